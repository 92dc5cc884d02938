# SPDX-License-Identifier: Apache-2.0

"""Tests ``kuryr-break0 cni-install``, and the examples of etc/cni."""

from __future__ import annotations

import json
import os
import pathlib
import subprocess
import tempfile
import unittest
from unittest import mock

import yaml

from kuryr_break0.cli import cni
from tests.functional.cni import base
from tests.support import program

ETC = pathlib.Path(__file__).parents[3] / 'etc/cni'


class TestInstall(unittest.TestCase):

    def setUp(self) -> None:
        super().setUp()
        directory = tempfile.TemporaryDirectory()
        self.addCleanup(directory.cleanup)
        self.path = pathlib.Path(directory.name)
        self.bin = self.path / 'bin'
        self.bin.mkdir()
        self.conf = self.path / 'kuryr.conf'
        self.conf.write_text('[break0]\n')

    def install(self, *args: str, code: int = 0) -> str:
        done = program.run(
            [program.BREAK0, '--config-file', str(self.conf), 'cni-install',
             *args], stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            text=True)
        self.assertEqual(code, done.returncode, done.stdout)
        self.assertNotIn('Traceback', done.stdout)
        return done.stdout

    def test_shim(self) -> None:
        (self.bin / 'break0').write_text('the one before')
        self.install('--bin-dir', str(self.bin), '--shim', str(base.SHIM))
        self.assertEqual(base.SHIM.read_bytes(),
                         (self.bin / 'break0').read_bytes())
        self.assertEqual(0o755, (self.bin / 'break0').stat().st_mode & 0o777)
        self.assertEqual(['break0'], os.listdir(self.bin))

    def test_running_plugin_is_replaced(self) -> None:
        """A replacement of the plugin's file affects no running plugin."""
        self.install('--bin-dir', str(self.bin), '--shim', str(base.SHIM))
        plugin = subprocess.Popen([str(self.bin / 'break0')],
                                  stdin=subprocess.PIPE,
                                  stdout=subprocess.PIPE)
        self.install('--bin-dir', str(self.bin), '--without-agent')
        output, _ = plugin.communicate(b'{}')
        self.assertIn(b'"code"', output)
        self.assertTrue((self.bin / 'break0').read_text().startswith(
            '#!/bin/sh'))

    def test_script_with_this_configuration(self) -> None:
        self.install('--bin-dir', str(self.bin), '--without-agent')
        text = (self.bin / 'break0').read_text()
        self.assertIn('--config-file %s' % self.conf, text)
        done = subprocess.run(
            [str(self.bin / 'break0')], input='', text=True,
            stdout=subprocess.PIPE, env={'CNI_COMMAND': 'VERSION'})
        self.assertIn('1.1.0', json.loads(done.stdout)['supportedVersions'])

    def test_the_shim_of_make_cni(self) -> None:
        """A shim that was built in the current clone is found, if it is safe.

        The shim's folders must not be world-writable.
        """
        for name in (cni._BUILT, cni._SOURCE):
            path = self.path / name
            path.parent.mkdir(parents=True)
            path.write_text('')
            path.chmod(0o755)
        built = str(self.path / cni._BUILT)
        self.addCleanup(os.chdir, os.getcwd())
        os.chdir(self.path)
        with mock.patch.object(cni, '__file__', '/none/of/a/clone.py'):
            self.assertIn(built, list(cni._shims()))
            (self.path / 'build').chmod(0o777)
            self.assertNotIn(built, list(cni._shims()))

    def test_impossible_arguments(self) -> None:
        (self.path / 'file').write_text('')
        (self.bin / 'break0').mkdir()
        for args, text in (
                (('--bin-dir', str(self.path / 'none')), 'No such file'),
                (('--bin-dir', str(self.path / 'file')), 'Not a directory'),
                (('--bin-dir', str(self.bin)), 'Is a directory'),
                (('--bin-dir', 'relative'), 'absolute'),
                (('--bin-dir', str(self.path), '--shim',
                  str(self.path / 'none')), 'No such file'),
                ((), '--bin-dir')):
            with self.subTest(args):
                self.assertIn(text, self.install(*args, code=2))
        self.assertEqual(['break0'], os.listdir(self.bin))
        self.assertEqual({'bin', 'file', 'kuryr.conf'},
                         set(os.listdir(self.path)))


class TestExamples(unittest.TestCase):

    def assert_chained(self, listed: object) -> None:
        assert isinstance(listed, dict)
        kinds = [each['type'] for each in listed['plugins']]
        self.assertEqual(['macvlan', 'break0'], kinds)
        self.assertEqual('bridge', listed['plugins'][0]['mode'])
        self.assertIn(listed['cniVersion'], ('0.4.0', '1.0.0', '1.1.0'))

    def test_conflist(self) -> None:
        self.assert_chained(json.loads(
            (ETC / '10-lan.conflist').read_text()))

    def test_network_attachment_definition(self) -> None:
        found = yaml.safe_load(
            (ETC / 'network-attachment-definition.yaml').read_text())
        self.assertEqual('NetworkAttachmentDefinition', found['kind'])
        listed = json.loads(found['spec']['config'])
        self.assertEqual(found['metadata']['name'], listed['name'])
        self.assert_chained(listed)

    def test_daemon_set_names_one_image(self) -> None:
        spec = yaml.safe_load((ETC / 'daemonset.yaml').read_text())[
            'spec']['template']['spec']
        images = {each['image'] for each in (*spec['initContainers'],
                                             *spec['containers'])}
        self.assertEqual(1, len(images))
        self.assertFalse(spec['automountServiceAccountToken'])
        self.assertTrue(spec['hostNetwork'])
        # The plugin must use the socket of the agent.
        mounted = {each['mountPath'] for each
                   in spec['containers'][0]['volumeMounts']}
        self.assertIn('/run/kuryr-break0', mounted)
        self.assertIn('"/run/kuryr-break0/cni.sock"',
                      base.SHIM_SOURCE.read_text())
