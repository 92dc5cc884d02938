# SPDX-License-Identifier: Apache-2.0

"""The number of other namespaces adds nothing to the cost of a search."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import time
from typing import Any, Callable, Iterator
from unittest import mock

from kuryr_break0 import kernel
from kuryr_break0.kernel import namespaces
from kuryr_break0.kernel import node
from kuryr_break0.kernel import search
from tests.functional import base
from tests.support import lab

CLONE_NEWPID = 0x20000000
LAST = '/proc/sys/kernel/ns_last_pid'
PROC = '/run/proc'
_libc = ctypes.CDLL(None, use_errno=True)


def contain() -> subprocess.Popen[bytes]:
    """Start a process in its own network namespace."""
    process = subprocess.Popen(['unshare', '--net', 'sleep', '1000'])
    lab.until(lambda: os.readlink('/proc/%d/ns/net' % process.pid)
              != os.readlink('/proc/self/ns/net'))
    return process


class SearchTestCase(base.LabTestCase):

    def isolated(self, test: Callable[[], Any]) -> None:
        """Call a function in an empty process namespace, with a /proc."""
        def call() -> None:
            assert _libc.unshare(CLONE_NEWPID | lab.CLONE_NEWNS) == 0
            pid = base.in_child(within)
            assert base.wait_for(pid) == 0

        def within() -> None:
            for path in ('/proc', PROC):
                os.makedirs(path, exist_ok=True)
                assert _libc.mount(b'proc', path.encode(), b'proc', 0,
                                   None) == 0
            with mock.patch.object(search, '_YOUNG', 0.0):
                test()

        self.assertEqual(0, base.wait_for(base.in_child(call)))


class TestProcesses(SearchTestCase):

    def test_others_are_not_looked_at(self) -> None:
        self.isolated(self.count_looks)

    def count_looks(self) -> None:
        looks = {}
        for count in (2, 20):
            for _ in range(count):
                contain()
            made = kernel.Search([PROC])
            made.all({})
            process = contain()
            with mock.patch.object(
                    namespaces, 'stat_namespace',
                    side_effect=namespaces.stat_namespace) as seen:
                found = made.new(False)
            self.assertIn('%s/%d' % (PROC, process.pid),
                          [each.process for each in found])
            looks[count] = seen.call_count
        self.assertEqual(looks[2], looks[20])
        self.assertLess(looks[20], 5)

    def test_numbers_start_again(self) -> None:
        if not os.path.exists(LAST):
            self.skipTest('needs CONFIG_CHECKPOINT_RESTORE')
        self.isolated(self.start_again)

    def start_again(self) -> None:
        made = kernel.Search([PROC])
        for number in (20000, 30000, 400):
            made.new(False)
            with open(LAST, 'w') as file:
                file.write('%d' % number)
            process = contain()
            self.assertLess(abs(process.pid - number), 100)
            self.assertIn('%s/%d' % (PROC, process.pid),
                          [each.process for each in made.new(False)])

    def test_of_another_process_namespace(self) -> None:
        """Each search lists all processes of another process namespace.

        The kernel offers no way to find only the new processes there.
        """
        process = contain()
        self.addCleanup(process.wait)
        self.addCleanup(process.kill)
        os.mkdir(PROC)
        os.symlink('/proc/%d' % process.pid, '%s/%d' % (PROC, process.pid))
        made = kernel.Search([PROC])
        for _ in range(2):
            found, = made.new(False)
            self.assertEqual('%s/%d/ns/net' % (PROC, process.pid), found.path)

    def test_one_that_unshares_a_moment_later(self) -> None:
        reading, writing = os.pipe()

        def wait() -> None:
            os.read(reading, 1)
            assert kernel.unshare()
            time.sleep(1000)

        made = kernel.Search(['/proc'])
        made.all({})
        pid = base.in_child(wait)
        try:
            path = '/proc/%d/ns/net' % pid
            self.assertNotIn(path, [each.path for each in made.new(False)])
            os.write(writing, b'x')
            lab.until(lambda: path in [each.path for each
                                       in made.new(False)])
        finally:
            os.kill(pid, signal.SIGKILL)
            base.wait_for(pid)
            os.close(reading)
            os.close(writing)


class TestNames(SearchTestCase):

    def test_others_are_not_looked_at(self) -> None:
        for number in range(9):
            self.lab.add_netns('n%d' % number)
        made = kernel.Search([])
        self.assertEqual(10, len(made.all({})))  # includes the LAN's
        self.lab.add_netns('new')
        with mock.patch.object(
                namespaces, 'stat_namespace',
                side_effect=namespaces.stat_namespace) as seen:
            found = made.new(True)
        self.assertEqual({'/run/netns/new'}, {each.path for each in found})
        self.assertLess(seen.call_count, 3)
        self.assertEqual([], made.new(True))
        with mock.patch.object(node, 'read_mounts') as read:
            self.assertEqual([], made.new(False))
        read.assert_not_called()


class TestContainer(SearchTestCase):

    def containers(self) -> Iterator[Any]:
        for found in kernel.find_namespaces([PROC]):
            yield kernel.examine_namespace(found).container

    def test_namespaces_of_one_container(self) -> None:
        """A container keeps its identity in nested process namespaces."""
        self.isolated(self.compare)

    def compare(self) -> None:
        inner = ('unshare --net sleep 1000 & '
                 'unshare --net --pid --fork sleep 1000 & wait')
        for _ in range(2):
            subprocess.Popen(['unshare', '--pid', '--fork', 'sh', '-c',
                              inner])
        contain()

        def found() -> list[Any]:
            return sorted(map(str, self.containers()))

        # Two containers with two namespaces each, and the namespaces of
        # contain() and of the LAN.
        lab.until(lambda: len(found()) == 6)
        one, same, other, also, *outside = found()
        self.assertEqual((one, other), (same, also))
        self.assertNotEqual(one, other)
        self.assertEqual(['None', 'None'], sorted(outside))
