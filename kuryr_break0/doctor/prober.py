# SPDX-License-Identifier: Apache-2.0

"""Sends probes between node and pod."""

from __future__ import annotations

import dataclasses
from typing import Optional

from kuryr_break0 import kernel
from kuryr_break0.kernel import probes
from kuryr_break0.model import IPAddress
from kuryr_break0.model import NamespaceId
from kuryr_break0.model import NodeAddresses


@dataclasses.dataclass(frozen=True)
class Probe:
    """One direction, and what was seen of it.

    :ivar to: the address that was pinged
    :ivar path: None if there is no way
    :ivar mac: what the address, or the gateway to it, is at on the link
    :ivar state: how that is known; None if it is not
    :ivar times: seconds that each ping took; None for one without a reply
    :ivar problem: what is wrong; None if nothing is
    :ivar misrouted: whether the kernel sends it elsewhere
    """

    is_to_pod: bool
    to: IPAddress
    path: Optional[kernel.Path]
    mac: Optional[str]
    state: Optional[str]
    times: tuple[Optional[float], ...]
    problem: Optional[str]
    misrouted: bool

    @property
    def direction(self) -> str:
        return 'node to pod' if self.is_to_pod else 'pod to node'

    @property
    def answered(self) -> list[float]:
        """Return the times of the answered ones."""
        return [time for time in self.times if time is not None]


@dataclasses.dataclass(frozen=True)
class Prober:
    """Probes one address of a pod.

    :ivar count: pings in each direction
    :ivar timeout: seconds to wait for each
    :ivar port: what to connect to by TCP, in place of pings
    """

    count: int
    timeout: float
    port: Optional[int] = None

    def from_pod(self, address: IPAddress, netns: str,
                 namespace: Optional[NamespaceId],
                 node: NodeAddresses) -> list[Probe]:
        """Probe the ways to the addresses of the node, as the pod has them.

        :raises NetnsUnusable: if its namespace cannot be entered
        :raises Break0Error: if the kernel cannot be asked
        """
        with kernel.enter_namespace(netns, namespace):
            return [self.probe(host, None, node.mac)
                    for host in node.addresses
                    if host.version == address.version]

    def probe(self, to: IPAddress, device: Optional[str],
              mac: Optional[str]) -> Probe:
        """Probe from the namespace of this thread.

        :param device: the break0 that it must go through, to a pod; None
            from a pod
        :param mac: what it must be sent to; None for any
        :raises Break0Error: if the kernel cannot be asked
        """
        with kernel.Netlink() as netlink:
            link = netlink.link(device) if device is not None else None
            vrf = link.vrf.ifindex if link is not None and link.vrf else 0
            path = netlink.path_to(to, vrf)
            times = (probes.ping(to, self.count, self.timeout, vrf)
                     if self.port is None else probes.connect(
                         to, self.port, self.count, self.timeout, vrf))
            found, state = (None, None) if path is None else netlink.neighbour(
                path.ifindex, path.gateway or to)
        if path is None:
            problem = 'there is no route to it'
        elif device not in (None, path.device):
            problem = 'it does not go through %s' % device
        elif mac is not None and found not in (None, mac):
            problem = 'it is sent to %s, but should be to %s' % (found, mac)
        else:
            problem = ''
        lost = times.count(None)
        return Probe(
            device is not None, to, path, found, state, tuple(times),
            problem or ('%d of %d were not answered' % (lost, len(times))
                        if lost else None), bool(problem))
