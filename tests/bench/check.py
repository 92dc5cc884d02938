# SPDX-License-Identifier: Apache-2.0

"""``make bench-check``: detects changes that make break0 slower.

Compares ratios of times from one run with the ratios in ratios.json. Ratios
vary less between machines than times, but they vary: the ratios of one commit
differed by a factor of up to 1.8 on two days. So the check fails only if a
ratio is more than twice the recorded ratio in each of three measurements.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import os
import pathlib
import signal
import subprocess
import sys
from typing import Callable, Iterator, Mapping

import prettytable
import psutil

from kuryr_break0 import kernel
from kuryr_break0 import manager
from tests import bench
from tests.bench import binding
from tests.bench import cni
from tests.bench import healing
from tests.support import kuryr
from tests.support import lab
from tests.support import program

FILE = pathlib.Path(__file__).with_name('ratios.json')
TOLERANCE = 2.0
RUNS = 3
PODS = 250
#: The baseline for the start of a program
PYTHON = (sys.executable, '-c', 'import argparse, json')

#: Ratios by name
Ratios = Mapping[str, float]
Part = Callable[[bench.Node], Iterator[tuple[str, float]]]


def _least(calls: dict[str, Callable[[], float]], rounds: int
           ) -> dict[str, float]:
    """Run the calls in turns, and return the minimum of each.

    Other processes of the machine can only add to a time, so the minimum is
    the least disturbed time.
    """
    taken = [{name: call() for name, call in calls.items()}
             for _ in range(rounds)]
    return {name: min(each[name] for each in taken) for name in calls}


def _ratios(least: dict[str, float]) -> Iterator[tuple[str, float]]:
    """Yield the name and the ratio of each later time to the first time."""
    (unit, of), *others = least.items()
    for name, taken in others:
        yield '%s / %s' % (name, unit), taken / of


def _pairs(node: bench.Node) -> Iterator[tuple[str, float]]:
    """Yield the costs of bind and unbind, in this and in forked processes."""
    node.resize(PODS)
    bench.keep()
    kernel.share_nft()  # as kuryr-daemon does before it forks

    def forked(call: Callable[[], None]) -> Callable[[], float]:
        return lambda: bench.in_child(lambda: bench.timed(call))

    # The two groups do not alternate: after a fork, each write of this process
    # to shared memory first copies the page, which slows the calls that do not
    # fork.
    for calls in ({'bind': lambda: bench.timed(node.bind),
                   'unbind': lambda: bench.timed(node.unbind)},
                  {'bind, just forked': forked(node.bind),
                   'unbind, just forked': forked(node.unbind)}):
        yield from _ratios(_least({
            bench.UNIT: lambda: bench.unit(node, min, 2), **calls}, 50))


def _syncs(node: bench.Node) -> Iterator[tuple[str, float]]:
    node.resize(1000)
    node.write_batch('add', node.records(0, 1000))
    device = node.options.device

    def flush() -> None:
        node.lab.run('ip', 'route', 'flush', 'dev', device)
        node.lab.run('ip', 'neigh', 'flush', 'dev', device,
                     'nud', 'permanent')

    def from_nothing(call: Callable[[], object]) -> float:
        flush()
        taken = bench.timed(call)
        node.require(False, False)
        return taken

    sync = manager.Break0Manager(node.options).sync
    yield from _ratios(_least({
        'ip -batch': lambda: from_nothing(node.run_batch),
        'sync from nothing': lambda: from_nothing(sync),
        'sync with nothing to do': lambda: bench.timed(sync)}, 6))


def _starts(node: bench.Node) -> Iterator[tuple[str, float]]:
    def run(*command: str) -> Callable[[], float]:
        return lambda: bench.timed(lambda: subprocess.run(
            command, check=True, stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL))

    node.resize(PODS)
    # These pods have no interfaces, so status finds problems and exits with 1.
    status = '%s status || [ $? = 1 ]' % program.BREAK0
    yield from _ratios(_least({
        'python': run(*PYTHON), '--version': run(program.BREAK0, '--version'),
        'status': run('sh', '-c', status)}, 8))


def _agent(node: bench.Node) -> Iterator[tuple[str, float]]:
    """Yield the ratio of the agent's memory to the memory of an idle Python.

    Both are measured after the agent has restored break0 three times.
    """
    node.resize(PODS)
    agent = subprocess.Popen(
        [program.BREAK0, 'agent'],
        env={**os.environ, 'OS_BREAK0__METRICS_BIND': ''},
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    with subprocess.Popen([sys.executable, '-c', 'input()'],
                          stdin=subprocess.PIPE) as python:
        try:
            healing.deletions(node, 3)
            memory = [psutil.Process(each.pid).memory_info().rss
                      for each in (agent, python)]
            yield "the agent's memory / python", memory[0] / memory[1]
        finally:
            agent.send_signal(signal.SIGTERM)
            agent.wait()
            python.communicate(b'\n')


def _plugin(node: bench.Node) -> Iterator[tuple[str, float]]:
    times = cni.adds(node, 60).data['times']
    yield from _ratios({'ADD of ' + name: min(times[name]) for name in (
        'tuning', cni.OURS, cni.SCRIPT)})


def _daemon(node: bench.Node) -> Iterator[tuple[str, float]]:
    """Yield the costs of ADDs by kuryr-daemon with break0 and without."""
    with kuryr.Node() as each:
        stock = kuryr.stock_environment(os.path.join(each.dir, 'venv'))
        yield from _ratios({'ADD by ' + way: min(
            add for add, _ in binding.singles(each, way, stock, 8))
            for way in (binding.STOCK, binding.KURYR, binding.DIRECT)})


PARTS = (_pairs, _syncs, _starts, _agent, _plugin, _daemon)


def measure(parts: list[Part]) -> dict[str, tuple[str, float]]:
    """Measure parts; return the part's name and the ratio, by ratio name."""
    found = {}
    for part in parts:
        bench.say(part.__name__.strip('_'))
        with contextlib.closing(lab.Lab()) as made:
            for name, ratio in part(bench.Node(made)):
                found[name] = part.__name__, ratio
    return found


def compare(known: Ratios) -> int:
    """Measure, and print each ratio with its recorded value."""
    table = prettytable.PrettyTable(['ratio', 'known', 'measured', 'result'])
    table.align = 'r'
    table.align['ratio'] = 'l'
    parts: dict[str, Part] = {part.__name__: part for part in PARTS}
    seen: dict[str, list[float]] = {}
    again = [*parts]
    for _ in range(RUNS):
        found = measure([parts[name] for name in again])
        for name, (_, ratio) in found.items():
            seen.setdefault(name, []).append(ratio)
        again = [*dict.fromkeys(
            part for name, (part, _) in found.items()
            if min(seen[name]) > TOLERANCE * known.get(name, 0))]
        if not again:
            break
    worse = [name for name, ratios in seen.items()
             if min(ratios) > TOLERANCE * known.get(name, 0)]
    for name, ratios in seen.items():
        table.add_row([name, '%.2f' % known.get(name, 0), ' '.join(
            '%.2f' % ratio for ratio in ratios),
            'WORSE' if name in worse else ''])
    print(table)
    missing = sorted(set(known) - set(seen))
    if missing:
        print('Not measured any more: ' + ', '.join(missing))
    if worse:
        print('More than %g times as large in each of %d runs: %s\nIf that is '
              'worth it: make bench-ratios, and say why in the commit' % (
                  TOLERANCE, RUNS, ', '.join(worse)))
    return 1 if worse or missing else 0


def main() -> int:
    parser = argparse.ArgumentParser(prog='make bench-check',
                                     description=__doc__)
    parser.add_argument('--renew', metavar='FILE', help='measure %d times, '
                        'and write the least' % RUNS,
                        type=argparse.FileType('w'))
    args = parser.parse_args()
    logging.disable(logging.INFO)
    if args.renew is None and not FILE.exists():
        print('There is nothing to compare with yet: make bench-ratios, on a '
              'machine that has nothing else to do', file=sys.stderr)
        return 2
    if args.renew is None:
        return compare(json.loads(FILE.read_text()))
    runs = [measure([*PARTS]) for _ in range(RUNS)]
    with args.renew:
        json.dump({name: round(min(run[name][1] for run in runs), 3)
                   for name in runs[0]}, args.renew, indent=2)
        args.renew.write('\n')
    return 0


if __name__ == '__main__':
    sys.exit(main())
