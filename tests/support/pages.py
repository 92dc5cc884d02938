# SPDX-License-Identifier: Apache-2.0

"""The commands of a page of the documentation, for tests that run them."""

from __future__ import annotations

import pathlib
import re
import textwrap
from typing import NamedTuple

SOURCE = pathlib.Path(__file__).parents[2] / 'doc/source'


class Step(NamedTuple):
    """A command of a page, the host that runs it, and its output there."""

    host: str
    command: str
    output: str


def steps(page: str, title: str) -> list[Step]:
    """Return the commands of a section, in the order of the page.

    A block of the language ``sh`` has commands without prompts and outputs.

    :param page: path below doc/source
    :raises AssertionError: if the section has no command
    """
    section = re.split(r'\n(.+)\n==+\n', (SOURCE / page).read_text())
    text = section[section.index(title) + 1]
    found: list[Step] = []
    for indent, language, block in re.findall(
            r'(?m)^( *)\.\. code-block:: (console|sh)\n\n'
            r'((?:\1   .*\n|\n)+)', text):
        lines = textwrap.dedent(block)
        if language == 'sh':
            found += [Step('', command, '') for command in re.findall(
                r'(?m)^((?:.*\\\n)*.+)\n', lines)]
        else:
            found += [
                Step(host, command, output.strip('\n'))
                for host, command, output in re.findall(
                    r'(?m)^(\w*)[#$] ((?:.*\\\n)*.*)\n'
                    r'((?:(?!\w*[#$] ).*\n)*)', lines)]
    assert found, '%s has no command in %s' % (title, page)
    return found


def block(page: str, text: str) -> str:
    """Return the only ``sh`` block of a page that contains a text."""
    found, = (each for _, each in re.findall(
        r'(?m)^( *)\.\. code-block:: sh\n\n((?:\1   .*\n|\n)+)',
        (SOURCE / page).read_text()) if text in each)
    return textwrap.dedent(found)
