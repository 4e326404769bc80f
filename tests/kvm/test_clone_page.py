"""The commands of docs/clones.md, as they stand there, in order, in a directory with the files that they name."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

from kvm.conftest import DEADLINE
from kvm.test_launcher import until
from kvm.test_program import wait_for_end
from kvm.test_qmp import Client
from kvm.test_snapshot import counter

PAGE = Path(__file__).resolve().parents[2] / "docs" / "clones.md"


def test_every_command_of_the_page(tmp_path: Path) -> None:
    commands = [line.strip() for line in PAGE.read_text().splitlines() if line.startswith(("    stratovirt ", "stratovirt "))]
    assert len(commands) == 10
    (tmp_path / "vmlinux").write_bytes(counter())
    (tmp_path / "root.img").write_bytes(bytes(1 << 20))
    runtime = tmp_path / "run"
    runtime.mkdir(mode=0o700)
    environment = {**os.environ, "XDG_RUNTIME_DIR": str(runtime), "STRATOVIRT_LOG_LEVEL": "warn",
                   "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    environment.pop("STRATOVIRT_LAUNCHER", None)
    pids: list[int] = []
    try:
        for command in commands:
            done = subprocess.run(["sh", "-c", command], cwd=tmp_path, env=environment, capture_output=True, text=True,
                                  timeout=DEADLINE, check=False, stdin=subprocess.DEVNULL)
            assert (done.returncode, done.stderr) == (0, ""), command
            if " -daemonize " in command:
                pids.append(int((tmp_path / "web.pid").read_text()))
                until(lambda: b"." in _console(tmp_path / "console.log"))
            elif " clone " in command:
                found = [dict(pair.partition("=")[::2] for pair in line.split()[1:]) for line in done.stdout.splitlines()]
                pids += [int(pairs["pid"]) for pairs in found]
                assert len(found) == (3 if "-n 3" in command else 1)
            elif "show" in command:
                assert json.loads(done.stdout)["name"] == "web"
        for name, socket in (("blue", "blue.qmp"), ("web-3", "web-3.qmp")):
            client = Client(tmp_path / socket)
            assert client.ask("query-name") == {"name": name}
            client.close()
        for name in ("web-1", "blue"):
            until(lambda name=name: b"." in _console(tmp_path / f"console.log.{name}"))
        assert not (runtime / "stratovirt-templates" / "web").exists()
    finally:
        for pid in pids:
            os.kill(pid, signal.SIGTERM)
        _end_launcher(runtime)
    for pid in pids:
        wait_for_end(pid)


def _console(path: Path) -> bytes:
    return path.read_bytes() if path.exists() else b""


def _end_launcher(runtime: Path) -> None:
    import socket

    client = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    client.connect(str(runtime / "stratovirt-launcher.sock"))
    pid = int.from_bytes(client.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)[:4], sys.byteorder)
    client.close()
    os.kill(pid, signal.SIGTERM)
    wait_for_end(pid)
