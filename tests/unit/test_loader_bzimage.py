"""bzImage: where it goes, what is taken from its header, what is refused."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stratovirt.errors import ConfigError
from stratovirt.loader.image import place
from stratovirt.loader.kernel import identify_kernel
from unit.images import bzimage

MIB = 1 << 20
RAM = [(0, 128 * MIB)]


def identify(data: bytes):
    return identify_kernel(memoryview(data), "bzImage")


def refusal(data: bytes, ram=RAM) -> str:
    with pytest.raises(ConfigError) as caught:
        place(identify(data), ram)
    assert (caught.value.option, caught.value.value) == ("-kernel", "bzImage")
    return caught.value.problem


def test_the_kernel_goes_to_one_mib_and_is_entered_in_long_mode():
    image = identify(bzimage(b"K" * 0x1000, setup_sects=9, cmdline_size=4095, initrd_addr_max=0x7FFF_FFFF))
    assert (image.kind, image.protocol, image.entry) == ("bzimage", "linux64", MIB + 0x200)
    segment, = image.segments
    assert (segment.file_offset, segment.file_size, segment.address) == (10 * 512, 0x1000, MIB)
    assert (image.cmdline_size, image.initrd_addr_max, image.relocatable) == (4095, 0x7FFF_FFFF, True)


def test_the_setup_header_is_taken_as_long_as_the_jump_says():
    data = bytearray(bzimage())
    image = identify(bytes(data))
    assert image.setup_header == data[0x1F1 : 0x202 + 0x6A]
    data[0x201] = 0  # nonsense: then at least what was parsed
    assert len(identify(bytes(data)).setup_header) == 0x7B
    data[0x201] = 0xFF
    assert len(identify(bytes(data)).setup_header) == 0x301 - 0x1F1


def test_no_setup_sectors_means_four():
    segment, = identify(bzimage(setup_sects=0)).segments
    assert segment.file_offset == 5 * 512


def test_a_signature_behind_the_kernel_is_not_loaded():
    segment, = identify(bzimage(bytes(0x1000), tail=b"signature" * 100)).segments
    assert segment.file_size == 0x1000


def test_without_syssize_all_is_loaded():
    segment, = identify(bzimage(bytes(0x1000), syssize=0)).segments
    assert segment.file_size == 0x1000


def test_the_room_to_unpack_belongs_to_the_kernel():
    assert place(identify(bzimage(pref_address=16 * MIB, init_size=32 * MIB)), RAM) == 48 * MIB
    # a preferred address below where it is loaded: it unpacks at the next aligned address
    assert place(identify(bzimage(pref_address=0, init_size=32 * MIB)), RAM) == 34 * MIB
    assert place(identify(bzimage(relocatable=0, pref_address=16 * MIB, init_size=32 * MIB)), RAM) == 48 * MIB


def test_too_little_memory_to_unpack_says_how_much_is_needed():
    assert "at least -m 216M" in refusal(bzimage(init_size=200 * MIB))


@pytest.mark.parametrize(("change", "said"), [
    ({"version": 0x201}, "too old: boot protocol 2.01"),
    ({"version": 0x20B}, "2.11"),
    ({"loadflags": 0}, "zImage"),
    ({"xloadflags": 0x3E}, "32-bit kernel"),
    ({"syssize": 1 << 30}, "truncated"),
    ({"syssize": 0x41}, "truncated"),
    ({"syssize": 0x10}, "256 bytes long"),
    ({"setup_sects": 255, "payload": b""}, "truncated"),
    ({"kernel_alignment": 0}, "alignment 0x0"),
    ({"kernel_alignment": 0x1800}, "alignment 0x1800"),
    ({"code32_start": 0x1000}, "below 1 MiB"),
    ({"code32_start": 0xFFFF_F000}, "not all RAM"),
    ({"pref_address": (1 << 64) - 1}, "not all RAM"),
    ({"init_size": 0xFFFF_FFFF}, "not all RAM"),
])
def test_headers_that_cannot_be_booted(change, said):
    assert said in refusal(bzimage(**change))


def test_a_kernel_that_unpacks_beyond_the_first_gib_is_refused():
    assert "first GiB" in refusal(bzimage(init_size=(1 << 30)), [(0, 3 << 30)])


def test_truncated_anywhere_behind_the_signature_it_is_refused():
    whole = bzimage(b"K" * 0x1000)
    for length in sorted({*range(0x206, 0x280), 0x400, 8 * 512, 8 * 512 + 0x200, len(whole) - 16}):
        refusal(whole[:length])


@settings(max_examples=300, deadline=None)
@given(st.lists(st.tuples(st.integers(0x1F1, 0x270), st.integers(0, 255)), min_size=1, max_size=8))
def test_mutated_headers_raise_nothing_but_config_errors(changes):
    data = bytearray(bzimage())
    for offset, value in changes:
        data[offset] = value
    try:
        image = identify(bytes(data))
        end = place(image, RAM)
    except ConfigError:
        return
    for segment in image.segments:
        assert MIB <= segment.address <= segment.end <= end
        assert segment.file_offset + segment.file_size <= len(data)
    assert image.segments[0].address <= image.entry < end


def test_the_layout_is_that_of_the_boot_protocol():
    """Offsets from Linux's boot.rst, poked one by one."""
    data = bytearray(bzimage())
    for offset, form, value in ((0x214, "<I", 0x20_0000), (0x22C, "<I", 0x3FFF_FFFF), (0x238, "<I", 255),
                                (0x258, "<Q", 0x300_0000), (0x260, "<I", 0x123_4000)):
        struct.pack_into(form, data, offset, value)
    image = identify(bytes(data))
    assert (image.entry, image.initrd_addr_max, image.cmdline_size) == (0x20_0200, 0x3FFF_FFFF, 255)
    assert (image.pref_address, image.init_size) == (0x300_0000, 0x123_4000)
