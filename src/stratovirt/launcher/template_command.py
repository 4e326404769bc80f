"""`stratovirt template`: making templates of machines that run, and looking after them.

    stratovirt template create NAME --qmp SOCKET     save the machine behind SOCKET, and have the launcher hold it as NAME
    stratovirt template create NAME --directory DIR  have the launcher hold a template that is in DIR already
    stratovirt template list | show NAME | remove NAME

`create` pauses the machine for as long as it takes to save it and to copy the disks that it can write.
"""

from __future__ import annotations

import argparse
import json
import os
import time

from stratovirt.backends import sparse_copy
from stratovirt.cli import command
from stratovirt.cli.qmp_client import QmpClient, QmpError
from stratovirt.errors import ConfigError
from stratovirt.launcher import asking, client
from stratovirt.launcher.asking import Parser
from stratovirt.launcher.template import FILE, NAMES_ACCEPTED, VERSION, is_name, stamp_of
from stratovirt.snapshot import state_file

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

_TIMEOUT = 600.0
_OPTION = "template create"


def main(arguments: list[str]) -> int:
    """The exit status."""
    return asking.told(lambda: _run(arguments))


def _run(arguments: list[str]) -> int:
    options = _parser().parse_args(arguments)
    return int(options.run(options))


def _parser() -> Parser:
    parser = Parser(prog="stratovirt template", allow_abbrev=False,
                    description="Templates are machines that the launcher holds ready for `stratovirt clone`.")
    kinds = parser.add_subparsers(required=True, metavar="create|list|show|remove", parser_class=Parser)

    create = kinds.add_parser("create", help="make a template of a machine",
                              description="Make a template of the machine behind a QMP socket. If it ran, it runs on.")
    create.add_argument("name", metavar="NAME")
    create.add_argument("--qmp", metavar="SOCKET", help="the machine: PATH, unix:PATH or tcp:HOST:PORT")
    create.add_argument("--directory", metavar="DIR", help="where its files are to be, or with no --qmp are already (default: "
                        "a directory beside the launcher's socket; it takes memory and disks)")
    create.add_argument("--paused", action="store_true", help="leave the machine paused")
    asking.add_socket(create)
    create.set_defaults(run=_create)

    listing = kinds.add_parser("list", help="the templates there are", description="The templates that the launcher holds.")
    listing.add_argument("--json", action="store_true", help="as JSON")
    asking.add_socket(listing)
    listing.set_defaults(run=_list)

    show = kinds.add_parser("show", help="a template and its clones", description="Show a template and its clones, as JSON.")
    show.add_argument("name", metavar="NAME")
    asking.add_socket(show)
    show.set_defaults(run=_show)

    remove = kinds.add_parser("remove", help="forget a template",
                              description="Forget a template and remove its files. Clones that run are not concerned.")
    remove.add_argument("name", metavar="NAME")
    remove.add_argument("--keep", action="store_true", help="leave the files, for `template create NAME --directory DIR`")
    asking.add_socket(remove)
    remove.set_defaults(run=_remove)
    return parser


# -- create


def _create(options: argparse.Namespace) -> int:
    name = options.name
    if not is_name(name):
        raise ConfigError("not a name for a template", option=_OPTION, value=name, accepted=NAMES_ACCEPTED)
    if options.qmp is None and options.directory is None:
        raise ConfigError("neither --qmp nor --directory", option=_OPTION, value=name,
                          accepted="--qmp SOCKET for a machine that runs, --directory DIR for a template that was kept")
    if any(template["name"] == name for template in asking.order(options, "list")):
        raise ConfigError("there is a template of this name", option=_OPTION, value=name,
                          accepted="another name, or `stratovirt template remove` before")
    directory = os.path.abspath(options.directory or os.path.join(asking.root(options), name))
    if options.qmp is None:
        asking.order(options, "create", name, directory)
        return 0
    _make_directory(directory, options.directory is None)
    try:
        _save(options, name, directory)
        asking.order(options, "create", name, directory)
    except BaseException:
        _remove_files(directory)
        raise
    return 0


def _make_directory(directory: str, in_root: bool) -> None:
    try:
        if in_root:
            os.makedirs(os.path.dirname(directory), 0o700, exist_ok=True)
        os.mkdir(directory, 0o700)
    except FileExistsError:
        if not os.path.isdir(directory) or os.listdir(directory):
            raise ConfigError("it is there already, and not empty", option=f"{_OPTION} --directory", value=directory,
                              accepted="a directory that is empty or not there; without --qmp one that is a template") from None
    except (OSError, ValueError) as error:
        raise ConfigError(_words(error), option=f"{_OPTION} --directory", value=directory,
                          accepted="a directory that can be made") from error


def _save(options: argparse.Namespace, name: str, directory: str) -> None:
    """Snapshot and disks, of one moment."""
    with QmpClient(options.qmp) as machine:
        was_running = bool(machine.execute("query-status", _TIMEOUT).get("running"))
        try:
            line = machine.execute("query-command-line", _TIMEOUT)
            machine.execute("migrate", _TIMEOUT, uri=f"file:{directory}")
        except QmpError as error:
            raise ConfigError(str(error), option=_OPTION, value=name) from error
        try:
            drives = _save_drives(line["arguments"], line["directory"], directory)
        finally:
            if was_running and not options.paused:
                machine.execute("cont", _TIMEOUT)
    _write(os.path.join(directory, FILE), {"version": VERSION, "name": name, "created": int(time.time()),
                                           "directory": line["directory"], "arguments": line["arguments"], "drives": drives})


def _save_drives(arguments: list[str], cwd: str, directory: str) -> list[dict[str, Any]]:
    saved: list[dict[str, Any]] = []
    for number, drive in enumerate(command.parse(arguments).drives.values()):
        path = os.path.join(cwd, drive.file)
        try:
            if not drive.readonly:
                copy = os.path.join(directory, f"disk-{number}")
                _copy(path, copy)
                path = copy
            status = os.stat(path)
        except OSError as error:
            raise ConfigError(f"the disk {drive.file} (drive {drive.id}): {_words(error)}", option=_OPTION, value=directory,
                              accepted="a disk that can be read, and room for a copy if it can be written; see --directory"
                              ) from error
        saved.append({"id": drive.id, "path": path, "copy": not drive.readonly, "stamp": list(stamp_of(status))})
    return saved


def _copy(source: str, target: str) -> None:
    from_fd = os.open(source, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        fd = os.open(target, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o400)
        try:
            sparse_copy.copy(from_fd, fd)
        finally:
            os.close(fd)
    finally:
        os.close(from_fd)


def _write(path: str, content: dict[str, Any]) -> None:
    """Last, and whole or not at all: without it there is no template."""
    temporary = f"{path}.new"
    try:
        with open(temporary, "w", encoding="utf-8") as file:
            json.dump(content, file, indent=1)
            file.write("\n")
        os.rename(temporary, path)
    except OSError as error:
        raise ConfigError(_words(error), option=_OPTION, value=path) from error


def _words(error: OSError | ValueError) -> str:
    return os.strerror(error.errno or 0) if isinstance(error, OSError) else str(error)


def _remove_files(directory: str) -> None:
    """What belongs to a template, and the directory if nothing else is in it."""
    try:
        for found in os.listdir(directory):
            plain = found.removeprefix(".").removesuffix(".new")
            if plain in (FILE, state_file.STATE, state_file.MEMORY) or (plain[:5] == "disk-" and plain[5:].isdigit()):
                os.unlink(os.path.join(directory, found))
        os.rmdir(directory)
    except OSError as error:
        raise client.Trouble(f"the files in {directory} stay: {_words(error)}") from error


# -- the others


def _list(options: argparse.Namespace) -> int:
    templates = asking.order(options, "list")
    if options.json:
        print(json.dumps(templates, indent=1))
        return 0
    rows = [("NAME", "MEMORY", "CPUS", "CLONES", "CREATED"), *(
        (each["name"], f"{each['memory'] >> 20} MiB", str(each["cpus"]), str(each["clones"]),
         time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(each["created"]))) for each in templates)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        print("  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip())
    return 0


def _show(options: argparse.Namespace) -> int:
    print(json.dumps(asking.order(options, "show", options.name), indent=1))
    return 0


def _remove(options: argparse.Namespace) -> int:
    removed = asking.order(options, "remove", options.name)
    if not options.keep:
        _remove_files(removed["directory"])
    return 0
