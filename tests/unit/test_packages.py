# SPDX-License-Identifier: Apache-2.0

"""tools/debian-packages requests the packages that bindep.txt lists."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import unittest

from tests.support import overlay

DEMO = {'git', 'iproute2', 'iputils-ping', 'make', 'mount', 'util-linux'}


def listed(profile: str = 'test') -> dict[str, list[str]]:
    """Return the programs and files of each package in bindep.txt, by package.

    :param profile: the profile of the packages; packages without a profile are
        included
    """
    with open(os.path.join(overlay.ROOT, 'bindep.txt')) as file:
        lines = [line.partition('#') for line in file if line[0] != '#']
    return {package.split()[0]: signs.split() for package, _, signs in lines
            if package.rstrip().endswith((':dpkg]', profile + ']'))}


class TestPackages(unittest.TestCase):

    def missing(self, *args: str, path: str = '') -> set[str]:
        """Return the packages that an unprivileged user is told to install."""
        with tempfile.TemporaryDirectory() as directory:
            with open(os.path.join(directory, 'id'), 'w') as file:
                file.write('#!/bin/sh\necho 1000\n')
            os.chmod(file.name, 0o755)
            done = subprocess.run(
                ['/bin/sh', os.path.join(overlay.ROOT, 'tools',
                                         'debian-packages'), *args],
                env={'PATH': directory + path, 'PYTHON': sys.executable},
                stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        if not done.returncode:
            return set()
        return set(done.stderr.partition('apt-get install')[2].split())

    @staticmethod
    def in_sbin(signs: list[str]) -> bool:
        """Return whether all files and programs of a package exist.

        :param signs: absolute paths, or names of programs in an sbin directory
        """
        return all(os.path.exists(sign) if sign[0] == '/' else
                   shutil.which(sign, path='/usr/sbin:/sbin')
                   for sign in signs)

    def test_all_that_is_listed_is_asked_for(self) -> None:
        packages = listed()
        self.assertLessEqual({*DEMO, 'netavark', 'podman'}, set(packages))
        expected = {package for package, signs in packages.items()
                    if not self.in_sbin(signs)}
        self.assertLessEqual({'git', 'podman', 'strace'}, expected)
        self.assertEqual(expected, self.missing('test'))

    def test_a_profile_needs_its_packages(self) -> None:
        for profile, package in (('boot', 'qemu-system-x86'),
                                 ('cluster', 'podman'),
                                 ('kernels', 'qemu-system-x86')):
            self.assertIn(package, self.missing(profile))
            self.assertLessEqual(self.missing(profile),
                                 set(listed(profile)))
            self.assertEqual(self.missing(profile) | self.missing('test'),
                             self.missing('test', profile))

    def test_the_demo_needs_less(self) -> None:
        missing = self.missing()
        self.assertIn('git', missing)
        self.assertLessEqual(missing, DEMO)

    def test_each_package_except_python_has_a_sign(self) -> None:
        self.assertEqual({'python3-venv'}, {
            package for package, signs in listed().items() if not signs})

    def test_nothing_is_missing_where_tests_run(self) -> None:
        self.assertEqual(set(), self.missing(
            'test', path=':' + os.environ['PATH']))
