"""ELF kernels: entry points, segments, and every way in which a file can lie."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stratovirt.errors import ConfigError
from stratovirt.loader.image import place
from stratovirt.loader.kernel import identify_kernel
from unit.images import EHDR_SIZE, Load, elf, note, pvh_elf, xen_note

MIB = 1 << 20
RAM = [(0, 128 * MIB)]


def identify(data: bytes):
    return identify_kernel(memoryview(data), "vmlinux")


def refusal(data: bytes) -> str:
    with pytest.raises(ConfigError) as caught:
        place(identify(data), RAM)
    assert caught.value.option == "-kernel"
    assert caught.value.value == "vmlinux"
    assert caught.value.accepted
    return caught.value.problem


def test_the_pvh_note_decides_protocol_and_entry():
    code = bytes(range(16))
    image = identify(elf([Load(code, MIB)], entry=0x1234, notes=xen_note(MIB + 8)))
    assert (image.kind, image.protocol, image.entry) == ("elf", "pvh", MIB + 8)
    segment, = image.segments
    assert (segment.address, segment.file_size, segment.memory_size) == (MIB, 16, 16)


def test_the_note_is_found_among_others_and_in_either_width():
    others = note(b"GNU\0", 3, b"build-id-of-20-bytes") + note(b"Linux\0", 18, b"1234") + note(b"Xen\0", 6, b"linux\0")
    for size in (4, 8):
        assert identify(elf([Load(b"x", MIB)], entry=0, notes=others + xen_note(MIB, size))).entry == MIB


def test_notes_may_be_aligned_to_eight():
    notes = note(b"GNU\0", 5, b"12345", align=8) + note(b"Xen\0", 18, MIB.to_bytes(8, "little"), align=8)
    assert identify(elf([Load(b"x", MIB)], entry=0, notes=notes, note_align=8)).entry == MIB


def test_without_a_note_the_64_bit_protocol_enters_at_e_entry():
    image = identify(elf([Load(bytes(64), 16 * MIB, vaddr=0xFFFF_FFFF_8100_0000)], entry=16 * MIB + 4))
    assert (image.protocol, image.entry) == ("linux64", 16 * MIB + 4)


def test_a_virtual_entry_is_translated_through_its_segment():
    loads = [Load(bytes(64), 16 * MIB, vaddr=0xFFFF_FFFF_8100_0000), Load(bytes(64), 32 * MIB, vaddr=0xFFFF_FFFF_8200_0000)]
    assert identify(elf(loads, entry=0xFFFF_FFFF_8200_0010)).entry == 32 * MIB + 0x10


def test_bss_counts_into_the_end_of_the_kernel():
    image = identify(elf([Load(b"x" * 100, MIB, memory_size=5 * MIB)], entry=MIB, notes=xen_note(MIB)))
    assert image.end == 6 * MIB
    assert place(image, RAM) == 6 * MIB


@pytest.mark.parametrize(("change", "said"), [
    ({"machine": 183}, "arm64"),
    ({"machine": 243}, "RISC-V"),
    ({"machine": 3, "ident": b"\x7fELF\x01\x01\x01"}, "32-bit x86"),
    ({"ident": b"\x7fELF\x01\x01\x01"}, "32-bit ELF"),
    ({"ident": b"\x7fELF\x02\x02\x01"}, "big-endian"),
    ({"ident": b"\x7fELF\x07\x01\x01"}, "damaged"),
    ({"ident": b"\x7fELF\x02\x00\x01"}, "damaged"),
    ({"e_type": 1}, "object file or kernel module"),
    ({"e_type": 4}, "core dump"),
    ({"e_type": 77}, "type 77"),
    ({"phentsize": 32}, "32 bytes each"),
    ({"phnum": 0}, "no program headers"),
    ({"phnum": 0xFFFF}, "65535 program headers"),
    ({"phnum": 100}, "truncated"),
    ({"interp": True}, "program for Linux"),
    ({"entry": 0x7777}, "lies in no segment"),
    ({"notes": xen_note(0x7777)}, "lies in no segment"),
    ({"notes": note(b"Xen\0", 18, b"123")}, "3 bytes long"),
    ({"notes": struct.pack("<III", 4, 1 << 31, 18) + b"Xen\0"}, "runs past the end"),
    ({"notes": struct.pack("<III", 0xFFFF_FFFF, 0xFFFF_FFFF, 1)}, "runs past the end"),
    ({"notes": note(b"", 0, b"") * 2000}, "more than 1024 notes"),
])
def test_files_that_are_no_kernel_for_this_machine_are_named(change, said):
    arguments = {"entry": MIB, **change}
    assert said in refusal(elf([Load(b"\xf4", MIB)], **arguments))


@pytest.mark.parametrize(("loads", "said"), [
    ([], "no program headers"),
    ([Load(b"", MIB)], "nothing to load"),
    ([Load(b"xy", MIB, memory_size=1)], "more bytes in the file than in memory"),
    ([Load(b"x", (1 << 64) - 16, memory_size=17)], "past the end of the address space"),
    ([Load(b"x", MIB, vaddr=(1 << 64) - 16, memory_size=17)], "past the end of the address space"),
    ([Load(b"x", MIB), Load(b"x", 0x7000)], "below 1 MiB"),
    ([Load(b"x", MIB), Load(b"x", 0)], "below 1 MiB"),
    ([Load(b"x", MIB, memory_size=4096), Load(b"x", MIB + 4095)], "overlap at 0x100fff"),
    ([Load(b"x", MIB), Load(b"x", MIB)], "overlap"),
    ([Load(b"x", MIB), Load(b"x", 128 * MIB - 1, memory_size=2)], "at least -m 129M"),
    ([Load(b"x", MIB), Load(b"x", 0xFEC0_0000)], "not all RAM"),
    ([Load(b"x", MIB, memory_size=1 << 62)], "not all RAM"),
])
def test_segments_that_cannot_be(loads, said):
    assert said in refusal(elf(loads, entry=MIB))


def test_the_64_bit_protocol_reaches_one_gib():
    image = identify(elf([Load(b"x", 1 << 30)], entry=1 << 30))
    with pytest.raises(ConfigError, match="first GiB"):
        place(image, [(0, 3 << 30)])
    pvh = identify(elf([Load(b"x", 1 << 30)], entry=1 << 30, notes=xen_note(1 << 30)))
    assert place(pvh, [(0, 3 << 30)]) == (1 << 30) + 1


def test_a_kernel_may_lie_above_the_gap_but_not_be_entered_there():
    high = 1 << 32
    ranges = [(0, 3 << 30), (high, 1 << 30)]
    image = identify(elf([Load(b"x", MIB), Load(b"y", high)], entry=MIB, notes=xen_note(MIB)))
    assert place(image, ranges) == high + 1
    image = identify(elf([Load(b"y", high)], entry=high, notes=xen_note(high, 8)))
    with pytest.raises(ConfigError, match="above 4 GiB"):
        place(image, ranges)


def test_truncated_anywhere_it_is_refused():
    whole = elf([Load(b"A" * 5000, MIB), Load(b"B" * 300, 2 * MIB)], entry=MIB, notes=xen_note(MIB))
    place(identify(whole), RAM)
    interesting = {*range(4, EHDR_SIZE + 3 * 56 + 30), *range(4090, 4100), len(whole) - 301, len(whole) - 1}
    for length in sorted(interesting):
        refusal(whole[:length])


def test_every_program_header_pointing_at_the_same_huge_notes_ends_soon():
    notes = note(b"GNU\0", 1, b"") * 900
    header = struct.pack("<16sHHIQQQIHHHHHH", b"\x7fELF\x02\x01\x01", 2, 62, 1, MIB, 64, 0, 0, 64, 56, 128, 0, 0, 0)
    offset = 64 + 128 * 56
    headers = struct.pack("<IIQQQQQQ", 1, 5, 0, MIB, MIB, 16, 16, 4096)
    headers += struct.pack("<IIQQQQQQ", 4, 4, offset, 0, 0, len(notes), len(notes), 4) * 127
    assert "more than 1024 notes" in refusal(header + headers + notes)


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_mutated_headers_raise_nothing_but_config_errors(data):
    whole = bytearray(elf([Load(b"A" * 64, MIB), Load(b"B" * 64, 2 * MIB, memory_size=4096)], entry=MIB, notes=xen_note(MIB)))
    for _ in range(data.draw(st.integers(1, 6))):
        width = data.draw(st.sampled_from([1, 2, 4, 8]))
        offset = data.draw(st.integers(0, EHDR_SIZE + 3 * 56 + 24 - width))
        value = data.draw(st.one_of(
            st.sampled_from([0, 1, (1 << 8 * width) - 1, 1 << (8 * width - 1), 4096, 0x10_0000]), st.integers(0, 1 << 64)))
        whole[offset : offset + width] = (value & (1 << 8 * width) - 1).to_bytes(width, "little")
    try:
        image = identify(bytes(whole))
        end = place(image, RAM)
    except ConfigError:
        return
    for segment in image.segments:
        assert MIB <= segment.address <= segment.end <= end <= RAM[0][1]
        assert segment.file_size == 0 or segment.file_offset + segment.file_size <= len(whole)
        assert segment.file_size <= segment.memory_size


def test_the_smallest_guest():
    image = identify(pvh_elf(b"\xf4"))
    assert (image.protocol, image.entry, place(image, RAM)) == ("pvh", MIB, MIB + 1)
