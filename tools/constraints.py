# SPDX-License-Identifier: Apache-2.0

"""Regenerate constraints.txt, or only the pins of the named packages.

Needs the package index, and a Python of each minor version in OLDEST, from
pyenv or in PATH.
"""

from __future__ import annotations

import glob
import json
import os
import re
import subprocess
import sys
import tempfile
from typing import Iterator, NamedTuple, Optional

from packaging import requirements

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
FILE = os.path.join(ROOT, 'constraints.txt')
#: The oldest release of each minor version of Python on which all pins have to
#: install. Debian 11 has 3.9.2, Debian 12 has 3.11.2.
OLDEST = ('3.9.2', '3.10.0', '3.11.2', '3.12.0', '3.13.0')
MINORS = [version.rpartition('.')[0] for version in OLDEST]
#: A program that runs pip as if its Python were another patch release. pip's
#: option --python-version refuses packages without a wheel, such as ovs.
PIP = """
import collections
import platform
import runpy
import sys
version = sys.argv.pop(1)
sys.version_info = collections.namedtuple(
    'version_info', 'major minor micro releaselevel serial')(
    *map(int, version.split('.')), 'final', 0)
platform.python_version = lambda: version
runpy.run_module('pip', run_name='__main__')
"""


class Pin(NamedTuple):
    """A line of constraints.txt: a requirement, and its Requires-Python."""

    requirement: requirements.Requirement
    requires_python: str

    def is_for(self, python: str) -> bool:
        """Return whether the pin applies to a release of Python."""
        marker = self.requirement.marker
        return marker is None or marker.evaluate(
            {'python_version': python.rpartition('.')[0],
             'python_full_version': python})


def read() -> Iterator[Pin]:
    """Yield the pins of constraints.txt."""
    with open(FILE) as file:
        for line in file:
            text, _, python = line.partition('#')
            if text.strip():
                yield Pin(requirements.Requirement(text.strip()),
                          python.strip())


def normalized(name: str) -> str:
    """Return the name in the spelling of the package index."""
    return re.sub('[-_.]+', '-', name).lower()


def resolve(python: str, kept: str) -> dict[str, tuple[str, str]]:
    """Return the version and Requires-Python of all packages, by name."""
    minor = python.rpartition('.')[0]
    found = glob.glob(os.path.expanduser(
        '~/.pyenv/versions/%s.*/bin/python3' % minor))
    with tempfile.TemporaryDirectory() as directory:
        subprocess.run([found[0] if found else 'python' + minor, '-m', 'venv',
                        directory], check=True)
        own = os.path.join(directory, 'bin/python')
        subprocess.run([own, '-m', 'pip', 'install', '-qq', '--upgrade',
                        'pip'], check=True)
        report = os.path.join(directory, 'report')
        subprocess.run(
            [own, '-c', PIP, python, 'install', '-qq', '--dry-run',
             '--ignore-installed', '--report', report, '--constraint', kept,
             '--requirement', 'requirements.txt',
             '--requirement', 'test-requirements.txt',
             '--requirement', 'doc/requirements.txt'], cwd=ROOT, check=True)
        with open(report) as file:
            each = [item['metadata'] for item in json.load(file)['install']]
        return {normalized(metadata['name']): (
            metadata['version'], metadata.get('requires_python', ''))
            for metadata in each}


def marker(minors: list[str]) -> str:
    """Return the marker of consecutive minor versions."""
    if len(minors) == 1 and minors[0] != MINORS[-1]:
        return ";python_version=='%s'" % minors[0]
    parts = []
    if minors[0] != MINORS[0]:
        parts.append("python_version>='%s'" % minors[0])
    if minors[-1] != MINORS[-1]:
        parts.append("python_version<'%s'" % MINORS[
            MINORS.index(minors[-1]) + 1])
    return (';' if parts else '') + ' and '.join(parts)


def lines(by_minor: dict[str, dict[str, tuple[str, str]]]) -> Iterator[str]:
    """Yield the lines of constraints.txt, one for each distinct pin."""
    for name in sorted({name for each in by_minor.values() for name in each}):
        run: list[str] = []
        before: Optional[tuple[str, str]] = None
        for minor in [*MINORS, '']:
            now = by_minor[minor].get(name) if minor else None
            if now != before:
                if before is not None:
                    yield '%s==%s%s%s\n' % (
                        name, before[0], marker(run),
                        before[1] and '  # ' + before[1])
                run = []
            run.append(minor)
            before = now


def main(renewed: list[str]) -> None:
    with open(FILE) as file:
        text = file.readlines()
    header = [line for line in text if line.startswith('#')]
    with tempfile.NamedTemporaryFile('w', suffix='.txt') as kept:
        if renewed:
            kept.writelines(
                line for line in text if not line.startswith('#')
                and line.partition('==')[0] not in renewed)
        kept.flush()
        by_minor = {python.rpartition('.')[0]: resolve(python, kept.name)
                    for python in OLDEST}
    with open(FILE, 'w') as file:
        file.writelines([*header, *lines(by_minor)])


if __name__ == '__main__':
    main(sys.argv[1:])
