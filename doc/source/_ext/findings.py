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

"""``.. findings:: FIRST LAST``, the doctor's findings between two ids."""

from __future__ import annotations

import re
from typing import Iterator

from docutils import nodes
from docutils import statemachine
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective
from sphinx.util.rst import escape

from kuryr_break0.doctor import findings


class Findings(SphinxDirective):
    """A definition for each finding, from the first id to the last."""

    required_arguments = 2

    def run(self) -> list[nodes.Node]:
        self.env.note_dependency(findings.PATH)
        kinds = list(findings.KINDS.values())
        ids = list(findings.KINDS)
        try:
            first, last = map(ids.index, self.arguments)
        except ValueError as err:
            raise self.error(str(err)) from err
        lines = statemachine.StringList()
        for kind in kinds[first:last + 1]:
            for line in describe(kind):
                lines.append(line, findings.PATH)
        parent = nodes.Element()
        self.state.nested_parse(lines, self.content_offset, parent)
        return parent.children


def describe(kind: findings.Finding) -> Iterator[str]:
    """Return the lines of reStructuredText for a finding."""
    yield '``%s`` (%s)' % (kind.id, kind.severity)
    for label, text in (('Found when', kind.when), ('Why', kind.why),
                        ('Remedy', kind.remedy)):
        yield '   *%s:* %s' % (label, escape(text))
        yield ''
    if kind.commands:
        yield '   .. code-block:: none'
        yield ''
        for command in kind.commands:
            # The doctor replaces these fields.
            yield '      ' + re.sub(
                r'%\((\w+)\)[sd]', lambda field: field[1].upper(), command)
        yield ''


def setup(app: Sphinx) -> dict[str, bool]:
    app.add_directive('findings', Findings)
    return {'parallel_read_safe': True, 'parallel_write_safe': True}
