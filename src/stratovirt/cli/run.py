"""`stratovirt run`: start a machine by hand, with its console on the terminal, or run one command in it.

    stratovirt run                                        a shell in Debian's kernel, from the cache of guest assets
    stratovirt run -- uname -a                            one command: its output, its exit status
    stratovirt run --kernel vmlinuz --disk root.img       a kernel and a root file system of one's own

With a command, stdout carries exactly what the command wrote there; the console and the command's stderr go to stderr. That
needs the init of our guest images (see `cli/guest_console.py`). Exit status 125: the machine failed, not the command.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import select
import shlex
import subprocess
import sys
import tempfile
import termios
from collections.abc import Iterator
from pathlib import Path

import stratovirt
from stratovirt.cli import guest_console
from stratovirt.cli.command import parse
from stratovirt.errors import ConfigError, GuestError

EXIT_FAILED = 125
ARM64 = os.uname().machine == "aarch64"
KERNEL_WORDS = f"console={'ttyAMA0' if ARM64 else 'ttyS0'} reboot=t panic=-1"
# Entries of the cache of guest assets, and the files in them.
STOCK_KERNEL = ("stock-image", "Image") if ARM64 else ("stock-elf", "vmlinux")
STOCK_INITRAMFS = ("initramfs.arm64-stock" if ARM64 else "initramfs.stock", "initramfs.cpio")
QUIET_WORDS = "quiet loglevel=1"
_HOW_TO_GET_ASSETS = "--kernel FILE, or the cache of guest assets that `make setup` in the source tree fills"


def main(arguments: list[str]) -> int:
    """Exit status of the command, or of the machine when there is none. Raises: ConfigError."""
    own, command = _split(arguments)
    options = _parser().parse_args(own)
    with tempfile.TemporaryDirectory(prefix="stratovirt-run-") as folder:
        line = command_line(options, command, Path(folder))
        parse(line)  # errors come from here and not from the child
        if command:
            return _run_command(_process(line, options.warm))
        with _terminal_kept():
            return subprocess.run(_process(line, options.warm), env=_environment(), check=False).returncode


def _split(arguments: list[str]) -> tuple[list[str], str]:
    """Our own options, and the command behind `--` as one line for the guest's shell."""
    if "--" not in arguments:
        return arguments, ""
    at = arguments.index("--")
    words = arguments[at + 1 :]
    return arguments[:at], words[0] if len(words) == 1 else shlex.join(words)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="stratovirt run", usage="stratovirt run [OPTION…] [-- COMMAND…]",
                                     description="Start a machine with its console here, or run one command in it.")
    parser.add_argument("--kernel", help="bzImage or vmlinux, on arm64 an Image; default: Debian's, from the cache of assets")
    parser.add_argument("--initrd", help="initial RAM disk")
    parser.add_argument("--disk", action="append", default=[], metavar="FILE[:ro]", help="raw disk image; may be repeated")
    parser.add_argument("--memory", default="256M", help="such as 512M or 2G (default 256M)")
    parser.add_argument("--cpus", default="1", help="1 to 254 (default 1)")
    parser.add_argument("--append", default="", help="more words for the kernel command line")
    parser.add_argument("--qmp", metavar="SOCKET", help="serve QMP on this unix socket")
    parser.add_argument("--warm", action="store_true", help="start it in this user's launcher, and that one first if need be")
    return parser


def command_line(options: argparse.Namespace, command: str, work: Path) -> list[str]:
    """The options of the machine; `work` takes files that live as long as it. Raises: ConfigError."""
    kernel, initrd = options.kernel, options.initrd
    if kernel is None:
        kernel = _asset(*STOCK_KERNEL, "--kernel")
        initrd = initrd or _asset(*STOCK_INITRAMFS, "--initrd")
    words = KERNEL_WORDS
    if command:
        words += f" {QUIET_WORDS} {guest_console.kernel_words(command)}"
        if not guest_console.fits_inline(command):
            initrd = _with_command(initrd, command, work)
    line = ["-machine", "microvm", "-smp", options.cpus, "-m", options.memory, "-kernel", kernel, "-serial", "stdio",
            "-object", "rng-random,id=random,filename=/dev/urandom", "-device", "virtio-rng-device,id=rng0,rng=random"]
    if initrd:
        line += ["-initrd", initrd]
    for number, text in enumerate(options.disk):
        readonly = text.endswith(":ro")
        path = text.removesuffix(":ro")
        if "," in path:
            raise ConfigError("a comma cannot be part of a path", option="--disk", value=text, accepted="a path without commas")
        line += ["-drive", f"id=disk{number},file={path},readonly={'on' if readonly else 'off'}",
                 "-device", f"virtio-blk-device,id=blk{number},drive=disk{number}"]
        if number == 0 and not initrd:
            words += " root=/dev/vda " + ("ro" if readonly else "rw")
    if options.qmp:
        line += ["-qmp", f"unix:{options.qmp},server,nowait"]
    return [*line, "-append", f"{words} {options.append}".strip()]


def cache_root() -> Path:
    """Where guest assets are cached (guest/cache.py puts them there)."""
    own = os.environ.get("STRATOVIRT_CACHE")
    if own:
        return Path(own)
    shared = os.environ.get("XDG_CACHE_HOME")
    return (Path(shared) if shared else Path.home() / ".cache") / "stratovirt"


def _asset(entry: str, name: str, option: str) -> str:
    """The newest file of that cache entry."""
    found = sorted(cache_root().glob(f"{entry}-*/{name}"), key=lambda path: path.stat().st_mtime)
    if not found:
        raise ConfigError(f"none given, and there is no {entry} in {cache_root()}", option=option, accepted=_HOW_TO_GET_ASSETS)
    return str(found[-1])


def _with_command(initrd: str | None, command: str, work: Path) -> str:
    """A copy of the initramfs with a command that is too long for the kernel command line."""
    if initrd is None:
        raise ConfigError("a command of this length travels in an initramfs", option="--initrd",
                          accepted=f"--initrd FILE, or a command of at most {guest_console.MAX_INLINE * 3 // 4 - 4} bytes")
    try:
        data = Path(initrd).read_bytes()
    except OSError as error:
        raise ConfigError(os.strerror(error.errno or 0), option="--initrd", value=initrd, accepted="a readable file") from error
    longer = work / "initrd"
    longer.write_bytes(data + bytes(-len(data) % 4) + guest_console.command_archive(command))
    return str(longer)


def _process(line: list[str], warm: bool) -> list[str]:
    return [sys.executable, "-m", "stratovirt", *(["--warm"] if warm else []), *line]


def _environment() -> dict[str, str]:
    """The child finds the package where this process found it."""
    paths = [str(Path(stratovirt.__file__).parent.parent), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    environment.setdefault("STRATOVIRT_LOG_LEVEL", "warn")
    return environment


@contextlib.contextmanager
def _terminal_kept() -> Iterator[None]:
    """The machine restores the terminal itself, but not when it is killed."""
    try:
        before = termios.tcgetattr(0)
    except termios.error:  # not a terminal
        yield
        return
    try:
        yield
    finally:
        termios.tcsetattr(0, termios.TCSADRAIN, before)


def _run_command(command: list[str]) -> int:
    """Start the machine with its serial port on a pipe and take the command's output out of what comes through."""
    console = guest_console.GuestConsole(_writer(1), _writer(2), _writer(2))
    process = subprocess.Popen(command, env=_environment(), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE)
    assert process.stdout is not None  # it is a pipe, as asked
    try:
        while data := os.read(process.stdout.fileno(), 1 << 16):
            console.feed(data)
        process.wait()
    except KeyboardInterrupt:
        process.terminate()
        process.wait()
        return 130
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()
    try:
        return console.finish()
    except GuestError as error:
        if process.returncode == 0:
            print(f"stratovirt run: {error}", file=sys.stderr)
        return EXIT_FAILED


def _writer(descriptor: int) -> guest_console.Sink:
    def write(data: bytes) -> None:
        view = memoryview(data)
        while view:
            try:
                view = view[os.write(descriptor, view) :]
            except BlockingIOError:
                select.select([], [descriptor], [])

    return write
