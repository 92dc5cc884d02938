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
from kuryr_break0 import model

LOG = log.get_logger(__name__)

#: The control groups of this process (cgroups(7)).
_CGROUPS = '/proc/self/cgroup'
#: Key in the ledger's cache for the systemd service of the agent that
#: discovers containers.
_UNIT = 'discovered_by'


def make_owner_id(namespace: model.NamespaceId) -> str:
    """Return a container id for a discovered container."""
    return 'discovered-%d' % (namespace.cookie or namespace.inode)


def read_unit() -> str:
    """Return the systemd service of this process.

    :returns: path of the service's control group. If this process is in no
        service, for example in a session or in a container without systemd,
        an empty text
    """
    with contextlib.suppress(OSError, ValueError), \
            open(_CGROUPS, errors='surrogateescape') as file:
        for line in file:
            _, kind, path = line.rstrip('\n').split(':', 2)
            parts = path.split('/')
            while parts and not parts[-1].endswith(('.service', '.scope')):
                # If a service has Delegate=, its processes can be in control
                # groups below the control group of the service.
                parts.pop()
            if kind in ('', 'name=systemd') and parts and (
                    parts[-1].endswith('.service')):
                return '/'.join(parts)
    return ''


def store_unit(ledger: Ledger) -> None:
    """Record that the service of this process discovers containers."""
    ledger.cache.put(_UNIT, [read_unit()])


def is_this_unit(ledger: Ledger) -> bool:
    """Return whether the last discovering agent ran in this service.

    If the result is True, and ``discover`` is false now, the operator has
    changed the option. If the result is False, the discovering agent may still
    run in another service.
    """
    unit = read_unit()
    return bool(unit) and ledger.cache.get(_UNIT) == [unit]


def unbind_discovered(options: config.Options, ledger: Ledger) -> bool:
    """Unbind all discovered addresses; return whether all were unbound."""
    manager = Break0Manager(options)
    records: list[model.Record] = []
    is_done = False
    with contextlib.suppress(exceptions.LedgerUnavailable):
        records += find_discovered(ledger)
        is_done = True
    for record in records:
        try:
            manager.unbind(record.owner, [record.address], record.netns)
        except exceptions.Break0Error as err:
            LOG.error('Cannot unbind %s of %s. The agent will try again: %s',
                      record.address, record.pod or record.owner, err)
            is_done = False
    if is_done:
        ledger.cache.drop(_UNIT)
    return is_done


def find_discovered(ledger: Ledger) -> Iterable[model.Record]:
    """Return the claims that discovery has made.

    :raises LedgerUnavailable: if the ledger cannot be read
    """
    return (record for record in find_maintained(ledger)
            if record.origin is model.Origin.DISCOVERED)


def find_maintained(ledger: Ledger) -> Iterator[model.Record]:
    """Return the claims that discovery updates and deletes.

    These are the claims that discovery has made, and rebuilt claims. The
    program that made a rebuilt claim is unknown, so discovery must delete the
    claim when its container ends.

    :raises LedgerUnavailable: if the ledger cannot be read
    """
    for claims in ledger.records.find_containing(model.Origin.DISCOVERED.value,
                                                 model.Owner.ADOPTED):
        for claim in claims:
            if claim.origin is model.Origin.DISCOVERED or claim.is_rebuilt:
                yield claim
