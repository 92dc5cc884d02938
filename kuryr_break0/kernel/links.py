# SPDX-License-Identifier: Apache-2.0

"""An rtnetlink socket for interfaces, their addresses, and namespaces."""

from __future__ import annotations

import errno
import ipaddress
import os
from typing import Any, Callable, Optional

from kuryr_break0.kernel import namespaces
from kuryr_break0.kernel import netlink
from kuryr_break0.kernel import values
from kuryr_break0.kernel import wire
from kuryr_break0 import model


_SKIP_COUNTERS = netlink.number(wire.IFLA_EXT_MASK,
                                wire.RTEXT_FILTER_SKIP_STATS)
_ANY_NUMBER = netlink.S32.pack(-1)  # NETNSA_NSID_NOT_ASSIGNED


class LinkSocket(netlink.RequestSocket):
    """The methods of :class:`kuryr_break0.kernel.Netlink` for interfaces."""

    options = (*netlink.RequestSocket.options,
               netlink.NETLINK_GET_STRICT_CHK)

    def _get(self, action: str, kind: int, body: bytes) -> Any:
        """Send a request that has a single answer, and return the answer."""
        (answer,), _ = self._ask(action, netlink.Message(kind, 0, body),
                                 wire.parse)
        return answer

    def _list(self, action: str, kind: int, body: bytes,
              read: Callable[[netlink.Received], Any] = wire.parse,
              merges: bool = False) -> list[Any]:
        return self._dump(action, netlink.Message(kind, 0, body), read, merges)

    def link(self, name: str) -> Optional[values.Link]:
        """Return the interface with a name, or None."""
        if not _is_name(name):
            return None
        with netlink.tolerate_errors(errno.ENODEV):
            link: values.Link = self._get(
                'read the interface ' + name, wire.RTM_GETLINK,
                wire.pack_link() + netlink.text(wire.IFLA_IFNAME, name)
                + _SKIP_COUNTERS)
            return link
        return None

    def links(self) -> list[values.Link]:
        """List all interfaces, by a dump."""
        return self._links(b'')

    def macvlans(self) -> list[values.Link]:
        """List the macvlans, by a dump."""
        return [each for each in self._links(wire.OF_KIND_MACVLAN)
                if each.kind == 'macvlan']  # old kernels ignore the filter

    def _links(self, attributes: bytes) -> list[values.Link]:
        return self._list('list the interfaces', wire.RTM_GETLINK,
                          wire.pack_link() + _SKIP_COUNTERS + attributes)

    def create_macvlan(self, name: str, parent: values.Link, netns: str, *,
                       mac: str, mtu: int, up: bool = True) -> None:
        """Create a macvlan in bridge mode in a namespace.

        The kernel creates the macvlan directly in the namespace. If this is
        not the namespace of the parent, the parent's namespace receives no
        event about the macvlan.

        :param netns: the path of the namespace
        :raises KernelRefused: with EEXIST if an interface of the namespace has
            the name. Linux 5.10 and 6.12, but not 6.18, also refuse the name
            of an interface in this thread's namespace
        """
        flags = wire.IFF_UP if up else 0
        with namespaces.open_namespace(netns) as other:
            self._order(
                'create the macvlan %s on %s' % (name, parent.name),
                netlink.Message(
                    wire.RTM_NEWLINK,
                    netlink.NLM_F_CREATE | netlink.NLM_F_EXCL,
                    wire.pack_link(0, flags, flags)
                    + netlink.text(wire.IFLA_IFNAME, name)
                    + netlink.number(wire.IFLA_LINK, parent.index)
                    + netlink.attribute(wire.IFLA_ADDRESS, wire.pack_mac(mac))
                    + netlink.number(wire.IFLA_MTU, mtu)
                    + netlink.number(wire.IFLA_NET_NS_FD, other)
                    + wire.pack_macvlan()))

    def rename_and_set_up(self, link: values.Link, name: str) -> None:
        """Rename an interface that is down, and bring it up."""
        self._alter(
            'rename the interface %s to %s and set it up' % (link.name, name),
            link, netlink.text(wire.IFLA_IFNAME, name),
            wire.IFF_UP, wire.IFF_UP)

    def set_mtu(self, link: values.Link, mtu: int) -> None:
        self._set(link, 'MTU to %d' % mtu, netlink.number(wire.IFLA_MTU, mtu))

    def set_mac(self, link: values.Link, mac: str) -> None:
        self._set(link, 'MAC address to ' + mac,
                  netlink.attribute(wire.IFLA_ADDRESS, wire.pack_mac(mac)))

    def set_vrf(self, link: values.Link, vrf: Optional[values.Vrf]) -> None:
        """Move an interface into a VRF; None removes it from its VRF."""
        self._set(link, 'VRF',
                  netlink.number(wire.IFLA_MASTER, vrf.ifindex if vrf else 0))

    def set_alias(self, link: values.Link, alias: str) -> None:
        """Set the alias of an interface.

        The kernel ignores an alias in the request that creates an interface.
        """
        self._set(link, 'alias to ' + alias,
                  netlink.attribute(wire.IFLA_IFALIAS, os.fsencode(alias)))

    def set_protodown_off(self, link: values.Link) -> None:
        self._set(link, 'protodown to off',
                  netlink.attribute(wire.IFLA_PROTO_DOWN, b'\0'))

    def set_group(self, link: values.Link, group: int) -> None:
        self._set(link, 'group to %d' % group,
                  netlink.number(wire.IFLA_GROUP, group))

    def set_link_up(self, link: values.Link) -> None:
        """Set an interface up, with multicast off."""
        self._alter(
            'set up the interface ' + link.name, link, b'', wire.IFF_UP,
            wire.IFF_UP | wire.IFF_MULTICAST,
            'If another macvlan has this MAC address, delete it or restore '
            'its name. To list the macvlans, run: ip link show type macvlan')

    def set_link_down(self, link: values.Link) -> None:
        self._alter('set down the interface ' + link.name, link, b'', 0,
                    wire.IFF_UP)

    def _set(self, link: values.Link, what: str, attribute: bytes) -> None:
        self._alter('set the %s of %s' % (what, link.name), link, attribute)

    def _alter(self, action: str, link: values.Link, attributes: bytes,
               flags: int = 0, mask: int = 0, advice: str = '') -> None:
        self._order(action, netlink.Message(
            wire.RTM_NEWLINK, 0, wire.pack_link(link.index, flags, mask)
            + attributes), advice=advice)

    def delete_link(self, name: str) -> None:
        """Delete an interface; do nothing if it does not exist."""
        if _is_name(name):
            with netlink.tolerate_errors(errno.ENODEV):
                self._order('delete the interface ' + name, netlink.Message(
                    wire.RTM_DELLINK, 0,
                    wire.pack_link() + netlink.text(wire.IFLA_IFNAME, name)))

    def add_address(self, link: values.Link, address: model.IPAddress) -> None:
        """Add a /32 or /128 address to an interface.

        Duplicate address detection is off, because it sends packets to the
        LAN.
        """
        self._order(
            'add the address %s to %s' % (address, link.name),
            netlink.Message(
                wire.RTM_NEWADDR, netlink.NLM_F_CREATE | netlink.NLM_F_REPLACE,
                wire.pack_address(link.index, ipaddress.ip_interface(address),
                                  wire.IFA_F_NODAD * (address.version == 6))))

    def delete_link_local(self, link: values.Link, address: model.IPAddress
                          ) -> None:
        """Delete a link-local address that the kernel has assigned."""
        self._order('delete the address %s from %s' % (address, link.name),
                    netlink.Message(wire.RTM_DELADDR, 0, wire.pack_address(
                        link.index, ipaddress.ip_interface('%s/64' % address)
                    )))

    def addresses(self) -> list[values.InterfaceAddress]:
        """List the addresses of all interfaces, by a dump.

        If the node's addresses change during each dump, for example the
        addresses of Services, the list may contain addresses that were just
        deleted. For a pod, the list decides which addresses belong to the
        pod. So if the pod's addresses change during each dump, the method
        raises KernelRefused.
        """
        return list(dict.fromkeys(
            values.InterfaceAddress(each.ifindex, each.address)
            for each in self.address_states(merges=self._most is None)))

    def address_states(self, ifindex: int = 0, merges: bool = False
                       ) -> list[values.AddressState]:
        """List the addresses of interfaces with their flags, by a dump.

        :param ifindex: ifindex of the interface; 0 for all interfaces
        :param merges: see :meth:`netlink.RequestSocket._dump`
        """
        return self._list('list the addresses', wire.RTM_GETADDR,
                          wire.pack_address_dump(ifindex), merges=merges)

    def namespace_number(self, fd: int) -> int:
        """Return the number (nsid) of a namespace; -1 if it has none."""
        answer: int = self._get('read the id of a namespace', wire.RTM_GETNSID,
                                bytes(4) + netlink.number(wire.NETNSA_FD, fd))
        return answer

    def ensure_namespace_number(self, fd: int) -> int:
        """Return the number of a namespace; assign one if it has none.

        :raises KernelRefused: if the kernel assigns no number
        """
        present = self.namespace_number(fd)
        if present >= 0:
            return present
        with netlink.tolerate_errors(errno.EEXIST):
            self._order('assign an id to a namespace', netlink.Message(
                wire.RTM_NEWNSID, 0,
                bytes(4) + netlink.number(wire.NETNSA_FD, fd)
                + netlink.attribute(wire.NETNSA_NSID, _ANY_NUMBER)))
        return self.namespace_number(fd)


def _is_name(name: str) -> bool:
    """Return whether the kernel accepts a name in a look-up."""
    try:
        return 0 < len(os.fsencode(name)) < 16
    except UnicodeEncodeError:
        return False  # the name cannot be encoded
