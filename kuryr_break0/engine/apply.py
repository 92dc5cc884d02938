# SPDX-License-Identifier: Apache-2.0

"""Sets and deletes the guard entries, neighbours and routes of addresses.

Bind, unbind, sync and cleanup use this module, and no other module changes
these items. :func:`apply` changes guard entries first. It sets a neighbour
before its route, and deletes a route before its neighbour: with a route but
without the neighbour, the kernel would ask the LAN for the MAC address of the
pod.
"""

from __future__ import annotations

import collections
from typing import Collection, Iterator, NamedTuple, Optional

from kuryr_break0.break0.guard import Guard
from kuryr_break0 import exceptions
from kuryr_break0 import kernel
from kuryr_break0.kernel import Verb
from kuryr_break0.ledger.journal import Done
from kuryr_break0.ledger.journal import Journal
from kuryr_break0 import log
from kuryr_break0 import model

LOG = log.get_logger(__name__)


class Work(NamedTuple):
    """The changes of the items of one address on a break0.

    :ivar set: the items to set
    :ivar unset: the items to delete; a missing item is no error
    :ivar claim: the claim that the items are for; None if no record claims
        the address
    :ivar is_new: if True, an existing route causes the error EEXIST, and is
        not replaced
    """

    address: model.IPAddress
    set: tuple[model.Item, ...] = ()
    unset: tuple[model.Item, ...] = ()
    claim: Optional[model.Record] = None
    is_new: bool = False


class Applied(NamedTuple):
    """The result of :func:`apply`.

    :ivar works: all works, including failed ones
    :ivar items: the items that were set or deleted
    :ivar errors: the first error of each address that failed
    :ivar guard_error: the error of changing the guard entries, which applies
        to all works; None without an error
    """

    works: Collection[Work]
    items: set[model.Item]
    errors: dict[model.IPAddress, exceptions.KernelRefused]
    guard_error: Optional[exceptions.Break0Error]

    @property
    def is_device_lost(self) -> bool:
        """Return whether break0 was down or gone."""
        return any(err.is_device_lost for err in self.errors.values())


def apply(netlink: kernel.Netlink, guard: Guard,
          works: Collection[Work]) -> Applied:
    """Set and delete the items of addresses.

    The caller holds the lock of the ledger. An error of one address does not
    affect the other addresses.

    :param guard: the guard of the break0 that has the items
    """
    applied = Applied(works, set(), {}, None)
    added = [pair for work in works
             for pair in model.of_kind(model.Pair, work.set)]
    deleted = [pair for work in works
               for pair in model.of_kind(model.Pair, work.unset)]
    try:
        if guard.change(added, deleted):
            applied.items.update(added, deleted)
    except (exceptions.KernelRefused,
            exceptions.GuardUnavailable) as guard_error:
        applied = applied._replace(guard_error=guard_error)
    changes = [(work, change) for work in works for change in _changes(work)]
    for (work, (verb, item)), err in zip(changes, netlink.change(
            [change for _, change in changes])):
        if err is None:
            applied.items.add(item)
        elif not (verb is Verb.DELETE and err.is_absent):
            applied.errors.setdefault(work.address, err)
    return applied


def _changes(work: Work) -> Iterator[kernel.Change]:
    """Yield the changes of routes and neighbours, in the order to apply."""
    for neighbour in model.of_kind(model.Neighbour, work.set):
        yield Verb.REPLACE, neighbour
    for route in model.of_kind(model.HostRoute, work.set):
        yield Verb.ADD if work.is_new else Verb.REPLACE, route
    for route in model.of_kind(model.HostRoute, work.unset):
        yield Verb.DELETE, route
    for neighbour in model.of_kind(model.Neighbour, work.unset):
        yield Verb.DELETE, neighbour


def log_repairs(device: str, applied: Applied, journal: Journal) -> None:
    """Log and count the routes and neighbours that a sync changed.

    A route and its neighbour share one log line. The caller logs the guard
    entries, in one line for the whole break0.
    """
    repaired: collections.Counter[Done] = collections.Counter()
    for work in applied.works:
        changed = [('Set' if item in work.set else 'Deleted',
                    isinstance(item, model.HostRoute))
                   for item in (*work.set, *work.unset)
                   if item in applied.items
                   and not isinstance(item, model.Pair)]
        has_route = any(is_route for _, is_route in changed)
        for verb, is_route in changed:
            if is_route or not has_route:
                LOG.info('%s the %s of %s on %s%s', verb,
                         'route' if is_route else 'neighbour', work.address,
                         device, ' for ' + work.claim.owner_text
                         if work.claim else ', which no record claims')
            repaired[Done.UNCLAIMED if work.claim is None else
                     Done.ROUTE if is_route else Done.NEIGHBOUR] += 1
    for reason, times in repaired.items():
        journal.add(reason, times=times)
