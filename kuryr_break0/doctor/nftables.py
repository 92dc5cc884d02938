# SPDX-License-Identifier: Apache-2.0

"""Parses the output of ``nft --json list ruleset`` (libnftables-json(5))."""

from __future__ import annotations

import ipaddress
import json
from typing import Any, Iterator, Optional

from kuryr_break0.doctor.packet_filter import Chain
from kuryr_break0.doctor.packet_filter import Condition
from kuryr_break0.doctor.packet_filter import Rule

_VERSIONS = {'ip': (4,), 'ip6': (6,), 'inet': (4, 6)}
_META = {'iifname': 'iif', 'iif': 'iif', 'oifname': 'oif', 'oif': 'oif',
         'nfproto': 'version'}
_PAYLOAD = {('ip', 'saddr'): 'src', ('ip', 'daddr'): 'dst',
            ('ip6', 'saddr'): 'src', ('ip6', 'daddr'): 'dst'}
_HEADERS = {'ip': 4, 'icmp': 4, 'ip6': 6, 'icmpv6': 6}
#: What of a packet is left open, and what is known not to matter.
_SOME_META = ('l4proto', 'length', 'pkttype', 'skuid', 'skgid', 'time')
_SOME_MATCHES = ('conntrack', 'hashlimit', 'icmp', 'icmp6', 'limit',
                 'multiport', 'owner', 'recent', 'state', 'tcp', 'udp')
_INERT = ('comment',)
_VERDICTS = {'accept': 'accept', 'drop': 'drop', 'reject': 'drop',
             'return': 'return', 'masquerade': 'rewrite', 'snat': 'rewrite'}
_TARGETS = {'REJECT': 'drop', 'DROP': 'drop', 'MASQUERADE': 'rewrite',
            'SNAT': 'rewrite'}
#: Of iptables, whose own program is to be used for its tables.
_BUILT_IN = ('PREROUTING', 'INPUT', 'OUTPUT', 'FORWARD', 'POSTROUTING')


def parse(text: str) -> list[dict[str, Chain]]:
    """Return the chains of each table.

    :raises ValueError: if it is not what it should be
    """
    tables: dict[tuple[str, str], dict[str, Chain]] = {}
    sets: dict[tuple[str, str, str], Any] = {}
    try:
        items = json.loads(text)['nftables']
        for item in items:
            kind, fields = next(iter(item.items()))
            if kind == 'chain' and fields['family'] in _VERSIONS:
                table = tables.setdefault(
                    (fields['family'], fields['table']), {})
                table[fields['name']] = _chain(fields)
            elif kind in ('set', 'map'):
                sets[fields['family'], fields['table'], fields['name']] = (
                    fields.get('elem', []))
        for item in items:
            rule = item.get('rule')
            if rule and rule['family'] in _VERSIONS:
                where = rule['family'], rule['table']
                tables[where][rule['chain']].rules += _rules_or_doubt(
                    rule, {name: elements for (family, table, name), elements
                           in sets.items() if (family, table) == where})
    except (AttributeError, IndexError, KeyError, TypeError,
            StopIteration) as err:
        raise ValueError('not a ruleset (%r)' % err)
    return list(tables.values())


def _chain(fields: dict[str, Any]) -> Chain:
    family, table, name = fields['family'], fields['table'], fields['name']
    if family != 'inet' and name in _BUILT_IN:
        accept = '%s -t %s -I %s %%(short)s %%(device)s -j ACCEPT' % (
            'iptables' if family == 'ip' else 'ip6tables', table, name)
    else:
        accept = 'nft insert rule %s %s %s %%(long)s %%(device)s accept' % (
            family, table, name)
    return Chain('%s %s %s' % (family, table, name), _VERSIONS[family],
                 fields.get('hook'), fields.get('policy', 'accept'),
                 accept=accept)


def _rules_or_doubt(fields: dict[str, Any],
                    sets: dict[str, Any]) -> list[Rule]:
    try:
        return list(_rules(fields, sets))
    except (AttributeError, IndexError, KeyError, TypeError, ValueError,
            StopIteration):
        # Of a form that is not known here.
        return [Rule((Condition('unknown'),), 'accept')]


def _rules(fields: dict[str, Any], sets: dict[str, Any]) -> Iterator[Rule]:
    conditions: list[Condition] = []
    for statement in fields['expr']:
        kind, body = next(iter(statement.items()))
        text = 'rule %s (handle %s)' % (
            _text(fields['expr']), fields.get('handle'))
        if kind == 'match':
            conditions += _family(body['left'])
            conditions.append(_condition(body, sets))
        elif kind == 'limit':
            conditions.append(Condition('some'))
        elif kind == 'xt':
            name = body.get('name') or ''
            if body.get('type') == 'target':
                if name in _TARGETS:
                    yield Rule(tuple(conditions), _TARGETS[name], text=text)
            elif name not in _INERT:
                conditions.append(Condition(
                    'some' if name in _SOME_MATCHES else 'unknown'))
        elif kind == 'vmap':
            yield from _mapped(conditions, body, sets, text)
        elif kind in _VERDICTS:
            yield Rule(tuple(conditions), _VERDICTS[kind], text=text)
        elif kind in ('jump', 'goto'):
            yield Rule(tuple(conditions), kind, body['target'], text)
        elif kind == 'queue':
            # A program decides.
            yield Rule((*conditions, Condition('unknown')), 'accept')


def _mapped(conditions: list[Condition], body: dict[str, Any],
            sets: dict[str, Any], text: str) -> Iterator[Rule]:
    data = body['data']
    pairs = (sets.get(data[1:], []) if isinstance(data, str)
             else data['set'])
    for key, verdict in pairs:
        condition = _condition(
            {'op': '==', 'left': body['key'], 'right': key}, sets)
        kind, target = next(iter(verdict.items()))
        yield Rule((*conditions, *_family(body['key']), condition),
                   _VERDICTS.get(kind) or kind,
                   target['target'] if target else '', text)


def _family(left: Any) -> list[Condition]:
    """Return the condition that a packet has the header of an expression."""
    payload = left.get('payload') if isinstance(left, dict) else None
    version = _HEADERS.get(payload.get('protocol')) if payload else None
    return [] if version is None else [Condition('version', (version,))]


def _condition(body: dict[str, Any], sets: dict[str, Any]) -> Condition:
    left, right = body['left'], body['right']
    field = _field(left)
    if field in ('some', 'unknown') or body['op'] not in ('==', '!=', 'in'):
        return Condition(field if field == 'unknown' else 'some')
    values = list(_values(field, right, sets))
    if None in values:
        return Condition('unknown')
    return Condition(field, tuple(values), body['op'] == '!=')


def _field(left: Any) -> str:
    """Return the field of a packet that an expression reads."""
    if not isinstance(left, dict):
        return 'unknown'
    kind, body = next(iter(left.items()))
    if kind == 'meta':
        return _META.get(body['key'], 'some' if body['key'] in _SOME_META
                         else 'unknown')
    if kind == 'payload':
        return _PAYLOAD.get((body.get('protocol'), body.get('field')),
                            'some')
    if kind == 'ct':
        return 'state' if body['key'] == 'state' else 'some'
    return 'unknown'


def _values(field: str, right: Any, sets: dict[str, Any]) -> Iterator[Any]:
    """Parse a match expression. Return None for unknown syntax."""
    if isinstance(right, str) and right.startswith('@'):
        right = sets.get(right[1:], [None])
    if isinstance(right, dict) and 'set' in right:
        right = right['set']
    for value in right if isinstance(right, list) else [right]:
        if isinstance(value, dict) and 'elem' in value:
            value = value['elem']['val']
        yield _value(field, value)


def _value(field: str, value: Any) -> Optional[Any]:
    if field == 'version':
        return {'ipv4': 4, 'ipv6': 6}.get(value)
    if field not in ('src', 'dst'):
        return value if isinstance(value, str) else None
    if isinstance(value, str):
        address = ipaddress.ip_address(value)
        return address, address
    if isinstance(value, dict) and 'prefix' in value:
        network = ipaddress.ip_network('%s/%d' % (
            value['prefix']['addr'], value['prefix']['len']), strict=False)
        return network[0], network[-1]
    if isinstance(value, dict) and 'range' in value:
        first, last = map(ipaddress.ip_address, value['range'])
        return first, last
    return None


def _text(statements: list[Any]) -> str:
    """Return a rule similar to the syntax of nft, for people."""
    words = []
    for statement in statements:
        kind, body = next(iter(statement.items()))
        if kind == 'match':
            words.append('%s %s%s' % (
                _short(body['left']), '!= ' if body['op'] == '!=' else '',
                _short(body['right'])))
        elif kind in ('jump', 'goto'):
            words.append('%s %s' % (kind, body['target']))
        elif kind == 'xt':
            words.append(body.get('name') or '')
        elif kind == 'vmap':
            words.append('%s vmap' % _short(body['key']))
        elif kind in _VERDICTS:
            words.append(kind)
    return '"%s"' % ' '.join(words)


def _short(expression: Any) -> str:
    if isinstance(expression, dict):
        return ' '.join(_short(value) for value in expression.values())
    if isinstance(expression, list):
        return '{ %s }' % ', '.join(map(_short, expression))
    return str(expression)
