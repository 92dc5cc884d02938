# SPDX-License-Identifier: Apache-2.0

"""Prepares untrusted texts for output, without an import of slow modules."""

from __future__ import annotations

from typing import Iterable


def safe(text: str) -> str:
    """Return a text on one line, without characters that control a terminal.

    The name of an interface or an alias may contain control characters,
    characters that change the direction of text, and bytes that are not UTF-8.
    The function replaces each of them by Python's notation: ``\\x9b``.
    """
    if text.isprintable():
        return text
    return ''.join(
        each if each.isprintable() else '\\x%02x' % (ord(each) & 0xff)
        if '\udc80' <= each <= '\udcff'  # a byte (PEP 383)
        else each.encode('unicode_escape').decode() for each in text)


def close_to(name: str, known: Iterable[str]) -> str:
    """Return ': did you mean NAME?' with the closest known name.

    If no known name is close, return an empty text.
    """
    import difflib  # rarely needed

    known = list(known)
    close = (difflib.get_close_matches(name, known, 1, 0.7)
             or difflib.get_close_matches(name.lower(), known, 1, 0.7))
    return ': did you mean %s?' % close[0] if close else ''
