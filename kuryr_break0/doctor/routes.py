# SPDX-License-Identifier: Apache-2.0

"""Checks routes and neighbours that the node has for its pods."""

from __future__ import annotations

import contextlib
from typing import Iterator, Optional, Sequence, TypeVar

from kuryr_break0.doctor import findings
from kuryr_break0.doctor.findings import Finding
from kuryr_break0.doctor.node import Node
from kuryr_break0.doctor.node import ParentView
from kuryr_break0 import kernel
from kuryr_break0.model import address_order
from kuryr_break0.model import HostRoute
from kuryr_break0.model import IPAddress

#: Addresses for which the kernel is asked what it would use. Each costs up
#: to two requests, about a millisecond in all.
LOOKED_UP = 128

#: Where ip(8) has the names of protocols.
_PROTOCOLS = tuple(directory + '/iproute2/rt_protos' for directory in (
    '/etc', '/usr/share', '/usr/lib'))

_T = TypeVar('_T')


def sample(items: Sequence[_T], size: int) -> list[_T]:
    """So many of a sequence at most, evenly over all of it."""
    if len(items) <= size:
        return list(items)
    return [items[number * len(items) // size] for number in range(size)]


def check_addresses(node: Node) -> Iterator[Finding]:
    """Look for addresses that cannot be those of pods of this node."""
    refused = {address: reason for address, reason in node.seen.refused.items()
               if address not in node.changing}
    not_allowed = [address for address, reason in refused.items()
                   if 'allowed_cidrs' in reason]
    if not_allowed:
        yield findings.ADDRESS_NOT_ALLOWED.found(
            'addresses of pods are outside [break0] allowed_cidrs',
            not_allowed)
    others = {address: reason for address, reason in refused.items()
              if address not in not_allowed}
    if others:
        yield findings.ADDRESS_REFUSED.found(
            'the address of a pod is ' + next(iter(others.values())), others)
    rivals = node.seen.rivals
    contested = node.settled(iter(rivals))
    if contested:
        first = contested[0]
        yield findings.ADDRESS_CONTESTED.found(
            '%s is claimed by %s and by %s, and all of them exist' % (
                first, node.live[first].owner,
                ', '.join(str(each.owner) for each in rivals[first])),
            contested)


def check_sources(view: ParentView) -> Iterator[Finding]:
    """Look whether the node has an address to send from."""
    own = {address.version for address in view.node.seen.own
           if not (address.is_link_local or address.is_loopback)}
    without = view.settled(address for address in view.live
                           if address.version not in own)
    if without:
        yield findings.NODE_ADDRESS_MISSING.found(
            'the node has no IPv%d address' % without[0].version, without,
            parent=view.parent_name)


def check_routes(view: ParentView) -> Iterator[Finding]:
    """Compare the routes with the entries."""
    options, plan = view.options, view.plan
    foreign = {route.dst: route for route in plan.foreign}
    there = {route.dst for route in view.node.seen.routes.host
             if route.table == options.route_table}
    lost = view.settled(route.dst for route in plan.replace
                        if route.dst not in foreign)
    missing = [address for address in lost if address not in there]
    wrong = [address for address in lost if address in there]
    if missing:
        yield findings.ROUTE_MISSING.found(
            'addresses of pods have no route through %s in table %d' % (
                view.name, options.route_table), missing)
    if wrong:
        yield findings.ROUTE_WRONG.found(
            'routes of pods are not as they were set', wrong)
    in_the_way = view.settled(iter(foreign))
    if in_the_way:
        route = foreign[in_the_way[0]]
        yield findings.ROUTE_FOREIGN.found(
            'addresses of pods have a route that is not ours, on %s with '
            'protocol %s' % (kernel.name_of(route.oif),
                             _protocol(route.protocol)), in_the_way,
            commands=[*(_deletion(foreign[each]) for each in in_the_way),
                      'kuryr-break0 sync'])
    stale = sorted({item.dst for item in plan.unclaimed
                    if item.dst in view.routes
                    and view.unclaimed(item.dst)
                    and view.seen.other is None}, key=address_order)
    if stale:
        yield findings.ROUTE_STALE.found(
            'there are routes through %s that no pod claims' %
            view.name, stale, address=stale[0], device=view.name,
            protocol=options.route_protocol, table=options.route_table)


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


def check_use(view: ParentView, netlink: kernel.Netlink,
              addresses: Sequence[IPAddress]) -> Iterator[Finding]:
    """Ask the kernel what it would use to reach pods whose routes are right.

    For what the node sends of itself, and for its answers, whose source
    address is set already.
    """
    astray: dict[IPAddress, str] = {}
    asked: dict[IPAddress, str] = {}
    vrf = view.link.vrf.ifindex if view.link and view.link.vrf else 0
    for address in addresses:
        src = view.desired[address].route.src
        for source in ((None,) if src is None else (None, src)):
            way = netlink.lookup(address, source, vrf)
            if way is None or way.oif != view.index:
                astray.setdefault(address, _way(way))
                asked.setdefault(address, '%s%s%s' % (
                    address, ' from %s' % source if source else '',
                    ' vrf ' + kernel.name_of(vrf) if vrf else ''))
    if astray:
        view.refresh()
    astray = {address: astray[address] for address in
              view.settled(iter(astray))}
    if astray:
        yield findings.ROUTE_NOT_USED.found(
            'addresses of pods are not reached through %s but %s; %d were '
            'looked up' % (view.name, next(iter(astray.values())),
                           len(addresses)), astray,
            get=asked[next(iter(astray))])


def _way(way: Optional[kernel.Route]) -> str:
    if way is None:
        return 'not at all'
    return 'through %s, by table %d' % (kernel.name_of(way.oif), way.table)


def usable(view: ParentView) -> list[IPAddress]:
    """Return the addresses whose route is correct."""
    wrong = {route.dst for route in (*view.plan.replace, *view.plan.foreign)}
    return view.settled(address for address in view.desired
                        if address not in wrong)


def check_neighbours(view: ParentView) -> Iterator[Finding]:
    """Compare the permanent neighbours on break0 with the entries."""
    name, known = view.name, view.neighbours
    learn = view.settled(neighbour.dst for neighbour in view.plan.learn)
    missing = [address for address in learn if address not in known]
    # Who has marked it changes nothing of where packets go.
    macs = {neighbour.dst: neighbour.mac for neighbour in view.plan.learn}
    wrong = [address for address in learn
             if address in known and known[address].mac != macs[address]]
    if missing:
        yield findings.NEIGHBOUR_MISSING.found(
            'addresses of pods have no permanent neighbour entry on %s' %
            name, missing)
    if wrong:
        yield findings.NEIGHBOUR_WRONG.found(
            'the neighbour entry of %s on %s is %s, but its pod has %s' % (
                wrong[0], name, known[wrong[0]].mac, macs[wrong[0]]), wrong)
    stale = [item.dst for item in view.plan.unclaimed
             if item.dst not in view.routes and view.unclaimed(item.dst)
             and view.seen.other is None]
    if stale:
        yield findings.NEIGHBOUR_STALE.found(
            'there are neighbour entries on %s that no pod claims' % name,
            stale, address=stale[0], device=name)
