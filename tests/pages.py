# SPDX-License-Identifier: Apache-2.0

"""The commands of the documentation, which tests run as they stand there."""

from __future__ import annotations

import pathlib
import re
import textwrap
from typing import Iterator, NamedTuple

SOURCE = pathlib.Path(__file__).parents[1] / 'doc/source'


class Step(NamedTuple):
    """A command of a page, the host before its prompt, and its output."""

    host: str
    command: str
    output: str


def steps(page: str, title: str) -> Iterator[Step]:
    """Return the commands of a section, in the order of the page.

    :param page: its path below doc/source
    """
    section = re.split(r'\n(.+)\n==+\n', (SOURCE / page).read_text())
    text = section[section.index(title) + 1]
    for block in re.findall(r'code-block:: console\n\n((?:   .*\n|\n)+)',
                            text):
        for host, command, output in re.findall(
                r'(?m)^(\w*)[#$] ((?:.*\\\n)*.*)\n((?:(?!\w*[#$] ).*\n)*)',
                textwrap.dedent(block)):
            yield Step(host, command, output.strip('\n'))
