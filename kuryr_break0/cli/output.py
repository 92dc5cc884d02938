# SPDX-License-Identifier: Apache-2.0

"""Prints tables and texts for the terminal, and JSON or YAML."""

from __future__ import annotations

import json
import os
import re
import sys
import threading
import time
from typing import Any, Iterable, Iterator, Optional, Sequence, TextIO, TypeVar

from kuryr_break0.texts import safe

T = TypeVar('T')

#: Words for a host without Kubernetes, which has containers and no pods.
_WORDS = {'pod': 'container', 'Pod': 'Container', 'node': 'host',
          'Node': 'Host', 'ADD': 'start', 'DEL': 'stop'}
_WORD = re.compile(r"(?<![^\s(])(an )?(%s)(?=s?(?:'s)?[.,;:)]?(?:\s|$))"
                   % '|'.join(_WORDS))
#: Smallest width of a column; longer words are broken if a table is too wide.
_LEAST = 8
#: Erases from the cursor to the end of the line (ECMA-48 EL).
_CLEAR = '\x1b[K'


class Wrong(str):
    """A text about a fault, printed in red on a terminal."""


class _Reader:
    """State of the output.

    :cvar has_pods: whether texts say pod and node, not container and host
    :cvar counting: whether a counter is on the terminal
    """

    has_pods = True
    counting = False


def speak_of_containers() -> None:
    """Print container and host instead of pod and node from now on."""
    _Reader.has_pods = False


def speak(text: str) -> str:
    """Return a text with the words for this host, such as container."""
    if _Reader.has_pods:
        return text
    text = type(text)(text.replace('container or pod', 'container'))
    return type(text)(_WORD.sub(
        lambda match: ('a ' if match[1] else '') + _WORDS[match[2]], text))


def columns() -> int:
    """Return the line width: COLUMNS, the terminal's, or 80; at least 40."""
    import shutil  # slow to import, and not needed by all verbs

    return max(shutil.get_terminal_size((80, 24)).columns, 40)


def say(text: str) -> None:
    """Print a paragraph, with the words for this host, in lines that fit."""
    import textwrap

    text = speak(text)
    write(type(text)(textwrap.fill(
        safe(text), columns(), break_on_hyphens=False,
        break_long_words=False)))


def write(text: str, stream: Optional[TextIO] = None) -> None:
    """Print lines, with control characters of the terminal escaped."""
    stream = stream or sys.stdout
    if _Reader.counting:
        print(end=_CLEAR, file=sys.stderr, flush=True)
    for line in text.split('\n'):
        line = safe(line)
        print(_red(line, stream) if isinstance(text, Wrong) else line,
              file=stream)


def write_document(document: Any, form: str) -> None:
    """Print a document for programs.

    :param form: "json" or "yaml"
    """
    text = json.dumps(document, indent=2)
    if form == 'yaml':
        import yaml  # slow to import

        # A copy through JSON has no shared objects. YAML would print a shared
        # object as a reference.
        text = yaml.safe_dump(json.loads(text), explicit_start=True,
                              sort_keys=False, allow_unicode=True).rstrip()
    print(text)


def show(form: Optional[str], document: Any, lines: Iterable[str]) -> None:
    """Print a document for programs, or lines for people.

    :param form: see :func:`write_document`; None for the lines
    :param lines: a line that starts with ! is a fault
    """
    if form:
        write_document(document, form)
        return
    for line in lines:
        write(Wrong(line) if line.startswith('!') else line)


def _red(text: str, stream: TextIO) -> str:
    if (not text or os.environ.get('NO_COLOR') or not stream.isatty()
            or os.environ.get('TERM') == 'dumb'):
        return text
    return '\x1b[31m%s\x1b[0m' % text


def table(head: Sequence[str], rows: Iterable[Sequence[Any]],
          wide: bool = False) -> None:
    """Print a table, with long cells wrapped to the width of the terminal.

    If stdout is not a terminal (a pipe, kubectl exec without -t) and COLUMNS
    is not set, cells are not wrapped: a program may search for whole names.

    :param wide: do not wrap
    """
    import textwrap

    import prettytable

    cells = [[(Wrong if isinstance(each, Wrong) else str)(safe(str(each)))
              for each in row] for row in rows]
    if not wide and (sys.stdout.isatty() or os.environ.get('COLUMNS')):
        widths = _widths(list(zip(head, *cells)))
        cells = [[type(each)('\n'.join(textwrap.wrap(
            each, width, break_on_hyphens=False)))
            for each, width in zip(row, widths)] for row in cells]
    made = prettytable.PrettyTable(list(head))
    for row in cells:
        made.add_row(['\n'.join(
            _red(line, sys.stdout) for line in each.split('\n'))
            if isinstance(each, Wrong) else each for each in row])
    if _Reader.counting:
        print(end=_CLEAR, file=sys.stderr, flush=True)
    print(made)


def _widths(cells: Sequence[Sequence[str]]) -> list[int]:
    """Return the widths of columns; words are broken only if necessary."""
    # A column has a blank on each side, and a vertical line before it.
    room = columns() - 3 * len(cells) - 1
    widths = [max(map(len, column)) for column in cells]
    for floors in ([max(len(word) for cell in column for word in cell.split())
                    for column in cells], [_LEAST] * len(cells)):
        while sum(widths) > room:
            wide = [place for place, column in enumerate(cells)
                    if widths[place] > max(floors[place], len(column[0]))]
            if not wide:
                break
            widths[max(wide, key=widths.__getitem__)] -= 1
    return widths


class Counter:
    """Shows the progress of a verb on a terminal.

    :param verb: the name of the verb
    """

    def __init__(self, verb: str) -> None:
        self._verb = verb
        self._text = ''
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Counter:
        if sys.stderr.isatty():
            self._thread.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._done.set()
        if self._thread.ident is not None:
            self._thread.join()
            _Reader.counting = False
            print(end=_CLEAR, file=sys.stderr, flush=True)

    def _run(self) -> None:
        began = time.monotonic()
        while not self._done.wait(1):
            _Reader.counting = True
            # After \r, the next line of output overwrites this line.
            print('%s: %s%d s' % (self._verb, self._text,
                                  time.monotonic() - began),
                  end=_CLEAR + '\r', file=sys.stderr, flush=True)

    def over(self, items: Sequence[T]) -> Iterator[T]:
        """Iterate over items, and show the number of completed items."""
        for number, each in enumerate(items):
            self._text = '%d of %d, ' % (number, len(items))
            yield each
