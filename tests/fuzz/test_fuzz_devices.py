"""Registers of the legacy devices in any order, with input arriving in between."""

from __future__ import annotations

import random

from fuzz.fuzzing import fuzz
from stratovirt.address_map import AddressMap
from stratovirt.devices.cmos_rtc import CmosRtc
from stratovirt.devices.i8042 import COMMAND_PULSE_RESET, I8042
from stratovirt.devices.serial import RECEIVE_BUFFER_SIZE, Serial
from stratovirt.devices.sleep_control import SleepControl
from stratovirt.snapshot.saved import Saved
from unit.virtio_driver import Line


class Terminal:
    """A character device that takes output now and then, and sends as much as it may."""

    def __init__(self, generator: random.Random) -> None:
        self.generator = generator
        self.can_write = True
        self.sent = bytearray()

    def write(self, data: bytes) -> None:
        self.sent += data
        self.can_write = self.generator.random() < 0.8

    def set_receiver(self, receive, can_receive, writable=None) -> None:
        self.receive, self.can_receive, self.writable = receive, can_receive, writable

    def resume_input(self) -> None: ...

    def act(self) -> None:
        room = self.can_receive()
        assert 0 <= room <= RECEIVE_BUFFER_SIZE
        if room:
            self.receive(self.generator.randbytes(self.generator.randint(1, room)))
        if not self.can_write:
            self.can_write = True
            self.writable()


def test_legacy_devices_on_their_ports() -> None:
    def one(generator: random.Random) -> None:
        terminal = Terminal(generator)
        calls: list[str] = []
        port = Serial(Line(), terminal, lambda value: None)
        bus = AddressMap()
        bus.claim(0x3F8, 8, port)
        bus.claim(0x70, 2, CmosRtc(lambda: generator.random() * 4e9))
        bus.claim(0x60, 1, I8042(False, lambda: calls.append("never")))
        bus.claim(0x64, 1, I8042(True, lambda: calls.append("reset")))
        bus.claim(0xCE9, 2, SleepControl(lambda: calls.append("off")))
        expected: list[str] = []
        for _ in range(500):
            address = generator.choice((0x60, 0x64, 0x70, 0x71, 0xCE9, 0xCEA, *range(0x3F6, 0x402)))
            size = generator.choice((1, 1, 1, 2, 4))
            if generator.random() < 0.5:
                assert 0 <= bus.read(address, size) < 1 << 8 * size
            else:
                value = generator.choice((generator.getrandbits(8 * size), 0xFE, 0x34))
                if address == 0x64 and size == 1 and value == COMMAND_PULSE_RESET:
                    expected.append("reset")
                if address == 0xCE9 and size < 4 and value & 0x20 and value >> 2 & 7 == 5:
                    expected.append("off")
                bus.write(address, size, value)
            if generator.random() < 0.1:
                terminal.act()
        assert calls == expected
        state = port.save()
        port.restore(Saved(state))
        assert port.save() == state
        port.reset()
        port.write(3, 1, 0x03)
        port.write(0, 1, ord("!"))
        assert terminal.sent[-1:] == b"!"

    fuzz(one, 300)
