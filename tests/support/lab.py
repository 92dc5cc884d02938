# SPDX-License-Identifier: Apache-2.0

"""A node in network and mount namespaces, for tests, demo and benchmark.

The calling process becomes the node. Its network namespace gets a NIC,
``eth0``, whose peer is in the namespace ``lan``; each pod gets another
namespace. The kernel removes all namespaces when the process ends, even by
SIGKILL, and the machine itself stays unchanged. ``tools/in-lab`` starts a
process with the necessary rights, for any user.

The lab reads the kernel's state with ``ip -json``, because the library under
test could hide its own faults.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import ipaddress
import json
import os
import random
import select
import socket
import struct
import subprocess
import threading
import time
from typing import Any, Callable, Iterator, Optional, Sequence

from kuryr_break0 import kernel
from tests.support import program

CLONE_NEWNS = 0x00020000
CLONE_NEWNET = 0x40000000
ETH_P_ALL = 3
SOL_PACKET = 263
PACKET_STATISTICS = 6
TUNSETIFF = 0x400454ca
IFF_TAP = 0x0002
IFF_NO_PI = 0x1000
MS_REC = 0x4000
MS_PRIVATE = 1 << 18

NODE = '100.75.30.51'
LAN = '100.75.30.1'
PREFIX = 24
NODE6 = 'fd00:30::51'
LAN6 = 'fd00:30::1'
#: A second subnet on the same link; the LAN host is its gateway.
OTHER_LAN = '100.75.40.1'
OTHER_LAN6 = 'fd00:40::1'
PARENT = 'eth0'
#: Seconds before until() raises an error. The limit is high because other
#: processes can occupy most of the machine.
PATIENCE = int(os.environ.get('PATIENCE', 120))

_libc = ctypes.CDLL(None, use_errno=True)


def _call(name: str, *args: Any) -> None:
    if getattr(_libc, name)(*args) != 0:
        error = ctypes.get_errno()
        raise OSError(error, '%s: %s. Run it under tools/in-lab.' %
                      (name, os.strerror(error)))


def until(condition: Callable[[], Any],
          log: Callable[[], str] = str) -> float:
    """Wait until a condition holds; return the duration in seconds.

    :param log: returns text for the error if the condition never holds
    :raises AssertionError: after PATIENCE seconds
    """
    began = time.monotonic()
    while not condition():
        passed = time.monotonic() - began
        assert passed < PATIENCE, 'not within %d s\n%s' % (PATIENCE, log())
        # Many tests poll at once, and polling slows down the awaited program.
        # The interval therefore grows with the time that has passed.
        time.sleep(min(0.01 + passed / 20, 0.2))
    return time.monotonic() - began


class Frame:
    """An Ethernet frame."""

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.dst, self.src = (data[start:start + 6].hex(':')
                              for start in (0, 6))
        self.answers: Optional[str] = None
        self.asks: Optional[str] = None
        kind, payload = data[12:14], data[14:]
        if kind == b'\x08\x06':  # ARP
            operation, = struct.unpack_from('!H', payload, 6)
            if operation == 2:
                self.answers = str(ipaddress.IPv4Address(payload[14:18]))
            else:
                self.asks = str(ipaddress.IPv4Address(payload[24:28]))
        elif kind == b'\x86\xdd' and payload[6] == 58:  # ICMPv6
            if payload[40] == 136:  # neighbour advertisement
                self.answers = str(ipaddress.IPv6Address(payload[48:64]))
            elif payload[40] == 135:  # neighbour solicitation
                self.asks = str(ipaddress.IPv6Address(payload[48:64]))

    def __repr__(self) -> str:
        return self.data.hex(' ')


class VM:
    """A virtual machine: a program that has opened a macvtap.

    A thread forwards frames between the macvtap's character device and a tap
    device in a namespace. The namespace stands for the guest: the kernel
    resolves addresses there, and nothing else configures its neighbours.
    """

    def __init__(self, lab: Lab, name: str, addresses: Sequence[str],
                 mac: Optional[str] = None) -> None:
        self.name = name
        self._lab = lab
        # All labs share /dev, so each macvtap needs a unique index.
        index = random.randrange(10 ** 6, 2 ** 31)
        made = lab.run(
            'ip', 'link', 'add', 'link', PARENT, 'name', name, 'index',
            str(index), *(('address', mac) if mac else ()),
            'type', 'macvtap', 'mode', 'bridge', check=False)
        if made.returncode:
            raise OSError('needs the module macvtap: ' + made.stdout)
        # libvirt sets allmulticast for a VM with trustGuestRxFilters. The
        # macvtap then receives the neighbour solicitations for other hosts.
        lab.run('ip', 'link', 'set', name, 'up', 'allmulticast', 'on')
        self.mac = lab.ip('link', 'show', name)[0]['address']
        self._files = [self._open('/dev/tap%d' % index)]
        lab.add_netns(name)
        lab.in_netns(lambda: self._files.append(self._open(
            '/dev/net/tun', PARENT)), name)
        self._ending, ending = os.pipe()
        self._files.append(ending)
        self._thread = threading.Thread(target=self._forward, args=(ending,))
        self._thread.start()
        lab.run('ip', 'link', 'set', PARENT, 'address', self.mac, 'up',
                netns=name)
        for address in addresses:
            six = ':' in address
            lab.run('ip', 'address', 'add', '%s/%d' % (
                address, 64 if six else PREFIX), 'dev', PARENT,
                *(('nodad',) if six else ()), netns=name)

    @staticmethod
    def _open(path: str, name: str = '') -> int:
        file = os.open(path, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
        fcntl.ioctl(file, TUNSETIFF, struct.pack(
            '16sH22x', name.encode(), IFF_TAP | IFF_NO_PI))
        return file

    def _forward(self, ending: int) -> None:
        outside, inside, _ = self._files
        while True:
            ready = select.select(self._files, [], [])[0]
            if ending in ready:
                return
            for source, target in ((outside, inside), (inside, outside)):
                if source in ready:
                    with contextlib.suppress(OSError):  # the interface is down
                        os.write(target, os.read(source, 2 ** 16))

    def power_off(self) -> None:
        """Stop forwarding and delete the macvtap, as libvirt does."""
        os.close(self._ending)
        self._thread.join()
        for file in self._files:
            os.close(file)
        self._lab.vms.remove(self)
        self._lab.run('ip', 'link', 'del', self.name, check=False)
        self._lab.del_netns(self.name)


class Lab:
    """A node with a NIC on a LAN.

    The constructor moves the calling process to the node. Another Lab replaces
    the first, so each test can have a new node.
    """

    def __init__(self) -> None:
        self.vms: list[VM] = []
        _call('unshare', CLONE_NEWNET | CLONE_NEWNS)
        _call('mount', b'none', b'/', None, MS_REC | MS_PRIVATE, None)
        _call('mount', b'lab', b'/run', b'tmpfs', 0, None)
        os.mkdir('/run/netns')
        self.run('ip', 'link', 'set', 'lo', 'up')
        self.add_netns('lan')
        self.add_nic()

    def close(self) -> None:
        """Leave the node; its namespaces end with their last process."""
        for vm in list(self.vms):
            vm.power_off()
        _call('umount2', b'/run', 2)  # MNT_DETACH

    def add_nic(self) -> None:
        """Add the NIC, and give it the node's IPv4 address."""
        self.run('ip', 'link', 'add', PARENT, 'type', 'veth',
                 'peer', 'name', 'nic', 'netns', 'lan')
        self.run('ip', 'link', 'set', PARENT, 'up')
        self.run('ip', 'address', 'add', '%s/%d' % (NODE, PREFIX),
                 'dev', PARENT)
        self.run('ip', 'route', 'replace', 'default', 'via', LAN)
        self.run('ip', 'link', 'set', 'nic', 'up', netns='lan')
        self.run('ip', 'address', 'add', '%s/%d' % (LAN, PREFIX),
                 'dev', 'nic', netns='lan')

    def add_ipv6(self) -> None:
        """Give the node and the LAN IPv6 addresses."""
        for address, device, netns in ((NODE6, PARENT, None),
                                       (LAN6, 'nic', 'lan')):
            self.run('ip', 'address', 'add', address + '/64', 'dev', device,
                     'nodad', netns=netns)
        self.run('ip', 'route', 'add', 'default', 'via', LAN6)

    def settle(self) -> None:
        """Wait until no interface has a tentative IPv6 address.

        The kernel adds the link-local addresses shortly after both ends of the
        veth pair are up.
        """
        until(lambda: all(
            'fe80::' in str(link['addr_info'])
            for name, netns in ((PARENT, None), ('nic', 'lan'))
            for link in self.ip('address', netns=netns)
            if link['ifname'] == name and 'LOWER_UP' in link['flags'])
            and not any(
                address.get('tentative')
                for netns in (None, *os.listdir('/run/netns'))
                for link in self.ip('address', 'show', netns=netns)
                for address in link['addr_info']))

    def add_other_subnet(self) -> None:
        """Make the LAN host the gateway of another subnet on its link."""
        for key in ('net.ipv4.ip_forward', 'net.ipv6.conf.all.forwarding'):
            self.run('sysctl', '-w', key + '=1', netns='lan')
        for address in (OTHER_LAN + '/24', OTHER_LAN6 + '/64'):
            self.run('ip', 'address', 'add', address, 'dev', 'nic',
                     *(('nodad',) if ':' in address else ()), netns='lan')

    def add_netns(self, name: str) -> str:
        """Add a namespace and return its path."""
        self.run('ip', 'netns', 'add', name)
        self.run('ip', 'link', 'set', 'lo', 'up', netns=name)
        return '/run/netns/' + name

    def del_netns(self, name: str) -> None:
        """Delete a namespace, and wait until the kernel has freed it.

        The kernel frees a namespace within several milliseconds.
        """
        path = '/run/netns/' + name
        known = kernel.identify(path)
        self.run('ip', 'netns', 'del', name)
        until(lambda: kernel.judge_state(
            path, known) is not kernel.State.LIVING)

    def add_pod(self, name: str, *addresses: str,
                mac: Optional[str] = None,
                gateways: Sequence[str] = (),
                parent: str = PARENT) -> str:
        """Add a namespace with a macvlan on the NIC, and return its path."""
        path = self.add_netns(name)
        self.add_macvlan(name, mac=mac, parent=parent)
        for address in addresses:
            interface = ipaddress.ip_interface(address)
            if interface.network.num_addresses == 1:
                address += '/%d' % (PREFIX if interface.version == 4 else 64)
            self.run('ip', 'address', 'add', address, 'dev', PARENT,
                     *(('nodad',) if interface.version == 6 else ()),
                     netns=name)
        for gateway in gateways:
            self.run('ip', 'route', 'add', 'default', 'via', gateway,
                     netns=name)
        return path

    def add_macvlan(self, netns: str, name: str = PARENT, *,
                    mac: Optional[str] = None, parent: str = PARENT,
                    mode: str = 'bridge') -> None:
        """Add a macvlan on a NIC to a namespace."""
        # Before Linux 6.14 the name must be unused on the node too.
        self.run('ip', 'link', 'add', 'new', 'link', parent, 'netns', netns,
                 *(('address', mac) if mac else ()),
                 'type', 'macvlan', 'mode', mode)
        self.run('ip', 'link', 'set', 'new', 'name', name, netns=netns)

        def is_up() -> bool:
            done = self.run('ip', 'link', 'set', name, 'up', netns=netns,
                            check=False)
            assert not done.returncode or 'in use' in done.stdout, done.stdout
            return done.returncode == 0

        # The macvlan of a deleted namespace keeps its MAC address in use for
        # several milliseconds.
        until(is_up)

    def until_free(self, mac: str) -> None:
        """Wait until no macvlan on the NIC uses a MAC address."""
        self.run('ip', 'link', 'add', 'next', 'link', PARENT, 'address', mac,
                 'type', 'macvlan', 'mode', 'bridge')
        until(lambda: self.run('ip', 'link', 'set', 'next', 'up',
                               check=False).returncode == 0)
        self.run('ip', 'link', 'del', 'next')

    def add_vm(self, name: str, *addresses: str,
               mac: Optional[str] = None) -> VM:
        """Start a virtual machine on the NIC.

        :raises OSError: if the kernel lacks the module macvtap
        """
        self.vms.append(VM(self, name, addresses, mac))
        return self.vms[-1]

    def socket(self, family: int, kind: int = socket.SOCK_STREAM,
               netns: Optional[str] = None) -> socket.socket:
        """Return a socket of the node or of another namespace."""
        made: list[socket.socket] = []
        self.in_netns(lambda: made.append(socket.socket(family, kind)), netns)
        made[0].settimeout(PATIENCE)
        return made[0]

    @staticmethod
    def in_netns(function: Callable[[], None],
                 netns: Optional[str] = None) -> None:
        """Call a function in another namespace.

        :param netns: the namespace's name or path; None for the node
        """
        errors: list[Exception] = []

        def call() -> None:
            try:
                if netns:
                    with open(os.path.join('/run/netns', netns)) as file:
                        _call('setns', file.fileno(), CLONE_NEWNET)
                function()
            except Exception as err:
                errors.append(err)

        # setns(2) changes the namespace of one thread only.
        thread = threading.Thread(target=call)
        thread.start()
        thread.join()
        if errors:
            raise errors[0]

    @contextlib.contextmanager
    def capture(self) -> Iterator[list[Frame]]:
        """Yield a list, which has all frames on the LAN when the block ends.

        tcpdump would change its user, which root of a user namespace cannot
        do, so a packet socket captures the frames.
        """
        frames: list[Frame] = []
        with self.socket(socket.AF_PACKET, socket.SOCK_RAW, 'lan') as wire:
            wire.bind(('nic', ETH_P_ALL))
            wire.settimeout(0.1)
            ending = threading.Event()

            def read() -> None:
                while True:
                    try:
                        frames.append(Frame(wire.recv(2 ** 16)))
                    except socket.timeout:
                        if ending.is_set():
                            return

            reader = threading.Thread(target=read)
            reader.start()
            try:
                yield frames
            finally:
                time.sleep(0.3)  # frames that are still on their way
                ending.set()
                reader.join()
            dropped = struct.unpack('II', wire.getsockopt(
                SOL_PACKET, PACKET_STATISTICS, 8))[1]
            assert not dropped, 'the capture has lost %d frames' % dropped

    def run(self, *command: str, netns: Optional[str] = None,
            check: bool = True) -> subprocess.CompletedProcess[str]:
        """Run a command on the node, or in another namespace."""
        if netns:
            command = ('ip', 'netns', 'exec', netns, *command)
        done = program.run(command, stdout=subprocess.PIPE, text=True,
                           stderr=subprocess.STDOUT)
        if check and done.returncode:
            raise AssertionError('%s: exit %d\n%s' % (
                ' '.join(command), done.returncode, done.stdout))
        return done

    def ip(self, *args: str, netns: Optional[str] = None) -> list[Any]:
        """Return the parsed output of ``ip -json -details``."""
        text = self.run('ip', '-json', '-details', *args, netns=netns).stdout
        # ip prints {} for each item that its filters exclude.
        return [item for item in json.loads(text or '[]') if item]

    def link(self, name: str) -> Optional[dict[str, Any]]:
        """Return one interface of the node, or None."""
        return next((link for link in self.ip('link', 'show')
                     if link['ifname'] == name), None)

    def routes(self, device: str = 'break0') -> dict[str, dict[str, Any]]:
        """Return the IPv4 and IPv6 routes on a device, by destination."""
        found = {}
        for family in ('-4', '-6'):
            for route in self.ip(family, 'route', 'show', 'table', 'all'):
                if (route.get('dev') == device
                        and route.get('type', 'unicast') == 'unicast'
                        and not route['dst'].startswith('fe80')):
                    assert route['dst'] not in found, route['dst'] + ' twice'
                    found[route['dst']] = route
        return found

    def state(self) -> dict[str, Any]:
        """Return the configuration of the node and of its other namespaces.

        The result has no dynamic neighbours and no counters.
        """
        self.settle()
        found = {}
        for netns in (None, *sorted(os.listdir('/run/netns'))):
            for family in ('-4', '-6'):
                for what in (('route', 'show', 'table', 'all'), ('rule',),
                             ('neighbour', 'show', 'nud', 'permanent')):
                    found['%s %s %s' % (netns, family, what[0])] = self.ip(
                        family, *what, netns=netns)
                # ip prints neighbours in the order of the kernel's hash table,
                # which changes when the table grows.
                found['%s %s neighbour' % (netns, family)].sort(
                    key=lambda entry: (entry['dev'], entry['dst']))
            found['%s address' % netns] = self.ip('address', netns=netns)
            text = self.run('grep', '-rs', '', '/proc/sys/net', netns=netns,
                            check=False).stdout
            found['%s sysctl' % netns] = [
                line for line in sorted(text.splitlines())
                if 'nf_conntrack_count' not in line]
        return found

    def forget_neighbours(self) -> None:
        """Flush the dynamic neighbours of the node and of all namespaces."""
        for where in (None, *os.listdir('/run/netns')):
            self.run('ip', 'neighbour', 'flush', 'all', netns=where,
                     check=False)

    def ping(self, address: str, netns: Optional[str] = None, *,
             cold: bool = True) -> bool:
        """Return whether a ping is answered.

        :param cold: whether to flush the dynamic neighbours first
        """
        if cold:
            self.forget_neighbours()
        return self.run('ping', '-n', '-q', '-c', '1', '-W', '1', address,
                        netns=netns, check=False).returncode == 0
