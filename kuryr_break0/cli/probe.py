# SPDX-License-Identifier: Apache-2.0

"""Whether node and pod reach each other through break0, and how."""

from __future__ import annotations

import argparse
import dataclasses
import json
from typing import Any, Optional

from oslo_config import cfg
import prettytable

from kuryr_break0.cli import common
from kuryr_break0 import config
from kuryr_break0 import exceptions
from kuryr_break0 import kernel
from kuryr_break0.kernel import icmp
from kuryr_break0.ledger import Ledger
from kuryr_break0.model import IPAddress
from kuryr_break0.model import NamespaceId
from kuryr_break0.model import NodeAddresses
from kuryr_break0 import snapshot

_DESCRIPTION = """\
Ping the address of a pod from the node and, where its network namespace is
known, the addresses of the node from there. For each way it shows the
interface and source address that the kernel chooses (ip route get), the MAC
address that it sends to and how that is known, how many pings were answered,
and the shortest, mean and longest round-trip time in milliseconds.

Changes nothing, but the kernel may learn a neighbour from it. Exits with 0 if
all pings were answered, and those of the node went through break0; 1 if not;
2 for wrong usage or configuration; 3 if the kernel or the state directory
cannot be read.
"""
_EPILOG = """\
example:
  kuryr-break0 probe 192.0.2.71
"""


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        'probe', help='ping a pod from the node, and the node from the pod',
        description=_DESCRIPTION, epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('address', metavar='ADDRESS',
                        type=common.argument(config.HostAddress()),
                        help="the pod's IPv4 or IPv6 address")
    parser.add_argument('--count', metavar='N', default=3,
                        type=common.argument(config.WholeNumber(
                            min=1, max=1000)),
                        help='pings in each direction (default: 3)')
    parser.add_argument('--timeout', metavar='SECONDS', default=1,
                        type=common.argument(config.WholeNumber(
                            min=1, max=60)),
                        help='how long to wait for each (default: 1)')
    parser.add_argument('--json', action='store_true',
                        help='print JSON instead of a table')
    parser.set_defaults(func=_run)


@dataclasses.dataclass(frozen=True)
class Probe:
    """One direction, and what was seen of it.

    :ivar to: the address that was pinged
    :ivar path: None if there is no way
    :ivar mac: what the address, or the gateway to it, is at on the link
    :ivar state: how that is known; None if it is not
    :ivar times: seconds that each ping took; None for one without a reply
    :ivar problem: what is not as it should be; None if nothing
    """

    direction: str
    to: IPAddress
    path: Optional[kernel.Path]
    mac: Optional[str]
    state: Optional[str]
    times: tuple[Optional[float], ...]
    problem: Optional[str]

    @property
    def answered(self) -> list[float]:
        """The times of those that were answered."""
        return [time for time in self.times if time is not None]


class Prober:
    """Probes one address of a pod.

    :param count: pings in each direction
    :param timeout: seconds to wait for each
    """

    def __init__(self, options: config.Options, count: int,
                 timeout: float) -> None:
        self._options = options
        self._count = count
        self._timeout = timeout

    def from_node(self, address: IPAddress, device: str,
                  mac: Optional[str]) -> Probe:
        """Probe the way to a pod.

        :param device: the break0 that it must go through
        :param mac: that of the pod; None if it is not known
        :raises Break0Error: if the kernel cannot be asked
        """
        return self._probe('node to pod', address, device, mac)

    def from_pod(self, address: IPAddress, netns: str,
                 namespace: Optional[NamespaceId],
                 node: NodeAddresses) -> list[Probe]:
        """Probe the ways to the addresses of the node, as the pod has them.

        :raises NetnsUnusable: if its namespace cannot be entered
        :raises Break0Error: if the kernel cannot be asked
        """
        with kernel.entered(netns, namespace):
            return [self._probe('pod to node', host, None, node.mac)
                    for host in node.addresses
                    if host.version == address.version]

    def _probe(self, direction: str, to: IPAddress, device: Optional[str],
               mac: Optional[str]) -> Probe:
        """From the namespace of this thread.

        :param device: what it is to go through; None for any interface
        :param mac: what it is to be sent to; None for any
        """
        with kernel.Netlink() as netlink:
            path = netlink.path_to(to)
            times = icmp.ping(to, self._count, self._timeout)
            found, state = (None, None) if path is None else netlink.neighbour(
                path.ifindex, path.gateway or to)
        problem = None
        answered = sum(time is not None for time in times)
        if answered < len(times):
            problem = '%d of %d were not answered' % (
                len(times) - answered, len(times))
        if path is None:
            problem = 'there is no route to it'
        elif device is not None and path.device != device:
            problem = 'it does not go through %s' % device
        elif mac is not None and found is not None and found != mac:
            problem = 'it is sent to %s, but should be to %s' % (found, mac)
        return Probe(direction, to, path, found, state, tuple(times), problem)


def _run(conf: cfg.ConfigOpts, options: config.Options) -> int:
    wanted = conf.command
    with kernel.Netlink() as netlink:
        seen = snapshot.read(options, Ledger(
            options.state_dir, options.lock_timeout), netlink)
    record = seen.live.get(wanted.address)
    parent = seen.parent_of(wanted.address)
    prober = Prober(options, wanted.count, wanted.timeout)
    probes = [prober.from_node(
        wanted.address, parent.device if parent else options.device,
        record.mac if record else None)]
    note = None
    if record is None:
        note = 'no pod on this node is recorded for this address'
    elif record.netns is None:
        note = 'the namespace of %s is not recorded' % record.owner
    elif parent is None or parent.node is None:
        note = 'there is no break0 on %s' % record.parent
    else:
        try:
            probes += prober.from_pod(wanted.address, record.netns,
                                      record.namespace, parent.node)
        except exceptions.NetnsUnusable as err:
            note = str(err)
    reached = not any(probe.problem for probe in probes)
    if wanted.json:
        print(json.dumps({
            'address': str(wanted.address), 'reached': reached,
            'owner': str(record.owner) if record else None,
            'probes': [_as_json(probe) for probe in probes],
            'note': note}, indent=2))
    else:
        _print_table(probes)
        if note is not None:
            print('The way from the pod was not tried: %s' % note)
    return common.IN_SYNC if reached else common.DRIFT


def _as_json(probe: Probe) -> dict[str, Any]:
    path = probe.path
    return {
        'direction': probe.direction, 'to': str(probe.to),
        'from': str(path.source) if path and path.source else None,
        'interface': path.device if path else None,
        'gateway': str(path.gateway) if path and path.gateway else None,
        'neighbour': {'mac': probe.mac, 'state': probe.state},
        'round_trip_ms': [None if time is None else round(time * 1000, 3)
                          for time in probe.times],
        'problem': probe.problem}


def _print_table(probes: list[Probe]) -> None:
    table = prettytable.PrettyTable(
        ['Direction', 'From', 'To', 'Interface', 'Neighbour', 'Answered',
         'Round trip (ms)', 'Problem'])
    for probe in probes:
        path, times = probe.path, probe.answered
        table.add_row([
            probe.direction, path.source if path and path.source else '-',
            '%s%s' % (probe.to, ' via %s' % path.gateway
                      if path and path.gateway else ''),
            path.device if path else '-',
            '%s %s' % (probe.mac or '-', probe.state or 'unknown'),
            '%d of %d' % (len(times), len(probe.times)),
            '%.3f / %.3f / %.3f' % (
                min(times) * 1000, sum(times) / len(times) * 1000,
                max(times) * 1000) if times else '-',
            probe.problem or '-'])
    print(table)
