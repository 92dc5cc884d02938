# SPDX-License-Identifier: Apache-2.0

"""Answers CNI requests on a socket, for the shim in kuryr_break0/cni."""

from __future__ import annotations

import contextlib
import os
import select
import socket
import struct
import threading
import time
from typing import Iterator, Optional

from kuryr_break0.cni import plugin
from kuryr_break0.cni import request
from kuryr_break0 import config
from kuryr_break0 import log

LOG = log.get_logger(__name__)

NAME = 'cni.sock'
#: Number of requests that are answered concurrently. Each request needs the
#: lock of the ledger, so more threads would only wait for the lock.
_WORKERS = 4
_BACKLOG = 512
#: Seconds without data after which a client is disconnected, and the maximum
#: size of a request in bytes.
_TIMEOUT = 3
_LIMIT = request.LIMIT + 2 ** 18
_CREDENTIALS = struct.Struct('3i')  # struct ucred of socket(7)
#: Maximum length of a path in bytes: sun_path of unix(7), minus the suffix
#: that :func:`_bind_socket` appends.
_ROOM = 108 - len('.4194304') - 1


class CNIServer:
    """Server of CNI requests on ``cni.sock`` in the state directory.

    All threads start before the first request, because starting a thread
    later can fail (pids.max, RLIMIT_AS). The threads also keep their nftables
    sockets: the kernel needs 12 ms to close such a socket.
    """

    def __init__(self) -> None:
        self._options: Optional[config.Options] = None
        self._socket: Optional[socket.socket] = None
        self._path = ''
        self._inode = 0
        self._error = ''  # the error that was logged last
        self._threads: list[threading.Thread] = []
        #: held by the thread that waits in accept(2)
        self._accept_lock = threading.Lock()

    def listen(self, options: config.Options) -> None:
        """Make sure that requests are served in the state directory.

        Recreate the socket if its file was deleted or replaced, and replace
        the threads that have ended. Log each error once.
        """
        self._options = options
        path = os.path.join(options.state_dir, NAME)
        if path != self._path or not self._has_socket():
            self._close_socket()
            self._path = path
            try:
                with _shorten_path(path) as short:
                    self._socket = _bind_socket(short)
                self._inode = os.stat(path).st_ino
            except OSError as err:
                self._log_error('%s: %s' % (path, err.strerror and (
                    err.strerror + '. Set [break0] state_dir to another '
                    'directory.') or err))
                return
            self._threads = []  # earlier threads end with their socket
            LOG.info('Serving CNI requests on %s', path)
        if self.is_complete:
            return
        self._threads = [each for each in self._threads if each.is_alive()]
        try:
            while len(self._threads) < _WORKERS:
                thread = threading.Thread(
                    target=self._run, args=(self._socket,), name='cni')
                thread.start()
                self._threads.append(thread)
        except RuntimeError as err:
            self._log_error('%s: %d of %d threads are running. Raise the '
                            'limits of the agent for processes and memory.' % (
                                err, len(self._threads), _WORKERS))
            return
        self._error = ''

    @property
    def is_complete(self) -> bool:
        """Return whether the socket is open and all threads are running."""
        return self._socket is not None and sum(
            each.is_alive() for each in self._threads) == _WORKERS

    def describe_failure(self) -> Optional[str]:
        """Return the reason why requests are not served, or None."""
        if self._has_socket() and any(
                each.is_alive() for each in list(self._threads)):
            return None
        return 'CNI requests are not served: %s' % (
            self._error or 'the socket was deleted or its threads have ended')

    def describe_hang(self) -> Optional[str]:
        """Return the reason why the agent should be restarted, or None.

        If threads cannot be started, a restart may help. If this process
        cannot bind the socket, a new process cannot bind it either.
        """
        return self.describe_failure() if self._has_socket() else None

    def _log_error(self, text: str) -> None:
        if self._error != text:
            self._error = text
            LOG.error('CNI requests cannot be served: %s', text)

    def close(self) -> None:
        """Stop accepting requests, and wait until all are answered."""
        self._close_socket()
        for thread in self._threads:
            thread.join()

    def _has_socket(self) -> bool:
        """Return whether the path still leads to the socket of this agent."""
        try:
            return self._socket is not None and (
                os.stat(self._path).st_ino == self._inode)
        except OSError:
            return False

    def _close_socket(self) -> None:
        if self._socket is None:
            return
        if self._has_socket():
            with contextlib.suppress(OSError):
                os.unlink(self._path)
        # Each thread compares this attribute after accept(2), and ends if it
        # has changed.
        listening, self._socket = self._socket, None
        # close(2) does not wake a thread in accept(2); shutdown(2) does.
        with contextlib.suppress(OSError):
            listening.shutdown(socket.SHUT_RDWR)
        listening.close()

    def _run(self, listening: socket.socket) -> None:
        while self._socket is listening:
            with self._accept_lock:
                try:
                    client, _ = listening.accept()
                except Exception as err:  # an error must not end the thread
                    if self._socket is listening:
                        LOG.warning(
                            'Cannot accept a CNI request: %s. Retrying in 1 '
                            'second. If this line recurs, raise the limits of '
                            'the agent for open files and memory.', err)
                        time.sleep(1)
                    continue
            self._serve_client(client)

    def _serve_client(self, client: socket.socket) -> None:
        with client:
            try:
                self._answer_request(client)
            except Exception as err:  # an error must not end the thread
                LOG.warning('A CNI request was not answered: %s. If a pod '
                            'does not start, see the log of the container '
                            'runtime.', err)

    def _answer_request(self, client: socket.socket) -> None:
        client.settimeout(_TIMEOUT)
        _, user, _ = _CREDENTIALS.unpack(client.getsockopt(
            socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size))
        if user != os.geteuid():
            LOG.warning('Refused a CNI request of user %d. Run the container '
                        'runtime as user %d, like the agent.', user,
                        os.geteuid())
            return
        data = bytearray()
        while len(data) <= _LIMIT:
            some = client.recv(2 ** 16)
            if not some:
                break
            data += some
        if not data:
            return  # another agent, which tests whether this agent listens
        environment, body = _parse(bytes(data))
        options = self._options
        assert options is not None  # listen() sets them
        answer = plugin.answer(environment, body, lambda: options)
        output = answer.output.encode()
        try:
            if _is_closed(client):
                raise BrokenPipeError
            client.sendall(b'%d %d\n' % (answer.status, len(output)) + output)
        except OSError:
            # For the runtime, the ADD has failed. The DEL of the runtime may
            # have ended before the ADD was completed, so undo the ADD.
            if answer.undo is not None:
                LOG.warning(
                    'Undoing the ADD of %s for %s: the runtime closed the '
                    'connection before the answer. If this line recurs, '
                    'raise the timeout of the runtime.',
                    environment['CNI_IFNAME'], _describe_pod(environment))
                answer.undo()


def _bind_socket(path: str) -> socket.socket:
    """Listen at a path for this user only; replace an existing file.

    :raises OSError: if the socket cannot be bound, or another agent listens
        there
    """
    with socket.socket(socket.AF_UNIX) as other:
        other.settimeout(1)
        with contextlib.suppress(FileNotFoundError, ConnectionRefusedError):
            other.connect(path)
            raise OSError('another agent listens there. Stop one of them: '
                          'a node needs one.')
    listening = socket.socket(socket.AF_UNIX)
    # bind(2) applies the umask, so other users could connect until chmod(2).
    # Until then, the socket has a temporary name.
    new = '%s.%d' % (path, os.getpid())
    try:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(new)
        listening.bind(new)
        os.chmod(new, 0o600)
        listening.listen(_BACKLOG)
        os.replace(new, path)
    except OSError:
        listening.close()
        with contextlib.suppress(OSError):
            os.unlink(new)
        raise
    return listening


@contextlib.contextmanager
def _shorten_path(path: str) -> Iterator[str]:
    """Yield a path of the same file that is short enough for a socket.

    The path is valid inside the ``with`` block.
    """
    if len(os.fsencode(path)) <= _ROOM:
        yield path
        return
    directory, name = os.path.split(path)
    fd = os.open(directory, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield '/proc/self/fd/%d/%s' % (fd, name)
    finally:
        os.close(fd)


def _parse(data: bytes) -> tuple[dict[str, str], bytes]:
    """Split a request into environment variables and standard input.

    :raises ValueError: if the request is too large or incomplete
    """
    variables, end, body = data.partition(b'\0\0')
    if data.startswith(b'\0'):  # no variables
        variables, end, body = b'', b'\0', data[1:]
    if not end or len(data) > _LIMIT:
        raise ValueError('it is incomplete, or larger than %d bytes' % _LIMIT)
    environment = {}
    for each in variables.split(b'\0'):
        name, _, value = each.decode(errors='replace').partition('=')
        environment[name] = value
    return environment, body


def _describe_pod(environment: dict[str, str]) -> str:
    """Return the namespace and name of a pod, or the id of its container."""
    arguments = {}
    for each in environment.get('CNI_ARGS', '').split(';'):
        name, _, value = each.partition('=')
        arguments[name] = value
    if arguments.get('K8S_POD_NAME'):
        return 'pod %s/%s' % (arguments.get('K8S_POD_NAMESPACE', ''),
                              arguments['K8S_POD_NAME'])
    return 'container ' + environment['CNI_CONTAINERID']


def _is_closed(client: socket.socket) -> bool:
    """Return whether a client has closed the connection.

    If a client has shut down only its sending side, it still waits for the
    answer, and the result is False.
    """
    poll = select.poll()
    poll.register(client, 0)
    return any(events & (select.POLLHUP | select.POLLERR)
               for _, events in poll.poll(0))
