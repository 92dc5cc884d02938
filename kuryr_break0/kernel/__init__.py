# SPDX-License-Identifier: Apache-2.0

"""All access to the kernel.

No other package imports pyroute2. Requests for one pod use one
:class:`Netlink` socket, and their cost does not depend on the number of pods:
they dump nothing. Functions that dump a table say so in their docstrings.

No NetlinkError leaves this package. Kuryr takes a NetlinkError with EEXIST for
a VLAN conflict, and answers any other NetlinkError with an HTML page.
"""

import importlib.util

from kuryr_break0 import exceptions
from kuryr_break0.kernel.conntrack import forget_connections
from kuryr_break0.kernel.events import Event
from kuryr_break0.kernel.events import Events
from kuryr_break0.kernel.events import NamespaceEvents
from kuryr_break0.kernel.events import open_mounts
from kuryr_break0.kernel.existence import find_taps
from kuryr_break0.kernel.existence import Judge
from kuryr_break0.kernel.existence import State
from kuryr_break0.kernel.existence import state
from kuryr_break0.kernel.existence import Verdict
from kuryr_break0.kernel.inotify import IN_DELETE
from kuryr_break0.kernel.inotify import IN_DELETE_SELF
from kuryr_break0.kernel.inotify import IN_MOVE_SELF
from kuryr_break0.kernel.inotify import IN_MOVED_TO
from kuryr_break0.kernel.inotify import IN_OPEN
from kuryr_break0.kernel.inotify import Inotify
from kuryr_break0.kernel.macvlans import FEW
from kuryr_break0.kernel.macvlans import Limits
from kuryr_break0.kernel.macvlans import Macvlan
from kuryr_break0.kernel.macvlans import macvlan_of
from kuryr_break0.kernel.macvlans import macvlans
from kuryr_break0.kernel.macvlans import macvlans_at
from kuryr_break0.kernel.macvlans import macvlans_in
from kuryr_break0.kernel.macvlans import MOST
from kuryr_break0.kernel.namespaces import entered
from kuryr_break0.kernel.namespaces import identify
from kuryr_break0.kernel.namespaces import identify_or_fail
from kuryr_break0.kernel.namespaces import OWN
from kuryr_break0.kernel.namespaces import require_other
from kuryr_break0.kernel.namespaces import unshare
from kuryr_break0.kernel.nft import Nft
from kuryr_break0.kernel.nft import NftEvents
from kuryr_break0.kernel.nft import node_nft
from kuryr_break0.kernel.nft import share_nft
from kuryr_break0.kernel.node import CAP_SYS_ADMIN
from kuryr_break0.kernel.node import capabilities
from kuryr_break0.kernel.node import count_host_routes
from kuryr_break0.kernel.node import current_name
from kuryr_break0.kernel.node import exists
from kuryr_break0.kernel.node import find_program
from kuryr_break0.kernel.node import index_of
from kuryr_break0.kernel.node import mounts
from kuryr_break0.kernel.node import name_of
from kuryr_break0.kernel.node import read_sysctl
from kuryr_break0.kernel.node import release
from kuryr_break0.kernel.node import source_for
from kuryr_break0.kernel.node import write_sysctl
from kuryr_break0.kernel.probes import claimants
from kuryr_break0.kernel.rtnetlink import Netlink
from kuryr_break0.kernel.rtnetlink import Path
from kuryr_break0.kernel.rtnetlink import Routes
from kuryr_break0.kernel.search import examine
from kuryr_break0.kernel.search import Examined
from kuryr_break0.kernel.search import find
from kuryr_break0.kernel.search import Found
from kuryr_break0.kernel.search import NETNS_DIRS
from kuryr_break0.kernel.search import Place
from kuryr_break0.kernel.search import Search
from kuryr_break0.kernel.values import AddressState
from kuryr_break0.kernel.values import Change
from kuryr_break0.kernel.values import Link
from kuryr_break0.kernel.values import Route
from kuryr_break0.kernel.values import RTN_LOCAL
from kuryr_break0.kernel.values import Verb
from kuryr_break0.kernel.wire import IFA_F_PERMANENT
from kuryr_break0.kernel.wire import RT_TABLE_MAIN


def create_macvlan(name: str, parent: Link, mac: str) -> None:
    """Create a macvlan in bridge mode on this node, down.

    Where Kuryr is installed, it is created by IPDB, as Kuryr creates its own.

    :raises CannotCreate: if Kuryr's pyroute2 cannot be imported
    :raises KernelRefused: if the macvlan does not exist in the end
    """
    if importlib.util.find_spec('kuryr_kubernetes') is None:
        with Netlink() as netlink:
            netlink.create_macvlan(name, parent, OWN, mac=mac, mtu=parent.mtu,
                                   up=False)
        return
    try:
        from kuryr_break0.kernel import ipdb
    except ImportError as err:  # for example, a version that is too new
        raise exceptions.CannotCreate(device=name, reason=err) from err
    ipdb.create_macvlan(name, parent, mac)
