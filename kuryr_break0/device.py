# Licensed under the Apache License, Version 2.0 (the "License"); you may
# not use this file except in compliance with the License. You may obtain
# a copy of the License at
#
#      http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS, WITHOUT
# WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the
# License for the specific language governing permissions and limitations
# under the License.

"""What break0 is, and how it is made so."""

from __future__ import annotations

import hashlib
from typing import NamedTuple, Optional

from oslo_log import log as logging

from kuryr_break0 import config
from kuryr_break0 import exceptions
from kuryr_break0 import netlink

LOG = logging.getLogger(__name__)

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
         'ipv6/conf/%s/forwarding': 0}


class Ensured(NamedTuple):
    """What break0 is now, and what was done for that.

    :ivar bare: whether it was created or brought up, which means that it has
        no routes
    :ivar corrected: whether it was there, and not as it should be
    """

    link: netlink.Link
    bare: bool
    corrected: bool


def derived_mac(device: str, parent_mac: str) -> str:
    """A MAC address that the same device on the same parent always gets.

    Pods remember break0 by its MAC address, so one that is created again
    must keep it. It is locally administered, and differs between nodes as
    the parents' addresses do.
    """
    digest = hashlib.sha256(
        ('kuryr-break0 %s %s' % (device, parent_mac)).encode()).digest()
    octets = bytes([digest[0] & 0xfc | 0x02]) + digest[1:6]
    return ':'.join('%02x' % octet for octet in octets)


def ensure(kernel: netlink.Kernel, options: config.Options,
           parent_name: str) -> Ensured:
    """Make sure that break0 exists, is what it should be, and is up.

    To be called under the lock. What another process left half-made is
    completed, since everything is looked at each time.

    :param parent_name: the interface that the pods are on
    :raises ParentNotFound: if there is no such interface
    :raises DeviceConflict: if the name is taken by another kind of interface
    :raises KernelRefused: if it cannot be made so; one that was created for
        it is gone again
    """
    parent = kernel.link(parent_name)
    if parent is None:
        raise exceptions.ParentNotFound(parent=parent_name)
    link = kernel.link(options.device)
    if link is not None:
        require_ours(link, parent)
        tuned, changed = _tune(kernel, options, link, parent)
        if changed:
            LOG.info('Corrected %s on %s: %s', link.name, parent.name,
                     ', '.join(changed))
        return Ensured(tuned, not link.up, bool(changed))
    try:
        netlink.create_macvlan(
            options.device, parent,
            options.mac or derived_mac(options.device, parent.mac))
        link = kernel.link(options.device)
        if link is None:
            raise exceptions.KernelRefused(
                'keep %s' % options.device, 'it vanished at once', 0)
        tuned, _ = _tune(kernel, options, link, parent)
    except Exception:
        kernel.delete_link(options.device)
        raise
    LOG.info('Created %s: a macvlan in bridge mode on %s, MAC address %s, '
             'MTU %d', tuned.name, parent.name, tuned.mac, tuned.mtu)
    return Ensured(tuned, bare=True, corrected=False)


def loud(name: str) -> dict[str, int]:
    """The sysctls that have to change for it to be quiet, as what."""
    wanted = {path % name: value for path, value in QUIET.items()}
    return {path: value for path, value in wanted.items()
            if netlink.read_sysctl(path) not in (value, None)}


def require_ours(link: netlink.Link, parent: netlink.Link) -> None:
    """Make sure that an interface is what break0 is.

    :raises DeviceConflict: if it is not a macvlan in bridge mode on that
        parent
    """
    if (link.kind == 'macvlan' and link.mode == 'bridge'
            and (link.lower, link.lower_elsewhere)
            == parent.lower_of_macvlans):
        return
    found = 'a %s' % (link.kind or 'physical interface')
    if link.kind == 'macvlan':
        found += ' in %s mode on %s' % (
            link.mode,
            link.lower_name or 'an interface of another namespace')
    raise exceptions.DeviceConflict(
        device=link.name, found=found,
        expected='a macvlan in bridge mode on ' + parent.name)


def _tune(kernel: netlink.Kernel, options: config.Options,
          link: netlink.Link, parent: netlink.Link
          ) -> tuple[netlink.Link, list[str]]:
    """Correct what is not as it should be; names what that was."""
    sysctls = loud(link.name)
    for path, value in sysctls.items():
        netlink.write_sysctl(path, value, options.sysctl_dir)
    changes: dict[str, Optional[object]] = {}
    if link.mtu != parent.mtu:
        changes['mtu'] = parent.mtu
    if options.mac and link.mac != options.mac:
        changes['address'] = options.mac
    if changes:
        kernel.change_link(link, **changes)
    if link.multicast or not link.up:
        kernel.raise_link(link)
        changes['state'] = 'up'
    for address in options.addr:
        kernel.put_address(link, address)
    if changes:
        link = kernel.link(link.name) or link
    return link, [*sysctls, *changes]
