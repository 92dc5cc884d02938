# SPDX-License-Identifier: Apache-2.0

"""The base of tests of the metrics."""

from __future__ import annotations

import contextlib
from typing import Any, Callable, Optional

from tests.functional import base
from tests.support import lab
from tests.support import metrics
from tests.support import program

CONF = '/run/kuryr.conf'
LOG = '/run/agent.log'
MAC = '02:00:00:00:00:71'


class MetricsTestCase(base.LabTestCase):

    where = metrics.DEFAULT
    #: Arguments before the agent's command, such as those of setpriv.
    prefix: tuple[str, ...] = ()

    def configure(self, *lines: str, default: str = '') -> None:
        with open(CONF, 'w') as file:
            file.write('[DEFAULT]\n%s\n[break0]\n%s\n' % (
                default, '\n'.join(lines)))

    def start(self, *lines: str, default: str = '',
              serving: bool = True) -> None:
        """Start an agent with options of [break0], and wait for a sync.

        By default the timer causes no sync: its interval is one hour.
        """
        self.configure(*(lines or ('resync_interval = 3600',)),
                       default=default)
        self.agent = program.start(
            [*self.prefix, program.BREAK0, '--config-file', CONF,
             '--log-file', LOG,
             'agent'])
        self.addCleanup(self.agent.wait)
        self.addCleanup(self.agent.kill)
        if serving:
            self.wait_for(lambda: self.value('sync_seconds_count') or 0)

    def log(self) -> str:
        with contextlib.suppress(FileNotFoundError), open(LOG) as file:
            return file.read()
        return ''

    def wait_for(self, condition: Callable[[], Any]) -> None:
        lab.until(condition, self.log)

    def get(self, path: str = '/metrics') -> Optional[metrics.Answer]:
        return metrics.get(path, self.where)

    def value(self, name: str, **labels: str) -> Optional[float]:
        if name.startswith('addresses_') or name == 'device_up':
            return metrics.total(name, self.where)
        return metrics.value(name, self.where, **labels)

    def wait_for_value(self, expected: float, name: str,
                       **labels: str) -> None:
        lab.until(lambda: self.value(name, **labels) == expected,
                  lambda: '%s %s is %s, not %s\n%s' % (
                      name, labels, self.value(name, **labels), expected,
                      self.log()))

    def repairs(self, reason: str) -> float:
        value = self.value('repairs_total', reason=reason)
        assert value is not None, reason
        return value
