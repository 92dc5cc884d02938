# SPDX-License-Identifier: Apache-2.0

"""The heartbeat of the agent, by which other processes know that it works."""

from __future__ import annotations

import contextlib
import fcntl
import os
from typing import Callable, Iterator, Optional

from kuryr_break0.ledger import files
from kuryr_break0 import log

LOG = log.get_logger(__name__)


class Heartbeat:
    """A file that the agent holds a lock on and writes with each sync.

    The kernel ends the lock with the agent (flock(2)).

    :ivar path: of the file
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self._fd = -1
        self._reason: Optional[str] = None

    @contextlib.contextmanager
    def kept(self) -> Iterator[Callable[[], None]]:
        """Be the agent within the block.

        :returns: what to call with each sync
        """
        with contextlib.ExitStack() as stack:
            def beat() -> None:
                try:
                    if not self._is_current():
                        stack.close()
                        self._fd = os.open(
                            self.path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW
                            | os.O_NONBLOCK | os.O_CLOEXEC, 0o600)
                        stack.callback(os.close, self._fd)
                        stack.callback(setattr, self, '_fd', -1)
                        fcntl.flock(self._fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
                    os.pwrite(self._fd, b'%020.3f\n' % files.now(), 0)
                    self._reason = None
                except OSError as err:
                    if err.strerror != self._reason:
                        LOG.error('Cannot write the heartbeat of the agent '
                                  'to %s: %s. Without it each ADD and DEL '
                                  'also repairs routes, which takes longer.',
                                  self.path, err.strerror)
                    self._reason = err.strerror

            beat()
            yield beat

    def _is_current(self) -> bool:
        """Return whether the file is still at its path.

        It is not if the state directory was lost, and made again.
        """
        with contextlib.suppress(FileNotFoundError):
            return self._fd >= 0 and os.path.samestat(
                os.fstat(self._fd), os.stat(self.path))
        return False

    def age(self) -> Optional[float]:
        """Return the seconds since the last beat; None without an agent."""
        try:
            fd = os.open(self.path, os.O_RDONLY | os.O_NONBLOCK
                         | os.O_CLOEXEC)
        except OSError:
            return None
        try:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return max(files.now() - float(os.read(fd, 64)), 0)
        except (OSError, ValueError):
            pass
        finally:
            os.close(fd)
        return None
