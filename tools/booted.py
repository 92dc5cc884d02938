#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0

"""The program that tools/boot runs in a Debian that it has booted.

The program needs only Python's standard library. Two containers of
systemd-nspawn, of which one is the node's name server, and one container of
Docker start at boot. The first boot starts the agent as documented, creates
the container of Docker, and pings the containers. The second boot examines the
node. The printed number of failed checks covers both boots.
"""

from __future__ import annotations

import contextlib
import glob
import json
import os
import re
import signal
import socket
import statistics
import struct
import subprocess
import sys
import threading
import time
from typing import Any, Callable

AGENT = 'kuryr-break0-agent'
NAME_SERVER, WEB, ENGINE = '100.75.30.53', '100.75.30.54', '100.75.30.55'
MACHINES = {'nameserver': NAME_SERVER, 'web': WEB}
IPV6 = 'fd00:75:30::54'
NAME, ANSWER = 'name.example.org', '192.0.2.1'
REACHED = '/run/reached.json'
#: File with the failed checks of the first boot, one in each line. If it
#: exists, this is the second boot.
FIRST_BOOT = '/var/first-boot'
#: Seconds within which a container has to be reachable after its start, on a
#: machine without emulation.
BOUND = 2.0

#: The script that each container runs as its first process.
PAYLOAD = '''\
trap 'exit 0' TERM
ip address add $1/24 dev mv-eth0
[ -z "$2" ] || ip address add $2/64 dev mv-eth0
ip link set mv-eth0 up
echo configured
[ ! -e /booted ] || /usr/bin/python3 /booted answer &
while :; do sleep 1000 & wait $!; done
'''

FILES = {
    '/etc/hostname': 'node\n',
    '/etc/hosts': '127.0.0.1 localhost\n127.0.1.1 node\n',
    '/etc/resolv.conf': 'nameserver %s\n' % NAME_SERVER,
    '/etc/systemd/network/eth0.network':
        '[Match]\nName=eth0\n[Network]\nAddress=100.75.30.2/24\n'
        'Address=fd00:75:30::2/64\nGateway=100.75.30.1\n'
        'LinkLocalAddressing=ipv6\nIPv6AcceptRA=no\n',
    # systemd-nspawn(1) recommends BindsTo: a macvlan cannot be created before
    # its NIC exists.
    '/etc/systemd/system/systemd-nspawn@.service.d/nic.conf':
        '[Unit]\nBindsTo=sys-subsystem-net-devices-eth0.device\n'
        'After=sys-subsystem-net-devices-eth0.device\n',
    # Both units run this file.
    '/etc/systemd/system/reach.service':
        '[Service]\nExecStart=%(here)s reach\n'
        '[Install]\nWantedBy=multi-user.target\n',
    '/etc/systemd/system/booted.service':
        '[Service]\nExecStart=%(here)s examine\n'
        '[Install]\nWantedBy=multi-user.target\n',
}


def run(*command: str, fails: bool = False) -> str:
    """Return the output of a command, including its errors."""
    done = subprocess.run(command, text=True, stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL)
    if done.returncode and not fails:
        raise Exception('%s: %d: %s' % (
            ' '.join(command), done.returncode, done.stdout))
    return done.stdout.strip()


def until(condition: Callable[[], Any], seconds: float = 300) -> bool:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.2)
    return True


def install() -> None:
    """Create the files and containers of the node."""
    here = os.path.abspath(__file__)
    for path, text in FILES.items():
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, 'w') as file:
            file.write(text % {'here': here})
    os.makedirs('/var/log/journal', exist_ok=True)  # survives the reboot
    os.makedirs('/etc/systemd/nspawn', exist_ok=True)
    for name, address in MACHINES.items():
        root = '/var/lib/machines/' + name
        for each in ('bin', 'dev', 'etc', 'proc', 'run', 'sys', 'tmp', 'usr'):
            os.makedirs('%s/%s' % (root, each))
        for each in ('lib', 'lib64'):
            os.symlink('usr/' + each, '%s/%s' % (root, each))
        run('cp', '/bin/busybox', root + '/bin')
        run('chroot', root, '/bin/busybox', '--install', '/bin')
        with open(root + '/payload', 'w') as file:
            file.write(PAYLOAD)
        with open('/etc/systemd/nspawn/%s.nspawn' % name, 'w') as file:
            file.write('[Exec]\nBoot=no\nParameters=/bin/sh /payload %s %s\n'
                       '[Network]\nVirtualEthernet=no\nMACVLAN=eth0\n'
                       % (address, IPV6 if name == 'web' else ''))
            if name == 'nameserver':
                file.write('[Files]\nBindReadOnly=/usr\n'
                           'BindReadOnly=%s:/booted\n' % here)
    # The doctor recommends these files on a node with systemd-networkd.
    run('cp', '-r', os.path.dirname(here) + '/../etc/systemd/networkd.conf.d',
        os.path.dirname(here) + '/../etc/systemd/network', '/etc/systemd')
    run('systemctl', 'enable', 'systemd-networkd', 'reach', 'booted',
        'machines.target', *map('systemd-nspawn@{}'.format, MACHINES))


def work() -> float:
    """Return the seconds that a start of Python takes, with imports."""
    began = time.monotonic()
    subprocess.run([sys.executable, '-c', 'import asyncio, email.mime.text, '
                    'http.server, unittest, xmlrpc.client'], check=True)
    return time.monotonic() - began


def speed() -> float:
    """Return the seconds that work() takes on an idle machine."""
    return min(work() for _ in range(10))


def answer() -> None:
    """Answer DNS queries for any name with one IPv4 address."""
    wire = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    wire.bind(('', 53))
    while True:
        query, sender = wire.recvfrom(512)
        end = query.index(0, 12) + 5
        is_ipv4 = query[end - 4:end] == b'\0\1\0\1'
        reply = query[:2] + struct.pack('!HHHHH', 0x8180, 1, is_ipv4, 0, 0) + (
            query[12:end])
        if is_ipv4:
            reply += struct.pack('!HHHIH', 0xc00c, 1, 1, 60, 4) + (
                socket.inet_aton(ANSWER))
        wire.sendto(reply, sender)


def reach() -> None:
    """Ping each container until it answers, and record the time.

    Also record the mean duration of work() up to this time. The duration shows
    the load of the boot.
    """
    reached: dict[str, tuple[float, float]] = {}
    took = [work()]
    wires = {}
    for address in (*MACHINES.values(), ENGINE):
        wires[address] = socket.socket(
            socket.AF_INET, socket.SOCK_RAW | socket.SOCK_NONBLOCK,
            socket.IPPROTO_ICMP)

    def measure() -> None:
        while wires:
            took.append(work())

    threading.Thread(target=measure).start()
    message = struct.pack('!BBHHH', 8, 0, 0xffff - 0x0800 - 1 - 1, 1, 1)
    while wires:
        for address, wire in list(wires.items()):
            with contextlib.suppress(OSError):
                wire.connect((address, 0))  # receive from this address only
                wire.send(message)
        time.sleep(0.05)
        for address, wire in list(wires.items()):
            with contextlib.suppress(OSError):
                if wire.recv(2048)[20] == 0:  # echo reply
                    reached[address] = (time.monotonic(),
                                        statistics.mean(took))
                    del wires[address]
                    with open(REACHED + '.new', 'w') as file:
                        json.dump(reached, file)
                    os.rename(file.name, REACHED)


def reached() -> dict[str, tuple[float, float]]:
    try:
        with open(REACHED) as file:
            return json.load(file)
    except OSError:
        return {}


def pings(address: str) -> bool:
    return ' 0% packet loss' in run('ping', '-c', '1', '-W', '5', address,
                                    fails=True)


def property_of(unit: str, name: str) -> str:
    return run('systemctl', 'show', '--value', '-p', name, unit)


def started(unit: str) -> float:
    return int(property_of(unit, 'ActiveEnterTimestampMonotonic')) / 1e6


def routes() -> str:
    return run('ip', '-4', 'route', 'show', 'dev', 'break0', fails=True)


def journal(*arguments: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in run(
        'journalctl', '--output=json', '--quiet', *arguments).splitlines()]


def mark() -> str:
    """Return journalctl's option for the entries after this call."""
    return '--after-cursor=' + run(
        'journalctl', '-n', '1', '--show-cursor').rpartition(' ')[2]


def wrong(*arguments: str) -> list[str]:
    """Return the warnings and errors of the agent's unit in the journal."""
    return [line['MESSAGE'] for line in journal('-u', AGENT, *arguments)
            if int(line['PRIORITY']) <= 4 or re.search(
                r' (WARNING|ERROR|CRITICAL) |Traceback|Errno|[Ff]ailed',
                str(line['MESSAGE']))]


class Examination:

    def __init__(self) -> None:
        self._wire = open('/dev/ttyS1', 'w', buffering=1)
        self._failed: list[str] = []
        if os.path.exists(FIRST_BOOT):
            with open(FIRST_BOOT) as file:
                self._failed = file.read().splitlines()

    def say(self, text: str) -> None:
        print(text, file=self._wire)

    def check(self, what: str, is_right: Any, seen: Any = '') -> None:
        self.say('%s  %s' % ('ok    ' if is_right else 'FAILED', what))
        if not is_right:
            self._failed.append(what)
            self.say(str(seen))

    def nothing_wrong(self, when: str, *arguments: str) -> None:
        found = wrong(*arguments)
        self.check('The journal of the agent has no warning or error %s'
                   % when, not found, '\n'.join(found))

    def reboot(self) -> None:
        """Store the failed checks for the second boot, and reboot."""
        with open(FIRST_BOOT, 'w') as file:
            file.write('\n'.join(self._failed))
        run('systemctl', 'reboot')

    def conclude(self) -> None:
        if self._failed:
            self.say(run('journalctl', '-u', AGENT, '-o', 'short-monotonic'))
        for each in self._failed:
            self.say('FAILED  ' + each)
        self.say('Failed: %d' % len(self._failed))

    def first_boot(self) -> None:
        """Start the agent as documented, and a container of Docker."""
        run('systemctl', 'enable', '--now', AGENT)
        self.check('The node reaches the containers that ran before the agent',
                   until(lambda: all(map(pings, MACHINES.values()))))
        image = subprocess.run(
            'tar -cC /var/lib/machines/web bin payload tmp |'
            ' docker import - payload', shell=True, check=False,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        self.say(image.stdout.strip())
        run('docker', 'network', 'create', '--driver', 'macvlan', '--opt',
            'parent=eth0', '--subnet', '100.75.30.0/24', '--gateway',
            '100.75.30.1', 'lan')
        run('docker', 'run', '--detach', '--name', 'engine', '--restart',
            'unless-stopped', '--network', 'lan', '--ip', ENGINE, 'payload',
            '/bin/sh', '/payload')
        self.check('The node reaches the container of Docker',
                   until(lambda: pings(ENGINE)))

    def after_reboot(self) -> None:
        self.times()
        self.order()
        self.check('The name server in a container answers the node',
                   ANSWER in run('getent', 'hosts', NAME, fails=True),
                   run('getent', 'hosts', NAME, fails=True))
        self.check('The node reaches the IPv6 address of a container',
                   until(lambda: pings(IPV6)))
        self.check('No unit has failed', not run(
            'systemctl', 'list-units', '--failed', '--no-legend'),
            run('systemctl', 'list-units', '--failed'))
        # systemd-analyze would look for the manual page, and this Debian lacks
        # man.
        verified = run('systemd-analyze', 'verify', '--man=no',
                       AGENT + '.service', fails=True)
        self.check('systemd-analyze verify accepts the unit', not verified,
                   verified)
        self.nothing_wrong('after the reboot', '-b')
        self.shutdown()
        for command in ('status', 'doctor'):
            self.command(command)
        self.confined()
        self.stop_and_start()
        self.repairs()
        self.gone()

    def command(self, name: str) -> None:
        done = subprocess.run(['kuryr-break0', name], text=True,
                              stdout=subprocess.PIPE,
                              stderr=subprocess.STDOUT)
        self.check('kuryr-break0 %s finds no fault' % name,
                   not done.returncode)
        self.say(done.stdout)

    def times(self) -> None:
        with open('/proc/cmdline') as file:
            machine = float(re.findall(r'machine_speed=(\S+)', file.read())[0])
        until(lambda: len(reached()) == 3)
        begin = {address: started('systemd-nspawn@' + name)
                 for name, address in MACHINES.items()}
        line, = [line for line in journal(
            '-b', '-u', 'docker') if 'Loading containers: start' in line[
                'MESSAGE']][:1] or [{'__MONOTONIC_TIMESTAMP': 0}]
        self.say('Docker started to load containers at %.1f s'
                 % (int(line['__MONOTONIC_TIMESTAMP']) / 1e6))
        wall = run('docker', 'inspect', '-f', '{{.State.StartedAt}}',
                   'engine')
        begin[ENGINE] = float(run('date', '-d', wall, '+%s.%N')) - (
            time.time() - time.monotonic())
        self.say('The agent was started at %.1f s, and listened for events '
                 'at %.1f s' % (started(AGENT), self.said_at('Watching ')))
        for address, (at, took) in reached().items():
            later, ratio = at - begin[address], took / machine
            self.say('%s: the container started at %.1f s, and was reached '
                     '%.1f s later. A start of Python took %.1f times as '
                     'long as without emulation. Corrected by this factor: '
                     '%.2f s'
                     % (address, begin[address], later, ratio, later / ratio))
            self.check('The node reaches %s within %.1f s (corrected)'
                       % (address, BOUND), later / ratio <= BOUND)
        self.say(run('systemd-analyze', 'critical-chain',
                     AGENT + '.service', fails=True))
        self.say(run('systemd-analyze', fails=True))

    def said_at(self, text: str) -> float:
        return min(int(line['__MONOTONIC_TIMESTAMP']) / 1e6
                   for line in journal('-b', '-u', AGENT)
                   if text in line['MESSAGE'])

    def order(self) -> None:
        self.say('After=%s' % property_of(AGENT, 'After'))
        self.say('Before=%s' % property_of(AGENT, 'Before'))
        self.check('The unit of the agent waits for no name server and no '
                   'other machine',
                   not {'network-online.target', 'nss-lookup.target'}
                   & set(property_of(AGENT, 'After').split()))

    def shutdown(self) -> None:
        self.nothing_wrong('before the reboot', '-b', '-1')
        lines = [line['MESSAGE'] for line in journal('-b', '-1', '-u', AGENT)]
        self.check('The agent ended cleanly at the shutdown', any(
            'The agent ends' in line for line in lines)
            and 'Deactivated successfully' in ''.join(lines[-2:] + lines[-4:]),
            '\n'.join(lines[-8:]))

    def confined(self) -> None:
        """Run commands with the rights of the agent's unit."""
        with open('/etc/systemd/system/%s.service' % AGENT) as file:
            unit = file.read()
        drop_in, = glob.glob('/etc/systemd/system/%s.service.d/*' % AGENT)
        os.makedirs('/run/systemd/system/confined.service.d')
        run('cp', drop_in, '/run/systemd/system/confined.service.d')
        for command in ('sync', 'doctor'):
            with open('/run/systemd/system/confined.service', 'w') as file:
                # systemd refuses Restart settings of a oneshot service.
                file.write(re.sub(r'(?m)^Restart.*', '', unit) + (
                    '[Service]\nType=oneshot\nExecStart=\n'
                    'ExecStart=kuryr-break0 %s\n' % command))
            since = mark()
            run('systemctl', 'daemon-reload')
            failed = run('systemctl', 'start', 'confined', fails=True)
            self.check('kuryr-break0 %s succeeds with the rights of the '
                       'unit' % command, not failed, failed)
            self.say('\n'.join(
                str(line['MESSAGE'])
                for line in journal('-u', 'confined', since)))

    def stop_and_start(self) -> None:
        everybody = (*MACHINES.values(), ENGINE, IPV6)
        since = mark()
        run('systemctl', 'stop', AGENT)
        self.check('systemctl stop ends the agent',
                   property_of(AGENT, 'Result') == 'success'
                   and not int(property_of(AGENT, 'MainPID')))
        self.check('The node reaches all containers without the agent',
                   all(map(pings, everybody)))
        for number, verb in enumerate(('start', 'restart')):
            run('systemctl', verb, AGENT)
            self.check('The agent runs after systemctl ' + verb, until(
                lambda: sum('Watching' in line['MESSAGE'] for line
                            in journal('-u', AGENT, since)) > number))
        run('systemctl', 'reload', AGENT)
        self.check('The agent reloads its configuration', until(lambda: any(
            'Read the configuration' in line['MESSAGE']
            for line in journal('-u', AGENT, since))))
        self.nothing_wrong('after stop, restart and reload', since)
        before = property_of(AGENT, 'MainPID')
        os.kill(int(before), signal.SIGKILL)
        self.check('systemd restarts the agent after SIGKILL', until(
            lambda: property_of(AGENT, 'MainPID') not in (before, '0')))
        self.check('The node reaches all containers after SIGKILL',
                   all(map(pings, everybody)))

    def repairs(self) -> None:
        since = mark()
        run('ip', 'link', 'delete', 'break0')
        self.check('The agent restores a deleted break0 and its routes', until(
            lambda: all(map(pings, (*MACHINES.values(), ENGINE, IPV6)))))
        run('nft', 'flush', 'ruleset')
        self.check('The agent restores a deleted guard', until(
            lambda: 'break0' in run('nft', 'list', 'tables')))
        self.command('doctor')
        self.say('\n'.join(wrong(since)))

    def gone(self) -> None:
        """End containers while the agent runs, and while it is stopped."""
        since = mark()
        run('docker', 'stop', 'engine')
        self.check('The agent unbinds a container that ends', until(
            lambda: ENGINE not in routes()), routes())
        run('systemctl', 'stop', AGENT)
        run('systemctl', 'stop', 'systemd-nspawn@web')
        run('docker', 'start', 'engine')
        run('systemctl', 'start', AGENT)
        self.check('The agent unbinds a container that ended while the agent '
                   'was stopped', until(lambda: WEB not in routes()), routes())
        self.check('The agent binds a container that started while the agent '
                   'was stopped', until(lambda: pings(ENGINE)), routes())
        self.nothing_wrong('after containers ended', since)


def examine() -> None:
    examination = Examination()
    try:
        state = run('systemctl', 'is-system-running', '--wait', fails=True)
        examination.say('%s: %s; %s' % (os.uname().release, state, run(
            'systemctl', '--version').splitlines()[0]))
        if os.path.exists(FIRST_BOOT):
            examination.after_reboot()
        else:
            examination.first_boot()
            examination.reboot()
            return
    except Exception as err:
        examination.check('The checks ran to the end', False, repr(err))
    examination.conclude()
    run('systemctl', 'poweroff')


if __name__ == '__main__':
    print({'install': install, 'speed': speed, 'reach': reach,
           'examine': examine, 'answer': answer}[sys.argv[1]]() or '')
