# SPDX-License-Identifier: Apache-2.0

"""Loggers of this package, for oslo.log, which is not imported.

And what makes a text safe for a log and a terminal, whoever chose it.
"""

from __future__ import annotations

import logging
from typing import Any, TYPE_CHECKING

if TYPE_CHECKING:
    _Adapter = logging.LoggerAdapter[logging.Logger]
else:
    _Adapter = logging.LoggerAdapter


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


class _Logger(_Adapter):

    def log(self, level: int, msg: Any, *args: Any, **kwargs: Any) -> None:
        """Log a line, as the base class does.

        To a line that is logged while an exception is handled, oslo.log
        appends the name of its class and its message, which our lines have
        already. It does not for a ValueError
        (oslo_log.formatters._get_error_summary).
        """
        if not self.isEnabledFor(level):
            return
        msg, args = safe(str(msg) % args if args else str(msg)), ()
        if level < logging.WARNING or kwargs.get('exc_info'):
            super().log(level, msg, *args, **kwargs)
            return
        try:
            raise ValueError
        except ValueError:
            super().log(level, msg, *args, **kwargs)


def get_logger(name: str) -> _Adapter:
    """Return the logger of a module of this package."""
    return _Logger(logging.getLogger(name), {})
