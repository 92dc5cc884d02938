# SPDX-License-Identifier: Apache-2.0

"""The nftables messages that this package sends for each pod.

The program ``nft`` loads whole tables in milliseconds. A netlink message adds
a set element in microseconds. The formats are defined in
linux/netfilter/nf_tables.h and nfnetlink.h.
"""

from __future__ import annotations

import errno
import itertools
import os
import socket
import struct
import threading
from typing import Iterable, Iterator, Optional, Sequence

from kuryr_break0.kernel import event_socket
from kuryr_break0.kernel import netlink
from kuryr_break0 import model

_SUBSYSTEM = 10  # NFNL_SUBSYS_NFTABLES
_BATCH_BEGIN, _BATCH_END = 0x10, 0x11
_NETDEV = 5  # NFPROTO_NETDEV
(_NEWTABLE, _GETTABLE, _DELTABLE, _NEWCHAIN, _GETCHAIN, _DELCHAIN, _NEWRULE,
 _GETRULE, _DELRULE, _, _, _DELSET, _NEWSETELEM, _GETSETELEM,
 _DELSETELEM) = range(15)
_GROUP = 7  # NFNLGRP_NFTABLES
_NF_DROP, _NF_ACCEPT = 0, 1
_EGRESS = 1  # NF_NETDEV_EGRESS
_META_OIF = 5  # NFT_META_OIF
#: Seconds to wait for an answer at a shared socket. The kernel answers before
#: send(2) returns, but another process may have read the answer by mistake.
_SHARED_TIMEOUT = 1
#: Maximum elements of a batch, which must fit into the socket's buffer.
_AT_ONCE = 256
_U32 = struct.Struct('!I')


#: The sets of a table.
SETS = ('pairs4', 'pairs6', 'addresses4', 'addresses6')


class Nft(netlink.RequestSocket):
    """A netlink socket for nftables in the namespace of the calling thread.

    Use it as a context manager. Its methods raise KernelRefused.
    """

    protocol = netlink.NETLINK_NETFILTER
    advice = 'To see the tables, run: nft list ruleset'

    def take_over(self) -> None:
        """Prepare a socket that another process may have used before.

        If that process was killed, the socket may have unread answers. So drop
        the unread answers, and continue with a random sequence number.
        """
        self._drain()
        # The number must not be 0, because post() sends messages with 0.
        self._sequence = (int.from_bytes(os.urandom(4), 'big') >> 1) | 1

    def _drain(self) -> None:
        while True:
            try:
                self._socket.recv(2 ** 17, socket.MSG_DONTWAIT)
            except OSError as err:
                if err.errno != errno.ENOBUFS:  # the buffer overflowed
                    return

    def post(self, messages: Sequence[netlink.Message], drain: bool) -> None:
        """Send messages without waiting for an answer.

        When this function returns, the kernel has processed the messages.
        Their sequence number is 0, so the next reader skips the errors in the
        answers.

        :param drain: whether to drop the answers at once. Do not drain a
            shared socket, because another process may wait for its answer
        """
        try:
            self._socket.send(b''.join(message.packed(0)
                                       for message in messages))
        except OSError as err:
            raise self._failed('process a netfilter request',
                               err) from err
        if drain:
            self._drain()

    def add(self, table: str, pairs: Iterable[model.Pair]) -> None:
        """Add guard entries; ignore existing entries.

        :raises KernelRefused: with ENOENT if the table does not exist
        """
        pairs = sorted(pairs, key=lambda pair: pair.set_name)
        for start in range(0, len(pairs), _AT_ONCE):
            self._batch('add guard entries to the table ' + table, *(
                _message(_NEWSETELEM, netlink.NLM_F_CREATE, table,
                         _elements(name, some))
                for name, some in itertools.groupby(
                    pairs[start:start + _AT_ONCE],
                    lambda pair: pair.set_name)))

    def delete(self, table: str, pairs: Iterable[model.Pair]) -> None:
        """Delete guard entries; ignore missing entries.

        For each missing entry, the kernel undoes a batch, which takes about
        15 ms.
        """
        # In a common batch, a missing entry would undo all deletions.
        for pair in pairs:
            with netlink.tolerate_errors(errno.ENOENT):
                self._batch('delete a guard entry from the table ' + table,
                            _message(_DELSETELEM, 0, table,
                                     _elements(pair.set_name, [pair])))

    def elements(self, table: str) -> set[model.Pair]:
        """List the guard entries of a table, by dumps.

        :raises KernelRefused: with ENOENT if the table does not exist
        """
        elements: set[model.Pair] = set()
        for name in SETS:
            for keys in self._dump(
                    'list a set of the table ' + table,
                    _message(_GETSETELEM, 0, table, netlink.text(2, name)),
                    lambda message: list(_keys(message.body))):
                elements.update(model.Pair(key[8:], key[:6]) if 'pairs' in name
                                else model.Pair(key, None) for key in keys)
        return elements

    def rules(self, table: str) -> list[int]:
        """List the handles of the rules of a table, by a dump.

        :returns: an empty list if the table does not exist
        """
        return [int.from_bytes(rule.get(3, b''), 'big')
                for rule in self._dump(
                    'list the rules of the table ' + table,
                    _message(_GETRULE, 0, table), _attributes)
                if netlink.read_text(rule.get(1)) == table]

    def has_source_rule(self, table: str, index: int, mac: bytes) -> bool:
        """Return whether the rule of :meth:`add_source_rule` exists.

        The method looks up only the chain, so the answer is one message, even
        if the pod has filled the table.
        """
        chain = self._get(_GETCHAIN, table,
                          netlink.text(3, _source_chain(index, mac)))
        return chain is not None and chain.get(6) == _U32.pack(1)  # one rule

    def add_source_rule(self, table: str, device: str, index: int,
                        mac: bytes) -> bool:
        """Drop frames of an interface whose source MAC address is not ``mac``.

        The table gets one chain with one rule. A chain outlives its interface.
        Since Linux 6.16, the kernel attaches the chain to the next interface
        of the same name. So the rule compares the ifindex too.

        :returns: whether a rule was added
        :raises KernelRefused: if the kernel has no egress hook
        """
        if self.has_source_rule(table, index, mac):
            return False  # undoing a batch takes the kernel about 15 ms
        chain = _source_chain(index, mac)
        hook = netlink.nested(4, _be32(1, _EGRESS) + _be32(2, 0)
                              + netlink.text(3, device))
        drop = netlink.nested(2, netlink.nested(2, _be32(1, _NF_DROP)))
        expressions = b''.join((
            _expression('meta', _be32(1, 1) + _be32(2, _META_OIF)),
            _compare(_EQUAL, struct.pack('=I', index)),
            _load(1, _LINK, 6, 6), _compare(_UNEQUAL, mac),
            _expression('immediate', _be32(1, 0) + drop)))
        action = 'guard the interface ' + device
        creation = [
            _message(_NEWTABLE, netlink.NLM_F_CREATE | netlink.NLM_F_EXCL,
                     table),
            _message(_NEWCHAIN, netlink.NLM_F_CREATE, table, (
                netlink.text(3, chain) + hook + _be32(5, _NF_ACCEPT)
                + netlink.text(7, 'filter'))),
            _rule(table, chain, expressions)]
        with netlink.tolerate_errors(errno.EEXIST):
            self._batch(action, *creation)
            return True
        # The table exists for an earlier interface of this name.
        self._batch(action, _message(_DELTABLE, 0, table), *creation)
        return True

    def add_neighbour_answer(self, table: str, chain: str, index: int,
                             mac: bytes) -> None:
        """Let a chain answer neighbour solicitations.

        One rule turns a solicitation into an advertisement (RFC 4861), and
        sends the advertisement to the sender of the solicitation.

        :param index: ifindex of the interface that sends the advertisements
        :param mac: MAC address of this interface, which each advertisement
            contains
        :raises KernelRefused: if the kernel has no expression ``fwd`` for
            tables of family netdev
        """
        expressions = b''.join((
            _load(1, _NETWORK, 8, 16), _load(2, _TRANSPORT, 8, 16),
            _load(3, _LINK, 6, 6),
            _store(1, _NETWORK, 24, 16), _store(2, _NETWORK, 8, 16),
            _store(3, _LINK, 0, 6),
            _load_value(4, mac), _store(4, _LINK, 6, 6),
            _load_value(4, b'\x02\x01' + mac), _store(4, _TRANSPORT, 24, 8),
            _load_value(4, b'\x88\0'), _store(4, _TRANSPORT, 0, 2),
            # The flags "solicited" and "override" (RFC 4861, 4.4).
            _load_value(4, b'\x60\0\0\0'), _store(4, _TRANSPORT, 4, 4),
            _load_value(4, struct.pack('=I', index)),
            _expression('fwd', _be32(1, 4))))
        self._batch('answer neighbour solicitations in the table ' + table,
                    _rule(table, chain, expressions))

    def has_table(self, table: str) -> bool:
        """Return whether a table exists."""
        return self._get(_GETTABLE, table) is not None

    def delete_table(self, table: str) -> bool:
        """Delete a table; return whether it existed."""
        if not self.has_table(table):
            return False  # undoing a batch takes the kernel about 15 ms
        with netlink.tolerate_errors(errno.ENOENT):
            self._batch('delete the table ' + table,
                        _message(_DELTABLE, 0, table))
            return True
        return False

    def _batch(self, action: str, *messages: netlink.Message) -> None:
        """Send a batch, which the kernel applies as a whole or not at all."""
        edge = struct.pack('!BBH', 0, 0, _SUBSYSTEM)
        self._order(action, netlink.Message(_BATCH_BEGIN, 0, edge), *messages,
                    netlink.Message(_BATCH_END, 0, edge), acknowledged=-2)

    def _get(self, kind: int, table: str, attributes: bytes = b''
             ) -> Optional[dict[int, bytes]]:
        """Return the attributes of an object; None if it does not exist."""
        with netlink.tolerate_errors(errno.ENOENT):
            replies, _ = self._ask(
                'read an nftables object',
                _message(kind, 0, table, attributes), _attributes)
            return next(iter(replies), None)
        return None


_kept = threading.local()
#: The inode of a namespace, and a socket in this namespace. This process and
#: the processes that it forks share the socket.
_shared: Optional[tuple[int, Nft]] = None


def share_nft() -> None:
    """Open a socket for all processes that this process will fork.

    When the last process closes a netfilter socket, the kernel frees the
    deleted objects, and blocks all changes of nftables for about 20 ms
    (nft_rcv_nl_event). So this process keeps the shared socket open.

    :raises KernelRefused: if the socket cannot be opened
    """
    global _shared
    _shared = (os.stat('/proc/thread-self/ns/net').st_ino,
               Nft(_SHARED_TIMEOUT))


def open_node_nft(exclusive: bool = False) -> Nft:
    """Return a socket in the node's namespace; the caller must not close it.

    The socket stays open for later calls, because the kernel takes about 12 ms
    to close a socket that has deleted an object. An open socket keeps its
    namespace alive, so do not use this function in the namespace of a pod.

    :param exclusive: whether the caller holds the ledger's lock. If so, the
        function may return the shared socket. The lock is necessary, because
        each process that shares the socket can read the answers to the
        requests of the other processes
    :raises KernelRefused: if the socket cannot be opened
    """
    place = os.getpid(), os.stat('/proc/thread-self/ns/net').st_ino
    if exclusive and _shared is not None and _shared[0] == place[1]:
        _shared[1].take_over()
        return _shared[1]
    if getattr(_kept, 'place', None) != place:
        # After a fork, the parent process keeps the inherited socket open.
        _kept.nft, _kept.place = Nft(), place
    kept: Nft = _kept.nft
    return kept


def post(messages: Sequence[netlink.Message]) -> None:
    """Send messages to netfilter without waiting for an answer.

    The socket stays open. The caller needs no lock, because no answer is read.

    :raises KernelRefused: if no socket can be opened or used
    """
    inode = os.stat('/proc/thread-self/ns/net').st_ino
    if _shared is not None and _shared[0] == inode:
        _shared[1].post(messages, drain=False)
    else:
        open_node_nft().post(messages, drain=True)


class NftEvents(event_socket.EventSocket):
    """Receives the deletions of this package's nftables objects.

    :param prefix: prefix of the names of this package's tables
    """

    def __init__(self, prefix: str) -> None:
        self._prefix = os.fsencode(prefix)
        super().__init__(netlink.NETLINK_NETFILTER, 1 << _GROUP - 1)

    def get(self) -> bool:
        """Return whether an object of our tables may have been deleted."""
        deleted = False
        for data, _ in self._receive():
            deleted |= not data or (self._prefix in data and any(
                message.kind & 0xff in (_DELTABLE, _DELCHAIN, _DELRULE,
                                        _DELSET)
                for message in netlink.messages(data)))
        return deleted


_EQUAL, _UNEQUAL = 0, 1  # NFT_CMP_EQ, NFT_CMP_NEQ
_LINK, _NETWORK, _TRANSPORT = range(3)  # NFT_PAYLOAD_LL_HEADER and so on


def _message(kind: int, flags: int, table: str,
             attributes: bytes = b'') -> netlink.Message:
    """Pack a message about a table or an object of the table."""
    return netlink.Message(_SUBSYSTEM << 8 | kind, flags, (
        struct.pack('!BBH', _NETDEV, 0, 0) + netlink.text(1, table)
        + attributes))


def _be32(kind: int, value: int) -> bytes:
    return netlink.attribute(kind, _U32.pack(value))


def _expression(name: str, data: bytes) -> bytes:
    return netlink.nested(1, netlink.text(1, name) + netlink.nested(2, data))


def _compare(operator: int, value: bytes) -> bytes:
    return _expression('cmp', _be32(1, 1) + _be32(2, operator)
                       + netlink.nested(3, netlink.attribute(1, value)))


def _load(register: int, base: int, offset: int, size: int) -> bytes:
    return _expression('payload', _be32(1, register) + _be32(2, base)
                       + _be32(3, offset) + _be32(4, size))


def _store(register: int, base: int, offset: int, size: int) -> bytes:
    """Write a register to the packet, and correct the ICMPv6 checksum."""
    body = (_be32(5, register) + _be32(2, base) + _be32(3, offset)
            + _be32(4, size))
    if base == _TRANSPORT:
        body += _be32(6, 1) + _be32(7, 2)  # NFT_PAYLOAD_CSUM_INET, offset 2
    elif base == _NETWORK:
        body += _be32(8, 1)  # NFT_PAYLOAD_L4CSUM_PSEUDOHDR
    return _expression('payload', body)


def _load_value(register: int, value: bytes) -> bytes:
    return _expression('immediate', _be32(1, register)
                       + netlink.nested(2, netlink.attribute(1, value)))


def _source_chain(index: int, mac: bytes) -> str:
    """Return the name of a chain, from the values that its rule compares."""
    return 'source-%s-%d' % (mac.hex(), index)


def _rule(table: str, chain: str, expressions: bytes) -> netlink.Message:
    """Return the message that appends a rule to a chain."""
    return _message(_NEWRULE, netlink.NLM_F_CREATE | netlink.NLM_F_APPEND,
                    table, netlink.text(2, chain)
                    + netlink.nested(4, expressions))


def _elements(name: str, pairs: Iterable[model.Pair]) -> bytes:
    return netlink.text(2, name) + netlink.nested(3, b''.join(
        netlink.nested(1, netlink.nested(1, netlink.attribute(1, pair.key)))
        for pair in pairs))


def _keys(body: bytes) -> Iterator[bytes]:
    for _, element in netlink.parse_list(
            netlink.attributes(body, 4).get(3, b'')):
        key = netlink.attributes(element).get(1, b'')
        value = netlink.attributes(key).get(1)
        if value:
            yield value


def _attributes(message: netlink.Received) -> dict[int, bytes]:
    return netlink.attributes(message.body, 4)
