# SPDX-License-Identifier: Apache-2.0

"""``make kernels``: run the kernel-dependent tests under other kernels.

Print a table of all results so far: passed, failed, and skipped because the
kernel lacks a feature. The results are in build/kernels.
``make kernels-table`` writes the documentation's table from them.
"""

from __future__ import annotations

import argparse
import collections
import json
import os
import pathlib
import re
import shlex
import signal
import sys
from typing import Any

import prettytable

from tests.kernels import machine
from tests.kernels import suite

#: Modules or parts of the suite, and their names in the table. The slowest
#: come first.
SUITES = {'tests.e2e.test_daemon': 'Kuryr, end to end',
          'tests.functional.test_discovery': 'Discovery',
          'tests.functional.test_border': 'Border and guard',
          'tests.functional.test_parents': 'Parents',
          'tests.functional.test_doubt': 'Doubt and claims',
          'tests.functional.test_parent_kinds': 'Kinds of parents',
          'tests.functional.cni.test_plugin.TestShim': 'CNI plugin',
          'tests.functional.test_kills': 'Kuryr, killed in an ADD',
          'tests.functional.test_vms': 'Virtual machines',
          'tests.functional.test_existence': 'End of sandboxes',
          'tests.functional.test_check': 'Check of a node'}
NAMES = {**SUITES, 'core-kuryr': 'Core of CI: Kuryr, end to end',
         'core': 'Core of CI: others'}
TABLE = pathlib.Path('doc/source/install/kernels.inc')
RESULTS = pathlib.Path('build/kernels')
#: Paths to exclude from the images of this folder and of Python's library,
#: because no suite reads them
UNNEEDED = ('.git', '.stestr', 'doc/build', '.venv/without-kuryr',
            '.venv/kuryr-sources', 'site-packages', 'test')


def main() -> int:
    parser = argparse.ArgumentParser(
        prog='make kernels', description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--kernel', action='append', choices=machine.SUITES,
                        help='repeat it for several; all by default')
    parser.add_argument('--place', action='append', choices=suite.PLACES,
                        help='process namespace: the first one, or an own '
                             'one, as of a container; both by default')
    parser.add_argument('tests', nargs='*', metavar='MODULE',
                        help='of tests; those of the table by default')
    parser.add_argument('--table', action='store_true',
                        help='run nothing, write %s' % TABLE)
    args = parser.parse_args()
    if args.table:
        TABLE.write_text(_rst())
        return 0
    # SystemExit runs the cleanup below; finished results stay on the disk.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    status = 0
    try:
        lacking = machine.missing()
        if lacking:
            raise machine.Unusable('These Debian packages are missing: %s'
                                   % ' '.join(lacking))
        kernels = list(map(machine.Kernel, args.kernel or machine.SUITES))
        for kernel in kernels:
            kernel.prepare()
        # A 9p share of many small files is slow, so pack both folders.
        with machine.packed([os.getcwd(), os.path.realpath(
                os.path.dirname(os.__file__))], UNNEEDED) as folders:
            for kernel in kernels:
                for place in args.place or suite.PLACES:
                    status |= _run(machine.Machine(kernel, folders), kernel,
                                   place, args.tests or list(SUITES))
    except machine.Unusable as err:
        print('make kernels: %s.' % err, file=sys.stderr)
        return 2
    print(_table())
    return status


def _run(guest: machine.Machine, kernel: machine.Kernel, place: str,
         tests: list[str]) -> int:
    print('Linux %s, %s process namespace' % (kernel.version, place))
    results = RESULTS / kernel.name / place
    results.mkdir(parents=True, exist_ok=True)
    (results / 'version').write_text(kernel.version)
    for test in tests:
        (results / (test + '.json')).unlink(missing_ok=True)
    status = guest.run(
        'export PATH=$PWD/%s:$PATH VENV=%s PATIENCE=900 NICS="%s"\nexec %s' % (
            os.path.relpath(os.path.dirname(sys.executable)),
            os.path.relpath(os.path.dirname(os.path.dirname(sys.executable))),
            # Only root of the machine may move NICs to another namespace.
            'eth0 eth1' if place == 'first' else '',
            shlex.join([sys.executable, '-m', 'tests.kernels.suite', '--in',
                        place, '--into', machine.RESULTS, *tests])),
        results, 600 + suite.LIMIT * len(tests))
    for test in tests:
        if not (results / (test + '.json')).exists():
            (results / (test + '.json')).write_text(json.dumps({
                'passed': 0, 'lacks': {}, 'failed': {test: 'it did not end'}}))
    return 1 if status is None else status


def _read(results: pathlib.Path) -> dict[str, Any]:
    return {path.stem: json.loads(path.read_text())
            for path in results.glob('*.json')}


def _columns() -> list[tuple[str, str, dict[str, Any]]]:
    """Return the results so far: kernel, place, results by test."""
    return [((RESULTS / name / place / 'version').read_text(), place,
             _read(RESULTS / name / place))
            for name in machine.SUITES for place in suite.PLACES
            if (RESULTS / name / place / 'version').exists()]


def _cell(found: Any) -> str:
    if found is None:
        return ''
    text = '%d' % found['passed']
    if found['failed']:
        text += ', %d FAILED' % len(found['failed'])
    if found['lacks']:
        text += ', %d left out' % len(found['lacks'])
    return text


def _reasons(results: dict[str, Any]) -> dict[str, int]:
    """Return the number of skipped tests, by reason."""
    return collections.Counter(
        reason for found in results.values()
        for reason in found['lacks'].values())


def _rst() -> str:
    """Return the documentation's table as reStructuredText."""
    columns = _columns()
    rows = [('Tests', *('%s, %s' % (re.split('[-+]', version)[0], place)
                        for version, place, _ in columns)),
            *((text, *(_cell(results.get(name)) or 'not run'
                       for _, _, results in columns))
              for name, text in NAMES.items())]
    lines = ['.. Made by "make kernels-table", of the results of "make '
             'kernels".', '', '.. csv-table::', '   :header-rows: 1', '',
             *('   "%s"' % '", "'.join(row) for row in rows),
             '']
    reasons = sorted({reason for _, _, results in columns
                      for reason in _reasons(results)})
    lines += ['Left out:', ''] if reasons else []
    for reason in reasons:
        lines += ['- %s: %s' % (reason, ', '.join(
            '%d under %s (%s)' % (_reasons(results)[reason], version, place)
            for version, place, results in columns
            if reason in _reasons(results)))]
    return '\n'.join(lines) + '\n'


def _table() -> str:
    columns = _columns()
    names = list(dict.fromkeys(
        test for _, _, results in columns for test in results))
    table = prettytable.PrettyTable(
        ['Suite', *('%s\n%s' % (version.partition('+')[0], place)
                    for version, place, _ in columns)])
    for name in names:
        table.add_row([NAMES.get(name, name), *(
            _cell(results.get(name)) for _, _, results in columns)])
    lines = [str(table)]
    for version, place, results in columns:
        for found in results.values():
            lines += ['%s, %s: FAILED %s' % (version, place, test)
                      for test in found['failed']]
    for reason in sorted({reason for _, _, results in columns
                          for reason in _reasons(results)}):
        lines.append('left out: %s' % reason)
    return '\n'.join(lines)


if __name__ == '__main__':
    sys.exit(main())
