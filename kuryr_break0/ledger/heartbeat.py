# SPDX-License-Identifier: Apache-2.0

"""The agent's heartbeat, by which other processes know that it is alive."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
from typing import Callable, Iterator, Optional

from kuryr_break0.ledger import files
from kuryr_break0 import log

LOG = log.get_logger(__name__)

#: Seconds to wait for a process that just tests the agent's lock.
_PATIENCE = 0.05


class Heartbeat:
    """A file that the agent locks, and writes after each successful sync.

    After a failed sync there is no heartbeat, so that other processes repair
    the node themselves.

    :ivar path: path of the file
    """

    def __init__(self, path: str) -> None:
        self.path = path

    @contextlib.contextmanager
    def kept(self) -> Iterator[Callable[[], None]]:
        """Hold the agent's lock within the block.

        :returns: a function to call after each successful sync
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
        """Return the heartbeat's age in seconds; None without an agent."""
        with contextlib.suppress(OSError, ValueError), \
                files.opened(self.path, os.O_RDONLY) as fd:
            if not files.take(fd, fcntl.LOCK_EX):
                return max(files.now() - float(os.read(fd, 64)), 0)
        return None
