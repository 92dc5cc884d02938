# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from typing import Any
import unittest
from unittest import mock

from kuryr_break0.agent import loop
from kuryr_break0.engine.plan import Outcome
from kuryr_break0 import exceptions
from kuryr_break0 import pace
from tests.functional import base


class TestPace(unittest.TestCase):
    """The agent's pause after a sync, with a fake clock."""

    def setUp(self) -> None:
        super().setUp()
        self.now = self.spent = 0.0
        for name, clock in (('monotonic', lambda: self.now),
                            ('thread_time', lambda: self.spent)):
            patch = mock.patch.object(loop.time, name, clock)
            patch.start()
            self.addCleanup(patch.stop)
        self.agent = loop.Agent(base.options(), base.options)
        self.agent._metrics = mock.Mock()

    def sync(self, seconds: float,
             *errors: exceptions.Break0Error) -> float:
        """Run a sync of this duration; return the seconds until the next."""
        def work(*args: Any) -> Outcome:
            self.now += seconds
            self.spent += seconds
            return Outcome(errors=errors)

        with mock.patch.object(loop.Reconciler, 'sync', work):
            self.agent._sync(loop.Reconciler(base.options(), mock.Mock()),
                             mock.Mock())
        return self.agent._not_before - self.now

    def test_rare_syncs_delay_none(self) -> None:
        for _ in range(100):
            self.assertAlmostEqual(loop._PAUSE, self.sync(0.05))
            self.now += 1

    def test_many_keep_to_their_share(self) -> None:
        self.now, began = 1000.0, 1000.0
        for _ in range(100):
            self.sync(0.05)
            self.now = self.agent._not_before
        self.assertLess(self.spent, (
            self.now - began) * pace.SHARE + pace.CREDIT + 0.05)
        self.assertGreater(self.spent, (self.now - began) * pace.SHARE)

    def until_repair(self) -> float:
        """Return the seconds until a loss of break0 now may be repaired."""
        return max(0.0, self.agent._find_sync_time(
            self.now + 3600, self.now) - self.now)

    def test_a_loss_waits_for_no_other_event(self) -> None:
        self.assertGreater(self.sync(5), 40)
        self.assertAlmostEqual(loop._PAUSE, self.until_repair())
        for _ in range(20):
            self.now += 0.5 + self.until_repair()
            before = self.agent._not_before
            self.sync(0.1)
            # A loss does not delay other events either.
            self.assertEqual(before, self.agent._not_before)
            self.assertAlmostEqual(loop._PAUSE, self.until_repair())

    def test_losses_keep_to_their_share(self) -> None:
        """Another program can delete break0 after each repair."""
        self.now, began = 1000.0, 1000.0
        for _ in range(200):
            self.now = self.agent._find_sync_time(self.now + 3600, self.now)
            self.sync(0.05)
        passed = self.now - began
        self.assertLess(self.spent, 2 * pace.SHARE * passed + pace.CREDIT
                        + loop._LOSS_CREDIT + 0.1)

    def test_a_repair_that_fails_at_once_again(self) -> None:
        self.sync(5)
        with self.assertLogs('kuryr_break0', 'ERROR'):
            for _ in range(100):
                self.now += self.until_repair()
                self.sync(0.01, exceptions.ParentNotFound(parent='eth1'))
        self.assertEqual(base.options().resync_interval, self.until_repair())

    def test_one_that_fails_with_the_timer_delays_none(self) -> None:
        """A parent is gone, and pods on other parents still need repairs."""
        with self.assertLogs('kuryr_break0', 'ERROR'):
            for _ in range(100):
                self.assertLess(self.sync(
                    0.01, exceptions.ParentNotFound(parent='eth1')), 1)
                self.now += 60

    def test_one_that_fails_at_once_again(self) -> None:
        pause = 0.0
        with self.assertLogs('kuryr_break0', 'ERROR'):
            for _ in range(100):
                self.now += pause
                pause = self.sync(
                    0.01, exceptions.ParentNotFound(parent='eth1'))
        self.assertEqual(base.options().resync_interval, pause)

    def test_a_long_one_is_paid_for(self) -> None:
        self.assertGreater(self.sync(5), 40)

    def test_the_first_work_delays_nothing(self) -> None:
        """The creation of break0 takes long, and delays no other pod."""
        paced = pace.Pace()
        for spent, is_free in ((0.2, True), (0.01, True), (0.2, False)):
            paced.begin()
            self.spent += spent
            self.assertEqual(is_free, paced.end() == 0)

    def work(self, paced: pace.Pace, cause: str, seconds: float) -> float:
        paced.begin()
        self.spent += seconds
        self.now += seconds
        return paced.end(cause)

    def test_one_cause_delays_no_other(self) -> None:
        paced = pace.Pace()
        self.assertGreater(self.work(paced, 'noisy', 10), 90)
        for _ in range(50):
            self.assertEqual(0, self.work(paced, 'other', 0.02))
            self.now += 1
        self.assertLess(0, paced.wait('noisy'))

    def test_late_causes_share_the_time(self) -> None:
        paced, began = pace.Pace(), self.now
        causes = [str(number) for number in range(10)]
        for _ in range(1000):
            cause = min(causes, key=paced.wait)
            self.now += paced.wait(cause)
            self.work(paced, cause, 0.01)
        self.assertLess(self.spent, 1.1 * (self.now - began) * pace.SHARE
                        + len(causes) * (pace.CREDIT + 0.01))
        self.assertGreater(self.spent, (self.now - began) * pace.SHARE)

    def test_causes_without_debt_are_forgotten(self) -> None:
        paced = pace.Pace()
        for number in range(3 * pace._MANY):
            self.work(paced, str(number), 0)
            self.now += 0.001
        self.assertLessEqual(len(paced._free), pace._MANY + 1)
