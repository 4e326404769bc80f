"""The filters for arm64, run by the same machine for programs of BPF: where they differ from those for x86_64."""

from __future__ import annotations

import pytest

from stratovirt.backends.aio_syscalls import _NUMBERS as AIO
from stratovirt.hypervisor.kvm import _uapi as common
from stratovirt.hypervisor.kvm import _uapi_arm64 as kvm
from stratovirt.machine.vcpus import KICK_SIGNAL
from stratovirt.sandbox import IOTHREAD, KINDS, MAIN, VCPU, bpf, kernel, rules, tables_aarch64, tables_x86_64
from stratovirt.sandbox.calls import numbers
from unit.bpf_machine import check
from unit.bpf_machine import run as run_program

ALLOW, TRAP, KILL = 0x7FFF_0000, 0x0003_0000, 0x8000_0000
AARCH64, X86_64 = 0xC000_00B7, 0xC000_003E
PID = 4711
NUMBERS = numbers("aarch64")
NAMES = {number: name for name, number in NUMBERS.items()}
AT_FDCWD = -100
RDWR, WRONLY, CREAT, EXCL, TRUNC, APPEND, NOCTTY = 2, 1, 0o100, 0o200, 0o1000, 0o2000, 0o400
CLOEXEC, NONBLOCK, DIRECT, DIRECTORY, PATH, NOFOLLOW = 0o2000000, 0o4000, 0o200000, 0o40000, 0o10000000, 0o100000


def filter_of(kind: int, *granted: bytes) -> bytes:
    program = tables_aarch64.FILTERS[kind].replace((0x7E57_C0DE).to_bytes(4, "little"), PID.to_bytes(4, "little"))
    for mark in granted:
        program = program.replace(mark, kernel._ALLOWED)
    return program


def answer(kind: int, call: str, *arguments: int) -> int:
    return run_program(filter_of(kind), NUMBERS[call], *arguments, arch=AARCH64)


def test_numbers_of_calls() -> None:
    """From asm-generic/unistd.h."""
    wanted = {"io_setup": 0, "epoll_pwait": 22, "fcntl": 25, "ioctl": 29, "mkdirat": 34, "unlinkat": 35, "renameat": 38,
              "openat": 56, "close": 57, "read": 63, "write": 64, "ppoll": 73, "newfstatat": 79, "exit": 93, "futex": 98,
              "clock_gettime": 113, "tgkill": 131, "rt_sigaction": 134, "rt_sigreturn": 139, "prctl": 167, "getpid": 172,
              "gettid": 178, "recvmsg": 212, "brk": 214, "munmap": 215, "clone": 220, "execve": 221, "mmap": 222,
              "mprotect": 226, "madvise": 233, "accept4": 242, "wait4": 260, "seccomp": 277, "membarrier": 283, "preadv2": 286,
              "rseq": 293, "io_uring_setup": 425, "clone3": 435, "set_mempolicy_home_node": 450}
    assert {name: NUMBERS[name] for name in wanted} == wanted
    assert tuple(NUMBERS[name] for name in ("io_setup", "io_destroy", "io_submit", "io_getevents")) == AIO["aarch64"]


@pytest.mark.parametrize("kind", KINDS)
def test_programs_and_marks(kind: int) -> None:
    program = tables_aarch64.FILTERS[kind]
    check(program)
    assert program.count(kernel._PID_MARK) == (kind == MAIN)
    assert tables_aarch64.HANDLER.count(kernel._DATA_MARK) == 1
    assert len(tables_aarch64.HANDLER) <= 4096
    assert kernel._NAMES_AT + len(tables_aarch64.CALL_NAMES) < kernel._DATA_PAGES * 4096


@pytest.mark.parametrize("kind", KINDS)
def test_another_architectures_call_kills(kind: int) -> None:
    assert run_program(filter_of(kind), NUMBERS["write"], arch=0x4000_0028) == KILL  # the 32-bit calls of an arm64 kernel
    assert run_program(filter_of(kind), NUMBERS["write"], arch=X86_64) == KILL
    assert run_program(tables_x86_64.FILTERS[kind], 1, arch=AARCH64) == KILL
    for number in (0x3FFF_FFFE, 0xFFFF_FFFF, NUMBERS["write"] | 0x4000_0000):
        assert run_program(filter_of(kind), number, arch=AARCH64) == TRAP | kind


@pytest.mark.parametrize("kind", KINDS)
def test_the_filters_allow_the_calls_of_the_table_and_no_others(kind: int) -> None:
    program = filter_of(kind, kernel._IO_URING_MARK, kernel._VHOST_USER_MARK)
    passing: dict[str, list[tuple[int, ...]]] = {}
    for rule in rules.rules_of(kind, "aarch64"):
        arguments = [0] * 6
        for test in rule.tests:
            if test.values:
                arguments[test.argument] = PID if test.values == (rules.OWN_PID,) else test.values[-1]
        passing.setdefault(rule.call, []).append(tuple(arguments))
    allowed = {NAMES.get(number, str(number)) for number in range(1024)
               if any(run_program(program, number, *arguments, arch=AARCH64) == ALLOW
                      for arguments in passing.get(NAMES.get(number, ""), [()]))}
    assert allowed == rules.allowed_calls(kind, "aarch64")
    assert {rule.call for rule in rules.rules_of(kind, "aarch64")} <= set(NUMBERS)


def test_every_row_is_for_somebody() -> None:
    for rule in rules.RULES:
        assert rule.only in ("", "x86_64", "aarch64")
        for architecture in ("x86_64", "aarch64"):
            if rule.only in ("", architecture):
                assert rule.call in numbers(architecture), rule.call


def test_the_numbers_of_requests_are_those_the_program_uses() -> None:
    for table in (rules.KVM_ON_VCPU_THREADS_AARCH64, rules.KVM_ON_MAIN_AARCH64):
        for name, number in table.items():
            assert getattr(kvm, name, getattr(common, name, 0)) == number, name


@pytest.mark.parametrize(("kind", "call", "allowed", "refused"), [
    (VCPU, "ioctl", (5, common.KVM_RUN, 0), [(5, kvm.KVM_SET_ONE_REG), (5, common.KVM_CREATE_VM), (5, 0x5401)]),
    (VCPU, "ioctl", (5, kvm.KVM_IRQ_LINE, 0), [(5, kvm.KVM_SET_DEVICE_ATTR), (5, kvm.KVM_ARM_VCPU_INIT)]),
    (MAIN, "ioctl", (5, kvm.KVM_SET_ONE_REG, 0), [
        (5, common.KVM_RUN), (5, common.KVM_CREATE_VM), (5, kvm.KVM_CREATE_DEVICE), (5, common.KVM_CREATE_VCPU)]),
    (MAIN, "ioctl", (5, common.KVM_GET_DIRTY_LOG, 0), []),
    (IOTHREAD, "ioctl", (5, 0x1277, 0), [(5, kvm.KVM_IRQ_LINE), (5, common.KVM_RUN)]),
    (MAIN, "openat", (AT_FDCWD, 1, RDWR | CLOEXEC | NONBLOCK | DIRECT), [
        (5, 1, 0), (AT_FDCWD, 1, RDWR | CREAT | CLOEXEC, 0o600), (AT_FDCWD, 1, RDWR | TRUNC), (AT_FDCWD, 1, PATH),
        (AT_FDCWD, 1, NOFOLLOW)]),
    (MAIN, "openat", (AT_FDCWD, 1, CLOEXEC | NONBLOCK | DIRECTORY), []),
    (MAIN, "openat", (AT_FDCWD, 1, RDWR | CREAT | EXCL | CLOEXEC, 0o600), [(5, 1, RDWR | CREAT | EXCL | CLOEXEC)]),
    (MAIN, "openat", (AT_FDCWD, 1, WRONLY | APPEND | CREAT | CLOEXEC | NOCTTY, 0o640), [
        (AT_FDCWD, 1, WRONLY | CREAT | CLOEXEC | NOCTTY)]),
    (MAIN, "unlinkat", (AT_FDCWD, 1, 0), [(5, 1, 0), (AT_FDCWD, 1, 0x200)]),
    (MAIN, "renameat", (AT_FDCWD, 1, AT_FDCWD, 2), [(5, 1, AT_FDCWD, 2), (AT_FDCWD, 1, 5, 2)]),
    (MAIN, "mkdirat", (AT_FDCWD, 1, 0o700), [(5, 1, 0o700)]),
    (MAIN, "tgkill", (PID, 1, KICK_SIGNAL), [(PID, 1, 35), (PID - 1, 1, KICK_SIGNAL)]),
    (IOTHREAD, "clone", (0x3D0F00, 0), [(0x0120_0011, 0), (0x11, 0)]),
    (VCPU, "mmap", (0, 4096, 3, 0x22), [(0, 4096, 7, 0x22)]),
])
def test_arguments(kind: int, call: str, allowed: tuple[int, ...], refused: list[tuple[int, ...]]) -> None:
    assert answer(kind, call, *allowed) == ALLOW
    for arguments in refused:
        assert answer(kind, call, *arguments) == TRAP | bpf.OTHER_ARGUMENTS | kind, arguments


@pytest.mark.parametrize("kind", KINDS)
def test_nobody_needs_these(kind: int) -> None:
    for call in ("execve", "ptrace", "prctl", "seccomp", "bpf", "kill", "rt_sigaction", "memfd_create", "linkat", "symlinkat",
                 "mknodat", "fchmodat", "renameat2", "openat2", "pidfd_getfd", "process_vm_writev"):
        assert answer(kind, call) == TRAP | kind, call
