"""A machine that is restored from a template as far as it can be before anybody has asked for it.

    before the request   RAM is mapped copy-on-write, VM, chips and vCPUs are made, all of them restored that stands still
    after it             devices with the clone's own identity; clocks, timers, interrupt chips; a new generation ID

What is left goes through `MicroVm.build` like any restore. Thread: the main one of the process that becomes the machine.
"""

from __future__ import annotations

from stratovirt.errors import ConfigError, HostError
from stratovirt.hostmap import HostMapping
from stratovirt.machine.board import Processors, layout
from stratovirt.machine.kvm import KvmAhead
from stratovirt.machine.snapshot import Incoming
from stratovirt.memory import RamRegion

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from stratovirt.config.vm import VmConfig
    from stratovirt.snapshot.chain import Chain


class MappedTemplate:
    """The memory of a template's clone, and what has been read of its state. Of `chain` nothing is needed afterwards.

    Raises: ConfigError, HostError.
    """

    def __init__(self, config: VmConfig, state: dict[str, Any], chain: Chain) -> None:
        self.config = config
        self.incoming = Incoming(config, state, chain)
        self.regions = [RamRegion(base, HostMapping(size)) for base, size in layout.ram_ranges(config.memory_size)]
        for region in self.regions:
            if not config.dump_guest_core:
                region.host.dont_dump()
            self.incoming.load_memory(region)


class CloneAhead(KvmAhead):
    """Raises: ConfigError, HostError."""

    def __init__(self, mapped: MappedTemplate) -> None:
        self._mapped = mapped
        super().__init__(mapped.config)
        self.incoming = mapped.incoming

    def _create_memory(self, config: VmConfig) -> list[RamRegion]:
        return self._mapped.regions

    def _create_processors(self, config: VmConfig | None) -> Processors:
        processors = Processors(self.system, self._mapped.config)
        try:
            for region in self._mapped.regions:
                processors.vm.add_memory(region)
            processors.create_all()
            self._mapped.incoming.prepare(processors)
        except (ConfigError, HostError):
            processors.let_go()
            raise
        return processors
