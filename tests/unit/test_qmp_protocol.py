"""QMP framing and validation, without a socket."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stratovirt.control import protocol
from stratovirt.control.commands import COMMANDS, EVENTS
from stratovirt.control.descriptors import Descriptors
from stratovirt.control.protocol import ABSENT, MAX_DEPTH, MAX_DOCUMENT, Decoder, Malformed, QmpError, Request
from stratovirt.control.table import Command, CommandTable
from stratovirt.control.types import ANY, BOOL, INT, STR, UINT64, Array, Enum, Member, Object, record


def names(found):
    return [item.execute if isinstance(item, Request) else item.description for item in found]


def test_one_several_and_split_documents():
    decoder = Decoder()
    assert names(decoder.feed(b'{"execute":"stop"}')) == ["stop"]
    assert names(decoder.feed(b'{"execute":"stop"}\r\n{"execute":"cont"}{"execute":"quit"}\n\n')) == ["stop", "cont", "quit"]
    assert decoder.feed(b'  {"execute":"qu') == []
    assert names(decoder.feed(b'it"}')) == ["quit"]


def test_braces_and_escapes_within_strings_are_no_structure():
    text = '{"execute":"x","id":"a}\\"{[\\\\","arguments":{"k":"]"}}'
    for cut in range(1, len(text)):
        decoder = Decoder()
        found = decoder.feed(text[:cut].encode()) + decoder.feed(text[cut:].encode())
        assert [(item.execute, item.id, item.arguments) for item in found] == [("x", 'a}"{[\\', {"k": "]"})]


@pytest.mark.parametrize("text", [
    b"quit", b"42", b'"quit"', b"\xff", b"}", b'{"execute"]', b'[}', b'{"a":"line\nbreak"}',
])
def test_what_cannot_be_json_costs_one_error_and_the_rest_of_the_line(text):
    decoder = Decoder()
    first, *rest = decoder.feed(text + b' {"execute":"stop"}')
    assert isinstance(first, Malformed) and first.id is ABSENT
    assert all(isinstance(item, Malformed) for item in rest)
    assert names(decoder.feed(b'{"execute":"cont"}')) == ["cont"]


@pytest.mark.parametrize(("text", "word"), [
    (b"{}", "missing member 'execute'"),
    (b"[]", "JSON object"),
    (b'{"execute":1}', "'execute' must be a string"),
    (b'{"execute":"x","arguments":[]}', "'arguments' must be an object"),
    (b'{"execute":"x","arguments":null}', "'arguments' must be an object"),
    (b'{"execute":"x","exec-oob":1}', "unexpected member 'exec-oob'"),
    (b'{"execute":"x","execute":"y"}', "'execute' appears twice"),
    (b'{"execute":"x","arguments":{"a":1,"a":2}}', "'a' appears twice"),
    (b'{"execute":"\xc3("}', "invalid UTF-8"),
    (b'{"execute":"x","id":NaN}', "NaN is not JSON"),
    (b'{"execute":"x","id":-Infinity}', "-Infinity is not JSON"),
    (b'{"execute":"x","id":1e999}', "out of range"),
    (b'{"execute":"x","id":' + b"9" * 60000 + b"}", "60000 digits"),
    (b'{"execute" "x"}', "column"),
    (b"{'execute':'x'}", "column"),
    (b'{"execute":"\\q"}', "column"),
    (b'{"execute":"x",}', "column"),
    (b"[" * (MAX_DEPTH + 1) + b"]" * (MAX_DEPTH + 1), "nested deeper"),
    (b"[" * 30000 + b"]" * 30000, "nested deeper"),
])
def test_malformed_requests_say_what_is_wrong_and_the_next_one_works(text, word):
    decoder = Decoder()
    (found,) = decoder.feed(text)
    assert isinstance(found, Malformed) and word in found.description
    assert names(decoder.feed(b'{"execute":"stop"}')) == ["stop"]


def test_the_id_of_a_request_with_a_wrong_shape_is_kept():
    (found,) = Decoder().feed(b'{"execute":5,"id":"libvirt-7"}')
    assert found.id == "libvirt-7"


def test_nesting_up_to_the_limit_is_fine():
    inner = b"[" * (MAX_DEPTH - 1) + b"]" * (MAX_DEPTH - 1)
    (found,) = Decoder().feed(b'{"execute":"x","id":' + inner + b"}")
    assert isinstance(found, Request)


def test_a_document_that_is_too_long_is_refused_once_skipped_whole_and_not_kept():
    decoder = Decoder()
    found = decoder.feed(b'{"execute":"x","id":"')
    for _ in range(40):
        found += decoder.feed(b'{\\"execute\\":\\"quit\\"}' * 1000)
        assert len(decoder._document) <= MAX_DOCUMENT
    assert names(found) == [protocol.TOO_LONG]
    assert names(decoder.feed(b'"}{"execute":"stop"}')) == ["stop"]


def test_the_longest_document_is_taken():
    text = b'{"execute":"x","id":"' + b"a" * (MAX_DOCUMENT - 23) + b'"}'
    assert len(text) == MAX_DOCUMENT
    assert names(Decoder().feed(text)) == ["x"]
    assert names(Decoder().feed(text.replace(b"aa", b"aaa", 1))) == [protocol.TOO_LONG]


JSON = st.recursive(st.none() | st.booleans() | st.integers(-2**70, 2**70) | st.floats(allow_nan=False, allow_infinity=False)
                    | st.text(), lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3))


@given(st.lists(st.tuples(st.text(), st.dictionaries(st.text(), JSON, max_size=3), JSON), max_size=4),
       st.lists(st.integers(1, 40), max_size=20), st.booleans(), st.sampled_from([b"", b"\n", b"\r\n", b"  "]))
@settings(deadline=None)
def test_any_requests_cut_anywhere_come_out_as_they_went_in(requests, cuts, ascii_only, gap):
    stream = b"".join(
        json.dumps({"execute": name, "arguments": arguments, "id": id}, ensure_ascii=ascii_only).encode(
            "utf-8", "surrogatepass" if ascii_only else "strict") + gap
        for name, arguments, id in requests)
    decoder, found = Decoder(), []
    for cut in cuts:
        found += decoder.feed(stream[:cut])
        stream = stream[cut:]
    found += decoder.feed(stream)
    assert [(item.execute, item.arguments, item.id) for item in found] == requests


@given(st.lists(st.one_of(st.binary(max_size=60), st.text(alphabet='{}[]"\\:, \n\x00ae1', max_size=60).map(str.encode),
                          st.sampled_from([b'{"execute":"stop"}', b'{"execute":', b'"}', b"\n"])), max_size=30))
@settings(max_examples=300, deadline=None)
def test_no_bytes_break_the_decoder_and_a_new_line_after_closing_recovers(pieces):
    decoder = Decoder()
    for piece in pieces:
        for item in decoder.feed(piece):
            line = protocol.encode_error("GenericError", item.description, item.id) if isinstance(item, Malformed) else (
                protocol.encode_return(item.arguments, item.id))
            assert line.endswith(b"\r\n") and b"\n" not in line[:-2]
            json.loads(line)
    decoder.feed(b'"\n"\n' + b"]}" * 200 + b"\n")
    assert names(decoder.feed(b'{"execute":"stop"}'))[-1:] == ["stop"]


# -- what is sent


def test_greeting_is_what_clients_of_the_reference_expect():
    assert protocol.encode_greeting() == (
        b'{"QMP":{"version":{"qemu":{"micro":1,"minor":0,"major":5},"package":"StratoVirt-2.5.0"},"capabilities":[]}}\r\n')


@pytest.mark.parametrize("id", ["a", 7, 2**80, None, True, 1.5, [1, {"b": 2}], "\ud800", "\r\n"])
def test_any_id_is_echoed_after_the_return(id):
    line = protocol.encode_return({"b": 1, "a": 2}, id)
    assert line.startswith(b'{"return":{"a":2,"b":1},"id":') and line.endswith(b"}\r\n")
    assert json.loads(line)["id"] == id


def test_without_an_id_there_is_none():
    assert protocol.encode_return({}) == b'{"return":{}}\r\n'
    assert protocol.encode_error("GenericError", 'no "x"') == (
        b'{"error":{"class":"GenericError","desc":"no \\"x\\""}}\r\n')
    assert protocol.encode_event("STOP", {}, 5, 6) == (
        b'{"event":"STOP","data":{},"timestamp":{"seconds":5,"microseconds":6}}\r\n')


# -- the table


def command(**options):
    return Command("test", lambda _machine, arguments: arguments, "", **options)


ARGUMENTS = (Member("path", STR), Member("size", UINT64, optional=True), Member("on", BOOL, optional=True),
             Member("delta", INT, optional=True), Member("words", Array(Enum("a", "b")), optional=True),
             Member("file", record({"name": STR, "size?": UINT64}), optional=True))


@pytest.mark.parametrize(("arguments", "word"), [
    (None, "missing field `arguments`"), ({}, "missing field `path`"), ({"path": 1}, "`path` must be a string"),
    ({"path": None}, "`path`"), ({"path": "", "size": -1}, "`size` must be an unsigned"),
    ({"path": "", "size": 2**64}, "`size`"), ({"path": "", "size": True}, "`size`"), ({"path": "", "size": 1.0}, "`size`"),
    ({"path": "", "on": 1}, "`on` must be true or false"), ({"path": "", "delta": 2**63}, "`delta`"),
    ({"path": "", "colour": 1}, "unknown field `colour`, expected one of `path`, `size`, `on`, `delta`, `words`, `file`"),
    ({"path": "", "words": "a"}, "`words` must be an array"), ({"path": "", "words": ["a", 1]}, "`words[1]` must be a string"),
    ({"path": "", "words": ["c"]}, "unknown variant `c` of `words[0]`, expected one of `a`, `b`"),
    ({"path": "", "file": []}, "`file` must be an object"), ({"path": "", "file": {}}, "missing field `file.name`"),
    ({"path": "", "file": {"name": "", "x": 1}}, "unknown field `file.x`"),
    ({"path": "", "file": {"name": "", "size": "1"}}, "`file.size` must be"),
])
def test_wrong_arguments_are_named(arguments, word):
    with pytest.raises(QmpError) as caught:
        command(arguments=ARGUMENTS).check(arguments)
    assert word in caught.value.description and caught.value.error_class == "GenericError"


def test_right_arguments_pass_and_lax_commands_take_more():
    full = {"path": "", "size": 2**64 - 1, "on": False, "delta": -(2**63)}
    assert command(arguments=ARGUMENTS).check(full) == full
    assert command(strict=False).check({"anything": 1}) == {"anything": 1}
    with pytest.raises(QmpError, match="there are no fields"):
        command().check({"anything": 1})


def test_unknown_commands_have_a_class_of_their_own():
    with pytest.raises(QmpError) as caught:
        COMMANDS.dispatch(None, Request("no-such", {}, ABSENT), Descriptors())
    assert (caught.value.error_class, str(caught.value)) == (
        "CommandNotFound", "The command no-such has not been found")


def test_a_command_declared_twice_is_a_mistake():
    with pytest.raises(ValueError):
        CommandTable((command(), command()))


# As clients of the reference know it (its `query-commands`); what is ours comes after.
REFERENCE = """
qmp_capabilities quit stop cont system_powerdown system_reset device_add device_del chardev-add chardev-remove
netdev_add netdev_del netdev_replace netlink_set cameradev_add cameradev_del query-hotpluggable-cpus query-cpus
query-status getfd blockdev-add blockdev-del balloon set-viomem get-viomem query-mem query-mem-gpa query-balloon
query-vnc query-display-image switch-audio-record migrate query-migrate migrate_cancel query-version query-commands
query-target query-kvm query-machines query-events qom-list-types device-list-properties block-commit query-tpm-models
query-tpm-types query-command-line-options query-migrate-capabilities query-qmp-schema query-sev-capabilities
query-chardev qom-list qom-get query-block query-named-block-nodes query-blockstats query-block-jobs
query-gic-capabilities query-iothreads update_region input_event human-monitor-command blockdev-snapshot-internal-sync
blockdev-snapshot-delete-internal-sync query-vcpu-reg trace-get-state trace-set-state query-ohui-status query-workloads
detect-silent-audio
""".split()


def test_commands_are_listed_in_the_order_of_the_reference_and_say_what_they_do():
    listed = [entry["name"] for entry in COMMANDS.dispatch(None, Request("query-commands", None, ABSENT), Descriptors())]
    assert listed == [entry.name for entry in COMMANDS] and len(set(listed)) == len(listed)
    assert listed[:len(REFERENCE)] == REFERENCE
    assert set(listed[len(REFERENCE):]) == {
        "closefd", "query-command-line", "query-cpus-fast", "query-name", "query-uuid", "query-memory-size-summary", "set_link"}
    assert all(entry.summary for entry in COMMANDS) and all(event.summary for event in EVENTS)


def test_the_schema_describes_every_command_and_each_type_that_it_uses():
    entries = COMMANDS.dispatch(None, Request("query-qmp-schema", None, ABSENT), Descriptors())
    by_name = {entry["name"]: entry for entry in entries}
    assert len(by_name) == len(entries)
    kinds = {name: entry["meta-type"] for name, entry in by_name.items()}
    assert {name for name, kind in kinds.items() if kind == "command"} == {command.name for command in COMMANDS}
    assert {name for name, kind in kinds.items() if kind == "event"} == {event.name for event in EVENTS}
    for entry in entries:
        used = [entry[key] for key in ("arg-type", "ret-type", "element-type") if key in entry]
        used += [member["type"] for member in entry.get("members", ())]
        assert set(used) <= set(by_name), entry
        if entry["meta-type"] == "command":
            assert kinds[entry["arg-type"]] == "object"
    blockdev = by_name[by_name["blockdev-add"]["arg-type"]]
    file = next(member for member in blockdev["members"] if member["name"] == "file")
    names = {member["name"]: "default" in member for member in by_name[file["type"]]["members"]}
    assert names["filename"] is False and names["aio"] is True


def test_a_value_is_of_the_type_that_describes_it():
    Object(Member("a", ANY), open=True).check({"a": None, "b": 1}, "")
    with pytest.raises(QmpError, match="`x` must be an object"):
        record({}).check(None, "x")
