# SPDX-License-Identifier: Apache-2.0

"""Runs one test on every engine; tools/engines-of adds newer releases."""

from __future__ import annotations

import json
import os
import re
import statistics
import unittest

from tests.engines import base
from tests.engines import discovery_base
from tests.engines import runners
from tests.support import lab
from tests.support import program


class TestRunners(discovery_base.DiscoveryTestCase):

    def reaches(self, runner: runners.Runner, name: str, number: int
                ) -> None:
        """Wait until node and container reach each other."""
        inside = runner.inside(name)
        for address, node in ((runners.address(number), lab.NODE),
                              (runners.address6(number), lab.NODE6)):
            self.until(lambda: self.lab.ping(address, cold=False))
            self.until(lambda: inside('ping', '-c', '1', '-W', '1', node))

    def until_bound_by(self, runner: runners.Runner, *numbers: int) -> None:
        """Wait until these containers, and no others, are bound.

        Docker and other engines may rename an interface after they have added
        addresses. Each record must have the new name.
        """
        self.until(lambda: {
            (str(record.address), record.owner.ifname)
            for record in self.snapshot().live.values()} == {
            (address, runner.ifname) for number in numbers
            for address in (runners.address(number),
                            runners.address6(number))})

    def shown(self) -> set[str]:
        """Return the discovered containers that status shows."""
        return set(re.findall(r'(\S+/\S+) +\| +discovered', self.lab.run(
            'env', 'COLUMNS=200', program.BREAK0, '--config-file', base.CONF,
            'status', check=False).stdout))  # 200 columns fold no name

    def cases(self, kind: type[runners.Runner], is_named: bool = True
              ) -> None:
        row = {'suite': os.environ.get('BREAK0_SUITE', ''),
               'engine': kind.__name__, 'result': 'failed'}
        self.addCleanup(self.write, row)
        runner = kind(self)
        row['engine'] = runner.version()
        runner.run('before', 1, '02:00:00:00:01:01')
        self.start_agent()
        self.reaches(runner, 'before', 1)
        times = []
        for last in (2, 2, 3, 4, 5):
            mac = '02:00:00:00:01:%02x' % last
            runner.run('web', 2, mac)
            times.append(1000 * self.until(lambda: self.lab.run(
                'ping', '-c', '1', '-W', '0.02', runners.address(2),
                check=False).returncode == 0))
            row['ms'] = '%.0f (%.0f to %.0f)' % (
                statistics.median(times), min(times), max(times))
            self.reaches(runner, 'web', 2)
            self.until_bound_by(runner, 1, 2)
            self.assertIn(mac, [
                neighbour.get('lladdr') for neighbour
                in self.lab.ip('neigh', 'show', 'dev', 'break0')])
            if last == 2:
                names = {each + '/' + runner.ifname
                         for each in ('before', 'web')}
                if is_named:
                    self.until(lambda: {
                        re.sub('break0-lab-([a-z]+)-[0-9a-f]+', r'\1', each)
                        for each in self.shown()} == names)
                row['names'] = 'by name' if is_named else 'discovered-N'
            (runner.stop if last % 2 else runner.kill)('web')
            self.until_bound_by(runner, 1)
            # Engines do not wait until the kernel has deleted the macvlan.
            self.lab.until_free(mac)
        runner.stop('before')
        self.assert_nothing_left()
        row['result'] = 'works'

    @staticmethod
    def write(row: dict[str, str]) -> None:
        """Add a row to the table of tools/engines-of."""
        if 'BREAK0_ROWS' in os.environ:
            with open(os.environ['BREAK0_ROWS'], 'a') as file:
                file.write(json.dumps(row) + '\n')

    def test_docker(self) -> None:
        self.cases(runners.Docker)

    def test_podman(self) -> None:
        self.cases(runners.Podman)

    def test_nspawn(self) -> None:
        self.cases(runners.Nspawn)

    def test_lxc(self) -> None:
        self.cases(runners.LXC)

    @unittest.skipUnless(os.path.exists(runners.INCUSD),
                         'Debian has Incus from release 13 on')
    def test_incus(self) -> None:
        self.cases(runners.Incus)
