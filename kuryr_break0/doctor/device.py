# SPDX-License-Identifier: Apache-2.0

"""Checks of break0 and its parent."""

from __future__ import annotations

from typing import Collection, Iterator

from kuryr_break0 import config
from kuryr_break0 import device
from kuryr_break0.doctor.findings import ERROR
from kuryr_break0.doctor.findings import Finding
from kuryr_break0.doctor.findings import KINDS
from kuryr_break0.doctor.node import largest_sysctl
from kuryr_break0.doctor.node import Node
from kuryr_break0.guard import Guard
from kuryr_break0.guard import is_installed
from kuryr_break0.guard import NO_NFT
from kuryr_break0 import kernel
from kuryr_break0.ledger.identity import Ownership
from kuryr_break0.model import IPAddress
from kuryr_break0.model import of_kind
from kuryr_break0.model import Pair
from kuryr_break0.policy import Policy
from kuryr_break0.problems import guard_text
from kuryr_break0.snapshot import Parent

_ARP_FILTER = 'ipv4/conf/%s/arp_filter'


def check_use(node: Node, seen: Parent) -> Iterator[Finding]:
    """Report faults that make a break0 unusable, and all further checks."""
    yield from _check_options(node, seen) or _check_existence(node, seen)


def _check_options(node: Node, seen: Parent) -> list[Finding]:
    """Compare the parent of the pods with the options."""
    found: list[Finding] = []
    parent, table = seen.parent, node.options.route_table
    if seen.live and node.options.parent not in (None, seen.name):
        found.append(KINDS['parent-mismatch'].found(
            '[break0] parent is %s, but there are pods on %s' % (
                node.options.parent, seen.name), list(seen.live)))
    if seen.live and parent and parent.vrf and parent.vrf.table != table:
        found.append(KINDS['parent-vrf'].found(
            '%s is in %s, whose table is %d, but [break0] route_table is %d'
            % (parent.name, _vrf_of(parent), parent.vrf.table, table),
            table=parent.vrf.table))
    return found


def _check_existence(node: Node, seen: Parent) -> Iterator[Finding]:
    link, parent, name = seen.present, seen.parent, seen.device
    if parent is None:
        yield KINDS['parent-missing'].found(
            'there is no interface %s on this node, but %s' % (
                seen.name, 'pods are bound on it' if seen.live
                else '[break0] parent names it'))
    elif link is None:
        if seen.live:
            yield KINDS['break0-missing'].found(
                'there is no interface %s, but %d addresses are bound' % (
                    name, len(seen.live)))
    elif (link.kind, link.mode) != ('macvlan', 'bridge'):
        yield KINDS['break0-foreign'].found(
            '%s is %s, where a macvlan in bridge mode is needed' % (
                name, link.described), device=name)
    elif (link.lower, link.lower_namespace) != parent.lower_of_macvlans:
        if seen.live:  # the parent of the pods has its own report
            yield KINDS['break0-wrong-parent'].found(
                '%s is on %s, but the pods are on %s' % (
                    name, device.lower_name(link)
                    or 'an interface of another namespace', seen.name),
                device=name)
    elif not (parent.up and parent.carrier):
        yield KINDS['parent-down'].found(
            '%s, which the pods and %s are on, %s' % (
                parent.name, name, 'has no carrier' if parent.up
                else 'is down'),
            commands=['ip -details link show ' + parent.name] if parent.up
            else (), parent=parent.name)
    elif link.vrf != parent.vrf:
        yield KINDS['break0-vrf'].found(
            '%s is in %s, but %s is in %s' % (
                name, _vrf_of(link), parent.name, _vrf_of(parent)))
    else:
        # Both faults delete routes or neighbours: the kernel flushes routes
        # of an interface that is down, and neighbours at a new MAC address.
        yield from _check_differences(seen, 'break0-down', 'break0-mac')


def _check_differences(seen: Parent, *kinds: str) -> Iterator[Finding]:
    """Report the differences that a sync repairs, by kind of finding."""
    for kind in kinds:
        texts = [text for each, text in seen.differences
                 if 'break0-' + each == kind]
        if texts:
            yield KINDS[kind].found(
                '%s: %s' % (seen.device, ', '.join(texts)),
                # The text for a sysctl begins with the name of the sysctl.
                names='|'.join(text.split()[0] for text in texts))


def _vrf_of(link: kernel.Link) -> str:
    return ('the VRF ' + kernel.name_of(link.vrf.ifindex) if link.vrf
            else 'no VRF')


def check(node: Node, seen: Parent, netlink: kernel.Netlink,
          ask: bool) -> Iterator[Finding]:
    """Check a usable break0, and other macvlans on its parent.

    :param ask: send ARP requests to find duplicate addresses on the LAN
    """
    link, parent = seen.link, seen.parent
    if link is None or parent is None:
        return
    if seen.other is not None:
        yield KINDS['ledger-lost' if seen.ownership is Ownership.LOST
                    else 'ledger-other'].found(
            '%s belongs to the ledger %s in %s, but state_dir is %s' % (
                seen.device, *seen.other, node.options.state_dir))
    yield from _check_differences(seen, 'break0-mtu', 'break0-heard',
                                  'break0-open')
    addresses = netlink.addresses()
    yield from _check_addresses(node, seen, parent, addresses)
    yield from _check_answers(link.name)
    yield from _check_guard(node, seen)
    of_ipv6 = [address for address in seen.live if address.version == 6]
    if of_ipv6 and kernel.read_sysctl(
            'ipv6/conf/%s/disable_ipv6' % link.name) != 0:
        yield KINDS['ipv6-disabled'].found(
            'IPv6 is disabled on %s, but there are containers with IPv6 '
            'addresses' % link.name, of_ipv6, device=link.name)
    if seen.device == node.options.device:
        yield from _check_addr(node, seen, netlink, addresses, ask)
    if seen.live:
        yield from _check_siblings(parent, netlink, {
            parent.name, *(each.device for each
                           in node.seen.parents.values())})


def _check_addresses(node: Node, seen: Parent, parent: kernel.Link,
                     addresses: Collection[tuple[int, IPAddress]]
                     ) -> Iterator[Finding]:
    has = set(seen.addresses)
    wants = set(Policy(node.options).own_addresses(
        addresses, parent.index, seen.device))
    # addr_gen_mode, which has its own check, creates link-local addresses.
    strange = {address for address in has - wants
               if address.version == 4 or not address.is_link_local}
    if strange or wants - has:
        yield KINDS['break0-addresses'].found(
            '%s has %s, but must have %s' % (
                seen.device, *(', '.join(sorted(map(str, some)))
                               or 'no address' for some in (has, wants))),
            sorted(map(str, strange | (wants - has))),
            commands=[
                *('ip address delete %s dev %s' % (address, seen.device)
                  for address in sorted(map(str, strange))),
                'kuryr-break0 sync'])


def _check_addr(node: Node, seen: Parent, netlink: kernel.Netlink,
                addresses: Collection[tuple[int, IPAddress]],
                ask: bool) -> Iterator[Finding]:
    """Report addresses of [break0] addr that the node no longer has.

    An address that only break0 has is correct if it is in a network of the
    parent and no other host has it.
    """
    known = {address.version for index, address in addresses
             if seen.parent and index == seen.parent.index
             and not address.is_link_local}
    alone = {*seen.addresses} - {address for index, address in addresses
                                 if index != seen.index}
    for address in node.options.addr:
        if address not in alone or address.version not in known:
            continue
        # For break0's own address the kernel returns a local route. The
        # neighbouring address shows the network.
        why = ''
        if not netlink.is_on_link(type(address)(int(address) ^ 1)):
            why = 'it is in no network of %s' % seen.name
        elif ask:
            for mac in kernel.claimants(seen.name, address):
                why = 'it is at %s on the LAN' % mac
        if why:
            yield KINDS['break0-addr-stale'].found(
                '[break0] addr is %s, but no other interface of the node has '
                'it, and %s' % (address, why), address=address,
                device=seen.device)


def _check_answers(name: str) -> Iterator[Finding]:
    """Report sysctls that make break0 answer ARP requests from the LAN."""
    wrong = [('proxy_arp', where, 0) for where in ('all', name)
             if kernel.read_sysctl('ipv4/conf/%s/proxy_arp' % where)]
    if not largest_sysctl(_ARP_FILTER, 'all', name):
        wrong.insert(0, ('arp_filter', name, 1))
    for key, where, value in wrong:
        yield KINDS['break0-answers-lan'].found(
            '%s of %s is %d' % (key, where, not value),
            key='net/ipv4/conf/%s/%s' % (where, key), value=value, names=key)


def _check_guard(node: Node, seen: Parent) -> Iterator[Finding]:
    guard = Guard(node.options, node.ledger, seen.device)
    if guard.is_wanted and not is_installed() and (
            seen.guard is not None or not guard.is_possible):
        yield KINDS['guard-unavailable'].found(
            '%s, so %s has no guard' % (NO_NFT, seen.device),
            severity=ERROR if node.options.guard == config.ON else None)
        return
    # Refused addresses, gone sandboxes and foreign routes are reported
    # themselves, so their guard entries are not.
    known = {*node.seen.refused, *(each.address for each in node.seen.gone),
             *(route.dst for route in seen.plan.foreign)}
    missing, stale = (
        [pair for pair in of_kind(Pair, items)
         if pair.dst not in node.changing]
        for items in (seen.plan.set, seen.plan.unset))
    barred = list(dict.fromkeys(pair.dst for pair in missing))
    texts = [seen.guard] if seen.guard is not None else list(guard_text(
        missing, [pair for pair in stale if pair.dst not in known]))
    if texts:
        yield KINDS['guard-missing'].found(
            '%s: %s' % (seen.device, *texts), barred,
            severity=ERROR if barred else None)


def _check_siblings(parent: kernel.Link, netlink: kernel.Netlink,
                    ours: Collection[str]) -> Iterator[Finding]:
    """Report other macvlans that answer ARP requests for node addresses.

    :param ours: names of the break0s and of the parent
    """
    for link in netlink.links():
        if ((link.lower, link.lower_namespace) == parent.lower_of_macvlans
                and link.name not in ours
                and link.up and (link.kind, link.mode) == ('macvlan', 'bridge')
                and not largest_sysctl(_ARP_FILTER, 'all', link.name)
                and not largest_sysctl('ipv4/conf/%s/arp_ignore', 'all',
                                       link.name)):
            yield KINDS['second-macvlan'].found(
                '%s is a macvlan on %s too, and answers ARP requests for all '
                'addresses of the node' % (link.name, parent.name),
                other=link.name)
            return
