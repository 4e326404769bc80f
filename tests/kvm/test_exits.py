"""What a guest's accesses do, from a real vCPU to the device and back."""

from __future__ import annotations

from kvm.guests import DATA, Asm, hello
from unit.images import Load


def test_a_guest_says_hello_and_switches_itself_off(launch) -> None:
    assert launch(hello()).finish()[:2] == (0, "hello\n")


def test_ports_nobody_owns_read_as_all_ones(machine) -> None:
    asm = Asm()
    for number, (port, size) in enumerate(((0x80, 1), (0x80, 2), (0x80, 4), (0x1F7, 1), (0xFFFF, 1), (0xCFC, 4), (0x3FF, 2))):
        asm.mov(0, 0x5A5A_5A5A).in_eax(port, size).store_eax(DATA + 4 * number)
    vm = machine(asm.power_off().kernel()).run()
    assert [vm.word(DATA + 4 * number) for number in range(7)] == [
        0x5A5A_5AFF, 0x5A5A_FFFF, 0xFFFF_FFFF, 0x5A5A_5AFF, 0x5A5A_5AFF, 0xFFFF_FFFF, 0x5A5A_FFFF]
    assert vm.told == [("SHUTDOWN", {"guest": True, "reason": "guest-shutdown"})]


class Recorder:
    """A device that writes down what reaches it."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, int, int, int]] = []

    def read(self, offset: int, size: int) -> int:
        self.seen.append(("read", offset, size, 0))
        return 0x8877_6655_4433_2211 & (1 << 8 * size) - 1

    def write(self, offset: int, size: int, value: int) -> None:
        self.seen.append(("write", offset, size, value))


def test_widths_and_values_arrive_unchanged(machine) -> None:
    asm = Asm()
    for size in (1, 2, 4):
        asm.out(0x504, 0xDDCC_BBAA, size)
        asm.mov(0, 0).in_eax(0x500 + size, size).store_eax(DATA + size)
        asm.mov(0, 0xDDCC_BBAA).store_eax(0xE000_0010, size)
        asm.mov(0, 0).load_eax(0xE000_0020 + size, size).store_eax(DATA + 0x10 + size)
    vm = machine(asm.power_off().kernel())
    ports, mmio = Recorder(), Recorder()
    vm.vm.ports.claim(0x500, 0x10, ports)
    vm.vm.mmio.claim(0xE000_0000, 0x1000, mmio)
    vm.run()
    values = {1: 0xAA, 2: 0xBBAA, 4: 0xDDCC_BBAA}
    assert ports.seen == [entry for size in (1, 2, 4) for entry in (("write", 4, size, values[size]), ("read", size, size, 0))]
    assert mmio.seen == [entry for size in (1, 2, 4)
                         for entry in (("write", 0x10, size, values[size]), ("read", 0x20 + size, size, 0))]


def test_string_output_arrives_byte_by_byte(launch) -> None:
    asm = Asm()
    asm.mov(6, DATA).mov(1, 6).mov(2, 0x3F8).raw(0xFC, 0xF3, 0x6E)  # cld; rep outsb
    image = asm.power_off().kernel(Load(b"string", DATA))
    assert launch(image).finish()[:2] == (0, "string")


def test_string_input_fills_memory(machine) -> None:
    asm = Asm().mov(7, DATA).mov(1, 5).mov(2, 0x510).raw(0xFC, 0xF3, 0x6D)  # rep insd
    vm = machine(asm.power_off().kernel())
    recorder = Recorder()
    vm.vm.ports.claim(0x510, 4, recorder)
    vm.run()
    assert vm.memory.read(DATA, 24) == bytes.fromhex("11223344") * 5 + bytes(4)
    assert recorder.seen == [("read", 0, 4, 0)] * 5


def test_mmio_nobody_owns_reads_as_all_ones(machine) -> None:
    asm = Asm().load_eax(0xD000_0000).store_eax(DATA).store(0xD000_0000, 1).mov(0, 0).load_eax(0xF010_01FE, 4)
    vm = machine(asm.store_eax(DATA + 4).power_off().kernel()).run()
    assert [vm.word(DATA), vm.word(DATA + 4)] == [0xFFFF_FFFF, 0xFFFF_FFFF]


def test_the_guest_knows_how_it_was_entered(machine) -> None:
    """EBX holds the start information of the PVH protocol, which names the memory of the machine."""
    asm = Asm().raw(b"\x89\x1d", DATA.to_bytes(4, "little"))  # mov [DATA], ebx
    asm.raw(b"\x8b\x03").store_eax(DATA + 4)  # mov eax, [ebx]
    vm = machine(asm.power_off().kernel()).run()
    assert (vm.word(DATA), vm.word(DATA + 4)) == (0x6000, 0x336E_C578)
