# SPDX-License-Identifier: Apache-2.0

"""The manager creates, adopts and repairs break0."""

from __future__ import annotations

import os
from unittest import mock

from kuryr_break0.break0 import device
from kuryr_break0 import exceptions
from kuryr_break0 import kernel
from kuryr_break0.ledger import cache
from tests.functional import base
from tests.functional.base import OTHER_POD
from tests.functional.base import OWNER
from tests.functional.base import POD
from tests.support import lab


class TestDevice(base.LabTestCase):

    def assert_untouched(self, *raised: str) -> None:
        """Expect bind to fail with these texts, and break0 to be unchanged."""
        before = self.lab.link('break0')
        with self.assertRaises(exceptions.DeviceConflict) as caught:
            self.bind()
        for text in ('break0', *raised):
            self.assertIn(text, str(caught.exception))
        self.assertEqual(before, self.lab.link('break0'))

    def test_the_attributes_of_break0(self) -> None:
        self.lab.run('ip', 'link', 'set', lab.PARENT, 'mtu', '1400')
        self.bind()
        link = self.lab.link('break0')
        assert link is not None
        self.assertEqual('macvlan', link['linkinfo']['info_kind'])
        self.assertEqual('bridge', link['linkinfo']['info_data']['mode'])
        self.assertEqual(lab.PARENT, link['link'])
        self.assertEqual(1400, link['mtu'])
        self.assertIn('UP', link['flags'])
        self.assertEqual('none', link['inet6_addr_gen_mode'])
        for path, value in device.QUIET.items():
            self.assertEqual(value, kernel.read_sysctl(path % 'break0'))
        self.assertEqual([], [
            each for link in self.lab.ip('address', 'show', 'break0')
            for each in link['addr_info']])

    def test_an_mtu_that_brings_ipv6_back(self) -> None:
        netns = self.lab.add_pod('pod', POD, mac='02:00:00:00:00:71')
        self.bind(netns=netns, mac_of_pod='02:00:00:00:00:71', guard='off')
        for mtu in '1000', '1500':
            self.lab.run('ip', 'link', 'set', lab.PARENT, 'mtu', mtu)
        self.assertEqual(1000, (self.lab.link('break0') or {})['mtu'])
        with self.lab.capture() as frames:
            self.manager(guard='off').sync()
            mac = (self.lab.link('break0') or {})['address']
        self.assertEqual([], [frame for frame in frames if frame.src == mac])
        self.assertEqual([], self.problems(guard='off'))
        self.assertTrue(self.lab.ping(POD))
        self.assertTrue(self.lab.ping(lab.NODE, 'pod'))

    def test_its_name_is_an_option(self) -> None:
        self.bind(device='shim')
        self.assertIsNotNone(self.lab.link('shim'))
        self.assertIsNone(self.lab.link('break0'))

    def test_created_again_it_has_the_same_mac(self) -> None:
        self.bind()
        first = self.lab.link('break0')
        self.lab.run('ip', 'link', 'del', 'break0')
        self.bind()
        second = self.lab.link('break0')
        assert first and second
        self.assertNotEqual(first['ifindex'], second['ifindex'])
        self.assertEqual(first['address'], second['address'])
        self.assertEqual(0x02, int(first['address'][:2], 16) & 0x03)

    def test_one_that_is_down_is_brought_up(self) -> None:
        self.bind()
        self.lab.run('ip', 'link', 'set', 'break0', 'down')
        self.assertEqual({}, self.lab.routes())
        self.bind()
        self.assertIn(POD, self.lab.routes())

    def test_one_made_by_hand_is_used(self) -> None:
        self.lab.run('ip', 'link', 'add', 'break0', 'link', lab.PARENT,
                     'type', 'macvlan', 'mode', 'bridge')
        self.lab.run('ip', 'address', 'add', '100.75.30.7/32',
                     'dev', 'break0')
        before = self.lab.link('break0')
        self.lab.add_pod('pod', POD)
        self.bind()
        after = self.lab.link('break0')
        assert before and after
        self.assertEqual((before['ifindex'], before['address']),
                         (after['ifindex'], after['address']))
        self.assertEqual(
            1, kernel.read_sysctl('ipv4/conf/break0/arp_filter'))
        self.assertTrue(self.lab.ping(POD))
        self.assertTrue(self.lab.ping(lab.NODE, 'pod'))

    def test_a_changed_one_is_mended(self) -> None:
        self.bind()
        kernel.write_sysctl('ipv4/conf/break0/arp_filter', 0)
        self.lab.run('ip', 'link', 'set', 'break0', 'mtu', '1300')
        with mock.patch.object(cache, 'MAX_AGE', 0):
            self.bind()
        self.assertEqual(
            1, kernel.read_sysctl('ipv4/conf/break0/arp_filter'))
        self.assertEqual(1500, (self.lab.link('break0') or {})['mtu'])

    def test_an_mtu_that_forbids_ipv6_for_a_while(self) -> None:
        # Below an MTU of 1280 the kernel removes IPv6 and its sysctls.
        self.bind()
        for mtu in ('1200', '1500'):
            self.lab.run('ip', 'link', 'set', lab.PARENT, 'mtu', mtu)
            self.lab.run('ip', 'link', 'set', 'break0', 'mtu', mtu)
            self.manager().sync()
        self.assertEqual([], self.lab.ip('address', 'show', 'dev', 'break0')
                         [0]['addr_info'])
        self.assertFalse(self.manager().sync())

    def test_changed_options_are_applied_at_once(self) -> None:
        self.bind()
        self.bind(addr=['100.75.30.9'])
        self.assertEqual(['100.75.30.9'], [
            each['local'] for link in self.lab.ip('address', 'show', 'break0')
            for each in link['addr_info']])

    def test_the_address_of_a_router(self) -> None:
        self.lab.add_ipv6()
        for addr in (lab.LAN, lab.LAN6):
            with self.subTest(addr), self.assertRaisesRegex(
                    exceptions.InvalidOption, addr + ' is a next hop'):
                self.bind(addr=[addr])
            self.assertIsNone(self.lab.link('break0'))
            self.assertTrue(self.lab.ping(addr))

    def test_its_address_is_no_pods(self) -> None:
        with self.assertRaisesRegex(exceptions.AddressRefused, 'itself'):
            self.bind(addr=[POD])

    def test_another_interface_in_its_place(self) -> None:
        self.bind()
        self.lab.run('ip', 'link', 'del', 'break0')
        self.lab.run('ip', 'link', 'add', 'break0', 'type', 'veth',
                     'peer', 'name', 'peer0')
        self.assert_untouched('a veth')

    def test_not_a_macvlan(self) -> None:
        self.lab.run('ip', 'link', 'add', 'break0', 'type', 'veth',
                     'peer', 'name', 'peer0')
        self.assert_untouched('a veth', 'macvlan in bridge mode')

    def test_another_mode(self) -> None:
        self.lab.run('ip', 'link', 'add', 'break0', 'link', lab.PARENT,
                     'type', 'macvlan', 'mode', 'private')
        self.assert_untouched('private mode', 'bridge mode')

    def test_another_parent(self) -> None:
        self.lab.run('ip', 'link', 'add', 'eth1', 'type', 'veth',
                     'peer', 'name', 'peer1')
        self.lab.run('ip', 'link', 'add', 'break0', 'link', 'eth1',
                     'type', 'macvlan', 'mode', 'bridge')
        self.assert_untouched('interface', 'on eth0 is needed')

    def test_a_parent_of_another_namespace(self) -> None:
        # Each namespace numbers its interfaces independently.
        self.lab.run('ip', 'link', 'add', 'break0', 'link', 'nic',
                     'netns', str(os.getpid()), 'type', 'macvlan',
                     'mode', 'bridge', netns='lan')
        self.assert_untouched('another namespace')

    def test_a_macvlan_as_parent(self) -> None:
        # If the parent is a macvlan itself, the kernel takes that macvlan's
        # parent.
        self.lab.run('ip', 'link', 'add', 'stacked', 'link', lab.PARENT,
                     'type', 'macvlan', 'mode', 'bridge')
        self.lab.run('ip', 'link', 'set', 'stacked', 'up')
        self.bind(parent='stacked')
        self.bind(OTHER_POD, parent='stacked')
        self.assertEqual({POD, OTHER_POD}, set(self.lab.routes()))

    def test_no_parent(self) -> None:
        with self.assertRaisesRegex(exceptions.ParentNotFound, 'eth7'):
            self.bind(parent='eth7')
        with self.assertRaisesRegex(exceptions.ParentNotFound, 'eth7'):
            self.manager(parent='eth7').bind(
                OWNER, base.addresses(POD), parent=lab.PARENT)
        self.assertIsNone(self.lab.link('break0'))

    def test_a_parent_that_is_not_the_pods(self) -> None:
        self.lab.run('ip', 'link', 'add', 'eth1', 'type', 'veth',
                     'peer', 'name', 'peer1')
        with self.assertRaisesRegex(exceptions.ParentMismatch,
                                    'eth1.*eth0'):
            self.manager(parent='eth1').bind(
                OWNER, base.addresses(POD), parent=lab.PARENT)
        self.assertIsNone(self.lab.link('break0'))

    def test_thirty_at_once_make_one(self) -> None:
        children = [
            base.in_child(lambda number=number: self.bind(
                '100.75.30.%d' % number,
                owner=base.Owner('sandbox-%d' % number, 'eth0')))
            for number in range(100, 130)]
        self.assertEqual([0] * 30, list(map(base.wait_for, children)))
        made = [link for link in self.lab.ip('link', 'show')
                if link.get('linkinfo', {}).get('info_kind') == 'macvlan']
        self.assertEqual(['break0'], [link['ifname'] for link in made])
        self.assertEqual({'100.75.30.%d' % number
                          for number in range(100, 130)},
                         set(self.lab.routes()))
        self.assertEqual(set(self.lab.routes()), self.bound())

    def test_killed_while_making_it(self) -> None:
        with mock.patch.object(kernel, 'write_sysctl',
                               lambda *args: base.die()):
            pid = base.in_child(self.bind)
        self.assertEqual(-9, base.wait_for(pid))
        half_made = self.lab.link('break0')
        assert half_made is not None  # the test needs an unfinished break0
        self.assertNotIn('UP', half_made['flags'])
        self.bind(OTHER_POD)
        self.assertIn(OTHER_POD, self.lab.routes())
        self.assertEqual(
            1, kernel.read_sysctl('ipv4/conf/break0/arp_filter'))

    def test_failed_while_making_it(self) -> None:
        refused = exceptions.KernelRefused('set it', 'not today', 1)
        with mock.patch.object(kernel, 'write_sysctl', side_effect=refused):
            with self.assertRaises(exceptions.KernelRefused):
                self.bind()
        self.assertIsNone(self.lab.link('break0'))
        # The claim is recorded, so that a sync can repair break0.
        self.assertEqual({POD}, self.bound())
