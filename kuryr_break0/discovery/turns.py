# SPDX-License-Identifier: Apache-2.0

"""The order in which namespaces are read, and the time that each may take.

Namespaces that have changed come first. The routine comes last: namespaces of
which nothing says that they have changed. The work for one container delays no
other one: a container that causes much work waits, and so does the routine.
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

#: Seconds of a processor that the work for one container may take at once.
#: To bind 32 addresses takes half of that.
_CREDIT = 0.15
#: The payer of the routine
_ROUTINE = 'routine'


class Turns:
    """The namespaces that are to be read, in their order.

    :ivar pace: of the containers; its causes are :attr:`Namespace.payer`
    """

    def __init__(self) -> None:
        self.pace = Pace(_CREDIT)
        self._count = itertools.count()
        #: monotonic time, place among equal times, namespace
        self._due: list[tuple[float, int, Namespace]] = []
        #: namespaces of payers that have to wait
        self._late: dict[Hashable, collections.deque[Namespace]] = {}
        self._routine: dict[kernel.Place, Namespace] = {}

    def mark(self, namespace: Namespace, now: float) -> None:
        """Have a namespace that has changed read soon."""
        if namespace.due is None:
            namespace.due = namespace.mark(now)
            heapq.heappush(self._due, (namespace.due, next(self._count),
                                       namespace))

    def may_begin(self, namespace: Namespace) -> bool:
        """Return whether a namespace that is new may be read at once.

        Otherwise it waits for its turn.
        """
        if not self.pace.wait(namespace.payer):
            return True
        namespace.due = 0.0
        self._late.setdefault(namespace.payer, collections.deque()).append(
            namespace)
        return False

    def add_routine(self, namespaces: Iterable[Namespace]) -> None:
        """Have namespaces read after all that have changed."""
        for namespace in namespaces:
            self._routine.setdefault(namespace.found.place, namespace)

    def remove(self, namespace: Namespace) -> None:
        """Take out a namespace."""
        namespace.due = None
        if self._routine.get(namespace.found.place) is namespace:
            del self._routine[namespace.found.place]

    def at(self, now: float) -> float:
        """Return the monotonic time of the next turn; infinity for none."""
        waits = [self.pace.wait(payer) for payer in self._late]
        if self._routine:
            waits.append(self.pace.wait(_ROUTINE))
        return min([at for at, _, _ in self._due[:1]]
                   + [now + wait for wait in waits], default=math.inf)

    def next(self, now: float) -> Optional[tuple[Namespace, Hashable]]:
        """Take out the next namespace that has changed.

        :returns: the namespace and its payer; None if none is due, or all
            that are due have to wait
        """
        while self._due and self._due[0][0] <= now:
            at, _, namespace = heapq.heappop(self._due)
            payer = namespace.payer
            if namespace.due != at:
                continue  # it was taken out meanwhile
            if self.pace.wait(payer):
                self._late.setdefault(payer, collections.deque()).append(
                    namespace)
                continue
            self.remove(namespace)
            return namespace, payer
        return None

    def next_of_rest(self) -> Optional[tuple[Namespace, Hashable]]:
        """Take out a namespace that had to wait, or one of the routine."""
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
