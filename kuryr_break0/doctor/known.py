# SPDX-License-Identifier: Apache-2.0

"""Converts the problems that status shows to findings with remedies."""

from __future__ import annotations

import contextlib
from typing import Any, Callable, Iterable, Iterator, Optional

from kuryr_break0 import config
from kuryr_break0.doctor.findings import ERROR
from kuryr_break0.doctor.findings import Finding
from kuryr_break0.doctor.findings import inside
from kuryr_break0.doctor.findings import KINDS
from kuryr_break0.doctor.findings import merged
from kuryr_break0.doctor.host import Host
from kuryr_break0.doctor.node import Node
from kuryr_break0.doctor import unserved
from kuryr_break0.engine import problems
from kuryr_break0.engine.snapshot import Parent
from kuryr_break0 import kernel
from kuryr_break0 import model

#: Files with the names of routing protocols, for ip(8).
_PROTOCOLS = tuple(directory + '/iproute2/rt_protos' for directory in (
    '/etc', '/usr/share', '/usr/lib'))
#: Kind of problem that device.py reports, with addresses that no sync deletes.
ADDRESSES = 'break0-addresses'
_SYNC = 'kuryr-break0 sync'
#: Problems of files, which records.py reports with the paths of the files.
_OF_FILES = ('ledger-damaged', 'ledger-newer', 'ledger-quarantined')


def check(node: Node, all_problems: Iterable[problems.Problem],
          host: Optional[Host] = None) -> Iterator[Finding]:
    """Yield findings for problems: one per kind, or per kind and break0.

    Addresses that are being bound or unbound are left out.

    :param host: builds the commands that change options
    """
    of_devices: dict[tuple[str, str], list[problems.Problem]] = {}
    of_addresses: list[tuple[model.IPAddress, problems.Problem]] = []
    for each in sorted(all_problems, key=_by_address):
        if isinstance(each.subject, str):
            of_devices.setdefault((each.kind, each.subject), []).append(each)
        elif each.subject not in node.changing:
            of_addresses.append((each.subject, each))
    parents = {parent.device: parent for parent
               in node.snapshot.parents.values()}
    for (kind, name), some in of_devices.items():
        if kind != ADDRESSES:
            yield _of_device(node, kind, name, parents.get(name), [
                each.text for each in some],
                any(each.is_error for each in some))
    told = {kind for kind, _ in of_devices}.union(_OF_FILES)
    if not node.snapshot.is_steady:  # a bind may not be complete
        told.update(('route-stale', 'neighbour-stale'))
    outside = [address for address, each in of_addresses
               if each.kind == 'address-not-allowed']
    allow = host.set(allowed_cidrs=unserved.with_networks(
        outside, node.options)) if host is not None and outside else []
    yield from merged(
        _of_address(node, each, address, node.snapshot.parent_of(address),
                    allow)
        for address, each in of_addresses if each.kind not in told)


def _of_device(node: Node, kind: str, name: str, parent: Any,
               texts: list[str], is_error: bool) -> Finding:
    """Return the finding for a break0's problems of one kind."""
    start = name + ': '
    details = [text[len(start):] if text.startswith(start) else text
               for text in texts]
    observed = texts[0] + ''.join(', ' + text for text in details[1:])
    subjects: list[Any] = []
    commands: list[str] = []
    fields: dict[str, Any] = {'device': name, 'names': '|'.join(
        text.split()[0] for text in details  # the names of sysctls
        if not text.startswith('it '))}
    if kind in ('ledger-lost', 'ledger-other'):
        observed += ', but state_dir is ' + node.options.state_dir
    elif kind == 'sandbox-unknown':
        subjects = [record.address for record in node.snapshot.unjudged]
    elif kind == 'parent-mismatch':
        subjects = list(parent.live)
    elif kind == 'parent-vrf':
        fields['table'] = parent.parent.vrf.table
    elif kind == 'parent-down':
        fields['parent'] = parent.name
        if parent.parent.up:
            commands = ['ip -details link show ' + parent.name]
    elif kind == 'break0-answers-lan':
        key = details[0].split()[0]
        fields.update(key='net/ipv4/conf/%s/%s' % (name, key),
                      value=int(key == 'arp_filter'))
    elif kind == 'ipv6-disabled':
        subjects = [address for address in parent.live
                    if address.version == 6]
    elif kind == 'guard-unavailable':
        is_error = node.options.guard == config.ON
    return KINDS[kind].finding(_as_part(observed), subjects, commands,
                               severity=ERROR if is_error else None, **fields)


def _by_address(problem: problems.Problem) -> tuple[int, ...]:
    """Return a sort key: devices in their order, then addresses."""
    return () if isinstance(problem.subject, str) else (
        1, *model.address_order(problem.subject))


def _as_part(text: str) -> str:
    """Return a text without its full stop, which the report adds."""
    return text[:-1] if text.endswith('.') else text


def _of_address(node: Node, problem: problems.Problem,
                address: model.IPAddress, parent: Any,
                allow: list[str]) -> Finding:
    """Return the finding for a problem of an address.

    :param allow: commands that allow the addresses outside of allowed_cidrs
    """
    detail, commands, fields = _DETAILS.get(problem.kind, _nothing)(
        node, address, parent)
    if problem.kind == 'address-not-allowed':
        commands = allow
    subject: object = address
    if problem.kind == 'sandbox-gone':
        subject = '%s (%s)' % (address, next(
            record.owner_text for record in node.snapshot.gone
            if record.address == address))
    return KINDS[problem.kind].finding(
        _as_part(problem.text) + (detail and ': ' + detail), [subject],
        commands, severity=ERROR if problem.is_error else None, **fields)


_Details = tuple[str, list[str], dict[str, Any]]


def _nothing(node: Node, address: model.IPAddress, parent: Parent) -> _Details:
    return '', [], {'device': parent.device if parent else ''}


def _refused(node: Node, address: model.IPAddress, parent: Parent) -> _Details:
    return ('the address %s of the pod %s is refused' % (
        address, node.live[address].owner_text)
        if address in node.live else ''), [], {}


def _contested(node: Node, address: model.IPAddress, parent: Parent
               ) -> _Details:
    return 'the newest claim on %s is of %s' % (
        address, node.live[address].owner_text), [], {}


def _missing(node: Node, address: model.IPAddress, parent: Parent) -> _Details:
    return 'no route through %s in table %d' % (
        parent.device, node.options.route_table), [], {}


def _wrong(node: Node, address: model.IPAddress, parent: Parent) -> _Details:
    actual = parent.routes[address]
    desired = next(
        route for route in model.of_kind(model.HostRoute, parent.plan.set)
        if route.dst == address)
    return 'the route of %s has %s' % (address, ', '.join(
        '%s %s, not %s' % each for each in (
            ('the interface', kernel.format_ifname(actual.oif),
             kernel.format_ifname(desired.oif)),
            ('the protocol', actual.protocol, desired.protocol),
            ('the source', actual.src, desired.src),
            ('the metric', actual.metric, desired.metric))
        if each[1] != each[2])
        or 'another scope, an MTU or an encapsulation'), [], {}


def _foreign(node: Node, address: model.IPAddress, parent: Parent) -> _Details:
    """Return the commands that delete only the foreign route, and sync."""
    route = next(each for each in parent.plan.foreign if each.dst == address)
    protocol = _protocol(route.protocol)
    return 'protocol ' + protocol, [
        'ip %sroute del %s%s proto %s%s table %d' % (
            '-6 ' if address.version == 6 else '', address,
            ' dev ' + kernel.format_ifname(route.oif) if route.oif else '',
            protocol, ' metric %d' % route.metric if route.metric else '',
            route.table), _SYNC], {}


def _protocol(number: int) -> str:
    """Return the name of a routing protocol for ip(8), or its number."""
    for path in _PROTOCOLS:
        with contextlib.suppress(OSError), open(path) as file:
            for fields in map(str.split, file):
                if fields[:1] in ([str(number)], [hex(number)]):
                    return fields[1]
    return str(number)


def _neighbour(node: Node, address: model.IPAddress, parent: Parent
               ) -> _Details:
    desired = next(
        each.mac for each in model.of_kind(model.Neighbour, parent.plan.set)
        if each.dst == address)
    return 'the neighbour %s on %s has the MAC address %s and the protocol ' \
        '%s, but must have %s and %d' % (
            address, parent.device, parent.neighbours[address].mac,
            parent.neighbours[address].protocol, desired,
            node.options.route_protocol), [], {}


def _not_used(node: Node, address: model.IPAddress, parent: Parent
              ) -> _Details:
    return '', [], {'get': parent.astray[address][1], 'address': address,
                    'family': '-%d' % address.version}


def _apart(node: Node, address: model.IPAddress, parent: Parent) -> _Details:
    command = _in_pod(node, address)('ip link set %s type macvlan mode bridge')
    return '', [command], {}


def _down(node: Node, address: model.IPAddress, parent: Parent) -> _Details:
    return '', [_in_pod(node, address)('ip link set %s up'), _SYNC], {}


def _address_missing(node: Node, address: model.IPAddress, parent: Parent
                     ) -> _Details:
    record = node.live[address]
    length = next((subnet.prefixlen for subnet in record.subnets
                   if address in subnet), address.max_prefixlen)
    return '', [inside(record.netns, 'ip address add %s/%s dev %s', address,
                       length, record.owner.ifname)], {}


def _mac(node: Node, address: model.IPAddress, parent: Parent) -> _Details:
    return '', [_in_pod(node, address)('ip link set %s address %s', str(
        node.live[address].mac)), _SYNC], {}


def _in_pod(node: Node, address: model.IPAddress) -> Callable[..., str]:
    record = node.live[address]
    return lambda command, *names: inside(
        record.netns, command, record.owner.ifname, *names)


def _sync(node: Node, address: model.IPAddress, parent: Parent) -> _Details:
    return '', [_SYNC], {}


_DETAILS: dict[str, Callable[[Node, model.IPAddress, Parent], _Details]] = {
    'address-not-allowed': _refused, 'address-refused': _refused,
    'address-contested': _contested, 'route-missing': _missing,
    'route-wrong': _wrong, 'route-foreign': _foreign,
    'neighbour-wrong': _neighbour, 'route-not-used': _not_used,
    'pod-apart': _apart, 'pod-down': _down,
    'pod-address-missing': _address_missing, 'pod-mac': _mac,
    'rp-filter': _sync}
