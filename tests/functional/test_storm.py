# SPDX-License-Identifier: Apache-2.0

"""The agent syncs only for events that can affect break0 or its pods."""

from __future__ import annotations

import os
import signal
import socket
import struct
import threading
import time
from typing import Callable

import psutil

from kuryr_break0 import ledger
from tests.functional import agent_base
from tests.functional import base
from tests.functional.base import POD
from tests.support import metrics

SOL_PACKET, PACKET_ADD_MEMBERSHIP, PACKET_DROP_MEMBERSHIP = 263, 1, 2
PACKET_MR_PROMISC = 1


class StormTestCase(agent_base.AgentTestCase):

    def setUp(self) -> None:
        super().setUp()
        self.settle()

    def settle(self) -> None:
        """Wait until the agent is idle."""
        count = -1.0
        while count != self.syncs():
            count = self.syncs()
            time.sleep(2)
            self.wait_for(lambda: base.is_idle(psutil.Process(
                self.agent.pid)))

    def assert_idle(self, before: float) -> None:
        """Expect at most one sync for each loss of events, and no other."""
        self.wait_for(lambda: base.is_idle(psutil.Process(self.agent.pid)))
        lost = metrics.value('events_lost_total') or 0
        self.assertLessEqual(self.syncs() - before, lost)

    def syncs(self) -> float:
        found = metrics.value('sync_seconds_count')
        assert found is not None
        return found

    def share_during(self, storm: Callable[[], object]) -> float:
        """Return the share of a CPU that the agent uses during a storm."""
        process = psutil.Process(self.agent.pid)

        def used() -> float:
            times = process.cpu_times()
            return times.user + times.system

        before, began = used(), time.monotonic()
        storm()
        time.sleep(max(0, began + 3 - time.monotonic()))
        share = (used() - before) / (time.monotonic() - began)
        print('%s: %.1f %% of a CPU' % (self.id(), 100 * share), flush=True)
        return share


class TestNothingOfOurs(StormTestCase):

    def test_pods_that_are_made_on_the_node_and_moved(self) -> None:
        # Stock Kuryr creates each macvlan on the node and moves it to the pod.
        before = self.syncs()
        batch = ''.join(
            'link add tap%d link eth0 type macvlan mode bridge\n'
            'link set tap%d netns pods\n' % (number, number)
            for number in range(200))
        self.lab.add_netns('pods')
        with open('/run/batch', 'w') as file:
            file.write(batch)

        def storm() -> None:
            self.lab.run('ip', '-batch', '/run/batch')
            self.lab.del_netns('pods')

        self.assertLess(self.share_during(storm), 0.5)
        self.assert_idle(before)

    def test_foreign_routes(self) -> None:
        before = self.syncs()
        with open('/run/batch', 'w') as file:
            for number in range(10000):
                file.write('route %s 10.99.%d.%d dev eth0\n' % (
                    'add' if number < 5000 else 'del',
                    *divmod(number % 5000, 250)))
        self.share_during(lambda: self.lab.run('ip', '-batch', '/run/batch'))
        self.assert_idle(before)

    def test_a_storm_of_link_events(self) -> None:
        before = self.syncs()
        with self.lab.socket(socket.AF_PACKET, socket.SOCK_RAW,
                             'pod') as pod:
            request = struct.pack('iHH8s', self.index_in_pod(),
                                  PACKET_MR_PROMISC, 0, b'')

            def storm() -> None:
                ends = time.monotonic() + 5
                while time.monotonic() < ends:
                    for option in (PACKET_ADD_MEMBERSHIP,
                                   PACKET_DROP_MEMBERSHIP):
                        pod.setsockopt(SOL_PACKET, option, request)

            self.assertLess(self.share_during(storm), 0.2)
        self.assertLess(self.syncs() - before, 60)

    def index_in_pod(self) -> int:
        return int(self.lab.ip('link', 'show', 'eth0',
                               netns='pod')[0]['ifindex'])

    def test_repairs_during_a_storm(self) -> None:
        stop = threading.Event()

        def storm() -> None:
            while not stop.is_set():
                self.lab.run('ip', 'link', 'set', 'lo', 'promisc', 'on')
                self.lab.run('ip', 'link', 'set', 'lo', 'promisc', 'off')

        thread = threading.Thread(target=storm)
        thread.start()
        try:
            for _ in range(3):
                self.lab.run('ip', 'route', 'del', POD)
                self.wait_for(lambda: POD in self.lab.routes())
        finally:
            stop.set()
            thread.join()


class TestItsOwn(StormTestCase):

    def test_a_sync_is_never_its_own_event(self) -> None:
        with open(agent_base.CONF, 'w') as file:
            file.write('[break0]\nresync_interval = 3600\n'
                       'addr = 100.75.30.7,fd00:30::7\n')
        self.agent.send_signal(signal.SIGHUP)
        self.wait_for(lambda: '100.75.30.7' in self.lab.run(
            'ip', 'address', 'show', 'break0').stdout)
        self.settle()
        before = self.syncs()
        time.sleep(4)
        self.assertEqual(before, self.syncs())

    def test_one_that_fails_again_and_again_is_repeated_less(self) -> None:
        # The parent does not exist, and the node has constant events.
        made = ledger.Ledger('/run/kuryr-break0', 10)
        address, = base.addresses('100.75.30.99')
        made.records.put([ledger.Record(
            address, ledger.Owner('x', 'eth0'), 'eth7')])
        self.wait_for(lambda: (metrics.value('sync_failures_total')
                               or 0) > 0)
        before = self.syncs()
        ends = time.monotonic() + 6
        while time.monotonic() < ends:
            self.lab.run('ip', 'route', 'replace', POD, 'dev', 'break0')
            time.sleep(0.02)
        self.assertLess(self.syncs() - before, 12)


class TestBounded(agent_base.AgentTestCase):

    def test_a_configuration_that_cannot_be_read_is_said(self) -> None:
        os.unlink(agent_base.CONF)
        os.mkdir(agent_base.CONF)
        self.agent.send_signal(signal.SIGHUP)
        self.wait_for(lambda: 'Keeping the previous' in self.log())
        self.assertNotIn('Read the configuration again', self.log())
