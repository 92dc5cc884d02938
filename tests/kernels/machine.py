# SPDX-License-Identifier: Apache-2.0

"""A virtual machine with another kernel and the files of this machine.

QEMU emulates the virtual machine, which has no network. The kernels are
Debian's, with all their modules, and are downloaded once. The virtual machine
mounts this machine's files read-only below an overlay in memory, so only the
folder of the results persists.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import lzma
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile
import time
from typing import Iterable, Iterator, Mapping, Optional

#: Debian releases by kernel version. The kernel of unstable ("sid") changes.
SUITES = {'5.10': 'bullseye', '6.1': 'bookworm', '6.12': 'trixie',
          '7': 'sid'}
CACHE = pathlib.Path(os.environ.get('XDG_CACHE_HOME') or '/var/tmp',
                     'kuryr-break0-kernels')
#: Required programs, and the Debian package of each
PROGRAMS = {'qemu-system-x86_64': 'qemu-system-x86',
            'busybox': 'busybox-static', 'cpio': 'cpio', 'depmod': 'kmod',
            'zstd': 'zstd', 'mksquashfs': 'squashfs-tools'}
_PATH = os.environ['PATH'] + ':/usr/sbin:/sbin'
#: Modules for mounting the root file system
_FIRST = ('virtio_pci', 'virtio_blk', '9pnet_virtio', '9p', 'overlay',
          'squashfs')
_MEMORY = 6000  # MiB
#: All features of the processor, without features that are slow in emulation:
#: fast string copies (erms, fsrm), access checks in kernel mode (smap, smep),
#: five levels of page tables (la57), and process-context identifiers (pcid)
_PROCESSOR = 'max,-erms,-fsrm,-smap,-smep,-la57,-pcid'
#: Two NICs on one hub, which has no link to this machine
_NICS = [each for number in ('0', '1') for each in (
    '-netdev', 'hubport,hubid=0,id=wire' + number,
    '-device', 'virtio-net-pci,netdev=wire' + number)]
#: Folder in the virtual machine for results
RESULTS = '/mnt/shared/results'
_NINE = 'trans=virtio,version=9p2000.L,msize=262144'

_FIRST_INIT = '''\
#!/bin/busybox sh
b=/bin/busybox
$b mount -t proc p /proc
$b mount -t devtmpfs d /dev
for m in /modules/*; do $b insmod $m 2>/dev/null; done
$b mount -t 9p -o {nine},ro,cache=loose root /below
$b mount -t tmpfs -o size=80% t /layer
$b mkdir /layer/up /layer/work
$b mount -t overlay -o {layer} o /new || $b poweroff -f
$b mkdir -p /new/lib/modules/{version} /new/mnt/shared
$b mount -t 9p -o {nine},ro,cache=loose modules /new/lib/modules/{version}
$b mount -t 9p -o {nine} shared /new/mnt/shared
$b umount /proc
$b umount /dev
exec $b switch_root /new /bin/sh /mnt/shared/init
'''
_INIT = '''\
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs dev /dev
mkdir -p /dev/pts /dev/shm
mount -t devpts devpts /dev/pts
mount -t tmpfs shm /dev/shm
mount -t tmpfs run /run
mkdir -p /run/lock /run/netns
mount -t cgroup2 cgroup /sys/fs/cgroup
modprobe -a virtio_net tun
mount -t securityfs security /sys/kernel/security 2>/dev/null
export PATH={path} HOME=/root LANG=C.UTF-8
ulimit -n 65536
ip link set lo up
hostname machine
layer() {{ # DEVICE FOLDER: see it through a layer, as the rest
    mkdir -p "/run/$1/below" "/run/$1/layer"
    mount -t squashfs -o ro "/dev/$1" "/run/$1/below"
    mount -t tmpfs -o size=80% layer "/run/$1/layer"
    mkdir "/run/$1/layer/up" "/run/$1/layer/work"
    mount -t overlay -o "lowerdir=/run/$1/below,upperdir=/run/$1/layer/up,\\
workdir=/run/$1/layer/work" layer "$2"
}}
{layers}
cd {folder}
sh /mnt/shared/command >/mnt/shared/log 2>&1 </dev/null
echo $? >/mnt/shared/status
sync
echo o >/proc/sysrq-trigger
sleep 60
'''


class Unusable(Exception):
    """The virtual machine cannot be started; the text has the reason."""


def missing() -> list[str]:
    """Return the missing Debian packages of :data:`PROGRAMS`."""
    return sorted(package for program, package in PROGRAMS.items()
                  if shutil.which(program, path=_PATH) is None)


@dataclasses.dataclass(frozen=True)
class Kernel:
    """A kernel of Debian.

    :ivar name: a key of :data:`SUITES`
    """

    name: str

    @property
    def directory(self) -> pathlib.Path:
        return CACHE / SUITES[self.name]

    @functools.cached_property
    def modules(self) -> pathlib.Path:
        return _only(self.directory, 'root/lib/modules/*',
                     'root/usr/lib/modules/*')

    @property
    def version(self) -> str:
        return self.modules.name

    @property
    def image(self) -> pathlib.Path:
        return _only(self.directory, 'root/boot/vmlinuz*',
                     'root/usr/lib/modules/*/vmlinuz')

    def prepare(self) -> None:
        """Download the kernel and build its initrd, unless both exist.

        :raises Unusable: if a download or a program fails
        """
        done = self.directory / 'complete'
        if not done.exists():
            shutil.rmtree(self.directory, ignore_errors=True)
            self.directory.mkdir(parents=True)
            self._download()
            _run('depmod', '-b', str(self.modules.parents[2]), self.version)
            self._make_first_files()
            done.touch()

    def _download(self) -> None:
        here = self.directory
        for each in ('lists/partial', 'apt/archives/partial', 'packages'):
            (here / each).mkdir(parents=True)
        # This machine's release may lack the signing keys of another release.
        (here / 'sources').write_text('deb [trusted=yes] %s %s main\n' % (
            _mirror(), SUITES[self.name]))
        options = ['-o', 'Dir::Etc::sourcelist=%s' % (here / 'sources'),
                   '-o', 'Dir::Etc::sourceparts=-',
                   '-o', 'Dir::State::lists=%s' % (here / 'lists'),
                   '-o', 'Dir::Cache=%s' % (here / 'apt'),
                   '-o', 'APT::Sandbox::User=root']
        _run('apt-get', *options, '-qq', 'update')
        names = re.findall(r'^(linux-image-[0-9.]+[-+a-z0-9]*-amd64) ', _run(
            'apt-cache', *options, 'search', '--names-only',
            '^linux-image-[0-9]'), re.MULTILINE)
        name = max((name for name in names if not re.search(
            r'dbg|rt-|cloud|unsigned', name)), key=_by_version)
        # From 7.0 on, image and modules are packages of their own.
        depends = re.findall(r'\b(linux-(?:binary|modules)-[^ ,]+)', _run(
            'apt-cache', *options, 'show', name))
        _run('apt-get', *options, '-qq', 'download', name, *set(depends),
             cwd=here / 'packages')
        for package in sorted((here / 'packages').iterdir()):
            _run('dpkg-deb', '-x', str(package), str(here / 'root'))
        for each in ('lists', 'apt', 'packages'):
            shutil.rmtree(here / each)

    def _make_first_files(self) -> None:
        """Build the initrd, which mounts the files of this machine."""
        with tempfile.TemporaryDirectory() as name:
            root = pathlib.Path(name)
            for each in ('bin', 'proc', 'dev', 'below', 'layer', 'new',
                         'modules'):
                (root / each).mkdir()
            shutil.copy(shutil.which('busybox') or '', root / 'bin')
            for number, path in enumerate(self._needed(_FIRST)):
                (root / 'modules' / ('%02d.ko' % number)).write_bytes(
                    _uncompressed(path))
            init = root / 'init'
            init.write_text(_FIRST_INIT.format(
                nine=_NINE, version=self.version,
                layer='lowerdir=/below,upperdir=/layer/up,'
                'workdir=/layer/work'))
            init.chmod(0o755)
            subprocess.run(
                ['sh', '-c', 'find . | cpio --quiet -oH newc | gzip -1 >"$1"',
                 'sh', str(self.directory / 'initrd')],
                cwd=root, check=True, env={**os.environ, 'PATH': _PATH})

    def _needed(self, names: Iterable[str]) -> list[pathlib.Path]:
        """Return the files of modules and dependencies, in load order."""
        needs = {path: rest.split() for path, _, rest in (
            line.partition(':') for line in (
                self.modules / 'modules.dep').read_text().splitlines())}
        paths = {re.sub(r'\.ko.*', '', os.path.basename(path)
                        ).replace('-', '_'): path for path in needs}
        order: dict[str, None] = {}

        def add(path: str) -> None:
            for each in reversed(needs[path]):
                add(each)
            order.setdefault(path)

        for name in names:
            if name in paths:  # not built into the kernel
                add(paths[name])
        return [self.modules / path for path in order]


class Machine:
    """A virtual machine, which boots anew for each command.

    :param kernel: a prepared kernel
    :param folders: images by folder, from :func:`packed`
    """

    def __init__(self, kernel: Kernel,
                 folders: Mapping[str, pathlib.Path]) -> None:
        self._kernel = kernel
        self._folders = folders

    def run(self, command: str, results: pathlib.Path,
            limit: float) -> Optional[int]:
        """Run a shell command, and print its output.

        :param results: receives the command's files from :data:`RESULTS`
        :param limit: seconds, including boot
        :returns: the command's exit status; None if the machine ended first
        """
        with tempfile.TemporaryDirectory(dir=CACHE) as name:
            shared = pathlib.Path(name)
            (shared / 'results').mkdir()
            (shared / 'log').touch()
            (shared / 'command').write_text(command)
            (shared / 'init').write_text(_INIT.format(
                path=_PATH, folder=os.getcwd(), layers='\n'.join(
                    'layer vd%s %s' % (letter, folder) for letter, folder
                    in zip('abcdef', self._folders))))
            drives = []
            for image in self._folders.values():
                drives += ['-drive', 'file=%s,format=raw,if=virtio,'
                           'readonly=on' % image]
            try:
                self._boot(shared, drives, limit)
            finally:
                shutil.copytree(shared / 'results', results,
                                dirs_exist_ok=True)
            try:
                return int((shared / 'status').read_text())
            except (FileNotFoundError, ValueError):
                (shared / 'console').touch()  # QEMU may have created no file
                for each in ('errors', 'console'):
                    text = (shared / each).read_text(errors='replace')
                    print('\n'.join(text.splitlines()[-8:]), file=sys.stderr)
                return None

    def _boot(self, shared: pathlib.Path, drives: list[str],
              limit: float) -> None:
        def share(path: pathlib.Path, tag: str, options: str) -> list[str]:
            return ['-virtfs', 'local,path=%s,mount_tag=%s,security_model='
                    'none,%s' % (path, tag, options)]

        with open(shared / 'log') as log, \
                open(shared / 'errors', 'w') as errors, subprocess.Popen(
                ['setpriv', '--pdeathsig', 'KILL',
                 'qemu-system-x86_64', '-accel', 'tcg,thread=multi',
                 '-cpu', _PROCESSOR, '-smp', '2', '-m', str(_MEMORY),
                 '-display', 'none', '-no-reboot', *_NICS,
                 '-serial', 'file:%s' % (shared / 'console'),
                 '-kernel', str(self._kernel.image),
                 '-initrd', str(self._kernel.directory / 'initrd'),
                 '-append', 'console=ttyS0 panic=-1 quiet mitigations=off '
                            'tsc=reliable clocksource=tsc',
                 *share(pathlib.Path('/'), 'root',
                        'readonly=on,multidevs=remap'),
                 *share(self._kernel.modules, 'modules', 'readonly=on'),
                 *share(shared, 'shared', 'multidevs=remap'), *drives],
                stdin=subprocess.DEVNULL, stderr=errors) as machine:
            deadline = time.monotonic() + limit
            try:
                while (machine.poll() is None
                       and time.monotonic() < deadline):
                    print(log.read(), end='', flush=True)
                    time.sleep(0.5)
            finally:
                machine.kill()
            print(log.read(), end='', flush=True)


@contextlib.contextmanager
def packed(folders: Iterable[str], without: Iterable[str] = ()
           ) -> Iterator[dict[str, pathlib.Path]]:
    """Pack folders into squashfs images, which exist within the block.

    A 9p share of a folder with many small files is slow.

    :param without: paths to exclude, relative to each folder
    """
    CACHE.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=CACHE) as name:
        images = {}
        for number, folder in enumerate(folders):
            images[folder] = pathlib.Path(name, str(number))
            _run('mksquashfs', folder, str(images[folder]), '-quiet',
                 '-noappend', '-comp', 'lz4', '-e', *without)
        yield images


def _mirror() -> str:
    """Return the URL of the Debian mirror of this machine."""
    found = re.search(r'^\S+/debian/*$', _run(
        'apt-get', 'indextargets', '--format', '$(REPO_URI)'), re.MULTILINE)
    return found[0] if found else 'http://deb.debian.org/debian'


def _only(directory: pathlib.Path, *patterns: str) -> pathlib.Path:
    found = [path for pattern in patterns
             for path in sorted(directory.glob(pattern))]
    if not found:
        raise Unusable('There is no kernel in %s. Remove that, and start '
                       'again' % directory)
    return found[0].resolve()


def _by_version(name: str) -> list[int]:
    return [int(number) for number in re.findall(r'[0-9]+', name)]


def _uncompressed(path: pathlib.Path) -> bytes:
    data = path.read_bytes()
    if path.suffix == '.xz':
        return lzma.decompress(data)
    if path.suffix == '.zst':
        return subprocess.run(['zstd', '-qdc'], input=data, check=True,
                              stdout=subprocess.PIPE).stdout
    return data


def _run(*command: str, cwd: Optional[pathlib.Path] = None) -> str:
    """Run a program, and return its output.

    :raises Unusable: if the program fails
    """
    done = subprocess.run(command, capture_output=True, text=True, cwd=cwd,
                          env={**os.environ, 'PATH': _PATH})
    if done.returncode:
        raise Unusable('%s failed: %s' % (' '.join(command[:2]), (
            done.stderr.strip() or done.stdout.strip())[-500:]))
    return done.stdout
