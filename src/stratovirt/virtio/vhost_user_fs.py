"""virtio-fs (VIRTIO 1.2, 5.11) on vhost-user: a directory of the host, served by virtiofsd.

    queue 0  hiprio    FORGET and INTERRUPT, which nobody waits for
    queue 1  request   everything else

Config space: the tag (36 bytes, UTF-8, filled up with NULs) that the guest mounts it by, u32 num_request_queues. Both are
ours: virtiofsd has no config space.

What virtiofsd knows of the guest's open files and directories is in a snapshot if it gives that away (DEVICE_STATE of the
protocol, which the one of QEMU 7.2 does not have), and then another one over the same directory goes on with it.
"""

from __future__ import annotations

import os
import struct

from stratovirt.config.options import FS_TAG_SIZE
from stratovirt.errors import HostError
from stratovirt.vhost._user import P_DEVICE_STATE
from stratovirt.virtio.queue import split
from stratovirt.virtio.vhost_user import VhostUserDevice

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from stratovirt.errors import StratoVirtError
    from stratovirt.loop import EventLoop
    from stratovirt.snapshot.saved import Saved
    from stratovirt.vhost.user import BackendSocket
    from stratovirt.virtio.queue import Chain

_QUEUE_SIZE = 128
_REQUEST_QUEUES = 1
_IN_HEADER = struct.Struct("<IIQ")  # struct fuse_in_header { u32 len; u32 opcode; u64 unique; … }
_OUT_HEADER = struct.Struct("<IiQ")  # struct fuse_out_header { u32 len; s32 error; u64 unique; }
_ENOTCONN = 107
MAX_STATE = 8 << 20


class VhostUserFs(VhostUserDevice):
    device_id = 26
    name = "vhost-user-fs"
    needed_queues = 1 + _REQUEST_QUEUES
    wanted_protocol = 1 << P_DEVICE_STATE

    def __init__(self, backend: BackendSocket, tag: bytes, loop: EventLoop,
                 on_error: Callable[[StratoVirtError], None] | None = None) -> None:
        super().__init__(backend, (_QUEUE_SIZE,) * (1 + _REQUEST_QUEUES), loop, on_error)
        self.config = tag.ljust(FS_TAG_SIZE, b"\0") + _REQUEST_QUEUES.to_bytes(4, "little")
        self._tag = tag
        self._state = b""  # the back end's, while it is saved

    # -- snapshots

    def not_to_save(self) -> str:
        connection = self._connection
        if connection is not None and not connection.protocol >> P_DEVICE_STATE & 1:
            return (f"{self.provider} keeps what it knows of the guest's files and directories to itself "
                    "(it lacks VHOST_USER_PROTOCOL_F_DEVICE_STATE)")
        return super().not_to_save()

    def fetch_state(self, new_file: Callable[[], int]) -> None:
        self._state = b""
        with self._work:
            connection = self._connection
            if connection is None or not self.active:
                return  # `save` says what that means
            fd = new_file()
            try:
                try:
                    connection.save_state(fd)
                except HostError as error:
                    self._lose(error)  # nobody knows what it would answer next
                    raise
                size = os.fstat(fd).st_size
                if size > MAX_STATE:
                    raise HostError(f"{self.provider} has a state of {size >> 20} MiB, and {MAX_STATE >> 20} are the most")
                self._state = os.pread(fd, MAX_STATE, 0)
            except OSError as error:
                raise HostError.from_os("the state of a back end", error) from error
            finally:
                os.close(fd)

    def save(self) -> dict[str, object]:
        state, self._state = self._state, b""
        return {**super().save(), "tag": self._tag.hex(), "state": state.hex()}

    def restore(self, state: Saved) -> None:
        super().restore(state)
        tag, content = state.data("tag", limit=FS_TAG_SIZE), state.data("state", limit=MAX_STATE)
        if tag != self._tag:
            raise state.error("tag", f"the guest has seen {tag.decode(errors='replace')!a}, and now it is "
                              f"{self._tag.decode(errors='replace')!a}")
        connection = self._connection
        if not self.active:
            return
        if connection is None or not connection.protocol >> P_DEVICE_STATE & 1:
            raise state.error("state", f"{self.provider} cannot take it over (it lacks VHOST_USER_PROTOCOL_F_DEVICE_STATE)")
        fd = os.memfd_create("stratovirt-state", os.MFD_CLOEXEC)
        try:
            rest = memoryview(content)
            while rest:
                rest = rest[os.write(fd, rest) :]
            os.lseek(fd, 0, os.SEEK_SET)
            connection.load_state(fd)
        except HostError as error:
            raise state.error("state", str(error)) from error
        finally:
            os.close(fd)

    def fail(self, index: int, chain: Chain) -> int:
        """Nobody is connected, says FUSE. A request without room for an answer wants none."""
        if chain.readable_length < _IN_HEADER.size or chain.writable_length < _OUT_HEADER.size:
            return 0
        header, _ = split(chain.readable, _IN_HEADER.size)
        _length, _opcode, unique = _IN_HEADER.unpack(b"".join(header))
        answer = _OUT_HEADER.pack(_OUT_HEADER.size, -_ENOTCONN, unique)
        for view in split(chain.writable, _OUT_HEADER.size)[0]:
            view[:], answer = answer[: len(view)], answer[len(view) :]
        return _OUT_HEADER.size
