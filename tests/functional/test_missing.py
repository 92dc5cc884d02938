# SPDX-License-Identifier: Apache-2.0

"""Containers that have lost an address since they were bound."""

from __future__ import annotations

import contextlib
import ipaddress
from typing import Any, Iterator
from unittest import mock

from kuryr_break0.break0 import missing
from kuryr_break0.engine.plan import Outcome
from kuryr_break0.engine import reconciler
from kuryr_break0 import ledger
from kuryr_break0.ledger import files
from kuryr_break0 import manager
from kuryr_break0.model import Origin
from kuryr_break0.model import Owner
from tests.functional import base
from tests.functional.base import OTHER_OWNER
from tests.functional.base import OWNER
from tests.functional.base import POD
from tests.functional import cli_base
from tests.functional import discovery_base
from tests.support import lab

MAC, OTHER_MAC = '02:00:00:00:00:71', '02:00:00:00:00:72'
POD6 = 'fd00:30::71'
#: The container's later addresses; LEARNT6 is from a router's prefix.
LATER, LATER6, LEARNT6 = '100.75.30.72', 'fd00:30::72', 'fd00:30::73'


class MissingTestCase(cli_base.CLITestCase):

    def setUp(self) -> None:
        super().setUp()
        self.lab.add_ipv6()
        self.netns = self.lab.add_pod('pod', POD, POD6, mac=MAC)
        self.add(POD, POD6)

    def add(self, *addresses: str, owner: Owner = OWNER, mac: str = MAC,
            origin: Origin = Origin.CNI, **kwargs: Any) -> None:
        self.manager().bind(
            owner, base.addresses(*addresses), parent=lab.PARENT,
            netns=kwargs.pop('netns', self.netns), mac=mac, origin=origin,
            subnets=[ipaddress.ip_network(each) for each in (
                '100.75.30.0/24', 'fd00:30::/64')], **kwargs)

    def inside(self, *commands: str) -> None:
        for command in commands:
            self.lab.run('ip', *command.split(), netns='pod')

    def change(self) -> None:
        self.inside('address del %s/24 dev eth0' % POD,
                    'address add %s/24 dev eth0' % LATER,
                    'address del %s/64 dev eth0' % POD6,
                    'address add %s/64 dev eth0 nodad' % LATER6)

    @contextlib.contextmanager
    def after(self, pauses: float) -> Iterator[None]:
        """Advance the clock of the ledger by this many pauses in the block."""
        real = files.now

        with mock.patch.object(files, 'now', lambda: (
                real() + pauses * missing.PAUSE)):
            yield

    def sync(self, pauses: float, **kwargs: bool) -> Outcome:
        own = base.options()
        with self.after(pauses):
            outcome = reconciler.Reconciler(
                own, ledger.Ledger(own.state_dir)).sync(**kwargs)
        self.assertEqual((), outcome.errors)
        return outcome


class TestReplaced(MissingTestCase):

    def test_seen_twice(self) -> None:
        for origin in (Origin.CNI, Origin.KURYR, Origin.MANUAL):
            with self.subTest(origin=origin):
                self.add(POD, POD6, origin=origin)
                self.change()
                self.assertFalse(self.sync(0.5).missing)
                for pauses in (2, 2.5):
                    outcome = self.sync(pauses)
                    self.assertEqual(
                        {POD, POD6}, {str(record.address)
                                      for record in outcome.missing})
                    self.assertFalse(outcome)
                self.assertEqual({POD, POD6}, set(self.lab.routes()))
                self.assertTrue(self.sync(3.1, dry_run=True).released)
                self.assertEqual({POD, POD6}, set(self.lab.routes()))
                outcome = self.sync(3.1)
                self.assertEqual({POD, POD6}, {
                    str(record.address) for record in outcome.released})
                self.assertFalse(outcome.missing)
                self.assertEqual((set(), {}), (self.bound(),
                                               self.lab.routes()))
                self.assertEqual([], self.lab.ip(
                    'neighbour', 'show', 'dev', 'break0'))
                self.assertFalse(self.sync(9))
                # The container's neighbour table has no node address left.
                self.assertEqual([], self.lab.ip(
                    'neighbour', 'show', 'nud', 'permanent', netns='pod'))
                self.inside('address flush dev eth0 scope global',
                            'address add %s/24 dev eth0' % POD,
                            'address add %s/64 dev eth0 nodad' % POD6)

    def test_seen_twice_while_another_route_is_missing(self) -> None:
        """Without an agent, an ADD counts missing routes between syncs."""
        self.change()
        self.sync(2)
        self.add('100.75.30.80')
        self.lab.run('ip', 'route', 'del', '100.75.30.80', 'dev', 'break0')
        with mock.patch.object(manager.Break0Manager, 'sync'):
            self.manager().housekeep()
        self.assertEqual({POD, POD6}, {
            str(record.address) for record in self.sync(4).released})

    def test_a_host_of_the_lan_gets_it(self) -> None:
        self.change()
        for address, prefix in (POD, 24), (POD6, 64):
            self.lab.run('ip', 'address', 'add', '%s/%d' % (address, prefix),
                         'dev', 'nic', *(['nodad'] if prefix == 64 else []),
                         netns='lan')
            self.assertFalse(self.lab.ping(address))
        self.sync(2)
        self.sync(4)
        self.assertTrue(self.lab.ping(POD))
        self.assertTrue(self.lab.ping(POD6))

    def test_other_bound_addresses_stay(self) -> None:
        self.change()
        self.add(LATER, LATER6)
        self.sync(2)
        self.assertTrue(self.sync(4).released)
        self.assertEqual({LATER, LATER6}, self.bound())
        for address in (LATER, LATER6):
            self.assertTrue(self.lab.ping(address))
        for address in (lab.NODE, lab.NODE6):
            self.assertTrue(self.lab.ping(address, 'pod'))
        self.assertEqual([], self.problems())

    def test_an_interface_that_was_made_again(self) -> None:
        # A second ADD of a sandbox creates eth0 with a new MAC address.
        self.inside('link del eth0')
        self.lab.add_macvlan('pod', mac=OTHER_MAC)
        self.inside('address add %s/24 dev eth0' % LATER)
        self.add(LATER, mac=OTHER_MAC)
        self.sync(2)
        self.assertEqual({POD}, {str(record.address) for record
                                 in self.sync(4).released})
        self.assertEqual({LATER, POD6}, self.bound())
        self.assertTrue(self.lab.ping(LATER))

    def test_the_next_claim_counts(self) -> None:
        # Two containers have one address. When the container of the newer
        # claim removes the address, the older claim gets the routes.
        other = self.lab.add_pod('other', POD, mac=OTHER_MAC)
        self.lab.run('ip', 'link', 'set', 'eth0', 'down', netns='other')
        self.add(POD, owner=OTHER_OWNER, netns=other, mac=OTHER_MAC)
        self.add(POD, POD6)
        self.lab.run('ip', 'link', 'set', 'eth0', 'up', netns='other')
        self.change()
        self.sync(2)
        self.sync(4)
        self.assertEqual(OTHER_OWNER, self.snapshot().live[
            ipaddress.ip_address(POD)].owner)
        self.assertTrue(self.lab.ping(POD))

    def test_how_it_is_shown(self) -> None:
        # The command uses the real clock. A newly bound address does not count
        # as missing, since Kuryr configures it after the bind.
        text = ('has other addresses. If the interface still lacks it after '
                '10 s, a sync unbinds it')
        self.change()
        self.assertNotIn(text, self.call('status').stdout)
        self.unbind(POD, POD6)
        with self.after(-2):
            self.add(POD, POD6)
        done = self.call('status')
        self.assertIn(text, ' '.join(done.stdout.split()))
        self.assertEqual(1, done.returncode)
        done = self.call('sync')
        self.assertEqual(1, done.returncode)
        self.assertIn('! record %s owner %s: the interface eth0' % (
            POD, OWNER), done.stdout)


class TestDoubt(MissingTestCase):
    """Ambiguous evidence never costs a container its route."""

    def assert_stays(self) -> None:
        for pauses in range(2, 8):
            self.sync(pauses)
        self.assertEqual({POD, POD6}, self.bound())
        self.assertEqual({POD, POD6}, set(self.lab.routes()))

    def test_no_address_yet(self) -> None:
        # Kuryr's _configure_l3 sets the addresses after the bind.
        self.inside('address flush dev eth0 scope global')
        self.assert_stays()
        self.assertIn(
            'and has no other IPv4 address. It stays bound, because a program '
            'in the container, such as a DHCP client, may add it again',
            ''.join(self.sync(9).missing.values()))

    def test_the_first_of_two_families(self) -> None:
        self.inside('address flush dev eth0 scope global',
                    'address add %s/24 dev eth0' % POD)
        self.assert_stays()

    def test_addresses_by_router_advertisements(self) -> None:
        self.inside('address flush dev eth0 scope global',
                    'address add %s/24 dev eth0' % POD,
                    'address add %s/64 dev eth0 nodad valid_lft 3600 '
                    'preferred_lft 3600' % LEARNT6)
        self.assert_stays()

    def test_interface_that_is_down(self) -> None:
        self.change()
        self.inside('link set eth0 down')
        self.assert_stays()

    def test_another_mac_address(self) -> None:
        self.change()
        self.inside('link set eth0 address ' + OTHER_MAC)
        self.assert_stays()

    def test_interface_that_is_not_there(self) -> None:
        self.inside('link del eth0')
        self.assert_stays()

    def test_on_another_interface_of_the_pod(self) -> None:
        self.change()
        self.inside('link add bridge type bridge',
                    'address add %s/32 dev bridge' % POD,
                    'address add %s/128 dev lo' % POD6)
        self.assert_stays()

    def test_too_many_addresses_to_read(self) -> None:
        self.change()
        with open('/run/batch', 'w') as file:
            for number in range(600):
                file.write('address add 10.9.%d.%d/32 dev eth0\n' % divmod(
                    number, 250))
        self.lab.run('ip', '-batch', '/run/batch', netns='pod')
        self.assert_stays()

    def test_seen_once(self) -> None:
        there = ['address add %s/24 dev eth0' % POD,
                 'address add %s/64 dev eth0 nodad' % POD6]
        for pauses in range(2, 8, 2):
            self.change()
            self.assertEqual(2, len(self.sync(pauses).missing))
            self.inside('address flush dev eth0 scope global', *there)
            self.assertFalse(self.sync(pauses + 1).missing)
        self.change()
        self.sync(10)
        # A bind between two syncs starts the count again.
        with self.after(10.5):
            self.add(POD, POD6)
        self.sync(11.1)
        self.inside('address flush dev eth0 scope global', *there)
        self.assert_stays()

    def test_another_namespace_by_now(self) -> None:
        if self.is_blind():
            self.skipTest('only the cookie shows that the namespace lives')
        # The path leads to another container's namespace, with an interface
        # of the same name and MAC address.
        self.inside('link set eth0 down')
        self.lab.run('mount', '--bind', self.lab.add_pod(
            'other', LATER, LATER6, mac=MAC), self.netns)
        self.addCleanup(self.lab.run, 'umount', self.netns)
        self.assert_stays()


class TestAgent(discovery_base.DiscoveryTestCase):

    def test_a_container_of_cni_changes_its_address(self) -> None:
        netns = self.lab.add_pod('one', discovery_base.ONE, mac=MAC)
        self.manager().bind(
            OWNER, base.addresses(discovery_base.ONE), parent=lab.PARENT,
            netns=netns, mac=MAC, origin=Origin.CNI)
        self.start(discovery_base.OPTIONS.replace('3600', '1'))
        for verb, address in (('del', discovery_base.ONE),
                              ('add', discovery_base.TWO)):
            self.inside('one', 'ip', 'address', verb, address + '/24', 'dev',
                        'eth0')
        self.until_bound(discovery_base.TWO)
        self.assert_reachable(discovery_base.TWO, 'one')
        # When the pod lost its last address, the kernel deleted the pod's
        # neighbour for the node.
        lab.until(lambda: not self.problems(), self.log)
        self.assertIn('Unbound %s for %s: ' % (
            discovery_base.ONE, OWNER), self.log())
