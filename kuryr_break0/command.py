# Licensed under the Apache License, Version 2.0 (the "License"); you may
# not use this file except in compliance with the License. You may obtain
# a copy of the License at
#
#      http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS, WITHOUT
# WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the
# License for the specific language governing permissions and limitations
# under the License.

"""What the subcommands of ``kuryr-break0`` have in common."""

from __future__ import annotations

import argparse
import sys
from typing import Any, Callable

from kuryr_break0.plan import HostRoute
from kuryr_break0.plan import Item

#: Exit codes of all subcommands.
IN_SYNC, DRIFT, USAGE, UNREADABLE = range(4)


def argument(parse: Callable[[str], Any]) -> Callable[[str], Any]:
    """A type of argparse that says what a configuration value's would."""
    def checked(text: str) -> Any:
        try:
            return parse(text)
        except ValueError as err:
            raise argparse.ArgumentTypeError(str(err)) from err

    return checked


def line(sign: str, item: Item, device: str) -> str:
    """A route or neighbour as a line of a diff, in the words of ip(8).

    :param sign: ``+``, ``-`` or ``!``
    :param device: the name of its interface
    """
    if isinstance(item, HostRoute):
        return '%s route %s dev %s proto %d table %d%s' % (
            sign, item.dst, device, item.protocol, item.table,
            ' src %s' % item.src if item.src else '')
    return '%s neighbour %s dev %s lladdr %s' % (
        sign, item.dst, device, item.mac)


def fail(code: int, err: Exception) -> int:
    """Say what hindered a subcommand; its exit code."""
    print('kuryr-break0: %s' % err, file=sys.stderr)
    return code
