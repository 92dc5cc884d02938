# SPDX-License-Identifier: Apache-2.0

"""Build the image of kuryr-cni-ds with kuryr-break0, as documented.

::

    python -m tests.cluster.image [DIRECTORY]

Run this module as root, with the network of the machine. The module runs the
commands of ``doc/source/install/kubernetes.rst`` that need the network, in a
clone of the working tree. The test of the DaemonSet runs the other commands in
the same clone. ``docker`` is Podman (``tests/cluster/bin``). The page begins
with an image of Kuryr, and no registry provides such an image here. Therefore
the steps of Kuryr's ``cni.Dockerfile`` run on a Debian that debootstrap makes.

Podman repeats no step with unchanged input, so only the first run takes
minutes. DIRECTORY keeps about 500 MB; the default is kuryr-break0-cluster in
$XDG_CACHE_HOME or /var/tmp. MIRROR in the environment names a Debian mirror,
by default apt's.
"""

from __future__ import annotations

import fcntl
import glob
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile

from tests.support import pages

ROOT = pathlib.Path(__file__).parents[2]
PAGE = 'install/kubernetes.rst'
#: Default directory of the images
DIRECTORY = os.path.realpath(os.path.join(
    os.environ.get('XDG_CACHE_HOME', '/var/tmp'), 'kuryr-break0-cluster',
    'images'))

#: Make an image of Debian. Debian's own images lack the removed files too.
DEBIAN = r'''
. tools/network-settings
mkdir "$WORK/debian"
debootstrap --variant=minbase --include=ca-certificates,iproute2,python3-venv \
    bookworm "$WORK/debian" "$(debian_mirror)"
cd "$WORK/debian"
rm -rf usr/share/doc/* usr/share/locale/* usr/share/man/* var/cache/apt/* \
    var/lib/apt/lists/* var/log/*
echo 'Dir::Cache::pkgcache ""; Dir::Cache::srcpkgcache "";' \
    >etc/apt/apt.conf.d/no-cache
tar -c . | docker import - localhost/debian:bookworm
'''
KURYR = r'''
tools/kuryr-cni-in-go "$IMAGES/kuryr-cni"
tools/kuryr-sources "$SOURCES"
cp -r "$SOURCES"/kuryr-kubernetes-*/ "$WORK/kuryr"
rm -r "$WORK/kuryr/kuryr_cni"
cp "$IMAGES/kuryr-cni" constraints.txt "$WORK"
. tools/network-settings
copy_network_settings "$WORK/machine"
mkdir -p "$WORK/machine/opt/venv"
pip_variables >"$WORK/machine/opt/venv/pip.conf"
docker build -f tests/cluster/kuryr-cni.Dockerfile -t kuryr/cni:latest "$WORK"
'''


def environ(directory: str) -> dict[str, str]:
    """Return variables for ``docker`` with the images of a directory."""
    return {**os.environ, 'IMAGES': directory, 'PATH': os.pathsep.join(
        [str(ROOT / 'tests/cluster/bin'), os.path.dirname(sys.executable),
         os.environ['PATH']])}


class Images:
    """Builds images, and keeps them.

    :param directory: the directory of the images, which no other process may
        use at the same time
    :ivar clone: the working directory of the page's commands
    """

    def __init__(self, directory: str) -> None:
        self._environ = environ(directory)
        self._directory = directory
        self.clone = os.path.join(directory, 'clone')

    def run(self, script: str, cwd: str = str(ROOT),
            **variables: str) -> None:
        """Run a shell script, or exit with the end of its output."""
        done = subprocess.run(
            ['sh', '-ec', script], cwd=cwd, env={**self._environ, **variables},
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        if done.returncode:
            sys.exit('%s\nThe image cannot be built: %s failed' % (
                done.stdout[-3000:], script.strip().splitlines()[-1]))

    def build(self) -> None:
        """Build all images with changed input."""
        self.build_debian()
        self.run_with_directory(KURYR)
        self.update_clone()
        self.run(_command('1. Build the image', 'docker build'), self.clone)
        if not glob.glob(self.clone + '/kuryr-kubernetes-*.tar.gz'):
            self.run(_command("2. Get Kuryr's DaemonSet", 'pip download'),
                     self.clone)
        # Remove unused images that are older than ten days. If the last build
        # is older, the next run repeats the build.
        self.run('docker image prune --force --filter until=240h')

    def build_debian(self) -> None:
        """Make Debian's image if it is missing."""
        if subprocess.run(['docker', 'image', 'exists',
                           'localhost/debian:bookworm'],
                          env=self._environ).returncode:
            print('Building an image of Debian; this takes minutes')
            self.run_with_directory(DEBIAN)

    def run_with_directory(self, script: str) -> None:
        with tempfile.TemporaryDirectory(dir=self._directory) as work:
            self.run(script, WORK=work, SOURCES=os.path.join(
                sys.prefix, 'kuryr-sources'))

    def update_clone(self) -> None:
        """Replace the clone, except Kuryr's downloaded sources."""
        os.makedirs(self.clone, exist_ok=True)
        for entry in os.scandir(self.clone):
            if entry.is_dir():
                shutil.rmtree(entry.path)
            elif not entry.name.endswith('.tar.gz'):
                os.remove(entry.path)
        listed = subprocess.check_output(
            ['git', 'ls-files', '-z', '--cached', '--others',
             '--exclude-standard'], cwd=ROOT, text=True)
        for name in listed.split('\0'):
            if os.path.isfile(ROOT / name):
                target = os.path.join(self.clone, name)
                os.makedirs(os.path.dirname(target), exist_ok=True)
                shutil.copy2(ROOT / name, target)


def _command(title: str, beginning: str) -> str:
    """Return a command of a section of the page."""
    return next(step.command for step in pages.steps(PAGE, title)
                if step.command.startswith(beginning + ' '))


def main(argv: list[str], images: type[Images] = Images,
         module: str = 'tests.cluster.image') -> int:
    """Build images in namespaces of their own.

    :param images: class that builds the images
    :param module: name of the calling module
    """
    if argv[:1] == ['--inside']:
        subprocess.run(['mount', '-t', 'tmpfs', 'run', argv[1] + '/run'],
                       check=True)
        images(argv[1]).build()
        return 0
    if os.geteuid():
        sys.exit('%s: must be root' % module)
    if subprocess.run([ROOT / 'tools/debian-packages',
                       'cluster']).returncode:
        return 1
    directory = (os.path.realpath(os.path.join(argv[0], 'images')) if argv
                 else DIRECTORY)
    os.makedirs(directory + '/run', exist_ok=True)
    with open(directory + '/lock', 'w') as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        # Mounts and processes of the command end with the command.
        return subprocess.run(
            ['setpriv', '--pdeathsig', 'KILL', 'unshare', '--mount', '--pid',
             '--fork', '--kill-child', '--mount-proc', sys.executable, '-m',
             module, '--inside', directory], cwd=ROOT
        ).returncode


if __name__ == '__main__':
    sys.exit(main(sys.argv[1:]))
