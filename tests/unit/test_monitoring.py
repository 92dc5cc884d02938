# SPDX-License-Identifier: Apache-2.0

"""promtool of Prometheus accepts the alert rules and the dashboard."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import textwrap
from typing import Any
import unittest

import yaml

from tests.support.monitoring import DASHBOARD
from tests.support.monitoring import MONITORING
from tests.support.monitoring import read
from tests.support.monitoring import RULE_TESTS
from tests.support.monitoring import RULES


def alerts() -> list[str]:
    group, = yaml.safe_load(read(RULES))['groups']
    return [rule['alert'] for rule in group['rules']]


def panels() -> list[dict[str, Any]]:
    return list(json.loads(read(DASHBOARD))['panels'])


class PromtoolTestCase(unittest.TestCase):

    def promtool(self, *args: str) -> None:
        """Run promtool, which must succeed."""
        bin_dir = os.path.dirname(sys.executable)
        path = shutil.which('promtool', path=os.pathsep.join(
            [bin_dir, os.environ['PATH']]))
        if path is None:
            self.skipTest('needs promtool: tools/promtool ' + bin_dir)
        done = subprocess.run([path, *args], text=True,
                              stdout=subprocess.PIPE,
                              stderr=subprocess.STDOUT)
        self.assertEqual(0, done.returncode, done.stdout)


class TestRules(PromtoolTestCase):

    def test_they_are_rules(self) -> None:
        self.promtool('check', 'rules', '--lint=all', '--lint-fatal', RULES)

    def test_when_they_fire(self) -> None:
        self.promtool('test', 'rules', RULE_TESTS)

    def test_each_is_seen_to_fire_and_is_in_the_manual(self) -> None:
        self.assertGreater(len(alerts()), 5)
        for alert in alerts():
            self.assertIn(alert, read(RULE_TESTS))
            self.assertIn('``%s``' % alert, read(MONITORING))
        self.assertEqual(len(alerts()),
                         read(MONITORING).count('``KuryrBreak0'))


class TestDashboard(PromtoolTestCase):

    def test_its_queries_are_queries(self) -> None:
        queries = [target['expr'] for panel in panels()
                   for target in panel['targets']]
        self.assertGreater(len(queries), 10)
        rules = [{'record': 'panel:%d' % number, 'expr': query
                  .replace('$__rate_interval', '5m')
                  .replace('$instance', 'node-1')}
                 for number, query in enumerate(queries)]
        self.assertNotIn('$', repr(rules))
        with tempfile.NamedTemporaryFile('w', suffix='.yaml') as file:
            yaml.safe_dump({'groups': [{'name': 'dashboard',
                                        'rules': rules}]}, file)
            file.flush()
            self.promtool('check', 'rules', file.name)

    def test_each_panel_has_its_place(self) -> None:
        taken = set()
        for panel in panels():
            at = panel['gridPos']
            cells = {(x, y) for x in range(at['x'], at['x'] + at['w'])
                     for y in range(at['y'], at['y'] + at['h'])}
            self.assertEqual(set(), taken & cells, panel['title'])
            self.assertLessEqual(at['x'] + at['w'], 24, panel['title'])
            taken |= cells
        ids = [panel['id'] for panel in panels()]
        self.assertEqual(len(ids), len(set(ids)))

    def test_it_is_bound_to_no_data_source(self) -> None:
        for panel in panels():
            for each in (panel, *panel['targets']):
                self.assertEqual('${datasource}', each['datasource']['uid'])


class TestManual(PromtoolTestCase):

    def test_the_configuration_of_prometheus(self) -> None:
        blocks = re.findall(r'code-block:: yaml\n\n((?:   .*\n|\n)+)',
                            read(MONITORING))
        configurations = [block for block in map(textwrap.dedent, blocks)
                          if block.startswith('scrape_configs:')]
        self.assertEqual(2, len(configurations))
        for configuration in map(yaml.safe_load, configurations):
            for job in configuration['scrape_configs']:
                # Debian builds Prometheus without Kubernetes service
                # discovery.
                job.pop('kubernetes_sd_configs', None)
            with tempfile.NamedTemporaryFile('w', suffix='.yaml') as file:
                yaml.safe_dump(configuration, file)
                file.flush()
                self.promtool('check', 'config', file.name)
        for block in blocks:
            self.assertTrue(yaml.safe_load(textwrap.dedent(block)))
