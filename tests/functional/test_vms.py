# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import ipaddress
import os
import socket
import struct
from typing import Optional

from kuryr_break0.model import Owner
from tests.functional import base
from tests.functional.cli_base import CLITestCase
from tests.functional.doctor.base import DoctorTestCase
from tests.support import lab
from tests.support import program

ONE, ONE6 = '100.75.30.81', 'fd00:30::81'
TWO, TWO6 = '100.75.30.82', 'fd00:30::82'
MAC = '02:00:00:00:00:81'


def power_on(test: base.LabTestCase, name: str, *addresses: str,
             mac: Optional[str] = None) -> lab.VM:
    """Start a VM, or skip the test if this machine cannot run a VM."""
    try:
        return test.lab.add_vm(name, *addresses, mac=mac)
    except OSError as err:
        test.skipTest('no macvtap can be opened here, as root of the '
                      'machine can: %s' % err)
        raise AssertionError from err


def checksum(data: bytes) -> int:
    total = sum(struct.unpack('!%dH' % (len(data) // 2), data))
    total = (total >> 16) + (total & 0xffff)
    return ~(total + (total >> 16)) & 0xffff


def solicitation(target: str, source: str, mac: str, to: str = '',
                 from_mac: str = '') -> bytes:
    """Return a neighbour solicitation for a target.

    :param to: the destination MAC address; by default the target's group
    """
    wanted = ipaddress.IPv6Address(target).packed
    group = b'\xff\x02' + bytes(9) + b'\x01\xff' + wanted[13:]
    src, dst = ipaddress.IPv6Address(source).packed, wanted if to else group
    link_to = bytes.fromhex(to.replace(':', '')) or b'\x33\x33' + group[12:]
    own = bytes.fromhex(mac.replace(':', ''))
    body = wanted + b'\1\1' + own
    text = src + dst + struct.pack('!II', 32, 58) + struct.pack(
        '!BBHI', 135, 0, 0, 0) + body
    return (link_to + bytes.fromhex((from_mac or mac).replace(':', ''))
            + b'\x86\xdd' + struct.pack('!IHBB', 6 << 28, 32, 58, 255) + src
            + dst + struct.pack('!BBHI', 135, 0, checksum(text), 0) + body)


class VMTestCase(CLITestCase):
    """Two virtual machines, bound from the command line."""

    def setUp(self) -> None:
        super().setUp()
        self.lab.add_ipv6()
        self.one = power_on(self, 'one', ONE, ONE6, mac=MAC)
        self.two = power_on(self, 'two', TWO, TWO6)
        self.lab.settle()

    def run_it(self, *args: str, code: int = 0) -> str:
        done = self.call(*args)
        self.assertEqual(code, done.returncode, done.stdout + done.stderr)
        return done.stdout

    def bind_vm(self, vm: lab.VM, *addresses: str) -> None:
        self.run_it('bind', *addresses, '--owner', vm.name, '--mac', vm.mac,
                    '--parent', lab.PARENT)

    def bind_both(self) -> None:
        self.bind_vm(self.one, ONE, ONE6)
        self.bind_vm(self.two, TWO, TWO6)

    def assert_reachable(self) -> None:
        for vm, addresses in ((self.one, (ONE, ONE6)),
                              (self.two, (TWO, TWO6))):
            for own, address in zip((lab.NODE, lab.NODE6), addresses):
                with self.subTest(vm=vm.name, address=address):
                    self.assert_answers(address)
                    self.assert_answers(own, vm.name)

    def assert_answers(self, address: str, netns: Optional[str] = None
                       ) -> None:
        """Ping an address until it answers.

        The first answers may be late: a thread of this process runs the VM.
        """
        lab.until(lambda: self.lab.ping(address, netns))


class TestReach(VMTestCase):

    def setUp(self) -> None:
        super().setUp()
        self.require_rewriting()

    def test_both_ways_and_families_in_silence(self) -> None:
        with self.lab.capture() as frames:
            self.bind_both()
            self.assert_reachable()
            self.assertIn('0 out of sync', self.run_it('status'))
            for address in (TWO, TWO6, lab.LAN, lab.LAN6):
                self.assert_answers(address, 'one')
            for address in (lab.NODE, lab.NODE6):
                self.assertTrue(self.lab.ping(address, 'lan'), address)
        mac = self.lab.ip('link', 'show', 'break0')[0]['address']
        self.assertIn(self.one.mac, {each.src for each in frames})
        self.assertEqual([], [each for each in frames if each.src == mac])
        # Only the parent answers the LAN's solicitations for the node.
        own = self.lab.ip('link', 'show', lab.PARENT)[0]['address']
        self.assertEqual({own}, {each.src for each in frames
                                 if each.answers == lab.NODE6})

    def test_break0_joins_no_group(self) -> None:
        self.bind_both()
        self.assert_reachable()
        self.assertEqual(
            {'ff02::1', 'ff01::1'},
            {group['address'] for link in self.lab.ip(
                '-6', 'maddress', 'show', 'dev', 'break0')
             for group in link['maddr']})

    def test_a_neighbour_that_is_stale(self) -> None:
        # A VM probes a stale neighbour by unicast from a link-local address.
        self.bind_both()
        self.assert_answers(lab.NODE6, 'one')
        for state in ('stale', 'delay', 'probe', 'failed'):
            self.lab.run('ip', 'neighbour', 'change', lab.NODE6, 'dev',
                         lab.PARENT, 'nud', state, netns='one')
            self.assertTrue(self.lab.ping(lab.NODE6, 'one', cold=False),
                            state)

    def test_break0_was_deleted(self) -> None:
        self.bind_both()
        self.lab.run('ip', 'link', 'delete', 'break0')
        self.run_it('sync')
        self.assert_reachable()

    def test_the_node_gets_another_address(self) -> None:
        self.bind_both()
        self.lab.run('ip', 'address', 'add', 'fd00:30::52/64', 'dev',
                     lab.PARENT, 'nodad')
        self.run_it('sync')
        self.assert_reachable()
        self.assert_answers('fd00:30::52', 'one')
        self.lab.run('ip', 'address', 'delete', 'fd00:30::52/64', 'dev',
                     lab.PARENT)
        self.run_it('sync')
        self.assertFalse(self.lab.ping('fd00:30::52', 'one'))
        self.assert_reachable()


class TestAnswers(VMTestCase):
    """Solicitations that break0 answers or ignores."""

    def setUp(self) -> None:
        super().setUp()
        self.require_rewriting()
        self.bind_both()
        self.mac = self.lab.ip('link', 'show', 'break0')[0]['address']

    def answered(self, frame: bytes, netns: str = 'one'
                 ) -> list[tuple[str, str]]:
        """Return target and receiver of each answer of break0 to a frame."""
        good = solicitation(lab.NODE6, ONE6, MAC)
        with self.lab.socket(socket.AF_PACKET, socket.SOCK_RAW, 'one') as vm, \
                self.lab.socket(socket.AF_PACKET, socket.SOCK_RAW,
                                netns) as sender:
            vm.bind((lab.PARENT, lab.ETH_P_ALL))
            vm.settimeout(lab.PATIENCE)
            sender.bind(('nic' if netns == 'lan' else lab.PARENT, 0))
            sender.send(frame)
            if netns == 'lan':
                # Frames arrive in order: ``frame`` came before these pings.
                self.assert_answers(ONE, 'lan')
            vm.send(good)
            found: list[tuple[str, str]] = []
            while (lab.NODE6, ONE6) not in found:
                each = lab.Frame(vm.recv(2 ** 16))
                if each.answers and each.src == self.mac:
                    found.append((each.answers, str(ipaddress.IPv6Address(
                        each.data[38:54]))))
        return found[:-1]

    def test_by_unicast(self) -> None:
        with self.lab.socket(socket.AF_PACKET, socket.SOCK_RAW, 'one') as vm:
            vm.bind((lab.PARENT, lab.ETH_P_ALL))
            vm.settimeout(lab.PATIENCE)
            vm.send(solicitation(lab.NODE6, ONE6, MAC, to=self.mac))
            while lab.Frame(vm.recv(2 ** 16)).answers != lab.NODE6:
                pass

    def test_solicitations_of_other_hosts(self) -> None:
        for name, frame, netns in (
                ('of another host', solicitation(lab.LAN6, ONE6, MAC), 'one'),
                ('of another VM', solicitation(TWO6, ONE6, MAC), 'one'),
                ('from an address that is not bound',
                 solicitation(lab.NODE6, 'fd00:30::99', MAC), 'one'),
                ("from the other VM's", solicitation(lab.NODE6, TWO6, MAC),
                 'one'),
                ('without a source', solicitation(lab.NODE6, '::', MAC),
                 'one'),
                ('from the LAN', solicitation(
                    lab.NODE6, lab.LAN6, self.lab.ip(
                        'link', 'show', 'nic', netns='lan')[0]['address']),
                 'lan'),
                ('from the LAN, to break0', solicitation(
                    lab.NODE6, lab.LAN6, '02:00:00:00:00:99', to=self.mac),
                 'lan')):
            with self.subTest(name), self.lab.capture() as frames:
                self.assertEqual([], self.answered(frame, netns))
            self.assertEqual([], [each for each in frames
                                  if each.src == self.mac])


class TestEnd(VMTestCase):

    def test_with_its_macvtap(self) -> None:
        self.bind_both()
        self.one.power_off()
        self.assertIn('its sandbox is gone', self.run_it('status', code=1))
        self.run_it('sync')
        self.assertEqual({TWO, TWO6}, self.bound())
        self.assertEqual({TWO, TWO6}, set(self.lab.routes()))
        self.assert_answers(TWO)

    def test_by_the_next_command(self) -> None:
        self.bind_both()
        self.one.power_off()
        self.bind_vm(self.two, TWO)
        self.assertEqual({TWO, TWO6}, self.bound())

    def test_its_address_is_free_at_once(self) -> None:
        self.bind_both()
        self.one.power_off()
        self.two.mac, two = '02:00:00:00:00:99', self.two.mac
        self.bind_vm(self.two, ONE)
        self.two.mac = two
        self.assertIn(ONE, self.bound())

    def test_it_comes_back(self) -> None:
        self.bind_both()
        self.one.power_off()
        self.one = power_on(self, 'one', ONE, ONE6, mac=MAC)
        self.run_it('sync')
        self.assertEqual({ONE, ONE6, TWO, TWO6}, self.bound())
        self.assert_answers(ONE)

    def test_bound_before_it_is_started(self) -> None:
        self.one.power_off()
        self.bind_both()
        self.run_it('sync')
        self.assertEqual({ONE, ONE6, TWO, TWO6}, self.bound())
        self.one = power_on(self, 'one', ONE, ONE6, mac=MAC)
        self.run_it('sync')
        self.assert_answers(ONE)
        self.one.power_off()
        self.run_it('sync')
        self.assertEqual({TWO, TWO6}, self.bound())

    def test_seen_from_elsewhere(self) -> None:
        # A sync in the namespace "lan" sees no macvtap of the VMs, and must
        # not unbind the VMs.
        self.bind_both()
        self.lab.run('ip', 'link', 'add', 'break0', 'link', 'nic', 'type',
                     'macvlan', netns='lan')
        self.lab.run(program.BREAK0, 'sync', netns='lan', check=False)
        self.assertIn('another network namespace than its macvtap',
                      self.lab.run(program.BREAK0, 'status', netns='lan',
                                   check=False).stdout.replace('\n', ' '))
        self.assertEqual({ONE, ONE6, TWO, TWO6}, self.bound())

    def test_the_parent_was_deleted(self) -> None:
        # The kernel deletes macvtaps and break0 with their parent.
        self.bind_both()
        self.lab.run('ip', 'link', 'delete', lab.PARENT)
        self.run_it('sync', code=3)
        self.assertEqual({ONE, ONE6, TWO, TWO6}, self.bound())

    def test_the_agent_hears_of_it(self) -> None:
        self.bind_both()
        with open('/run/kuryr.conf', 'w') as file:
            # No sync may be due to the timer.
            file.write('[break0]\nresync_interval = 3600\n')
        agent = program.start(
            [program.BREAK0, '--config-file', '/run/kuryr.conf', '--log-file',
             '/run/agent.log', 'agent'])
        self.addCleanup(agent.wait)
        self.addCleanup(agent.kill)
        lab.until(lambda: os.path.exists('/run/kuryr-break0/heartbeat'))
        self.one.power_off()
        lab.until(lambda: set(self.lab.routes()) == {TWO, TWO6}
                  and self.bound() == {TWO, TWO6})


class TestDoctor(DoctorTestCase):

    def set_up_pods(self) -> None:
        self.require_rewriting()
        self.vm = power_on(self, 'one', ONE, ONE6, mac=MAC)
        self.lab.settle()
        self.bind(ONE, ONE6, owner=Owner('one', 'eth0'), mac_of_pod=MAC)

    def test_it_is_well(self) -> None:
        self.assertEqual({}, self.findings())
        self.vm.power_off()
        self.assertEqual(['sandbox-gone'], list(self.findings()))

    def test_without_a_guard(self) -> None:
        self.manager(guard='off').sync()
        self.assert_found('solicitations-unanswered', '', ONE6, guard='off')
        self.assertFalse(self.lab.ping(lab.NODE6, 'one'))
        lab.until(lambda: self.lab.ping(lab.NODE, 'one'))
