"""The balloon with Linux: memory goes to the host and comes back, as guest, process and QMP see it alike."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import pytest
from linux_guest import DEADLINE, Guest

MIB = 1 << 20
MEMORY = 512
# The guest touches nearly all of its memory, gives it back to its own kernel, and then answers to what is typed.
SERVE = """
mkdir -p /tmp/m; mount -t tmpfs -o size=420m m /tmp/m
head -c 380m /dev/zero >/tmp/m/fill; rm /tmp/m/fill
echo ready
line=$(head -c 3000 /dev/urandom | base64 | tr -d '\\n') # random bytes by the mebibyte are slow where the host is emulated
exec 3<>$PORT
while :; do
    read word <&3 || sleep 0.1
    case $word in
    memory) echo $(awk '/^MemTotal|^MemFree/ { print $2 }' /proc/meminfo) kib ;;
    use) yes "$line" | head -c 200m >/tmp/m/data && md5sum </tmp/m/data && echo used ;;
    unuse) rm /tmp/m/data; echo unused ;;
    end) exit ;;
    esac
    word=
done
"""
FIND = "for n in /sys/class/virtio-ports/*/name; do PORT=/dev/$(basename $(dirname $n)); done;"


class Patient:
    """A guest with a balloon that answers on its standard output to words sent over a port."""

    def __init__(self, boot: Callable[..., Guest], folder: Path, kernel: str, smp: int, options: str) -> None:
        import socket

        path = folder / "words.socket"
        self.guest = boot(
            kernel,
            FIND + SERVE,
            memory=MEMORY,
            smp=smp,
            qmp=True,
            extra=(
                *("-chardev", f"socket,id=c,path={path},server,nowait", "-device", "virtio-serial-device,id=s"),
                *("-device", "virtserialport,id=words,chardev=c"),
                *("-device", f"virtio-balloon-device,id=balloon0{options}"),
            ),
        )
        assert self.guest.execute("query-status")["running"] is True
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.connect(str(path))
        self.guest.wait_for(b"ready\n", stream=self.guest.stdout)

    def ask(self, word: str, answer: bytes) -> str:
        before = len(self.guest.stdout)
        self.socket.sendall(f"{word}\n".encode())
        until = time.monotonic() + DEADLINE
        while answer not in self.guest.stdout[before:]:
            assert time.monotonic() < until, self.guest.account()
            time.sleep(0.02)
        return self.guest.stdout[before:].decode()

    def memory(self) -> tuple[int, int]:
        """MemTotal and MemFree of the guest, in MiB."""
        total, free, _ = self.ask("memory", b"kib\n").split()
        return int(total) >> 10, int(free) >> 10

    def resident(self) -> int:
        """MiB of the VMM's process that are in memory."""
        for line in Path(f"/proc/{self.guest.process.pid}/status").read_text().splitlines():
            if line.startswith("VmRSS"):
                return int(line.split()[1]) >> 10
        raise AssertionError("no VmRSS")

    def balloon(self, mebibytes: int) -> float:
        """Ask for a size and wait until the guest has it; the longest that QMP took to answer meanwhile, in seconds."""
        self.guest.execute("balloon", value=mebibytes * MIB)
        slowest, until = 0.0, time.monotonic() + DEADLINE
        while True:
            before = time.monotonic()
            actual = self.guest.execute("query-balloon")["actual"]
            slowest = max(slowest, time.monotonic() - before)
            if actual == mebibytes * MIB:
                return slowest
            assert time.monotonic() < until, (actual, self.guest.account())
            time.sleep(0.01)


@pytest.mark.parametrize(("kernel", "smp"), [pytest.param("stock-elf", 2, marks=pytest.mark.long), ("small-elf", 1)])
def test_to_half_and_back(
    boot: Callable[..., Guest], measured: Callable[..., None], tmp_path: Path, kernel: str, smp: int
) -> None:
    """QMP answers all the while: within 100 ms on real hardware, a generous limit where the host itself is emulated."""
    patient = Patient(boot, tmp_path, kernel, smp, "")
    guest = patient.guest
    assert guest.execute("query-balloon") == {"actual": MEMORY * MIB}
    (total, _), resident = patient.memory(), patient.resident()
    assert resident > 350  # it has touched its memory
    for _ in range(2):
        slowest = patient.balloon(MEMORY // 2)
        measured("slowest answer of QMP while the balloon inflates", slowest * 1000, "ms")
        assert slowest < 5
        assert guest.wait_event("BALLOON_CHANGED")["data"]["actual"] <= MEMORY * MIB
        half_total, half_free = patient.memory()
        assert total - 270 <= half_total <= total - 240
        assert half_free < half_total
        assert patient.resident() < resident - 150
        slowest = patient.balloon(MEMORY)
        measured("slowest answer of QMP while the balloon deflates", slowest * 1000, "ms")
        assert slowest < 5
        assert patient.memory()[0] == total
    # What was given back is ordinary memory again.
    assert "used" in patient.ask("use", b"used\n")
    patient.socket.sendall(b"end\n")
    assert guest.finish()[0] == 0


@pytest.mark.long
@pytest.mark.parametrize("kernel", ["stock-elf"])
def test_reported_free_pages_leave_the_process(boot: Callable[..., Guest], tmp_path: Path, kernel: str) -> None:
    patient = Patient(boot, tmp_path, kernel, 1, ",free-page-reporting=true,auto-balloon=true,deflate-on-oom=true")
    until = time.monotonic() + DEADLINE
    while patient.resident() > 220:  # the guest reports what has been free for a while
        assert time.monotonic() < until, patient.resident()
        time.sleep(0.2)
    patient.ask("use", b"used\n")
    assert patient.resident() > 250
    patient.ask("unuse", b"unused\n")
    while patient.resident() > 220:
        assert time.monotonic() < until, patient.resident()
        time.sleep(0.2)
    patient.socket.sendall(b"end\n")
    assert patient.guest.finish()[0] == 0


@pytest.mark.long
def test_a_balloon_deflates_before_the_guest_runs_out(boot: Callable[..., Guest], tmp_path: Path) -> None:
    patient = Patient(boot, tmp_path, "small-elf", 1, ",deflate-on-oom=true")
    patient.balloon(200)
    assert "used" in patient.ask("use", b"used\n")
    assert patient.guest.execute("query-balloon")["actual"] > 200 * MIB
    patient.guest.execute("quit")
    assert patient.guest.wait_end() == 0


def test_a_reset_gives_the_guest_all_its_memory(boot: Callable[..., Guest], tmp_path: Path) -> None:
    patient = Patient(boot, tmp_path, "small-elf", 1, "")
    patient.balloon(MEMORY // 2)
    patient.guest.execute("balloon", value=MEMORY * MIB)
    patient.guest.execute("system_reset")
    patient.guest.wait_for(b"ready\n", stream=patient.guest.stdout, count=2)
    assert patient.guest.execute("query-balloon")["actual"] == MEMORY * MIB
    assert patient.memory()[0] > MEMORY - 60
    patient.guest.execute("quit")
    assert patient.guest.wait_end() == 0


def test_without_a_balloon_qmp_says_so(boot: Callable[..., Guest]) -> None:
    from qemu.qmp import ExecuteError

    guest = boot("small-elf", "sleep 1000", qmp=True)
    for command, arguments in (("balloon", {"value": 1 << 28}), ("query-balloon", {})):
        with pytest.raises(ExecuteError, match="No balloon device has been activated"):
            guest.execute(command, **arguments)
    guest.execute("quit")
    assert guest.wait_end() == 0
