# SPDX-License-Identifier: Apache-2.0

"""``kuryr-break0 status``"""

from __future__ import annotations

import json
from typing import Any, Iterator

from oslo_config import cfg
import prettytable

from kuryr_break0.cli import common
from kuryr_break0 import config
from kuryr_break0 import device
from kuryr_break0 import kernel
from kuryr_break0.ledger import Ledger
from kuryr_break0.model import address_order
from kuryr_break0.model import IPAddress
from kuryr_break0.model import Record
from kuryr_break0 import snapshot
from kuryr_break0.snapshot import Snapshot


#: Characters of a container id, as docker and crictl print it; more for what
#: stands for one that is not known.
_SHORT = 24


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        'status', help='show break0 and the addresses of containers behind it',
        description='Show break0 and the addresses of containers behind it. '
                    'Exits with 0 if all is as it should be, 1 if something '
                    'stops traffic or a sync would change something, 2 for '
                    'wrong usage or configuration, 3 if the kernel or the '
                    'state directory cannot be read.')
    parser.add_argument('--json', action='store_true',
                        help='print JSON instead of tables')
    parser.add_argument('--wide', action='store_true',
                        help='print container ids in full')
    parser.set_defaults(func=run)


def run(conf: cfg.ConfigOpts, options: config.Options) -> int:
    """Print what is, and what is wrong with it."""
    with kernel.Netlink() as netlink:
        seen = snapshot.read(options, Ledger(
            options.state_dir, options.lock_timeout), netlink)
    shown = Status(seen)
    if conf.command.json:
        print(json.dumps(shown.as_json(), indent=2))
    else:
        for part in shown.as_text(conf.command.wide):
            print(part)
    return common.IN_SYNC if shown.in_sync else common.DRIFT


class Status:
    """A snapshot as it is shown."""

    def __init__(self, seen: Snapshot) -> None:
        self._seen = seen
        self._problems = seen.problems()
        self._of_node = list(seen.node_problems())
        self._addresses = sorted(seen.live.keys() | self._problems.keys(),
                                 key=address_order)

    @property
    def in_sync(self) -> bool:
        return not (self._problems or self._of_node)

    def as_json(self) -> dict[str, Any]:
        parents = list(self._seen.parents.values())
        devices = [_device_as_json(*each) for each in self._devices()]
        return {
            'in_sync': self.in_sync,
            'device': next(iter(devices), None),
            'devices': devices,
            'host_addresses': sorted({
                str(address) for parent in parents if parent.node
                for address in parent.node.addresses}),
            'problems': self._of_node,
            'addresses': [self._address_as_json(address)
                          for address in self._addresses],
            'totals': self._totals()}

    def _devices(self) -> Iterator[tuple[kernel.Link,
                                         tuple[IPAddress, ...]]]:
        for parent in self._seen.parents.values():
            if parent.present is not None:
                yield parent.present, parent.addresses
        if self._seen.stranger is not None:
            yield self._seen.stranger, ()

    def _address_as_json(self, address: IPAddress) -> dict[str, Any]:
        record = self._seen.live.get(address)
        parent = self._seen.parent_of(address)
        problem = self._problems.get(address)
        neighbour = parent.neighbours.get(address) if parent else None
        return {
            'address': str(address),
            'container_id': record.owner.container_id if record else None,
            'ifname': record.owner.ifname if record else None,
            'pod': record.pod if record else None,
            'origin': record.origin.value if record and record.origin
            else None,
            'network': record.network if record else None,
            'netns': record.netns if record else None,
            'parent': parent.name if parent else None,
            'device': parent.device if parent else None,
            'routed': parent is not None and address in parent.routes,
            'neighbour': neighbour.mac if neighbour else None,
            'problem': problem, 'in_sync': problem is None}

    def _totals(self) -> dict[str, int]:
        return {'bound': len(self._seen.live),
                'routed': sum(address in parent.routes
                              for parent in self._seen.parents.values()
                              for address in self._addresses),
                'out_of_sync': len(self._problems)}

    def as_text(self, wide: bool = False) -> Iterator[str]:
        links = list(self._devices())
        if not links and not self._seen.live:
            yield ('There is no %s yet: it comes with the first container.'
                   % self._seen.options.device)
        if links:
            table = prettytable.PrettyTable(
                ['Device', 'Kind', 'Parent', 'MAC', 'MTU', 'Addresses',
                 'State'])
            for link in links:
                table.add_row(_device_row(*link))
            yield str(table)
        table = prettytable.PrettyTable(
            ['Address', 'Container', 'Origin', 'Route', 'Neighbour',
             'In sync'])
        for address in self._addresses:
            each = self._address_as_json(address)
            record = self._seen.live.get(address)
            table.add_row([
                address, _owner(record, wide) if record else 'nobody',
                each['origin'] or '-',
                'yes' if each['routed'] else '-', each['neighbour'] or '-',
                'no: ' + each['problem'] if each['problem'] else 'yes'])
        yield str(table)
        for problem in self._of_node:
            yield 'Out of sync: ' + problem
        yield ('%(bound)d bound, %(routed)d routed, %(out_of_sync)d out of '
               'sync' % self._totals())


def _owner(record: Record, wide: bool) -> str:
    """Say whose an address is: by name, or as engines shorten ids."""
    if wide:
        return str(record.owner)
    return '%s/%s' % (record.pod or record.owner.container_id[:_SHORT],
                      record.owner.ifname)


def _device_as_json(link: kernel.Link,
                    addresses: tuple[IPAddress, ...]) -> dict[str, Any]:
    return {
        'name': link.name, 'index': link.index, 'kind': link.kind,
        'mode': link.mode, 'parent_index': link.lower,
        'parent': device.lower_name(link), 'mac': link.mac, 'mtu': link.mtu,
        'up': link.up,
        'addresses': [str(each) for each in addresses]}


def _device_row(link: kernel.Link,
                addresses: tuple[IPAddress, ...]) -> list[Any]:
    return [link.name, '%s %s' % (link.kind or 'physical', link.mode or ''),
            device.lower_name(link) or '-', link.mac, link.mtu,
            ' '.join(map(str, addresses)) or 'unnumbered',
            'up' if link.up else 'down']
