# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
import time
import unittest

from kuryr_break0.ledger import journal
from kuryr_break0.ledger.journal import Done
from kuryr_break0.ledger.journal import Record
from tests.functional import base


class TestJournal(unittest.TestCase):

    def setUp(self) -> None:
        super().setUp()
        self.dir = tempfile.mkdtemp()
        self.addCleanup(shutil.rmtree, self.dir)
        self.journal = journal.Journal(self.dir)
        self.path = os.path.join(self.dir, 'journal')

    def test_each_is_taken_out_once(self) -> None:
        self.journal.add(Done.BIND, seconds=0.25)
        self.journal.add(Done.ROUTE, times=3)
        self.assertEqual([Record(Done.BIND, 1, 0.25),
                          Record(Done.ROUTE, 3, 0)], self.journal.drain())
        self.assertEqual([], self.journal.drain())

    def test_none_yet(self) -> None:
        self.assertEqual([], self.journal.drain())

    def test_without_a_directory_it_is_lost(self) -> None:
        journal.Journal(self.dir + '/none').add(Done.BIND)
        self.assertEqual([], journal.Journal(self.dir + '/none').drain())

    def test_it_is_bounded(self) -> None:
        for _ in range(journal.LIMIT // 16 + 10):
            self.journal.add(Done.BIND)
        self.assertEqual(journal.LIMIT, os.path.getsize(self.path))
        self.assertEqual(journal.LIMIT // 16, len(self.journal.drain()))
        self.journal.add(Done.BIND)
        self.assertEqual(1, len(self.journal.drain()))

    def test_others_cannot_read_it(self) -> None:
        self.journal.add(Done.BIND)
        self.assertEqual(0o600, os.stat(self.path).st_mode & 0o777)

    def test_damaged_records_are_left_out(self) -> None:
        with open(self.path, 'wb') as file:
            file.write(b'\xff' * 16)
        self.journal.add(Done.BIND)
        with open(self.path, 'ab') as file:
            file.write(b'half a')
        self.assertEqual([Record(Done.BIND, 1, 0)], self.journal.drain())

    def test_a_link_is_not_followed(self) -> None:
        os.symlink(os.path.join(self.dir, 'other'), self.path)
        self.journal.add(Done.BIND)
        self.assertEqual(['journal'], os.listdir(self.dir))

    def test_a_stopped_reader_or_writer_delays_no_other(self) -> None:
        self.journal.add(Done.BIND)
        with open(self.path) as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            self.journal.add(Done.BIND)
            fcntl.flock(file, fcntl.LOCK_SH)
            self.assertEqual([], self.journal.drain())
        self.assertEqual(1, len(self.journal.drain()))

    def test_many_processes_lose_none(self) -> None:
        def write() -> None:
            for number in range(200):
                self.journal.add(Done.BIND, seconds=number)

        with base.patient():
            writers = [base.in_child(write) for _ in range(8)]
        found = []
        while writers:
            found += self.journal.drain()
            time.sleep(0.005)  # the agent drains the journal less often
            writers = [pid for pid in writers
                       if os.waitpid(pid, os.WNOHANG)[0] == 0]
        found += self.journal.drain()
        self.assertEqual(sorted(list(range(200)) * 8),
                         sorted(record.seconds for record in found))
