# SPDX-License-Identifier: Apache-2.0

"""The few messages of nftables that are sent for each pod.

Tables of some size are loaded by the program ``nft``, which takes
milliseconds; an element of a set takes some microseconds by netlink. The
formats are those of linux/netfilter/nf_tables.h and nfnetlink.h.
"""

from __future__ import annotations

import errno
import itertools
import os
import socket
import struct
import threading
from typing import Iterable, Iterator, Optional, Sequence

from kuryr_break0.kernel import netlink
from kuryr_break0.kernel.netlink import attribute
from kuryr_break0.kernel.netlink import attributes
from kuryr_break0.kernel.netlink import Message
from kuryr_break0.kernel.netlink import NESTED
from kuryr_break0.kernel.netlink import Received
from kuryr_break0.kernel.netlink import text
from kuryr_break0.kernel.netlink import tolerated
from kuryr_break0.model import Pair

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
#: Of a shared socket. An answer is there when send(2) returns; one that is not
#: there was read by a process that should not have.
_SHARED_TIMEOUT = 1
#: Elements of one batch, which has to fit into the socket's buffer.
_AT_ONCE = 256
_U32 = struct.Struct('!I')


#: The sets of a table.
SETS = ('pairs4', 'pairs6', 'addresses4', 'addresses6')


class Nft(netlink.RequestSocket):
    """A netlink socket of nftables in the namespace of the calling thread.

    To be used as a context manager. Its methods raise KernelRefused.
    """

    protocol = netlink.NETLINK_NETFILTER
    advice = 'See the tables: nft list ruleset'

    def take_over(self) -> None:
        """Prepare a socket that another process may have used last.

        What that has not read is dropped, since it may have been killed, and
        numbers of messages differ from those that it used.
        """
        self._drain()
        # Not 0, which is the number of what is posted.
        self._sequence = (int.from_bytes(os.urandom(4), 'big') >> 1) | 1

    def _drain(self) -> None:
        while True:
            try:
                self._socket.recv(2 ** 17, socket.MSG_DONTWAIT)
            except OSError as err:
                if err.errno != errno.ENOBUFS:  # more than had room
                    return

    def post(self, messages: Sequence[Message], drain: bool) -> None:
        """Send what nobody waits for an answer to.

        What is sent is done when this returns. Errors have a number that no
        other message has, so whoever reads them next ignores them.

        :param drain: drop them at once, which may take an answer from
            another process that shares the socket
        """
        try:
            self._socket.send(b''.join(message.packed(0)
                                       for message in messages))
        except OSError as err:
            raise self._failed('take a message for netfilter', err) from err
        if drain:
            self._drain()

    def add(self, table: str, pairs: Iterable[Pair]) -> None:
        """Add elements; those that are there are fine.

        :raises KernelRefused: with ENOENT if there is no such table
        """
        pairs = sorted(pairs, key=lambda pair: pair.set_name)
        for start in range(0, len(pairs), _AT_ONCE):
            self._batch('let pods pass in the table ' + table, *(
                _message(_NEWSETELEM, netlink.NLM_F_CREATE,
                         _elements(table, name, some))
                for name, some in itertools.groupby(
                    pairs[start:start + _AT_ONCE],
                    lambda pair: pair.set_name)))

    def delete(self, table: str, pairs: Iterable[Pair]) -> None:
        """Delete elements; those that are not there are fine.

        For one of these the kernel takes some 15 ms, to undo the batch.
        """
        for pair in pairs:  # one that is not there ends a batch
            with tolerated(errno.ENOENT):
                self._batch('let a pod pass no more in the table ' + table,
                            _message(
                                _DELSETELEM, 0, _elements(
                                    table, pair.set_name, [pair])))

    def elements(self, table: str) -> set[Pair]:
        """List the elements of all sets of a table, by dumps.

        :raises KernelRefused: with ENOENT if there is no such table
        """
        found: set[Pair] = set()
        for name in SETS:
            for keys in self._dump(
                    'list a set of the table ' + table,
                    _message(_GETSETELEM, 0, text(1, table) + text(2, name)),
                    lambda message: list(_keys(message.body))):
                found.update(Pair(key[8:], key[:6]) if 'pairs' in name
                             else Pair(key, None) for key in keys)
        return found

    def rules(self, table: str) -> list[int]:
        """List the handles of the rules of a table; none without it."""
        return [int.from_bytes(found.get(3, b''), 'big')
                for found in self._dump(
                    'list the rules of the table ' + table,
                    _message(_GETRULE, 0, text(1, table)), _attributes)
                if netlink.read_text(found.get(1)) == table]

    def binds_source(self, table: str, index: int, mac: bytes) -> bool:
        """Return whether :meth:`bind_source` was done for an interface.

        Whatever its pod has put into the table, this is one message each way.
        """
        chain = self._get(_GETCHAIN, text(1, table)
                          + text(3, _source_chain(index, mac)))
        return chain is not None and chain.get(6) == _U32.pack(1)  # its rules

    def bind_source(self, table: str, device: str, index: int,
                    mac: bytes) -> bool:
        """Let an interface send with its own MAC address only.

        By a table with one chain and one rule. A chain outlives its interface,
        and since Linux 6.16 it is attached to the next one of that name, so
        the rule names the number of the interface too.

        :returns: whether it was not so yet
        :raises KernelRefused: if the kernel has no such hook
        """
        if self.binds_source(table, index, mac):
            return False  # to undo a batch takes the kernel some 15 ms
        chain = _source_chain(index, mac)
        hook = attribute(NESTED | 4, (
            _be32(1, _EGRESS) + _be32(2, 0) + text(3, device)))
        drop = attribute(NESTED | 2, attribute(
            NESTED | 2, _be32(1, _NF_DROP)))
        expressions = b''.join((
            _expression('meta', _be32(1, 1) + _be32(2, _META_OIF)),
            _compared(_EQUAL, struct.pack('=I', index)),
            _loaded(1, _LINK, 6, 6), _compared(_UNEQUAL, mac),
            _expression('immediate', _be32(1, 0) + drop)))
        action = 'guard the interface ' + device
        creation = [
            _message(_NEWTABLE, netlink.NLM_F_CREATE | netlink.NLM_F_EXCL,
                     text(1, table)),
            _message(_NEWCHAIN, netlink.NLM_F_CREATE, (
                text(1, table) + text(3, chain) + hook
                + _be32(5, _NF_ACCEPT) + text(7, 'filter'))),
            _rule(table, chain, expressions)]
        with tolerated(errno.EEXIST):
            self._batch(action, *creation)
            return True
        # That of an earlier interface of this name.
        self._batch(action, _deletion(table), *creation)
        return True

    def add_answer(self, table: str, chain: str, index: int,
                   mac: bytes) -> None:
        """Let a chain answer the neighbour solicitations that it gets.

        By one rule, which makes an advertisement of a solicitation, by
        their formats in RFC 4861, and sends it where that came from.

        :param index: ifindex of the interface to send by
        :param mac: MAC address of that, for each address that is asked for
        :raises KernelRefused: if the kernel cannot forward in this family
        """
        expressions = b''.join((
            _loaded(1, _NETWORK, 8, 16), _loaded(2, _TRANSPORT, 8, 16),
            _loaded(3, _LINK, 6, 6),
            _stored(1, _NETWORK, 24, 16), _stored(2, _NETWORK, 8, 16),
            _stored(3, _LINK, 0, 6),
            _immediate(4, mac), _stored(4, _LINK, 6, 6),
            _immediate(4, b'\x02\x01' + mac), _stored(4, _TRANSPORT, 24, 8),
            _immediate(4, b'\x88\0'), _stored(4, _TRANSPORT, 0, 2),
            # Solicited, and in place of what was known before.
            _immediate(4, b'\x60\0\0\0'), _stored(4, _TRANSPORT, 4, 4),
            _immediate(4, struct.pack('=I', index)),
            _expression('fwd', _be32(1, 4))))
        self._batch('answer neighbour solicitations in the table ' + table,
                    _rule(table, chain, expressions))

    def has_table(self, table: str) -> bool:
        """Return whether there is a table."""
        return self._get(_GETTABLE, text(1, table)) is not None

    def delete_table(self, table: str) -> bool:
        """Delete a table; whether there was one."""
        if not self.has_table(table):
            return False  # to undo a batch takes the kernel some 15 ms
        with tolerated(errno.ENOENT):
            self._batch('delete the table ' + table, _deletion(table))
            return True
        return False

    def _batch(self, action: str, *messages: Message) -> None:
        """Have the kernel do all of it, or nothing."""
        edge = struct.pack('!BBH', 0, 0, _SUBSYSTEM)
        self._order(action, Message(_BATCH_BEGIN, 0, edge), *messages,
                    Message(_BATCH_END, 0, edge), acknowledged=-2)

    def _get(self, kind: int, body: bytes) -> Optional[dict[int, bytes]]:
        """Return the attributes of one object; None if it is not there."""
        with tolerated(errno.ENOENT):
            found, _ = self._ask('read a table', _message(kind, 0, body),
                                 _attributes)
            return next(iter(found), None)
        return None


_kept = threading.local()
#: The socket that forked processes share, and the inode of its namespace.
_shared: Optional[tuple[int, Nft]] = None


def share_nft() -> None:
    """Open a socket for the processes that will be forked from this one.

    When the last process closes a socket of netfilter, the kernel frees what
    was deleted, and keeps all who change nftables waiting for some 20 ms
    (nft_rcv_nl_event). This process keeps it open instead.

    :raises KernelRefused: if it cannot be opened
    """
    global _shared
    _shared = (os.stat('/proc/thread-self/ns/net').st_ino,
               Nft(_SHARED_TIMEOUT))


def node_nft(exclusive: bool = False) -> Nft:
    """Return a socket that stays open, for the namespace of the node.

    To close one that has deleted something takes the kernel some 12 ms. It
    keeps its namespace, so it is not for that of a pod.

    :param exclusive: whether the caller holds the lock of the ledger. Only
        then it may be one that this process shares with others, since an
        answer goes to whoever reads it first.
    :raises KernelRefused: if it cannot be opened
    """
    place = os.getpid(), os.stat('/proc/thread-self/ns/net').st_ino
    if exclusive and _shared is not None and _shared[0] == place[1]:
        _shared[1].take_over()
        return _shared[1]
    if getattr(_kept, 'place', None) != place:
        # Of the process that this one was forked from, it stays open there.
        _kept.nft, _kept.place = Nft(), place
    kept: Nft = _kept.nft
    return kept


def post(messages: Sequence[Message]) -> None:
    """Send messages to netfilter that nobody waits for an answer to.

    By a socket that stays open, which needs no lock, since nothing is read.

    :raises KernelRefused: if it cannot be opened, or they cannot be sent
    """
    inode = os.stat('/proc/thread-self/ns/net').st_ino
    if _shared is not None and _shared[0] == inode:
        _shared[1].post(messages, drain=False)
    else:
        node_nft().post(messages, drain=True)


class NftEvents(netlink.EventSocket):
    """Receives what is deleted of our tables, in this namespace."""

    def __init__(self, prefix: str) -> None:
        self._prefix = os.fsencode(prefix)
        super().__init__(netlink.NETLINK_NETFILTER, 1 << _GROUP - 1)

    def get(self) -> bool:
        """Return whether some of ours may have been deleted."""
        deleted = False
        for data, _ in self._received():
            deleted |= not data or (self._prefix in data and any(
                message.kind & 0xff in (_DELTABLE, _DELCHAIN, _DELRULE,
                                        _DELSET)
                for message in netlink.messages(data)))
        return deleted


_EQUAL, _UNEQUAL = 0, 1  # NFT_CMP_EQ, NFT_CMP_NEQ
_LINK, _NETWORK, _TRANSPORT = range(3)  # NFT_PAYLOAD_LL_HEADER and so on


def _message(kind: int, flags: int, body: bytes) -> Message:
    return Message(_SUBSYSTEM << 8 | kind, flags,
                   struct.pack('!BBH', _NETDEV, 0, 0) + body)


def _be32(kind: int, value: int) -> bytes:
    return attribute(kind, _U32.pack(value))


def _expression(name: str, data: bytes) -> bytes:
    return attribute(NESTED | 1, text(1, name)
                     + attribute(NESTED | 2, data))


def _compared(operator: int, value: bytes) -> bytes:
    return _expression('cmp', _be32(1, 1) + _be32(2, operator)
                       + attribute(NESTED | 3, attribute(1, value)))


def _loaded(register: int, base: int, offset: int, size: int) -> bytes:
    return _expression('payload', _be32(1, register) + _be32(2, base)
                       + _be32(3, offset) + _be32(4, size))


def _stored(register: int, base: int, offset: int, size: int) -> bytes:
    """Write to the packet, and correct the checksum of its ICMPv6."""
    body = (_be32(5, register) + _be32(2, base) + _be32(3, offset)
            + _be32(4, size))
    if base == _TRANSPORT:
        body += _be32(6, 1) + _be32(7, 2)  # NFT_PAYLOAD_CSUM_INET, at 2
    elif base == _NETWORK:
        body += _be32(8, 1)  # NFT_PAYLOAD_L4CSUM_PSEUDOHDR
    return _expression('payload', body)


def _immediate(register: int, value: bytes) -> bytes:
    return _expression('immediate', _be32(1, register) + attribute(
        NESTED | 2, attribute(1, value)))


def _source_chain(index: int, mac: bytes) -> str:
    """Return the name of a chain, which says what its rule is about."""
    return 'source-%s-%d' % (mac.hex(), index)


def _deletion(table: str) -> Message:
    return _message(_DELTABLE, 0, text(1, table))


def _rule(table: str, chain: str, expressions: bytes) -> Message:
    """Return what adds a rule to the end of a chain."""
    return _message(_NEWRULE, netlink.NLM_F_CREATE | netlink.NLM_F_APPEND, (
        text(1, table) + text(2, chain) + attribute(NESTED | 4, expressions)))


def _elements(table: str, name: str, pairs: Iterable[Pair]) -> bytes:
    return text(1, table) + text(2, name) + attribute(
        NESTED | 3, b''.join(attribute(NESTED | 1, attribute(
            NESTED | 1, attribute(1, pair.key))) for pair in pairs))


def _keys(body: bytes) -> Iterator[bytes]:
    for _, element in netlink.listed(attributes(body, 4).get(3, b'')):
        value = attributes(attributes(element).get(1, b'')).get(1)
        if value:
            yield value


def _attributes(message: Received) -> dict[int, bytes]:
    return attributes(message.body, 4)
