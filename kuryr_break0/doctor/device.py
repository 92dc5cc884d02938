# SPDX-License-Identifier: Apache-2.0

"""Checks break0 itself and its parent."""

from __future__ import annotations

from typing import Collection, Iterable, Iterator

from kuryr_break0 import config
from kuryr_break0 import device
from kuryr_break0.doctor import findings
from kuryr_break0.doctor.findings import Finding
from kuryr_break0.doctor.node import ParentView
from kuryr_break0.guard import Guard
from kuryr_break0.guard import said
from kuryr_break0 import kernel
from kuryr_break0 import policy

_ARP_FILTER = 'ipv4/conf/%s/arp_filter'


def check_existence(view: ParentView) -> Iterator[Finding]:
    """Find what makes it useless. Without such faults the rest is checked."""
    link, parent, name = view.link, view.parent, view.name
    if parent is None:
        yield findings.PARENT_MISSING.found(
            'there is no interface %s on this node, but %s' % (
                view.parent_name, 'pods are bound on it' if view.live
                else '[break0] parent names it'))
        return
    if link is None:
        if view.live:
            yield findings.BREAK0_MISSING.found(
                'there is no interface %s, but %d addresses are bound' % (
                    name, len(view.live)), device=name)
        return
    if (link.kind, link.mode) != ('macvlan', 'bridge'):
        yield findings.BREAK0_FOREIGN.found(
            '%s is a %s%s, where a macvlan in bridge mode is needed' % (
                name, link.kind or 'physical interface',
                ' in %s mode' % link.mode if link.mode else ''), device=name)
        return
    if (link.lower, link.lower_namespace) != parent.lower_of_macvlans:
        if not view.live:
            return  # it is said where pods are
        yield findings.BREAK0_WRONG_PARENT.found(
            '%s is on %s, but the pods are on %s' % (
                name, device.lower_name(link)
                or 'an interface of another namespace',
                view.parent_name), device=name)
    elif not parent.up:
        yield findings.PARENT_DOWN.found(
            '%s, which the pods and %s are on, is down' % (parent.name, name),
            parent=parent.name)
    elif not parent.carrier:
        yield findings.PARENT_DOWN.found(
            '%s, which the pods and %s are on, has no carrier' % (
                parent.name, name),
            commands=('ip -details link show ' + parent.name,))
    elif link.vrf != parent.vrf:
        yield findings.BREAK0_VRF.found(
            '%s is in %s, but %s is in %s' % (
                name, _name_vrf(link), parent.name, _name_vrf(parent)))
    elif not link.up:
        yield findings.BREAK0_DOWN.found('%s is down' % name, device=name)
    else:
        yield from _check_mac(view, link)


def _name_vrf(link: kernel.Link) -> str:
    return ('the VRF ' + kernel.name_of(link.vrf.ifindex) if link.vrf
            else 'no VRF')


def _check_mac(view: ParentView, link: kernel.Link) -> Iterator[Finding]:
    """Check the MAC address: when it changes, the kernel drops neighbours."""
    identity = view.node.seen.identity
    before = identity.macs.get(view.name) if identity else None
    if before is not None and link.mac != before:
        yield findings.BREAK0_MAC.found(
            'the MAC address of %s is %s, but pods were configured with %s' %
            (link.name, link.mac, before))


def check_parent(view: ParentView) -> Iterator[Finding]:
    """Compare the parent with the one that is configured."""
    configured = view.options.parent
    if configured not in (None, view.parent_name) and view.live:
        yield findings.PARENT_MISMATCH.found(
            '[break0] parent is %s, but there are pods on %s' % (
                configured, view.parent_name), list(view.live))
    parent, table = view.parent, view.options.route_table
    if (parent is not None and parent.vrf is not None and view.live
            and parent.vrf.table != table):
        yield findings.PARENT_VRF.found(
            '%s is in %s, whose table is %d, but [break0] route_table is %d'
            % (parent.name, _name_vrf(parent), parent.vrf.table, table),
            table=parent.vrf.table)


def check_owner(view: ParentView) -> Iterator[Finding]:
    """Look whether break0 belongs to this ledger."""
    other = view.seen.other
    if other is None:
        return
    kind = (findings.LEDGER_LOST if view.node.seen.is_lost
            else findings.LEDGER_OTHER)
    yield kind.found('%s belongs to the ledger %s in %s, but state_dir is %s'
                     % (view.name, other.ledger, other.directory,
                        view.options.state_dir), device=view.name)


def check_properties(view: ParentView) -> Iterator[Finding]:
    """Check the settings that keep it silent, its MTU and addresses."""
    link, parent = view.link, view.parent
    if link is None:
        return
    if parent is not None and link.mtu != parent.mtu:
        yield findings.BREAK0_MTU.found(
            'the MTU of %s is %d, that of its parent %s is %d' % (
                link.name, link.mtu, parent.name, parent.mtu))
    yield from _check_addresses(view, link)
    yield from _check_answers(view, link)
    drift = device.sysctl_drift(link.name)
    names = [path.rpartition('/')[2] for path in _of(device.QUIET, link)
             if path in drift and path != _ARP_FILTER % link.name]
    if link.multicast:
        names.insert(0, 'multicast')
    if names:
        yield findings.BREAK0_HEARD.found(
            '%s has settings that make it speak on the LAN: %s' % (
                link.name, ', '.join(names)), names='|'.join(names))
    yield from _check_border(view, link, drift)
    if (any(address.version == 6 for address in view.live)
            and kernel.read_sysctl('ipv6/conf/%s/disable_ipv6' % link.name)
            != 0):
        yield findings.IPV6_DISABLED.found(
            'IPv6 is disabled on %s, but there are containers with IPv6 '
            'addresses' % link.name,
            [address for address in view.live if address.version == 6],
            device=link.name)


def check_others(view: ParentView, netlink: kernel.Netlink,
                 ours: Collection[str]) -> Iterator[Finding]:
    """Look for macvlans of the node that answer the LAN in its name.

    :param ours: names of break0s
    """
    parent = view.parent
    if parent is None or not view.live:
        return
    for link in netlink.links():
        if ((link.lower, link.lower_namespace) == parent.lower_of_macvlans
                and link.name not in (*ours, parent.name)
                and link.up and link.mode == 'bridge'
                and not view.sysctl(_ARP_FILTER, 'all', link.name)
                and not view.sysctl('ipv4/conf/%s/arp_ignore', 'all',
                                    link.name)):
            yield findings.SECOND_MACVLAN.found(
                '%s is a macvlan on %s too, and answers ARP requests for all '
                'addresses of the node' % (link.name, parent.name),
                other=link.name)
            return


def _of(sysctls: Iterable[str], link: kernel.Link) -> list[str]:
    return [path % link.name for path in sysctls]


def _check_border(view: ParentView, link: kernel.Link,
                  drift: Collection[str]) -> Iterator[Finding]:
    """Check what keeps pods from using addresses of others."""
    names = [path for path in _of(device.BORDER, link)
             if path in drift and not path.endswith('/proxy_arp')]
    if names:
        yield findings.BREAK0_OPEN.found(
            '%s has settings by which a pod can do more than speak to its '
            'node: %s' % (link.name, ', '.join(names)))
    # Whoever is not to pass any more is reported for what is against it.
    known = {*view.node.seen.refused,
             *(record.address for record in view.node.gone),
             *(route.dst for route in view.seen.plan.foreign)}
    texts = [view.seen.guard] if view.seen.guard is not None else [*said(
        view.settled(view.seen.guard_missing),
        view.settled(view.seen.guard_extra.keys() - known))]
    if texts:
        yield findings.GUARD_MISSING.found('%s: %s' % (link.name, *texts))
    elif view.options.guard == config.AUTO and not Guard(
            view.options, view.node.ledger, link.name).is_possible:
        yield findings.GUARD_UNAVAILABLE.found(
            'there is no program nft, so %s has no guard' % link.name)


def _check_addresses(view: ParentView, link: kernel.Link) -> Iterator[Finding]:
    has, own = set(view.seen.addresses), policy.link_address(link.name)
    wants = {*(view.options.addr if view.name == view.options.device else ()),
             *({own} & set(view.known.addresses if view.known else ()))}
    # A link-local one comes from addr_gen_mode, which is checked too.
    strange = {address for address in has - wants
               if address.version == 4 or not address.is_link_local}
    if strange or wants - has:
        yield findings.BREAK0_ADDRESSES.found(
            '%s has %s, but must have %s' % (
                link.name, *(', '.join(sorted(map(str, addresses)))
                             or 'no address' for addresses in (has, wants))),
            sorted(map(str, strange | (wants - has))),
            commands=[
                *('ip address delete %s dev %s' % (address, link.name)
                  for address in sorted(map(str, strange))),
                'kuryr-break0 sync'])


def _check_answers(view: ParentView, link: kernel.Link) -> Iterator[Finding]:
    """Look if it answers the LAN's ARP requests.

    The kernel takes either value of ``all`` and the interface for both.
    """
    if not view.sysctl(_ARP_FILTER, 'all', link.name):
        yield findings.BREAK0_ANSWERS_LAN.found(
            'arp_filter of %s is 0: it answers ARP requests for all '
            'addresses of the node' % link.name,
            key='net/ipv4/conf/%s/arp_filter' % link.name, value=1,
            name='arp_filter')
    for where in ('all', link.name):
        if view.sysctl('ipv4/conf/%s/proxy_arp', where):
            yield findings.BREAK0_ANSWERS_LAN.found(
                'proxy_arp of %s is 1: %s answers ARP requests for all that '
                'the node has a route to' % (where, link.name),
                key='net/ipv4/conf/%s/proxy_arp' % where, value=0,
                name='proxy_arp')
