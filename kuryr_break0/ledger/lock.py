# SPDX-License-Identifier: Apache-2.0

"""The lock between all processes and threads that use a ledger.

It is on a file, so the kernel frees it when its holder dies. The functions
raise OSError if the file cannot be opened.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
from typing import Iterator

from kuryr_break0 import exceptions
from kuryr_break0.ledger import files

#: Seconds between two tries. The lock is held for half a millisecond; those
#: who try too often take the processor from its holder.
_PAUSE, _MAX_PAUSE = 0.01, 0.05


@contextlib.contextmanager
def held(path: str, timeout: float) -> Iterator[None]:
    """Hold the lock within the block.

    :param timeout: seconds
    :raises LockTimeout: when another held it for longer
    """
    # Where processors are scarce, let the kernel stop this process now
    # rather than while it keeps the others waiting.
    os.sched_yield()
    deadline = time.monotonic() + timeout
    pause = _PAUSE
    while True:
        with files.opened(path, os.O_RDWR | os.O_CREAT) as fd:
            if files.take(fd, fcntl.LOCK_EX) and files.is_at(fd, path):
                yield
                return
        if time.monotonic() > deadline:
            raise exceptions.LockTimeout(path=path, timeout=timeout)
        time.sleep(pause)
        pause = min(pause * 1.5, _MAX_PAUSE)


def is_free_within(path: str, seconds: float) -> bool:
    """Wait until who holds the lock now has let it go.

    Nothing is made and nobody is kept waiting.

    :returns: whether it was free within so many seconds
    """
    try:
        with files.opened(path, os.O_RDONLY) as fd:
            return files.take(fd, fcntl.LOCK_SH, seconds)
    except FileNotFoundError:
        return True  # nobody has ever held it
