# SPDX-License-Identifier: Apache-2.0

"""Print the digests of Kuryr's releases for kuryr_break0/kuryr/comparison.

``python -m tools.releases 6.0.0 10.0.0`` downloads the releases with pip. Add
a release after tests/functional/test_l3.py has passed with it.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import zipfile

from kuryr_break0.kuryr import comparison


def main(releases: list[str]) -> None:
    for release in releases:
        with tempfile.TemporaryDirectory() as directory:
            subprocess.run(
                [sys.executable, '-m', 'pip', 'download', '-q', '--no-deps',
                 '--ignore-requires-python', '--only-binary', ':all:', '-d',
                 directory, 'kuryr-kubernetes==' + release], check=True)
            path = '%s/kuryr_kubernetes-%s-py3-none-any.whl' % (directory,
                                                                release)
            with zipfile.ZipFile(path) as wheel:
                number = comparison.digest(
                    lambda module: wheel.read('kuryr_kubernetes/' + module)
                    .decode())
        print('%-7s %s' % (release, comparison.DIGESTS.get(
            number, 'is unknown: ' + number)))


if __name__ == '__main__':
    main(sys.argv[1:])
