"""The host's side of the contract with the init of our guest images (guest/init): run one command, get its output exactly.

The command travels in `stratovirt.cmd=` on the kernel command line, base64 so that no byte of it means anything to the
kernel; a longer one in a cpio archive behind the initramfs, as the file /cmd. `stratovirt.end=` says how the guest ends.

The output comes back over the serial console as lines, each begun by the byte 0x1e, which nothing else there prints:

    b                   the command starts
    o BASE64            a piece of its stdout, as soon as it was written
    e BASE64            a piece of its stderr
    x STATUS O E        it ended with STATUS; all o (e) frames together held O (E) characters of base64

Everything between frames (firmware, kernel, init) is console text. The counts make a lost or damaged frame an error
instead of an output that lacks a piece. The guest is untrusted: a line never ends, a frame is nonsense or there are two
ends: the decoder keeps at most one frame's worth of bytes and takes what is no frame as console text.
"""

from __future__ import annotations

import binascii

from stratovirt.errors import GuestError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    Sink = Callable[[bytes], None]

MARK = 0x1E
MAX_FRAME = 8192
# What goes on the kernel command line, of which x86 kernels take 2048 bytes in all. A longer command needs an archive.
MAX_INLINE = 1024


def kernel_words(command: str, end: str = "reboot") -> str:
    """What to append to the kernel command line. The words for a command over `fits_inline` leave it to the archive."""
    words = [f"stratovirt.end={end}"]
    if fits_inline(command):
        words.append("stratovirt.cmd=" + binascii.b2a_base64(command.encode(), newline=False).decode())
    return " ".join(words)


def fits_inline(command: str) -> bool:
    """Whether the command goes on the kernel command line."""
    return 0 < len(command.encode()) * 4 // 3 + 4 <= MAX_INLINE


def command_archive(command: str) -> bytes:
    """A cpio archive ("newc") with the command as /cmd, to be appended to an initramfs whose size is a multiple of 4."""
    data = command.encode()
    parts = []
    for name, mode, body in ((b"cmd\0", 0o100644, data), (b"TRAILER!!!\0", 0, b"")):
        fields = (1, mode, 0, 0, 1, 0, len(body), 0, 0, 0, 0, len(name), 0)
        head = b"070701" + b"".join(b"%08x" % field for field in fields) + name
        parts += [head, bytes(-len(head) % 4), body, bytes(-len(body) % 4)]
    return b"".join(parts)


class GuestConsole:
    """Takes the bytes of the serial console apart as they come; feed it from one thread."""

    def __init__(self, stdout: Sink, stderr: Sink, console: Sink) -> None:
        self._sinks = {0x6F: stdout, 0x65: stderr}  # by frame letter
        self._received = {0x6F: 0, 0x65: 0}
        self._console = console
        self._frame: bytearray | None = None  # the frame that is being received, without its mark
        self._lost = False
        self.started = False
        self.status: int | None = None

    def feed(self, data: bytes) -> None:
        """The next bytes from the console."""
        position = 0
        while position < len(data):
            if self._frame is None:
                mark = data.find(MARK, position)
                end = len(data) if mark < 0 else mark
                if end > position:
                    self._console(data[position:end])
                position = end
                if mark >= 0:
                    self._frame = bytearray()
                    position += 1
                continue
            newline = data.find(b"\n", position)
            end = len(data) if newline < 0 else newline
            self._frame += data[position:end]
            position = end
            if newline >= 0:
                frame = bytes(self._frame)
                self._frame = None
                position += 1
                if not self._take(frame.rstrip(b"\r")):
                    self._console(frame + b"\n")
            elif len(self._frame) > MAX_FRAME:
                self._console(bytes(self._frame))
                self._frame = None

    def finish(self) -> int:
        """The command's exit status, once the console has closed.

        Raises GuestError when the guest ended before the command did, or a piece of the output was lost on the way.
        """
        if self.status is None:
            when = "before the command ended" if self.started else "before it could start the command"
            raise GuestError("guest console", f"the guest ended {when}")
        if self._lost:
            raise GuestError("guest console", "a part of the command's output was damaged on the serial line")
        return self.status

    def _take(self, frame: bytes) -> bool:
        """One frame without mark and newline; False when it is none."""
        letter = frame[:1]
        if frame == b"b":
            self.started = True
            if self.status is None:  # a machine that is reset before its command has ended starts it again, and counts anew
                self._received = dict.fromkeys(self._received, 0)
            return True
        if self.status is not None:
            return False
        if letter == b"x":
            words = frame[1:].split()
            if len(words) != 3 or not all(word.isdigit() and len(word) < 20 for word in words):
                return False
            self.status = int(words[0]) & 0xFF
            self._lost = [int(words[1]), int(words[2])] != [self._received[0x6F], self._received[0x65]]
            return True
        if frame[1:2] != b" " or letter not in (b"o", b"e"):
            return False
        text = frame[2:]
        try:
            data = binascii.a2b_base64(text, strict_mode=True)
        except binascii.Error:
            return False
        self._received[frame[0]] += len(text)
        self._sinks[frame[0]](data)
        return True
