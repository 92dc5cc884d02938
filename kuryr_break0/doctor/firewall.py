# SPDX-License-Identifier: Apache-2.0

"""Checks whether a firewall of the node drops traffic of its pods."""

from __future__ import annotations

import subprocess
from typing import Any, Callable, Iterator, Optional

from kuryr_break0.doctor import findings
from kuryr_break0.doctor.findings import Finding
from kuryr_break0.doctor import iptables
from kuryr_break0.doctor import nftables
from kuryr_break0.doctor.node import ParentView
from kuryr_break0.doctor.packet_filter import Chain
from kuryr_break0.doctor.packet_filter import Obstacle
from kuryr_break0.doctor.packet_filter import obstacles
from kuryr_break0.doctor.packet_filter import Packet
from kuryr_break0.doctor.packet_filter import rewriting
from kuryr_break0 import kernel
from kuryr_break0 import log

LOG = log.get_logger(__name__)

#: Seconds for a program to list all rules.
_TIMEOUT = 10
_FORWARDING = {4: 'ipv4/ip_forward', 6: 'ipv6/conf/all/forwarding'}


def check(view: ParentView) -> Iterator[Finding]:
    """Follow packets between node and pods through all rules."""
    packets = list(_packets(view))
    if not packets:
        return
    found: dict[findings.Kind, list[Obstacle]] = {}
    for table in _tables():
        for obstacle in obstacles(table, packets):
            found.setdefault(
                findings.FIREWALL_DROPS if obstacle.all
                else findings.FIREWALL_RESTRICTS, []).append(obstacle)
        found.setdefault(findings.SOURCE_REWRITTEN, []).extend(
            rewriting(table, packets))
    for kind, chains in found.items():
        if chains:
            first = chains[0]
            yield kind.found(
                'the chain %s, hook %s, has: %s' % (
                    first.chain.title, first.chain.hook, first.what),
                [each.chain.title for each in chains],
                commands=[_accept(each.chain, view.name) for each in chains])


def _accept(chain: Chain, device: str) -> str:
    """Return the command for a rule that accepts what passes break0."""
    comes_in = chain.hook in ('prerouting', 'input')
    return chain.accept % {
        'device': device, 'short': '-i' if comes_in else '-o',
        'long': 'iifname' if comes_in else 'oifname'}


def not_examined() -> Iterator[str]:
    """Return which rules could not be examined."""
    if kernel.find_program('nft') is None:
        yield ('the rules of nftables: there is no program nft. Install the '
               'package nftables.')
        if kernel.find_program('iptables-save') is None:
            yield ('the rules of iptables: there is no program '
                   'iptables-save. Install the package iptables.')


def _packets(view: ParentView) -> Iterator[Packet]:
    """Return packets between the node and one pod of each family."""
    device = view.name
    for version in (4, 6):
        pod = next((address for address in view.desired
                    if address.version == version), None)
        if pod is None:
            continue
        host = next((address for address in
                     (view.known.addresses if view.known else ())
                     if address.version == version), None)
        for hook in ('prerouting', 'input'):
            yield Packet(hook, device, '', pod, host, version)
        for hook in ('output', 'postrouting'):
            yield Packet(hook, '', device, host, pod, version)
        # What comes from elsewhere for a service of a pod of this node.
        if kernel.read_sysctl(_FORWARDING[version]):
            yield Packet('forward', view.parent_name or '', device, None,
                         pod, version)


def _tables() -> Iterator[dict[str, Chain]]:
    """Return the tables of nftables, and those that only iptables shows.

    Where its programs are not at hand there is nothing to say.
    """
    rules = _run('nft', '--json', 'list', 'ruleset')
    if rules is not None:
        yield from _parsed(nftables.parse, rules)
    for version, prefix, names in ((4, 'iptables', 'ip_tables_names'),
                                   (6, 'ip6tables', 'ip6_tables_names')):
        legacy = _legacy_in_use(names)
        if rules is not None and not legacy:
            continue
        saved = _run(prefix + '-legacy-save') if legacy else None
        if saved is None:
            saved = _run(prefix + '-save')
        if saved is not None:
            yield from _parsed(iptables.parse, saved, version)


def _parsed(parse: Callable[..., list[dict[str, Chain]]],
            *args: Any) -> list[dict[str, Chain]]:
    try:
        return parse(*args)
    except ValueError as err:
        LOG.warning('Cannot examine the rules of the firewall: %s', err)
        return []


def _legacy_in_use(names: str) -> bool:
    try:
        with open('/proc/thread-self/net/' + names) as file:
            return bool(file.read().strip())
    except OSError:
        return False


def _run(program: str, *args: str) -> Optional[str]:
    """Return the output of a program; None if it is missing or fails."""
    path = kernel.find_program(program)
    if path is None:
        return None
    try:
        done = subprocess.run([path, *args], stdout=subprocess.PIPE,
                              stderr=subprocess.PIPE, text=True,
                              timeout=_TIMEOUT)
    except (OSError, subprocess.SubprocessError) as err:
        LOG.warning('Cannot examine the rules of the firewall: %s', err)
        return None
    if done.returncode:
        LOG.warning('Cannot examine the rules of the firewall: %s: %s',
                    program, done.stderr.strip())
        return None
    return done.stdout
