# SPDX-License-Identifier: Apache-2.0

"""Records which configuration and version each program of the node runs with.

A program reads the configuration when it starts, and the agent also when it is
reloaded. If a file is changed later, the program still works with the old
options. The next pod may then fail, although each command shows the new
options. The module does not compare environment variables, because they may
differ between programs on purpose.
"""

from __future__ import annotations

import contextlib
import os
import time
from typing import Any, Iterator, NamedTuple

from oslo_config import cfg

from kuryr_break0 import config
from kuryr_break0.ledger import Ledger

DAEMON, AGENT = 'kuryr-daemon', 'the agent'
#: Keys in the ledger's cache, by the name of the program.
_KEYS = {DAEMON: 'read_by_daemon', AGENT: 'read_by_agent'}


class Reader(NamedTuple):
    """A program that has read the configuration.

    :ivar version: the version of the package that it runs
    :ivar read_at: time of the read, in seconds since the epoch
    :ivar digest: digest of the section [break0] in the files at that time
    :ivar files: paths of the files
    """

    version: str
    read_at: float
    digest: str
    files: tuple[str, ...]


def describe(conf: cfg.ConfigOpts) -> Reader:
    """Describe this process, which has just read its configuration."""
    files = tuple(map(os.path.abspath, config.list_files(conf)))
    return Reader(installed_version(), time.time(), _digest(files), files)


def installed_version() -> str:
    """Return the version of the installed package; empty if unknown."""
    import importlib.metadata  # slow, and rarely needed

    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        return importlib.metadata.version('kuryr-break0')
    return ''


def store(ledger: Ledger, program: str, reader: Reader) -> None:
    """Store the description of a program, unless it is stored already.

    Without a state directory, nothing is stored. The next bind creates the
    directory.
    """
    facts = [*reader[:3], *reader.files]
    if ledger.exists() and ledger.cache.get(_KEYS[program]) != facts:
        ledger.cache.put(_KEYS[program], facts)


def list_differences(ledger: Ledger) -> Iterator[tuple[str, str, str]]:
    """Yield each program that runs with old options or another version.

    :returns: the program, ``options`` or ``version``, and a text that
        describes the difference
    """
    for program, key in _KEYS.items():
        reader = _read(ledger, key)
        if reader is None or (program == AGENT
                              and ledger.heartbeat.age() is None):
            continue
        version = installed_version()
        if reader.version != version:
            yield program, 'version', (
                '%s runs version %s, but version %s is installed' % (
                    program, reader.version or 'unknown',
                    version or 'unknown'))
        # If this process is in a container, it may not have the files.
        if all(map(os.path.exists, reader.files)) and (
                _digest(reader.files) != reader.digest):
            yield program, 'options', (
                '%s has read the options at %s, and [break0] in %s has '
                'changed since' % (program, time.strftime(
                    '%Y-%m-%d %H:%M:%S', time.localtime(reader.read_at)),
                    ' or '.join(reader.files)))


def _read(ledger: Ledger, key: str) -> Any:
    with contextlib.suppress(TypeError, ValueError):
        facts: list[Any] = ledger.cache.get(key) or []
        version, read_at, digest, *files = facts
        return Reader(str(version), float(read_at), str(digest),
                      tuple(map(str, files)))
    return None


def _digest(files: tuple[str, ...]) -> str:
    """Return a digest of the section [break0] in files, without comments."""
    import hashlib

    names_by_path: dict[str, list[str]] = {}
    for path in files:
        for section, names in config.parse_file(path).items():
            if section.lower() == config.GROUP:
                names_by_path.update(names)
    return hashlib.sha256(repr(sorted(names_by_path.items())).encode()
                          ).hexdigest()[:16]
