# SPDX-License-Identifier: Apache-2.0

"""Checks addresses, and the routes and neighbours of the node for them."""

from __future__ import annotations

import contextlib
from typing import Collection, Iterator

from kuryr_break0.doctor.findings import Finding
from kuryr_break0.doctor.findings import KINDS
from kuryr_break0.doctor.node import Node
from kuryr_break0 import kernel
from kuryr_break0.model import address_order
from kuryr_break0.model import HostRoute
from kuryr_break0.model import IPAddress
from kuryr_break0.snapshot import Parent

#: Where ip(8) has the names of protocols.
_PROTOCOLS = tuple(directory + '/iproute2/rt_protos' for directory in (
    '/etc', '/usr/share', '/usr/lib'))


def check_addresses(node: Node) -> Iterator[Finding]:
    """Look for addresses that cannot be those of pods of this node."""
    refused = {address: node.seen.refused[address]
               for address in node.settled(node.seen.refused)}
    not_allowed = [address for address, reason in refused.items()
                   if 'allowed_cidrs' in reason]
    if not_allowed:
        yield KINDS['address-not-allowed'].found(
            'addresses of pods are outside [break0] allowed_cidrs',
            not_allowed)
    others = [address for address in refused if address not in not_allowed]
    if others:
        yield KINDS['address-refused'].found(
            'the address of a pod is ' + refused[others[0]], others)
    contested = node.settled(node.seen.rivals)
    if contested:
        first = contested[0]
        yield KINDS['address-contested'].found(
            '%s is claimed by %s and by %s, and all of them exist' % (
                first, node.live[first].owner, ', '.join(
                    str(each.owner) for each in node.seen.rivals[first])),
            contested)


def check_sources(node: Node, parent: Parent) -> Iterator[Finding]:
    """Look whether the node has an address to send from."""
    own = {address.version for address in node.seen.own
           if not (address.is_link_local or address.is_loopback)}
    without = node.settled(address for address in parent.live
                           if address.version not in own)
    if without:
        yield KINDS['node-address-missing'].found(
            'the node has no IPv%d address' % without[0].version, without,
            parent=parent.name)


def check_routes(node: Node, parent: Parent) -> Iterator[Finding]:
    """Compare the routes with the entries."""
    plan, table = parent.plan, node.options.route_table
    foreign = {route.dst: route for route in plan.foreign}
    there = {route.dst: route for route in node.seen.routes.host
             if route.table == table}
    wanted = {route.dst: route for route in plan.replace}
    lost = node.settled(route.dst for route in plan.replace
                        if route.dst not in foreign)
    missing = [address for address in lost if address not in there]
    wrong = [address for address in lost if address in there]
    if missing:
        yield KINDS['route-missing'].found(
            'addresses of pods have no route through %s in table %d' % (
                parent.device, table), missing)
    if wrong:
        yield KINDS['route-wrong'].found(
            'routes of pods are not as they were set: that of %s has %s' % (
                wrong[0], _difference(there[wrong[0]], wanted[wrong[0]])),
            wrong)
    in_the_way = node.settled(foreign)
    if in_the_way:
        route = foreign[in_the_way[0]]
        yield KINDS['route-foreign'].found(
            'addresses of pods have a route that is not ours, on %s with '
            'protocol %s' % (kernel.name_of(route.oif),
                             _protocol(route.protocol)), in_the_way,
            commands=[*(_deletion(foreign[each]) for each in in_the_way),
                      'kuryr-break0 sync'])
    stale = sorted(node.unclaimed(parent, {
        item.dst for item in plan.unclaimed if item.dst in parent.routes}),
        key=address_order)
    if stale:
        yield KINDS['route-stale'].found(
            'there are routes through %s that no pod claims' % parent.device,
            stale)


def _difference(found: HostRoute, wanted: HostRoute) -> str:
    return ', '.join(
        '%s %s, not %s' % each for each in (
            ('the interface', kernel.name_of(found.oif),
             kernel.name_of(wanted.oif)),
            ('the protocol', found.protocol, wanted.protocol),
            ('the source', found.src, wanted.src),
            ('the metric', found.metric, wanted.metric))
        if each[1] != each[2]) or 'another scope'


def _deletion(route: HostRoute) -> str:
    """Return the command that deletes a route, and no other."""
    return 'ip %sroute del %s%s proto %s%s table %d' % (
        '-6 ' if route.dst.version == 6 else '', route.dst,
        ' dev ' + kernel.name_of(route.oif) if route.oif else '',
        _protocol(route.protocol),
        ' metric %d' % route.metric if route.metric else '', route.table)


def _protocol(number: int) -> str:
    """Return the name of a protocol, as ip(8) has it."""
    for path in _PROTOCOLS:
        with contextlib.suppress(OSError), open(path) as file:
            for fields in map(str.split, file):
                if fields[:1] in ([str(number)], [hex(number)]):
                    return fields[1]
    return str(number)


def usable(node: Node, parent: Parent) -> list[IPAddress]:
    """Return the addresses whose route is correct."""
    wrong = {route.dst for route in (*parent.plan.replace,
                                     *parent.plan.foreign)}
    return node.settled(address for address in parent.desired
                        if address not in wrong)


def check_use(parent: Parent, addresses: Collection[IPAddress]
              ) -> Iterator[Finding]:
    """Report pods whose routes are right, and not used."""
    astray = [address for address in addresses if address in parent.astray]
    if astray:
        through, get = parent.astray[astray[0]]
        yield KINDS['route-not-used'].found(
            'addresses of pods are not reached through %s but %s' % (
                parent.device, through), astray,
            get=get, address=astray[0], family='-%d' % astray[0].version)


def check_neighbours(node: Node, parent: Parent) -> Iterator[Finding]:
    """Compare the permanent neighbours on break0 with the entries."""
    name, known = parent.device, parent.neighbours
    # Who has marked one changes nothing of where packets go.
    macs = {each.dst: each.mac for each in parent.plan.learn
            if each.dst not in known or known[each.dst].mac != each.mac}
    missing = [each for each in node.settled(macs) if each not in known]
    wrong = [each for each in node.settled(macs) if each in known]
    if missing:
        yield KINDS['neighbour-missing'].found(
            'addresses of pods have no permanent neighbour entry on %s' %
            name, missing)
    if wrong:
        yield KINDS['neighbour-wrong'].found(
            'the neighbour entry of %s on %s is %s, but its pod has %s' % (
                wrong[0], name, known[wrong[0]].mac, macs[wrong[0]]), wrong)
    stale = node.unclaimed(parent, (
        item.dst for item in parent.plan.unclaimed
        if item.dst not in parent.routes))
    if stale:
        yield KINDS['neighbour-stale'].found(
            'there are neighbour entries on %s that no pod claims' % name,
            stale)
