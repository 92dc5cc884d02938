# SPDX-License-Identifier: Apache-2.0

"""Count unclear phrases: ``python -m tests.support.words FILE_OR_FOLDER...``

A hidden noun is a clause that replaces a noun, such as ``what is left`` for
"the remaining routes". An odd beginning is a sentence that begins with such a
clause or with a fragment. CONTRIBUTING.rst has the rules. The command prints
each sentence with such a phrase, and the counts per 1,000 words.
"""

from __future__ import annotations

import ast
import io
import itertools
import pathlib
import re
import sys
import tokenize
from typing import Iterator, NamedTuple

HIDDEN = re.compile(
    r'\b(what|whatever|who|whoever|whose|whom|those who|those that|that of|'
    r'nobody|somebody|as who)\b', re.IGNORECASE)
ODD = re.compile(r'(?:\A|[.!?:]\s+)(?:Of|What|Who|Whoever|Else|But|Nobody|'
                 r'In place of|Those)\b')
WORD = re.compile(r"[A-Za-z']+")
SENTENCE = re.compile(r'(?<=[.!?:;])\s+')
LITERAL = re.compile(r'``.+?``', re.DOTALL)


class Count(NamedTuple):
    """Numbers of words, hidden nouns and odd beginnings."""

    words: int = 0
    hidden: int = 0
    odd: int = 0

    def __add__(self, other: tuple[int, ...]) -> Count:  # type: ignore
        return Count(*map(sum, zip(self, other)))

    def per_thousand(self) -> tuple[float, float]:
        """Return hidden nouns and odd beginnings per 1,000 words."""
        words = max(self.words, 1)
        return 1000 * self.hidden / words, 1000 * self.odd / words


def count(text: str) -> Count:
    """Count the words and the unclear phrases of a text.

    :param text: one or more sentences; the first word begins a sentence
    """
    return Count(len(WORD.findall(text)), len(HIDDEN.findall(text)),
                 len(ODD.findall(text)))


def python_texts(source: str) -> Iterator[str]:
    """Yield comments, strings of more than two words, and names.

    Comments on consecutive lines form one text. The names follow ``def``,
    and have spaces in place of underscores.
    """
    comments: list[str] = []
    last = 0
    previous = ''
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            if token.start[0] != last + 1 and comments:
                yield '\n'.join(comments)
                comments = []
            last = token.start[0]
            if 'SPDX' not in token.string:
                comments.append(token.string.lstrip('#: '))
        elif token.type == tokenize.STRING:
            text = ast.literal_eval(re.sub(r'\A[fF]', '', token.string))
            if isinstance(text, str) and len(text.split()) > 2:
                yield text
        elif previous == 'def':
            yield token.string.replace('_', ' ').strip()
        previous = token.string
    yield '\n'.join(comments)


def prose_texts(source: str) -> Iterator[str]:
    """Yield paragraphs, items and cells, without literals and directives."""
    lines, block = [], None  # the indentation of a literal block's parent
    for line in source.splitlines():
        indent = len(line) - len(line.lstrip())
        if block is not None and (not line.strip() or indent > block):
            continue
        block = None
        text = line.strip()
        if re.match(r'\.\. (code-block|literalinclude|image|toctree)::', text):
            block = indent
        elif not text.startswith('..') and text.endswith('::'):
            block = indent
            lines.append(line[:-1])
        elif re.match(r'(\.\. |:[a-z-]+:|[-=~+ |]+$)', text):
            lines.append('')
        else:  # each item or cell begins a text
            item = re.match(r'\s*((\* - |[-*] |\d+\. )+)', line)
            lines += [''] * bool(item) + [line[item.end():] if item else line]
    for full, paragraph in itertools.groupby(lines, lambda line: bool(
            line.strip())):
        if full:
            yield LITERAL.sub('literal', '\n'.join(paragraph))


def texts(path: pathlib.Path) -> Iterator[str]:
    """Yield the texts of a file."""
    source = path.read_text()
    yield from (python_texts(source) if path.suffix == '.py'
                else prose_texts(source))


def files(root: pathlib.Path) -> list[pathlib.Path]:
    """Return the files of a folder with texts, or the file itself."""
    if root.is_file():
        return [root]
    return sorted(path for path in root.rglob('*') if path.suffix in (
        '.py', '.rst') or path.name == 'findings.txt')


def count_all(roots: list[pathlib.Path]) -> Count:
    """Return the counts of files and folders together."""
    return sum((count(text) for root in roots for path in files(root)
                for text in texts(path)), Count())


def main(names: list[str]) -> None:
    for root in map(pathlib.Path, names):
        for path in files(root):
            for text in texts(path):
                for sentence in SENTENCE.split(text):
                    if HIDDEN.search(sentence) or ODD.match(sentence):
                        print('%s: %s' % (path, ' '.join(sentence.split())))
        print('%s: hidden nouns %.1f, odd beginnings %.1f per 1,000 words' % (
            root, *count_all([root]).per_thousand()))


if __name__ == '__main__':
    main(sys.argv[1:])
