# SPDX-License-Identifier: Apache-2.0

"""What discovery has recorded, and how it is withdrawn."""

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
#: The fact in the ledger that names the unit of the agent that discovers.
_UNIT = 'discovered_by'


def owner_id(namespace: NamespaceId) -> str:
    """Return the owner for a container whose id is unknown."""
    return 'discovered-%d' % (namespace.cookie or namespace.inode)


def unit() -> str:
    """Return the service of systemd that this process is in.

    :returns: the path of its control group; empty for a process of no
        service, as of a session, or of a container without systemd
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
    """Note that this agent discovers."""
    ledger.cache.put(_UNIT, [unit()])


def is_of_this_unit(ledger: Ledger) -> bool:
    """Return whether the last agent that discovered was of this unit.

    Then a person has set ``discover`` to false. Any other agent may merely
    run beside the one that discovers, which may be started again.
    """
    own = unit()
    return bool(own) and ledger.cache.get(_UNIT) == [own]


def take_back(options: config.Options, ledger: Ledger) -> bool:
    """Unbind all that was discovered; whether that was done."""
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
    """Return the claims that were discovered.

    :raises LedgerUnavailable: if the ledger cannot be read
    """
    return (record for record in followed(ledger)
            if record.origin is Origin.DISCOVERED)


def followed(ledger: Ledger) -> Iterator[Record]:
    """Return the claims that discovery renews and withdraws.

    Those that it has made, and those that were rebuilt: nothing says who has
    made them, and nobody else may be there to withdraw them.

    :raises LedgerUnavailable: if the ledger cannot be read
    """
    for claims in ledger.records.find_containing(Origin.DISCOVERED.value,
                                                 Owner.ADOPTED):
        for claim in claims:
            if claim.origin is Origin.DISCOVERED or claim.is_rebuilt:
                yield claim
