# SPDX-License-Identifier: Apache-2.0

"""The macvlans of other namespaces that are on interfaces of this one."""

from __future__ import annotations

import contextlib
import os
import socket
from typing import Iterable, Iterator, NamedTuple, Optional

from oslo_log import log as logging

from kuryr_break0 import exceptions
from kuryr_break0.kernel import namespaces
from kuryr_break0.kernel.rtnetlink import Netlink
from kuryr_break0.kernel.wire import Link
from kuryr_break0.model import IPAddress
from kuryr_break0.model import NamespaceId

LOG = logging.getLogger(__name__)


class Macvlan(NamedTuple):
    """A macvlan on an interface of the node, in another namespace.

    :ivar netns: path of that
    :ivar parent: the interface of the node
    :ivar addresses: those of the macvlan, but link-local ones
    """

    netns: str
    namespace: NamespaceId
    parent: str
    link: Link
    addresses: tuple[IPAddress, ...]


def macvlans_in(netns: str, namespace: Optional[NamespaceId] = None
                ) -> list[Macvlan]:
    """List those of one namespace.

    :param netns: its path
    :param namespace: what it must be
    :raises NetnsUnusable: if it cannot be entered
    :raises KernelRefused: if its interfaces cannot be listed
    """
    namespace = namespace or namespaces.identify(netns)
    if namespace is None:
        raise exceptions.NetnsUnusable(
            netns=netns, reason='does not exist, or is another kind of file')
    own = os.open('/proc/thread-self/ns/net', os.O_RDONLY | os.O_CLOEXEC)
    try:
        with namespaces.entered(netns, namespace), Netlink() as netlink:
            links = [link for link in netlink.links()
                     if link.kind == 'macvlan']
            # Whoever lists interfaces gives a number to each namespace that
            # one of them is on; the number of one that none is on is -1.
            here = netlink.namespace_number(own) if links else -1
            addresses = netlink.addresses() if links else []
    finally:
        os.close(own)
    found = []
    for link in links:
        # With the number of another namespace, lower counts there.
        if link.lower_namespace != here or link.lower is None:
            continue
        with contextlib.suppress(OSError):  # just deleted
            found.append(Macvlan(
                netns, namespace, socket.if_indextoname(link.lower), link,
                tuple(address for index, address in addresses
                      if index == link.index
                      and not address.is_link_local)))
    return found


def macvlans(directories: Iterable[str],
             processes: Iterable[str]) -> Iterator[Macvlan]:
    """List those of all namespaces that this process can see.

    A namespace that cannot be entered is logged, and has none.

    :param directories: where namespaces have names
    :param processes: where processes are to be seen, as /proc
    """
    for found in namespaces.find(directories, processes):
        try:
            yield from macvlans_in(found.path, found.namespace)
        except (exceptions.NetnsUnusable, exceptions.KernelRefused) as err:
            LOG.warning('Left out: %s', err)
