"""What the commands `template` and `clone` have in common: the way to the launcher, and how errors are told."""

from __future__ import annotations

import argparse
import json
import os
import sys

from stratovirt.errors import ConfigError, StratoVirtError
from stratovirt.launcher import client, wire
from stratovirt.launcher.templates import root_of

TYPE_CHECKING = False
if TYPE_CHECKING:
    import _socket
    from collections.abc import Callable
    from typing import Any, NoReturn

_PATIENCE = 600  # seconds, for what the launcher has to read first


class Parser(argparse.ArgumentParser):
    """Errors as everywhere in this program: one line."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(message, option=self.prog.removeprefix("stratovirt "), accepted=f"see {self.prog} --help")


def add_socket(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--socket", metavar="PATH", help="of the launcher (default: $STRATOVIRT_LAUNCHER if that is a path, "
                        "else this user's launcher, which is started if need be)")


def socket_path(options: argparse.Namespace) -> str:
    """Of the launcher that is meant; "" for the user's own."""
    given = options.socket or os.environ.get("STRATOVIRT_LAUNCHER", "")
    return os.path.abspath(given) if options.socket or given[:1] == "/" else ""


def root(options: argparse.Namespace) -> str:
    """Where that launcher has its templates."""
    return root_of(socket_path(options) or os.fsdecode(wire.default_socket()[0]))


def connect(options: argparse.Namespace) -> _socket.socket:
    """Raises: client.Trouble."""
    return client.connect_as(socket_path(options) or "start")


def order(options: argparse.Namespace, *words: str) -> Any:
    """What the launcher answers. Raises: client.Trouble."""
    connection = connect(options)
    try:
        client.request(connection, list(words), b"template")
        client.set_timeouts(connection, _PATIENCE)
        try:
            data = connection.recv(wire.MAX_DONE)
        except BlockingIOError as error:
            raise client.Trouble(f"the launcher did not answer within {_PATIENCE} s") from error
        except OSError as error:
            raise client.Trouble(f"the launcher did not answer: {os.strerror(error.errno or 0)}") from error
    finally:
        connection.close()
    kind, _, text = data.partition(b" ")
    if kind == b"error":
        raise client.Trouble(text.decode("utf-8", "replace"))
    if kind != b"done":
        raise client.Trouble("the launcher gave an answer of another version" if data else "the launcher gave no answer")
    return json.loads(text)


def told(run: Callable[[], int]) -> int:
    """The exit status of `run`; what goes wrong is one line on stderr."""
    try:
        status = run()
        sys.stdout.flush()
        return status
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # whoever reads has seen enough
        return 0
    except (StratoVirtError, client.Trouble) as error:
        text = str(error)
        sys.stderr.write(f"stratovirt: {text if text.isprintable() else ascii(text)}\n")
        return 1
