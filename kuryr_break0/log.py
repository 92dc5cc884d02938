# SPDX-License-Identifier: Apache-2.0

"""Loggers of this package: those of oslo.log, with each error said once."""

from __future__ import annotations

import logging
from typing import Any

from oslo_log import log as oslo_logging


class _Logger(oslo_logging.KeywordArgumentAdapter):

    def log(self, level: int, msg: Any, *args: Any, **kwargs: Any) -> None:
        """Log a line, as the base class does.

        To a line that is logged while an exception is handled, oslo.log
        appends the name of its class and its message, which our lines have
        already. It does not for a ValueError
        (oslo_log.formatters._get_error_summary).
        """
        if level < logging.WARNING or kwargs.get('exc_info'):
            super().log(level, msg, *args, **kwargs)
            return
        try:
            raise ValueError
        except ValueError:
            super().log(level, msg, *args, **kwargs)


def get_logger(name: str) -> logging.LoggerAdapter[logging.Logger]:
    """Return the logger of a module of this package."""
    return _Logger(logging.getLogger(name), {'project': 'kuryr-break0'})
