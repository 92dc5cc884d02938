# SPDX-License-Identifier: Apache-2.0

"""Nodes with one or two NICs, and traffic between two ends.

The nodes of test_table have pods, a container behind a bridge, and a VPN
client. Clients and servers use real sockets. A server answers with the source
address of the request.
"""

from __future__ import annotations

import contextlib
import os
import re
import socket
import subprocess
import threading
from typing import Any, Iterator, NamedTuple, Optional

from kuryr_break0 import kernel
from kuryr_break0.model import Owner
from kuryr_break0 import policy
from tests.functional import base
from tests.support import lab

POD, POD6 = '100.75.30.71', 'fd00:30::71'
OTHER, OTHER6 = '100.75.30.72', 'fd00:30::72'
SUBNETS = ('100.75.30.0/24', 'fd00:30::/64')
MAC, OTHER_MAC = 'fa:16:3e:00:00:71', 'fa:16:3e:00:00:72'
#: Addresses of the node on its other NIC, and of the LAN host there.
MANAGEMENT, MANAGEMENT6 = '10.9.0.51', 'fd00:9::51'
MANAGER, MANAGER6 = '10.9.0.1', 'fd00:9::1'
#: Addresses on lo, like addresses that a routing protocol announces.
LOOPBACK, LOOPBACK6 = '10.255.0.51', 'fd00:255::51'
BRIDGE, BRIDGE6 = '172.30.0.1', 'fd00:172::1'
CONTAINER, CONTAINER6 = '172.30.0.2', 'fd00:172::2'
TUNNEL, TUNNEL6 = '10.8.0.1', 'fd00:8::1'
CLIENT, CLIENT6 = '10.8.0.2', 'fd00:8::2'
CLUSTER, CLUSTER6 = '10.96.0.10', 'fd00:96::10'
#: Address of break0, on a node where break0 needs an address.
BREAK0 = str(policy.link_address('break0'))
PORT = 8080  # the port of each server
PUBLISHED = 30080  # the port of the node that is forwarded to a server
PROTOCOLS = ('ping', 'tcp', 'udp')
#: Seconds to wait for an answer that must not come.
SILENCE = 0.5


class End(NamedTuple):
    """A client or server, by its addresses.

    :ivar netns: name of the namespace; None for the node
    """

    netns: Optional[str]
    v4: str
    v6: str

    def address(self, family: int) -> str:
        return self.v4 if family == 4 else self.v6


ENDS = {
    'node': End(None, lab.NODE, lab.NODE6),
    'node (other NIC)': End(None, MANAGEMENT, MANAGEMENT6),
    'node (lo)': End(None, LOOPBACK, LOOPBACK6),
    # IPv6 prefers the source with the longest prefix of the destination.
    'break0': End(None, BREAK0, lab.NODE6),
    'break0, other NIC': End(None, BREAK0, MANAGEMENT6),
    'node (bridge)': End(None, BRIDGE, BRIDGE6),
    'pod': End('pod', POD, POD6),
    'other pod': End('other', OTHER, OTHER6),
    'container': End('container', CONTAINER, CONTAINER6),
    'VPN client': End('client', CLIENT, CLIENT6),
    'LAN': End('lan', lab.LAN, lab.LAN6),
}


class Seen(NamedTuple):
    """Result of a request.

    :ivar error: None if the server answered
    :ivar source: the client's address as the server saw it; None for a ping
    """

    error: Optional[str]
    source: Optional[str] = None

    def __str__(self) -> str:
        return self.error or self.source or 'yes'


class Server:
    """A TCP and UDP server that answers with the client's address."""

    def __init__(self, node: lab.Lab, netns: Optional[str],
                 port: int = PORT) -> None:
        self._sockets = []
        for family in (socket.AF_INET, socket.AF_INET6):
            for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM):
                made = node.socket(family, kind, netns)
                if family == socket.AF_INET6:
                    made.setsockopt(socket.IPPROTO_IPV6,
                                    socket.IPV6_V6ONLY, 1)
                made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                made.bind(('', port))
                made.settimeout(0.1)
                if kind == socket.SOCK_STREAM:
                    made.listen()
                self._sockets.append(made)
        self._ending = threading.Event()
        self._threads = [threading.Thread(target=self._serve, args=(each,))
                         for each in self._sockets]
        for thread in self._threads:
            thread.start()

    def _serve(self, served: socket.socket) -> None:
        while not self._ending.is_set():
            try:
                if served.type == socket.SOCK_DGRAM:
                    data, source = served.recvfrom(100)
                    # The kernel chooses the source of the answer, as for most
                    # services.
                    served.sendto(source[0].encode(), source)
                else:
                    with served.accept()[0] as accepted:
                        accepted.sendall(accepted.getpeername()[0].encode())
            except OSError:
                continue

    def close(self) -> None:
        self._ending.set()
        for thread in self._threads:
            thread.join()
        for each in self._sockets:
            each.close()


class TrafficTestCase(base.LabTestCase):
    """A node with two bound pods, and optional NICs and addresses."""

    #: NICs in the order of creation; the kernel prefers the first NIC's
    #: address as source.
    nics: tuple[str, ...] = ('eth0',)
    #: Whether the parent has no address.
    is_bare = False
    #: Whether the node has other addresses on lo.
    has_loopback = False
    overrides: dict[str, Any] = {}

    def setUp(self) -> None:
        super().setUp()
        self.lab.run('ip', 'link', 'del', 'eth0')
        for path in ('ipv4/ip_forward', 'ipv6/conf/all/forwarding'):
            kernel.write_sysctl(path, 1)
        if self.has_loopback:
            self.add_address('lo', LOOPBACK, LOOPBACK6, 32, 128)
        for nic in self.nics:
            if nic == 'eth0':
                self.lab.add_nic()
                self.lab.add_ipv6()
            else:
                self.add_management()
        if self.is_bare:
            self.lab.run('ip', 'address', 'flush', 'dev', 'eth0', 'scope',
                         'global')
            for address in (MANAGER, MANAGER6):
                self.lab.run('ip', 'route', 'replace', 'default', 'via',
                             address)
        for name, mac, addresses in (('pod', MAC, (POD, POD6)),
                                     ('other', OTHER_MAC, (OTHER, OTHER6))):
            self.add_pod(name, mac, *addresses)

    def add_pod(self, name: str, mac: str, *addresses: str) -> None:
        path = self.lab.add_pod(name, *addresses, mac=mac,
                                gateways=(lab.LAN, lab.LAN6)[
                                    :len(addresses)])
        self.bind(*addresses, owner=Owner(name, 'eth0'), netns=path,
                  mac_of_pod=mac, subnets=SUBNETS, **self.overrides)

    def add_address(self, device: str, v4: str, v6: str, length: int = 24,
                    length6: int = 64, netns: Optional[str] = None) -> None:
        for address in ('%s/%d' % (v4, length), '%s/%d' % (v6, length6)):
            self.lab.run('ip', 'address', 'add', address, 'dev', device,
                         *(('nodad',) if ':' in address else ()),
                         netns=netns)

    def add_management(self) -> None:
        """Add a second NIC to the node."""
        self.lab.run('ip', 'link', 'add', 'mgmt', 'type', 'veth',
                     'peer', 'name', 'nic1', 'netns', 'lan')
        self.lab.run('ip', 'link', 'set', 'mgmt', 'up')
        self.lab.run('ip', 'link', 'set', 'nic1', 'up', netns='lan')
        self.add_address('mgmt', MANAGEMENT, MANAGEMENT6)
        self.add_address('nic1', MANAGER, MANAGER6, netns='lan')

    def add_container(self) -> None:
        """Add a container on a bridge, and masquerade it as Docker does."""
        self.lab.run('ip', 'link', 'add', 'docker0', 'type', 'bridge')
        self.lab.run('ip', 'link', 'set', 'docker0', 'up')
        self.add_address('docker0', BRIDGE, BRIDGE6)
        self._add_behind('container', 'docker0', CONTAINER, CONTAINER6,
                         BRIDGE, BRIDGE6)
        self.masquerade('172.30.0.0/24', 'fd00:172::/64',
                        'oifname != "docker0"')

    def add_client(self, out: Optional[str]) -> None:
        """Add a client of a VPN server on the node.

        :param out: interface on which the client's packets are masqueraded;
            None for no masquerading
        """
        self._add_behind('client', None, CLIENT, CLIENT6, TUNNEL, TUNNEL6)
        if out is not None:
            self.masquerade('10.8.0.0/24', 'fd00:8::/64',
                            'oifname "%s"' % out)

    def _add_behind(self, name: str, bridge: Optional[str], v4: str, v6: str,
                    gateway: str, gateway6: str) -> None:
        self.lab.add_netns(name)
        self.lab.run('ip', 'link', 'add', 'to-' + name, 'type', 'veth',
                     'peer', 'name', 'eth0', 'netns', name)
        self.lab.run('ip', 'link', 'set', 'to-' + name, 'up',
                     *(('master', bridge) if bridge else ()))
        self.lab.run('ip', 'link', 'set', 'eth0', 'up', netns=name)
        if bridge is None:
            self.add_address('to-' + name, gateway, gateway6)
        self.add_address('eth0', v4, v6, netns=name)
        for address in (gateway, gateway6):
            self.lab.run('ip', 'route', 'add', 'default', 'via', address,
                         netns=name)

    def masquerade(self, v4: str, v6: str, match: str) -> None:
        self.nft('''table inet guide {
            chain post { type nat hook postrouting priority 100;
                ip saddr %s %s masquerade
                ip6 saddr %s %s masquerade
            }
        }''' % (v4, match, v6, match))

    def publish(self, family: int, address: str, port: int, target: str,
                marked: bool = True) -> None:
        """Forward an address and port to a server, as kube-proxy does.

        :param marked: whether the forwarded packets are masqueraded
        """
        self.nft('''table %(ip)s proxy {
            chain services {
                %(ip)s daddr %(address)s meta l4proto { tcp, udp } \
th dport %(port)d %(mark)s dnat to %(target)s
            }
            chain pre { type nat hook prerouting priority -100;
                jump services
            }
            chain out { type nat hook output priority -100;
                jump services
            }
            chain post { type nat hook postrouting priority 100;
                meta mark 0x4000 masquerade
            }
        }''' % {
            'ip': 'ip' if family == 4 else 'ip6', 'address': address,
            'port': port, 'target': ('%s:%d' if family == 4 else
                                     '[%s]:%d') % (target, PORT),
            'mark': 'meta mark set 0x4000' if marked else ''})

    def nft(self, text: str) -> None:
        subprocess.run(['nft', '-f', '-'], input=text, text=True, check=True)

    def route_services(self) -> None:
        """Route packets of the pods for services through the node."""
        for netns in ('pod', 'other'):
            for network, via in (('10.96.0.0/16', lab.NODE),
                                 ('fd00:96::/64', lab.NODE6)):
                self.lab.run('ip', 'route', 'add', network, 'via', via,
                             netns=netns)

    @contextlib.contextmanager
    def serving(self, netns: Optional[str]) -> Iterator[None]:
        server = Server(self.lab, netns)
        try:
            yield
        finally:
            server.close()

    def ask(self, protocol: str, family: int, client: End, address: str,
            port: int = PORT, patience: float = lab.PATIENCE) -> Seen:
        """Send a request to a server and return the result.

        :param patience: seconds to wait for an answer
        """
        if protocol == 'ping':
            done = self.lab.run(
                'ping', '-n', '-q', '-c', '1', '-W', str(patience), address,
                netns=client.netns, check=False)
            return Seen(None if done.returncode == 0 else 'no')
        kind = (socket.SOCK_STREAM if protocol == 'tcp'
                else socket.SOCK_DGRAM)
        with self.lab.socket(socket.AF_INET if family == 4
                             else socket.AF_INET6, kind,
                             client.netns) as made:
            made.settimeout(patience)
            try:
                made.connect((address, port))
                if protocol == 'udp':
                    made.send(b'who am I?')
                return Seen(None, made.recv(100).decode())
            except OSError as err:
                return Seen('no (%s)' % (
                    re.sub('[^a-z ].*', '', os.strerror(err.errno).lower())
                    if err.errno else 'no answer'))

    def neighbours_of(self, netns: str) -> dict[str, str]:
        """Return the permanent neighbours in a pod: MAC address by address."""
        return {each['dst']: each['lladdr'] for each in self.lab.ip(
            'neighbour', 'show', 'nud', 'permanent', netns=netns)}
