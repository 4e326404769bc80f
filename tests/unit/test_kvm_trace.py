"""The benches' account of exits to user space, from lines as the kernel writes them."""

from __future__ import annotations

from pathlib import Path

from benches import kvm_trace

_TRACE = """\
# tracer: nop
  stratovirt-123     [000] d....    10.000001: kvm_entry: vcpu 0, rip 0x1000000
  stratovirt-123     [000] .....    10.000002: kvm_pio: pio_write at 0x3f8 size 1 count 1 val 0x41
  stratovirt-123     [000] .....    10.000003: kvm_userspace_exit: reason KVM_EXIT_IO (2)
  stratovirt-123     [000] d....    10.000013: kvm_entry: vcpu 0, rip 0x1000001
  stratovirt-123     [000] .....    10.000014: kvm_pio: pio_write at 0x20 size 1 count 1 val 0x20
  stratovirt-123     [000] d....    10.000015: kvm_entry: vcpu 0, rip 0x1000002
  stratovirt-123     [000] .....    10.000016: kvm_userspace_exit: reason KVM_EXIT_IO (2)
  stratovirt-123     [000] .....    10.000020: kvm_pio: pio_read at 0x3fd size 1 count 1 val 0x60
  stratovirt-123     [000] d....    10.000021: kvm_entry: vcpu 0, rip 0x1000003
  stratovirt-123     [000] .....    10.000022: kvm_mmio: mmio write len 4 gpa 0xfeb00070 val 0x1
  stratovirt-123     [000] .....    10.000023: kvm_userspace_exit: reason KVM_EXIT_MMIO (6)
  stratovirt-123     [000] d....    10.000025: kvm_entry: vcpu 0, rip 0x1000004
  stratovirt-123     [000] .....    10.000026: kvm_userspace_exit: reason restart (4)
  stratovirt-123     [000] d....    10.000027: kvm_entry: vcpu 0, rip 0x1000005
  stratovirt-123     [000] .....    10.000030: kvm_userspace_exit: reason KVM_EXIT_IO (2)
"""


def test_each_exit_is_counted_where_it_went(tmp_path: Path) -> None:
    file = tmp_path / "trace"
    file.write_text(_TRACE)
    events = kvm_trace.read(file)
    assert kvm_trace.user_space_exits(events) == {
        "port 0x3f8 write": (1, 10_000),
        "port 0x3fd read": (1, 5_000),
        "mmio 0xfeb00070 write": (1, 2_000),
        "restart": (1, 1_000),
    }  # the write to 0x20 stayed in the kernel; the last exit never came back
    assert kvm_trace.count(events, "kvm_entry") == 6
