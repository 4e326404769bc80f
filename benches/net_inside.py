"""The part of `net` that runs inside the lab: guests with iperf3 on every way that frames can take, raw figures out.

`python -m benches.net_inside KERNEL INITRAMFS COUNT FOLDER`; the report is JSON lines on stdout, traces and the profile go to
FOLDER, and `net.py` reads all of it. The clock is the lab's, which counts instructions: 1 ns each, on the one processor that
host and guest share. So what is measured is the sum of all work for a byte, with the guest's and iperf3's in it, which are the
same whoever is in between.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from guest.programs import archive

import stratovirt
from benches import kvm_trace, loop_probe, machines
from benches.boot_inside import ATTEMPTS, into_memory, libraries
from benches.spinning import Spinning
from stratovirt.cli import guest_console

MEMORY = "256M"
MEBIBYTES = 32
UP, DOWN = "guest to host", "host to guest"
OURS, PEER = "stratovirt", machines.PEER
MAIN, IOTHREAD, VHOST = "main loop", "iothread", "vhost"
_HOST, _GUEST, _TAP, _MAC = "10.79.0.1", "10.79.0.2", "benchtap0", "52:54:00:ab:cd:ef"
_GATE = 7000
# boot_inside.py says why a start has so much time, and why what does not end is done again.
_DEADLINE, _START_DEADLINE = 15.0, 10_000.0
_LOOK = 0.5
_COPY = Path("/tmp/bench")
_SOURCE = Path(stratovirt.__file__).parent.parent
_WORDS = "console=ttyS0 quiet reboot=t panic=-1"
Record = dict[str, object]
WAYS = {OURS: (MAIN, IOTHREAD, VHOST), PEER: (MAIN, VHOST)}


def main(arguments: list[str]) -> int:
    kernel, initramfs, count, folder = Path(arguments[0]), Path(arguments[1]), int(arguments[2]), Path(arguments[3])
    subprocess.run(["mount", "-t", "debugfs", "debugfs", "/sys/kernel/debug"], check=True)
    say("copying what is timed to memory")
    iperf = archive("iperf3")
    launcher = into_memory()
    for file in {Path(shutil.which("iperf3") or ""), *libraries(Path(shutil.which("iperf3") or ""))}:
        file.chmod(file.stat().st_mode & 0o7777)  # copied up to memory, as in into_memory
    kernel = Path(shutil.copy(kernel, _COPY))
    ram_disk = _COPY / "initramfs"
    ram_disk.write_bytes(initramfs.read_bytes() + iperf)
    _make_tap()
    gate = socket.create_server((_HOST, _GATE))
    for monitor, ways in WAYS.items():
        for number, way in enumerate(ways):
            say(f"{monitor}: {way}")
            command = _command(monitor, way, kernel, ram_disk, launcher, count + 1)
            trace = folder / f"trace.{len(monitor)}.{number}"
            _repeat(lambda what=(monitor, way, command, gate, count, trace): _measure(*what))  # type: ignore[misc]
    say(f"{OURS}: {MAIN}, profiled")
    shutil.copy(loop_probe.__file__, _COPY)
    line = [*_command(OURS, MAIN, kernel, ram_disk, launcher, 1)[1:], "-disable-seccomp"]  # the profile is a file
    command = [str(Path(sys.executable).resolve()), "-I", "-S", str(_COPY / "loop_probe.py"), str(_COPY / "src"),
               str(folder / "profile"), *line]
    _repeat(lambda: _profile(command, gate, folder))
    return 0


def say(text: str) -> None:
    print(f"net: in the lab, {time.monotonic():.1f} s: {text}", file=sys.stderr, flush=True)


# -- the guest and what it is connected to


def _script(rounds: int) -> str:
    """Before each transfer, and at the end, the guest waits at the gate until it is let through."""
    gate = f"nc {_HOST} {_GATE} </dev/null >/dev/null"
    return f"""ip link set eth0 up; ip addr add {_GUEST}/24 dev eth0
round=0
while [ $round -lt {rounds} ]; do
    for direction in "" -R; do {gate}; iperf3 -c {_HOST} -n {MEBIBYTES}M $direction >/tmp/out 2>&1 || cat /tmp/out; done
    round=$((round + 1))
done
{gate}
"""


def _make_tap() -> None:
    for words in (f"tuntap add {_TAP} mode tap vnet_hdr", f"addr add {_HOST}/24 dev {_TAP}", f"link set {_TAP} up"):
        subprocess.run(["ip", *words.split()], check=True)


def _command(monitor: str, way: str, kernel: Path, ram_disk: Path, launcher: str, rounds: int) -> list[str]:
    vhost = "on" if way == VHOST else "off"
    words = f"{_WORDS} {guest_console.kernel_words(_script(rounds))}"
    more = ["-initrd", str(ram_disk), "-append", words, "-serial", "stdio"]
    if monitor == OURS:
        thread = ["-object", "iothread,id=io0"] if way == IOTHREAD else []
        key = ",iothread=io0" if way == IOTHREAD else ""
        return [launcher, *machines.ours(kernel, MEMORY, 1, *more, *thread, "-netdev", f"tap,id=n,ifname={_TAP},vhost={vhost}",
                                         "-device", f"virtio-net-device,id=eth0,netdev=n,mac={_MAC}{key}")[1:]]
    netdev = f"tap,id=n,ifname={_TAP},script=no,downscript=no,vhost={vhost}"
    command = machines.qemu(kernel, MEMORY, 1, *more, "-global", "virtio-mmio.force-legacy=false", "-netdev", netdev,
                            "-device", f"virtio-net-device,netdev=n,mac={_MAC}", serial=True)
    return [word.replace("auto-kernel-cmdline=off", "auto-kernel-cmdline=on,acpi=off") for word in command]


class Stuck(Exception):
    """A guest that does not come to its gate, or a transfer that does not end."""


class Machine:
    """A running guest, from gate to gate."""

    def __init__(self, command: list[str], gate: socket.socket) -> None:
        self._gate = gate
        self._console = open(_COPY / "console", "wb+")  # noqa: SIM115 - closed by close()
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=self._console, stderr=self._console)
        self._connection: socket.socket | None = None
        self._spinning = Spinning(self.process.pid)

    def at_gate(self, deadline: float = _DEADLINE) -> None:
        """Return when the guest waits there."""
        self._gate.settimeout(_LOOK)
        until = time.monotonic() + deadline
        while True:
            try:
                self._connection = self._gate.accept()[0]
                return
            except TimeoutError as error:
                if self._spinning.look() or time.monotonic() > until:
                    self._console.seek(0)
                    raise Stuck(f"the guest did not come: {self._console.read()[-2000:].decode(errors='replace')}") from error

    def let_through(self) -> None:
        assert self._connection is not None
        self._connection.close()

    def transfer(self) -> tuple[int, int, dict[str, int]]:
        """One transfer: bytes, ns, and ns of the processor for everybody who took part."""
        server = subprocess.Popen(["iperf3", "-s", "-1", "-J", "-B", _HOST], stdout=subprocess.PIPE)
        _wait_for_listener()
        before = _work_of(self.process.pid)
        self.let_through()
        until = time.monotonic() + _DEADLINE
        while True:
            try:
                output = server.communicate(timeout=_LOOK)[0]
                break
            except subprocess.TimeoutExpired as error:
                if self._spinning.look() or time.monotonic() > until:
                    server.kill()
                    server.communicate()
                    raise Stuck("a transfer does not end") from error
        self.at_gate()
        after = _work_of(self.process.pid)
        result = json.loads(output)["end"]["sum_received"]
        if not result["bytes"]:
            result = json.loads(output)["end"]["sum_sent"]  # with -R the server sends
        work = {name: nanoseconds - before.get(name, 0) for name, nanoseconds in after.items()}
        return result["bytes"], round(result["seconds"] * 1e9), work

    def close(self) -> None:
        self.process.kill()
        self.process.communicate()
        self._console.close()


def _wait_for_listener() -> None:
    """Until somebody listens on port 5201 (0x1451)."""
    until = time.monotonic() + _DEADLINE
    while ":1451 " not in "".join(line for line in Path("/proc/net/tcp").read_text().splitlines() if " 0A " in line):
        if time.monotonic() > until:
            sys.exit("iperf3 does not listen")
        time.sleep(0.002)


def _work_of(pid: int) -> dict[str, int]:
    """ns on the processor so far: the machine's threads, and those that the kernel runs for it."""
    work: dict[str, int] = {}
    for task in Path(f"/proc/{pid}/task").iterdir():
        fields = (task / "stat").read_text().rpartition(")")[2].split()
        guest_time = int(fields[40])
        name = "main thread" if task.name == str(pid) else "vCPU thread" if guest_time else "other threads"
        work[name] = work.get(name, 0) + _on_processor(task)
    for comm in Path("/proc").glob("[0-9]*/comm"):
        if comm.read_text().strip() == f"vhost-{pid}":
            work["vhost's thread"] = _on_processor(comm.parent)
    return work


def _on_processor(task: Path) -> int:
    return int((task / "schedstat").read_text().split()[0])


# -- runs


def _repeat(work: Callable[[], list[Record]]) -> None:
    """Do the work of one machine, again if it gets stuck, and tell what it returns."""
    for _ in range(ATTEMPTS):
        try:
            records = work()
        except Stuck as error:
            say(f"{error}; once more")
            continue
        for record in records:
            print(json.dumps(record), flush=True)
        return
    sys.exit("it gets stuck every time")


def _measure(monitor: str, way: str, command: list[str], gate: socket.socket, count: int, trace: Path) -> list[Record]:
    machine = Machine(command, gate)
    records: list[Record] = []
    what = {"monitor": monitor, "way": way}
    try:
        machine.at_gate(_START_DEADLINE)
        for _ in range(count):
            for direction in (UP, DOWN):
                size, nanoseconds, work = machine.transfer()
                records.append({"kind": "transfer", **what, "direction": direction, "bytes": size, "nanoseconds": nanoseconds,
                                "work": work})
        for direction in (UP, DOWN):
            file = trace.with_name(f"{trace.name}.{direction.partition(' ')[0]}")
            kvm_trace.record(machine.transfer, file)
            records.append({"kind": "trace", **what, "direction": direction, "file": file.name})
    finally:
        machine.close()
    return records


def _profile(command: list[str], gate: socket.socket, folder: Path) -> list[Record]:
    """The functions of the main loop, in both directions."""
    machine = Machine(command, gate)
    records: list[Record] = []
    try:
        machine.at_gate(_START_DEADLINE)
        for direction in (UP, DOWN):
            os.kill(machine.process.pid, signal.SIGUSR1)
            machine.transfer()
            os.kill(machine.process.pid, signal.SIGUSR2)
            file, until = folder / "profile", time.monotonic() + _START_DEADLINE
            while not file.exists() and time.monotonic() < until:
                time.sleep(0.01)
            name = f"profile.{direction.partition(' ')[0]}"
            file.rename(folder / name)
            records.append({"kind": "profile", "direction": direction, "file": name})
    finally:
        machine.close()
    return records


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
