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

"""The interface of a pod, made in the pod's namespace.

Kuryr makes it on the node, under a name that is in nobody's way, moves it,
renames it, and sets its MTU and MAC address one by one; around each step it
reads the namespace anew. Here it is one request, and the outcome is the same.
"""

from __future__ import annotations

from oslo_log import log as logging

from kuryr_break0 import netlink

LOG = logging.getLogger(__name__)


def connect(kernel: netlink.Kernel, netns: str, ifname: str,
            parent: netlink.Link, *, mac: str, mtu: int,
            passing: str) -> None:
    """Make the macvlan of a pod, in bridge mode and up.

    May be repeated: what an ADD before it has left is removed first, as
    Kuryr does it. Refused, it leaves nothing.

    :param kernel: in the node's namespace
    :param netns: path of the pod's
    :param parent: on the node
    :param passing: the name that Kuryr would give it on the node. One that
        is left of that has the MAC address of the pod
    :raises NetnsUnusable: if the pod's namespace cannot be entered
    :raises KernelRefused: with EADDRINUSE where another macvlan on the
        parent has the MAC address
    """
    with netlink.entered(netns), netlink.Kernel() as pods:
        _remove(pods, passing, netns)
        _remove(pods, ifname, netns)
    _remove(kernel, passing, 'the node')
    kernel.create_macvlan(ifname, parent, netns, mac=mac, mtu=mtu)


def disconnect(netns: str, *names: str) -> None:
    """Delete interfaces of a pod; one that is not there is fine.

    :raises NetnsUnusable: if its namespace cannot be entered
    :raises KernelRefused: if one can't be deleted
    """
    with netlink.entered(netns), netlink.Kernel() as kernel:
        for name in names:
            kernel.delete_link(name)


def _remove(kernel: netlink.Kernel, name: str, where: str) -> None:
    if netlink.index_of(name) is not None:
        LOG.warning('The interface %s in %s is left from an earlier ADD: '
                    'deleting it.', name, where)
        kernel.delete_link(name)
