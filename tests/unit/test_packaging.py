# SPDX-License-Identifier: Apache-2.0

"""pip can install the package and its dependencies from each source."""

from __future__ import annotations

import configparser
from importlib import metadata
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import unittest

from packaging import specifiers

from tests.support import overlay
from tools import constraints

ROOT = pathlib.Path(overlay.ROOT)


def run(*args: str, cwd: pathlib.Path, **environ: str) -> str:
    done = subprocess.run(args, cwd=cwd, env={**os.environ, **environ},
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                          text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@unittest.skipUnless((ROOT / '.git').exists(), 'not a clone of the repository')
class TestSources(unittest.TestCase):

    def setUp(self) -> None:
        super().setUp()
        directory = tempfile.TemporaryDirectory()
        self.addCleanup(directory.cleanup)
        self.dir = pathlib.Path(directory.name)
        self.files = {name for name in run(
            'git', 'ls-files', '-z', '--cached', '--others',
            '--exclude-standard', cwd=ROOT).split('\0')
            if name and (ROOT / name).exists()}
        self.archive = self.dir / 'archive'
        for name in self.files:
            target = self.archive / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, target)

    def assert_installs(self, source: pathlib.Path) -> None:
        """Assert that pip installs a source with its files, offline."""
        setup = configparser.ConfigParser()
        setup.optionxform = str  # type: ignore[assignment,method-assign]
        setup.read(source / 'setup.cfg')
        into = self.dir / 'into'
        # Without a network, the build uses the packages of the environment.
        run(sys.executable, '-m', 'pip', 'install', '-qq', '--no-deps',
            '--no-build-isolation', '--target', str(into), str(source),
            cwd=self.dir)
        self.assertEqual(setup['metadata']['version'] + '\n',
                         run(str(into / 'bin/kuryr-break0'), '--version',
                             cwd=self.dir, PYTHONPATH=str(into)))
        for target, patterns in setup['options.data_files'].items():
            for pattern in patterns.split():
                for path in ROOT.glob(pattern):
                    self.assertEqual(
                        path.read_bytes(),
                        (into / target / path.name).read_bytes())
        for name in self.files:
            if name.startswith('kuryr_break0/'):
                self.assertTrue((into / name).exists(), name)
        written, = into.glob('*.dist-info/METADATA')
        self.assertEqual(
            set(re.findall(r'^([\w.-]+)', (ROOT / 'requirements.txt')
                           .read_text(), re.M)),
            set(re.findall(r'^Requires-Dist: ([\w.-]+)', written.read_text(),
                           re.M)))

    def test_an_archive(self) -> None:
        self.assert_installs(self.archive)

    def test_a_clone(self) -> None:
        for command in ('init --quiet', 'add --all',
                        '-c user.name=tests -c user.email=tests@example.org '
                        'commit --quiet --message all'):
            run('git', *command.split(), cwd=self.archive)
        self.assert_installs(self.archive)

    def test_a_source_distribution(self) -> None:
        run(sys.executable, '-c', 'from setuptools import build_meta\n'
            'build_meta.build_sdist(%r)' % str(self.dir), cwd=self.archive)
        made, = self.dir.glob('*.tar.gz')
        with tarfile.open(made) as file:
            file.extractall(self.dir / 'made')
        source, = (self.dir / 'made').iterdir()
        held = {str(path.relative_to(source)) for path in source.rglob('*')
                if path.is_file()}
        self.assertEqual({'.ci/run', '.gitignore'}, self.files - held)
        self.assertEqual({'PKG-INFO'}, {
            name for name in held - self.files
            if not name.startswith('kuryr_break0.egg-info/')})
        self.assert_installs(source)


class TestConstraints(unittest.TestCase):

    def test_the_oldest_pythons_can_install_each(self) -> None:
        for python in constraints.OLDEST:
            pins = [pin for pin in constraints.read() if pin.is_for(python)]
            names = [pin.requirement.name for pin in pins]
            self.assertEqual(len(set(names)), len(names), python)
            self.assertIn('kuryr-kubernetes', names)
            self.assertEqual([], [
                str(pin.requirement) for pin in pins
                if not specifiers.SpecifierSet(pin.requires_python).contains(
                    python)], python)

    def test_constraints_name_the_installed_releases(self) -> None:
        installed = {
            constraints.normalized(each.metadata['Name']): (
                '==' + each.version, each.metadata['Requires-Python'] or '')
            for each in metadata.distributions()}
        compared = 0
        for pin in constraints.read():
            version = str(pin.requirement.specifier)
            found = installed.get(pin.requirement.name, ('', ''))
            # A name can have several pins, for several versions of Python.
            if found[0] == version:
                compared += 1
                self.assertEqual(found[1], pin.requires_python,
                                 pin.requirement)
        self.assertGreater(compared, 100)


class TestDemo(unittest.TestCase):

    def test_each_target_installs_only_its_needs(self) -> None:
        for target, tools in (('demo', False), ('lint', True)):
            commands = run('make', '--dry-run', '--always-make', target,
                           cwd=ROOT)
            self.assertIn('tools/core-requirements.txt', commands)
            for requirements in ('test-requirements.txt',
                                 'doc/requirements.txt'):
                self.assertEqual(tools, requirements in commands, commands)
