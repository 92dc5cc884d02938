# SPDX-License-Identifier: Apache-2.0

"""``kuryr-break0 check``: checks a node before the installation."""

from __future__ import annotations

from typing import Any

from oslo_config import cfg

from kuryr_break0.cli import common
from kuryr_break0.cli import output
from kuryr_break0.cli import parser
from kuryr_break0 import config
from kuryr_break0.doctor import preconditions

_DESCRIPTION = """\
Check what break0 needs, before you install it: capabilities, kernel, macvlan
on the interface, free names and numbers, sysctls, namespaces, and programs
that manage interfaces. Changes nothing. Exit status: 0 if break0 will work, 1
if it will not, 2 for wrong usage or configuration.
"""


def add_parsers(subparsers: Any) -> None:
    added = parser.add_verb(
        subparsers, 'check', 'check whether break0 will work on this node',
        run, _DESCRIPTION)
    added.add_argument(
        '--parent', metavar='NAME',
        type=parser.argument(config.DeviceName()),
        help='interface that the containers will be on (default: [break0] '
             'parent, then [binding] link_iface)')


def run(conf: cfg.ConfigOpts, options: config.Options) -> int:
    """Print what is there and what is missing, a line each."""
    parent = (conf.command.parent or options.parent
              or config.link_iface(conf))
    results = list(preconditions.check(options, parent))
    if conf.command.json:
        output.write_json([each._asdict() for each in results])
    else:
        for each in results:
            kind = str if each.state == preconditions.OK else output.Wrong
            output.write(output.fold(kind(output.speak('%-8s %s: %s' % (
                each.state, each.what, each.text))), ' ' * 9))
    return common.DRIFT if any(
        each.state == preconditions.ERROR for each in results
    ) else common.IN_SYNC
