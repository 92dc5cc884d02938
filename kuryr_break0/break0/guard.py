# SPDX-License-Identifier: Apache-2.0

"""The guard of a break0: an nftables table of the family netdev.

break0 connects pods with their node, without any port security between them.
The table accepts a packet only if its source is the MAC address and the
address of a bound pod. The table drops redirects and advertisements, which
could change routes and neighbours of the node. It also drops packets with the
MAC address of break0 that would leave through the parent. In each pod, another
table drops packets that the interface of the pod sends with another source MAC
address than its own.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import subprocess
from typing import Callable, Collection, Iterable, Mapping, Optional

from kuryr_break0 import config
from kuryr_break0 import exceptions
from kuryr_break0 import kernel
from kuryr_break0.kernel import Verb
from kuryr_break0.ledger import Ledger
from kuryr_break0 import log
from kuryr_break0 import model

LOG = log.get_logger(__name__)

#: Prefix of the names of our tables, on the node and in pods.
PREFIX = 'kuryr-break0'
_TIMEOUT = 5  # seconds; the caller holds the lock meanwhile

# For IPv6, node and pod have permanent neighbours for each other, so neighbour
# discovery is dropped. In ARP packets, a pod may use only its own address. A
# virtual machine has no permanent neighbours, so it sends solicitations to
# multicast groups. break0 must not join these groups, because a host reports
# its groups to the LAN. So the table itself answers solicitations: on break0,
# and on the egress of the parent, to which macvlan sends multicast packets.
_SETS = '''
table netdev {table} {{
    set pairs4 {{ type ether_addr . ipv4_addr; }}
    set pairs6 {{ type ether_addr . ipv6_addr; }}
    set addresses4 {{ type ipv4_addr; }}
    set addresses6 {{ type ipv6_addr; }}
    set held4 {{ type ether_addr . ipv4_addr; timeout 1s; }}
    set held6 {{ type ether_addr . ipv6_addr; timeout 1s; }}
}}
'''
# If a set exists with another type, Linux 5.10 accepts the definition of the
# set, but then rejects its elements. So these lines add an element to each set
# and delete it.
_TRIAL = ''.join(
    '%s element netdev {table} %s%d {{ %s%s }}\n' % (
        verb, name, version, mac, address)
    for verb in ('add', 'delete')
    for name, mac in (('pairs', '00:00:00:00:00:00 . '), ('addresses', ''))
    for version, address in ((4, '0.0.0.0'), (6, '::')))
# _ANEW replaces the whole table. _AGAIN deletes the chains and keeps the sets.
_ANEW = '''
table netdev {table}
delete table netdev {table}
''' + _SETS
_AGAIN = '''
table netdev {table} {{
    chain {answer} {{ }}
    chain from-pods {{ }}
    chain to-the-wire {{ }}
}}
flush table netdev {table}
delete chain netdev {table} {answer}
delete chain netdev {table} from-pods
delete chain netdev {table} to-the-wire
'''
_CHAINS = '''
table netdev {table} {{
    chain {answer} {{
    }}
    chain from-pods {{
        type filter hook ingress device "{device}" priority 0; policy drop;
        {solicited}
        ip daddr 127.0.0.0/8 drop
        icmp type {{ redirect, router-advertisement }} drop
        icmpv6 type {{ nd-router-advert, nd-neighbor-solicit, \
nd-neighbor-advert, nd-redirect }} drop
        ether type ip ether saddr . ip saddr @pairs4 accept
        ether type ip ip saddr @addresses4 accept
        ether type ip6 ether saddr . ip6 saddr @pairs6 accept
        ether type ip6 ip6 saddr @addresses6 accept
        ether type arp ether saddr . arp saddr ip @pairs4 \
arp saddr ether . arp saddr ip @pairs4 accept
        ether type arp arp saddr ip @addresses4 accept
    }}
{egress}}}
'''
_EGRESS = '''    chain to-the-wire {{
        type filter hook egress device "{lower}" priority 0; policy accept;
        ether saddr {mac} drop
        {held}
        {solicited}
    }}
'''
# Forwards packets for a pod from the parent to break0, see Guard.release. If
# no macvlan has the destination MAC address, break0 sends the packet back to
# the parent, where the rule for the MAC address of break0 drops it.
_HELD = '''ether daddr . ip daddr @held4 ether saddr set {mac} fwd to {device}
        ether daddr . ip6 daddr @held6 ether saddr set {mac} fwd to {device}
'''
# Matches a solicitation of a bound pod for an address of the node. The only
# option of the solicitation is the source link-layer address. The answer is
# sent to the source MAC address of the frame.
_SOLICITED = '''icmpv6 type nd-neighbor-solicit ip6 hoplimit 255 \
ip6 length 32 @th,192,16 0x0101 @th,64,128 {{ {hosts} }} \
ether saddr . ip6 saddr @pairs6 goto {answer}'''
_ANSWER, NO_NFT = 'answer', 'there is no program nft'


class _Held(model.Pair):
    """An entry for which the table forwards held packets to break0.

    See :meth:`Guard.release`. The kernel deletes the entry after one second.
    """

    @property
    def set_name(self) -> str:
        return 'held%d' % (4 if len(self.address) == 4 else 6)


def table_of(device: str) -> str:
    """Return the name of the table of an interface."""
    if not re.fullmatch(r'[A-Za-z0-9_.-]+', device):  # nft rejects the name
        device = hashlib.sha256(os.fsencode(device)).hexdigest()[:8]
    return '%s-%s' % (PREFIX, device)


def is_installed() -> bool:
    """Return whether nft, which loads the guard, is installed."""
    return kernel.find_program('nft') is not None


def against_egress() -> Optional[str]:
    """Return why the installed nft cannot load the egress chain, or None."""
    return _load(
        str(kernel.find_program('nft')), 'table netdev %s {\n%s}' % (
            PREFIX, _EGRESS.format(lower='lo', mac='02:00:00:00:00:00',
                                   held='', solicited='')), '--check')


def _load(nft: str, text: str, *options: str) -> Optional[str]:
    """Load rules by nft, all or none; return an error text, or None."""
    try:
        completed = subprocess.run([nft, *options, '-f', '-'], input=text,
                                   text=True, errors='surrogateescape',
                                   stdout=subprocess.DEVNULL,
                                   stderr=subprocess.PIPE, timeout=_TIMEOUT)
    except subprocess.TimeoutExpired:
        return 'nft does not end within %d seconds' % _TIMEOUT
    # The first error tells the reason; the following lines quote the rules.
    first = re.search('Error: (.*)', completed.stderr)
    return None if completed.returncode == 0 else 'nft says: ' + (
        first[1] if first else ' '.join(completed.stderr.split()))[:300]


def pairs(records: Iterable[model.Record]) -> list[model.Pair]:
    """Return the guard entries of the pods of one parent.

    A pod with several interfaces may answer from any interface. So each
    address of the pod has an entry for each MAC address of the pod.
    """
    records = list(records)
    of_sandbox: dict[Optional[model.NamespaceId], set[str]] = {}
    for record in records:
        if record.namespace is not None:
            of_sandbox.setdefault(record.namespace, set()).update(record.macs)
    return [model.Pair.of(record.address, mac) for record in records
            for mac in ({*record.macs, *of_sandbox.get(record.namespace, ())}
                        if record.mac is not None else {None})]


class Guard:
    """The guard of one break0."""

    def __init__(self, options: config.Options, ledger: Ledger,
                 device: str) -> None:
        self._options = options
        self._ledger = ledger
        self._cache = ledger.cache
        self.device = device
        self.table = table_of(device)
        self._key = 'guard.' + self.table

    @property
    def is_wanted(self) -> bool:
        return self._options.guard != config.OFF

    @property
    def is_possible(self) -> bool:
        """Return whether the kernel should have the guard.

        If [break0] guard is on, the result is True. If it is auto, the result
        is True if the guard was loaded or nft is installed.
        """
        return self.is_wanted and (self._options.guard == config.ON
                                   or self.is_loaded() or is_installed())

    @property
    def answers(self) -> bool:
        """Return whether the table answers neighbour solicitations."""
        return (self._cache.get(self._key) or ())[2:3] == [True]

    def problem(self, link: kernel.Link,
                hosts: Iterable[model.IPAddress]) -> Optional[str]:
        """Return the problem with the table as a text; None without a problem.

        :param hosts: the IPv6 addresses of the node, in a constant order
        :raises KernelRefused: if the table cannot be read
        """
        if not self.is_wanted and self.is_loaded():
            return 'its guard is off, but the table still exists'
        if self.is_possible and not self.is_intact(link, hosts):
            return 'its guard is missing or was changed'
        return None

    def _nft(self) -> kernel.Nft:
        return kernel.open_node_nft(exclusive=self._ledger.is_locked)

    def is_loaded(self) -> bool:
        """Return whether the table was loaded, according to the cache."""
        return bool(self._cache.get(self._key))

    def is_there(self) -> bool:
        """Return whether the kernel has the table."""
        with contextlib.suppress(exceptions.KernelRefused):  # without nftables
            return self._nft().has_table(self.table)
        return False

    def is_intact(self, link: kernel.Link,
                  hosts: Iterable[model.IPAddress]) -> bool:
        """Return whether the kernel has the table as it was loaded."""
        cached = self._cache.get(self._key)
        if not cached or cached[0] != self._digest(link, hosts):
            return False
        # If no rules are cached, another program deleted the table before its
        # rules were read.
        return bool(cached[3:]) and (
            kernel.open_node_nft().rules(self.table) == cached[3:])

    def entries(self) -> Optional[set[model.Pair]]:
        """Return the guard entries in the table; None without a table.

        :raises KernelRefused: if they cannot be listed
        """
        try:
            return kernel.open_node_nft().elements(self.table)
        except exceptions.KernelRefused as err:
            if err.is_absent:
                return None
            raise

    def ensure(self, link: kernel.Link, hosts: Collection[model.IPAddress],
               is_used: Callable[[], bool], is_filled: bool) -> bool:
        """Load the table if it is missing or was changed.

        The caller must hold the lock. The chains drop packets of each pod
        without an entry. So if pods have routes, this method loads the chains
        only when the sets are complete, and otherwise loads only the sets.

        :param hosts: as for :meth:`problem`
        :param is_used: returns whether pods have routes through break0
        :param is_filled: whether the sets have the entries of all these pods
        :returns: whether the caller must add the entries, and then call this
            method again
        :raises GuardUnavailable: if the table cannot be loaded
        """
        if not self.is_wanted and self.is_loaded():
            self.remove()
        if not self.is_wanted or self.is_intact(link, hosts):
            return False
        nft = kernel.find_program('nft') or ''
        against: Optional[str] = NO_NFT
        is_open = not is_filled and is_used()
        # An old nft may not know the statements that forward packets or match
        # solicitations.
        texts = [self._text(link, hosts), self._text(link, hosts, held=''),
                 self._text(link, (), held='')]
        if self._options.guard == config.AUTO:
            # Linux before 5.16 has no egress hook.
            texts.append(self._text(link, (), egress=''))
        around, anew, sets = (each.format(table=self.table, answer=_ANSWER)
                              for each in (_AGAIN, _ANEW, _SETS + _TRIAL))
        for place, text in enumerate(texts if nft else ()):
            against = _load(nft, (around if is_filled else anew) + text,
                            *['--check'] * is_open)
            if against is None:
                break
        if is_open and against is None:
            # If the table has sets of an earlier version, replace the table.
            against = _load(nft, sets) and _load(nft, anew)
        if against is not None:
            self._cache.drop(self._key)
            raise exceptions.GuardUnavailable(device=self.device,
                                              reason=against)
        if not is_open:
            LOG.info('Loaded the guard of %s%s', self.device,
                     ': it was missing or changed' * self.is_loaded())
            self._cache.put(self._key, [
                self._digest(link, hosts),
                place == 0, place < 2 and self._answer(link),
                *kernel.open_node_nft().rules(self.table)])
        return is_open

    def _answer(self, link: kernel.Link) -> bool:
        """Add the rules that answer neighbour solicitations to the table.

        nft has no syntax for these rules, so they are added by netlink.

        :returns: whether the kernel accepted them
        """
        try:
            self._nft().add_neighbour_answer(
                self.table, _ANSWER, link.index,
                bytes.fromhex(link.mac.replace(':', '')))
        except exceptions.KernelRefused as err:
            LOG.info('Virtual machines cannot reach the node by IPv6 through '
                     '%s: %s', link.name, err)
            return False
        return True

    def _text(self, link: kernel.Link, hosts: Iterable[model.IPAddress],
              held: str = _HELD, egress: str = _EGRESS) -> str:
        """Return the definition of the chains, in nft's syntax."""
        lower = kernel.format_ifname(link.lower)
        solicited = ','.join('0x' + host.packed.hex() for host in hosts)
        if solicited:
            solicited = _SOLICITED.format(hosts=solicited, answer=_ANSWER)
        held = held.format(mac=link.mac, device='"%s"' % link.name)
        return _CHAINS.format(
            table=self.table, device=link.name, answer=_ANSWER,
            solicited=solicited, egress=egress.format(
                lower=lower, mac=link.mac, held=held, solicited=solicited))

    def _digest(self, link: kernel.Link,
                hosts: Iterable[model.IPAddress]) -> str:
        """Return a digest of all data that the table depends on.

        The rules that answer solicitations contain the ifindex of break0,
        which changes when break0 is created again.
        """
        return hashlib.sha256(os.fsencode('%d %s%s' % (
            link.index, _SETS, self._text(link, hosts)))).hexdigest()[:16]

    def remove(self) -> bool:
        """Delete the table; return whether it existed."""
        self._cache.drop(self._key)
        return kernel.open_node_nft().delete_table(self.table)

    def change(self, added: Collection[model.Pair],
               deleted: Collection[model.Pair] = ()) -> bool:
        """Add and delete guard entries, if the table exists.

        :returns: whether the table exists
        :raises KernelRefused: if the kernel refuses the change
        :raises GuardUnavailable: if pods cannot be admitted and [break0]
            guard is on
        """
        if not self.is_wanted or not (added or deleted):
            return False
        reason = 'it is not loaded' if is_installed() else NO_NFT
        # If the state directory was lost, the cache is lost too, so ask the
        # kernel.
        if self.is_loaded() or self.is_there():
            try:
                nft = self._nft()
                nft.delete(self.table, deleted)
                nft.add(self.table, added)
                return True
            except exceptions.KernelRefused as err:
                if self._options.guard != config.ON:
                    raise
                reason = str(err)
        if added and self._options.guard == config.ON:
            raise exceptions.GuardUnavailable(device=self.device,
                                              reason=reason)
        return False

    def release(self, netlink: kernel.Netlink, parent: Optional[int],
                macs: Mapping[model.IPAddress, Optional[str]]) -> None:
        """Release the packets that wait for the MAC address of a pod.

        If the node has asked the LAN for a pod, the kernel holds packets to
        the pod for three seconds. Meanwhile TCP does not retransmit the held
        packets (tcp_retransmit_skb). After that time the kernel reports the
        pod as unreachable, and a connection attempt fails. So this method sets
        the pod as a neighbour on the parent and then deletes the neighbour.
        The kernel sends the packets, and the table forwards them to break0. If
        the table cannot forward packets, this method only deletes the
        neighbour: the kernel drops the held packets, and reports the pod as
        unreachable at once.

        :param parent: ifindex of the parent, on which the node has asked; None
            if the parent is gone
        :param macs: MAC addresses of the pods, by address. Each address has a
            route through break0 now
        """
        if parent is None:
            return
        for address in netlink.list_unresolved(parent, macs):
            mac = macs[address]
            changes: list[kernel.Change] = [
                (Verb.DELETE, model.Neighbour(address, parent, '', None))]
            if mac and (self._cache.get(self._key) or ())[1:2] == [True]:
                with contextlib.suppress(exceptions.KernelRefused):
                    self._nft().add(self.table, [
                        _Held(*model.Pair.of(address, mac))])
                    changes.insert(0, (Verb.REPLACE, model.Neighbour(
                        address, parent, mac, None)))
            netlink.change(changes)
