# SPDX-License-Identifier: Apache-2.0

"""Finds iptables rules by their counters, and commands that accept traffic.

The kernel's trace shows the rules of nftables and iptables-nft, but not of
iptables-legacy. A rule of iptables-legacy that drops a packet is found by its
counter, which rises with each packet.
"""

from __future__ import annotations

import fnmatch
import re
import subprocess
from typing import Iterator, NamedTuple, Optional

from kuryr_break0 import kernel
from kuryr_break0 import log

LOG = log.get_logger(__name__)

#: Seconds for a program to list all rules.
_TIMEOUT = 10
#: Built-in chains of iptables. A rule in these chains must be set by iptables,
#: which keeps the rule.
_BUILT_IN = ('PREROUTING', 'INPUT', 'OUTPUT', 'FORWARD', 'POSTROUTING')
_POLICY = re.compile(r':(\S+) (\w+) \[(\d+):')
_RULE = re.compile(r'\[(\d+):\d+\] (-A (\S+).*)')
_DROPS = re.compile(r'-j (DROP|REJECT)\b')
_REWRITES = re.compile(r'(?i)\b(masquerade|snat)\b')


class Rule(NamedTuple):
    """A rule of iptables, or the policy of a chain."""

    program: str
    table: str
    chain: str
    text: str
    place: int

    @property
    def drops(self) -> bool:
        return bool(_DROPS.search(self.text))

    def accept(self, device: str, comes_in: bool) -> str:
        """Return the command that inserts a rule to accept the traffic.

        :param device: the interface of the traffic
        :param comes_in: whether the traffic enters by the interface;
            otherwise it leaves by the interface
        """
        # If chains of ufw exist, ufw has set the policies too.
        if self.chain.startswith('ufw') or (
                self.text.startswith('policy') and any(
                    'ufw-before-input' in text for text in _rulesets())):
            return _ufw(device, comes_in)
        return '%s -t %s -I %s %s %s -j ACCEPT' % (
            self.program, self.table, self.chain, '-i' if comes_in else '-o',
            device)

    def __str__(self) -> str:
        return 'the table %s of %s, chain %s, has: %s' % (
            self.table, self.program, self.chain, self.text)


def accept(table: str, chain: str, device: str, comes_in: bool,
           text: str = '') -> str:
    """Return the command that lets a chain of nftables accept traffic.

    If firewalld, ufw or iptables manages the chain, the command uses that
    program. If not, the command uses nft.

    :param table: family and name
    :param text: begins with "policy" if the chain's policy drops the traffic
    """
    family, name = table.split(' ', 1)
    if name == 'firewalld':
        return ('firewall-cmd --permanent --zone=trusted --add-interface=%s '
                '&& firewall-cmd --reload' % device)
    if chain.startswith('ufw'):
        return _ufw(device, comes_in)
    if family in ('ip', 'ip6') and chain in _BUILT_IN:
        return Rule('iptables' if family == 'ip' else 'ip6tables', name,
                    chain, text, 0).accept(device, comes_in)
    return 'nft insert rule %s %s %s %s accept' % (
        table, chain, 'iifname' if comes_in else 'oifname', device)


def _ufw(device: str, comes_in: bool) -> str:
    return 'ufw allow %s on %s' % ('in' if comes_in else 'out', device)


def not_examined() -> Iterator[str]:
    """Yield the rules that cannot be examined, with the missing program."""
    if kernel.find_program('nft') is None:
        for program, package in (('nft', 'nftables'),
                                 ('iptables-save', 'iptables')):
            if kernel.find_program(program) is None:
                yield ('the rules of %s: the program %s is not installed. '
                       'Install the package %s.' % (package, program, package))


def rewrites(text: str) -> bool:
    """Return whether a rule gives packets another source address."""
    return bool(_REWRITES.search(text))


def counters(version: int) -> dict[Rule, int]:
    """Return the packet counters of iptables rules that no trace shows.

    The trace of nft(8) does not show rules of iptables-legacy. Without nft(8),
    there is no trace. The rules are read in the namespace of this thread.

    :param version: the version of IP
    """
    program = 'iptables' if version == 4 else 'ip6tables'
    if _is_legacy_in_use(version):
        saved = _run(program + '-legacy-save', '-c')
        if saved is not None:
            return dict(_parsed(saved, program + '-legacy'))
    elif kernel.find_program('nft') is not None:
        return {}
    return dict(_parsed(_run(program + '-save', '-c') or '', program))


def risen(before: dict[Rule, int], after: dict[Rule, int],
          device: str) -> list[Rule]:
    """Return the rules whose counter has risen.

    :param device: the interface of the traffic; rules for other interfaces
        are left out
    """
    return [rule for rule, count in after.items()
            if count > before.get(rule, count) and all(
                fnmatch.fnmatchcase(device, name.replace('+', '*'))
                for name in re.findall(r'(?<! !) -[io] (\S+)', rule.text))]


def _parsed(text: str, program: str) -> Iterator[tuple[Rule, int]]:
    table = ''
    for place, line in enumerate(text.splitlines()):
        if line.startswith('*'):
            table = line[1:]
        policy, rule = _POLICY.match(line), _RULE.match(line)
        if policy:
            yield Rule(program, table, policy[1], 'policy -j ' + policy[2],
                       place), int(policy[3])
        elif rule:
            yield Rule(program, table, rule[3], rule[2], place), int(rule[1])


def masquerading(parent: str, device: str) -> Optional[tuple[str, str]]:
    """Return a parent's source NAT rule, and a command to add it for break0.

    The rule that the command adds does not match traffic from the node itself.

    :returns: None if the parent has no such rule, or break0 has one already
    """
    out = r'(-o|oif(?:name)?) "?%s"?(?=\s)'
    named = re.compile(out % re.escape(parent))
    if any(re.search(out % re.escape(device), line) and rewrites(line)
           for text in _rulesets() for line in text.splitlines()):
        return None
    for program in (*(['iptables-legacy'] if _is_legacy_in_use(4) else []),
                    'iptables'):
        for line in (_run(program + '-save', '-t', 'nat') or '').splitlines():
            if named.search(line) and rewrites(line):
                return line, '%s -t nat %s' % (program, named.sub(
                    r'\1 %s -m addrtype ! --src-type LOCAL' % device, line))
    place = ['', '']
    for line in (_run('nft', 'list', 'ruleset') or '').splitlines():
        words = line.split()
        if words[:1] in (['table'], ['chain']):
            place[words[0] == 'chain'] = ' '.join(words[1:-1])
        elif named.search(line) and rewrites(line):
            rule = named.sub('oifname %s fib saddr type != local' % device,
                             plain(line.strip()))
            return line.strip(), 'nft "insert rule %s %s %s"' % (
                *place, rule)
    return None


def _rulesets() -> Iterator[str]:
    yield _run('nft', 'list', 'ruleset') or ''
    if _is_legacy_in_use(4):
        yield _run('iptables-legacy-save') or ''


def plain(rule: str) -> str:
    """Return a rule of nftables without verdict and counter."""
    return re.sub(r'\s*\(verdict.*|counter packets \d+ bytes \d+ ', '', rule)


def _is_legacy_in_use(version: int) -> bool:
    """Return whether iptables-legacy has tables for a version of IP."""
    try:
        with open('/proc/thread-self/net/ip%s_tables_names' % (
                '' if version == 4 else '6')) as file:
            return bool(file.read().strip())
    except OSError:
        return False


def _run(program: str, *args: str) -> Optional[str]:
    """Return the output of a program; None if it is missing or fails."""
    path = kernel.find_program(program)
    if path is None:
        return None
    try:
        return subprocess.run(
            [path, *args], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            text=True, timeout=_TIMEOUT, check=True).stdout
    except (OSError, subprocess.SubprocessError) as err:
        LOG.warning('Cannot examine the rules of the firewall. Run the '
                    'program yourself: %s: %s', err,
                    getattr(err, 'stderr', None) or '')
        return None
