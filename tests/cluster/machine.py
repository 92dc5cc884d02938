# SPDX-License-Identifier: Apache-2.0

"""Machines of the cluster: namespaces with a disk, and programs in them."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import time
from typing import Any, Callable, Optional, Sequence, Union

import psutil

from tests.support import lab

#: Directories on a machine's own disk. Their files survive a reboot, and are
#: on no other machine.
DISK = ('/etc', '/opt', '/var/lib')

#: The script of the first process of a machine, which reaps orphans.
#: With rshared, mounts that containers request propagate as on a host.
_BOOT = r'''
set -e
disk=$1; shift
mount --make-rprivate /
for each; do
    upper=$disk$each
    mkdir -p "$upper/data" "$upper/work"
    layers=lowerdir=$each,upperdir=$upper/data,workdir=$upper/work
    mount -t overlay -o "$layers" overlay "$each"
done
# An overlay cannot be below the overlays of containerd.
for each in /var/lib/containerd /var/lib/kubelet /var/log; do
    mkdir -p "$disk/plain$each" "$each"
    mount --bind "$disk/plain$each" "$each"
done
mount -t tmpfs run /run
mkdir /run/netns /run/lock
[ -L /var/run ] || mount --bind /run /var/run
mount --make-rshared /
ip link set lo up
touch /run/booted
sleep infinity & wait
'''


class Program:
    """A program of a machine that can start, be killed and start again.

    :param is_ready: returns whether the program serves
    :param is_family: whether to kill the program's children too; containerd's
        children are containers, which outlive containerd
    :ivar log: the file with the output of all runs
    """

    def __init__(self, machine: Machine, name: str,
                 command: Sequence[str], *,
                 environ: Optional[dict[str, str]] = None,
                 is_ready: Callable[[], Any] = lambda: True,
                 is_family: bool = False) -> None:
        self.machine = machine
        self.name = name
        self.command = list(command)
        self.environ = environ or {}
        self.log = os.path.join(machine.logs,
                                '%s-%s.log' % (machine.name, name))
        self._is_ready = is_ready
        self._is_family = is_family
        self._process: Optional[subprocess.Popen[bytes]] = None

    def start(self, wait: bool = True) -> None:
        """Start the program.

        :param wait: whether to wait until the program serves
        :raises AssertionError: with the end of the log, if the program ends
            before
        """
        assert self._process is None, self.name + ' is running'
        with open(self.log, 'ab') as log:
            self._process = self.machine.popen(
                self.command, environ=self.environ, stdin=subprocess.DEVNULL,
                stdout=log, stderr=log)
        if wait:
            self.wait_ready()

    def wait_ready(self) -> None:
        """Wait until the program serves."""
        process = self._process
        assert process is not None
        lab.until(lambda: self._is_ready() or process.poll() is not None,
                  self.tail)
        assert process.poll() is None, '%s on %s ended with %s:\n%s' % (
            self.name, self.machine.name, process.returncode, self.tail())

    def is_running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def kill(self, number: int = signal.SIGKILL) -> None:
        """End the program with a signal, then SIGKILL if it still runs."""
        process, self._process = self._process, None
        if process is None:
            return
        entered = psutil.Process(process.pid)
        with contextlib.suppress(psutil.NoSuchProcess):
            # nsenter waits for the program, and both have the same process
            # group.
            main = entered.children()
            family = (entered.children(recursive=True) if self._is_family
                      else main)
            for each in main if number != signal.SIGKILL else family:
                each.send_signal(number)
            _, living = psutil.wait_procs(family, 20)
            for each in living:
                each.kill()
            psutil.wait_procs(living, 20)
        process.wait()

    def terminate(self) -> None:
        self.kill(signal.SIGTERM)

    def restart(self, away: float = 0) -> None:
        """Kill the program, and start it again.

        :param away: seconds between the end and the start
        """
        self.kill()
        time.sleep(away)
        self.start()

    def forget(self) -> None:
        """Reap the process after the machine has ended."""
        if self._process is not None:
            self._process.wait()
            self._process = None

    def tail(self, lines: int = 15) -> str:
        """Return the path and the last lines of the log."""
        with contextlib.suppress(FileNotFoundError), open(
                self.log, errors='replace') as file:
            return '%s:\n%s' % (self.log, ''.join(
                line[:300] + '\n' for line in
                file.read().splitlines()[-lines:]))
        return self.log


class Machine:
    """The namespaces of a machine, and a disk.

    :param directory: the directory of the disks and logs of all machines
    :param is_on_lan: True shares the network of the lab, which is the LAN;
        False gives the machine a network of its own
    """

    def __init__(self, name: str, directory: str,
                 is_on_lan: bool = False) -> None:
        self.name = name
        self._spaces = ['--mount', '--pid', '--uts', '--ipc'] + (
            [] if is_on_lan else ['--net'])
        self.disk = os.path.join(directory, 'disks', name)
        self.logs = os.path.join(directory, 'logs')
        os.makedirs(self.disk, exist_ok=True)
        os.makedirs(self.logs, exist_ok=True)
        self.programs: list[Program] = []
        self._init: Optional[subprocess.Popen[bytes]] = None
        #: The process ID of the first process.
        self.pid = 0

    def boot(self) -> None:
        """Create the namespaces, and start no program."""
        # When the first process of the lab ends, the kernel kills this
        # process, because it is in the lab's process namespace.
        with open(os.path.join(self.logs, self.name + '.log'), 'ab') as log:
            self._init = subprocess.Popen(
                ['unshare', *self._spaces, '--fork', '--kill-child',
                 '--mount-proc', 'sh', '-c', _BOOT, self.name, self.disk,
                 *DISK], stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        children = '/proc/%d/task/%d/children' % (2 * (self._init.pid,))
        init = self._init

        def is_booted() -> bool:
            assert init.poll() is None, (
                '%s does not boot: see %s' % (self.name, self.logs))
            with open(children) as file:
                self.pid = int(file.read() or 0)
            return bool(self.pid) and os.path.exists(
                '/proc/%d/root/run/booted' % self.pid)

        lab.until(is_booted)
        self.run('hostname', self.name)

    def halt(self) -> None:
        """Kill all processes at once, like a loss of power."""
        if self._init is None:
            return
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)
        self._init.wait()
        self._init = None
        for each in self.programs:
            each.forget()

    def add(self, name: str, command: Sequence[str],
            **options: Any) -> Program:
        """Return a new program without starting it; see Program."""
        self.programs.append(Program(self, name, command, **options))
        return self.programs[-1]

    def program(self, name: str) -> Program:
        return next(each for each in self.programs if each.name == name)

    def path(self, path: str) -> str:
        """Return the lab's path of a file of the machine."""
        return '/proc/%d/root%s' % (self.pid, path)

    def write(self, path: str, content: Union[str, bytes],
              mode: int = 0o644) -> None:
        """Write a file of the machine, and create its directories."""
        self.run('mkdir', '-p', os.path.dirname(path))
        data = content.encode() if isinstance(content, str) else content
        with open(self.path(path), 'wb') as file:
            os.fchmod(file.fileno(), mode)
            file.write(data)

    def copy(self, source: str, path: str) -> None:
        """Copy a file of the lab into the machine, with its mode."""
        with open(source, 'rb') as file:
            self.write(path, file.read(), os.stat(source).st_mode & 0o777)

    def _entered(self, command: Sequence[str]) -> list[str]:
        return ['nsenter', '--target', str(self.pid), *self._spaces, *command]

    def popen(self, command: Sequence[str], *,
              environ: Optional[dict[str, str]] = None,
              **options: Any) -> subprocess.Popen[Any]:
        """Start a command in the machine, in the root directory."""
        # Kuryr's client would prefer the certificates of these variables to
        # kuryr.conf's, and would use their proxies for requests to the API.
        env = {name: value for name, value in os.environ.items()
               if not re.search('(?i)ca_bundle|ssl_cert|proxy', name)}
        env.update(environ or {})
        return subprocess.Popen(
            self._entered(command), env=env, cwd='/', start_new_session=True,
            **options)

    def run(self, *command: str, check: bool = True,
            environ: Optional[dict[str, str]] = None,
            input: Optional[str] = None
            ) -> subprocess.CompletedProcess[str]:
        """Run a command in the machine, and wait for its end."""
        process = self.popen(
            command, environ=environ, text=True,
            stdin=subprocess.DEVNULL if input is None else subprocess.PIPE,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        output = process.communicate(input)[0]
        assert not (check and process.returncode), (
            '%s: %s: exit %d\n%s' % (self.name, ' '.join(command),
                                     process.returncode, output))
        return subprocess.CompletedProcess(
            command, process.returncode, output)

    def ip(self, *args: str) -> list[Any]:
        """Return the parsed output of ``ip -json``."""
        text = self.run('ip', '-json', '-details', *args).stdout
        return [each for each in json.loads(text or '[]') if each]

    def ping(self, address: str) -> bool:
        return self.run('ping', '-n', '-q', '-c', '1', '-W', '1', address,
                        check=False).returncode == 0
