# SPDX-License-Identifier: Apache-2.0

"""Uses IPDB, as Kuryr does."""

from __future__ import annotations

import contextlib
import logging
import os
import types
from typing import Any, Iterator, Optional

import pyroute2
from pyroute2.ipdb import interfaces as ipdb_interfaces
from pyroute2.netlink import exceptions as nl_exceptions
from pyroute2.netlink import rtnl
from pyroute2 import netns as pyroute2_netns

from kuryr_break0.kernel.errors import undisturbed
from kuryr_break0.kernel.values import Link

LOG = logging.getLogger(__name__)

_INTERFACE_GROUPS = (rtnl.RTMGRP_LINK | rtnl.RTMGRP_IPV4_IFADDR
                     | rtnl.RTMGRP_IPV6_IFADDR)


def create_macvlan(name: str, parent: Link, mac: str) -> None:
    """Create a macvlan in bridge mode, down, by IPDB.

    That reads all interfaces of the node, as Kuryr does for each pod; here
    it happens once per boot.

    :raises KernelRefused: if there is none in the end
    """
    def create() -> None:
        with _unwarned(), pyroute2.IPDB(
                plugins=('interfaces',), deprecation_warning=False) as ipdb:
            ipdb.create(ifname=name, kind='macvlan',
                        link=parent.lower_of_macvlans[0],
                        macvlan_mode='bridge', address=mac).commit()

    undisturbed('create the macvlan %s on %s' % (name, parent.name), create)


@contextlib.contextmanager
def _unwarned() -> Iterator[None]:
    """Without IPDB's line in the log that it is deprecated."""
    log = logging.getLogger(pyroute2.IPDB.__module__)
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(level)


class _Unread(dict):  # type: ignore[type-arg]
    """What an IPDB does not read; it writes here of its own accord."""

    def __init__(self, ipdb: Any) -> None:
        super().__init__()


class _InterfacesIPDB(pyroute2.IPDB):  # type: ignore[misc]
    """An IPDB that reads and hears of interfaces and addresses only."""

    # It has no attributes before this is called.
    def __init__(self) -> None:
        super().__init__(nl_bind_groups=_INTERFACE_GROUPS,
                         deprecation_warning=False)

    def initdb(self) -> None:
        # Its plugin for interfaces reads the neighbours as well.
        spec = [{**each, 'class': _Unread} if each['name'] == 'neighbours'
                else each for each in ipdb_interfaces.spec]
        self._plugins = [types.SimpleNamespace(groups=_INTERFACE_GROUPS,
                                               spec=spec)]
        super().initdb()


def ipdb_of_interfaces() -> Optional[Any]:
    """Open an IPDB, on the node, that has read what Kuryr needs of it.

    All interfaces and addresses, but no neighbours, routes and rules.

    :returns: None if that cannot be done with this pyroute2
    :raises NetlinkError: as any IPDB; for :func:`undisturbed`
    """
    try:
        with _unwarned():
            ipdb = _InterfacesIPDB()
        try:
            ipdb.interfaces  # read when first asked for
        except BaseException:
            ipdb.release()
            raise
        return ipdb
    except nl_exceptions.NetlinkError:
        raise
    except Exception as err:
        LOG.debug('Kuryr reads all of the node, since IPDB is not as it was: '
                  '%r', err)
        return None


def prepare() -> None:
    """Have pyroute2 do, before processes fork, what it does at first use.

    In each of them it would look for the C library, by another process, and
    compile its messages.
    """
    with contextlib.suppress(OSError, nl_exceptions.NetlinkError):
        with pyroute2.IPRoute() as ipr:
            ipr.link('get', index=1)
        own = os.open('/proc/thread-self/ns/net', os.O_RDONLY | os.O_CLOEXEC)
        try:
            pyroute2_netns.setns(own)
        finally:
            os.close(own)
