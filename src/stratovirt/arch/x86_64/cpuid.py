"""What CPUID tells each vCPU: KVM's own table with the leaves about identity and topology rewritten.

Layout of an entry, struct kvm_cpuid_entry2: u32 function, index, flags, eax, ebx, ecx, edx, padding[3]; 40 bytes.
Spec: Intel SDM volume 2, CPUID; AMD APM volume 3, appendix E; Linux Documentation/virt/kvm/x86/cpuid.rst.
"""

from __future__ import annotations

import struct

_ENTRY = struct.Struct("<7I12x")

_LEAF_1_ECX_TSC_DEADLINE = 1 << 24
_LEAF_1_ECX_HYPERVISOR = 1 << 31
_LEAF_1_EDX_HTT = 1 << 28
_CLFLUSH_LINE = 8  # leaf 1 EBX[15:8], in units of 8 bytes
_LEAF_6_ECX_EPB = 1 << 3
_SIGNIFICANT_INDEX = 1  # KVM_CPUID_FLAG_SIGNIFCANT_INDEX
_LEVEL_SMT, _LEVEL_CORE, _LEVEL_DIE = 1, 2, 5
_LEAVES_REBUILT = (0xB, 0x1F)


class Topology:
    """The processor topology of one machine, and the APIC id of each vCPU in it.

    An APIC id is a bit string, package | die | core | thread, each field wide enough for its count. Where that would
    pass 253 (three cores a socket and many sockets), vCPUs are numbered without gaps instead, and the fields are only
    approximate: an 8-bit APIC id matters more than an exact package number.
    """

    __slots__ = ("apic_ids", "core_shift", "cpus", "die_shift", "dies", "package_shift")

    def __init__(self, cpus: int, dies: int, cores: int, threads: int) -> None:
        self.cpus = cpus
        self.dies = dies
        self.core_shift = (threads - 1).bit_length()
        self.die_shift = self.core_shift + (cores - 1).bit_length()
        self.package_shift = self.die_shift + (dies - 1).bit_length()
        ids = [self._apic_id(index, dies, cores, threads) for index in range(cpus)]
        self.apic_ids = ids if ids[-1] < 254 else list(range(cpus))

    def _apic_id(self, index: int, dies: int, cores: int, threads: int) -> int:
        rest, thread = divmod(index, threads)
        rest, core = divmod(rest, cores)
        package, die = divmod(rest, dies)
        return package << self.package_shift | die << self.die_shift | core << self.core_shift | thread


def vcpu_cpuid(supported: bytes, topology: Topology, max_cpus: int, tsc_deadline: bool) -> list[bytes]:
    """The CPUID table of each vCPU, in the order of topology.apic_ids. `supported` is what KVM_GET_SUPPORTED_CPUID gave."""
    common = bytearray()
    patches: list[tuple[int, int]] = []  # (leaf, offset) of the entries that hold the APIC id
    per_package = 1 << topology.package_shift
    for start in range(0, len(supported), _ENTRY.size):
        function, index, flags, eax, ebx, ecx, edx = _ENTRY.unpack_from(supported, start)
        if function in _LEAVES_REBUILT:
            continue
        if function == 1:
            ebx = ebx & 0xFF | _CLFLUSH_LINE << 8 | (min(per_package, 255) << 16)
            ecx |= _LEAF_1_ECX_HYPERVISOR
            if tsc_deadline:
                ecx |= _LEAF_1_ECX_TSC_DEADLINE
            edx = edx | _LEAF_1_EDX_HTT if per_package > 1 else edx & ~_LEAF_1_EDX_HTT
            patches.append((1, len(common)))
        elif function == 4 and eax & 0x1F:
            eax = eax & 0x03FF_FFFF | (min(max_cpus - 1, 63) << 26)
        elif function == 6:
            ecx &= ~_LEAF_6_ECX_EPB
        elif function == 0xA and eax & 0xFF != 2:
            eax = ebx = ecx = edx = 0
        elif function == 0x80000008:
            ecx = topology.package_shift << 12 | (min(per_package, 256) - 1)
        elif function == 0x8000001E:
            patches.append((0x8000001E, len(common)))
        common += _ENTRY.pack(function, index, flags, eax, ebx, ecx, edx)
    topology_offset = len(common)
    levels = _topology_levels(topology)
    for leaf in _LEAVES_REBUILT if topology.dies > 1 else _LEAVES_REBUILT[:1]:
        chosen = levels if leaf == 0x1F else [level for level in levels if level[0] != _LEVEL_DIE]
        for index, (level, shift, count) in enumerate([*chosen, (0, 0, 0)]):
            common += _ENTRY.pack(leaf, index, _SIGNIFICANT_INDEX, shift, count, level << 8 | index, 0)

    tables: list[bytes] = []
    for apic_id in topology.apic_ids:
        table = bytearray(common)
        for leaf, offset in patches:
            if leaf == 1:
                table[offset + 19] = apic_id  # EBX[31:24]
            else:  # AMD: extended APIC id, core id and threads a core, node
                threads = 1 << topology.core_shift
                struct.pack_into("<III", table, offset + 12, apic_id, (threads - 1) << 8 | apic_id >> topology.core_shift, 0)
        for offset in range(topology_offset, len(table), _ENTRY.size):
            struct.pack_into("<I", table, offset + 24, apic_id)  # EDX: the x2APIC id
        tables.append(bytes(table))
    return tables


def _topology_levels(topology: Topology) -> list[tuple[int, int, int]]:
    """(level type, bits to shift to the next level, logical processors at this level) from the thread up."""
    levels = [(_LEVEL_SMT, topology.core_shift, 1 << topology.core_shift)]
    if topology.dies > 1:
        levels.append((_LEVEL_CORE, topology.die_shift, 1 << topology.die_shift))
        levels.append((_LEVEL_DIE, topology.package_shift, 1 << topology.package_shift))
    else:
        levels.append((_LEVEL_CORE, topology.package_shift, 1 << topology.package_shift))
    return levels
