# SPDX-License-Identifier: Apache-2.0

"""Decides which of the claims on an address is effective.

The claims on an address are ordered, the newest first. The newest claim of an
existing sandbox is effective, and the other claims wait until that sandbox
ends. The functions are pure: the caller passes the state of the sandboxes.
"""

from __future__ import annotations

from typing import Callable, Collection, NamedTuple, Optional

from kuryr_break0 import model

Claims = tuple[model.Record, ...]


class Addition(NamedTuple):
    """The claims on an address after another claim was added.

    :ivar after: all claims, the new one first
    :ivar rivals: earlier claims of other interfaces, without gone claims
    """

    after: Claims
    rivals: Claims


class Transition(NamedTuple):
    """A change of the claims on an address.

    :ivar before: all claims before the change, the newest first
    :ivar after: all claims after it
    """

    before: Claims
    after: Claims

    @property
    def is_handed_over(self) -> bool:
        """Return whether the address passes to another interface."""
        return bool(self.before) and not is_of_same_interface(
            self.before[0], self.after[0])


def split(claims: Collection[model.Record],
          is_gone: Callable[[model.Record], bool]) -> tuple[Claims, Claims]:
    """Return the remaining claims and the gone claims, each in order.

    :param is_gone: returns whether a claim is gone, for example because its
        sandbox no longer exists
    """
    gone = tuple(claim for claim in claims if is_gone(claim))
    return tuple(claim for claim in claims if claim not in gone), gone


def add(record: model.Record, claims: Claims,
        is_gone: Callable[[model.Record], bool]) -> Addition:
    """Add a claim, which replaces the earlier claims of its interface.

    If the owner of the claim already has a newer claim, nothing changes: the
    runtime has abandoned this bind and started another one.
    """
    if any(claim.owner == record.owner and claim.bound_at > record.bound_at
           for claim in claims):
        return Addition(claims, ())
    of_others = [claim for claim in claims
                 if not is_of_same_interface(claim, record)]
    rivals, _ = split(of_others, is_gone)
    # Drop a claim that has neither a namespace nor a macvtap, because the end
    # of its sandbox could never be proven.
    kept = tuple(claim for claim in rivals if claim.namespace or claim.tap)
    return Addition((record, *kept), rivals)


def is_of_same_interface(claim: model.Record, record: model.Record) -> bool:
    """Return whether a claim is an earlier claim of the same interface.

    If a claim was discovered or rebuilt, this program has invented the
    container id, and the container's engine passes another id to a later
    bind. So for such a claim, the function compares the namespace and the name
    of the interface instead.
    """
    return claim.owner == record.owner or (
        (claim.origin is model.Origin.DISCOVERED or claim.is_rebuilt)
        and claim.owner.ifname == record.owner.ifname
        and claim.namespace is not None
        and claim.namespace == record.namespace)


def is_own(claim: model.Record, owner: model.Owner,
           namespace: Optional[model.NamespaceId], mac: Optional[str],
           bound_at: Optional[float] = None) -> bool:
    """Return whether an unbind for an owner drops a claim.

    If a claim has an owner from :meth:`Owner.adopted`, its container id is
    unknown. The namespace alone does not identify the container: a runtime can
    reuse the path for a new container, and then repeat the DEL of the earlier
    container. So for such a claim, the function also compares the MAC address.

    :param namespace: the namespace of the sandbox, if it exists
    :param mac: MAC address of its interface; None if unknown
    :param bound_at: the time of the bind to undo; None for any bind
    """
    if bound_at is not None and claim.bound_at != bound_at:
        return False
    return claim.owner == owner or (
        namespace is not None and mac is not None and claim.mac == mac
        and claim.owner in (
            model.Owner.adopted(namespace, owner.ifname),
            model.Owner.adopted(namespace._replace(cookie=None),
                                owner.ifname)))


def can_own_items(claims: Collection[model.Record],
                  mac: Optional[str]) -> bool:
    """Return whether the route and the neighbour can belong to the claims.

    If the result is False, the items belong to an unrecorded pod or to another
    ledger. A claim without a MAC address can own any items.

    :param mac: MAC address of the permanent neighbour of the address; None
        if it has no such neighbour
    """
    return mac is None or any(claim.mac is None or mac in claim.macs
                              for claim in claims)
