# SPDX-License-Identifier: Apache-2.0

"""``kuryr-break0 doctor``: prints findings, and writes a bundle."""

from __future__ import annotations

import difflib
import json
from typing import Any

from oslo_config import cfg

from kuryr_break0.cli import common
from kuryr_break0.cli import status
from kuryr_break0 import config
from kuryr_break0.doctor import bundle
from kuryr_break0.doctor.examination import Examination
from kuryr_break0.doctor.examination import examine
from kuryr_break0.doctor import findings
from kuryr_break0.doctor import report
from kuryr_break0 import exceptions


def add_parser(subparsers: Any) -> None:
    """Register the subcommand."""
    parser = subparsers.add_parser(
        'doctor', help='find out what is wrong on this node',
        description='Examine everything that node and pods need to reach '
                    'each other. For each finding, print what was seen, why '
                    'it matters, and what to do. Changes nothing. Exit '
                    'status: 0 if nothing is wrong, 1 if there are errors, '
                    '4 if there are only warnings, 2 for wrong usage or '
                    'configuration, 3 if the kernel or the state directory '
                    'cannot be read.')
    parser.add_argument('--ignore', metavar='ID', action='append',
                        default=[], type=common.argument(_known),
                        help='leave out this finding, for example '
                             'route-foreign; may be repeated')
    parser.add_argument('--json', action='store_true',
                        help='print JSON instead of text')
    parser.add_argument('--no-probe', action='store_true',
                        help='send no pings; by default they are the last '
                             'check if nothing else was found')
    parser.add_argument('--bundle', metavar='FILE',
                        help='also write an archive (tar.gz) for a bug '
                             'report: versions, options, status, findings, '
                             'ledger, network, rules, sysctls, logs; at most '
                             '10 MiB before it is packed, without secrets')
    parser.add_argument('--redact', action='store_true',
                        help='replace addresses, ids and names in the archive')
    parser.set_defaults(func=run)


def _bundle(conf: cfg.ConfigOpts, done: Examination,
            counts: dict[str, int]) -> None:
    options = config.load(conf)
    bundle.Bundle(options, conf.command.redact).write(conf.command.bundle, {
        'status.json': lambda: json.dumps(status.as_json(options),
                                          indent=2),
        'doctor.json': lambda: report.as_json(
            done.findings, done.not_examined, **counts)})


def _known(name: str) -> str:
    known = [each.id for each in vars(findings).values()
             if isinstance(each, findings.Kind)]
    if name not in known:
        close = difflib.get_close_matches(name, known, 1)
        raise ValueError('%r is no finding%s' % (
            name, ': did you mean %s?' % close[0] if close else ''))
    return name


def run(conf: cfg.ConfigOpts) -> int:
    """Print what is wrong, and return the exit code."""
    done = examine(conf, not conf.command.no_probe)
    done.findings = [each for each in done.findings
                     if each.id not in conf.command.ignore]
    counts = {'addresses': done.addresses, 'looked_up': done.looked_up,
              'pods': done.pods, 'entered': done.entered}
    print((report.as_json if conf.command.json else report.as_text)(
        done.findings, done.not_examined, **counts))
    if conf.command.bundle is not None:
        try:
            _bundle(conf, done, counts)
        except (OSError, exceptions.InvalidOption) as err:
            return common.fail(common.USAGE, exceptions.CannotWrite(
                path=conf.command.bundle, reason=err))
    if done.unreadable is not None:
        return common.fail(common.UNREADABLE, done.unreadable)
    if done.invalid:
        return common.USAGE
    if any(each.severity == findings.ERROR for each in done.findings):
        return common.DRIFT
    return (common.WARNINGS if any(
        each.severity == findings.WARNING for each in done.findings)
        else common.IN_SYNC)
