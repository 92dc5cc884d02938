# SPDX-License-Identifier: Apache-2.0

"""Checks of break0 and its parent."""

from __future__ import annotations

from typing import Collection, Iterator

from kuryr_break0.break0.guard import is_installed
from kuryr_break0.break0.guard import NO_NFT
from kuryr_break0 import config
from kuryr_break0.doctor.findings import Finding
from kuryr_break0.doctor.findings import KINDS
from kuryr_break0.doctor import known
from kuryr_break0.doctor.node import Node
from kuryr_break0.engine import problems
from kuryr_break0.engine.snapshot import Parent
from kuryr_break0 import kernel
from kuryr_break0 import model
from kuryr_break0 import policy


def check(node: Node, parent: Parent, netlink: kernel.Netlink,
          ask: bool) -> Iterator[Finding]:
    """Check a usable break0, and other macvlans on its parent.

    :param ask: send ARP requests to find duplicate addresses on the LAN
    """
    lower = parent.parent
    if parent.link is None or lower is None:
        return
    addresses = netlink.addresses()
    yield from _check_addresses(node, parent, lower, addresses)
    yield from _check_answers()
    yield from _check_guard(node, parent)
    if parent.device == node.options.device:
        yield from _check_addr(node, parent, netlink, addresses, ask)
    if parent.live:
        yield from _check_siblings(lower, netlink, {
            lower.name, *(each.device for each
                          in node.snapshot.parents.values())})


def _check_addresses(node: Node, parent: Parent, lower: kernel.Link,
                     addresses: Collection[tuple[int, model.IPAddress]]
                     ) -> Iterator[Finding]:
    """Report missing addresses, and addresses that no sync deletes."""
    texts = [each.text for each in problems.of_device(parent, node.snapshot)
             if each.kind == known.ADDRESSES]
    has = set(parent.addresses)
    wants = set(policy.Policy(node.options).own_addresses(
        addresses, lower.index, parent.device))
    # Link-local IPv6 addresses are left out: another finding reports them,
    # and a sync deletes them.
    strange = {address for address in has - wants
               if address.version == 4 or not address.is_link_local}
    if strange or texts:
        texts.append('%s has %s, but must have %s' % (
            parent.device, *(', '.join(sorted(map(str, some)))
                             or 'no address' for some in (has, wants))))
        yield KINDS[known.ADDRESSES].finding(
            '; '.join(texts), sorted(map(str, strange | (wants - has))),
            commands=[
                *('ip address delete %s dev %s' % (address, parent.device)
                  for address in sorted(map(str, strange))),
                'kuryr-break0 sync'])


def _check_addr(node: Node, parent: Parent, netlink: kernel.Netlink,
                addresses: Collection[tuple[int, model.IPAddress]],
                ask: bool) -> Iterator[Finding]:
    """Report addresses of [break0] addr that the node no longer has.

    An address that only break0 has is correct if it is in a network of the
    parent and no other host has it.
    """
    versions = {address.version for index, address in addresses
                if parent.parent and index == parent.parent.index
                and not address.is_link_local}
    alone = {*parent.addresses} - {address for index, address in addresses
                                   if index != parent.index}
    for address in node.options.addr:
        if address not in alone or address.version not in versions:
            continue
        # For break0's own address the kernel returns a local route. So look up
        # the neighbouring address, which is in the same network.
        why = ''
        if not netlink.is_on_link(type(address)(int(address) ^ 1)):
            why = 'it is in no network of %s' % parent.name
        elif ask:
            for mac in kernel.find_claimants(parent.name, address):
                why = 'the host with the MAC address %s on the LAN has it' % (
                    mac)
        if why:
            yield KINDS['break0-addr-stale'].finding(
                '[break0] addr is %s, but no other interface of the node has '
                'it, and %s' % (address, why), address=address,
                device=parent.device)


def _check_answers() -> Iterator[Finding]:
    """Report the sysctl by which all interfaces answer ARP as proxies."""
    if kernel.read_sysctl('ipv4/conf/all/proxy_arp'):
        yield KINDS['break0-answers-lan'].finding(
            'the sysctl proxy_arp of all interfaces is 1',
            key='net/ipv4/conf/all/proxy_arp', value=0, names='proxy_arp')


def _check_guard(node: Node, parent: Parent) -> Iterator[Finding]:
    """Report that nft, which loads the guard, is not installed."""
    if node.options.guard == config.AUTO and not (
            parent.guard or parent.is_guarded or is_installed()):
        yield KINDS['guard-unavailable'].finding(
            '%s, so %s has no guard' % (NO_NFT, parent.device))


def _check_siblings(parent: kernel.Link, netlink: kernel.Netlink,
                    ours: Collection[str]) -> Iterator[Finding]:
    """Report other macvlans that answer ARP requests for node addresses.

    :param ours: names of the break0s and of the parent
    """
    for link in netlink.links():
        if ((link.lower, link.lower_namespace) == parent.lower_of_macvlans
                and link.name not in ours
                and link.up and (link.kind, link.mode) == ('macvlan', 'bridge')
                and not any(kernel.effective_sysctl(path, link.name)
                            for path in ('ipv4/conf/%s/arp_filter',
                                         'ipv4/conf/%s/arp_ignore'))):
            yield KINDS['second-macvlan'].finding(
                '%s is another macvlan on %s, and answers ARP requests for '
                'all addresses of the node' % (link.name, parent.name),
                other=link.name)
            return
