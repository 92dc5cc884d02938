# SPDX-License-Identifier: Apache-2.0

"""The lock between all processes and threads that use a ledger."""

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


class Lock:
    """A lock on a file, which the kernel frees when its holder dies.

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
            with files.opened(self.path, os.O_RDWR | os.O_CREAT) as fd:
                if files.take(fd, fcntl.LOCK_EX) and files.is_at(fd,
                                                                 self.path):
                    self.is_held = True
                    try:
                        yield
                    finally:
                        self.is_held = False
                    return
            if time.monotonic() > deadline:
                raise exceptions.LockTimeout(path=self.path,
                                             timeout=self._timeout)
            time.sleep(pause)
            pause = min(pause * 1.5, _MAX_PAUSE)

    def is_free_within(self, seconds: float) -> bool:
        """Wait until who holds it now has let it go.

        Nothing is made and nobody is kept waiting.

        :raises OSError: if the file cannot be opened
        """
        try:
            with files.opened(self.path, os.O_RDONLY) as fd:
                return files.take(fd, fcntl.LOCK_SH, seconds)
        except FileNotFoundError:
            return True  # nobody has ever held it
