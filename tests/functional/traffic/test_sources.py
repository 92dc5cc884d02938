# SPDX-License-Identifier: Apache-2.0

"""Pods know exactly the addresses that their node may send from."""

from __future__ import annotations

import os
import socket
import struct
import subprocess

from kuryr_break0.model import Owner
from kuryr_break0 import policy
from tests.functional.traffic import base
from tests.support import lab
from tests.support import program

OTHER = '10.77.0.1'
OTHER6 = 'fd00:77::1'


class SourcesTestCase(base.TrafficTestCase):

    def known(self, netns: str = 'pod') -> set[str]:
        """Return a pod's neighbours; all must have break0's MAC address."""
        mac = (self.lab.link('break0') or {})['address']
        neighbours = self.neighbours_of(netns)
        self.assertLessEqual(set(neighbours.values()), {mac})
        return set(neighbours)

    def own(self, device: str = 'break0') -> list[str]:
        """Return the addresses of a break0."""
        return [each['local'] for link in self.lab.ip('address', 'show',
                                                      device)
                for each in link['addr_info']]

    def start_agent(self) -> None:
        agent = subprocess.Popen(
            [program.BREAK0, 'agent'],
            env={**os.environ, 'OS_BREAK0__METRICS_BIND': ''})
        self.addCleanup(agent.wait)
        self.addCleanup(agent.terminate)
        # A repaired route shows that the agent is running.
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
        self.assertEqual([], self.own())

    def test_a_later_interface_needs_nothing(self) -> None:
        """A later interface of the node adds no address to pods or break0.

        Docker would refuse to connect a container to that interface's network
        while the container has a route to an address in the network.
        """
        self.add_interface('net1', OTHER + '/24', OTHER6 + '/64')
        self.manager().sync()
        self.assertEqual({lab.NODE, lab.NODE6}, self.known())
        self.assertEqual([], self.own())

    def test_a_needed_source_address_is_followed(self) -> None:
        """An address on lo is preferred as source, so break0 needs its own."""
        self.start_agent()
        self.lab.run('ip', 'address', 'add', OTHER + '/32', 'dev', 'lo')
        expected = {lab.NODE, lab.NODE6, base.BREAK0}
        for netns in ('pod', 'other'):
            lab.until(lambda: self.known(netns) == expected)
            self.assertTrue(self.lab.ping(base.BREAK0, netns))
        self.assertEqual([], self.problems())
        # break0 keeps its address, since connections may use the address.
        self.lab.run('ip', 'address', 'del', OTHER + '/32', 'dev', 'lo')
        self.manager().sync()
        self.assertEqual([base.BREAK0], self.own())
        self.assertEqual(expected, self.known())
        self.lab.run('ip', 'link', 'del', 'break0')
        lab.until(lambda: self.lab.link('break0') and self.known() == {
            lab.NODE, lab.NODE6})
        self.assertEqual([], self.own())


class TestOtherNICFirst(SourcesTestCase):

    nics = ('mgmt', 'eth0')

    def test_a_new_pod_knows_the_address_of_break0(self) -> None:
        self.assertEqual([base.BREAK0], self.own())
        for netns in ('pod', 'other'):
            self.assertEqual({lab.NODE, lab.NODE6, base.BREAK0},
                             self.known(netns))
        self.assertEqual([], self.problems())
        with self.quiet():
            self.assertFalse(self.manager().sync())

    def test_one_that_is_deleted_comes_back(self) -> None:
        self.start_agent()
        self.lab.run('ip', 'address', 'flush', 'dev', 'break0')
        lab.until(lambda: self.own() == [base.BREAK0])

    def test_an_address_of_the_operator_is_taken_instead(self) -> None:
        self.lab.run('ip', 'link', 'del', 'break0')
        self.manager(addr=['100.75.30.7']).sync()
        self.assertEqual(['100.75.30.7'], self.own())
        self.assertEqual({lab.NODE, lab.NODE6, '100.75.30.7'}, self.known())

    def test_pods_on_both_nics(self) -> None:
        """Each break0 has a different address, or none if it needs none."""
        path = self.lab.add_pod('managed', parent='mgmt')
        self.lab.add_macvlan('managed', 'eth1')
        for name, device, address, parent in (
                ('m', 'eth0', '10.9.0.71', 'mgmt'),
                ('m', 'eth1', '100.75.30.74', 'eth0')):
            self.lab.run('ip', 'address', 'add', address + '/24', 'dev',
                         device, netns='managed')
            link, = self.lab.ip('link', 'show', device, netns='managed')
            self.bind(address, owner=Owner(name, device), netns=path,
                      mac_of_pod=link['address'], parent=parent,
                      subnets=[address.rpartition('.')[0] + '.0/24'])
        self.assertEqual([], self.own('break0-mgmt'))
        self.assertEqual({lab.NODE, base.BREAK0, base.MANAGEMENT},
                         set(self.neighbours_of('managed')))
        for address in (lab.NODE, base.BREAK0, base.MANAGEMENT):
            self.assertTrue(self.lab.ping(address, 'managed'))
        for address in ('10.9.0.71', '100.75.30.74'):
            self.assertTrue(self.lab.ping(address))
        self.assertEqual([], self.problems())

    def test_the_lan_hears_datagrams_to_a_group(self) -> None:
        """A program that selects eth0 by its address sends to the LAN."""
        self.assertEqual([base.BREAK0], self.own())
        group = socket.inet_aton('224.0.0.251')
        for to, option in (('224.0.0.251', socket.IP_MULTICAST_IF),
                           ('224.0.0.251', None), ('255.255.255.255', None)):
            with self.lab.socket(socket.AF_INET, socket.SOCK_DGRAM, 'lan'
                                 ) as hears, self.lab.socket(
                    socket.AF_INET, socket.SOCK_DGRAM) as sends:
                hears.bind(('', 5353))
                hears.setsockopt(socket.IPPROTO_IP, socket.IP_ADD_MEMBERSHIP,
                                 struct.pack('4s4s', group,
                                             socket.inet_aton(lab.LAN)))
                sends.setsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST, 1)
                if option is None:
                    sends.bind((lab.NODE, 0))
                else:
                    sends.setsockopt(socket.IPPROTO_IP, option,
                                     socket.inet_aton(lab.NODE))
                sends.sendto(b'who?', (to, 5353))
                self.assertEqual(lab.NODE, hears.recvfrom(100)[1][0])


class TestSilence(SourcesTestCase):
    """break0 sends no frame to the LAN, even without the guard."""

    overrides = {'guard': 'off'}

    def test_when_it_gets_the_address(self) -> None:
        self.lab.run('ip', 'address', 'add', OTHER + '/32', 'dev', 'lo')
        self.lab.settle()
        with self.lab.capture() as frames:
            self.manager(guard='off').sync()
            self.assertEqual([base.BREAK0], self.own())
            self.assertTrue(self.lab.ping(base.POD))
            self.assertTrue(self.lab.ping(base.BREAK0, 'pod'))
            # eth0 answers ARP requests of the LAN for this address, as for
            # any address of the node.
            self.lab.run('ip', 'route', 'add', base.BREAK0, 'dev', 'nic',
                         netns='lan')
            self.lab.ping(base.BREAK0, 'lan')
        mac = (self.lab.link('break0') or {})['address']
        self.assertEqual([], [each for each in frames if each.src == mac])
        self.assertTrue(any(each.asks == base.BREAK0 for each in frames))


class TestBareParent(SourcesTestCase):

    nics = ('mgmt', 'eth0')
    is_bare = True

    def test_any_ipv6_address_is_known(self) -> None:
        for number in range(1, policy.MAX_ELSEWHERE + 5):
            self.add_interface('net%d' % number, 'fd00:77:%d::1/64' % number)
        self.manager().sync()
        known = self.known()
        self.assertEqual({base.MANAGEMENT, base.BREAK0, base.MANAGEMENT6, *(
            'fd00:77:%d::1' % number
            for number in range(1, policy.MAX_ELSEWHERE))}, known)
        self.manager().sync()
        self.assertEqual(known, self.known())

    def test_addresses_of_services_are_not_known(self) -> None:
        if self.lab.run('ip', 'link', 'add', 'kube-ipvs0', 'type', 'dummy',
                        check=False).returncode:
            self.skipTest('this kernel has no dummy interfaces')
        self.lab.run('ip', 'address', 'add', 'fd00:96::1/128', 'dev',
                     'kube-ipvs0', 'nodad')
        self.manager().sync()
        self.assertEqual({base.MANAGEMENT, base.BREAK0, base.MANAGEMENT6},
                         self.known())


class TestNumberedOnBareParent(SourcesTestCase):
    """The second limit of Rook's hosts in doc/source/install/cni.rst."""

    nics = ('mgmt', 'eth0')
    is_bare = True
    overrides = {'addr': [lab.NODE]}

    def test_other_nodes_are_reached_by_a_route_on_the_parent(self) -> None:
        for device, is_reached in (('eth0', True), ('break0', False)):
            self.lab.run('ip', 'route', 'replace', base.SUBNETS[0], 'dev',
                         device, 'src', lab.NODE)
            self.lab.settle()
            self.assertEqual((is_reached, True), (
                self.lab.ping(lab.LAN), self.lab.ping(base.POD)), device)
