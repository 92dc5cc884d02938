# SPDX-License-Identifier: Apache-2.0

"""Limits the processor time of work that pods and clients cause."""

from __future__ import annotations

import time
from typing import Hashable

#: Share of a processor for all late causes together.
SHARE = 0.1
#: Processor seconds that the work of each cause may take before the cause is
#: late. So rare work, such as the work at boot, is not delayed.
CREDIT = 0.25
#: If more causes than this number are stored, the causes without a debt are
#: removed.
_MANY = 4096


class Pace:
    """Computes pauses between the pieces of work of one thread.

    Each piece has a cause, such as a container. If the work of a cause has
    taken more processor time than its credit, the cause is late and has to
    wait. Late causes share SHARE of a processor equally, and do not delay
    other causes.

    :param credit: processor seconds
    """

    def __init__(self, credit: float = CREDIT) -> None:
        self._credit = credit
        #: processor seconds that each cause was granted until ``_at``
        self._paid = 0.0
        self._at = time.monotonic()
        #: by cause, the value of ``_paid`` at which its debt is paid
        self._free: dict[Hashable, float] = {}
        self._late: set[Hashable] = set()
        self._spent = 0.0

    def begin(self) -> None:
        """Begin a piece of work."""
        # Measure processor time: on a busy node, other processes take most of
        # the elapsed time.
        self._spent = time.thread_time()

    def end(self, cause: Hashable = None) -> float:
        """End a piece of work; return the seconds that its cause must wait."""
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
        """Return the seconds that a cause has to wait."""
        if cause not in self._late:
            return 0.0
        late = self._free[cause] - self._pay() - self._credit
        return max(0.0, late * len(self._late) / SHARE)

    def _pay(self) -> float:
        """Update ``_paid`` and return it."""
        now = time.monotonic()
        self._paid += SHARE * (now - self._at) / max(1, len(self._late))
        self._at = now
        self._late = {each for each in self._late
                      if self._free[each] > self._paid + self._credit}
        return self._paid
