"""The filters of system calls: what each kind of thread may do, argument by argument, and that the bytes say the same."""

from __future__ import annotations

import ast
import importlib
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from stratovirt.backends import tap
from stratovirt.backends.aio_syscalls import IO_URING_ENTER, IO_URING_REGISTER, IO_URING_SETUP
from stratovirt.backends.block_holes import BLKDISCARD
from stratovirt.hostmap import PAGE_SIZE, HostMapping
from stratovirt.hypervisor.kvm import _uapi as kvm
from stratovirt.hypervisor.kvm.dirty_log import DirtyLog
from stratovirt.hypervisor.kvm.system import KvmSystem
from stratovirt.hypervisor.kvm.vm import KvmVm
from stratovirt.lockdown import DISK_MODULES
from stratovirt.machine.vcpus import KICK_SIGNAL
from stratovirt.memory import RamRegion
from stratovirt.sandbox import IOTHREAD, KIND_NAMES, KINDS, MAIN, VCPU, bpf, generate, kernel, report, rules
from stratovirt.sandbox import tables_x86_64 as tables
from stratovirt.sandbox.calls import by_number, numbers
from stratovirt.vhost import _uapi as vhost
from unit.bpf_machine import check, run

SOURCE = Path(generate.__file__).resolve().parents[2]
ALLOW, TRAP, KILL = 0x7FFF_0000, 0x0003_0000, 0x8000_0000
ENOSYS, EPERM, EACCES = 0x0005_0000 | 38, 0x0005_0000 | 1, 0x0005_0000 | 13
PID = 4711
NUMBERS = numbers("x86_64")
NAMES = {number: name for name, number in NUMBERS.items()}
X86_64 = rules.HOST == "x86_64"
only_x86_64 = pytest.mark.skipif(not X86_64, reason="what only x86_64 has")
HERE = numbers(rules.HOST)  # what the tests with real threads call


def filter_of(kind: int, *granted: bytes) -> bytes:
    program = tables.FILTERS[kind].replace((0x7E57_C0DE).to_bytes(4, "little"), PID.to_bytes(4, "little"))
    for mark in granted:
        program = program.replace(mark, kernel._ALLOWED)
    return program


def answer(kind: int, call: str, *arguments: int, granted: tuple[bytes, ...] = ()) -> int:
    return run(filter_of(kind, *granted), NUMBERS[call], *arguments)


# -- the bytes


@pytest.mark.parametrize("kind", KINDS)
def test_the_kernel_would_take_the_programs(kind: int) -> None:
    check(tables.FILTERS[kind])


@pytest.mark.parametrize("architecture", generate.ARCHITECTURES)
def test_the_tables_are_what_their_sources_make(architecture: str) -> None:
    if not X86_64 and not generate.can_assemble(architecture):
        pytest.skip("this host has no assembler for it")
    assert generate.can_assemble(architecture), "binutils is missing: lab/setup.sh test"
    text = generate.file_of(architecture).read_text(encoding="utf-8")
    made = generate.text_of(architecture, generate.filters(architecture), generate.assemble(architecture))
    assert text == made, "run python -m stratovirt.sandbox.generate"


def test_marks_are_where_they_are_meant_to_be() -> None:
    assert tables.HANDLER.count(kernel._DATA_MARK) == 1
    assert len(tables.HANDLER) <= 4096
    for kind in KINDS:
        assert tables.FILTERS[kind].count(kernel._PID_MARK) == (kind == MAIN)
    assert bpf.INSTRUCTION.pack(bpf.RETURN, 0, 0, rules.IF_VHOST_USER) == kernel._VHOST_USER_MARK
    assert bpf.INSTRUCTION.pack(bpf.RETURN, 0, 0, rules.IF_IO_URING) == kernel._IO_URING_MARK
    assert int.from_bytes(kernel._PID_MARK, "little") == rules.OWN_PID


def test_the_numbers_of_requests_are_those_the_program_uses() -> None:
    for table, module in ((rules.KVM_ON_VCPU_THREADS, kvm), (rules.KVM_ON_MAIN, kvm), (rules.VHOST, vhost),
                          (rules.VHOST_OPENING, vhost), (rules.TAP_IN_USE, tap), (rules.TAP_OPENING, tap)):
        for name, number in table.items():
            assert getattr(module, name) == number, name
    # The other way round: what is declared is in a table, or needed at the start alone.
    at_start = {"VHOST_VSOCK_SET_GUEST_CID"}
    declared = {name for module in (vhost, tap) for name in vars(module)
                if re.match(r"VHOST_(VSOCK_|NET_)?[SG]ET_|TUN[SG]ET", name)}
    assert declared - at_start == {name for table in (rules.VHOST, rules.VHOST_OPENING, rules.TAP_IN_USE, rules.TAP_OPENING)
                                   for name in table}
    assert rules.DISK == {"BLKDISCARD": BLKDISCARD}
    assert (NUMBERS["io_uring_setup"], NUMBERS["io_uring_enter"], NUMBERS["io_uring_register"]) == (
        IO_URING_SETUP, IO_URING_ENTER, IO_URING_REGISTER)


@pytest.mark.parametrize("table", [rules.KVM_ON_MAIN, rules.KVM_ON_MAIN_AARCH64], ids=["x86_64", "aarch64"])
def test_counting_what_is_written_needs_nothing_that_is_not_allowed(
    monkeypatch: pytest.MonkeyPatch, table: dict[str, int]
) -> None:
    asked: set[int] = set()

    def ioctl(_fd: int, request: int, *_argument: object) -> int:
        asked.add(request)
        return kvm.KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE

    system = KvmSystem.__new__(KvmSystem)
    system.fd = -1
    monkeypatch.setattr(KvmSystem, "create_vm", lambda self, kind: -1)
    monkeypatch.setattr("fcntl.ioctl", ioctl)
    vm = KvmVm(system)
    vm.slots = [RamRegion(0, HostMapping(PAGE_SIZE))]
    log = DirtyLog(vm)
    log.start()
    log.read(0)
    log.clear()
    log.stop()
    assert len(asked) == 5 and asked <= set(table.values())


def test_names_and_numbers_of_calls() -> None:
    assert len(NAMES) == len(NUMBERS)
    assert (NUMBERS["read"], NUMBERS["execve"], NUMBERS["seccomp"], NUMBERS["clone3"], NUMBERS["io_uring_setup"]) == (
        0, 59, 317, 435, 425)
    assert by_number("x86_64")[450] == "set_mempolicy_home_node"
    assert kernel._NAMES_AT + len("|".join(by_number("x86_64"))) < kernel._DATA_PAGES * kernel._PAGE
    assert all(len(name) < kernel._KIND_SIZE for name in KIND_NAMES)


# -- the counts


@pytest.mark.parametrize("architecture", generate.ARCHITECTURES)
def test_the_counts_are_within_their_bounds(architecture: str) -> None:
    sets = [rules.allowed_calls(kind, architecture) for kind in KINDS]
    whole = rules.calls_of_a_process(architecture=architecture)
    assert whole < report.PROCESS_BOUND == 55
    assert len(set().union(*sets)) == whole
    assert len(sets[VCPU]) <= report.VCPU_BOUND == 27


@pytest.mark.parametrize("kind", KINDS)
def test_the_filters_allow_the_calls_of_the_table_and_no_others(kind: int) -> None:
    """With arguments that pass, and every number there is."""
    passing = {rule.call: [_passing(rule)] for rule in rules.rules_of(kind, "x86_64") if rule.allows}
    program = filter_of(kind, kernel._IO_URING_MARK, kernel._VHOST_USER_MARK)
    allowed = {NAMES.get(number, str(number)) for number in range(1024)
               if any(run(program, number, *arguments) == ALLOW for arguments in passing.get(NAMES.get(number, ""), [()]))}
    assert allowed == rules.allowed_calls(kind, "x86_64")


def _passing(rule: rules.Rule) -> tuple[int, ...]:
    arguments = [0] * 6
    for test in rule.tests:
        if test.values:
            arguments[test.argument] = PID if test.values == (rules.OWN_PID,) else test.values[-1]
    return tuple(arguments)


def test_the_report_names_every_call_with_its_reason_and_the_counts() -> None:
    text = report.report()
    for kind in KINDS:
        part = text.split(f"{KIND_NAMES[kind]}: {len(rules.allowed_calls(kind))} system calls")[1].split("\n\n")[0]
        assert {line.split()[0] for line in part.splitlines()[1:]} == rules.allowed_calls(kind)
    assert all(rule.reason for rule in rules.RULES)
    assert re.search(r"\d+ system calls in all; at most a vCPU thread \d+, an iothread \d+, the main thread \d+\n\Z", text)


# -- what is refused whatever else is right


@pytest.mark.parametrize("kind", KINDS)
def test_other_architectures_and_the_x32_abi(kind: int) -> None:
    program = filter_of(kind)
    assert run(program, 4, arch=0x4000_0003) == KILL  # i386, int 0x80: number 4 is write there
    assert run(program, NUMBERS["write"] | 0x4000_0000) == TRAP | kind
    assert run(program, 0xFFFF_FFFF) == TRAP | kind
    assert run(program, 0x3FFF_FFFE) == TRAP | kind  # what the handler dies of


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("call", ["execve", "execveat", "ptrace", "fork", "vfork", "process_vm_writev", "prctl", "seccomp",
                                  "bpf", "unshare", "setns", "mount", "bind", "listen", "tkill", "memfd_create", "kill",
                                  "rt_sigaction", "rt_sigqueueinfo", "pkey_mprotect", "personality", "setuid",
                                  "capset", "open", "creat", "symlink", "link", "chmod", "ftruncate", "userfaultfd",
                                  "perf_event_open"])
def test_nobody_needs_these(kind: int, call: str) -> None:
    assert answer(kind, call) == TRAP | kind


@pytest.mark.parametrize("call", ["openat", "clone", "sendto", "setsockopt", "tgkill", "eventfd2", "accept4",
                                  "unlink", "rename", "newfstatat",
                                  "preadv2", "pwritev2", "io_setup", "fallocate", "exit_group", "socket", "connect", "fcntl"])
def test_a_vcpu_thread_opens_nothing_and_starts_nobody(call: str) -> None:
    assert answer(VCPU, call) == TRAP | VCPU


@pytest.mark.parametrize("call", ["openat", "sendto", "setsockopt", "accept4", "unlink", "rename", "newfstatat",
                                  "tgkill", "exit_group"])
def test_an_iothread_opens_nothing_and_talks_to_nobody(call: str) -> None:
    assert answer(IOTHREAD, call) == TRAP | IOTHREAD


# -- arguments: (call, allowed, refused)

RDWR, WRONLY, CREAT, EXCL, TRUNC, APPEND, NOCTTY = 2, 1, 0o100, 0o200, 0o1000, 0o2000, 0o400
CLOEXEC, NONBLOCK, DIRECT, DIRECTORY, PATH, TMPFILE, NOFOLLOW = (
    0o2000000, 0o4000, 0o40000, 0o200000, 0o10000000, 0o20200000, 0o400000)
AT_FDCWD = -100
THREAD = 0x3D0F00

ON_ALL = [
    ("mmap", (0, 4096, 3, 0x22, -1, 0), [(0, 4096, 7, 0x22), (0, 4096, 4, 0x22), (0, 4096, 5, 2, 3)]),
    ("mprotect", (0x1000, 4096, 1), [(0x1000, 4096, 5), (0x1000, 4096, 7), (0x1000, 4096, 0x0100_0004)]),
    ("madvise", (0x1000, 4096, 4), [(0x1000, 4096, 8), (0x1000, 4096, 16), (0x1000, 4096, 23)]),
]
PER_KIND = [
    (VCPU, "ioctl", (5, kvm.KVM_RUN, 0), [(5, kvm.KVM_SET_REGS), (5, kvm.KVM_CREATE_VM), (5, 0x5401), (5, tap.TUNSETIFF)]),
    (VCPU, "ioctl", (5, tap.TUNSETOFFLOAD, 0), [(5, 0x5412)]),
    (VCPU, "ioctl", (5, vhost.VHOST_SET_VRING_KICK, 0), [(5, vhost.VHOST_SET_MEM_TABLE), (5, vhost.VHOST_SET_OWNER)]),
    (IOTHREAD, "ioctl", (5, BLKDISCARD, 0), [(5, kvm.KVM_RUN), (5, 0x5401)]),
    (IOTHREAD, "clone", (THREAD, 0), [(0x0120_0011, 0), (THREAD | 0x1000_0000, 0), (0x11, 0), (THREAD & ~0x10000, 0)]),
    (IOTHREAD, "rseq", (0x1000, 32, 0, 7), [(0x1000, 32, 1, 7)]),
    (MAIN, "rseq", (0x1000, 32, 0, 7), [(0x1000, 32, 1, 7)]),
    (IOTHREAD, "fcntl", (5, 1030), [(5, 4), (5, 8), (5, 0)]),
    (IOTHREAD, "madvise", (0, 0, 4), [(0, 0, 9)]),
    (MAIN, "madvise", (0, 0, 9), [(0, 0, 14), (0, 0, 100)]),
    (MAIN, "madvise", (0, 0, 102), [(0, 0, 103)]),
    (MAIN, "tgkill", (PID, 1, KICK_SIGNAL), [(PID, 1, 35), (PID - 1, 1, KICK_SIGNAL)]),
    (MAIN, "tgkill", (PID, 1, 6), [(PID, 1, 9), (PID, 1, 15), (1, 1, 6), (PID + 1, 1, 6)]),
    (MAIN, "clone", (THREAD, 0), [(0x0120_0011, 0), (0x0400_0000, 0)]),
    (MAIN, "fcntl", (5, 37), [(5, 4, NONBLOCK), (5, 8, 1), (5, 1033, 0)]),
    (MAIN, "openat", (AT_FDCWD, 1, RDWR | CLOEXEC | NONBLOCK | DIRECT), [
        (5, 1, 0), (AT_FDCWD, 1, RDWR | CREAT | CLOEXEC, 0o600), (AT_FDCWD, 1, RDWR | TRUNC), (AT_FDCWD, 1, PATH),
        (AT_FDCWD, 1, TMPFILE | RDWR), (AT_FDCWD, 1, WRONLY | CREAT | EXCL | CLOEXEC)]),
    (MAIN, "openat", (AT_FDCWD, 1, CLOEXEC | NONBLOCK | DIRECTORY), []),
    (MAIN, "openat", (AT_FDCWD, 1, WRONLY | APPEND | CREAT | CLOEXEC | NOCTTY, 0o640), [
        (5, 1, WRONLY | APPEND | CREAT | CLOEXEC | NOCTTY), (AT_FDCWD, 1, WRONLY | CREAT | CLOEXEC | NOCTTY),
        (AT_FDCWD, 1, RDWR | APPEND | CREAT | CLOEXEC | NOCTTY)]),
    (MAIN, "accept4", (5, 0, 0, CLOEXEC), [(5, 0, 0, 0)]),
    (MAIN, "ioctl", (5, kvm.KVM_CREATE_VM, 0), [(5, kvm.KVM_RUN), (5, 0x5412), (5, kvm.KVM_SET_TSC_KHZ)]),
    (MAIN, "ioctl", (5, tap.TUNSETIFF, 0), [(5, 0x400454CB), (5, 0x5413)]),  # TUNSETPERSIST, TIOCGWINSZ
]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("call", "allowed", "refused"), ON_ALL)
def test_arguments_on_every_thread(kind: int, call: str, allowed: tuple[int, ...], refused: list[tuple[int, ...]]) -> None:
    test_arguments(kind, call, allowed, refused)


@pytest.mark.parametrize(("kind", "call", "allowed", "refused"), PER_KIND)
def test_arguments(kind: int, call: str, allowed: tuple[int, ...], refused: list[tuple[int, ...]]) -> None:
    assert answer(kind, call, *allowed) == ALLOW
    for arguments in refused:
        assert answer(kind, call, *arguments) == TRAP | bpf.OTHER_ARGUMENTS | kind, arguments


def test_every_test_of_an_argument_is_tried_here() -> None:
    tried = {(kind, call) for kind, call, _, _ in PER_KIND} | {(kind, call) for call, _, _ in ON_ALL for kind in KINDS}
    tried |= {(kind, call) for call in ("io_uring_register", "socket") for kind in KINDS}
    for rule in rules.RULES:
        for kind in KINDS:
            if rule.tests and rule.kinds >> kind & 1 and rule.only != "aarch64":
                assert (kind, rule.call) in tried, rule.call


def test_request_numbers_are_compared_as_the_kernel_takes_them() -> None:
    """The upper half of an ioctl's number is not there for the kernel, so neither for the filter."""
    assert answer(VCPU, "ioctl", 5, kvm.KVM_RUN | 0xDEAD_0000_0000) == ALLOW
    assert answer(VCPU, "ioctl", 5, 0x1_0000_0000 | 0x5401) == TRAP | bpf.OTHER_ARGUMENTS | VCPU


@pytest.mark.parametrize("kind", [IOTHREAD, MAIN])
def test_what_the_c_library_does_without(kind: int) -> None:
    for call in ("clone3", "set_robust_list"):
        assert answer(kind, call) == ENOSYS


@pytest.mark.parametrize("kind", KINDS)
def test_io_uring_only_for_who_asked_for_it(kind: int) -> None:
    """A ring does its requests past every filter."""
    calls: dict[str, tuple[int, ...]] = {"io_uring_enter": ()}
    if kind != VCPU:
        calls |= {"io_uring_setup": (128,), "io_uring_register": (5, 4)}
    for call, arguments in calls.items():
        assert answer(kind, call, *arguments) == EACCES
        assert answer(kind, call, *arguments, granted=(kernel._IO_URING_MARK,)) == ALLOW
    if kind != VCPU:
        assert answer(kind, "io_uring_register", 5, 2, granted=(kernel._IO_URING_MARK,)) == TRAP | bpf.OTHER_ARGUMENTS | kind


@pytest.mark.parametrize("kind", KINDS)
def test_sockets_only_for_who_has_back_ends_in_other_processes(kind: int) -> None:
    calls: dict[str, tuple[int, ...]] = {"sendmsg": (5,)}
    if kind == MAIN:
        assert answer(kind, "recvmsg", 5) == ALLOW, "QMP has it as well"
    else:
        calls["recvmsg"] = (5,)
    if kind != VCPU:
        calls |= {"socket": (1, 1 | NONBLOCK | CLOEXEC, 0), "connect": (5,)}
    for call, arguments in calls.items():
        assert answer(kind, call, *arguments) == EPERM
        assert answer(kind, call, *arguments, granted=(kernel._VHOST_USER_MARK,)) == ALLOW
    if kind != VCPU:
        for family, type in ((2, 1 | NONBLOCK | CLOEXEC), (16, 3 | CLOEXEC), (1, 1), (1, 2 | NONBLOCK | CLOEXEC)):
            assert answer(kind, "socket", family, type, granted=(kernel._VHOST_USER_MARK,)) == \
                TRAP | bpf.OTHER_ARGUMENTS | kind


@only_x86_64
def test_a_host_that_makes_no_code_gets_filters_that_kill() -> None:
    sandbox = object.__new__(kernel.Sandbox)
    sandbox._granted, sandbox._pages = [], None
    program = sandbox._program(MAIN)
    check(program)
    assert run(program, NUMBERS["execve"]) == KILL
    assert run(program, NUMBERS["mmap"], 0, 0, 4) == KILL
    assert run(program, NUMBERS["tgkill"], os.getpid(), 1, KICK_SIGNAL) == ALLOW
    assert run(program, NUMBERS["clone3"]) == ENOSYS


def test_the_assembler_refuses_jumps_that_are_too_long() -> None:
    with pytest.raises(ValueError, match="255"):
        bpf.Program().add(bpf.JUMP_EQUAL, 1, 256, 0)


def test_a_long_list_of_requests_is_jumped_over() -> None:
    wide = rules.Rule(7, "ioctl", "", rules.Test(1, "", tuple(range(1000, 1253))))
    program = bpf.compile_filter([wide, rules.Rule(7, "read", "")], NUMBERS, VCPU, "x86_64")
    check(program)
    assert run(program, NUMBERS["ioctl"], 1, 1000) == run(program, NUMBERS["ioctl"], 1, 1252) == ALLOW
    assert run(program, NUMBERS["ioctl"], 1, 1253) == TRAP | bpf.OTHER_ARGUMENTS
    assert run(program, NUMBERS["read"]) == ALLOW
    assert run(program, NUMBERS["write"]) == TRAP


# -- real threads

EXECVE = HERE["execve"]


def in_sandbox(kind: int, act: str, prepare: str = "",
               meanwhile: str = "over.acquire()") -> subprocess.CompletedProcess[str]:
    """Run `act` on a thread of that kind, in a process of its own."""
    code = f"""
import os, select, sys, _thread
sys.path.insert(0, {str(SOURCE)!r})
from stratovirt.sandbox.kernel import Sandbox
from stratovirt.hostmap import syscall
{prepare}
sandbox = Sandbox(2)
sandbox.begin()
def act():
    sandbox.confine({kind})
    {act}
    os.write(1, b"survived")
if {kind} == {MAIN}:
    act()
    os._exit(0)
over = _thread.allocate_lock()
over.acquire()
def run():
    act()
    over.release()
_thread.start_new_thread(run, ())
{meanwhile}
os._exit(0)
"""
    return subprocess.run([sys.executable, "-IS", "-c", code], capture_output=True, text=True, timeout=60, check=False)


@pytest.mark.parametrize("kind", KINDS)
def test_a_violation_ends_the_process_with_a_line_that_names_call_and_thread(kind: int) -> None:
    done = in_sandbox(kind, f"syscall({EXECVE}, 0x1234, 0, 0xabcdef0123456789)")
    assert done.returncode == -signal.SIGSYS
    assert done.stdout == ""
    line = re.fullmatch(
        r"(\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d)\.\d{9}: \[(\d+)\]\[(\d+)\]\[seccomp\]:ERROR: system call execve "
        rf"\({EXECVE}\) is not allowed on {KIND_NAMES[kind]}; arguments 0x1234, 0x0, 0xabcdef0123456789; the process ends\n",
        done.stderr)
    assert line, done.stderr
    assert (line[2] == line[3]) == (kind == MAIN)


@pytest.mark.parametrize("kind", KINDS)
def test_a_violation_by_arguments_says_so(kind: int) -> None:
    done = in_sandbox(kind, f"syscall({HERE['mmap']}, 0, 4096, 7, 0x22, 0xffffffff, 0)")
    assert done.returncode == -signal.SIGSYS
    words = f"is not allowed with these arguments on {KIND_NAMES[kind]}; arguments 0x0, 0x1000, 0x7; "
    assert f"system call mmap ({HERE['mmap']}) {words}" in done.stderr


@pytest.mark.parametrize(("number", "words"), [
    *[(HERE[name], f"{name} ({HERE[name]})") for name in (by_number(rules.HOST)[5], "rseq", "kexec_load")], (423, "(423)"),
    (424, "pidfd_send_signal (424)"), (450, "set_mempolicy_home_node (450)"), (451, "(451)"), (0x3FFF_FFFF, "(1073741823)")])
def test_calls_by_name_and_number(number: int, words: str) -> None:
    done = in_sandbox(VCPU, f"syscall({number})")
    assert done.returncode == -signal.SIGSYS
    assert f"ERROR: system call {words} is not allowed on " in done.stderr


def test_a_violation_without_the_interpreters_lock() -> None:
    """The call is made without the GIL, and the main thread, which computes without an end, has it by then."""
    done = in_sandbox(VCPU, f"syscall({EXECVE})", meanwhile="while True: pass")
    assert done.returncode == -signal.SIGSYS
    assert done.stderr.count("\n") == 1


def test_a_violation_with_nobody_reading_the_log_does_not_hang() -> None:
    done = in_sandbox(VCPU, f"syscall({EXECVE})", prepare="""
read, write = os.pipe()
os.set_blocking(write, False)
try:
    while True:
        os.write(write, bytes(65536))
except BlockingIOError:
    os.set_blocking(write, True)
os.dup2(write, 2)
""")
    assert (done.returncode, done.stderr) == (-signal.SIGSYS, "")


def test_the_log_moves(tmp_path: Path) -> None:
    done = in_sandbox(VCPU, f"sandbox.move_log(file); syscall({EXECVE})",
                      prepare=f"file = os.open({str(tmp_path / 'log')!r}, os.O_CREAT | os.O_WRONLY)")
    assert (done.returncode, done.stderr) == (-signal.SIGSYS, "")
    assert "execve" in (tmp_path / "log").read_text()


def test_many_threads_need_no_file(tmp_path: Path) -> None:
    """The C library's ninth heap would be counted against the processors, which it reads from a file."""
    done = in_sandbox(IOTHREAD, """
    locks = []
    for _ in range(20):
        lock = _thread.allocate_lock()
        lock.acquire()
        locks.append(lock)
        _thread.start_new_thread(lambda lock=lock: (keep.append(bytearray(4000)), select.poll().poll(200), lock.release()), ())
    for lock in locks:
        lock.acquire()""".strip(), prepare="keep = []")
    assert (done.returncode, done.stdout, done.stderr) == (0, "survived", "")


@only_x86_64
def test_another_architectures_call_kills() -> None:
    done = in_sandbox(MAIN, "call()", prepare="""
import _ctypes
from stratovirt.hostmap import HostMapping, _Word, _CFunction
code = HostMapping(4096)
code.view[:8] = bytes.fromhex("b804000000cd80c3")  # mov eax, 4; int 0x80; ret
syscall(10, code.address, 4096, 5)
call = _CFunction(code.address)
""")
    assert done.returncode == -signal.SIGSYS
    assert done.stderr == ""


def test_threads_that_a_confined_thread_starts_are_confined_and_start() -> None:
    done = in_sandbox(IOTHREAD, """
    late = _thread.allocate_lock()
    late.acquire()
    _thread.start_new_thread(lambda: (os.write(1, b"a worker "), late.release()), ())
    late.acquire()
    _thread.start_new_thread(lambda: os.uname(), ())
    select.poll().poll(10000)""".strip())
    assert done.returncode == -signal.SIGSYS, done
    assert done.stdout == "a worker "
    assert f"system call uname ({HERE['uname']}) is not allowed on an iothread" in done.stderr


@pytest.mark.parametrize(("seconds", "date"), [(0, "1970-01-01T00:00:00"), (951_782_399, "2000-02-28T23:59:59"),
                                               (951_782_400, "2000-02-29T00:00:00"), (1_709_251_199, "2024-02-29T23:59:59"),
                                               (1_735_689_599, "2024-12-31T23:59:59"), (4_107_542_400, "2100-03-01T00:00:00")])
def test_the_handlers_calendar(seconds: int, date: str) -> None:
    """The handler's code, called as a function with a clock of ours in the place of clock_gettime."""
    done = in_sandbox(MAIN, f"syscall({EXECVE})", prepare=f"""
import struct
import stratovirt.sandbox.kernel as kernel
if {X86_64}:
    # mov eax, 228; xor edi, edi; mov rsi, r14; syscall -> mov eax, SECONDS; mov [r14], rax; zero the rest
    real = bytes.fromhex("b8e400000031ff4c89f60f05")
    ours = b"\\xb8" + ({seconds}).to_bytes(4, "little") + bytes.fromhex("498906") + bytes.fromhex("31ff") + b"\\x66\\x90"
else:
    # mov x0, 0; mov x1, x22; mov x8, 113; svc 0 -> mov w0, SECONDS, in two halves; stp x0, xzr, [x22]; nop
    real = struct.pack("<4I", 0xd2800000, 0xaa1603e1, 0xd2800e28, 0xd4000001)
    low, high = {seconds} & 0xffff, {seconds} >> 16
    ours = struct.pack("<4I", 0x52800000 | low << 5, 0x72a00000 | high << 5, 0xa9007ec0, 0xd503201f)
assert kernel.HANDLER.count(real) == 1
kernel.HANDLER = kernel.HANDLER.replace(real, ours)
assert len(ours) == len(real), (len(ours), len(real))
""")
    assert done.returncode == -signal.SIGSYS
    assert done.stderr.startswith(date + "."), done.stderr


# -- late imports


def late_imports() -> list[tuple[str, str]]:
    """(module of the package, module that one of its functions imports)."""
    found = []
    for path in sorted((SOURCE / "stratovirt").rglob("*.py")):
        name = ".".join(path.relative_to(SOURCE).with_suffix("").parts)
        for function in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef):
                for node in ast.walk(function):
                    if isinstance(node, ast.ImportFrom) and node.module:
                        found += [(name, node.module)] + [(name, f"{node.module}.{alias.name}") for alias in node.names]
                    elif isinstance(node, ast.Import):
                        found += [(name, alias.name) for alias in node.names]
    return found


def test_what_devices_import_late_is_fetched_before_the_filters() -> None:
    """Devices run on vCPU threads and iothreads, which open no files."""
    at_start = {"stratovirt.backends.chardev_stdio", "stratovirt.backends.chardev_host", "stratovirt.backends.chardev_socket",
                "stratovirt.errors", "stratovirt.log", "termios", "atexit"}  # character devices are made before
    for importer, imported in late_imports():
        if importer.split(".")[1] not in ("virtio", "devices", "backends", "vhost", "iothread", "loop", "memory"):
            continue
        try:
            importlib.import_module(imported)
        except ImportError:
            continue  # the name of something in a module
        assert imported in DISK_MODULES or imported in at_start or imported in ("stratovirt", "stratovirt.backends") or \
            imported == "stratovirt.backends.aio_syscalls", f"{importer} imports {imported} late: see DISK_MODULES"


def test_the_main_thread_can_import_whatever_comes_late() -> None:
    """Every module of the package, after the filter is in place; nothing is written, and no shared object is needed."""
    modules = [".".join(path.relative_to(SOURCE).with_suffix("").parts).removesuffix(".__init__")
               for path in sorted((SOURCE / "stratovirt").rglob("*.py"))]
    wanted = [name for name in modules if name.split(".")[1:2] in (["machine"], ["virtio"], ["devices"], ["hypervisor"],
              ["loader"], ["firmware"], ["arch"], ["control"], ["config"], ["vhost"], ["backends"]) and "_uapi" not in name]
    other = ("aarch64",) if X86_64 else ("x86_64", "stratovirt.firmware.acpi", "stratovirt.firmware.mptable")
    wanted = [name for name in wanted if not any(word in name for word in other)]
    code = f"""
import os, sys
sys.path.insert(0, {str(SOURCE)!r})
from stratovirt.config.vm import VmConfig, QmpConfig
from stratovirt.lockdown import Lockdown
from stratovirt.loop import EventLoop
import stratovirt.control.server, stratovirt.machine.microvm, stratovirt.virtio.queue
config = VmConfig()
config.qmp.append(QmpConfig("/nowhere"))
Lockdown(config, EventLoop()).confine_main()
for name in {wanted!r}:
    __import__(name)
os.write(1, b"survived")
os._exit(0)
"""
    done = subprocess.run([sys.executable, "-ISB", "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "survived", "")
