# SPDX-License-Identifier: Apache-2.0

"""Loggers for oslo.log, without an import of oslo.log."""

from __future__ import annotations

import logging
from typing import Any, TYPE_CHECKING

from kuryr_break0.texts import safe

if TYPE_CHECKING:
    _Adapter = logging.LoggerAdapter[logging.Logger]
else:
    _Adapter = logging.LoggerAdapter


class _Logger(_Adapter):

    def log(self, level: int, msg: Any, *args: Any, **kwargs: Any) -> None:
        """Log a line as the base class does.

        While an exception is being handled, oslo.log appends the exception's
        class and message to the line, which already contains them. oslo.log
        appends nothing for a ValueError
        (oslo_log.formatters._get_error_summary). So this method logs warnings
        and errors while it handles a ValueError.
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
