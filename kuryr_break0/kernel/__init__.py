# SPDX-License-Identifier: Apache-2.0

"""All access to the kernel.

No other package imports pyroute2.

The requests for one pod dump no table that has an entry for each pod, so their
cost does not depend on the number of pods. Two exceptions are the requests
after an error and the requests with an empty cache. The docstrings of the
methods of :class:`Netlink` and :class:`Nft` mention each dump.

No NetlinkError leaves this package. Kuryr treats a NetlinkError with EEXIST as
a VLAN conflict, and answers any other NetlinkError with an HTML page.
"""

import importlib.util

from kuryr_break0 import exceptions
from kuryr_break0.kernel.conntrack import delete_connections
from kuryr_break0.kernel.events import Event
from kuryr_break0.kernel.events import Events
from kuryr_break0.kernel.events import NamespaceEvents
from kuryr_break0.kernel.events import open_mounts
from kuryr_break0.kernel.existence import find_taps
from kuryr_break0.kernel.existence import Judge
from kuryr_break0.kernel.existence import judge_state
from kuryr_break0.kernel.existence import State
from kuryr_break0.kernel.existence import Verdict
from kuryr_break0.kernel.inotify import IN_DELETE
from kuryr_break0.kernel.inotify import IN_DELETE_SELF
from kuryr_break0.kernel.inotify import IN_MOVE_SELF
from kuryr_break0.kernel.inotify import IN_MOVED_TO
from kuryr_break0.kernel.inotify import Inotify
from kuryr_break0.kernel.macvlans import find_macvlan
from kuryr_break0.kernel.macvlans import FULL_LIMITS
from kuryr_break0.kernel.macvlans import Limits
from kuryr_break0.kernel.macvlans import list_macvlans
from kuryr_break0.kernel.macvlans import list_macvlans_at
from kuryr_break0.kernel.macvlans import list_macvlans_in
from kuryr_break0.kernel.macvlans import Macvlan
from kuryr_break0.kernel.macvlans import QUICK_LIMITS
from kuryr_break0.kernel.namespaces import enter_namespace
from kuryr_break0.kernel.namespaces import identify
from kuryr_break0.kernel.namespaces import identify_or_fail
from kuryr_break0.kernel.namespaces import OWN_NETNS
from kuryr_break0.kernel.namespaces import require_other_namespace
from kuryr_break0.kernel.namespaces import unshare
from kuryr_break0.kernel.nft import Nft
from kuryr_break0.kernel.nft import NftEvents
from kuryr_break0.kernel.nft import open_node_nft
from kuryr_break0.kernel.nft import share_nft
from kuryr_break0.kernel.node import CAP_SYS_ADMIN
from kuryr_break0.kernel.node import count_host_routes
from kuryr_break0.kernel.node import effective_sysctl
from kuryr_break0.kernel.node import find_current_name
from kuryr_break0.kernel.node import find_ifindex
from kuryr_break0.kernel.node import find_program
from kuryr_break0.kernel.node import find_source
from kuryr_break0.kernel.node import format_ifname
from kuryr_break0.kernel.node import has_interface
from kuryr_break0.kernel.node import list_mounts
from kuryr_break0.kernel.node import read_capabilities
from kuryr_break0.kernel.node import read_release
from kuryr_break0.kernel.node import read_sysctl
from kuryr_break0.kernel.node import write_sysctl
from kuryr_break0.kernel.probes import find_claimants
from kuryr_break0.kernel.rtnetlink import Netlink
from kuryr_break0.kernel.rtnetlink import Path
from kuryr_break0.kernel.rtnetlink import Routes
from kuryr_break0.kernel.search import examine_namespace
from kuryr_break0.kernel.search import ExaminedNamespace
from kuryr_break0.kernel.search import find_namespaces
from kuryr_break0.kernel.search import NamespaceLocation
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
    """Create a macvlan in bridge mode on this node, and leave it down.

    If Kuryr is installed, this function uses IPDB, as Kuryr does for its own
    macvlans.

    :raises CannotCreate: if Kuryr's pyroute2 cannot be imported
    :raises KernelRefused: if the creation fails
    """
    if importlib.util.find_spec('kuryr_kubernetes') is None:
        with Netlink() as netlink:
            netlink.create_macvlan(name, parent, OWN_NETNS, mac=mac,
                                   mtu=parent.mtu, up=False)
        return
    try:
        from kuryr_break0.kernel import ipdb
    except ImportError as err:  # for example, pyroute2 is too new
        raise exceptions.CannotCreate(device=name, reason=err) from err
    ipdb.create_macvlan(name, parent, mac)
