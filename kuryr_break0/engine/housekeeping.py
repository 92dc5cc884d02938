# SPDX-License-Identifier: Apache-2.0

"""Maintains a node without an agent, in a short run at each ADD and DEL.

If a pod is already deleted in the API, Kuryr does not pass its DEL to the
driver. Other programs may delete routes. While an agent is alive, housekeeping
does nothing, because the agent syncs.
"""

from __future__ import annotations

from typing import Callable

from kuryr_break0.break0.devices import Devices
from kuryr_break0 import config
from kuryr_break0.engine import transaction
from kuryr_break0.engine import transitions
from kuryr_break0 import failures
from kuryr_break0 import kernel
from kuryr_break0.ledger import Ledger
from kuryr_break0 import log

LOG = log.get_logger(__name__)

#: Number of addresses that one run examines for ended sandboxes. By default,
#: kubelet allows 110 pods.
EXAMINED = 128


def run(options: config.Options, ledger: Ledger, engine: transitions.Engine,
        sync: Callable[[], object]) -> None:
    """Unbind ended sandboxes and repair lost routes, unless an agent is alive.

    The duration does not depend on the number of pods, except for listing the
    names of all records and for the work of :func:`_repair`.

    :param sync: a function that reconciles the whole node
    :raises Break0Error: the first error
    """
    age = ledger.heartbeat.age()
    if age is not None and age <= options.patience:
        return
    failure = failures.Failures()
    with failure.collect():
        _prune(ledger, engine, failure)
    with failure.collect():
        _repair(ledger, engine.devices, sync)
    failure.raise_first()


def _prune(ledger: Ledger, engine: transitions.Engine,
           failure: failures.Failures) -> None:
    """Examine EXAMINED addresses, and drop claims of ended sandboxes.

    The next run continues after the last examined address.
    """
    position = ledger.cache.get_number('pruned')
    addresses, count = ledger.records.list_part(position, EXAMINED)
    if count > EXAMINED:
        ledger.cache.put('pruned', [(position + EXAMINED) % count])
    judge = kernel.Judge()
    gone = [address for address in addresses
            if ledger.records.may_be_gone(address, judge)]
    if gone:
        engine.remove_gone(gone, failure)


def _repair(ledger: Ledger, devices: Devices,
            sync: Callable[[], object]) -> None:
    """Sync if routes were lost or the addresses of the node have changed.

    Counting 1,000 routes takes about 1 ms. The cache keeps the number of
    routes that are still missing after a sync. Only a greater number causes
    the next sync.
    """
    cache = ledger.cache
    expected = cache.get_number('missing_routes')
    missing = _count_missing(ledger, devices)
    if missing > expected:
        LOG.warning('%d addresses have no route through break0: repairing',
                    missing)
    with kernel.Netlink() as netlink:
        own = sorted('%d %s' % each for each in netlink.addresses()
                     if not each.address.is_link_local)
    recorded = cache.get('own_addresses')
    if missing > expected or recorded not in (None, own):
        sync()
        missing = _count_missing(ledger, devices)
    if missing != expected:
        cache.put('missing_routes', [missing])
    if own != recorded:
        cache.put('own_addresses', own)


def _count_missing(ledger: Ledger, devices: Devices) -> int:
    # A bind writes a record before its route, so count under the lock.
    with transaction.begin(ledger):
        return ledger.records.count() - devices.count_routes(devices.names())
