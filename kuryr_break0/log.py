# SPDX-License-Identifier: Apache-2.0

"""Loggers of this package, for oslo.log, which is not imported."""

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
