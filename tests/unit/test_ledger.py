# Licensed under the Apache License, Version 2.0 (the "License"); you may
# not use this file except in compliance with the License. You may obtain
# a copy of the License at
#
#      http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS, WITHOUT
# WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the
# License for the specific language governing permissions and limitations
# under the License.

from __future__ import annotations

import dataclasses
import ipaddress
import os
import shutil
import signal
import stat
import tempfile
import time
from typing import Any, Callable, Iterator
import unittest
from unittest import mock

from kuryr_break0 import exceptions
from kuryr_break0 import ledger
from tests.functional import base

ADDRESS = ipaddress.ip_address('100.75.30.71')
ENTRY = ledger.Entry(ADDRESS, ledger.Owner('sandbox-1', 'eth0'), 'eth0',
                     mac='fa:16:3e:00:00:01', netns='/run/netns/pod',
                     netns_id=(4, 4026531840), bound_at=1764000000.5)


class LedgerTestCase(unittest.TestCase):

    def setUp(self) -> None:
        super().setUp()
        directory = tempfile.TemporaryDirectory()
        self.addCleanup(directory.cleanup)
        self.path = os.path.join(directory.name, 'state')
        self.ledger = ledger.Ledger(self.path, 1)

    def file(self, name: str = '100.75.30.71.json') -> str:
        return os.path.join(self.path, 'addresses', name)

    def write(self, text: str, name: str = '100.75.30.71.json') -> None:
        with open(self.file(name), 'w') as file:
            file.write(text)


class TestBeside(LedgerTestCase):
    """What is read of ledger and kernel is of one moment."""

    def beside(self, *changes: Callable[[], object]
               ) -> tuple[list[ledger.Entry], int, bool]:
        """While one thing after another changes."""
        looks: list[int] = []

        def look() -> int:
            if len(looks) < len(changes):
                changes[len(looks)]()
            looks.append(1)
            return len(looks)

        return self.ledger.beside(self.ledger.entries, look, 0.1)

    def come(self) -> None:
        self.ledger.put(ENTRY)

    def go(self) -> None:
        self.ledger.remove(ADDRESS)

    def come_and_go(self) -> None:
        self.come()
        self.go()

    def test_nothing_changes(self) -> None:
        self.assertEqual(([], 1, True), self.beside())
        self.come()
        self.assertEqual(([ENTRY], 1, True), self.beside())

    def test_again_after_changes(self) -> None:
        self.assertEqual(([ENTRY], 2, True), self.beside(self.come))
        self.assertEqual(([], 2, True), self.beside(self.go))
        self.assertEqual(([], 3, True), self.beside(*2 * [self.come_and_go]))

    def test_not_for_ever(self) -> None:
        self.assertEqual(([], 5, False),
                         self.beside(*9 * [self.come_and_go]))

    def test_who_holds_the_lock_for_long_is_not_waited_for_again(
            self) -> None:
        ready, tell = os.pipe()

        def hold() -> None:
            with self.ledger.lock():
                os.write(tell, b'.')
                time.sleep(60)

        pid = base.in_child(hold)
        try:
            os.read(ready, 1)
            self.assertEqual(([], 1, False), self.beside(self.come))
        finally:
            os.kill(pid, signal.SIGKILL)
            base.wait_for(pid)


class TestEntries(LedgerTestCase):

    def test_what_was_put_is_there(self) -> None:
        self.ledger.put(ENTRY)
        self.assertEqual(ENTRY, self.ledger.get(ADDRESS))
        self.assertEqual(ENTRY, ledger.Ledger(self.path, 1).get(ADDRESS))
        self.assertEqual([ENTRY], self.ledger.entries())

    def test_nothing(self) -> None:
        self.assertIsNone(self.ledger.get(ADDRESS))
        self.assertEqual([], self.ledger.entries())
        self.ledger.remove(ADDRESS)

    def test_put_replaces(self) -> None:
        self.ledger.put(ENTRY)
        other = ledger.Entry(ADDRESS, ledger.Owner('sandbox-2', 'eth0'),
                             'eth0')
        self.ledger.put(other)
        self.assertEqual([other], self.ledger.entries())

    def test_remove(self) -> None:
        self.ledger.put(ENTRY)
        self.ledger.remove(ADDRESS)
        self.assertIsNone(self.ledger.get(ADDRESS))

    def test_order_and_both_families(self) -> None:
        texts = ['fd00::2', '100.75.30.100', 'fd00::1', '100.75.30.9']
        for text in texts:
            self.ledger.put(ledger.Entry(ipaddress.ip_address(text),
                                         ENTRY.owner, 'eth0'))
        self.assertEqual(
            ['100.75.30.9', '100.75.30.100', 'fd00::1', 'fd00::2'],
            [str(entry.address) for entry in self.ledger.entries()])

    def test_some_in_turn(self) -> None:
        everything = set()
        for number in range(5):
            address = ipaddress.ip_address('10.0.0.%d' % number)
            everything.add(address)
            self.ledger.put(dataclasses.replace(ENTRY, address=address))
        self.assertEqual(5, self.ledger.count())
        seen: list[Any] = []
        for position in (0, 2, 4, 11):
            some, count = self.ledger.some(position, 2)
            self.assertEqual((2, 5), (len(some), count))
            seen += some
        self.assertEqual(everything, set(seen[:5]))
        self.assertEqual(seen[0], seen[5])
        self.assertEqual(seen[1:3], seen[6:])
        some, count = self.ledger.some(3, 5)
        self.assertEqual((everything, 5), (set(some), count))
        self.write('', 'ten.json')
        self.assertEqual(6, self.ledger.count())
        with self.assertLogs('kuryr_break0.ledger', 'WARNING'):
            self.ledger.some(0, 10)
        self.assertEqual(5, self.ledger.count())

    def test_a_writer_killed_half_way_leaves_what_was_there(self) -> None:
        self.ledger.put(ENTRY)
        with open(os.path.join(self.path, '.unfinished'), 'w') as file:
            file.write('{"version": 1, "addr')
        self.assertEqual([ENTRY], self.ledger.entries())
        self.ledger.put(ENTRY)
        self.assertEqual([ENTRY], self.ledger.entries())

    def damage(self) -> Iterator[str]:
        """Make entries that are none, one after the other; their names."""
        self.ledger.put(ENTRY)
        for name, content in (
                ('100.75.30.72.json', b'\0\1random'),
                ('100.75.30.72.json', os.urandom(300)),
                ('100.75.30.72.json', b''),
                ('100.75.30.72.json', b'[]'),
                ('100.75.30.72.json', b'[' * 4000),
                ('100.75.30.72.json', b'{"version": 1}'),
                ('100.75.30.72.json', b'{"version": "one"}'),
                ('100.75.30.72.json', ENTRY.to_json().encode()),
                ('100.75.30.72.json', ENTRY.to_json().replace(
                    '71', '72').replace('"/run/netns/pod"', '1').encode()),
                ('100.75.30.72.json', b' ' * 2 ** 20),
                ('not-an-address.json', ENTRY.to_json().encode())):
            with open(self.file(name), 'wb') as file:
                file.write(content)
            yield name
        os.symlink('/dev/zero', self.file('100.75.30.72.json'))
        yield '100.75.30.72.json'
        for make in (os.mkfifo, os.mkdir):
            make(self.file('100.75.30.72.json'))
            yield '100.75.30.72.json'

    def test_a_sandbox_may_be_gone(self) -> None:
        self.assertFalse(self.ledger.may_be_gone(ADDRESS))
        netns = os.path.join(os.path.dirname(self.path), 'netns')
        with open(netns, 'w'):
            pass
        entry = dataclasses.replace(ENTRY, netns=netns,
                                    netns_id=ledger.netns_id(netns))
        for change, gone in (({}, False), ({'netns_id': (4, 1)}, True),
                             ({'netns_id': None}, False),
                             ({'netns': None}, False),
                             ({'netns': netns + '-'}, True),
                             ({'netns': '/nowhere/netns'}, False)):
            with self.subTest(change=change):
                changed = dataclasses.replace(entry, **change)
                self.assertEqual(gone, changed.sandbox_gone)
                self.ledger.put(changed)
                self.assertEqual(gone, self.ledger.may_be_gone(ADDRESS))
        for text in ('', '[]', '{}', '[' * 4000):  # who knows
            with self.subTest(text=text):
                self.write(text)
                self.assertTrue(self.ledger.may_be_gone(ADDRESS))

    def test_damage_is_set_aside_and_costs_no_other(self) -> None:
        for name in self.damage():
            with self.subTest(name=name):
                with self.assertLogs('kuryr_break0.ledger',
                                     'WARNING') as logs:
                    self.assertEqual([ENTRY], self.ledger.entries())
                self.assertIn(name, '\n'.join(logs.output))
                aside = os.path.join(self.path, 'damaged', name)
                self.assertTrue(os.path.lexists(aside))
                shutil.rmtree(os.path.dirname(aside))

    def test_whose_it_was_is_not_known(self) -> None:
        self.ledger.put(ENTRY)
        self.write('damaged')
        self.assertEqual(([], {ADDRESS}), self.ledger.read())
        self.assertEqual(([], {ADDRESS}), self.ledger.read())
        self.ledger.put(ENTRY)
        self.assertEqual(([ENTRY], set()), self.ledger.read())

    def test_a_newer_version_is_refused_and_untouched(self) -> None:
        self.ledger.put(ENTRY)
        newer = '{"version": 2, "address": "100.75.30.71", "more": []}'
        self.write(newer)
        with self.assertRaisesRegex(exceptions.LedgerUnavailable, 'newer'):
            self.ledger.get(ADDRESS)
        self.assertEqual(([], {ADDRESS}), self.ledger.read())
        with open(self.file()) as file:
            self.assertEqual(newer, file.read())

    def test_ten_thousand(self) -> None:
        addresses = [ipaddress.ip_address('10.0.%d.%d' % divmod(number, 250))
                     for number in range(10000)]
        for address in addresses:
            self.ledger.put(ledger.Entry(address, ENTRY.owner, 'eth0'))
        self.assertEqual(addresses, [entry.address for entry
                                     in self.ledger.entries()])

    def test_a_directory_that_is_a_file(self) -> None:
        with open(self.path, 'w'):
            pass
        with self.assertRaisesRegex(exceptions.LedgerUnavailable, self.path):
            self.ledger.put(ENTRY)
        with self.assertRaises(exceptions.LedgerUnavailable):
            with self.ledger.lock():
                self.fail('that is no lock')


class TestDirectory(LedgerTestCase):

    def test_only_its_owner_can_use_it(self) -> None:
        self.ledger.put(ENTRY)
        self.assertEqual(0o700, stat.S_IMODE(os.stat(self.path).st_mode))

    def test_an_empty_one_is_closed(self) -> None:
        os.mkdir(self.path)
        os.chmod(self.path, 0o755)  # by kubelet, for a volume
        self.ledger.put(ENTRY)
        self.assertEqual(0o700, stat.S_IMODE(os.stat(self.path).st_mode))

    def test_one_that_others_can_use_is_closed(self) -> None:
        self.ledger.put(ENTRY)
        os.chmod(self.path, 0o777)
        with self.assertLogs('kuryr_break0.ledger', 'WARNING') as logs:
            self.ledger.put(ENTRY)
        self.assertIn('777', '\n'.join(logs.output))
        self.assertEqual(0o700, stat.S_IMODE(os.stat(self.path).st_mode))

    def test_one_of_another_user_is_refused(self) -> None:
        os.mkdir(self.path)
        # A user namespace of one user has no other.
        with mock.patch('os.geteuid', return_value=os.geteuid() + 1):
            for refused in (lambda: self.ledger.put(ENTRY),
                            self.ledger.lock().__enter__):
                with self.assertRaisesRegex(exceptions.LedgerUnavailable,
                                            'belongs to user'):
                    refused()
        self.assertEqual([], self.ledger.entries())


class TestRecall(LedgerTestCase):

    def setUp(self) -> None:
        super().setUp()
        self.ledger.put(ENTRY)

    def test_fresh_and_stale(self) -> None:
        self.assertIsNone(self.ledger.recall('hops', 60))
        self.ledger.remember('hops', ['fd00::1', 7])
        self.assertEqual(['fd00::1', 7], self.ledger.recall('hops', 60))
        path = os.path.join(self.path, 'hops.json')
        os.utime(path, (0, 0))
        self.assertIsNone(self.ledger.recall('hops', 60))

    def test_damage_is_as_nothing(self) -> None:
        path = os.path.join(self.path, 'hops.json')
        for text in ('', '{', '7', '[' * 10 ** 5, '[%s1]' % ('1,' * 2 ** 20)):
            with open(path, 'w') as file:
                file.write(text)
            with self.subTest(text=text[:10]):
                self.assertIsNone(self.ledger.recall('hops', 60))
        os.unlink(path)
        os.mkfifo(path)
        self.assertIsNone(self.ledger.recall('hops', 60))

    def test_larger_than_an_entry(self) -> None:
        hops = ['100.75.%d.%d' % divmod(number, 256)
                for number in range(10000)]
        self.ledger.remember('hops', hops)
        self.assertEqual(hops, self.ledger.recall('hops', 60))


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
