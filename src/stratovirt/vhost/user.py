"""vhost-user: a device's rings are served by another process, which maps guest RAM and is told about rings over a socket.

Layout of a message, all in the machine's byte order:
    u32 request, u32 flags, u32 size, then `size` bytes; descriptors travel beside it (SCM_RIGHTS)

The back end is not trusted: it has all of guest RAM, and nothing of this process. Every answer has a deadline and is checked:
version, request, size, range. Whatever is wrong with one, the connection is closed, because nobody knows any longer what is a
reply to what. Descriptors that it sends are not taken.

The addresses in the memory table and in those of rings are only names that both sides agree on. So they are guest-physical
addresses at an offset, and tell nothing of where this process has its memory.
"""

from __future__ import annotations

import _socket
import os
import select
import struct
import time

from stratovirt.errors import HostError
from stratovirt.vhost import _user as proto

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping

    from stratovirt.memory import GuestMemory
    from stratovirt.vhost.net import Ring

# Seconds for all the messages of one step together. A vCPU may wait for them, or the main loop.
HANDSHAKE_SECONDS = 5.0
START_SECONDS = 3.0
STOP_SECONDS = 5.0  # requests in flight end first
STATE_SECONDS = 10.0  # a back end writes or reads all that it keeps for its device

_HEADER = struct.Struct("=III")
_U64 = struct.Struct("=Q")
_STATE = struct.Struct("=II")  # struct vhost_vring_state { u32 index, num; }
_CONFIG = struct.Struct("=III")  # u32 offset, size, flags; then the bytes
_SAVE, _LOAD, _STOPPED = 0, 1, 0  # u32 direction, phase of SET_DEVICE_STATE_FD
_NO_DESCRIPTOR = 1 << 8  # its answer: the one that came is used; in the lowest byte 0 for yes
_ADDRESS_OFFSET = 1 << 40
_MAX_REGIONS = 8
_EAGAIN = 11


class BackendError(HostError):
    """The back end is not there, does not answer, or answers what it must not: its connection is of no use any more."""


class VhostUser:
    """One connection, from the handshake on. `features` and `protocol` are what the back end can do, `queues` its queues or
    pairs of them.

    `name` is for messages. Raises: BackendError from everything that speaks. Thread: one at a time.
    """

    __slots__ = ("_memory", "_socket", "_until", "features", "name", "protocol", "queues")

    def __init__(self, socket: _socket.socket, name: str, memory: GuestMemory, protocol: int) -> None:
        """The handshake. `socket` does not block; `protocol`: features of it to use if they are there."""
        self._socket = socket
        self._memory = memory
        self._until = time.monotonic() + HANDSHAKE_SECONDS
        self.name = name
        self.protocol = 0
        self.queues = 1
        try:
            self.features = self._get_u64(proto.GET_FEATURES)
            if self.features >> proto.F_PROTOCOL_FEATURES & 1:
                offered = self._get_u64(proto.GET_PROTOCOL_FEATURES)
                chosen = offered & (protocol | 1 << proto.P_REPLY_ACK)
                self._set(proto.SET_PROTOCOL_FEATURES, _U64.pack(chosen))
                self.protocol = chosen
                if chosen >> proto.P_MQ & 1:
                    self.queues = self._get_u64(proto.GET_QUEUE_NUM)
            self._set(proto.SET_OWNER)
        except BackendError:
            self.close()
            raise

    @property
    def fd(self) -> int:
        return self._socket.fileno()

    def read_config(self, size: int) -> bytes:
        """The first `size` bytes of the device's config space, which only P_CONFIG has."""
        self._until = time.monotonic() + START_SECONDS
        reply = self._get(proto.GET_CONFIG, _CONFIG.pack(0, size, 0) + bytes(size), _CONFIG.size + size)
        if _CONFIG.unpack_from(reply)[:2] != (0, size):
            raise self._wrong(proto.GET_CONFIG, "another part of the config space than the one asked for")
        return reply[_CONFIG.size :]

    # -- rings

    def start(self, features: int, rings: Mapping[int, Ring], kick_fds: list[int], call_fd: int, error_fd: int) -> None:
        """Let it have `rings`, by index, from where they stand: it serves those that are enabled then. `features` are the
        driver's choice.
        """
        self._until = time.monotonic() + START_SECONDS
        self._set(proto.SET_FEATURES, _U64.pack(features & self.features | self.features & 1 << proto.F_PROTOCOL_FEATURES))
        self._set_memory()
        for index, ring in rings.items():
            self._set(proto.SET_VRING_NUM, _STATE.pack(index, ring.size))
            self._set(proto.SET_VRING_BASE, _STATE.pack(index, ring.position))
            # struct vhost_vring_addr { u32 index, flags; u64 desc_user_addr, used_user_addr, avail_user_addr, log_guest_addr; }
            self._set(proto.SET_VRING_ADDR, struct.pack(
                "=IIQQQQ", index, 0, ring.descriptor_table + _ADDRESS_OFFSET, ring.used_ring + _ADDRESS_OFFSET,
                ring.avail_ring + _ADDRESS_OFFSET, 0))
            self._set(proto.SET_VRING_ERR, _U64.pack(index), (error_fd,))
            self._set(proto.SET_VRING_CALL, _U64.pack(index), (call_fd,))
            self._set(proto.SET_VRING_KICK, _U64.pack(index), (kick_fds[index],))

    def enable(self, index: int, enabled: bool) -> None:
        """A ring that is not enabled is not worked on. Without protocol features there is no such thing."""
        self._until = time.monotonic() + START_SECONDS
        if self.features >> proto.F_PROTOCOL_FEATURES & 1:
            self._set(proto.SET_VRING_ENABLE, _STATE.pack(index, int(enabled)))

    def stop(self, indices: list[int]) -> dict[int, int]:
        """The positions at which the rings stand. When this returns the back end touches none of them, nor any buffer."""
        self._until = time.monotonic() + STOP_SECONDS
        positions: dict[int, int] = {}
        for index in indices:
            number, base = _STATE.unpack(self._get(proto.GET_VRING_BASE, _STATE.pack(index, 0), _STATE.size))
            if number != index or base > 0xFFFF:
                raise self._wrong(proto.GET_VRING_BASE, f"ring {number}, position {base}")
            positions[index] = base
        return positions

    # -- what the back end keeps for itself, which only P_DEVICE_STATE shows, while no ring runs

    def save_state(self, fd: int) -> None:
        """Have it written to the file `fd`."""
        self._move_state(_SAVE, fd)

    def load_state(self, fd: int) -> None:
        """Have it read from the file `fd`, from its position to its end."""
        self._move_state(_LOAD, fd)

    def _move_state(self, direction: int, fd: int) -> None:
        self._until = time.monotonic() + STATE_SECONDS
        self._send(proto.SET_DEVICE_STATE_FD, 0, _STATE.pack(direction, _STOPPED), (fd,))
        answer = int(_U64.unpack(self._reply(proto.SET_DEVICE_STATE_FD, _U64.size))[0])
        if answer != _NO_DESCRIPTOR:
            what = f"error {answer & 0xFF}" if answer & 0xFF else "a descriptor of its own"
            raise self._wrong(proto.SET_DEVICE_STATE_FD, what)
        result = self._get_u64(proto.CHECK_DEVICE_STATE)
        if result:
            verb = "read" if direction == _LOAD else "write"
            raise self._wrong(proto.CHECK_DEVICE_STATE, f"error {result}: it cannot {verb} its state")

    def _set_memory(self) -> None:
        """Tell all of guest RAM.

        Layout: u32 count, u32 padding, then for each region: u64 guest_phys_addr, memory_size, userspace_addr, mmap_offset.
        """
        regions = self._memory.regions[:_MAX_REGIONS]
        table = struct.pack("=II", len(regions), 0) + b"".join(
            struct.pack("=QQQQ", region.base, region.size, region.base + _ADDRESS_OFFSET, region.fd_offset)
            for region in regions)
        self._set(proto.SET_MEM_TABLE, table, tuple(region.fd for region in regions))

    # -- messages

    def _get_u64(self, request: int) -> int:
        return int(_U64.unpack(self._get(request, b"", _U64.size))[0])

    def _get(self, request: int, payload: bytes, expected: int) -> bytes:
        """A request that has an answer, of `expected` bytes."""
        self._send(request, 0, payload)
        return self._reply(request, expected)

    def _set(self, request: int, payload: bytes = b"", fds: tuple[int, ...] = ()) -> None:
        """A request without an answer of its own: with P_REPLY_ACK it says whether it was carried out."""
        acknowledged = self.protocol >> proto.P_REPLY_ACK & 1
        self._send(request, proto.NEED_REPLY if acknowledged else 0, payload, fds)
        if acknowledged and _U64.unpack(self._reply(request, _U64.size))[0]:
            raise BackendError(f"{self.name} refuses {proto.NAMES[request]}")

    def _send(self, request: int, flags: int, payload: bytes, fds: tuple[int, ...] = ()) -> None:
        data = _HEADER.pack(request, proto.VERSION | flags, len(payload)) + payload
        rights = [(_socket.SOL_SOCKET, _socket.SCM_RIGHTS, struct.pack(f"={len(fds)}i", *fds))] if fds else []
        while data:
            try:
                sent = self._socket.sendmsg([data], rights, _socket.MSG_NOSIGNAL)
            except BlockingIOError:
                self._wait(select.POLLOUT, request)
                continue
            except OSError as error:
                raise BackendError(f"{proto.NAMES[request]} to {self.name}", error.errno or 0) from error
            data, rights = data[sent:], []

    def _reply(self, request: int, expected: int) -> bytes:
        answered, flags, size = _HEADER.unpack(self._receive(_HEADER.size, request))
        if answered != request or flags & proto.VERSION_MASK != proto.VERSION or not flags & proto.REPLY:
            raise self._wrong(request, f"request {answered}, flags {flags:#x}")
        if size != expected:
            raise self._wrong(request, f"{size} bytes instead of {expected}" if size else "that it cannot")
        return self._receive(expected, request)

    def _receive(self, size: int, request: int) -> bytes:
        """Exactly so many bytes. Descriptors beside them are dropped by the kernel, as nobody asks for them."""
        data = b""
        while len(data) < size:
            try:
                piece = self._socket.recvmsg(size - len(data))[0]  # a call that the main thread makes anyway
            except BlockingIOError:
                self._wait(select.POLLIN, request)
                continue
            except OSError as error:
                raise BackendError(f"the reply of {self.name} to {proto.NAMES[request]}", error.errno or 0) from error
            if not piece:
                raise BackendError(f"{self.name} has closed the connection at {proto.NAMES[request]}")
            data += piece
        return data

    def _wait(self, events: int, request: int) -> None:
        poller = select.poll()
        poller.register(self._socket.fileno(), events)
        left = self._until - time.monotonic()
        if left <= 0 or not poller.poll(left * 1000):
            raise BackendError(f"{self.name} does not answer {proto.NAMES[request]} in time")

    def _wrong(self, request: int, what: str) -> BackendError:
        return BackendError(f"{self.name} answers {proto.NAMES[request]} with {what}")

    def close(self) -> None:
        """Idempotent."""
        self._socket.close()


class BackendSocket:
    """Where a back end listens: a unix socket `path`; a lost connection is tried again after `reconnect` seconds, 0 for never.

    `id` is the character device's.
    """

    __slots__ = ("id", "memory", "path", "reconnect")

    def __init__(self, id: str, path: str, memory: GuestMemory, reconnect: float) -> None:
        self.id = id
        self.path = path
        self.memory = memory
        self.reconnect = reconnect

    def connect(self, protocol: int) -> VhostUser:
        """A connection with its handshake done, within the time for one. Raises: BackendError. Thread: any."""
        name = f"the back end at {self.path}"
        until = time.monotonic() + HANDSHAKE_SECONDS
        while True:
            socket = _socket.socket(_socket.AF_UNIX, _socket.SOCK_STREAM | _socket.SOCK_NONBLOCK | _socket.SOCK_CLOEXEC)
            try:
                socket.connect(os.fsencode(self.path))
            except OSError as error:
                socket.close()
                if error.errno == _EAGAIN and time.monotonic() < until:  # too many wait to be accepted, and poll cannot tell
                    select.poll().poll(50)
                    continue
                raise BackendError(f"cannot connect to {self.path}", error.errno or 0) from error
            return VhostUser(socket, name, self.memory, protocol)
