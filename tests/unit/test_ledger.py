# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import dataclasses
import errno
import fcntl
import ipaddress
import json
import os
import shutil
import signal
import stat
import tempfile
import threading
import time
import types
from typing import Any, Callable, Iterator
import unittest
from unittest import mock

from kuryr_break0.break0 import missing
from kuryr_break0 import exceptions
from kuryr_break0 import kernel
from kuryr_break0.kernel import node
from kuryr_break0 import ledger
from kuryr_break0.ledger import files
from kuryr_break0.ledger import identity
from kuryr_break0.ledger import records
from kuryr_break0.model import NamespaceId
from tests.functional import base

ADDRESS = ipaddress.ip_address('100.75.30.71')
RECORD = ledger.Record(
    ADDRESS, ledger.Owner('sandbox-1', 'eth0'), 'eth0',
    mac='fa:16:3e:00:00:01', netns='/run/netns/pod',
    namespace=NamespaceId(4, 4026531840, 77), bound_at=1000.5,
    configured='0123456789abcdef',
    subnets=(ipaddress.ip_network('100.75.30.0/24'),))


class LedgerTestCase(unittest.TestCase):

    def setUp(self) -> None:
        super().setUp()
        directory = tempfile.TemporaryDirectory()
        self.addCleanup(directory.cleanup)
        self.path = os.path.join(directory.name, 'state')
        self.ledger = ledger.Ledger(self.path, 1)
        self.records = self.ledger.records
        self.ledger.prepare()

    def file(self, name: str = '100.75.30.71.json') -> str:
        return os.path.join(self.path, 'addresses', name)

    def write(self, text: str, name: str = '100.75.30.71.json') -> None:
        with open(self.file(name), 'w') as file:
            file.write(text)

    def all(self) -> list[ledger.Record]:
        """Quarantine damaged records, and return all claims."""
        return [claim for address in self.records.addresses()
                for claim in self.records.claims(address)]

    def read(self) -> tuple[Any, Any]:
        """Return all claims, and the addresses of unreadable records."""
        contents = self.ledger.contents()
        return contents.claims, set(contents.unreadable)

    def hold(self) -> Callable[[], None]:
        """Hold the lock in a process; return a function that kills it."""
        ready, tell = os.pipe()

        def hold() -> None:
            with self.ledger.lock():
                os.write(tell, b'.')
                time.sleep(1000)

        pid = base.in_child(hold)
        os.read(ready, 1)

        def end() -> None:
            os.kill(pid, signal.SIGKILL)
            base.wait_for(pid)

        return end


class TestInspection(LedgerTestCase):
    """The ledger and the kernel are read at the same moment."""

    def inspect(self, *changes: Callable[[], object]
                ) -> tuple[list[ledger.Record], int, bool]:
        """Inspect the ledger while one change happens at each attempt."""
        looks: list[int] = []

        def look() -> int:
            if len(looks) < len(changes):
                changes[len(looks)]()
            looks.append(1)
            return len(looks)

        contents, count, steady = self.ledger.inspect(look, 0.1)
        return ([claim for claims in contents.claims.values()
                 for claim in claims], count, steady)

    def come(self) -> None:
        self.records.put([RECORD])

    def go(self) -> None:
        self.records.remove(ADDRESS)

    def come_and_go(self) -> None:
        self.come()
        self.go()

    def test_nothing_changes(self) -> None:
        self.assertEqual(([], 1, True), self.inspect())
        self.come()
        self.assertEqual(([RECORD], 1, True), self.inspect())

    def test_again_after_changes(self) -> None:
        self.assertEqual(([RECORD], 2, True), self.inspect(self.come))
        self.assertEqual(([], 2, True), self.inspect(self.go))
        self.assertEqual(([], 3, True), self.inspect(*2 * [self.come_and_go]))

    def test_not_for_ever(self) -> None:
        self.assertEqual(([], 5, False),
                         self.inspect(*9 * [self.come_and_go]))

    def test_a_long_held_lock_is_awaited_once(
            self) -> None:
        end = self.hold()
        try:
            self.assertEqual(([], 1, False), self.inspect(self.come))
        finally:
            end()

    def test_nothing_is_moved(self) -> None:
        self.come()
        self.write('damaged', '100.75.30.72.json')
        self.write('{"version": 3}', '100.75.30.73.json')
        contents = self.ledger.contents()
        self.assertEqual([ADDRESS], list(contents.claims))
        self.assertEqual({self.file('100.75.30.72.json')},
                         set(contents.damaged))
        self.assertEqual({self.file('100.75.30.73.json')},
                         set(contents.newer))
        self.assertEqual({'100.75.30.72', '100.75.30.73'},
                         set(map(str, contents.unreadable)))
        self.assertTrue(os.path.exists(self.file('100.75.30.72.json')))
        for address in (ADDRESS, ADDRESS + 2):
            self.assertTrue(contents.is_still(self.records, address))
        self.write('{"version": 3}')
        self.assertFalse(contents.is_still(self.records, ADDRESS))

    def test_nothing_is_read_or_asked_twice(self) -> None:
        self.records.put([dataclasses.replace(RECORD, parent_index=7)])
        self.records.put([dataclasses.replace(
            RECORD, address=ADDRESS + 1, parent_index=7)])
        with mock.patch.object(node, 'find_current_name',
                               return_value='eth7') as asked:
            before = self.ledger.contents()
        self.assertEqual(1, asked.call_count)
        self.records.put([dataclasses.replace(RECORD, parent_index=7,
                                              pod='a/b')])
        # The interface has another name by now.
        with mock.patch.object(node, 'find_current_name',
                               return_value='eth8'), \
                mock.patch.object(records, 'from_json',
                                  side_effect=records.from_json) as parsed:
            after = self.ledger.contents()
        self.assertEqual(1, parsed.call_count)
        self.assertEqual(
            ([('eth7', None)] * 2, [('eth8', 'a/b'), ('eth8', None)]),
            tuple([(claim.parent, claim.pod)
                   for claims in each.claims.values() for claim in claims]
                  for each in (before, after)))


class TestRecords(LedgerTestCase):

    def test_a_written_record_can_be_read(self) -> None:
        self.records.put([RECORD])
        self.assertEqual(RECORD, self.records.get(ADDRESS))
        self.assertEqual(RECORD,
                         ledger.Ledger(self.path, 1).records.get(ADDRESS))
        self.assertEqual([RECORD], self.all())

    def test_nothing(self) -> None:
        self.assertIsNone(self.records.get(ADDRESS))
        self.assertEqual([], self.all())
        self.records.remove(ADDRESS)
        shutil.rmtree(self.path)
        self.assertIsNone(self.records.get(ADDRESS))
        self.assertEqual([], self.all())

    def test_several_claims_the_newest_first(self) -> None:
        other = dataclasses.replace(
            RECORD, owner=ledger.Owner('sandbox-2', 'eth0'), namespace=None)
        self.records.put([other, RECORD])
        self.assertEqual((other, RECORD), self.records.claims(ADDRESS))
        self.assertEqual(other, self.records.get(ADDRESS))

    def test_a_field_of_the_newest_claim_changes(self) -> None:
        older = dataclasses.replace(
            RECORD, owner=ledger.Owner('sandbox-2', 'eth0'), namespace=None)
        self.records.put([RECORD, older])
        self.records.update_newest(RECORD, pod='shop/web')
        changed = dataclasses.replace(RECORD, pod='shop/web')
        self.assertEqual((changed, older), self.records.claims(ADDRESS))
        # A changed claim, an older claim and a dropped claim are not updated.
        for expected in RECORD, older:
            self.assertEqual((changed, older), self.records.update_newest(
                expected, pod='shop/db'))
            self.assertEqual((changed, older), self.records.claims(ADDRESS))
        self.records.remove(ADDRESS)
        self.assertEqual((), self.records.update_newest(changed, pod='a/b'))
        self.assertEqual((), self.records.claims(ADDRESS))

    def test_no_more_claims_and_subnets_than_fit(self) -> None:
        many = [dataclasses.replace(RECORD, owner=ledger.Owner(
            'sandbox-%d' % number, 'eth0'), subnets=tuple(
                ipaddress.ip_network('10.%d.%d.0/24' % divmod(each, 250))
                for each in range(500))) for number in range(100)]
        self.records.put(many)
        claims = self.records.claims(ADDRESS)
        self.assertEqual([claim.owner for claim in many[:8]],
                         [claim.owner for claim in claims])
        self.assertEqual(many[0].subnets[:16], claims[0].subnets)

    def test_remove(self) -> None:
        self.records.put([RECORD])
        self.records.remove(ADDRESS)
        self.assertIsNone(self.records.get(ADDRESS))

    def test_order_and_both_families(self) -> None:
        texts = ['fd00::2', '100.75.30.100', 'fd00::1', '100.75.30.9']
        for text in texts:
            self.records.put([ledger.Record(ipaddress.ip_address(text),
                                            RECORD.owner, 'eth0')])
        self.assertEqual(
            ['100.75.30.9', '100.75.30.100', 'fd00::1', 'fd00::2'],
            [str(record.address) for record in self.all()])

    def test_some_in_turn(self) -> None:
        everything = set()
        for number in range(5):
            address = ipaddress.ip_address('10.0.0.%d' % number)
            everything.add(address)
            self.records.put([dataclasses.replace(RECORD, address=address)])
        self.assertEqual(5, self.records.count())
        seen: list[Any] = []
        for position in (0, 2, 4, 11):
            some, count = self.records.list_part(position, 2)
            self.assertEqual((2, 5), (len(some), count))
            seen += some
        self.assertEqual(everything, set(seen[:5]))
        self.assertEqual(seen[0], seen[5])
        self.assertEqual(seen[1:3], seen[6:])
        some, count = self.records.list_part(3, 5)
        self.assertEqual((everything, 5), (set(some), count))
        self.write('', 'ten.json')
        self.assertEqual(6, self.records.count())
        with self.assertLogs('kuryr_break0.ledger', 'WARNING'):
            self.records.list_part(0, 10)
        self.assertEqual(5, self.records.count())

    def test_a_killed_writer_leaves_the_earlier_record(self) -> None:
        self.records.put([RECORD])
        unfinished = self.file('.unfinished.42.100.75.30.71.json')
        with open(unfinished, 'w') as file:
            file.write('{"version": 2, "addr')
        self.assertEqual([RECORD], self.all())
        self.records.put([RECORD])
        self.assertEqual([RECORD], self.all())
        cached = os.path.join(self.path, '.unfinished.42.next_hops.json')
        shutil.copy(unfinished, cached)
        with self.ledger.lock():
            self.records.delete_unfinished()
        self.assertFalse(os.path.exists(cached))
        self.assertEqual(['100.75.30.71.json'],
                         os.listdir(os.path.dirname(unfinished)))

    def test_two_writers_at_once(self) -> None:
        """Processes in two containers can have the same process ID."""
        write, texts = os.write, ['the longer one', 'short']

        def interrupted(fd: int, data: bytes) -> int:
            if len(texts) > 1:
                files.replace(self.file(), texts.pop(0))
            return write(fd, data)

        with mock.patch.object(os, 'write', interrupted):
            files.replace(self.file(), texts[1])
        self.assertEqual('short', files.read(self.file(), 100))

    def test_a_full_disk_leaves_the_earlier_record(self) -> None:
        self.records.put([RECORD])
        with mock.patch('os.write', side_effect=OSError(28, 'No space')):
            with self.assertRaisesRegex(exceptions.LedgerUnavailable,
                                        'No space'):
                self.records.put([dataclasses.replace(RECORD, mac=None)])
        self.assertEqual([RECORD], self.all())
        self.assertEqual(['100.75.30.71.json'],
                         os.listdir(os.path.dirname(self.file())))

    def damage(self) -> Iterator[str]:
        """Write damaged records one after the other; yield the file names."""
        self.records.put([RECORD])
        good = json.loads(records.to_json([dataclasses.replace(
            RECORD, address=ipaddress.ip_address('100.75.30.72'))]))
        wrong: dict[str, list[Any]] = {
            'mac': ['zz', 'fa:16:3e:00:00:01\n', 'fa-16-3e-00-00-01', 7, [],
                    'FA:16:3E:00:00:01:00'],
            'bound_at': [None, 'late', [], {}],
            'netns': ['/run/netns/a\0b', '/run/netns/a\nb', 7, 'x' * 600],
            'namespace': ['ab', 7, [1], ['a', 'b'], [None, None], {}],
            'subnets': ['10.0.0.0/8', 7, [7], ['10.0.0.1/8'], ['no']],
            'owner': [None, 'me', {}, {'container_id': 'a'},
                      {'container_id': 'a\nb', 'ifname': 'eth0'},
                      {'container_id': 'a', 'ifname': 'eth0', 'more': 1},
                      {'container_id': 7, 'ifname': 'eth0'}],
            'parent': [None, 7, 'a\nb'], 'pod': [7, 'a\rb'],
            'configured': [7, []]}
        texts = [json.dumps({**good, 'claims': [
            {**good['claims'][0], key: value}]}).encode()
            for key, values in wrong.items() for value in values]
        texts += [json.dumps({**good, **change}).encode() for change in (
            {'claims': []}, {'claims': None}, {'claims': [7]},
            {'address': '100.75.30.73'}, {'address': None},
            {'address': 1681596999}, {'version': 0}, {'version': True})]
        texts += [b'\0\1random', os.urandom(300), b'', b'[]', b'[' * 4000,
                  b'{"version": 1}', b'{"version": "one"}',
                  records.to_json([RECORD]).encode(), b' ' * 2 ** 20]
        for text in texts:
            with open(self.file('100.75.30.72.json'), 'wb') as file:
                file.write(text)
            yield '100.75.30.72.json'
        for name in ('not-an-address.json', '100.75.30.072.json',
                     'FD00::1.json', 'fe80::1%eth0.json'):
            with open(self.file(name), 'wb') as file:
                file.write(records.to_json([RECORD]).encode())
            yield name
        os.symlink('/dev/zero', self.file('100.75.30.72.json'))
        yield '100.75.30.72.json'
        for make in (os.mkfifo, os.mkdir):
            make(self.file('100.75.30.72.json'))
            yield '100.75.30.72.json'

    def test_damage_is_moved_to_quarantine_and_costs_no_other(self) -> None:
        for name in self.damage():
            with self.subTest(name=name):
                contents = self.ledger.contents()
                self.assertEqual({ADDRESS: (RECORD,)}, contents.claims)
                self.assertEqual([self.file(name)], list(contents.damaged))
                with self.assertLogs('kuryr_break0.ledger',
                                     'WARNING') as logs:
                    self.assertEqual([RECORD], self.all())
                self.assertIn(name, '\n'.join(logs.output))
                moved = os.path.join(self.path, 'quarantine', name)
                self.assertTrue(os.path.lexists(moved))
                shutil.rmtree(os.path.dirname(moved))

    def test_damage_may_be_gone(self) -> None:
        address = ipaddress.ip_address('100.75.30.72')
        for name in self.damage():
            with self.subTest(name=name):
                self.records.may_be_gone(  # raises no error
                    address, kernel.Judge())
                shutil.rmtree(self.file(name)) if os.path.isdir(
                    self.file(name)) else os.unlink(self.file(name))

    def test_the_owner_of_a_damaged_record_is_unknown(self) -> None:
        self.records.put([RECORD])
        self.write('damaged')
        self.assertEqual(({}, {ADDRESS}), self.read())
        self.assertIsNone(self.records.get(ADDRESS))  # quarantined
        self.assertEqual(({}, {ADDRESS}), self.read())
        self.records.put([RECORD])
        self.assertEqual(({ADDRESS: (RECORD,)}, set()), self.read())

    def test_a_newer_version_is_refused_and_untouched(self) -> None:
        self.records.put([RECORD])
        newer = '{"version": 3, "address": "100.75.30.71", "more": []}'
        self.write(newer)
        with self.assertRaisesRegex(exceptions.LedgerUnavailable,
                                    'later version'):
            self.records.get(ADDRESS)
        self.assertEqual(({}, {ADDRESS}), self.read())
        with open(self.file()) as file:
            self.assertEqual(newer, file.read())

    def test_ten_thousand(self) -> None:
        addresses = [ipaddress.ip_address('10.0.%d.%d' % divmod(number, 250))
                     for number in range(10000)]
        for address in addresses:
            self.records.put([ledger.Record(address, RECORD.owner, 'eth0')])
        self.assertEqual(addresses, list(self.read()[0]))

    def test_a_directory_that_is_a_file(self) -> None:
        shutil.rmtree(self.path)
        with open(self.path, 'w'):
            pass
        with self.assertRaisesRegex(exceptions.LedgerUnavailable, self.path):
            self.records.put([RECORD])
        with self.assertRaises(exceptions.LedgerUnavailable):
            with self.ledger.lock():
                self.fail('that is no lock')


class TestDirectory(LedgerTestCase):

    def test_only_its_owner_can_use_it(self) -> None:
        self.assertEqual(0o700, stat.S_IMODE(os.stat(self.path).st_mode))

    def test_an_empty_one_is_closed(self) -> None:
        shutil.rmtree(self.path)
        os.mkdir(self.path)
        os.chmod(self.path, 0o755)  # kubelet sets this mode for a volume
        self.ledger.prepare()
        self.assertEqual(0o700, stat.S_IMODE(os.stat(self.path).st_mode))

    def test_one_that_others_use_is_refused(self) -> None:
        shutil.rmtree(self.path)
        os.makedirs(self.path + '/others')
        os.chmod(self.path, 0o755)
        open(self.path + '/x.json', 'w').close()
        for refused in self.ledger.prepare, self.ledger.lock().__enter__:
            with self.assertRaisesRegex(
                    exceptions.LedgerUnavailable,
                    'has no records, but a file of another program: others'):
                refused()
        self.assertEqual(0o755, stat.S_IMODE(os.stat(self.path).st_mode))
        self.assertEqual({'others', 'x.json'}, {*os.listdir(self.path)})

    def test_one_that_has_lost_its_records_is_used(self) -> None:
        with self.ledger.lock():
            self.ledger.ensure_identity()
            self.ledger.cache.put('fact', [1])
        shutil.rmtree(self.records.directory)
        os.mkdir(self.path + '/quarantine')
        self.ledger.prepare()
        self.assertTrue(os.path.isdir(self.records.directory))

    def test_one_behind_a_link_is_cleared(self) -> None:
        os.rename(self.path, self.path + '-real')
        os.symlink(self.path + '-real', self.path)
        self.addCleanup(shutil.rmtree, self.path + '-real')
        with self.ledger.lock():
            self.ledger.clear()
        self.assertEqual([], os.listdir(self.path))

    def test_one_that_others_can_use_is_closed(self) -> None:
        os.chmod(self.path, 0o777)
        with self.assertLogs('kuryr_break0.ledger', 'WARNING') as logs:
            self.ledger.prepare()
        self.assertIn('777', '\n'.join(logs.output))
        self.assertEqual(0o700, stat.S_IMODE(os.stat(self.path).st_mode))

    def test_one_of_another_user_is_refused(self) -> None:
        # The lab's user namespace maps a single user, so chown would fail.
        with mock.patch('os.geteuid', return_value=os.geteuid() + 1):
            for refused in (self.ledger.prepare,
                            self.ledger.lock().__enter__):
                with self.assertRaisesRegex(exceptions.LedgerUnavailable,
                                            'belongs to user'):
                    refused()
        self.assertEqual([], self.all())


class TestIdentity(LedgerTestCase):

    def test_it_stays(self) -> None:
        self.assertIsNone(self.ledger.identity())
        found = self.ledger.ensure_identity()
        self.assertEqual(found, self.ledger.ensure_identity())
        self.assertEqual(found, self.ledger.identity())

    def test_each_is_another(self) -> None:
        other = ledger.Ledger(self.path + '-2', 1)
        other.prepare()
        self.assertNotEqual(self.ledger.ensure_identity().id,
                            other.ensure_identity().id)
        self.assertNotEqual(self.ledger.ensure_identity().secret,
                            other.ensure_identity().secret)

    def test_its_alias_says_which_it_is_and_no_secret(self) -> None:
        found = self.ledger.ensure_identity()
        alias = found.alias(self.path)
        self.assertEqual(alias, identity.Alias.parse(str(alias)))
        self.assertNotIn(found.secret, str(alias))
        for text in (None, '', 'uplink', 'kuryr-break0 ledger x in /run'):
            self.assertIsNone(identity.Alias.parse(text))
        self.assertLessEqual(len(str(found.alias('/' + 'x' * 500))), 255)

    def test_a_lack_of_resources_is_no_damage(self) -> None:
        found = self.ledger.ensure_identity()
        with mock.patch.object(os, 'open', side_effect=OSError(
                errno.EMFILE, 'of the test')):
            for ask in self.ledger.identity, self.ledger.ensure_identity:
                with self.assertRaises(exceptions.SystemRefused):
                    ask()
        self.assertEqual(found, self.ledger.ensure_identity())

    def test_damage_is_replaced(self) -> None:
        for text in ('', '{', '[]', '{"version": 1}', '{"version": 2}',
                     '{"version": 1, "id": 7, "secret": 7, "boot": ""}',
                     json.dumps({'version': 1, **vars(identity.Identity.new()
                                                      ), 'devices': [7]})):
            with self.subTest(text=text):
                with open(os.path.join(self.path, 'identity'), 'w') as file:
                    file.write(text)
                with self.assertRaises(exceptions.LedgerUnavailable):
                    self.ledger.identity()
                with self.assertLogs('kuryr_break0.ledger', 'ERROR'):
                    found = self.ledger.ensure_identity()
                self.assertEqual(found, self.ledger.identity())

    def test_records_of_an_earlier_boot_do_not_count(self) -> None:
        # After a reboot, other namespaces have the numbers of the recorded
        # namespaces.
        before = self.ledger.ensure_identity()
        self.records.put([RECORD])
        self.ledger.put_identity(dataclasses.replace(before, boot='earlier'))
        with self.assertLogs('kuryr_break0.ledger', 'WARNING') as logs:
            after = self.ledger.ensure_identity()
        self.assertIn('earlier boot', '\n'.join(logs.output))
        self.assertNotEqual(before.id, after.id)
        self.assertEqual([], self.all())
        self.assertEqual(['100.75.30.71.json'], os.listdir(os.path.join(
            self.path, 'quarantine', 'earlier-boot')))
        self.ledger.clear()
        self.assertFalse(os.path.exists(self.path))


class TestCache(LedgerTestCase):

    def test_fresh_and_old(self) -> None:
        cache = self.ledger.cache
        self.assertIsNone(cache.get('hops', 60))
        cache.put('hops', ['fd00::1', 7])
        self.assertEqual(['fd00::1', 7], cache.get('hops', 60))
        with mock.patch.object(files, 'now', return_value=files.now() + 61):
            self.assertIsNone(cache.get('hops', 60))
            self.assertEqual(['fd00::1', 7], cache.get('hops'))

    def test_the_clock_may_be_set(self) -> None:
        cache = self.ledger.cache
        cache.put('hops', [7])
        for when in (0, time.time() - 86400, time.time() + 86400):
            with mock.patch('time.time', return_value=when):
                os.utime(os.path.join(self.path, 'hops.json'), (when, when))
                self.assertEqual([7], cache.get('hops', 60))

    def test_a_cached_value_of_another_boot(self) -> None:
        self.ledger.cache.put('hops', [7])
        with mock.patch.object(files, 'now', return_value=1.0):
            self.assertIsNone(self.ledger.cache.get('hops', 60))

    def test_damage_is_as_nothing(self) -> None:
        path = os.path.join(self.path, 'hops.json')
        for text in ('', '{', '7', '[' * 10 ** 5, '[]', '{"at": 0}',
                     '{"at": "now", "facts": []}', '{"at": 0, "facts": 7}',
                     '[%s1]' % ('1,' * 2 ** 20)):
            with open(path, 'w') as file:
                file.write(text)
            with self.subTest(text=text[:10]):
                self.assertIsNone(self.ledger.cache.get('hops', 60))
        os.unlink(path)
        os.mkfifo(path)
        self.assertIsNone(self.ledger.cache.get('hops', 60))

    def test_larger_than_a_record(self) -> None:
        hops = ['100.75.%d.%d' % divmod(number, 256)
                for number in range(10000)]
        self.ledger.cache.put('hops', hops)
        self.assertEqual(hops, self.ledger.cache.get('hops', 60))


class TestNextHops(LedgerTestCase):

    def note(self, *addresses: str) -> list[str]:
        self.ledger.add_next_hops(map(ipaddress.ip_address, addresses))
        return self.ledger.list_recent_next_hops()

    def test_the_last_ones_are_kept(self) -> None:
        self.assertEqual([], self.ledger.list_recent_next_hops())
        self.assertEqual(['10.0.0.1', 'fd00::1'],
                         self.note('10.0.0.1', 'fe80::1', 'fd00::1'))
        self.assertEqual(['10.0.0.1', 'fd00::1', '10.0.0.2'],
                         self.note('10.0.0.2', '10.0.0.1'))
        many = ['10.%d.0.1' % number for number in range(2, 256)] * 2
        for number in range(5):
            many += ['10.0.%d.%d' % (number, last) for last in range(3, 250)]
        found = self.note(*many)
        self.assertEqual(ledger.MAX_NEXT_HOPS, len(found))
        self.assertNotIn('10.0.0.1', found)

    def test_of_this_boot(self) -> None:
        self.note('10.0.0.1')
        with mock.patch.object(identity, 'read_boot_id', return_value='other'):
            self.assertEqual([], self.ledger.list_recent_next_hops())
            self.assertEqual(['10.0.0.2'], self.note('10.0.0.2'))
        self.assertEqual([], self.ledger.list_recent_next_hops())


class TestEnds(LedgerTestCase):

    def test_noted_and_forgotten(self) -> None:
        first, second = (ledger.Owner('sandbox-%d' % number, 'eth0')
                         for number in range(2))
        for owner, when in (first, 1.5), (second, 2.5), (first, 3.5):
            self.ledger.add_end(owner, when)
        self.assertEqual({first: 3.5, second: 2.5}, self.ledger.list_ended())
        self.ledger.delete_ends(3.0)
        self.assertEqual({first: 3.5}, self.ledger.list_ended())

    def test_bounded(self) -> None:
        with mock.patch.object(ledger, 'MAX_ENDED', 3):
            for number in range(9):
                self.ledger.add_end(ledger.Owner(str(number), 'eth0'),
                                    float(number))
        self.assertEqual([6.0, 7.0, 8.0],
                         list(self.ledger.list_ended().values()))

    def test_damage_is_as_nothing(self) -> None:
        for facts in ([7], [['a', 'eth0']], [['a', 'eth0', 'now']], ['abc'],
                      [None], [['a', 'eth0', {}]]):
            self.ledger.cache.put('ended', facts)
            self.assertEqual({}, self.ledger.list_ended(), facts)
            self.ledger.cache.put('missing', facts)
            self.assertFalse(missing.Sightings(self.ledger.cache).has(
                [RECORD]))


class TestHeartbeat(LedgerTestCase):

    def test_a_bind_at_the_first_heartbeat(self) -> None:
        """A bind holds the heartbeat's lock for a moment."""
        heartbeat = self.ledger.heartbeat
        with open(heartbeat.path, 'w') as asked:
            fcntl.flock(asked, fcntl.LOCK_EX)
            with self.assertLogs('kuryr_break0.ledger', 'ERROR'), \
                    heartbeat.keep() as beat:
                asked.close()
                beat()
                self.assertIsNotNone(heartbeat.age())

    def test_after_the_directory_was_lost(self) -> None:
        heartbeat = self.ledger.heartbeat
        with heartbeat.keep() as beat:
            shutil.rmtree(self.ledger.path)
            with self.assertLogs('kuryr_break0', 'ERROR') as logs:
                beat()
                beat()
            self.assertEqual(1, len(logs.output))
            self.ledger.prepare()
            beat()
            self.assertIsNotNone(heartbeat.age())
        self.assertIsNone(heartbeat.age())

    def test_while_an_agent_runs(self) -> None:
        heartbeat = self.ledger.heartbeat
        self.assertIsNone(heartbeat.age())
        with heartbeat.keep() as beat:
            self.assertLess(heartbeat.age() or 0, 60)
            with mock.patch.object(files, 'now',
                                   return_value=files.now() + 100):
                self.assertGreater(heartbeat.age() or 0, 90)
                beat()
                self.assertLess(heartbeat.age() or 0, 1)
        self.assertIsNone(heartbeat.age())

    def test_where_it_cannot_be_written(self) -> None:
        shutil.rmtree(self.path)
        with self.assertLogs('kuryr_break0.ledger', 'ERROR') as logs:
            with self.ledger.heartbeat.keep() as beat:
                beat()
        self.assertIn('Cannot write the heartbeat', logs.output[0])


class TestLock(LedgerTestCase):

    def test_it_can_be_taken_again(self) -> None:
        for _ in range(2):
            with self.ledger.lock():
                pass

    def test_an_error_frees_it(self) -> None:
        with self.assertRaises(ZeroDivisionError):
            with self.ledger.lock():
                raise ZeroDivisionError
        with self.ledger.lock():
            pass

    def test_other_users_of_the_file_do_not_end_it(self) -> None:
        # A process that closes any descriptor of a file releases all its locks
        # of fcntl(2) on the file.
        with self.ledger.lock():
            with open(self.ledger.lock_path):
                pass
            self.assertFalse(self.ledger.is_free_within(0))
            other = base.in_child(self._take)
            self.assertEqual(1, base.wait_for(other))
        self.assertTrue(self.ledger.is_free_within(0))

    def _take(self) -> None:
        with self.ledger.lock():
            pass

    def test_between_threads(self) -> None:
        inside: list[int] = []
        overlaps: list[int] = []

        def work() -> None:
            for _ in range(20):
                with ledger.Ledger(self.path, 10).lock():
                    inside.append(1)
                    overlaps.append(len(inside))
                    inside.pop()

        threads = [threading.Thread(target=work) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        self.assertEqual({1}, set(overlaps))
        self.assertEqual(80, len(overlaps))

    def test_a_killed_holder_does_not_keep_the_lock(self) -> None:
        end = self.hold()
        with self.assertRaises(exceptions.LockTimeout):
            self._take()
        end()
        self._take()

    def test_a_directory_that_is_wiped_meanwhile(self) -> None:
        with self.ledger.lock():
            shutil.rmtree(self.path)
            with self.ledger.lock():  # the lock file is a new one
                self.records.put([RECORD])
        self.assertEqual([RECORD], self.all())

    def test_a_pipe_in_its_place_delays_no_process(self) -> None:
        os.mkfifo(self.ledger.lock_path)
        self.assertTrue(self.ledger.is_free_within(0))


class TestOwnership(unittest.TestCase):

    def test_all(self) -> None:
        own = dataclasses.replace(identity.Identity.new(),
                                  claimed={'break0-eth1': 'a' * 16})
        expected = identity.Ownership
        for alias, known, name, answer in (
                (None, own, 'break0', expected.UNMARKED),
                ('uplink', own, 'break0', expected.UNMARKED),
                (own.alias('/run/x'), own, 'break0', expected.OURS),
                (own.alias('/run/y'), own, 'break0', expected.OURS),
                # The next two aliases have the path of this state directory
                # and the ID of a lost ledger. In the first case, this ledger
                # is new. In the second case, it has already taken over
                # break0-eth1 of the lost ledger.
                (identity.Alias('a' * 16, '/run/x'), None, 'break0',
                 expected.LOST),
                (identity.Alias('a' * 16, '/run/x'), own, 'break0',
                 expected.LOST),
                (identity.Alias('a' * 16, '/run/x'), own, 'break0-eth1',
                 expected.OTHER),
                (identity.Alias('b' * 16, '/run/x'), own, 'break0',
                 expected.OTHER),
                (identity.Alias('a' * 16, '/run/y'), None, 'break0',
                 expected.OTHER)):
            with self.subTest(alias=alias, name=name):
                link: Any = types.SimpleNamespace(
                    name=name, alias=alias and str(alias))
                self.assertIs(answer, identity.ownership(link, known,
                                                         '/run/x'))
        self.assertIs(expected.UNMARKED,
                      identity.ownership(None, own, '/run/x'))
