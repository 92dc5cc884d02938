# SPDX-License-Identifier: Apache-2.0

"""The heartbeat of the agent, by which other processes know that it works."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
from typing import Callable, Iterator, Optional

from kuryr_break0.ledger import files
from kuryr_break0 import log

LOG = log.get_logger(__name__)

#: Seconds to wait for those who only ask whether the agent has the lock.
_PATIENCE = 0.05


class Heartbeat:
    """A file that the agent holds a lock on and writes after its syncs.

    But not after one that fails: then others do what they would without it.

    :ivar path: of the file
    """

    def __init__(self, path: str) -> None:
        self.path = path

    @contextlib.contextmanager
    def kept(self) -> Iterator[Callable[[], None]]:
        """Be the agent within the block.

        :returns: what to call after each sync that succeeds
        """
        fd = -1
        reason: Optional[str] = None
        with contextlib.ExitStack() as stack:
            def beat() -> None:
                nonlocal fd, reason
                try:
                    if fd < 0 or not files.is_at(fd, self.path):
                        stack.close()
                        fd = -1
                        made = stack.enter_context(files.opened(
                            self.path, os.O_RDWR | os.O_CREAT))
                        if not files.take(made, fcntl.LOCK_SH, _PATIENCE):
                            raise OSError(errno.EAGAIN, 'it is locked')
                        fd = made
                    os.pwrite(fd, b'%020.3f\n' % files.now(), 0)
                    reason = None
                except OSError as err:
                    if err.strerror != reason:
                        LOG.error('Cannot write the heartbeat of the agent '
                                  'to %s: %s. Without it each ADD and DEL '
                                  'also repairs routes, which takes longer.',
                                  self.path, err.strerror)
                    reason = err.strerror

            beat()
            yield beat

    def age(self) -> Optional[float]:
        """Return the seconds since the last beat; None without an agent."""
        with contextlib.suppress(OSError, ValueError), \
                files.opened(self.path, os.O_RDONLY) as fd:
            if not files.take(fd, fcntl.LOCK_EX):
                return max(files.now() - float(os.read(fd, 64)), 0)
        return None
