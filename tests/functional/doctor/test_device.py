# SPDX-License-Identifier: Apache-2.0


from __future__ import annotations

from unittest import mock

from kuryr_break0 import kernel
from kuryr_break0 import policy
from tests.functional.doctor.base import DoctorTestCase
from tests.functional.doctor.base import OTHER4
from tests.functional.doctor.base import OTHER6
from tests.functional.doctor.base import OWNER_79
from tests.functional.doctor.base import POD4
from tests.functional.doctor.base import POD6
from tests.support import lab


class TestDevice(DoctorTestCase):

    def test_missing(self) -> None:
        self.lab.run('ip', 'link', 'del', 'break0')
        finding = self.assert_found('break0-missing', 'is missing on eth0',
                                    severity='error')
        self.assertIn('kuryr-break0 sync', finding['commands'])
        self.follow(finding)
        self.assertEqual({}, self.findings())

    def test_foreign(self) -> None:
        self.lab.run('ip', 'link', 'del', 'break0')
        self.lab.run('ip', 'link', 'add', 'break0', 'type', 'veth', 'peer',
                     'name', 'other')
        self.follow(self.assert_found('break0-foreign', 'is a veth'))
        self.assertEqual({}, self.findings())

    def test_another_mode(self) -> None:
        self.lab.run('ip', 'link', 'del', 'break0')
        self.lab.run('ip', 'link', 'add', 'break0', 'link', lab.PARENT,
                     'type', 'macvlan', 'mode', 'private')
        self.assert_found('break0-foreign', 'macvlan in private mode')

    def test_wrong_parent(self) -> None:
        self.lab.run('ip', 'link', 'del', 'break0')
        self.lab.run('ip', 'link', 'add', 'eth1', 'type', 'veth', 'peer',
                     'name', 'other')
        self.lab.run('ip', 'link', 'add', 'break0', 'link', 'eth1', 'type',
                     'macvlan', 'mode', 'bridge')
        self.follow(self.assert_found('break0-wrong-parent', 'mode on eth0 '
                                      'is needed'))
        self.assertEqual({}, self.findings())

    def test_a_parent_that_was_renamed(self) -> None:
        for command in ('eth0 down', 'eth0 name ens3', 'ens3 up'):
            self.lab.run('ip', 'link', 'set', *command.split())
        self.lab.run('ip', 'address', 'add', lab.NODE6 + '/64', 'dev', 'ens3',
                     'nodad')
        found = self.findings()
        self.assertEqual({'break0-name', 'guard-missing'}, set(found))
        self.follow(found['guard-missing'])
        self.assertEqual({}, self.findings())
        found = self.findings(parent='eth0')
        self.assertEqual({'parent-missing', 'parent-mismatch'}, set(found))
        self.assertIn('are on ens3', found['parent-mismatch']['seen'])

    def test_down(self) -> None:
        self.lab.run('ip', 'link', 'set', 'break0', 'down')
        self.follow(self.assert_found('break0-down'))
        self.assertEqual({}, self.findings())

    def test_a_guard_that_does_not_admit_a_pod(self) -> None:
        for name in ('pairs4', 'addresses4'):
            self.lab.run('nft', 'flush', 'set', 'netdev',
                         'kuryr-break0-break0', name)
        self.assertFalse(self.lab.ping(POD4))
        self.follow(self.assert_found(
            'guard-missing', 'its guard entry is missing', POD4, OTHER4,
            severity='error'))
        self.assertTrue(self.lab.ping(POD4))
        self.assertEqual({}, self.findings())

    def test_no_nft(self) -> None:
        self.lab.run('nft', 'flush', 'ruleset')
        with mock.patch.object(kernel, 'find_program', return_value=None):
            for guard, severity in ('on', 'error'), ('auto', 'warning'):
                self.assert_found('guard-unavailable', 'no program nft',
                                  severity=severity, guard=guard)

    def test_mtu(self) -> None:
        self.lab.run('ip', 'link', 'set', 'break0', 'mtu', '1400')
        self.follow(self.assert_found('break0-mtu', '1400'))
        self.assertEqual({}, self.findings())

    def test_mac(self) -> None:
        mac = '02:00:00:00:00:99'
        self.lab.run('ip', 'link', 'set', 'break0', 'address', mac)
        self.assertIn(mac, self.findings()['break0-mac']['seen'])
        self.manager().sync()
        self.assertEqual({}, self.findings())

    def test_an_address_that_is_not_configured(self) -> None:
        self.lab.run('ip', 'address', 'add', '100.75.30.7/32', 'dev',
                     'break0')
        self.follow(self.assert_found('break0-addresses', 'must have no',
                                      '100.75.30.7'))
        self.assertEqual({}, self.findings())

    def test_a_configured_address_is_missing(self) -> None:
        addr = ['100.75.30.7', '100.75.30.8']
        self.manager(addr=addr).sync()
        self.assertEqual({}, self.findings(addr=addr))
        self.lab.run('ip', 'address', 'del', addr[1] + '/32', 'dev',
                     'break0')
        self.assert_found('break0-addresses', addr[0], addr[1], addr=addr)

    def test_the_address_to_masquerade_with_is_missing(self) -> None:
        self.lab.run('ip', 'address', 'add', '10.255.0.51/32', 'dev', 'lo')
        self.manager().sync()
        self.assertEqual({}, self.findings())
        own = str(policy.link_address('break0'))
        # Add the new address first: when break0 loses its last address, the
        # kernel deletes the routes.
        for verb, address in ('add', '100.75.30.7'), ('del', own):
            self.lab.run('ip', 'address', verb, address + '/32', 'dev',
                         'break0')
        self.follow(self.assert_found('break0-addresses', 'must have ' + own,
                                      '100.75.30.7', own))
        self.assertEqual({}, self.findings())

    def test_a_configured_address_that_the_node_has_no_more(self) -> None:
        addr = [lab.NODE]  # as an administrator sets it for MASQUERADE
        self.manager(addr=addr).sync()
        self.assertEqual({}, self.findings(addr=addr))
        self.lab.run('ip', 'address', 'del', lab.NODE + '/24', 'dev',
                     lab.PARENT)
        self.lab.run('ip', 'address', 'add', '100.75.30.52/24', 'dev',
                     lab.PARENT)
        self.manager(addr=addr).sync()
        # The address works until another host of the LAN has it.
        self.assertEqual({}, self.findings(addr=addr))
        self.lab.run('ip', 'address', 'add', lab.NODE + '/24', 'dev', 'nic',
                     netns='lan')
        self.assertEqual({}, self.findings(False, addr=addr))
        self.assert_found('break0-addr-stale', 'on the LAN', addr=addr,
                          severity='warning')
        self.lab.run('ip', 'address', 'del', lab.NODE + '/24', 'dev', 'nic',
                     netns='lan')
        # The node has moved to another network.
        self.lab.run('ip', 'address', 'replace', '100.99.0.51/24', 'dev',
                     lab.PARENT)
        self.lab.run('ip', 'address', 'flush', 'dev', lab.PARENT, 'to',
                     '100.75.30.0/24')
        self.manager(addr=addr).sync()
        found = self.findings(False, addr=addr)
        self.assertIn('in no network of eth0',
                      found['break0-addr-stale']['seen'])
        # Without addr in the configuration, the commands remove the address.
        self.follow(found['break0-addr-stale'])
        self.assertNotIn('break0-addr-stale', self.findings(False))

    def test_parent_missing(self) -> None:
        self.lab.run('ip', 'link', 'del', lab.PARENT)
        self.assert_found('parent-missing', 'interface eth0 does not exist')

    def test_parent_down(self) -> None:
        self.lab.run('ip', 'link', 'set', lab.PARENT, 'down')
        finding = self.assert_found('parent-down')
        self.assertEqual(['ip link set eth0 up'], finding['commands'])

    def test_parent_without_carrier(self) -> None:
        self.lab.run('ip', 'link', 'set', 'nic', 'down', netns='lan')
        finding = self.assert_found('parent-down', 'eth0, the parent of '
                                    'break0, has no carrier')
        self.assertEqual(['ip -details link show eth0'], finding['commands'])
        self.assertEqual(['eth0, the parent of break0, has no carrier'],
                         self.problems())

    def test_two_parents(self) -> None:
        self.lab.run('ip', 'link', 'add', 'eth1', 'up', 'type', 'veth',
                     'peer', 'name', 'other')
        self.lab.run('ip', 'link', 'set', 'other', 'up')
        self.bind('100.75.30.79', parent='eth1', owner=OWNER_79)
        self.assertEqual({}, self.findings())
        self.lab.run('ip', 'link', 'set', 'break0-eth1', 'down')
        self.follow(self.assert_found('break0-down', 'break0-eth1'))
        self.assertEqual({}, self.findings())

    def test_parent_is_configured_to_another(self) -> None:
        found = self.findings(parent='lo')
        self.assertEqual({'parent-mismatch', 'break0-wrong-parent'},
                         set(found))
        self.assertIn('[break0] parent', found['parent-mismatch']['seen'])
        self.assertEqual([POD4, OTHER4, POD6, OTHER6],
                         found['parent-mismatch']['subjects'])

    def test_it_answers_the_lan(self) -> None:
        self.sysctl('ipv4.conf.break0.arp_filter', 0)
        finding = self.assert_found('break0-answers-lan', 'arp_filter',
                                    severity='error')
        self.follow(finding)
        self.assertEqual({}, self.findings())
        self.assertFalse(self.is_answered_for())

    def test_it_answers_the_lan_by_proxy(self) -> None:
        self.sysctl('ipv4.conf.break0.proxy_arp', 1)
        self.follow(self.assert_found('break0-answers-lan', 'proxy_arp'))
        self.assertEqual({}, self.findings())

    def test_all_may_filter(self) -> None:
        self.sysctl('ipv4.conf.break0.arp_filter', 0)
        self.sysctl('ipv4.conf.all.arp_filter', 1)
        self.assertFalse(self.is_answered_for())
        # The value for "all" suffices, but a sync also sets break0's sysctl.
        self.follow(self.assert_found('break0-answers-lan', 'arp_filter'))
        self.assertEqual({}, self.findings())

    def test_a_second_macvlan(self) -> None:
        """The doctor finds a macvlan of the recipe that break0 replaces."""
        self.lab.run('ip', 'link', 'add', 'shim0', 'link', lab.PARENT,
                     'type', 'macvlan', 'mode', 'bridge')
        self.assertEqual({}, self.findings())
        self.lab.run('ip', 'link', 'set', 'shim0', 'up')
        self.follow(self.assert_found('second-macvlan', 'shim0',
                                      severity='warning'))
        self.assertEqual({}, self.findings())
        self.lab.run('ip', 'link', 'del', 'shim0')
        # keepalived creates such a macvlan for its virtual address.
        self.lab.run('ip', 'link', 'add', 'vrrp.51', 'link', lab.PARENT,
                     'up', 'type', 'macvlan', 'mode', 'private')
        self.assertEqual({}, self.findings())

    def is_answered_for(self) -> bool:
        """Return whether break0 answers ARP of the LAN for the node."""
        link = self.lab.link('break0')
        assert link is not None
        with self.lab.capture() as frames:
            self.lab.ping(lab.NODE, 'lan')
        return any(frame.src == link['address'] and frame.answers == lab.NODE
                   for frame in frames)

    def test_heard(self) -> None:
        for name, value in (('addr_gen_mode', 0), ('accept_ra', 1),
                            ('force_mld_version', 0)):
            with self.subTest(name):
                self.sysctl('ipv6.conf.break0.' + name, value)
                self.follow(self.assert_found('break0-heard', name,
                                              severity='warning'))
                self.assertEqual({}, self.findings())
        self.lab.run('ip', 'link', 'set', 'break0', 'multicast', 'on')
        self.follow(self.assert_found('break0-heard', 'multicast'))
        self.assertEqual({}, self.findings())

    def test_ipv6_disabled(self) -> None:
        self.sysctl('ipv6.conf.break0.disable_ipv6', 1)
        self.follow(self.assert_found('ipv6-disabled', 'on break0', POD6,
                                      OTHER6))
        self.assertEqual({}, self.findings())
        self.assertTrue(self.lab.ping(POD6))
