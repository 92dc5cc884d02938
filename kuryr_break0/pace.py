# SPDX-License-Identifier: Apache-2.0

"""Keeps work that others can cause at any rate to a part of a processor."""

from __future__ import annotations

import time

#: The part of a processor that it may take.
SHARE = 0.1
#: Seconds of a processor that it may take before that counts, so that what
#: happens rarely, as at boot, is done at once.
CREDIT = 0.25


class Pace:
    """How long to wait after pieces of work of one thread.

    :param credit: seconds of a processor
    """

    def __init__(self, credit: float = CREDIT) -> None:
        self._credit = credit
        self._debt = 0.0
        self._spent = 0.0
        self._ended = time.monotonic()

    def begin(self) -> None:
        """Begin a piece of work."""
        # Of the processor, since on a busy node others have most of the time.
        self._spent = time.thread_time()

    def end(self) -> float:
        """End it; return the seconds to wait until the next."""
        now = time.monotonic()
        self._debt = time.thread_time() - self._spent + max(
            0.0, self._debt - SHARE * (now - self._ended))
        self._ended = now
        return max(0.0, (self._debt - self._credit) / SHARE)
