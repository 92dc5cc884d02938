# SPDX-License-Identifier: Apache-2.0

"""Creates and repairs break0. Each parent has its own."""

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
from kuryr_break0.model import IPAddress
from kuryr_break0 import policy

LOG = log.get_logger(__name__)

#: What keeps break0 from speaking to the LAN, in this order: answering the
#: LAN's ARP requests for addresses of the node; link-local addresses with
#: their duplicate detection and MLD; router solicitations; and, on a node that
#: forwards IPv6, reports of the routers' group. That is left by not being a
#: router on break0; unlike version 2, MLD version 1 says nothing of a group
#: that it has not reported (igmp6_leave_group). Packets are forwarded all the
#: same, by conf/all/forwarding (ip6_forward). If that is switched on later,
#: the group is not joined since break0 has no multicast (dev_forward_change).
QUIET = {'ipv4/conf/%s/arp_filter': 1,
         'ipv6/conf/%s/addr_gen_mode': 1,  # IN6_ADDR_GEN_MODE_NONE
         'ipv6/conf/%s/accept_ra': 0,
         'ipv6/conf/%s/force_mld_version': 1,
         'ipv6/conf/%s/forwarding': 0,
         'ipv4/conf/%s/arp_notify': 0,
         'ipv6/conf/%s/ndisc_notify': 0}
#: What keeps a pod from more than speaking to its node in its own name:
#: sources that are not reached through break0, redirects and routes that it
#: could give to the node, answers for others, the addresses of the loopback.
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
#: Below it, an interface has no IPv6 (IPV6_MIN_MTU).
_IPV6_MIN_MTU = 1280


class Difference(NamedTuple):
    """Something that a break0 is, and should not be.

    :ivar kind: what follows from it, as the doctor calls it
    :ivar text: what it is, and what it should be
    :ivar repair: makes it so
    :ivar loses_routes: whether the kernel has dropped its routes with that
    """

    kind: str
    text: str
    repair: Callable[[kernel.Netlink], None]
    loses_routes: bool = False


class Ensured(NamedTuple):
    """A break0, and what was done for it.

    :ivar needs_sync: whether it was created or brought up, so that it has no
        routes
    :ivar repaired: what it was
    """

    link: kernel.Link
    needs_sync: bool
    repaired: tuple[str, ...]


def lower_name(link: kernel.Link) -> Optional[str]:
    """Return the interface of this namespace that another is stacked on."""
    if link.lower is None or link.lower_namespace is not None:
        return None
    return kernel.format_ifname(link.lower)


def against_macvlans(link: kernel.Link) -> Optional[str]:
    """Return why no pod can be on an interface; None if one can."""
    if link.loopback:
        return 'it is the loopback'
    if not link.ethernet:
        return 'it has no MAC addresses, like a tunnel'
    if link.port_of is not None:
        master = kernel.format_ifname(link.port_of)
        return 'it is a port of %s. Name %s in its place' % (master, master)
    if link.kind == 'macvtap' or Alias.parse(link.alias):
        return 'it is %s. Name the interface that it is on' % (
            'a macvtap' if link.kind == 'macvtap'
            else 'made by kuryr-break0')
    return None


def require_fit(parent: kernel.Link) -> None:
    """Make sure that a break0 can be on an interface.

    :raises ParentUnfit: if no macvlan can
    """
    reason = against_macvlans(parent)
    if reason is not None:
        raise exceptions.ParentUnfit(parent=parent.name, reason=reason)


def derived_mac(secret: str, device: str) -> str:
    """Return the MAC address that a break0 gets.

    Pods know it by that, so one that is created again must have it again. It
    is locally administered, differs between nodes, and cannot be computed
    without the secret of the ledger.
    """
    digest = hashlib.sha256(
        ('kuryr-break0 %s %s' % (device, secret)).encode()).digest()
    octets = bytes([digest[0] & 0xfc | 0x02]) + digest[1:6]
    return octets.hex(':')


class Device:
    """The break0 of one parent, as it should be.

    :param name: its own
    :param parent: the name of its parent
    :param identity: of the ledger that it should belong to, and that says
        which MAC address pods know; None to leave both
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
        """Make sure that it exists, is what it should be, and is up.

        Call it under the lock. What another process left half-made is
        completed, since everything is examined each time.

        :param new_mac: what it gets if it is created and nothing says which
            it had
        :param needs_ipv6: as for :meth:`differences`
        :raises ParentNotFound: if there is no such parent
        :raises ParentUnfit: if no macvlan can be on it
        :raises DeviceConflict: if the name is taken by another kind of
            interface
        :raises InvalidOption: if [break0] addr names a router of the node
        :raises KernelRefused: if it cannot be made so

        One that was created for it is gone again then.

        Where a pod has taken its MAC address while it was gone or down, it
        gets another one: then all pods have to be configured again.
        """
        parent = netlink.link(self.parent)
        if parent is None:
            raise exceptions.ParentNotFound(parent=self.parent)
        link, is_new = netlink.link(self.name), False
        if link is None:
            require_fit(parent)  # or IPDB would try for ten seconds
            try:
                kernel.create_macvlan(self.name, parent, self._mac or new_mac)
                is_new = True
            except exceptions.KernelRefused:
                # Unless another process, without the lock, was faster.
                if netlink.link(self.name) is None:
                    raise
            link = netlink.link(self.name)
        if link is None:
            raise exceptions.KernelRefused(
                'keep %s' % self.name, 'it vanished at once', 0)
        self.require_ours(link, parent)
        try:
            differences = list(self.differences(
                link, parent, netlink.addresses(), needs_ipv6))
            for each in differences:
                each.repair(netlink)
        except Exception:
            if is_new:
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
        """Set it up, with another MAC address if a pod has taken its own.

        The kernel compares MAC addresses only when a macvlan is set up
        (macvlan_open), so one that is down or gone does not hold its own.
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
                raise  # an interface of the node has it, and no pod
            LOG.error('Another namespace has taken the MAC address of %s, '
                      '%s, while it was gone or down: it gets another one, '
                      'and its pods are configured with that. Find out '
                      'which: ip netns exec NAME ip link', self.name, mac)
            netlink.set_mac(link, derived_mac(secrets.token_hex(16),
                                              self.name))
            netlink.set_link_up(link)

    def _set_mtu(self, netlink: kernel.Netlink, link: kernel.Link,
                 mtu: int) -> None:
        """Set its MTU; where that brings IPv6 back, while it is down.

        For that has then the settings that new interfaces have.
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
                     address: IPAddress) -> None:
        # The node would answer itself, in place of its router.
        if address in netlink.next_hops():
            raise exceptions.InvalidOption(
                option='addr', reason='%s is %s' % (address, policy.NEXT_HOP))
        netlink.add_address(link, address)

    @staticmethod
    def _set_mac(netlink: kernel.Netlink, link: kernel.Link,
                 mac: str) -> None:
        """Give it the MAC address that pods know, unless another has it."""
        try:
            netlink.set_mac(link, mac)
        except exceptions.KernelRefused as err:
            if err.errno != errno.EADDRINUSE:
                raise
            LOG.error('%s keeps the MAC address %s, since another interface '
                      'on its parent has %s. See: ip link show type macvlan',
                      link.name, link.mac, mac)

    def require_ours(self, link: kernel.Link, parent: kernel.Link) -> None:
        """Make sure that an interface is what break0 is.

        :raises DeviceConflict: if it is not a macvlan in bridge mode on that
            parent
        """
        if (link.kind == 'macvlan' and link.mode == 'bridge'
                and (link.lower, link.lower_namespace)
                == parent.lower_of_macvlans):
            return
        found = link.description
        if link.kind == 'macvlan':
            found += ' on ' + (lower_name(link)
                               or 'an interface of another namespace')
        raise exceptions.DeviceConflict(
            device=link.name, found=found,
            expected='a macvlan in bridge mode on ' + parent.name)

    def differences(self, link: kernel.Link, parent: kernel.Link,
                    addresses: Collection[tuple[int, IPAddress]],
                    needs_ipv6: bool = False) -> Iterator[Difference]:
        """Compare what it is with what it should be.

        In the order in which that is to be repaired: it must be silent
        before it is up.

        :param addresses: those of the node, with their ifindexes
        :param needs_ipv6: whether pods on it have IPv6 addresses. Then it
            gets IPv6, unless that is disabled on all interfaces
        """
        for path, (found, value) in sysctl_drift(link.name).items():
            yield Difference(
                'answers-lan' if path.endswith(('/arp_filter', '/proxy_arp'))
                else 'heard' if path in QUIET else 'open',
                '%s is %d, must be %d' % (path.rpartition('/')[2], found,
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
        present = {address for index, address in addresses
                   if index == link.index}
        for address in present:
            # The kernel forgets addr_gen_mode while the MTU is below 1280.
            if address.version == 6 and address.is_link_local:
                yield Difference(
                    'addresses',
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
    """Return the text for pods with IPv6 on a break0 without it."""
    return ('IPv6 is disabled, but there are containers with IPv6 addresses. '
            'Enable it: sysctl -w net/%s=0; kuryr-break0 sync'
            % (DISABLE_IPV6 % name))


def sysctl_drift(name: str) -> dict[str, tuple[int, int]]:
    """Return the sysctls of a break0 that it must not have: is, must be.

    By their paths, with ``%s`` for the interface.
    """
    wanted = {**QUIET, **BORDER}
    found = {path: kernel.read_sysctl(path % name) for path in wanted}
    return {path: (value, wanted[path]) for path, value in found.items()
            if value not in (wanted[path], None)}
