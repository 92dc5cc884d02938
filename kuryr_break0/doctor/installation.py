# SPDX-License-Identifier: Apache-2.0

"""Checks that Kuryr can load the driver, with supported dependencies.

The module imports no dependency of the package except packaging, because
an unsupported version of a dependency may fail to import.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import re
import stat
import sys
import time
from typing import Iterator, Optional
import warnings

from packaging import requirements

from kuryr_break0 import cni
from kuryr_break0.doctor.findings import Finding
from kuryr_break0.doctor.findings import KINDS

_DISTRIBUTION = 'kuryr-break0'
#: Packages that only Kuryr's driver requires. A host that has neither of the
#: first two packages is a host without Kuryr.
_KURYR = ('kuryr-kubernetes', 'os-vif', 'oslo.concurrency',
          'oslo.versionedobjects', 'pyroute2', 'stevedore', 'cotyledon')
#: Entry points of setup.cfg: group, name (as Kuryr or os-vif looks it up) and
#: module.
_ENTRY_POINTS = (('kuryr_kubernetes.cni.binding', 'VIFMacvlanBreak0',
                  'kuryr_break0.kuryr.driver'),
                 ('os_vif', 'kuryr_break0',
                  'kuryr_break0.kuryr.os_vif_plugin'))
#: The command line of kuryr-daemon's first process. With the package
#: setproctitle, cotyledon replaces the command line by a title. Without
#: setproctitle, the command line is unchanged.
_TITLES = (re.compile(r'kuryr-daemon: master process \[(/\S*)'),
           re.compile(r'\S*python[0-9.]*\0(/\S*/kuryr-daemon)\0'))
#: Kuryr's CNI plugin: pip installs one in Python, Kuryr's image has one in Go.
_PLUGIN = 'kuryr-cni'
#: Text that shows that a script is in Python or uses a Python environment
_PYTHON = re.compile('python|kuryr_kubernetes', re.IGNORECASE)
_COMMENT = re.compile(r'\n\s*#.*')
_PATH = re.compile(r'(?<![\w.])/[\w./+@-]+')
#: Largest number of bytes to read of a script, and of scripts to follow
_SCRIPT_SIZE, _SCRIPTS = 2 ** 16, 16


def check() -> Iterator[Finding]:
    """Examine the Python environment of this process."""
    unfit = list(_unfit())
    if unfit:  # an unfit dependency also breaks the entry points
        yield KINDS['dependency-unfit'].finding(
            '; '.join('%s is %s, but %s is needed' % (
                each.name, version or 'not installed',
                str(each.specifier) or 'any version')
                for each, version in unfit),
            python=sys.executable, requirements=' '.join(
                "'%s%s'" % (each.name, each.specifier) for each, _ in unfit))
    elif is_for_kuryr():
        for group, name, module in _ENTRY_POINTS:
            yield from _check_entry_point(group, name, module)


def is_for_kuryr() -> bool:
    """Return whether Kuryr is in this Python environment."""
    return any(map(_version, _KURYR[:2]))


def _unfit() -> Iterator[tuple[requirements.Requirement, str]]:
    """Yield the unmet requirements, each with the installed version.

    The version is empty if the requirement is not installed.
    """
    required: list[str] = []  # if kuryr-break0 is not installed
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        required = importlib.metadata.requires(_DISTRIBUTION) or []
    for requirement in map(requirements.Requirement, required):
        if requirement.marker and not requirement.marker.evaluate():
            continue
        if requirement.name in _KURYR and not is_for_kuryr():
            continue
        version = _version(requirement.name)
        if not version or not requirement.specifier.contains(
                version, prereleases=True):
            yield requirement, version


def _version(name: str) -> str:
    """Return the version of a distribution; empty if not installed."""
    # Before Python 3.10, importlib.metadata does not normalise names: it
    # finds oslo_config, but not oslo.config.
    for spelling in (name, _normalized(name)):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            return importlib.metadata.version(spelling)
    return ''


def _check_entry_point(group: str, name: str,
                       module: str) -> Iterator[Finding]:
    entry_points = [each for each in _entry_points(group) if each.name == name]
    if len(entry_points) != 1:
        yield KINDS['entry-point-missing'].finding(
            '%s has %d entry points named %s, but must have 1, in the '
            'environment of %s' % (
                group, len(entry_points), name, sys.executable),
            python=sys.executable)
        return
    try:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')  # Kuryr's imports warn
            entry_points[0].load()
    except Exception as err:  # an import can raise any exception
        yield KINDS['driver-broken'].finding(
            'the entry point %s of %s does not load: %s: %s' % (
                name, group, type(err).__name__, err),
            python=sys.executable, module=module)


def _entry_points(group: str) -> Iterator[importlib.metadata.EntryPoint]:
    """Yield the entry points that stevedore finds, without writing its cache.

    If a distribution is installed twice, only the first installation on
    sys.path counts.
    """
    names = set()
    for distribution in importlib.metadata.distributions():
        name = _normalized(distribution.metadata['Name'])
        if name not in names:
            names.add(name)
            yield from (each for each in distribution.entry_points
                        if each.group == group)


def _normalized(name: str) -> str:
    return re.sub('[-_.]+', '_', name or '').lower()


def check_daemon(restart: str) -> Iterator[Finding]:
    """Compare kuryr-daemon with the Python environment of this process.

    Reports nothing if kuryr-daemon runs in another container.

    :param restart: the command that restarts kuryr-daemon
    """
    installed = _installed_at()
    for pid, program, since in daemons():
        if os.path.dirname(program) != os.path.dirname(sys.executable):
            yield KINDS['daemon-elsewhere'].finding(
                'kuryr-daemon, process %d, is %s, but this program runs '
                'with %s' % (pid, program, sys.executable),
                directory=os.path.dirname(program), restart=restart)
        elif since < installed:
            yield KINDS['daemon-not-restarted'].finding(
                'kuryr-daemon, process %d, was started %s, and the package '
                'installed %s' % (pid, _readable(since),
                                  _readable(installed)), restart=restart)


def _readable(when: float) -> str:
    return time.strftime('%Y-%m-%d %H:%M:%S', time.localtime(when))


def daemons() -> Iterator[tuple[int, str, float]]:
    """Return each kuryr-daemon in the mount namespace of this process.

    :returns: process id, path of the program, and time of the start in
        seconds since the epoch
    """
    reported = set()
    for pid in sorted(map(int, filter(str.isdigit, os.listdir('/proc')))):
        with contextlib.suppress(OSError):  # process ended, or access denied
            with open('/proc/%d/cmdline' % pid, errors='replace') as file:
                title = file.read()
            match = next(filter(None, (pattern.match(title)
                                       for pattern in _TITLES)), None)
            # A child process can have the title of its parent process.
            if (match is not None and match[1] not in reported
                    and os.path.samefile('/proc/%d/ns/mnt' % pid,
                                         '/proc/self/ns/mnt')):
                reported.add(match[1])
                yield pid, match[1], _started_at(pid)


def _started_at(pid: int) -> float:
    with open('/proc/%d/stat' % pid) as file:
        # The name, in parentheses, can contain blanks and parentheses
        # (proc_pid_stat(5)).
        ticks = int(file.read().rpartition(')')[2].split()[19])
    since_boot = ticks / os.sysconf('SC_CLK_TCK')
    return time.time() - time.clock_gettime(time.CLOCK_BOOTTIME) + since_boot


def _installed_at() -> float:
    """Return the installation time, from RECORD, which pip writes last.

    :returns: seconds since the epoch; 0 if RECORD does not exist
    """
    with contextlib.suppress(OSError,
                             importlib.metadata.PackageNotFoundError):
        distribution = importlib.metadata.distribution(_DISTRIBUTION)
        for file in distribution.files or ():
            if file.name == 'RECORD':
                return os.stat(str(distribution.locate_file(file))).st_mtime
    return 0


def check_plugin() -> Iterator[Finding]:
    """Report a CNI plugin of Kuryr that starts Python."""
    plugins = {path: program for path, program in (
        (path, _python_of(path)) for path in (
            os.path.join(directory, _PLUGIN)
            for directory in cni.PLUGIN_DIRS)) if program is not None}
    if plugins:
        path, program = next(iter(plugins.items()))
        yield KINDS['plugin-slow'].finding(
            '%s runs Python%s' % (path, ' through %s' % program
                                  if program != path else ''), list(plugins))


def _python_of(path: str) -> Optional[str]:
    """Return the script by which a program runs Python.

    The program can be this script, or can be a script that starts this script,
    directly or through other scripts.

    :returns: the resolved path of the script; None if no readable script runs
        Python
    """
    paths = [path]
    for each in paths:  # the loop appends to the list
        script = _script(each)
        if _PYTHON.search(script):
            return os.path.realpath(each)
        named = [one for one in _PATH.findall(script) if one not in paths]
        paths += named[:max(0, _SCRIPTS - len(paths))]
    return None


def _script(path: str) -> str:
    """Return the beginning of a script, without comments.

    Pipes and devices are not read: a read can block or consume data.

    :returns: empty for an ELF program or a file that cannot be read
    """
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            return ''
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        with open(fd, 'rb') as file:
            data = file.read(_SCRIPT_SIZE)
    except OSError:
        return ''
    return '' if data.startswith(b'\x7fELF') else _COMMENT.sub(
        '\n', os.fsdecode(data))
