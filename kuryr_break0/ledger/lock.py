# SPDX-License-Identifier: Apache-2.0

"""The lock of a ledger, for all processes and threads that use the ledger.

The lock is a lock on a file (flock(2)). When the holder dies, the kernel
releases the lock. The functions raise OSError if the file cannot be opened.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
from typing import Iterator

from kuryr_break0 import exceptions
from kuryr_break0.ledger import files

#: Seconds between the first two attempts, and maximum seconds between any two
#: attempts. A bind holds the lock for half a millisecond. More frequent
#: attempts would take processor time from the holder.
_PAUSE, _MAX_PAUSE = 0.01, 0.05


@contextlib.contextmanager
def hold(path: str, timeout: float) -> Iterator[None]:
    """Hold the lock within the block.

    :param timeout: seconds to wait
    :raises LockTimeout: if the lock was not free in time
    """
    # On a busy node, let the kernel preempt this process now, rather than
    # while it holds the lock.
    os.sched_yield()
    deadline = time.monotonic() + timeout
    pause = _PAUSE
    while True:
        with files.open_file(path, os.O_RDWR | os.O_CREAT) as fd:
            if files.try_lock(fd, fcntl.LOCK_EX) and files.is_at(fd, path):
                yield
                return
        if time.monotonic() > deadline:
            raise exceptions.LockTimeout(path=path, timeout=timeout)
        time.sleep(pause)
        pause = min(pause * 1.5, _MAX_PAUSE)


def is_free_within(path: str, seconds: float) -> bool:
    """Wait until the lock is free, without taking it.

    The function creates no file and blocks no other process.

    :returns: whether the lock was free within this time
    """
    try:
        with files.open_file(path, os.O_RDONLY) as fd:
            return files.try_lock(fd, fcntl.LOCK_SH, seconds)
    except FileNotFoundError:
        return True  # no process has ever held the lock
