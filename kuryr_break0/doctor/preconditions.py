# SPDX-License-Identifier: Apache-2.0

"""Checks of a node before the installation of break0."""

from __future__ import annotations

from concurrent import futures
import os
import platform
import threading
from typing import Callable, Iterator, Optional

from kuryr_break0.break0 import device
from kuryr_break0.break0 import guard
from kuryr_break0 import config
from kuryr_break0.doctor.findings import ERROR
from kuryr_break0.doctor.findings import Finding
from kuryr_break0.doctor.findings import KINDS
from kuryr_break0.doctor.host import Host
from kuryr_break0.doctor import records
from kuryr_break0.doctor import services
from kuryr_break0.engine import containers
from kuryr_break0 import exceptions
from kuryr_break0 import kernel

#: Capabilities by their numbers in linux/capability.h.
_NEEDED = {12: 'NET_ADMIN', kernel.CAP_SYS_ADMIN: 'SYS_ADMIN'}
_USEFUL = {13: 'NET_RAW', 11: 'NET_BROADCAST'}


class Preconditions:
    """Checks the requirements on a node, causes before effects.

    :param parent: the interface for the containers; None if not known
    :ivar not_examined: subjects that could not be examined, with the reason
    """

    def __init__(self, options: config.Options, parent: Optional[str],
                 host: Host) -> None:
        self._options = options
        self._parent = parent
        self._checks: dict[str, Callable[[], Iterator[Finding]]] = {
            'capabilities': self._capabilities, 'kernel': self._kernel,
            'the parent, macvlans on it': self._link,
            'names and numbers': self._names, 'sysctls': self._sysctls,
            'the state directory': lambda: records.check_directory(
                options, host),
            'namespaces': self._namespaces,
            'programs that manage interfaces': lambda: services.check_drop_ins(
                options.device),
            'container engines': self._engines}
        self.not_examined: list[str] = []
        if parent is None:
            del self._checks['the parent, macvlans on it']
            self.not_examined.append(
                'the interface of the containers: name it by --parent NAME')

    @property
    def examined(self) -> str:
        return ', '.join(self._checks)

    def check(self) -> Iterator[Finding]:
        for what, check in self._checks.items():
            try:
                yield from check()
            except (exceptions.Break0Error, OSError) as err:
                self.not_examined.append('%s: %s' % (what, err))

    @staticmethod
    def _capabilities() -> Iterator[Finding]:
        effective = kernel.read_capabilities()
        for kind, required in ((KINDS['capability-missing'], _NEEDED),
                               (KINDS['capability-useful'], _USEFUL)):
            missing = [name for bit, name in required.items()
                       if not effective >> bit & 1]
            if missing:
                yield kind.finding('this process lacks CAP_' + ', CAP_'.join(
                    missing))

    @staticmethod
    def _kernel() -> Iterator[Finding]:
        if kernel.read_release() < (4, 20):
            yield KINDS['kernel-old'].finding(
                'the kernel is ' + platform.release())

    def _link(self) -> Iterator[Finding]:
        name = self._parent
        if name is None:
            return
        with kernel.Netlink() as netlink:
            link = netlink.link(name)
            if link is None:
                yield KINDS['parent-missing'].finding(
                    'the node has no interface %s' % name)
                return
            against = device.against_macvlans(link)
            if against is not None:
                yield KINDS['macvlan-impossible'].finding(
                    'containers cannot be on %s: %s' % (name, against))
                return
            if not link.up:
                yield KINDS['parent-down'].finding('%s is down' % name,
                                                   parent=name)
            # Create a macvlan in the namespace of a thread. When the thread
            # ends, the kernel deletes the namespace and the macvlan.
            with futures.ThreadPoolExecutor(1) as other:
                if not other.submit(kernel.unshare).result():
                    raise OSError('Cannot create a namespace to test a '
                                  'macvlan in')
                thread = other.submit(threading.get_native_id).result()
                try:
                    netlink.create_macvlan(
                        'break0-check', link, '/proc/self/task/%d/ns/net' %
                        thread, mac='02:00:00:00:00:00', mtu=link.mtu,
                        up=False)  # an interface that is up sends on the LAN
                except exceptions.KernelRefused as err:
                    yield KINDS['macvlan-impossible'].finding(
                        str(err).rstrip('.'))

    def _names(self) -> Iterator[Finding]:
        options = self._options
        with kernel.Netlink() as netlink:
            link = netlink.link(options.device)
            foreign = [route.dst for route in netlink.routes().host
                       if route.protocol == options.route_protocol
                       and not kernel.format_ifname(
                           route.oif).startswith('break0')]
        if link is not None and (link.kind, link.mode) != ('macvlan',
                                                           'bridge'):
            yield KINDS['break0-foreign'].finding(
                '%s is %s' % (link.name, link.description), device=link.name)
        if foreign:
            yield KINDS['protocol-taken'].finding(
                '%d routes of other programs have the protocol number %d' % (
                    len(foreign), options.route_protocol), foreign)
        if options.guard != config.OFF and not guard.is_installed():
            yield KINDS['guard-unavailable'].finding(
                guard.NO_NFT, severity=ERROR if options.guard == config.ON
                else None)
        elif options.guard != config.OFF:
            reason = guard.against_egress()
            if reason is not None:
                yield KINDS['egress-unguarded'].finding(reason.rstrip('.'))

    def _sysctls(self) -> Iterator[Finding]:
        path = os.path.join(self._options.sysctl_dir,
                            'net/ipv4/conf/all/arp_filter')
        try:
            os.close(os.open(path, os.O_WRONLY))
        except OSError as err:
            yield KINDS['sysctls-read-only'].finding(
                '%s: %s' % (path, err.strerror))

    def _namespaces(self) -> Iterator[Finding]:
        if not any(kernel.find_namespaces(self._options.proc_dirs)):
            yield KINDS['namespaces-unseen'].finding(
                'only the namespace of the node is visible')
        own = kernel.identify('/proc/thread-self/ns/net')
        blindness = kernel.Judge().blindness()
        if blindness and own is not None and own.cookie is not None:
            yield KINDS['sandbox-unknown'].finding(
                'only the path of a namespace, not its cookie, shows that it '
                'has ended: %s' % blindness)

    def _engines(self) -> Iterator[Finding]:
        sockets = [path for path in containers.ENGINE_SOCKETS
                   if os.path.exists(path)]
        if sockets and not self._options.discover:
            yield KINDS['engine-not-discovered'].finding(
                '%s exists, and [break0] discover is false' % sockets[0])
