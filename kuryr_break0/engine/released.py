# SPDX-License-Identifier: Apache-2.0

"""Drops claims on addresses that existing pods no longer use.

First case: a DEL has ended the interface, but has named only the addresses of
the last ADD, so claims of earlier ADDs remain. Second case: the interface has
other addresses now.
"""

from __future__ import annotations

from typing import Iterable, Mapping

from kuryr_break0.break0.missing import Missing
from kuryr_break0.engine.snapshot import Snapshot
from kuryr_break0.engine import transitions
from kuryr_break0 import failures
from kuryr_break0.ledger.journal import Done
from kuryr_break0.ledger import Ledger
from kuryr_break0 import log
from kuryr_break0 import model

LOG = log.get_logger(__name__)

#: Origins of claims by CNI: one ADD claims all addresses of an interface.
_BY_ADD = model.Origin.KURYR, model.Origin.CNI


def by_del(snapshot: Snapshot, ended: Mapping[model.Owner, float]
           ) -> dict[model.Record, str]:
    """Return the claims of interfaces that a DEL has ended, with reasons.

    :param ended: times of the DELs; see :meth:`Ledger.list_ended`
    """
    return {claim: 'a DEL has ended its interface'
            for claims in (snapshot.contents.claims.values() if ended else ())
            for claim in claims
            if claim.origin in _BY_ADD and claim not in snapshot.gone
            and claim.bound_at < ended.get(claim.owner, 0)}


def by_change(missing: Iterable[Missing]) -> dict[model.Record, str]:
    """Return the claims on replaced addresses, with the reasons."""
    return {each.record: 'its interface had other addresses, but not this '
            'one, in two syncs' for each in missing}


def drop(claims: Mapping[model.Record, str], engine: transitions.Engine,
         ledger: Ledger, failure: failures.Failures) -> None:
    """Drop claims, unless their addresses have been bound again.

    :param claims: the claims to drop, with the reasons
    """
    for record, reason in claims.items():
        def is_same(claim: model.Record, of: model.Record = record) -> bool:
            return (claim.owner, claim.bound_at) == (of.owner, of.bound_at)

        with failure.collect(record.address):
            if engine.unbind([record.address], is_same, record.owner_text,
                             None, failure):
                LOG.warning('Unbound %s for %s: %s. To see its present '
                            'addresses, run: kuryr-break0 status',
                            record.address, record.owner_text, reason)
                engine.pods.withdraw(record)
                ledger.journal.add(Done.RELEASED)
