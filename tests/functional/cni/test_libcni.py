# SPDX-License-Identifier: Apache-2.0

"""Tests the plugin with the real libcni, by a driver built here."""

from __future__ import annotations

import json
import os
import pathlib
import subprocess
import tempfile

from tests.functional.cni import base
from tests.functional.cni.base import ID
from tests.functional.cni.base import network

SOURCE = pathlib.Path(__file__).with_name('libcni.go')


class TestLibcni(base.WithShim, base.CNITestCase):

    @classmethod
    def setUpClass(cls) -> None:
        super().setUpClass()
        directory = tempfile.TemporaryDirectory()
        cls.addClassCleanup(directory.cleanup)
        cls.program = directory.name + '/libcni'
        subprocess.run(
            ['go', 'build', '-o', cls.program, SOURCE], check=True, env={
                'PATH': os.environ['PATH'], 'GO111MODULE': 'off',
                'GOPATH': '/usr/share/gocode', 'GOFLAGS': '',
                'GOCACHE': directory.name + '/cache'})

    def libcni(self, command: str, container: str = ID, netns: str = 'one',
               code: int = 0) -> str:
        done = subprocess.run(
            [self.program, command, '/run/lan.conflist',
             base.PLUGINS + ':' + base.BIN, container, '/run/netns/' + netns,
             'eth0'], stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            text=True)
        self.assertEqual(code, done.returncode, done.stdout)
        return done.stdout

    def write(self, version: str, **keys: object) -> None:
        with open('/run/lan.conflist', 'w') as file:
            json.dump(network(version=version, **keys), file)

    def test_all_that_it_knows(self) -> None:
        self.lab.add_netns('one')
        for version in ('0.3.1', '0.4.0', '1.0.0'):
            self.write(version)
            self.libcni('VALIDATE')
            result = json.loads(self.libcni('ADD'))
            address = base.addresses(result)[0]
            self.assert_reachable(address, 'one')
            record, *_ = self.snapshot().live.values()
            self.assertEqual(('shop/web-0', 'lan'),
                             (record.pod, record.network))
            if version != '0.3.1':
                self.libcni('CHECK')
            self.libcni('DEL')
            self.libcni('DEL')
            self.assertEqual(set(), self.bound())

    def test_errors_reach_it(self) -> None:
        self.lab.add_netns('one')
        self.write('1.0.0', mode='private')
        self.assertIn('private mode on eth0', self.libcni('ADD', code=1))
        self.agent.kill()
        self.agent.wait()
        self.assertIn('Start it', self.libcni('DEL', code=1))
