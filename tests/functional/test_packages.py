# SPDX-License-Identifier: Apache-2.0

"""tools/debian-packages finds each package of bindep.txt."""

from __future__ import annotations

import os
import unittest

from tests.support import packages


class TestPackages(unittest.TestCase):

    def test_no_package_is_missing_where_tests_run(self) -> None:
        self.assertEqual(set(), packages.missing(
            'test', path=':' + os.environ['PATH']))
