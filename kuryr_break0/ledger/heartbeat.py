# SPDX-License-Identifier: Apache-2.0

"""The heartbeat by which other processes know that the agent is alive."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
from typing import Callable, Iterator, Optional

from kuryr_break0.ledger import files
from kuryr_break0 import log

LOG = log.get_logger(__name__)

#: Seconds to wait for another process, which holds the lock to test it.
_PATIENCE = 0.05


class Heartbeat:
    """A file that the agent locks, and writes after each successful sync.

    After a failed sync, the agent does not write the file. The heartbeat gets
    old, and other processes then repair the node themselves.

    :ivar path: path of the file
    """

    def __init__(self, path: str) -> None:
        self.path = path

    @contextlib.contextmanager
    def keep(self) -> Iterator[Callable[[], None]]:
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
                        made = stack.enter_context(files.open_file(
                            self.path, os.O_RDWR | os.O_CREAT))
                        if not files.try_lock(made, fcntl.LOCK_SH, _PATIENCE):
                            raise OSError(errno.EAGAIN, 'another process '
                                          'has locked the file')
                        fd = made
                    os.pwrite(fd, b'%020.3f\n' % files.now(), 0)
                    reason = None
                except OSError as err:
                    if err.strerror != reason:
                        LOG.error('Cannot write the heartbeat of the agent '
                                  'to %s: %s. Each ADD and DEL now also '
                                  'repairs routes, which takes longer. Make '
                                  'the state directory writable for the '
                                  'agent', self.path, err.strerror)
                    reason = err.strerror

            beat()
            yield beat

    def state(self, patience: float) -> str:
        """Return the state of the agent: running, stopped or stuck.

        :param patience: age of the heartbeat, in seconds, above which a
            running agent counts as stuck
        """
        age = self.age()
        if age is None:
            return 'stopped'
        return 'stuck' if age > patience else 'running'

    def age(self) -> Optional[float]:
        """Return the heartbeat's age in seconds; None if no agent runs."""
        with contextlib.suppress(OSError, ValueError), \
                files.open_file(self.path, os.O_RDONLY) as fd:
            if not files.try_lock(fd, fcntl.LOCK_EX):
                return max(files.now() - float(os.read(fd, 64)), 0)
        return None
