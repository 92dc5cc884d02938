# SPDX-License-Identifier: Apache-2.0

"""Creates and repairs the break0 of a parent."""

from __future__ import annotations

import errno
import hashlib
import secrets
from typing import Callable, Collection, Iterator, NamedTuple, Optional

from kuryr_break0 import config
from kuryr_break0 import exceptions
from kuryr_break0 import kernel
from kuryr_break0.ledger.identity import Alias
from kuryr_break0.ledger.identity import Identity
from kuryr_break0 import log
from kuryr_break0 import model
from kuryr_break0 import policy

LOG = log.get_logger(__name__)

#: Sysctls that keep break0 silent on the LAN. They prevent, in this order:
#: answers to the LAN's ARP requests for addresses of the node; link-local
#: addresses, with their duplicate address detection and MLD reports; router
#: solicitations; MLD messages for the group of all routers; and announcements
#: of addresses.
#:
#: On a node that forwards IPv6, an interface is in the group of all routers
#: until its own sysctl forwarding is 0. If an interface leaves a group that it
#: has not reported, MLD version 1 sends no message, unlike MLD version 2
#: (igmp6_leave_group). The kernel still forwards packets from break0, by
#: conf/all/forwarding (ip6_forward). If a user enables conf/all/forwarding
#: later, break0 does not join the group, because multicast is off on break0
#: (dev_forward_change).
QUIET = {'ipv4/conf/%s/arp_filter': 1,
         'ipv6/conf/%s/addr_gen_mode': 1,  # IN6_ADDR_GEN_MODE_NONE
         'ipv6/conf/%s/accept_ra': 0,
         'ipv6/conf/%s/force_mld_version': 1,
         'ipv6/conf/%s/forwarding': 0,
         'ipv4/conf/%s/arp_notify': 0,
         'ipv6/conf/%s/ndisc_notify': 0}
#: Sysctls that limit the influence of a pod on its node. The node drops a
#: packet of a pod if the route to its source does not lead through break0, or
#: if its destination is a loopback address. The node ignores redirects, source
#: routes, prefixes and gratuitous ARP of pods. It sends no redirects, and does
#: not answer for other hosts.
BORDER = {'ipv4/conf/%s/rp_filter': 1,
          'ipv4/conf/%s/accept_redirects': 0,
          'ipv4/conf/%s/send_redirects': 0,
          'ipv4/conf/%s/accept_source_route': 0,
          'ipv4/conf/%s/proxy_arp': 0,
          'ipv4/conf/%s/proxy_arp_pvlan': 0,
          'ipv4/conf/%s/arp_accept': 0,
          'ipv4/conf/%s/route_localnet': 0,
          'ipv6/conf/%s/accept_redirects': 0,
          'ipv6/conf/%s/accept_source_route': 0,
          'ipv6/conf/%s/proxy_ndp': 0,
          'ipv6/conf/%s/autoconf': 0}
DISABLE_IPV6 = 'ipv6/conf/%s/disable_ipv6'
#: With a smaller MTU, an interface has no IPv6 (IPV6_MIN_MTU).
_IPV6_MIN_MTU = 1280


class Difference(NamedTuple):
    """A difference between a break0 and its desired state.

    :ivar kind: id of the doctor's finding, without the prefix ``break0-``
    :ivar text: the present value and the desired one
    :ivar repair: a function that sets the desired value
    :ivar loses_routes: whether the difference or its repair makes the kernel
        delete the routes of break0
    """

    kind: str
    text: str
    repair: Callable[[kernel.Netlink], None]
    loses_routes: bool = False


class Ensured(NamedTuple):
    """A break0 in its desired state.

    :ivar needs_sync: whether a sync must restore its routes, because the
        break0 was created, or because a repair deleted the routes
    :ivar repaired: the texts of the differences that were repaired
    """

    link: kernel.Link
    needs_sync: bool
    repaired: tuple[str, ...]


def lower_name(link: kernel.Link) -> Optional[str]:
    """Return the name of the lower interface of a link.

    Return None if there is no lower interface, or if the lower interface is in
    another namespace.
    """
    if link.lower is None or link.lower_namespace is not None:
        return None
    return kernel.format_ifname(link.lower)


def against_macvlans(link: kernel.Link) -> Optional[str]:
    """Return why an interface cannot be a parent; None if it can."""
    if link.loopback:
        return 'it is the loopback'
    if not link.ethernet:
        return 'it has no MAC addresses, like a tunnel'
    if link.port_of is not None:
        master = kernel.format_ifname(link.port_of)
        return 'it is a port of %s. Name %s in its place' % (master, master)
    if link.kind == 'macvtap' or Alias.parse(link.alias):
        return 'it is %s. Name the interface below it' % (
            'a macvtap' if link.kind == 'macvtap'
            else 'made by kuryr-break0')
    return None


def require_fit(parent: kernel.Link) -> None:
    """Check that an interface can be the parent of a break0.

    :raises ParentUnfit: if it cannot have macvlans
    """
    reason = against_macvlans(parent)
    if reason is not None:
        raise exceptions.ParentUnfit(parent=parent.name, reason=reason)


def derived_mac(secret: str, device: str) -> str:
    """Derive the MAC address of a new break0 from a secret.

    Pods have the MAC address in their neighbour tables, so a break0 that is
    created again must get the same MAC address. The MAC address is locally
    administered, differs between nodes, and cannot be computed without the
    secret of the ledger.
    """
    digest = hashlib.sha256(
        ('kuryr-break0 %s %s' % (device, secret)).encode()).digest()
    octets = bytes([digest[0] & 0xfc | 0x02]) + digest[1:6]
    return octets.hex(':')


class Device:
    """The desired state of the break0 of one parent.

    :param name: the name of the break0
    :param parent: the name of its parent
    :param identity: the identity of the ledger that must own the break0. The
        identity contains the MAC address that pods know. None to keep the
        present owner and MAC address
    """

    def __init__(self, options: config.Options, name: str, parent: str,
                 identity: Optional[Identity] = None) -> None:
        self.name = name
        self.parent = parent
        self._options = options
        self._alias = (identity.alias(options.state_dir)
                       if identity is not None else None)
        self._mac = (identity.macs.get(name) if identity is not None
                     else None)
        self._policy = policy.Policy(options)

    def ensure(self, netlink: kernel.Netlink, new_mac: str,
               needs_ipv6: bool = False) -> Ensured:
        """Create or repair the break0, and bring it up.

        The caller must hold the lock. Each call examines the whole state, so
        it also completes a break0 that a killed process left unfinished. A new
        break0 is deleted again if its configuration fails.

        If the break0 was gone or down and a pod has taken its MAC address, the
        break0 gets another MAC address, and all pods must be configured again.

        :param new_mac: the MAC address of a new break0, if the identity does
            not contain one
        :param needs_ipv6: as for :meth:`differences`
        :raises ParentNotFound: if there is no such parent
        :raises ParentUnfit: if the parent cannot have macvlans
        :raises DeviceConflict: if the name is taken by another kind of
            interface
        :raises InvalidOption: if [break0] addr names a router of the node
        :raises KernelRefused: if the kernel refuses to create or repair the
            break0
        """
        parent = netlink.link(self.parent)
        if parent is None:
            raise exceptions.ParentNotFound(parent=self.parent)
        link, is_created = netlink.link(self.name), False
        is_missing = link is None
        if link is None:
            require_fit(parent)  # otherwise IPDB retries for ten seconds
            try:
                kernel.create_macvlan(self.name, parent, self._mac or new_mac)
                is_created = True
            except exceptions.KernelRefused:
                # IPDB can fail after the kernel has created the interface, or
                # because a process without the lock has created the interface.
                if netlink.link(self.name) is None:
                    raise
            link = netlink.link(self.name)
        if link is None:
            raise exceptions.KernelRefused(
                'keep %s' % self.name, 'it vanished at once', 0)
        self.require_ours(link, parent)
        is_new = is_missing and not link.alias
        try:
            differences = list(self.differences(
                link, parent, netlink.addresses(), needs_ipv6))
            for each in differences:
                each.repair(netlink)
        except Exception:
            if is_created:
                netlink.delete_link(self.name)
            raise
        if differences:
            link = netlink.link(self.name) or link
        if is_new:
            LOG.info('Created %s: a macvlan in bridge mode on %s, MAC address '
                     '%s, MTU %d', link.name, parent.name, link.mac, link.mtu)
            return Ensured(link, True, ('it was missing',))
        repaired = tuple(each.text for each in differences)
        if repaired:
            LOG.info('Repaired %s on %s: %s', link.name, parent.name,
                     '; '.join(repaired))
        return Ensured(link, any(each.loses_routes for each in differences),
                       repaired)

    def _raise(self, netlink: kernel.Netlink, link: kernel.Link) -> None:
        """Bring the break0 up, with another MAC address if necessary.

        The kernel compares MAC addresses only when it brings a macvlan up
        (macvlan_open). So a pod can take the MAC address of a break0 that is
        down or gone.
        """
        try:
            netlink.set_link_up(link)
        except exceptions.KernelRefused as err:
            if err.errno != errno.EADDRINUSE:
                raise
            links = netlink.links()
            mac = next((each.mac for each in links
                        if each.index == link.index), link.mac)
            if any(each.mac == mac and each.index != link.index
                   for each in links):
                raise  # an interface of the node has the MAC address
            LOG.error('An interface in another namespace took the MAC '
                      'address %s while %s was missing or down. %s gets a '
                      'new MAC address, and its pods are configured with the '
                      'new one. To find the interface, list the links of each '
                      'namespace: ip netns exec NAME ip link',
                      mac, self.name, self.name)
            netlink.set_mac(link, derived_mac(secrets.token_hex(16),
                                              self.name))
            netlink.set_link_up(link)

    def _set_mtu(self, netlink: kernel.Netlink, link: kernel.Link,
                 mtu: int) -> None:
        """Set the MTU, and the sysctls if the kernel adds IPv6 again.

        When the MTU reaches 1280, the kernel adds IPv6 with the default values
        of the sysctls. So the break0 stays down until our values are set.
        """
        if not link.mtu < _IPV6_MIN_MTU <= mtu:
            netlink.set_mtu(link, mtu)
            return
        netlink.set_link_down(link)
        netlink.set_mtu(link, mtu)
        for path, (_, value) in sysctl_drift(link.name).items():
            kernel.write_sysctl(path % link.name, value,
                                self._options.sysctl_dir)
        self._raise(netlink, link)

    @staticmethod
    def _put_address(netlink: kernel.Netlink, link: kernel.Link,
                     address: model.IPAddress) -> None:
        # With a router's address on break0, the node would not reach that
        # router.
        if address in netlink.next_hops():
            raise exceptions.InvalidOption(
                option='addr', reason='%s is %s' % (address, policy.NEXT_HOP))
        netlink.add_address(link, address)

    @staticmethod
    def _set_mac(netlink: kernel.Netlink, link: kernel.Link,
                 mac: str) -> None:
        """Set the MAC address, unless another interface has it."""
        try:
            netlink.set_mac(link, mac)
        except exceptions.KernelRefused as err:
            if err.errno != errno.EADDRINUSE:
                raise
            LOG.error('%s keeps the MAC address %s, since another interface '
                      'on its parent has %s. See: ip link show type macvlan',
                      link.name, link.mac, mac)

    def require_ours(self, link: kernel.Link, parent: kernel.Link) -> None:
        """Check that an interface can serve as the break0 of a parent.

        :raises DeviceConflict: if it is not a macvlan in bridge mode on that
            parent
        """
        if (link.kind == 'macvlan' and link.mode == 'bridge'
                and (link.lower, link.lower_namespace)
                == parent.lower_of_macvlans):
            return
        description = link.description
        if link.kind == 'macvlan':
            description += ' on ' + (lower_name(link)
                                     or 'an interface of another namespace')
        raise exceptions.DeviceConflict(
            device=link.name, found=description,
            expected='a macvlan in bridge mode on ' + parent.name)

    def differences(self, link: kernel.Link, parent: kernel.Link,
                    addresses: Collection[tuple[int, model.IPAddress]],
                    needs_ipv6: bool = False) -> Iterator[Difference]:
        """Compare the break0 with its desired state.

        Differences are in the order of their repair: the break0 must be silent
        on the LAN before it is up.

        :param addresses: the addresses of the node, with their ifindexes
        :param needs_ipv6: whether pods on the break0 have IPv6 addresses. If
            so, IPv6 must be enabled on the break0, unless the node has
            disabled IPv6 on all interfaces
        """
        for path, (actual, value) in sysctl_drift(link.name).items():
            yield Difference(
                'answers-lan' if path.endswith(('/arp_filter', '/proxy_arp'))
                else 'heard' if path in QUIET else 'open',
                '%s is %d, must be %d' % (path.rpartition('/')[2], actual,
                                          value),
                lambda _, path=path, value=value:  # type: ignore[misc]
                kernel.write_sysctl(path % link.name, value,
                                    self._options.sysctl_dir))
        if needs_ipv6 and kernel.read_sysctl(DISABLE_IPV6 % link.name) == 1 \
                and kernel.read_sysctl(DISABLE_IPV6 % 'all') == 0:
            yield Difference(
                'ipv6', ipv6_text(link.name),
                lambda _: kernel.write_sysctl(DISABLE_IPV6 % link.name, 0,
                                              self._options.sysctl_dir),
                loses_routes=True)
        if link.mtu != parent.mtu:
            yield Difference(
                'mtu', 'its MTU is %d, must be %d' % (link.mtu, parent.mtu),
                lambda netlink: self._set_mtu(netlink, link, parent.mtu),
                loses_routes=link.mtu < _IPV6_MIN_MTU <= parent.mtu)
        mac = self._mac
        if mac is not None and link.mac != mac:
            yield Difference(
                'mac', 'its MAC address is %s, but pods were configured with '
                '%s' % (link.mac, mac),
                lambda netlink: self._set_mac(netlink, link, str(mac)))
        alias = self._alias
        if alias is not None and link.alias != str(alias):
            yield Difference(
                'owner', 'its alias does not name this ledger',
                lambda netlink: netlink.set_alias(link, str(alias)))
        if link.vrf != parent.vrf:
            yield Difference(
                'vrf', 'it is not in the VRF of %s' % parent.name if parent.vrf
                else 'it is in a VRF, and %s is not' % parent.name,
                lambda netlink: netlink.set_vrf(link, parent.vrf),
                loses_routes=True)
        if link.multicast:
            yield Difference('heard', 'multicast is on, must be off',
                             lambda netlink: self._raise(netlink, link))
        if not link.up:
            yield Difference('down', 'it is down',
                             lambda netlink: self._raise(netlink, link),
                             loses_routes=True)
        if link.protodown:
            yield Difference('down', 'protodown is on, must be off',
                             lambda netlink: netlink.set_protodown_off(link))
        present = {address for index, address in addresses
                   if index == link.index}
        for address in present:
            # If the MTU falls below 1280, the kernel removes IPv6. When the
            # kernel adds IPv6 again, addr_gen_mode has its default value, and
            # break0 can get a link-local address.
            if address.version == 6 and address.is_link_local:
                yield Difference(
                    'heard',
                    'it has the address %s, must have none' % address,
                    lambda netlink, address=address:  # type: ignore[misc]
                    netlink.delete_link_local(link, address))
        for address in self._policy.own_addresses(addresses, parent.index,
                                                  self.name):
            if address not in present:
                yield Difference(
                    'addresses', 'it lacks the address %s' % address,
                    lambda netlink, address=address:  # type: ignore[misc]
                    self._put_address(netlink, link, address))


def ipv6_text(name: str) -> str:
    """Return the text of the problem that IPv6 is disabled on a break0."""
    return ('IPv6 is disabled on %s, but there are containers with IPv6 '
            'addresses. Enable it: sysctl -w net/%s=0; kuryr-break0 sync'
            % (name, DISABLE_IPV6 % name))


def sysctl_drift(name: str) -> dict[str, tuple[int, int]]:
    """Return the present and the desired value of each drifted sysctl.

    The keys are paths, with ``%s`` for the interface.
    """
    expected = {**QUIET, **BORDER}
    actual = {path: kernel.read_sysctl(path % name) for path in expected}
    return {path: (value, expected[path]) for path, value in actual.items()
            if value not in (expected[path], None)}
