"""Engines that carry out many requests on an image at once: `-drive aio=`.

    threads    a few threads, each one in preadv, pwritev, fdatasync or fallocate      aio_threads.py
    native     the kernel's io_submit interface, for O_DIRECT                           aio_native.py
    io_uring   rings shared with the kernel                                             aio_uring.py

An engine has the same few members whatever is behind it: `submit` takes a request and keeps it, `kick` starts what was
submitted, `fd` is an eventfd that becomes readable when requests are finished, `reap` returns those. What is finished before
`kick` returns, it says: nobody need wait for the eventfd then. A request fails
through its `error`, never through an exception. Nothing here runs before a guest asks for the first block, but for `probe`.
"""

from __future__ import annotations

import errno

from stratovirt import log
from stratovirt.backends.aio_threads import ThreadEngine
from stratovirt.errors import ConfigError, HostError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from stratovirt.backends.block import RawImage

ENGINES = ("threads", "native", "io_uring")


def probe(name: str) -> None:
    """Can this host run the engine? Raises: ConfigError, which names those that it can.

    What only this process's own filters withhold is no reason to refuse a disk that comes later: threads do the work, and the
    log says so when it begins (`open_engine`).
    """
    try:
        _prober(name)()
    except HostError as error:
        if error.errno == errno.EACCES:
            return
        usable = [other for other in ENGINES if other != name and _works(other)]
        raise ConfigError(f"the engine does not work on this host: {error}", option="-drive aio", value=name,
                          accepted=", ".join(f"aio={other}" for other in (*usable, "off"))) from error


def open_engine(image: RawImage) -> ThreadEngine:
    """The engine that the image names; threads, with a warning in the log, when the host refuses it by now."""
    try:
        if image.engine == "native":
            from stratovirt.backends.aio_native import NativeEngine

            return NativeEngine(image)
        if image.engine == "io_uring":
            from stratovirt.backends.aio_uring import UringEngine

            return UringEngine(image)
    except HostError as error:
        log.warn(f"{image.path}: {error}; threads do the work of aio={image.engine}")
    return ThreadEngine(image)


def _prober(name: str) -> Callable[[], None]:
    if name == "native":
        from stratovirt.backends import aio_native

        return aio_native.probe
    if name == "io_uring":
        from stratovirt.backends import aio_uring

        return aio_uring.probe
    return lambda: None


def _works(name: str) -> bool:
    try:
        _prober(name)()
    except HostError:
        return False
    return True
