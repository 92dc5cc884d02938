# SPDX-License-Identifier: Apache-2.0

"""Creates the interface of a pod in the pod's namespace.

Kuryr creates the interface on the node under a temporary name, moves and
renames it, and sets its MTU and MAC address one by one. Around each step,
Kuryr reads the namespace again. This module sends one request, with the same
result.

If Kuryr is killed before the move, the interface remains on the node. The VIF
does not identify this leftover, because the author of a KuryrPort chooses name
and MAC address. So a leftover is identified by its interface group: Kuryr
creates the interface in this group, and nothing else uses the group.

All functions raise NetnsUnusable if the pod's namespace cannot be entered, and
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

#: The group of a macvlan that Kuryr has not moved to its pod yet ("br0").
UNFINISHED_GROUP = 0x627230

#: Seconds to wait until a MAC address is free, and between two attempts.
_PATIENCE, _PAUSE = 1.0, 0.05

_EVERYTHING = {4: ipaddress.ip_network('0.0.0.0/0'),
               6: ipaddress.ip_network('::/0')}


def sandbox_path(netns: str) -> str:
    """Return a path of a pod's namespace that this process can open.

    For an empty path, Kuryr would use the namespace of kuryr-daemon, and
    delete the node's eth0. If a path does not exist, pyroute2.NetNS would
    create a namespace there.

    :param netns: CNI_NETNS of the request
    :raises NetnsUnusable: if the path is empty, does not exist, or leads to
        the namespace of this process
    """
    if not netns:
        raise exceptions.NetnsUnusable(netns=netns, reason='is not named')
    path = str(k_utils.convert_netns(netns))
    kernel.require_other_namespace(path)
    return path


@contextlib.contextmanager
def _entered(netns: str) -> Iterator[kernel.Netlink]:
    """Enter the namespace of a pod, and open a socket there."""
    with kernel.enter_namespace(netns), kernel.Netlink() as netlink:
        yield netlink


def connect(netlink: kernel.Netlink, netns: str, ifname: str,
            parent: kernel.Link, *, mac: str, mtu: int,
            temporary_name: str) -> None:
    """Create the macvlan of a pod, in bridge mode and up.

    As in Kuryr, interfaces that an earlier ADD has left are deleted first. If
    the kernel refuses the macvlan, no interface remains. If another macvlan on
    the parent has the MAC address, the kernel refuses with EADDRINUSE.

    :param netlink: socket in the node's namespace
    :param temporary_name: Kuryr's name of the interface before the rename
    """
    with _entered(netns) as pods:
        for name in (temporary_name, ifname):
            if kernel.find_ifindex(name) is not None:
                _remove(pods, name, netns)
    began = time.monotonic()
    while True:
        try:
            netlink.create_macvlan(ifname, parent, netns, mac=mac, mtu=mtu)
            return
        except exceptions.KernelRefused as err:
            if err.errno == errno.EEXIST:
                break
            # The previous interface with the MAC address is being deleted.
            if (err.errno != errno.EADDRINUSE
                    or time.monotonic() - began >= _PATIENCE):
                raise
        time.sleep(_PAUSE)
    # The node's NIC has the same name as the pod's interface. This kernel
    # requires a name that is free on the node too, as the temporary name is.
    netlink.create_macvlan(temporary_name, parent, netns, mac=mac, mtu=mtu,
                           up=False)
    with _entered(netns) as pods:
        link = pods.link(temporary_name)
        if link is None:
            raise exceptions.NetnsUnusable(
                netns=netns, reason='has no interface of the pod any more')
        try:
            pods.rename_and_set_up(link, ifname)
        except exceptions.KernelRefused:
            for name in (temporary_name, ifname):
                pods.delete_link(name)
            raise


def configure_l3(vif: Any, ifname: str, netns: str,
                 is_default_gateway: bool) -> None:
    """Add addresses and routes to a pod, as Kuryr's _configure_l3 does.

    This function sends one request, while Kuryr opens IPDB and waits for each
    item. Items that exist already, for example after an earlier attempt, are
    no error. The kernel refuses a gateway that is not on-link.
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
            # IPv6 may be disabled, for example by Docker with --net=none.
            kernel.write_sysctl('ipv6/conf/all/disable_ipv6', 0)
        netlink.configure(ifname, addresses, routes)


def disconnect(netns: str, *names: str) -> None:
    """Delete interfaces of a pod. A missing interface is no error."""
    with _entered(netns) as netlink:
        for name in names:
            netlink.delete_link(name)


def remove_leftover(name: str) -> None:
    """Delete the interface that an earlier ADD has left on the node.

    :raises NotALeftover: if another interface has the name
    """
    if kernel.find_ifindex(name) is None:
        return
    with kernel.Netlink() as netlink:
        link = netlink.link(name)
        if (link is None or link.kind != 'macvlan'
                or link.group != UNFINISHED_GROUP):
            raise exceptions.NotALeftover(
                name=name, found='an alternative name' if link is None
                else link.description)
        _remove(netlink, link.name, 'the node')


def clear_group(netns: str, ifname: str) -> None:
    """Reset the group of the interface that Kuryr has created."""
    with _entered(netns) as netlink:
        link = netlink.link(ifname)
        if link is not None:
            netlink.set_group(link, 0)


def _remove(netlink: kernel.Netlink, name: str, where: str) -> None:
    LOG.warning('Deleting the interface %s in %s, which an earlier ADD has '
                'left', name, where)
    netlink.delete_link(name)
