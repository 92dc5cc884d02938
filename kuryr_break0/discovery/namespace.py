# SPDX-License-Identifier: Apache-2.0

"""Calculate the time of the next read of a changed namespace."""

from __future__ import annotations

import dataclasses
from typing import Hashable, Optional

from kuryr_break0 import kernel

#: Seconds from an event to the read of its namespace, so that one read handles
#: a whole burst of events.
BURST = 0.03
#: Minimum seconds between two reads of a namespace that has credit, maximum
#: credit in reads, and minimum seconds between two reads without credit. 24
#: reads are enough for an engine that replaces an interface several times.
_SOON, _MAX_CREDIT, LAST = 0.06, 24.0, 1.0


@dataclasses.dataclass
class Namespace:
    """A namespace of the node, with the times of its changes and reads.

    :ivar container: see :class:`kernel.ExaminedNamespace`
    :ivar number: see :class:`kernel.ExaminedNamespace`
    :ivar due: monotonic time of the next read; None if nothing has changed
    :ivar read_at: monotonic time of the last read
    :ivar credit: number of reads that may follow at intervals of ``_SOON``. It
        grows by one every two seconds
    :ivar changed_at: monotonic time of the last change, at which ``credit``
        was calculated
    """

    location: kernel.NamespaceLocation
    container: Hashable = None
    number: Optional[int] = None
    due: Optional[float] = None
    read_at: float = 0.0
    credit: float = _MAX_CREDIT
    changed_at: float = 0.0

    @property
    def cause(self) -> Hashable:
        """Return the cause to charge (:class:`~kuryr_break0.pace.Pace`).

        All namespaces of a container have the same cause. A namespace without
        a container is a cause of its own.
        """
        return self.container or self.location.namespace

    def mark(self, now: float) -> float:
        """Record a change; return the monotonic time for the next read."""
        self.credit = min(_MAX_CREDIT,
                          self.credit + (now - self.changed_at) / 2)
        self.changed_at = now
        pause = LAST
        if self.credit >= 1:
            self.credit -= 1
            pause = _SOON
        return max(now + BURST, self.read_at + pause)
