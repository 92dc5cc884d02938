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

"""``.. modules:: PACKAGE``, a table of modules in the order of imports."""

from __future__ import annotations

import ast
import graphlib
import importlib.util
import pathlib
from typing import Iterator

from docutils import nodes
from docutils import statemachine
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective


class Modules(SphinxDirective):
    """A table of modules, each after the modules that it imports.

    A subpackage counts as one module.

    :raises graphlib.CycleError: if the imports have a cycle
    """

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        package = self.arguments[0]
        spec = importlib.util.find_spec(package)
        assert spec is not None and spec.origin is not None
        root = pathlib.Path(spec.origin).parent
        texts: dict[str, str] = {}
        imports: dict[str, set[str]] = {}
        for path in sorted(root.rglob('*.py')):
            name = path.relative_to(root).parts[0].removesuffix('.py')
            if name.startswith('__'):
                continue
            self.env.note_dependency(str(path))
            tree = ast.parse(path.read_text())
            # The docstring of a package is in __init__.py, the first file.
            texts.setdefault(name, (ast.get_docstring(tree) or '')
                             .split('\n\n')[0].replace('\n', ' '))
            imports.setdefault(name, set()).update(_imported(tree, package))
        for name, imported in imports.items():
            imported.discard(name)
        lines = statemachine.StringList()
        for line in _table(texts, imports):
            lines.append(line, str(root))
        parent = nodes.container()
        self.state.nested_parse(lines, self.content_offset, parent)
        return parent.children


def _imported(tree: ast.AST, package: str) -> Iterator[str]:
    """Return the modules of the package that a module imports."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            module = '%s.' % node.module
            if module.startswith(package + '.'):
                rest = module.removeprefix(package + '.')
                yield from [rest.split('.')[0]] if rest else (
                    alias.name for alias in node.names)


def _table(texts: dict[str, str],
           imports: dict[str, set[str]]) -> Iterator[str]:
    yield from ('.. list-table::', '   :header-rows: 1',
                '   :widths: 15 50 35', '', '   * - Module',
                '     - Purpose', '     - Imported modules')
    sorter = graphlib.TopologicalSorter(imports)
    sorter.prepare()
    while sorter.is_active():
        for name in sorted(sorter.get_ready()):
            sorter.done(name)
            yield '   * - ``%s``' % name
            yield '     - ' + texts[name]
            yield '     - ' + ', '.join(sorted(imports[name]))


def setup(app: Sphinx) -> dict[str, bool]:
    app.add_directive('modules', Modules)
    return {'parallel_read_safe': True, 'parallel_write_safe': True}
