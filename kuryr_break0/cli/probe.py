# SPDX-License-Identifier: Apache-2.0

"""``kuryr-break0 probe``: pings pods from the node and the node from pods."""

from __future__ import annotations

import contextlib
import dataclasses
from typing import Any, Optional

from oslo_config import cfg

from kuryr_break0.cli import common
from kuryr_break0.cli import names
from kuryr_break0.cli import output
from kuryr_break0.cli import parser
from kuryr_break0 import config
from kuryr_break0.doctor.prober import Probe
from kuryr_break0.doctor.prober import Prober
from kuryr_break0.doctor.trace import places
from kuryr_break0.doctor.trace import Trace
from kuryr_break0.doctor.trace import traced
from kuryr_break0.engine import actual
from kuryr_break0.engine.snapshot import Snapshot
from kuryr_break0 import exceptions
from kuryr_break0 import kernel
from kuryr_break0.ledger import Ledger
from kuryr_break0 import model
from kuryr_break0 import option_types

_DESCRIPTION = """\
Ping a container or pod from the node. If its network namespace is known, also
ping the addresses of the node from there. For each direction, show the source
address and the interface that the kernel selects (ip route get), MAC address
and state of the neighbour, the number of answered pings, and the minimum,
mean and maximum round-trip time in milliseconds.

Change nothing, except that the kernel may add a neighbour. Exit status: 0 if
all pings were answered and the pings of the node went through break0, 1 if
not, 2 for wrong usage or configuration, 3 if the kernel or the state
directory cannot be read.
"""
_EPILOG = """\
examples:
  kuryr-break0 probe homeassistant
  kuryr-break0 probe 192.0.2.71 --tcp 8080
  kuryr-break0 probe default/web-1 --trace
  kuryr-break0 probe --all --count 1
"""


def add_parsers(subparsers: Any) -> None:
    added = parser.add_verb(subparsers, 'probe', _run, _DESCRIPTION, _EPILOG)
    added.add_value('target', 'NAME', 'address, or name of a container or pod',
                    nargs='?')
    added.add_flag('--all', 'probe each bound address')
    added.add_value(
        '--tcp', 'PORT', 'connect to this TCP port instead of pinging; a '
        'refused connection is an answer too',
        option_types.WholeNumber(min=1, max=65535))
    added.add_flag(
        '--conflict', "search for other hosts with the address, by ARP or "
        "neighbour solicitations from the container's interface; the hosts "
        "on the LAN receive these requests")
    added.add_flag(
        '--trace', 'show the rule that drops a packet, on the node or in the '
        'container; while the probe runs, a table of nftables marks the '
        'packets')
    added.add_value('--count', 'N', 'pings in each direction (default: 3)',
                    option_types.WholeNumber(min=1, max=1000), default=3)
    added.add_value(
        '--timeout', 'SECONDS', 'time to wait for each answer (default: 1)',
        option_types.WholeNumber(min=1, max=60), default=1)
    added.add_flag('--wide', 'do not fold long lines')


@dataclasses.dataclass(frozen=True)
class Result:
    """The result for one address.

    :ivar note: the reason why no probe was sent from the pod; None if one was
        sent
    :ivar claimants: MAC addresses of other hosts with the address; None if
        no search was made
    """

    address: model.IPAddress
    owner: Optional[model.Owner]
    probes: list[Probe]
    note: Optional[str]
    claimants: Optional[list[str]]
    trace: Optional[Trace]

    @property
    def reached(self) -> bool:
        return not (any(probe.problem for probe in self.probes)
                    or self.claimants)

    def as_json(self) -> dict[str, Any]:
        return {
            'address': str(self.address), 'reached': self.reached,
            'owner': str(self.owner) if self.owner else None,
            'probes': [_as_json(probe) for probe in self.probes],
            'note': self.note, 'claimants': self.claimants,
            'trace': None if self.trace is None else {
                'dropped': list(self.trace.dropped), 'seen': self.trace.hooks}}


def _run(conf: cfg.ConfigOpts, options: config.Options) -> int:
    command = conf.command
    if command.all == (command.target is not None):
        raise exceptions.WrongUsage(
            'Give an address or the name of a container or pod, or --all to '
            'probe all bound addresses.')
    with kernel.Netlink() as netlink:
        snapshot = actual.read(options, Ledger(options.state_dir), netlink)
    addresses = (sorted(snapshot.live, key=model.address_order) if command.all
                 else names.addresses_of(command.target, snapshot.live))
    prober = Prober(command.count, command.timeout, command.tcp)
    with output.Counter('probe') as counter:
        results = [_result(prober, options, snapshot, address, command)
                   for address in counter.over(addresses)]
    if command.output:
        documents = [each.as_json() for each in results]
        is_one = not command.all and command.target == str(addresses[0])
        output.write_document(documents[0] if is_one else documents,
                              command.output)
    else:
        _print(results, command.wide)
    return (common.IN_SYNC if all(each.reached for each in results)
            else common.DRIFT)


def _print(results: list[Result], wide: bool) -> None:
    probes = [probe for each in results for probe in each.probes]
    output.table(['Direction', 'From', 'To', 'Through', 'Answered'],
                 map(_row, probes), wide)
    for probe in probes:
        if probe.problem is not None:
            output.say(output.Wrong('%s, to %s: %s' % (
                probe.direction, probe.to, probe.problem)))
    for each in results:
        if each.note is not None:
            output.say('%s: no probe from the pod: %s' % (
                each.address, each.note))
        if each.trace is not None and any(
                probe.problem for probe in each.probes):
            for text in each.trace.explain():
                output.say(output.Wrong('%s: %s' % (each.address, text)))
        if each.claimants == []:
            output.say('%s: no other host has answered for the address' %
                       each.address)
        for mac in each.claimants or ():
            output.say(output.Wrong(
                '%s is also used by the host with the MAC address %s. Give '
                'one of them another address.' % (each.address, mac)))


def _row(probe: Probe) -> list[str]:
    path, times = probe.path, probe.answered
    answered = '%d of %d' % (len(times), len(probe.times))
    if times:
        answered += ' in %.3f / %.3f / %.3f ms' % (
            min(times) * 1000, sum(times) / len(times) * 1000,
            max(times) * 1000)
    return [output.speak(probe.direction),
            str(path.source) if path and path.source else '-',
            '%s%s' % (probe.to, ' via %s' % path.gateway
                      if path and path.gateway else ''),
            '%s %s %s' % (path.device if path else '-', probe.mac or '-',
                          probe.state or 'unknown'),
            answered if len(times) == len(probe.times)
            else output.Wrong(answered)]


def _result(prober: Prober, options: config.Options, snapshot: Snapshot,
            address: model.IPAddress, command: Any) -> Result:
    record, parent = snapshot.live.get(address), snapshot.parent_of(address)
    device = parent.device if parent else options.device
    note, claimants = None, None
    with (traced(address, places(device, record)) if command.trace
          else contextlib.nullcontext()) as trace:
        probes = [prober.probe(address, device,
                               record.mac if record else None)]
        if record is None:
            note = 'no pod on this node has a record of this address'
        elif record.netns is None:
            note = ('the namespace of the pod %s is not recorded'
                    % record.owner_text)
        elif parent is None or parent.node is None:
            note = 'there is no break0 on %s' % record.parent
        else:
            try:
                probes += prober.from_pod(address, record.netns,
                                          record.namespace, parent.node)
                if command.conflict:
                    with kernel.enter_namespace(record.netns,
                                                record.namespace):
                        claimants = kernel.find_claimants(
                            record.owner.ifname, address)
            except exceptions.NetnsUnusable as err:
                note = str(err)
    return Result(address, record.owner if record else None, probes, note,
                  claimants, trace)


def _as_json(probe: Probe) -> dict[str, Any]:
    path = probe.path
    return {
        'direction': probe.direction, 'to': str(probe.to),
        'from': str(path.source) if path and path.source else None,
        'interface': path and path.device,
        'gateway': str(path.gateway) if path and path.gateway else None,
        'neighbour': {'mac': probe.mac, 'state': probe.state},
        'round_trip_ms': [None if time is None else round(time * 1000, 3)
                          for time in probe.times],
        'problem': probe.problem}
