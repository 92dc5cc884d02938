# SPDX-License-Identifier: Apache-2.0

"""The command ``kuryr-break0 doctor``."""

from __future__ import annotations

from typing import Any

from oslo_config import cfg

from kuryr_break0.cli import common
from kuryr_break0.doctor.examination import examine
from kuryr_break0.doctor import report


def add_parser(subparsers: Any) -> None:
    """Register the subcommand."""
    parser = subparsers.add_parser(
        'doctor', help='say what is wrong on this node, and what to do',
        description='Look at all that node and pods need to reach each '
                    'other, and say of each fault what was seen, why it '
                    'matters and what to do. Changes nothing. Exits with 0 '
                    'if nothing was found, 1 if something was, 2 for wrong '
                    'usage or configuration, 3 if the kernel or the state '
                    'directory cannot be read.')
    parser.add_argument('--json', action='store_true',
                        help='print JSON instead of text')
    parser.set_defaults(func=run)


def run(conf: cfg.ConfigOpts) -> int:
    """Print what is wrong, and return the exit code."""
    done = examine(conf)
    counts = {'addresses': done.addresses, 'looked_up': done.looked_up,
              'pods': done.pods, 'entered': done.entered}
    print((report.as_json if conf.command.json else report.as_text)(
        done.findings, **counts))
    if done.unreadable is not None:
        return common.fail(common.UNREADABLE, done.unreadable)
    if done.invalid:
        return common.USAGE
    return common.DRIFT if done.findings else common.IN_SYNC
