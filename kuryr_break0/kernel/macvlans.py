# SPDX-License-Identifier: Apache-2.0

"""The macvlans of other namespaces that are on interfaces of this one."""

from __future__ import annotations

import contextlib
import socket
from typing import Iterable, Iterator, NamedTuple, Optional

from kuryr_break0 import exceptions
from kuryr_break0.kernel import namespaces
from kuryr_break0.kernel.node import absence
from kuryr_break0.kernel.rtnetlink import Netlink
from kuryr_break0.kernel.values import InterfaceAddress
from kuryr_break0.kernel.values import Link
from kuryr_break0.kernel.wire import IFA_F_DADFAILED
from kuryr_break0.kernel.wire import IFA_F_TENTATIVE
from kuryr_break0 import log
from kuryr_break0.model import IPAddress
from kuryr_break0.model import NamespaceId

LOG = log.get_logger(__name__)

#: Interfaces and addresses that are read of a namespace, which its container
#: can have as many of as it likes, and change all the time.
_MOST = 2 ** 14


class Macvlan(NamedTuple):
    """A macvlan on an interface of the node, in another namespace.

    :ivar netns: path of that
    :ivar parent: the interface of the node
    :ivar addresses: those of the macvlan, but link-local ones
    :ivar unproven: of these, what duplicate address detection has not passed
    :ivar duplicates: of these, what another host has, as that has found
    """

    netns: str
    namespace: NamespaceId
    parent: str
    link: Link
    addresses: tuple[IPAddress, ...]
    unproven: frozenset[IPAddress] = frozenset()
    duplicates: frozenset[IPAddress] = frozenset()


def macvlans_in(netns: str, namespace: Optional[NamespaceId] = None
                ) -> list[Macvlan]:
    """List those of one namespace.

    :param netns: its path
    :param namespace: what it must be
    :raises NetnsUnusable: if it cannot be entered
    :raises SystemRefused: if this process lacks descriptors
    """
    namespace = _required(netns, namespace)
    flags: dict[InterfaceAddress, int] = {}
    with _entered(netns, namespace) as (netlink, own):
        # Engines rename an interface before they give it addresses, so the
        # name that is read after these is the one that it keeps.
        addresses = netlink.addresses(flags)
        links = [link for link in netlink.links() if link.kind == 'macvlan']
        # Whoever lists interfaces gives a number to each namespace that
        # one of them is on; the number of one that none is on is -1.
        here = netlink.namespace_number(own) if links else -1
    # An optimistic one is tentative too.
    unproven, duplicates = (
        [each for each in addresses if flags[each] & mask] for mask in (
            IFA_F_TENTATIVE | IFA_F_DADFAILED, IFA_F_DADFAILED))
    return [Macvlan(netns, namespace, parent, link,
                    _of_link(link, addresses),
                    frozenset(_of_link(link, unproven)),
                    frozenset(_of_link(link, duplicates)))
            for link in links
            for parent in _parent_of(link, here)]


def macvlan_of(netns: str, ifname: str,
               parent: Optional[str] = None) -> Macvlan:
    """Return an interface that a node can reach through a break0.

    :param netns: path of its namespace
    :param parent: what it should be on; None for any interface of the node
    :raises NotAMacvlan: if it is none
    :raises NetnsUnusable: if the namespace cannot be entered
    """
    namespace = _required(netns, None)
    with _entered(netns, namespace) as (netlink, own):
        link = netlink.link(ifname)
        here = netlink.namespace_number(own) if link else -1
        addresses = netlink.addresses() if link else []
    if link is None:
        found = 'there is none of that name'
    elif link.kind != 'macvlan':
        found = 'it is a %s' % (link.kind or 'physical interface')
    else:
        found = 'it is on no interface of this node'
        for actual in _parent_of(link, here):
            if link.mode == 'bridge' and parent in (None, actual):
                return Macvlan(netns, namespace, actual, link,
                               _of_link(link, addresses))
            found = 'it is in %s mode on %s' % (link.mode, actual)
    raise exceptions.NotAMacvlan(
        ifname=ifname, netns=netns, found=found,
        parent=parent or 'an interface of this node')


def _required(netns: str, namespace: Optional[NamespaceId]) -> NamespaceId:
    """Return what a namespace is, which must not be that of the node."""
    found = namespace or namespaces.identify(netns)
    own = namespaces.identify(namespaces.OWN)
    if found is None:
        raise exceptions.NetnsUnusable(
            netns=netns, reason='does not exist, or is another kind of file')
    if own is not None and found.is_same(own):
        raise exceptions.NetnsUnusable(netns=netns, reason="is the node's own")
    return found


@contextlib.contextmanager
def _entered(netns: str, namespace: NamespaceId
             ) -> Iterator[tuple[Netlink, int]]:
    """Be in a namespace, with a socket there and a file of the own one."""
    with namespaces.own_file() as own, \
            namespaces.entered(netns, namespace), \
            Netlink(most=_MOST) as netlink:
        yield netlink, own


def _parent_of(link: Link, here: int) -> Iterator[str]:
    """Return the interface of the node that a macvlan is on, if on one.

    :param here: the number of the node's namespace in that of the macvlan;
        with another number, its lower interface counts elsewhere
    """
    if link.lower_namespace == here and link.lower is not None:
        with absence('cannot name the parent of a macvlan'):  # just deleted
            yield socket.if_indextoname(link.lower)


def _of_link(link: Link, addresses: Iterable[InterfaceAddress]
             ) -> tuple[IPAddress, ...]:
    return tuple(address for index, address in addresses
                 if index == link.index and not address.is_link_local)


def macvlans(processes: Iterable[str]) -> Iterator[Macvlan]:
    """List those of all namespaces that this process can see.

    A namespace that cannot be entered is logged, and has none.

    :param processes: where processes are to be seen, as /proc
    """
    for found in namespaces.find(processes):
        try:
            yield from macvlans_in(found.path, found.namespace)
        except (exceptions.NetnsUnusable, exceptions.KernelRefused) as err:
            LOG.warning('Skipping a network namespace: %s', err)
