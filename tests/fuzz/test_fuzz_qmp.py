"""QMP bytes: whatever a client sends, in whatever pieces, ends in requests or in errors, in bounded memory."""

from __future__ import annotations

import json
import random
from itertools import pairwise
from pathlib import Path

from fuzz.fuzzing import fuzz, mutate
from stratovirt.control import commands
from stratovirt.control.protocol import MAX_DOCUMENT, Decoder, Malformed, Request

NAMES = tuple(command.name for command in commands.COMMANDS)
VALUES = (None, True, 0, -1, 1 << 64, 1.5, "", "text", "é", "\0", [], {}, [[]], {"a": {"b": []}}, "x" * 300, 10**30)


def any_request(generator: random.Random) -> bytes:
    message: dict[str, object] = {"execute": generator.choice((*NAMES, "no-such-command", ""))}
    if generator.random() < 0.5:
        message["arguments"] = {generator.choice(("id", "device", "node-name", "enable", "x")): generator.choice(VALUES)
                                for _ in range(generator.randrange(4))}
    if generator.random() < 0.5:
        message["id"] = generator.choice(VALUES)
    return json.dumps(message).encode() + generator.choice((b"", b"\n", b"\r\n", b" "))


def pieces(generator: random.Random, data: bytes) -> list[bytes]:
    cuts = sorted({0, len(data), *(generator.randrange(len(data) + 1) for _ in range(generator.randrange(8)))})
    return [data[low:high] for low, high in pairwise(cuts)]


def summary(found: list[Request | Malformed]) -> list[tuple[str, str]]:
    return [("request", item.execute) if isinstance(item, Request) else ("malformed", item.description) for item in found]


def test_any_bytes_in_any_pieces() -> None:
    def one(generator: random.Random) -> None:
        data = b"".join(any_request(generator) for _ in range(generator.randint(1, 4)))
        if generator.random() < 0.7:
            data = mutate(generator, data)
        if generator.random() < 0.05:
            data += generator.choice((b"[", b'{"a":', b'"', b"\\")) * generator.randrange(100_000)
        decoder, found = Decoder(), []
        for piece in pieces(generator, data):
            found += decoder.feed(piece)
            assert len(decoder._document) <= MAX_DOCUMENT
        for item in found:
            assert isinstance(item, (Request, Malformed))
        if b"\n" not in data:  # what is skipped after an error ends with the line or the burst: then the cuts matter
            return
        assert len(found) <= len(data)

    fuzz(one, 4000)


def test_good_requests_survive_any_cuts() -> None:
    def one(generator: random.Random) -> None:
        data = b"".join(any_request(generator) for _ in range(generator.randint(1, 6)))
        whole = summary(Decoder().feed(data))
        decoder, found = Decoder(), []
        for piece in pieces(generator, data):
            found += decoder.feed(piece)
        assert summary(found) == whole

    fuzz(one, 2000)


def test_a_server_answers_everything_and_lives(tmp_path: Path) -> None:
    """Over a real socket, to a machine that only changes its state: after any bytes a fresh client is served."""
    from unit.test_qmp_server import GREETING, Setup

    setup = Setup(str(tmp_path / "qmp"))
    setup.serve()

    def one(generator: random.Random) -> None:
        client = setup.connect()
        client.pump(lambda: bool(client.lines))
        assert client.lines.pop(0) == GREETING
        data = b'{"execute":"qmp_capabilities"}' if generator.random() < 0.7 else b""
        for _ in range(generator.randint(1, 6)):
            request = any_request(generator)
            if b'"quit"' in request or b'"system_powerdown"' in request:
                continue
            data += request if generator.random() < 0.6 else mutate(generator, request)
        if b"quit" in data or b"powerdown" in data:
            data = b""
        for piece in pieces(generator, data):
            client.socket.send(piece)
            setup.loop.run_once(0)
        for _ in range(3):
            setup.loop.run_once(0)
        client.socket.close()
        setup.clients.remove(client)
        setup.loop.run_once(0)
        assert setup.machine.state in ("running", "paused")

    fuzz(one, 300)
    last = setup.connect()
    last.pump(lambda: bool(last.lines))
    assert last.lines[0] == GREETING
    setup.close()
