# SPDX-License-Identifier: Apache-2.0

"""Locks the ledger for a change. A bind may proceed without the lock."""

from __future__ import annotations

import contextlib
import dataclasses
from typing import Any, Iterator, Optional

from kuryr_break0 import exceptions
from kuryr_break0.ledger import Ledger
from kuryr_break0 import log

LOG = log.get_logger(__name__)


@dataclasses.dataclass
class Transaction:
    """A change under the lock of the ledger.

    :ivar unwritable: the error if the state directory cannot be written, or
        None
    """

    unwritable: Optional[exceptions.LedgerUnavailable] = None
    _lines: list[tuple[Any, ...]] = dataclasses.field(default_factory=list)

    def log_later(self, *line: Any) -> None:
        """Log at INFO after the lock is released.

        Writing a log line can take as long as setting a route.
        """
        self._lines.append(line)

    def write_log(self) -> None:
        for line in self._lines:
            LOG.info(*line)


@contextlib.contextmanager
def begin(ledger: Ledger, required: bool = False,
          writable: bool = False) -> Iterator[Transaction]:
    """Hold the lock of the ledger within the block.

    By default, the block also runs without the lock if the lock cannot be
    taken, because for a bind, a reachable pod matters more than the lock.

    :param required: fail if another process keeps the lock. An unbind needs
        the lock
    :param writable: fail if the state directory cannot be written
    :raises LockTimeout: only if ``required``
    :raises LedgerUnavailable: only if ``writable``
    """
    transaction = Transaction()
    try:
        with contextlib.ExitStack() as stack:
            try:
                stack.enter_context(ledger.lock())
            except exceptions.LedgerUnavailable as err:
                if writable:
                    raise
                LOG.error('Working without a lock. %s', err)
                transaction.unwritable = err
            except exceptions.LockTimeout as err:
                if required:
                    raise
                LOG.error('Working without a lock. %s', err)
            yield transaction
    finally:
        transaction.write_log()
