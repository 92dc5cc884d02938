# SPDX-License-Identifier: Apache-2.0

"""Our code encodes and parses netlink messages as pyroute2 does."""

from __future__ import annotations

import errno
import ipaddress
import struct
from typing import Any
import unittest

from pyroute2.netlink.nfnetlink import nfctsocket
from pyroute2.netlink.rtnl import ifaddrmsg
from pyroute2.netlink.rtnl import ifinfmsg
from pyroute2.netlink.rtnl import ndmsg
from pyroute2.netlink.rtnl import rtmsg

from kuryr_break0.kernel import conntrack
from kuryr_break0.kernel import netlink
from kuryr_break0.kernel.values import Link
from kuryr_break0.kernel.values import Verb
from kuryr_break0.kernel import wire
from kuryr_break0.model import HostRoute
from kuryr_break0.model import Neighbour

ADDRESS4 = ipaddress.ip_address('10.0.0.1')
ADDRESS6 = ipaddress.ip_address('fd00::1')
SOURCE4 = ipaddress.ip_address('10.0.0.9')
MAC = 'fa:16:3e:00:00:01'


def encoded(message: Any, kind: int, flags: int, sequence: int = 7) -> bytes:
    """Return pyroute2's encoding of a message."""
    message['header'].update(type=kind, flags=flags | netlink.NLM_F_REQUEST,
                             sequence_number=sequence, pid=0)
    message.encode()
    return bytes(message.data)


def decoded(kind: Any, data: bytes) -> Any:
    """Return a message as pyroute2 parses it."""
    message = kind(data)
    message.decode()
    return message


class TestRequests(unittest.TestCase):

    maxDiff = None

    def assert_same(self, expected: bytes, message: netlink.Message) -> None:
        self.assertEqual(expected.hex(' '), message.packed(7).hex(' '))

    def test_connections(self) -> None:
        for address in (ADDRESS4, ADDRESS6):
            for message, which, end in zip(
                    conntrack.deletions(address),
                    ('ORIG', 'ORIG', 'REPLY'), ('saddr', 'daddr', 'saddr')):
                family = wire.family_of(address)
                wanted = nfctsocket.NFCTAttrTuple(family=family,
                                                  **{end: str(address)})
                expected = nfctsocket.nfct_msg()
                expected['nfgen_family'] = family
                expected['attrs'] = [
                    ('CTA_TUPLE_' + which, {'attrs': wanted.attrs()}),
                    ('CTA_FILTER', {'attrs': [
                        ('CTA_FILTER_%s_FLAGS' % which, wanted.flags)]})]
                self.assert_same(encoded(
                    expected, 1 << 8 | nfctsocket.IPCTNL_MSG_CT_DELETE, 0),
                    message)

    def test_routes(self) -> None:
        for verb, kind, flags, scope in (
                (Verb.ADD, 24, 0x600, 253), (Verb.REPLACE, 24, 0x500, 253),
                (Verb.DELETE, 25, 0, 255)):
            for address, table, metric in (
                    (ADDRESS4, 254, 0), (ADDRESS4, 1000, None),
                    (ADDRESS6, 254, 1), (ADDRESS6, 1000, 4294967295)):
                with self.subTest(verb=verb, address=address, table=table):
                    message = rtmsg.rtmsg()
                    message.update(
                        family=2 if address.version == 4 else 10,
                        dst_len=address.max_prefixlen, proto=176,
                        table=table if table < 256 else 252, scope=scope,
                        type=1)
                    message['attrs'] = [('RTA_DST', str(address)),
                                        ('RTA_OIF', 5)]
                    if metric is not None:
                        message['attrs'].append(('RTA_PRIORITY', metric))
                    if table >= 256:
                        message['attrs'].append(('RTA_TABLE', table))
                    self.assert_same(
                        encoded(message, kind, flags), wire.change(
                            verb, HostRoute(address, 5, 176, table,
                                            metric=metric)))

    def test_the_source_of_a_route(self) -> None:
        message = rtmsg.rtmsg()
        message.update(family=2, dst_len=32, proto=176, table=254, scope=253,
                       type=1)
        message['attrs'] = [('RTA_DST', '10.0.0.1'), ('RTA_OIF', 5),
                            ('RTA_PREFSRC', '10.0.0.9')]
        self.assert_same(encoded(message, 24, 0x500), wire.change(
            Verb.REPLACE, HostRoute(ADDRESS4, 5, 176, 254, SOURCE4)))

    def test_neighbours(self) -> None:
        for verb, kind, flags in ((Verb.REPLACE, 28, 0x500),
                                  (Verb.DELETE, 29, 0)):
            for address in (ADDRESS4, ADDRESS6):
                message = ndmsg.ndmsg()
                message.update(family=2 if address.version == 4 else 10,
                               ifindex=5)
                message['attrs'] = [('NDA_DST', str(address))]
                if verb is Verb.REPLACE:
                    message['state'] = 0x80
                    message['attrs'].append(('NDA_LLADDR', MAC))
                self.assert_same(
                    encoded(message, kind, flags), wire.change(
                        verb, Neighbour(address, 5, MAC, None)))

    def test_links_and_addresses(self) -> None:
        message = ifinfmsg.ifinfmsg()
        message.update(index=5, flags=1, change=0x1001)
        message['attrs'] = [('IFLA_IFNAME', 'eth0'), ('IFLA_LINK', 2),
                            ('IFLA_ADDRESS', MAC), ('IFLA_MTU', 1400),
                            ('IFLA_LINKINFO', {'attrs': [
                                ('IFLA_INFO_KIND', 'macvlan'),
                                ('IFLA_INFO_DATA', {'attrs': [
                                    ('IFLA_MACVLAN_MODE', 'bridge')]})]})]
        body = (wire.pack_link(5, 1, 0x1001)
                + netlink.text(wire.IFLA_IFNAME, 'eth0')
                + netlink.number(wire.IFLA_LINK, 2)
                + netlink.attribute(wire.IFLA_ADDRESS, wire.pack_mac(MAC))
                + netlink.number(wire.IFLA_MTU, 1400))
        made = netlink.Message(16, 0, body + wire.pack_macvlan()).packed(7)
        # pyroute2 terminates the name of the kind with a NUL, and our encoder
        # does not. Therefore the test compares the parsed messages.
        theirs = encoded(message, 16, 0)
        for parse in (lambda data: wire.parse_link(data[16:]),
                      lambda data: decoded(ifinfmsg.ifinfmsg, data).get_nested(
                          'IFLA_LINKINFO', 'IFLA_INFO_DATA').get_attr(
                              'IFLA_MACVLAN_MODE')):
            self.assertEqual(parse(theirs), parse(made))
        address = ifaddrmsg.ifaddrmsg()
        address.update(family=10, prefixlen=128, flags=2, index=5)
        address['attrs'] = [('IFA_LOCAL', 'fd00::1'),
                            ('IFA_ADDRESS', 'fd00::1')]
        self.assert_same(encoded(address, 20, 0), netlink.Message(
            20, 0, wire.pack_address(5, ipaddress.ip_interface(ADDRESS6),
                                     wire.IFA_F_NODAD)))


class TestAnswers(unittest.TestCase):

    def test_a_link(self) -> None:
        message = ifinfmsg.ifinfmsg()
        message.update(index=5, flags=0x1041)
        message['attrs'] = [
            ('IFLA_IFNAME', 'break0'), ('IFLA_MTU', 1400), ('IFLA_LINK', 2),
            ('IFLA_ADDRESS', MAC), ('IFLA_IFALIAS', 'mine'),
            ('IFLA_LINK_NETNSID', 3), ('IFLA_GROUP', 7),
            ('IFLA_PROTO_DOWN', 1),
            ('IFLA_LINKINFO', {'attrs': [
                ('IFLA_INFO_KIND', 'macvlan'),
                ('IFLA_INFO_DATA', {'attrs': [
                    ('IFLA_MACVLAN_MODE', 'private')]})]})]
        data = encoded(message, 16, 0)
        self.assertEqual(
            Link('break0', 5, 'macvlan', 'private', 2, 3, 1400, MAC,
                 'mine', True, True, False, 7, False, None, None, False, True),
            wire.parse_link(data[16:]))

    def test_a_link_in_a_vrf(self) -> None:
        message = ifinfmsg.ifinfmsg()
        message.update(index=2, flags=0x11043)
        message['attrs'] = [('IFLA_IFNAME', 'eth0'), ('IFLA_MASTER', 7)]
        data = encoded(message, 16, 0) + netlink.attribute(
            wire.IFLA_LINKINFO,
            netlink.text(wire.IFLA_INFO_SLAVE_KIND, 'vrf')
            + netlink.attribute(wire.IFLA_INFO_SLAVE_DATA, netlink.number(
                wire.IFLA_VRF_PORT_TABLE, 1000)))
        found = wire.parse_link(data[16:])
        self.assertEqual(((7, 1000), True), (found.vrf, found.carrier))

    def test_a_route(self) -> None:
        message = rtmsg.rtmsg()
        message.update(family=2, dst_len=24, proto=4, table=254, scope=0,
                       type=1)
        message['attrs'] = [('RTA_DST', '10.1.0.0'), ('RTA_PRIORITY', 50),
                            ('RTA_GATEWAY', '10.0.0.1'), ('RTA_OIF', 5)]
        data = encoded(message, 24, 0)
        found = wire.parse_route(data[16:])
        self.assertEqual((5, 50, ((ADDRESS4, 5),), 4, False), (
            found.oif, found.metric, found.next_hops, found.protocol,
            found.is_on_link))
        self.assertIsNone(found.host_route)
        self.assertEqual(4, wire.route_protocol(data[16:]))

    def test_a_prefix_of_32_is_a_host_in_one_family_only(self) -> None:
        for text, length, is_host in (('10.0.0.1', 32, True),
                                      ('fd00::', 32, False),
                                      ('fd00::1', 128, True)):
            message = rtmsg.rtmsg()
            message.update(family=10 if ':' in text else 2, dst_len=length,
                           type=1, scope=253)
            message['attrs'] = [('RTA_DST', text), ('RTA_OIF', 5)]
            data = encoded(message, 24, 0)
            self.assertEqual(is_host, wire.parse_route(
                data[16:]).host_route is not None, text)

    def test_an_error(self) -> None:
        body = struct.pack('=i', -errno.EEXIST) + bytes(16)
        data = struct.pack('=IHHII', 16 + len(body), 2, 0x100, 7, 0) + body
        message, = netlink.messages(data)
        err = message.error()
        assert err is not None
        self.assertEqual((errno.EEXIST, 'File exists'),
                         (err.errno, err.strerror))

    def test_an_error_that_is_explained(self) -> None:
        explanation = netlink.text(1, 'because')
        for capped, request in ((0x100, bytes(16)),
                                (0, struct.pack('=I', 21) + bytes(20))):
            message = netlink.Received(
                2, 0x200 | capped, 7, struct.pack('=i', -errno.EPERM)
                + request + explanation)
            self.assertEqual('Operation not permitted (because)',
                             str(message.error().strerror))
            for end in range(4, len(message.body)):  # truncated
                err = message._replace(body=message.body[:end]).error()
                self.assertEqual(errno.EPERM, err and err.errno)

    def test_other_families(self) -> None:
        """A dump without a family also has addresses of, for example, MCTP."""
        address = bytes([45, 0, 0, 0]) + struct.pack('=I', 5) + (
            netlink.attribute(wire.IFA_LOCAL, b'\x09'))
        self.assertIsNone(wire.parse(netlink.Received(
            wire.RTM_NEWADDR, 0, 0, address)))
        neighbour = bytes([45]) + bytes(11) + (
            netlink.attribute(wire.NDA_DST, b'\x09'))
        self.assertIsNone(wire.parse(netlink.Received(
            wire.RTM_NEWNEIGH, 0, 0, neighbour)).dst)

    def test_the_number_of_a_namespace(self) -> None:
        """Messages for new and deleted namespaces contain their numbers."""
        body = bytes(4) + netlink.attribute(1, struct.pack('=i', 5))
        for kind in (wire.RTM_NEWNSID, wire.RTM_DELNSID):
            self.assertEqual(5, wire.parse(netlink.Received(
                kind, 0, 0, body)))

    def test_a_truncated_message_is_an_error(self) -> None:
        message = rtmsg.rtmsg()
        message.update(family=2, dst_len=32, type=1)
        message['attrs'] = [('RTA_DST', '10.0.0.1'), ('RTA_OIF', 5),
                            ('RTA_MULTIPATH', [])]
        data = encoded(message, 24, 0)
        for end in range(16, 28):  # up to the end of rtmsg
            received, = netlink.messages(data[:end])
            with self.assertRaises(OSError) as caught:
                wire.parse(received)
            self.assertEqual(errno.EBADMSG, caught.exception.errno)
        received, = netlink.messages(data)
        self.assertEqual(5, wire.parse(received).oif)
