# SPDX-License-Identifier: Apache-2.0

"""A node with two NICs, each with an independent break0."""

from __future__ import annotations

import contextlib
import glob
import ipaddress
import json
import os
import signal
from typing import Any
from unittest import mock

from kuryr_break0.break0 import device
from kuryr_break0.break0 import devices
from kuryr_break0.engine import problems
from kuryr_break0 import exceptions
from kuryr_break0 import kernel
from kuryr_break0.ledger import cache
from kuryr_break0.ledger import Ledger
from kuryr_break0.model import Owner
from kuryr_break0.model import Record
from tests.functional import base
from tests.functional.base import OTHER_OWNER
from tests.functional.base import OWNER
from tests.functional.base import POD
from tests.functional import cli_base
from tests.functional import discovery_base
from tests.functional.parents_base import MAC
from tests.functional.parents_base import MAC1
from tests.functional.parents_base import NODE1
from tests.functional.parents_base import NODE1_6
from tests.functional.parents_base import OWNER1
from tests.functional.parents_base import ParentsTestCase
from tests.functional.parents_base import POD1
from tests.functional.parents_base import POD1_6
from tests.functional.parents_base import POD6
from tests.functional.parents_base import SUBNETS
from tests.support import lab
from tests.support import program

ONE, ONE6, TWO = (discovery_base.ONE, discovery_base.ONE6,
                  discovery_base.TWO)


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
        self.assertEqual({POD, POD6}, set(map(str, problems.by_address(
            problems.find(self.snapshot())))))
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
            for name, parent in self.snapshot().parents.items()})

    def test_the_break0_of_another_ledger_keeps_its_neighbour(self) -> None:
        """An address moves from a parent whose break0 was taken over.

        The new bind gets the route, because an address has one route.
        """
        self.bind(POD, mac_of_pod=MAC, state_dir='/run/other')
        self.bind(POD, owner=OTHER_OWNER, parent=self.NIC, mac_of_pod=MAC)
        self.assertIn(POD, [each['dst'] for each in self.lab.ip(
            'neighbour', 'show', 'dev', 'break0')])

    def test_the_next_claim_beside_a_break0_of_another_ledger(self) -> None:
        self.bind(POD, mac_of_pod=MAC, state_dir='/run/other')
        self.bind(POD1, owner=OTHER_OWNER, parent=self.NIC, mac_of_pod=MAC)
        self.unbind(POD1, owner=OTHER_OWNER)
        self.assertIn(POD1, self.lab.routes(self.device1))
        self.assert_answers(POD1)

    def test_the_next_claim_of_a_ledger_without_a_break0(self) -> None:
        """An unbind takes over no break0 of another ledger."""
        alias = (self.lab.link('break0') or {})['ifalias']
        other = base.options(state_dir='/run/other')
        address, = base.addresses(POD)
        ledger = Ledger(other.state_dir)
        ledger.prepare()
        ledger.records.put([Record(
            address, owner, lab.PARENT, MAC, netns=self.netns,
            namespace=kernel.identify(self.netns), bound_at=at)
            for owner, at in ((OTHER_OWNER, 2.0), (OWNER, 1.0))])
        self.unbind(POD, owner=OTHER_OWNER, state_dir=other.state_dir)
        self.assertEqual(alias, (self.lab.link('break0') or {})['ifalias'])

    def test_the_first_bind_after_a_lost_ledger(self) -> None:
        """The new ledger takes over the break0 of both parents."""
        self.lab.run('rm', '-r', '/run/kuryr-break0')
        self.lab.run('ip', 'link', 'del', self.device1)
        self.bind(POD1, owner=OWNER1, parent=self.NIC, mac_of_pod=MAC)
        self.manager().sync()
        self.assertEqual([], self.problems())
        self.assert_answers(POD)

    def test_next_hops_of_either(self) -> None:
        for hop in ('100.75.60.1', lab.LAN):
            self.lab.run('ip', 'route', 'add', '198.51.100.%d/32' % (
                ipaddress.ip_address(hop).packed[2]), 'via', hop)
        with mock.patch.object(cache, 'MAX_AGE', 0):
            for hop in ('100.75.60.1', lab.LAN):
                with self.assertRaises(exceptions.AddressRefused):
                    self.bind(hop, owner=Owner('x', 'eth0'))
        # A route through a bound pod keeps the pod bound.
        self.lab.run('ip', 'route', 'add', '203.0.113.0/24', 'via', POD1)
        self.manager().sync()
        self.assert_reachable()

    def test_without_an_agent(self) -> None:
        self.manager().housekeep()
        self.lab.run('ip', 'route', 'flush', 'dev', self.device1)
        self.manager().housekeep()
        self.assert_reachable()


class TestVlanName(TestTwoParents):
    """A parent named like a VLAN: its dot is no separator of sysctl names."""

    NIC = 'eth0.100'


class TestRenamed(ParentsTestCase):
    """A parent that is renamed keeps its ifindex, its macvlans and pods."""

    NEW, NEW6 = '100.75.30.72', 'fd00:30::72'

    def rename(self, old: str, new: str) -> None:
        """Rename a NIC while it is down, as udev does.

        The kernel deletes the IPv6 addresses of a NIC that goes down. This
        function adds these addresses again.
        """
        texts = [text for text in (lab.NODE6, NODE1_6) if any(
            text == each.get('local') for link in self.lab.ip(
                'address', 'show', 'dev', old) for each in link['addr_info'])]
        for command in (old + ' down', '%s name %s' % (old, new),
                        new + ' up'):
            self.lab.run('ip', 'link', 'set', *command.split())
        for text in texts:
            self.lab.run('ip', 'address', 'add', text + '/64', 'dev', new,
                         'nodad')

    def bind_new(self, parent: str, **overrides: Any) -> None:
        """Add one more pod to a NIC, and bind it."""
        netns = self.lab.add_netns('new')
        run = self.lab.run
        self.lab.add_macvlan('new', mac='fa:16:3e:00:00:03', parent=parent)
        run('ip', 'address', 'add', self.NEW + '/24', 'dev', 'eth0',
            netns='new')
        run('ip', 'address', 'add', self.NEW6 + '/64', 'dev', 'eth0',
            'nodad', netns='new')
        self.bind(self.NEW, self.NEW6, owner=Owner('new', 'eth0'),
                  parent=parent, netns=netns, subnets=SUBNETS,
                  mac_of_pod='fa:16:3e:00:00:03', **overrides)

    def assert_all_answer(self) -> None:
        self.assert_answers()
        self.assert_answers(self.NEW, self.NEW6, name='new')

    def devices(self) -> dict[str, str]:
        """Return the name of each break0 by the name of its NIC."""
        return {link['link']: link['ifname']
                for link in self.lab.ip('link', 'show', 'type', 'macvlan')
                if not (link.get('linkinfo') or {}).get('link_netnsid')}

    def assert_in_sync(self, devices: dict[str, str]) -> None:
        """Expect no problem, and ``devices`` in the kernel and the ledger."""
        self.assertEqual([], self.problems())
        with self.quiet():
            self.assertFalse(self.manager().sync())
        self.assertEqual(devices, self.devices())
        seen = self.snapshot()
        self.assertEqual(devices, seen.identity and seen.identity.devices)
        self.assertEqual(devices, {name: parent.device for name, parent
                                   in seen.parents.items()})

    def test_then_one_is_bound(self) -> None:
        before = {name: self.lab.link(name) for name in ('break0', 'eth0')}
        self.rename('eth0', 'ens3')
        self.bind_new('ens3')
        self.assert_all_answer()
        self.assertEqual((before['break0'] or {})['ifindex'],
                         (self.lab.link('break0') or {})['ifindex'])
        self.manager().sync()
        self.assert_in_sync({'ens3': 'break0', self.NIC: self.device1})
        self.assert_all_answer()

    def test_of_a_further_one(self) -> None:
        self.rename(self.NIC, 'ens4')
        self.lab.run('ip', 'route', 'flush', 'dev', self.device1)
        problems = ' '.join(self.problems())
        self.assertIn('%s: its parent %s is called ens4 now' % (
            self.device1, self.NIC), problems)
        self.assertNotIn('does not exist', problems)
        self.manager().sync()
        self.assert_in_sync({'eth0': 'break0', 'ens4': self.device1})
        self.assert_reachable()
        # The NIC gets its old name back.
        self.rename('ens4', self.NIC)
        self.manager().sync()
        self.assert_in_sync({'eth0': 'break0', self.NIC: self.device1})
        self.assert_reachable()

    def test_without_a_guard(self) -> None:
        self.manager(guard='off').sync()
        self.rename('eth0', 'ens3')
        self.bind_new('ens3', guard='off')
        self.manager(guard='off').sync()
        self.assertEqual([], self.problems(guard='off'))
        self.assertFalse(self.manager(guard='off').sync())
        for address in (POD, POD6, self.NEW, self.NEW6):
            self.assertTrue(self.lab.ping(address), address)

    def test_a_dry_run_changes_nothing(self) -> None:
        self.rename('eth0', 'ens3')
        outcome = self.manager().sync(dry_run=True)
        self.assertIn(('break0', 'its parent eth0 is called ens3 now'),
                      outcome.devices)
        seen = self.snapshot()
        self.assertEqual('break0', seen.identity
                         and seen.identity.devices['eth0'])

    def test_housekeeping_without_an_agent(self) -> None:
        self.manager().housekeep()
        self.rename('eth0', 'ens3')
        self.lab.run('ip', 'route', 'flush', 'dev', 'break0')
        self.manager().housekeep()
        self.assert_in_sync({'ens3': 'break0', self.NIC: self.device1})
        self.assert_reachable()

    def test_unbind_and_a_gone_sandbox(self) -> None:
        self.rename('eth0', 'ens3')
        self.rename(self.NIC, 'ens4')
        self.unbind(POD1, POD1_6, owner=OWNER1)
        self.assertEqual({}, self.lab.routes(self.device1))
        self.lab.del_netns('pod')
        self.manager().sync()
        self.assertEqual(({}, set()), (self.lab.routes(), self.bound()))
        self.assertEqual([], self.problems())

    def test_another_takes_the_name(self) -> None:
        self.rename('eth0', 'ens3')
        run = self.lab.run
        run('ip', 'link', 'add', 'eth0', 'type', 'veth', 'peer', 'name',
            'nic2', 'netns', 'lan')
        run('ip', 'link', 'set', 'eth0', 'up')
        run('ip', 'link', 'set', 'nic2', 'up', netns='lan')
        run('ip', 'address', 'add', '100.75.70.51/24', 'dev', 'eth0')
        netns = self.lab.add_pod('new', '100.75.70.71/24',
                                 mac='fa:16:3e:00:00:03')
        self.bind('100.75.70.71', owner=Owner('new', 'eth0'), netns=netns,
                  subnets=['100.75.70.0/24'], mac_of_pod='fa:16:3e:00:00:03')
        self.assertTrue(self.lab.ping('100.75.70.71'))
        self.assertTrue(self.lab.ping('100.75.70.51', 'new'))
        self.manager().sync()
        self.assert_in_sync({'ens3': 'break0', self.NIC: self.device1,
                             'eth0': 'break0-eth0'})
        self.assert_reachable()
        self.assertTrue(self.lab.ping('100.75.70.71'))
        self.unbind('100.75.70.71', owner=Owner('new', 'eth0'))
        self.assertEqual({}, self.lab.routes('break0-eth0'))

    def test_another_takes_the_name_of_a_further_one(self) -> None:
        self.rename(self.NIC, 'ens4')
        self.rename('eth0', self.NIC)
        self.bind_new(self.NIC)
        self.assert_all_answer()
        self.manager().sync()
        self.assert_in_sync({self.NIC: 'break0', 'ens4': self.device1})

    def test_a_new_one_takes_the_name_of_a_further_one(self) -> None:
        self.rename(self.NIC, 'ens4')
        self.lab.run('ip', 'link', 'add', self.NIC, 'type', 'veth', 'peer',
                     'name', 'nic2', 'netns', 'lan')
        self.lab.run('ip', 'link', 'set', self.NIC, 'up')
        self.lab.run('ip', 'link', 'set', 'nic2', 'up', netns='lan')
        self.bind(self.NEW, owner=Owner('new', 'eth0'), parent=self.NIC)
        self.manager().sync()
        found = self.devices()
        self.assertEqual(self.device1, found['ens4'])
        self.assertRegex(found[self.NIC], r'\Abreak0-[0-9a-f]{8}\Z')
        self.assertEqual({self.NEW}, set(self.lab.routes(found[self.NIC])))
        self.assert_reachable()

    def test_two_swap_names(self) -> None:
        self.rename('eth0', 'x')
        self.rename(self.NIC, 'eth0')
        self.rename('x', self.NIC)
        self.bind_new(self.NIC)
        self.assert_all_answer()
        self.manager().sync()
        self.assert_in_sync({self.NIC: 'break0', 'eth0': self.device1})
        # A DEL before the sync deletes the routes of the right break0.
        self.rename('eth0', 'x')
        self.rename(self.NIC, 'eth0')
        self.rename('x', self.NIC)
        self.unbind(self.NEW, self.NEW6, owner=Owner('new', 'eth0'))
        self.assertEqual({POD, POD6}, set(self.lab.routes()))

    def test_and_its_break0_is_deleted(self) -> None:
        self.rename('eth0', 'ens3')
        self.lab.run('ip', 'link', 'del', 'break0')
        self.bind_new('ens3')
        self.assert_all_answer()

    def test_without_pods(self) -> None:
        self.unbind(POD, POD6)
        self.unbind(POD1, POD1_6, owner=OWNER1)
        self.rename('eth0', 'ens3')
        self.rename(self.NIC, 'ens4')
        self.assertEqual([], self.problems())
        with self.quiet():
            self.manager().sync()
        self.bind_new('ens3')
        self.assertEqual({self.NEW, self.NEW6}, set(self.lab.routes()))
        self.assertEqual([], self.problems())

    def test_options_with_the_earlier_name(self) -> None:
        self.rename('eth0', 'ens3')
        with self.assertRaisesRegex(exceptions.ParentNotFound,
                                    'eth0 does not exist'):
            self.manager(parent='eth0').bind(
                Owner('x', 'eth0'), base.addresses('100.75.30.73'),
                parent='ens3')
        with self.assertRaises(exceptions.Break0Error):
            self.manager(parent='eth0').sync()
        self.assertIn('Set the option to ens3, or remove it', ' '.join(
            self.problems(parent='eth0')))
        self.assertEqual({POD, POD6}, set(self.lab.routes()))
        for address in (POD, POD6):
            self.assertTrue(self.lab.ping(address), address)

    def test_while_its_guard_is_loaded(self) -> None:
        """A rename while the guard is loaded cuts off no pod.

        No sync can follow, since the option ``parent`` has the earlier name.
        """
        ensure = device.Device.ensure

        def then_renamed(self_: device.Device, *args: Any) -> device.Ensured:
            ensured = ensure(self_, *args)
            if self_.parent == 'eth0':
                self.rename('eth0', 'ens3')
            return ensured

        self.lab.run('nft', 'flush', 'ruleset')
        with mock.patch.object(device.Device, 'ensure', then_renamed), \
                contextlib.suppress(exceptions.Break0Error):
            self.manager(parent='eth0').sync()
        self.assertEqual({POD, POD6}, set(self.lab.routes()))
        self.assertTrue(self.lab.ping(POD))
        self.assertTrue(self.lab.ping(lab.NODE, 'pod'))

    def test_by_an_altname(self) -> None:
        self.rename('eth0', 'ens3')
        self.lab.run('ip', 'link', 'property', 'add', 'dev', 'ens3',
                     'altname', 'eth0')
        self.bind_new('ens3')
        self.bind('100.75.30.73', owner=Owner('x', 'eth0'), parent='eth0')
        self.assert_all_answer()
        self.manager().sync()
        self.assert_in_sync({'ens3': 'break0', self.NIC: self.device1})

    def test_the_option_by_an_altname(self) -> None:
        self.lab.run('ip', 'link', 'property', 'add', 'dev', 'eth0',
                     'altname', 'enp0s3')
        self.unbind(POD1, POD1_6, owner=OWNER1)
        self.manager(parent='enp0s3').sync()
        self.assertEqual({POD, POD6}, set(self.lab.routes()))
        self.assertEqual([], self.problems(parent='enp0s3'))
        netns = self.lab.add_pod('x', '100.75.30.73')
        done = program.run([program.BREAK0, 'bind', '--owner', 'x', '--netns',
                            netns, '--parent', 'enp0s3'])
        self.assertEqual(0, done.returncode)
        self.assertTrue(self.lab.ping('100.75.30.73'))

    def test_a_lost_record(self) -> None:
        self.rename('eth0', 'ens3')
        for path in glob.glob('/run/kuryr-break0/addresses/*%s*' % POD):
            os.unlink(path)
        self.assertEqual(1, len(self.manager().sync().rebuilt))
        self.rename('ens3', 'ens5')
        self.manager().sync()
        self.assert_in_sync({'ens5': 'break0', self.NIC: self.device1})
        self.assert_reachable()


class TestRenamedWithAnAgent(discovery_base.DiscoveryTestCase):

    def setUp(self) -> None:
        super().setUp()
        self.lab.add_pod('one', ONE, ONE6, mac=MAC)
        self.start()
        self.until_bound(ONE, ONE6)

    def rename(self, old: str, new: str) -> None:
        # A kernel before 6.2 renames an interface only while it is down.
        for command in (old + ' down', '%s name %s' % (old, new),
                        new + ' up'):
            self.lab.run('ip', 'link', 'set', *command.split())
        self.lab.run('ip', 'address', 'add', lab.NODE6 + '/64', 'dev', new,
                     'nodad')

    def test_an_option_with_the_earlier_name(self) -> None:
        with open(discovery_base.CONF, 'w') as file:
            file.write('[break0]\n%sparent = eth0\n'
                       % discovery_base.OPTIONS)
        self.agent.send_signal(signal.SIGHUP)
        self.until(lambda: 'Read the configuration again' in self.log())
        self.rename('eth0', 'ens3')
        self.until(lambda: 'parent interface eth0 does not exist'
                   in self.log())
        # The log line about a new address proves that the agent has read the
        # namespace.
        self.lab.run('ip', 'address', 'add', '10.66.0.1/24', 'dev', 'eth0',
                     netns='one')
        self.until(lambda: '10.66.0.1, on eth0 in' in self.log())
        self.assertEqual({ONE, ONE6}, set(self.lab.routes()))
        # The test pings IPv4 only: with this option the agent cannot repair
        # the faults that arose while the NIC was down and had no IPv6 address.
        self.until(lambda: self.lab.ping(ONE))
        self.until(lambda: self.lab.ping(lab.NODE, 'one'))

    def assert_parents(self, *names: str) -> None:
        self.until(lambda: names == tuple(self.snapshot().parents)
                   and not self.problems())

    def test_containers_before_and_after(self) -> None:
        index = (self.lab.link('break0') or {})['ifindex']
        self.rename('eth0', 'ens3')
        self.assert_parents('ens3')
        self.lab.add_netns('two')
        run = self.lab.run
        self.lab.add_macvlan('two', mac=MAC1, parent='ens3')
        run('ip', 'address', 'add', TWO + '/24', 'dev', 'eth0', netns='two')
        self.until_bound(ONE, ONE6, TWO)
        self.assert_parents('ens3')
        self.rename('ens3', 'eth0')
        self.assert_parents('eth0')
        self.assertEqual(index, (self.lab.link('break0') or {})['ifindex'])
        for address, name in ((ONE, 'one'), (ONE6, 'one'), (TWO, 'two')):
            self.assert_reachable(address, name)
        # The agent still receives the events of the renamed parent.
        self.lab.run('ip', 'link', 'set', 'eth0', 'mtu', '1400')
        self.until(lambda: (self.lab.link('break0') or {})['mtu'] == 1400)


class TestNames(base.LabTestCase):

    def name(self, parent: str, primary: str = 'eth0', **options: Any) -> str:
        names = devices.Names(base.options(**options), None,
                              lambda name: None, list, ())
        names.primary = primary
        return names.of(parent)

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
        self.assertEqual(['eth1, the parent of break0-eth1, is down'],
                         self.problems())

    def test_the_parent_option_is_for_one(self) -> None:
        self.lab.run('ip', 'link', 'add', 'eth1', 'up', 'type', 'veth',
                     'peer', 'name', 'peer1')
        with self.assertRaises(exceptions.ParentMismatch):
            self.manager(parent='eth0').bind(OWNER, base.addresses(POD),
                                             parent='eth1')
        self.bind(POD, parent='eth0')
        self.bind(POD1, parent='eth1', owner=OWNER1)
        self.assertIn('pods of this node are on eth1',
                      self.problems(parent='eth0')[0])
        self.unbind(POD1, owner=OWNER1)
        self.assertEqual([], self.problems(parent='eth0'))


class TestBond(base.LabTestCase):

    def test_a_parent_with_a_changing_mac_address(self) -> None:
        # A bond's MAC address follows its active member.
        self.lab.add_pod('pod', POD, mac=MAC)
        self.bind(POD, netns='/run/netns/pod', mac_of_pod=MAC)
        before = (self.lab.link('break0') or {})['address']
        self.lab.run('ip', 'link', 'set', lab.PARENT, 'address',
                     '02:00:00:00:00:aa')
        self.lab.run('ip', 'link', 'del', 'break0')
        self.manager().sync()
        self.assertEqual(before, (self.lab.link('break0') or {})['address'])
        self.assertTrue(self.lab.ping(POD))


class TestCommand(cli_base.CLITestCase):

    def test_a_parent_that_was_renamed(self) -> None:
        self.bind(POD)
        for command in ('down', 'name ens3'):
            self.lab.run('ip', 'link', 'set', 'eth0', *command.split())
        self.lab.run('ip', 'link', 'set', 'ens3', 'up')
        done = self.call('status')
        self.assertEqual(1, done.returncode)
        self.assertIn('its parent eth0 is called ens3 now', done.stdout)
        self.assertNotIn('does not exist', done.stdout)
        done = self.call('sync')
        self.assertEqual(0, done.returncode, done.stderr)
        done = self.call('status', '--json')
        self.assertEqual(0, done.returncode, done.stdout)
        status = json.loads(done.stdout)
        self.assertEqual(('ens3', 'ens3'), (
            status['device']['parent'], status['addresses'][0]['parent']))
        done = self.call('cleanup')
        self.assertEqual(0, done.returncode, done.stdout)
        self.assertIsNone(self.lab.link('break0'))

    def test_cleanup_takes_both(self) -> None:
        self.lab.run('ip', 'link', 'add', 'eth1', 'type', 'veth', 'peer',
                     'name', 'peer1')
        self.lab.settle()
        before = self.lab.state()
        self.bind(POD)
        self.bind('100.75.30.72', owner=Owner('b', 'eth0'), parent='eth1')
        done = self.call('status')
        self.assertIn('break0-eth1', done.stdout)
        done = self.call('cleanup')
        self.assertEqual(0, done.returncode, done.stdout)
        self.assertIn('- interface break0-eth1', done.stdout)
        self.assertEqual(before, self.lab.state())
