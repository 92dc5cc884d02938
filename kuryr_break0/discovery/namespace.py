# SPDX-License-Identifier: Apache-2.0

"""Calculate the time at which a changed namespace is read."""

from __future__ import annotations

import dataclasses
from typing import Hashable, Optional

from kuryr_break0 import kernel

#: Seconds from an event to the read of its namespace, so that one read handles
#: a whole burst of events.
BURST = 0.03
#: Seconds between two reads of a namespace while it has credit, the maximum
#: credit in reads, and seconds between two reads without credit. 24 reads are
#: enough for an engine that replaces an interface several times.
_SOON, _QUICK, LAST = 0.06, 24.0, 1.0


@dataclasses.dataclass
class Namespace:
    """A namespace of the node.

    :ivar container: see :class:`kernel.Examined`
    :ivar number: see :class:`kernel.Examined`
    :ivar due: monotonic time of the next look; None if nothing has changed
    :ivar looked: monotonic time of the last look
    :ivar quick: looks that may follow each other quickly; one more with every
        two seconds
    :ivar marked: monotonic time of the last change, from which that counts
    """

    found: kernel.Found
    container: Hashable = None
    number: Optional[int] = None
    due: Optional[float] = None
    looked: float = 0.0
    quick: float = _QUICK
    marked: float = 0.0

    @property
    def payer(self) -> Hashable:
        """Return the cause that :class:`~kuryr_break0.pace.Pace` charges.

        All namespaces of a container have the same cause. A namespace without
        a container is a cause of its own.
        """
        return self.container or self.found.namespace

    def mark(self, now: float) -> float:
        """Record a change; return the monotonic time for the next read."""
        self.quick = min(_QUICK, self.quick + (now - self.marked) / 2)
        self.marked = now
        pause = LAST
        if self.quick >= 1:
            self.quick -= 1
            pause = _SOON
        return max(now + BURST, self.looked + pause)
