"""One suite, run on both architectures, and what is not the same: the tests that only one has, each with its reason, and those
that only a long run has on arm64, where the whole suite would take `make test` another quarter of an hour.
"""

from __future__ import annotations

import platform

import pytest

# A part of a test's id: why it does not run.
NOT_ON_AARCH64 = {
    "[stock-bzimage-": "a bzImage is an x86_64 kernel",
    "test_other_forms_of_the_small_kernel": "bzImage and flat binaries are x86_64 kernels",
    "test_a_pod_with_three_volumes": "it names a bzImage, as Kata's driver does on x86_64",
    "test_vhost_user_net.py": "DPDK's threads never sleep, and the emulated host has two processors for all that runs in it",
    "test_disk_and_network_go_on_in_another_machine": "DPDK, as above",
    "test_two_guests_of_one_snapshot_know_that_they_are_two": "Linux reads the generation ID of a device tree since 6.10 only",
}
# On arm64 these count as long: each repeats, on another kernel, engine, end or number of processors, what another test of its
# file shows there, or shows a part of the program that is the same on both.
LONG_ON_AARCH64 = (
    "test_a_reset_gives_the_guest_all_its_memory",
    "test_fio_verifies_a_random_mix_on_every_engine_at_once",
    "test_several_queues_and_writers",
    "test_a_full_host_file_system_gives_io_errors",
    "test_discard_and_zeroes_give_space_back",
    "test_stop_and_reset_in_the_middle_of_requests",
    "test_a_limit_of_requests_a_second",
    "test_ports_work_again_after_a_reset",
    "test_a_read_only_image_cannot_be_written",
    "test_a_disk_stays_in_its_slot_over_a_reset",
    "test_boots_to_init_and_sees_its_devices[small-elf-",
    "test_a_stock_boot_sits_through_no_probe",
    "test_256_mib_written_by_the_guest_are_on_the_image[stock-elf-2]",
    "test_a_read_only_disk_refuses_writes[stock-elf]",
    "test_a_panic_ends_the_process[small-elf]",
    "test_signals_end_it_cleanly[1]",
    "test_signals_end_it_cleanly[2]",
    "test_stop_and_cont_under_load_lose_nothing",
    "test_system_reset_starts_the_kernel_again[stock-elf]",
    "test_a_guest_reboot_with_action_reset_boots_again",
    "test_ping_and_tcp_both_ways[small-iothread]",
    "test_ping_and_tcp_both_ways[stock]",
    "test_a_disk_and_an_interface_share_an_iothread",
    "test_ping_and_iperf_both_ways[main loop]",
    "test_ping_and_iperf_both_ways[rx and tx iothread]",
    "test_ping_and_iperf_both_ways[two queues]",
    "test_ping_and_iperf_both_ways[vhost, two queues]",
    "test_ten_times_out_and_in_again_under_traffic",
    "test_qmp_answers_under_load_of_disk_and_network",
    "test_10000_files_of_the_host_are_in_the_guest",
    "test_snapshot.py",
    "test_a_share_of_an_old_virtiofsd_is_refused_before_anything_is_written",
    "test_programs_in_the_guest_get_errors_when_virtiofsd_dies",
    "test_what_the_guest_writes_is_in_the_image[stock-elf-2]",
    "test_a_disk_is_there_again_after_a_reset",
    "test_a_disk_whose_back_end_is_killed",
    "test_a_paused_machine_leaves_its_disk_alone",
    "test_a_disk_of_another_process_goes_on_in_another_machine",
    "test_an_inherited_descriptor_with_its_cid_reserved",
    "test_sockets_work_again_after_a_reset",
)
NOT_ON_X86_64 = {
    "test_an_image_in_every_form": "the Image is an arm64 kernel",
    "test_processors.py": "pmu and sve are arm64's",
}


def not_on_this_architecture(item: pytest.Item) -> str:
    """Why this test does not run on this machine's architecture, "" when it does."""
    exceptions = NOT_ON_AARCH64 if platform.machine() == "aarch64" else NOT_ON_X86_64
    return next((reason for words, reason in exceptions.items() if words in item.nodeid), "")


def long_on_this_architecture(item: pytest.Item) -> bool:
    """Whether only a long run has this test on this machine's architecture."""
    return platform.machine() == "aarch64" and any(words in item.nodeid for words in LONG_ON_AARCH64)
