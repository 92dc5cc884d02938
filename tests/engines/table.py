# SPDX-License-Identifier: Apache-2.0

"""Prints the rows that tools/engines-of has collected."""

from __future__ import annotations

import json
import sys

import prettytable

_COLUMNS = {'suite': 'Debian', 'engine': 'Engine',
            'names': 'Shown by status', 'ms': 'To the first ping, ms',
            'result': 'Result'}


def main() -> None:
    table = prettytable.PrettyTable(list(_COLUMNS.values()), align='l',
                                    header_style=None)
    # Lines between all rows give a grid table of reStructuredText.
    table.hrules = prettytable.HRuleStyle.ALL
    with open(sys.argv[1]) as file:
        for row in map(json.loads, file):
            table.add_row([row.get(key, '') for key in _COLUMNS])
    print(table)


if __name__ == '__main__':
    main()
