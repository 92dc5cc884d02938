# SPDX-License-Identifier: Apache-2.0

"""Sends probes between node and pod."""

from __future__ import annotations

import dataclasses
from typing import Optional

from kuryr_break0 import kernel
from kuryr_break0.kernel import probes
from kuryr_break0 import model


@dataclasses.dataclass(frozen=True)
class Probe:
    """The result of the pings in one direction.

    :ivar to: the destination
    :ivar path: the kernel's route; None without a route
    :ivar mac: MAC address of the next hop; None if not known
    :ivar state: state of the neighbour; None without a neighbour
    :ivar times: round-trip time of each ping in seconds; None without reply
    :ivar problem: the fault, in words; None without a fault
    :ivar misrouted: whether the route or the neighbour is wrong
    """

    is_to_pod: bool
    to: model.IPAddress
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
        """Return the round-trip times of the answered pings, in seconds."""
        return [time for time in self.times if time is not None]


@dataclasses.dataclass(frozen=True)
class Prober:
    """Sends pings, or connects, in both directions.

    :ivar count: pings in each direction
    :ivar timeout: seconds to wait for each reply
    :ivar port: the TCP port to connect to instead of pinging
    """

    count: int
    timeout: float
    port: Optional[int] = None

    def from_pod(self, address: model.IPAddress, netns: str,
                 namespace: Optional[model.NamespaceId],
                 node: model.NodeAddresses) -> list[Probe]:
        """Probe each node address of one version of IP from a pod.

        :param address: an address of the pod, with the same version of IP
        :raises NetnsUnusable: if the pod's namespace cannot be entered
        :raises Break0Error: if the kernel refuses a query
        """
        with kernel.enter_namespace(netns, namespace):
            return [self.probe(host, None, node.mac)
                    for host in node.addresses
                    if host.version == address.version]

    def probe(self, to: model.IPAddress, device: Optional[str],
              mac: Optional[str]) -> Probe:
        """Probe from the namespace of this thread.

        :param device: the expected outgoing break0; None from a pod
        :param mac: the expected MAC address of the next hop; None for any
        :raises Break0Error: if the kernel refuses a query
        """
        with kernel.Netlink() as netlink:
            link = netlink.link(device) if device is not None else None
            vrf = link.vrf.ifindex if link is not None and link.vrf else 0
            path = netlink.path_to(to, vrf)
            times = (probes.ping(to, self.count, self.timeout, vrf)
                     if self.port is None else probes.connect(
                         to, self.port, self.count, self.timeout, vrf))
            neighbour, state = (
                (None, None) if path is None
                else netlink.neighbour(path.ifindex, path.gateway or to))
        if path is None:
            problem = 'there is no route to it'
        elif device not in (None, path.device):
            problem = 'its route goes through %s, not %s' % (path.device,
                                                             device)
        elif mac is not None and neighbour not in (None, mac):
            problem = ('its neighbour has the MAC address %s, but must have '
                       '%s' % (neighbour, mac))
        else:
            problem = ''
        lost = times.count(None)
        return Probe(
            device is not None, to, path, neighbour, state, tuple(times),
            problem or ('%d of %d were not answered' % (lost, len(times))
                        if lost else None), bool(problem))
