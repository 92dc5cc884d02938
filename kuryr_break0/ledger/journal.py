# SPDX-License-Identifier: Apache-2.0

"""Counts the operations of all processes of the node, for the metrics.

A worker of kuryr-daemon lives for one request, and perhaps no agent runs. So
each process appends records to a file in the state directory, and the agent
removes the records. A bind takes about 10 microseconds to append its record.
The methods of :class:`Journal` raise no error.
"""

from __future__ import annotations

import contextlib
import enum
import fcntl
import functools
import os
import struct
import time
from typing import Any, Callable, cast, NamedTuple, TypeVar

from kuryr_break0.ledger import files

_F = TypeVar('_F', bound=Callable[..., Any])

#: Operation, count, total seconds. The page size is a multiple of the size of
#: a record, so tmpfs writes a record as a whole.
_RECORD = struct.Struct('<BxxxId')
#: Maximum bytes of the file. If the file is full, new records are dropped.
LIMIT = 64 * 1024
#: Seconds to wait for the lock. A process holds the lock for microseconds,
#: unless it is stopped.
_PATIENCE = 0.01


class Done(enum.IntEnum):
    """An operation; the value is its number in the file."""

    BIND = 1
    BIND_FAILED = 2
    UNBIND = 3
    UNBIND_FAILED = 4
    # Repairs. The metrics use the names of repairs as reasons.
    DEVICE = 16
    ROUTE = 17
    NEIGHBOUR = 18
    POD = 19
    UNCLAIMED = 20
    SANDBOX_GONE = 21
    REBUILT = 23
    RELEASED = 24


#: The operations that are repairs.
REPAIRS = tuple(each for each in Done if each >= Done.DEVICE)


class Record(NamedTuple):
    """The counts of an operation.

    :ivar times: number of times that the operation took place
    :ivar seconds: total duration; 0 if not measured
    """

    operation: Done
    times: int
    seconds: float


class Journal:
    """The records that the agent has not removed yet.

    :param state_dir: the state directory; the ledger creates it
    """

    def __init__(self, state_dir: str) -> None:
        self._path = os.path.join(state_dir, 'journal')

    def add(self, what: Done, *, times: int = 1, seconds: float = 0) -> None:
        """Append a record; drop the record if there is an error."""
        with contextlib.suppress(OSError), files.open_file(
                self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT) as fd:
            if files.try_lock(fd, fcntl.LOCK_SH, _PATIENCE) and (
                    os.fstat(fd).st_size + _RECORD.size <= LIMIT):
                os.write(fd, _RECORD.pack(what, times, seconds))

    def drain(self) -> list[Record]:
        """Remove and return all records; none if the file is unreadable."""
        content = b''
        with contextlib.suppress(OSError), \
                files.open_file(self._path, os.O_RDWR) as fd:
            if files.try_lock(fd, fcntl.LOCK_EX, _PATIENCE):
                content = os.read(fd, LIMIT)
                if content:
                    os.ftruncate(fd, 0)
        whole = len(content) - len(content) % _RECORD.size
        by_number = {int(each): each for each in Done}
        return [Record(by_number[what], times, seconds)
                for what, times, seconds
                in _RECORD.iter_unpack(content[:whole]) if what in by_number]


def timed(done: Done, failed: Done) -> Callable[[_F], _F]:
    """Record the result and duration of a method in the journal.

    The ledger of the journal is the attribute ``_ledger`` of the object.
    """
    def decorate(method: _F) -> _F:
        @functools.wraps(method)
        def timed_method(self: Any, *args: Any, **kwargs: Any) -> Any:
            began = time.monotonic()
            what = failed
            try:
                result = method(self, *args, **kwargs)
                what = done
                return result
            finally:
                self._ledger.journal.add(
                    what, seconds=time.monotonic() - began)
        return cast(_F, timed_method)
    return decorate
