# SPDX-License-Identifier: Apache-2.0

"""Unbinds the addresses of ended namespaces."""

from __future__ import annotations

import dataclasses
import math
import time
from typing import Hashable

from kuryr_break0.discovery.binder import Binder
from kuryr_break0.discovery.namespace import BURST
from kuryr_break0 import model
from kuryr_break0.pace import Pace

#: If the pause after an attempt would be this number of seconds or more, no
#: attempt follows. A timed sync then unbinds the addresses.
_GIVE_UP = 60.0


@dataclasses.dataclass
class _Attempt:
    """The next attempt to unbind the addresses of a namespace.

    :ivar at: monotonic time of the attempt
    :ivar pause: seconds from this attempt to the following one
    :ivar cause: see :attr:`Namespace.cause`
    """

    at: float
    pause: float
    cause: Hashable


class EndedNamespaces:
    """The ended namespaces with addresses that are still bound.

    The kernel sends the event of a namespace's end before it deletes the
    namespace. Until the deletion, the end cannot be proven, and an attempt to
    unbind the addresses fails.

    :param pace: pace of the containers
    """

    def __init__(self, binder: Binder, pace: Pace) -> None:
        self._binder = binder
        self._pace = pace
        self._attempts: dict[model.NamespaceId, _Attempt] = {}

    def __len__(self) -> int:
        return len(self._attempts)

    def add(self, namespace: model.NamespaceId, cause: Hashable) -> None:
        """Schedule the first attempt, if the namespace has bound addresses."""
        if self._binder.has_bound(namespace):
            self._attempts.setdefault(namespace, _Attempt(
                time.monotonic() + BURST, BURST, cause))

    def discard(self, namespace: model.NamespaceId) -> None:
        """Cancel the attempts for a namespace that exists."""
        self._attempts.pop(namespace, None)

    def find_due(self, now: float) -> float:
        """Return the monotonic time of the next attempt, or infinity."""
        return min((max(each.at, now + self._pace.wait(each.cause))
                    for each in self._attempts.values()), default=math.inf)

    def unbind(self) -> None:
        """Make the due attempts, and double the pause after each of them."""
        now = time.monotonic()
        for namespace, attempt in list(self._attempts.items()):
            if attempt.at > now or self._pace.wait(attempt.cause):
                continue
            self._pace.begin()
            is_done = False
            try:
                is_done = self._binder.unbind_ended(namespace)
            finally:
                self._pace.end(attempt.cause)
                if is_done or attempt.pause >= _GIVE_UP:
                    del self._attempts[namespace]
                else:
                    attempt.at = now + attempt.pause
                    attempt.pause *= 2
