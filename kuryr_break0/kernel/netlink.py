# SPDX-License-Identifier: Apache-2.0

"""Netlink: the framing of messages, and sockets for requests and events.

The formats are those of linux/netlink.h. A message of a pod takes pyroute2
more than ten times as long.
"""

from __future__ import annotations

import contextlib
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
_NLMSGERR_ATTR_MSG, _MAX_ERRNO = 1, 4095

SOL_NETLINK = 270  # linux/socket.h
NETLINK_ROUTE, NETLINK_NETFILTER = 0, 12
# Absent in older kernels, which costs time only
_NETLINK_CAP_ACK, _NETLINK_EXT_ACK = 10, 11
NETLINK_GET_STRICT_CHK = 12

_SO_RCVBUFFORCE = 33  # asm-generic/socket.h

_RECEIVED = 2 ** 17  # bytes; a dump fills at most 32 KiB at once
#: Seconds after which an answer is lost. The kernel answers while the
#: request is being sent, so only a fault can make it as long.
_TIMEOUT = 10
#: An interrupted dump is repeated this often. Each try meets about as many
#: changes as the last, so what counts is their number, not their distance.
DUMP_TRIES, FEW_TRIES = 20, 3
#: Seconds between two tries at most: of the first two, and of any. What
#: interrupts one is often over then, as the deletion of an interface.
DUMP_PAUSE_FIRST, DUMP_PAUSE = 0.001, 0.05
#: Datagrams of events that are read at once, and bytes of each.
_AT_ONCE, _DATAGRAM = 256, 2 ** 16
#: Bytes of events that a socket holds until they are read: some 10,000. The
#: usual 208 KiB hold 250, and a break0 that is deleted has two per address.
_HELD = 2 ** 23

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


class Received(NamedTuple):
    """A message that was received."""

    kind: int
    flags: int
    sequence: int
    body: bytes

    def error(self) -> Optional[OSError]:
        """Return the error in an NLMSG_ERROR or NLMSG_DONE; None for none."""
        body = self.body.ljust(S32.size + U32.size, b'\0')
        code = min(-S32.unpack_from(body)[0], _MAX_ERRNO)
        if code == 0:
            return None
        reason = os.strerror(code)
        if self.kind == NLMSG_ERROR and self.flags & _NLM_F_ACK_TLVS:
            # They stand behind the request, or its header.
            request = (HEADER.size if self.flags & _NLM_F_CAPPED
                       else U32.unpack_from(body, S32.size)[0])
            explanation = read_text(attributes(
                body, S32.size + (request + 3 & ~3)).get(_NLMSGERR_ATTR_MSG))
            if explanation:
                reason += ' (%s)' % explanation
        return OSError(code, reason)


def dump_pause(tries: int) -> float:
    """Return the seconds to wait after so many interrupted dumps, from 0."""
    return random.uniform(0, min(DUMP_PAUSE, DUMP_PAUSE_FIRST * 2 ** tries))


def messages(data: bytes) -> Iterator[Received]:
    """Iterate over the messages of what was received at once."""
    start = 0
    while start + HEADER.size <= len(data):
        length, kind, flags, sequence, _ = HEADER.unpack_from(data, start)
        if length < HEADER.size:
            return  # or it would not end
        yield Received(kind, flags, sequence,
                       data[start + HEADER.size:start + length])
        start += length + 3 & ~3


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


def attributes(data: bytes, start: int = 0) -> dict[int, bytes]:
    """Read attributes by their kind.

    As of :func:`listed`, at less than half of the time that takes.
    """
    found, end = {}, len(data) - _ATTRIBUTE.size
    while start <= end:
        length, kind = _ATTRIBUTE.unpack_from(data, start)
        if length < _ATTRIBUTE.size:
            break  # or it would not end
        found[kind & _KIND] = data[start + 4:start + length]
        start += length + 3 & ~3
    return found


def listed(data: bytes, start: int = 0) -> Iterator[tuple[int, bytes]]:
    """Iterate over attributes, of which several may be of one kind."""
    while start + _ATTRIBUTE.size <= len(data):
        length, kind = _ATTRIBUTE.unpack_from(data, start)
        if length < _ATTRIBUTE.size:
            return  # or it would not end
        yield kind & _KIND, data[start + 4:start + length]
        start += length + 3 & ~3


def read_number(packed: Optional[bytes]) -> Optional[int]:
    return int(U32.unpack(packed)[0]) if packed else None


def read_text(packed: Optional[bytes]) -> Optional[str]:
    # Names are bytes to the kernel, and must go back to it unchanged.
    return None if packed is None else os.fsdecode(packed.rstrip(b'\0'))


@contextlib.contextmanager
def tolerated(*numbers: int) -> Iterator[None]:
    """Go on behind the block if the kernel refuses with one of some errors."""
    try:
        yield
    except exceptions.KernelRefused as err:
        if err.errno not in numbers:
            raise


class _Socket:
    """A context manager that closes its socket."""

    _socket: socket.socket

    def __enter__(self: _T) -> _T:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def close(self) -> None:
        self._socket.close()


class RequestSocket(_Socket):
    """A socket in the namespace of the calling thread, for requests.

    To be used as a context manager. Its methods raise KernelRefused.

    :param timeout: seconds to wait for an answer
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
            # The kernel alone may answer. In a pod's namespace, the pod could
            # (netlink_getsockbyportid).
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
        """Have the kernel do what makes sense as a whole only.

        :param acknowledged: as for :meth:`_send`
        """
        try:
            for err in self._send(messages, acknowledged, True).values():
                raise err
        except OSError as err:
            raise self._failed(action, err, advice) from err

    def _send(self, messages: Sequence[Message], acknowledged: int = -1,
              atomic: bool = False) -> dict[int, OSError]:
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
        """Ask the kernel a question.

        :param read: reads a message of the answer; None for nothing
        :returns: what was read, and whether it is of one moment
        """
        found: list[_T] = []
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
                    # It would be answered with the rest of this.
                    self._socket.close()
                    self._open()
                    return found, True
                count += 1
                each = read(answer)
                if each is not None:
                    found.append(each)
                if not message.flags & NLM_F_DUMP:
                    break  # that is all
        except OSError as err:
            raise self._failed(action, err) from err
        return found, is_whole

    def _dump(self, action: str, message: Message,
              read: Callable[[Received], Optional[_T]],
              merges: bool = False) -> list[_T]:
        """List what the kernel has of a kind; again if it changed meanwhile.

        :param merges: return what was in one of a few lists, if it changed
            each time. The kernel may pass over an item when one before it is
            deleted, and each time that is another one
        :raises KernelRefused: with EINTR, if it changed each time
        """
        request = message._replace(flags=message.flags | NLM_F_DUMP)
        merged: dict[_T, None] = {}
        for number in range(
                FEW_TRIES if self._most or merges else DUMP_TRIES):
            found, is_whole = self._ask(action, request, read)
            if is_whole:
                return found
            if merges:
                merged.update(dict.fromkeys(found))
            elif self._most is None:  # or a pod would choose for how long
                time.sleep(dump_pause(number))
        if merges:
            return list(merged)
        raise self._failed(action, OSError(
            errno.EINTR, 'it changed each time that it was read'))

    def _answers(self, first: int) -> Iterator[Received]:
        """Iterate without end over the answers to requests from a number on.

        Others are what is left of an earlier request.
        """
        while True:
            for answer in messages(self._socket.recv(_RECEIVED)):
                if first <= answer.sequence <= self._sequence:
                    yield answer

    def _failed(self, action: str, err: OSError,
                advice: str = '') -> exceptions.KernelRefused:
        return exceptions.KernelRefused(action, err.strerror or str(err),
                                        err.errno or 0, advice or self.advice)


class EventSocket(_Socket):
    """A socket that receives events in the namespace of the calling thread.

    :param groups: multicast groups, as bits
    :param options: to be set before it is bound
    """

    _overrun = False

    def __init__(self, protocol: int, groups: int, *options: int) -> None:
        self._groups = groups
        self._options = options
        self._protocol = protocol
        self._socket = self._opened()

    def _opened(self) -> socket.socket:
        made = socket.socket(
            socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_NONBLOCK,
            self._protocol)
        try:
            # Not as root of a user namespace
            with contextlib.suppress(PermissionError):
                made.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, _HELD)
            for option in self._options:
                made.setsockopt(SOL_NETLINK, option, 1)
            made.bind((0, self._groups))
        except OSError:
            made.close()
            raise
        return made

    def fileno(self) -> int:
        """For select(2): readable when there is something to read."""
        return self._socket.fileno()

    def _drop(self) -> None:
        """Drop what has come and was not read: to read it would take longer.

        The socket is replaced by a new one, which has the same descriptor.
        """
        with contextlib.suppress(OSError), self._opened() as new:
            os.dup2(new.fileno(), self._socket.fileno(), inheritable=False)
            self._overrun = False

    def _received(self, most: int = _AT_ONCE) -> Iterator[tuple[bytes, Any]]:
        """Iterate over the datagrams that have come, with ancillary data.

        An empty one stands for some that were lost, as by ENOBUFS. From then
        on the kernel drops what comes until all that it has kept was read,
        and does not say so again (netlink_overrun), so another one follows.
        """
        for _ in range(most):
            try:
                data, extra, flags, _ = self._socket.recvmsg(
                    _DATAGRAM, socket.CMSG_SPACE(U32.size))
            except BlockingIOError:
                if self._overrun:
                    self._overrun = False
                    yield b'', ()
                return
            except OSError:
                self._overrun = True
                yield b'', ()
            else:
                # What was cut off could be read as something else.
                yield b'' if flags & socket.MSG_TRUNC else data, extra
