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

"""All that is asked of the kernel about networks; alone imports pyroute2.

Requests that belong to a pod go through one :class:`Kernel`, an rtnetlink
socket, and cost the same however many pods the node has: nothing is dumped.
Dumps are left to what looks at the whole node, and say so.

No NetlinkError leaves this package, since Kuryr takes any that carries EEXIST
for a VLAN conflict, and answers any other with a page of HTML.
"""

from __future__ import annotations

import contextlib

from kuryr_break0 import exceptions
from kuryr_break0.netlink.conntrack import forget_connections
from kuryr_break0.netlink.errors import IPDB_DISTURBED
from kuryr_break0.netlink.errors import undisturbed
from kuryr_break0.netlink.events import Event
from kuryr_break0.netlink.events import Events
from kuryr_break0.netlink.ipdb import create_macvlan
from kuryr_break0.netlink.ipdb import ipdb_of_interfaces
from kuryr_break0.netlink.kernel import Kernel
from kuryr_break0.netlink.kernel import Path
from kuryr_break0.netlink.kernel import Routes
from kuryr_break0.netlink.link import Link
from kuryr_break0.netlink.netns import entered
from kuryr_break0.netlink.netns import macvlans_in
from kuryr_break0.netlink.netns import prepare_entering
from kuryr_break0.netlink.node import count_host_routes
from kuryr_break0.netlink.node import index_of
from kuryr_break0.netlink.node import name_of
from kuryr_break0.netlink.node import read_sysctl
from kuryr_break0.netlink.node import source_for
from kuryr_break0.netlink.node import write_sysctl
from kuryr_break0.netlink import requests
from kuryr_break0.netlink.requests import Change
from kuryr_break0.netlink.requests import RT_SCOPE_LINK
from kuryr_break0.netlink.requests import RT_SCOPE_NOWHERE
from kuryr_break0.netlink.requests import RT_TABLE_MAIN
from kuryr_break0.netlink.requests import RTN_UNICAST
from kuryr_break0.netlink.requests import Verb

__all__ = (
    'Change', 'Event', 'Events', 'IPDB_DISTURBED', 'Kernel', 'Link', 'Path',
    'RTN_UNICAST', 'RT_SCOPE_LINK', 'RT_SCOPE_NOWHERE', 'RT_TABLE_MAIN',
    'Routes', 'Verb', 'count_host_routes', 'create_macvlan', 'entered',
    'forget_connections', 'index_of', 'ipdb_of_interfaces', 'macvlans_in',
    'name_of', 'prepare', 'read_sysctl', 'source_for', 'undisturbed',
    'write_sysctl')


def prepare() -> None:
    """Do, before processes fork, what pyroute2 does at the first use.

    In each of them: it looks for the C library, by another process, where it
    enters a namespace for Kuryr, and compiles its messages.
    """
    with contextlib.suppress(exceptions.Break0Error, OSError):
        with Kernel() as kernel:
            kernel.link('lo')
        prepare_entering()
        requests.prepare()
