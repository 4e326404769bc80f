"""`stratovirt snapshot`: taking snapshots of a running machine, looking at them, comparing and merging them.

    stratovirt snapshot create DIR --qmp SOCKET                          a whole snapshot of the machine behind SOCKET
    stratovirt snapshot create DIR --qmp SOCKET --diff --base DIR0       of its memory what differs from the one in DIR0
    stratovirt snapshot show DIR                                         what is in it, one value a line
    stratovirt snapshot diff DIR DIR2                                    in what two differ
    stratovirt snapshot merge DIR [INTO]                                 one that stands on others made whole

`create` goes through QMP, and lets a machine that ran run on. `diff` ends with status 0 when nothing differs, 1 when something
does, and 2 when that cannot be told. Everything else ends with 0 or 1.
"""

from __future__ import annotations

import argparse
import os
import sys

from stratovirt.errors import ConfigError, StratoVirtError
from stratovirt.snapshot.saved import SnapshotError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, NoReturn

_USAGE = "snapshot create|show|diff|merge; each with --help"
_TIMEOUT = 600.0


class _Parser(argparse.ArgumentParser):
    """Errors as everywhere in this program: one line. No option is guessed from its first letters."""

    def __init__(self, **words: Any) -> None:
        super().__init__(allow_abbrev=False, **words)

    def error(self, message: str) -> NoReturn:
        raise ConfigError(message, option=self.prog.removeprefix("stratovirt "), accepted=f"stratovirt {_USAGE}")


def main(arguments: list[str]) -> int:
    """The exit status. Raises: StratoVirtError."""
    options = _parser().parse_args(arguments)
    try:
        status = int(options.run(options))
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # whoever reads has seen enough
        return 0
    return status


def _parser() -> _Parser:
    parser = _Parser(prog="stratovirt snapshot", description="Take, look at, compare and merge snapshots.")
    kinds = parser.add_subparsers(required=True, metavar="create|show|diff|merge", parser_class=_Parser)

    create = kinds.add_parser("create", help="save the machine behind a QMP socket",
                              description="Save the machine behind a QMP socket. A machine that ran runs on afterwards.")
    create.add_argument("directory", metavar="DIR", help="where to, as the machine's process sees it; made if need be")
    create.add_argument("--qmp", required=True, metavar="SOCKET", help="the machine: PATH, unix:PATH or tcp:HOST:PORT")
    create.add_argument("--diff", action="store_true", help="of the memory only what differs from --base")
    create.add_argument("--base", metavar="DIR", help="an earlier snapshot of this machine, which a restore then needs, too")
    create.add_argument("--track", action=argparse.BooleanOptionalAction,
                        help="count from here on what is written, so that the next --diff need not compare all memory")
    create.add_argument("--paused", action="store_true", help="leave the machine paused")
    create.add_argument("--timeout", type=_seconds, default=_TIMEOUT, metavar="SECONDS",
                        help=f"how long to wait for the machine (default {_TIMEOUT:g})")
    create.set_defaults(run=_create)

    show = kinds.add_parser("show", help="what is in a snapshot", description="Show a snapshot, one value a line.")
    show.add_argument("directory", metavar="DIR")
    show.set_defaults(run=_show)

    diff = kinds.add_parser("diff", help="in what two snapshots differ",
                            description="Compare two snapshots. Exit status 0: no difference, 1: some, 2: trouble.")
    diff.add_argument("one", metavar="DIR")
    diff.add_argument("other", metavar="DIR2")
    diff.set_defaults(run=_diff)

    merge = kinds.add_parser("merge", help="make an incremental snapshot whole",
                             description="Write a snapshot that stands on others as one that stands on nothing.")
    merge.add_argument("directory", metavar="DIR")
    merge.add_argument("into", metavar="INTO", nargs="?", help="where to (default: in its own place)")
    merge.set_defaults(run=_merge)
    return parser


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value <= 86400:
        raise argparse.ArgumentTypeError(f"{text} is not a number of seconds from 1 to 86400")
    return value


def _create(options: argparse.Namespace) -> int:
    from stratovirt.cli.qmp_client import QmpClient, QmpError

    if options.diff != (options.base is not None):
        raise ConfigError("--base DIR is missing" if options.diff else "--diff is missing", option="snapshot create",
                          accepted="--diff --base DIR, or neither")
    directory = os.path.abspath(options.directory)
    more: dict[str, object] = {"base": os.path.abspath(options.base)} if options.diff else {}
    if options.track is not None:
        more["track"] = options.track
    with QmpClient(options.qmp) as client:
        was_running = bool(client.execute("query-status", options.timeout).get("running"))
        try:
            client.execute("migrate", options.timeout, uri=f"file:{directory}", **more)
        except QmpError as error:
            raise ConfigError(str(error), option="snapshot create", value=options.directory) from error
        if was_running and not options.paused:
            client.execute("cont", options.timeout)
    return 0


def _show(options: argparse.Namespace) -> int:
    from stratovirt.cli.snapshot_view import show

    try:
        show(options.directory)
    except SnapshotError as error:
        raise ConfigError(str(error), option="snapshot show", value=options.directory,
                          accepted="a directory of a snapshot") from error
    return 0


def _diff(options: argparse.Namespace) -> int:
    from stratovirt.cli.snapshot_view import differ

    try:
        return int(differ(options.one, options.other))
    except StratoVirtError as error:
        sys.stdout.flush()
        sys.stderr.write(f"stratovirt: snapshot diff: {error}\n")
        return 2


def _merge(options: argparse.Namespace) -> int:
    from stratovirt.snapshot.merge import merge

    try:
        count = merge(options.directory, options.into or options.directory)
    except SnapshotError as error:
        raise ConfigError(str(error), option="snapshot merge", value=options.directory,
                          accepted="a snapshot whose bases are all there, and a place that it does not stand on") from error
    print(f"{count} merged" if count > 1 else "it stands on no other")
    return 0
