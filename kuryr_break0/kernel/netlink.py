# SPDX-License-Identifier: Apache-2.0

"""Netlink: the framing of messages, and sockets for requests and events.

The formats are those of linux/netlink.h. A message of a pod takes pyroute2
more than ten times as long.
"""

from __future__ import annotations

import errno
import os
import random
import socket
import struct
import time
from typing import Any, Callable, Iterator, NamedTuple, Optional
from typing import Sequence, TypeVar

from kuryr_break0 import exceptions

_T = TypeVar('_T')

NLMSG_ERROR, NLMSG_DONE = 2, 3
NLM_F_REQUEST, NLM_F_ACK, NLM_F_DUMP_INTR = 0x1, 0x4, 0x10
NLM_F_DUMP = 0x300
NLM_F_REPLACE, NLM_F_EXCL, NLM_F_CREATE, NLM_F_APPEND = (0x100, 0x200, 0x400,
                                                         0x800)
_NLM_F_CAPPED, _NLM_F_ACK_TLVS = 0x100, 0x200
_NLMSGERR_ATTR_MSG = 1

SOL_NETLINK = 270  # linux/socket.h
NETLINK_ROUTE, NETLINK_NETFILTER = 0, 12
# Absent in older kernels, which costs time only
_NETLINK_CAP_ACK, _NETLINK_EXT_ACK = 10, 11
NETLINK_GET_STRICT_CHK = 12

_RECEIVED = 2 ** 17  # bytes; a dump fills at most 32 KiB at once
#: Seconds after which an answer is lost. The kernel answers while the
#: request is being sent, so only a fault can make it as long.
_TIMEOUT = 10
#: An interrupted dump is repeated this often. Each try meets about as many
#: changes as the last, so what counts is their number, not their distance.
DUMP_TRIES, FEW_TRIES = 20, 3
DUMP_PAUSE = 0.05  # seconds, at most
#: Datagrams of events that are read at once, and bytes of each.
_AT_ONCE, _DATAGRAM = 256, 2 ** 16

HEADER = struct.Struct('=IHHII')  # nlmsghdr
_ATTRIBUTE = struct.Struct('=HH')  # nlattr
U32 = struct.Struct('=I')
S32 = struct.Struct('=i')
#: The kind of an attribute without its two flags (NLA_TYPE_MASK)
_KIND = 0x3fff
NESTED = 0x8000


class Message(NamedTuple):
    """A message as it is sent, but for its sequence number."""

    kind: int
    flags: int
    body: bytes

    def packed(self, sequence: int) -> bytes:
        """Return it with its header, padded for the next one to follow."""
        length = HEADER.size + len(self.body)
        return (HEADER.pack(length, self.kind, self.flags | NLM_F_REQUEST,
                            sequence, 0)
                + self.body + bytes(-length % 4))


class Header(NamedTuple):
    """The header of a message that was received, and where its body is."""

    kind: int
    flags: int
    sequence: int
    start: int
    end: int


def headers(data: bytes) -> Iterator[Header]:
    """Iterate over the messages of what was received at once."""
    start = 0
    while start + HEADER.size <= len(data):
        length, kind, flags, sequence, _ = HEADER.unpack_from(data, start)
        if length < HEADER.size:
            return  # or it would not end
        yield Header(kind, flags, sequence, start + HEADER.size,
                     min(start + length, len(data)))
        start += length + 3 & ~3


def error(data: bytes, header: Header) -> tuple[int, str]:
    """Read an NLMSG_ERROR or NLMSG_DONE: errno (0 for none), explanation."""
    if header.end - header.start < S32.size:
        return 0, ''
    code = -S32.unpack_from(data, header.start)[0]
    explanation = ''
    if header.kind == NLMSG_ERROR and header.flags & _NLM_F_ACK_TLVS:
        skipped = header.start + S32.size + HEADER.size
        if not header.flags & _NLM_F_CAPPED:
            length, = U32.unpack_from(data, header.start + S32.size)
            skipped = header.start + S32.size + (length + 3 & ~3)
        explanation = read_text(attributes(data, skipped, header.end)
                                .get(_NLMSGERR_ATTR_MSG)) or ''
    return code, explanation


def attribute(kind: int, payload: bytes) -> bytes:
    """Pack one attribute."""
    length = _ATTRIBUTE.size + len(payload)
    return _ATTRIBUTE.pack(length, kind) + payload + bytes(-length % 4)


def number(kind: int, value: int) -> bytes:
    """Pack an attribute that is a number of 32 bits."""
    return attribute(kind, U32.pack(value))


def text(kind: int, value: str) -> bytes:
    """Pack an attribute that is a text."""
    return attribute(kind, os.fsencode(value) + b'\0')


def attributes(data: bytes, start: int = 0,
               end: Optional[int] = None) -> dict[int, bytes]:
    """Read attributes by their kind."""
    return {kind: value for kind, value in listed(data, start, end)}


def listed(data: bytes, start: int = 0, end: Optional[int] = None
           ) -> Iterator[tuple[int, bytes]]:
    """Iterate over attributes, of which several may be of one kind."""
    if end is None:
        end = len(data)
    while start + _ATTRIBUTE.size <= end:
        length, kind = _ATTRIBUTE.unpack_from(data, start)
        if length < _ATTRIBUTE.size:
            return  # or it would not end
        yield kind & _KIND, data[start + 4:start + length]
        start += length + 3 & ~3


def read_number(packed: Optional[bytes]) -> Optional[int]:
    return int(U32.unpack(packed)[0]) if packed else None


def read_text(packed: Optional[bytes]) -> Optional[str]:
    if packed is None:
        return None
    # Names are bytes to the kernel, and must go back to it unchanged.
    return os.fsdecode(packed.rstrip(b'\0'))


class Refusal(NamedTuple):
    """The error that the kernel answered a request with."""

    code: int
    explanation: str = ''

    @property
    def reason(self) -> str:
        return os.strerror(self.code) + (
            ' (%s)' % self.explanation if self.explanation else '')


class _Interrupted(Exception):
    """A table has changed while it was dumped."""


class RequestSocket:
    """A socket in the namespace of the calling thread, for requests.

    To be used as a context manager. Its methods raise KernelRefused.

    :param most: messages that a list is read to at most, where others can
        make it as long as they like; None for all
    :cvar advice: what to do about an error
    """

    protocol = NETLINK_ROUTE
    options: tuple[int, ...] = (_NETLINK_CAP_ACK, _NETLINK_EXT_ACK)
    advice = ''

    def __init__(self, timeout: int = _TIMEOUT,
                 most: Optional[int] = None) -> None:
        self._timeout = timeout
        self._most = most
        self._sequence = 0
        self._open()

    def _open(self) -> None:
        try:
            self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW,
                                         self.protocol)
        except OSError as err:
            raise self._failed('open a netlink socket', err) from err
        for option in self.options:
            self._set_option(option)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO,
                                struct.pack('@ll', self._timeout, 0))

    def _set_option(self, option: int, value: int = 1) -> None:
        try:
            self._socket.setsockopt(SOL_NETLINK, option, value)
        except OSError:
            pass

    def __enter__(self: _T) -> _T:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._socket.close()

    def _order(self, action: str, message: Message, advice: str = '') -> None:
        """Have the kernel do something.

        :raises KernelRefused: if it does not
        """
        try:
            refused = self._send([message]).get(0)
        except OSError as err:
            raise self._failed(action, err, advice) from err
        if refused is not None:
            raise self._refused(action, refused, advice)

    def _send(self, messages: Sequence[Message], acknowledged: int = -1,
              atomic: bool = False) -> dict[int, Refusal]:
        """Send all at once; the errors, by the place of the message.

        The kernel answers each that it refuses, and one that it is asked to
        acknowledge. Answers to the others would take as long as the requests.

        :param acknowledged: place of that, from the end
        :param atomic: whether one error is that of all; no other is read
        """
        sent = list(messages)
        asked = sent[acknowledged]
        sent[acknowledged] = asked._replace(flags=asked.flags | NLM_F_ACK)
        first = self._sequence + 1
        self._sequence += len(sent)
        self._socket.send(b''.join(
            message.packed(sequence)
            for sequence, message in enumerate(sent, first)))
        refused: dict[int, Refusal] = {}
        for data, header in self._answers(first):
            if header.kind != NLMSG_ERROR:
                continue
            place = header.sequence - first
            refusal = Refusal(*error(data, header))
            if refusal.code:
                refused[place] = refusal
            if place - len(sent) == acknowledged or (atomic and refused):
                break
        return refused

    def _ask(self, action: str, message: Message,
             read: Callable[[bytes, Header], Optional[_T]]) -> list[_T]:
        """Ask the kernel a question.

        :param read: reads a message of the answer; None for nothing
        :raises KernelRefused: if it does not answer
        """
        found: list[_T] = []
        count, is_interrupted = 0, False
        self._sequence += 1
        try:
            # An answer that is no dump ends with the acknowledgement.
            self._socket.send(message._replace(
                flags=message.flags | NLM_F_ACK).packed(self._sequence))
            for data, header in self._answers(self._sequence):
                is_interrupted |= bool(header.flags & NLM_F_DUMP_INTR)
                if header.kind in (NLMSG_ERROR, NLMSG_DONE):
                    refusal = Refusal(*error(data, header))
                    if refusal.code:
                        raise self._refused(action, refusal)
                    break
                if count == self._most:
                    # It would be answered with the rest of this.
                    self._socket.close()
                    self._open()
                    return found
                count += 1
                each = read(data, header)
                if each is not None:
                    found.append(each)
        except OSError as err:
            raise self._failed(action, err) from err
        if is_interrupted:
            raise _Interrupted
        return found

    def _dump(self, action: str, message: Message,
              read: Callable[[bytes, Header], Optional[_T]]) -> list[_T]:
        """List what the kernel has of a kind; again if it changed meanwhile.

        :raises KernelRefused: as :meth:`_ask`; with EINTR, if it changed
            each time
        """
        request = message._replace(flags=message.flags | NLM_F_DUMP)
        for _ in range(FEW_TRIES if self._most else DUMP_TRIES):
            try:
                return self._ask(action, request, read)
            except _Interrupted:
                time.sleep(random.uniform(0, DUMP_PAUSE))
        raise exceptions.KernelRefused(
            action, 'it changed each time that it was read', errno.EINTR,
            self.advice)

    def _answers(self, first: int) -> Iterator[tuple[bytes, Header]]:
        """Iterate without end over the answers to requests from a number on.

        Others are what is left of an earlier request.
        """
        while True:
            data = self._socket.recv(_RECEIVED)
            for header in headers(data):
                if first <= header.sequence <= self._sequence:
                    yield data, header

    def _refused(self, action: str, refusal: Refusal,
                 advice: str = '') -> exceptions.KernelRefused:
        return exceptions.KernelRefused(action, refusal.reason, refusal.code,
                                        advice or self.advice)

    def _failed(self, action: str, err: OSError,
                advice: str = '') -> exceptions.KernelRefused:
        return exceptions.KernelRefused(action, err.strerror or str(err),
                                        err.errno or 0, advice or self.advice)


class EventSocket:
    """A socket that receives events in the namespace of the calling thread.

    :param groups: multicast groups, as bits
    :param options: to be set before it is bound
    """

    def __init__(self, protocol: int, groups: int, *options: int) -> None:
        self._socket = socket.socket(
            socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_NONBLOCK,
            protocol)
        try:
            for option in options:
                self._socket.setsockopt(SOL_NETLINK, option, 1)
            self._socket.bind((0, groups))
        except OSError:
            self._socket.close()
            raise

    def __enter__(self: _T) -> _T:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._socket.close()

    def close(self) -> None:
        self._socket.close()

    def fileno(self) -> int:
        """For select(2): readable when there is something to read."""
        return self._socket.fileno()

    def _received(self) -> Iterator[tuple[bytes, Any]]:
        """Iterate over the datagrams that have come, with ancillary data.

        An empty one stands for some that were lost, as by ENOBUFS.
        """
        for _ in range(_AT_ONCE):
            try:
                yield self._socket.recvmsg(
                    _DATAGRAM, socket.CMSG_SPACE(U32.size))[:2]
            except BlockingIOError:
                return
            except OSError:
                yield b'', ()
