# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import os
from typing import Optional

from tests.e2e.base import DaemonTestCase
from tests.support import kuryr
from tests.support import lab
from tests.support import metrics
from tests.support import program


class TestMetrics(DaemonTestCase):
    """The agent counts requests, since a worker ends with its request."""

    def start_agent(self) -> None:
        agent = program.start(
            [program.BREAK0, '--config-file', self.node.conf, '--log-file',
             os.path.join(self.node.dir, 'agent.log'), 'agent'])
        self.addCleanup(agent.wait)
        self.addCleanup(agent.kill)

    def assert_value(self, expected: float, name: str,
                     **labels: str) -> None:
        """Wait until a metric has a value."""
        def found() -> Optional[float]:
            return (metrics.total(name) if name.startswith('addresses_')
                    else metrics.value(name, **labels))

        lab.until(lambda: found() == expected,
                  lambda: '%s %s is %s, not %s\n%s' % (
                      name, labels, found(), expected, self.node.errors()))

    def pods(self, numbers: range) -> list[kuryr.Pod]:
        return [self.node.add_pod('pod-%d' % number,
                                  '100.75.30.%d' % number)
                for number in numbers]

    def test_binds_of_workers(self) -> None:
        self.start_patient_daemon()
        before = self.pods(range(100, 110))
        self.node.requests(before, 'ADD')
        for pod in before[:4]:
            self.delete(pod)
        self.start_agent()
        self.assert_value(10, 'bind_seconds_count')
        self.assert_value(4, 'unbind_seconds_count')
        self.assert_value(6, 'addresses_routed')
        after = self.pods(range(110, 130))
        self.node.requests(after, 'ADD')
        self.assert_value(30, 'bind_seconds_count')
        self.assert_value(26, 'addresses_desired')
        self.assert_value(0, 'addresses_out_of_sync')
        self.node.requests(after, 'DEL')
        self.assert_value(24, 'unbind_seconds_count')
        self.assert_value(6, 'addresses_routed')
        for name in ('bind_failures_total', 'unbind_failures_total',
                     'sync_failures_total'):
            self.assert_value(0, name)
        for reason in ('device', 'unclaimed', 'sandbox_gone'):
            self.assert_value(0, 'repairs_total', reason=reason)

    def test_binds_that_fail(self) -> None:
        self.node.lab.run('ip', 'link', 'add', 'break0', 'type', 'veth',
                          'peer', 'name', 'peer0')
        self.node.start_daemon()
        for pod in self.pods(range(100, 103)):
            self.add(pod)
        self.start_agent()
        self.assert_value(3, 'bind_failures_total')
        self.assert_value(3, 'addresses_out_of_sync')
        self.node.lab.run('ip', 'link', 'del', 'break0')
        self.assert_value(3, 'addresses_routed')
        self.assert_value(1, 'repairs_total', reason='device')
        self.assert_value(3, 'repairs_total', reason='route')
        self.assert_value(0, 'addresses_out_of_sync')

    def test_a_sandbox_that_ended_unseen(self) -> None:
        self.node.start_daemon()
        ended, other = self.pods(range(100, 102))
        self.add(ended)
        self.node.lab.del_netns(ended.name)
        self.add(other)
        self.start_agent()
        self.assert_value(1, 'repairs_total', reason='sandbox_gone')
        self.assert_value(1, 'addresses_desired')
