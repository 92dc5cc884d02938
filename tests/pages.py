# SPDX-License-Identifier: Apache-2.0

"""The commands of a page of the documentation, for tests that run them."""

from __future__ import annotations

import pathlib
import re
import textwrap
from typing import NamedTuple

SOURCE = pathlib.Path(__file__).parents[1] / 'doc/source'


class Step(NamedTuple):
    """A command of a page, the host that runs it, and its output there."""

    host: str
    command: str
    output: str


def steps(page: str, title: str) -> list[Step]:
    """Return the commands of a section, in the order of the page.

    :param page: path below doc/source
    :raises AssertionError: if the section has no command
    """
    section = re.split(r'\n(.+)\n==+\n', (SOURCE / page).read_text())
    text = section[section.index(title) + 1]
    found = [Step(host, command, output.strip('\n'))
             for block in re.findall(
                 r'code-block:: console\n\n((?:   .*\n|\n)+)', text)
             for host, command, output in re.findall(
                 r'(?m)^(\w*)[#$] ((?:.*\\\n)*.*)\n((?:(?!\w*[#$] ).*\n)*)',
                 textwrap.dedent(block))]
    assert found, '%s has no command in %s' % (title, page)
    return found
