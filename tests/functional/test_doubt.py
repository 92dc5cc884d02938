# SPDX-License-Identifier: Apache-2.0

"""No fault of ledger, clock or view of namespaces costs a pod its route.

A fault of one record does not affect other records.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import json
import logging
import os
import shutil
import subprocess
from typing import Any, Optional
from unittest import mock

from kuryr_break0.break0 import devices
from kuryr_break0.engine import rebuild
from kuryr_break0.engine import reconciler
from kuryr_break0 import exceptions
from kuryr_break0 import kernel
from kuryr_break0.kernel import namespaces
from kuryr_break0 import ledger
from kuryr_break0.ledger import cache
from kuryr_break0.ledger import lock
from kuryr_break0.ledger import records
from kuryr_break0.model import Owner
from tests.functional import base
from tests.functional.base import OTHER_OWNER
from tests.functional.base import OTHER_POD
from tests.functional.base import OWNER
from tests.functional.base import POD
from tests.functional import cli_base
from tests.support import lab
from tests.support import program

MAC = 'fa:16:3e:00:00:%02x'
STATE = '/run/kuryr-break0'
POD6 = 'fd00:30::71'


class DoubtTestCase(base.LabTestCase):
    """A node with two bound pods, each in its own namespace."""

    def setUp(self) -> None:
        super().setUp()
        self.netns = self.lab.add_pod('pod', POD, mac=MAC % 1)
        self.other_netns = self.lab.add_pod('other', OTHER_POD, mac=MAC % 2)
        self.bind(POD, netns=self.netns, mac_of_pod=MAC % 1)
        self.bind(OTHER_POD, owner=OTHER_OWNER, netns=self.other_netns,
                  mac_of_pod=MAC % 2)

    def reconcile(self, **overrides: Any) -> reconciler.Outcome:
        """Reconcile three times like an agent; return the first outcome."""
        own = base.options(**overrides)
        reconcile = reconciler.Reconciler(
            own, ledger.Ledger(own.state_dir)).sync
        first = reconcile()
        for _ in range(2):
            reconcile()
        return first

    def file(self, address: str = POD) -> str:
        return '%s/addresses/%s.json' % (STATE, address)

    def assert_reachable(self, *addresses: str) -> None:
        for address in addresses or (POD, OTHER_POD):
            self.assertTrue(self.lab.ping(address), address)
        for netns in ('pod', 'other'):
            self.assertTrue(self.lab.ping(lab.NODE, netns), netns)


class TestViews(DoubtTestCase):
    """A namespace with a hidden or wrong path keeps its record."""

    def setUp(self) -> None:
        super().setUp()
        # A process keeps the namespace alive without its path.
        process = subprocess.Popen(
            ['ip', 'netns', 'exec', 'pod', 'sh', '-c', 'echo; exec cat'],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self.addCleanup(process.__exit__, None, None, None)
        self.addCleanup(process.kill)
        assert process.stdout is not None
        process.stdout.read(1)
        self.process = process.pid

    def show(self, *commands: str) -> None:
        """Replace the path of the pod's namespace.

        Each command is a shell command with %s for the path.
        """
        for command in ('umount -l %s 2>/dev/null', 'rm -rf %s', *commands):
            self.lab.run('sh', '-c', command % self.netns, check=False)

    def assert_untouched(self, **overrides: Any) -> None:
        self.reconcile(**overrides)
        self.manager(**overrides).housekeep()
        self.assertTrue(self.lab.ping(POD, cold=False))
        self.assertIn(POD, self.bound())

    PATHS = ('touch %s', 'mkdir %s', 'mkfifo %s', 'ln -s /dev/zero %s',
             'ln -s /nowhere %s')

    def test_a_path_that_shows_nothing(self) -> None:
        for command in (*self.PATHS, 'true %s'):
            with self.subTest(command=command):
                self.show(command)
                self.assert_untouched()

    def test_on_a_kernel_that_does_not_number_namespaces(self) -> None:
        with mock.patch.object(namespaces, '_NS_GET_ID', 0):
            self.bind(POD, netns=self.netns, mac_of_pod=MAC % 1)
            record = self.snapshot().live[base.addresses(POD)[0]]
            assert record.namespace is not None
            self.assertIsNone(record.namespace.cookie)
            for command in self.PATHS:
                with self.subTest(command=command):
                    self.show(command)
                    self.assert_untouched()
            self.lab.del_netns('other')  # the directory shows no namespace now
            self.lab.run('mount', '-t', 'tmpfs', 'hidden', '/run/netns')
            self.reconcile()
            self.assertIn(POD, self.bound())
            self.lab.run('umount', '/run/netns')

    def test_another_process_namespace(self) -> None:
        # In another process namespace, the recorded path /proc/PID belongs to
        # another process.
        record = self.snapshot().live[base.addresses(POD)[0]]
        ledger.Ledger(STATE, 10).records.put([dataclasses.replace(
            record, netns='/proc/1/ns/net')])
        self.assert_untouched()

    def test_an_inode_that_is_used_again(self) -> None:
        record = self.snapshot().live[base.addresses(POD)[0]]
        assert record.namespace is not None
        if record.namespace.cookie is None:
            self.skipTest('needs numbers of namespaces, Linux 6.18')
        os.kill(self.process, 9)
        # The kernel reuses the inode for the next namespace in about half of
        # all attempts.
        for _ in range(50):
            self.lab.del_netns('pod')
            self.netns = self.lab.add_netns('pod')
            found = kernel.identify(self.netns)
            assert found is not None
            if found[:2] == record.namespace[:2]:
                break
        else:  # another program has the inode
            records.Records(STATE + '/addresses', STATE).put([
                dataclasses.replace(record, namespace=found._replace(
                    cookie=record.namespace.cookie))])
        self.assertNotEqual(record.namespace.cookie, found.cookie)
        self.reconcile()
        self.assertEqual({OTHER_POD}, set(self.lab.routes()))
        self.assertEqual({OTHER_POD}, self.bound())


class TestLostLedger(DoubtTestCase):

    def assert_rebuilt(self, *addresses: str) -> None:
        outcome = self.reconcile()
        self.assertEqual((), outcome.errors)
        self.assertEqual(set(addresses), {str(each.address)
                                          for each in outcome.rebuilt})
        self.assert_reachable()
        self.assertEqual({POD, OTHER_POD}, self.bound())
        self.assertEqual([], self.problems())

    def test_wiped(self) -> None:
        shutil.rmtree(STATE)
        self.assertIn('was lost', '\n'.join(self.problems()))
        self.assert_rebuilt(POD, OTHER_POD)

    def test_emptied(self) -> None:
        for name in os.listdir(STATE):
            path = os.path.join(STATE, name)
            shutil.rmtree(path) if os.path.isdir(path) else os.unlink(path)
        self.assert_rebuilt(POD, OTHER_POD)

    def test_one_record(self) -> None:
        os.unlink(self.file())
        self.assertEqual(['no container claims it'], self.problems())
        self.assert_rebuilt(POD)

    def test_one_damaged_record(self) -> None:
        with open(self.file(), 'w') as file:
            file.write('{')
        self.assert_rebuilt(POD)

    def test_another_sync_is_faster(self) -> None:
        os.unlink(self.file())
        find = rebuild.find

        def and_another_sync(*args: Any) -> list[Any]:
            found = list(find(*args))
            with mock.patch.object(rebuild, 'find', find):
                self.assert_rebuilt(POD)
            return found

        with mock.patch.object(rebuild, 'find', and_another_sync):
            outcome = self.manager().sync()
        self.assertEqual(((), ()), (outcome.rebuilt, outcome.unclaimed))

    def test_a_rebuilt_record_ends_with_its_pod(self) -> None:
        shutil.rmtree(STATE)
        self.assert_rebuilt(POD, OTHER_POD)
        # The DEL, with namespace and MAC address, unbinds the first pod.
        self.manager().unbind(OWNER, base.addresses(POD), self.netns,
                              MAC % 1)
        self.assertEqual({OTHER_POD}, set(self.lab.routes()))
        # The end of its namespace unbinds the second pod.
        self.lab.del_netns('other')
        self.reconcile()
        self.assertEqual({}, self.lab.routes())

    def test_an_unmatched_route_stays(self) -> None:
        shutil.rmtree(STATE)
        # The first pod has lost its address, the second has a new MAC
        # address.
        self.lab.run('ip', 'address', 'flush', 'dev', 'eth0', netns='pod')
        self.lab.run('ip', 'link', 'set', 'eth0', 'address',
                     '02:00:00:00:00:99', netns='other')
        outcome = self.reconcile()
        self.assertEqual((), outcome.rebuilt)
        self.assertEqual({POD, OTHER_POD}, set(self.lab.routes()))
        self.assertEqual(2, self.problems().count('no container claims it'))

    def test_another_one_with_its_address_and_mac_address(self) -> None:
        """A rebuild prefers the interface that is up.

        The kernel permits a second macvlan with the same MAC address only
        while one of the two is down.
        """
        self.lab.add_pod('evil')
        for command in ('link add mv0 link eth0 address %s type macvlan mode '
                        'bridge' % (MAC % 1),
                        'address add %s/24 dev mv0' % POD):
            self.lab.run('ip', *command.split(), netns='evil')
        shutil.rmtree(STATE)
        self.assert_rebuilt(POD, OTHER_POD)
        self.assertEqual(self.netns, self.snapshot().live[
            base.addresses(POD)[0]].netns)

    def test_a_dry_run_says_it_and_does_nothing(self) -> None:
        os.unlink(self.file())
        outcome = self.manager().sync(dry_run=True)
        self.assertEqual([POD], [str(each.address)
                                 for each in outcome.rebuilt])
        self.assertEqual({OTHER_POD}, self.bound())

    def test_a_dry_run_deletes_nothing_that_is_rebuilt(self) -> None:
        os.unlink(self.file())
        own = base.options()
        outcome = reconciler.Reconciler(
            own, ledger.Ledger(own.state_dir, 10)).sync(
                dry_run=True, prune=True)
        self.assertEqual(1, len(outcome.rebuilt))
        self.assertEqual(((), ()), (outcome.unclaimed, outcome.unset))

    def test_a_pod_bound_on_a_full_disk_is_recorded_later(self) -> None:
        self.unbind(POD)
        with mock.patch.object(records.files, 'replace', side_effect=OSError(
                errno.ENOSPC, 'No space left on device')):
            with self.assertLogs('kuryr_break0', 'ERROR'):
                self.bind(POD, netns=self.netns, mac_of_pod=MAC % 1)
        self.assertTrue(self.lab.ping(POD))
        self.assertEqual({OTHER_POD}, self.bound())
        self.assert_rebuilt(POD)

    def test_the_record_before_does_not_unbind_the_new_pod(self) -> None:
        # The full disk keeps the old record, so the DEL of the old pod finds
        # the old record.
        self.lab.add_pod('new', mac=MAC % 3)
        with mock.patch.object(records.files, 'replace', side_effect=OSError(
                errno.ENOSPC, 'No space left on device')):
            with self.assertLogs('kuryr_break0', 'ERROR'):
                self.bind(POD, owner=Owner('new', 'eth0'),
                          netns='/run/netns/new', mac_of_pod=MAC % 3)
        self.unbind(POD)
        self.assertIn(POD, self.lab.routes())
        self.assertEqual({OTHER_POD}, self.bound())


class TestOtherLedger(DoubtTestCase):

    def test_the_end_of_a_sandbox_is_said_as_it_is(self) -> None:
        """A sync removes an ended claim, but no route of another ledger."""
        self.bind('100.75.30.99', owner=Owner('new', 'eth0'),
                  state_dir='/run/other')
        self.lab.del_netns('other')
        with self.assertLogs('kuryr_break0', 'INFO') as logs:
            with self.assertRaises(exceptions.OtherLedger):
                self.manager().sync()
        self.assertIn('removed its claim on ' + OTHER_POD, str(logs.output))
        self.assertNotIn(OTHER_POD + ' from break0', str(logs.output))
        self.assertIn(OTHER_POD, self.lab.routes())

    def test_an_agent_with_another_directory(self) -> None:
        outcome = self.reconcile(state_dir='/run/other')
        self.assert_reachable()
        self.assertFalse(outcome)
        problems = '\n'.join(self.problems(state_dir='/run/other'))
        self.assertIn('belongs to the ledger', problems)
        self.assertIn(STATE, problems)
        self.assertEqual([], self.problems())

    def test_the_earlier_ledger_repairs_nothing(self) -> None:
        self.bind('100.75.30.80', state_dir='/run/other',
                  owner=Owner('c', 'eth0'), mac_of_pod=MAC % 9)
        self.bind(POD, netns=self.netns, mac_of_pod=MAC % 1)
        with mock.patch.object(cache, 'MAX_AGE', 0):
            self.bind(POD, netns=self.netns, mac_of_pod=MAC % 1)
        self.lab.run('ip', 'route', 'del', '100.75.30.80')
        outcome = self.reconcile(state_dir='/run/other')
        self.assertIn('belongs to the ledger', str(outcome.errors[0]))
        self.assertEqual({POD, OTHER_POD}, set(self.lab.routes()))

    def test_a_person_says_so(self) -> None:
        own = base.options(state_dir='/run/other')
        outcome = reconciler.Reconciler(
            own, ledger.Ledger(own.state_dir, 10)).sync(claim=True)
        self.assertEqual((), outcome.errors)
        self.assertEqual(2, len(outcome.rebuilt))
        self.assertEqual([], self.problems(state_dir='/run/other'))
        # The first ledger now owns nothing: its syncs only report.
        shutil.rmtree(STATE + '/addresses')
        self.reconcile()
        self.assert_reachable()

    def test_a_dry_run_shows_the_takeover(self) -> None:
        own = base.options(state_dir='/run/other')
        outcome = reconciler.Reconciler(
            own, ledger.Ledger(own.state_dir, 10)).sync(
                dry_run=True, claim=True, prune=True)
        self.assertEqual((), outcome.errors)
        self.assertEqual(2, len(outcome.rebuilt))
        self.assertEqual(((), ()), (outcome.unclaimed, outcome.unset))
        self.assertFalse(os.path.exists('/run/other'))

    def state(self) -> list[Any]:
        return [self.lab.routes(), self.lab.link('break0'), self.lab.ip(
            'neighbour', 'show', 'dev', 'break0', 'nud', 'permanent'),
            self.lab.run('nft', 'list', 'ruleset').stdout]

    def test_unbind_changes_nothing_of_it(self) -> None:
        self.bind(POD, netns=self.netns, mac_of_pod=MAC % 1,
                  state_dir='/run/other')
        with mock.patch.object(cache, 'MAX_AGE', 0):
            self.bind(POD, netns=self.netns, mac_of_pod=MAC % 1)
            self.bind('100.75.30.90', owner=Owner('c', 'eth0'))
        before = self.state()
        with self.assertLogs('kuryr_break0', 'WARNING') as logs:
            self.assertEqual(base.addresses(POD), self.manager(
                state_dir='/run/other').unbind(OWNER, base.addresses(POD)))
            # The other ledger has no claim of these two owners.
            self.manager(state_dir='/run/other').unbind(
                OTHER_OWNER, base.addresses(OTHER_POD), mac=MAC % 2)
            self.unbind('100.75.30.90', owner=Owner('c', 'eth0'),
                        state_dir='/run/other')
        self.assertIn('belongs to the ledger', logs.output[0])
        self.assertEqual(before, self.state())
        self.assertEqual({POD, OTHER_POD, '100.75.30.90'}, self.bound())
        # The bind in the other ledger had rebuilt this record, since the
        # guard needs all pods.
        self.assertEqual({OTHER_POD}, set(map(str, self.snapshot(
            state_dir='/run/other').contents.claims)))

    def test_unbind_with_an_earlier_claim_changes_nothing_of_it(self) -> None:
        for owner, netns, number in ((OTHER_OWNER, self.other_netns, 2),
                                     (OWNER, self.netns, 1)):
            self.lab.run('ip', 'address', 'replace', POD + '/24', 'dev',
                         'eth0', netns=os.path.basename(netns))
            self.bind(POD, owner=owner, netns=netns, mac_of_pod=MAC % number,
                      state_dir='/run/other')
        with mock.patch.object(cache, 'MAX_AGE', 0):
            self.bind(POD, netns=self.netns, mac_of_pod=MAC % 1)
            before = self.state()
            self.unbind(POD, state_dir='/run/other')
        self.assertEqual(before, self.state())
        record, = self.snapshot(state_dir='/run/other').contents.claims[
            base.addresses(POD)[0]]
        self.assertEqual(OTHER_OWNER, record.owner)

    def test_unbind_after_it_was_lost(self) -> None:
        shutil.rmtree(STATE)
        self.manager().unbind(OWNER, base.addresses(POD), mac=MAC % 1)
        self.assertEqual({OTHER_POD}, set(self.lab.routes()))
        self.reconcile()
        self.assertEqual({OTHER_POD}, set(self.lab.routes()))
        self.assertTrue(self.lab.ping(OTHER_POD))
        self.assertEqual([], self.problems())

    def test_two_at_one_path_take_it_over_once(self) -> None:
        # If an agent's container does not share the daemon's state directory,
        # two directories have the same path.
        os.rename(STATE, '/run/of-the-daemon')
        self.reconcile()  # as the agent: rebuild and take over
        self.assertEqual([], self.problems())
        os.rename(STATE, '/run/of-the-agent')
        os.rename('/run/of-the-daemon', STATE)
        with mock.patch.object(cache, 'MAX_AGE', 0):
            self.bind('100.75.30.80', owner=Owner('c', 'eth0'))
        self.assertEqual([], self.problems())
        os.rename(STATE, '/run/of-the-daemon')
        os.rename('/run/of-the-agent', STATE)
        self.assertIn('belongs to the ledger', '\n'.join(self.problems()))
        self.lab.del_netns('pod')
        self.assertNotEqual((), self.reconcile().errors)
        self.assertEqual({POD, OTHER_POD, '100.75.30.80'},
                         set(self.lab.routes()))

    def test_a_device_of_before_is_claimed(self) -> None:
        self.lab.run('ip', 'link', 'set', 'break0', 'alias', 'of mine')
        self.assertTrue(self.reconcile().devices)
        self.assertEqual([], self.problems())


class TestErrorsStayWhereTheyArise(DoubtTestCase):

    def wrong_records(self) -> None:
        """Write one valid but unusable record of each kind."""
        made = ledger.Ledger(STATE, 10).records
        for number, change in enumerate((
                {'parent': 'eth7'}, {'parent': 'lo'},
                {'parent': 'an-absurdly-long-name-of-an-interface'},
                {'parent': ''}, {'parent': '../../x'},
                {'netns': '/dev/tty'}, {'netns': '/'}, {'netns': ''},
                {'mac': 'ff:ff:ff:ff:ff:ff'}, {'mac': '00:00:00:00:00:00'})):
            address, = base.addresses('100.75.30.%d' % (100 + number))
            fields: dict[str, Any] = {
                'address': address, 'owner': Owner('w%d' % number, 'eth0'),
                'parent': lab.PARENT, 'mac': MAC % 77, 'bound_at': 1e9}
            made.put([ledger.Record(**{**fields, **change})])

    def test_a_wrong_record_holds_up_no_other(self) -> None:
        self.wrong_records()
        self.lab.del_netns('other')
        self.lab.run('ip', 'link', 'del', 'break0')
        self.reconcile()
        self.assertTrue(self.lab.ping(POD))
        self.assertIn(POD, self.lab.routes())
        self.assertNotIn(OTHER_POD, self.bound())
        problems = '\n'.join(self.problems())
        self.assertIn('eth7 does not exist on this node', problems)

    def test_a_failed_change_is_no_repair(self) -> None:
        self.wrong_records()
        for dry_run in (True, False, False):
            outcome = reconciler.Reconciler(
                base.options(), ledger.Ledger(STATE)).sync(dry_run)
            self.assertNotIn('break0-lo', dict(outcome.devices))
            self.assertIn('Pods cannot be on lo: it is the loopback',
                          '\n'.join(map(str, outcome.errors)))
        self.assertIn('Pods cannot be on lo: it is the loopback',
                      '\n'.join(self.problems()))
        self.lab.run('ip', 'link', 'set', 'break0', 'down')
        with mock.patch.object(kernel.Netlink, 'set_link_up',
                               side_effect=exceptions.KernelRefused(
                                   'set it up', 'no memory', errno.ENOMEM)):
            self.assertEqual((), self.reconcile().devices)
        self.assertIn(('break0', 'it is down'), self.reconcile().devices)

    def test_a_record_of_a_broadcast_address(self) -> None:
        # A bind refuses a broadcast address. A record of a broadcast address
        # exists if an operator writes the file or the node gets a new subnet.
        made = ledger.Ledger(STATE, 10).records
        own, later = '100.75.30.255', '100.75.30.127'
        for address in (own, later):
            made.put([ledger.Record(base.addresses(address)[0], OTHER_OWNER,
                                    lab.PARENT, MAC % 2, bound_at=1.0)])
        self.assertEqual({own}, set(map(str, self.reconcile().refused)))
        self.assertEqual({POD, OTHER_POD, later}, set(self.lab.routes()))
        self.lab.run('ip', 'address', 'add', '100.75.30.126/25', 'brd', '+',
                     'dev', lab.PARENT)
        self.assertEqual({own, later}, set(map(
            str, self.reconcile().refused)))
        self.assertEqual({POD, OTHER_POD}, set(self.lab.routes()))
        self.assertIn('it is not a host address, according to the routes of '
                      'the node',
                      self.problems())

    def test_a_refused_bind_leaves_no_record(self) -> None:
        for parent, error in (('eth7', exceptions.ParentNotFound),
                              ('lo', exceptions.Break0Error)):
            with self.assertRaises(error):
                self.manager().bind(
                    Owner('c', 'eth0'), base.addresses('100.75.30.90'),
                    parent=parent, yielding=True)
        for address in (lab.NODE, lab.LAN, '224.0.0.1'):
            with self.assertRaises(exceptions.AddressRefused):
                self.bind(address, owner=Owner('c', 'eth0'))
        self.assertEqual({POD, OTHER_POD}, self.bound())
        self.assertEqual([], self.problems())

    def test_a_failed_bind_that_yields_leaves_nothing(self) -> None:
        self.lab.run('ip', 'route', 'add', '100.75.30.90', 'dev', 'lo')
        with self.assertRaises(exceptions.ForeignRoute):
            self.manager().bind(
                Owner('c', 'eth0'), base.addresses('100.75.30.90'),
                parent=lab.PARENT, mac=MAC % 9, yielding=True)
        self.assertEqual({POD, OTHER_POD}, self.bound())
        self.assertEqual([], [each for each in self.lab.ip(
            'neigh', 'show', 'dev', 'break0', 'nud', 'permanent')
            if each['dst'] == '100.75.30.90'])
        self.lab.run('ip', 'route', 'del', '100.75.30.90')
        self.manager().bind(
            Owner('d', 'eth0'), base.addresses('100.75.30.90'),
            parent=lab.PARENT, mac=MAC % 9, yielding=True)

    def test_a_batch_that_fails_is_repeated_in_halves(self) -> None:
        addresses = ['10.9.0.%d' % number for number in range(1, 120)]
        self.bind(*addresses, owner=Owner('many', 'eth0'))
        self.lab.run('ip', 'route', 'flush', 'dev', 'break0')
        send = kernel.Netlink._send

        def failing(netlink: kernel.Netlink, messages: Any) -> Any:
            if len(messages) > 3:
                raise OSError(errno.ENOBUFS, 'No buffer space available')
            return send(netlink, messages)

        with mock.patch.object(kernel.Netlink, '_send', failing):
            self.assertEqual((), self.reconcile().errors)
        self.assertLessEqual({*addresses, POD, OTHER_POD},
                             set(self.lab.routes()))

    def test_the_pod_is_recorded_before_any_failure(self) -> None:
        broken: dict[str, Any] = {
            'dump': mock.patch.object(
                kernel.Netlink, 'next_hops',
                side_effect=exceptions.KernelRefused(
                    'list the next hops', 'it changed', errno.EINTR)),
            'socket': mock.patch.object(
                kernel.Netlink, '__init__',
                side_effect=OSError(errno.EMFILE, 'Too many open files')),
            'descriptors': mock.patch.object(
                kernel, 'identify_or_fail',
                side_effect=OSError(errno.EMFILE, 'Too many open files')),
            'lock': mock.patch.object(
                lock, 'hold', side_effect=exceptions.LockTimeout(
                    path='lock', timeout=1)),
            'device': mock.patch.object(
                devices.Devices, 'ensure',
                side_effect=exceptions.KernelRefused('make', 'no', 1)),
            'change': mock.patch.object(
                kernel.Netlink, '_send',
                side_effect=OSError(errno.ENOBUFS, 'No buffer space'))}
        for number, (name, fault) in enumerate(broken.items()):
            address = '100.75.30.%d' % (110 + number)
            netns = self.lab.add_pod('pod-' + name, address,
                                     mac=MAC % (32 + number))
            with self.subTest(fault=name):
                with mock.patch.object(cache, 'MAX_AGE', 0), fault, \
                        self.assertLogs('kuryr_break0') as logs:
                    logging.getLogger('kuryr_break0').info('so that it has')
                    try:
                        self.bind(address, owner=Owner(name, 'eth0'),
                                  netns=netns, mac_of_pod=MAC % (32 + number))
                    except exceptions.Break0Error:
                        pass
                del logs
                self.assertIn(address, self.bound())
                self.reconcile()
                self.assertTrue(self.lab.ping(address))

    def test_the_first_pod_is_recorded_before_any_failure(self) -> None:
        """A bind of a new ledger reads the interfaces of the node."""
        for err in (exceptions.KernelRefused('list', 'no', errno.EINTR),
                    OSError(errno.EMFILE, 'Too many open files')):
            shutil.rmtree(STATE)
            with self.subTest(error=err), self.assertLogs('kuryr_break0'):
                with contextlib.suppress(exceptions.Break0Error), \
                        mock.patch.object(kernel.Netlink, 'links',
                                          side_effect=err):
                    self.bind(POD, netns=self.netns, mac_of_pod=MAC % 1)
                self.assertIn(POD, self.bound())

    def test_a_namespace_that_is_gone_before_its_record(self) -> None:
        self.lab.del_netns('other')
        with self.assertRaisesRegex(exceptions.NetnsUnusable, 'is gone'):
            self.bind('100.75.30.90', owner=Owner('c', 'eth0'),
                      netns=self.other_netns)
        self.assertNotIn('100.75.30.90', self.bound())
        self.assertNotIn('100.75.30.90', self.lab.routes())

    def test_a_prefix_of_ipv6_is_no_host_route(self) -> None:
        self.lab.add_ipv6()
        self.bind(POD6)
        self.manager().sync()  # applies the node's new IPv6 address
        self.lab.run('ip', 'route', 'add', 'fd01:2::/32', 'dev', 'break0',
                     'proto', '176')
        with kernel.Netlink() as netlink:
            self.assertNotIn('fd01:2::', {
                str(route.dst) for route in netlink.routes().host})
        self.assertEqual([], self.problems())

    def test_a_foreign_route_of_ipv6_with_a_better_metric(self) -> None:
        self.lab.add_ipv6()
        self.lab.run('ip', 'route', 'add', POD6, 'dev', 'lo', 'metric', '10')
        with self.assertRaises(exceptions.ForeignRoute):
            self.bind(POD6)
        self.assertNotIn(POD6, self.lab.routes())

    def test_another_table_is_repaired_without_an_agent(self) -> None:
        self.lab.run('ip', 'rule', 'add', 'from', 'all', 'lookup', '1000')
        self.bind(POD, netns=self.netns, mac_of_pod=MAC % 1,
                  route_table=1000)
        self.manager(route_table=1000).housekeep()
        self.lab.run('ip', 'route', 'flush', 'table', '1000')
        self.manager(route_table=1000).housekeep()
        self.assertEqual('1000', self.lab.routes()[POD]['table'])


class TestClaims(DoubtTestCase):
    """The newest claim on an address wins, and the others are kept."""

    def claim(self) -> str:
        netns = self.lab.add_pod('thief', POD, mac=MAC % 9)
        self.bind(POD, owner=Owner('thief', 'eth0'), netns=netns,
                  mac_of_pod=MAC % 9)
        self.assertEqual(MAC % 9, self.neighbour())
        return netns

    def neighbour(self) -> Optional[str]:
        found = self.lab.ip('neigh', 'show', POD, 'dev', 'break0')
        return found[0]['lladdr'] if found else None

    def test_it_returns_with_the_end_of_the_newest(self) -> None:
        for end in ('unbind', 'gone'):
            with self.subTest(end=end):
                self.claim()
                self.assertIn('is claimed by sandbox-1/eth0 too',
                              '\n'.join(self.problems()))
                if end == 'unbind':
                    self.unbind(POD, owner=Owner('thief', 'eth0'))
                    self.lab.del_netns('thief')
                else:
                    self.lab.del_netns('thief')
                    self.reconcile()
                self.assertEqual(MAC % 1, self.neighbour())
                self.assertTrue(self.lab.ping(POD))
                self.assertEqual([], self.problems())

    def test_it_does_not_return_if_it_is_a_next_hop_by_then(self) -> None:
        self.claim()
        self.lab.run('ip', 'route', 'add', '198.51.100.0/24', 'via', POD,
                     'dev', lab.PARENT, 'onlink')
        with mock.patch.object(cache, 'MAX_AGE', 0):  # read the next hops
            self.unbind(POD, owner=Owner('thief', 'eth0'))
        self.assertEqual({OTHER_POD}, set(self.lab.routes()))
        self.assertIsNone(self.neighbour())
        self.assertEqual({POD, OTHER_POD}, self.bound())
        self.lab.run('ip', 'route', 'del', '198.51.100.0/24')
        self.lab.del_netns('thief')
        self.reconcile()
        self.assertEqual(MAC % 1, self.neighbour())
        self.assertTrue(self.lab.ping(POD))

    def test_an_earlier_one_can_end_first(self) -> None:
        self.claim()
        self.unbind(POD)
        self.assertEqual(MAC % 9, self.neighbour())
        self.unbind(POD, owner=Owner('thief', 'eth0'))
        self.assertEqual({OTHER_POD}, set(self.lab.routes()))
        self.assertEqual({OTHER_POD}, self.bound())

    def test_one_that_has_lost_the_address_does_not_get_it_back(
            self) -> None:
        self.claim()
        self.lab.run('ip', 'address', 'flush', 'dev', 'eth0', netns='pod')
        self.unbind(POD, owner=Owner('thief', 'eth0'))
        self.assertEqual({OTHER_POD}, set(self.lab.routes()))
        self.assertEqual({OTHER_POD}, self.bound())


class TestElsewhere(base.LabTestCase):

    def test_in_the_namespace_of_a_pod(self) -> None:
        self.bind(POD, netns=self.lab.add_pod('pod', POD))
        self.lab.settle()
        before = self.lab.ip('link', netns='pod')
        for change in self.manager().sync, self.snapshot:
            with self.assertRaisesRegex(exceptions.Break0Error,
                                        'namespace of sandbox-1/eth0, not '):
                self.lab.in_netns(change, 'pod')
        self.assertEqual(before, self.lab.ip('link', netns='pod'))
        self.assertEqual([], self.problems())


class TestPodSide(DoubtTestCase):

    def setUp(self) -> None:
        super().setUp()
        self.lab.add_ipv6()
        self.lab.run('ip', 'address', 'add', POD6 + '/64', 'dev', 'eth0',
                     'nodad', netns='pod')
        self.bind(POD, POD6, netns=self.netns, mac_of_pod=MAC % 1,
                  subnets=['100.75.30.0/24', 'fd00:30::/64'])
        self.assertTrue(self.lab.ping(lab.NODE6, 'pod'))

    def test_lost_neighbours_of_a_pod_are_repaired(self) -> None:
        def neighbours() -> list[Any]:
            return self.lab.ip('neigh', 'show', 'nud', 'permanent',
                               netns='pod')

        healthy = neighbours()
        for fault in (('ip', 'neigh', 'flush', 'nud', 'permanent'),
                      ('sh', '-c', 'ip link set eth0 down; '
                       'ip link set eth0 up; ip address add %s/64 dev eth0 '
                       'nodad' % POD6),
                      ('ip', 'neigh', 'replace', lab.NODE6, 'lladdr',
                       MAC % 99, 'dev', 'eth0', 'nud', 'permanent')):
            with self.subTest(fault=fault):
                self.lab.run(*fault, netns='pod')
                self.assertNotEqual(healthy, neighbours())
                self.assertEqual([OWNER], list(self.reconcile().pods))
                self.assertEqual(healthy, neighbours())
                self.assertTrue(self.lab.ping(lab.NODE6, 'pod'))
                self.assertFalse(self.manager().sync())

    def test_it_is_recorded_only_when_it_was_done(self) -> None:
        self.lab.run('ip', 'address', 'add', 'fd00:30::52/64', 'dev',
                     lab.PARENT, 'nodad')
        for name in ('PodSide.configure', 'repair'):
            with mock.patch('kuryr_break0.break0.podside.' + name,
                            side_effect=lambda *args, **kwargs: base.die()):
                self.assertEqual(-9, base.wait_for(base.in_child(
                    (lambda: self.bind(POD6, netns=self.netns, subnets=[
                        'fd00:30::/64'], mac_of_pod=MAC % 1))
                    if name == 'PodSide.configure'
                    else (lambda: self.manager().sync()))))
            self.assertIn('its container is not configured to reach the node',
                          self.problems())
        self.reconcile()
        self.assertEqual([], self.problems())
        self.assertTrue(self.lab.ping('fd00:30::52', 'pod'))

    def test_an_address_that_leaves_the_node_without_an_agent(self) -> None:
        vip = '100.75.30.60'
        self.manager().housekeep()
        self.lab.run('ip', 'address', 'add', vip + '/32', 'dev', lab.PARENT)
        self.manager().housekeep()
        self.assertIn(vip, self.pinned())
        self.lab.run('ip', 'address', 'del', vip + '/32', 'dev', lab.PARENT)
        self.lab.run('ip', 'address', 'add', vip + '/24', 'dev', 'nic',
                     netns='lan')
        self.manager().housekeep()
        self.assertNotIn(vip, self.pinned())
        self.assertTrue(self.lab.ping(vip, 'pod'))

    def pinned(self) -> set[str]:
        return {each['dst'] for each in self.lab.ip(
            'neigh', 'show', 'dev', 'eth0', 'nud', 'permanent', netns='pod')}

    def test_a_node_without_ipv4(self) -> None:
        self.lab.run('ip', '-4', 'address', 'flush', 'dev', lab.PARENT)
        with self.quiet():
            self.manager().sync()
        self.assertNotIn('prefsrc', self.lab.routes()[POD])
        self.assertEqual({lab.NODE6}, self.pinned())
        self.assertFalse(self.manager().sync())
        self.assertEqual([], self.problems())


class TestStatus(cli_base.CLITestCase):
    """Status reports every fault that stops traffic or that a sync repairs."""

    def setUp(self) -> None:
        super().setUp()
        self.netns = self.lab.add_pod('pod', POD, mac=MAC % 1)
        self.bind(POD, netns=self.netns, mac_of_pod=MAC % 1)

    def status(self, **environ: str) -> tuple[int, dict[str, Any]]:
        done = self.call('status', '--json', **environ)
        return done.returncode, json.loads(done.stdout)

    def assert_out_of_sync(self, text: str, **environ: str) -> None:
        code, found = self.status(**environ)
        self.assertEqual((1, False), (code, found['in_sync']))
        self.assertIn(text, '\n'.join(
            [*found['problems'], *(each['problem'] or ''
                                   for each in found['addresses'])]))
        self.assertIn(text, self.call('status', **environ).stdout)

    def test_each(self) -> None:
        self.assertEqual(0, self.status()[0])
        for text, command in (
                ('arp_filter is 0',
                 'echo 0 >/proc/sys/net/ipv4/conf/break0/arp_filter'),
                ('MTU is 1400', 'ip link set break0 mtu 1400'),
                ('alias does not name', 'ip link set break0 alias x'),
                ('multicast is on', 'ip link set break0 multicast on'),
                ('it is down', 'ip link set break0 down'),
                ('break0 is missing', 'ip link del break0')):
            with self.subTest(fault=text):
                self.lab.run('sh', '-c', command)
                self.assert_out_of_sync(text)
                done = self.call('sync', '--dry-run')
                self.assertEqual(1, done.returncode)
                self.assertIn('~ interface break0: ', done.stdout)
                done = self.call('sync')
                self.assertEqual(0, done.returncode, done.stderr)
                self.assertIn('~ interface break0: ', done.stdout)
                self.assertEqual('', self.call('sync').stdout)
                self.assertEqual(0, self.status()[0])

    def test_private_mode(self) -> None:
        self.lab.run('ip', 'link', 'set', 'break0', 'type', 'macvlan',
                     'mode', 'private')
        self.assert_out_of_sync('in private mode')
        self.assertEqual(3, self.call('sync').returncode)

    def test_a_parent_that_does_not_exist(self) -> None:
        self.assert_out_of_sync('eth7', OS_BREAK0__PARENT='eth7')

    def test_ipv6_is_disabled(self) -> None:
        self.bind('fd00:30::79', owner=Owner('six', 'eth0'))
        self.lab.run('sysctl', '-w', 'net.ipv6.conf.break0.disable_ipv6=1')
        self.assert_out_of_sync('IPv6 is disabled')
        self.assertIn('IPv6 is disabled',
                      self.call('sync', '--dry-run').stdout)
        self.assertEqual(0, self.call('sync').returncode)
        self.assertEqual(0, self.status()[0])
        self.assertIn('fd00:30::79', self.lab.routes())

    def test_a_guard_that_cannot_be_loaded_again(self) -> None:
        """A sync reports no repair of the guard if nft is missing."""
        self.lab.run('nft', 'flush', 'ruleset')
        with mock.patch.object(kernel, 'find_program', return_value=None):
            outcome = self.manager().sync()
        self.assertEqual([], [text for _, text in outcome.devices
                              if 'guard' in text])

    def test_a_lost_ledger(self) -> None:
        shutil.rmtree(STATE)
        self.assert_out_of_sync('was lost')
        done = self.call('sync')
        self.assertIn('+ record %s owner adopted-' % POD, done.stdout)
        self.assertEqual(0, self.status()[0])

    def test_unbind_of_an_address_that_was_never_bound(self) -> None:
        done = self.call('unbind', '100.75.30.99', '--owner', 'web')
        self.assertEqual((0, '100.75.30.99 was not bound\n'),
                         (done.returncode, done.stdout))

    def test_a_state_directory_that_cannot_be_used(self) -> None:
        self.lab.run('mount', '-t', 'tmpfs', '-o', 'size=4k,nr_inodes=2',
                     'full', '/mnt')
        self.addCleanup(self.lab.run, 'umount', '/mnt')
        for state in ('/proc/nothing', '/mnt'):
            for command in (('sync',), ('bind', '100.75.30.99', '--owner',
                                        'web', '--parent', lab.PARENT)):
                with self.subTest(state=state, command=command):
                    done = self.call(*command, OS_BREAK0__STATE_DIR=state)
                    self.assertEqual(3, done.returncode, done.stderr)
                    self.assertIn('The state directory', done.stderr)
                    self.assertNotIn('Traceback', done.stderr)

    def test_a_closed_pipe(self) -> None:
        for number in range(300):
            self.bind('10.9.%d.%d' % divmod(number, 250),
                      owner=Owner('many', 'eth0'))
        for command in ('status', 'doctor', 'sync --dry-run --json'):
            done = self.lab.run(
                'sh', '-c', '%s %s | true' % (program.BREAK0, command))
            self.assertNotIn('Traceback', done.stdout)
            self.assertNotIn('BrokenPipe', done.stdout)

    def test_a_scrape_does_not_end_the_lock(self) -> None:
        # A record lock of fcntl(2) ends when the process closes any of its
        # descriptors of the file, so the ledger uses flock(2).
        made = ledger.Ledger(STATE, 1)
        with made.lock():
            self.snapshot()  # as a scrape does in the agent's process
            pid = base.in_child(self._take)
            self.assertEqual(1, base.wait_for(pid))

    def _take(self) -> None:
        with ledger.Ledger(STATE, 1).lock():
            pass

    def test_manual_binds_look_after_others(self) -> None:
        self.lab.add_pod('web', '100.75.30.80')
        self.lab.del_netns('pod')
        done = self.call('bind', '--owner', 'web', '--netns',
                         '/run/netns/web')
        self.assertEqual(0, done.returncode, done.stderr)
        self.assertEqual({'100.75.30.80'}, set(self.lab.routes()))

    def test_a_manual_bind_of_an_address_elsewhere(self) -> None:
        done = self.call('bind', '100.75.30.81', '--owner', 'web',
                         '--netns', self.netns)
        self.assertEqual(2, done.returncode)
        self.assertIn('does not have the address', done.stderr)
        self.assertEqual({POD}, self.bound())
