"""Random bytes for a guest, from a character device of the host such as /dev/urandom."""

from __future__ import annotations

import os
import stat

from stratovirt.errors import ConfigError, HostError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from stratovirt.config.vm import RngBackendConfig


class RandomSource:
    """An open source. Raises: ConfigError when `filename` is not a readable character device."""

    def __init__(self, backend: RngBackendConfig) -> None:
        self.path = backend.filename
        try:
            self._fd = os.open(self.path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError as error:
            raise ConfigError(os.strerror(error.errno or 0), option="-object rng-random,filename", value=self.path) from error
        if not stat.S_ISCHR(os.fstat(self._fd).st_mode):
            os.close(self._fd)
            raise ConfigError("not a source of random bytes", option="-object rng-random,filename", value=self.path,
                              accepted="a character device, such as /dev/urandom")

    def read_into(self, views: list[memoryview]) -> int:
        """Fill as much of `views` as the source has now; returns the number of bytes, 0 when it has none at the moment."""
        try:
            return os.readv(self._fd, views)
        except BlockingIOError:
            return 0
        except OSError as error:
            raise HostError.from_os(f"read of {self.path}", error) from error

    def close(self) -> None:
        os.close(self._fd)
