# SPDX-License-Identifier: Apache-2.0

"""Draw the pods of the cluster's demo over time, without and with break0.

::

    python -m tests.cluster.plot JSON SVG
"""

from __future__ import annotations

import json
import pathlib
import sys

import matplotlib
from matplotlib import pyplot

#: The parts of the demo, with colour and line style
PARTS = (('Kuryr alone', 'C7', '--'), ('with break0', 'C2', '-'))


def draw(timelines: dict[str, list[tuple[float, int, int]]], path: str
         ) -> None:
    """Write an SVG file: ready pods on the left, restarts on the right."""
    # The same results must give the same file.
    matplotlib.rcParams['svg.hashsalt'] = 'kuryr-break0'
    matplotlib.rcParams['svg.fonttype'] = 'none'
    figure, plots = pyplot.subplots(ncols=2, figsize=(10, 3.2),
                                    layout='constrained')
    for plot, title, column in zip(
            plots, ('Pods that are ready', 'Restarts of containers'), (1, 2)):
        for part, colour, style in PARTS:
            seconds = [each[0] for each in timelines[part]]
            plot.step(seconds, [each[column] for each in timelines[part]],
                      where='post', color=colour, linestyle=style, label=part)
        plot.set_title(title)
        plot.set_xlabel('seconds after the creation of the Deployment')
        plot.yaxis.get_major_locator().set_params(integer=True)
        plot.set_ylim(-0.2, 4.4)
        plot.grid(alpha=0.3)
        plot.legend()
    figure.savefig(path, metadata={'Date': None})


if __name__ == '__main__':
    draw(json.loads(pathlib.Path(sys.argv[1]).read_text()), sys.argv[2])
