# SPDX-License-Identifier: Apache-2.0

"""Decides whether our route may replace or override a foreign one."""

from __future__ import annotations

import contextlib
from typing import Iterable

from kuryr_break0 import config
from kuryr_break0 import exceptions
from kuryr_break0 import kernel
from kuryr_break0.ledger import files
from kuryr_break0.ledger.journal import Done
from kuryr_break0.ledger import Ledger
from kuryr_break0 import log
from kuryr_break0.model import best_metric
from kuryr_break0.model import HostRoute
from kuryr_break0.model import IPAddress
from kuryr_break0.plan import compute

LOG = log.get_logger(__name__)

#: Seconds after a takeover in which the same address is not taken over again.
TRUCE = 60


class Routes:
    """The foreign routes that conflict with routes of pods."""

    def __init__(self, options: config.Options, ledger: Ledger) -> None:
        self._options = options
        self._ledger = ledger

    def require_free(self, route: HostRoute,
                     present: Iterable[HostRoute]) -> None:
        """Refuse to override a route of others, or take it over.

        :param route: the route to set
        :raises ForeignRoute: if it stays
        """
        plan = compute({route.dst: (route,)}, present,
                       device=route.oif or 0, protocol=route.protocol,
                       takeover=self._options.takeover)
        if not plan.set and plan.foreign:
            raise foreign_route(plan.foreign[0])
        for foreign in plan.foreign:
            self.take_over(foreign)

    def take_over(self, route: HostRoute) -> None:
        """Log and count the takeover of a foreign route.

        The caller sets our route after this call.

        :raises ForeignRoute: if another program has set the route again within
            TRUCE after its takeover
        """
        now = files.now()
        recent = {}
        with contextlib.suppress(TypeError, ValueError):
            recent = {str(address): float(when) for address, when
                      in self._ledger.cache.get('takeovers', TRUCE) or ()
                      if 0 <= now - float(when) < TRUCE}
        if str(route.dst) in recent:
            if route.metric != best_metric(route.dst):
                return  # our route has overridden it, and it still exists
            raise foreign_route(
                route, 'somebody has set it again after it was taken over, '
                'so it is left alone for a minute')
        recent[str(route.dst)] = now
        self._ledger.cache.put('takeovers', sorted(recent.items()))
        LOG.warning('Taking over the route of %s on %s with protocol %s',
                    route.dst, kernel.format_ifname(route.oif), route.protocol)
        self._ledger.journal.add(Done.TAKEOVER)


def foreign_route(route: HostRoute, reason: str = 'it is left alone, unless '
                  '[break0] takeover is set') -> exceptions.ForeignRoute:
    """Return the error of a foreign route that conflicts with a pod's."""
    return exceptions.ForeignRoute(
        address=route.dst, on=kernel.format_ifname(route.oif),
        protocol=route.protocol, reason=reason)


def delete_connections(addresses: Iterable[IPAddress]) -> None:
    """Delete the tracked connections of addresses.

    The next pod with the address must not inherit them. An error of the kernel
    is only logged.
    """
    for address in addresses:
        try:
            kernel.delete_connections(address)
        except exceptions.KernelRefused as err:
            LOG.debug('%s', err)
