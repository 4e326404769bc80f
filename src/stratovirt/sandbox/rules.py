"""What the threads of a running machine may ask of the kernel, and why: the source of the filters.

One row is one call, the kinds of threads it is for, the reason, and what its arguments must be. Not on the way to a running
guest: `generate.py` makes bytes of it, and a test holds the two together.

Architectures differ in the calls that they have (arm64 has none that newer ones have made superfluous, so the C library makes
those) and in what KVM is asked: `only` names the one that a row is for.

Kinds of threads:
    VCPU       in KVM_RUN, and in the registers of devices
    IOTHREAD   the loop of an -object iothread, and the threads that do the requests of its disks
    MAIN       the main loop: QMP, hot-plug, devices without an iothread, the end; and the threads of its disks
"""

from __future__ import annotations

from stratovirt.hostmap import ARCHITECTURE
from stratovirt.sandbox import IOTHREAD, MAIN, VCPU
from stratovirt.sandbox.bpf import ALLOW, ERRNO

_V, _I, _M = 1 << VCPU, 1 << IOTHREAD, 1 << MAIN
_VI, _VM, _IM, _ALL = _V | _I, _V | _M, _I | _M, _V | _I | _M

# Stand for what is known at start only; `kernel.py` puts the real thing there.
OWN_PID = 0x7E57_C0DE
# EACCES, which the kernel itself does not answer with (`backends/aio.py` takes threads then), or ALLOW when a -drive has
# aio=io_uring.
IF_IO_URING = ERRNO | 13
IF_VHOST_USER = ERRNO | 1  # EPERM, or ALLOW when a device has its back end in another process

_ENOSYS = ERRNO | 38  # "this kernel does not know it": the C library falls back to what there was before


class Test:
    """Argument `argument`, its low 32 bits, is one of `values`, or has none of the `forbidden_bits`. `words` says it."""

    __slots__ = ("argument", "forbidden_bits", "values", "words")

    def __init__(self, argument: int, words: str, values: tuple[int, ...] = (), forbidden_bits: int = 0) -> None:
        self.argument = argument
        self.words = words
        self.values = values
        self.forbidden_bits = forbidden_bits


class Rule:
    """`kinds` is a set of bits, 1 << kind; `action` what the kernel does when all `tests` pass; `only` "" for everywhere."""

    __slots__ = ("action", "call", "kinds", "only", "reason", "tests")

    def __init__(self, kinds: int, call: str, reason: str, *tests: Test, action: int = ALLOW, only: str = "") -> None:
        self.kinds = kinds
        self.call = call
        self.reason = reason
        self.tests = tests
        self.action = action
        self.only = only

    @property
    def allows(self) -> bool:
        return self.action in (ALLOW, IF_IO_URING, IF_VHOST_USER)


X86_64, AARCH64 = "x86_64", "aarch64"
HOST = AARCH64 if ARCHITECTURE == AARCH64 else X86_64

KVM_ON_VCPU_THREADS = {"KVM_RUN": 0xAE80}
KVM_ON_VCPU_THREADS_AARCH64 = {"KVM_RUN": 0xAE80, "KVM_IRQ_LINE": 0x4008_AE61}  # lines of serial port and clock
KVM_DIRTY_LOG = {  # the log of what is written after a snapshot
    "KVM_CHECK_EXTENSION": 0xAE03, "KVM_ENABLE_CAP": 0x4068_AEA3, "KVM_SET_USER_MEMORY_REGION": 0x4020_AE46,
    "KVM_GET_DIRTY_LOG": 0x4010_AE42, "KVM_CLEAR_DIRTY_LOG": 0xC018_AEC0,
}
KVM_ON_MAIN = {  # a look at a vCPU that has failed or stands still, and a reset, which reads its values from a fresh machine
    "KVM_CREATE_VM": 0xAE01, "KVM_GET_VCPU_MMAP_SIZE": 0xAE04,
    "KVM_GET_MSR_INDEX_LIST": 0xC004_AE02, "KVM_CREATE_VCPU": 0xAE41, "KVM_SET_TSS_ADDR": 0xAE47,
    "KVM_SET_IDENTITY_MAP_ADDR": 0x4008_AE48, "KVM_CREATE_IRQCHIP": 0xAE60, "KVM_CREATE_PIT2": 0x4040_AE77,
    "KVM_GET_IRQCHIP": 0xC208_AE62, "KVM_SET_IRQCHIP": 0x8208_AE63, "KVM_GET_PIT2": 0x8070_AE9F, "KVM_SET_PIT2": 0x4070_AEA0,
    "KVM_GET_REGS": 0x8090_AE81, "KVM_SET_REGS": 0x4090_AE82, "KVM_GET_SREGS": 0x8138_AE83, "KVM_SET_SREGS": 0x4138_AE84,
    "KVM_GET_MSRS": 0xC008_AE88, "KVM_SET_MSRS": 0x4008_AE89, "KVM_GET_FPU": 0x81A0_AE8C, "KVM_SET_FPU": 0x41A0_AE8D,
    "KVM_GET_LAPIC": 0x8400_AE8E, "KVM_SET_LAPIC": 0x4400_AE8F, "KVM_SET_CPUID2": 0x4008_AE90,
    "KVM_GET_MP_STATE": 0x8004_AE98, "KVM_SET_MP_STATE": 0x4004_AE99,
    "KVM_GET_VCPU_EVENTS": 0x8040_AE9F, "KVM_SET_VCPU_EVENTS": 0x4040_AEA0,
    "KVM_GET_DEBUGREGS": 0x8080_AEA1, "KVM_SET_DEBUGREGS": 0x4080_AEA2, "KVM_GET_XSAVE": 0x9000_AEA4,
    "KVM_SET_XSAVE": 0x5000_AEA5, "KVM_GET_XCRS": 0x8188_AEA6, "KVM_SET_XCRS": 0x4188_AEA7, "KVM_TRANSLATE": 0xC018_AE85,
    # a snapshot
    "KVM_GET_CLOCK": 0x8030_AE7C, "KVM_GET_TSC_KHZ": 0xAEA3, "KVM_GET_XSAVE2": 0x9000_AECF,
    **KVM_DIRTY_LOG,
}
KVM_ON_MAIN_AARCH64 = {  # the serial port's line, the look at a vCPU that has failed, a reset, a snapshot
    "KVM_IRQ_LINE": 0x4008_AE61, "KVM_ARM_VCPU_INIT": 0x4020_AEAE, "KVM_GET_REG_LIST": 0xC008_AEB0,
    "KVM_GET_ONE_REG": 0x4010_AEAB, "KVM_SET_ONE_REG": 0x4010_AEAC, "KVM_SET_DEVICE_ATTR": 0x4018_AEE1,
    "KVM_GET_DEVICE_ATTR": 0x4018_AEE2, "KVM_GET_MP_STATE": 0x8004_AE98, "KVM_GET_VCPU_EVENTS": 0x8040_AE9F,
    **KVM_DIRTY_LOG,
}
VHOST = {  # a driver's set-up and reset of a device that the kernel serves, its pause, and its cable
    "VHOST_SET_FEATURES": 0x4008_AF00, "VHOST_SET_VRING_NUM": 0x4008_AF10, "VHOST_SET_VRING_ADDR": 0x4028_AF11,
    "VHOST_SET_VRING_BASE": 0x4008_AF12, "VHOST_GET_VRING_BASE": 0xC008_AF12, "VHOST_SET_VRING_KICK": 0x4008_AF20,
    "VHOST_SET_VRING_CALL": 0x4008_AF21, "VHOST_SET_VRING_ERR": 0x4008_AF22, "VHOST_NET_SET_BACKEND": 0x4008_AF30,
    "VHOST_VSOCK_SET_RUNNING": 0x4004_AF61, "VHOST_SET_LOG_BASE": 0x4008_AF04,
}
VHOST_OPENING = {  # netdev_add with vhost=on
    "VHOST_SET_OWNER": 0xAF01, "VHOST_GET_FEATURES": 0x8008_AF00, "VHOST_SET_MEM_TABLE": 0x4008_AF03,
}
TAP_IN_USE = {"TUNSETOFFLOAD": 0x4004_54D0, "TUNSETQUEUE": 0x4004_54D9}
TAP_OPENING = {"TUNSETIFF": 0x4004_54CA, "TUNGETIFF": 0x8004_54D2, "TUNSETVNETHDRSZ": 0x4004_54D8}
DISK = {"BLKDISCARD": 0x1277}
DESCRIPTOR = {"FIONBIO": 0x5421, "FIOCLEX": 0x5451}
TERMINAL = {"TCGETS": 0x5401, "TCSETS": 0x5402}

_PROT_EXEC = 4
_AT_FDCWD = -100 & 0xFFFF_FFFF
_O_WRONLY, _O_RDWR, _O_CREAT, _O_EXCL, _O_NOCTTY, _O_APPEND = 0o1, 0o2, 0o100, 0o200, 0o400, 0o2000
_O_NONBLOCK, _O_CLOEXEC = 0o4000, 0o2000000
_O_DIRECT, _O_DIRECTORY = {X86_64: 0o40000, AARCH64: 0o200000}, {X86_64: 0o200000, AARCH64: 0o40000}
_OPEN_LOG = _O_WRONLY | _O_APPEND | _O_CREAT | _O_CLOEXEC | _O_NOCTTY
_OPEN_NEW = _O_RDWR | _O_CREAT | _O_EXCL | _O_CLOEXEC
# CLONE_VM FS FILES SIGHAND THREAD SYSVSEM SETTLS PARENT_SETTID CHILD_CLEARTID: what pthread_create asks for
_CLONE_THREAD = 0x003D_0F00
_MADV_DONTNEED, _MADV_REMOVE, _MADV_GUARD_INSTALL = 4, 9, 102
_SIGABRT, _KICK_SIGNAL = 6, 34
_AT_REMOVEDIR = 0x200
_SOCK_STREAM, _SOCK_NONBLOCK, _SOCK_CLOEXEC = 1, 0o4000, 0o2000000


def _not_to_open(architecture: str) -> int:
    """The flags of open that what exists is not opened with."""
    allowed = _O_WRONLY | _O_RDWR | _O_NONBLOCK | _O_CLOEXEC | _O_DIRECT[architecture] | _O_DIRECTORY[architecture]
    return ~allowed & 0xFFFF_FFFF


def _requests(*groups: dict[str, int]) -> Test:
    names = {name: value for group in groups for name, value in group.items()}
    return Test(1, ", ".join(names), tuple(names.values()))


_NOT_EXECUTABLE = Test(2, "not PROT_EXEC", forbidden_bits=_PROT_EXEC)
_AT_CWD = Test(0, "AT_FDCWD", (_AT_FDCWD,))
_TO_ITSELF = Test(0, "this process", (OWN_PID,))

RULES = (
    # -- what a guest keeps busy
    Rule(_V, "ioctl", "the guest runs; a driver sets up or resets a device that the kernel serves",
         _requests(KVM_ON_VCPU_THREADS, VHOST, TAP_IN_USE), only=X86_64),
    Rule(_V, "ioctl", "the guest runs; lines of devices; a driver sets up or resets a device that the kernel serves",
         _requests(KVM_ON_VCPU_THREADS_AARCH64, VHOST, TAP_IN_USE), only=AARCH64),
    Rule(_I, "ioctl", "discards on block devices; the cable and offloads of interfaces",
         _requests(TAP_IN_USE, DISK, VHOST)),
    Rule(_M, "ioctl", "reset, a vCPU's state, taps, vhost, discards, sockets and terminals",
         _requests(DESCRIPTOR, TAP_IN_USE, VHOST, DISK, TERMINAL, TAP_OPENING, VHOST_OPENING, KVM_ON_MAIN), only=X86_64),
    Rule(_M, "ioctl", "reset, a vCPU's state, lines of devices, taps, vhost, discards, sockets and terminals",
         _requests(DESCRIPTOR, TAP_IN_USE, VHOST, DISK, TERMINAL, TAP_OPENING, VHOST_OPENING, KVM_ON_MAIN_AARCH64),
         only=AARCH64),
    Rule(_ALL, "futex", "locks: the interpreter's, those of devices"),
    Rule(_ALL, "write", "eventfds (interrupts, wake-ups), character devices, QMP's answers, the log"),
    Rule(_ALL, "read", "eventfds, character devices, modules that are imported late"),
    Rule(_IM, "epoll_wait", "the event loop", only=X86_64),
    Rule(_IM, "epoll_pwait", "the event loop", only=AARCH64),
    Rule(_IM, "preadv2", "disk reads"),
    Rule(_IM, "pwritev2", "disk writes"),
    Rule(_ALL, "readv", "frames from taps, also stale ones that a driver's start drops; random bytes"),
    Rule(_IM, "writev", "frames to taps"),
    Rule(_ALL, "io_submit", "aio=native; a reset on a vCPU's thread waits for the requests in flight, and begins the rest"),
    Rule(_ALL, "io_getevents", "aio=native: the ends of requests"),
    Rule(_ALL, "io_uring_enter", "aio=io_uring, if a -drive has it at the start, else EACCES", action=IF_IO_URING),
    Rule(_IM, "fdatasync", "a guest's flush; a snapshot is on disk before it has its name"),
    Rule(_IM, "fallocate", "discard, zeroes"),
    Rule(_ALL, "lseek", "the size of an image, looked at again by flush and reset"),
    Rule(_ALL, "poll", "waits with a deadline: requests in flight, stderr, clients' last events", only=X86_64),
    Rule(_ALL, "ppoll", "waits with a deadline: requests in flight, stderr, clients' last events", only=AARCH64),
    Rule(_ALL, "clock_gettime", "time where the vDSO has none; the processor time of vCPU threads (halt watch)"),

    # -- memory and threads of the interpreter
    Rule(_ALL, "mmap", "the interpreter's memory, stacks, rings, a kernel loaded anew", _NOT_EXECUTABLE),
    Rule(_ALL, "mprotect", "the C library grows its heaps", _NOT_EXECUTABLE),
    Rule(_ALL, "munmap", "memory given back"),
    Rule(_ALL, "mremap", "large buffers that grow"),
    Rule(_ALL, "brk", "the C library's heap"),
    Rule(_V, "madvise", "a thread's stack at its end", Test(2, "MADV_DONTNEED", (_MADV_DONTNEED,))),
    Rule(_I, "madvise", "a thread's stack at its end, and the guard of a new one in newer C libraries",
         Test(2, "MADV_DONTNEED, MADV_GUARD_INSTALL", (_MADV_DONTNEED, _MADV_GUARD_INSTALL))),
    Rule(_M, "madvise", "the same; the balloon and a reset give pages back",
         Test(2, "MADV_DONTNEED, MADV_REMOVE, MADV_GUARD_INSTALL", (_MADV_DONTNEED, _MADV_REMOVE, _MADV_GUARD_INSTALL))),
    Rule(_IM, "clone", "threads for the requests of disks",
         Test(0, "the flags of pthread_create", (_CLONE_THREAD,))),
    Rule(_IM, "rseq", "the C library aborts when a new thread does not get what the first one got", Test(2, "no flags", (0,))),
    Rule(_ALL, "rt_sigprocmask", "threads begin and end with signals blocked"),
    Rule(_ALL, "rt_sigreturn", "the end of a signal's handler: the kick of a vCPU, SIGTERM"),
    Rule(_ALL, "restart_syscall", "the kernel goes on with a wait after SIGSTOP and SIGCONT"),
    Rule(_M, "tgkill", "vCPUs are kicked out of the guest; the interpreter's last resort is abort()", _TO_ITSELF,
         Test(2, "SIGABRT, the kick signal", (_SIGABRT, _KICK_SIGNAL))),
    Rule(_ALL, "getpid", "the log; the C library sends signals with it"),
    Rule(_ALL, "gettid", "the log"),
    Rule(_ALL, "exit", "the end of a thread"),
    Rule(_M, "exit_group", "the end of the process"),

    # -- descriptors
    Rule(_ALL, "epoll_ctl", "what a loop waits for"),
    Rule(_ALL, "close", "what is unplugged, clients that leave; a driver's reset forgets a watched tap"),
    Rule(_IM, "eventfd2", "engines of disks, interrupts of vhost"),
    Rule(_IM, "fcntl", "image locks; a tap is watched for room under a second number",
         Test(1, "F_GETFL, F_OFD_GETLK, F_OFD_SETLK, F_DUPFD_CLOEXEC", (3, 36, 37, 1030))),
    Rule(_IM, "io_setup", "the engine of aio=native"),
    Rule(_IM, "io_destroy", "the same, closed"),
    Rule(_IM, "io_uring_setup", "the engine of aio=io_uring, if a -drive has it at the start, else EACCES", action=IF_IO_URING),
    Rule(_IM, "io_uring_register", "its eventfd", Test(1, "IORING_REGISTER_EVENTFD", (4,)), action=IF_IO_URING),

    # -- QMP and files, on the main thread
    Rule(_M, "recvmsg", "QMP requests, with descriptors; the answers of vhost-user back ends"),
    Rule(_M, "accept4", "clients of QMP and of consoles", Test(3, "SOCK_CLOEXEC", (_SOCK_CLOEXEC,))),
    Rule(_M, "getsockname", "Python asks what kind of socket a client's is"),
    *(Rule(_M, "openat", "blockdev-add, taps, vhost, modules that are imported late: files that exist", _AT_CWD,
           Test(2, "no O_CREAT, O_TRUNC, O_PATH", forbidden_bits=_not_to_open(architecture)), only=architecture)
      for architecture in (X86_64, AARCH64)),
    Rule(_M, "openat", "a new log file", _AT_CWD, Test(2, "the flags of the log", (_OPEN_LOG,))),
    Rule(_M, "openat", "the files of a snapshot, which must not exist", _AT_CWD,
         Test(2, "the flags of a snapshot's files", (_OPEN_NEW,))),
    Rule(_M, "mkdir", "the directory of a snapshot", only=X86_64),
    Rule(_M, "mkdirat", "the directory of a snapshot", _AT_CWD, only=AARCH64),
    Rule(_M, "newfstatat", "what kind of file an image is; whether a socket is still ours"),
    Rule(_M, "fstat", "the same in newer C libraries"),
    Rule(_M, "getdents64", "modules that are imported late"),
    Rule(_M, "rename", "the log's rotation; a snapshot gets its name", only=X86_64),
    Rule(_M, "renameat", "the log's rotation; a snapshot gets its name", _AT_CWD, Test(2, "AT_FDCWD", (_AT_FDCWD,)),
         only=AARCH64),
    Rule(_M, "unlink", "sockets and pid file, at the end; a snapshot that failed, or is replaced", only=X86_64),
    Rule(_M, "unlinkat", "sockets and pid file, at the end; a snapshot that failed, or is replaced", _AT_CWD,
         Test(2, "no AT_REMOVEDIR", forbidden_bits=_AT_REMOVEDIR), only=AARCH64),

    # -- back ends in other processes, if there are any at the start, else EPERM
    Rule(_ALL, "sendmsg", "vhost-user: a driver's set-up, a reset, a pause are told", action=IF_VHOST_USER),
    Rule(_VI, "recvmsg", "vhost-user: the answers", action=IF_VHOST_USER),
    Rule(_IM, "socket", "vhost-user: a lost back end is tried again", Test(0, "AF_UNIX", (1,)),
         Test(1, "SOCK_STREAM", (_SOCK_STREAM | _SOCK_NONBLOCK | _SOCK_CLOEXEC,)), action=IF_VHOST_USER),
    Rule(_IM, "connect", "the same", action=IF_VHOST_USER),

    # -- what must fail the way an old kernel fails
    Rule(_IM, "clone3", "its flags are in memory, where no filter can look: the C library takes clone", action=_ENOSYS),
    Rule(_IM, "set_robust_list", "every new thread asks, and does without", action=_ENOSYS),
)


def rules_of(kind: int, architecture: str = HOST) -> tuple[Rule, ...]:
    return tuple(rule for rule in RULES if rule.kinds >> kind & 1 and rule.only in ("", architecture))


def allowed_calls(kind: int, architecture: str = HOST) -> set[str]:
    """The calls that such a thread may make, with the right arguments."""
    return {rule.call for rule in rules_of(kind, architecture) if rule.allows}


def calls_of_a_process(kinds: tuple[int, ...] = (VCPU, IOTHREAD, MAIN), architecture: str = HOST) -> int:
    """How many calls the threads of these kinds may make together, at most."""
    return len({rule.call for kind in kinds for rule in rules_of(kind, architecture) if rule.allows})
