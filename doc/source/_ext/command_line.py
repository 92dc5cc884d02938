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

"""``.. command-line::``, the subcommands, rendered from their parser."""

from __future__ import annotations

import argparse
import functools
import pathlib
import textwrap
from typing import Any, Iterator

from docutils import nodes
from docutils import statemachine
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective
from sphinx.util.nodes import nested_parse_with_titles
from sphinx.util.rst import escape

from kuryr_break0.cli import parser as cli

PROGRAM = 'kuryr-break0'


class CommandLine(SphinxDirective):
    """One section per subcommand, in the order of ``--help``."""

    def run(self) -> list[nodes.Node]:
        for path in pathlib.Path(cli.__file__).parent.glob('*.py'):
            self.env.note_dependency(str(path))
        lines = statemachine.StringList()
        for line in describe(cli.whole().verbs):
            lines.append(line, cli.__file__)
        parent = nodes.section(document=self.state.document)
        parent.document = self.state.document
        nested_parse_with_titles(self.state, lines, parent)
        return parent.children


def describe(parsers: dict[str, argparse.ArgumentParser]) -> Iterator[str]:
    """Return a section of reStructuredText for each subcommand.

    :param parsers: by the names of the subcommands. A subcommand with several
        names is described under the first
    """
    described = []
    for name, parser in parsers.items():
        if parser not in described:
            described.append(parser)
            yield from _describe(name, parser)


def _describe(name: str, parser: argparse.ArgumentParser) -> Iterator[str]:
    yield from (name, '~' * len(name), '',
                '.. program:: %s %s' % (PROGRAM, name), '')
    raw = issubclass(parser.formatter_class,
                     argparse.RawDescriptionHelpFormatter)
    parser.formatter_class = functools.partial(  # for any terminal
        parser.formatter_class, width=75)
    usage = parser.format_usage().partition(' ')[2]
    yield from _literal(textwrap.dedent(' ' * len('usage: ') + usage))
    yield from _text(parser.description, parser, raw)
    for action in parser._actions:
        if action.dest != 'help' and action.help is not argparse.SUPPRESS:
            yield '.. option:: ' + ', '.join(_forms(action))
            yield ''
            for line in _text(action.help, parser, False, vars(action)):
                yield '   ' + line if line else ''
    yield from _text(parser.epilog, parser, raw)


def _forms(action: argparse.Action) -> Iterator[str]:
    """Return the forms of an argument: ``-n NUMBER``, ``--number NUMBER``."""
    value = action.metavar or action.dest.upper()
    if action.choices is not None:
        value = '{%s}' % ','.join(map(str, action.choices))
    if not action.option_strings:
        yield str(value)
    for option in action.option_strings:
        yield option if action.nargs == 0 else '%s %s' % (option, value)


def _text(text: str | None, parser: argparse.ArgumentParser, raw: bool,
          values: dict[str, Any] | None = None) -> Iterator[str]:
    """Return a text of the parser, with its characters escaped."""
    if not text:
        return
    text = text % {**(values or {}), 'prog': parser.prog}
    if raw:
        # An indented paragraph keeps its layout.
        for paragraph in text.strip('\n').split('\n\n'):
            if any(line.startswith(' ') for line in paragraph.split('\n')):
                yield from _literal(paragraph)
            else:
                yield from (*escape(paragraph).split('\n'), '')
    else:
        yield from (escape(' '.join(text.split())), '')


def _literal(text: str) -> Iterator[str]:
    yield from ('.. code-block:: none', '')
    for line in text.rstrip().split('\n'):
        yield '   ' + line
    yield ''


def setup(app: Sphinx) -> dict[str, bool]:
    app.add_directive('command-line', CommandLine)
    return {'parallel_read_safe': True, 'parallel_write_safe': True}
