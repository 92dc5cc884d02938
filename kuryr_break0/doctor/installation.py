# SPDX-License-Identifier: Apache-2.0

"""Check that Kuryr finds and loads the driver, in supported versions.

Nothing that needs the kernel is imported at the top, so that this works
also if an unsupported version cannot be imported.
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
#: The requirements of Kuryr's driver alone. Where neither of the first two is
#: installed, this is a host without Kuryr.
_KURYR = ('kuryr-kubernetes', 'os-vif', 'oslo.concurrency',
          'oslo.versionedobjects', 'pyroute2', 'stevedore', 'cotyledon')
#: What setup.cfg registers, by the names that Kuryr and os-vif look for.
_ENTRY_POINTS = (('kuryr_kubernetes.cni.binding', 'VIFMacvlanBreak0',
                  'kuryr_break0.kuryr.driver'),
                 ('os_vif', 'kuryr_break0',
                  'kuryr_break0.kuryr.os_vif_plugin'))
#: cotyledon's title of the process that starts the others, and what it is
#: where the setproctitle that it needs for that is not there.
_TITLES = (re.compile(r'kuryr-daemon: master process \[(/\S*)'),
           re.compile(r'\S*python[0-9.]*\0(/\S*/kuryr-daemon)\0'))
#: Kuryr's CNI plugin: pip installs one in Python, Kuryr's image has one in Go.
_PLUGIN = 'kuryr-cni'
#: A script that is in Python, enters an environment of it, or starts it
_PYTHON = re.compile('python|kuryr_kubernetes', re.IGNORECASE)
_COMMENT = re.compile(r'\n\s*#.*')
_PATH = re.compile(r'(?<![\w.])/[\w./+@-]+')
#: Bytes of a script that are read, and scripts that start one another
_SCRIPT_SIZE, _SCRIPTS = 2 ** 16, 16


def check() -> Iterator[Finding]:
    """Examine the Python environment of this process."""
    unfit = list(_unfit())
    if unfit:  # what follows would only say the same in other words
        yield KINDS['dependency-unfit'].found(
            '; '.join('%s is %s, but %s is needed' % (
                each.name, found or 'not installed',
                str(each.specifier) or 'any version')
                for each, found in unfit),
            python=sys.executable, requirements=' '.join(
                "'%s%s'" % (each.name, each.specifier) for each, _ in unfit))
    elif is_for_kuryr():
        for group, name, module in _ENTRY_POINTS:
            yield from _check_entry_point(group, name, module)


def is_for_kuryr() -> bool:
    """Return whether Kuryr is in this Python environment."""
    return any(map(_version, _KURYR[:2]))


def _unfit() -> Iterator[tuple[requirements.Requirement, str]]:
    """Return the requirements that are not met, with the present version."""
    wanted: list[str] = []  # without a distribution, nor has it entry points
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        wanted = importlib.metadata.requires(_DISTRIBUTION) or []
    for requirement in map(requirements.Requirement, wanted):
        if requirement.marker and not requirement.marker.evaluate():
            continue
        if requirement.name in _KURYR and not is_for_kuryr():
            continue
        found = _version(requirement.name)
        if not found or not requirement.specifier.contains(
                found, prereleases=True):
            yield requirement, found


def _version(name: str) -> str:
    """Return the version of a distribution; empty if not installed."""
    # Before Python 3.10, oslo.config is not found as oslo_config is.
    for spelling in (name, _normalized(name)):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            return importlib.metadata.version(spelling)
    return ''


def _check_entry_point(group: str, name: str,
                       module: str) -> Iterator[Finding]:
    found = [each for each in _entry_points(group) if each.name == name]
    if len(found) != 1:
        yield KINDS['entry-point-missing'].found(
            '%s has %d entry points named %s, where there must be one, for '
            '%s' % (group, len(found), name, sys.executable),
            python=sys.executable)
        return
    try:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')  # Kuryr's imports warn
            found[0].load()
    except Exception as err:  # whatever its import raises
        yield KINDS['driver-broken'].found(
            'the entry point %s of %s does not load: %s: %s' % (
                name, group, type(err).__name__, err),
            python=sys.executable, module=module)


def _entry_points(group: str) -> Iterator[importlib.metadata.EntryPoint]:
    """Find entry points like stevedore, without writing its cache.

    Of a distribution that is there twice, the first hides the other.
    """
    seen = set()
    for distribution in importlib.metadata.distributions():
        name = _normalized(distribution.metadata['Name'])
        if name not in seen:
            seen.add(name)
            yield from (each for each in distribution.entry_points
                        if each.group == group)


def _normalized(name: str) -> str:
    return re.sub('[-_.]+', '_', name or '').lower()


def check_daemon() -> Iterator[Finding]:
    """Compare kuryr-daemon with the Python environment of this process.

    Where it is in a container of its own it is not seen, and nothing is
    said.
    """
    installed = _installed_at()
    for pid, program, since in _daemons():
        if os.path.dirname(program) != os.path.dirname(sys.executable):
            yield KINDS['daemon-elsewhere'].found(
                'kuryr-daemon, process %d, is %s, but this program runs '
                'with %s' % (pid, program, sys.executable),
                directory=os.path.dirname(program))
        elif since < installed:
            yield KINDS['daemon-not-restarted'].found(
                'kuryr-daemon, process %d, was started %s, and the package '
                'installed %s' % (pid, _readable(since),
                                  _readable(installed)))


def _readable(when: float) -> str:
    return time.strftime('%Y-%m-%d %H:%M:%S', time.localtime(when))


def _daemons() -> Iterator[tuple[int, str, float]]:
    """Return the daemons that see the same files as this process.

    Each by its process, its program, and since when it runs (of the epoch).
    """
    seen = set()
    for pid in sorted(map(int, filter(str.isdigit, os.listdir('/proc')))):
        with contextlib.suppress(OSError):  # it ended, or is not ours
            with open('/proc/%d/cmdline' % pid, errors='replace') as file:
                title = file.read()
            match = next(filter(None, (pattern.match(title)
                                       for pattern in _TITLES)), None)
            # A child may have the title of its parent.
            if (match is not None and match[1] not in seen
                    and os.path.samefile('/proc/%d/ns/mnt' % pid,
                                         '/proc/self/ns/mnt')):
                seen.add(match[1])
                yield pid, match[1], _started_at(pid)


def _started_at(pid: int) -> float:
    with open('/proc/%d/stat' % pid) as file:
        # The name, in parentheses, may have anything in it.
        ticks = int(file.read().rpartition(')')[2].split()[19])
    since_boot = ticks / os.sysconf('SC_CLK_TCK')
    return time.time() - time.clock_gettime(time.CLOCK_BOOTTIME) + since_boot


def _installed_at() -> float:
    """Return when pip wrote what it writes last; 0 if that is unknown."""
    with contextlib.suppress(OSError,
                             importlib.metadata.PackageNotFoundError):
        distribution = importlib.metadata.distribution(_DISTRIBUTION)
        for file in distribution.files or ():
            if file.name == 'RECORD':
                return os.stat(str(distribution.locate_file(file))).st_mtime
    return 0


def check_plugin() -> Iterator[Finding]:
    """Report Kuryr's CNI plugin in Python, which pip installs."""
    found = {path: program for path, program in (
        (path, _python_of(path)) for path in (
            os.path.join(directory, _PLUGIN)
            for directory in cni.PLUGIN_DIRS)) if program is not None}
    if found:
        path, program = next(iter(found.items()))
        yield KINDS['plugin-slow'].found(
            '%s runs Python%s' % (path, ', by %s' % program
                                  if program != path else ''), list(found))


def _python_of(path: str) -> Optional[str]:
    """Return the script by which a program runs Python.

    :returns: the path without links of the program itself, or of a script
        that it names; None if there is none, or if a file cannot be read
    """
    paths = [path]
    for each in paths:  # the list grows meanwhile
        script = _script(each)
        if _PYTHON.search(script):
            return os.path.realpath(each)
        named = [one for one in _PATH.findall(script) if one not in paths]
        paths += named[:max(0, _SCRIPTS - len(paths))]
    return None


def _script(path: str) -> str:
    """Return the beginning of a script without comments; empty if it is none.

    A pipe or a device must neither hold up this process nor be read.
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
