"""The documentation says what the declarations say, and its examples are command lines that work."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from stratovirt.cli import command, help, reference, run
from stratovirt.cli.options import OPTIONS
from stratovirt.config import later, options
from stratovirt.control import reference as control_reference
from stratovirt.control.commands import COMMANDS
from stratovirt.errors import ConfigError

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
REGENERATE = "run: python -m stratovirt.cli.reference docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.glob("*.md"))]


def test_the_options_page_is_what_the_declarations_say() -> None:
    assert (DOCS / "reference" / "options.md").read_text(encoding="utf-8") == reference.options_page(), REGENERATE


def test_the_qmp_page_is_what_the_table_says() -> None:
    assert (DOCS / "reference" / "qmp.md").read_text(encoding="utf-8") == control_reference.page(), REGENERATE


def test_the_compatibility_page_is_what_the_declarations_say() -> None:
    text = (DOCS / "compatibility.md").read_text(encoding="utf-8")
    assert set(re.findall(r"<!-- begin: (\w+) -->", text)) == set(reference.BLOCKS)
    assert text == reference.fill(text), REGENERATE


def test_every_option_and_group_is_in_the_reference() -> None:
    page = reference.options_page()
    for option in OPTIONS.values():
        assert f"| `-{option.name}` |" in page
    for groups in (options.DEVICES, options.OBJECTS, options.CHARDEVS, later.DEVICES, later.OBJECTS, later.NETDEVS):
        for group in groups.values():
            assert f"## {group.title}\n" in page


def test_nothing_is_declared_both_as_there_and_as_not_there() -> None:
    assert not set(options.DEVICES) & set(later.DEVICES)
    assert not set(options.OBJECTS) & set(later.OBJECTS)
    assert not set(options.DEVICES) & {*later.PCI_DEVICES, *later.OTHER_DEVICES}


def test_the_list_of_qmp_commands_is_the_interface_s() -> None:
    assert len(reference.QMP_COMMANDS) == len(set(reference.QMP_COMMANDS)) == 69
    assert {"qmp_capabilities", "quit", "stop", "cont", "query-status"} <= {command.name for command in COMMANDS}


def examples(text: str) -> list[str]:
    """Command lines in indented or fenced blocks, with their continuation lines joined."""
    joined = text.replace("\\\n", " ")
    return [line.strip() for line in joined.splitlines() if re.match(r" *stratovirt +(-\w|run )", line)]


def check_example(line: str) -> None:
    words = shlex.split(line)[1:]
    if words[0] == "run":
        own, text = run._split(words[1:])
        made = run.command_line(run._parser().parse_args(own), text, Path("/nonexistent"))
        command.parse(made)
    elif not any(word.endswith("help") or word in ("-h", "-V") for word in words):
        command.parse(words)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_examples_are_command_lines_that_work(page: Path) -> None:
    for line in examples(page.read_text(encoding="utf-8")):
        try:
            check_example(line)
        except ConfigError as error:
            pytest.fail(f"{line}\n{error}")


def test_the_readme_has_examples_to_check() -> None:
    assert len(examples((ROOT / "README.md").read_text(encoding="utf-8"))) >= 2


def test_the_example_in_the_help_works() -> None:
    (line,) = examples(help.usage())
    check_example(line)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)", page.read_text(encoding="utf-8")):
        if "://" not in target:
            assert (page.parent / target).exists(), target
