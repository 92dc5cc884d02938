# SPDX-License-Identifier: Apache-2.0

"""Manager, reconciler and device against a fake kernel in memory."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import ipaddress
import os
import shutil
import tempfile
from typing import Any
from unittest import mock

from kuryr_break0.break0 import device
from kuryr_break0.break0 import devices
from kuryr_break0.engine import reconciler
from kuryr_break0 import exceptions
from kuryr_break0 import kernel
from kuryr_break0 import ledger
from kuryr_break0.ledger import cache
from kuryr_break0.ledger import files
from kuryr_break0.ledger import journal
from kuryr_break0.ledger import records
from kuryr_break0 import manager
from kuryr_break0.model import HostRoute
from kuryr_break0.model import IPAddress
from kuryr_break0.model import NamespaceId
from kuryr_break0.model import Neighbour
from kuryr_break0.model import Owner
from kuryr_break0.model import Record
from tests.functional import base
from tests.unit import fake

NODE = ipaddress.ip_address('10.0.0.1')
POD = ipaddress.ip_address('10.0.0.71')
OTHER = ipaddress.ip_address('10.0.0.72')
MAC, OTHER_MAC = 'fa:16:3e:00:00:01', 'fa:16:3e:00:00:02'
OWNER, OTHER_OWNER = Owner('a', 'eth0'), Owner('b', 'eth0')


class EngineTestCase(fake.FakeKernelTestCase):

    def setUp(self) -> None:
        super().setUp()
        directory = tempfile.TemporaryDirectory()
        self.addCleanup(directory.cleanup)
        self.state = os.path.join(directory.name, 'state')
        self.fake.add_link('eth0', mac='02:00:00:00:00:ee')
        self.fake.owned.append(('eth0', NODE))
        for number, path in enumerate(('/a', '/b')):
            self.fake.namespaces[path] = NamespaceId(4, 100 + number,
                                                     1000 + number)

    def options(self, **overrides: Any) -> Any:
        # Only tests of guard entries enable the guard.
        return base.options(**{'state_dir': self.state, 'guard': 'off',
                               **overrides})

    def bind(self, *addresses: IPAddress, owner: Owner = OWNER,
             netns: str = '/a', mac: str = MAC, parent: str = 'eth0',
             yielding: bool = False, **overrides: Any) -> None:
        manager.Break0Manager(self.options(**overrides)).bind(
            owner, addresses, parent=parent, mac=mac, netns=netns,
            yielding=yielding)

    def unbind(self, *addresses: IPAddress, owner: Owner = OWNER) -> None:
        manager.Break0Manager(self.options()).unbind(owner, addresses)

    def sync(self, **overrides: Any) -> reconciler.Outcome:
        return reconciler.Reconciler(
            self.options(**overrides), self.ledger()).sync()

    def ledger(self) -> ledger.Ledger:
        return ledger.Ledger(self.state, 1)

    def routed(self) -> set[IPAddress]:
        return {route.dst for route in self.fake.host.values()}

    def recorded(self) -> set[IPAddress]:
        return set(self.ledger().records.addresses())


class TestManager(EngineTestCase):

    def test_a_bind_and_its_unbind(self) -> None:
        self.bind(POD)
        route, = self.fake.host.values()
        index = self.fake.links['break0'].index
        self.assertEqual(HostRoute(POD, index, 176, 254, NODE, 0), route)
        self.assertEqual(MAC, self.fake.known[index, POD].mac)
        self.unbind(POD)
        self.assertEqual((set(), set(), {}), (
            self.routed(), self.recorded(), self.fake.known))

    def test_any_error_of_the_kernel_leaves_a_record(self) -> None:
        for code in (errno.ENOBUFS, errno.ENOMEM, errno.EPERM,
                     errno.ENETDOWN, errno.ENODEV):
            self.fake.fail = lambda verb, item, code=code: code
            with self.subTest(code=code):
                with self.assertRaises(exceptions.KernelRefused):
                    self.bind(POD)
                self.assertEqual({POD}, self.recorded())
        self.fake.fail = lambda verb, item: None
        self.sync()
        self.assertEqual({POD}, self.routed())

    def test_one_address_that_fails_hinders_no_other(self) -> None:
        self.fake.fail = lambda verb, item: (
            errno.EINVAL if item.dst == POD else None)
        with self.assertRaises(exceptions.KernelRefused):
            self.bind(POD, OTHER)
        self.assertEqual({OTHER}, self.routed())
        self.assertEqual({POD, OTHER}, self.recorded())

    def test_a_check_has_the_error_of_a_yielding_bind(self) -> None:
        def foreign_route() -> None:
            self.fake.set_route(HostRoute(
                POD, self.fake.links['eth0'].index, 4, 254))

        def older_claim_of_living_sandbox() -> None:
            self.bind(POD)
            self.bind(POD, owner=OTHER_OWNER, netns='/b', mac=OTHER_MAC)
            self.fake.gone.add(self.fake.namespaces['/b'])

        self.fake.namespaces['/c'] = NamespaceId(4, 110, 1010)
        owner = Owner('c', 'eth0')
        record = Record(POD, owner, 'eth0', 'fa:16:3e:00:00:03',
                        namespace=self.fake.namespaces['/c'])
        checked = manager.Break0Manager(self.options())
        for prepare, expected in (
                (foreign_route, exceptions.ForeignRoute),
                (older_claim_of_living_sandbox, exceptions.AddressTaken)):
            with self.subTest(expected=expected.__name__):
                self.fake.host.clear()
                checked.check(record)
                prepare()
                before = (dict(self.fake.host), self.recorded())
                with self.assertRaises(expected) as of_check:
                    checked.check(record)
                self.assertEqual(before, (self.fake.host, self.recorded()))
                with self.assertRaises(expected) as of_bind:
                    self.bind(POD, owner=owner, netns='/c', yielding=True)
                self.assertEqual(str(of_check.exception),
                                 str(of_bind.exception))
                self.unbind(POD)
                self.unbind(POD, owner=OTHER_OWNER)

    def test_a_yielding_bind_needs_a_record(self) -> None:
        asked: list[object] = []
        self.fake.fail = lambda verb, item: asked.append(item)
        with mock.patch.object(
                files, 'replace', side_effect=OSError(
                    errno.ENOSPC, 'of the test')):
            with self.assertRaises(exceptions.LedgerUnavailable):
                self.bind(POD, yielding=True)
            self.assertEqual([], asked)
            self.bind(POD)
        self.assertEqual({POD}, self.routed())

    def test_an_unbind_that_fails_keeps_the_record(self) -> None:
        self.bind(POD)
        self.fake.fail = lambda verb, item: errno.ENOBUFS
        with self.assertRaises(exceptions.KernelRefused):
            self.unbind(POD)
        self.assertEqual({POD}, self.recorded())

    def test_break0_that_vanishes_in_between_is_made_again(self) -> None:
        self.bind(OTHER, owner=OTHER_OWNER, netns='/b')
        calls: list[int] = []

        def fail(verb: Any, item: Any) -> Any:
            calls.append(1)
            return errno.ENODEV if len(calls) <= 2 else None

        self.fake.fail = fail
        self.bind(POD)
        self.assertIn(POD, self.routed())


class TestUndo(EngineTestCase):
    """An undo removes exactly the items that the bind set, by address."""

    def test_an_add_that_was_given_up_leaves_the_next_one(self) -> None:
        made = manager.Break0Manager(self.options())
        for late in (False, True):
            with self.subTest(late=late):
                given_up, following = files.now(), files.now()
                order = [given_up, following]
                for bound_at in reversed(order) if late else order:
                    made.bind(OWNER, [POD], parent='eth0', mac=MAC,
                              netns='/a', bound_at=bound_at)
                made.unbind(OWNER, [POD], '/a', bound_at=given_up)
                self.assertEqual(({POD}, {POD}), (self.routed(),
                                                  self.recorded()))
                made.unbind(OWNER, [POD], '/a', bound_at=following)
                self.assertEqual((set(), set()), (self.routed(),
                                                  self.recorded()))

    def test_a_refused_address_costs_no_other_address(self) -> None:
        foreign = HostRoute(POD, 1, 4, 254, None, 0)
        self.fake.set_route(foreign)
        with self.assertRaises(exceptions.ForeignRoute):
            self.bind(POD, OTHER, yielding=True)
        self.assertEqual({OTHER}, self.recorded())
        self.assertEqual([foreign], self.fake.routes_to(POD))
        self.assertEqual(1, len(self.fake.routes_to(OTHER)))
        self.assertEqual({OTHER}, {each.dst for each
                                   in self.fake.known.values()})

    def test_a_successor_gets_no_items_of_a_refused_address(self) -> None:
        self.bind(POD)
        self.bind(POD, owner=OTHER_OWNER, netns='/b', mac=OTHER_MAC)
        self.fake.next_hops.add(POD)
        with mock.patch.object(cache, 'MAX_AGE', 0), \
                self.assertLogs('kuryr_break0.engine.transitions',
                                'ERROR') as logged:
            self.unbind(POD, owner=OTHER_OWNER)
        self.assertIn('it is a next hop', logged.output[0])
        self.assertEqual((set(), {POD}, {}), (
            self.routed(), self.recorded(), self.fake.known))
        self.fake.next_hops.clear()
        self.sync()
        self.assertEqual({POD}, self.routed())

    def test_the_earlier_claim_stays(self) -> None:
        self.bind(POD)
        before = dict(self.fake.host), dict(self.fake.known)
        self.fake.fail = lambda verb, item: (
            errno.ENOBUFS if verb is kernel.Verb.ADD else None)
        with self.assertRaises(exceptions.KernelRefused):
            self.bind(POD, OTHER, yielding=True)
        self.assertEqual(before, (self.fake.host, self.fake.known))
        self.assertEqual({POD}, self.recorded())

    def test_items_of_a_dead_pod_are_removed(self) -> None:
        """A failing bind removes a dead pod's items, even its neighbour."""
        for failing in ((HostRoute, Neighbour), (HostRoute,), ()):
            with self.subTest(failing=failing):
                self.bind(POD, guard='auto')
                self.fake.gone.add(self.fake.namespaces['/a'])
                self.fake.fail = lambda verb, item, failing=failing: (
                    errno.ENOBUFS if verb is not kernel.Verb.DELETE
                    and isinstance(item, failing) else None)
                with self.assertRaises(exceptions.KernelRefused), (
                        contextlib.nullcontext() if failing
                        else mock.patch.object(
                            devices.Devices, 'get',
                            side_effect=exceptions.KernelRefused(
                                'look', 'of the test', errno.ENOBUFS))):
                    self.bind(POD, owner=OTHER_OWNER, netns='/b',
                              mac=OTHER_MAC, yielding=True, guard='auto')
                self.assertEqual(
                    (set(), set(), {}, []),
                    (self.routed(), self.recorded(), self.fake.known,
                     self.fake.pairs))
                self.fake.fail = lambda verb, item: None
                self.fake.gone.clear()

    def test_of_an_adopted_one_without_evidence(self) -> None:
        adopted = Owner.adopted(self.fake.namespaces['/a'], 'eth0')
        late = Owner('of-a-container-before', 'eth0')
        made = manager.Break0Manager(self.options())
        for addresses in ([POD], None):
            self.bind(POD, owner=adopted)
            for mac in (OTHER_MAC, None):
                with self.subTest(addresses=addresses, mac=mac):
                    made.unbind(late, addresses, '/a', mac=mac)
                    self.assertEqual({POD}, self.recorded())
            self.assertEqual([POD], made.unbind(late, addresses, '/a',
                                                mac=MAC))
            self.assertEqual(set(), self.routed())


class TestSuccession(EngineTestCase):
    """If one of two claims on an address ends, the other gets the address."""

    def setUp(self) -> None:
        super().setUp()
        self.bind(POD)
        self.bind(POD, owner=OTHER_OWNER, netns='/b', mac=OTHER_MAC)
        self.fake.gone.add(self.fake.namespaces['/b'])

    def neighbour(self) -> str:
        return self.fake.known[self.fake.links['break0'].index, POD].mac

    def test_one_sync_is_enough(self) -> None:
        outcome = self.sync()
        self.assertEqual([OTHER_OWNER], [each.owner for each
                                         in outcome.gone])
        self.assertEqual(MAC, self.neighbour())
        self.assertEqual((), outcome.unset)
        self.assertFalse(self.sync())

    def test_without_an_agent(self) -> None:
        manager.Break0Manager(self.options()).housekeep()
        self.assertEqual(MAC, self.neighbour())
        self.assertFalse(self.sync())


class TestGuard(EngineTestCase):

    def admitted(self) -> set[IPAddress]:
        return {ipaddress.ip_address(each.address)
                for each in self.fake.pairs}

    def test_one_that_is_loaded_again_lets_in_no_blocked_address(self
                                                                 ) -> None:
        self.bind(POD, guard='auto')
        self.fake.set_route(HostRoute(OTHER, 1, 4, 254, None, 0))
        with self.assertRaises(exceptions.ForeignRoute):
            self.bind(OTHER, owner=OTHER_OWNER, netns='/b', mac=OTHER_MAC,
                      guard='auto')
        self.fake.tables.clear()
        with mock.patch.object(cache, 'MAX_AGE', 0):
            self.bind(POD + 2, guard='auto')
        self.assertEqual({POD, POD + 2}, self.admitted())

    def test_of_a_break0_without_pods(self) -> None:
        self.bind(POD, guard='auto')
        left, = self.fake.pairs
        manager.Break0Manager(self.options(guard='auto')).unbind(OWNER, [POD])
        for pairs in self.fake.tables.values():
            pairs.add(left)
        self.assertEqual({POD}, self.admitted())
        self.assertTrue(self.sync(guard='auto'))
        self.assertEqual(set(), self.admitted())


class TestReconciler(EngineTestCase):

    def test_one_that_fails_holds_up_no_other(self) -> None:
        self.bind(POD)
        self.bind(OTHER, owner=OTHER_OWNER, netns='/b', mac=OTHER_MAC)
        self.fake.host.clear()
        self.fake.fail = lambda verb, item: (
            errno.EINVAL if item.dst == POD else None)
        self.assertEqual(1, len(self.sync().errors))
        self.assertEqual({OTHER}, self.routed())

    def test_only_proven_absence_deletes(self) -> None:
        self.bind(POD)
        self.bind(OTHER, owner=OTHER_OWNER, netns='/b', mac=OTHER_MAC)
        self.sync()
        self.assertEqual({POD, OTHER}, self.routed())
        self.fake.gone.add(self.fake.namespaces['/b'])
        self.sync()
        self.assertEqual(({POD}, {POD}), (self.routed(), self.recorded()))

    def test_a_gone_pod_with_an_address_of_another_pod(self) -> None:
        # The neighbour's MAC address belongs to a pod that is not recorded.
        self.bind(POD)
        index = self.fake.links['break0'].index
        self.fake.known[index, POD] = self.fake.known[
            index, POD]._replace(mac=OTHER_MAC)
        self.fake.gone.add(self.fake.namespaces['/a'])
        self.sync()
        self.assertEqual(({POD}, set()), (self.routed(), self.recorded()))

    def test_a_lost_ledger(self) -> None:
        self.bind(POD)
        shutil.rmtree(self.state)
        self.fake.macvlans_found = [kernel.Macvlan(
            '/a', self.fake.namespaces['/a'], 'eth0', dataclasses.replace(
                self.fake.links['eth0'], name='eth0', mac=MAC), (POD,))]
        self.assertEqual([POD], [each.address for each
                                 in self.sync().rebuilt])
        self.assertEqual(({POD}, {POD}), (self.routed(), self.recorded()))

    def test_unmatched_items_are_not_rebuilt(self) -> None:
        self.bind(POD)
        shutil.rmtree(self.state)
        mine = dataclasses.replace(self.fake.links['eth0'], mac=MAC)
        for macvlan in (
                kernel.Macvlan('/a', self.fake.namespaces['/a'], 'eth0',
                               mine, (OTHER,)),
                kernel.Macvlan('/a', self.fake.namespaces['/a'], 'eth1',
                               mine, (POD,)),
                kernel.Macvlan('/a', self.fake.namespaces['/a'], 'eth0',
                               dataclasses.replace(mine, mac=OTHER_MAC),
                               (POD,))):
            self.fake.macvlans_found = [macvlan]
            self.assertEqual((), self.sync().rebuilt)
            self.assertEqual({POD}, self.routed())

    def test_the_newest_claim_wins_and_the_other_comes_back(self) -> None:
        self.bind(POD)
        self.bind(POD, owner=OTHER_OWNER, netns='/b', mac=OTHER_MAC)
        index = self.fake.links['break0'].index
        self.assertEqual(OTHER_MAC, self.fake.known[index, POD].mac)
        self.fake.gone.add(self.fake.namespaces['/b'])
        self.sync()
        self.sync()
        self.assertEqual(MAC, self.fake.known[index, POD].mac)
        self.assertEqual({POD}, self.routed())

    def test_a_repair_is_counted_by_the_claim_on_its_address(self) -> None:
        self.bind(POD)
        index = self.fake.links['break0'].index
        for table, unclaimed, reason in (
                (100, POD, journal.Done.ROUTE),
                (254, OTHER, journal.Done.UNCLAIMED)):
            with self.subTest(reason=reason):
                self.ledger().journal.drain()
                self.fake.set_route(HostRoute(unclaimed, index, 176, table))
                reconciler.Reconciler(self.options(), self.ledger()).sync(
                    prune=True)
                self.assertEqual([], self.fake.routes_to(unclaimed, table))
                self.assertEqual([(reason, 1)], [
                    each[:2] for each in self.ledger().journal.drain()])

    def test_a_repair_is_counted_by_the_claim_on_another_parent(self) -> None:
        self.fake.add_link('eth1')
        self.bind(POD)
        self.bind(OTHER, owner=OTHER_OWNER, netns='/b', parent='eth1')
        self.ledger().journal.drain()
        self.fake.set_route(HostRoute(
            OTHER, self.fake.links['break0'].index, 176, 254, None, 50))
        self.sync()
        self.assertEqual(1, len(self.fake.routes_to(OTHER, 254)))
        self.assertEqual([(journal.Done.ROUTE, 1)], [
            each[:2] for each in self.ledger().journal.drain()])

    def test_each_record_is_parsed_once(self) -> None:
        addresses = [POD + number for number in range(20)]
        self.bind(*addresses)
        for fault in (lambda: None, lambda: self.fake.replace(
                self.fake.links['break0'], mtu=1400)):
            fault()  # after a repair, sync reads the kernel again
            with mock.patch.object(records, 'from_json',
                                   side_effect=records.from_json) as parsed:
                self.sync()
            self.assertLessEqual(parsed.call_count, len(addresses) + 1)
        self.assertEqual(1500, self.fake.links['break0'].mtu)

    def test_parents_are_apart(self) -> None:
        self.fake.add_link('eth1')
        self.bind(POD)
        self.bind(OTHER, owner=OTHER_OWNER, netns='/b', parent='eth1')
        self.fake.host.clear()
        del self.fake.links['eth0']
        errors = self.sync().errors
        self.assertEqual([exceptions.ParentNotFound],
                         [type(err) for err in errors])
        self.assertEqual({OTHER}, self.routed())


class TestDevice(EngineTestCase):

    def ensure(self, **overrides: Any) -> device.Ensured:
        made = device.Device(self.options(**overrides), 'break0', 'eth0',
                             self.identity)
        with kernel.Netlink() as netlink:
            return made.ensure(netlink, '02:00:00:00:00:07')

    def setUp(self) -> None:
        super().setUp()
        made = self.ledger()
        made.prepare()
        self.identity = made.ensure_identity()

    def test_it_is_made_once(self) -> None:
        first, second = self.ensure(), self.ensure()
        self.assertTrue(first.needs_sync)
        self.assertEqual((False, ()), second[1:])
        self.assertEqual(first.link, second.link)
        self.assertTrue(first.link.up and not first.link.multicast)
        self.assertEqual(str(self.identity.alias(self.state)),
                         first.link.alias)

    def test_it_is_silent_before_it_is_up(self) -> None:
        order: list[str] = []
        write, up = self.fake.write_sysctl, fake.FakeNetlink.set_link_up
        with mock.patch.object(
                kernel, 'write_sysctl', lambda path, *rest: (
                    order.append(path), write(path, *rest))), \
                mock.patch.object(
                    fake.FakeNetlink, 'set_link_up', lambda *args: (
                        order.append('up'), up(*args))):
            self.ensure()
        self.assertLessEqual(
            {path % 'break0' for path in (*device.QUIET, *device.BORDER)},
            set(order[:order.index('up')]))

    def test_one_that_cannot_be_finished_is_gone_again(self) -> None:
        with mock.patch.object(
                fake.FakeNetlink, 'set_link_up',
                side_effect=exceptions.KernelRefused('up', 'no', 1)):
            with self.assertRaises(exceptions.KernelRefused):
                self.ensure()
        self.assertNotIn('break0', self.fake.links)

    def test_a_break0_with_an_error_at_its_creation(self) -> None:
        """A created break0 is used, even if its creation reports an error.

        IPDB reports an error if all tries of its dump are interrupted.
        """
        def late(name: str, parent: kernel.Link, mac: str) -> None:
            self.fake.create_macvlan(name, parent, mac)
            raise exceptions.KernelRefused('create', 'there is one', 17)

        with mock.patch.object(kernel, 'create_macvlan', late), \
                self.assertLogs('kuryr_break0.break0.device', 'INFO') as logs:
            ensured = self.ensure()
        self.assertTrue(ensured.link.up)
        self.assertTrue(ensured.needs_sync)
        self.assertEqual(('it was missing',), ensured.repaired)
        self.assertIn('Created break0', '\n'.join(logs.output))
        self.assertIn('break0', self.fake.links)

    def test_each_difference_is_repaired(self) -> None:
        self.ensure()
        for change in ({'up': False}, {'mtu': 1400}, {'multicast': True},
                       {'alias': 'mine'}, {'alias': None},
                       {'protodown': True}):
            with self.subTest(change=change):
                self.fake.replace(self.fake.links['break0'], **change)
                self.assertEqual('up' in change, self.ensure().needs_sync)
                self.assertEqual((), self.ensure().repaired)
        for path in device.QUIET:
            self.fake.sysctls[path % 'break0'] = 7
            self.assertEqual(1, len(self.ensure().repaired))

    def test_an_address_is_put_once(self) -> None:
        for _ in range(3):
            self.ensure(addr=['10.0.0.7'])
        self.assertEqual(1, [address for _, address in self.fake.owned
                             ].count(ipaddress.ip_address('10.0.0.7')))

    def test_others_are_left_as_they_are(self) -> None:
        for fields in ({'kind': 'veth'}, {'kind': None},
                       {'kind': 'macvlan', 'mode': 'private', 'lower': 1},
                       {'kind': 'macvlan', 'mode': 'bridge', 'lower': 99},
                       {'kind': 'macvlan', 'mode': 'bridge', 'lower': 1,
                        'lower_namespace': 3}):
            before = self.fake.add_link('break0', **fields)
            with self.assertRaises(exceptions.DeviceConflict):
                self.ensure()
            self.assertEqual(before, self.fake.links['break0'])
