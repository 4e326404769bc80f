"""Snapshots with tiny guests: what counted goes on counting, what rang goes on ringing, and bad files are refused by name."""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kvm.conftest import SOURCE, Program
from kvm.guests import DATA, Asm
from kvm.memories import KINDS, arguments
from kvm.test_qmp import Client
from stratovirt.arch.x86_64 import layout
from stratovirt.errors import StratoVirtError
from stratovirt.snapshot import state_file
from stratovirt.snapshot.chain import Chain

TICKS, TURNS, MARK = DATA, DATA + 4, DATA + 8
RNG = ("-object", "rng-random,id=r0,filename=/dev/urandom", "-device", "virtio-rng-device,rng=r0,id=rng0")
RNG_IRQ = layout.slot(6).irq


def counter() -> bytes:
    """Counts timer interrupts and turns of a loop; a full stop on the serial port every 16 ticks."""
    asm = Asm().set_stack().load_idt().gate(32, "tick").pic(mask_master=0xFE, mask_slave=0xFF)
    asm.out(0x43, 0x34).out(0x40, 0xA9).out(0x40, 0x04)  # 1 kHz
    asm.store(MARK, 0x5EED).text("up\n").sti()
    again = asm.label()
    asm.inc(TURNS).load_eax(TICKS).raw(0x25, b"\x0f\0\0\0").cmp_eax(0).jnz(again)  # and eax, 15
    asm.load_eax(MARK).cmp_eax(0x5EED).jnz("lost").text(".")
    asm.label("wait")
    asm.load_eax(TICKS).raw(0x25, b"\x0f\0\0\0").cmp_eax(0).jz("wait").jmp(again)
    asm.label("lost")
    asm.text("lost\n").power_off()
    asm.handler("tick").inc(TICKS).end_of_interrupt()
    return asm.kernel()


def serial(path: Path) -> tuple[str, str]:
    return "-serial", f"file,path={path}"


@pytest.fixture
def snapshot(machine: Callable[..., Any], tmp_path: Path) -> tuple[Path, int, Any]:
    """Where one is, the ticks that were counted in it, and the machine, which is paused."""
    first = machine(counter(), *serial(tmp_path / "first"), *RNG).start()
    first.run_until(lambda: first.word(TICKS) > 20)
    first.vm.snapshot(str(tmp_path / "snap"))
    return tmp_path / "snap", first.word(TICKS), first


# -- saved and gone on with


def test_a_counter_goes_on_and_so_does_its_timer(machine, snapshot, tmp_path) -> None:
    directory, ticks, first = snapshot
    assert (first.vm.state, first.vm.migration) == ("paused", "completed")
    assert sorted(path.name for path in directory.iterdir()) == ["memory", "state"]
    assert (directory / "memory").stat().st_blocks * 512 < 1 << 21, "zero pages are holes"
    turns = first.word(TURNS)
    second = machine(counter(), *serial(tmp_path / "second"), *RNG, "-S", "-incoming", f"file:{directory}")
    assert (second.word(TICKS), second.word(TURNS), second.vm.state) == (ticks, turns, "created")
    second.start()
    assert second.vm.state == "running", "-S has no effect"
    ids = [bytes(each.memory.read(layout.GENERATION_ID, 16)) for each in (first, second)]
    assert len({*ids, bytes(16)}) == 3, "each of them has a generation ID of its own"
    second.run_until(lambda: second.word(TICKS) > ticks + 40 and second.word(TURNS) > turns)
    first.vm.resume()
    first.run_until(lambda: first.word(TICKS) > ticks + 40)
    second.run_until(lambda: b"." in (tmp_path / "second").read_bytes())
    assert set((tmp_path / "second").read_bytes()) == set(b"."), "no boot, no lost mark"


def test_a_snapshot_of_what_was_restored(machine, snapshot, tmp_path) -> None:
    directory, ticks, _first = snapshot
    second = machine(counter(), *serial(tmp_path / "second"), *RNG, "-incoming", f"file:{directory}").start()
    second.run_until(lambda: second.word(TICKS) > ticks + 20)
    second.vm.snapshot(str(directory))  # over the one that it is mapped from
    ticks = second.word(TICKS)
    third = machine(counter(), *serial(tmp_path / "third"), *RNG, "-incoming", f"file:{directory}").start()
    assert third.word(TICKS) >= ticks
    second.vm.resume()
    for each in (second, third):
        each.run_until(lambda each=each: each.word(TICKS) > ticks + 20 and each.word(MARK) == 0x5EED)


def test_a_reset_after_a_restore_boots_the_kernel(machine, snapshot, tmp_path) -> None:
    directory, ticks, _first = snapshot
    second = machine(counter(), *serial(tmp_path / "second"), *RNG, "-incoming", f"file:{directory}").start()
    second.run_until(lambda: second.word(TICKS) > ticks)
    second.memory.store_u32(0x400_0000, 0xDEAD)
    second.vm.reset(False)
    assert second.word(0x400_0000) == 0
    second.run_until(lambda: b"up\n" in (tmp_path / "second").read_bytes())


def test_without_a_kernel_it_goes_on_but_does_not_start_again(snapshot, tmp_path, launch) -> None:
    directory, _ticks, _first = snapshot
    program = launch(None, *RNG, "-incoming", f"file:{directory}", "-qmp", f"unix:{tmp_path / 'qmp'},server,nowait")
    program.wait_for(".")
    client = connect(tmp_path / "qmp")
    assert "without -kernel" in client.ask("system_reset")["desc"]
    assert client.ask("query-status")["status"] == "running"
    program.wait_for(".")
    client.close()


@pytest.mark.parametrize("kind", KINDS)
def test_into_every_kind_of_memory(machine, snapshot, tmp_path, kind) -> None:
    directory, ticks, _first = snapshot
    more = arguments(kind, tmp_path)
    if kind == "file":
        (tmp_path / "memory").write_bytes(b"\xff" * (128 << 20))  # what was there does not shine through
    smp = ["-smp", "1"] if "-smp" in more else []
    if smp:
        more = [word for word in more if word not in ("-smp", "2")]
    second = machine(counter(), *serial(tmp_path / "second"), *RNG, *more, "-incoming", f"file:{directory}")
    assert second.word(0x400_0000) == 0
    second.start().run_until(lambda: second.word(TICKS) > ticks + 20)


def test_memory_that_is_read(machine, snapshot, tmp_path) -> None:
    directory, ticks, _first = snapshot
    second = machine(counter(), *serial(tmp_path / "second"), *RNG, "-incoming", f"file:{directory},mapped=false")
    (directory / "memory").write_bytes(b"")  # nobody needs it any more
    second.start().run_until(lambda: second.word(TICKS) > ticks + 20)


def test_an_interrupt_that_was_on_its_way_arrives(machine, tmp_path) -> None:
    """By the device's registers it is pending, and the interrupt chips have not heard of it."""
    asm = Asm().set_stack().load_idt().gate(32 + RNG_IRQ, "device").pic().store(TICKS, 0).store(MARK, 0x5EED).sti()
    again = asm.label()
    asm.inc(TURNS).jmp(again)
    kernel = asm.handler("device").inc(TICKS).end_of_interrupt().kernel()
    first = machine(kernel, *serial(tmp_path / "first"), *RNG).start()
    first.run_until(lambda: first.word(MARK) == 0x5EED and first.word(TURNS) > 0)
    assert first.vm.slots[0].slot.irq == RNG_IRQ
    first.vm.snapshot(str(tmp_path / "snap"))
    assert first.word(TICKS) == 0
    spoil(tmp_path / "snap", lambda state: state["slots"][0].update(used_pending=True))
    second = machine(kernel, *serial(tmp_path / "second"), *RNG, "-incoming", f"file:{tmp_path / 'snap'}").start()
    second.run_until(lambda: second.word(TICKS) == 1)


def connect(path: Path) -> Client:
    until = time.monotonic() + 30
    while True:
        try:
            return Client(path)
        except OSError:
            assert time.monotonic() < until
            time.sleep(0.01)


def test_ten_at_once_over_qmp(launch, tmp_path) -> None:
    first = launch(counter(), *RNG, "-qmp", f"unix:{tmp_path / 'qmp'},server,nowait")
    first.wait_for("up\n")
    client = connect(tmp_path / "qmp")
    assert client.ask("query-migrate") == {"status": "none"}
    assert client.ask("migrate", uri="tcp:1.2.3.4:5")["desc"] == "MicroVM does not support migration"
    assert client.ask("migrate", uri="file:")["desc"] == "Invalid uri: file:"
    assert client.ask("migrate", uri=f"file:{tmp_path / 'snap'}") == {}
    client.wait_event("STOP")
    assert client.ask("query-migrate") == {"status": "completed"}
    assert client.ask("query-status")["status"] == "paused"
    assert client.ask("cont") == {}
    machine = ["-machine", "microvm", "-m", "128", "-serial", "stdio", *RNG]
    # the six empty slots that -qmp brings are in the snapshot, and come with it
    programs = [Program([*machine, "-incoming", f"file:{tmp_path / 'snap'}"]) for _ in range(10)]
    try:
        for program in programs:
            for _ in range(3):
                assert program.wait_for(".") == "."
        private = [private_kib(program.process.pid) for program in programs]
    finally:
        for program in programs:
            program.close()
    assert max(private) < 32 << 10, "of 128 MiB of memory each"
    client.close()


def private_kib(pid: int) -> int:
    rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
    return sum(int(line.split()[1]) for line in rollup.splitlines() if line.startswith("Private"))


def test_show(snapshot) -> None:
    directory, _ticks, _first = snapshot
    code = f"import sys; sys.path.insert(0, {str(SOURCE)!r}); from stratovirt.__main__ import main; sys.exit(main())"

    def show(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([sys.executable, "-IS", "-c", code, "snapshot", *words], capture_output=True, text=True,
                              timeout=60, check=False)

    shown = show("show", str(directory))
    assert shown.returncode == 0 and "machine.memory = 134217728\n" in shown.stdout and "slots[0].id = rng0\n" in shown.stdout
    assert "processors.vcpus[0].registers.rip = 0000000000100" in shown.stdout
    assert show("show", str(directory)).stdout == shown.stdout
    for words in (("show", "/nonexistent"), ("show",), ("hide", "x")):
        bad = show(*words)
        assert bad.returncode == 1 and bad.stderr.count("\n") == 1 and "Traceback" not in bad.stderr


# -- what fails leaves nothing behind, and the machine goes on


def test_a_disk_that_is_full(machine, tmp_path, monkeypatch) -> None:
    first = machine(counter(), *serial(tmp_path / "first")).start()
    first.run_until(lambda: first.word(TICKS) > 20)
    real, written, allowed = os.pwritev, [], 0

    def full(fd: int, buffers: list[memoryview], offset: int, flags: int = 0) -> int:
        written.append(offset)
        if len(written) > allowed:
            raise OSError(errno.ENOSPC, "full")
        return real(fd, buffers, offset, flags)

    for allowed in range(3):  # noqa: B007 - `full` looks at it
        written.clear()
        with monkeypatch.context() as patched:
            patched.setattr(os, "pwritev", full)
            with pytest.raises(StratoVirtError, match="No space left on device"):
                first.vm.snapshot(str(tmp_path / "snap"))
        assert list((tmp_path / "snap").iterdir()) == []
        assert (first.vm.state, first.vm.migration) == ("running", "failed")
        ticks = first.word(TICKS)
        first.run_until(lambda ticks=ticks: first.word(TICKS) > ticks + 5)
    first.vm.pause()
    with monkeypatch.context() as patched, pytest.raises(StratoVirtError):
        patched.setattr(os, "fdatasync", lambda fd: full(fd, [], 0) if written.extend(range(9)) is None else None)
        first.vm.snapshot(str(tmp_path / "snap"))
    assert first.vm.state == "paused" and list((tmp_path / "snap").iterdir()) == []


@pytest.mark.parametrize("where", ["file", "file/below", "missing/below"])
def test_places_where_no_snapshot_can_be(machine, tmp_path, where) -> None:
    (tmp_path / "file").touch()
    first = machine(counter(), *serial(tmp_path / "first")).start()
    with pytest.raises(StratoVirtError):
        first.vm.snapshot(str(tmp_path / where))
    assert first.vm.state == "running"


@pytest.mark.parametrize("incremental", [False, True])
def test_killed_at_any_moment(launch, tmp_path, incremental) -> None:
    """There is a whole snapshot or none, however far it has come; and the next one into that place clears up."""
    chance = random.Random(5)
    whole = 0
    base = tmp_path / "base"
    machine = (*RNG, "-qmp", f"unix:{tmp_path / 'qmp'},server,nowait")
    for number in range(12):
        directory = tmp_path / f"snap{number // 2}"  # every other one replaces another
        program = launch(counter(), *machine)
        program.wait_for("up\n")
        client = connect(tmp_path / "qmp")
        more = {}
        if incremental:
            assert client.ask("migrate", uri=f"file:{base}", track=number % 3 == 0) == {}
            more = {"base": str(base)}
            client.ask("cont")
        arguments = {"uri": f"file:{directory}", **more}
        client.socket.sendall(json.dumps({"execute": "migrate", "arguments": arguments}).encode())
        time.sleep(chance.random() * 0.06)
        program.process.kill()
        program.process.wait()
        client.close()
        if (directory / "state").exists():
            state = state_file.read(str(directory))
            if incremental and state["base"]["id"] != state_file.read(str(base))["id"]:
                continue  # the one before: its base is another by now
            whole += 1
            Chain(str(directory), state).close()
    print(f"{whole} of 12 were through")
    program = launch(counter(), *machine)
    program.wait_for("up\n")
    client = connect(tmp_path / "qmp")
    for directory in sorted(tmp_path.glob("snap*")):
        assert client.ask("migrate", uri=f"file:{directory}") == {}
        assert sorted(path.name for path in directory.iterdir()) == ["memory", "state"]
    client.close()


def test_a_limit_of_the_size_of_files(launch, tmp_path) -> None:
    """The error is the client's, and the guest runs on; what was there is still there."""
    program = launch(counter(), *RNG, "-qmp", f"unix:{tmp_path / 'qmp'},server,nowait",
                     prefix=("prlimit", f"--fsize={1 << 20}"))
    program.wait_for("up\n")
    client = connect(tmp_path / "qmp")
    for _ in range(2):
        assert client.ask("migrate", uri=f"file:{tmp_path / 'snap'}")["desc"].endswith("File too large")
        assert client.ask("query-migrate") == {"status": "failed"} and list((tmp_path / "snap").iterdir()) == []
        assert client.ask("query-status")["status"] == "running"
        program.wait_for(".")
    client.close()


# -- what is not a snapshot of this machine


def spoil(directory: Path, change: Callable[[dict[str, Any]], object]) -> None:
    state = json.loads((directory / "state").read_text())
    change(state)
    (directory / "state").write_text(json.dumps(state))


BAD = {
    "no-directory": (lambda d: shutil.rmtree(d), (), "no such directory"),
    "no-state": (lambda d: (d / "state").unlink(), (), "`state` is missing"),
    "no-memory": (lambda d: (d / "memory").unlink(), (), "`memory` is missing"),
    "half-a-state": (lambda d: os.truncate(d / "state", 2000), (), "not JSON"),
    "half-the-memory": (lambda d: os.truncate(d / "memory", 64 << 20), (), "it is not whole"),
    "another-memory": (lambda d: spoil(d, lambda s: s.update(id="00" * 16)), (), "of another snapshot"),
    "newer": (lambda d: spoil(d, lambda s: s.update(version=99)), (), "version: 99 is newer"),
    "arm64": (lambda d: spoil(d, lambda s: s.update(architecture="aarch64")), (), "architecture: 'aarch64'"),
    "less-memory": (lambda d: None, ("-m", "256"), "machine.memory"),
    "more-processors": (lambda d: None, ("-smp", "2"), "machine.cpus"),
    "a-device-more": (lambda d: None, ("-device", "virtio-balloon-device,id=bal0"), "no such device"),
    "a-device-less": (lambda d: None, (), "slots[0].id"),
    "edited-register": (lambda d: spoil(d, lambda s: s["processors"]["vcpus"][0]["registers"].update(rip="xyz")), (),
                        "processors.vcpus[0].registers.rip"),
    "edited-queue": (lambda d: spoil(d, lambda s: s["slots"][0]["queues"][0].update(size=3)), (), "slots[0].queues[0].size"),
    "ring-nowhere": (lambda d: spoil(d, lambda s: s["slots"][0].update(status=15, driver_features=1 << 32, queues=[
        {"size": 8, "ready": True, "addresses": [0, 9, 0, 9, 0, 9], "position": 0}])), (), "slots[0].queues"),
    "unknown-field": (lambda d: spoil(d, lambda s: s["platform"]["rtc"].update(more=1)), (), "platform.rtc.more: unknown"),
    "another-maker": (lambda d: spoil(d, lambda s: s["processors"]["vcpus"][0].update(
        cpuid="00" * 12 + "11" * 28 + s["processors"]["vcpus"][0]["cpuid"][80:])), (), "processors.vcpus[0].cpuid"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_snapshot_is_refused_by_name(snapshot, launch, case) -> None:
    directory, _ticks, _first = snapshot
    change, words, expected = BAD[case]
    change(directory)
    devices = () if case == "a-device-less" else RNG
    arguments = ["-machine", "microvm", *([] if "-m" in words else ["-m", "128"]), "-serial", "stdio", *devices, *words,
                 "-incoming", f"file:{directory}"]
    status, out, error = Program(arguments).finish()
    assert (status, out) == (1, "")
    assert error.startswith("stratovirt: -incoming file:") and error.count("\n") == 1, error
    assert expected in error, error
