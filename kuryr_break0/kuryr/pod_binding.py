# SPDX-License-Identifier: Apache-2.0

"""Creates the interface of a pod directly in the pod's namespace.

Kuryr makes it on the node, under a name that is in nobody's way, moves it,
renames it, and sets its MTU and MAC address one by one; around each step it
reads the namespace again. Here it is one request, with the same result.

Killed before the move, Kuryr leaves an interface on the node. The VIF cannot
say that it is one: whoever writes the KuryrPort chooses name and MAC address.
So Kuryr is made to create it in a group that nothing else is in, which the
kernel does in the same request.

All raises NetnsUnusable if the pod's namespace cannot be entered, and
KernelRefused with the first error of the kernel.
"""

from __future__ import annotations

import contextlib
import errno
import ipaddress
import time
from typing import Any, Iterator

from kuryr_kubernetes import utils as k_utils

from kuryr_break0 import exceptions
from kuryr_break0 import kernel
from kuryr_break0 import log

LOG = log.get_logger(__name__)

#: The group of a macvlan that Kuryr has not yet made a pod's ("br0").
UNFINISHED = 0x627230

#: Seconds to wait for a MAC address, and between two tries.
_PATIENCE, _PAUSE = 1.0, 0.05

_EVERYTHING = {4: ipaddress.ip_network('0.0.0.0/0'),
               6: ipaddress.ip_network('::/0')}


def sandbox_path(netns: str) -> str:
    """Return the namespace of a pod as a path that this process can open.

    Kuryr would take an empty path for the namespace of kuryr-daemon, and
    delete the node's eth0; pyroute2.NetNS creates a path that does not exist.

    :param netns: CNI_NETNS of the request
    :raises NetnsUnusable: if it is empty, does not exist, or is the
        namespace of this process
    """
    if not netns:
        raise exceptions.NetnsUnusable(netns=netns, reason='is not named')
    path = str(k_utils.convert_netns(netns))
    kernel.require_other(path)
    return path


@contextlib.contextmanager
def _entered(netns: str) -> Iterator[kernel.Netlink]:
    """Be in the namespace of a pod, with a socket there."""
    with kernel.entered(netns), kernel.Netlink() as netlink:
        yield netlink


def connect(netlink: kernel.Netlink, netns: str, ifname: str,
            parent: kernel.Link, *, mac: str, mtu: int,
            passing: str) -> None:
    """Make the macvlan of a pod, in bridge mode and up.

    May be repeated: what an ADD before it has left is removed first, as
    Kuryr does it. Refused, as with EADDRINUSE where another macvlan on the
    parent has the MAC address and keeps it, it leaves nothing.

    :param netlink: in the node's namespace
    :param passing: the name that Kuryr gives it before it renames it
    """
    with _entered(netns) as pods:
        for name in (passing, ifname):
            if kernel.index_of(name) is not None:
                _remove(pods, name, netns)
    began = time.monotonic()
    while True:
        try:
            netlink.create_macvlan(ifname, parent, netns, mac=mac, mtu=mtu)
            return
        except exceptions.KernelRefused as err:
            if err.errno == errno.EEXIST:
                break
            # The namespace that had the address last is being deleted.
            if (err.errno != errno.EADDRINUSE
                    or time.monotonic() - began >= _PATIENCE):
                raise
        time.sleep(_PAUSE)
    # The NIC of the node is named like that of the pod, and the kernel looks
    # for the name on the node, where that of the VIF is free.
    netlink.create_macvlan(passing, parent, netns, mac=mac, mtu=mtu, up=False)
    with _entered(netns) as pods:
        link = pods.link(passing)
        if link is None:
            raise exceptions.NetnsUnusable(
                netns=netns, reason='has lost the interface of the pod')
        try:
            pods.rename_and_raise(link, ifname)
        except exceptions.KernelRefused:
            for name in (passing, ifname):
                pods.delete_link(name)
            raise


def configure_l3(vif: Any, ifname: str, netns: str,
                 is_default_gateway: bool) -> None:
    """Give a pod its addresses and routes, as Kuryr's _configure_l3 does.

    In one request, where Kuryr opens IPDB and waits for each. What is there
    already, as after a first try, is fine. A gateway on no link is refused.
    """
    addresses, routes = [], []
    for subnet in vif.network.subnets.objects:
        length = subnet.cidr.prefixlen
        addresses += [ipaddress.ip_interface('%s/%d' % (each.address, length))
                      for each in subnet.ips.objects]
        routes += [(ipaddress.ip_network(str(route.cidr)),
                    ipaddress.ip_address(str(route.gateway)))
                   for route in subnet.routes.objects]
        if is_default_gateway and hasattr(subnet, 'gateway'):
            gateway = ipaddress.ip_address(str(subnet.gateway))
            routes.append((_EVERYTHING[gateway.version], gateway))
    with _entered(netns) as netlink:
        if any(each.version == 6 for each in addresses):
            # An engine may have disabled it, as Docker with --net=none.
            kernel.write_sysctl('ipv6/conf/all/disable_ipv6', 0)
        netlink.configure(ifname, addresses, routes)


def disconnect(netns: str, *names: str) -> None:
    """Delete interfaces of a pod; one that is not there is fine."""
    with _entered(netns) as netlink:
        for name in names:
            netlink.delete_link(name)


def remove_leftover(name: str) -> None:
    """Delete what an earlier ADD has left on the node under a name.

    :raises NotALeftover: if it is anything else
    """
    if kernel.index_of(name) is None:
        return
    with kernel.Netlink() as netlink:
        link = netlink.link(name)
        if (link is None or link.kind != 'macvlan'
                or link.group != UNFINISHED):
            raise exceptions.NotALeftover(
                name=name, found='an alternative name' if link is None
                else link.described)
        _remove(netlink, link.name, 'the node')


def finish(netns: str, ifname: str) -> None:
    """Take the interface that Kuryr has made for a pod out of the group."""
    with _entered(netns) as netlink:
        link = netlink.link(ifname)
        if link is not None:
            netlink.set_group(link, 0)


def _remove(netlink: kernel.Netlink, name: str, where: str) -> None:
    LOG.warning('The interface %s in %s is left from an earlier ADD: '
                'deleting it.', name, where)
    netlink.delete_link(name)
