# SPDX-License-Identifier: Apache-2.0

"""A common interface for running containers by each engine."""

from __future__ import annotations

import abc
import os
import secrets
import shutil
import subprocess
import tarfile
from typing import Callable

from tests.engines import base
from tests.support import images
from tests.support import lab

#: Path of the daemon in Debian's incus, from release 13 on
INCUSD = '/usr/libexec/incus/incusd'


def address(number: int) -> str:
    return '100.75.30.%d' % (200 + number)


def address6(number: int) -> str:
    return 'fd00:30::%d' % (200 + number)


class Runner(abc.ABC):
    """An engine with containers on a macvlan of eth0 in bridge mode."""

    #: Name of a container's interface
    ifname = 'eth0'

    def __init__(self, test: base.EngineTestCase) -> None:
        self.test = test

    @abc.abstractmethod
    def version(self) -> str:
        """Return the engine's release."""

    @abc.abstractmethod
    def run(self, name: str, number: int, mac: str) -> None:
        """Start a new or stopped container that sleeps.

        The container has its addresses on return.
        """

    @abc.abstractmethod
    def stop(self, name: str) -> None:
        """Stop a container gracefully."""

    @abc.abstractmethod
    def kill(self, name: str) -> None:
        """Kill a container."""

    @abc.abstractmethod
    def inside(self, name: str) -> Callable[..., bool]:
        """Return a function that runs a command in a container.

        The function returns whether the command succeeds.
        """

    def output(self, *command: str) -> str:
        return self.test.lab.run(*command).stdout.strip()


class Docker(Runner):

    def __init__(self, test: base.EngineTestCase) -> None:
        super().__init__(test)
        self.engine: base.Engine = self.start()
        self.engine('network', 'create', '--driver', 'macvlan', '--ipv6',
                    '--subnet', '100.75.30.0/24', '--gateway', lab.LAN,
                    '--subnet', 'fd00:30::/64', '--opt', 'parent=eth0', 'lan')

    def start(self) -> base.Engine:
        return base.Docker(self.test)

    def version(self) -> str:
        return 'Docker ' + self.engine(
            'version', '--format', '{{.Server.Version}}').partition('+')[0]

    def run(self, name: str, number: int, mac: str) -> None:
        assert isinstance(self.engine, base.Docker)
        self.engine('rm', '--force', name, check=False)
        self.engine.run_with_mac(name, mac, address(number),
                                 address6(number))

    def stop(self, name: str) -> None:
        self.engine('stop', '--time', '0', name)

    def kill(self, name: str) -> None:
        self.engine('kill', name)

    def inside(self, name: str) -> Callable[..., bool]:
        return self.engine.inside(name)


class Podman(Docker):

    def start(self) -> base.Engine:
        podman = base.Podman(self.test, 'netavark')
        # Serve the API, like podman.socket.
        self.test.start('env', *map('='.join, podman.environ.items()),
                        *podman.command, 'system', 'service', '--time', '0',
                        'unix:///run/podman/podman.sock')
        return podman

    def version(self) -> str:
        return 'Podman %s with %s' % (
            self.engine('--version').split()[-1],
            self.output('/usr/lib/podman/netavark', '--version'))

    def run(self, name: str, number: int, mac: str) -> None:
        self.engine('rm', '--force', '--time', '0', name, check=False)
        self.engine.run(name, '--network', 'lan', '--mac-address', mac,
                        '--ip', address(number), '--ip6', address6(number))


class LXC(Runner):

    def __init__(self, test: base.EngineTestCase) -> None:
        super().__init__(test)
        # Like a current host, mount cgroup2 without hierarchies of version 1.
        # If /sys is read-only, nspawn assumes that no udev runs.
        for kind, path in (('sysfs', '/sys'), ('cgroup2', '/sys/fs/cgroup')):
            test.lab.run('mount', '-t', kind, *(
                ('-o', 'ro') if kind == 'sysfs' else ()), kind, path)
            test.addCleanup(test.lab.run, 'umount', '--lazy', path)
        self.names: dict[str, str] = {}
        test.addCleanup(lambda: list(map(self.kill, self.names)))

    def name(self, name: str) -> str:
        """Return the container's name, unique among labs of this machine."""
        return self.names.setdefault(
            name, 'break0-lab-%s-%s' % (name, secrets.token_hex(3)))

    def rootfs(self, name: str) -> str:
        """Create the container's root directory, and return the path."""
        path = '/run/machines/' + self.name(name)
        if not os.path.isdir(path):
            shutil.copytree(images.rootfs('/run'), path, symlinks=True)
            for each in ('dev', 'etc', 'proc', 'sys', 'usr'):
                os.mkdir('%s/%s' % (path, each))
        return path

    def version(self) -> str:
        return 'LXC ' + self.output('lxc-start', '--version')

    def lxc(self, command: str, name: str, *args: str) -> list[str]:
        return ['lxc-' + command, '--lxcpath=/run/lxc',
                '--name=' + self.name(name), *args]

    def run(self, name: str, number: int, mac: str) -> None:
        os.makedirs('/run/lxc/' + self.name(name), exist_ok=True)
        with open('/run/lxc/%s/config' % self.name(name), 'w') as file:
            file.write('''
lxc.uts.name = %s
lxc.rootfs.path = dir:%s
lxc.init.cmd = /bin/sleep 1000
lxc.apparmor.profile = unconfined
lxc.net.0.type = macvlan
lxc.net.0.macvlan.mode = bridge
lxc.net.0.link = eth0
lxc.net.0.name = eth0
lxc.net.0.flags = up
lxc.net.0.hwaddr = %s
lxc.net.0.ipv4.address = %s/24
lxc.net.0.ipv6.address = %s/64
''' % (name, self.rootfs(name), mac, address(number), address6(number)))
        self.output(*self.lxc('start', name, '--logfile=/run/lxc.log',
                              '--logpriority=INFO'))

    def stop(self, name: str) -> None:
        # The container's init ignores the stop signal: LXC kills it after the
        # timeout.
        self.output(*self.lxc('stop', name, '--timeout=1'))

    def kill(self, name: str) -> None:
        self.test.lab.run(*self.lxc('stop', name, '--kill'), check=False)

    def inside(self, name: str) -> Callable[..., bool]:
        def run(command: str, *args: str) -> bool:
            return self.test.lab.run(*self.lxc(
                'attach', name, '--', '/bin/' + command, *args),
                check=False).returncode == 0

        return run


class Nspawn(LXC):

    ifname = 'mv-eth0'
    #: Shell script that enters the control group $1, like a unit of systemd,
    #: and runs a command
    _IN_UNIT = 'mkdir -p "$1"; echo $$ >"$1/cgroup.procs"; shift; exec "$@"'
    _INIT = '''ip link set mv-eth0 address %s
        until ip link set mv-eth0 up; do sleep 0.05; done
        ip address add %s/24 dev mv-eth0
        ip address add %s/64 dev mv-eth0
        echo >/configured
        exec sleep 1000'''

    def __init__(self, test: base.EngineTestCase) -> None:
        super().__init__(test)
        self.processes: dict[str, subprocess.Popen[bytes]] = {}

    def version(self) -> str:
        return 'systemd-nspawn ' + self.output(
            'systemd-nspawn', '--version').split()[1]

    def run(self, name: str, number: int, mac: str) -> None:
        configured = self.rootfs(name) + '/configured'
        if os.path.exists(configured):
            os.remove(configured)
        with open('/run/nspawn.log', 'ab') as log:
            self.processes[name] = subprocess.Popen(
                ['sh', '-c', self._IN_UNIT, 'unit',
                 '/sys/fs/cgroup/break0-lab/machine-%s.scope'
                 % self.name(name).replace('-', '\\x2d'), 'systemd-nspawn',
                 '--directory=' + self.rootfs(name),
                 '--machine=' + self.name(name), '--register=no',
                 '--keep-unit', '--network-macvlan=eth0', '--as-pid2',
                 'sh', '-c', self._INIT % (mac, address(number),
                                           address6(number))],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        self.test.until(lambda: os.path.exists(configured))

    def stop(self, name: str) -> None:
        self.processes[name].terminate()
        self.processes[name].wait()

    def leader(self, name: str) -> str:
        """Return the pid of a container's first process."""
        pid = self.processes[name].pid
        with open('/proc/%d/task/%d/children' % (pid, pid)) as file:
            return file.read().split()[0]

    def kill(self, name: str) -> None:
        # Kill the container's init: a killed nspawn leaves mounts that prevent
        # the next start.
        if self.processes[name].poll() is None:
            os.kill(int(self.leader(name)), 9)
            self.processes[name].wait()

    def inside(self, name: str) -> Callable[..., bool]:
        leader = self.leader(name)

        def run(command: str, *args: str) -> bool:
            return self.test.lab.run(
                'nsenter', '--target', leader, '--mount', '--net', '--root',
                '/bin/' + command, *args, check=False).returncode == 0

        return run


class Incus(LXC):

    def __init__(self, test: base.EngineTestCase) -> None:
        super().__init__(test)
        os.environ.update(INCUS_DIR='/run/incus', INCUS_CONF='/run',
                          INCUS_SOCKET='/run/incus/unix.socket')
        os.mkdir('/run/incus')
        test.start(INCUSD, '--group', 'root')
        self.output('incus', 'admin', 'waitready', '--timeout', '60')
        rootfs = self.rootfs('image')
        del self.names['image']
        os.mkdir(rootfs + '/sbin')
        with open(rootfs + '/sbin/init', 'w') as file:
            os.fchmod(file.fileno(), 0o755)
            file.write('#!/bin/sh\nexec sleep 1000\n')
        with open('/run/metadata.yaml', 'w') as file:
            file.write('architecture: %s\ncreation_date: 1\n'
                       % os.uname().machine)
        with tarfile.open('/run/incus.tar', 'w') as archive:
            archive.add('/run/metadata.yaml', 'metadata.yaml')
            archive.add(rootfs, 'rootfs')
        for command in ('storage create default dir',
                        'image import /run/incus.tar --alias box'):
            self.output('incus', *command.split())

    def version(self) -> str:
        return 'Incus ' + self.output(INCUSD, '--version')

    def run(self, name: str, number: int, mac: str) -> None:
        known = name in self.names
        name = self.name(name)
        if not known:
            self.output('incus', 'init', 'box', name, '--storage', 'default',
                        '--config', 'security.privileged=true')
            self.output('incus', 'config', 'device', 'add', name, 'eth0',
                        'nic', 'nictype=macvlan', 'parent=eth0', 'name=eth0')
        self.output('incus', 'config', 'device', 'set', name, 'eth0',
                    'hwaddr=' + mac)
        self.output('incus', 'start', name)
        self.output('incus', 'exec', name, '--', 'sh', '-c',
                    'ip address add %s/24 dev eth0; '
                    'ip address add %s/64 dev eth0'
                    % (address(number), address6(number)))

    def stop(self, name: str) -> None:
        self.test.lab.run('incus', 'stop', self.name(name), '--timeout', '1',
                          check=False)
        self.kill(name)

    def kill(self, name: str) -> None:
        self.test.lab.run('incus', 'stop', '--force', self.name(name),
                          check=False)

    def inside(self, name: str) -> Callable[..., bool]:
        def run(*command: str) -> bool:
            return self.test.lab.run(
                'incus', 'exec', self.name(name), '--', *command,
                check=False).returncode == 0

        return run
