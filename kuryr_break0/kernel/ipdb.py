# SPDX-License-Identifier: Apache-2.0

"""Uses IPDB, as Kuryr does, with its errors as ours.

Import it only where an IPDB is used: pyroute2 takes as long to import as all
that most commands need.
"""

from __future__ import annotations

import contextlib
import logging
import os
import time
import types
from typing import Any, Callable, Iterator, Optional, TypeVar

import pyroute2
from pyroute2.ipdb import exceptions as ipdb_exceptions
from pyroute2.ipdb import interfaces as ipdb_interfaces
from pyroute2.netlink import exceptions as nl_exceptions
from pyroute2.netlink import rtnl
from pyroute2 import netns as pyroute2_netns

from kuryr_break0 import exceptions
from kuryr_break0.kernel import namespaces
from kuryr_break0.kernel import netlink
from kuryr_break0.kernel.values import Link

LOG = logging.getLogger(__name__)

_INTERFACE_GROUPS = (rtnl.RTMGRP_LINK | rtnl.RTMGRP_IPV4_IFADDR
                     | rtnl.RTMGRP_IPV6_IFADDR)
#: What IPDB raises if it misses something: RuntimeError if it could not
#: even go back to what was before.
IPDB_DISTURBED = (RuntimeError, ipdb_exceptions.CommitException,
                  nl_exceptions.NetlinkDumpInterrupted)

_T = TypeVar('_T')


def undisturbed(action: str, function: Callable[..., _T], *args: Any) -> _T:
    """Call what reads the node by dumps, and again if one is interrupted.

    The kernel marks a dump that the table has changed under; pyroute2 raises
    that as an error. ``function`` must be safe to repeat.

    :param action: what it does, for the error
    :raises KernelRefused: for another error of pyroute2 or a socket, or if
        every try was interrupted
    """
    try:
        for number in range(netlink.DUMP_TRIES - 1):
            try:
                return function(*args)
            except nl_exceptions.NetlinkDumpInterrupted:
                time.sleep(netlink.dump_pause(number))
        return function(*args)
    except nl_exceptions.NetlinkError as err:
        reason = os.strerror(err.code) if err.code > 0 else str(err)
        raise exceptions.KernelRefused(action, reason, err.code) from err
    except OSError as err:
        raise exceptions.KernelRefused(action, err.strerror or str(err),
                                       err.errno or 0) from err
    except (ipdb_exceptions.CommitException,
            ipdb_exceptions.CreateException) as err:
        # Some of them say nothing.
        raise exceptions.KernelRefused(action, str(err) or 'IPDB raised %r' %
                                       err, 0) from err


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
        with open(namespaces.OWN) as own:
            pyroute2_netns.setns(own.fileno())
