# SPDX-License-Identifier: Apache-2.0

"""Says when a namespace is read again."""

from __future__ import annotations

import dataclasses
from typing import Optional

from kuryr_break0 import kernel

#: Seconds from an event to the look that it causes: a burst is one.
BURST = 0.03
#: Seconds between two reads of one namespace: the first for as many reads as
#: an engine may cause that replaces an interface a few times, then the last.
_SOON, _QUICK, LAST = 0.06, 24.0, 1.0


@dataclasses.dataclass
class Namespace:
    """A namespace of the node.

    :ivar container: what it is of; see :func:`kernel.container_of`
    :ivar due: monotonic time of the next look; None if nothing has changed
    :ivar looked: monotonic time of the last look
    :ivar quick: looks that may follow each other quickly; one more with every
        two seconds
    :ivar marked: monotonic time from which that was counted
    """

    found: kernel.Found
    container: Optional[int] = None
    due: Optional[float] = None
    looked: float = 0.0
    quick: float = _QUICK
    marked: float = 0.0

    def mark(self, now: float) -> None:
        """Mark it to be read soon."""
        if self.due is not None:
            return
        self.quick = min(_QUICK, self.quick + (now - self.marked) / 2)
        self.marked = now
        pause = LAST
        if self.quick >= 1:
            self.quick -= 1
            pause = _SOON
        self.due = max(now + BURST, self.looked + pause)
