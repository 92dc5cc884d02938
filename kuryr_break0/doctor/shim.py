# Licensed under the Apache License, Version 2.0 (the "License"); you may
# not use this file except in compliance with the License. You may obtain
# a copy of the License at
#
#      http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS, WITHOUT
# WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the
# License for the specific language governing permissions and limitations
# under the License.

"""break0 itself: whether it is there, and what it should be."""

from __future__ import annotations

from typing import Iterator

from kuryr_break0 import device
from kuryr_break0.doctor import findings
from kuryr_break0.doctor.findings import Finding
from kuryr_break0.doctor.node import Node
from kuryr_break0 import netlink

_ARP_FILTER = 'ipv4/conf/%s/arp_filter'


def check_existence(node: Node) -> Iterator[Finding]:
    """Find what makes it useless; without any, the rest can be looked at."""
    options, link, parent = node.options, node.look.link, node.parent
    name = options.device
    if node.parent_name is not None and parent is None:
        yield findings.PARENT_MISSING.found(
            'there is no interface %s on this node, but %s' % (
                node.parent_name, 'pods are bound on it' if node.live
                else '[break0] parent names it'))
        return
    if link is None:
        if node.live:
            yield findings.BREAK0_MISSING.found(
                'there is no interface %s, but %d addresses are bound' % (
                    name, len(node.live)), device=name)
        return
    if (link.kind, link.mode) != ('macvlan', 'bridge'):
        yield findings.BREAK0_FOREIGN.found(
            '%s is a %s%s, where a macvlan in bridge mode is needed' % (
                name, link.kind or 'physical interface',
                ' in %s mode' % link.mode if link.mode else ''), device=name)
        return
    if parent is None:
        return  # no pods, and no word on where they will be
    if (link.lower, link.lower_elsewhere) != parent.lower_of_macvlans:
        yield findings.BREAK0_WRONG_PARENT.found(
            '%s is on %s, but the pods are on %s' % (
                name, link.lower_name or 'an interface of another namespace',
                node.parent_name), device=name)
    elif not parent.up:
        yield findings.PARENT_DOWN.found(
            '%s, which the pods and %s are on, is down' % (parent.name, name),
            parent=parent.name)
    elif not link.up:
        yield findings.BREAK0_DOWN.found('%s is down' % name, device=name)
    else:
        yield from _check_mac(node, link)


def _check_mac(node: Node, link: netlink.Link) -> Iterator[Finding]:
    """The kernel drops neighbour entries when the MAC address changes."""
    configured = node.options.mac
    told = {entry.peer.mac for entry in node.live.values()
            if entry.peer is not None and entry.peer.mac is not None}
    if configured is not None and link.mac != configured:
        yield findings.BREAK0_MAC.found(
            'the MAC address of %s is %s, but [break0] mac is %s' % (
                link.name, link.mac, configured))
    elif told and link.mac not in told:
        yield findings.BREAK0_MAC.found(
            'the MAC address of %s is %s, but pods have been told %s' % (
                link.name, link.mac, ', '.join(sorted(told))))


def check_parents(node: Node) -> Iterator[Finding]:
    """Look if all pods are on the interface that break0 is on."""
    configured = node.options.parent
    elsewhere = [entry for entry in node.live.values()
                 if entry.parent != (configured or node.parent_name)]
    if elsewhere:
        yield findings.PARENT_MISMATCH.found(
            '%s is for pods on %s%s, but there are pods on %s' % (
                node.options.device, configured or node.parent_name,
                ' ([break0] parent)' if configured else '',
                ', '.join(sorted({entry.parent for entry in elsewhere}))),
            [entry.address for entry in elsewhere])


def check_properties(node: Node) -> Iterator[Finding]:
    """Look at what keeps it quiet, and its packets whole."""
    link, parent = node.look.link, node.parent
    if link is None:
        return
    if parent is not None and link.mtu != parent.mtu:
        yield findings.BREAK0_MTU.found(
            'the MTU of %s is %d, that of its parent %s is %d' % (
                link.name, link.mtu, parent.name, parent.mtu))
    yield from _check_addresses(node, link)
    yield from _check_answers(node, link)
    names = [path.rpartition('/')[2] for path in device.loud(link.name)
             if path != _ARP_FILTER % link.name]
    if link.multicast:
        names.insert(0, 'multicast')
    if names:
        yield findings.BREAK0_HEARD.found(
            '%s has settings that make it speak on the LAN: %s' % (
                link.name, ', '.join(names)), names='|'.join(names))
    if (any(address.version == 6 for address in node.live)
            and netlink.read_sysctl('ipv6/conf/%s/disable_ipv6' % link.name)
            != 0):
        yield findings.IPV6_DISABLED.found(
            'IPv6 is disabled on %s, but there are pods with IPv6 '
            'addresses' % link.name,
            [address for address in node.live if address.version == 6],
            device=link.name)


def _check_addresses(node: Node, link: netlink.Link) -> Iterator[Finding]:
    has, wants = set(node.look.addresses_of(link.index)), set(
        node.options.addr)
    # One that is link-local is by addr_gen_mode, which is looked at too.
    strange = {address for address in has - wants
               if not address.is_link_local}
    if strange or wants - has:
        yield findings.BREAK0_ADDRESSES.found(
            '%s has %s, but [break0] addr is %s' % (
                link.name, ', '.join(sorted(map(str, has))) or 'no address',
                ', '.join(map(str, node.options.addr)) or 'not set'),
            sorted(map(str, strange | (wants - has))),
            commands=[
                *('ip address delete %s dev %s' % (address, link.name)
                  for address in sorted(map(str, strange))),
                'kuryr-break0 sync'])


def _check_answers(node: Node, link: netlink.Link) -> Iterator[Finding]:
    """Look if it answers the LAN's ARP requests.

    The kernel takes either value of ``all`` and the interface for both.
    """
    if not node.sysctl(_ARP_FILTER, 'all', link.name):
        yield findings.BREAK0_ANSWERS_LAN.found(
            'arp_filter of %s is 0: it answers ARP requests for all '
            'addresses of the node' % link.name,
            key='net.ipv4.conf.%s.arp_filter' % link.name, value=1,
            name='arp_filter')
    for where in ('all', link.name):
        if node.sysctl('ipv4/conf/%s/proxy_arp', where):
            yield findings.BREAK0_ANSWERS_LAN.found(
                'proxy_arp of %s is 1: %s answers ARP requests for all that '
                'the node has a route to' % (where, link.name),
                key='net.ipv4.conf.%s.proxy_arp' % where, value=0,
                name='proxy_arp')
