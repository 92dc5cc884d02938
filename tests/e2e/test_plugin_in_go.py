# SPDX-License-Identifier: Apache-2.0

"""Tests Kuryr's CNI plugin in Go, built as the page install/bare says."""

from __future__ import annotations

import json
import os
import pathlib
import shutil
import subprocess
import sys
from typing import Any
import unittest

from tests.e2e import base as e2e_base
from tests.support import kuryr
from tests.support import lab
from tests.support import pages

REPOSITORY = pathlib.Path(__file__).parents[2]
SOURCES = pathlib.Path(sys.prefix, 'kuryr-sources')
POD, POD6 = '100.75.30.71', 'fd00:30::71'


@unittest.skipUnless(SOURCES.is_dir() and shutil.which('go'),
                     'needs golang-go and the sources of Kuryr: '
                     'tools/kuryr-sources .venv/kuryr-sources')
class TestPluginInGo(e2e_base.DaemonTestCase):

    bin_dir: str

    @classmethod
    def setUpClass(cls) -> None:
        super().setUpClass()
        cls.bin_dir = str(REPOSITORY / 'build')
        subprocess.run([str(REPOSITORY / 'tools/kuryr-cni-in-go'),
                        cls.bin_dir + '/kuryr-cni'], check=True)

    def call(self, pod: kuryr.Pod, command: str, bin_dir: str,
             status: int = 0) -> dict[str, Any]:
        """Run a plugin like a runtime; return its answer's nonempty fields."""
        done = self.node.cni(pod, command, bin_dir)
        self.assertEqual(status, done.returncode, done)
        answer: dict[str, Any] = json.loads(done.stdout or '{}')
        # Only one of the plugins omits empty fields.
        return {key: value for key, value in answer.items() if value}

    def test_the_same_as_in_python(self) -> None:
        self.node.lab.add_ipv6()
        self.node.start_daemon()
        vif = kuryr.macvlan_vif(POD, POD6, subnets=[
            '%s/24' % lab.LAN, '%s/64' % lab.LAN6])
        pod = self.node.add_pod('pod', vif=vif)
        answers = []
        for bin_dir in (self.bin_dir, kuryr.BIN):
            answers.append(self.call(pod, 'ADD', bin_dir))
            self.node.lab.settle()
            self.assert_reachable(pod)
            self.call(pod, 'DEL', bin_dir)
            self.assertEqual({}, self.node.lab.routes())
        self.assertEqual(*answers)
        self.assertEqual([POD + '/24', POD6 + '/64'],
                         [each['address'] for each in answers[0]['ips']])

    def test_the_error_of_the_daemon(self) -> None:
        # A name conflict: break0 is a veth.
        self.node.lab.run('ip', 'link', 'add', 'break0', 'type', 'veth',
                          'peer', 'name', 'peer0')
        self.node.start_daemon('strict = true')
        pod = self.node.add_pod('pod', POD)
        answer = self.call(pod, 'ADD', self.bin_dir, status=1)
        self.assertEqual(11, answer['code'])  # try again later
        self.assertIn('break0 ', answer['msg'])
        self.assertIn('Got invalid status code', self.call(
            pod, 'ADD', kuryr.BIN, status=1)['msg'])

    def test_it_reads_no_configuration(self) -> None:
        self.node.write_conf('\n[cni_daemon]\nbind_address = 127.0.0.1:1')
        pod = self.node.add_pod('pod', POD)
        answer = self.call(pod, 'ADD', self.bin_dir, status=1)
        self.assertEqual(
            'Looks like http://localhost:5036/addNetwork cannot be reached. '
            'Is kuryr-daemon running?', answer['msg'])

    def test_the_page(self) -> None:
        """The page's commands replace the link to pip's plugin."""
        plugins = '/opt/cni/bin'
        place = plugins if os.path.isdir(plugins) else '/opt'
        self.node.lab.run('mount', '-t', 'tmpfs', 'private', place)
        self.addCleanup(self.node.lab.run, 'umount', place)
        os.makedirs(plugins, exist_ok=True)
        program = os.path.join(kuryr.BIN, 'kuryr-cni')
        before = pathlib.Path(program).read_bytes()
        os.symlink(program, plugins + '/kuryr-cni')
        *steps, back = pages.steps('install/bare.rst',
                                   "Kuryr's CNI plugin in Go")
        self.assertTrue(steps[0].command.startswith('apt-get install '))
        # The remaining steps find the sources by PIP_FIND_LINKS, without a
        # network.
        done = self.run_steps(steps[1:])
        self.assertEqual(steps[-1].output, done.splitlines()[-1])
        self.assertFalse(os.path.islink(plugins + '/kuryr-cni'))
        self.assertEqual(before, pathlib.Path(program).read_bytes())
        self.node.start_daemon()
        pod = self.node.add_pod('pod', POD)
        self.call(pod, 'ADD', plugins)
        self.assert_reachable(pod)
        self.run_steps([back])
        self.assertEqual(program, os.readlink(plugins + '/kuryr-cni'))

    def run_steps(self, steps: list[pages.Step]) -> str:
        done = subprocess.run(
            ['sh', '-e', '-c', '\n'.join(each.command for each in steps)],
            cwd=self.node.dir, text=True, stdout=subprocess.PIPE,
            stderr=subprocess.PIPE, env={
                **os.environ, 'PATH': '%s:%s' % (kuryr.BIN,
                                                 os.environ['PATH']),
                'PIP_CONFIG_FILE': os.devnull, 'PIP_NO_INDEX': '1',
                'PIP_FIND_LINKS': str(SOURCES),
                'PIP_NO_BUILD_ISOLATION': '0',
                'PIP_DISABLE_PIP_VERSION_CHECK': '1'})
        self.assertEqual(0, done.returncode, done.stderr[-3000:])
        return done.stdout
