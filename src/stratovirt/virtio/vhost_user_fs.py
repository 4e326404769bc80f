"""virtio-fs (VIRTIO 1.2, 5.11) on vhost-user: a directory of the host, served by virtiofsd.

    queue 0  hiprio    FORGET and INTERRUPT, which nobody waits for
    queue 1  request   everything else

Config space: the tag (36 bytes, UTF-8, filled up with NULs) that the guest mounts it by, u32 num_request_queues. Both are
ours: virtiofsd has no config space.
"""

from __future__ import annotations

import struct

from stratovirt.config.options import FS_TAG_SIZE
from stratovirt.virtio.queue import split
from stratovirt.virtio.vhost_user import VhostUserDevice

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from stratovirt.errors import StratoVirtError
    from stratovirt.loop import EventLoop
    from stratovirt.vhost.user import BackendSocket
    from stratovirt.virtio.queue import Chain

_QUEUE_SIZE = 128
_REQUEST_QUEUES = 1
_IN_HEADER = struct.Struct("<IIQ")  # struct fuse_in_header { u32 len; u32 opcode; u64 unique; … }
_OUT_HEADER = struct.Struct("<IiQ")  # struct fuse_out_header { u32 len; s32 error; u64 unique; }
_ENOTCONN = 107


class VhostUserFs(VhostUserDevice):
    device_id = 26
    name = "vhost-user-fs"
    needed_queues = 1 + _REQUEST_QUEUES

    def __init__(self, backend: BackendSocket, tag: bytes, loop: EventLoop,
                 on_error: Callable[[StratoVirtError], None] | None = None) -> None:
        super().__init__(backend, (_QUEUE_SIZE,) * (1 + _REQUEST_QUEUES), loop, on_error)
        self.config = tag.ljust(FS_TAG_SIZE, b"\0") + _REQUEST_QUEUES.to_bytes(4, "little")

    def not_to_save(self) -> str:
        return (f"{self.provider} keeps the open files and directories of the guest to itself "
                "(it lacks VHOST_USER_PROTOCOL_F_DEVICE_STATE)")

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
