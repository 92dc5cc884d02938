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

"""Binds and unbinds addresses that Kuryr knows nothing of."""

from __future__ import annotations

import argparse
import re
import socket
from typing import Any, Optional

from oslo_config import cfg

from kuryr_break0 import command
from kuryr_break0 import config
from kuryr_break0 import exceptions
from kuryr_break0.ledger import Ledger
from kuryr_break0.ledger import Owner
from kuryr_break0.manager import Break0Manager
from kuryr_break0 import netlink

_BIND = """\
Make addresses reachable through break0 that Kuryr knows nothing of: of a
container that another engine has put on the node's interface by macvlan, in
bridge mode. It is repaired by sync and agent, as a pod is.

With --netns, its MAC address and parent are read from there, the container
is told how to reach the node, and the addresses are unbound by themselves
when the namespace is gone. Without, only the node's side is set up, until
unbind: give --mac, unless the node may find it by ARP (IPv4 only).

Exits with 0 if done, 1 if an address belongs to another owner or has a route
of others, 2 for what cannot be meant, 3 if the kernel or the state directory
refuses.
"""
_BIND_EPILOG = """\
example:
  kuryr-break0 bind 192.0.2.80 2001:db8::80 --owner web \\
      --netns /run/netns/web

The path of the namespace of a container is what docker inspect and podman
inspect call SandboxKey.
"""
_UNBIND = """\
Take back what bind did. An address that belongs to another owner is left.
Exits with 0 if the addresses are unbound, also if they were before, 1 if one
belongs to another owner, 3 if the kernel or the state directory refuses.
"""
_UNBIND_EPILOG = """\
example:
  kuryr-break0 unbind 192.0.2.80 2001:db8::80 --owner web
"""
#: What is wrong with the arguments, or with what they name.
_NOT_MEANT = (exceptions.AddressRefused, exceptions.NetnsUnusable,
              exceptions.NotAMacvlan, exceptions.ParentMismatch,
              exceptions.ParentNotFound, exceptions.ParentUnknown)


def add_parsers(subparsers: Any) -> None:
    bind = subparsers.add_parser(
        'bind', help='make an address reachable by hand',
        description=_BIND, epilog=_BIND_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    unbind = subparsers.add_parser(
        'unbind', help='take back what bind did',
        description=_UNBIND, epilog=_UNBIND_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    for parser in (bind, unbind):
        parser.add_argument(
            'address', metavar='ADDRESS', nargs='+',
            type=command.argument(config.HostAddress()),
            help='IPv4 or IPv6 address')
        parser.add_argument(
            '--owner', metavar='NAME', required=True,
            type=command.argument(_owner),
            help='whose the addresses are: a name that is yours alone; '
                 'unbind needs the same')
        parser.add_argument(
            '--ifname', metavar='NAME', default='eth0',
            type=command.argument(config.DeviceName()),
            help="the container's interface (default: eth0)")
    bind.add_argument(
        '--netns', metavar='PATH',
        type=command.argument(config.AbsolutePath()),
        help="absolute path of the container's network namespace")
    bind.add_argument(
        '--mac', metavar='MAC', type=command.argument(config.UnicastMAC()),
        help="MAC address of the container's interface (default: what it "
             'has in the namespace)')
    bind.add_argument(
        '--parent', metavar='NAME',
        type=command.argument(config.DeviceName()),
        help="the node's interface that it is on (default: [break0] parent, "
             'else [binding] link_iface, else what it is on)')
    bind.set_defaults(func=_bind)
    unbind.set_defaults(func=_unbind)


def _owner(name: str) -> str:
    if not re.fullmatch(r'[^\s/]{1,128}', name):
        raise ValueError('%r is not a name: 1 to 128 characters without '
                         'white space and "/" are allowed' % name)
    return name


def _bind(conf: cfg.ConfigOpts, options: config.Options) -> int:
    wanted = conf.command
    owner = Owner(wanted.owner, wanted.ifname)
    parent = wanted.parent or options.parent or config.link_iface(conf)
    mac = wanted.mac
    try:
        if wanted.netns is not None:
            link, parent = _macvlan(options, wanted.netns, wanted.ifname,
                                    parent)
            mac = mac or link.mac
        if parent is None:
            raise exceptions.ParentUnknown()
        Break0Manager(options).bind(
            owner, wanted.address, parent=parent, mac=mac,
            netns=wanted.netns, yielding=True)
    except (exceptions.AddressTaken, exceptions.ForeignRoute) as err:
        return command.fail(command.DRIFT, err)
    except _NOT_MEANT as err:
        return command.fail(command.USAGE, err)
    for address in wanted.address:
        print('Bound %s to %s for %s' % (address, options.device, owner))
    return command.IN_SYNC


def _macvlan(options: config.Options, netns: str, ifname: str,
             parent: Optional[str]) -> tuple[netlink.Link, str]:
    """Find the container's interface; it, and what it is on.

    :param parent: what it should be on; None for any interface of the node
    :raises NotAMacvlan: if it is none that break0 reaches
    """
    found = 'the node has no macvlan of that name there'
    for link in netlink.macvlans_in(netns):
        if link.name == ifname and link.lower is not None:
            on = socket.if_indextoname(link.lower)
            if link.mode == 'bridge' and parent in (None, on):
                return link, on
            found = 'it is in %s mode on %s' % (link.mode, on)
    raise exceptions.NotAMacvlan(
        ifname=ifname, netns=netns, found=found, device=options.device,
        parent=parent or 'an interface of this node')


def _unbind(conf: cfg.ConfigOpts, options: config.Options) -> int:
    owner = Owner(conf.command.owner, conf.command.ifname)
    addresses = conf.command.address
    Break0Manager(options).unbind(owner, addresses)
    ledger = Ledger(options.state_dir, options.lock_timeout)
    code = command.IN_SYNC
    for address in addresses:
        entry = ledger.get(address)
        if entry is None:
            print('Unbound %s from %s' % (address, options.device))
        else:
            code = command.fail(command.DRIFT, exceptions.AddressTaken(
                address=address, owner=entry.owner, **vars(entry.owner)))
    return code
