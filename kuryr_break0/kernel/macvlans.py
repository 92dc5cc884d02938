# SPDX-License-Identifier: Apache-2.0

"""Lists the macvlans of other namespaces whose parent is on this node.

A function that takes the path of a namespace raises the errors that
:mod:`kuryr_break0.kernel.namespaces` describes. If the path leads to the
node's own namespace, the function raises NetnsUnusable.
"""

from __future__ import annotations

import socket
from typing import Callable, Iterable, Iterator, NamedTuple, Optional

from kuryr_break0 import exceptions
from kuryr_break0.kernel import namespaces
from kuryr_break0.kernel import node
from kuryr_break0.kernel import rtnetlink
from kuryr_break0.kernel import search
from kuryr_break0.kernel import values
from kuryr_break0.kernel.wire import IFA_F_DADFAILED
from kuryr_break0.kernel.wire import IFA_F_TENTATIVE
from kuryr_break0 import log
from kuryr_break0 import model

LOG = log.get_logger(__name__)


class Limits(NamedTuple):
    """Limits on reading a namespace, which its container can fill.

    :ivar listed: maximum interfaces to list
    :ivar read: maximum interfaces whose addresses are read
    :ivar addresses: maximum addresses to read from one interface. If all
        interfaces together have this number of addresses, reading ends
    """

    listed: int
    read: int
    addresses: int


#: Reading one namespace up to the limits takes 0.4 s of processor time with
#: FULL_LIMITS, and 0.06 s with QUICK_LIMITS.
FULL_LIMITS = Limits(2 ** 14, 2 ** 14, 2 ** 14)
QUICK_LIMITS = Limits(256, 64, 2048)


class Macvlan(NamedTuple):
    """A macvlan in another namespace, with its parent on the node.

    :ivar netns: path of the namespace
    :ivar parent: name of the parent interface; empty if it is not on the node
    :ivar addresses: its addresses, except link-local ones
    :ivar unproven: the addresses that have not passed duplicate address
        detection
    :ivar duplicates: the addresses for which duplicate address detection has
        found another host
    :ivar is_whole: whether ``addresses`` is complete
    """

    netns: str
    namespace: model.NamespaceId
    parent: str
    link: values.Link
    addresses: tuple[model.IPAddress, ...]
    unproven: frozenset[model.IPAddress] = frozenset()
    duplicates: frozenset[model.IPAddress] = frozenset()
    is_whole: bool = True

    def require(self, addresses: Iterable[model.IPAddress],
                mac: Optional[str] = None) -> None:
        """Check that the macvlan has the given addresses.

        :param mac: the MAC address that it must have; None for any
        :raises NotItsAddress: if it has another MAC address, or for the first
            address that it lacks
        """
        if mac not in (None, self.link.mac):
            raise exceptions.NotItsAddress(
                address=mac, ifname=self.link.name, netns=self.netns,
                found=self.link.mac)
        for address in addresses:
            if address not in self.addresses:
                raise exceptions.NotItsAddress(
                    address=address, ifname=self.link.name, netns=self.netns,
                    found=', '.join(map(str, self.addresses)) or 'no address')


def list_macvlans_in(netns: str, namespace: Optional[model.NamespaceId] = None,
                     limits: Limits = FULL_LIMITS, first: Iterable[str] = ()
                     ) -> list[Macvlan]:
    """List the macvlans in a namespace that have a parent on the node.

    :param namespace: the expected identity of the namespace; None for any
    :param first: names of interfaces to read before all others
    """
    def listed(netlink: rtnetlink.Netlink) -> list[values.Link]:
        present = {link.name: link for link in netlink.macvlans()}
        ordered = {}
        for name in first:
            link = present.get(name) or netlink.link(name)
            if link is not None and (link.name, link.kind) == (name,
                                                               'macvlan'):
                ordered[name] = link
        return [*{**ordered, **present}.values()]

    return [macvlan for macvlan in _read(netns, namespace, listed, limits)
            if macvlan.parent]


def find_macvlan(netns: str, ifname: str,
                 parent: Optional[str] = None) -> Macvlan:
    """Return the macvlan with a name, if a break0 can reach it.

    :param parent: the expected parent; None for any interface of the node
    :raises NotAMacvlan: if it does not exist, is no macvlan in bridge mode, or
        has another parent
    """
    description = 'it does not exist'
    for macvlan in _read(netns, None, lambda netlink: list(filter(
            None, [netlink.link(ifname)])), FULL_LIMITS):
        link = macvlan.link
        if link.name != ifname:  # ifname is an alternative name
            continue
        if link.kind != 'macvlan':
            description = 'it is ' + link.description
        elif not macvlan.parent:
            description = (
                'its parent is not on this node. In a container, run this '
                'command with the network of the host')
        elif link.mode == 'bridge' and parent in (None, macvlan.parent):
            return macvlan
        else:
            description = 'it is in %s mode on %s' % (
                link.mode, macvlan.parent)
    raise exceptions.NotAMacvlan(
        ifname=ifname, netns=netns, found=description,
        parent=parent or 'an interface of this node')


def _read(netns: str, expected: Optional[model.NamespaceId],
          listed: Callable[[rtnetlink.Netlink], list[values.Link]],
          limits: Limits) -> list[Macvlan]:
    """Read interfaces of a namespace.

    If the parent of an interface is not on the node, its ``parent`` is empty,
    and its addresses are not read: any user can unshare a namespace, and
    quickly add thousands of addresses in this namespace.

    :param listed: lists the interfaces to read
    """
    namespace = namespaces.require_other_namespace(netns, expected)
    own_of: dict[int, list[values.AddressState]] = {}
    with namespaces.open_namespace(namespaces.OWN_NETNS) as own, \
            namespaces.enter_namespace(netns, namespace), \
            rtnetlink.Netlink(most=limits.listed) as netlink, \
            rtnetlink.Netlink(most=limits.addresses) as reading:
        links, room = listed(netlink), limits.addresses
        # When the kernel lists interfaces, it assigns a number to the
        # namespace of each parent. If no parent is on the node, the node's
        # namespace may have no number. Then namespace_number() returns -1.
        own_number = netlink.namespace_number(own)
        for link in links:
            if link.lower_namespace == own_number and room > 0 and (
                    len(own_of) < limits.read):
                own_of[link.index] = reading.address_states(link.index)
                room -= len(own_of[link.index])
        # Engines rename an interface before they add addresses. So the names
        # are final if they are read after the addresses.
        if any(own_of.values()):
            links = listed(netlink)

    macvlans = []
    for link in links:
        read = own_of.get(link.index)
        states = [each for each in read or ()
                  if not each.address.is_link_local]
        # An optimistic address has IFA_F_TENTATIVE too.
        unproven, duplicates = (
            frozenset(each.address for each in states if each.flags & mask)
            for mask in (IFA_F_TENTATIVE | IFA_F_DADFAILED, IFA_F_DADFAILED))
        macvlans.append(Macvlan(
            netns, namespace, _parent_of(link, own_number), link,
            tuple(each.address for each in states), unproven, duplicates,
            read is not None and len(read) < limits.addresses))
    return macvlans


def _parent_of(link: values.Link, own_number: int) -> str:
    """Return the name of a macvlan's parent; empty if not on the node.

    :param own_number: number (nsid) of the node's namespace in the macvlan's
        namespace. If the parent has another number, it is in another
        namespace, and its ifindex identifies no interface of the node
    """
    if link.lower_namespace == own_number and link.lower is not None:
        with node.tolerate_absence(
                'cannot find the name of a macvlan\'s parent'):
            return socket.if_indextoname(link.lower)
    return ''


def list_macvlans(processes: Iterable[str]) -> Iterator[Macvlan]:
    """List the macvlans of all namespaces that this process can see.

    :param processes: directories such as /proc
    """
    for location in search.find_namespaces(processes):
        yield from list_macvlans_at(location)


def list_macvlans_at(location: search.NamespaceLocation,
                     limits: Limits = FULL_LIMITS) -> list[Macvlan]:
    """List the macvlans of a namespace; none if it cannot be entered.

    In most cases, such a namespace is just being deleted.
    """
    try:
        return list_macvlans_in(location.path, location.namespace, limits)
    except (exceptions.NetnsUnusable, exceptions.KernelRefused) as err:
        LOG.debug('Cannot list the macvlans of a namespace: %s', err)
        return []
