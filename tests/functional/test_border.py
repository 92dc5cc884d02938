# SPDX-License-Identifier: Apache-2.0

"""The guard of break0 stops attacks of pods with CAP_NET_RAW."""

from __future__ import annotations

import contextlib
import errno
import ipaddress
import json
import os
import re
import socket
import struct
import subprocess
import threading
import time
from typing import Any, Callable, Iterator, Optional
from unittest import mock

from kuryr_break0.break0 import device
from kuryr_break0.break0 import guard
from kuryr_break0.break0 import podside
from kuryr_break0.engine import reconciler
from kuryr_break0 import exceptions
from kuryr_break0 import kernel
from kuryr_break0.kernel import netlink
from kuryr_break0.kernel import nft
from kuryr_break0.ledger import cache
from kuryr_break0.model import Owner
from kuryr_break0.model import Record
from tests.functional import base
from tests.functional.base import OTHER_OWNER
from tests.functional.base import OTHER_POD
from tests.functional.base import OWNER
from tests.functional.base import POD
from tests.functional.border_base import BEYOND
from tests.functional.border_base import BorderTestCase
from tests.functional.border_base import checksum
from tests.functional.border_base import icmp6
from tests.functional.border_base import MAC
from tests.functional.border_base import OTHER6
from tests.functional.border_base import OTHER_MAC
from tests.functional.border_base import packed
from tests.functional.border_base import POD6
from tests.functional.border_base import SUBNETS
from tests.functional.border_base import udp
from tests.functional import cli_base
from tests.support import lab


class TestForgery(BorderTestCase):

    def test_its_own_name_is_fine(self) -> None:
        self.assert_received(udp(POD, lab.NODE))
        self.assert_received(udp(POD6, lab.NODE6), family=socket.AF_INET6)
        self.assert_reachable()

    def test_names_of_others(self) -> None:
        for source in (lab.LAN, BEYOND, OTHER_POD, '127.0.0.1', '0.0.0.0',
                       '100.75.30.99', lab.NODE):
            self.assertFalse(self.received(udp(source, lab.NODE)), source)
        for source in (lab.LAN6, OTHER6, '2001:db8::1', 'fd00:30::99'):
            self.assertFalse(self.received(
                udp(source, lab.NODE6), family=socket.AF_INET6), source)

    def test_mac_addresses_of_others(self) -> None:
        # The other pod's MAC address and address are an admitted pair on the
        # node, so only the guard in the sending pod can stop such a frame.
        self.require_egress()
        for source in (OTHER_MAC, '02:00:00:00:00:99', self.mac):
            self.assertFalse(self.received(udp(OTHER_POD, lab.NODE), source))
            self.assertFalse(self.received(udp(POD, lab.NODE), source))

    def test_the_loopback_of_the_node(self) -> None:
        kernel.write_sysctl('ipv4/conf/all/route_localnet', 1)
        self.assertFalse(self.received(udp(POD, '127.0.0.1')))
        self.assert_received(udp(POD, lab.NODE))

    def test_the_sysctls_alone_stop_foreign_sources(self) -> None:
        self.lab.run('nft', 'flush', 'ruleset')
        self.assert_received(udp(POD, lab.NODE))
        for source in (lab.LAN, BEYOND):
            self.assertFalse(self.received(udp(source, lab.NODE)), source)

    def test_without_a_guard_it_succeeds(self) -> None:
        # Without the guard the same datagrams arrive, so the guard stopped
        # them in the other tests.
        self.lab.run('nft', 'flush', 'ruleset')
        self.lab.run('nft', 'flush', 'ruleset', netns='pod')
        kernel.write_sysctl('ipv4/conf/break0/rp_filter', 0)
        for source in (lab.LAN, BEYOND, OTHER_POD):
            self.assert_received(udp(source, lab.NODE))
        self.assert_received(udp(OTHER6, lab.NODE6), family=socket.AF_INET6)

    def test_a_refused_bind_is_never_admitted(self) -> None:
        refused = '100.75.30.90'
        self.lab.run('ip', 'route', 'add', refused, 'dev', 'lo')
        with mock.patch.object(kernel.Nft, 'add', autospec=True,
                               side_effect=kernel.Nft.add) as add:
            for yielding in (True, False):
                with self.assertRaises(exceptions.ForeignRoute):
                    self.manager().bind(
                        Owner('c', 'eth0'), base.addresses(refused),
                        parent=lab.PARENT, mac=MAC, yielding=yielding)
            self.manager().sync()
            packed_pairs = [pair for call in add.call_args_list
                            for pair in call.args[2]]
        self.assertEqual([], packed_pairs)
        self.assertEqual({POD, POD6, OTHER_POD, OTHER6, refused},
                         self.bound())
        self.assertEqual(1, len(self.problems()), self.problems())
        self.lab.run('ip', 'route', 'del', refused, 'dev', 'lo')
        self.manager().sync()
        self.assertEqual([], self.problems())


class TestRedirection(BorderTestCase):

    def neighbours(self) -> dict[str, str]:
        return {each['dst']: each.get('lladdr', '')
                for each in self.lab.ip('neigh', 'show', 'dev', 'break0')}

    def test_forged_neighbours(self) -> None:
        before = self.neighbours()
        sender = ipaddress.ip_address(OTHER_POD).packed
        for operation in (1, 2):
            self.send(b'\x08\x06\x00\x01\x08\x00\x06\x04'
                      + struct.pack('!H', operation) + packed(MAC) + sender
                      + packed(self.mac) + ipaddress.ip_address(
                          lab.NODE).packed)
        for text in (OTHER6, lab.LAN6):
            target = ipaddress.ip_address(text).packed
            self.send(icmp6(text, lab.NODE6, b'\x88\0\0\0' + b'\x60\0\0\0'
                            + target + b'\x02\x01' + packed(MAC)))
            self.send(icmp6(POD6, lab.NODE6, b'\x88\0\0\0' + b'\x60\0\0\0'
                            + target + b'\x02\x01' + packed(MAC)))
            self.send(icmp6(text, lab.NODE6, b'\x87\0\0\0' + bytes(4)
                            + ipaddress.ip_address(lab.NODE6).packed
                            + b'\x01\x01' + packed(MAC)))
        # Frames arrive in order: the forged frames came before the datagram.
        self.assert_received(udp(POD, lab.NODE))
        self.assertEqual(before, self.neighbours())

    def test_router_advertisements(self) -> None:
        before = self.neighbours(), self.lab.ip('-6', 'route')
        for number in range(20):
            self.send(icmp6('fe80::%x' % (number + 1), 'ff02::1',
                            b'\x86\0\0\0' + b'\x40\0\x07\x08' + bytes(8)
                            + b'\x01\x01' + packed(MAC)))
        # Frames arrive in order: the forged frames came before the datagram.
        self.assert_received(udp(POD, lab.NODE))
        self.assertEqual(before, (self.neighbours(),
                                  self.lab.ip('-6', 'route')))

    def test_icmp_redirects(self) -> None:
        inner = udp(lab.NODE, BEYOND)[2:]
        body = (b'\x05\x01\0\0' + ipaddress.ip_address(POD).packed + inner)
        body += bytes(len(body) % 2)
        body = body[:2] + struct.pack('!H', checksum(body)) + body[4:]
        for source in (lab.LAN, POD):
            head = struct.pack(
                '!BBHHHBBH4s4s', 0x45, 0, 20 + len(body), 1, 0, 64, 1, 0,
                ipaddress.ip_address(source).packed,
                ipaddress.ip_address(lab.NODE).packed)
            head = head[:10] + struct.pack('!H', checksum(head)) + head[12:]
            self.send(b'\x08\x00' + head + body, times=5)
        # Frames arrive in order: the forged frames came before the datagram.
        self.assert_received(udp(POD, lab.NODE))
        found = self.lab.ip('route', 'get', BEYOND)[0]
        self.assertEqual(('eth0', lab.LAN), (found['dev'],
                                             found['gateway']))


class TestTheMACAddress(BorderTestCase):

    def test_a_pod_takes_it_while_break0_is_gone(self) -> None:
        self.lab.run('ip', 'link', 'del', 'break0')
        self.lab.run('ip', 'link', 'set', 'eth0', 'address', self.mac,
                     netns='other')
        with self.assertLogs('kuryr_break0', 'ERROR') as logs:
            self.manager().sync()
        self.assertIn('took the MAC address %s while break0 was' % self.mac,
                      '\n'.join(logs.output))
        new = (self.lab.link('break0') or {})['address']
        self.assertNotEqual(self.mac, new)
        self.assertTrue(self.lab.ping(POD))
        for host in (lab.NODE, lab.NODE6):
            self.assertTrue(self.lab.ping(host, 'pod'))
        # Later recreations of break0 keep the new MAC address.
        self.lab.run('ip', 'link', 'del', 'break0')
        self.manager().sync()
        self.assertEqual(new, (self.lab.link('break0') or {})['address'])

    def take(self, mac: str, name: str = 'other') -> None:
        """Give the pod's interface a MAC address."""
        self.lab.run('ip', 'link', 'set', 'eth0', 'address', mac, netns=name)

    def known_to_pods(self) -> set[str]:
        """Return the MAC addresses of break0 in the pods and in the guard.

        The pods have permanent neighbours; the guard has rules that drop
        frames by their source.
        """
        found = {each['lladdr'] for name in ('pod', 'other')
                 for family in ('-4', '-6') for each in self.lab.ip(
                     family, 'neigh', 'show', 'nud', 'permanent', netns=name)}
        text = self.lab.run('nft', 'list', 'table', 'netdev',
                            'kuryr-break0-break0').stdout
        return found | set(re.findall(r'ether saddr (\S+) drop', text))

    def assert_renewed(self) -> str:
        """Check that break0 has a new MAC address, and return the address.

        The pods and the guard must have the new address, and another sync
        must change nothing.
        """
        new = str((self.lab.link('break0') or {})['address'])
        self.assertNotEqual(self.mac, new)
        self.assertEqual({new}, self.known_to_pods())
        for address in (POD, POD6):
            self.assertTrue(self.lab.ping(address), address)
        for host in (lab.NODE, lab.NODE6):
            self.assertTrue(self.lab.ping(host, 'pod'), host)
        with self.quiet():
            self.assertFalse(self.manager().sync())
        return new

    def test_a_pod_takes_it_while_break0_is_down(self) -> None:
        self.lab.run('ip', 'link', 'set', 'break0', 'down')
        self.take(self.mac)
        self.assertFalse(self.lab.ping(POD))
        with self.assertLogs('kuryr_break0', 'ERROR') as logs:
            self.manager().sync()
        self.assertIn('took the MAC address %s while break0 was' % self.mac,
                      '\n'.join(logs.output))
        new = self.assert_renewed()
        # The next bind configures its pod with the new MAC address.
        third = '100.75.30.73', 'fd00:30::73'
        self.lab.add_pod('third', *third, mac='fa:16:3e:00:00:03')
        self.bind(*third, netns='/run/netns/third', subnets=SUBNETS,
                  owner=Owner('third', 'eth0'),
                  mac_of_pod='fa:16:3e:00:00:03')
        self.assertTrue(self.lab.ping(lab.NODE6, 'third'))
        # When the other pod returns to its own MAC address, break0 keeps the
        # new address, which the pods' neighbour tables hold.
        self.take(OTHER_MAC)
        for state in ('down', 'up'):
            self.lab.run('ip', 'link', 'set', 'break0', state)
        self.manager().sync()
        self.assertEqual(new, self.assert_renewed())
        self.assert_reachable()

    def test_it_is_taken_and_break0_has_another(self) -> None:
        for command in ('down', 'address 02:00:00:00:00:77'):
            self.lab.run('ip', 'link', 'set', 'break0', *command.split())
        self.take(self.mac)
        self.manager().sync()
        self.assert_renewed()

    def test_without_an_agent(self) -> None:
        self.lab.run('ip', 'link', 'set', 'break0', 'down')
        self.take(self.mac)
        self.bind(POD, POD6, netns=self.netns, mac_of_pod=MAC,
                  subnets=SUBNETS)
        self.assert_renewed()

    def test_an_interface_of_the_node_has_it(self) -> None:
        self.lab.run('ip', 'link', 'set', 'break0', 'down')
        self.lab.run('ip', 'link', 'set', 'eth0', 'address', self.mac)
        with self.assertRaisesRegex(exceptions.KernelRefused,
                                    'If another macvlan has this MAC'):
            self.manager().sync()
        self.assertEqual(self.mac,
                         (self.lab.link('break0') or {})['address'])

    def test_it_cannot_be_computed(self) -> None:
        made = {device.derived_mac(secret, 'break0')
                for secret in ('a' * 32, 'b' * 32)}
        self.assertEqual(2, len(made))
        self.assertNotIn(self.mac, made)


class TestLeaks(BorderTestCase):
    """No frame with break0's MAC address as its source leaves the node."""

    def leaked(self, *commands: str) -> int:
        """Return the number of leaked frames while the node pings the pod.

        The commands run during the pings.
        """
        with self.lab.capture() as frames:
            ping = subprocess.Popen(
                ['ping', '-n', '-q', '-i', '0.01', POD],
                stdout=subprocess.DEVNULL)
            ping6 = subprocess.Popen(
                ['ping', '-n', '-q', '-i', '0.01', POD6],
                stdout=subprocess.DEVNULL)
            try:
                for command in commands:
                    self.lab.run('sh', '-c', command)
                for address in (POD, POD6):
                    self.lab.run('ping', '-n', '-q', '-i', '0.01', '-c', '30',
                                 '-W', '0.2', address, check=False)
            finally:
                for each in (ping, ping6):
                    each.kill()
                    each.wait()
        mac = (self.lab.link('break0') or {}).get('address', self.mac)
        return sum(frame.src in (mac, self.mac) for frame in frames)

    def test_a_pod_that_is_down_or_gone_or_another(self) -> None:
        self.require_egress()
        for command in ('ip -n pod link set eth0 address 02:00:00:00:00:42',
                        'ip -n pod link set eth0 down',
                        'ip -n pod link del eth0'):
            with self.subTest(command=command):
                self.assertEqual(0, self.leaked(command))

    def test_without_a_guard_they_do(self) -> None:
        self.lab.run('nft', 'flush', 'ruleset')
        self.assertLess(10, self.leaked('ip -n pod link set eth0 down'))

    def test_sysctls_that_a_new_break0_inherits(self) -> None:
        self.require_egress()
        for path in ('ipv4/conf/default/proxy_arp',
                     'ipv4/conf/default/arp_notify',
                     'ipv6/conf/default/ndisc_notify',
                     'ipv6/conf/default/forwarding',
                     'ipv4/conf/default/forwarding'):
            kernel.write_sysctl(path, 1)
        with self.lab.capture() as frames:
            self.lab.run('ip', 'link', 'del', 'break0')
            self.manager(addr=['fd00:30::7', '100.75.30.7']).sync()
            self.lab.run('arping', '-c', '2', '-w', '2', '-I', 'nic', POD,
                         netns='lan', check=False)
            self.lab.ping(POD, 'lan')
            time.sleep(1)
        self.assertEqual([], [frame for frame in frames
                              if frame.src == self.mac])


class TestTable(BorderTestCase):

    def pairs(self, name: str = 'pairs4') -> set[tuple[str, str]]:
        """Return the elements of a set in the guard's table."""
        text = self.lab.run('nft', '-j', 'list', 'set', 'netdev',
                            'kuryr-break0-break0', name).stdout
        found = next(each['set'] for each in json.loads(text)['nftables']
                     if 'set' in each)
        return {tuple(each['concat']) for each in found.get('elem', [])}

    def test_elements_come_and_go_with_pods(self) -> None:
        self.assertEqual({(MAC, POD), (OTHER_MAC, OTHER_POD)}, self.pairs())
        self.assertEqual({(MAC, POD6), (OTHER_MAC, OTHER6)},
                         self.pairs('pairs6'))
        self.unbind(POD, POD6)
        self.assertEqual({(OTHER_MAC, OTHER_POD)}, self.pairs())
        self.lab.del_netns('other')
        self.manager().sync()
        self.assertEqual(set(), self.pairs() | self.pairs('pairs6'))

    def test_an_address_that_passes_to_another(self) -> None:
        self.bind(POD, owner=OTHER_OWNER, netns='/run/netns/other',
                  mac_of_pod=OTHER_MAC)
        self.assertEqual({(OTHER_MAC, POD), (OTHER_MAC, OTHER_POD)},
                         self.pairs())
        self.assertFalse(self.received(udp(POD, lab.NODE)))
        self.unbind(POD, owner=OTHER_OWNER)
        self.assertEqual({(MAC, POD), (OTHER_MAC, OTHER_POD)}, self.pairs())
        self.assertTrue(self.lab.ping(POD))

    def test_another_interface_of_a_pod_goes(self) -> None:
        """The unbind of a second interface removes all pairs with its MAC.

        If the pair of the second MAC address and the first interface's
        address stayed, a later container with the second MAC address could
        send from the first interface's address.
        """
        second, mac = '100.75.30.79', '02:00:00:00:00:79'
        self.lab.add_macvlan('pod', 'net1', mac=mac)
        self.lab.run('ip', 'address', 'add', second, 'dev', 'net1',
                     netns='pod')
        self.bind(second, owner=Owner(OWNER.container_id, 'net1'),
                  netns='/run/netns/pod', mac_of_pod=mac)
        others = {(MAC, POD), (OTHER_MAC, OTHER_POD)}
        self.assertEqual(others | {(mac, second), (MAC, second), (mac, POD)},
                         self.pairs())
        self.manager().sync()
        self.assertIn((mac, POD), self.pairs())
        self.unbind(second, owner=Owner(OWNER.container_id, 'net1'))
        self.manager().sync()
        self.assertEqual(others, self.pairs())

    def test_changes_by_other_programs_are_repaired(self) -> None:
        table = 'netdev kuryr-break0-break0'
        for command in ('flush ruleset', 'delete table ' + table,
                        'flush table ' + table,
                        'flush chain %s from-pods' % table,
                        'flush set %s pairs4' % table,
                        'add element %s pairs4 { %s . %s }' % (
                            table, MAC, lab.LAN)):
            with self.subTest(command=command):
                self.lab.run('nft', command)
                self.assertIn('guard', '\n'.join(self.problems()))
                with self.assertLogs('kuryr_break0', 'INFO') as logs:
                    self.assertTrue(self.manager().sync())
                self.assertEqual(1, len([
                    line for line in logs.output if 'the guard of break0: it '
                    'was' in line or 'break0: its guard has' in line]),
                    logs.output)
                self.assertEqual([], self.problems())
                self.assertFalse(self.received(udp(lab.LAN, lab.NODE)))
                self.assert_reachable()
                self.assertFalse(self.manager().sync())

    def test_a_deletion_during_the_load_is_repaired(self) -> None:
        load = guard._load

        def interrupted(*args: Any) -> Optional[str]:
            reason = load(*args)
            self.lab.run('nft', 'flush', 'ruleset')
            return reason

        self.lab.run('nft', 'flush', 'ruleset')
        with mock.patch.object(guard, '_load', interrupted):
            self.manager().sync()
        self.assertIn('guard', '\n'.join(self.problems()))
        self.manager().sync()
        self.assertEqual([], self.problems())
        self.assertFalse(self.received(udp(lab.LAN, lab.NODE)))

    def sync_checked(self, check: Callable[[], None]) -> None:
        """Run a sync and call ``check`` after each ruleset that nft loads."""
        load, texts = guard._load, []

        def checked(*args: str) -> Optional[str]:
            reason = load(*args)
            texts.append(args[1])
            check()
            return reason

        with mock.patch.object(guard, '_load', checked):
            self.manager().sync()
        self.assertIn('policy drop', texts[-1])
        self.assertLess(1, len(texts))
        self.assertEqual([], self.problems())
        self.assertFalse(self.received(udp(lab.LAN, lab.NODE)))

    def test_no_pod_is_cut_off_while_it_is_loaded_again(self) -> None:
        for command in ('flush ruleset', 'flush ruleset; add table netdev '
                        'kuryr-break0-break0; add set netdev '
                        'kuryr-break0-break0 pairs4 { type mark; }'):
            with self.subTest(command=command):
                self.lab.run('nft', command)
                self.sync_checked(self.assert_reachable)
                self.assert_reachable()

    def test_foreign_sources_stay_blocked_during_a_reload(self) -> None:
        """Foreign sources stay blocked while a sync reloads the guard.

        A new address of the node causes the reload.
        """
        self.lab.run('ip', 'address', 'add', 'fd00:30::99/64', 'dev', 'eth0',
                     'nodad')
        with mock.patch.object(kernel.Nft, 'add',
                               side_effect=AssertionError):
            self.sync_checked(lambda: self.assertFalse(
                self.received(udp(lab.LAN, lab.NODE))))
        self.assert_reachable()

    def test_it_is_not_closed_before_all_pods_are_in_it(self) -> None:
        self.lab.run('nft', 'flush', 'ruleset')
        with mock.patch.object(
                kernel.Nft, 'add', side_effect=exceptions.KernelRefused(
                    'let pods pass', 'no memory', errno.ENOMEM)):
            with self.assertRaises(exceptions.KernelRefused):
                self.manager().sync()
        self.assert_reachable()
        self.assertIn('guard', '\n'.join(self.problems()))
        self.bind('100.75.30.80', owner=Owner('c', 'eth0'),
                  mac_of_pod='fa:16:3e:00:00:09')
        self.assert_reachable()
        self.manager().sync()
        self.assertEqual([], self.problems())
        self.assert_reachable()

    def test_more_pods_than_nft_can_load_at_once(self) -> None:
        """A sync splits large sets, since nft's message size is limited.

        Root of a user namespace cannot raise the limit of its socket.
        """
        first = ipaddress.ip_address('10.0.0.1')
        made = self.manager()._ledger.records
        for number in range(3000):
            made.put([Record(first + number, OWNER, lab.PARENT,
                             'fa:16:3e:00:%02x:%02x' % divmod(number, 256))])
        self.manager().sync()
        self.lab.run('nft', 'flush', 'ruleset')
        self.manager().sync()
        self.assertEqual(3002, len(self.pairs()))
        self.assertEqual([], self.problems())

    def test_a_pod_with_a_lost_record_is_not_cut_off(self) -> None:
        os.unlink(base.options().state_dir + '/addresses/%s.json' % POD)
        self.assertTrue(self.lab.ping(POD))
        with mock.patch.object(kernel, 'list_macvlans', return_value=[]):
            self.manager().sync()
            self.assertTrue(self.lab.ping(POD))
            self.lab.run('nft', 'flush', 'ruleset')
            self.manager().sync()
            self.assertTrue(self.lab.ping(POD))
            reconciler.Reconciler(
                base.options(), self.manager()._ledger).sync(prune=True)
            self.manager().sync()
        self.assertNotIn((MAC, POD), self.pairs())

    def test_a_state_dir_that_is_lost_cuts_no_pod_off(self) -> None:
        os.rename(base.options().state_dir, '/run/lost')
        with open(base.options().state_dir, 'w'):
            pass
        self.bind('100.75.30.73', owner=Owner('third', 'eth0'),
                  netns=self.lab.add_pod('third', '100.75.30.73',
                                         mac='fa:16:3e:00:00:03'),
                  mac_of_pod='fa:16:3e:00:00:03')
        self.assertTrue(self.lab.ping('100.75.30.73'))
        self.assertTrue(self.lab.ping(POD))

    def test_rules_of_others_stay(self) -> None:
        self.lab.run('nft', 'add table inet mine; add chain inet mine a; '
                     'add rule inet mine a counter')
        before = self.lab.run('nft', 'list', 'table', 'inet', 'mine').stdout
        self.lab.run('nft', 'delete', 'table', 'netdev',
                     'kuryr-break0-break0')
        self.manager().sync()
        self.unbind(POD)
        self.assertEqual(before, self.lab.run('nft', 'list', 'table', 'inet',
                                              'mine').stdout)

    def test_fragments_and_large_packets_pass(self) -> None:
        for command, netns in (('ping -c 1 -s 4000 ' + POD, None),
                               ('ping -c 1 -s 4000 ' + lab.NODE6, 'pod'),
                               ('ping -c 1 -s 4000 ' + POD6, None)):
            self.lab.run(*command.split(), netns=netns)

    def test_switched_off_and_on(self) -> None:
        self.manager(guard='off').sync()
        self.assertNotIn('kuryr-break0', self.lab.run(
            'nft', 'list', 'ruleset').stdout)
        self.assertEqual([], self.problems(guard='off'))
        self.assertTrue(self.problems())
        self.manager().sync()
        self.assertEqual([], self.problems())

    def test_without_nft(self) -> None:
        with mock.patch.object(kernel, 'find_program', return_value=None):
            self.lab.run('nft', 'flush', 'ruleset')
            self.manager().sync()
            self.assertEqual([], self.problems())
            self.bind('100.75.30.80', owner=Owner('c', 'eth0'),
                      mac_of_pod='fa:16:3e:00:00:09')
            for age in 0, cache.MAX_AGE:
                with mock.patch.object(cache, 'MAX_AGE', age), \
                        self.assertRaisesRegex(exceptions.GuardUnavailable,
                                               'no program nft'), \
                        self.assertLogs('kuryr_break0') as logs:
                    self.bind('100.75.30.81', 'fd00:30::81',
                              owner=Owner('d', 'eth0'),
                              mac_of_pod='fa:16:3e:00:00:09', guard='on')
                # The caller reports the error, so the log must not repeat it.
                self.assertNotIn('no program nft', str(logs.output))

    def test_an_nft_that_fails_or_hangs_costs_no_route(self) -> None:
        for number, script in enumerate(('exit 1', 'echo -e "\\xff" >&2; '
                                         'exit 1', 'exec sleep 60')):
            with self.subTest(script=script):
                self.lab.run('nft', 'flush', 'ruleset')
                with open('/run/nft', 'w') as file:
                    file.write('#!/bin/sh\n%s\n' % script)
                os.chmod('/run/nft', 0o755)
                address = '100.75.30.%d' % (80 + number)
                with mock.patch.object(kernel, 'find_program',
                                       return_value='/run/nft'), \
                        mock.patch.object(guard, '_TIMEOUT', 1), \
                        mock.patch.object(cache, 'MAX_AGE', 0), \
                        self.assertLogs('kuryr_break0', 'WARNING') as logs:
                    self.bind(address, owner=Owner('c', 'eth0'),
                              mac_of_pod='fa:16:3e:00:00:09')
                self.assertIn('The guard of break0', '\n'.join(logs.output))
                self.assertIn(address, self.lab.routes())

    def test_switched_off_nothing_is_asked_of_nftables(self) -> None:
        self.manager(guard='off').sync()
        with mock.patch.object(kernel, 'open_node_nft',
                               side_effect=AssertionError):
            self.bind('100.75.30.80', owner=Owner('c', 'eth0'),
                      mac_of_pod='fa:16:3e:00:00:09', guard='off')
            self.unbind('100.75.30.80', owner=Owner('c', 'eth0'),
                        guard='off')
        self.assertNotIn('100.75.30.80', self.lab.routes())

    def test_found_by_arp(self) -> None:
        for name in ('pod', 'other'):
            self.lab.run('ip', 'neigh', 'flush', 'nud', 'permanent',
                         netns=name)
        self.lab.run('ip', 'neigh', 'flush', 'dev', 'break0', 'nud',
                     'permanent')
        self.assertTrue(self.lab.ping(POD))
        self.assertTrue(self.lab.ping(lab.NODE, 'pod'))


class TestInThePod(BorderTestCase):
    """The guard's table in a pod, which can outlive the pod's interface."""

    TABLE = 'kuryr-break0-eth0'
    NEW_MAC = 'fa:16:3e:00:00:11'
    #: The ruleset of kuryr-break0 1.0.0.
    EARLIER = ('table netdev kuryr-break0-eth0 { chain source-fa163e000001 { '
               'type filter hook egress device "eth0" priority 0; '
               'policy accept; ether saddr != %s drop; }; }' % MAC)

    def setUp(self) -> None:
        super().setUp()
        self.require_egress()

    def ruleset(self, name: str = 'pod') -> str:
        return self.lab.run('nft', 'list', 'ruleset', netns=name).stdout

    def can_send(self, source: str, device: str = 'eth0') -> bool:
        """Return whether the pod can send an ARP reply and an advertisement.

        Docker 28 and later removes an interface that cannot send both packets.
        """
        arp = (b'\x08\x06\x00\x01\x08\x00\x06\x04\0\x02'
               + 2 * (packed(source) + ipaddress.ip_address(POD).packed))
        advertisement = icmp6(
            POD6, 'ff02::1', b'\x88\0\0\0' + b'\x20\0\0\0'
            + ipaddress.ip_address(POD6).packed + b'\x02\x01'
            + packed(source))
        results = set()
        with self.lab.socket(socket.AF_PACKET, socket.SOCK_RAW,
                             'pod') as wire:
            wire.bind((device, 0))
            for target, payload in (('ff:ff:ff:ff:ff:ff', arp),
                                    ('33:33:00:00:00:01', advertisement)):
                try:
                    wire.send((packed(target) + packed(source)
                               + payload).ljust(60, b'\0'))
                    results.add(True)
                except OSError as err:
                    self.assertEqual(errno.ENOBUFS, err.errno)
                    results.add(False)
        result, = results
        return result

    def delete_interface(self) -> None:
        self.lab.run('ip', 'link', 'del', 'eth0', netns='pod')

    def add_interface(self, name: str = 'eth0', mac: str = NEW_MAC) -> None:
        """Add a macvlan to the pod, in the order of Docker's requests."""
        for command in (
                'link add dm link %s address %s type macvlan mode bridge' % (
                    lab.PARENT, mac), 'link set dm netns pod'):
            self.lab.run('ip', *command.split())
        for command in ('link set dm name ' + name,
                        'link set %s up' % name,
                        'address add %s/24 dev %s' % (POD, name),
                        'address add %s/64 dev %s nodad' % (POD6, name)):
            self.lab.run('ip', *command.split(), netns='pod')

    def test_the_next_interface_can_send(self) -> None:
        self.assertTrue(self.can_send(MAC))
        self.assertFalse(self.can_send(self.NEW_MAC))
        for number in range(3):
            mac = 'fa:16:3e:00:00:2%d' % number
            self.delete_interface()
            self.add_interface(mac=mac)
            self.assertTrue(self.can_send(mac))
            # The new interface has the bound name and another MAC address: a
            # sync must not restore the guard for the old one.
            self.manager().sync()
            self.assertTrue(self.can_send(mac))
            # After a bind, the interface can send with its own MAC address
            # only.
            self.bind(POD, POD6, netns=self.netns, mac_of_pod=mac,
                      subnets=SUBNETS)
            self.assertTrue(self.can_send(mac))
            self.assertFalse(self.can_send(OTHER_MAC))
            self.assertEqual(1, self.ruleset().count('hook egress'))
            self.assert_reachable()

    def test_it_goes_with_the_records(self) -> None:
        for command in ('link set eth0 down', 'link set eth0 name lan0',
                        'link del lan0'):
            self.lab.run('ip', *command.split(), netns='pod')
        self.unbind(POD, POD6)
        self.assertEqual('', self.ruleset())
        self.assertIn(self.TABLE, self.ruleset('other'))

    def test_the_table_of_another_interface_stays(self) -> None:
        self.add_interface('eth1')
        self.bind('100.75.30.73', owner=Owner(OWNER.container_id, 'eth1'),
                  netns=self.netns, mac_of_pod=self.NEW_MAC)
        self.delete_interface()
        self.unbind(POD, POD6)
        self.assertNotIn(self.TABLE, self.ruleset())
        self.assertTrue(self.can_send(self.NEW_MAC, 'eth1'))
        self.assertFalse(self.can_send(OTHER_MAC, 'eth1'))

    def test_a_cleanup_takes_it_from_where_the_interface_is_gone(self
                                                                 ) -> None:
        self.delete_interface()
        records = [record for record in self.snapshot().live.values()
                   if record.owner == OWNER]
        self.assertEqual([], podside.withdraw(records[0], base.options(),
                                              dry_run=True))
        self.assertIn(self.TABLE, self.ruleset())
        self.assertEqual([], podside.withdraw(records[0], base.options()))
        self.assertEqual('', self.ruleset())

    def test_a_changed_table_is_repaired(self) -> None:
        intact = self.ruleset()
        chain = 'netdev %s source-' % self.TABLE
        self.assertEqual(1, intact.count('chain source-'))
        name = intact.partition('chain source-')[2].split()[0]
        delete = 'delete table netdev %s; ' % self.TABLE
        for rules in (
                'flush ruleset', 'flush chain ' + chain + name,
                # Kernels before 6.16 delete the chain with the interface and
                # keep the table.
                delete + 'table netdev %s' % self.TABLE,
                delete + self.EARLIER,
                delete + self.EARLIER.replace('00:01 drop', '00:99 drop')):
            with self.subTest(rules=rules):
                self.lab.run('nft', rules, netns='pod')
                self.assertNotEqual(intact, self.ruleset())
                self.assertTrue(self.manager().sync())
                self.assertEqual(intact, self.ruleset())
                self.assertFalse(self.can_send(OTHER_MAC))
                self.assertFalse(self.manager().sync())

    def test_tables_of_a_pod_are_not_read(self) -> None:
        messages = netlink.messages
        sizes: list[int] = []

        def counted(data: bytes) -> Iterator[netlink.Received]:
            sizes.append(len(data))
            return messages(data)

        with mock.patch.object(netlink, 'messages', counted):
            self.assertFalse(self.manager().sync())
        before = sum(sizes)
        with open('/run/rules', 'w') as file:
            file.write('add table netdev {0}\nadd chain netdev {0} mine\n'
                       .format(self.TABLE) + 300 * (
                           'add rule netdev %s mine counter\n' % self.TABLE))
        for _ in range(3):  # a larger batch exceeds the socket buffer
            self.lab.run('nft', '-f', '/run/rules', netns='pod')
        sizes.clear()
        with mock.patch.object(netlink, 'messages', counted):
            self.manager().sync()
        self.assertLess(sum(sizes), before + 3000)
        self.unbind(POD, POD6)
        self.assertEqual('', self.ruleset())


class TestWithoutTheHook(BorderTestCase):
    """Linux before 5.16 has no egress hook, so pods get no guard."""

    def test_there_is_nothing_to_repair(self) -> None:
        # Linux 5.10 has no egress hook; every sync must report no repair.
        with contextlib.ExitStack() as stack:
            if self.has_egress():
                self.lab.run('nft', 'delete', 'table', 'netdev',
                             'kuryr-break0-eth0', netns='pod')
                stack.enter_context(mock.patch.object(
                    kernel.Nft, 'add_source_rule',
                    side_effect=exceptions.KernelRefused(
                        'guard it', 'no such hook', errno.EOPNOTSUPP)))
                stack.enter_context(mock.patch.object(
                    kernel, 'read_release', return_value=(5, 10)))
            for dry_run in (True, False):
                self.assertEqual((), self.manager().sync(dry_run).pods)
        repaired = int(self.has_egress())
        for dry_run, count in ((True, repaired), (False, repaired),
                               (False, 0)):
            self.assertEqual(count, len(self.manager().sync(dry_run).pods))


class TestInput(cli_base.CLITestCase):
    """A bind refuses invalid input of any caller and records nothing."""

    def refuse(self, *texts: str, **changes: Any) -> str:
        fields: dict[str, Any] = {
            'owner': OWNER, 'parent': lab.PARENT, 'mac': MAC, **changes}
        with self.assertRaises(exceptions.InputRefused) as caught:
            self.manager().bind(
                fields.pop('owner'),
                [ipaddress.ip_address(text) for text in texts or (POD,)],
                **fields)
        message = str(caught.exception)
        self.assertLess(len(message), 400)
        self.assertRegex(message, r'\A[^\x00-\x1f]*\Z')
        self.assertEqual(set(), self.bound())
        return message

    def test_each(self) -> None:
        for mac in ('fa:16:3e:00:00:01\n', 'zz', '', 'ff:ff:ff:ff:ff:ff',
                    '01:00:5e:00:00:01', 'fa163e000001'):
            self.assertIn('MAC address', self.refuse(mac=mac))
        for owner in (Owner('a\nb', 'eth0'), Owner('a', 'eth0\nERROR'),
                      Owner('a' * 5000, 'eth0'), Owner('a\x1b[2J', 'eth0')):
            self.refuse(owner=owner)
        self.refuse(pod='a\nb')
        self.refuse(netns='/run/netns/a\0b')
        self.assertIn('scope', self.refuse('fd00::51%x'))
        self.assertIn('addresses', self.refuse(*(
            '10.9.%d.%d' % divmod(number, 250) for number in range(3000))))

    def test_an_address_twice_is_one(self) -> None:
        self.bind(POD, POD, POD)
        self.assertEqual({POD}, set(self.lab.routes()))

    def test_a_mac_address_in_capitals(self) -> None:
        self.bind(POD, mac_of_pod=MAC.upper())
        self.assertEqual([], self.problems())

    def test_a_pipe_as_a_namespace(self) -> None:
        os.mkfifo('/run/netns/pipe')
        done = self.call('bind', POD, '--owner', 'web', '--netns',
                         '/run/netns/pipe')
        self.assertEqual(2, done.returncode, done.stderr)


class TestFlood(BorderTestCase):
    """A sync reads no oversized table of a pod with CAP_NET_ADMIN."""

    def fill(self, text: str, *command: str) -> None:
        with open('/run/batch', 'w') as file:
            file.write(text)
        self.lab.run(*command, '/run/batch', netns='pod')

    def assert_repaired(self) -> None:
        self.lab.run('ip', 'neigh', 'flush', 'dev', 'eth0', 'nud',
                     'permanent', netns='other')
        received = []

        class CountingSocket(socket.socket):

            def recv(self, *args: Any) -> bytes:
                data = super().recv(*args)
                received.append(len(data))
                return data

        with mock.patch.object(socket, 'socket', CountingSocket), \
                mock.patch.object(nft, '_kept', threading.local()):
            self.manager().sync()
        self.assertLess(sum(received), 2 ** 20)
        for name in ('pod', 'other'):
            self.assertTrue(self.lab.ping(lab.NODE6, name))

    def test_of_routes(self) -> None:
        self.fill(''.join('route add 10.%d.%d.%d dev eth0 proto 176\n' % (
            number >> 16, number >> 8 & 255, number & 255)
            for number in range(100000)), 'ip', '-batch')
        self.assert_repaired()

    def test_of_rules(self) -> None:
        self.require_egress()
        table, = [each for each in self.lab.run(
            'nft', 'list', 'tables', netns='pod').stdout.split()
            if each.startswith('kuryr')]
        chain, = re.findall(r'chain (\S+) ', self.lab.run(
            'nft', 'list', 'ruleset', netns='pod').stdout)
        for _ in range(30):
            self.fill('add rule netdev %s %s accept\n' % (table, chain)
                      * 1000, 'nft', '-f')
        self.assert_repaired()
