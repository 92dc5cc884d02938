# SPDX-License-Identifier: Apache-2.0

"""``kuryr-break0 check``: checks a node before the installation."""

from __future__ import annotations

import json
import textwrap
from typing import Any

from oslo_config import cfg

from kuryr_break0.cli import common
from kuryr_break0 import config
from kuryr_break0.doctor import preconditions

_WIDTH = 79


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        'check', help='check whether break0 will work on this node',
        description='Check what break0 needs, before you install it: '
                    'capabilities, kernel, macvlan on the interface, free '
                    'names and numbers, sysctls, namespaces, and programs '
                    'that manage interfaces. Changes nothing. Exit status: '
                    '0 if break0 will work, 1 if it will not, 2 for wrong '
                    'usage or configuration.')
    parser.add_argument(
        '--parent', metavar='NAME',
        type=common.argument(config.DeviceName()),
        help='interface that the containers will be on (default: [break0] '
             'parent, then [binding] link_iface)')
    parser.add_argument('--json', action='store_true',
                        help='print JSON instead of text')
    parser.set_defaults(func=run)


def run(conf: cfg.ConfigOpts, options: config.Options) -> int:
    """Print what is there and what is missing, a line each."""
    parent = (conf.command.parent or options.parent
              or config.link_iface(conf))
    results = list(preconditions.check(options, parent))
    if conf.command.json:
        print(json.dumps([each._asdict() for each in results], indent=2))
    else:
        for each in results:
            print(textwrap.fill(
                '%-8s %s: %s' % (each.state, each.what, each.text), _WIDTH,
                subsequent_indent=' ' * 9, break_on_hyphens=False,
                break_long_words=False))
    return common.DRIFT if any(
        each.state == preconditions.ERROR for each in results
    ) else common.IN_SYNC
