# SPDX-License-Identifier: Apache-2.0

"""Checks whether break0 will work on a node, before the installation."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import platform
import stat
from typing import Callable, Iterator, NamedTuple, Optional

from kuryr_break0 import config
from kuryr_break0.doctor import services
from kuryr_break0 import exceptions
from kuryr_break0 import guard
from kuryr_break0 import kernel

OK, WARNING, ERROR = 'ok', 'warning', 'error'
#: linux/capability.h
_CAPABILITIES = {12: 'NET_ADMIN', 21: 'SYS_ADMIN', 13: 'NET_RAW',
                 11: 'NET_BROADCAST'}
_NEEDED = ('NET_ADMIN', 'SYS_ADMIN')


class Result(NamedTuple):
    """What one check came to.

    :ivar what: what was checked
    :ivar state: ``ok``, ``warning`` or ``error``
    :ivar text: what was seen, and what to do about it
    """

    what: str
    state: str
    text: str


def check(options: config.Options, parent: Optional[str]
          ) -> Iterator[Result]:
    """Check all, in an order in which the causes come first.

    :param parent: the interface that containers will be on; None if it is
        not known
    """
    checks: list[Callable[[], Iterator[Result]]] = [
        _capabilities, _kernel, lambda: _parent(parent),
        lambda: _macvlan(parent), lambda: _names(options), _nftables,
        lambda: _sysctls(options), lambda: _state_directory(options),
        lambda: _namespaces(options), lambda: _routes(options), _managers,
        _kuryr, lambda: _engines(options)]
    for each in checks:
        try:
            yield from each()
        except (exceptions.Break0Error, OSError) as err:
            yield Result(getattr(each, '__name__', 'check').strip('_'),
                         ERROR, 'it cannot be checked: %s' % err)


def _capabilities() -> Iterator[Result]:
    with open('/proc/thread-self/status') as file:
        effective = next(int(line.split()[1], 16) for line in file
                         if line.startswith('CapEff:'))
    missing = [name for bit, name in _CAPABILITIES.items()
               if not effective >> bit & 1]
    needed = [name for name in missing if name in _NEEDED]
    if needed:
        yield Result('capabilities', ERROR, 'CAP_%s is missing. Run it as '
                     'root, in a container with these' % ', CAP_'.join(
                         needed))
    elif missing:
        yield Result('capabilities', WARNING, 'CAP_%s is missing: probe '
                     'needs NET_RAW, discover NET_BROADCAST' % ', CAP_'.join(
                         missing))
    else:
        yield Result('capabilities', OK, 'all required ones are there')


def _kernel() -> Iterator[Result]:
    release = platform.release()
    identity = kernel.identify('/proc/thread-self/ns/net')
    if kernel.release() < (4, 20):
        yield Result('kernel', WARNING, '%s: before 4.20 the kernel cannot '
                     'filter dumps, so they take longer' % release)
    elif identity is not None and identity.cookie is None:
        yield Result('kernel', OK, '%s. It does not number namespaces '
                     '(6.18), so path and inode identify them' % release)
    else:
        yield Result('kernel', OK, release)


def _parent(parent: Optional[str]) -> Iterator[Result]:
    if parent is None:
        yield Result('parent', WARNING, 'unknown. Name the interface of '
                     'the containers: --parent NAME')
        return
    with kernel.Netlink() as netlink:
        link = netlink.link(parent)
    if link is None:
        yield Result('parent', ERROR, 'there is no interface %s. Name that '
                     'of the containers: --parent NAME' % parent)
    elif link.loopback:
        yield Result('parent', ERROR, '%s is the loopback' % parent)
    elif not link.up:
        yield Result('parent', WARNING, '%s is down: ip link set %s up' % (
            parent, parent))
    else:
        yield Result('parent', OK, '%s, %s, MTU %d. break0 sends nothing '
                     'on the wire, so port security and limits of MAC '
                     'addresses do not affect it' % (
                         parent, link.kind or 'physical', link.mtu))


def _macvlan(parent: Optional[str]) -> Iterator[Result]:
    """Make one in a namespace of a child, with which it ends."""
    if parent is None or kernel.index_of(parent) is None:
        return
    reading, writing = os.pipe()
    release, hold = os.pipe()
    child = os.fork()
    if not child:
        with contextlib.suppress(BaseException):
            os.close(hold)
            os.write(writing, b'1' if kernel.unshare() else b'0')
            os.read(release, 1)
        os._exit(0)
    os.close(release)
    os.close(writing)
    try:
        if os.read(reading, 1) != b'1':
            yield Result('macvlan', WARNING, 'no namespace can be created to '
                         'try one in')
            return
        with kernel.Netlink() as netlink:
            link = netlink.link(parent)
            assert link is not None
            netlink.create_macvlan('break0-check', link,
                                   '/proc/%d/ns/net' % child,
                                   mac='02:00:00:00:00:00', mtu=link.mtu,
                                   up=False)  # it would be heard
        yield Result('macvlan', OK, 'one in bridge mode can be created on %s'
                     % parent)
    except exceptions.KernelRefused as err:
        yield Result('macvlan', ERROR, '%s Load the module: modprobe '
                     'macvlan' % err)
    finally:
        os.close(reading)
        os.close(hold)
        os.waitpid(child, 0)


def _names(options: config.Options) -> Iterator[Result]:
    with kernel.Netlink() as netlink:
        link = netlink.link(options.device)
    if link is None:
        yield Result('device', OK, 'the name %s is free' % options.device)
    elif link.kind == 'macvlan' and link.mode == 'bridge':
        yield Result('device', OK, '%s exists, and is a macvlan in '
                     'bridge mode' % options.device)
    else:
        yield Result('device', ERROR, '%s is a %s. Rename it, or choose '
                     'another name by [break0] device' % (
                         options.device, link.kind or 'physical interface'))


def _nftables() -> Iterator[Result]:
    if not guard.is_installed():
        yield Result('guard', WARNING, 'the program nft is missing, so '
                     'containers can forge addresses towards the node. '
                     'Install nftables')
        return
    reason = guard.against_egress()
    if reason is not None:
        yield Result('guard', WARNING, 'it cannot see what leaves an '
                     'interface, which needs Linux 5.16. So a container can '
                     'forge both addresses of another one towards the node, '
                     'and VMs cannot reach it by IPv6. ' + reason)
    else:
        yield Result('guard', OK, 'the program nft is installed')


def _sysctls(options: config.Options) -> Iterator[Result]:
    path = os.path.join(options.sysctl_dir, 'net/ipv4/conf/all/arp_filter')
    try:
        os.close(os.open(path, os.O_WRONLY))
    except OSError as err:
        yield Result('sysctls', ERROR, '%s: %s. In a container, mount '
                     '/proc/sys/net of the node elsewhere, and name that by '
                     '[break0] sysctl_dir' % (path, err.strerror))
    else:
        yield Result('sysctls', OK, options.sysctl_dir + ' is writable')


def _state_directory(options: config.Options) -> Iterator[Result]:
    path = options.state_dir
    while not os.path.lexists(path):
        path = os.path.dirname(path)
    if not stat.S_ISDIR(os.stat(path).st_mode) or not os.access(path,
                                                                os.W_OK):
        yield Result('state directory', ERROR, '%s cannot be created in %s. '
                     'Set [break0] state_dir' % (options.state_dir, path))
    else:
        yield Result('state directory', OK, '%s is usable'
                     % options.state_dir)


def _namespaces(options: config.Options) -> Iterator[Result]:
    found = kernel.find(options.netns_dirs, options.proc_dirs,
                        kernel.mounted())
    if found:
        yield Result('namespaces', OK, '%d found besides that of the node'
                     % len(found))
    else:
        yield Result('namespaces', WARNING, 'none found besides that of the '
                     'node. If containers run, mount their directory with '
                     'HostToContainer: see [break0] netns_dirs')
    own = kernel.identify('/proc/thread-self/ns/net')
    blindness = kernel.Judge().blindness()
    if blindness and own is not None and own.cookie is not None:
        yield Result('end of namespaces', WARNING, 'seen by their paths only, '
                     'not by their numbers: %s' % blindness)


def _routes(options: config.Options) -> Iterator[Result]:
    with kernel.Netlink() as netlink:
        others = [route for route in netlink.routes().host
                  if route.protocol == options.route_protocol
                  and not kernel.name_of(route.oif).startswith('break0')]
    if others:
        yield Result('protocol number', ERROR, '%d routes of other programs '
                     'have the number %d, for example that to %s. Set '
                     '[break0] route_protocol to another number' % (
                         len(others), options.route_protocol, others[0].dst))
    else:
        yield Result('protocol number', OK, '%d is not in use'
                     % options.route_protocol)


def _managers() -> Iterator[Result]:
    found = [name for name, path in (
        ('systemd-networkd', '/run/systemd/netif/links'),
        ('NetworkManager', '/run/NetworkManager/devices'))
        if os.path.isdir(path)]
    where = services.manages_foreign_routes()
    if where is not None and 'systemd-networkd' in found:
        yield Result('managers', WARNING, 'systemd-networkd deletes routes of '
                     'other programs, %s. Install the drop-ins in etc/systemd'
                     % where)
    elif found:
        yield Result('managers', WARNING, '%s manages interfaces. Install its '
                     'drop-in from etc/' % ' and '.join(found))
    else:
        yield Result('managers', OK, 'no program found that would manage '
                     'break0')


def _kuryr() -> Iterator[Result]:
    try:
        version = importlib.metadata.version('kuryr-kubernetes')
    except importlib.metadata.PackageNotFoundError:
        yield Result('kuryr', OK, 'not installed here. CNI and discovery '
                     'work without it')
        return
    major = version.partition('.')[0]
    if major.isdigit() and 6 <= int(major) < 11:
        yield Result('kuryr', OK, 'kuryr-kubernetes ' + version)
    else:
        yield Result('kuryr', ERROR, 'kuryr-kubernetes %s was not tested: '
                     'install 6.0.0 to 10' % version)


def _engines(options: config.Options) -> Iterator[Result]:
    found = [path for path in options.engine_sockets if os.path.exists(path)]
    if found and not options.discover:
        yield Result('engines', WARNING, '%s exists. To include its '
                     'containers, set [break0] discover and allowed_cidrs'
                     % found[0])
    elif found:
        yield Result('engines', OK, ', '.join(found))
