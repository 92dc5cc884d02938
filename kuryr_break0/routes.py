# SPDX-License-Identifier: Apache-2.0

"""Sets neighbour and route of one address, where nothing is in the way.

They are added as if nothing was there. What the kernel has already is read
then, and compared: a route of others stays, unless it may be taken over.
"""

from __future__ import annotations

import contextlib
import errno
from typing import Iterable, Optional

from kuryr_break0 import config
from kuryr_break0.devices import Break0
from kuryr_break0.devices import Devices
from kuryr_break0 import exceptions
from kuryr_break0 import kernel
from kuryr_break0.kernel import Verb
from kuryr_break0.ledger import files
from kuryr_break0.ledger.journal import Done
from kuryr_break0.ledger import Ledger
from kuryr_break0 import log
from kuryr_break0.model import best_metric
from kuryr_break0.model import HostRoute
from kuryr_break0.model import IPAddress
from kuryr_break0.model import Neighbour
from kuryr_break0.model import Record
from kuryr_break0.model import Wanted
from kuryr_break0.plan import compute
from kuryr_break0.policy import Policy

LOG = log.get_logger(__name__)

#: Seconds within which a route that was taken over is not taken again.
TRUCE = 60


class Routes:
    """Adds what addresses must have."""

    def __init__(self, options: config.Options, ledger: Ledger,
                 devices: Devices) -> None:
        self._options = options
        self._policy = Policy(options)
        self._ledger = ledger
        self._devices = devices

    def add(self, netlink: kernel.Netlink, record: Record, wanted: Wanted,
            present: Optional[HostRoute], break0: Break0) -> None:
        """Add neighbour and route, where nothing is in the way.

        :param present: the route that was in use, which is known to be free
        """
        err = self._add_exclusively(netlink, wanted)
        if err is not None and err.device_lost:
            # break0 is down, or has just gone.
            self._devices.renew(netlink, break0, record.parent)
            wanted = self._policy.wanted(record, break0.name, break0.index,
                                         wanted.route.src) or wanted
            err = self._add_exclusively(netlink, wanted)
        if err is not None and err.errno == errno.EEXIST:
            self._replace(netlink, wanted, present)
        elif err is not None:
            raise err

    @staticmethod
    def _add_exclusively(netlink: kernel.Netlink, wanted: Wanted
                         ) -> Optional[exceptions.KernelRefused]:
        changes: list[kernel.Change] = [(Verb.ADD, wanted.route)]
        if wanted.neighbour is not None:
            # Before the route, or it might be asked for on the wire.
            changes.insert(0, (Verb.REPLACE, wanted.neighbour))
        *others, err = netlink.change(changes)
        for other in others:
            if other is not None and not other.device_lost:
                LOG.error('%s', other)
        return err

    def require_free(self, wanted: Wanted,
                     in_the_way: Iterable[HostRoute]) -> None:
        """Refuse to override a route of others, or take it over.

        :raises ForeignRoute: if it stays
        """
        route = wanted.route
        plan = compute({route.dst: wanted}, in_the_way,
                       device=route.oif or 0, protocol=route.protocol,
                       takeover=self._options.takeover)
        if not plan.replace and plan.foreign:
            raise foreign_route(plan.foreign[0])
        for foreign in plan.foreign:
            self.take_over(foreign)

    def _replace(self, netlink: kernel.Netlink, wanted: Wanted,
                 present: Optional[HostRoute]) -> None:
        """Set a route in place of what is there, if that may be."""
        route = wanted.route
        if present is None or (present.table, present.metric) != (
                route.table, route.metric):
            # One that is not the one in use is only to be seen in a dump.
            self.require_free(wanted, [
                each for each in netlink.routes().host
                if each.dst == route.dst])
        changes: list[kernel.Change] = [(Verb.REPLACE, route)]
        if wanted.neighbour is None:
            # It was an earlier pod's, which had another MAC address.
            changes.append((Verb.DELETE, Neighbour(
                route.dst, route.oif or 0, '', None)))
        err = netlink.change(changes)[0]
        if err is not None:
            raise err

    def take_over(self, route: HostRoute) -> None:
        """Note that a route of others is about to be replaced or overridden.

        :raises ForeignRoute: if it has just been replaced already
        """
        now = files.now()
        recent = {}
        with contextlib.suppress(TypeError, ValueError):
            recent = {str(address): float(when) for address, when
                      in self._ledger.cache.get('takeovers', TRUCE) or ()
                      if 0 <= now - float(when) < TRUCE}
        if str(route.dst) in recent:
            if route.metric != best_metric(route.dst):
                return  # it was not set again, but has stayed beside ours
            raise foreign_route(
                route, 'somebody has set it again after it was taken over, '
                'so it is left alone for a minute')
        recent[str(route.dst)] = now
        self._ledger.cache.put('takeovers', sorted(recent.items()))
        LOG.warning('Taking over the route of %s on %s with protocol %s',
                    route.dst, kernel.name_of(route.oif), route.protocol)
        self._ledger.journal.add(Done.TAKEOVER)


def foreign_route(route: HostRoute, reason: str = 'it is left alone, unless '
                  '[break0] takeover is set') -> exceptions.ForeignRoute:
    """Return the error of a route of others in the way of a pod's."""
    return exceptions.ForeignRoute(
        address=route.dst, on=kernel.name_of(route.oif),
        protocol=route.protocol, reason=reason)


def forget_connections(addresses: Iterable[IPAddress]) -> None:
    """Let none of an earlier pod's connections be the next one's."""
    for address in addresses:
        try:
            kernel.forget_connections(address)
        except exceptions.KernelRefused as err:
            LOG.debug('%s', err)
