# SPDX-License-Identifier: Apache-2.0

"""``kuryr-break0 bind`` and ``unbind``: manual binds."""

from __future__ import annotations

import re
from typing import Any, Optional

from oslo_config import cfg

from kuryr_break0.break0.device import lower_name
from kuryr_break0.break0.devices import Devices
from kuryr_break0.cli import common
from kuryr_break0.cli import names
from kuryr_break0.cli import output
from kuryr_break0.cli import parser
from kuryr_break0 import config
from kuryr_break0 import exceptions
from kuryr_break0 import kernel
from kuryr_break0.ledger import Ledger
from kuryr_break0.manager import Break0Manager
from kuryr_break0 import model
from kuryr_break0 import option_types

_BIND = """\
Make addresses of a container reachable through break0, if neither Kuryr nor
CNI nor discovery binds it. The container must have a macvlan in bridge mode
on an interface of the node. Agent and sync then repair it like a pod.

With --netns, MAC address and parent are read from the namespace, and also the
addresses if you give none. The container is configured to reach the node. Its
addresses are unbound when the namespace is gone.

Without --netns, as for a virtual machine, only the node is configured. Give
--mac, unless all addresses are IPv4 and the node can find the MAC address by
ARP. The addresses stay bound until you unbind them, or until the macvtap with
that MAC address is gone.

Exit status: 0 if the addresses are bound, 1 if an address belongs to another
owner or has a route of another program, 2 for wrong arguments, 3 if the kernel
or the state directory refuses.
"""
_BIND_EPILOG = """\
example:
  kuryr-break0 bind 192.0.2.80 2001:db8::80 --owner web \\
      --netns /run/netns/web

For Docker and Podman, the output of docker inspect or podman inspect has the
path of the namespace as SandboxKey.
"""
_UNBIND = """\
Revert bind. Give the addresses and --owner. To unbind all addresses of a
container or pod, including addresses bound by Kuryr, CNI or the agent, give
--pod. If discovery finds the container, the agent binds it again. An address
of another owner stays bound. Exit status: 0 if the addresses are unbound now,
1 if one belongs to another owner, 2 for wrong arguments, 3 if the kernel or
the state directory refuses.
"""
_UNBIND_EPILOG = """\
examples:
  kuryr-break0 unbind 192.0.2.80 2001:db8::80 --owner web
  kuryr-break0 unbind --pod web
"""
#: Errors in the arguments, or in the interface or namespace that they name.
_NOT_MEANT = (exceptions.AddressRefused, exceptions.InputRefused,
              exceptions.NetnsUnusable, exceptions.NotItsAddress,
              exceptions.ParentMismatch, exceptions.ParentNotFound,
              exceptions.ParentUnfit)


def add_parsers(subparsers: Any) -> None:
    bind = parser.add_verb(subparsers, 'bind', _bind, _BIND, _BIND_EPILOG)
    unbind = parser.add_verb(subparsers, 'unbind', _unbind, _UNBIND,
                             _UNBIND_EPILOG)
    for each in (bind, unbind):
        each.add_value(
            'address', 'ADDRESS', 'IPv4 or IPv6 address' + (
                ' (default: all addresses of the interface in the namespace)'
                if each is bind else ''),
            option_types.host_address, nargs='*')
        each.add_value(
            '--owner', 'NAME', 'owner of the addresses: a unique name of your '
            'choice; unbind needs the same name', _owner,
            required=each is bind)
        each.add_value(
            '--ifname', 'NAME', 'interface of the container (default: eth0%s)'
            % ('' if each is bind else ', or with --pod any'),
            option_types.device_name,
            default='eth0' if each is bind else None)
    unbind.add_value('--pod', 'NAME', 'name of a container or pod')
    bind.add_value(
        '--netns', 'PATH', "absolute path of the container's network "
        'namespace', option_types.absolute_path)
    bind.add_value(
        '--mac', 'MAC', "MAC address of the container's interface (default: "
        'read from the namespace)', option_types.unicast_mac)
    bind.add_value(
        '--parent', 'NAME', "parent of the container's macvlan (default: "
        '[break0] parent, then [binding] link_iface, then the actual parent)',
        option_types.device_name)


def _owner(name: str) -> str:
    if not re.fullmatch(r'[^\s/]{1,128}', name):
        raise ValueError('%r is not a name: 1 to 128 characters without '
                         'white space and "/" are allowed' % name)
    return name


def _bind(conf: cfg.ConfigOpts, options: config.Options) -> int:
    command = conf.command
    owner = model.Owner(command.owner, command.ifname)
    parent = command.parent or options.parent or config.read_link_iface(conf)
    if parent is not None:  # it may be an altname
        parent = kernel.find_current_name(parent, kernel.find_ifindex(parent))
    mac, addresses = command.mac, list(dict.fromkeys(command.address))
    ledger = Ledger(options.state_dir)
    ledger.prepare()
    devices = Devices(options, ledger)
    manager = Break0Manager(options)
    try:
        if command.netns is not None:
            macvlan = kernel.find_macvlan(command.netns, command.ifname,
                                          parent)
            parent = macvlan.parent
            addresses = addresses or list(macvlan.addresses)
            macvlan.require(addresses, mac)
            mac = macvlan.link.mac
        if not addresses:
            raise exceptions.NoAddress(owner=owner)
        if mac is None and any(each.version == 6 for each in addresses):
            raise exceptions.WrongUsage(
                'For an IPv6 address, give --mac or --netns: break0 cannot '
                'find a MAC address by IPv6.')
        if parent is None:
            raise exceptions.WrongUsage(
                'The parent of %s is not known. Give --netns or --parent, or '
                'set [break0] parent.' % ', '.join(map(str, addresses)))
        if command.mac is not None:
            _require_other(command.mac, parent, devices.names())
        manager.bind(owner, addresses, parent=parent, mac=mac,
                     netns=command.netns, yielding=True,
                     origin=model.Origin.MANUAL)
    except (exceptions.AddressTaken, exceptions.ForeignRoute) as err:
        return common.fail(common.DRIFT, err)
    except exceptions.NotAMacvlan as err:
        return common.fail(common.USAGE, '%s Give the name of a macvlan with '
                           '--ifname.' % err)
    except _NOT_MEANT as err:
        return common.fail(common.USAGE, err)
    finally:
        manager.try_to_housekeep()
    device = devices.name(parent) or options.device
    output.show(
        command.output,
        {**vars(owner), 'interface': device,
         'addresses': list(map(str, addresses))},
        ['Bound %s to %s for %s' % (address, device, owner)
         for address in addresses])
    return common.IN_SYNC


def _require_other(mac: str, parent: str, devices: set[str]) -> None:
    """Refuse a MAC address of the parent, a break0 or an unfit macvtap.

    :param mac: the MAC address that was given for a container
    :param devices: names of the break0s
    :raises WrongUsage: if the parent, a break0, or a macvtap that is on
        another parent or not in bridge mode has the MAC address
    """
    with kernel.Netlink() as netlink:
        links = [link for link in netlink.links() if link.mac == mac]
    for link in links:
        if link.name in (parent, *devices):
            raise exceptions.WrongUsage(
                'The MAC address %s belongs to %s. Give the MAC address of '
                'the container.' % (mac, link.name))
        on = lower_name(link)
        if link.kind == 'macvtap' and (link.mode, on) != ('bridge', parent):
            raise exceptions.WrongUsage(
                'The macvtap %s with the MAC address %s is in %s mode on %s. '
                'Create it in bridge mode on %s.' % (
                    link.name, mac, link.mode, on, parent))


def _unbind(conf: cfg.ConfigOpts, options: config.Options) -> int:
    command = conf.command
    ledger = Ledger(options.state_dir)
    ledger.prepare()
    owner, addresses, netns = _meant(command, ledger)
    manager = Break0Manager(options)
    try:
        unbound = manager.unbind(owner, addresses, netns)
    finally:
        manager.try_to_housekeep()
    records = ledger.records
    code = common.IN_SYNC
    outcomes = []
    for address in addresses:
        record = records.get(address)
        outcome = ('unbound' if address in unbound else
                   'not bound' if record is None else 'taken')
        outcomes.append({'address': str(address), 'outcome': outcome})
        if record is not None and outcome == 'taken':
            code = common.fail(common.DRIFT, exceptions.AddressTaken(
                address=address, owner=record.owner, **vars(record.owner)))
        elif not command.output:
            output.write('Unbound %s' % address if address in unbound
                         else '%s was not bound' % address)
    if command.output:
        output.write_document({**vars(owner), 'addresses': outcomes},
                              command.output)
    return code


def _meant(command: Any, ledger: Ledger
           ) -> tuple[model.Owner, list[model.IPAddress], Optional[str]]:
    """Return owner, addresses and namespace of the claims to unbind.

    :raises WrongUsage: unless the arguments name exactly one interface
    """
    # The arguments are either addresses and --owner, or only --pod.
    if {command.owner is not None, bool(command.address)} != {
            command.pod is None}:
        raise exceptions.WrongUsage(
            'Give addresses and the --owner that you gave to bind, or only '
            '--pod with the name of a container or pod.')
    if command.pod is None:
        return model.Owner(command.owner, command.ifname or 'eth0'), list(
            dict.fromkeys(command.address)), None
    live = {address: claims[0] for address, claims
            in ledger.contents().claims.items()}
    records = [live[address] for address in names.addresses_of(
        command.pod, live) if address in live and command.ifname in (
            None, live[address].owner.ifname)]
    owners = {each.owner: each for each in records}
    if len(owners) != 1:
        raise exceptions.WrongUsage(
            '%s matches several containers or interfaces: %s. Give --ifname, '
            'or the address and --owner.' % (command.pod, ', '.join(
                sorted(map(str, owners)))) if owners else
            'No address of %s%s is bound.' % (
                command.pod, '/' + command.ifname if command.ifname else ''))
    (owner, record), = owners.items()
    return owner, [each.address for each in records], record.netns
