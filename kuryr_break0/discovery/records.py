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


def owner_id(namespace: NamespaceId) -> str:
    """Return the owner for a container whose id is unknown."""
    return 'discovered-%d' % (namespace.cookie or namespace.inode)


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
    for claims in ledger.records.containing(Origin.DISCOVERED.value,
                                            Owner.ADOPTED):
        for claim in claims:
            if claim.origin is Origin.DISCOVERED or claim.is_rebuilt:
                yield claim
