# SPDX-License-Identifier: Apache-2.0

"""The macvlans of other namespaces that are on interfaces of this one.

What takes the path of a namespace raises as in
:mod:`kuryr_break0.kernel.namespaces`, also for that of the node.
"""

from __future__ import annotations

import socket
from typing import Callable, Iterable, Iterator, NamedTuple, Optional

from kuryr_break0 import exceptions
from kuryr_break0.kernel import namespaces
from kuryr_break0.kernel.node import absence
from kuryr_break0.kernel.rtnetlink import Netlink
from kuryr_break0.kernel import search
from kuryr_break0.kernel.values import AddressState
from kuryr_break0.kernel.values import Link
from kuryr_break0.kernel.wire import IFA_F_DADFAILED
from kuryr_break0.kernel.wire import IFA_F_TENTATIVE
from kuryr_break0 import log
from kuryr_break0.model import IPAddress
from kuryr_break0.model import NamespaceId

LOG = log.get_logger(__name__)


class Limits(NamedTuple):
    """How much is read of a namespace: its container can have any number.

    :ivar listed: interfaces that are listed
    :ivar read: interfaces whose addresses are read
    :ivar addresses: addresses that are read of one interface, and after which
        no other interface is read
    """

    listed: int
    read: int
    addresses: int


#: To read a namespace that has more takes 0.4 s of a processor, and 0.06 s.
MOST, FEW = Limits(2 ** 14, 2 ** 14, 2 ** 14), Limits(256, 64, 2048)


class Macvlan(NamedTuple):
    """A macvlan on an interface of the node, in another namespace.

    :ivar netns: path of that
    :ivar parent: the interface of the node
    :ivar addresses: those of the macvlan, but link-local ones
    :ivar unproven: of these, what duplicate address detection has not passed
    :ivar duplicates: of these, what another host has, as that has found
    :ivar is_whole: whether all of its addresses were read
    """

    netns: str
    namespace: NamespaceId
    parent: str
    link: Link
    addresses: tuple[IPAddress, ...]
    unproven: frozenset[IPAddress] = frozenset()
    duplicates: frozenset[IPAddress] = frozenset()
    is_whole: bool = True

    def require(self, addresses: Iterable[IPAddress],
                mac: Optional[str] = None) -> None:
        """Make sure that it has addresses.

        :param mac: its MAC address; None for any
        :raises NotItsAddress: of the first that it does not have
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


def macvlans_in(netns: str, namespace: Optional[NamespaceId] = None,
                limits: Limits = MOST, first: Iterable[str] = ()
                ) -> list[Macvlan]:
    """List those of the namespace at a path, and what that must be.

    :param first: names of interfaces that are read before any other
    """
    def listed(netlink: Netlink) -> list[Link]:
        found = {link.name: link for link in netlink.macvlans()}
        ordered = {}
        for name in first:
            link = found.get(name) or netlink.link(name)
            if link is not None and (link.name, link.kind) == (name,
                                                               'macvlan'):
                ordered[name] = link
        return [*{**ordered, **found}.values()]

    return [macvlan for macvlan in _read(netns, namespace, listed, limits)
            if macvlan.parent]


def macvlan_of(netns: str, ifname: str,
               parent: Optional[str] = None) -> Macvlan:
    """Return an interface that a node can reach through a break0.

    :param parent: what it should be on; None for any interface of the node
    :raises NotAMacvlan: if it is none
    """
    found = 'there is none of that name'
    for macvlan in _read(netns, None, lambda netlink: list(filter(
            None, [netlink.link(ifname)])), MOST):
        link = macvlan.link
        if link.name != ifname:  # but an altname
            continue
        if link.kind != 'macvlan':
            found = 'it is ' + link.described
        elif not macvlan.parent:
            found = ('it is on no interface of this node. In a container, '
                     'run this with the network of the host')
        elif link.mode == 'bridge' and parent in (None, macvlan.parent):
            return macvlan
        else:
            found = 'it is in %s mode on %s' % (link.mode, macvlan.parent)
    raise exceptions.NotAMacvlan(
        ifname=ifname, netns=netns, found=found,
        parent=parent or 'an interface of this node')


def _read(netns: str, known: Optional[NamespaceId],
          listed: Callable[[Netlink], list[Link]], limits: Limits
          ) -> list[Macvlan]:
    """Read interfaces of a namespace; without parent, if on none.

    The addresses of others there are not read: who has unshared it can add
    thousands of these in a moment.
    """
    namespace = namespaces.require_other(netns, known)
    own_of: dict[int, list[AddressState]] = {}
    with namespaces.opened(namespaces.OWN) as own, \
            namespaces.entered(netns, namespace), \
            Netlink(most=limits.listed) as netlink, \
            Netlink(most=limits.addresses) as reading:
        links, room = listed(netlink), limits.addresses
        # Whoever lists interfaces gives a number to each namespace that
        # one of them is on; the number of one that none is on is -1.
        here = netlink.namespace_number(own)
        for link in links:
            if link.lower_namespace == here and room > 0 and (
                    len(own_of) < limits.read):
                own_of[link.index] = reading.address_states(link.index)
                room -= len(own_of[link.index])
        # Engines rename an interface before they give it addresses, so the
        # name that is read after these is the one that it keeps.
        if any(own_of.values()):
            links = listed(netlink)

    found = []
    for link in links:
        read = own_of.get(link.index)
        states = [each for each in read or ()
                  if not each.address.is_link_local]
        # An optimistic one is tentative too.
        unproven, duplicates = (
            frozenset(each.address for each in states if each.flags & mask)
            for mask in (IFA_F_TENTATIVE | IFA_F_DADFAILED, IFA_F_DADFAILED))
        found.append(Macvlan(
            netns, namespace, _parent_of(link, here), link,
            tuple(each.address for each in states), unproven, duplicates,
            read is not None and len(read) < limits.addresses))
    return found


def _parent_of(link: Link, here: int) -> str:
    """Return the interface of the node that one is on; empty if on none.

    :param here: the number of the node's namespace in that of the link; with
        another number, its lower interface counts elsewhere
    """
    if link.lower_namespace == here and link.lower is not None:
        with absence('cannot name the parent of a macvlan'):  # just deleted
            return socket.if_indextoname(link.lower)
    return ''


def macvlans(processes: Iterable[str]) -> Iterator[Macvlan]:
    """List those of all namespaces that this process can see.

    :param processes: where processes are to be seen, as /proc
    """
    for found in search.find(processes):
        yield from macvlans_at(found)


def macvlans_at(found: search.Found, limits: Limits = MOST) -> list[Macvlan]:
    """List those of a namespace; none if it cannot be entered.

    Mostly it is just ending.
    """
    try:
        return macvlans_in(found.path, found.namespace, limits)
    except (exceptions.NetnsUnusable, exceptions.KernelRefused) as err:
        LOG.debug('Skipping a network namespace: %s', err)
        return []
