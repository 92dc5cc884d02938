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

"""The ledger in files, as it is, against one in SQLite."""

from __future__ import annotations

import contextlib
import sqlite3
import statistics
import time
from typing import Callable, Iterator

from kuryr_break0.ledger import Entry
from kuryr_break0.ledger import Ledger
from tests.bench import Broken
from tests.bench import Node
from tests.bench import say
from tests.bench import Section

SIZES = (250, 10000)
FILES = 'files'
SQLITE = 'SQLite'


class _Database:
    """The same by SQLite, opened by each request, as it is a process."""

    def __init__(self, path: str) -> None:
        self._path = path
        with self._open() as database:
            # What it needs to lose nothing when a process is killed, and
            # not to wait for a disk; readers are not held up by a writer.
            database.execute('PRAGMA journal_mode=WAL')
            database.execute('CREATE TABLE entries '
                             '(address TEXT PRIMARY KEY, entry TEXT)')

    @contextlib.contextmanager
    def _open(self) -> Iterator[sqlite3.Connection]:
        with contextlib.closing(sqlite3.connect(self._path)) as database:
            database.execute('PRAGMA synchronous=OFF')
            with database:
                yield database

    def put(self, *entries: Entry) -> None:
        with self._open() as database:
            database.executemany(
                'INSERT OR REPLACE INTO entries VALUES (?, ?)',
                [(str(entry.address), entry.to_json()) for entry in entries])

    def get(self, entry: Entry) -> Entry:
        with self._open() as database:
            found = database.execute(
                'SELECT entry FROM entries WHERE address = ?',
                (str(entry.address),)).fetchone()
        return Entry.from_json(found[0])

    def read(self) -> list[Entry]:
        with self._open() as database:
            return [Entry.from_json(text) for text, in database.execute(
                'SELECT entry FROM entries')]

    def remove(self, entry: Entry) -> None:
        with self._open() as database:
            database.execute('DELETE FROM entries WHERE address = ?',
                             (str(entry.address),))


def compare(node: Node, repeat: int) -> Section:
    """One entry put, got and removed, and all read; both on a tmpfs."""
    medians: dict[str, dict[str, dict[int, float]]] = {}
    for size in SIZES:
        say('ledgers of %d entries' % size)
        ledger = Ledger('/run/files-%d' % size, 10)
        database = _Database('/run/sqlite-%d' % size)
        entries = node.entries(0, size)
        database.put(*entries)
        for entry in entries:
            ledger.put(entry)
        if sorted(database.read(), key=lambda each: each.address) != \
                ledger.read()[0]:
            raise Broken('the ledgers differ')
        entry = entries[size // 2]
        ways: dict[str, dict[str, Callable[[], object]]] = {
            FILES: {'put': lambda: ledger.put(entry),
                    'get': lambda: ledger.get(entry.address),
                    'remove': lambda: ledger.remove(entry.address),
                    'read all': ledger.read},
            SQLITE: {'put': lambda: database.put(entry),
                     'get': lambda: database.get(entry),
                     'remove': lambda: database.remove(entry),
                     'read all': database.read}}
        times: dict[str, dict[str, list[float]]] = {
            name: {what: [] for what in calls}
            for name, calls in ways.items()}
        for number in range(max(repeat, 5)):
            for name, calls in ways.items():
                for what, call in calls.items():
                    if what == 'read all' and number % 20:
                        continue
                    start = time.perf_counter()
                    call()
                    times[name][what].append(
                        (time.perf_counter() - start) * 1000)
        for name, calls in ways.items():
            for what in calls:
                medians.setdefault(name, {}).setdefault(what, {})[
                    size] = statistics.median(times[name][what])
    return Section(
        'The ledger, median ms',
        ['way', *('%s, %d' % (what, size) for what in medians[FILES]
                  for size in SIZES)],
        [[name, *('%.3f' % by_what[what][size] for what in by_what
                  for size in SIZES)] for name, by_what in medians.items()],
        [], {'medians_ms': medians})
