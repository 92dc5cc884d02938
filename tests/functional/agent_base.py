# SPDX-License-Identifier: Apache-2.0

"""The base of tests that run the agent."""

from __future__ import annotations

import ipaddress
import os
import subprocess
from typing import Any, Callable

from kuryr_break0 import ledger
from tests.functional import base
from tests.functional.base import OTHER_OWNER
from tests.functional.base import OTHER_POD
from tests.functional.base import POD
from tests.support import lab
from tests.support import metrics
from tests.support import program

#: 250 addresses; only POD has a pod in the lab.
PODS = {'10.20.0.%d' % number for number in range(1, 250)} | {POD}
MAC = 'fa:16:3e:00:00:01'
CONF = '/run/kuryr.conf'


class AgentTestCase(base.LabTestCase):

    def setUp(self) -> None:
        super().setUp()
        self.netns = self.lab.add_pod('pod', POD, mac=MAC)
        self.bind_all()
        self.healthy = self.items()
        for found in self.healthy:
            self.assertEqual(PODS, set(found))
        with open(CONF, 'w') as file:
            # In these tests events must cause the repairs, not the timer.
            file.write('[break0]\nresync_interval = 3600\n')
        self.agent = self.start()

    def bind_all(self) -> None:
        self.bind(*sorted(PODS - {POD}), mac_of_pod=MAC)
        self.bind(POD, netns=self.netns, mac_of_pod=MAC)

    def launch(self, **environ: str) -> subprocess.Popen[str]:
        """Start the agent with additional environment variables."""
        agent = program.start(
            [program.BREAK0, '--config-file', CONF,
             '--log-file', '/run/agent.log',
             'agent'], env={**os.environ, **environ})
        self.addCleanup(agent.wait)
        self.addCleanup(agent.kill)
        return agent

    def start(self) -> subprocess.Popen[str]:
        """Start the agent, and wait for its first sync."""
        agent = self.launch()
        self.wait_for(lambda: metrics.value('sync_seconds_count'))
        return agent

    def log(self) -> str:
        try:
            with open('/run/agent.log') as file:
                return file.read()
        except FileNotFoundError:
            return ''

    def wait_for(self, condition: Callable[[], Any]) -> float:
        """Wait for a condition; return the duration in seconds."""
        return lab.until(condition, self.log)

    def items(self) -> tuple[dict[str, Any], ...]:
        """Return break0's routes and permanent neighbours, by address."""
        return self.lab.routes(), {
            each['dst']: (each['lladdr'], each['protocol'])
            for each in self.lab.ip(
                'neigh', 'show', 'dev', 'break0', 'nud', 'permanent')
        } if self.lab.link('break0') else {}

    def healed(self) -> bool:
        return (self.items() == self.healthy
                and self.lab.ping(POD, cold=False)
                and self.lab.ping(lab.NODE, 'pod', cold=False))

    def assert_noticed(self) -> None:
        """Check that the agent sets the route of a new record."""
        made = ledger.Ledger('/run/kuryr-break0', 10)
        address = ipaddress.ip_address(OTHER_POD)
        with made.lock():
            made.records.put([ledger.Record(address, OTHER_OWNER,
                                            lab.PARENT)])
        self.wait_for(lambda: OTHER_POD in self.lab.routes())

    def fault(self, name: str, *commands: str) -> None:
        """Cause a fault and wait until the agent has repaired it."""
        with self.subTest(fault=name):
            for command in commands:
                self.lab.run(*command.split())
            took = self.wait_for(self.healed)
            print('%s: mended and pinged after %.2f s' % (name, took),
                  flush=True)
