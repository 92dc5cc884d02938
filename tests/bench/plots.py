# SPDX-License-Identifier: Apache-2.0

"""Draws the times to connect and to start a pod, with and without break0."""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from typing import Any, Optional

import matplotlib
from matplotlib import axes
from matplotlib import pyplot

#: Times by way and number of pods
Medians = dict[str, dict[str, float]]

#: Ways to connect a pod, with label, colour and line style
CONNECTS = (('stock Kuryr', 'Kuryr alone', 'C7', '--'),
            ('break0, pod_binding = kuryr',
             'with break0, pod_binding = kuryr', 'C0', '-'),
            ('break0, pod_binding = auto', 'with break0', 'C2', '-'))
#: Ways to start a sandbox, with label and colour
STARTS = (('stock Kuryr, Go', 'Kuryr alone', 'C7'),
          ('break0, Go', 'with break0', 'C2'))


def draw(results: dict[str, Any], path: str) -> None:
    """Write an SVG file with connections and starts side by side."""
    # The same results must give the same file.
    matplotlib.rcParams['svg.hashsalt'] = 'kuryr-break0'
    matplotlib.rcParams['svg.fonttype'] = 'none'
    figure, (left, right) = pyplot.subplots(
        ncols=2, figsize=(10, 3.8), layout='constrained')
    sections = results['sections']
    _connects(left, sections['binding']['connect_ms'])
    _starts(right, sections['sandboxes'])
    figure.savefig(path, metadata={'Date': None})


def _connects(plot: axes.Axes, medians: Medians) -> None:
    for name, label, colour, style in CONNECTS:
        sizes, values = zip(*((int(size), value) for size, value
                              in medians[name].items()))
        plot.plot(sizes, values, color=colour, linestyle=style, marker='o',
                  label=label)
    plot.set_title('Time to connect one pod to its network')
    plot.set_xlabel('pods on the node')
    plot.set_ylabel('ms, median')
    plot.set_ylim(bottom=0)
    plot.grid(alpha=0.3)
    plot.legend()


def _starts(plot: axes.Axes, section: dict[str, Any]) -> None:
    engine = statistics.median(section['alone_ms'])
    for name, label, colour in STARTS:
        median = statistics.median(section['there_ms'][name])
        plot.bar(label, engine, color='C7', alpha=0.4,
                 label=None if plot.patches else 'containerd alone')
        plot.bar(label, median - engine, bottom=engine, color=colour,
                 label='network of the pod, ' + label)
        plot.annotate('%.0f ms' % median, (label, median), ha='center',
                      va='bottom')
    plot.set_title('Time until a pod has its sandbox')
    plot.set_ylabel('ms, median')
    plot.margins(y=0.5)  # room for the legend
    plot.legend()


def main(argv: Optional[list[str]] = None) -> int:
    parser = argparse.ArgumentParser(
        prog='tests.bench.plots',
        description='Draw the figures of a benchmark as SVG.')
    parser.add_argument('results', help='file of tests.bench --json')
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
