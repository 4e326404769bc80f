"""virtio-console (VIRTIO 1.2, 5.3): consoles and named byte streams ("ports") between guest and character devices.

    queue 0, 1          port 0: to the guest, from the guest
    queue 2, 3          control: to the guest, from the guest
    queue 4 + 2n, 5 + 2n  port n + 1

Control messages tell the guest which ports there are, which of them are consoles, what they are called, and whether somebody
is at the other end; the guest tells which ports it has open.

Layout of the config space: u16 cols, u16 rows (both 0: unknown), u32 max_nr_ports, u32 emerg_wr.
Layout of a control message: u32 port, u16 event, u16 value, and after PORT_NAME the name.

Nothing is lost and nothing piles up. To the guest: a character device is read only while the guest has the port open and
buffers in its queue; what a read brings beyond these, at most one read's worth, waits in `Port.pending`. From the guest: a
buffer goes to the character device piece by piece, and stays the device's until the last piece is taken.

Threads: queues, character devices and control on the main loop.
"""

from __future__ import annotations

import struct

from stratovirt.backends.chardev import OUTPUT_HIGH_WATER, OUTPUT_LIMIT, READ_SIZE
from stratovirt.errors import GuestError
from stratovirt.virtio.device import VirtioDevice
from stratovirt.virtio.queue import split

TYPE_CHECKING = False
if TYPE_CHECKING:
    from stratovirt.backends.chardev import CharDevice
    from stratovirt.snapshot.saved import Saved
    from stratovirt.virtio.queue import Chain, Virtqueue

F_SIZE, F_MULTIPORT = 0, 1
DEVICE_READY, PORT_ADD, PORT_REMOVE, PORT_READY, CONSOLE_PORT, RESIZE, PORT_OPEN, PORT_NAME = range(8)
CONTROL_RX, CONTROL_TX = 2, 3
DATA_QUEUE_SIZE, CONTROL_QUEUE_SIZE = 128, 32

_CONTROL = struct.Struct("<IHH")
_PIECE = OUTPUT_LIMIT - OUTPUT_HIGH_WATER  # what a character device takes whole whenever it says that it can write


class Port:
    """One port. `console`: it is a console and always connected; another port is so while its character device is."""

    __slots__ = ("chardev", "console", "name", "number", "open", "pending", "rx", "sending", "starved", "tx")

    def __init__(self, number: int, name: str, chardev: CharDevice, console: bool) -> None:
        self.number = number
        self.name = name
        self.chardev = chardev
        self.console = console
        self.rx = 2 * number + 2 if number else 0
        self.tx = self.rx + 1
        self.open = False  # by the guest
        self.starved = False  # the character device was told that there is no room, and waits to hear otherwise
        self.pending = bytearray()  # read from the host, not yet in a buffer of the guest
        self.sending: tuple[int, list[memoryview]] | None = None  # head and rest of a chain on its way to the host

    @property
    def connected(self) -> bool:
        return self.console or self.chardev.connected


class VirtioConsole(VirtioDevice):
    """The controller with its ports, at least a place for port 0."""

    device_id = 3
    name = "virtio-serial"

    def __init__(self, ports: list[Port]) -> None:
        super().__init__()
        self.features |= 1 << F_SIZE | 1 << F_MULTIPORT
        self._ports = {port.number: port for port in ports}
        self._by_queue = {queue: port for port in ports for queue in (port.rx, port.tx)}
        count = max(self._ports, default=0) + 1
        data, control = (DATA_QUEUE_SIZE,) * 2, (CONTROL_QUEUE_SIZE,) * 2
        self.queue_sizes = data + control + data * (count - 1)
        self.config = struct.pack("<HHII", 0, 0, count, 0)
        self._paused = False
        # By port and event, so that no guest makes it grow: a newer message replaces the one it contradicts.
        self._control: dict[tuple[int, int], bytes] = {}
        for port in ports:
            self._connect(port)

    def _connect(self, port: Port) -> None:
        chardev = port.chardev
        chardev.watch_connection(lambda connected: self._on_connection(port))
        chardev.set_receiver(lambda data: self._receive(port, data), lambda: self._can_receive(port),
                             lambda: self._requeue(port.tx))

    def _requeue(self, index: int) -> None:
        if self.transport is not None:
            self.transport.requeue(index)

    # -- life cycle

    def activate(self, queues: list[Virtqueue | None]) -> None:
        super().activate(queues)
        first = self._ports.get(0)
        if first is not None and not self.driver_features >> F_MULTIPORT & 1:
            self._set_open(first, True)  # such a driver knows one port, and no control messages

    def on_reset(self) -> None:
        self._control.clear()
        for port in self._ports.values():
            port.open = False
            port.sending = None

    def pause(self) -> None:
        with self._work:
            self._paused = True

    def resume(self) -> None:
        with self._work:
            self._paused = False
        for index in range(len(self.queue_sizes)):
            self._requeue(index)

    # -- snapshots

    def save(self) -> dict[str, object]:
        ports = [{
            "number": port.number, "open": port.open, "pending": bytes(port.pending).hex(),
            # of the buffer that is on its way to the host: how much the character device has not taken yet
            "unsent": sum(map(len, port.sending[1])) if port.sending is not None else 0,
        } for port in self._ports.values()]
        control = [{"port": number, "event": event, "message": message.hex()}
                   for (number, event), message in self._control.items()]
        return {"ports": ports, "control": control}

    def restore(self, state: Saved) -> None:
        """Who is at the other end may have changed: every port that is not a console says so anew."""
        saved = state.sections("ports")
        for section in saved:
            port = self._ports.get(section.integer("number", 0, 0xFFFF_FFFF))
            if port is None:
                raise section.error("number", "the machine has no such port")
            port.open = section.boolean("open")
            port.pending[:] = section.data("pending", limit=READ_SIZE)
            self._restore_unsent(port, section)
            section.end()
        if len(saved) != len(self._ports):
            raise state.error("ports", f"{len(saved)} of them, and the machine has {len(self._ports)}")
        for section in state.sections("control"):
            key = section.integer("port", 0, 0xFFFF_FFFF), section.integer("event", 0, PORT_NAME)
            self._control[key] = section.data("message", limit=_CONTROL.size + 256)
            section.end()
        if self.active and self.driver_features >> F_MULTIPORT & 1:
            for port in self._ports.values():
                if not port.console:
                    self._tell(port, PORT_OPEN, int(port.connected))

    def _restore_unsent(self, port: Port, section: Saved) -> None:
        unsent = section.integer("unsent", 0, 1 << 32)
        queue = self.queues[port.tx] if unsent and self.active else None
        if queue is None:
            return
        try:
            chain = queue.pop()
        except GuestError as error:
            raise section.error("unsent", str(error)) from error
        if chain is None or chain.readable_length < unsent:
            raise section.error("unsent", "the guest's queue has no such buffer")
        port.sending = (chain.head, split(chain.readable, chain.readable_length - unsent)[1])

    # -- from the host, on the loop

    def _can_receive(self, port: Port) -> int:
        with self._work:
            queue = self.queues[port.rx] if self.active and not self._paused else None
            if queue is not None and port.open and not port.pending and queue.enable_notifications():
                return READ_SIZE
            port.starved = True
            return 0

    def _receive(self, port: Port, data: bytes) -> None:
        port.pending += data
        self.process(port.rx)

    def _on_connection(self, port: Port) -> None:
        if port.console:
            return
        with self._work:
            if not self.active:
                return
            self._tell(port, PORT_OPEN, int(port.connected))
        self._requeue(CONTROL_RX)

    # -- queues

    def _drain(self, index: int, queue: Virtqueue) -> bool:
        if self._paused:
            return False
        if index == CONTROL_TX:
            return super()._drain(index, queue)
        if index == CONTROL_RX:
            return self._send_control(queue)
        port = self._by_queue.get(index)
        if port is None:
            return False  # a port number that nothing is attached to
        return self._to_guest(port, queue) if index == port.rx else self._to_host(port, queue)

    def _to_guest(self, port: Port, queue: Virtqueue) -> bool:
        """Put what is pending into the guest's buffers, and ask for more when there are buffers left."""
        if not port.open:
            return False
        for _ in range(queue.size):
            if not port.pending:
                if port.starved and queue.enable_notifications():
                    port.starved = False
                    port.chardev.resume_input()
                return False
            chain = queue.pop()
            if chain is not None:
                written = _scatter(port.pending, chain.writable)
                queue.push(chain.head, written)
                del port.pending[:written]
            elif not queue.enable_notifications():
                return False
        return True

    def _to_host(self, port: Port, queue: Virtqueue) -> bool:
        queue.disable_notifications()
        for _ in range(queue.size):
            if port.sending is None:
                chain = queue.pop()
                if chain is None:
                    if not queue.enable_notifications():
                        return False
                    continue
                port.sending = (chain.head, chain.readable)
            head, views = port.sending
            if not self._write(port.chardev, views):
                return False  # the character device calls when it can take more
            port.sending = None
            queue.push(head, 0)
        return True

    @staticmethod
    def _write(chardev: CharDevice, views: list[memoryview]) -> bool:
        """Hand over as much as the character device takes; what is left stays in `views`. True when nothing is."""
        while views:
            if not chardev.can_write:
                return False
            view = views[0]
            chardev.write(bytes(view[:_PIECE]))
            if len(view) > _PIECE:
                views[0] = view[_PIECE:]
            else:
                del views[0]
        return True

    # -- control

    def handle(self, index: int, queue: Virtqueue, chain: Chain) -> int:
        """A control message from the guest. Those that say nothing are passed over."""
        message = b"".join(map(bytes, split(chain.readable, _CONTROL.size)[0]))
        if len(message) < _CONTROL.size:
            return 0
        number, event, value = _CONTROL.unpack(message)
        if event == DEVICE_READY:
            if value:
                for port in self._ports.values():
                    self._tell(port, PORT_ADD, 1)
        else:
            known = self._ports.get(number)
            if known is None:
                return 0
            if event == PORT_READY and value:
                if known.console:
                    self._tell(known, CONSOLE_PORT, 1)
                self._tell(known, PORT_NAME, 1, known.name.encode() + b"\0")
                if known.connected:
                    self._tell(known, PORT_OPEN, 1)
            elif event == PORT_OPEN:
                self._set_open(known, value != 0)
        self._requeue(CONTROL_RX)
        return 0

    def _set_open(self, port: Port, is_open: bool) -> None:
        port.open = is_open
        if is_open:
            self._requeue(port.rx)

    def _tell(self, port: Port, event: int, value: int, more: bytes = b"") -> None:
        self._control.pop((port.number, event), None)
        self._control[port.number, event] = _CONTROL.pack(port.number, event, value) + more

    def _send_control(self, queue: Virtqueue) -> bool:
        for _ in range(queue.size):
            if not self._control:
                return False
            chain = queue.pop()
            if chain is not None:
                if chain.writable_length < _CONTROL.size:
                    queue.push(chain.head, 0)
                    raise GuestError(self.name, f"a control buffer of {chain.writable_length} bytes", "VIRTIO 1.2, 5.3.6.2")
                key = next(iter(self._control))
                queue.push(chain.head, _scatter(self._control.pop(key), chain.writable))
            elif not queue.enable_notifications():
                return False
        return True


def _scatter(data: bytes | bytearray, views: list[memoryview]) -> int:
    """Copy `data` into `views`, as much as fits; the number of bytes."""
    done = 0
    for view in views:
        piece = data[done : done + len(view)]
        view[: len(piece)] = piece
        done += len(piece)
        if done == len(data):
            break
    return done
