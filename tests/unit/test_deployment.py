# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import configparser
import copy
import glob
import os
import subprocess
import sys
import tempfile
from typing import Any
import unittest
from unittest import mock

from oslo_config import cfg
import yaml

from kuryr_break0 import config
from tests.support import overlay


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
        """Return the mounted paths of the host, by path in the container."""
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
        """Assert that `after` has at least all parts of `before`."""
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
        # Kuryr's script builds the image on the node, and so refers to no
        # registry.
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
            self.assertEqual('registry.example.org/kuryr/cni-break0:1',
                             container['image'])
            self.assertEqual('IfNotPresent', container['imagePullPolicy'])


class TestConfiguration(OverlayTestCase):

    def options(self, container: dict[str, Any],
                built: dict[str, dict[str, Any]]) -> config.Options:
        """Return the options that the environment of a container sets."""
        variables = {}
        for source in container['envFrom']:
            self.assertEqual(built['ConfigMap']['metadata']['name'],
                             source['configMapRef']['name'])
            variables.update(built['ConfigMap']['data'])
        for variable in container['env']:
            variables[variable['name']] = variable.get('value')
        known = {opt.dest for opt in config.OPTS}
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

    def test_commented_options(self) -> None:
        built = overlay.build(
            uncommented='- OS_BREAK0__ALLOWED_CIDRS=')
        container = overlay.container(built['DaemonSet'], overlay.AGENT)
        self.assertEqual(
            ['10.0.0.0/16', 'fd00:10::/64'],
            list(map(str, self.options(container, built).allowed_cidrs)))
        # The ConfigMap's name has a hash of its data, so a changed option
        # creates new pods.
        self.assertNotEqual(self.built['ConfigMap']['metadata']['name'],
                            built['ConfigMap']['metadata']['name'])

    def test_switched_off(self) -> None:
        built = overlay.build(uncommented='- OS_BREAK0__ENABLED=')
        for name in ('kuryr-cni', overlay.AGENT):
            container = overlay.container(built['DaemonSet'], name)
            self.assertFalse(self.options(container, built).enabled)

    def test_probes(self) -> None:
        bound = self.built['ConfigMap']['data']['OS_BREAK0__METRICS_BIND']
        for probe, path in (('readinessProbe', '/healthz'),
                            ('livenessProbe', '/livez')):
            asked = self.agent[probe]['httpGet']
            self.assertEqual(bound, '%(host)s:%(port)d' % asked)
            self.assertEqual(path, asked['path'])
        self.assertTrue(
            self.daemon_set['spec']['template']['spec']['hostNetwork'])


class TestAgent(OverlayTestCase):

    def test_command(self) -> None:
        self.assertEqual(['kuryr-break0', '--config-file',
                          '/etc/kuryr/kuryr.conf', 'agent'],
                         self.agent['command'])
        self.assertIn('/etc/kuryr', self.mounts(self.agent))

    def test_adopts_earlier_pods(self) -> None:
        shell, option, line = self.agent['lifecycle']['postStart']['exec'][
            'command']
        self.assertEqual(('sh', '-c'), (shell, option))
        # If adopt finds no pods or no API, the container must start all the
        # same.
        self.assertRegex(line, r'^kuryr-break0 .* adopt .* \|\| true$')
        self.assertNotIn('\n', line)

    def test_knows_its_node(self) -> None:
        self.assertIn({'name': 'KUBERNETES_NODE_NAME', 'valueFrom': {
            'fieldRef': {'fieldPath': 'spec.nodeName'}}}, self.agent['env'])

    def test_rights(self) -> None:
        rights = self.agent['securityContext']
        self.assertFalse(rights.get('privileged', False))
        self.assertTrue(rights['readOnlyRootFilesystem'])
        self.assertEqual({'drop': ['ALL'], 'add': ['NET_ADMIN', 'SYS_ADMIN']},
                         rights['capabilities'])

    def test_mounts_of_the_host(self) -> None:
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
        # This path is Kuryr's [cni_daemon] netns_proc_dir.
        self.assertIn({'name': 'proc', 'mountPath': '/host_proc',
                       'readOnly': True}, agent['volumeMounts'])
        self.assertEqual('/proc',
                         overlay.volumes(built)['proc']['hostPath']['path'])
        self.assertEqual(['NET_ADMIN', 'SYS_ADMIN', 'SYS_PTRACE'],
                         agent['securityContext']['capabilities']['add'])
        for mount in self.agent['volumeMounts']:
            self.assertIn(mount, agent['volumeMounts'])


class TestDockerfile(unittest.TestCase):

    def setUp(self) -> None:
        super().setUp()
        self.stages = self.read('kubernetes')

    @staticmethod
    def read(name: str) -> list[list[tuple[str, list[str]]]]:
        """Return the instructions of a Dockerfile, by stage.

        The first list has the instructions before the first stage.
        """
        with open(os.path.join(overlay.ROOT, 'etc', name,
                               'Dockerfile')) as file:
            lines = file.read().replace('\\\n', ' ').splitlines()
        stages: list[list[tuple[str, list[str]]]] = [[]]
        for line in lines:
            if line and not line.startswith('#'):
                instruction, *words = line.split()
                if instruction == 'FROM':
                    stages.append([])
                stages[-1].append((instruction, words))
        return stages

    def test_on_top_of_kuryrs_image(self) -> None:
        before, wheel, last = self.stages
        self.assertEqual([('ARG', ['BASE=kuryr/cni:latest'])], before)
        # Both stages use Kuryr's image, so the build works with the cluster's
        # registry alone.
        self.assertEqual(('FROM', ['${BASE}', 'AS', 'wheel']), wheel[0])
        self.assertEqual(('FROM', ['${BASE}']), last[0])
        # The DaemonSet expects the entry point and the command of Kuryr's
        # image.
        self.assertEqual({'FROM', 'COPY', 'RUN'},
                         {instruction for instruction, _ in last})

    def copied(self, stage: list[tuple[str, list[str]]]) -> set[str]:
        """Return the paths that a stage copies from the repository."""
        return {source for instruction, words in stage
                if instruction == 'COPY'
                and not words[0].startswith('--from=')
                for source in words[:-1]}

    def test_builders_get_the_copied_files(self) -> None:
        with open(os.path.join(overlay.ROOT, '.dockerignore')) as file:
            first, *lines = [line.strip() for line in file
                             if not line.startswith('#')]
        self.assertEqual('*', first)
        copied = {source for name in ('kubernetes', 'cni')
                  for stage in self.read(name)
                  for source in self.copied(stage)}
        # Operators edit files in etc/kubernetes, and these edits must not
        # change the image.
        lines.remove('etc/kubernetes/*')
        lines.remove('**/__pycache__')
        self.assertEqual(
            {'!' + source for source in copied
             if not source.startswith('etc/cni/')}, set(lines))

    def test_all_that_is_copied_exists(self) -> None:
        for stage in self.stages:
            for source in self.copied(stage):
                self.assertTrue(
                    os.path.exists(os.path.join(overlay.ROOT, source)),
                    source)

    def test_all_that_the_wheel_needs_is_copied(self) -> None:
        setup = configparser.ConfigParser()
        setup.read(os.path.join(overlay.ROOT, 'setup.cfg'))
        needed = {'pyproject.toml', 'requirements.txt', 'setup.cfg',
                  'setup.py', setup['metadata']['long_description'].split()[1],
                  *setup['metadata']['license_files'].split(),
                  setup['options.packages.find']['include'].strip(' \n*')}
        self.assertLessEqual(needed, self.copied(self.stages[1]))
        # The build needs no git, and so no history.
        self.assertNotIn('.git', self.copied(self.stages[1]))


class TestControllerDockerfile(unittest.TestCase):

    def test_it_installs_like_the_image_of_the_daemonset(self) -> None:
        texts = []
        for name in ('Dockerfile', 'controller.Dockerfile'):
            with open(os.path.join(overlay.OVERLAY, name)) as file:
                texts.append(file.read())
        ours, other = (set(text.replace('\\\n', ' ').splitlines())
                       for text in reversed(texts))
        self.assertEqual(
            {'COPY', 'FROM', 'RUN', 'WORKDIR'},
            {line.split()[0] for line in ours & other if line[:1].isalpha()})
        # Kuryr's image defines the entry point and the user.
        self.assertEqual(
            ['FROM ${BASE}', 'USER root', 'USER kuryr'],
            [line for line in texts[1].partition('AS wheel')[2].splitlines()
             if line.startswith(('FROM', 'USER', 'ENTRYPOINT', 'CMD'))][1:])
        self.assertIn('kuryr_break0.kuryr.pod_vif', texts[1])


class TestInstallPackage(unittest.TestCase):
    """install-package keeps a supported Kuryr and refuses any other."""

    def install(self, version: str) -> subprocess.CompletedProcess[str]:
        with tempfile.TemporaryDirectory() as directory:
            if version:
                info = os.path.join(directory, 'kuryr_kubernetes-%s.dist-info'
                                    % version)
                os.mkdir(info)
                with open(os.path.join(info, 'METADATA'), 'w') as file:
                    file.write('Metadata-Version: 2.1\n'
                               'Name: kuryr-kubernetes\nVersion: %s\n'
                               % version)
            # This Python has no packages, and this pip only prints its
            # arguments and constraints.
            os.mkdir(os.path.join(directory, 'pip'))
            with open(os.path.join(directory, 'pip/__main__.py'),
                      'w') as file:
                file.write('import sys\nprint(sys.argv[1:])\n'
                           'print(open(sys.argv[sys.argv.index('
                           '"--constraint") + 1]).read())\n')
            python = os.path.join(directory, 'python')
            with open(python, 'w') as file:
                file.write('#!/bin/sh\nPYTHONPATH=%s exec %s -S "$@"\n' % (
                    directory, sys.executable))
            os.chmod(python, 0o755)
            return subprocess.run(
                [os.path.join(overlay.OVERLAY, 'install-package'),
                 'the.whl', os.path.join(overlay.ROOT, 'constraints.txt')],
                env={**os.environ, 'PYTHON': python}, text=True,
                stdout=subprocess.PIPE, stderr=subprocess.PIPE)

    def test_kuryr_stays(self) -> None:
        for version in ('6.0.1', '9.0.0+ours.3', '10.0.0', '10.1.0.dev7'):
            done = self.install(version)
            self.assertEqual(0, done.returncode, done.stderr)
            self.assertIn("'the.whl'", done.stdout)
            self.assertIn('\npyroute2==', done.stdout)
            self.assertNotIn('\nkuryr-kubernetes==', done.stdout)

    def test_one_that_does_not_work(self) -> None:
        for version, text in (('5.0.0', '5.0.0 is in this image'),
                              ('11.0.0', '11.0.0 is in'), ('', 'no kuryr')):
            done = self.install(version)
            self.assertEqual(1, done.returncode)
            self.assertIn(text, done.stderr)
            self.assertEqual('', done.stdout)


class TestGenerator(unittest.TestCase):
    """Kuryr's own generator runs without devstack."""

    SOURCES = glob.glob(os.path.join(sys.prefix, 'kuryr-sources',
                                     'kuryr-kubernetes-*', ''))

    def generate(self, *args: str, **environ: str
                 ) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [os.path.join(overlay.OVERLAY, 'generate'), *args], text=True,
            env={**os.environ, **environ}, stdout=subprocess.PIPE,
            stderr=subprocess.PIPE)

    @unittest.skipUnless(SOURCES, 'needs the sources of Kuryr: '
                         'tools/kuryr-sources .venv/kuryr-sources')
    def test_it_writes_the_tested_overlay(self) -> None:
        for engine in ('docker', 'crio'):
            with tempfile.TemporaryDirectory() as directory:
                into = os.path.join(directory, 'new')
                conf = os.path.join(directory, 'kuryr.conf')
                with open(conf, 'w') as file:
                    file.write('[kubernetes]\npod_vif_driver = '
                               'nested-macvlan\n')
                done = self.generate(*self.SOURCES, into, conf,
                                     CONTAINER_ENGINE=engine)
                self.assertEqual((0, ''), (done.returncode, done.stderr))
                with open(os.path.join(into, 'cni_ds.yml')) as file:
                    self.assertEqual(overlay.base(crio=engine == 'crio'),
                                     yaml.safe_load(file))
                with open(os.path.join(into, 'config_map.yml')) as file:
                    self.assertIn('nested-macvlan',
                                  yaml.safe_load(file)['data']['kuryr.conf'])

    def test_wrong_usage(self) -> None:
        for args, text in (((), 'Usage: generate KURYR_SOURCES'),
                           (('/run', '/run/new'), 'There is no /run/tools')):
            done = self.generate(*args)
            self.assertEqual(2, done.returncode)
            self.assertIn(text, done.stderr)


class TestWheel(unittest.TestCase):

    #: Files that only a clone of the repository needs
    LEFT_OUT = {'etc/kuryr-break0-config-generator.conf', 'etc/networks'}

    def test_holds_all_of_etc(self) -> None:
        setup = configparser.ConfigParser()
        setup.optionxform = str  # type: ignore[assignment,method-assign]
        setup.read(os.path.join(overlay.ROOT, 'setup.cfg'))
        held: dict[str, str] = {}
        for target, patterns in setup['options.data_files'].items():
            for pattern in patterns.split():
                found = glob.glob(os.path.join(overlay.ROOT, pattern))
                self.assertTrue(found, pattern)
                for path in found:
                    name = os.path.relpath(path, overlay.ROOT)
                    self.assertNotIn(name, held)
                    held[name] = target
        # Shells and man search these directories below /usr and /usr/local.
        self.assertEqual(
            'share/zsh/site-functions',
            held.pop('kuryr_break0/cli/completion/_kuryr-break0'))
        self.assertEqual(
            'share/fish/vendor_completions.d',
            held.pop('kuryr_break0/cli/completion/kuryr-break0.fish'))
        self.assertEqual(
            'share/bash-completion/completions',
            held.pop('kuryr_break0/cli/completion/kuryr-break0'))
        there = {os.path.relpath(os.path.join(directory, name), overlay.ROOT)
                 for directory, _, names
                 in os.walk(os.path.join(overlay.ROOT, 'etc'))
                 for name in names}
        self.assertEqual(there - self.LEFT_OUT, set(held))
        self.assertEqual('share/man/man8',
                         held.pop('etc/man/kuryr-break0.8'))
        # The other files keep their paths, below one directory.
        for name, target in held.items():
            self.assertEqual(
                os.path.join('share/kuryr-break0',
                             os.path.dirname(name)[len('etc/'):]).rstrip('/'),
                target)
