# SPDX-License-Identifier: Apache-2.0

"""Pods know all addresses that their node may speak from, and no others."""

from __future__ import annotations

import ipaddress
import os
import subprocess
from typing import Any
from unittest import mock

from kuryr_break0 import kernel
from kuryr_break0 import policy
from tests.functional.traffic import base
from tests import lab

OTHER = '10.77.0.1'
OTHER6 = 'fd00:77::1'


class SourcesTestCase(base.TrafficTestCase):

    def known(self, netns: str = 'pod') -> set[str]:
        """The addresses that a pod knows break0 for."""
        mac = (self.lab.link('break0') or {})['address']
        neighbours = self.neighbours_of(netns)
        self.assertLessEqual(set(neighbours.values()), {mac})
        return set(neighbours)

    def start_agent(self) -> None:
        agent = subprocess.Popen(
            [base.PROGRAM, 'agent'],
            env={**os.environ, 'OS_BREAK0__METRICS_BIND': ''})
        self.addCleanup(agent.wait)
        self.addCleanup(agent.terminate)
        # It has repaired something, so it is there.
        self.lab.run('ip', 'route', 'flush', 'dev', 'break0')
        lab.until(lambda: base.POD in self.lab.routes())

    def add_interface(self, name: str, *addresses: str) -> None:
        self.lab.run('ip', 'link', 'add', name, 'type', 'bridge')
        self.lab.run('ip', 'link', 'set', name, 'up')
        for address in addresses:
            self.lab.run('ip', 'address', 'add', address, 'dev', name,
                         *(('nodad',) if ':' in address else ()))


class TestOneNIC(SourcesTestCase):

    def test_nothing_else_is_known(self) -> None:
        self.assertEqual({lab.NODE, lab.NODE6}, self.known())
        self.assertEqual([], self.problems())
        self.assertEqual({'default', '100.75.30.0/24', 'fd00:30::/64'}, {
            route['dst'] for family in ('-4', '-6')
            for route in self.lab.ip(family, 'route', 'show', netns='pod')
            if not route['dst'].startswith('fe80')})

    def test_changes_are_followed(self) -> None:
        self.start_agent()
        self.add_interface('net1', OTHER + '/24', OTHER6 + '/64')
        expected = {lab.NODE, lab.NODE6, OTHER, OTHER6}
        for netns in ('pod', 'other'):
            lab.until(lambda: self.known(netns) == expected)
            for address in (OTHER, OTHER6):
                self.assertTrue(self.lab.ping(address, netns))
        self.lab.run('ip', 'link', 'del', 'net1')
        for netns in ('pod', 'other'):
            lab.until(lambda: self.known(netns) == {lab.NODE, lab.NODE6})
        self.assertFalse(self.lab.ping(OTHER, 'pod'))

    def test_the_source_of_a_new_route_is_followed(self) -> None:
        # Not the first address of its interface, which is known anyway.
        self.add_interface('net1', '10.77.0.9/24', OTHER + '/32')
        self.manager().sync()
        self.assertNotIn(OTHER, self.known())
        self.start_agent()
        self.lab.run('ip', 'route', 'add', '198.51.100.0/24', 'dev', 'net1',
                     'src', OTHER)
        lab.until(lambda: OTHER in self.known())
        self.assertTrue(self.lab.ping(OTHER, 'pod'))

    def test_a_new_pod_knows_the_source_of_a_route(self) -> None:
        self.add_interface('net1', '10.77.0.9/24', OTHER + '/32')
        self.lab.run('ip', 'route', 'add', '198.51.100.0/24', 'dev', 'net1',
                     'src', OTHER)
        self.manager().sync()  # or what was read before is used for a while
        self.add_pod('new', 'fa:16:3e:00:00:73', '100.75.30.73')
        self.assertEqual({lab.NODE, '10.77.0.9', OTHER}, self.known('new'))
        self.assertEqual([], [each for each in self.problems()
                              if '100.75.30.73' in each])

    def test_by_default_they_are_not_known(self) -> None:
        """Or Docker connects no container to a network on that NIC."""
        self.add_interface('net1', OTHER + '/24', OTHER6 + '/64')
        self.manager(all_addresses=False).sync()
        self.assertEqual({lab.NODE, lab.NODE6}, self.known())

    def test_there_is_a_limit(self) -> None:
        for number in range(policy.MAX_ELSEWHERE + 5):
            self.add_interface('net%d' % number, '10.77.%d.1/24' % number)
        self.manager().sync()
        known = self.known()
        # The node's own ones by the NIC of the pods are not among these.
        self.assertEqual({lab.NODE, lab.NODE6, *(
            '10.77.%d.1' % number
            for number in range(policy.MAX_ELSEWHERE - 2))}, known)
        self.manager().sync()
        self.assertEqual(known, self.known())

    def test_addresses_of_services_are_not_known(self) -> None:
        if self.lab.run('ip', 'link', 'add', 'kube-ipvs0', 'type', 'dummy',
                        check=False).returncode:
            self.skipTest('this kernel has no dummy interfaces')
        for number in range(3):
            self.lab.run('ip', 'address', 'add', '10.96.0.%d/32' % number,
                         'dev', 'kube-ipvs0')
        self.manager().sync()
        self.assertEqual({lab.NODE, lab.NODE6}, self.known())


class TestOrder(SourcesTestCase):
    """Which they are does not depend on the order of what is read."""

    def test_first_of_each_interface(self) -> None:
        found = [(index, ipaddress.ip_address(address))
                 for index, address in (
                     (3, '10.3.0.1'), (3, '10.3.0.2'), (3, 'fd00:3::1'),
                     (3, 'fd00:3::2'), (1, '127.0.0.1'), (1, '10.1.0.1'),
                     (2, 'fe80::1'), (2, '10.2.0.1'))]
        with mock.patch.object(kernel, 'Netlink') as netlink:
            netlink().__enter__().link.return_value = None
            self.assertEqual(
                ['10.9.0.1', '10.1.0.1', '10.2.0.1', '10.3.0.1',
                 'fd00:3::1', 'fd00:3::2'],
                [str(each) for each in policy.elsewhere(
                    found, {ipaddress.ip_address('10.9.0.1')})])

    def test_interfaces_with_the_same_address_are_not_read(self) -> None:
        found = [(index, ipaddress.ip_address('10.1.0.1'))
                 for index in range(1, 1000)]
        with mock.patch.object(kernel, 'Netlink') as netlink:
            netlink().__enter__().link.return_value = None
            netlink.reset_mock()
            self.assertEqual([found[0][1]], policy.elsewhere(found, ()))
            self.assertEqual(1, netlink.call_count)

    def test_not_of_dummies(self) -> None:
        def link(name: str) -> Any:
            return mock.Mock(kind='dummy' if name == 'if2' else None)

        found = [(index, ipaddress.ip_address('10.%d.0.1' % index))
                 for index in (2, 3)]
        with mock.patch.object(kernel, 'Netlink') as netlink, \
                mock.patch.object(kernel, 'name_of', 'if{}'.format):
            netlink().__enter__().link.side_effect = link
            self.assertEqual([found[1][1]], policy.elsewhere(found, ()))
