# SPDX-License-Identifier: Apache-2.0

"""Which claim on an address counts. Pure: the caller says who exists.

The claims on one address are ordered, the newest first. The newest of a
sandbox that exists counts; the others wait for its end.
"""

from __future__ import annotations

from typing import Callable, Collection, NamedTuple, Optional

from kuryr_break0.model import NamespaceId
from kuryr_break0.model import Origin
from kuryr_break0.model import Owner
from kuryr_break0.model import Record

Claims = tuple[Record, ...]


class Addition(NamedTuple):
    """What becomes of the claims on an address with one more.

    :ivar after: all of them, the new one first
    :ivar rivals: of these, the earlier ones of other sandboxes
    :ivar passed: whether another sandbox had the address
    """

    after: Claims
    rivals: Claims
    passed: bool


def split(claims: Collection[Record],
          is_gone: Callable[[Record], bool]) -> tuple[Claims, Claims]:
    """Tell the claims that count, now or later, from those that are gone.

    These are of sandboxes that are proven not to exist.
    """
    gone = tuple(claim for claim in claims if is_gone(claim))
    return tuple(claim for claim in claims if claim not in gone), gone


def add(record: Record, claims: Claims,
        is_gone: Callable[[Record], bool]) -> Addition:
    """Return the claims with a new one, in place of those of its interface.

    One that was asked for before the newest of its owner changes nothing:
    the runtime has given it up, and asked again.
    """
    if any(claim.owner == record.owner and claim.bound_at > record.bound_at
           for claim in claims):
        return Addition(claims, (), False)
    others = [claim for claim in claims
              if not is_of_same_interface(claim, record)]
    rivals, _ = split(others, is_gone)
    # The end of one without these is never proven.
    kept = tuple(claim for claim in rivals if claim.namespace or claim.tap)
    return Addition((record, *kept), rivals,
                    bool(others) and others[0] == claims[0])


def is_of_same_interface(claim: Record, record: Record) -> bool:
    """Return whether a claim is an earlier one of the same interface.

    What was discovered or rebuilt may be bound by its engine later.
    """
    return claim.owner == record.owner or (
        (claim.origin is Origin.DISCOVERED or claim.is_rebuilt)
        and claim.owner.ifname == record.owner.ifname
        and claim.namespace is not None
        and claim.namespace == record.namespace)


def is_own(claim: Record, owner: Owner, namespace: Optional[NamespaceId],
           mac: Optional[str], bound_at: Optional[float] = None) -> bool:
    """Return whether an unbind for an owner takes a claim away.

    The id of a container that was adopted is not known. Its namespace alone
    proves nothing: the DEL of another one can be repeated, and its path is
    used again. So its MAC address has to be the same too.

    :param namespace: of the sandbox, if it is there
    :param mac: MAC address of its interface, if that is known
    :param bound_at: the bind that is meant; None for any
    """
    if bound_at is not None and claim.bound_at != bound_at:
        return False
    return claim.owner == owner or (
        namespace is not None and mac is not None and claim.mac == mac
        and claim.owner in (
            Owner.adopted(namespace, owner.ifname),
            Owner.adopted(namespace._replace(cookie=None), owner.ifname)))


def have(claims: Collection[Record], mac: Optional[str]) -> bool:
    """Return whether what an address has on break0 is that of claims on it.

    Else a pod has it that could not be recorded, or another ledger has. What
    claims without a MAC address have cannot be told from that.

    :param mac: of the permanent neighbour of the address; None without one
    """
    return mac is None or any(claim.mac is None or mac in claim.macs
                              for claim in claims)
