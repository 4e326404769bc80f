"""A guest that does nothing but read its disk: batches of requests, a notification each, until all have come back.

32-bit code, as a PVH kernel is entered, of the few instructions that a KVM without hardware virtualization emulates. The
descriptors, the rings and the requests lie ready in the file. It writes a letter to the serial port before the first batch
and one after the last, waits for a byte from there, and ends as `tiny_guest` does. It does not wait for interrupts; the
monitor raises them all the same.
"""

from __future__ import annotations

import struct

from benches.tiny_guest import EXIT_PORT

BEGIN, END = b"B", b"E"
_CODE_AT, _RINGS_AT, _HEADERS_AT, _DATA_AT = 0x10_0000, 0x20_0000, 0x21_0000, 0x30_0000
_QUEUE_SIZE = 128
# Behind the address of rings: descriptors, 1000 on the available ring, 2000 on the used ring.
_NET_RINGS_AT, _FRAME_AT = 0x22_0000, 0x23_0000
_NET_SEND, _NET_HEADER, _FRAME = 1, 12, 1514
_NEXT, _WRITE = 1, 2
_SERIAL = 0x3F8
_EXIT_VALUE = 0x15

# Offsets of virtio-mmio, version 2.
_DRIVER_FEATURES, _DRIVER_FEATURES_SEL, _QUEUE_SEL, _QUEUE_NUM, _QUEUE_READY = 0x020, 0x024, 0x030, 0x038, 0x044
_QUEUE_NOTIFY, _STATUS, _QUEUE_DESC, _QUEUE_DRIVER, _QUEUE_DEVICE = 0x050, 0x070, 0x080, 0x090, 0x0A0


def image(window: int, batch: int, size: int, rounds: int, apart: bool) -> bytes:
    """The file: `rounds` batches of `batch` reads of `size` bytes each, from the disk whose registers are at `window`.

    They lie at the start of the disk: one after the other, or `apart`, with as much between any two, and out of order. A
    monitor can make one transfer of neighbours (QEMU sorts a batch for it), and none of those.
    """
    return _file(_code(window, batch, rounds), ((_RINGS_AT, _rings(batch, size)), (_HEADERS_AT, _headers(batch, size, apart))))


def with_network(disk: int, network: int, batch: int, size: int, rounds: int) -> bytes:
    """A guest that after each batch of reads sends as many frames as it has read, through the interface at `network`."""
    rings = ((_RINGS_AT, _rings(batch, size)), (_HEADERS_AT, _headers(batch, size, True)), (_NET_RINGS_AT, _frame_rings(batch)),
             (_FRAME_AT, bytes(_NET_HEADER) + b"\xff" * 6 + bytes((0x52, 0x54, 0, 0, 0, 1)) + b"\x88\xb5" + bytes(_FRAME - 14)))
    return _file(_code(disk, batch, rounds, network), rings)


def _file(code: bytes, content: tuple[tuple[int, bytes], ...]) -> bytes:
    note = struct.pack("<III4sI", 4, 4, 18, b"Xen\0", _CODE_AT)
    segments = ((_CODE_AT, code), *content)
    offset = 0x1000
    headers = struct.pack("<IIQQQQQQ", 4, 4, 0x800, 0, 0, len(note), len(note), 4)
    body = b""
    for address, data in segments:
        headers += struct.pack("<IIQQQQQQ", 1, 7, offset + len(body), address, address, len(data), len(data), 0x1000)
        body += data + bytes(-len(data) % 0x1000)
    head = struct.pack("<16sHHIQQQIHHHHHH", b"\x7fELF\x02\x01\x01", 2, 62, 1, _CODE_AT, 64, 0, 0, 64, 56, 1 + len(segments),
                       0, 0, 0)
    return (head + headers).ljust(0x800, b"\0") + note.ljust(0x800, b"\0") + body


def _code(window: int, batch: int, rounds: int, network: int = 0) -> bytes:
    def store(address: int, value: int) -> bytes:
        return b"\xc7\x05" + struct.pack("<II", address, value)  # mov dword [address], value

    def letter(value: bytes) -> bytes:
        return b"\x66\xba" + struct.pack("<H", _SERIAL) + b"\xb0" + value + b"\xee"  # mov dx, port; mov al, value; out dx, al

    def set_up(window: int, queue: int, rings: int) -> bytes:
        def register(offset: int, value: int) -> bytes:
            return store(window + offset, value)

        code = register(_STATUS, 0) + register(_STATUS, 1) + register(_STATUS, 3)
        for half, features in ((0, 0), (1, 1)):  # VERSION_1 alone
            code += register(_DRIVER_FEATURES_SEL, half) + register(_DRIVER_FEATURES, features)
        code += register(_STATUS, 11) + register(_QUEUE_SEL, queue) + register(_QUEUE_NUM, _QUEUE_SIZE)
        for offset, address in ((_QUEUE_DESC, rings), (_QUEUE_DRIVER, rings + 0x1000), (_QUEUE_DEVICE, rings + 0x2000)):
            code += register(offset, address) + register(offset + 4, 0)
        return code + register(_QUEUE_READY, 1) + register(_STATUS, 15)

    def offer(window: int, queue: int, rings: int) -> bytes:
        """Offer what the rings have up to bx, and wait for it."""
        loop = b"\x66\x89\x1d" + struct.pack("<I", rings + 0x1002)  # mov [avail.idx], bx
        loop += store(window + _QUEUE_NOTIFY, queue)
        # spin: mov ax, [used.idx]; cmp ax, bx; jne spin
        return loop + b"\x66\xa1" + struct.pack("<I", rings + 0x2002) + b"\x66\x39\xd8\x75\xf5"

    code = set_up(window, 0, _RINGS_AT) + (set_up(network, _NET_SEND, _NET_RINGS_AT) if network else b"") + letter(BEGIN)
    code += b"\xb9" + struct.pack("<I", rounds) + b"\xbb" + bytes(4)  # mov ecx, rounds; mov ebx, 0
    loop = b"\x83\xc3" + bytes([batch])  # add ebx, batch
    loop += offer(window, 0, _RINGS_AT) + (offer(network, _NET_SEND, _NET_RINGS_AT) if network else b"")
    loop += b"\x49"  # dec ecx
    code += loop + b"\x0f\x85" + struct.pack("<i", -(len(loop) + 6))  # jnz loop
    # wait for a byte: mov dx, line status; in al, dx; test al, 1; jz in
    code += letter(END) + b"\x66\xba" + struct.pack("<H", _SERIAL + 5) + b"\xec\xa8\x01\x74\xfb"
    code += b"\xb0" + bytes([_EXIT_VALUE]) + b"\xe6" + bytes([EXIT_PORT])
    return code + b"\xb0\xfe\xe6\x64\xf4\xeb\xfd"  # reset through the keyboard controller; hlt, for ever


def _rings(batch: int, size: int) -> bytes:
    """Descriptors: header, data, status of each request. The available ring names their heads, again and again."""
    table = b""
    for number in range(batch):
        header, data = _HEADERS_AT + 64 * number, _DATA_AT + size * number
        table += struct.pack("<QIHH", header, 16, _NEXT, 3 * number + 1)
        table += struct.pack("<QIHH", data, size, _NEXT | _WRITE, 3 * number + 2)
        table += struct.pack("<QIHH", header + 32, 1, _WRITE, 0)
    available = struct.pack("<HH", 0, 0) + b"".join(struct.pack("<H", 3 * (entry % batch)) for entry in range(_QUEUE_SIZE))
    return table.ljust(0x1000, b"\0") + available.ljust(0x1000, b"\0") + bytes(0x1000)


def _frame_rings(batch: int) -> bytes:
    """The same frame in every descriptor, and its header before it."""
    table = struct.pack("<QIHH", _FRAME_AT, _NET_HEADER + _FRAME, 0, 0) * batch
    available = struct.pack("<HH", 0, 0) + b"".join(struct.pack("<H", entry % batch) for entry in range(_QUEUE_SIZE))
    return table.ljust(0x1000, b"\0") + available.ljust(0x1000, b"\0") + bytes(0x1000)


def _headers(batch: int, size: int, apart: bool) -> bytes:
    sectors = size // 512
    # 7 is prime to every number of requests in use
    places = [2 * sectors * (number * 7 % batch) if apart else sectors * number for number in range(batch)]
    return b"".join(struct.pack("<IIQ", 0, 0, place).ljust(32, b"\0") + b"\xff".ljust(32, b"\0") for place in places)
