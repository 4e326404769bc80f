"""The tests of the suite that only one architecture has, each with its reason. Everything else runs on both."""

from __future__ import annotations

import platform

import pytest

# A part of a test's id: why it does not run.
NOT_ON_AARCH64 = {
    "[stock-bzimage-": "a bzImage is an x86_64 kernel",
    "test_other_forms_of_the_small_kernel": "bzImage and flat binaries are x86_64 kernels",
    "test_a_pod_with_three_volumes": "it names a bzImage, as Kata's driver does on x86_64",
    "test_vhost_user_net.py": "DPDK's threads never sleep, and the emulated host has two processors for all that runs in it",
    "test_what_strace_sees_is_what_is_allowed": "there are no system call filters for aarch64 yet",
}
NOT_ON_X86_64 = {
    "test_an_image_in_every_form": "the Image is an arm64 kernel",
}


def not_on_this_architecture(item: pytest.Item) -> str:
    """Why this test does not run on this machine's architecture, "" when it does."""
    exceptions = NOT_ON_AARCH64 if platform.machine() == "aarch64" else NOT_ON_X86_64
    return next((reason for words, reason in exceptions.items() if words in item.nodeid), "")
