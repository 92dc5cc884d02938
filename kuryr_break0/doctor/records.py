# SPDX-License-Identifier: Apache-2.0

"""Checks of state directory, records, lock and agent."""

from __future__ import annotations

import contextlib
import os
import shlex
import stat
from typing import Iterator

from kuryr_break0 import config
from kuryr_break0.doctor.findings import Finding
from kuryr_break0.doctor.findings import KINDS
from kuryr_break0.doctor.findings import merged
from kuryr_break0.doctor.host import Host
from kuryr_break0.doctor.node import Node
from kuryr_break0 import exceptions
from kuryr_break0 import kernel
from kuryr_break0.ledger import Ledger
from kuryr_break0.ledger import readers

#: The default state directory.
DEFAULT = '/run/kuryr-break0'
#: File systems that are empty after a reboot.
_IN_MEMORY = ('tmpfs', 'ramfs', 'devtmpfs')


def check_directory(options: config.Options, host: Host
                    ) -> Iterator[Finding]:
    """Examine the state directory, or its nearest existing parent."""
    path = existing = options.state_dir
    while not os.path.lexists(existing):
        existing = os.path.dirname(existing)
    if not os.path.isdir(existing):
        yield KINDS['state-dir-unusable'].finding(
            '%s is not a directory' % existing, path=existing)
        return
    for directory in (existing, os.path.join(path, 'addresses')):
        if os.path.lexists(directory) and not (
                os.path.isdir(directory)
                and os.access(directory, os.R_OK | os.W_OK | os.X_OK)):
            if os.geteuid() != 0:
                raise exceptions.LedgerUnavailable(
                    path=directory, reason='only root can examine it')
            yield KINDS['state-dir-unusable'].finding(
                'user %d cannot write to %s' % (os.geteuid(), directory),
                path=directory)
            return
    ledger = Ledger(path)
    if existing == path and not os.path.isdir(ledger.records.directory):
        for name in ledger.list_foreign_files()[:1]:
            yield KINDS['state-dir-unusable'].finding(
                '%s has no records, but contains the file %s, which '
                'kuryr-break0 did not create' % (path, name), path=path)
            return
    mount, kind = _mount_of(existing)
    if kind not in _IN_MEMORY:
        yield KINDS['state-dir-persistent'].finding(
            '%s is on %s, which has the persistent file system %s' % (
                path, mount, kind), commands=_move(path, host))
    size = os.statvfs(existing)  # 0 blocks or files mean no limit
    if (size.f_blocks and not size.f_bavail
            or size.f_files and not size.f_favail):
        yield KINDS['state-dir-full'].finding(
            'the file system of %s, mounted on %s, is full' % (path, mount),
            path=existing)
    status = os.stat(existing)
    if existing == path and (status.st_uid != os.geteuid()
                             or status.st_mode & 0o077):
        yield KINDS['state-dir-mode'].finding(
            '%s belongs to user %d and has mode %04o' % (
                path, status.st_uid, stat.S_IMODE(status.st_mode)), path=path)


def _move(path: str, host: Host) -> list[str]:
    """Return commands that put the state directory on a tmpfs.

    In a pod, no command can do this: the DaemonSet must mount a directory of
    the node.
    """
    if host.daemon_set is not None:
        return []
    if path != DEFAULT and _mount_of(os.path.dirname(DEFAULT)
                                     )[1] in _IN_MEMORY:
        return host.set(state_dir=DEFAULT)
    quoted = shlex.quote(path)
    return ["echo '%s %s tmpfs mode=0700 0 0' >>/etc/fstab" % (
        'kuryr-break0', path), 'mkdir -p ' + quoted, 'mount ' + quoted]


def _mount_of(path: str) -> tuple[str, str]:
    """Return mount point and type of the file system of a path."""
    best = ('/', 'unknown')
    path = os.path.realpath(path)
    for _, point, kind in kernel.list_mounts():
        # A later mount on the same point hides the earlier mount.
        if (os.path.commonpath((point, path)) == point
                and len(point) >= len(best[0])):
            best = point, kind
    return best


def check_ledger(node: Node, host: Host) -> Iterator[Finding]:
    """Examine the records, the lock and the agent."""
    contents, ledger = node.snapshot.contents, node.ledger
    for kind, unreadable in ((KINDS['ledger-damaged'], contents.damaged),
                             (KINDS['ledger-newer'], contents.newer)):
        if unreadable:
            yield kind.finding(
                'its record in the ledger cannot be read: ' + next(iter(
                    unreadable.values())), unreadable, upgrade=host.upgrade)
    if contents.quarantined:
        yield KINDS['ledger-quarantined'].finding(
            'its record in the ledger cannot be read, and is in quarantine'
            if contents.unreadable else 'records were moved to quarantine',
            contents.quarantined,
            directory=os.path.dirname(contents.quarantined[0]))
    if not node.lock_free:
        yield KINDS['lock-held'].finding(
            'the lock %s did not become free; %s holds it' % (
                ledger.lock_path, _holder(ledger.lock_path)),
            path=ledger.lock_path)
    agent = ledger.heartbeat.state(node.options.patience)
    if agent == 'stopped':
        yield KINDS['agent-not-running'].finding(
            'no agent uses the state directory %s' % node.options.state_dir,
            start=host.start)
    elif agent == 'stuck':
        yield KINDS['agent-stuck'].finding(
            'no sync of the agent has succeeded for %d s; the agent is %s'
            % (ledger.heartbeat.age() or 0, _holder(ledger.heartbeat.path)),
            path=ledger.heartbeat.path, restart=host.restart)
    yield from merged(check_readers(ledger, host))


def check_readers(ledger: Ledger, host: Host) -> Iterator[Finding]:
    """Report programs that run with outdated options or another version."""
    for program, subject, text in readers.list_differences(ledger):
        kind = KINDS['options-stale' if subject == 'options'
                     else 'version-differs']
        yield kind.finding(text, commands=(
            [host.restart_daemon] if program == readers.DAEMON
            else [host.restart] if subject == 'version' else host.reload()))


def _holder(path: str) -> str:
    """Return the process that holds a lock on a file (/proc/locks)."""
    status = os.stat(path)
    place = '%02x:%02x:%d' % (os.major(status.st_dev),
                              os.minor(status.st_dev), status.st_ino)
    with open('/proc/locks') as locks:
        for fields in map(str.split, locks):
            # 1: FLOCK  ADVISORY  WRITE 1234 00:19:567 0 EOF
            if fields[1] == 'FLOCK' and place in fields:
                command = ''
                with contextlib.suppress(OSError), open(
                        '/proc/%s/cmdline' % fields[4]) as file:
                    command = file.read().replace('\0', ' ').strip()
                return 'process %s (%s)' % (fields[4], command or 'unknown')
    return 'a process of another container'
