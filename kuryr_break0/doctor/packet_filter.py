# SPDX-License-Identifier: Apache-2.0

"""Simulates the firewall of the node for packets through break0.

Each chain of a hook is followed as the first packet of a new connection
between the node and a pod would pass it, of which ports and protocol are left
open. A rule of which it is not known whether that packet matches is given
the benefit of the doubt.
"""

from __future__ import annotations

import dataclasses
import enum
import fnmatch
from typing import Any, Iterator, Mapping, Optional

from kuryr_break0.model import IPAddress


class Answer(enum.IntEnum):
    """Whether a packet matches; of several conditions the least counts."""

    NO = 0
    #: By something that is not understood.
    UNKNOWN = 1
    #: By its ports, its protocol or the like.
    SOME = 2
    YES = 3


@dataclasses.dataclass(frozen=True)
class Packet:
    """The first one of a new connection.

    :ivar iif: name of the interface that it comes in by; empty for none
    :ivar oif: of that which it leaves by
    :ivar src: None for any
    """

    hook: str
    iif: str
    oif: str
    src: Optional[IPAddress]
    dst: Optional[IPAddress]
    version: int
    state: str = 'new'


@dataclasses.dataclass(frozen=True)
class Condition:
    """Something that a rule asks of a packet.

    :ivar field: that of a Packet, or ``some`` or ``unknown`` for what it
        does not have
    :ivar values: any of which will do; of addresses, the first and the last
        of each range
    """

    field: str
    values: tuple[Any, ...] = ()
    negated: bool = False

    def holds(self, packet: Packet) -> Answer:
        if self.field == 'unknown':
            return Answer.UNKNOWN
        actual = getattr(packet, self.field, None)
        if actual is None:
            return Answer.SOME
        if self.field in ('src', 'dst'):
            within = any(first.version == actual.version
                         and first <= actual <= last
                         for first, last in self.values)
        elif self.field in ('iif', 'oif'):
            within = any(fnmatch.fnmatchcase(actual, name)
                         for name in self.values)
        else:
            within = actual in self.values
        return Answer.YES if within != self.negated else Answer.NO

    @property
    def names_interface(self) -> bool:
        return self.field in ('iif', 'oif') and not self.negated


@dataclasses.dataclass(frozen=True)
class Rule:
    """What is done with packets that meet all conditions.

    :ivar verdict: ``accept``, ``drop``, ``return``, ``jump``, ``goto``, or
        ``rewrite`` for one that gives the packet another source address
    :ivar target: the chain to go to
    """

    conditions: tuple[Condition, ...]
    verdict: str
    target: str = ''
    text: str = ''

    def matches(self, packet: Packet) -> Answer:
        return min((condition.holds(packet) for condition in self.conditions),
                   default=Answer.YES)

    @property
    def names_interface(self) -> bool:
        return any(condition.names_interface for condition in self.conditions)


@dataclasses.dataclass
class Chain:
    """The rules of a chain, in their order.

    :ivar hook: as nft names it, ``input``; None for one that is only jumped
        to
    :ivar versions: of IP, whose packets it sees
    :ivar policy: what is done with what no rule decides
    :ivar accept: the command for a rule at its top that accepts what comes
        through an interface, with fields ``direction`` and ``device``
    """

    title: str
    versions: tuple[int, ...]
    hook: Optional[str] = None
    policy: str = 'accept'
    rules: list[Rule] = dataclasses.field(default_factory=list)
    accept: str = ''


@dataclasses.dataclass(frozen=True)
class Obstacle:
    """A chain that drops what goes through break0.

    :ivar all: whether it drops all
    """

    chain: Chain
    what: str
    all: bool


#: More than the kernel follows (NFT_JUMP_STACK_SIZE).
_DEPTH = 20


class _Walk:
    """One packet's way through one table."""

    def __init__(self, chains: Mapping[str, Chain], packet: Packet) -> None:
        self._chains = chains
        self._packet = packet
        self.partly_accepted = False
        self.partly_dropped: Optional[str] = None
        self.dropped_by = ''
        self.rewritten_by = ''

    def is_accepted(self, chain: Chain) -> bool:
        """Return whether the packet is accepted in the end."""
        decided = self.follow(chain)
        if decided is None and chain.policy == 'drop':
            self.dropped_by = 'policy drop'
        return (decided or chain.policy) != 'drop'

    def follow(self, chain: Chain, depth: int = 0,
               named: bool = False) -> Optional[str]:
        """Return the verdict; None if the calling chain decides.

        :param named: whether the interface has been asked for on the way
        """
        returned = False  # perhaps
        for rule in chain.rules:
            matches = rule.matches(self._packet)
            if matches is Answer.NO:
                continue
            verdict: Optional[str] = rule.verdict
            text = rule.text
            if verdict in ('jump', 'goto'):
                target = self._chains.get(rule.target)
                if target is None or depth > _DEPTH:
                    continue
                verdict = self.follow(target, depth + 1,
                                      named or rule.names_interface)
                if verdict is None and (rule.verdict == 'goto'
                                        and matches is Answer.YES):
                    return None
                text = '%s, then %s' % (rule.text, self.dropped_by)
            if verdict == 'return' and matches is Answer.YES:
                return None
            returned |= verdict == 'return' or rule.verdict == 'goto'
            if verdict == 'rewrite' and matches is Answer.YES and (
                    not returned):
                if rule.verdict == 'rewrite':
                    self.rewritten_by = text
                return 'rewrite'
            if verdict == 'accept':
                if matches is not Answer.SOME:
                    return 'accept'
                self.partly_accepted = True
            elif verdict == 'drop':
                if matches is Answer.YES:
                    self.dropped_by = text
                    return 'drop'
                if self.partly_dropped is None and (
                        named or rule.names_interface):
                    self.partly_dropped = text
        return None


def rewriting(chains: Mapping[str, Chain],
              packets: list[Packet]) -> Iterator[Obstacle]:
    """Find the chains that give packets another source address.

    :param chains: of one family and table, by their names
    """
    for chain in chains.values():
        for packet in packets:
            if (chain.hook == packet.hook
                    and packet.version in chain.versions):
                walk = _Walk(chains, packet)
                if walk.follow(chain) == 'rewrite':
                    yield Obstacle(chain, walk.rewritten_by, True)
                    break


def obstacles(chains: Mapping[str, Chain],
              packets: list[Packet]) -> Iterator[Obstacle]:
    """Find the chains that drop packets.

    :param chains: of one family and table, by their names
    """
    for chain in chains.values():
        found: list[Obstacle] = []
        for packet in packets:
            if (chain.hook != packet.hook
                    or packet.version not in chain.versions):
                continue
            walk = _Walk(chains, packet)
            if not walk.is_accepted(chain):
                found.append(Obstacle(
                    chain, walk.dropped_by,
                    not walk.partly_accepted and packet.hook != 'forward'))
            elif walk.partly_dropped is not None:
                found.append(Obstacle(chain, walk.partly_dropped, False))
        yield from sorted(found, key=lambda each: not each.all)[:1]
