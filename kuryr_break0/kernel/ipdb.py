# SPDX-License-Identifier: Apache-2.0

"""Uses IPDB as Kuryr does, and converts IPDB's errors.

Import this module only to use IPDB. The import of pyroute2 takes as long as
the imports of all other modules that most commands need.
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
from kuryr_break0.kernel import values

LOG = logging.getLogger(__name__)

_INTERFACE_GROUPS = (rtnl.RTMGRP_LINK | rtnl.RTMGRP_IPV4_IFADDR
                     | rtnl.RTMGRP_IPV6_IFADDR)
#: Errors of an IPDB that has missed an event. If IPDB also fails to roll back
#: to the previous state, it raises RuntimeError.
IPDB_DISTURBED = (RuntimeError, ipdb_exceptions.CommitException,
                  nl_exceptions.NetlinkDumpInterrupted)

_T = TypeVar('_T')


def repeat_dumps(action: str, function: Callable[..., _T], *args: Any) -> _T:
    """Call a function that dumps a table; repeat it after an interrupted dump.

    If a table changes during a dump, the kernel marks the dump, and pyroute2
    raises an error. ``function`` must be safe to repeat.

    :param action: description of the function, for the error message
    :raises KernelRefused: for another error of pyroute2 or a socket, or if
        the dump was interrupted at every attempt
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
        # Some of these errors have no text.
        raise exceptions.KernelRefused(action, str(err) or 'IPDB raised %r' %
                                       err, 0) from err


def create_macvlan(name: str, parent: values.Link, mac: str) -> None:
    """Create a macvlan in bridge mode with IPDB, and leave it down.

    IPDB reads all interfaces of the node. Kuryr uses IPDB for each pod, but
    callers use this function only to create a break0.

    :raises KernelRefused: if the creation fails
    """
    def create() -> None:
        with _suppress_warning(), pyroute2.IPDB(
                plugins=('interfaces',), deprecation_warning=False) as ipdb:
            ipdb.create(ifname=name, kind='macvlan',
                        link=parent.lower_of_macvlans[0],
                        macvlan_mode='bridge', address=mac).commit()

    repeat_dumps('create the macvlan %s on %s' % (name, parent.name), create)


@contextlib.contextmanager
def _suppress_warning() -> Iterator[None]:
    """Suppress IPDB's deprecation warning in the log."""
    log = logging.getLogger(pyroute2.IPDB.__module__)
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(level)


class _EmptyView(dict):  # type: ignore[type-arg]
    """Replaces IPDB's table of neighbours, without reading the kernel's."""

    def __init__(self, ipdb: Any) -> None:
        super().__init__()


class _InterfacesIPDB(pyroute2.IPDB):  # type: ignore[misc]
    """An IPDB that reads only interfaces, addresses and their events."""

    def __init__(self) -> None:
        super().__init__(nl_bind_groups=_INTERFACE_GROUPS,
                         deprecation_warning=False)

    def initdb(self) -> None:
        # IPDB.__init__() selects plugins, and then calls this method. IPDB's
        # plugin for interfaces would read the neighbours too.
        spec = [{**each, 'class': _EmptyView} if each['name'] == 'neighbours'
                else each for each in ipdb_interfaces.spec]
        self._plugins = [types.SimpleNamespace(groups=_INTERFACE_GROUPS,
                                               spec=spec)]
        super().initdb()


def open_interfaces_ipdb() -> Optional[Any]:
    """Open an IPDB that has read the interfaces and addresses of the node.

    Kuryr needs no neighbours, routes or rules of the node.

    :returns: None if this version of pyroute2 has a different IPDB
    :raises NetlinkError: if IPDB raises it. Call this function through
        :func:`repeat_dumps`, which converts this error
    """
    try:
        with _suppress_warning():
            ipdb = _InterfacesIPDB()
        try:
            ipdb.interfaces  # the first access reads the interfaces
        except BaseException:
            ipdb.release()
            raise
        return ipdb
    except nl_exceptions.NetlinkError:
        raise
    except Exception as err:
        LOG.debug('Kuryr reads all routes and neighbours of the node, because '
                  'the IPDB of this pyroute2 is different: %r', err)
        return None


def preload() -> None:
    """Run the initialization of pyroute2 before processes fork.

    Without this function, each child process starts a program to find the C
    library, and compiles the message classes of pyroute2.
    """
    with contextlib.suppress(OSError, nl_exceptions.NetlinkError):
        with pyroute2.IPRoute() as ipr:
            ipr.link('get', index=1)
        with open(namespaces.OWN_NETNS) as own:
            pyroute2_netns.setns(own.fileno())
