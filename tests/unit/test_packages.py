# SPDX-License-Identifier: Apache-2.0

"""tools/debian-packages requests the packages that bindep.txt lists."""

from __future__ import annotations

import os
import shutil
import unittest

from tests.support import packages

DEMO = {'git', 'iproute2', 'iputils-ping', 'make', 'mount', 'util-linux'}


class TestPackages(unittest.TestCase):

    @staticmethod
    def in_sbin(signs: list[str]) -> bool:
        """Return whether all files and programs of a package exist.

        :param signs: absolute paths, or names of programs in an sbin directory
        """
        return all(os.path.exists(sign) if sign[0] == '/' else
                   shutil.which(sign, path='/usr/sbin:/sbin')
                   for sign in signs)

    def test_all_that_is_listed_is_asked_for(self) -> None:
        listed = packages.listed()
        self.assertLessEqual({*DEMO, 'netavark', 'podman'}, set(listed))
        expected = {package for package, signs in listed.items()
                    if not self.in_sbin(signs)}
        self.assertLessEqual({'git', 'podman', 'strace'}, expected)
        self.assertEqual(expected, packages.missing('test'))

    def test_a_profile_needs_its_packages(self) -> None:
        for profile, package in (('boot', 'qemu-system-x86'),
                                 ('cluster', 'podman'),
                                 ('kernels', 'qemu-system-x86')):
            missing = packages.missing(profile)
            self.assertIn(package, missing)
            self.assertLessEqual(missing, set(packages.listed(profile)))
            self.assertEqual(missing | packages.missing('test'),
                             packages.missing('test', profile))

    def test_the_demo_needs_less(self) -> None:
        missing = packages.missing()
        self.assertIn('git', missing)
        self.assertLessEqual(missing, DEMO)

    def test_each_package_except_python_has_a_sign(self) -> None:
        self.assertEqual({'python3-venv'}, {
            package for package, signs in packages.listed().items()
            if not signs})
