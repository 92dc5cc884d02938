# SPDX-License-Identifier: Apache-2.0

"""Compare releases of Kuryr with DIGESTS of kuryr_break0/kuryr/comparison.py.

``python -m tools.releases 6.0.0 10.0.0`` downloads the releases with pip. For
each release it prints the releases with the same digest, or the digest if it
is unknown. Before you add a digest to DIGESTS, run tests/functional/test_l3.py
with the release.
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
