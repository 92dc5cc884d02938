# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import os
from typing import Any, Callable
from unittest import mock

from kuryr_break0.break0 import guard
from kuryr_break0.engine import apply
from kuryr_break0.engine import housekeeping
from kuryr_break0.engine import reconciler
from kuryr_break0 import exceptions
from kuryr_break0 import kernel
from kuryr_break0 import ledger
from kuryr_break0.ledger import cache
from kuryr_break0.ledger import files
from kuryr_break0.ledger import journal
from kuryr_break0.ledger import records
from tests.functional import base
from tests.functional.base import OTHER_POD
from tests.functional.base import POD
from tests.support import lab

PODS = {'100.75.30.%d' % number for number in range(100, 120)}


class SyncTestCase(base.LabTestCase):

    def setUp(self) -> None:
        super().setUp()
        self.bind(*sorted(PODS))
        self.healthy = self.lab.routes()
        self.assertEqual(PODS, set(self.healthy))

    def sync(self, dry_run: bool = False,
             **overrides: Any) -> reconciler.Outcome:
        return self.manager(**overrides).sync(dry_run)

    def assert_healed(self, *, changed: bool = True) -> None:
        """Expect a sync to restore all, and a second sync to do nothing."""
        self.assertEqual(changed, bool(self.sync()))
        self.assertEqual(self.healthy, self.lab.routes())
        self.assertFalse(self.sync())


class TestFaults(SyncTestCase):

    def test_none(self) -> None:
        self.assert_healed(changed=False)

    def test_look_ups_do_not_hold_the_lock(self) -> None:
        self.lab.run('ip', 'route', 'flush', 'dev', 'break0')
        state = ledger.Ledger(base.options().state_dir)
        were_free: list[bool] = []

        def seen(*args: Any, **kwargs: Any) -> None:
            were_free.append(state.is_free_within(0))

        with mock.patch.object(guard.Guard, 'release', seen), \
                mock.patch.object(journal.Journal, 'add', seen), \
                mock.patch.object(apply.LOG, 'info', seen), \
                mock.patch.object(records.Records, 'addresses',
                                  side_effect=AssertionError):
            self.sync()
        self.assertLess(len(PODS), len(were_free))
        self.assertEqual({True}, set(were_free))
        self.assert_healed(changed=False)

    def test_break0_deleted(self) -> None:
        before = self.lab.link('break0') or {}
        self.lab.run('ip', 'link', 'del', 'break0')
        self.assert_healed()
        after = self.lab.link('break0') or {}
        self.assertEqual(before['address'], after['address'])

    def test_break0_down(self) -> None:
        self.lab.run('ip', 'link', 'set', 'break0', 'down')
        self.assert_healed()

    def test_break0_down_and_up(self) -> None:
        self.lab.run('ip', 'link', 'set', 'break0', 'down')
        self.lab.run('ip', 'link', 'set', 'break0', 'up')
        self.assert_healed()

    def test_break0_renamed(self) -> None:
        # The kernel refuses a second macvlan with the MAC address of break0.
        self.lab.run('ip', 'link', 'set', 'break0', 'name', 'mine')
        with self.assertRaisesRegex(exceptions.KernelRefused,
                                    'set up the interface break0: Address '
                                    'already in use.*restore its name'):
            self.sync()
        self.assertEqual(PODS, set(self.lab.routes('mine')))
        self.lab.run('ip', 'link', 'set', 'mine', 'name', 'break0')
        self.assert_healed(changed=False)

    def test_parent_deleted_and_created_again(self) -> None:
        self.lab.run('ip', 'link', 'del', lab.PARENT)
        with self.assertRaises(exceptions.ParentNotFound):
            self.sync()
        self.lab.add_nic()
        self.assert_healed()

    def test_address_of_the_node_removed_and_added(self) -> None:
        self.lab.run('ip', 'address', 'del', lab.NODE + '/24',
                     'dev', lab.PARENT)
        self.assertEqual({}, self.lab.routes())
        self.lab.run('ip', 'address', 'add', lab.NODE + '/24',
                     'dev', lab.PARENT)
        self.assert_healed()

    def test_address_of_the_node_changed(self) -> None:
        self.lab.run('ip', 'address', 'del', lab.NODE + '/24',
                     'dev', lab.PARENT)
        self.lab.run('ip', 'address', 'add', '100.75.30.52/24',
                     'dev', lab.PARENT)
        self.sync()
        routes = self.lab.routes()
        self.assertEqual(PODS, set(routes))
        self.assertEqual({'100.75.30.52'},
                         {route['prefsrc'] for route in routes.values()})

    def test_routes_deleted(self) -> None:
        self.lab.run('ip', 'route', 'del', '100.75.30.100')
        self.assert_healed()
        self.lab.run('ip', 'route', 'flush', 'dev', 'break0')
        self.assert_healed()

    def test_routes_changed(self) -> None:
        for change in (('dev', 'break0', 'proto', '176'),  # no src
                       ('dev', 'break0', 'proto', 'static'),
                       ('dev', 'lo', 'proto', '176'),
                       ('via', lab.LAN, 'proto', '176'),
                       ('dev', 'break0', 'scope', 'host', 'proto', '176')):
            with self.subTest(change=change):
                self.lab.run('ip', 'route', 'replace', '100.75.30.100',
                             *change)
                self.assertNotEqual(self.healthy, self.lab.routes())
                self.assert_healed()

    def test_a_bind_that_finds_break0_gone_restores_all(self) -> None:
        for fault in (('del', 'break0'), ('set', 'break0', 'down')):
            with self.subTest(fault=fault):
                self.lab.run('ip', 'link', *fault)
                self.bind(POD)
                self.assertEqual(PODS | {POD}, set(self.lab.routes()))
                self.unbind(POD)

    def test_dry_run_changes_nothing(self) -> None:
        self.lab.run('ip', 'route', 'del', '100.75.30.100')
        before = self.lab.routes()
        plan = self.sync(dry_run=True)
        self.assertEqual(['100.75.30.100'],
                         [str(route.dst) for route in plan.set])
        self.assertEqual(before, self.lab.routes())


class TestMeanwhile(SyncTestCase):
    """The ledger changes after a sync has read it."""

    ADDRESS = '100.75.30.100'

    def sync_while(self, change: Callable[[], object]) -> None:
        """Sync, with a change between the snapshot and the repairs."""
        read = reconciler.actual.read
        changed = []

        def read_and_change(*args: Any, **known: Any) -> Any:
            seen = read(*args, **known)
            if not changed:
                changed.append(True)
                # The sync has planned repairs.
                self.assertTrue(any(parent.plan for parent
                                    in seen.parents.values()))
                change()
            return seen

        self.lab.run('ip', 'route', 'del', self.ADDRESS)
        self.lab.run('ip', 'neigh', 'flush', 'dev', 'break0',
                     'nud', 'permanent')
        with mock.patch.object(reconciler.actual, 'read',
                               read_and_change):
            self.sync()

    def test_unbound(self) -> None:
        self.sync_while(lambda: self.unbind(self.ADDRESS))
        self.assertEqual(PODS - {self.ADDRESS}, set(self.lab.routes()))

    def test_bound_by_another(self) -> None:
        # The new pod has another MAC address than the planned neighbour.
        self.bind(self.ADDRESS, mac_of_pod='fa:16:3e:00:00:01')
        self.sync_while(lambda: self.bind(
            self.ADDRESS, owner=base.OTHER_OWNER,
            mac_of_pod='fa:16:3e:00:00:02'))
        self.assertEqual(['fa:16:3e:00:00:02'], [
            each['lladdr'] for each in self.lab.ip(
                'neigh', 'show', self.ADDRESS, 'dev', 'break0')])


class TestWithoutAgent(SyncTestCase):
    """Faults are repaired at the next ADD or DEL on the node."""

    def next_pod(self) -> None:
        """Bind a pod and housekeep, as the driver does for an ADD."""
        self.bind(POD)
        self.manager().housekeep()

    def test_restored(self) -> None:
        for fault in ('ip link del break0', 'ip link set break0 down',
                      'ip link set break0 down; ip link set break0 up',
                      'ip address del %s/24 dev eth0; '
                      'ip address add %s/24 dev eth0' % (lab.NODE, lab.NODE),
                      'ip route flush dev break0',
                      'ip route del 100.75.30.100'):
            with self.subTest(fault=fault):
                self.lab.run('sh', '-c', fault)
                self.assertNotEqual(self.healthy, self.lab.routes())
                self.next_pod()
                after = self.lab.routes()
                self.assertEqual({**self.healthy, POD: after[POD]}, after)
                self.unbind(POD)

    def test_by_a_del_too(self) -> None:
        self.next_pod()
        self.lab.run('ip', 'route', 'flush', 'dev', 'break0')
        self.unbind(POD)
        self.manager().housekeep()
        self.assertEqual(self.healthy, self.lab.routes())

    def test_an_impossible_repair_is_tried_once(self) -> None:
        self.lab.run('ip', 'route', 'replace', '100.75.30.100', 'dev', 'lo')
        with self.assertLogs('kuryr_break0', 'ERROR') as logs:
            self.next_pod()
        self.assertIn('100.75.30.100 has a foreign route',
                      '\n'.join(logs.output))
        with self.quiet():
            self.next_pod()
        self.assertIn('100.75.30.100', self.lab.routes('lo'))

    def test_a_route_through_a_pod_hides_none(self) -> None:
        self.bind('fd00:30::71')
        for pod, beyond in (('100.75.30.100', '192.0.2.1'),
                            ('fd00:30::71', 'fd02::1')):
            with self.subTest(pod=pod):
                self.lab.run('ip', 'route', 'add', beyond, 'via', pod)
                self.lab.run('ip', 'route', 'del', pod)
                self.next_pod()
                self.assertLessEqual({pod, beyond}, set(self.lab.routes()))
                self.lab.run('ip', 'route', 'del', beyond)

    def test_that_is_left_to_an_agent(self) -> None:
        own = base.options()
        with ledger.Ledger(own.state_dir).heartbeat.keep():
            self.lab.run('ip', 'route', 'flush', 'dev', 'break0')
            self.next_pod()
            self.assertEqual({POD}, set(self.lab.routes()))
        self.next_pod()
        self.assertEqual({*self.healthy, POD}, set(self.lab.routes()))

    def test_that_is_not_left_to_an_agent_that_hangs(self) -> None:
        own = base.options()
        found = ledger.Ledger(own.state_dir)
        with found.heartbeat.keep() as beat:
            self.lab.run('ip', 'route', 'flush', 'dev', 'break0')
            with mock.patch.object(files, 'now', return_value=(
                    files.now() - 200)):
                beat()
            self.next_pod()
            self.assertEqual({*self.healthy, POD}, set(self.lab.routes()))
            self.lab.run('ip', 'route', 'flush', 'dev', 'break0')
            beat()
            self.unbind(POD)
            self.assertEqual({}, self.lab.routes())


class TestForeign(SyncTestCase):

    def setUp(self) -> None:
        super().setUp()
        self.lab.run('ip', 'route', 'replace', '100.75.30.100', 'dev', 'lo')

    def test_reported_and_left_alone(self) -> None:
        with self.assertLogs('kuryr_break0', 'ERROR') as logs:
            plan = self.sync()
        self.assertIn('100.75.30.100 has a foreign route',
                      '\n'.join(logs.output))
        self.assertEqual(1, len(plan.foreign))
        self.assertIn('100.75.30.100', self.lab.routes('lo'))


class TestUnclaimed(SyncTestCase):
    """An unclaimed route is kept unless its pod is known to be gone."""

    def setUp(self) -> None:
        super().setUp()
        self.lab.run('ip', 'route', 'add', POD, 'dev', 'break0',
                     'proto', '176')

    def test_it_stays_and_is_reported(self) -> None:
        for _ in range(3):
            outcome = self.sync()
            self.assertEqual([POD], [str(each.dst)
                                     for each in outcome.unclaimed])
        self.assertIn(POD, self.lab.routes())
        self.assertEqual(['no container claims it'], self.problems())

    def test_an_unclaimed_route_is_deleted_on_request(self) -> None:
        own = base.options()
        reconcile = reconciler.Reconciler(
            own, ledger.Ledger(own.state_dir)).sync
        self.assertIn(POD, {str(each.dst) for each in reconcile(
            dry_run=True, prune=True).unset})
        self.assertIn(POD, self.lab.routes())
        self.assertEqual((), reconcile(prune=True).errors)
        self.assertEqual(self.healthy, self.lab.routes())

    def test_one_that_is_bound_meanwhile_stays(self) -> None:
        self.sync()
        self.bind(POD)
        self.sync()
        self.assertEqual(PODS | {POD}, set(self.lab.routes()))
        self.assertEqual([], self.problems())

    def test_a_route_with_an_unreadable_record_stays(self) -> None:
        self.bind(POD)
        with open('/run/kuryr-break0/addresses/%s.json' % POD, 'w') as file:
            file.write('damaged')
        self.sync()
        self.assertIn(POD, self.lab.routes())

    def test_one_of_another_protocol_stays(self) -> None:
        self.lab.run('ip', 'route', 'add', OTHER_POD, 'dev', 'break0',
                     'proto', 'static')
        self.assertEqual([POD], [str(each.dst)
                                 for each in self.sync().unclaimed])
        self.assertEqual(PODS | {POD, OTHER_POD}, set(self.lab.routes()))


class TestSandboxGone(SyncTestCase):

    def setUp(self) -> None:
        super().setUp()
        self.netns = self.lab.add_netns('pod')
        self.bind(POD, netns=self.netns)

    def assert_gone(self) -> None:
        self.assertEqual(self.healthy, self.lab.routes())
        self.assertEqual(PODS, self.bound())

    def test_a_living_one_stays(self) -> None:
        self.sync()
        self.manager().housekeep()
        self.assertIn(POD, self.lab.routes())

    def test_sync(self) -> None:
        self.lab.del_netns('pod')
        self.sync()
        self.assert_gone()

    def test_prune(self) -> None:
        self.lab.del_netns('pod')
        self.manager().housekeep()
        self.assert_gone()

    def test_another_one_at_its_path(self) -> None:
        self.lab.del_netns('pod')
        self.lab.add_netns('between')  # takes the old inode number
        self.lab.add_netns('pod')
        self.manager().housekeep()
        self.assert_gone()

    def test_a_path_that_cannot_be_seen_from_here_says_nothing(self) -> None:
        os.makedirs('/run/host_proc/1')
        os.makedirs('/run/host_proc/42/ns')
        os.symlink(self.netns, '/run/host_proc/42/ns/net')
        self.bind(POD, netns='/run/host_proc/42/ns/net')
        os.rename('/run/host_proc', '/run/not_mounted_here')
        self.manager().housekeep()
        self.assertIn(POD, self.lab.routes())
        self.lab.del_netns('pod')  # the namespace's number ends too
        self.manager().housekeep()
        if self.is_blind():
            self.assertIn(POD, self.lab.routes())
        else:
            self.assert_gone()

    def test_many_are_looked_at_in_turn(self) -> None:
        self.lab.del_netns('pod')
        with mock.patch.object(housekeeping, 'EXAMINED', 4):
            for _ in range(6):
                self.manager().housekeep()
        self.assert_gone()


class TestSteps(SyncTestCase):
    """A sync repairs the state after a kill at any step."""

    STEPS = ((records.Records, 'put'), (records.Records, 'remove'),
             (cache.Cache, 'put'), (kernel.Netlink, 'change'),
             (kernel.Netlink, 'link'),
             (kernel.Netlink, 'set_link_up'), (kernel, 'create_macvlan'),
             (kernel, 'write_sysctl'))

    def die_after(self, number: int) -> None:
        """Let this process kill itself after this number of steps."""
        left = number

        def counted(original: Any) -> Any:
            def step(*args: Any, **kwargs: Any) -> Any:
                nonlocal left
                result = original(*args, **kwargs)
                left -= 1
                if left == 0:
                    base.die()
                return result
            return step

        for owner, name in self.STEPS:
            setattr(owner, name, counted(getattr(owner, name)))

    def every_step(self, what: Any, expected: Any) -> int:
        """Kill ``what`` after each step in turn; return the number of steps.

        Expect that a sync after each kill restores the expected addresses.
        """
        for number in range(1, 200):
            def run(number: int = number) -> None:
                self.die_after(number)
                what()

            ended = base.wait_for(base.in_child(run))
            self.sync()
            self.assertEqual(expected(), set(self.lab.routes()), number)
            self.assertEqual(expected(), self.bound(), number)
            if ended == 0:
                return number - 1
            self.assertEqual(-9, ended)
        self.fail('it does not get through')

    def test_bind(self) -> None:
        def bind() -> None:
            self.lab.run('ip', 'link', 'del', 'break0', check=False)
            self.bind(POD)

        steps = self.every_step(bind, lambda: PODS | (self.bound() & {POD}))
        self.assertGreater(steps, 10)

    def test_unbind(self) -> None:
        def unbind() -> None:
            self.bind(POD)
            self.unbind(POD)

        steps = self.every_step(unbind, lambda: PODS | (self.bound() & {POD}))
        self.assertGreater(steps, 3)

    def test_sync(self) -> None:
        def sync() -> None:
            self.lab.run('ip', 'link', 'del', 'break0', check=False)
            self.sync()

        self.assertGreater(self.every_step(sync, lambda: PODS), 10)
