# SPDX-License-Identifier: Apache-2.0

"""Checks of addresses, and of the node's routes and neighbours for them."""

from __future__ import annotations

import contextlib
from typing import Collection, Iterator

from kuryr_break0.doctor.findings import Finding
from kuryr_break0.doctor.findings import KINDS
from kuryr_break0.doctor.host import Host
from kuryr_break0.doctor.node import Node
from kuryr_break0.doctor.unserved import with_networks
from kuryr_break0 import kernel
from kuryr_break0.model import address_order
from kuryr_break0.model import HostRoute
from kuryr_break0.model import IPAddress
from kuryr_break0.model import Neighbour
from kuryr_break0.model import of_kind
from kuryr_break0.snapshot import Parent

#: Files with the names of routing protocols, for ip(8).
_PROTOCOLS = tuple(directory + '/iproute2/rt_protos' for directory in (
    '/etc', '/usr/share', '/usr/lib'))


def check_addresses(node: Node, host: Host) -> Iterator[Finding]:
    """Report refused addresses, and addresses with several owners."""
    refused = list(node.settled(node.seen.refused))
    outside = [address for address in refused
               if 'outside [break0] allowed_cidrs' in
               node.seen.refused[address]]
    allow = host.set(allowed_cidrs=with_networks(
        outside, node.options)) if outside else []
    for address in refused:
        reason = node.seen.refused[address]
        yield KINDS['address-not-allowed' if 'allowed_cidrs' in reason
                    else 'address-refused'].found(
            'the address %s of the pod %s is refused: it is %s' % (
                address, node.live[address].owner_text, reason)
            if address in node.live else
            'the address %s of a pod is refused: it is %s' % (
                address, reason), [address],
            commands=allow if address in outside else ())
    for address in node.settled(node.seen.rivals):
        yield KINDS['address-contested'].found(
            'the existing sandboxes %s claim %s' % (
                ' and '.join(each.owner_text for each in (
                    node.live[address], *node.seen.rivals[address])),
                address),
            [address])


def check(node: Node, parent: Parent) -> Iterator[Finding]:
    """Compare the routes and neighbours of a break0 with the records."""
    own = {address.version for address in node.seen.facts.own
           if not (address.is_link_local or address.is_loopback)}
    for address in node.settled(parent.live):
        if address.version not in own:
            yield KINDS['node-address-missing'].found(
                'the node has no IPv%d address' % address.version, [address],
                parent=parent.name)
    yield from _check_routes(node, parent)
    yield from _check_neighbours(node, parent)
    # Entries without a record may have one in the ledger that owns break0, or
    # belong to a bind that is not complete.
    is_known = parent.other is None and node.seen.is_steady
    for address in node.settled(sorted({
            item.dst for item in parent.plan.unclaimed if is_known},
            key=address_order)):
        kind, what = (('route-stale', 'routes through')
                      if address in parent.routes
                      else ('neighbour-stale', 'neighbours on'))
        yield KINDS[kind].found('there are %s %s without a record' % (
            what, parent.device), [address])


def _check_routes(node: Node, parent: Parent) -> Iterator[Finding]:
    plan, table = parent.plan, node.options.route_table
    foreign = {route.dst: route for route in plan.foreign}
    there = {route.dst: route for route in node.seen.routes.host
             if route.table == table}
    wanted = {route.dst: route for route in of_kind(HostRoute, plan.set)
              if route.dst not in foreign}
    for address in node.settled(wanted):
        if address not in there:
            yield KINDS['route-missing'].found(
                'addresses of pods have no route through %s in table %d' % (
                    parent.device, table), [address])
        else:
            yield KINDS['route-wrong'].found(
                'routes of pods have changed: the route of %s has %s' % (
                    address, _difference(there[address], wanted[address])),
                [address])
    for address in node.settled(foreign):
        route = foreign[address]
        yield KINDS['route-foreign'].found(
            'addresses of pods have a route of another program, through %s '
            'with protocol %s' % (kernel.format_ifname(route.oif),
                                  _protocol(route.protocol)), [address],
            commands=[_deletion(route), 'kuryr-break0 sync'])


def _check_neighbours(node: Node, parent: Parent) -> Iterator[Finding]:
    name, known = parent.device, parent.neighbours
    wanted = {each.dst: each.mac
              for each in of_kind(Neighbour, parent.plan.set)}
    for address in node.settled(wanted):
        if address not in known:
            yield KINDS['neighbour-missing'].found(
                'addresses of pods have no permanent neighbour on %s' % name,
                [address])
        # The protocol of a neighbour does not matter for traffic.
        elif known[address].mac != wanted[address]:
            yield KINDS['neighbour-wrong'].found(
                'the neighbour %s on %s has the MAC address %s, but the pod '
                'has %s' % (address, name, known[address].mac,
                            wanted[address]),
                [address])


def _difference(found: HostRoute, wanted: HostRoute) -> str:
    return ', '.join(
        '%s %s, not %s' % each for each in (
            ('the interface', kernel.format_ifname(found.oif),
             kernel.format_ifname(wanted.oif)),
            ('the protocol', found.protocol, wanted.protocol),
            ('the source', found.src, wanted.src),
            ('the metric', found.metric, wanted.metric))
        if each[1] != each[2]) or 'another scope, an MTU or an encapsulation'


def _deletion(route: HostRoute) -> str:
    """Return a command that deletes exactly this route."""
    return 'ip %sroute del %s%s proto %s%s table %d' % (
        '-6 ' if route.dst.version == 6 else '', route.dst,
        ' dev ' + kernel.format_ifname(route.oif) if route.oif else '',
        _protocol(route.protocol),
        ' metric %d' % route.metric if route.metric else '', route.table)


def _protocol(number: int) -> str:
    """Return the name of a routing protocol for ip(8), or its number."""
    for path in _PROTOCOLS:
        with contextlib.suppress(OSError), open(path) as file:
            for fields in map(str.split, file):
                if fields[:1] in ([str(number)], [hex(number)]):
                    return fields[1]
    return str(number)


def usable(node: Node, parent: Parent) -> list[IPAddress]:
    """Return the addresses with a correct route."""
    wrong = {route.dst for route in of_kind(HostRoute, (
        *parent.plan.set, *parent.plan.foreign))}
    return node.settled(address for address in parent.desired
                        if address not in wrong)


def check_use(parent: Parent, addresses: Collection[IPAddress]
              ) -> Iterator[Finding]:
    """Report addresses with a correct route that the kernel does not use."""
    astray = [address for address in addresses if address in parent.astray]
    if astray:
        through, get = parent.astray[astray[0]]
        yield KINDS['route-not-used'].found(
            'the kernel does not send to pods through %s, but through %s' % (
                parent.device, through), astray,
            get=get, address=astray[0], family='-%d' % astray[0].version)
