# SPDX-License-Identifier: Apache-2.0

"""Netlink messages, and a socket for requests.

The formats are defined in linux/netlink.h. pyroute2 takes more than ten times
as long as this module for the messages of one pod.
"""

from __future__ import annotations

import contextlib
import errno
import os
import random
import socket
import struct
import time
from typing import Callable, Iterator, NamedTuple, Optional, Sequence, TypeVar

from kuryr_break0 import exceptions

_T = TypeVar('_T')

NLMSG_ERROR, NLMSG_DONE = 2, 3
NLM_F_REQUEST, NLM_F_ACK, NLM_F_DUMP_INTR = 0x1, 0x4, 0x10
NLM_F_DUMP = 0x300
NLM_F_REPLACE, NLM_F_EXCL, NLM_F_CREATE, NLM_F_APPEND = (0x100, 0x200, 0x400,
                                                         0x800)
_NLM_F_CAPPED, _NLM_F_ACK_TLVS = 0x100, 0x200
_NLMSGERR_ATTR_MSG, _MAX_ERRNO = 1, 4095

SOL_NETLINK = 270  # linux/socket.h
NETLINK_ROUTE, NETLINK_NETFILTER = 0, 12
# Socket options for the error messages of the kernel. With CAP_ACK, an error
# contains only the header of the request. With EXT_ACK, an error may also
# contain a text.
_NETLINK_CAP_ACK, _NETLINK_EXT_ACK = 10, 11
NETLINK_GET_STRICT_CHK = 12

_RECEIVED = 2 ** 17  # bytes; a datagram of a dump has at most 32 KiB
#: Seconds to wait for an answer. The kernel answers before send(2) returns, so
#: a longer wait indicates a fault.
_TIMEOUT = 10
#: Maximum attempts to dump a table that changes during the dumps. FEW_TRIES
#: applies to dumps that are merged or have a maximum length. More attempts
#: help. Longer pauses do not help, because a change is equally likely during
#: each attempt.
DUMP_TRIES, FEW_TRIES = 20, 3
#: Maximum seconds to pause after the first attempt, and after any attempt. The
#: first pause is short, because many changes are short, such as the deletion
#: of an interface.
DUMP_PAUSE_FIRST, DUMP_PAUSE = 0.001, 0.05

HEADER = struct.Struct('=IHHII')  # nlmsghdr
_ATTRIBUTE = struct.Struct('=HH')  # nlattr
U32 = struct.Struct('=I')
S32 = struct.Struct('=i')
#: The kind of an attribute without its two flags (NLA_TYPE_MASK)
_KIND = 0x3fff
_NESTED = 0x8000


class Message(NamedTuple):
    """A message to send, without its sequence number."""

    kind: int
    flags: int
    body: bytes

    def packed(self, sequence: int) -> bytes:
        """Return the message with its header, padded to 4 bytes."""
        length = HEADER.size + len(self.body)
        return (HEADER.pack(length, self.kind, self.flags | NLM_F_REQUEST,
                            sequence, 0)
                + self.body + bytes(-length % 4))


class Received(NamedTuple):
    """A received message."""

    kind: int
    flags: int
    sequence: int
    body: bytes

    def error(self) -> Optional[OSError]:
        """Return the error of an NLMSG_ERROR or NLMSG_DONE, or None."""
        body = self.body.ljust(S32.size + U32.size, b'\0')
        code = min(-S32.unpack_from(body)[0], _MAX_ERRNO)
        if code == 0:
            return None
        reason = os.strerror(code)
        if self.kind == NLMSG_ERROR and self.flags & _NLM_F_ACK_TLVS:
            # The attributes follow a copy of the request, or of its header.
            request = (HEADER.size if self.flags & _NLM_F_CAPPED
                       else U32.unpack_from(body, S32.size)[0])
            explanation = read_text(attributes(
                body, S32.size + (request + 3 & ~3)).get(_NLMSGERR_ATTR_MSG))
            if explanation:
                reason += ' (%s)' % explanation
        return OSError(code, reason)


def dump_pause(tries: int) -> float:
    """Return the seconds to wait before the next attempt.

    :param tries: number of the interrupted attempt, from 0
    """
    return random.uniform(0, min(DUMP_PAUSE, DUMP_PAUSE_FIRST * 2 ** tries))


def messages(data: bytes) -> Iterator[Received]:
    """Iterate over the messages of a datagram."""
    start = 0
    while start + HEADER.size <= len(data):
        length, kind, flags, sequence, _ = HEADER.unpack_from(data, start)
        if length < HEADER.size:
            return  # malformed; the loop would not end
        yield Received(kind, flags, sequence,
                       data[start + HEADER.size:start + length])
        start += length + 3 & ~3


def attribute(kind: int, payload: bytes) -> bytes:
    """Pack an attribute."""
    length = _ATTRIBUTE.size + len(payload)
    return _ATTRIBUTE.pack(length, kind) + payload + bytes(-length % 4)


def nested(kind: int, payload: bytes) -> bytes:
    """Pack an attribute that contains attributes, with its flag."""
    return attribute(_NESTED | kind, payload)


def number(kind: int, value: int) -> bytes:
    """Pack an attribute with a 32-bit number."""
    return attribute(kind, U32.pack(value))


def text(kind: int, value: str) -> bytes:
    """Pack an attribute with a text."""
    return attribute(kind, os.fsencode(value) + b'\0')


def attributes(data: bytes, start: int = 0) -> dict[int, bytes]:
    """Parse attributes; if a type occurs twice, return the last attribute.

    This function takes less than half of the time of :func:`parse_list`.
    """
    values, end = {}, len(data) - _ATTRIBUTE.size
    while start <= end:
        length, kind = _ATTRIBUTE.unpack_from(data, start)
        if length < _ATTRIBUTE.size:
            break  # malformed; the loop would not end
        values[kind & _KIND] = data[start + 4:start + length]
        start += length + 3 & ~3
    return values


def parse_list(data: bytes) -> Iterator[tuple[int, bytes]]:
    """Iterate over attributes, of which several may have the same type."""
    start = 0
    while start + _ATTRIBUTE.size <= len(data):
        length, kind = _ATTRIBUTE.unpack_from(data, start)
        if length < _ATTRIBUTE.size:
            return  # malformed; the loop would not end
        yield kind & _KIND, data[start + 4:start + length]
        start += length + 3 & ~3


def read_number(packed: Optional[bytes]) -> Optional[int]:
    return int(U32.unpack(packed)[0]) if packed else None


def read_text(packed: Optional[bytes]) -> Optional[str]:
    # A name may contain any bytes, and os.fsencode() must restore them.
    return None if packed is None else os.fsdecode(packed.rstrip(b'\0'))


@contextlib.contextmanager
def tolerate_errors(*numbers: int) -> Iterator[None]:
    """Suppress a KernelRefused with one of the given values of errno."""
    try:
        yield
    except exceptions.KernelRefused as err:
        if err.errno not in numbers:
            raise


class Socket:
    """A context manager that closes its socket."""

    _socket: socket.socket

    def __enter__(self: _T) -> _T:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def close(self) -> None:
        self._socket.close()


class RequestSocket(Socket):
    """A socket for requests in the namespace of the calling thread.

    Use it as a context manager. Its methods raise KernelRefused.

    :param timeout: seconds to wait for an answer
    :param most: maximum messages to read in a dump, for a table whose size
        another user controls; None for no limit
    :cvar advice: the remedy in the text of errors
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
            # Accept only answers from the kernel. In the namespace of a pod,
            # the pod could send answers too (netlink_getsockbyportid).
            self._socket.connect((0, 0))
        except OSError as err:
            raise self._failed('open a netlink socket', err) from err
        for option in self.options:
            self._set_option(option)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO,
                                struct.pack('@ll', self._timeout, 0))

    def _set_option(self, option: int, value: int = 1) -> None:
        with contextlib.suppress(OSError):
            self._socket.setsockopt(SOL_NETLINK, option, value)

    def _order(self, action: str, *messages: Message, acknowledged: int = -1,
               advice: str = '') -> None:
        """Send requests in one datagram; raise the first error.

        :param acknowledged: see :meth:`_send`
        """
        try:
            for err in self._send(messages, acknowledged, True).values():
                raise err
        except OSError as err:
            raise self._failed(action, err, advice) from err

    def _send(self, messages: Sequence[Message], acknowledged: int = -1,
              atomic: bool = False) -> dict[int, OSError]:
        """Send messages in one datagram; return errors by message position.

        The kernel answers each message that it refuses, and the one message
        with NLM_F_ACK. If every message had NLM_F_ACK, the kernel would take
        twice as long.

        :param acknowledged: position of the message with NLM_F_ACK, counted
            from the end
        :param atomic: whether the kernel undoes all messages after an error,
            so that this method returns at the first error
        """
        sent = list(messages)
        asked = sent[acknowledged]
        sent[acknowledged] = asked._replace(flags=asked.flags | NLM_F_ACK)
        first = self._sequence + 1
        self._sequence += len(sent)
        self._socket.send(b''.join(
            message.packed(sequence)
            for sequence, message in enumerate(sent, first)))
        refused: dict[int, OSError] = {}
        for answer in self._answers(first):
            if answer.kind != NLMSG_ERROR:
                continue
            place = answer.sequence - first
            err = answer.error()
            if err is not None:
                refused[place] = err
            if place - len(sent) == acknowledged or (atomic and refused):
                break
        return refused

    def _ask(self, action: str, message: Message,
             read: Callable[[Received], Optional[_T]]
             ) -> tuple[list[_T], bool]:
        """Send a request and parse its answer.

        :param read: parses a message of the answer; returns None to skip it
        :returns: the parsed messages, and False if the table changed during
            the dump, so that the caller has to repeat the dump
        """
        replies: list[_T] = []
        count, is_whole = 0, True
        self._sequence += 1
        try:
            self._socket.send(message.packed(self._sequence))
            for answer in self._answers(self._sequence):
                if answer.flags & NLM_F_DUMP_INTR:
                    is_whole = False
                if answer.kind in (NLMSG_ERROR, NLMSG_DONE):
                    err = answer.error()
                    if err is not None:
                        raise err
                    break
                if count == self._most:
                    # Open a new socket, because the next request on the old
                    # socket would receive the rest of this answer.
                    self._socket.close()
                    self._open()
                    return replies, True
                count += 1
                each = read(answer)
                if each is not None:
                    replies.append(each)
                if not message.flags & NLM_F_DUMP:
                    break  # a request without NLM_F_DUMP has one answer
        except OSError as err:
            raise self._failed(action, err) from err
        return replies, is_whole

    def _dump(self, action: str, message: Message,
              read: Callable[[Received], Optional[_T]],
              merges: bool = False) -> list[_T]:
        """Dump a table; repeat the dump if the table changed meanwhile.

        :param merges: whether to return the union of the dumps if the table
            changed during each dump. After a deletion, the kernel may skip an
            item of a dump, but rarely the same item in several dumps
        :raises KernelRefused: with EINTR, if the table changed during each
            dump and ``merges`` is False
        """
        request = message._replace(flags=message.flags | NLM_F_DUMP)
        merged: dict[_T, None] = {}
        for number in range(
                FEW_TRIES if self._most or merges else DUMP_TRIES):
            replies, is_whole = self._ask(action, request, read)
            if is_whole:
                return replies
            if merges:
                merged.update(dict.fromkeys(replies))
            elif self._most is None:  # a pod must not cause pauses
                time.sleep(dump_pause(number))
        if merges:
            return list(merged)
        raise self._failed(action, OSError(
            errno.EINTR, 'the table changed during each read'))

    def _answers(self, first: int) -> Iterator[Received]:
        """Iterate over the answers to the latest requests.

        The iterator does not detect the last answer, so the caller stops it.

        :param first: sequence number of the first of these requests. The
            iterator skips answers to earlier requests
        """
        while True:
            for answer in messages(self._socket.recv(_RECEIVED)):
                if first <= answer.sequence <= self._sequence:
                    yield answer

    def _failed(self, action: str, err: OSError,
                advice: str = '') -> exceptions.KernelRefused:
        return exceptions.KernelRefused(action, err.strerror or str(err),
                                        err.errno or 0, advice or self.advice)
