# SPDX-License-Identifier: Apache-2.0

"""The finder finds the namespaces of containers at a bounded cost."""

from __future__ import annotations

import contextlib
import errno
import ipaddress
import os
import resource
import select
import shutil
import subprocess
import time
from typing import Any, Iterator
from unittest import mock

from kuryr_break0.break0 import pods
from kuryr_break0.discovery import binder
from kuryr_break0.discovery import finder
from kuryr_break0.discovery import namespace
from kuryr_break0.engine import transitions
from kuryr_break0 import exceptions
from kuryr_break0 import kernel
from kuryr_break0.ledger import files
from kuryr_break0.model import NamespaceId
from tests.functional import base
from tests.functional.discovery_base import FinderTestCase
from tests.functional.discovery_base import is_idle
from tests.functional.discovery_base import LATER
from tests.functional.discovery_base import ONE
from tests.functional.discovery_base import TWO
from tests.support import lab


class TestWithoutName(FinderTestCase):

    def test_container_with_a_new_macvlan(self) -> None:
        """A macvlan created inside a nameless namespace is discovered.

        systemd-nspawn creates no mount and moves no interface.
        """
        self.work()
        process = self.start_unnamed()
        pid = str(process.pid)
        os.mkdir(self.PROC)
        for each in ('1', pid):
            os.symlink('/proc/' + each, '%s/%s' % (self.PROC, each))
        self.lab.run('ip', 'link', 'add', 'mv-eth0', 'link', 'eth0', 'netns',
                     pid, 'type', 'macvlan', 'mode', 'bridge')
        for command in ('link set mv-eth0 up',
                        'address add %s/24 dev mv-eth0' % ONE):
            self.lab.run('nsenter', '--net', '--target', pid, 'ip',
                         *command.split())
        self.assert_bound(ONE)
        process.kill()
        process.wait()
        self.assert_bound()


class TestExhausted(FinderTestCase):
    """The finder recovers after a search without free descriptors."""

    @contextlib.contextmanager
    def descriptors(self, count: int) -> Iterator[None]:
        """Leave the process ``count`` free descriptors within the block."""
        before = resource.getrlimit(resource.RLIMIT_NOFILE)
        taken = [os.open('/dev/null', os.O_RDONLY) for _ in range(count)]
        resource.setrlimit(resource.RLIMIT_NOFILE,
                           (max(taken, default=0) + 1, before[1]))
        try:
            with contextlib.suppress(OSError):
                while True:
                    taken.append(os.open('/dev/null', os.O_RDONLY))
            for _ in range(count):
                os.close(taken.pop())
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, before)
            for each in taken:
                os.close(each)

    def starve(self, count: int) -> None:
        """Run 4 steps of the finder with ``count`` free descriptors."""
        with self.descriptors(count):
            for _ in range(4):
                with contextlib.suppress(OSError, exceptions.Break0Error):
                    self.step()

    def test_a_container_that_started_without_an_event(self) -> None:
        expected = set()
        for count in range(12):
            with self.subTest(descriptors=count):
                expected.add('100.75.30.%d' % (100 + count))
                self.lab.add_pod('c%d' % count, '100.75.30.%d' % (
                    100 + count))
                self.finder.note_mounts()
                self.starve(count)
                self.assert_bound(*expected)

    def test_a_container_that_changed_without_an_event(self) -> None:
        self.lab.add_pod('one', ONE)
        self.finder.note_mounts()
        self.assert_bound(ONE)
        for count in range(12):
            for change, address in (('add', TWO), ('del', None)):
                with self.subTest(descriptors=count, change=change):
                    self.lab.run('ip', 'address', change, TWO + '/24', 'dev',
                                 'eth0', netns='one')
                    self.finder.mark_all()
                    self.starve(count)
                    self.assert_bound(ONE, *([address] if address else []))

    def test_a_container_that_ended_without_an_event(self) -> None:
        self.lab.add_pod('one', ONE)
        for count in range(12):
            with self.subTest(descriptors=count):
                self.lab.add_pod('two', TWO)
                self.finder.note_mounts()
                self.assert_bound(ONE, TWO)
                self.lab.del_netns('two')
                self.finder.note_mounts()
                self.starve(count)
                self.assert_bound(ONE)

    def test_end_that_is_not_proven_again(self) -> None:
        """A record stays if a second check cannot prove the end.

        The finder checks the namespace again under the lock. The lock takes
        descriptors, so the second check can fail.
        """
        self.lab.add_pod('one', ONE)
        self.finder.note_mounts()
        self.assert_bound(ONE)
        self.lab.del_netns('one')
        with mock.patch.object(pods, 'is_gone',
                               return_value=False) as is_gone:
            self.finder.note_mounts()
            lab.until(lambda: self.step() or is_gone.called)
            self.assertEqual({ONE}, self.bound())
        self.assert_bound()

    def test_number_that_is_used_again(self) -> None:
        self.lab.add_pod('one', ONE)
        self.finder.note_mounts()
        self.assert_bound(ONE)
        number, = [number for number, each in self.finder._numbers.items()
                   if each.location.path.endswith('/one')]
        self.lab.del_netns('one')
        self.lab.add_pod('two', TWO)
        with mock.patch.object(kernel.Netlink, 'ensure_namespace_number',
                               return_value=number):
            self.finder.note_mounts()
            lab.until(lambda: self.step() or any(
                each.location.path.endswith('/two')
                for each in self.finder._namespaces.values()))
        self.assert_bound(TWO)

    def test_end_of_one_that_had_the_number_before(self) -> None:
        self.lab.add_pod('one', ONE)
        self.finder.note_mounts()
        self.assert_bound(ONE)
        with mock.patch.object(self.finder, '_events') as events:
            events.get.return_value = kernel.events.Changes(
                set(), set(self.finder._numbers), set(), False, False, False,
                1)
            self.finder.read_events()
        self.assert_bound(ONE)
        self.lab.run('ip', 'address', 'add', TWO + '/24', 'dev', 'eth0',
                     netns='one')
        self.assert_bound(ONE, TWO)

    def test_end_that_an_error_interrupts(self) -> None:
        self.lab.add_pod('one', ONE)
        self.finder.note_mounts()
        self.assert_bound(ONE)
        self.lab.del_netns('one')
        with mock.patch.object(transitions, 'Engine', side_effect=OSError(
                errno.EMFILE, 'no descriptor')):
            self.finder.note_mounts()
            with self.assertRaises(OSError):
                lab.until(self.step)
        self.assert_bound()

    def test_records_that_cannot_be_read(self) -> None:
        """An unreadable record still belongs to its container."""
        self.lab.add_pod('one', ONE)
        self.finder.note_mounts()
        self.assert_bound(ONE)
        with mock.patch.object(files, 'read', side_effect=OSError(
                errno.EMFILE, 'no descriptor')):
            self.finder.mark_all()
        self.lab.del_netns('one')
        self.finder.note_mounts()
        self.assert_bound()

    def test_ledger_that_cannot_be_read(self) -> None:
        """With an unreadable ledger, the finder uses its last reading."""
        self.lab.add_pod('one', ONE)
        self.finder.note_mounts()
        self.assert_bound(ONE)
        with self.descriptors(0):
            self.finder.mark_all()
        self.lab.run('ip', 'address', 'flush', 'dev', 'eth0', netns='one')
        self.assert_bound()

    def test_end_that_cannot_be_proven(self) -> None:
        """The finder checks at growing intervals if a namespace has ended."""
        self.lab.add_pod('one', ONE)
        self.finder.note_mounts()
        self.assert_bound(ONE)
        self.lab.del_netns('one')
        now = [time.monotonic()]
        with mock.patch.object(
                kernel, 'judge_state',
                return_value=kernel.State.UNKNOWN) as asked, \
                mock.patch.object(time, 'monotonic', lambda: now[0]):
            self.finder.note_mounts()
            while not is_idle(self.finder):
                now[0] = self.finder.find_due()
                self.finder.read_events()
                self.finder.work()
        self.assertLess(asked.call_count, 20)
        self.assertEqual({ONE}, self.bound())


class TestManyNamespaces(FinderTestCase):
    """Another container creates namespaces faster than they are examined.

    The kernel reuses the namespaces' inodes.
    """

    ended = 0

    def add_one(self) -> kernel.NamespaceLocation:
        """Add a container after the first search."""
        self.work()
        path = self.lab.add_pod('one', ONE)
        status = os.stat(path)
        return kernel.NamespaceLocation(
            path, NamespaceId(status.st_dev, status.st_ino))

    def add_stale(self, place: kernel.Place) -> None:
        """Add an ended namespace of the container "noisy" at an inode.

        The event of the namespace's end has not arrived yet. The container has
        spent its processor time, so its namespaces wait.
        """
        stale = namespace.Namespace(kernel.NamespaceLocation(
            '/run/netns/ended', NamespaceId(*place, 1)), 'noisy', 77)
        self.finder._namespaces[place] = self.finder._numbers[77] = stale
        pace = self.finder._queue.pace
        pace.begin()
        with mock.patch.object(time, 'thread_time', lambda: 10 ** 6):
            self.assertLess(10 ** 6, pace.end('noisy'))

    def count_examined(self) -> int:
        """Return the number of namespaces that are examined before "one".

        Each examination adds another namespace.
        """
        examined: list[str] = []
        examine = kernel.examine_namespace

        def examining(location: kernel.NamespaceLocation
                      ) -> kernel.ExaminedNamespace:
            examined.append(location.path)
            self.add_ended(1)
            return examine(location)

        with mock.patch.object(kernel, 'examine_namespace', examining):
            lab.until(lambda: self.step() or any(
                each.endswith('/one') for each in examined))
        return [each.endswith('/one') for each in examined].index(True)

    def add_ended(self, count: int) -> None:
        """Add namespaces that end before they are examined."""
        for _ in range(count):
            self.ended += 1
            identity = NamespaceId(1, self.ended)
            self.finder._unexamined[identity[:2]] = kernel.NamespaceLocation(
                '/run/netns/ended', identity)

    def test_inode_of_an_ended_namespace(self) -> None:
        """A container does not wait for an earlier owner of its inode."""
        for search in self.finder.note_mounts, self.finder.mark_all:
            with self.subTest(search=search.__name__):
                self.add_stale(self.add_one().place)
                search()
                self.assert_bound(ONE)
                self.lab.del_netns('one')
                self.finder.note_mounts()
                self.assert_bound()

    def test_unnamed_with_the_inode_of_an_unexamined_name(self) -> None:
        """A name that was deleted does not hide a process's namespace."""
        self.work()
        pid = str(self.start_unnamed().pid)
        status = os.stat('/proc/%s/ns/net' % pid)
        place = status.st_dev, status.st_ino
        self.finder._unexamined[place] = kernel.NamespaceLocation(
            '/run/netns/ended', NamespaceId(*place))
        os.mkdir(self.PROC)
        os.symlink('/proc/' + pid, '%s/%s' % (self.PROC, pid))
        self.finder._search_new()
        self.assertFalse(self.finder._unexamined[place].is_named)

    def test_late_end_of_the_namespace_that_had_the_inode(self) -> None:
        """A late event does not replace the path of the new namespace."""
        one = self.add_one()
        self.add_stale(one.place)
        self.finder._unexamined[one.place] = one
        with mock.patch.object(self.finder, '_events') as events:
            events.get.return_value = kernel.events.Changes(
                set(), {77}, set(), False, False, False, 1)
            self.finder.read_events()
        self.assert_bound(ONE)

    def test_name_with_the_inode_of_an_unexamined_namespace(self) -> None:
        """A namespace with a name does not wait for many others."""
        one = self.add_one()
        self.finder._unexamined[one.place] = one._replace(
            path='/proc/0/ns/net')
        self.add_ended(500)
        self.finder._mounts_changed = True
        self.finder._search_new()
        self.assertEqual(one, [*self.finder._unexamined.values()][-1])
        self.assert_bound(ONE)

    def test_namespace_before_many_others(self) -> None:
        """A namespace does not wait for all namespaces that arrive later."""
        one = self.add_one()
        self.finder._unexamined[one.place] = one
        self.add_ended(9)
        with mock.patch.object(self.finder, '_search_if_due'):
            self.assertLess(self.count_examined(), 9)

    def test_full_search_omits_ended_namespaces(self) -> None:
        self.work()
        self.add_ended(500)
        self.finder.mark_all()
        with mock.patch.object(finder, '_STEP', 0):
            lab.until(lambda: self.step() or len(
                self.finder._unexamined) < 400)
        self.assertLess(len(self.finder._unexamined), 10)


class TestBounds(FinderTestCase):

    def test_more_addresses_that_others_had_bound(self) -> None:
        """Rebuilt records stay beyond the limit of discovered addresses."""
        addresses = ['100.75.30.%d' % (100 + number)
                     for number in range(binder.MAX_DISCOVERED + 5)]
        path = self.lab.add_pod('one', *addresses, mac='02:00:00:00:00:01')
        self.bind(*addresses, netns=path, mac_of_pod='02:00:00:00:00:01')
        shutil.rmtree('/run/kuryr-break0')
        self.manager().sync()
        self.assertEqual(set(addresses), self.bound())
        self.finder.mark_all()
        self.assert_bound(*addresses)

    def test_namespaces_without_containers_that_end(self) -> None:
        self.work()
        with mock.patch.object(transitions, 'Engine') as engine:
            for number in range(9):
                self.finder._remove(namespace.Namespace(
                    kernel.NamespaceLocation(
                        '/run/netns/gone', NamespaceId(1, 2, number))))
            self.work()
        engine.assert_not_called()
        self.assertEqual(0, len(self.finder._ended))

    def test_refusals_that_are_logged(self) -> None:
        def refuse() -> None:
            for number in range(9):
                self.finder._binder._log_refusal(
                    *base.addresses('10.0.0.%d' % number),
                    mock.Mock(namespace=NamespaceId(1, 2)), 'of the test')

        with mock.patch.object(binder, '_MAX_REFUSALS', 4), \
                self.assertLogs('kuryr_break0', 'WARNING') as logs:
            refuse()
            refuse()
            self.assertEqual(4, len(logs.output))
            with mock.patch.object(time, 'monotonic', return_value=(
                    time.monotonic() + binder._REFUSAL_SECONDS)):
                refuse()
            self.assertEqual(8, len(logs.output))


class TestNoisy(FinderTestCase):
    """A container that causes much work delays no other container."""

    def setUp(self) -> None:
        super().setUp()
        self.spent = 0.0
        clock = mock.patch.object(time, 'thread_time', lambda: self.spent)
        clock.start()
        self.addCleanup(clock.stop)
        read = kernel.list_macvlans_in

        def reading(netns: str, *args: Any) -> list[kernel.Macvlan]:
            if netns.endswith('/noisy'):
                self.spent += 1000
            return read(netns, *args)

        patch = mock.patch.object(kernel, 'list_macvlans_in', reading)
        patch.start()
        self.addCleanup(patch.stop)

    def change(self, verb: str, address: str, name: str) -> None:
        self.lab.run('ip', 'address', verb, address + '/24', 'dev', 'eth0',
                     netns=name)

    def test_delays_no_other(self) -> None:
        self.lab.add_pod('noisy', ONE)
        self.assert_bound(ONE)
        # The finder has spent the CPU budget of "noisy", which must wait.
        self.change('add', LATER, 'noisy')
        self.lab.add_pod('one', TWO)
        self.finder.note_mounts()
        self.assert_bound(ONE, TWO)
        for verb, expected in (('add', {ONE, TWO, '100.75.30.83'}),
                               ('del', {ONE, TWO})):
            self.change(verb, '100.75.30.83', 'one')
            self.assert_bound(*expected)
        self.lab.del_netns('one')
        self.assert_bound(ONE)
        # The address added by "noisy" is bound after the wait.
        now = time.monotonic
        with mock.patch.object(time, 'monotonic', lambda: now() + 10 ** 6):
            self.assert_bound(ONE, LATER)

    def test_many_addresses_are_bound_by_and_by(self) -> None:
        addresses = ['100.75.30.%d' % (100 + number) for number in range(9)]
        self.lab.add_pod('one', *addresses)
        with mock.patch.object(binder, '_TURN', 0.0):
            while not self.bound():
                self.step()
            self.assertLess(len(self.bound()), len(addresses))
            self.assert_bound(*addresses)

    def test_a_bound_address_stays_beyond_the_limits(self) -> None:
        self.lab.add_pod('one', ONE)
        self.assert_bound(ONE)
        with mock.patch.object(kernel, 'QUICK_LIMITS', kernel.Limits(4, 3, 4)):
            for number in range(9):
                self.lab.add_macvlan('one', 'aa%d' % number)
                self.lab.run('ip', 'address', 'add', '10.0.0.%d' % number,
                             'dev', 'aa%d' % number, netns='one')
                self.lab.run('ip', 'address', 'add', '10.0.1.%d' % number,
                             'dev', 'eth0', netns='one')
            # The last address added is the last that the kernel lists.
            self.change('del', ONE, 'one')
            self.change('add', ONE, 'one')
            self.finder.mark_all()
            self.assert_bound(ONE)
            self.lab.run('ip', 'link', 'del', 'eth0', netns='one')
            self.assert_bound()

    def test_work_is_bounded(self) -> None:
        self.lab.add_pod('one', ONE)
        self.assert_bound(ONE)
        for number in range(9):
            self.lab.add_macvlan('one', 'aa%d' % number)
        limits = kernel.Limits(4, 3, 4)
        with mock.patch.object(kernel, 'QUICK_LIMITS', limits), \
                mock.patch.object(
                    kernel.Netlink, 'address_states', autospec=True,
                    side_effect=kernel.Netlink.address_states) as read:
            found = kernel.list_macvlans_in(
                '/run/netns/one', None, kernel.QUICK_LIMITS, ['aa8'])
        self.assertEqual(3, read.call_count)
        self.assertEqual('aa8', found[0].link.name)
        self.assertLess(len(found), 7)
        self.assertEqual(3, sum(each.is_whole for each in found))


class TestEvents(FinderTestCase):

    def test_old_process_with_a_new_macvlan(self) -> None:
        """The parent's event reveals a new macvlan in an old namespace."""
        pid = str(self.start_unnamed().pid)
        self.work()
        with mock.patch.object(kernel.search._Processes, 'new',
                               return_value=[]):
            os.mkdir(self.PROC)
            os.symlink('/proc/' + pid, '%s/%s' % (self.PROC, pid))
            self.lab.run('ip', 'link', 'add', 'mv', 'link', 'eth0', 'netns',
                         pid, 'type', 'macvlan', 'mode', 'bridge')
            self.lab.run('nsenter', '--net', '--target', pid, 'ip', 'link',
                         'set', 'mv', 'up')
            self.lab.run('nsenter', '--net', '--target', pid, 'ip', 'address',
                         'add', ONE + '/24', 'dev', 'mv')
            self.assert_bound(ONE)

    def test_a_process_that_ends_in_a_namespace_with_a_name(self) -> None:
        """The finder examines a namespace by its name, not by a process.

        The search has found the namespace by both.
        """
        os.mkdir(self.PROC)
        self.work()
        self.lab.add_pod('one', ONE)
        self.finder.note_mounts()
        self.finder._search_new()
        process = subprocess.Popen(['ip', 'netns', 'exec', 'one', 'sleep',
                                    '1000'])
        self.addCleanup(process.wait)
        self.addCleanup(process.kill)
        pid = str(process.pid)
        lab.until(lambda: os.stat('/proc/%s/ns/net' % pid).st_ino
                  == os.stat('/run/netns/one').st_ino)
        os.symlink('/proc/' + pid, '%s/%s' % (self.PROC, pid))
        self.finder._search_new()
        os.unlink('%s/%s' % (self.PROC, pid))
        with mock.patch.object(kernel.Search, 'all', return_value=[]):
            self.assert_bound(ONE)

    def test_another_namespace_of_the_same_name(self) -> None:
        """A new namespace at a known path replaces the old one.

        The finder has not received the event of the old namespace's end.
        """
        self.lab.add_pod('one', ONE)
        self.assert_bound(ONE)
        known, = (each for each in self.finder._namespaces.values()
                  if each.location.path.endswith('/one'))
        self.lab.del_netns('one')
        lab.until(lambda: kernel.judge_state(
            known.location.path,
            known.location.namespace) is kernel.State.GONE)
        while select.select(self.finder.list_readable(), [], [], 1)[0]:
            self.finder._events.get()
        self.lab.add_pod('one', TWO)
        with mock.patch.object(kernel.Search, 'all', return_value=[]), \
                mock.patch.object(kernel.Search, 'new', return_value=[]):
            self.finder._queue.mark(known, time.monotonic())
            self.assert_bound(TWO)

    def test_macvlans_of_known_namespaces_cause_no_search_for_all(self
                                                                  ) -> None:
        self.lab.add_netns('one')
        self.finder.note_mounts()
        self.work()
        with mock.patch.object(kernel.Search, 'all') as searched:
            self.lab.add_pod('two', TWO)
            self.finder.note_mounts()
            self.assert_bound(TWO)
            self.lab.add_macvlan('one')
            self.lab.run('ip', 'address', 'add', ONE + '/24', 'dev', 'eth0',
                         netns='one')
            self.assert_bound(ONE, TWO)
            self.lab.del_netns('two')
            self.assert_bound(ONE)
        searched.assert_not_called()

    def test_flood(self) -> None:
        """The finder drops a flood of events, and reads all state again."""
        self.lab.add_pod('one', ONE)
        self.assert_bound(ONE)
        events = self.finder._events
        assert events is not None
        with mock.patch.object(kernel.events, 'MAX_EVENTS', 9):
            for _ in range(9):
                for verb in ('add', 'del'):
                    self.lab.run('ip', 'address', verb, '10.0.0.1', 'dev',
                                 'eth0', netns='one')
            self.lab.run('ip', 'address', 'add', TWO + '/24', 'dev', 'eth0',
                         netns='one')
            self.lab.add_pod('two', LATER)
            self.finder.note_mounts()
            changes = events.get()
            self.assertEqual((True, 9), (changes.lost, changes.messages))
            self.assertEqual(0, events.get().messages)
            with mock.patch.object(events, 'get', side_effect=[changes]):
                self.finder.read_events()
            self.assert_bound(ONE, TWO, LATER)
        self.lab.run('ip', 'address', 'del', TWO + '/24', 'dev', 'eth0',
                     netns='one')
        self.assert_bound(ONE, LATER)

    def test_records_that_another_program_has_changed(self) -> None:
        self.lab.add_pod('one', ONE)
        self.lab.add_pod('two', TWO)
        self.assert_bound(ONE, TWO)
        record = self.snapshot().live[ipaddress.ip_address(ONE)]
        self.manager().unbind(record.owner, base.addresses(ONE))
        self.assertEqual({TWO}, self.bound())
        queue = self.finder._queue
        with mock.patch.object(queue, 'mark', side_effect=queue.mark) as mark:
            self.finder.note_records()
        self.assertEqual([record.namespace], [
            call.args[0].location.namespace for call in mark.mock_calls])
        self.assert_bound(ONE, TWO)

    def test_namespace_that_gets_a_name(self) -> None:
        """A record changes from a process's path to the namespace's name.

        The name exists as long as the namespace; the process can end
        earlier.
        """
        process = self.start_unnamed()
        pid = str(process.pid)
        os.mkdir(self.PROC)
        os.symlink('/proc/' + pid, '%s/%s' % (self.PROC, pid))
        self.finder.mark_all()
        self.lab.run('ip', 'link', 'add', 'eth0', 'link', 'eth0', 'netns', pid,
                     'type', 'macvlan', 'mode', 'bridge')
        self.lab.run('nsenter', '--net', '--target', pid, 'ip', 'address',
                     'add', ONE + '/24', 'dev', 'eth0')
        self.assert_bound(ONE)
        self.lab.run('ip', 'netns', 'attach', 'one', pid)
        self.finder.note_mounts()
        process.kill()
        process.wait()
        os.remove('%s/%s' % (self.PROC, pid))
        self.lab.run('ip', 'address', 'add', TWO + '/24', 'dev', 'eth0',
                     netns='one')
        self.assert_bound(ONE, TWO)
        self.assertEqual({'/run/netns/one'}, {
            record.netns for record in self.snapshot().live.values()})
