# SPDX-License-Identifier: Apache-2.0

"""A node with two NICs: each has a break0, and each is a matter of its own."""

from __future__ import annotations

import ipaddress
from typing import Any
from unittest import mock

from kuryr_break0 import device
from kuryr_break0 import exceptions
from kuryr_break0.model import Owner
from tests.functional import base
from tests.functional.base import OWNER
from tests.functional.base import POD
from tests.functional import test_cli
from tests import lab

POD6 = 'fd00:30::71'
NODE1, NODE1_6 = '100.75.60.51', 'fd00:60::51'
POD1, POD1_6 = '100.75.60.71', 'fd00:60::71'
MAC, MAC1 = 'fa:16:3e:00:00:01', 'fa:16:3e:00:00:02'
SUBNETS = ('100.75.30.0/24', 'fd00:30::/64')
SUBNETS1 = ('100.75.60.0/24', 'fd00:60::/64')
OWNER1 = Owner('sandbox-1', 'eth1')


class ParentsTestCase(base.LabTestCase):
    """A pod with an interface on each of two NICs, both families."""

    NIC = 'eth1'

    def setUp(self) -> None:
        super().setUp()
        self.lab.add_ipv6()
        run = self.lab.run
        run('ip', 'link', 'add', self.NIC, 'type', 'veth', 'peer', 'name',
            'nic1', 'netns', 'lan')
        run('ip', 'link', 'set', self.NIC, 'up')
        run('ip', 'link', 'set', 'nic1', 'up', netns='lan')
        self.netns = self.lab.add_pod('pod', POD, POD6, mac=MAC)
        run('ip', 'link', 'add', 'eth1', 'link', self.NIC, 'netns', 'pod',
            'address', MAC1, 'type', 'macvlan', 'mode', 'bridge')
        run('ip', 'link', 'set', 'eth1', 'up', netns='pod')
        for netns, name, texts in ((None, self.NIC, (NODE1, NODE1_6)),
                                   ('pod', 'eth1', (POD1, POD1_6))):
            for text in texts:
                run('ip', 'address', 'add', text + ('/64' if ':' in text
                                                    else '/24'), 'dev', name,
                    *(('nodad',) if ':' in text else ()), netns=netns)
        self.bind_both()

    def bind_both(self) -> None:
        self.bind(POD, POD6, netns=self.netns, mac_of_pod=MAC,
                  subnets=SUBNETS)
        self.bind(POD1, POD1_6, owner=OWNER1, parent=self.NIC,
                  netns=self.netns, mac_of_pod=MAC1, subnets=SUBNETS1)

    @property
    def device1(self) -> str:
        return 'break0-' + self.NIC

    def assert_reachable(self) -> None:
        for address in (POD, POD6, POD1, POD1_6):
            self.assertTrue(self.lab.ping(address), address)
        for address in (lab.NODE, lab.NODE6, NODE1, NODE1_6):
            self.assertTrue(self.lab.ping(address, 'pod'), address)
        self.assertEqual([], self.problems())


class TestTwoParents(ParentsTestCase):

    def test_each_has_its_own(self) -> None:
        self.assertEqual({POD, POD6}, set(self.lab.routes()))
        self.assertEqual({POD1, POD1_6}, set(self.lab.routes(self.device1)))
        links = [self.lab.link(name) for name in ('break0', self.device1)]
        self.assertEqual([lab.PARENT, self.NIC],
                         [(link or {})['link'] for link in links])
        self.assertEqual(2, len({(link or {})['address'] for link in links}))
        self.assertEqual({lab.NODE, NODE1}, {
            route['prefsrc'] for device in ('break0', self.device1)
            for route in self.lab.routes(device).values()
            if ':' not in route['dst']})
        self.assert_reachable()

    def test_after_both_were_deleted(self) -> None:
        for name in ('break0', self.device1):
            self.lab.run('ip', 'link', 'del', name)
        self.manager().sync()
        self.assert_reachable()
        self.assertFalse(self.manager().sync())

    def test_silence_and_mtu_of_each(self) -> None:
        self.lab.run('ip', 'link', 'set', self.NIC, 'mtu', '1400')
        self.lab.run('ip', 'link', 'set', self.device1, 'mtu', '1300')
        self.assertIn('%s: its MTU is 1300, must be 1400' % self.device1,
                      self.problems())
        self.manager().sync()
        self.assertEqual(1400, (self.lab.link(self.device1) or {})['mtu'])
        self.assertEqual(1500, (self.lab.link('break0') or {})['mtu'])
        self.assertEqual({}, device.sysctl_drift(self.device1))

    def test_one_that_is_gone_holds_up_no_other(self) -> None:
        self.lab.run('ip', 'link', 'del', lab.PARENT)
        self.lab.run('ip', 'route', 'flush', 'dev', self.device1)
        with self.assertRaisesRegex(exceptions.ParentNotFound, lab.PARENT):
            self.manager().sync()
        self.assertTrue(self.lab.ping(POD1))
        self.assertEqual({POD1, POD1_6}, set(self.lab.routes(self.device1)))
        problems = self.seen().problems()
        self.assertEqual({POD, POD6}, set(map(str, problems)))
        self.lab.add_nic()
        self.manager().sync()
        self.assertEqual({POD}, {each for each in self.lab.routes()
                                 if ':' not in each})

    def test_unbind_of_one(self) -> None:
        self.unbind(POD1, POD1_6, owner=OWNER1)
        self.assertEqual({}, self.lab.routes(self.device1))
        self.assertEqual({POD, POD6}, set(self.lab.routes()))
        self.unbind(POD, POD6)
        self.assertEqual({}, self.lab.routes())
        self.assertEqual([], self.problems())

    def test_a_gone_sandbox(self) -> None:
        self.lab.del_netns('pod')
        self.manager().housekeep()
        self.assertEqual(({}, {}), (self.lab.routes(),
                                    self.lab.routes(self.device1)))
        self.assertEqual(set(), self.bound())

    def test_a_lost_ledger(self) -> None:
        self.lab.run('rm', '-r', '/run/kuryr-break0')
        outcome = self.manager().sync()
        self.assertEqual(4, len(outcome.rebuilt))
        self.manager().sync()
        self.assert_reachable()
        self.assertEqual({lab.PARENT: 'break0', self.NIC: self.device1}, {
            name: parent.device
            for name, parent in self.seen().parents.items()})

    def test_next_hops_of_either(self) -> None:
        for hop in ('100.75.60.1', lab.LAN):
            self.lab.run('ip', 'route', 'add', '198.51.100.%d/32' % (
                ipaddress.ip_address(hop).packed[2]), 'via', hop)
        with mock.patch.object(base.manager, 'CACHED', 0):
            for hop in ('100.75.60.1', lab.LAN):
                with self.assertRaises(exceptions.AddressRefused):
                    self.bind(hop, owner=Owner('x', 'eth0'))
        # One through a pod is none of the node's.
        self.lab.run('ip', 'route', 'add', '203.0.113.0/24', 'via', POD1)
        self.manager().sync()
        self.assert_reachable()

    def test_without_an_agent(self) -> None:
        self.manager().housekeep()
        self.lab.run('ip', 'route', 'flush', 'dev', self.device1)
        self.manager().housekeep()
        self.assert_reachable()


class TestVlanName(TestTwoParents):
    """As of a VLAN, whose dot is no separator in the path of a sysctl."""

    NIC = 'eth0.100'


class TestNames(base.LabTestCase):

    def name(self, parent: str, primary: str = 'eth0', **options: Any) -> str:
        return device.name_for(base.options(**options), parent, primary)

    def test_always_the_same_and_short_enough(self) -> None:
        for parent, expected in (('eth0', 'break0'), ('eth1', 'break0-eth1'),
                                 ('eth0.100', 'break0-eth0.100')):
            self.assertEqual(expected, self.name(parent))
        names = {self.name(parent) for parent in (
            'enp130s0f0np0', 'enp130s0f0np1', 'eth0.1001', 'a%db', 'a b',
            'x' * 15, 'é')}
        self.assertEqual(7, len(names))
        for name in names:
            self.assertRegex(name, r'\Abreak0-[0-9a-f]{8}\Z')

    def test_by_option(self) -> None:
        self.assertEqual('shim1', self.name('eth1',
                                            devices={'eth1': 'shim1'}))
        with self.assertRaisesRegex(exceptions.InvalidOption, 'break0'):
            base.options(devices={'eth1': 'break0'})

    def test_the_first_stays_the_first(self) -> None:
        self.lab.run('ip', 'link', 'add', 'eth1', 'type', 'veth', 'peer',
                     'name', 'peer1')
        self.bind(POD, parent='eth1')
        self.bind('100.75.30.72', owner=Owner('b', 'eth0'))
        self.unbind(POD)
        self.lab.run('ip', 'link', 'del', 'break0')
        self.bind(POD, parent='eth1')
        self.assertEqual({POD}, set(self.lab.routes()))
        self.assertEqual({'100.75.30.72'},
                         set(self.lab.routes('break0-eth0')))

    def test_link_iface_changed_while_pods_run(self) -> None:
        self.bind(POD)
        self.lab.run('ip', 'link', 'add', 'eth1', 'type', 'veth', 'peer',
                     'name', 'peer1')
        self.bind('100.75.30.72', owner=Owner('b', 'eth0'), parent='eth1')
        self.assertEqual({POD}, set(self.lab.routes()))
        self.manager().sync()
        self.assertEqual([], self.problems())

    def test_the_parent_option_is_for_one(self) -> None:
        self.lab.run('ip', 'link', 'add', 'eth1', 'type', 'veth', 'peer',
                     'name', 'peer1')
        with self.assertRaises(exceptions.ParentMismatch):
            self.manager(parent='eth0').bind(OWNER, base.addresses(POD),
                                             parent='eth1')


class TestBond(base.LabTestCase):

    def test_a_parent_whose_mac_address_changes(self) -> None:
        # As that of a bond, which follows its active member.
        self.lab.add_pod('pod', POD, mac=MAC)
        self.bind(POD, netns='/run/netns/pod', mac_of_pod=MAC)
        before = (self.lab.link('break0') or {})['address']
        self.lab.run('ip', 'link', 'set', lab.PARENT, 'address',
                     '02:00:00:00:00:aa')
        self.lab.run('ip', 'link', 'del', 'break0')
        self.manager().sync()
        self.assertEqual(before, (self.lab.link('break0') or {})['address'])
        self.assertTrue(self.lab.ping(POD))


class TestCommand(test_cli.CLITestCase):

    def test_cleanup_takes_both(self) -> None:
        self.lab.run('ip', 'link', 'add', 'eth1', 'type', 'veth', 'peer',
                     'name', 'peer1')
        before = self.lab.state()
        self.bind(POD)
        self.bind('100.75.30.72', owner=Owner('b', 'eth0'), parent='eth1')
        done = self.call('status')
        self.assertIn('break0-eth1', done.stdout)
        done = self.call('cleanup')
        self.assertEqual(0, done.returncode, done.stdout)
        self.assertIn('- interface break0-eth1', done.stdout)
        self.assertEqual(before, self.lab.state())
