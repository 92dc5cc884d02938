# SPDX-License-Identifier: Apache-2.0

"""The agent finds a replaced interface in a running container at once."""

from __future__ import annotations

import unittest
from unittest import mock

from kuryr_break0.discovery.namespace import Namespace
from tests.functional import discovery_base
from tests.functional.discovery_base import ONE
from tests.functional.discovery_base import ONE6
from tests.support import lab


class TestReplaced(discovery_base.DiscoveryTestCase):

    def replace(self, mac: str) -> None:
        """Replace eth0 as Docker does: disconnect, then connect."""
        self.inside('one', 'ip', 'link', 'del', 'eth0')
        self.lab.run('ip', 'link', 'add', 'tmp0', 'link', lab.PARENT,
                     'type', 'macvlan', 'mode', 'bridge')
        self.lab.run('ip', 'link', 'set', 'tmp0', 'netns', 'one')
        self.inside('one', 'ip', 'link', 'set', 'tmp0', 'name', 'eth0',
                    'address', mac)
        for address in (ONE + '/24', ONE6 + '/64'):
            self.inside('one', 'ip', 'address', 'add', address, 'dev', 'eth0',
                        *(('nodad',) if ':' in address else ()))
        self.inside('one', 'ip', 'link', 'set', 'eth0', 'up')

    def known(self) -> dict[str, str]:
        return {each['dst']: each['lladdr'] for each in self.lab.ip(
            'neighbour', 'show', 'dev', 'break0', 'nud', 'permanent')}

    def test_with_another_mac_address(self) -> None:
        self.start()
        self.lab.add_pod('one', ONE, ONE6)
        self.until_bound(ONE, ONE6)
        for number in range(3):
            mac = '02:00:00:00:02:%02x' % number
            self.replace(mac)
            self.until(lambda: self.known() == {ONE: mac, ONE6: mac})
            self.until_bound(ONE, ONE6)
            for address in (ONE, ONE6):
                self.assert_reachable(address, 'one')


class TestPace(unittest.TestCase):
    """Times of the reads of a namespace, with a simulated clock."""

    def reads(self, events: list[float]) -> list[float]:
        """Return the times of the reads that follow from events."""
        namespace = Namespace(mock.Mock())
        times = []
        for event in events:
            while namespace.due is not None and namespace.due <= event:
                times.append(namespace.due)
                namespace.read_at, namespace.due = namespace.due, None
            if namespace.due is None:
                namespace.due = namespace.mark(event)
        return [*times, *(each for each in [namespace.due] if each)]

    def test_engine_that_takes_its_time(self) -> None:
        # An engine changes links, addresses and routes, and so causes an event
        # every 40 ms.
        for pause in (5, 10):
            events = [100 + start * pause + number * 0.04
                      for start in range(3) for number in range(12)]
            reads = self.reads(events)
            for event in events:
                read = min(each for each in reads if each > event)
                self.assertLess(read - event, 0.1, (event, reads))

    def test_container_that_changes_all_the_time(self) -> None:
        reads = self.reads([100 + number * 0.001
                            for number in range(30000)])
        self.assertLess(len(reads), 90)  # of 30000 events
        self.assertTrue([each for each in reads if each > 129])
