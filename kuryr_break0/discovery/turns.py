# SPDX-License-Identifier: Apache-2.0

"""Order the namespaces to read, and limit the time for each container.

Changed namespaces come first. After them comes the routine: the timer has all
namespaces read again, also without a known change. If the work for one
container exceeds its share of the processor, its namespaces wait, so that it
does not delay other containers. The routine has its own share.
"""

from __future__ import annotations

import collections
import heapq
import itertools
import math
from typing import Hashable, Iterable, Optional

from kuryr_break0.discovery.namespace import Namespace
from kuryr_break0 import kernel
from kuryr_break0.pace import Pace

#: Seconds of a processor that the work for one container may take before it
#: has to wait. Binding 32 addresses takes half of them.
_CREDIT = 0.15
#: The cause of the routine, for Pace
_ROUTINE = 'routine'


class Turns:
    """Queue of the namespaces to read.

    :ivar pace: pace of the containers, by :attr:`Namespace.cause`
    """

    def __init__(self) -> None:
        self.pace = Pace(_CREDIT)
        self._count = itertools.count()
        #: heap of monotonic time, serial number and namespace
        self._due: list[tuple[float, int, Namespace]] = []
        #: namespaces of causes that have to wait
        self._late: dict[Hashable, collections.deque[Namespace]] = {}
        self._routine: dict[kernel.Place, Namespace] = {}

    def mark(self, namespace: Namespace, now: float) -> None:
        """Add a changed namespace."""
        if namespace.due is None:
            namespace.due = namespace.mark(now)
            heapq.heappush(self._due, (namespace.due, next(self._count),
                                       namespace))

    def may_begin(self, namespace: Namespace) -> bool:
        """Add a new namespace if its container has to wait.

        :returns: False if the caller may read the namespace at once
        """
        if not self.pace.wait(namespace.payer):
            return True
        namespace.due = 0.0
        self._late.setdefault(namespace.payer, collections.deque()).append(
            namespace)
        return False

    def add_routine(self, namespaces: Iterable[Namespace]) -> None:
        """Add namespaces without a known change."""
        for namespace in namespaces:
            self._routine.setdefault(namespace.found.place, namespace)

    def remove(self, namespace: Namespace) -> None:
        """Take out a namespace."""
        namespace.due = None
        if self._routine.get(namespace.found.place) is namespace:
            del self._routine[namespace.found.place]

    def at(self, now: float) -> float:
        """Return the monotonic time of the next read.

        :returns: infinity if the queue is empty
        """
        waits = [self.pace.wait(payer) for payer in self._late]
        if self._routine:
            waits.append(self.pace.wait(_ROUTINE))
        return min([at for at, _, _ in self._due[:1]]
                   + [now + wait for wait in waits], default=math.inf)

    def next(self, now: float) -> Optional[tuple[Namespace, Hashable]]:
        """Remove and return the next changed namespace.

        :returns: the namespace and the cause to charge; None if no namespace
            is due, or if all that are due have to wait
        """
        while self._due and self._due[0][0] <= now:
            at, _, namespace = heapq.heappop(self._due)
            payer = namespace.payer
            if namespace.due != at:
                continue  # removed since it was added
            if self.pace.wait(payer):
                self._late.setdefault(payer, collections.deque()).append(
                    namespace)
                continue
            self.remove(namespace)
            return namespace, payer
        return None

    def next_of_rest(self) -> Optional[tuple[Namespace, Hashable]]:
        """Remove and return a namespace that had to wait.

        :returns: a namespace of the routine if no changed namespace waits, and
            the cause to charge; None if all still have to wait
        """
        for payer, waiting in list(self._late.items()):
            while waiting and not self.pace.wait(payer):
                namespace = waiting.popleft()
                if namespace.due is not None:
                    self.remove(namespace)
                    return namespace, payer
            if not waiting:
                del self._late[payer]
        if self._routine and not self.pace.wait(_ROUTINE):
            namespace = next(iter(self._routine.values()))
            self.remove(namespace)
            return namespace, _ROUTINE
        return None
