# SPDX-License-Identifier: Apache-2.0

"""Find the names of discovered containers.

Only log lines, metrics and commands use the names, so no bind waits for them.
A separate thread asks the engines, and ignores an engine that does not answer.
"""

from __future__ import annotations

import contextlib
import dataclasses
import http.client
import json
import os
import re
import socket
import threading
import time
from typing import Any, Iterator, Optional, TypeVar

from kuryr_break0 import config
from kuryr_break0.discovery.records import find_discovered
from kuryr_break0.engine import containers
from kuryr_break0 import exceptions
from kuryr_break0 import kernel
from kuryr_break0.ledger import Ledger
from kuryr_break0 import log
from kuryr_break0 import model

LOG = log.get_logger(__name__)

T = TypeVar('T')

_ID = re.compile(r'[0-9A-Za-z]{1,128}')
#: Matches the control group of a container of LXC, Incus or systemd-nspawn.
#: The first match in a path counts, because a container can create control
#: groups below its own control group.
_CGROUP = re.compile(
    r'/(?:lxc\.payload\.([^/\n]+)|systemd-nspawn@([^/\n]+)\.service'
    r'|machine-([^/\n]+)\.scope)(?=/|$)', re.M)
_TIMEOUT = 2  # seconds
_LIMIT = 2 ** 23  # maximum size of an answer in bytes
#: Seconds from a change to the requests. An engine lists a container only
#: after the engine has connected the container to a network.
_SETTLED = 0.3
#: Seconds for which the thread asks for the name of a container. A busy engine
#: answers late, and some namespaces belong to no engine.
_PATIENCE = 60
_RETRY = 1  # seconds until the first retry; each later pause doubles


class Namer:
    """Thread that writes the names of containers into their records."""

    def __init__(self, options: config.Options, ledger: Ledger) -> None:
        self._options = options
        self._ledger = ledger
        #: monotonic time at which the requests for an owner's name end
        self._until: dict[model.Owner, float] = {}
        self._requested = threading.Event()
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def request_names(self) -> None:
        """Make the thread find the names of the containers of new records."""
        self._requested.set()

    def close(self) -> None:
        self._stopped.set()
        self._requested.set()
        self._thread.join(2 * _TIMEOUT)

    def _run(self) -> None:
        pause: Optional[float] = None
        while True:
            is_new = self._requested.wait(pause)
            self._stopped.wait(_SETTLED)
            if self._stopped.is_set():
                return
            self._requested.clear()
            next_pause = _RETRY if is_new or pause is None else 2 * pause
            pause = None
            try:
                if self._name_containers():
                    pause = next_pause
            except exceptions.LedgerUnavailable as err:
                LOG.debug('Cannot write the names of containers: %s', err)
            except Exception:  # an error must not end the thread
                LOG.exception('Cannot read the names of containers. They are '
                              'bound, but have no names in logs and metrics. '
                              'If this line recurs, report a bug.')

    def _name_containers(self) -> bool:
        """Write the names of unnamed containers into their records.

        :returns: whether to try again, because a busy engine may not list a
            new container yet
        """
        now = time.monotonic()
        unnamed = {record.owner: record for record
                   in find_discovered(self._ledger) if record.pod is None}
        self._until = {owner: self._until.get(owner, now + _PATIENCE)
                       for owner in unnamed}
        new = {owner: record for owner, record in unnamed.items()
               if now < self._until[owner]}
        if not new:
            return False
        names = {}
        for path in containers.ENGINE_SOCKETS:
            names.update(self._read_names(path))
        for record in list(new.values()):
            name = (record.namespace and names.get(record.namespace)
                    or read_cgroup_name(record))
            if name:
                self._write_name(record.owner, name)
                LOG.info('%s on %s, recorded as %s, belongs to container %s',
                         record.address, record.owner.ifname, record.owner,
                         name)
                del new[record.owner]
        return bool(new) and any(
            map(os.path.exists, containers.ENGINE_SOCKETS))

    def _read_names(self, path: str) -> dict[model.NamespaceId, str]:
        """Return the names of an engine's containers, by namespace.

        :param path: socket of the engine
        """
        if not os.path.exists(path):
            return {}
        names = {}
        try:
            for name, netns in list_containers(path, self._options.proc_dirs):
                namespace = kernel.identify(netns)
                if namespace is not None:
                    names[namespace] = name
        except (OSError, ValueError, http.client.HTTPException) as err:
            LOG.debug('Cannot read names from the engine at %s: %s', path, err)
        return names

    def _write_name(self, owner: model.Owner, name: str) -> None:
        records = self._ledger.records
        with contextlib.suppress(exceptions.Break0Error):
            for claims in list(records.find_containing(owner.container_id)):
                with self._ledger.lock():
                    claims = records.claims(claims[0].address)
                    named = [dataclasses.replace(claim, pod=name)
                             if claim.owner == owner
                             and claim.origin is model.Origin.DISCOVERED
                             else claim for claim in claims]
                    if named and tuple(named) != claims:
                        records.put(named)


def read_cgroup_name(record: model.Record) -> Optional[str]:
    """Return the name of a container of LXC, Incus or systemd-nspawn.

    These engines do not have Docker's API. The path of a container's control
    group contains the container's name.
    """
    path = (record.netns or '').rpartition('/ns/')[0]
    with contextlib.suppress(OSError):
        with open(path + '/cgroup', errors='replace') as file:
            match = _CGROUP.search(file.read())
        # The kernel may have reused the PID in the path.
        if match and kernel.identify(record.netns) == record.namespace:
            name = ''.join(filter(None, match.groups()))
            name = name.replace('\\x2d', '-')  # escaped by systemd
            return name if model.NAME.fullmatch(name) else None
    return None


def list_containers(path: str, proc_dirs: tuple[str, ...]
                    ) -> Iterator[tuple[str, str]]:
    """List the running containers of an engine with Docker's API.

    Podman has this API too.

    :param path: socket of the engine
    :returns: pairs of a name and a path of a network namespace; a container
        may have several pairs
    :raises OSError: if the engine does not answer
    :raises ValueError: if an answer is invalid
    """
    for each in _fetch(path, '/containers/json'):
        identity = _get_field(each, 'Id', str)
        if not _ID.fullmatch(identity):
            raise ValueError('invalid id of a container: %r' % identity[:64])
        names = [*_get_field(each, 'Names', list), identity[:12]]
        name = names[0].lstrip('/') if isinstance(names[0], str) else ''
        if not name or not model.NAME.fullmatch(name):
            continue
        try:
            details = _fetch(path, '/containers/%s/json' % identity)
        except ValueError:
            continue  # the container has just ended
        key = _get_field(_get_field(details, 'NetworkSettings', dict),
                         'SandboxKey', str)
        if key.startswith('/'):
            yield name, key
        pid = _get_field(_get_field(details, 'State', dict), 'Pid', int)
        if pid > 0:
            for proc in proc_dirs:
                yield name, '%s/%d/ns/net' % (proc, pid)


def _get_field(of: Any, key: str, kind: type[T]) -> T:
    """Return a field of an answer, or an empty value of its type.

    :param kind: type of the field. If the field is missing or has another
        type, the function returns an empty value
    """
    value = of.get(key) if isinstance(of, dict) else None
    return value if isinstance(value, kind) else kind()


def _fetch(path: str, url: str) -> Any:
    """Request a URL from the engine with a socket; return decoded JSON."""
    connection = _Connection(path)
    try:
        connection.request('GET', url, headers={'Host': 'engine'})
        answer = connection.getresponse()
        data = answer.read(_LIMIT + 1)
        if answer.status != 200 or len(data) > _LIMIT:
            raise ValueError('the answer to %s has status %d and %d bytes' % (
                url, answer.status, len(data)))
        decoded = json.loads(data)
        if not isinstance(decoded, list if url == '/containers/json'
                          else dict):
            raise ValueError('the answer to %s has the wrong type' % url)
        return decoded
    except RecursionError as err:
        raise ValueError('the answer to %s is nested too deeply' % url
                         ) from err
    finally:
        connection.close()


class _Connection(http.client.HTTPConnection):
    """HTTP connection to a Unix socket."""

    def __init__(self, path: str) -> None:
        super().__init__('engine', timeout=_TIMEOUT)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(_TIMEOUT)
        self.sock.connect(self._path)
