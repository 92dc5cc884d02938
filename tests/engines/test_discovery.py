# SPDX-License-Identifier: Apache-2.0

"""Tests discovery of containers of engines without a CNI plugin."""

from __future__ import annotations

import statistics
import subprocess

from tests.engines import base
from tests.engines.discovery_base import DiscoveryTestCase
from tests.support import lab
from tests.support import program


class TestDocker(DiscoveryTestCase):

    def setUp(self) -> None:
        super().setUp()
        self.docker = base.Docker(self)
        self.docker('network', 'create', '--driver', 'macvlan', '--ipv6',
                    '--subnet', '100.75.30.0/24', '--ip-range',
                    '100.75.30.128/25', '--gateway', lab.LAN, '--subnet',
                    'fd00:30::/64', '--opt', 'parent=eth0', 'lan')

    def test_core(self) -> None:
        self.core(self.docker)

    def test_time_to_the_first_ping(self) -> None:
        self.start_agent()
        times = self.bound_times(self.docker, 10)
        print('docker: from the end of "run" to the first ping, ms:',
              ' '.join('%.0f' % (each * 1000) for each in times),
              'median %.0f' % (statistics.median(times) * 1000))
        self.until(lambda: len(self.bound()) == 20)  # also by IPv6

    def test_another_mac_address(self) -> None:
        self.start_agent()
        for number in range(3):
            mac = '02:00:00:00:01:%02x' % number
            self.docker.run_with_mac('web', mac, '100.75.30.200',
                                     'fd00:30::200')
            self.assertEqual(mac, self.docker.attachment(
                'web', 'lan')['MacAddress'])
            self.assertEqual('100.75.30.200', self.reach(self.docker, 'web'))
            self.docker('rm', '--force', 'web')

    def test_six_at_once(self) -> None:
        self.start_agent()
        names = ['c%d' % number for number in range(6)]
        running = [subprocess.Popen(
            [*self.docker.command, 'run', '--detach', '--name', name,
             '--network', 'lan', 'box', 'sleep', '1000'],
            stdout=subprocess.DEVNULL) for name in names]
        for each in running:
            self.assertEqual(0, each.wait())
        for name in names:
            self.reach(self.docker, name)

    def test_second_network_on_a_second_nic(self) -> None:
        self.lab.run('ip', 'link', 'add', 'eth1', 'type', 'veth', 'peer',
                     'name', 'nic1')
        for name in ('eth1', 'nic1'):
            self.lab.run('ip', 'link', 'set', name, 'up')
        self.lab.run('ip', 'address', 'add', '10.9.0.1/24', 'dev', 'eth1')
        # On an interface without addresses, the kernel prefers an address of
        # lo as source (inet_select_addr). MASQUERADE would use this address,
        # so break0 gets an address in 169.254.0.0/16.
        self.lab.run('ip', 'address', 'add', '10.255.0.51/32', 'dev', 'lo')
        self.docker('network', 'create', '--driver', 'macvlan', '--subnet',
                    '10.9.0.0/24', '--ip-range', '10.9.0.128/25', '--opt',
                    'parent=eth1', 'storage')
        self.start_agent()
        self.docker.run('web', '--network', 'lan')
        self.reach(self.docker, 'web')
        self.docker('network', 'connect', 'storage', 'web')
        address = self.docker.address('web', 'storage')
        self.until(lambda: self.lab.ping(address, cold=False))
        self.assertTrue(self.docker.inside('web')(
            'ping', '-c', '1', '-W', '1', '10.9.0.1'))
        self.assertEqual('eth1', self.routed()[address])
        # The records of both interfaces have the container's name, and status
        # prints it.
        self.until(lambda: {record.pod for record
                            in self.snapshot().live.values()} == {'web'})
        shown = self.lab.run(program.BREAK0, '--config-file', base.CONF,
                             'status').stdout
        self.assertRegex(shown, r'web/eth1 +\| +discovered')
        self.docker('network', 'disconnect', 'storage', 'web')
        self.until(lambda: address not in self.routed())
        self.reach(self.docker, 'web')

    def test_created_again_with_the_same_address(self) -> None:
        self.start_agent()
        for _ in range(3):
            self.docker('create', '--name', 'web', '--network', 'lan',
                        '--ip', '100.75.30.201', 'box', 'sleep', '1000')
            self.docker('start', 'web')
            self.reach(self.docker, 'web')
            self.docker('rm', '--force', 'web')

    def test_disconnected_and_connected(self) -> None:
        # Docker 28 and later announces the addresses of the new interface, and
        # deletes the interface if that fails. Debian 12 has an earlier Docker.
        # To test a later Docker, unpack the packages of Debian unstable, and
        # put their programs first in PATH.
        self.start_agent()
        self.docker.run('web', '--network', 'lan')
        self.reach(self.docker, 'web')
        netns = self.docker('inspect', '--format',
                            '{{.NetworkSettings.SandboxKey}}', 'web')

        def tables() -> str:
            return self.lab.run('nsenter', '--net=' + netns, 'nft', 'list',
                                'tables', 'netdev').stdout

        self.assertIn('kuryr-break0-eth0', tables())
        for _ in range(3):
            self.docker('network', 'disconnect', 'lan', 'web')
            self.docker('network', 'connect', 'lan', 'web')
            self.reach(self.docker, 'web')
        self.docker('network', 'disconnect', 'lan', 'web')
        self.until(lambda: not tables())

    def test_addresses_set_inside(self) -> None:
        self.start_agent()
        self.docker.run('web', '--network', 'lan', '--cap-add', 'NET_ADMIN')
        self.docker.run('victim', '--network', 'lan')
        self.reach(self.docker, 'web')
        victim = self.reach(self.docker, 'victim')
        before = self.routed()
        inside = self.docker.inside('web')
        for address in ('10.66.0.1/24', victim + '/32', lab.LAN + '/32',
                        lab.NODE + '/32', '224.0.0.1/32'):
            inside('ip', 'address', 'add', address, 'dev', 'eth0')
        self.assertTrue(inside('ip', 'address', 'add', '100.75.30.77/24',
                               'dev', 'eth0'))
        # When the allowed address is bound, the other addresses have been
        # refused.
        self.until(lambda: '100.75.30.77' in self.routed())
        inside('ip', 'address', 'add', '100.75.30.78/24', 'dev', 'eth0')
        self.until(lambda: '100.75.30.78' in self.routed())
        self.assertEqual({**before, '100.75.30.77': 'eth0',
                          '100.75.30.78': 'eth0'}, self.routed())
        self.reach(self.docker, 'victim')
        for number in (77, 78):
            inside('ip', 'address', 'del', '100.75.30.%d/24' % number, 'dev',
                   'eth0')
        self.until(lambda: self.routed() == before)

    def test_agent_is_restarted_and_switched_off(self) -> None:
        agent = self.start_agent()
        self.docker.run('web', '--network', 'lan')
        address = self.reach(self.docker, 'web')
        before = self.snapshot().live
        agent.terminate()
        agent.wait()
        self.docker('restart', '--time', '0', 'web')
        self.docker.run('new', '--network', 'lan')
        agent = self.start_agent()
        self.reach(self.docker, 'web')
        self.reach(self.docker, 'new')
        self.until(lambda: len(self.bound()) == 4)
        self.assertEqual(len(before), 2)
        self.configure('enabled = false\n' + self.conf)
        agent.send_signal(1)
        self.assert_nothing_left()
        self.configure(self.conf)
        agent.send_signal(1)
        self.reach(self.docker, 'web')
        agent.terminate()
        agent.wait()
        self.lab.run(program.BREAK0, '--config-file', base.CONF, 'cleanup')
        self.assertFalse(self.lab.ping(address))
        self.assertEqual([], [link['ifname'] for link in self.lab.ip('link')
                              if link['ifname'].startswith('break0')])


class TestPodman(DiscoveryTestCase):

    def setUp(self) -> None:
        super().setUp()
        self.podman = base.Podman(self, 'netavark')
        self.podman('network', 'create', '--driver', 'macvlan', '--subnet',
                    '100.75.30.0/24', '--ip-range', '100.75.30.128/25',
                    '--gateway', lab.LAN, '--subnet', 'fd00:30::/64',
                    '--opt', 'parent=eth0', 'lan')

    def test_core(self) -> None:
        self.core(self.podman)

    def test_same_address_and_another_mac_address(self) -> None:
        self.start_agent()
        self.podman.run('web', '--network', 'lan:ip=100.75.30.200')
        macs = set()
        for _ in range(3):
            self.assertEqual('100.75.30.200', self.reach(self.podman, 'web'))
            macs.add(self.podman.attachment('web', 'lan')['MacAddress'])
            self.podman('restart', '--time', '0', 'web')
        self.assertEqual(3, len(macs))

    def test_time_to_the_first_ping(self) -> None:
        self.start_agent()
        times = self.bound_times(self.podman, 10)
        print('podman: from the end of "run" to the first ping, ms:',
              ' '.join('%.0f' % (each * 1000) for each in times),
              'median %.0f' % (statistics.median(times) * 1000))
        self.until(lambda: len(self.bound()) == 20)  # also by IPv6
