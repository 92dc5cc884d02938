# SPDX-License-Identifier: Apache-2.0

"""``kuryr-break0 status``: shows break0 and the addresses behind it."""

from __future__ import annotations

import contextlib
import sys
import time
from typing import Any, Iterator, Optional

from oslo_config import cfg

from kuryr_break0 import actual
from kuryr_break0.cli import common
from kuryr_break0.cli import names
from kuryr_break0.cli import output
from kuryr_break0.cli import parser
from kuryr_break0 import config
from kuryr_break0 import containers
from kuryr_break0 import device
from kuryr_break0 import kernel
from kuryr_break0.ledger import Ledger
from kuryr_break0.model import address_order
from kuryr_break0.model import IPAddress
from kuryr_break0.model import Origin
from kuryr_break0.model import Record
from kuryr_break0.problems import address_problems
from kuryr_break0.problems import node_problems
from kuryr_break0.snapshot import Snapshot


#: Characters of a container id, as docker and crictl print it; more for what
#: stands for one that is not known.
_SHORT = 24
#: Seconds between two snapshots of --watch.
_PAUSE = 2.0

_DESCRIPTION = """\
Show break0 and the addresses behind it: first a summary and what is wrong,
then containers that are not bound, and each address, or those of one container
or pod. Exit status: 0 if everything is in sync, 1 if a container is not bound,
something stops traffic or a sync would change something, 2 for wrong usage or
configuration, 3 if the kernel or the state directory cannot be read.
"""


def add_parsers(subparsers: Any) -> None:
    added = parser.add_verb(
        subparsers, 'status', run, _DESCRIPTION)
    added.add_argument('target', metavar='NAME', nargs='?',
                       help='address, or name of a container or pod')
    added.add_flag(
        '--wide', 'print ids and neighbours in full, and do not fold long '
        'lines')
    added.add_flag('--problems', 'show only addresses with a problem')
    added.add_argument('--pod', metavar='TEXT',
                       help='show only pods or containers whose name '
                            'contains this')
    added.add_argument('--owner', metavar='ID',
                       help='show only containers whose id starts with this')
    added.add_argument('--origin', choices=[each.value for each in Origin],
                       help='show only addresses that were bound this way')
    added.add_flag(
        '--watch', 'then print what comes (+) and what goes (-), until Ctrl-C')


def run(conf: cfg.ConfigOpts, options: config.Options) -> int:
    """Print what is, and what is wrong with it."""
    wanted = conf.command
    shown = _read(options, wanted)
    if wanted.json:
        output.write_json(shown.as_json())
    else:
        shown.print(wanted.wide)
    if wanted.watch:
        with contextlib.suppress(KeyboardInterrupt):
            shown = _watch(options, wanted, shown)
    return common.IN_SYNC if shown.in_sync else common.DRIFT


def _read(options: config.Options, wanted: Any = None) -> Status:
    ledger = Ledger(options.state_dir)
    with kernel.Netlink() as netlink:
        return Status(actual.read(options, ledger, netlink), ledger, wanted)


def _watch(options: config.Options, wanted: Any, before: Status) -> Status:
    """Print what changes, a line each, until it is interrupted."""
    while True:
        sys.stdout.flush()
        try:
            time.sleep(_PAUSE)
            now = _read(options, wanted)
        except KeyboardInterrupt:
            return before
        old, new = dict.fromkeys(before.facts()), dict.fromkeys(now.facts())
        for sign, facts, others in ('-', old, new), ('+', new, old):
            for each in facts:
                if each not in others:
                    output.write('%s %s %s' % (time.strftime('%H:%M:%S'),
                                               sign, each))
        before = now


def as_json(options: config.Options) -> dict[str, Any]:
    """Return what ``status --json`` prints."""
    return _read(options).as_json()


class Status:
    """A snapshot as it is shown."""

    def __init__(self, seen: Snapshot, ledger: Ledger,
                 wanted: Any = None) -> None:
        self._seen = seen
        self._unserved = containers.unserved(seen, ledger)
        wrong, self._not_examined = containers.pod_sides(seen)
        self._problems = {**wrong, **address_problems(seen)}
        self._of_node = list(node_problems(seen))
        self._wanted = wanted
        self._named = wanted and wanted.target and names.addresses_of(
            wanted.target, seen.live)
        self._addresses = sorted(
            filter(self._is_wanted, seen.live.keys() | self._problems.keys()),
            key=address_order)

    def _is_wanted(self, address: IPAddress) -> bool:
        wanted, record = self._wanted, self._seen.live.get(address)
        if wanted is None:
            return True
        if wanted.problems and address not in self._problems or (
                self._named and address not in self._named):
            return False
        if record is None:
            return not (wanted.pod or wanted.owner or wanted.origin)
        return ((wanted.pod or '') in (record.pod or '')
                and record.owner.container_id.startswith(wanted.owner or '')
                and wanted.origin in (None, record.origin
                                      and record.origin.value))

    @property
    def in_sync(self) -> bool:
        return not (self._problems or self._of_node or self._unserved)

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
            'unserved': [{
                'address': each.address and str(each.address),
                'ifname': each.macvlan.link.name,
                'netns': each.macvlan.netns, 'parent': each.macvlan.parent,
                'reason': each.reason.value, 'problem': each.text}
                for each in self._unserved],
            'not_examined': [
                {'address': str(address), 'why': why}
                for address, why in self._not_examined.items()],
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
                              for address in {*self._seen.live,
                                              *self._problems}),
                'out_of_sync': len(self._problems),
                'unserved': len(self._unserved)}

    def print(self, wide: bool = False) -> None:
        """Print a summary, what is wrong, and a table of the addresses."""
        links = list(self._devices())
        if not (links or self._seen.live or self._unserved):
            output.say('There is no %s yet: it comes with the first container.'
                       % self._seen.options.device)
        if links:
            output.table(
                ['Device', 'Kind', 'Parent', 'MAC', 'MTU', 'Addresses',
                 'State'], [_device_row(*link) for link in links], wide)
        output.write('%(bound)d bound, %(routed)d routed, %(out_of_sync)d '
                     'out of sync' % self._totals())
        for problem in self._of_node:
            output.say(output.Wrong('Out of sync: ' + problem))
        for each in self._unserved:
            output.say(output.Wrong('Not bound: %s' % each))
        for address, why in list(self._not_examined.items())[:1]:
            output.say('Not examined from inside: %d addresses, as %s: %s' % (
                len(self._not_examined), address, why))
        if self._addresses:
            head = ['Address', 'Container', 'Origin', 'Route', 'In sync']
            if wide:
                head.insert(4, 'Neighbour')
            output.table(head, [self._row(address, wide) for address in sorted(
                self._addresses, key=lambda each: each not in self._problems)],
                wide)

    def _row(self, address: IPAddress, wide: bool) -> list[str]:
        each = self._address_as_json(address)
        return [str(address), _owner(self._seen.live.get(address), wide),
                each['origin'] or '-', 'yes' if each['routed'] else '-',
                *([each['neighbour'] or '-'] if wide else []),
                output.Wrong(output.speak('no: ' + each['problem']))
                if each['problem'] else 'yes']

    def facts(self) -> Iterator[str]:
        """Return what is wrong and what is bound, a line each."""
        yield from self._of_node
        yield from map(str, self._unserved)
        for address in self._addresses:
            if address in self._seen.live:
                yield '%s: bound for %s' % (address,
                                            self._seen.live[address].whose)
            if address in self._problems:
                yield '%s: %s' % (address, self._problems[address])


def _owner(record: Optional[Record], wide: bool) -> str:
    """Say whose an address is: by name, or as engines shorten ids."""
    if record is None:
        return '-'
    if wide:
        return record.whose
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
