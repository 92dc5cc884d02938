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

"""Who may import what: the rules of the page on the architecture."""

from __future__ import annotations

import ast
import pathlib
import unittest

import kuryr_break0

PACKAGE = pathlib.Path(kuryr_break0.__file__).parent


def importers(library: str) -> set[str]:
    """The modules of the package that import a library."""
    found = set()
    for path in PACKAGE.rglob('*.py'):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [node.module or '']
            else:
                continue
            if library in {name.split('.')[0] for name in names}:
                found.add(path.relative_to(PACKAGE).parts[0]
                          .removesuffix('.py'))
    return found


class TestImports(unittest.TestCase):

    def test_netlink_alone_imports_pyroute2(self) -> None:
        self.assertEqual({'netlink'}, importers('pyroute2'))

    def test_what_works_without_kuryr(self) -> None:
        # All but what kuryr-daemon loads, and adopt's view of its API
        self.assertEqual(
            {'addressing', 'driver', 'flat', 'kuryr_api', 'os_vif_plugin',
             'vif'}, importers('kuryr_kubernetes'))
