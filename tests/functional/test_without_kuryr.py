# SPDX-License-Identifier: Apache-2.0

"""break0 works where neither kuryr-kubernetes nor os-vif is installed."""

from __future__ import annotations

import os
import pathlib
import re
import subprocess
import sys

from tests.functional.cni import base
from tests.functional.cni.base import network

ROOT = pathlib.Path(__file__).parents[2]
REQUIREMENTS = ROOT / 'etc/cni/requirements.txt'
#: Packages in requirements.txt that only Kuryr needs.
_FOR_KURYR = {'kuryr-kubernetes', 'cotyledon', 'os-vif', 'oslo.concurrency',
              'oslo.versionedobjects', 'pyroute2', 'stevedore'}


def _requirements(path: pathlib.Path) -> dict[str, str]:
    lines = [line.partition(' #')[0] for line in path.read_text().splitlines()
             if line and not line.startswith('#')]
    return {re.split('[<>=]', line)[0]: line for line in lines}


class TestWithoutKuryr(base.CNITestCase):

    #: The script tools/without-kuryr creates this folder, since a lab has no
    #: network.
    bin = os.path.join(os.path.dirname(os.path.dirname(sys.executable)),
                       'without-kuryr', 'bin')

    def install(self) -> str:
        self.lab.run(self.bin + '/kuryr-break0', '--config-file', base.CONF,
                     'cni-install', '--without-agent', '--bin-dir', base.BIN)
        return base.BIN + '/break0'

    def call(self, *args: str, code: int = 0) -> str:
        done = subprocess.run(
            [self.bin + '/kuryr-break0', '--config-file', base.CONF, *args],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        self.assertEqual(code, done.returncode, done.stdout)
        self.assertNotIn('Traceback', done.stdout)
        return done.stdout

    def test_it_is_not_installed(self) -> None:
        for name in ('kuryr_kubernetes', 'os_vif', 'pyroute2'):
            self.assertNotEqual(0, subprocess.run(
                [self.bin + '/python', '-c', 'import ' + name],
                stderr=subprocess.DEVNULL).returncode)

    def test_requirements_equal_the_package(self) -> None:
        whole = _requirements(ROOT / 'requirements.txt')
        self.assertEqual({name: line for name, line in whole.items()
                          if name not in _FOR_KURYR},
                         _requirements(REQUIREMENTS))

    def test_plugin_and_command(self) -> None:
        netns = self.lab.add_netns('one')
        lan = network(subnets=('100.75.30.128/25',))
        address, = base.addresses(self.runtime.add(lan, netns))
        self.assert_reachable(address, 'one')
        self.assertIn(address, self.call('status'))
        self.assertEqual('', self.call('sync', '--dry-run'))
        self.call('probe', address)
        self.assertRegex(
            self.call('adopt', code=2),
            "'kuryr_kubernetes'. Run the command in the environment of")
        self.assertEqual(['agent-not-running'], re.findall(
            r'^[a-z]+: (.*)', self.call('doctor', code=4), re.M))
        self.runtime.remove(lan, netns)
        # On a Docker host, the doctor writes "container" and "host", not "pod"
        # and "node".
        with open(base.CONF, 'a') as file:
            file.write('discover = true\nallowed_cidrs = 100.76.0.0/16\n')
        self.lab.add_pod('two', '100.75.30.81')
        shown = self.call('doctor', code=1)
        self.assertIn('container-not-allowed', shown)
        self.assertNotRegex(shown, r'(?i)\b(pod|node)s?\b|kuryr-daemon')
        self.call('cleanup')
        self.assertIsNone(self.lab.link('break0'))
