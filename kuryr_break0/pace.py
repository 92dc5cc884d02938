# SPDX-License-Identifier: Apache-2.0

"""Keeps work that others can cause at any rate to a part of a processor."""

from __future__ import annotations

import time
from typing import Hashable

#: The part of a processor that all late causes share.
SHARE = 0.1
#: Seconds of a processor that the work of each cause may take before it is
#: late, so that what happens rarely, as at boot, is done at once.
CREDIT = 0.25
#: Causes that are kept; any more are looked through for some without debt.
_MANY = 4096


class Pace:
    """How long to wait after pieces of work of one thread.

    Each piece has a cause, such as a container. A cause whose work has taken
    more than its credit is late, and waits. The late ones share SHARE of a
    processor equally; they delay no other.

    :param credit: seconds of a processor
    """

    def __init__(self, credit: float = CREDIT) -> None:
        self._credit = credit
        #: seconds of a processor that each cause has got back until ``_at``
        self._paid = 0.0
        self._at = time.monotonic()
        #: by cause, the value of ``_paid`` at which it has no debt
        self._free: dict[Hashable, float] = {}
        self._late: set[Hashable] = set()
        self._spent = 0.0

    def begin(self) -> None:
        """Begin a piece of work."""
        # Of the processor, since on a busy node others have most of the time.
        self._spent = time.thread_time()

    def end(self, cause: Hashable = None) -> float:
        """End it; return the seconds to wait until the next of its cause."""
        paid = self._pay()
        self._free[cause] = max(paid, self._free.get(cause, paid)) + (
            time.thread_time() - self._spent)
        if self._free[cause] > paid + self._credit:
            self._late.add(cause)
        if len(self._free) > _MANY:
            self._free = {each: free for each, free in self._free.items()
                          if free > paid}
        return self.wait(cause)

    def wait(self, cause: Hashable = None) -> float:
        """Return the seconds until a cause may have work done."""
        if cause not in self._late:
            return 0.0
        late = self._free[cause] - self._pay() - self._credit
        return max(0.0, late * len(self._late) / SHARE)

    def _pay(self) -> float:
        """Return ``_paid`` as it is now."""
        now = time.monotonic()
        self._paid += SHARE * (now - self._at) / max(1, len(self._late))
        self._at = now
        self._late = {each for each in self._late
                      if self._free[each] > self._paid + self._credit}
        return self._paid
