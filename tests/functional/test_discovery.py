# SPDX-License-Identifier: Apache-2.0

"""Discovery of containers; plain namespaces replace the containers."""

from __future__ import annotations

import dataclasses
import ipaddress
import os
import shutil
import signal
import subprocess
import sys
import time
from typing import Any, Callable
from unittest import mock

import psutil

from kuryr_break0.discovery import binder
from kuryr_break0.discovery import engines
from kuryr_break0.discovery import finder
from kuryr_break0.discovery import records
from kuryr_break0.engine import containers
from kuryr_break0 import exceptions
from kuryr_break0 import kernel
from kuryr_break0 import ledger
from kuryr_break0.model import Origin
from kuryr_break0.model import Owner
from kuryr_break0.model import Record
from kuryr_break0 import pace
from tests.functional import base
from tests.functional.discovery_base import AGENT
from tests.functional.discovery_base import CONF
from tests.functional.discovery_base import DiscoveryTestCase
from tests.functional.discovery_base import is_idle
from tests.functional.discovery_base import LATER
from tests.functional.discovery_base import ONE
from tests.functional.discovery_base import ONE6
from tests.functional.discovery_base import OPTIONS
from tests.functional.discovery_base import QUIET
from tests.functional.discovery_base import TWO
from tests.support import dhcp
from tests.support import lab
from tests.support import program


class TestFinding(DiscoveryTestCase):

    def test_before_and_after_the_agent(self) -> None:
        self.lab.add_pod('one', ONE, ONE6)
        self.start()
        self.until_bound(ONE, ONE6)
        self.lab.add_pod('two', TWO)
        self.until_bound(ONE, ONE6, TWO)
        self.assert_reachable(ONE, 'one')
        self.assert_reachable(ONE6, 'one')
        self.assert_reachable(TWO, 'two')
        self.assertEqual([], self.problems())
        self.lab.del_netns('one')
        self.until_bound(TWO)
        self.lab.del_netns('two')
        self.until_bound()
        self.assertEqual([], self.lab.ip('neigh', 'show', 'dev', 'break0'))

    def test_addresses_come_and_go_in_a_container(self) -> None:
        self.lab.add_netns('one')
        self.start()
        self.lab.add_macvlan('one')
        self.until_looked()
        self.assertEqual({}, self.lab.routes())
        self.inside('one', 'ip', 'address', 'add', ONE + '/24', 'dev', 'eth0')
        self.until_bound(ONE)
        self.inside('one', 'ip', 'address', 'add', ONE6 + '/64', 'dev',
                    'eth0', 'nodad')
        self.until_bound(ONE, ONE6)
        self.assert_reachable(ONE6, 'one')
        for number in range(3):
            self.inside('one', 'ip', 'link', 'set', 'eth0', 'address',
                        '02:00:00:00:05:%02x' % number)
            self.until(lambda: self.lab.ping(ONE, cold=False))
            self.until(lambda: self.lab.ping(lab.NODE, 'one', cold=False))
        self.inside('one', 'ip', 'link', 'set', 'eth0', 'down')
        self.inside('one', 'ip', 'link', 'set', 'eth0', 'name', 'lan0')
        self.inside('one', 'ip', 'link', 'set', 'lan0', 'up')
        self.until(lambda: {record.owner.ifname for record
                            in self.snapshot().live.values()} == {'lan0'})
        self.inside('one', 'ip', 'address', 'flush', 'dev', 'lan0')
        self.until_bound()
        self.inside('one', 'ip', 'address', 'add', ONE + '/24', 'dev',
                    'lan0')
        self.until_bound(ONE)
        self.inside('one', 'ip', 'link', 'del', 'lan0')
        self.until_bound()

    def test_a_namespace_that_a_program_keeps_open(self) -> None:
        # The server of Podman 4 holds descriptors of inspected namespaces.
        netns = self.lab.add_pod('one', ONE)
        known = kernel.identify(netns)
        assert known is not None
        if known.cookie is None:
            self.skipTest('needs numbers of namespaces, Linux 6.18')
        try:
            os.close(kernel.namespaces.open_by_cookie(known))
        except OSError:
            self.skipTest('needs the first process namespace, as from Linux '
                          '7.0 on only that shows namespaces by their numbers')
        self.start()
        self.until_bound(ONE)
        with open(netns) as file:
            self.lab.run('ip', 'netns', 'del', 'one')
            held = '--net=/proc/%d/fd/%d' % (os.getpid(), file.fileno())
            # The kernel still opens the namespace by its number. After the
            # agent has bound the second namespace, it has also handled the
            # removal of the first one's name.
            self.lab.add_pod('two', TWO)
            self.until_bound(ONE, TWO)
            self.assertTrue(self.lab.ping(ONE))
            self.lab.run('nsenter', held, 'ip', 'link', 'del', 'eth0')
            self.until_bound(TWO)

    def test_interface_is_renamed_while_it_is_read(self) -> None:
        # Docker sets the name and then the addresses. The patch does both
        # between two netlink requests of the finder.
        self.lab.add_pod('one')
        for command in ('link set eth0 down', 'link set eth0 name dm-1'):
            self.inside('one', 'ip', *command.split())
        macvlans = kernel.Netlink.macvlans

        def then_renamed(netlink: kernel.Netlink) -> list[kernel.Link]:
            found = macvlans(netlink)
            if any(link.name == 'dm-1' for link in found):
                for command in ('link set dm-1 name eth0',
                                'address add %s/24 dev eth0' % ONE,
                                'link set eth0 up'):
                    self.inside('one', 'ip', *command.split())
            return found

        options = base.options(
            discover=True, proc_dirs=[], resync_interval=3600,
            allowed_cidrs=['100.75.0.0/16', 'fd00:30::/64'])
        found = finder.Finder(options, ledger.Ledger(options.state_dir))
        self.addCleanup(found.close)

        def is_quiet() -> bool:
            found.read_events()
            found.work()
            self.assertLessEqual({record.owner.ifname for record
                                  in self.snapshot().live.values()}, {'eth0'})
            return is_idle(found) and bool(self.bound())

        with self.quiet(), mock.patch.object(kernel.Netlink, 'macvlans',
                                             then_renamed):
            lab.until(is_quiet)
        self.assertTrue(self.lab.ping(ONE))
        self.assertTrue(self.lab.ping(lab.NODE, 'one'))

    def test_names_by_control_groups(self) -> None:
        netns = self.lab.add_netns('one')
        os.makedirs('/run/proc/7/ns')
        os.symlink(netns, '/run/proc/7/ns/net')
        record = Record(
            ipaddress.ip_address(ONE), Owner('discovered-1', 'eth0'), 'eth0',
            '02:00:00:00:00:01', netns='/run/proc/7/ns/net',
            namespace=kernel.identify(netns), origin=Origin.DISCOVERED)
        for groups, name in (
                ('0::/lxc.payload.web', 'web'),
                ('0::/lxc.payload.web/lxc.payload.mail', 'web'),
                # cgroup v1, read by an agent in another cgroup namespace.
                ('4:pids:/\n1:name=systemd:/../lxc.payload.web/init.scope\n',
                 'web'),
                (r'0::/machine.slice/machine-my\x2dweb.scope/payload',
                 'my-web'),
                ('0::/machine.slice/systemd-nspawn@web.service/payload\n',
                 'web'),
                ('0::/machine.slice/machine-a.slice/web.scope', None),
                ('0::/machine.slice/libpod-0123abcd.scope', None),
                ('0::/lxc.payload.we\x07b', None), ('0::/', None)):
            with self.subTest(groups=groups):
                with open('/run/proc/7/cgroup', 'w') as file:
                    file.write(groups)
                self.assertEqual(name, engines.read_cgroup_name(record))
        # The process number now belongs to another process.
        with open('/run/proc/7/cgroup', 'w') as file:
            file.write('0::/lxc.payload.web')
        os.remove('/run/proc/7/ns/net')
        os.symlink(self.lab.add_netns('two'), '/run/proc/7/ns/net')
        self.assertIsNone(engines.read_cgroup_name(record))
        # The process has ended, the namespace has a name, or the record has
        # no path.
        for path in ('/run/proc/8/ns/net', netns, None):
            self.assertIsNone(engines.read_cgroup_name(
                dataclasses.replace(record, netns=path)))

    def test_namespace_without_a_name(self) -> None:
        self.start()
        process = subprocess.Popen(['unshare', '--net', 'sleep', '1000'])
        self.addCleanup(process.wait)
        self.addCleanup(process.kill)
        self.until(lambda: os.readlink('/proc/%d/ns/net' % process.pid)
                   != os.readlink('/proc/self/ns/net'))
        self.lab.run('ip', 'link', 'add', 'mv', 'link', 'eth0', 'type',
                     'macvlan', 'mode', 'bridge')
        # LXC moves the interface in this way. The kernel assigns the
        # namespace a number (nsid) for the event of the move.
        self.lab.run('ip', 'link', 'set', 'mv', 'netns', str(process.pid))
        for command in (('link', 'set', 'mv', 'up'),
                        ('address', 'add', ONE + '/24', 'dev', 'mv')):
            self.lab.run('nsenter', '--net', '--target', str(process.pid),
                         'ip', *command)
        self.until_bound(ONE)
        self.assertTrue(self.lab.ping(ONE))
        process.kill()
        process.wait()  # old kernels cannot judge a zombie's namespace
        self.until_bound()

    def test_interfaces_that_discovery_must_not_bind(self) -> None:
        self.lab.run('ip', 'link', 'add', 'eth1', 'type', 'veth', 'peer',
                     'name', 'nic1')
        self.lab.run('ip', 'link', 'set', 'eth1', 'up')
        for name, mode, parent, address in (
                ('private', 'private', 'eth0', '100.75.30.83'),
                ('vepa', 'vepa', 'eth0', '100.75.30.84'),
                ('other', 'bridge', 'eth1', '100.75.31.85'),
                ('outside', 'bridge', 'eth0', '10.66.0.1')):
            self.lab.add_netns(name)
            self.lab.add_macvlan(name, parent=parent, mode=mode)
            self.inside(name, 'ip', 'address', 'add', address + '/24', 'dev',
                        'eth0')
        # The parent of this macvlan is not an interface of the node.
        self.lab.add_netns('nested')
        self.inside('nested', 'ip', 'link', 'add', 'upper', 'type', 'veth',
                    'peer', 'name', 'lower')
        self.inside('nested', 'ip', 'link', 'add', 'eth0', 'link', 'upper',
                    'type', 'macvlan', 'mode', 'bridge')
        self.inside('nested', 'ip', 'address', 'add', '100.75.30.86/24',
                    'dev', 'eth0')
        self.start(OPTIONS + 'parent = eth0\n')
        self.lab.add_pod('one', ONE)
        self.until_bound(ONE)
        self.until_looked()
        self.until_bound(ONE)
        self.assertEqual(1, self.log().count('10.66.0.1, on eth0 in'))

    def test_dhcp(self) -> None:
        server = dhcp.serve('100.75.30.210', '100.75.30.219')
        self.addCleanup(server.wait)
        self.addCleanup(server.kill)
        self.start()
        self.lab.add_pod('one')
        client = dhcp.client('one')
        self.addCleanup(client.wait)
        self.addCleanup(client.kill)
        self.until(lambda: len(self.bound()) == 1)
        first, = self.bound()
        self.assertRegex(first, r'100\.75\.30\.21\d')
        self.assert_reachable(first, 'one')
        # The new server has another range, so the client gets a new lease.
        client.terminate()
        client.wait()
        self.until_bound()
        server.kill()
        server.wait()
        os.unlink('/run/leases')
        again = dhcp.serve('100.75.30.220', '100.75.30.229')
        self.addCleanup(again.wait)
        self.addCleanup(again.kill)
        client = dhcp.client('one')
        self.addCleanup(client.wait)
        self.addCleanup(client.kill)
        self.until(lambda: any(each.startswith('100.75.30.22')
                               for each in self.bound()))
        second, = self.bound()
        self.assert_reachable(second, 'one')
        client.send_signal(signal.SIGUSR2)  # releases the lease
        self.until_bound()

    def test_a_macvlan_of_keepalived(self) -> None:
        """Keepalived's macvlan belongs to the node and is not bound."""
        address = '100.75.30.200'
        self.lab.add_pod('one', ONE)
        self.start()
        self.until_bound(ONE)
        with open('/run/keepalived.conf', 'w') as file:
            file.write('vrrp_instance home {\n interface %s\n use_vmac\n'
                       ' virtual_router_id 51\n virtual_ipaddress {\n  %s\n'
                       ' }\n}\n' % (lab.PARENT, address))
        keepalived = subprocess.Popen(
            ['keepalived', '--dont-fork', '--use-file=/run/keepalived.conf',
             '--pid=/run/keepalived.pid', '--vrrp_pid=/run/vrrp.pid'],
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            self.until(lambda: self.lab.ping(address, 'lan'))
            made, = self.lab.ip('link', 'show', 'vrrp.51')
            self.assertEqual('private', made[
                'linkinfo']['info_data']['mode'])
            self.until_looked()
            self.assertTrue(self.lab.ping(address, 'one'))
            self.assert_reachable(ONE, 'one')
            self.assertEqual([], self.problems())
            self.assertEqual({ONE}, self.bound())
            self.assertEqual([], containers.unserved(
                self.snapshot(), ledger.Ledger('/run/kuryr-break0')))
        finally:
            keepalived.terminate()
            keepalived.wait()

    def test_without_events(self) -> None:
        self.lab.add_pod('one', ONE)
        self.start(OPTIONS, 'setpriv', '--bounding-set=-net_broadcast',
                   '--inh-caps=-net_broadcast')
        self.until(lambda: 'CAP_NET_BROADCAST' in self.log())
        self.until_bound(ONE)
        self.inside('one', 'ip', 'address', 'add', TWO + '/24', 'dev', 'eth0')
        self.until_bound(ONE, TWO)
        self.lab.del_netns('one')
        self.until_bound()


class TestOwnership(DiscoveryTestCase):

    def test_others_win(self) -> None:
        """Discovery keeps the claims of Kuryr, CNI and manual binds."""
        for number, origin in enumerate((Origin.KURYR, Origin.CNI,
                                         Origin.MANUAL)):
            name, address = 'c%d' % number, '100.75.30.%d' % (90 + number)
            netns = self.lab.add_pod(name, address)
            self.manager().bind(
                Owner(name, 'eth0'), base.addresses(address), parent='eth0',
                mac=self.mac(name), netns=netns, origin=origin)
            # A second container has the same address.
            self.lab.add_pod('thief%d' % number, address)
        before = {address: record.owner for address, record
                  in self.snapshot().live.items()}
        self.start()
        self.lab.add_pod('one', ONE)
        self.until(lambda: ONE in self.bound())
        self.until_looked()
        live = self.snapshot().live
        self.assertEqual(before, {
            address: record.owner for address, record in live.items()
            if str(address) != ONE})
        self.assertEqual({}, self.snapshot().rivals)
        for number in range(3):
            self.assert_reachable('100.75.30.%d' % (90 + number),
                                  'c%d' % number)
        # When the owner ends, discovery binds the second container.
        self.lab.del_netns('c0')
        # sync exits with 1: the second containers are not bound yet.
        self.lab.run(program.BREAK0, '--config-file', CONF, 'sync',
                     check=False)
        self.until(lambda: any(
            str(address) == '100.75.30.90'
            and record.origin is Origin.DISCOVERED
            for address, record in self.snapshot().live.items()))

    def mac(self, name: str) -> str:
        return str(self.lab.ip('link', 'show', 'eth0', netns=name)[0][
            'address'])

    def test_found_before_it_is_bound(self) -> None:
        """A bind by CNI replaces the discovered claim of its container.

        Kuryr and CNI bind after the interface exists, so discovery can be
        first.
        """
        self.start()
        netns = self.lab.add_pod('one', ONE)
        self.until_bound(ONE)
        owner = Owner('sandbox', 'eth0')
        self.manager().bind(owner, base.addresses(ONE), parent='eth0',
                            mac=self.mac('one'), netns=netns,
                            origin=Origin.CNI)
        record, = self.snapshot().live.values()
        self.assertEqual((owner, Origin.CNI), (record.owner, record.origin))
        self.assertEqual({}, self.snapshot().rivals)
        self.assert_reachable(ONE, 'one')

    def test_first_of_two(self) -> None:
        self.start()
        self.lab.add_pod('one', ONE)
        self.until_bound(ONE)
        mac = self.mac('one')
        self.lab.add_pod('two', ONE)
        self.until(lambda: 'it belongs to' in self.log())
        self.until_looked()
        record, = self.snapshot().live.values()
        self.assertEqual(mac, record.mac)
        self.assertEqual(1, self.log().count('it belongs to'))
        done = self.lab.run(program.BREAK0, '--config-file', CONF, 'doctor',
                            check=False)
        self.assertIn('warning: address-twice', done.stdout)
        self.assertIn('in /run/netns/two, is not bound: it belongs to',
                      ' '.join(done.stdout.split()))
        self.lab.del_netns('one')
        self.until(lambda: [record.mac for record
                            in self.snapshot().live.values()]
                   == [self.mac('two')])
        self.assertTrue(self.lab.ping(ONE))

    def start_as(self, unit: str, options: str) -> subprocess.Popen[bytes]:
        """Start an agent in the control group of a systemd unit."""
        with open('/run/cgroup-of-it', 'w') as file:
            file.write('4:memory:/x\n1:name=systemd:%s\n0::%s\n' % (
                unit, unit))
        return self.start(
            options, 'sh', '-c', 'cp /run/cgroup-of-it /run/cgroup-$$; '
            'mount --bind /run/cgroup-$$ /proc/$$/cgroup; exec "$@"', 'sh')

    def test_beside_an_agent_without_discovery(self) -> None:
        for unit, name in (('/', 'one'), (AGENT, 'two')):
            with self.subTest(unit=unit):
                first = self.start_as(AGENT, OPTIONS)
                self.lab.add_pod(name, ONE)
                self.until_bound(ONE)
                second = self.start_as(
                    '/user.slice/session-3.scope' if unit == '/'
                    else '/system.slice/other.service',
                    'metrics_bind =\nresync_interval = 1\n')
                served = self.log().count('Serving CNI requests')
                first.kill()  # the agent without discovery remains
                self.until(lambda: self.log().count('Serving CNI requests')
                           > served)
                self.until(lambda: '1 addresses of containers that another '
                           'agent has found stay bound' in self.log())
                self.lab.run(program.BREAK0, '--config-file', CONF, 'sync')
                self.assert_reachable(ONE, name)
                self.assertEqual({ONE}, self.bound())
                self.assertNotIn('Unbound', self.log())
                # The address stays bound until its container ends.
                self.lab.del_netns(name)
                self.until_bound()
                second.kill()
                second.wait()

    def test_started_again_by_the_same_unit(self) -> None:
        for unit in (AGENT, AGENT + '/below'):  # a unit with Delegate=
            with self.subTest(unit=unit):
                agent = self.start_as(AGENT, OPTIONS)
                self.lab.add_pod('one', ONE)
                self.until_bound(ONE)
                self.bind(base.POD)  # not discovered, so it stays
                agent.kill()
                agent.wait()
                agent = self.start_as(unit, 'metrics_bind =\n')
                self.until_bound(base.POD)
                agent.kill()
                agent.wait()
                self.unbind(base.POD)
                self.lab.del_netns('one')

    def test_another_one_has_discovered_since(self) -> None:
        agent = self.start_as(AGENT, OPTIONS)
        self.lab.add_pod('one', ONE)
        self.until_bound(ONE)
        agent.kill()
        agent.wait()
        for unit, options in (('/', OPTIONS), (AGENT, 'metrics_bind =\n')):
            agent = self.start_as(unit, options)
            self.lab.add_pod('later', LATER)
            self.lab.del_netns('later')
            agent.kill()
            agent.wait()
        self.until(lambda: 'stay bound until their containers end'
                   in self.log())
        self.assertEqual({ONE}, self.bound())
        done = self.lab.run(program.BREAK0, '--config-file', CONF, 'cleanup')
        self.assertIn(ONE, done.stdout)
        self.assertEqual({}, self.lab.routes())

    def test_restarted_and_switched_off(self) -> None:
        agent = self.start()
        self.lab.add_pod('one', ONE)
        self.lab.add_pod('two', TWO)
        self.until_bound(ONE, TWO)
        agent.kill()
        agent.wait()
        self.lab.del_netns('two')
        self.inside('one', 'ip', 'address', 'del', ONE + '/24', 'dev', 'eth0')
        self.inside('one', 'ip', 'address', 'add', '100.75.30.88/24', 'dev',
                    'eth0')
        agent = self.start()
        self.until_bound('100.75.30.88')
        self.bind(base.POD)  # not discovered, so it stays
        with open(CONF, 'w') as file:
            file.write('[break0]\n' + OPTIONS.replace('true', 'false'))
        agent.send_signal(signal.SIGHUP)
        self.until_bound(base.POD)

    def test_follows_a_rebuilt_container(self) -> None:
        agent = self.start()
        self.lab.add_pod('one', ONE)
        self.until_bound(ONE)
        agent.kill()
        agent.wait()
        shutil.rmtree('/run/kuryr-break0')
        self.start()
        self.until_bound(ONE)
        self.inside('one', 'ip', 'link', 'set', 'eth0', 'address',
                    '02:00:00:00:00:77')
        self.until(lambda: self.lab.ping(ONE, cold=False))
        self.inside('one', 'ip', 'address', 'flush', 'dev', 'eth0')
        self.until_bound()

    def test_needs_allowed_cidrs(self) -> None:
        with self.assertRaisesRegex(exceptions.InvalidOption,
                                    'needs .break0. allowed_cidrs'):
            base.options(discover=True)
        self.assertTrue(base.options(
            discover=True, allowed_cidrs=['10.0.0.0/8']).discover)
        with open(CONF, 'w') as file:
            file.write('[break0]\ndiscover = true\n')
        done = program.run([program.BREAK0, '--config-file', CONF, 'agent'],
                           stderr=subprocess.PIPE, text=True)
        self.assertEqual(2, done.returncode)
        self.assertIn('allowed_cidrs', done.stderr)


#: A program that changes its MAC address at most 200 times per second.
_HOSTILE = '''
import subprocess, time
number = 0
while True:
    number += 1
    subprocess.run(['ip', 'link', 'set', 'eth0', 'address',
                    '02:00:00:01:%02x:%02x' % divmod(number % 65536, 256)])
    time.sleep(0.005)
'''


class TestHostile(DiscoveryTestCase):

    def setUp(self) -> None:
        super().setUp()
        self.start()
        self.lab.add_pod('hostile', ONE)
        self.lab.add_pod('victim', TWO)
        self.until_bound(ONE, TWO)

    def test_takes_addresses(self) -> None:
        before = self.lab.routes()
        for address in (TWO + '/32', lab.LAN + '/32', lab.NODE + '/32',
                        lab.NODE6 + '/128', lab.LAN6 + '/128', '127.0.0.2/32',
                        '255.255.255.255/32', '0.0.0.1/32', '224.0.0.5/32'):
            self.lab.run('ip', 'address', 'add', address, 'dev', 'eth0',
                         netns='hostile', check=False)
        self.until_looked()
        self.assertEqual(before, self.lab.routes())
        self.assert_reachable(TWO, 'victim')

    def test_thousand_addresses(self) -> None:
        with open('/run/batch', 'w') as file:
            for number in range(1000):
                file.write('address add 100.75.%d.%d/32 dev eth0\n' % (
                    40 + number // 250, 1 + number % 250))
        cpu = self.cpu_while(lambda: self.inside(
            'hostile', 'ip', '-batch', '/run/batch'), 4)
        # The finder and the loop can each exceed their share by one credit.
        self.assertLess(cpu, pace.SHARE + 2 * pace.CREDIT / 4)
        self.until(lambda: len(self.bound()) > binder.MAX_DISCOVERED)
        self.until_looked()
        bound = self.bound()
        self.assertEqual(binder.MAX_DISCOVERED + 1, len(bound))
        self.assertLessEqual({ONE, TWO}, bound)
        self.assertEqual(1, self.log().count('has 1001 addresses'))
        self.assert_reachable(TWO, 'victim')
        self.lab.add_pod('new', '100.75.30.99')
        self.until(lambda: self.lab.ping('100.75.30.99', cold=False))

    def test_namespaces_of_its_own(self) -> None:
        count = 4
        container = subprocess.Popen(
            ['unshare', '--pid', '--fork', '--kill-child', 'sh', '-c',
             'for number in 1 2 3 4; do unshare --net sleep 1000 & done; '
             'wait'])
        self.addCleanup(container.wait)
        self.addCleanup(container.kill)

        def inside() -> list[int]:
            return [each.pid for each in psutil.Process(
                container.pid).children(recursive=True)
                if each.name() == 'sleep']

        self.until(lambda: len(inside()) == count)
        for number, pid in enumerate(inside()):
            self.lab.run('ip', 'link', 'add', 'of%d' % number, 'link', 'eth0',
                         'netns', str(pid), 'type', 'macvlan',
                         'mode', 'bridge')
            with open('/run/batch', 'w') as file:
                for host in range(1, 21):
                    file.write('address add 100.75.%d.%d/32 dev of%d\n' % (
                        40 + number, host, number))
            self.lab.run('nsenter', '--target', str(pid), '--net', 'ip',
                         '-batch', '/run/batch')
        self.until(lambda: len(self.bound()) >= binder.MAX_DISCOVERED + 2)
        self.until_looked()
        self.assertEqual(binder.MAX_DISCOVERED + 2, len(self.bound()))
        self.assertLessEqual({ONE, TWO}, self.bound())

    def cpu_while(self, action: Callable[[], Any], seconds: float) -> float:
        """Return the agent's CPU usage during an action; 1.0 is one CPU.

        The measurement takes at least ``seconds``.
        """
        process = psutil.Process(self.agent.pid)

        def spent() -> float:
            times = process.cpu_times()
            return float(times.user + times.system)

        began, before = time.monotonic(), spent()
        action()
        time.sleep(max(0.0, began + seconds - time.monotonic()))
        return (spent() - before) / (time.monotonic() - began)

    def test_changes_its_mac_address(self) -> None:
        attack = subprocess.Popen(
            ['ip', 'netns', 'exec', 'hostile', sys.executable, '-c',
             _HOSTILE])
        self.addCleanup(attack.wait)
        self.addCleanup(attack.kill)
        self.until(lambda: self.lab.ip('link', 'show', 'eth0', netns='hostile')
                   [0]['address'].startswith('02:00:00:01:'))
        cpu = self.cpu_while(self.repaired_meanwhile, 5)
        self.assertLess(cpu, 0.1)
        self.assertIsNone(attack.poll())
        attack.kill()
        attack.wait()
        self.until(lambda: self.lab.ping(ONE, cold=False))
        self.assert_reachable(TWO, 'victim')

    def repaired_meanwhile(self) -> None:
        for _ in range(3):
            self.lab.run('ip', 'route', 'flush', 'dev', 'break0')
            self.until(lambda: TWO in self.lab.routes())
            self.assertTrue(self.lab.ping(TWO, cold=False))

    def test_hundred_containers_at_rest(self) -> None:
        self.agent.kill()
        self.agent.wait()
        self.start(QUIET)
        for number in range(100):
            self.lab.add_pod('c%d' % number, '100.75.32.%d' % number
                             if number else '100.75.32.200')
        self.until(lambda: len(self.bound()) == 102)
        # A sync may still wait for its share of a CPU.
        self.until(lambda: self.cpu_while(lambda: None, 5) < 0.005)


class TestInstalled(DiscoveryTestCase):

    def test_configuration_of_make_install(self) -> None:
        done = self.lab.run('make', 'install-files', 'DESTDIR=/run/dest',
                            check=False)
        self.assertEqual(2, done.returncode)
        self.assertIn('CIDRS=', done.stdout)
        self.lab.run('make', 'install-files', 'DESTDIR=/run/dest',
                     'CIDRS=100.75.0.0/16,fd00:30::/64')
        self.assertTrue(os.path.exists(
            '/run/dest/usr/local/share/man/man8/kuryr-break0.8'))
        # oslo.config reads ~/.kuryr-break0 like /etc/kuryr-break0.
        os.makedirs('/run/home')
        os.rename('/run/dest/etc/kuryr-break0', '/run/home/.kuryr-break0')
        with open('/run/agent.log', 'ab') as log:
            agent = program.start([program.BREAK0, 'agent'], stderr=log, env={
                **os.environ, 'HOME': '/run/home'})
        self.addCleanup(agent.wait)
        self.addCleanup(agent.kill)
        self.lab.add_pod('one', ONE, ONE6)
        self.until_bound(ONE, ONE6)

    def test_first_configuration_after_the_start(self) -> None:
        """A reload finds a file that did not exist at the start."""
        os.makedirs('/run/home/.kuryr-break0')
        settings = '/run/home/.kuryr-break0/kuryr-break0.conf'
        with open('/run/agent.log', 'ab') as log:
            agent = program.start([program.BREAK0, 'agent'], stderr=log, env={
                **os.environ, 'HOME': '/run/home'})
        self.addCleanup(agent.wait)
        self.addCleanup(agent.kill)
        self.lab.add_pod('one', ONE)
        self.until(lambda: 'Watching' in self.log())
        self.assertIn('Read the configuration from no file', self.log())
        with open(settings, 'w') as file:
            file.write('[break0]\n' + OPTIONS)
        agent.send_signal(signal.SIGHUP)
        self.until_bound(ONE)
        self.assertIn('Read the configuration from ' + settings, self.log())
        # A missing file is an error, and the agent keeps its options.
        os.remove(settings)
        agent.send_signal(signal.SIGHUP)
        self.until(lambda: 'Keeping the previous' in self.log())
        self.assertEqual({ONE}, set(self.lab.routes()))

    def test_cleanup_beside_the_agent(self) -> None:
        """After a cleanup beside a running agent, the agent binds again.

        remove.rst documents this behaviour.
        """
        self.start(OPTIONS + 'resync_interval = 1\n')
        self.lab.add_pod('one', ONE)
        self.until_bound(ONE)
        command = program.BREAK0, '--config-file', CONF
        done = self.lab.run(*command, 'cleanup', check=False)
        self.assertEqual(1, done.returncode)
        self.assertIn('! agent', done.stdout)
        self.until_bound(ONE)
        done = self.lab.run(*command, 'doctor', check=False)
        self.assertNotIn('error: ', done.stdout)


class TestFaults(DiscoveryTestCase):

    def test_state_directory_that_cannot_be_written(self) -> None:
        """The agent binds no address that it cannot record.

        Without a record, the address would stay bound after the container's
        end.
        """
        state = '/run/kuryr-break0'
        line = ('%s, on eth0 in /run/netns/two, is not bound: The state '
                'directory' % TWO)
        self.lab.add_pod('one', ONE)
        self.start()
        self.until_bound(ONE)
        for number in range(2):
            self.lab.run('mount', '--bind', state, state)
            # mount fails while the agent has a file there open for writing.
            self.until(lambda: self.lab.run(
                'mount', '-o', 'remount,bind,ro', state,
                check=False).returncode == 0)
            if number:
                self.agent.kill()
                self.agent.wait()
                self.start()
            self.lab.add_pod('two', TWO)
            self.until(lambda: self.log().count(line) == number + 1)
            self.assertEqual({ONE}, set(self.lab.routes()))
            self.assert_reachable(ONE, 'one')
            # The agent tries again each second and logs the error once.
            lines = self.log().count('\n')
            time.sleep(3)
            self.assertLess(self.log().count('\n') - lines, 3)
            self.lab.run('umount', state)
            self.until_bound(ONE, TWO)
            self.assert_reachable(TWO, 'two')
            self.lab.del_netns('two')
            self.until_bound(ONE)

    def test_no_descriptors_left(self) -> None:
        """An agent without free file descriptors waits and then continues."""
        agent = self.start(QUIET)
        self.lab.add_pod('one', ONE)
        self.until_bound(ONE)
        process = psutil.Process(agent.pid)
        self.until(lambda: base.is_idle(process))
        before = process.rlimit(psutil.RLIMIT_NOFILE)
        process.rlimit(psutil.RLIMIT_NOFILE, (process.num_fds(), before[1]))
        self.lab.add_pod('two', TWO)
        self.until(lambda: 'Too many open files' in self.log())
        # After a new address of the node, the agent checks whether the
        # address's interface has addresses of Kubernetes services. The check
        # needs a descriptor.
        self.lab.run('ip', 'address', 'add', '100.75.30.54/24', 'dev', 'eth0')
        times = process.cpu_times()
        lines = self.log().count('\n')
        time.sleep(3)
        now = process.cpu_times()
        self.assertLess(now.user + now.system - times.user - times.system,
                        0.6)
        self.assertLess(self.log().count('\n') - lines, 40)
        self.assertIsNone(agent.poll())
        process.rlimit(psutil.RLIMIT_NOFILE, before)
        self.until_bound(ONE, TWO)


class TestRecords(base.LabTestCase):

    def test_take_back_leaves_others(self) -> None:
        options = base.options()
        netns = self.lab.add_pod('one', ONE)
        self.manager().bind(Owner('discovered-7', 'eth0'),
                            base.addresses(ONE), parent='eth0', netns=netns,
                            origin=Origin.DISCOVERED)
        # This address is bound manually, so it stays: the owner's name does
        # not make it a discovered address.
        self.manager().bind(Owner('discovered', 'eth0'),
                            base.addresses(TWO), parent='eth0', netns=netns,
                            origin=Origin.MANUAL)
        found = ledger.Ledger(options.state_dir)
        # After the result False, the next sync of the agent tries again.
        with mock.patch.object(ledger.Ledger, 'lock', side_effect=(
                exceptions.LockTimeout(path='/run', timeout=0))):
            self.assertFalse(records.unbind_discovered(options, found))
        with mock.patch.object(found.records, 'names', side_effect=(
                exceptions.LedgerUnavailable(path='/run', reason='x'))):
            self.assertFalse(records.unbind_discovered(options, found))
        self.assertEqual({ONE, TWO}, self.bound())
        self.assertTrue(records.unbind_discovered(options, found))
        self.assertEqual({TWO}, self.bound())
        self.assertEqual({TWO}, set(self.lab.routes()))
