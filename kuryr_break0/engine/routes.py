# SPDX-License-Identifier: Apache-2.0

"""Checks for foreign routes, and deletes conntrack entries."""

from __future__ import annotations

from typing import Iterable

from kuryr_break0.engine.plan import compute
from kuryr_break0 import exceptions
from kuryr_break0 import kernel
from kuryr_break0 import log
from kuryr_break0 import model

LOG = log.get_logger(__name__)


def require_free(route: model.HostRoute,
                 present: Iterable[model.HostRoute]) -> None:
    """Refuse a route that would override a foreign route.

    :param route: the route to set
    :param present: routes to the same address
    :raises ForeignRoute: if a foreign route conflicts with the route to set
    """
    plan = compute({route.dst: (route,)}, present,
                   device=route.oif or 0, protocol=route.protocol)
    if not plan.set and plan.foreign:
        raise foreign_route(plan.foreign[0])


def foreign_route(route: model.HostRoute) -> exceptions.ForeignRoute:
    """Return the error for a foreign route that blocks a pod's route."""
    return exceptions.ForeignRoute(
        address=route.dst, on=kernel.format_ifname(route.oif),
        protocol=route.protocol)


def delete_connections(addresses: Iterable[model.IPAddress]) -> None:
    """Delete the conntrack entries of addresses.

    The next pod with an address must not inherit its connections. An error of
    the kernel is only logged.
    """
    for address in addresses:
        try:
            kernel.delete_connections(address)
        except exceptions.KernelRefused as err:
            LOG.debug('%s', err)
