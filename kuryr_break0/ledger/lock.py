# SPDX-License-Identifier: Apache-2.0

"""The lock between all processes and threads that use a ledger."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import time
from typing import Iterator

from kuryr_break0 import exceptions

#: Seconds between two tries. The lock is held for half a millisecond; those
#: who try too often take the processor from its holder.
_PAUSE, _MAX_PAUSE = 0.01, 0.05


class Lock:
    """A lock on a file, by flock(2).

    It belongs to the open file, so that other users of the file in the same
    process neither have it nor lose it, as they would a lock of fcntl(2).
    The kernel frees it when its holder dies.

    :ivar path: of the file
    :ivar is_held: whether it is held through this object
    """

    def __init__(self, path: str, timeout: float) -> None:
        self.path = path
        self._timeout = timeout
        self.is_held = False

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Hold it within the block.

        :raises LockTimeout: when another held it for too long
        :raises OSError: when the file cannot be opened
        """
        # Where processors are scarce, let the kernel stop this process now
        # rather than while it keeps the others waiting.
        os.sched_yield()
        deadline = time.monotonic() + self._timeout
        pause = _PAUSE
        while True:
            fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW
                         | os.O_NONBLOCK | os.O_CLOEXEC, 0o600)
            try:
                if _taken(fd) and self._is_current(fd):
                    self.is_held = True
                    try:
                        yield
                    finally:
                        self.is_held = False
                    return
            finally:
                os.close(fd)
            if time.monotonic() > deadline:
                raise exceptions.LockTimeout(path=self.path,
                                             timeout=self._timeout)
            time.sleep(pause)
            pause = min(pause * 1.5, _MAX_PAUSE)

    def _is_current(self, fd: int) -> bool:
        """Return whether the file is still the one that others open."""
        try:
            return os.path.samestat(os.fstat(fd), os.stat(self.path))
        except FileNotFoundError:
            return False

    def is_free_within(self, seconds: float) -> bool:
        """Wait until who holds it now has let it go.

        Nothing is made and nobody is kept waiting.

        :raises OSError: if the file cannot be opened
        """
        deadline = time.monotonic() + seconds
        try:
            fd = os.open(self.path, os.O_RDONLY | os.O_NONBLOCK
                         | os.O_CLOEXEC)
        except FileNotFoundError:
            return True  # nobody has ever held it
        try:
            while not _taken(fd, fcntl.LOCK_SH):
                if time.monotonic() > deadline:
                    return False
                time.sleep(0.001)
            return True
        finally:
            os.close(fd)


def _taken(fd: int, kind: int = fcntl.LOCK_EX) -> bool:
    try:
        fcntl.flock(fd, kind | fcntl.LOCK_NB)
    except OSError as err:
        if err.errno in (errno.EAGAIN, errno.EACCES):
            return False
        raise
    return True
