# SPDX-License-Identifier: Apache-2.0

"""``kuryr-break0 status``: shows break0 and the bound addresses."""

from __future__ import annotations

import contextlib
import sys
import time
from typing import Any, Collection, Iterator, Optional

from oslo_config import cfg

from kuryr_break0.break0 import device
from kuryr_break0.cli import common
from kuryr_break0.cli import names
from kuryr_break0.cli import output
from kuryr_break0.cli import parser
from kuryr_break0 import config
from kuryr_break0.engine import actual
from kuryr_break0.engine import containers
from kuryr_break0.engine import problems
from kuryr_break0.engine.snapshot import Parent
from kuryr_break0.engine.snapshot import Snapshot
from kuryr_break0 import kernel
from kuryr_break0.ledger import Ledger
from kuryr_break0.ledger import readers
from kuryr_break0 import model
from kuryr_break0 import option_types

#: Largest number of characters to show of a container id, or of the name that
#: replaces an unknown id.
_SHORT = 24
#: Seconds between two snapshots of --watch.
_PAUSE = 2.0
#: Seconds between two snapshots of --wait.
_RETRY = 0.5

_DESCRIPTION = """\
Show break0 and the bound addresses: a summary, problems, containers that are
not bound, and a table of all addresses, or of one container or pod. Exit
status: 0 if everything is in sync, 1 if a container is not bound, a fault
stops traffic or a sync would change something, 2 for wrong usage or
configuration, 3 if the kernel or the state directory cannot be read.
"""


def add_parsers(subparsers: Any) -> None:
    added = parser.add_verb(subparsers, 'status', run, _DESCRIPTION)
    added.add_value('target', 'NAME', 'address, or name of a container or pod',
                    nargs='?')
    added.add_flag(
        '--wide', 'print ids and neighbours in full, and do not fold long '
        'lines')
    added.add_flag('--problems', 'show only addresses with a problem')
    added.add_value('--pod', 'TEXT', 'show only pods or containers whose name '
                    'contains TEXT')
    added.add_value('--owner', 'ID', 'show only containers whose id starts '
                    'with ID')
    added.add_argument(
        '--origin', choices=[each.value for each in model.Origin],
        help='show only addresses with this origin')
    added.add_value(
        '--wait', 'SECONDS', 'first wait until everything is in sync, at most '
        'this time (default: 60)', option_types.WholeNumber(
            min=1, max=86400), nargs='?', const=60)
    added.add_flag(
        '--watch', 'then print bound addresses and problems as they appear '
        '(+) and clear (-), until Ctrl-C; with --output, print everything '
        'after each change')


def run(conf: cfg.ConfigOpts, options: config.Options) -> int:
    """Print the state of break0 and addresses; return the exit code."""
    command = conf.command
    shown = read(options, command)
    deadline = time.monotonic() + (command.wait or 0)
    while not shown.in_sync and time.monotonic() < deadline:
        time.sleep(_RETRY)
        shown = read(options, command)
    if command.output:
        output.write_document(shown.as_json(), command.output)
    else:
        shown.print(command.wide)
    if command.watch:
        with contextlib.suppress(KeyboardInterrupt):
            while True:
                sys.stdout.flush()
                time.sleep(_PAUSE)
                before, shown = shown, read(options, command)
                if not command.output:
                    _print_changes(before, shown)
                elif shown.as_json() != before.as_json():
                    output.write_document(shown.as_json(), command.output)
    return common.IN_SYNC if shown.in_sync else common.DRIFT


def as_json(options: config.Options) -> dict[str, Any]:
    """Return the document of ``status --json``."""
    return read(options).as_json()


def read(options: config.Options, command: Any = None) -> Status:
    """Return the problems and addresses of the node."""
    ledger = Ledger(options.state_dir)
    with kernel.Netlink() as netlink:
        return Status(actual.read(options, ledger, netlink), ledger, command)


def _print_changes(before: Status, now: Status) -> None:
    """Print problems and bound addresses that appeared (+) or cleared (-)."""
    old, new = dict.fromkeys(before.facts()), dict.fromkeys(now.facts())
    for sign, facts, opposite in ('-', old, new), ('+', new, old):
        for each in facts:
            if each not in opposite:
                output.write('%s %s %s' % (time.strftime('%H:%M:%S'), sign,
                                           each))


class Status:
    """The problems and addresses of a snapshot.

    :param command: the arguments, which select addresses; None for all
    """

    def __init__(self, snapshot: Snapshot, ledger: Ledger,
                 command: Any = None) -> None:
        self._snapshot = snapshot
        self._agent = ledger.heartbeat.state(snapshot.options.patience)
        self._unserved = containers.unserved(snapshot, ledger)
        self._all_problems, self._not_examined = problems.find_all(snapshot)
        self._problems = problems.by_address(self._all_problems)
        self._of_node = problems.of_node(self._all_problems)
        self._differences = list(readers.list_differences(ledger))
        self._addresses = sorted(snapshot.live.keys() | self._problems.keys(),
                                 key=model.address_order)
        if command is not None:
            named = None if command.target is None else names.addresses_of(
                command.target, snapshot.live)
            self._addresses = [
                each for each in self._addresses
                if (named is None or each in named)
                and (not command.problems or each in self._problems)
                and _is_of(snapshot.live.get(each), command)]

    @property
    def in_sync(self) -> bool:
        return not (self._problems or self._of_node or self._unserved)

    def as_json(self) -> dict[str, Any]:
        parents = self._snapshot.parents.values()
        devices = [_device_as_json(parent.present, parent.addresses,
                                   self._guard_state(parent))
                   for parent in parents if parent.present is not None]
        if self._snapshot.name_conflict is not None:
            devices.append(_device_as_json(self._snapshot.name_conflict, (),
                                           None))
        return {
            'in_sync': self.in_sync,
            'agent': self._agent,
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
            'addresses': list(map(self._address_as_json, self._addresses)),
            'totals': {
                'bound': len(self._snapshot.live),
                'routed': sum(address in parent.routes for parent in parents
                              for address in {*self._snapshot.live,
                                              *self._problems}),
                'out_of_sync': len(self._problems),
                'unserved': len(self._unserved)}}

    def _guard_state(self, parent: Parent) -> Optional[str]:
        """Return the state of a guard; None without pods or break0."""
        if self._snapshot.options.guard == config.OFF:
            return 'off'
        if not parent.live or parent.node is None:
            return None  # the guard was not read
        if parent.guard:
            return 'faulty'
        return 'loaded' if parent.is_guarded else 'unavailable'

    def _address_as_json(self, address: model.IPAddress) -> dict[str, Any]:
        record = self._snapshot.live.get(address)
        parent = self._snapshot.parent_of(address)
        neighbour = parent and parent.neighbours.get(address)
        problem = self._problems.get(address)
        return {
            'address': str(address),
            'container_id': record and record.owner.container_id,
            'ifname': record and record.owner.ifname,
            'pod': record and record.pod,
            'origin': record and record.origin and record.origin.value,
            'network': record and record.network,
            'netns': record and record.netns,
            'parent': parent and parent.name,
            'device': parent and parent.device,
            'routed': parent is not None and address in parent.routes,
            'neighbour': neighbour and neighbour.mac,
            'problem': problem, 'in_sync': problem is None}

    def print(self, wide: bool = False) -> None:
        """Print a summary, problems, and a table of the addresses."""
        shown = self.as_json()
        if shown['devices']:
            output.table(
                ['Device', *(['Kind'] if wide else []), 'Parent',
                 *(['MAC', 'MTU'] if wide else []), 'Addresses', 'State',
                 'Guard', 'Agent'],
                [_device_row(each, self._agent, wide)
                 for each in shown['devices']], wide)
        elif not (self._snapshot.live or self._unserved):
            output.say('%s does not exist yet: the bind of the first '
                       'container creates it.' % self._snapshot.options.device)
        output.write('%(bound)d bound, %(routed)d routed, %(out_of_sync)d '
                     'out of sync' % shown['totals'])
        for _, _, text in self._differences:
            output.say(output.Wrong('Differs: %s.' % text))
        for problem in self._of_node:
            output.say(output.Wrong('Out of sync: ' + problem))
        for each in self._unserved:
            output.say(output.Wrong('Not bound: %s' % each))
        if containers.blindness():
            output.say('Not examined: ' + containers.blindness())
        for address, why in list(self._not_examined.items())[:1]:
            output.say('Not examined in the container: %d addresses, for '
                       'example %s: %s' % (
                           len(self._not_examined), address, why))
        if shown['addresses']:
            head = ['Address', 'Container', 'Origin', 'Route',
                    *(['Neighbour'] if wide else []), 'In sync']
            output.table(head, [
                self._row(each, wide) for each in sorted(
                    self._addresses,
                    key=lambda each: each not in self._problems)], wide)

    def _row(self, address: model.IPAddress, wide: bool) -> list[str]:
        each, record = self._address_as_json(address), self._snapshot.live.get(
            address)
        owner = '-'
        if record is not None:  # the name, or a shortened id
            owner = record.owner_text if wide else '%s/%s' % (
                record.pod or record.owner.container_id[:_SHORT],
                record.owner.ifname)
        return [each['address'], owner, each['origin'] or '-',
                'yes' if each['routed'] else '-',
                *([each['neighbour'] or '-'] if wide else []),
                output.Wrong(output.speak('no: ' + each['problem']))
                if each['problem'] else 'yes']

    def describe_problems(self, without: Collection[object] = ()
                          ) -> Iterator[str]:
        """Yield a line for each problem and each unbound container.

        :param without: subjects; the result omits their problems
        """
        yield from problems.of_node(each for each in self._all_problems
                                    if each.subject not in without)
        yield from map(str, self._unserved)
        for address in self._addresses:
            if address in self._problems and address not in without:
                yield '%s: %s' % (address, self._problems[address])

    def facts(self) -> Iterator[str]:
        """Yield a line for each problem and each bound address."""
        yield from self.describe_problems()
        for address in self._addresses:
            if address in self._snapshot.live:
                yield '%s: bound for %s' % (
                    address, self._snapshot.live[address].owner_text)

    def addresses_of(self, owners: Collection[model.Owner]
                     ) -> list[model.IPAddress]:
        """Return the bound addresses of the given owners."""
        return [address for address, record in self._snapshot.live.items()
                if record.owner in owners]


def _is_of(record: Optional[model.Record], command: Any) -> bool:
    """Return whether --pod, --owner and --origin select a record."""
    if record is None:
        return not (command.pod or command.owner or command.origin)
    return ((command.pod or '') in (record.pod or '')
            and record.owner.container_id.startswith(command.owner or '')
            and command.origin in (None, record.origin
                                   and record.origin.value))


def _device_as_json(link: kernel.Link, addresses: tuple[model.IPAddress, ...],
                    guard: Optional[str]) -> dict[str, Any]:
    return {
        'name': link.name, 'index': link.index, 'kind': link.kind,
        'mode': link.mode, 'parent_index': link.lower,
        'parent': device.lower_name(link), 'mac': link.mac, 'mtu': link.mtu,
        'up': link.up, 'guard': guard,
        'addresses': [str(each) for each in addresses]}


def _device_row(each: dict[str, Any], agent: str, wide: bool) -> list[Any]:
    kind = '%s %s' % (each['kind'] or 'physical', each['mode'] or '')
    return [each['name'], *([kind] if wide else []), each['parent'] or '-',
            *([each['mac'], each['mtu']] if wide else []),
            ' '.join(each['addresses']) or 'unnumbered',
            'up' if each['up'] else output.Wrong('down'),
            output.Wrong('faulty') if each['guard'] == 'faulty'
            else each['guard'] or '-',
            output.Wrong(agent) if agent == 'stuck' else agent]
