# SPDX-License-Identifier: Apache-2.0

"""Parses the output of ``iptables-save`` and ``ip6tables-save``."""

from __future__ import annotations

import ipaddress
import shlex
from typing import Any, Iterator

from kuryr_break0.doctor.packet_filter import Chain
from kuryr_break0.doctor.packet_filter import Condition
from kuryr_break0.doctor.packet_filter import Rule

_HOOKS = {name.upper(): name for name in (
    'prerouting', 'input', 'forward', 'output', 'postrouting')}
_FIELDS = {'-i': 'iif', '-o': 'oif', '-s': 'src', '-d': 'dst'}
_VERDICTS = {'ACCEPT': 'accept', 'DROP': 'drop', 'REJECT': 'drop',
             'RETURN': 'return', 'MASQUERADE': 'rewrite', 'SNAT': 'rewrite'}
#: Of which an extension's options say something; others are left open.
_UNKNOWN = ('addrtype', 'bpf', 'connmark', 'mark', 'physdev', 'set', 'u32')


def parse(text: str, version: int) -> list[dict[str, Chain]]:
    """Return the chains of each table.

    :param version: of IP
    :raises ValueError: if it is not what it should be
    """
    tables: dict[str, dict[str, Chain]] = {}
    table = ''
    program = 'iptables' if version == 4 else 'ip6tables'
    for line in text.splitlines():
        if line.startswith('*'):
            table = line[1:].strip()
        elif line.startswith(':'):
            name, policy = line[1:].split()[:2]
            tables.setdefault(table, {})[name] = Chain(
                '%s %s %s' % (program, table, name), (version,),
                _HOOKS.get(name), _VERDICTS.get(policy, 'accept'),
                accept='%s -t %s -I %s %%(short)s %%(device)s -j ACCEPT' % (
                    program, table, name))
        elif line.startswith('-A '):
            words = shlex.split(line)
            try:
                tables[table][words[1]].rules += _rules(words[2:], line)
            except (IndexError, KeyError) as err:
                raise ValueError('not a rule (%r): %s' % (err, line))
    return list(tables.values())


def _rules(words: list[str], line: str) -> Iterator[Rule]:
    conditions: list[Condition] = []
    module = ''
    for negated, option, values in _options(words):
        if option in _FIELDS:
            conditions.append(Condition(
                _FIELDS[option], (_value(option, values[0]),), negated))
        elif option == '-m':
            module = values[0]
            if module in _UNKNOWN:
                conditions.append(Condition('unknown'))
        elif option in ('--ctstate', '--state'):
            conditions.append(Condition(
                'state', tuple(values[0].lower().split(',')), negated))
        elif option in ('-j', '-g'):
            target = values[0]
            if option == '-g' or target not in _VERDICTS:
                # Targets like LOG are no chains, and decide nothing.
                yield Rule(tuple(conditions), 'goto' if option == '-g'
                           else 'jump', target, line)
            else:
                yield Rule(tuple(conditions), _VERDICTS[target], text=line)
            return  # what follows is of the target
        elif option == '-p' or module not in ('comment', *_UNKNOWN):
            conditions.append(Condition('some'))


def _options(words: list[str]) -> Iterator[tuple[bool, str, list[str]]]:
    """Return each option, whether it is negated, and its values."""
    negated, option = False, ''
    values: list[str] = []
    for word in words:
        if word == '!' or word.startswith('-') and len(word) > 1:
            if option:
                yield negated, option, values
                negated, option, values = False, '', []
            if word == '!':
                negated = True
            else:
                option = word
        else:
            values.append(word)
    if option:
        yield negated, option, values


def _value(option: str, value: str) -> Any:
    if option in ('-i', '-o'):
        return value[:-1] + '*' if value.endswith('+') else value
    network = ipaddress.ip_network(value, strict=False)
    return network[0], network[-1]
