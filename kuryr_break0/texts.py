# SPDX-License-Identifier: Apache-2.0

"""Makes texts fit to be read, whoever chose them. Imports nothing slow."""

from __future__ import annotations

from typing import Iterable


def safe(text: str) -> str:
    """Return a text of one line in which no character acts on a terminal.

    A name of an interface or an alias can have control characters, of C1
    too, characters that change the direction of what follows, and bytes that
    are not UTF-8. They are written as in Python: ``\\x9b``.
    """
    if text.isprintable():
        return text
    return ''.join(
        each if each.isprintable() else '\\x%02x' % (ord(each) & 0xff)
        if '\udc80' <= each <= '\udcff'  # a byte (PEP 383)
        else each.encode('unicode_escape').decode() for each in text)


def close_to(name: str, known: Iterable[str]) -> str:
    """Return a question for the known name that was meant, if there is one."""
    import difflib  # only where something is wrong

    known = list(known)
    close = (difflib.get_close_matches(name, known, 1, 0.7)
             or difflib.get_close_matches(name.lower(), known, 1, 0.7))
    return ': did you mean %s?' % close[0] if close else ''
