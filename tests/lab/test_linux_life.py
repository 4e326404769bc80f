"""The life of a machine with Linux in it: how it ends, pauses, starts again."""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from linux_guest import ARM64, DEADLINE, Guest

# A byte on the console costs the emulated arm64 host several milliseconds.
LINES, STOPS = (2400, 4) if ARM64 else (6000, 10)


@pytest.mark.parametrize(("kernel", "end", "smp"), [
    ("stock-elf", "reboot", 2), ("stock-elf", "poweroff", 1), ("small-elf", "reboot", 1), ("small-elf", "poweroff", 2),
])
def test_reboot_and_power_off_end_the_process(boot: Callable[..., Guest], kernel: str, end: str, smp: int) -> None:
    guest = boot(kernel, "echo up", end=end, smp=smp, qmp=True)
    guest.execute("query-status")
    event = guest.wait_event("SHUTDOWN")
    assert event["data"]["guest"] is True
    assert guest.finish() == (0, "up\n")
    assert not guest.qmp_path.exists()


@pytest.mark.parametrize("kernel", ["stock-elf", "small-elf"])
def test_a_panic_ends_the_process(boot: Callable[..., Guest], kernel: str) -> None:
    guest = boot(kernel, "echo up", end="panic")
    assert guest.wait_end() == 0
    assert b"Kernel panic" in guest.console
    assert bytes(guest.stdout) == b"up\n"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_signals_end_it_cleanly(boot: Callable[..., Guest], number: signal.Signals) -> None:
    guest = boot("small-elf", "echo up; while :; do :; done", qmp=True, smp=2)
    guest.wait_for(b"up\n", stream=guest.stdout)
    guest.process.send_signal(number)
    assert guest.wait_end() == 0
    assert not guest.qmp_path.exists()


def test_stop_and_cont_under_load_lose_nothing(boot: Callable[..., Guest], tmp_path: Path) -> None:
    """One process writes numbered lines to the console, one writes numbered blocks to the disk; both are complete."""
    image = tmp_path / "image"
    with open(image, "wb") as file:
        file.truncate(32 << 20)
    load = f"""
    (i=0; while [ $i -lt 512 ]; do printf '%065535d\\n' $i; i=$((i + 1)); done |
        dd of=/dev/vda bs=65536 iflag=fullblock oflag=direct 2>/dev/null) &
    i=0; while [ $i -lt {LINES} ]; do echo line $i; i=$((i + 1)); done
    wait; sync; echo complete
    """
    guest = boot("small-elf", load, smp=2, disk=image, qmp=True)
    guest.wait_for(b"line 10\n", stream=guest.stdout)
    for _ in range(STOPS):
        guest.execute("stop")
        assert guest.execute("query-status")["status"] == "paused"
        lines = guest.stdout.count(b"\n")
        guest.execute("cont")
        assert guest.execute("query-status")["running"] is True
        # Frames hold some hundred lines each: so many of them are well before the last.
        guest.wait_for(b"\n", stream=guest.stdout, count=lines + 1)
    assert b"complete" not in guest.stdout
    status, output = guest.finish(2 * DEADLINE)
    assert status == 0
    assert output == "".join(f"line {number}\n" for number in range(LINES)) + "complete\n"
    assert image.read_bytes() == b"".join(b"%065535d\n" % number for number in range(512))


def test_a_stopped_machine_stands_still(boot: Callable[..., Guest]) -> None:
    guest = boot("small-elf", "i=0; while :; do echo line $i; i=$((i + 1)); done", qmp=True)
    guest.wait_for(b"line 5\n", stream=guest.stdout)
    guest.execute("stop")
    # What the guest had written is on its way; a second round trip later the console must not move any more.
    ticks = Path(f"/proc/{guest.process.pid}/stat")
    guest.execute("query-status")
    before = ticks.read_text().split()[13:15]
    for _ in range(50):
        guest.execute("query-status")
    console = len(guest.console)
    for _ in range(50):
        guest.execute("query-status")
    assert len(guest.console) == console, (before, ticks.read_text().split()[13:15])
    guest.execute("cont")
    lines = guest.stdout.count(b"\n")
    guest.wait_for(b"\n", stream=guest.stdout, count=lines + 5)
    guest.execute("quit")
    assert guest.wait_end() == 0


@pytest.mark.parametrize("kernel", ["stock-elf", "small-elf"])
def test_system_reset_starts_the_kernel_again(boot: Callable[..., Guest], disk: Path, kernel: str) -> None:
    guest = boot(kernel, "head -c 15 /dev/vda; echo; nproc; sleep 1000", smp=2, disk=disk, qmp=True)
    for count in range(1, 5):
        guest.wait_for(b"stratovirt disk\n2\n", stream=guest.stdout, count=count)
        if count < 4:
            guest.execute("system_reset")
            assert guest.wait_event("RESET")["data"]["guest"] is False
    assert guest.execute("query-status") == {"status": "running", "running": True, "singlestep": False}
    guest.execute("quit")
    assert guest.wait_end() == 0


@pytest.mark.long
def test_fifty_resets(boot: Callable[..., Guest], disk: Path) -> None:
    """Nothing is used up by a reset: neither descriptors nor memory of the process grow."""
    guest = boot("small-elf", "head -c 15 /dev/vda; echo; nproc; sleep 1000", smp=2, disk=disk, qmp=True)
    descriptors = Path(f"/proc/{guest.process.pid}/fd")
    before = 0
    for count in range(1, 51):
        guest.wait_for(b"stratovirt disk\n2\n", stream=guest.stdout, count=count)
        if count == 2:
            before = len(list(descriptors.iterdir()))
        if count < 50:
            guest.execute("system_reset")
    assert len(list(descriptors.iterdir())) == before
    guest.execute("quit")
    assert guest.wait_end() == 0


def test_reset_while_the_kernel_boots(boot: Callable[..., Guest], disk: Path) -> None:
    """A reset at any moment of a boot leads to a boot."""
    guest = boot("small-elf", "echo up", smp=2, disk=disk, qmp=True, words="")
    for text in (b"Linux version", b"smp: Bringing up", b"virtio_blk"):
        guest.wait_for(text)
        guest.execute("system_reset")
        guest.console.clear()
    assert guest.finish() == (0, "up\n")


def test_a_guest_reboot_with_action_reset_boots_again(boot: Callable[..., Guest]) -> None:
    guest = boot("small-elf", "echo up", qmp=True, extra=("-action", "reboot=reset"))
    guest.wait_for(b"Restarting system", count=2)
    assert guest.wait_event("RESET")["data"]["guest"] is True
    guest.execute("quit")
    assert guest.wait_end() == 0


def test_a_machine_that_starts_paused_boots_at_cont(boot: Callable[..., Guest]) -> None:
    guest = boot("small-elf", "echo up", qmp=True, extra=("-S",))
    for _ in range(20):
        assert guest.execute("query-status")["running"] is False
    assert not guest.console
    guest.execute("cont")
    assert guest.finish() == (0, "up\n")
