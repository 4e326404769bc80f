"""Exactly these modules are loaded when the first vCPU's thread begins: each of them is paid for by every start."""

from __future__ import annotations

import shutil
import subprocess
import sys

from kvm.conftest import DEADLINE, SOURCE
from kvm.guests import hello

PROBE = """if 1:
    import sys
    before = set(sys.modules)
    import _thread, posix
    start_new_thread = _thread.start_new_thread
    def first(*arguments):
        _thread.start_new_thread = start_new_thread
        posix.pwrite(out, " ".join(sorted(set(sys.modules) - before)).encode(), 0)
        return start_new_thread(*arguments)
    _thread.start_new_thread = first
    out = posix.open(sys.argv.pop(1), posix.O_WRONLY)
    sys.path.insert(0, sys.argv.pop(1))
    from stratovirt.__main__ import main
    sys.exit(main())
"""

# Of the standard library and the interpreter.
FOREIGN = set("""
_bisect _ctypes _stat _struct errno fcntl gc mmap select struct
""".split())
OURS = set("""
stratovirt stratovirt.__main__ stratovirt.address_map stratovirt.arch stratovirt.arch.x86_64
stratovirt.arch.x86_64.boot_params stratovirt.arch.x86_64.cpuid stratovirt.arch.x86_64.layout stratovirt.arch.x86_64.pvh
stratovirt.arch.x86_64.registers stratovirt.bundle stratovirt.cli stratovirt.cli.command stratovirt.cli.grammar
stratovirt.cli.health stratovirt.cli.options stratovirt.cli.suboptions stratovirt.config stratovirt.config.options
stratovirt.config.schema stratovirt.config.vm stratovirt.devices stratovirt.devices.cmos_rtc stratovirt.devices.i8042
stratovirt.devices.sleep_control stratovirt.errors stratovirt.firmware stratovirt.firmware.acpi stratovirt.firmware.aml
stratovirt.firmware.mptable stratovirt.hostmap stratovirt.hypervisor stratovirt.hypervisor.kvm
stratovirt.hypervisor.kvm._uapi stratovirt.hypervisor.kvm.run_loop stratovirt.hypervisor.kvm.system
stratovirt.hypervisor.kvm.vcpu stratovirt.hypervisor.kvm.vm stratovirt.loader stratovirt.loader.elf stratovirt.loader.image
stratovirt.loader.kernel stratovirt.lockdown stratovirt.log stratovirt.loop stratovirt.machine stratovirt.machine.board
stratovirt.machine.boot stratovirt.machine.drivers stratovirt.machine.events stratovirt.machine.halt_watch
stratovirt.machine.kvm stratovirt.machine.lifecycle stratovirt.machine.microvm stratovirt.machine.slots
stratovirt.machine.vcpus stratovirt.machine.x86_64 stratovirt.machine.x86_64.boot stratovirt.machine.x86_64.platform
stratovirt.machine.x86_64.processors stratovirt.memory stratovirt.process stratovirt.sandbox stratovirt.sandbox.kernel
stratovirt.sandbox.tables_x86_64
""".split())


def test_modules_at_the_first_vcpus_start(kernel, tmp_path) -> None:
    out = tmp_path / "modules"
    words = ["-machine", "microvm", "-m", "128", "-kernel", kernel(hello())]
    for _ in range(2):  # the first writes the bundle, if it is not up to date
        out.write_text("")
        done = subprocess.run([sys.executable, "-IS", "-c", PROBE, str(out), str(SOURCE), *words], timeout=DEADLINE,
                              check=False, capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (0, "")
    loaded = set(out.read_text().split())
    ours = {name for name in loaded if name.partition(".")[0] == "stratovirt"}
    assert ours == OURS
    assert loaded - ours == FOREIGN


def test_the_bundle_has_what_is_imported_last(kernel, tmp_path) -> None:
    """Else every start looks for it in directories."""
    shutil.copytree(SOURCE / "stratovirt", tmp_path / "stratovirt", ignore=shutil.ignore_patterns("__pycache__"))
    code = ("import sys; sys.path.insert(0, sys.argv.pop(1)); from stratovirt import bundle; Bundle = bundle.Bundle; "
            "bundle.Bundle = lambda directory: made.append(Bundle(directory)) or made[0]; made = []; "
            "from stratovirt.__main__ import main; import posix; real = posix._exit; "
            "posix._exit = lambda status: (print(made[0].stale), sys.stdout.flush(), real(status)); main()")
    words = ["-machine", "microvm", "-m", "128", "-kernel", kernel(hello())]
    said = [subprocess.run([sys.executable, "-IS", "-c", code, str(tmp_path), *words], timeout=DEADLINE, check=True,
                           capture_output=True, text=True).stdout for _ in range(2)]
    assert said == ["True\n", "False\n"]
