"""What guest memory is made of.

A microVM has one memory. `-machine mem-share`, `-mem-path` and `-mem-prealloc` describe it; or `-machine memory-backend=ID`, as
in QEMU, names the `-object memory-backend-…` that does. Only imported when one of them is given.
"""

from __future__ import annotations

from stratovirt.config import options
from stratovirt.config.schema import size_text
from stratovirt.config.vm import RamConfig, VmConfig
from stratovirt.errors import ConfigError

_KIND = "memory-backend-"


def settle(config: VmConfig) -> None:
    """Fill in `config.ram`. Raises: ConfigError for what contradicts itself."""
    if config.memory_backend:
        config.ram = _from_object(config)
    elif config.mem_path:
        config.ram = RamConfig("file", path=config.mem_path, share=config.mem_share, prealloc=config.mem_prealloc)
    elif config.mem_share:
        config.ram = RamConfig("memfd", share=True, prealloc=config.mem_prealloc, option="-machine mem-share")
    elif config.mem_prealloc:
        config.ram = RamConfig("ram", prealloc=True, option="-m")


def _from_object(config: VmConfig) -> RamConfig:
    id = config.memory_backend
    if id not in config.memory_backends:
        known = ", ".join(config.memory_backends)
        raise ConfigError(f"there is no memory backend {id}", option="-machine memory-backend", value=id,
                          accepted="the id of an -object memory-backend-…" + (f": {known}" if known else ""))
    kind, values = config.memory_backends[id]
    title = f"-object {_KIND}{kind}"
    share = values.boolean("share")
    if config.mem_path:
        raise ConfigError(f"the memory is that of {id} already", option="-mem-path", value=config.mem_path,
                          accepted="-mem-path or -machine memory-backend")
    if config.mem_share and not share:
        raise ConfigError(f"contradicts share=off of {id}", option="-machine mem-share", value="on",
                          accepted=f"{title},share=on")
    size = values.integer("size")
    if config.memory_size_given and size != config.memory_size:
        raise ConfigError(f"the memory has {size_text(config.memory_size)} (-m)", option=f"{title},size",
                          value=size_text(size), accepted="the same size as with -m, or no -m")
    if not options.MIN_MEMORY <= size <= options.MAX_MEMORY or size % options.MEMORY_GRANULE:
        raise ConfigError("too small" if size < options.MIN_MEMORY else "no memory of a machine", option=f"{title},size",
                          value=size_text(size),
                          accepted=f"{size_text(options.MIN_MEMORY)} to {size_text(options.MAX_MEMORY)}, whole pages")
    policy, nodes = values.string("policy"), values.integers("host-nodes") if "host-nodes" in values.given else ()
    if policy != "default" and not nodes:
        raise ConfigError("host-nodes is missing", option=f"{title},policy", value=policy, accepted="host-nodes=N[-N][:N…]")
    config.memory_size = size
    config.dump_guest_core = config.dump_guest_core and values.boolean("dump-guest-core")
    path = values.string("mem-path") if kind == "file" else ""
    return RamConfig(kind, id=id, path=path, share=share, prealloc=config.mem_prealloc or values.boolean("mem-prealloc"),
                     host_nodes=nodes, policy=policy, option=f"{title},mem-path" if path else title)
