# SPDX-License-Identifier: Apache-2.0

"""Decides which claim on an address counts.

The functions are pure: the caller passes the state of sandboxes. The claims on
an address are ordered, the newest first. The newest claim of an existing
sandbox counts. The other claims wait until that sandbox ends.
"""

from __future__ import annotations

from typing import Callable, Collection, NamedTuple, Optional

from kuryr_break0.model import NamespaceId
from kuryr_break0.model import Origin
from kuryr_break0.model import Owner
from kuryr_break0.model import Record

Claims = tuple[Record, ...]


class Addition(NamedTuple):
    """The claims on an address after another claim was added.

    :ivar after: all claims, the new one first
    :ivar rivals: earlier claims of other interfaces that are not gone
    :ivar is_handed_over: whether the address passes to another interface
    """

    after: Claims
    rivals: Claims
    is_handed_over: bool


def split(claims: Collection[Record],
          is_gone: Callable[[Record], bool]) -> tuple[Claims, Claims]:
    """Return the remaining claims and the gone claims, each in order.

    :param is_gone: returns whether a claim is gone, for example because its
        sandbox is proven not to exist
    """
    gone = tuple(claim for claim in claims if is_gone(claim))
    return tuple(claim for claim in claims if claim not in gone), gone


def add(record: Record, claims: Claims,
        is_gone: Callable[[Record], bool]) -> Addition:
    """Add a claim, which replaces the earlier claims of its interface.

    If its owner has a newer claim, the claims stay the same: the runtime has
    abandoned the earlier bind and started another one.
    """
    if any(claim.owner == record.owner and claim.bound_at > record.bound_at
           for claim in claims):
        return Addition(claims, (), False)
    of_others = [claim for claim in claims
                 if not is_of_same_interface(claim, record)]
    rivals, _ = split(of_others, is_gone)
    # A claim without namespace and macvtap can never be proven gone.
    kept = tuple(claim for claim in rivals if claim.namespace or claim.tap)
    return Addition((record, *kept), rivals,
                    bool(of_others) and of_others[0] == claims[0])


def is_of_same_interface(claim: Record, record: Record) -> bool:
    """Return whether a claim is an earlier claim of the same interface.

    The owner of a discovered or rebuilt claim differs from the owner in a
    later bind by the container's engine. So the namespace identifies it.
    """
    return claim.owner == record.owner or (
        (claim.origin is Origin.DISCOVERED or claim.is_rebuilt)
        and claim.owner.ifname == record.owner.ifname
        and claim.namespace is not None
        and claim.namespace == record.namespace)


def is_own(claim: Record, owner: Owner, namespace: Optional[NamespaceId],
           mac: Optional[str], bound_at: Optional[float] = None) -> bool:
    """Return whether an unbind for an owner drops a claim.

    The container id of an adopted container is unknown, and its namespace
    proves nothing: a runtime can repeat the DEL of an earlier container, and
    reuse the path for a new one. So the MAC address must be the same too.

    :param namespace: the namespace of the sandbox, if it exists
    :param mac: MAC address of its interface; None if unknown
    :param bound_at: the time of the bind to undo; None for any bind
    """
    if bound_at is not None and claim.bound_at != bound_at:
        return False
    return claim.owner == owner or (
        namespace is not None and mac is not None and claim.mac == mac
        and claim.owner in (
            Owner.adopted(namespace, owner.ifname),
            Owner.adopted(namespace._replace(cookie=None), owner.ifname)))


def have(claims: Collection[Record], mac: Optional[str]) -> bool:
    """Return whether the items of an address can belong to its claims.

    Otherwise the items belong to an unrecorded pod or to another ledger. If a
    claim has no MAC address, the items are taken for its items.

    :param mac: MAC address of the permanent neighbour of the address; None
        if it has no such neighbour
    """
    return mac is None or any(claim.mac is None or mac in claim.macs
                              for claim in claims)
