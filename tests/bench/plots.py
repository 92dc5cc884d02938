# SPDX-License-Identifier: Apache-2.0

"""Draws the costs of a pod by the number of pods, from the JSON results."""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any, Optional

import matplotlib
from matplotlib import axes
from matplotlib import pyplot

#: Times by way and number of pods
Medians = dict[str, dict[str, float]]

#: Ways to compare, with colour and line style
ADDS = (('stock Kuryr', 'C7', '--'),
        ('break0, pod_binding = kuryr', 'C0', '-'),
        ('break0, pod_binding = auto', 'C2', '-'))
ROUTES = (('IPDB per operation', 'C3', '--'), ('ours', 'C0', '-'))
LABELS = {'stock Kuryr': 'stock Kuryr, with as many routes',
          'IPDB per operation': 'the original recipe, by IPDB',
          'ours': 'kuryr-break0: ledger, route, neighbours'}


def draw(results: dict[str, Any], path: str) -> None:
    """Write an SVG file with ADDs and routes side by side."""
    # The same figures must give the same file.
    matplotlib.rcParams['svg.hashsalt'] = 'kuryr-break0'
    matplotlib.rcParams['svg.fonttype'] = 'none'
    figure, (left, right) = pyplot.subplots(
        ncols=2, figsize=(10, 3.8), layout='constrained')
    sections = results['sections']
    _lines(left, 'b_base.connect of one pod', ADDS,
           sections['binding']['connect_ms'])
    _lines(right, 'bind + unbind of one address', ROUTES,
           sections['pods']['medians_ms'])
    left.set_ylim(bottom=0)
    right.set_yscale('log')
    figure.savefig(path, metadata={'Date': None})


def _lines(plot: axes.Axes, title: str,
           ways: tuple[tuple[str, str, str], ...], medians: Medians) -> None:
    for name, colour, style in ways:
        sizes, values = zip(*((int(size), value) for size, value
                              in medians[name].items()))
        plot.plot(sizes, values, color=colour, linestyle=style, marker='o',
                  label=LABELS.get(name, name))
    plot.set_title(title)
    plot.set_xlabel('pods on the node')
    plot.set_ylabel('ms, median')
    plot.grid(alpha=0.3)
    plot.legend()


def main(argv: Optional[list[str]] = None) -> int:
    parser = argparse.ArgumentParser(
        prog='tests.bench.plots',
        description='Draw the figures of a benchmark as SVG.')
    parser.add_argument('results', help='what tests.bench --json has written')
    parser.add_argument('svg', help='the file to write')
    args = parser.parse_args(argv)
    try:
        with open(args.results) as file:
            results = json.load(file)
        draw(results, args.svg)
    except (OSError, ValueError, KeyError) as err:
        print('tests.bench.plots: %s: %s' % (args.results, err),
              file=sys.stderr)
        return 1
    return 0


if __name__ == '__main__':
    sys.exit(main())
