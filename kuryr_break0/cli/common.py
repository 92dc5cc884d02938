# SPDX-License-Identifier: Apache-2.0

"""Exit statuses, errors and formats that all verbs share."""

from __future__ import annotations

import argparse
import sys
from typing import Any, Callable

from kuryr_break0.model import HostRoute
from kuryr_break0.model import Item

#: Exit codes of all verbs.
IN_SYNC, DRIFT, USAGE, UNREADABLE, WARNINGS = range(5)
#: Of a program that SIGPIPE ended, as shells have it.
CLOSED_PIPE = 141
#: Of a program that Ctrl-C ended.
INTERRUPTED = 130


def argument(parse: Callable[[str], Any]) -> Callable[[str], Any]:
    """Return a type of argparse with the errors of an option's type."""
    def checked(text: str) -> Any:
        try:
            return parse(text)
        except ValueError as err:
            raise argparse.ArgumentTypeError(str(err)) from err

    return checked


def described(item: Item, device: str) -> str:
    """Return a route or neighbour in the words of ip(8).

    :param device: the name of its interface
    """
    if isinstance(item, HostRoute):
        return 'route %s dev %s proto %d table %d%s' % (
            item.dst, device, item.protocol, item.table,
            ' src %s' % item.src if item.src else '')
    return 'neighbour %s dev %s lladdr %s' % (item.dst, device, item.mac)


def fail(code: int, err: Exception) -> int:
    """Print an error, and return the exit code."""
    print('kuryr-break0: %s' % err, file=sys.stderr)
    return code
