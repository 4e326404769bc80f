"""Templates and clones with tiny guests: they go on from where the template was, each by itself, and outlive what made them."""

from __future__ import annotations

import json
import os
import resource
import signal
import struct
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from kvm.conftest import DEADLINE, Program
from kvm.guests import Asm
from kvm.test_launcher import COMMAND, Warm, until
from kvm.test_program import is_alive, wait_for_end
from kvm.test_qmp import Client
from kvm.test_snapshot import MARK, TICKS, TURNS, counter
from stratovirt.arch.x86_64 import layout
from stratovirt.cli.command import parse
from stratovirt.machine.clone import CloneAhead, MappedTemplate
from stratovirt.snapshot import state_file
from stratovirt.snapshot.chain import Chain


class Farm:
    """A launcher, and the machine that a template is made of: a counter with a disk to write and one to read."""

    def __init__(self, folder: Path, launch: Callable[..., Program]) -> None:
        self.folder = folder
        self._launch = launch
        self.warm = Warm(folder / "launcher.sock")
        self.clones: list[Program] = []
        self.pids: list[int] = []
        for name in ("disk", "shared"):
            (folder / name).write_bytes(name.encode().ljust(1 << 20, b"\0"))

    def machine(self, *more: str, image: bytes = b"", serial: str = "stdio") -> Program:
        qmp = self.folder / "qmp"
        program = self._launch(image or counter(), "-qmp", f"unix:{qmp},server,nowait", "-drive",
                               f"id=d,file={self.folder / 'disk'},direct=off", "-device", "virtio-blk-device,id=b,drive=d",
                               "-drive", f"id=s,file={self.folder / 'shared'},readonly=on,direct=off", "-device",
                               "virtio-blk-device,id=c,drive=s", *more, serial=serial)
        if serial == "stdio":
            program.wait_for("up\n")
        until(qmp.exists)
        return program

    def run(self, *words: str, **more: Any) -> subprocess.CompletedProcess[str]:
        return subprocess.run([*COMMAND, *words, "--socket", str(self.warm.path)], capture_output=True, text=True,
                              timeout=DEADLINE, check=False, stdin=subprocess.DEVNULL, **more)

    def create(self, name: str = "web", *words: str) -> None:
        done = self.run("template", "create", name, "--qmp", str(self.folder / "qmp"), *words)
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")

    def clone(self, *words: str) -> list[dict[str, str]]:
        """Detached clones, as they are described."""
        done = self.run("clone", "web", "-d", *words)
        assert done.returncode == 0, done.stderr
        found = []
        for line in done.stdout.splitlines():
            name, *pairs = line.split()
            found.append({"name": name, **dict(pair.split("=", 1) for pair in pairs)})
            self.pids.append(int(found[-1]["pid"]))
        return found

    def refused(self, *words: str, **more: Any) -> str:
        """What is said of a command that fails: one line."""
        done = self.run(*words, **more)
        lines = [line for line in done.stderr.splitlines() if ":INFO:" not in line]
        assert (done.returncode, len(lines)) == (1, 1), done.stderr
        assert lines[0].startswith("stratovirt: ")
        return lines[0]

    def foreground(self, *words: str) -> Program:
        program = Program(["clone", "web", "--socket", str(self.warm.path), *words])
        self.clones.append(program)
        return program

    def show(self) -> dict[str, Any]:
        shown: dict[str, Any] = json.loads(self.run("template", "show", "web").stdout)
        return shown

    @property
    def directory(self) -> Path:
        return self.folder / "launcher.sock.templates" / "web"

    def close(self) -> None:
        for pid in self.pids:
            if is_alive(pid):
                os.kill(pid, signal.SIGKILL)
        for program in self.clones:
            program.close()
        self.warm.close()


def address_teller() -> bytes:
    """A guest that waits for another generation ID and then writes the six bytes of its interface's address."""
    asm = Asm().load_eax(layout.GENERATION_ID).raw(0xA3, struct.pack("<I", MARK))  # mov [MARK], eax
    again = asm.label()
    asm.load_eax(layout.GENERATION_ID).raw(0x3B, b"\x05" + struct.pack("<I", MARK))  # cmp eax, [MARK]
    asm.jz(again).raw(0x66, b"\xba\xf8\x03")  # mov dx, 3F8
    for offset in (0, 4):
        asm.load_eax(layout.slot(4).base + 0x100 + offset)
        for _ in range(4 if offset == 0 else 2):
            asm.raw(0xEE, b"\xc1\xe8\x08")  # out dx, al; shr eax, 8
    return asm.halt_forever().kernel()


@pytest.fixture
def farm(tmp_path: Path, launch: Callable[..., Program]) -> Iterator[Farm]:
    made = Farm(tmp_path, launch)
    yield made
    made.close()


# -- what a clone is


def test_it_goes_on_where_the_template_was(machine, tmp_path) -> None:
    """In this process, where its memory can be seen: nothing of what is restored ahead is missing, and nothing is shared."""
    first = machine(counter(), "-serial", f"file,path={tmp_path / 'first'}").start()
    first.run_until(lambda: first.word(TICKS) > 20)
    first.vm.snapshot(str(tmp_path / "snap"))
    ticks, turns = first.word(TICKS), first.word(TURNS)
    words = ["-serial", f"file,path={tmp_path / 'second'}", "-incoming", f"file:{tmp_path / 'snap'}"]
    config = parse(["-machine", "microvm", "-m", "128", "-kernel", str(tmp_path / "kernel"), *words])
    state = state_file.read(str(tmp_path / "snap"))
    chain = Chain(str(tmp_path / "snap"), state)
    clones = [machine(counter(), *words, ahead=CloneAhead(MappedTemplate(config, state, chain))) for _ in range(2)]
    chain.close()
    time.sleep(0.1)  # time passes for the host, and not for a guest that has not begun
    ids = [bytes(each.memory.read(layout.GENERATION_ID, 16)) for each in (first, *clones)]
    assert len({*ids, bytes(16)}) == 4
    for clone in clones:
        assert (clone.word(TICKS), clone.word(TURNS)) == (ticks, turns)
    clones[0].start()
    clones[0].run_until(lambda: clones[0].word(TICKS) > ticks + 40 and clones[0].word(TURNS) > turns)
    assert (clones[1].word(TICKS), first.word(TICKS)) == (ticks, ticks)
    clones[1].start()
    clones[1].run_until(lambda: clones[1].word(TICKS) > ticks + 20 and clones[1].word(MARK) == 0x5EED)
    clones[1].vm.snapshot(str(tmp_path / "again"), str(tmp_path / "snap"))  # a clone is a machine like others


def test_in_the_foreground_it_is_like_any_machine(farm) -> None:
    source = farm.machine()
    farm.create()
    source.wait_for(".")  # it runs on
    clone = farm.foreground()
    assert set(clone.wait_for("...")) == {"."}
    (own,) = farm.show()["clones"]
    assert (own["name"], own["mac"], own["cid"]) == ("web-1", [], None)
    clone.process.terminate()
    assert clone.finish()[0] == 0
    until(lambda: farm.show()["clones"] == [])
    clone = farm.foreground("--name", "blue")
    clone.wait_for(".")
    (own,) = farm.show()["clones"]
    clone.process.kill()  # whoever ends the command ends the machine
    wait_for_end(own["pid"])


def test_several_in_the_background(farm) -> None:
    farm.machine()
    farm.create()
    clones = farm.clone("-n", "3", "--qmp", f"unix:{farm.folder}/q%d")
    assert [clone["name"] for clone in clones] == ["web-1", "web-2", "web-3"]
    for number, clone in enumerate(clones, 1):
        client = Client(farm.folder / f"q{number}")
        assert client.ask("query-status")["status"] == "running"
        assert client.ask("query-name") == {"name": clone["name"]}
        client.close()
    assert {clone["pid"] for clone in farm.show()["clones"]} == {int(clone["pid"]) for clone in clones}
    listed = json.loads(farm.run("template", "list", "--json").stdout)
    assert [(each["name"], each["memory"], each["clones"]) for each in listed] == [("web", 128 << 20, 3)]
    assert farm.run("template", "list").stdout.splitlines()[1].split()[:5] == ["web", "128", "MiB", "1", "3"]
    for clone in clones:
        os.kill(int(clone["pid"]), signal.SIGTERM)
    until(lambda: farm.show()["clones"] == [])


def test_disks_are_private_copies_or_shared_to_read(farm) -> None:
    farm.machine()
    farm.create()
    assert (farm.directory / "disk-0").read_bytes() == (farm.folder / "disk").read_bytes()
    one, other = farm.clone("-n", "2")
    copies = []
    for clone in (one, other):
        open_files = {int(fd.name): os.readlink(fd) for fd in Path(f"/proc/{clone['pid']}/fd").iterdir()}
        assert str(farm.folder / "shared") in open_files.values()
        assert str(farm.folder / "disk") not in open_files.values()
        (copy,) = {os.stat(f"/proc/{clone['pid']}/fd/{fd}").st_ino for fd, name in open_files.items()
                   if name.startswith(str(farm.directory)) and name.endswith(" (deleted)")
                   and os.stat(f"/proc/{clone['pid']}/fd/{fd}").st_size == 1 << 20}
        copies.append(copy)
    assert copies[0] != copies[1]
    assert sorted(path.name for path in farm.directory.iterdir()) == ["disk-0", "memory", "state", "template"]


def test_clones_outlive_template_and_launcher(farm) -> None:
    farm.machine()
    farm.create()
    farm.clone("-n", "2", "--qmp", f"unix:{farm.folder}/q%d")
    assert farm.run("template", "remove", "web").returncode == 0
    assert not farm.directory.exists()
    assert "template web: there is no such template (accepted: none" in farm.refused("clone", "web")
    farm.warm.process.kill()
    farm.warm.process.wait()
    time.sleep(0.1)
    for number in (1, 2):
        client = Client(farm.folder / f"q{number}")
        assert client.ask("query-status")["status"] == "running"
        client.ask("quit")
        client.close()
    for pid in farm.pids:
        wait_for_end(pid)


def test_a_launcher_takes_over_what_the_last_one_had(farm) -> None:
    farm.machine()
    farm.create()
    farm.warm.close()
    farm.warm = Warm(farm.folder / "launcher.sock")
    assert len(farm.clone()) == 1
    assert farm.run("template", "remove", "web", "--keep").returncode == 0
    assert farm.run("template", "create", "web", "--directory", str(farm.directory)).returncode == 0
    assert len(farm.clone()) == 1


def test_a_launcher_that_makes_many_clones_keeps_nothing(farm) -> None:
    farm.machine()
    farm.create()

    def settled() -> int:
        until(lambda: not farm.show()["clones"])
        time.sleep(0.2)  # both spares are there again
        return farm.warm.descriptors()

    farm.clone("-n", "2")
    for pid in farm.pids:
        os.kill(pid, signal.SIGKILL)
    before = settled()
    for _ in range(3):
        for clone in farm.clone("-n", "4"):
            os.kill(int(clone["pid"]), signal.SIGKILL)
    assert settled() == before


@pytest.mark.skipif(not os.access("/dev/net/tun", os.R_OK | os.W_OK) or os.geteuid() != 0, reason="no right to make taps")
def test_each_has_a_tap_and_an_address(farm) -> None:
    names = [f"svt{os.getpid() % 10000}x{number}" for number in range(3)]
    pattern = names[0][:-1] + "%d"
    farm.machine("-netdev", f"tap,id=n,ifname={names[0]}", "-device", "virtio-net-device,id=e,netdev=n", image=address_teller(),
                 serial=f"file,path={farm.folder / 'console'}")
    farm.create()
    assert f"the -netdev n of the template web is on {names[0]}, and a clone needs a tap" in farm.refused("clone", "web", "-d")
    one, other = farm.clone("-n", "2", "--tap", pattern, "--mac", "52:54:00:00:00:09")
    assert [(clone["mac"], clone["tap"]) for clone in (one, other)] == [
        ("52:54:00:00:00:09", names[1]), ("52:54:00:00:00:0a", names[2])]
    for clone in (one, other):  # what a driver would read
        path = Path(f"{farm.folder / 'console'}.{clone['name']}")
        until(lambda path=path: path.exists() and path.stat().st_size == 6)
        assert path.read_bytes().hex(":") == clone["mac"]
    for name in names:
        assert Path(f"/sys/class/net/{name}").exists(), "a tap that is not persistent is there as long as somebody is on it"
    assert "another clone is on this tap" in farm.refused("clone", "web", "-d", "--tap", names[1])
    assert "another clone has this address" in farm.refused("clone", "web", "-d", "--tap", "x", "--mac", "52:54:00:00:00:0A")
    os.kill(int(one["pid"]), signal.SIGTERM)
    until(lambda: not Path(f"/sys/class/net/{names[1]}").exists())


# -- what cannot be


def test_names_that_are_taken_or_none(farm) -> None:
    farm.machine()
    assert "template create a/b: not a name for a template" in farm.refused("template", "create", "a/b", "--qmp", "x")
    assert "template nothing: there is no such template" in farm.refused("clone", "nothing")
    farm.create()
    assert "there is a template of this name" in farm.refused("template", "create", "web", "--qmp", str(farm.folder / "qmp"))
    farm.clone("--name", "one")
    assert "clone --name one: a clone has this name already" in farm.refused("clone", "web", "--name", "one")
    assert "no vhost-vsock-device" in farm.refused("clone", "web", "--cid", "4")
    assert "0 network devices" in farm.refused("clone", "web", "--mac", "52:54:00:00:00:01")
    assert "clone -n 0: not a number of clones (accepted: 1 to 1000)" in farm.refused("clone", "web", "-n", "0")
    assert "2 clones cannot have the same" in farm.refused("clone", "web", "-n", "2", "--name", "x")
    assert "clone: unrecognized arguments: --nonsense" in farm.refused("clone", "web", "--nonsense")
    qmp = f"unix:{farm.folder}/taken"
    farm.clone("--qmp", qmp)
    assert "-qmp" in farm.refused("clone", "web", "-d", "--qmp", qmp)
    assert "-qmp" in farm.refused("clone", "web", "-d", "--qmp", "nonsense")
    assert len(farm.show()["clones"]) == 2


def test_a_template_whose_files_have_changed(farm) -> None:
    farm.machine()
    farm.create()
    disk, shared, memory = farm.directory / "disk-0", farm.folder / "shared", farm.directory / "memory"
    for path, what in ((shared, "(drive s) has changed"), (disk, "(drive d) has changed"), (memory, "its memory")):
        before = path.stat()
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns + 1))
        assert what in farm.refused("clone", "web", "-d")
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert len(farm.clone()) == 1
    disk.unlink()
    assert f"the disk {disk} (drive d): No such file" in farm.refused("clone", "web", "-d")


def test_no_space_for_the_template(farm) -> None:
    """As much as a limit on the size of files can show of it: nothing is left, and the machine runs on."""
    source = farm.machine()

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, 500_000))

    text = farm.refused("template", "create", "web", "--qmp", str(farm.folder / "qmp"), preexec_fn=limit)
    assert "(drive d): File too large" in text and "room for a copy" in text
    assert not farm.directory.exists()
    assert "no such template" in farm.refused("template", "show", "web")
    source.wait_for("...")
    farm.create()


def test_a_machine_that_cannot_be_one(farm) -> None:
    source = farm.machine("-object", "rng-random,id=r0,filename=/dev/urandom", "-device", "virtio-rng-device,rng=r0,id=rng0")
    client = Client(farm.folder / "qmp")
    line = client.ask("query-command-line")
    assert "virtio-rng-device,rng=r0,id=rng0" in line["arguments"] and line["directory"] == os.getcwd()
    client.ask("blockdev-add", **{"node-name": "late", "file": {"driver": "file", "filename": str(farm.folder / "late")}})
    (farm.folder / "late").write_bytes(bytes(4096))
    client.ask("blockdev-add", **{"node-name": "late", "file": {"driver": "file", "filename": str(farm.folder / "late")}})
    client.ask("device_add", id="plugged", driver="virtio-blk-mmio", drive="late", addr="0x2")
    client.close()
    assert "device 'plugged'" in farm.refused("template", "create", "web", "--qmp", str(farm.folder / "qmp"))
    assert not farm.directory.exists()
    source.wait_for(".")
