# SPDX-License-Identifier: Apache-2.0

"""Tests the real daemon with hostile KuryrPorts, and for leaks at a DEL."""

from __future__ import annotations

import subprocess

from tests.e2e.base import DaemonTestCase
from tests.support import kuryr
from tests.support import lab

POD = '100.75.30.71'


class TestNameOfTheVIF(DaemonTestCase):

    binding = 'kuryr'

    def test_interfaces_of_the_node_stay(self) -> None:
        self.node.start_daemon('pod_binding = ' + self.binding)
        first = self.node.add_pod('first', POD)
        self.add(first)
        run = self.node.lab.run
        run('ip', 'link', 'add', 'veth7', 'type', 'veth', 'peer', 'name',
            'peer7')
        run('ip', 'link', 'add', 'macvlan7', 'link', lab.PARENT,
            'type', 'macvlan', 'mode', 'bridge')
        for number, (name, its_mac) in enumerate((
                ('break0', False), ('break0', True), (lab.PARENT, False),
                ('veth7', False), ('lo', False), ('macvlan7', False),
                ('macvlan7', True))):
            with self.subTest(name=name, its_mac=its_mac):
                before = self.node.lab.link(name)
                assert before is not None
                vif = kuryr.macvlan_vif(
                    '100.75.30.%d' % (80 + number),
                    mac=before['address'] if its_mac else None)
                vif.vif_name = name
                pod = self.node.add_pod('pod-%d' % number, vif=vif)
                answer = self.node.request(pod, 'ADD')
                self.assertNotEqual(202, answer.status)
                self.assertIn('Correct vif_name', answer.body)
                self.assertEqual(before, self.node.lab.link(name))
        self.assertTrue(self.node.lab.ping(POD))


class TestNameOfTheVIFDirectly(TestNameOfTheVIF):

    binding = 'auto'


class TestDeletion(DaemonTestCase):

    def received(self, name: str) -> int:
        """Return the number of packets that a pod has received."""
        link, = self.node.lab.ip('-statistics', 'link', 'show', 'eth0',
                                 netns=name)
        return int(link['stats64']['rx']['packets'])

    def test_no_frame_leaks_at_a_del(self) -> None:
        # Without a guard, only the order of deletions can prevent leaks.
        self.node.start_daemon('guard = off')
        pods = [self.node.add_pod('pod-%d' % number,
                                  '100.75.30.%d' % number)
                for number in range(100, 106)]
        for pod in pods:
            self.add(pod)
        mac = (self.node.lab.link('break0') or {})['address']
        pings = [subprocess.Popen(
            ['ping', '-n', '-q', '-i', '0.01',
             '100.75.30.%d' % number], stdout=subprocess.DEVNULL)
            for number in range(100, 106)]
        try:
            for pod in pods:
                lab.until(lambda: self.received(pod.name) > 10)
            with self.node.lab.capture() as frames:
                for pod in pods:
                    self.delete(pod)
        finally:
            for ping in pings:
                ping.kill()
                ping.wait()
        self.assertEqual([], [frame for frame in frames
                              if frame.src == mac])
