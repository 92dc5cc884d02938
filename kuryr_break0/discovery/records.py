# SPDX-License-Identifier: Apache-2.0

"""Find and unbind the records that discovery maintains."""

from __future__ import annotations

import contextlib
from typing import Iterable, Iterator

from kuryr_break0 import config
from kuryr_break0 import exceptions
from kuryr_break0.ledger import Ledger
from kuryr_break0 import log
from kuryr_break0.manager import Break0Manager
from kuryr_break0.model import NamespaceId
from kuryr_break0.model import Origin
from kuryr_break0.model import Owner
from kuryr_break0.model import Record

LOG = log.get_logger(__name__)

#: The control groups of this process (cgroups(7)).
_CGROUPS = '/proc/self/cgroup'
#: Key in the ledger's cache for the systemd service of the agent that
#: discovers containers.
_UNIT = 'discovered_by'


def owner_id(namespace: NamespaceId) -> str:
    """Return a container id for a discovered container."""
    return 'discovered-%d' % (namespace.cookie or namespace.inode)


def unit() -> str:
    """Return the systemd service of this process.

    :returns: path of its control group; empty outside of a service, for
        example in a session or in a container without systemd
    """
    with contextlib.suppress(OSError, ValueError), \
            open(_CGROUPS, errors='surrogateescape') as file:
        for line in file:
            _, kind, path = line.rstrip('\n').split(':', 2)
            parts = path.split('/')
            while parts and not parts[-1].endswith(('.service', '.scope')):
                parts.pop()  # below the unit, as of a service with Delegate=
            if kind in ('', 'name=systemd') and parts and (
                    parts[-1].endswith('.service')):
                return '/'.join(parts)
    return ''


def note_unit(ledger: Ledger) -> None:
    """Record this process's service as the one that discovers containers."""
    ledger.cache.put(_UNIT, [unit()])


def is_of_this_unit(ledger: Ledger) -> bool:
    """Return whether the last discovering agent ran in this service.

    If so, and ``discover`` is false now, the operator has changed the option.
    An agent of another service may merely run beside the agent that discovers.
    """
    own = unit()
    return bool(own) and ledger.cache.get(_UNIT) == [own]


def take_back(options: config.Options, ledger: Ledger) -> bool:
    """Unbind all discovered addresses; return whether all were unbound."""
    manager = Break0Manager(options)
    records: list[Record] = []
    is_done = False
    with contextlib.suppress(exceptions.LedgerUnavailable):
        records += discovered(ledger)
        is_done = True
    for record in records:
        try:
            manager.unbind(record.owner, [record.address], record.netns)
        except exceptions.Break0Error as err:
            LOG.error('%s stays bound for now: %s', record.address, err)
            is_done = False
    if is_done:
        ledger.cache.drop(_UNIT)
    return is_done


def discovered(ledger: Ledger) -> Iterable[Record]:
    """Return the claims that discovery has made.

    :raises LedgerUnavailable: if the ledger cannot be read
    """
    return (record for record in followed(ledger)
            if record.origin is Origin.DISCOVERED)


def followed(ledger: Ledger) -> Iterator[Record]:
    """Return the claims that discovery updates and deletes.

    Discovery has made them, or they were rebuilt: the origin of a rebuilt
    claim is unknown, so perhaps no other program will delete it.

    :raises LedgerUnavailable: if the ledger cannot be read
    """
    for claims in ledger.records.containing(Origin.DISCOVERED.value,
                                            Owner.ADOPTED):
        for claim in claims:
            if claim.origin is Origin.DISCOVERED or claim.is_rebuilt:
                yield claim
