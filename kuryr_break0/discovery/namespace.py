# SPDX-License-Identifier: Apache-2.0

"""A namespace of the node, and the time at which it is read again."""

from __future__ import annotations

import dataclasses
from typing import Hashable, Optional

from kuryr_break0 import kernel

#: Seconds from an event to the look that it causes: a burst is one.
BURST = 0.03
#: Seconds between two reads of one namespace: the first for as many reads as
#: an engine may cause that replaces an interface a few times, then the last.
_SOON, _QUICK, LAST = 0.06, 24.0, 1.0


@dataclasses.dataclass
class Namespace:
    """A namespace of the node.

    :ivar container: see :class:`kernel.ExaminedNamespace`
    :ivar number: see :class:`kernel.ExaminedNamespace`
    :ivar due: monotonic time of the next look; None if nothing has changed
    :ivar looked: monotonic time of the last look
    :ivar quick: looks that may follow each other quickly; one more with every
        two seconds
    :ivar marked: monotonic time of the last change, from which that counts
    """

    found: kernel.FoundNamespace
    container: Hashable = None
    number: Optional[int] = None
    due: Optional[float] = None
    looked: float = 0.0
    quick: float = _QUICK
    marked: float = 0.0

    @property
    def payer(self) -> Hashable:
        """Return the key of the share of time that it is read with.

        It is that of its container. A namespace of none has its own.
        """
        return self.container or self.found.namespace

    def mark(self, now: float) -> float:
        """Note a change; return the monotonic time of the look for it."""
        self.quick = min(_QUICK, self.quick + (now - self.marked) / 2)
        self.marked = now
        pause = LAST
        if self.quick >= 1:
            self.quick -= 1
            pause = _SOON
        return max(now + BURST, self.looked + pause)
