"""The text protocol: one command a line, one reply to each.

    readb|readw|readl|readq A            OK 0x…     1, 2, 4, 8 bytes at a guest-physical address, RAM or registers
    writeb|writew|writel|writeq A V      OK
    read A N, write A N 0x…              OK 0x…, OK     bytes in memory order
    memset A N 0x…                       OK         a pattern again and again
    inb|inw|inl P, outb|outw|outl P V    OK 0x…, OK     x86 ports
    clock_step [NS], clock_set NS        OK NS      move the virtual clock; without NS to the next timer of any device
    query_msix ADDRESS DATA              OK FALSE   no device of a microVM sends messages
    query_intx IRQ, eoi_intx IRQ         OK TRUE|FALSE     is the line raised; lower it

Numbers are hexadecimal, with 0x before them or not; those of the clock and of interrupts are decimal. Anything else is
answered with `ERR` and a reason, and changes nothing.

An access behaves as a vCPU's: it is cut where a page ends, RAM is RAM, and a piece of it that no device claims as a whole
reads as all ones and writes nowhere. A run of bytes reaches registers as aligned 4-byte words, and as bytes at its ends.
"""

from __future__ import annotations

from stratovirt.errors import GuestError, StateError
from stratovirt.hostmap import PAGE_SIZE
from stratovirt.hypervisor.test_accel.clock import LATEST

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from stratovirt.address_map import AddressMap
    from stratovirt.hypervisor.test_accel.clock import VirtualClock
    from stratovirt.hypervisor.test_accel.lines import InterruptLines
    from stratovirt.memory import GuestMemory

MAX_BYTES = 1 << 20  # of one read, write or memset; a memset of RAM may be larger
MAX_LINE = 2 * MAX_BYTES + 64
_ADDRESSES = 1 << 64
_PORTS = 1 << 16
_SIZES = {"b": 1, "w": 2, "l": 4, "q": 8}
_FILL_SIZE = 1 << 16


class Malformed(Exception):
    """A command that is not one; the text is the reason."""


def _hexadecimal(text: str, limit: int) -> int:
    """Raises: Malformed, also for what is not below `limit`."""
    digits = text[2:] if text[:2] in ("0x", "0X") else text
    if not digits or digits.strip("0123456789abcdefABCDEF"):
        raise Malformed("not a hexadecimal number")
    if len(digits.lstrip("0")) > 16 or int(digits, 16) >= limit:
        raise Malformed("a number is too large")
    return int(digits, 16)


def _bytes(text: str) -> bytes:
    digits = text[2:] if text[:2] in ("0x", "0X") else text
    if not digits or digits.strip("0123456789abcdefABCDEF"):
        raise Malformed("not hexadecimal bytes")
    return bytes.fromhex("0" * (len(digits) & 1) + digits)


def _decimal(text: str, limit: int) -> int:
    if not text.isdigit():
        raise Malformed("not a decimal number")
    if len(text.lstrip("0")) > 20 or int(text) >= limit:
        raise Malformed("a number is too large")
    return int(text)


def _answer(truth: bool) -> str:
    return "OK TRUE" if truth else "OK FALSE"


def _pages(address: int, length: int) -> Iterator[tuple[int, int]]:
    """[address, address + length) cut where pages end: (address, length) of each part."""
    while length:
        size = min(length, PAGE_SIZE - address % PAGE_SIZE)
        yield address, size
        address, length = address + size, length - size


def _words(address: int, length: int) -> Iterator[tuple[int, int]]:
    """The same cut into aligned words of 4 bytes, and single bytes at the ends."""
    while length:
        size = 4 if address % 4 == 0 and length >= 4 else 1
        yield address, size
        address, length = address + size, length - size


class Bus:
    """Memory and registers as a vCPU's loads and stores reach them."""

    def __init__(self, memory: GuestMemory, mmio: AddressMap) -> None:
        self._memory = memory
        self._mmio = mmio

    def _ram(self, address: int, length: int) -> memoryview | None:
        try:
            return self._memory.slice(address, length)
        except GuestError:
            return None

    def read(self, address: int, length: int, one_access: bool) -> bytes:
        """`one_access`: a load of a processor, which registers see as it is, and not as a run of words."""
        found = bytearray()
        for start, size in _pages(address, length):
            ram = self._ram(start, size)
            if ram is not None:
                found += ram
                continue
            for at, width in [(start, size)] if one_access else _words(start, size):
                found += self._mmio.read(at, width).to_bytes(width, "little")
        return bytes(found)

    def write(self, address: int, data: bytes, one_access: bool) -> None:
        for start, size in _pages(address, len(data)):
            part = data[start - address : start - address + size]
            ram = self._ram(start, size)
            if ram is not None:
                ram[:] = part
                continue
            for at, width in [(start, size)] if one_access else _words(start, size):
                self._mmio.write(at, width, int.from_bytes(part[at - start : at - start + width], "little"))

    def is_ram(self, address: int, length: int) -> bool:
        return self._ram(address, length) is not None


class Commands:
    """Carries out one line at a time. Thread: the main loop's; devices are called on it as on a vCPU's."""

    def __init__(self, bus: Bus, ports: AddressMap, clock: VirtualClock, lines: InterruptLines) -> None:
        self._bus = bus
        self._ports = ports
        self._clock = clock
        self._lines = lines
        self._table: dict[str, tuple[tuple[int, ...], Callable[[list[str]], str]]] = {
            "read": ((2,), self._read), "write": ((3,), self._write), "memset": ((3,), self._memset),
            "clock_step": ((0, 1), self._clock_step), "clock_set": ((1,), self._clock_set),
            "query_msix": ((2,), self._query_msix), "query_intx": ((1,), self._query_intx),
            "eoi_intx": ((1,), self._eoi_intx),
        }
        for letter, size in _SIZES.items():
            self._table["read" + letter] = ((1,), lambda words, size=size: self._load(words, size))  # type: ignore[misc]
            self._table["write" + letter] = ((2,), lambda words, size=size: self._store(words, size))  # type: ignore[misc]
            if size <= 4:
                self._table["in" + letter] = ((1,), lambda words, size=size: self._in(words, size))  # type: ignore[misc]
                self._table["out" + letter] = ((2,), lambda words, size=size: self._out(words, size))  # type: ignore[misc]

    def execute(self, line: bytes) -> str:
        """The reply to `line`, both without their ends of line."""
        try:
            if not line.isascii():
                raise Malformed("not ASCII text")
            words = line.decode().split()
            if not words:
                raise Malformed("no command")
            entry = self._table.get(words[0])
            if entry is None:
                raise Malformed("no such command")
            counts, function = entry
            if len(words) - 1 not in counts:
                raise Malformed(f"{words[0]} takes {' or '.join(map(str, counts))} arguments")
            return function(words[1:])
        except (Malformed, StateError) as error:
            return f"ERR {error}"

    # -- memory and registers

    def _load(self, words: list[str], size: int) -> str:
        address = self._address(words[0], size)
        return f"OK 0x{int.from_bytes(self._bus.read(address, size, one_access=True), 'little'):016x}"

    def _store(self, words: list[str], size: int) -> str:
        address = self._address(words[0], size)
        value = _hexadecimal(words[1], 1 << 8 * size)
        self._bus.write(address, value.to_bytes(size, "little"), one_access=True)
        return "OK"

    def _read(self, words: list[str]) -> str:
        length = self._length(words[1], MAX_BYTES)
        return f"OK 0x{self._bus.read(self._address(words[0], length), length, one_access=False).hex()}"

    def _write(self, words: list[str]) -> str:
        length = self._length(words[1], MAX_BYTES)
        address = self._address(words[0], length)
        data = _bytes(words[2])
        if len(data) != length:
            raise Malformed(f"{len(data)} bytes of data, not {length}")
        self._bus.write(address, data, one_access=False)
        return "OK"

    def _memset(self, words: list[str]) -> str:
        length = self._length(words[1], _ADDRESSES)
        address = self._address(words[0], length)
        if length > MAX_BYTES and not self._bus.is_ram(address, length):
            raise Malformed(f"more than {MAX_BYTES} bytes that are not all RAM")
        pattern = _bytes(words[2])
        block = pattern * -(-_FILL_SIZE // len(pattern))  # whole patterns
        for done in range(0, length, len(block)):
            self._bus.write(address + done, block[: length - done], one_access=False)
        return "OK"

    @staticmethod
    def _length(text: str, limit: int) -> int:
        length = _hexadecimal(text, limit + 1)
        if not length:
            raise Malformed("a length is at least 1")
        return length

    @staticmethod
    def _address(text: str, length: int) -> int:
        address = _hexadecimal(text, _ADDRESSES)
        if address + length > _ADDRESSES:
            raise Malformed("beyond the last address")
        return address

    # -- ports

    def _in(self, words: list[str], size: int) -> str:
        return f"OK 0x{self._ports.read(_hexadecimal(words[0], _PORTS), size):016x}"

    def _out(self, words: list[str], size: int) -> str:
        port, value = _hexadecimal(words[0], _PORTS), _hexadecimal(words[1], 1 << 8 * size)
        self._ports.write(port, size, value)
        return "OK"

    # -- time

    def _clock_step(self, words: list[str]) -> str:
        clock = self._clock
        if words:
            return self._advance(clock.ns + _decimal(words[0], LATEST + 1))
        deadline = clock.next_deadline()
        return self._advance(clock.ns if deadline is None else max(clock.ns, deadline))

    def _clock_set(self, words: list[str]) -> str:
        target = _decimal(words[0], LATEST + 1)
        if target < self._clock.ns:
            raise Malformed("the clock does not go back")
        return self._advance(target)

    def _advance(self, target: int) -> str:
        if target > LATEST:
            raise Malformed("the clock ends before that")
        self._clock.advance(target)
        return f"OK {self._clock.ns}"

    # -- interrupts

    def _query_msix(self, words: list[str]) -> str:
        for word in words:
            _decimal(word, _ADDRESSES)
        return _answer(False)

    def _query_intx(self, words: list[str]) -> str:
        return _answer(self._lines.is_raised(_decimal(words[0], _ADDRESSES)))

    def _eoi_intx(self, words: list[str]) -> str:
        return _answer(self._lines.lower(_decimal(words[0], _ADDRESSES)))
