# SPDX-License-Identifier: Apache-2.0

"""The Debian packages in bindep.txt, and tools/debian-packages."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile

from tests.support import overlay


def listed(profile: str = 'test') -> dict[str, list[str]]:
    """Return the programs and files of each package in bindep.txt, by package.

    :param profile: the profile of the packages; packages without a profile are
        included
    """
    with open(os.path.join(overlay.ROOT, 'bindep.txt')) as file:
        lines = [line.partition('#') for line in file if line[0] != '#']
    return {package.split()[0]: signs.split() for package, _, signs in lines
            if package.rstrip().endswith((':dpkg]', profile + ']'))}


def missing(*profiles: str, path: str = '') -> set[str]:
    """Return the packages that an unprivileged user is told to install.

    :param path: a colon, and the PATH to find programs in; by default, all
        programs are missing
    """
    with tempfile.TemporaryDirectory() as directory:
        with open(os.path.join(directory, 'id'), 'w') as file:
            file.write('#!/bin/sh\necho 1000\n')
        os.chmod(file.name, 0o755)
        done = subprocess.run(
            ['/bin/sh', os.path.join(overlay.ROOT, 'tools',
                                     'debian-packages'), *profiles],
            env={'PATH': directory + path, 'PYTHON': sys.executable},
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    if not done.returncode:
        return set()
    return set(done.stderr.partition('apt-get install')[2].split())
