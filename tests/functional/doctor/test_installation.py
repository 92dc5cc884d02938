# SPDX-License-Identifier: Apache-2.0


from __future__ import annotations

import json
import os
import shutil
import subprocess

import yaml

from tests.functional.cni import base as cni_base
from tests.functional.doctor.base import DoctorTestCase
from tests.support import program


class TestInstallation(DoctorTestCase):
    """The doctor examines the packages that PYTHONPATH puts first."""

    PATH = '/run/site-packages'
    BINDING = 'kuryr_kubernetes.cni.binding'

    def install(self, name: str, version: str, entry_points: str = '',
                requires: str = '') -> None:
        info = '%s/%s-%s.dist-info' % (self.PATH, name, version)
        os.makedirs(info)
        with open(info + '/METADATA', 'w') as file:
            file.write('Metadata-Version: 2.1\nName: %s\nVersion: %s\n%s' %
                       (name, version, requires))
        with open(info + '/entry_points.txt', 'w') as file:
            file.write(entry_points)

    def assert_only(self, expected: str, *seen: str, code: int = 1,
                    **environ: str) -> None:
        environ = {'PYTHONPATH': self.PATH, **environ}
        found = json.loads(self.call('--json', code=code,
                                     **environ).stdout)['findings']
        self.assertEqual([expected] * len(seen), [each['id']
                                                  for each in found], found)
        for text, finding in zip(seen, found):
            self.assertIn(text, finding['seen'])
        for text in (expected, 'why', 'do'):
            self.assertIn(text, self.call(code=code, **environ).stdout)

    def test_pyroute2_unfit(self) -> None:
        self.install('pyroute2', '0.9.7')
        self.assert_only('dependency-unfit', 'pyroute2 is 0.9.7, but <0.8')

    def test_kuryr_unfit(self) -> None:
        self.install('kuryr_kubernetes', '5.0.0')
        self.assert_only('dependency-unfit', 'kuryr-kubernetes is 5.0.0, but')

    def test_pyroute2_that_cannot_be_imported(self) -> None:
        self.install('pyroute2', '0.9.7')
        os.mkdir(self.PATH + '/pyroute2')
        with open(self.PATH + '/pyroute2/__init__.py', 'w') as file:
            file.write('raise ImportError("no transactional")\n')
        self.assert_only('dependency-unfit', 'pyroute2 is 0.9.7')
        # Only creating break0 needs pyroute2.
        self.assertIn('In sync', self.run_with('status', code=0).stdout)
        self.lab.run('ip', 'link', 'del', 'break0')
        self.assertRegex(
            self.run_with('sync', code=3).stderr,
            'break0 cannot be created, because pyroute2 cannot be imported: '
            'no transactional. To see the required version, run: ')

    def test_oslo_config_that_cannot_be_imported(self) -> None:
        self.install('oslo.config', '1.0')
        os.mkdir(self.PATH + '/oslo_config')
        with open(self.PATH + '/oslo_config/__init__.py', 'w') as file:
            file.write('raise ImportError("no ConfigOpts")\n')
        self.assert_only('dependency-unfit', 'oslo.config is 1.0', code=2)
        self.assertRegex(
            self.run_with('status', code=2).stderr,
            r'\Akuryr-break0: The command cannot be loaded: no ConfigOpts. '
            r'oslo.config is 1.0, [^\n]*\n\Z')
        for arguments in ('--json',), ('-o', 'yaml'), ('--output=json',):
            document = yaml.safe_load(
                self.run_with('doctor', *arguments, code=2).stdout)
            self.assertEqual(['dependency-unfit'], [
                each['id'] for each in document['findings']])

    def run_with(self, *args: str, code: int
                 ) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            [program.BREAK0, *args], text=True, stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={**os.environ, 'PYTHONPATH': self.PATH})
        self.assertEqual(code, done.returncode, done.stderr)
        return done

    def test_entry_points_missing(self) -> None:
        self.install('kuryr_break0', '9')
        self.assert_only('entry-point-missing', '0 entry points named '
                         'VIFMacvlanBreak0', '0 entry points named kuryr_bre')

    def test_one_entry_point_missing(self) -> None:
        self.install('kuryr_break0', '9', '[os_vif]\nkuryr_break0 = '
                     'kuryr_break0.kuryr.os_vif_plugin:Break0Plugin\n')
        self.assert_only('entry-point-missing', 'VIFMacvlanBreak0')

    def test_two_entry_points(self) -> None:
        self.install('another', '1', '[%s]\nVIFMacvlanBreak0 = '
                     'kuryr_break0.kuryr.driver:Break0MacvlanDriver\n' %
                     self.BINDING)
        self.assert_only('entry-point-missing', '2 entry points')

    def test_driver_broken(self) -> None:
        self.install('kuryr_break0', '9', '[os_vif]\nkuryr_break0 = '
                     'kuryr_break0.kuryr.os_vif_plugin:Break0Plugin\n[%s]\n'
                     'VIFMacvlanBreak0 = kuryr_break0.kuryr.driver_x:Driver\n'
                     % self.BINDING)
        self.assert_only('driver-broken', 'driver_x')

    def test_invalid_option(self) -> None:
        os.mkdir(self.PATH)
        self.assert_only('options-invalid', "addr: 'x' is not an IPv4",
                         code=2, OS_BREAK0__ADDR='x')

    def test_disabled(self) -> None:
        os.mkdir(self.PATH)
        self.assert_only('disabled', 'enabled is false', code=4,
                         OS_BREAK0__ENABLED='false')

    def test_unknown_option(self) -> None:
        os.mkdir(self.PATH)
        with open('/run/kuryr.conf', 'w') as file:
            file.write('[break0]\nallowed_cidr = 10.0.0.0/8\n'
                       'resync-interval = 5\n')
        found = json.loads(self.call(
            '--json', code=4, config='/run/kuryr.conf',
            OS_BREAK0__STRIKT='true').stdout)['findings']
        self.assertEqual(
            [('option-unknown', [
                # oslo.config accepts only underscores in a file.
                '[break0] resync-interval in /run/kuryr.conf is no option: '
                'did you mean resync_interval?',
                '[break0] strikt in the environment is no option: did you '
                'mean strict?'])],
            [(each['id'], each['subjects']) for each in found])
        self.assertIn('allowed_cidr in /run/kuryr.conf is no option: did you '
                      'mean allowed_cidrs?', found[0]['seen'])


class TestKuryrsPlugin(DoctorTestCase):

    def test_the_slow_one(self) -> None:
        self.lab.run('mount', '-t', 'tmpfs', 'plugins', cni_base.PLUGINS)
        self.addCleanup(self.lab.run, 'umount', cni_base.PLUGINS)
        path = os.path.join(cni_base.PLUGINS, 'kuryr-cni')
        plugin = os.path.join(program.BIN, 'kuryr-cni')
        with open(path, 'w') as file:
            file.write('#!/bin/sh\nexec %s "$@"\n' % plugin)
        self.assert_found('plugin-slow', plugin, path, severity='note')
        self.call()  # with a note alone, the exit status is 0
        shutil.copy('/bin/true', path)
        self.assertEqual({}, self.findings())
