# SPDX-License-Identifier: Apache-2.0

"""Start kuryr-break0 and kuryr-daemon from processes with their modules.

A start of Python imports hundreds of modules, which took most of the processor
time of the tests. A server of each program imports the modules once, and forks
for each start. The new process has the arguments, environment, directory,
files and namespaces that a child of the caller would have. The process is a
child of the server, though: use the object that :func:`start` returns to
signal the process and to wait for its end.

Other programs, prefixed commands, and commands with other PYTHON variables
start normally. A test of the start itself uses ``subprocess``.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import gc
import importlib
import json
import os
import pkgutil
import select
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from typing import Any, BinaryIO, Callable, Mapping, Optional, Sequence, Union

BIN = os.path.dirname(sys.executable)
BREAK0 = os.path.join(BIN, 'kuryr-break0')
DAEMON = os.path.join(BIN, 'kuryr-daemon')

_NAMESPACES = ('net', 'mnt')
_libc = ctypes.CDLL(None, use_errno=True)
#: The path of the server's socket, by program.
_servers: dict[str, str] = {}

Output = Union[None, int, BinaryIO]


class Process:
    """A process started by a server, with an interface like Popen's."""

    def __init__(self, args: Sequence[str], server: socket.socket) -> None:
        self.args = args
        self.returncode: Optional[int] = None
        self._server = server
        self.pid = int(server.recv(100))

    def poll(self) -> Optional[int]:
        """Return the exit code, or None while the process runs."""
        if self.returncode is None and select.select(
                [self._server], [], [], 0)[0]:
            return self.wait()
        return self.returncode

    def wait(self, timeout: Optional[float] = None) -> int:
        """Wait for the end of the process; return its exit code.

        :param timeout: in seconds; None waits forever
        :returns: the negative number of the signal if a signal killed the
            process
        """
        if self.returncode is None:
            if not select.select([self._server], [], [], timeout)[0]:
                assert timeout is not None
                raise subprocess.TimeoutExpired(self.args, timeout)
            status = self._server.recv(100)
            assert status, 'the server of %s has ended' % self.args[0]
            self.returncode = os.waitstatus_to_exitcode(int(status))
            self._server.close()
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)


def start(args: Sequence[str], *, stdin: Output = subprocess.DEVNULL,
          stdout: Output = None, stderr: Output = None,
          env: Optional[Mapping[str, str]] = None,
          cwd: Optional[str] = None
          ) -> Union[Process, subprocess.Popen[bytes]]:
    """Start a program; the parameters are the same as Popen's."""
    if not _is_served(args, env):
        return subprocess.Popen(args, stdin=stdin, stdout=stdout,
                                stderr=stderr, env=env, cwd=cwd)
    files: list[Any] = []
    try:
        for given, number in ((stdin, 0), (stdout, 1), (stderr, 2)):
            if given == subprocess.DEVNULL:
                files.append(open(os.devnull, 'r+b', buffering=0))
            elif given == subprocess.STDOUT:
                files.append(os.fdopen(os.dup(files[1].fileno()), 'wb'))
            else:
                files.append(os.fdopen(os.dup(
                    number if given is None else given
                    if isinstance(given, int) else given.fileno()), 'wb'))
        files += [open('/proc/thread-self/ns/' + kind, 'rb')
                  for kind in _NAMESPACES]
        server = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        server.connect(_address(args[0]))
        socket.send_fds(server, [json.dumps({
            'args': list(args), 'cwd': cwd or os.getcwd(),
            'env': dict(os.environ if env is None else env)}).encode()],
            [file.fileno() for file in files])
    finally:
        for file in files:
            file.close()
    return Process(args, server)


def run(args: Sequence[str], *, input: Union[None, str, bytes] = None,
        stdout: Output = None, stderr: Output = None, text: bool = False,
        check: bool = False, timeout: Optional[float] = None,
        env: Optional[Mapping[str, str]] = None, cwd: Optional[str] = None
        ) -> subprocess.CompletedProcess[Any]:
    """Run a program to its end, as subprocess.run does."""
    if not _is_served(args, env):
        return subprocess.run(
            args, input=input, stdout=stdout, stderr=stderr, text=text,
            check=check, timeout=timeout, env=env, cwd=cwd)
    with contextlib.ExitStack() as stack:
        def file() -> BinaryIO:
            return stack.enter_context(tempfile.TemporaryFile())

        stdin = file()
        stdin.write(input.encode() if isinstance(input, str)
                    else input or b'')
        stdin.seek(0)
        files = {name: file() for name, given in (
            ('stdout', stdout), ('stderr', stderr))
            if given == subprocess.PIPE}
        process = start(args, stdin=stdin, stdout=files.get('stdout', stdout),
                        stderr=files.get('stderr', stderr), env=env, cwd=cwd)
        try:
            code = process.wait(timeout)
        finally:
            process.kill()
        output: dict[str, Any] = {}
        for name, each in files.items():
            each.seek(0)
            data = each.read()
            output[name] = data.decode() if text else data
    done: Any = subprocess.CompletedProcess(args, code, **output)
    if check:
        done.check_returncode()
    return done


def _is_served(args: Sequence[str], env: Optional[Mapping[str, str]]) -> bool:
    return args[0] in (BREAK0, DAEMON) and all(
        value == os.environ.get(name) for name, value in (env or {}).items()
        if name.startswith('PYTHON'))


def of_script(path: str) -> list[str]:
    """Return the command in a script that cni-install wrote.

    :returns: the path itself for any other program
    """
    with open(path, 'rb') as file:
        lines = file.read(10000).split(b'\n')
    if lines[0] != b'#!/bin/sh':
        return [path]
    command = shlex.split(lines[-2].decode())
    # A server exists only for the Python of the tests.
    if command[:4] != ['exec', sys.executable, '-m', 'kuryr_break0']:
        return [path]
    return [BREAK0, *command[4:]]


def serve(program: str) -> None:
    """Start the server of a program; the server ends with this process.

    Processes that are forked from this process use the same server.
    """
    directory = tempfile.mkdtemp(prefix='program-')
    path = os.path.join(directory, 'socket')
    server = subprocess.Popen(
        [sys.executable, __file__, program, path],
        stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    _servers[program] = path
    atexit.register(_end, server, directory, os.getpid())


def _address(program: str) -> str:
    if program not in _servers:
        serve(program)
    # The server creates its socket after it has imported the program.
    ends = time.monotonic() + 300
    while not os.path.exists(_servers[program]):
        assert time.monotonic() < ends, 'no server of ' + program
        time.sleep(0.02)
    return _servers[program]


def _end(server: subprocess.Popen[bytes], directory: str, owner: int) -> None:
    if os.getpid() == owner:  # a forked process does not own the server
        server.kill()
        server.wait()
        shutil.rmtree(directory, ignore_errors=True)


def _imported(program: str) -> Callable[[], Any]:
    """Import the modules of a program, and return its entry point."""
    if program == DAEMON:
        from kuryr_kubernetes.cmd import daemon
        import setproctitle

        # Make the first call now: it finds the memory of the process title by
        # the environment, which the server replaces later.
        setproctitle.getproctitle()
        return daemon.start  # type: ignore[no-any-return]
    import kuryr_break0
    for module in pkgutil.walk_packages(kuryr_break0.__path__,
                                        'kuryr_break0.'):
        # The commands run without Kuryr.
        if not module.name.startswith('kuryr_break0.kuryr'):
            importlib.import_module(module.name)
    from kuryr_break0 import __main__
    return __main__.main


def _serve(program: str, path: str) -> None:
    parent = os.getppid()
    # If Python starts a program, the first entry is the program's directory.
    sys.path[0] = os.path.dirname(program)
    main = _imported(program)
    # Exclude all objects from garbage collection: a collection writes to each
    # object, so the forked processes would copy all pages.
    gc.collect()
    gc.freeze()
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as server:
        server.bind(path + '.new')
        server.listen(100)
        os.rename(path + '.new', path)
        server.settimeout(1)
        while os.getppid() == parent:
            with contextlib.suppress(socket.timeout):
                client = server.accept()[0]
                if not os.fork():
                    break
                client.close()
            with contextlib.suppress(ChildProcessError):
                while os.waitpid(-1, os.WNOHANG)[0]:
                    pass
        else:
            return
    data, files, _, _ = socket.recv_fds(client, 2 ** 20, 5)
    pid = os.fork()
    if pid:
        for file in files:
            os.close(file)
        client.send(b'%d' % pid)
        client.send(b'%d' % os.waitpid(pid, 0)[1])
        os._exit(0)
    client.close()
    for file in files[3:]:
        assert _libc.setns(file, 0) == 0, os.strerror(ctypes.get_errno())
    for number, name in enumerate(('stdin', 'stdout', 'stderr')):
        os.dup2(files[number], number)
        # The stream of the server refers to the server's file.
        stream = getattr(sys, name)
        setattr(sys, name, open(
            number, stream.mode, encoding=stream.encoding,
            errors=stream.errors, closefd=False,
            buffering=1 if name == 'stderr' else -1))
    for file in files:
        os.close(file)
    wanted = json.loads(data)
    os.chdir(wanted['cwd'])
    os.environ.clear()
    os.environ.update(wanted['env'])
    sys.argv = wanted['args']
    try:
        sys.exit(main())
    except SystemExit as end:
        if isinstance(end.code, str) or threading.active_count() > 1:
            raise
        # Python's usual exit would free all modules, and so copy their memory.
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(end.code or 0)


if __name__ == '__main__':
    _serve(*sys.argv[1:])
