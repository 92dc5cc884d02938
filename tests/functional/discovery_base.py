# SPDX-License-Identifier: Apache-2.0

"""The bases of tests of the discovery of containers."""

from __future__ import annotations

import os
import select
import subprocess
import time
from typing import Any, Callable
from unittest import mock

from kuryr_break0.discovery import finder
from kuryr_break0.discovery import namespace
from kuryr_break0 import ledger
from tests.functional import base
from tests.support import lab
from tests.support import program

CONF = '/run/break0.conf'
OPTIONS = ('discover = true\nallowed_cidrs = 100.75.0.0/16,fd00:30::/64\n'
           'metrics_bind =\nresync_interval = 3600\n')
#: Options without a search of processes, since the processes of other tests
#: have namespaces and cause constant work.
QUIET = OPTIONS + 'proc_dirs = /run/none\n'
ONE, TWO = '100.75.30.81', '100.75.30.82'
ONE6 = 'fd00:30::81'
LATER = '100.75.30.98'
#: The control group of the agent's systemd service.
AGENT = '/system.slice/kuryr-break0-agent.service'


def is_idle(found: finder.Finder) -> bool:
    """Return whether the finder has no work due within 600 seconds."""
    return found.find_due() > time.monotonic() + 600


class DiscoveryTestCase(base.LabTestCase):

    def setUp(self) -> None:
        super().setUp()
        self.lab.add_ipv6()

    def start(self, options: str = OPTIONS, *before: str
              ) -> subprocess.Popen[bytes]:
        """Start an agent and wait until it has completed one search."""
        with open(CONF, 'w') as file:
            file.write('[break0]\n' + options)
        with open('/run/agent.log', 'ab') as log:
            earlier = self.log().count('Watching ')
            self.agent = program.start(
                [*before, program.BREAK0, '--config-file', CONF, 'agent'],
                stderr=log)
        self.addCleanup(self.agent.wait)
        self.addCleanup(self.agent.kill)
        self.until(lambda: self.log().count('Watching ') > earlier)
        return self.agent

    @staticmethod
    def log() -> str:
        with open('/run/agent.log') as file:
            return file.read()

    def until(self, condition: Callable[[], Any]) -> None:
        lab.until(condition, self.log)

    def until_looked(self) -> None:
        """Wait until the agent has examined every earlier change.

        The agent examines a namespace at most namespace.LAST seconds after
        its event. So a namespace added after this time is examined last.
        """
        time.sleep(namespace.LAST)
        self.lab.add_pod('later', LATER)
        self.until(lambda: LATER in self.bound())
        self.lab.del_netns('later')
        self.until(lambda: LATER not in self.bound()
                   and LATER not in self.lab.routes())

    def until_bound(self, *addresses: str) -> None:
        self.until(lambda: set(self.lab.routes()) == set(addresses))
        self.until(lambda: self.bound() == set(addresses))

    def inside(self, name: str, *command: str) -> None:
        self.lab.run(*command, netns=name)

    def assert_reachable(self, address: str, name: str) -> None:
        # The agent configures the container after it has set the route.
        node = lab.NODE6 if ':' in address else lab.NODE
        self.until(lambda: self.lab.ping(address))
        self.until(lambda: self.lab.ping(node, name))


class FinderTestCase(base.LabTestCase):
    """A finder in the test process, driven only by its own events.

    An agent also searches after each sync, which would hide a missed event.
    """

    #: Replaces /proc, since the processes of other tests have namespaces too.
    PROC = '/run/proc'

    def setUp(self) -> None:
        super().setUp()
        options = base.options(
            discover=True, proc_dirs=[self.PROC], resync_interval=3600,
            allowed_cidrs=['100.75.0.0/16'])
        kept = ledger.Ledger(options.state_dir)
        kept.prepare()
        self.finder = finder.Finder(options, kept)
        self.addCleanup(self.finder.close)
        # Shorten the pause between two examinations of a namespace.
        pauses = mock.patch.object(namespace, 'LAST', 0.1)
        pauses.start()
        self.addCleanup(pauses.stop)

    def start_unnamed(self) -> subprocess.Popen[bytes]:
        """Start a process in a network namespace that has no name."""
        process = subprocess.Popen(['unshare', '--net', 'sleep', '1000'])
        self.addCleanup(process.wait)
        self.addCleanup(process.kill)
        lab.until(lambda: os.readlink('/proc/%d/ns/net' % process.pid)
                  != os.readlink('/proc/self/ns/net'))
        return process

    def work(self) -> None:
        """Run the finder until it is idle."""
        def is_done() -> bool:
            if not is_idle(self.finder):
                self.step()
            return is_idle(self.finder)

        lab.until(is_done)

    def step(self) -> None:
        wait = 0.0 if is_idle(self.finder) else max(
            0.0, self.finder.find_due() - time.monotonic())
        if select.select(self.finder.list_readable(), [], [], wait)[0]:
            self.finder.read_events()
        else:
            self.finder.work()

    def assert_bound(self, *addresses: str) -> None:
        def is_so() -> bool:
            # The kernel deletes a namespace with a delay and sends the event
            # of its end afterwards.
            self.work()
            self.step()
            return self.bound() == set(addresses)

        lab.until(is_so)
        self.assertEqual(set(addresses), set(self.lab.routes()))
