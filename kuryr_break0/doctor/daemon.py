# SPDX-License-Identifier: Apache-2.0

"""Checks whether the running kuryr-daemon can have loaded the driver."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import re
import sys
import time
from typing import Iterator, NamedTuple, Optional

from kuryr_break0.doctor import findings
from kuryr_break0.doctor.findings import Finding

#: cotyledon's title of the process that starts the others, and what it is
#: where the setproctitle that it needs for that is not there.
_TITLES = (re.compile(r'kuryr-daemon: master process \[(/\S*)'),
           re.compile(r'\S*python[0-9.]*\0(/\S*/kuryr-daemon)\0'))


class _Daemon(NamedTuple):
    """A kuryr-daemon.

    :ivar program: its path
    :ivar since: seconds since the epoch
    """

    pid: int
    program: str
    since: float


def check() -> Iterator[Finding]:
    """Compare it with the Python environment of this process.

    Where it is in a container of its own it is not seen, and nothing is
    said.
    """
    installed = _installed_at()
    for daemon in _daemons():
        if os.path.dirname(daemon.program) != os.path.dirname(sys.executable):
            yield findings.DAEMON_ELSEWHERE.found(
                'kuryr-daemon, process %d, is %s, but this program runs '
                'with %s' % (daemon.pid, daemon.program, sys.executable),
                directory=os.path.dirname(daemon.program))
        elif installed is not None and daemon.since < installed:
            yield findings.DAEMON_NOT_RESTARTED.found(
                'kuryr-daemon, process %d, was started %s, and the package '
                'installed %s' % (daemon.pid, _readable(daemon.since),
                                  _readable(installed)))


def _daemons() -> Iterator[_Daemon]:
    """Return the daemons that see the same files as this process."""
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
                yield _Daemon(pid, match[1], _started_at(pid))


def _started_at(pid: int) -> float:
    with open('/proc/%d/stat' % pid) as file:
        # The name, in parentheses, may have anything in it.
        ticks = int(file.read().rpartition(')')[2].split()[19])
    since_boot = ticks / os.sysconf('SC_CLK_TCK')
    return time.time() - time.clock_gettime(time.CLOCK_BOOTTIME) + since_boot


def _installed_at() -> Optional[float]:
    """When what pip writes last was written."""
    try:
        distribution = importlib.metadata.distribution('kuryr-break0')
        for file in distribution.files or ():
            if file.name == 'RECORD':
                return os.stat(str(distribution.locate_file(file))).st_mtime
    except (OSError, importlib.metadata.PackageNotFoundError):
        pass
    return None


def _readable(when: float) -> str:
    return time.strftime('%Y-%m-%d %H:%M:%S', time.localtime(when))
