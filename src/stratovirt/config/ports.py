"""Which `-device virtconsole` and `-device virtserialport` is which port of the one virtio-serial controller.

Ports come from anywhere on the command line, before or after their controller. Port 0 is for a console.
"""

from __future__ import annotations

from stratovirt.errors import ConfigError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from stratovirt.config.vm import DeviceConfig

CONTROLLER = "virtio-serial-device"
CONSOLE, PORT = "virtconsole", "virtserialport"
DRIVERS = frozenset((CONSOLE, PORT))


def number_ports(devices: list[DeviceConfig]) -> dict[int, DeviceConfig]:
    """The ports among `devices` by number: those that say theirs, then the others, each at the lowest that is free.

    Raises: ConfigError without a controller, with two, and for a number that cannot be.
    """
    controllers = [device for device in devices if device.driver == CONTROLLER]
    ports = [device for device in devices if device.driver in DRIVERS]
    if len(controllers) > 1:
        raise ConfigError("there is a controller already", option=f"-device {CONTROLLER}", value=f"id={controllers[1].id}",
                          accepted="one for a machine")
    if not ports:
        return {}
    if not controllers:
        raise ConfigError(f"there is no {CONTROLLER}", option=f"-device {ports[0].driver}", value=f"id={ports[0].id}",
                          accepted=f"-device {CONTROLLER},id=ID before or after it")
    limit = controllers[0].options.integer("max-ports")
    numbered: dict[int, DeviceConfig] = {}
    for port in ports:
        number = port.options.optional_integer("nr")
        if number is None:
            continue
        if number in numbered:
            raise ConfigError(f"the port is taken by {numbered[number].id}", option=f"-device {port.driver},nr",
                              value=str(number), accepted="a number of its own for each port")
        if number >= limit:
            raise ConfigError(f"the controller has {limit} ports", option=f"-device {port.driver},nr", value=str(number),
                              accepted=f"a number below max-ports={limit}")
        numbered[number] = port
    for port in ports:
        if port.options.optional_integer("nr") is not None:
            continue
        free = [number for number in range(int(port.driver == PORT), limit) if number not in numbered]
        if not free:
            raise ConfigError(f"the controller's {limit} ports are taken", option=f"-device {port.driver}",
                              value=f"id={port.id}", accepted="fewer ports, or a larger max-ports (at most 31)")
        numbered[free[0]] = port
    return dict(sorted(numbered.items()))
