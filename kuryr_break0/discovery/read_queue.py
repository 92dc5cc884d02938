# SPDX-License-Identifier: Apache-2.0

"""Order the namespaces to read, and limit the time for each container.

The queue returns changed namespaces first. The routine comes last: it is a
timed read of all namespaces, even of namespaces without a known change. If the
work for one container exceeds the container's share of the processor, the
container's namespaces wait, so that they do not delay other containers. The
routine has a share of its own.
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

#: Processor seconds that the work for one container may take before its
#: namespaces have to wait. Binding 32 addresses takes half of this time.
_CREDIT = 0.15
#: The cause of all reads of the routine, for :class:`Pace`
_ROUTINE = 'routine'


class ReadQueue:
    """Queue of the namespaces to read.

    :ivar pace: pace of the containers, by :attr:`Namespace.cause`
    """

    def __init__(self) -> None:
        self.pace = Pace(_CREDIT)
        self._count = itertools.count()
        #: heap of tuples: monotonic time, serial number and namespace
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

    def add_if_late(self, namespace: Namespace) -> bool:
        """Add a new namespace if its container has to wait.

        :returns: False if the caller may read the namespace at once
        """
        if not self.pace.wait(namespace.cause):
            return False
        namespace.due = 0.0
        self._late.setdefault(namespace.cause, collections.deque()).append(
            namespace)
        return True

    def add_routine(self, namespaces: Iterable[Namespace]) -> None:
        """Add namespaces to the routine."""
        for namespace in namespaces:
            self._routine.setdefault(namespace.location.place, namespace)

    def remove(self, namespace: Namespace) -> None:
        namespace.due = None
        if self._routine.get(namespace.location.place) is namespace:
            del self._routine[namespace.location.place]

    def find_due(self, now: float) -> float:
        """Return the monotonic time of the next read.

        :returns: infinity if the queue is empty
        """
        waits = [self.pace.wait(cause) for cause in self._late]
        if self._routine:
            waits.append(self.pace.wait(_ROUTINE))
        return min([at for at, _, _ in self._due[:1]]
                   + [now + wait for wait in waits], default=math.inf)

    def pop_changed(self, now: float) -> Optional[tuple[Namespace, Hashable]]:
        """Remove and return the next changed namespace.

        :returns: the namespace and the cause to charge; None if no namespace
            is due, or if all due namespaces have to wait
        """
        while self._due and self._due[0][0] <= now:
            at, _, namespace = heapq.heappop(self._due)
            cause = namespace.cause
            if namespace.due != at:
                continue  # an outdated item of the heap
            if self.pace.wait(cause):
                self._late.setdefault(cause, collections.deque()).append(
                    namespace)
                continue
            self.remove(namespace)
            return namespace, cause
        return None

    def pop_late(self) -> Optional[tuple[Namespace, Hashable]]:
        """Remove and return a namespace that had to wait.

        A changed namespace precedes the namespaces of the routine.

        :returns: the namespace and the cause to charge; None if all namespaces
            still have to wait
        """
        for cause, waiting in list(self._late.items()):
            while waiting and not self.pace.wait(cause):
                namespace = waiting.popleft()
                if namespace.due is not None:
                    self.remove(namespace)
                    return namespace, cause
            if not waiting:
                del self._late[cause]
        if self._routine and not self.pace.wait(_ROUTINE):
            namespace = next(iter(self._routine.values()))
            self.remove(namespace)
            return namespace, _ROUTINE
        return None
