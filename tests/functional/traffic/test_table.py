# SPDX-License-Identifier: Apache-2.0

"""Reachability between all ends, as in doc/source/admin/traffic.rst.

Each case is tried in both families, by ping, TCP and UDP, on nodes with one
NIC and with two. BREAK0_TABLE=1 in the environment prints the results, with
the source addresses that the servers saw.
"""

from __future__ import annotations

import os
import sys
from typing import NamedTuple, Optional

from tests.functional.traffic import base
from tests.functional.traffic.base import ENDS
from tests.functional.traffic.base import Seen
from tests.support import lab

PAGE = os.path.join(os.path.dirname(__file__), os.pardir, os.pardir,
                    os.pardir, 'doc', 'source', 'admin', 'traffic.rst')
#: Reasons of failures; the page has the remedies.
GATEWAY_ASKED = 'the pod asks its gateway, which knows no way'
GATEWAY = 'the pod answers by its gateway'
DIRECTLY = 'the other side answers past the node'


class Case(NamedTuple):
    """A client, a server, and the path between them.

    :ivar through: description of the path
    :ivar address: IPv4 and IPv6 address of the request; None for the server's
    :ivar source: the end that the server must see as source
    :ivar fails: reason of the failure, by protocol
    :ivar protocols: protocols to try
    :ivar gives: whether packets after DNAT are masqueraded; None without DNAT
    """

    client: str
    server: str
    through: str = ''
    address: Optional[tuple[str, str]] = None
    source: Optional[str] = None
    fails: dict[str, str] = {}
    protocols: tuple[str, ...] = base.PROTOCOLS
    gives: Optional[bool] = None

    @property
    def name(self) -> str:
        return '%s to %s%s' % (self.client, self.server, self.through
                               and ', ' + self.through)


def no(why: str, *protocols: str) -> dict[str, str]:
    return dict.fromkeys(protocols or base.PROTOCOLS, why)


CLUSTER = base.CLUSTER, base.CLUSTER6
TRANSPORT = ('tcp', 'udp')


class TableTestCase(base.TrafficTestCase):
    """All cases on one kind of node."""

    #: The ends that servers see as the source of the node's own packets, and
    #: of packets after MASQUERADE.
    speaks = masquerades = 'node'
    #: The interface on which VPN clients are masqueraded.
    out: Optional[str] = 'break0'

    def setUp(self) -> None:
        super().setUp()
        self.add_container()
        self.add_client(self.out)
        self.route_services()
        self.manager().sync()  # an agent syncs within a second

    def node_port(self) -> tuple[str, str]:
        end = ENDS[self.speaks]
        return end.v4, end.v6

    def cases(self) -> list[Case]:
        node, translated = self.speaks, self.masquerades
        return [
            Case(node, 'pod', source=node),
            Case('pod', node, source='pod'),
            Case('pod', 'node (bridge)', fails=no(GATEWAY_ASKED)),
            Case('pod', 'other pod', source='pod'),
            Case('LAN', 'pod', source='LAN'),
            Case('pod', 'LAN', source='pod'),
            Case('container', 'pod', 'masqueraded', source=translated),
            Case('VPN client', 'pod', 'masqueraded on break0',
                 source=translated),
            Case(node, 'pod', 'by ClusterIP', CLUSTER, translated,
                 protocols=TRANSPORT, gives=True),
            Case(node, 'pod', 'by NodePort', self.node_port(), translated,
                 protocols=TRANSPORT, gives=True),
            Case('LAN', 'pod', 'by NodePort', self.node_port(), translated,
                 protocols=TRANSPORT, gives=True),
            Case('LAN', 'pod', 'by NodePort, not masqueraded',
                 self.node_port(), protocols=TRANSPORT, gives=False,
                 fails=no(DIRECTLY)),
            Case('container', 'pod', 'by ClusterIP', CLUSTER, translated,
                 protocols=TRANSPORT, gives=True),
            Case('pod', 'container', 'by a published port',
                 self.node_port(), 'pod', protocols=TRANSPORT, gives=False),
            Case('pod', 'other pod', 'by ClusterIP, masqueraded', CLUSTER,
                 translated, protocols=TRANSPORT, gives=True),
            Case('pod', 'other pod', 'by ClusterIP, not masqueraded', CLUSTER,
                 protocols=TRANSPORT, gives=False, fails=no(DIRECTLY)),
            Case('pod', 'pod', 'itself, by ClusterIP, masqueraded', CLUSTER,
                 translated, protocols=TRANSPORT, gives=True)]

    def try_case(self, case: Case) -> dict[tuple[int, str], Seen]:
        seen = {}
        server = ENDS[case.server]
        port = base.PUBLISHED if case.gives is not None else base.PORT
        with self.serving(server.netns):
            for family in (4, 6):
                address = (case.address[family == 6] if case.address
                           else server.address(family))
                if case.gives is not None:
                    self.publish(family, address, port,
                                 server.address(family), case.gives)
                for protocol in case.protocols:
                    seen[family, protocol] = self.ask(
                        protocol, family, ENDS[case.client], address, port,
                        base.SILENCE if protocol in case.fails
                        else lab.PATIENCE)
                if case.gives is not None:
                    self.nft('delete table %s proxy' % (
                        'ip' if family == 4 else 'ip6'))
        return seen

    def expected(self, case: Case, family: int, protocol: str) -> str:
        if protocol in case.fails:
            return 'no'
        if protocol == 'ping' or case.source is None:
            return 'yes'
        return ENDS[case.source].address(family)

    def run_table(self) -> None:
        with open(PAGE) as file:
            page = file.read()
        for case in self.cases():
            # The page calls every source of the node "node".
            self.assertIn('   * - %s\n     - %s\n' % (
                case.name.replace(self.speaks, 'node')
                if case.client == self.speaks or case.server == self.speaks
                else case.name,
                'no' if 'tcp' in case.fails else 'yes'), page)
        self.lab.settle()
        wrong, lines = [], []
        own = (self.lab.link('break0') or {})['address']
        with self.lab.capture() as frames:
            self.lab.forget_neighbours()
            for case in self.cases():
                for (family, protocol), seen in self.try_case(case).items():
                    expected = self.expected(case, family, protocol)
                    lines.append('%-55s IPv%d %-4s  %s%s' % (
                        case.name, family, protocol, seen,
                        ': ' + case.fails[protocol]
                        if protocol in case.fails else ''))
                    if not str(seen).startswith(expected):
                        wrong.append('%s, expected %s' % (lines[-1],
                                                          expected))
        if os.environ.get('BREAK0_TABLE'):
            print('\n%s\n%s' % (self.__doc__, '\n'.join(lines)),
                  file=sys.stderr)
        self.assertEqual([], wrong, '\n'.join(wrong))
        self.assertGreater(len(frames), 0, 'nothing was captured')
        self.assertEqual([], [frame for frame in frames
                              if frame.src == own])


class TestOneNIC(TableTestCase):
    """A node with one NIC."""

    def test_table(self) -> None:
        self.run_table()


class TestManagementFirst(TableTestCase):
    """A node with a management NIC, created before the NIC of the pods."""

    nics = ('mgmt', 'eth0')
    masquerades = 'break0'

    def cases(self) -> list[Case]:
        return [*super().cases(),
                Case('pod', 'node (other NIC)', fails=no(GATEWAY_ASKED))]

    def test_table(self) -> None:
        self.run_table()


class TestStrict(TestManagementFirst):
    """A management NIC first, and rp_filter = 1 on node and containers."""

    def setUp(self) -> None:
        super().setUp()
        for netns in (None, 'pod', 'other', 'container'):
            for name in ('all', 'default', 'eth0'):
                self.lab.run('sysctl', '-qw', 'net.ipv4.conf.%s.rp_filter=1'
                             % name, netns=netns)


class TestManagementLast(TableTestCase):
    """A node with a management NIC, created after the NIC of the pods."""

    nics = ('eth0', 'mgmt')

    def test_table(self) -> None:
        self.run_table()


class TestLoopback(TableTestCase):
    """A node with other addresses on lo."""

    has_loopback = True
    masquerades = 'break0'

    def test_table(self) -> None:
        self.run_table()


class TestBareParent(TableTestCase):
    """A node without addresses on the NIC of the pods."""

    nics = ('mgmt', 'eth0')
    is_bare = True
    speaks = 'node (other NIC)'
    masquerades = 'break0, other NIC'

    def cases(self) -> list[Case]:
        return [case for case in super().cases()
                if (case.client != 'LAN' or 'NodePort' not in case.through)
                # Pods of this node know the bridge's IPv6 address.
                and case.server != 'node (bridge)']

    def route_services(self) -> None:
        for netns in ('pod', 'other'):
            for network, via in (('10.96.0.0/16', base.MANAGEMENT),
                                 ('fd00:96::/64', base.MANAGEMENT6)):
                self.lab.run('ip', 'route', 'add', network, 'via', via,
                             'dev', 'eth0', 'onlink', netns=netns)

    def test_table(self) -> None:
        self.run_table()


class TestClientOnTheParent(TableTestCase):
    """A VPN server that masquerades its clients on the node's NIC.

    Guides for VPN servers recommend this rule.
    """

    out = 'eth0'

    def cases(self) -> list[Case]:
        return [Case('VPN client', 'pod', 'masqueraded on the parent',
                     fails=no(GATEWAY))]

    def test_table(self) -> None:
        self.run_table()


class TestRoutedClient(TableTestCase):
    """A node with a VPN and without masquerading."""

    out = None

    def cases(self) -> list[Case]:
        return [Case('VPN client', 'pod', 'routed', fails=no(GATEWAY))]

    def test_table(self) -> None:
        self.run_table()

    def test_with_a_route_in_the_pod(self) -> None:
        for network, via in (('10.8.0.0/24', lab.NODE),
                             ('fd00:8::/64', lab.NODE6)):
            self.lab.run('ip', 'route', 'add', network, 'via', via,
                         netns='pod')
        for seen in self.try_case(Case('VPN client', 'pod')).values():
            self.assertIsNone(seen.error)
            self.assertIn(seen.source, (None, base.CLIENT, base.CLIENT6))
