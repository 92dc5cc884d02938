# SPDX-License-Identifier: Apache-2.0

"""Build the image of the agent, as documented for Docker hosts.

::

    python -m tests.engines.image [DIRECTORY]

Run this module as root, with the network of the machine. The module runs the
command of ``doc/source/install/docker.rst`` in a copy of the working tree. No
registry provides Debian's image here, so debootstrap makes this image, as for
the image of the DaemonSet (``tests.cluster.image``), in the same directory.
The agent's image is written to :data:`ARCHIVE` in this directory, for
``tests.engines.test_image``.
"""

from __future__ import annotations

import sys

from tests.cluster import image
from tests.support import pages

PAGE = 'install/docker.rst'
SECTION = 'The agent as a container'
NAME = 'kuryr-break0'
#: File of the image in the directory, as docker save writes it
ARCHIVE = 'kuryr-break0.tar'

#: Debian's image by its name in the Dockerfile, with the network settings
DEBIAN = r'''
. tools/network-settings
mkdir "$WORK/machine"
copy_network_settings "$WORK/machine"
pip_variables >"$WORK/machine/etc/pip.conf"
printf 'FROM localhost/debian:bookworm\nCOPY machine /\n' >"$WORK/Dockerfile"
docker build -t docker.io/library/debian:12-slim "$WORK"
'''


class Images(image.Images):

    def build(self) -> None:
        """Build the image of the agent, if its input has changed."""
        self.build_debian()
        self.run_with_directory(DEBIAN)
        self.update_clone()
        build = next(step.command for step in pages.steps(PAGE, SECTION)
                     if step.command.startswith('docker build '))
        self.run(build, self.clone)
        self.run('rm -f "$IMAGES"/{0}; docker save -o "$IMAGES"/{0} {1}'
                 .format(ARCHIVE, NAME))


if __name__ == '__main__':
    sys.exit(image.main(sys.argv[1:], Images, 'tests.engines.image'))
