# SPDX-License-Identifier: Apache-2.0

"""The allowed address pairs of a node's port in Neutron.

Port security of the node's port drops the frames of a pod unless the port
has the pair of the pod's MAC address and IP address. Neutron stores all pairs
of a port as one value, so each change reads and writes all pairs.
"""

from __future__ import annotations

import collections
import contextlib
import random
import threading
import time
from typing import Any, Callable, Iterable, Optional, TypeVar

from keystoneauth1 import exceptions as ksa_exc
from openstack import exceptions as os_exc

#: Delays between the attempts of one request, in seconds.
_DELAYS = (0.1, 0.2, 0.4, 0.8, 1.6, 3.2)
#: Status codes of errors that may be temporary. Neutron answers 404 while the
#: node's port is created again, and 412 if another process has changed the
#: port since it was read.
_TRANSIENT = (404, 408, 412, 429)
#: The type that Neutron gives to the error "too many pairs".
_EXHAUSTED = 'AllowedAddressPairExhausted'

_T = TypeVar('_T')


class _Change:
    """A change of the allowed address pairs that have one MAC address.

    :ivar addresses: the new addresses; empty for a pod that ends
    :ivar error: the reason why Neutron's port was not changed, or None
    """

    def __init__(self, mac: str, addresses: Iterable[str]) -> None:
        self.mac = mac.lower()
        self.addresses = frozenset(addresses)
        self.is_done = False
        self.error: Optional[Exception] = None

    def finish(self, error: Optional[Exception] = None) -> None:
        self.error = error
        self.is_done = True


class AddressPairs:
    """Changes the allowed address pairs of one port for several pods at once.

    All changes that wait for the same port are written by one request. The
    port is read under the lock, so changes of this process never conflict. If
    another process changes the port meanwhile, the read and the write are
    repeated.

    :param read: a function that returns Neutron's port
    :param write: a function of the id of the port, its pairs, and its revision
    """

    def __init__(self, read: Callable[[], Any],
                 write: Callable[[str, list[dict[str, str]], int], Any]
                 ) -> None:
        self._read = read
        self._write = write
        self._lock = threading.Lock()
        self._waiting: collections.deque[_Change] = collections.deque()

    def assign(self, mac: str, addresses: Iterable[str] = ()) -> None:
        """Replace the allowed address pairs that have a given MAC address.

        :param addresses: the addresses of the new pairs
        :raises Exception: if Neutron cannot be reached, or refuses the change
        """
        change = _Change(mac, addresses)
        self._waiting.append(change)
        try:
            with self._lock:
                if not change.is_done:
                    self._settle(self._take(change))
        except BaseException:  # this thread is killed
            with contextlib.suppress(ValueError):
                self._waiting.remove(change)
            raise
        if change.error is not None:
            raise change.error

    def _take(self, change: _Change) -> list[_Change]:
        """Return all waiting changes, including ``change``.

        If another thread took ``change`` and was killed, ``change`` is not
        waiting any more, but is returned too.
        """
        changes = []
        while self._waiting:
            changes.append(self._waiting.popleft())
        return changes if change in changes else [*changes, change]

    def _settle(self, changes: list[_Change]) -> None:
        """Write all changes; a refused change does not prevent the others."""
        # Deletions come first: deleted pairs make room for new pairs.
        changes.sort(key=lambda change: bool(change.addresses))
        size = len(changes)
        while changes:
            part = changes[:size]
            error: Optional[Exception] = None
            try:
                repeat(lambda: self._update(part))
            except (os_exc.BadRequestException,
                    os_exc.ConflictException) as err:
                if len(part) > 1:
                    size = len(part) // 2
                    continue
                error = err
                if is_exhausted(err):
                    part = changes
            except Exception as err:
                # The other changes would fail too.
                part, error = changes, err
            for change in part:
                change.finish(error)
            changes = changes[len(part):]
            size *= 2

    def _update(self, changes: list[_Change]) -> None:
        port = self._read()
        if port.is_port_security_enabled is False:
            return  # Neutron refuses pairs, and lets all frames pass
        before = list(port.allowed_address_pairs or ())
        additions = {change.mac: set(change.addresses) for change in changes}
        after = []
        for pair in before:
            mac, address = pair['mac_address'].lower(), pair['ip_address']
            if mac not in additions:
                after.append(pair)
            elif address in additions[mac]:
                additions[mac].remove(address)
                after.append(pair)
        after += [{'ip_address': address, 'mac_address': mac}
                  for mac, addresses in additions.items()
                  for address in sorted(addresses)]
        if after != before:
            self._write(port.id, after, port.revision_number)


def repeat(request: Callable[[], _T]) -> _T:
    """Return the result of a request; repeat it after a transient error.

    :raises Exception: the last error, after at most 7 attempts, with pauses of
        at most 10 seconds in total
    """
    for delay in _DELAYS:
        try:
            return request()
        except Exception as err:
            if not is_transient(err):
                raise
        # A random delay, so that two controllers do not conflict again.
        time.sleep(delay * random.uniform(0.5, 1.5))
    return request()


def is_exhausted(err: BaseException) -> bool:
    """Return whether Neutron permits no more pairs on the port."""
    try:
        answer = err.response.json()  # type: ignore[attr-defined]
        return bool(answer['NeutronError']['type'] == _EXHAUSTED)
    except (AttributeError, KeyError, TypeError, ValueError):
        return False


def is_transient(err: BaseException) -> bool:
    """Return whether the same request may succeed a moment later."""
    if isinstance(err, os_exc.HttpException):
        status = err.status_code or 0
        return status in _TRANSIENT or status >= 500
    return isinstance(err, ksa_exc.ConnectionError)
