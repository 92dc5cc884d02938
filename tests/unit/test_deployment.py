# Licensed under the Apache License, Version 2.0 (the "License"); you may
# not use this file except in compliance with the License. You may obtain
# a copy of the License at
#
#      http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS, WITHOUT
# WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the
# License for the specific language governing permissions and limitations
# under the License.

from __future__ import annotations

import copy
import os
from typing import Any
import unittest
from unittest import mock

from oslo_config import cfg

from kuryr_break0 import config
from tests import overlay


class OverlayTestCase(unittest.TestCase):

    @classmethod
    def setUpClass(cls) -> None:
        super().setUpClass()
        cls.base = overlay.base()
        cls.built = overlay.build()
        cls.daemon_set = cls.built['DaemonSet']
        cls.agent = overlay.container(cls.daemon_set, overlay.AGENT)
        cls.kuryr = overlay.container(cls.daemon_set, 'kuryr-cni')

    def mounts(self, container: dict[str, Any]) -> dict[str, dict[str, Any]]:
        """Where what of the host is mounted, by path of the container."""
        volumes = overlay.volumes(self.daemon_set)
        found = {}
        for mount in container['volumeMounts']:
            volume = volumes[mount['name']]
            self.assertNotIn(mount['mountPath'], found)
            found[mount['mountPath']] = {
                'host': volume.get('hostPath', {}).get('path'),
                'propagation': mount.get('mountPropagation'),
                'read_only': mount.get('readOnly', False)}
        return found


class TestKuryrsOwn(OverlayTestCase):

    def assert_kept(self, before: Any, after: Any, where: str = '') -> None:
        """All of before is in after, which may have more."""
        if isinstance(before, dict):
            self.assertIsInstance(after, dict, where)
            for key, value in before.items():
                self.assertIn(key, after, where)
                self.assert_kept(value, after[key], '%s.%s' % (where, key))
        elif isinstance(before, list) and isinstance(before[0], dict):
            for item in before:
                name = item.get('name') or item['key']
                found, = (each for each in after
                          if name in (each.get('name'), each.get('key')))
                self.assert_kept(item, found, '%s.%s' % (where, name))
        else:
            self.assertEqual(before, after, where)

    def test_nothing_is_lost(self) -> None:
        kept = copy.deepcopy(self.base)
        # Kuryr's script builds its image on the node itself.
        container = overlay.container(kept, 'kuryr-cni')
        kept['spec']['template']['spec']['containers'] = [container]
        self.assertEqual('kuryr/cni:latest', container.pop('image'))
        self.assertEqual('Never', container.pop('imagePullPolicy'))
        self.assert_kept(kept, self.daemon_set)

    def test_containers(self) -> None:
        self.assertEqual(
            ['kuryr-cni', overlay.AGENT],
            [each['name'] for each in
             self.daemon_set['spec']['template']['spec']['containers']])

    def test_with_crio(self) -> None:
        built = overlay.build(overlay.base(crio=True))['DaemonSet']
        self.assertNotIn('proc', overlay.volumes(built))
        self.assertEqual(self.agent,
                         overlay.container(built, overlay.AGENT))


class TestImage(OverlayTestCase):

    def test_one_with_the_package(self) -> None:
        for container in (self.kuryr, self.agent):
            self.assertEqual('registry.example.org/kuryr/cni-break0:latest',
                             container['image'])
            self.assertEqual('IfNotPresent', container['imagePullPolicy'])


class TestConfiguration(OverlayTestCase):

    def options(self, container: dict[str, Any],
                built: dict[str, dict[str, Any]]) -> config.Options:
        """The options that the environment of a container gives."""
        variables = {}
        for source in container['envFrom']:
            self.assertEqual(built['ConfigMap']['metadata']['name'],
                             source['configMapRef']['name'])
            variables.update(built['ConfigMap']['data'])
        for variable in container['env']:
            variables[variable['name']] = variable.get('value')
        # metrics_bind comes with the metrics.
        known = {opt.dest for opt in config.OPTS} | {'metrics_bind'}
        ours = {name: value for name, value in variables.items()
                if name.startswith('OS_BREAK0__')}
        self.assertLessEqual({name[len('OS_BREAK0__'):].lower()
                              for name in ours}, known)
        conf = cfg.ConfigOpts()
        with mock.patch.dict(os.environ, ours):
            conf([], default_config_files=[])
            return config.load(conf)

    def test_the_two_differ_in_one(self) -> None:
        kuryr = self.options(self.kuryr, self.built)
        agent = self.options(self.agent, self.built)
        self.assertEqual(vars(kuryr) | {'sysctl_dir': '/host/proc/sys'},
                         vars(agent))

    def test_namespace(self) -> None:
        self.assertEqual(self.daemon_set['metadata']['namespace'],
                         self.built['ConfigMap']['metadata']['namespace'])

    def test_what_is_commented_out(self) -> None:
        built = overlay.build(
            uncommented='- OS_BREAK0__ALLOWED_CIDRS=')
        container = overlay.container(built['DaemonSet'], overlay.AGENT)
        self.assertEqual(
            ['10.0.0.0/16', 'fd00:10::/64'],
            list(map(str, self.options(container, built).allowed_cidrs)))
        # The nodes get a new pod when an option changes.
        self.assertNotEqual(self.built['ConfigMap']['metadata']['name'],
                            built['ConfigMap']['metadata']['name'])

    def test_probes(self) -> None:
        bound = self.built['ConfigMap']['data']['OS_BREAK0__METRICS_BIND']
        for probe in ('readinessProbe', 'livenessProbe'):
            asked = self.agent[probe]['httpGet']
            self.assertEqual(bound, '%(host)s:%(port)d' % asked)
            self.assertEqual('/healthz', asked['path'])
        self.assertTrue(
            self.daemon_set['spec']['template']['spec']['hostNetwork'])


class TestAgent(OverlayTestCase):

    def test_command(self) -> None:
        self.assertEqual(['kuryr-break0', '--config-file',
                          '/etc/kuryr/kuryr.conf', 'agent'],
                         self.agent['command'])
        self.assertIn('/etc/kuryr', self.mounts(self.agent))

    def test_knows_its_node(self) -> None:
        self.assertIn({'name': 'KUBERNETES_NODE_NAME', 'valueFrom': {
            'fieldRef': {'fieldPath': 'spec.nodeName'}}}, self.agent['env'])

    def test_rights(self) -> None:
        rights = self.agent['securityContext']
        self.assertFalse(rights.get('privileged', False))
        self.assertTrue(rights['readOnlyRootFilesystem'])
        self.assertEqual({'drop': ['ALL'], 'add': ['NET_ADMIN', 'SYS_ADMIN']},
                         rights['capabilities'])

    def test_what_it_sees_of_the_host(self) -> None:
        seen = {path: mount for path, mount
                in self.mounts(self.agent).items() if mount['host']}
        self.assertEqual({
            '/run/kuryr-break0': {'host': '/run/kuryr-break0',
                                  'propagation': None, 'read_only': False},
            '/var/run/netns': {'host': '/var/run/netns',
                               'propagation': 'HostToContainer',
                               'read_only': True},
            '/host/proc/sys/net': {'host': '/proc/sys/net',
                                   'propagation': None, 'read_only': False},
        }, seen)

    def test_one_state_directory(self) -> None:
        state_dir = config.load(cfg.ConfigOpts()).state_dir
        for container in (self.kuryr, self.agent):
            self.assertEqual(state_dir,
                             self.mounts(container)[state_dir]['host'])

    def test_with_docker(self) -> None:
        built = overlay.build(uncommented='patchesJson6902:')['DaemonSet']
        agent = overlay.container(built, overlay.AGENT)
        # At the path that Kuryr's [cni_daemon] netns_proc_dir says.
        self.assertIn({'name': 'proc', 'mountPath': '/host_proc',
                       'readOnly': True}, agent['volumeMounts'])
        self.assertEqual('/proc',
                         overlay.volumes(built)['proc']['hostPath']['path'])
        self.assertEqual(['NET_ADMIN', 'SYS_ADMIN', 'SYS_PTRACE'],
                         agent['securityContext']['capabilities']['add'])
        for mount in self.agent['volumeMounts']:
            self.assertIn(mount, agent['volumeMounts'])
