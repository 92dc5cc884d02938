# SPDX-License-Identifier: Apache-2.0

"""The archive for a bug report."""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import io
import os
import platform
import re
import socket
import subprocess
import sys
import tarfile
import time
from typing import Callable

from kuryr_break0 import config
from kuryr_break0.doctor import redaction
from kuryr_break0 import exceptions
from kuryr_break0 import kernel
from kuryr_break0.ledger import Ledger

#: Largest size in bytes of the archive before compression, and of one part.
_MOST, _PART = 10 * 2 ** 20, 2 ** 20
_TIMEOUT = 10  # seconds to wait for a program
_COMMANDS = (
    ('ip', '-d', 'link'), ('ip', '-d', 'address'),
    ('ip', 'route', 'show', 'table', 'all'),
    ('ip', '-6', 'route', 'show', 'table', 'all'), ('ip', 'rule'),
    ('ip', '-6', 'rule'), ('ip', 'neigh'), ('ip', 'netns', 'list-id'),
    ('nft', 'list', 'ruleset'), ('iptables-save',), ('ip6tables-save',),
    ('sysctl', '-a', '--pattern', r'^net\.(ipv4|ipv6)\.(conf|ip_forward)'),
    ('ps', '-eo', 'pid,lstart,args'), ('dmesg',),
    *(('journalctl', '--no-pager', '--no-hostname', '-n', '5000', '-u', unit)
      for unit in ('kuryr-break0-agent', 'kuryr-daemon')))
_STATE = 'state/'
_PACKAGES = ('kuryr-break0', 'kuryr-kubernetes', 'os-vif', 'pyroute2',
             'oslo.config', 'oslo.log')
#: An assignment of a secret, in any file. No bundle contains the value.
_SECRET = re.compile(r'(?i)("?\b\w*(?:secret|password|token)\w*"?\s*[:=]\s*)'
                     r'("[^"]*"|\S+)')


class Bundle:
    """An archive (``tar.gz``) without secrets.

    :param redact: replace names and addresses with :class:`Redactor`
    """

    def __init__(self, options: config.Options, redact: bool) -> None:
        self._options = options
        self._redactor = redaction.Redactor(self._names()) if redact else None
        self._size = 0
        self._stem = 'kuryr-break0-%s' % time.strftime('%Y%m%d-%H%M%S')

    def write(self, path: str, parts: dict[str, Callable[[], str]]) -> None:
        """Write the archive, with the error for a part that fails.

        :param path: path of the archive, which must not exist
        :param parts: functions that return further parts, by name
        :raises OSError: if the archive cannot be written
        """
        parts = {'versions.txt': _versions, 'options.txt': lambda: '\n'.join(
            '%s = %s' % each for each in vars(self._options).items()),
            **parts, **self._state()}
        for command in _COMMANDS:
            parts['commands/%s.txt' % '_'.join(command).replace(
                '/', '_')[:60]] = functools.partial(_output, command)
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with open(fd, 'wb') as file, tarfile.open(
                fileobj=file, mode='w:gz') as archive:
            for name, make in parts.items():
                try:
                    text = make()
                except Exception as err:  # the other parts are still useful
                    text = 'Cannot collect %s: %r' % (name, err)
                self._add(archive, name, text)

    def _state(self) -> dict[str, Callable[[], str]]:
        """Return functions that read the files of the state directory."""
        top = self._options.state_dir
        return {
            _STATE + os.path.relpath(path, top):
            functools.partial(_content, path)
            for directory, _, names in sorted(os.walk(top))
            for path in (os.path.join(directory, each)
                         for each in sorted(names))
            if os.path.isfile(path) and not os.path.islink(path)}

    def _add(self, archive: tarfile.TarFile, name: str, text: str) -> None:
        text = _SECRET.sub(r'\1***', text)
        if self._redactor is not None:
            text = self._redactor.redact(text)
            if name.startswith(_STATE):  # all other names are constants
                name = self._redactor.redact(name)
        data = text.encode(errors='replace')[:_PART]
        data = data[:max(0, _MOST - self._size)]
        self._size += len(data)
        info = tarfile.TarInfo('%s/%s' % (self._stem, name))
        info.size, info.mtime, info.mode = len(data), int(time.time()), 0o600
        archive.addfile(info, io.BytesIO(data))

    def _names(self) -> set[str]:
        """Return the names of the node, its interfaces, pods and networks."""
        names = {socket.gethostname(),
                 os.environ.get('KUBERNETES_NODE_NAME', ''),
                 *(name for _, name in socket.if_nameindex())}
        for directory in kernel.NETNS_DIRS:
            with contextlib.suppress(OSError):
                names |= {*os.listdir(directory)}
        with contextlib.suppress(exceptions.Break0Error):
            ledger = Ledger(self._options.state_dir, 1)
            for claims in ledger.contents().claims.values():
                for claim in claims:
                    names |= {*(claim.pod or '').split('/'),
                              claim.owner.container_id, claim.parent,
                              claim.owner.ifname, claim.network or '',
                              os.path.basename(claim.netns or '')}
        return names


def _versions() -> str:
    lines = [' '.join((platform.system(), platform.release(),
                       platform.version(), platform.machine())),
             'Python ' + sys.version]
    for name in _PACKAGES:
        try:
            lines.append('%s %s' % (name, importlib.metadata.version(name)))
        except importlib.metadata.PackageNotFoundError:
            lines.append('%s is not installed' % name)
    return '\n'.join((*lines, *(
        '%s: %s' % (program, kernel.find_program(program))
        for program in ('ip', 'nft', 'iptables-save'))))


def _content(path: str) -> str:
    with open(path, errors='replace') as file:
        return file.read(_PART)


def _output(command: tuple[str, ...]) -> str:
    path = kernel.find_program(command[0])
    if path is None:
        return 'The program %s is not installed.' % command[0]
    completed = subprocess.run(
        [path, *command[1:]], stdout=subprocess.PIPE, text=True,
        stderr=subprocess.STDOUT, timeout=_TIMEOUT, errors='surrogateescape')
    return '$ %s\n%s\n(exit %d)' % (
        ' '.join(command), completed.stdout[-_PART:], completed.returncode)
