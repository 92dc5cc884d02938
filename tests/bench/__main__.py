# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import json
import logging
import os
import platform
import sys
from typing import Any, NoReturn, Optional

import prettytable

from tests import bench
from tests.bench import binding
from tests.bench import bulk
from tests.bench import cni
from tests.bench import found
from tests.bench import gaps
from tests.bench import healing
from tests.bench import hops
from tests.bench import hostile
from tests.bench import own
from tests.bench import paths
from tests.bench import pods
from tests.bench import sandboxes
from tests.bench import scale
from tests.bench import soak
from tests.support import lab

SECTIONS: dict[str, bench.Measure] = {
    'pods': pods.pairs, 'own': own.calls, 'lock': own.lock,
    'hops': hops.next_hops, 'bulk': bulk.syncs,
    'healing': healing.repairs, 'gaps': gaps.gaps, 'paths': paths.paths,
    'guarded': paths.guarded,
    'binding': binding.binding, 'single': binding.single,
    'scale': scale.scale,
    'bursts': binding.bursts, 'cni': cni.adds,
    'found': found.found, 'sandboxes': sandboxes.sandboxes}
#: Modules whose SIZES --small divides by ten
SIZED: tuple[Any, ...] = (binding, bulk, found, hops, own, pods,
                          scale)
#: The section that runs only if the user names it, and without other sections.
SOAK = 'soak'


def _table(title: Optional[str], columns: list[str],
           rows: list[list[str]]) -> str:
    table = prettytable.PrettyTable(columns, title=title)
    table.align = 'r'
    table.align[columns[0]] = 'l'
    table.add_rows(rows)
    return str(table)


def _report(sections: dict[str, bench.Section],
            repeat: int) -> dict[str, Any]:
    """Print the results, and return them for the JSON file."""
    environment = {'python': platform.python_version(),
                   'pyroute2': importlib.metadata.version('pyroute2'),
                   'kernel': platform.release(), 'cpus': os.cpu_count()}
    print(', '.join('%s %s' % item for item in environment.items()))
    for section in sections.values():
        print(_table(section.title, section.columns, section.rows))
    targets = [target for section in sections.values()
               for target in section.targets]
    if targets:
        print(_table(None, ['target', 'measured', 'result'], [
            [name, measured, 'met' if met else 'MISSED']
            for name, measured, met in targets]))
        missed = [target.name for target in targets if not target.met]
        print('Missed, %d of %d: %s' % (
            len(missed), len(targets), '; '.join(missed)) if missed
            else 'All %d targets are met' % len(targets))
    return {'environment': environment, 'repeat': repeat,
            'sections': {name: {'title': section.title, **section.data}
                         for name, section in sections.items()},
            'targets': [target._asdict() for target in targets]}


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, '%s: %s (see --help)\n' % (self.prog, message))


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(
            '%r is not a whole number from 1' % text)
    return int(text)


def _arguments(argv: Optional[list[str]]) -> argparse.Namespace:
    parser = _Parser(prog='tests.bench', description='Measure the costs '
                     'of a pod. Run the command under tools/in-lab.')
    # argparse opens the file before the lab mounts a /run of its own.
    parser.add_argument('--json', metavar='FILE',
                        type=argparse.FileType('w'),
                        help='write the results to this file as well')
    parser.add_argument('--repeat', metavar='N', type=_positive, default=200,
                        help='pairs by each way and number of routes; a '
                        'slow way gets fewer (default: %(default)d)')
    parser.add_argument('--small', action='store_true',
                        help='with a tenth of the pods, to see that it runs')
    parser.add_argument('--hours', metavar='N', type=float,
                        help='how long the soak lasts (default: 2, and half '
                        'an hour with --hostile)')
    parser.add_argument('--hostile', action='store_true', help='a soak beside '
                        'a hostile container, in place of kills and faults')
    parser.add_argument('sections', metavar='SECTION', nargs='*',
                        choices=[*SECTIONS, SOAK, []], default=[],
                        help='only these of: %s; or %s: whether all holds '
                        'through hours of churn, kills and other faults' % (
                            ', '.join(SECTIONS), SOAK))
    args = parser.parse_args(argv)
    if SOAK in args.sections and len(args.sections) > 1:
        parser.error('%s is run alone' % SOAK)
    if args.hostile and args.sections != [SOAK]:
        parser.error('--hostile is for ' + SOAK)
    return args


def main(argv: Optional[list[str]] = None) -> int:
    args = _arguments(argv)
    logging.disable(logging.INFO)
    if args.sections == [SOAK]:
        return (hostile.run(args.hours or 0.5) if args.hostile
                else soak.run(args.hours or 2))
    for module in SIZED if args.small else ():
        module.SIZES = tuple(size // 10 for size in module.SIZES)
    try:
        sections = {}
        for name in args.sections or SECTIONS:
            with contextlib.closing(lab.Lab()) as made:
                try:
                    sections[name] = SECTIONS[name](
                        bench.Node(made), args.repeat)
                except bench.LeftOut as err:
                    bench.say('Left out: %s: %s' % (name, err))
        results = _report(sections, args.repeat)
        if args.json:
            with args.json:
                json.dump(results, args.json, indent=2)
    except (OSError, AssertionError, bench.Broken) as err:
        reason = getattr(err, 'strerror', None) or str(err)
        print('tests.bench: ' + ' '.join(reason.split()), file=sys.stderr)
        return 1
    return 0


if __name__ == '__main__':
    sys.exit(main())
