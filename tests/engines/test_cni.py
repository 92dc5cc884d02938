# SPDX-License-Identifier: Apache-2.0

"""Tests engines that call the CNI plugin."""

from __future__ import annotations

import json
import os

from tests.engines import base
from tests.functional.cni import base as cni_base
from tests.support import program


class CNITestCase(base.EngineTestCase):

    def setUp(self) -> None:
        super().setUp()
        os.makedirs(cni_base.BIN)
        for name in os.listdir(cni_base.PLUGINS):
            os.symlink('%s/%s' % (cni_base.PLUGINS, name),
                       '%s/%s' % (cni_base.BIN, name))
        self.start_agent()
        self.lab.run(program.BREAK0, '--config-file', base.CONF, 'cni-install',
                     '--bin-dir', cni_base.BIN, '--shim',
                     str(cni_base.SHIM))

    def write_network(self, **keys: object) -> None:
        os.makedirs('/run/net.d', exist_ok=True)
        listed = cni_base.network(version='0.4.0', **keys)
        with open('/run/net.d/%s.conflist' % listed['name'], 'w') as file:
            json.dump(listed, file)


class TestPodman(CNITestCase):

    def setUp(self) -> None:
        super().setUp()
        self.write_network()
        self.podman = base.Podman(self, 'cni')

    def assert_reached(self, name: str) -> None:
        found = self.podman.attachment(name, 'lan')
        self.lab.settle()
        for address in (found['IPAddress'], found['GlobalIPv6Address']):
            self.assert_reaches(address, self.podman.inside(name))

    def test_run_restart_stop_kill(self) -> None:
        self.podman.run('web', '--network', 'lan')
        self.assert_reached('web')
        record, *_ = self.snapshot().live.values()
        self.assertEqual(('web', 'lan'), (record.pod, record.network))
        self.podman('restart', '--time', '0', 'web')
        self.assert_reached('web')
        self.podman('stop', '--time', '0', 'web')
        self.assert_nothing_left()
        self.podman('start', 'web')
        self.assert_reached('web')
        pid = self.podman('inspect', '--format', '{{.State.Pid}}', 'web')
        os.kill(int(pid), 9)
        self.podman('wait', 'web')
        self.podman('rm', '--force', 'web')
        self.assert_nothing_left()

    def test_two_networks(self) -> None:
        self.lab.run('ip', 'link', 'add', 'eth1', 'type', 'veth', 'peer',
                     'name', 'nic1')
        for name in ('eth1', 'nic1'):
            self.lab.run('ip', 'link', 'set', name, 'up')
        self.lab.run('ip', 'address', 'add', '10.9.0.1/24', 'dev', 'eth1')
        self.write_network(name='storage', master='eth1',
                           subnets=('10.9.0.128/25',))
        self.podman.run('web', '--network', 'lan,storage')
        self.assert_reached('web')
        address = self.podman.address('web', 'storage')
        self.assertTrue(self.lab.ping(address))
        self.assertTrue(self.podman.inside('web')(
            'ping', '-c', '1', '-W', '1', '10.9.0.1'))
        self.assertEqual('eth1', self.routed()[address])
        self.podman('rm', '--force', '--time', '0', 'web')
        self.assert_nothing_left()


class TestContainerd(CNITestCase):

    def test_sandbox_stop_remove(self) -> None:
        self.write_network()
        containerd = base.Containerd(self, cni_base.BIN)
        ids = [containerd.run_sandbox(name) for name in ('web', 'db')]
        self.lab.settle()
        for each, pod in zip(ids, ('shop/web', 'shop/db')):
            address = containerd.address(each)
            name = os.path.basename(containerd.netns(each))
            self.assert_reaches(address, lambda *command: self.lab.run(
                *command, netns=name, check=False).returncode == 0)
            records = {str(record.address): record
                       for record in self.snapshot().live.values()}
            self.assertEqual((pod, each), (
                records[address].pod, records[address].owner.container_id))
        for each in ids:
            for method in ('StopPodSandbox', 'StopPodSandbox',
                           'RemovePodSandbox'):
                containerd.call(method, base.message(1, each))
        self.assert_nothing_left()
