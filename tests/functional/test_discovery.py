# SPDX-License-Identifier: Apache-2.0

"""Discovery of containers; plain namespaces replace the containers."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import ipaddress
import os
import resource
import select
import shutil
import signal
import subprocess
import sys
import time
from typing import Any, Callable, Iterator
from unittest import mock

import psutil

from kuryr_break0.discovery import binder
from kuryr_break0.discovery import engines
from kuryr_break0.discovery import finder
from kuryr_break0.discovery import namespace
from kuryr_break0.discovery import records
from kuryr_break0.engine import containers
from kuryr_break0.engine import transitions as engine
from kuryr_break0 import exceptions
from kuryr_break0 import kernel
from kuryr_break0 import ledger
from kuryr_break0.ledger import files
from kuryr_break0.model import NamespaceId
from kuryr_break0.model import Origin
from kuryr_break0.model import Owner
from kuryr_break0.model import Record
from kuryr_break0 import pace
from tests.functional import base
from tests.support import dhcp
from tests.support import lab
from tests.support import program

PROGRAM = os.path.join(os.path.dirname(sys.executable), 'kuryr-break0')
CONF = '/run/break0.conf'
OPTIONS = ('discover = true\nallowed_cidrs = 100.75.0.0/16,fd00:30::/64\n'
           'metrics_bind =\nresync_interval = 3600\n')
#: Options without a search of processes, since the processes of other tests
#: have namespaces and cause constant work.
QUIET = OPTIONS + 'proc_dirs = /run/none\n'
ONE, TWO = '100.75.30.81', '100.75.30.82'
ONE6 = 'fd00:30::81'
LATER = '100.75.30.98'
#: The control group of the agent's systemd service.
AGENT = '/system.slice/kuryr-break0-agent.service'


def is_idle(found: finder.Finder) -> bool:
    """Return whether the finder has no work due within 600 seconds."""
    return found.find_due() > time.monotonic() + 600


class DiscoveryTestCase(base.LabTestCase):

    def setUp(self) -> None:
        super().setUp()
        self.lab.add_ipv6()

    def start(self, options: str = OPTIONS, *before: str
              ) -> subprocess.Popen[bytes]:
        """Start an agent and wait until it has completed one search."""
        with open(CONF, 'w') as file:
            file.write('[break0]\n' + options)
        with open('/run/agent.log', 'ab') as log:
            earlier = self.log().count('Watching ')
            self.agent = program.start(
                [*before, PROGRAM, '--config-file', CONF, 'agent'],
                stderr=log)
        self.addCleanup(self.agent.wait)
        self.addCleanup(self.agent.kill)
        self.until(lambda: self.log().count('Watching ') > earlier)
        return self.agent

    @staticmethod
    def log() -> str:
        with open('/run/agent.log') as file:
            return file.read()

    def until(self, condition: Callable[[], Any]) -> None:
        lab.until(condition, self.log)

    def until_looked(self) -> None:
        """Wait until the agent has examined every earlier change.

        The agent examines a namespace at most namespace.LAST seconds after
        its event. So a namespace added after this time is examined last.
        """
        time.sleep(namespace.LAST)
        self.lab.add_pod('later', LATER)
        self.until(lambda: LATER in self.bound())
        self.lab.del_netns('later')
        self.until(lambda: LATER not in self.bound()
                   and LATER not in self.lab.routes())

    def until_bound(self, *addresses: str) -> None:
        self.until(lambda: set(self.lab.routes()) == set(addresses))
        self.until(lambda: self.bound() == set(addresses))

    def inside(self, name: str, *command: str) -> None:
        self.lab.run(*command, netns=name)

    def assert_reachable(self, address: str, name: str) -> None:
        # The agent configures the container after it has set the route.
        node = lab.NODE6 if ':' in address else lab.NODE
        self.until(lambda: self.lab.ping(address))
        self.until(lambda: self.lab.ping(node, name))


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

    def test_what_comes_and_goes_inside(self) -> None:
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

    def test_namespace_that_somebody_keeps_open(self) -> None:
        # The server of Podman 4 holds descriptors of inspected namespaces.
        netns = self.lab.add_pod('one', ONE)
        known = kernel.identify(netns)
        assert known is not None
        if known.cookie is None:
            self.skipTest('needs numbers of namespaces, Linux 6.18')
        try:
            os.close(kernel.namespaces.open_by_number(known))
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

    def test_what_is_not_found(self) -> None:
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
        self.lab.run(PROGRAM, '--config-file', CONF, 'sync', check=False)
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
        done = self.lab.run(PROGRAM, '--config-file', CONF, 'doctor',
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
                self.lab.run(PROGRAM, '--config-file', CONF, 'sync')
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
        done = self.lab.run(PROGRAM, '--config-file', CONF, 'cleanup')
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

    def test_follows_what_was_rebuilt(self) -> None:
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
        done = program.run([PROGRAM, '--config-file', CONF, 'agent'],
                           stderr=subprocess.PIPE, text=True)
        self.assertEqual(2, done.returncode)
        self.assertIn('allowed_cidrs', done.stderr)


class TestNextHops(DiscoveryTestCase):
    """A container's address that is a next hop of the node gets no route."""

    WORLD, WORLD6 = '192.0.2.1', '2001:db8::1'
    ROUTER, ROUTER6 = '100.75.30.9', 'fd00:30::9'

    def until_routed(self, *addresses: str) -> None:
        self.until(lambda: {
            address for address, route in self.lab.routes().items()
            if route['protocol'] == '176'} == set(addresses))

    def test_while_the_node_has_no_route_by_it(self) -> None:
        self.start()
        self.lab.add_pod('one', ONE)
        self.until_bound(ONE)
        routers = lab.LAN, lab.LAN6, self.ROUTER, self.ROUTER6
        # All routes with these next hops are gone before the agent reads the
        # routes.
        for router in routers[2:]:
            self.lab.run('ip', 'route', 'add', '198.51.100.0/24' if '.' in
                         router else 'fd09::/64', 'via', router)
        for family in ('-4', '-6'):
            self.lab.run('ip', family, 'route', 'del', 'default')
        for network in ('198.51.100.0/24', 'fd09::/64'):
            self.lab.run('ip', 'route', 'del', network)
        for address in (*routers, TWO):
            self.inside('one', 'ip', 'address', 'add', address + (
                '/32' if '.' in address else '/128'), 'dev', 'eth0')
        self.until_bound(ONE, TWO)
        for router in routers:
            self.until(lambda: '%s, on eth0 in' % router in self.log())
        # The next full search must not bind the next hops either.
        self.lab.run('ip', 'route', 'flush', 'dev', 'break0')
        self.until_bound(ONE, TWO)
        self.assertEqual([], self.problems())

    def test_before_the_node_has_a_route_by_it(self) -> None:
        for family in ('-4', '-6'):
            self.lab.run('ip', family, 'route', 'del', 'default')
        for name in ('lan', 'one'):
            if name == 'one':
                self.lab.add_pod('one', ONE, self.ROUTER, self.ROUTER6)
            for address in (self.WORLD + '/32', self.WORLD6 + '/128'):
                self.inside(name, 'ip', 'address', 'add', address, 'dev',
                            'lo')
        self.start()
        self.until_bound(ONE, self.ROUTER, self.ROUTER6)
        for world, router in ((self.WORLD, self.ROUTER),
                              (self.WORLD6, self.ROUTER6)):
            self.lab.run('ip', 'route', 'add', 'default', 'via', router)
            self.until_routed(ONE, *{self.ROUTER6} - {router})
            # The kernel resolves a next hop when the route is set, so the
            # default route still leads through break0.
            self.assertEqual('break0', self.lab.ip(
                'route', 'get', world)[0]['dev'])
            self.assertFalse(self.lab.ping(world))
            self.assertRegex(self.problems()[-1], 'a next hop of a route '
                             'that leads through break0.*set that route ')
            # A new route resolves the next hop again, now to the LAN.
            self.inside('lan', 'ip', 'address', 'add', router + (
                '/24' if '.' in router else '/64'), 'dev', 'nic',
                *([] if '.' in router else ['nodad']))
            self.lab.run('ip', 'route', 'replace', 'default', 'via', router)
            self.assertEqual('eth0', self.lab.ip(
                'route', 'get', world)[0]['dev'])
            with self.lab.capture() as frames:
                self.assertTrue(self.lab.ping(world))
            self.assertTrue(frames)
        self.until_routed(ONE)
        self.assert_reachable(ONE, 'one')
        # The earlier next hops stay refused without the default routes.
        for family in ('-4', '-6'):
            self.lab.run('ip', family, 'route', 'del', 'default')
        self.lab.run('ip', 'route', 'flush', 'dev', 'break0')
        self.until_routed(ONE)
        self.assertEqual(2, len(self.problems()))
        self.assertRegex(self.problems()[0], 'an earlier next hop')
        self.inside('one', 'ip', 'address', 'del', self.ROUTER + '/24', 'dev',
                    'eth0')
        self.until(lambda: self.ROUTER not in self.bound())

    def test_in_each_kind_of_route(self) -> None:
        kernel.write_sysctl('ipv4/nexthop_compat_mode', 0)
        self.start()
        hops = ['100.75.30.%d' % number for number in range(60, 67)] + [
            'fd00:30::%d' % number for number in range(60, 63)]
        self.lab.add_pod('one', ONE, *hops)
        self.until_bound(ONE, *hops)
        expected = set(hops)
        for hop, what in zip(hops, (
                'route add 10.9.0.0/24 via %s',
                'route add 10.9.1.0/24 via %s dev eth0',
                'route add 10.9.2.0/24 table 77 via %s dev break0',
                'route add 10.9.3.0/24 nexthop via %s nexthop via ' + lab.LAN,
                'nexthop add id 1 via %s dev break0',
                'nexthop add id 2 via %s dev eth0',
                'nexthop replace id 2 via %s dev eth0',
                'route add 10.9.4.0/24 via inet6 %s dev break0',
                'route add fd09::/64 nexthop via %s dev break0 nexthop via '
                + lab.LAN6,
                'nexthop replace id 3 via %s dev break0')):
            with self.subTest(what=what):
                expected.remove(hop)
                self.lab.run('ip', *(what % hop).split())
                self.until_routed(ONE, *expected)

    def test_of_others(self) -> None:
        """A next hop with a manual bind keeps its route.

        A container bound by Kuryr, CNI or manually can be a VPN gateway.
        """
        self.start()
        netns = self.lab.add_pod('one', ONE, TWO)
        self.until_bound(ONE, TWO)
        self.manager().bind(Owner('sandbox', 'eth0'), base.addresses(ONE),
                            parent='eth0', netns=netns, origin=Origin.MANUAL)
        for number, address in enumerate((ONE, TWO)):
            self.lab.run('ip', 'route', 'add', '10.9.%d.0/24' % number, 'via',
                         address)
        self.until_routed(ONE)
        self.lab.run(PROGRAM, '--config-file', CONF, 'sync', check=False)
        self.until_routed(ONE)


class TestDuplicates(DiscoveryTestCase):
    """A container's IPv6 address is bound only if no LAN host has it."""

    def add(self, *flags: str) -> None:
        self.inside('one', 'ip', 'address', 'add', ONE6 + '/64', 'dev',
                    'eth0', *flags)

    def state(self, of: str = ONE6) -> set[str]:
        """Return the flags of an IPv6 address of the container.

        "local" is among them whenever the address exists.
        """
        return {flag for link in self.lab.ip('address', 'show', 'dev', 'eth0',
                                             netns='one')
                for each in link['addr_info'] if each['local'] == of
                for flag in ('tentative', 'dadfailed', 'optimistic', 'local')
                if each.get(flag)}

    def on_lan(self, verb: str) -> None:
        self.inside('lan', 'ip', 'address', verb, ONE6 + '/64', 'dev', 'nic',
                    *(['nodad'] if verb == 'add' else []))

    def assert_of_lan(self) -> None:
        """Check that the node reaches the address through the LAN."""
        with self.lab.capture() as frames:
            self.assertTrue(self.lab.ping(ONE6), self.log())
        self.assertTrue(frames)

    def test_of_a_lan_host(self) -> None:
        self.on_lan('add')
        self.lab.add_pod('one', ONE)
        self.start()
        self.until_bound(ONE)
        self.add()
        self.until(lambda: 'dadfailed' in self.state())
        self.inside('one', 'ip', 'address', 'add', TWO + '/24', 'dev', 'eth0')
        self.until_bound(ONE, TWO)
        self.until(lambda: self.log().count(
            ONE6 + ', on eth0 in /run/netns/one, is not bound: duplicate '
            'address detection has found it on another host') == 1)
        self.assert_of_lan()
        # A sync must not bind the duplicate address either.
        self.lab.run('ip', 'route', 'flush', 'dev', 'break0')
        self.until_bound(ONE, TWO)
        self.assert_of_lan()
        # The LAN host gives up the address.
        self.on_lan('del')
        self.inside('one', 'ip', 'address', 'del', ONE6 + '/64', 'dev',
                    'eth0')
        self.add()
        self.until_bound(ONE, TWO, ONE6)
        self.assert_reachable(ONE6, 'one')

    def test_many_are_not_all_logged(self) -> None:
        text = ''.join('address add fd00:30::%x/64 dev %%s %%s\n' % number
                       for number in range(0x100, 0x140))
        for name, *values in (('lan', 'nic', 'nodad'), ('one', 'eth0', '')):
            if name == 'one':
                self.lab.add_pod('one', ONE)
            with open('/run/batch', 'w') as file:
                file.write(text.replace('%s %s', ' '.join(values)))
            self.inside(name, 'ip', '-batch', '/run/batch')
        self.until(lambda: len([
            each for link in self.lab.ip('address', 'show', 'dev', 'eth0',
                                         netns='one')
            for each in link['addr_info'] if each.get('dadfailed')]) == 0x40)
        self.start()
        self.until_bound(ONE)
        self.until_looked()
        self.assertEqual(binder.MAX_ADDRESSES, self.log().count(
            'duplicate address detection has found it on another host'))

    def test_not_before_it_is_proven(self) -> None:
        self.lab.add_pod('one', ONE)
        for key in ('dad_transmits=2', 'optimistic_dad=1'):
            self.inside('one', 'sysctl', '-w', 'net.ipv6.conf.eth0.' + key)
        self.start()
        self.until_bound(ONE)
        for flags in ((), ('optimistic',)):
            with self.subTest(flags=flags):
                self.add(*flags)
                self.assertLessEqual({'tentative', *flags}, self.state())
                # A second address makes the agent examine the namespace during
                # duplicate address detection.
                self.inside('one', 'ip', 'address', 'add', TWO + '/24', 'dev',
                            'eth0')
                self.until(lambda: ONE6 in self.lab.routes())
                self.assertNotIn('tentative', self.state())
                self.until_bound(ONE, TWO, ONE6)
                self.assert_reachable(ONE6, 'one')
                for address in (TWO + '/24', ONE6 + '/64'):
                    self.inside('one', 'ip', 'address', 'del', address, 'dev',
                                'eth0')
                self.until_bound(ONE)

    def test_it_fails_later(self) -> None:
        self.lab.add_pod('one', ONE)
        self.inside('one', 'sysctl', '-w',
                    'net.ipv6.conf.eth0.keep_addr_on_down=1')
        self.start()
        self.add()
        self.until_bound(ONE, ONE6)
        self.inside('one', 'ip', 'link', 'set', 'eth0', 'down')
        self.on_lan('add')
        self.inside('one', 'ip', 'link', 'set', 'eth0', 'up')
        self.until(lambda: 'dadfailed' in self.state())
        self.until_bound(ONE)
        self.assert_of_lan()


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
        self.until(lambda: len(self.bound()) > binder.MAX_ADDRESSES)
        self.until_looked()
        bound = self.bound()
        self.assertEqual(binder.MAX_ADDRESSES + 1, len(bound))
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
        self.until(lambda: len(self.bound()) >= binder.MAX_ADDRESSES + 2)
        self.until_looked()
        self.assertEqual(binder.MAX_ADDRESSES + 2, len(self.bound()))
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
            agent = program.start([PROGRAM, 'agent'], stderr=log, env={
                **os.environ, 'HOME': '/run/home'})
        self.addCleanup(agent.wait)
        self.addCleanup(agent.kill)
        self.lab.add_pod('one', ONE, ONE6)
        self.until_bound(ONE, ONE6)

    def test_cleanup_beside_the_agent(self) -> None:
        """After a cleanup beside a running agent, the agent binds again.

        remove.rst documents this behaviour.
        """
        self.start(OPTIONS + 'resync_interval = 1\n')
        self.lab.add_pod('one', ONE)
        self.until_bound(ONE)
        command = PROGRAM, '--config-file', CONF
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
            self.lab.run('mount', '-o', 'remount,bind,ro', state)
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


class FinderTestCase(base.LabTestCase):
    """A finder in the test process, driven only by its own events.

    An agent also searches after each sync, which would hide a missed event.
    """

    #: Replaces /proc, since the processes of other tests have namespaces too.
    PROC = '/run/proc'

    def setUp(self) -> None:
        super().setUp()
        options = base.options(
            discover=True, proc_dirs=[self.PROC], resync_interval=3600,
            allowed_cidrs=['100.75.0.0/16'])
        kept = ledger.Ledger(options.state_dir)
        kept.prepare()
        self.finder = finder.Finder(options, kept)
        self.addCleanup(self.finder.close)
        # Shorten the pause between two examinations of a namespace.
        pauses = mock.patch.object(namespace, 'LAST', 0.1)
        pauses.start()
        self.addCleanup(pauses.stop)

    def start_unnamed(self) -> subprocess.Popen[bytes]:
        """Start a process in a network namespace that has no name."""
        process = subprocess.Popen(['unshare', '--net', 'sleep', '1000'])
        self.addCleanup(process.wait)
        self.addCleanup(process.kill)
        lab.until(lambda: os.readlink('/proc/%d/ns/net' % process.pid)
                  != os.readlink('/proc/self/ns/net'))
        return process

    def work(self) -> None:
        """Run the finder until it is idle."""
        def is_done() -> bool:
            if not is_idle(self.finder):
                self.step()
            return is_idle(self.finder)

        lab.until(is_done)

    def step(self) -> None:
        wait = 0.0 if is_idle(self.finder) else max(
            0.0, self.finder.find_due() - time.monotonic())
        if select.select(self.finder.list_readable(), [], [], wait)[0]:
            self.finder.read_events()
        else:
            self.finder.work()

    def assert_bound(self, *addresses: str) -> None:
        def is_so() -> bool:
            # The kernel deletes a namespace with a delay and sends the event
            # of its end afterwards.
            self.work()
            self.step()
            return self.bound() == set(addresses)

        lab.until(is_so)
        self.assertEqual(set(addresses), set(self.lab.routes()))


class TestWithoutName(FinderTestCase):

    def test_container_with_a_new_macvlan(self) -> None:
        """A macvlan created inside a nameless namespace is discovered.

        systemd-nspawn creates no mount and moves no interface.
        """
        self.work()
        process = self.start_unnamed()
        pid = str(process.pid)
        os.mkdir(self.PROC)
        for each in ('1', pid):
            os.symlink('/proc/' + each, '%s/%s' % (self.PROC, each))
        self.lab.run('ip', 'link', 'add', 'mv-eth0', 'link', 'eth0', 'netns',
                     pid, 'type', 'macvlan', 'mode', 'bridge')
        for command in ('link set mv-eth0 up',
                        'address add %s/24 dev mv-eth0' % ONE):
            self.lab.run('nsenter', '--net', '--target', pid, 'ip',
                         *command.split())
        self.assert_bound(ONE)
        process.kill()
        process.wait()
        self.assert_bound()


class TestExhausted(FinderTestCase):
    """The finder recovers after a search without free descriptors."""

    @contextlib.contextmanager
    def descriptors(self, count: int) -> Iterator[None]:
        """Leave the process ``count`` free descriptors within the block."""
        before = resource.getrlimit(resource.RLIMIT_NOFILE)
        taken = [os.open('/dev/null', os.O_RDONLY) for _ in range(count)]
        resource.setrlimit(resource.RLIMIT_NOFILE,
                           (max(taken, default=0) + 1, before[1]))
        try:
            with contextlib.suppress(OSError):
                while True:
                    taken.append(os.open('/dev/null', os.O_RDONLY))
            for _ in range(count):
                os.close(taken.pop())
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, before)
            for each in taken:
                os.close(each)

    def starve(self, count: int) -> None:
        """Run 4 steps of the finder with ``count`` free descriptors."""
        with self.descriptors(count):
            for _ in range(4):
                with contextlib.suppress(OSError, exceptions.Break0Error):
                    self.step()

    def test_what_came_meanwhile(self) -> None:
        expected = set()
        for count in range(12):
            with self.subTest(descriptors=count):
                expected.add('100.75.30.%d' % (100 + count))
                self.lab.add_pod('c%d' % count, '100.75.30.%d' % (
                    100 + count))
                self.finder.note_mounts()
                self.starve(count)
                self.assert_bound(*expected)

    def test_what_changed_meanwhile(self) -> None:
        self.lab.add_pod('one', ONE)
        self.finder.note_mounts()
        self.assert_bound(ONE)
        for count in range(12):
            for change, address in (('add', TWO), ('del', None)):
                with self.subTest(descriptors=count, change=change):
                    self.lab.run('ip', 'address', change, TWO + '/24', 'dev',
                                 'eth0', netns='one')
                    self.finder.mark_all()
                    self.starve(count)
                    self.assert_bound(ONE, *([address] if address else []))

    def test_what_ended_meanwhile(self) -> None:
        self.lab.add_pod('one', ONE)
        for count in range(12):
            with self.subTest(descriptors=count):
                self.lab.add_pod('two', TWO)
                self.finder.note_mounts()
                self.assert_bound(ONE, TWO)
                self.lab.del_netns('two')
                self.finder.note_mounts()
                self.starve(count)
                self.assert_bound(ONE)

    def test_end_that_is_not_proven_again(self) -> None:
        """A record stays if the judgement is in doubt when it is repeated.

        The finder repeats the judgement under the lock. The lock takes
        descriptors, so the repetition can fail.
        """
        self.lab.add_pod('one', ONE)
        self.finder.note_mounts()
        self.assert_bound(ONE)
        self.lab.del_netns('one')
        with mock.patch.object(engine, 'is_gone',
                               return_value=False) as is_gone:
            self.finder.note_mounts()
            lab.until(lambda: self.step() or is_gone.called)
            self.assertEqual({ONE}, self.bound())
        self.assert_bound()

    def test_number_that_is_used_again(self) -> None:
        self.lab.add_pod('one', ONE)
        self.finder.note_mounts()
        self.assert_bound(ONE)
        number, = [number for number, each in self.finder._numbers.items()
                   if each.location.path.endswith('/one')]
        self.lab.del_netns('one')
        self.lab.add_pod('two', TWO)
        with mock.patch.object(kernel.Netlink, 'ensure_namespace_number',
                               return_value=number):
            self.finder.note_mounts()
            lab.until(lambda: self.step() or any(
                each.location.path.endswith('/two')
                for each in self.finder._namespaces.values()))
        self.assert_bound(TWO)

    def test_end_of_one_that_had_the_number_before(self) -> None:
        self.lab.add_pod('one', ONE)
        self.finder.note_mounts()
        self.assert_bound(ONE)
        with mock.patch.object(self.finder, '_events') as events:
            events.get.return_value = kernel.events.Changes(
                set(), set(self.finder._numbers), set(), False, False, False,
                1)
            self.finder.read_events()
        self.assert_bound(ONE)
        self.lab.run('ip', 'address', 'add', TWO + '/24', 'dev', 'eth0',
                     netns='one')
        self.assert_bound(ONE, TWO)

    def test_end_that_an_error_interrupts(self) -> None:
        self.lab.add_pod('one', ONE)
        self.finder.note_mounts()
        self.assert_bound(ONE)
        self.lab.del_netns('one')
        with mock.patch.object(binder, 'Engine', side_effect=OSError(
                errno.EMFILE, 'no descriptor')):
            self.finder.note_mounts()
            with self.assertRaises(OSError):
                lab.until(self.step)
        self.assert_bound()

    def test_records_that_cannot_be_read(self) -> None:
        """An unreadable record still belongs to its container."""
        self.lab.add_pod('one', ONE)
        self.finder.note_mounts()
        self.assert_bound(ONE)
        with mock.patch.object(files, 'read', side_effect=OSError(
                errno.EMFILE, 'no descriptor')):
            self.finder.mark_all()
        self.lab.del_netns('one')
        self.finder.note_mounts()
        self.assert_bound()

    def test_ledger_that_cannot_be_read(self) -> None:
        """With an unreadable ledger, the finder uses its last reading."""
        self.lab.add_pod('one', ONE)
        self.finder.note_mounts()
        self.assert_bound(ONE)
        with self.descriptors(0):
            self.finder.mark_all()
        self.lab.run('ip', 'address', 'flush', 'dev', 'eth0', netns='one')
        self.assert_bound()

    def test_end_that_cannot_be_proven(self) -> None:
        """The finder repeats a judgement in doubt at growing intervals."""
        self.lab.add_pod('one', ONE)
        self.finder.note_mounts()
        self.assert_bound(ONE)
        self.lab.del_netns('one')
        now = [time.monotonic()]
        with mock.patch.object(
                kernel, 'judge_state',
                return_value=kernel.State.UNKNOWN) as asked, \
                mock.patch.object(time, 'monotonic', lambda: now[0]):
            self.finder.note_mounts()
            while not is_idle(self.finder):
                now[0] = self.finder.find_due()
                self.finder.read_events()
                self.finder.work()
        self.assertLess(asked.call_count, 20)
        self.assertEqual({ONE}, self.bound())


class TestManyNamespaces(FinderTestCase):
    """Another container creates namespaces faster than they are examined.

    The kernel reuses the namespaces' inodes.
    """

    ended = 0

    def add_one(self) -> kernel.NamespaceLocation:
        """Add a container after the first search."""
        self.work()
        path = self.lab.add_pod('one', ONE)
        status = os.stat(path)
        return kernel.NamespaceLocation(
            path, NamespaceId(status.st_dev, status.st_ino))

    def add_stale(self, place: kernel.Place) -> None:
        """Add a waiting container's ended namespace with this inode.

        The event of the namespace's end has not arrived yet.
        """
        stale = namespace.Namespace(kernel.NamespaceLocation(
            '/run/netns/ended', NamespaceId(*place, 1)), 'noisy', 77)
        self.finder._namespaces[place] = self.finder._numbers[77] = stale
        pace = self.finder._queue.pace
        pace.begin()
        with mock.patch.object(time, 'thread_time', lambda: 10 ** 6):
            self.assertLess(10 ** 6, pace.end('noisy'))

    def count_examined(self) -> int:
        """Return the number of namespaces that are examined before "one".

        Each examination adds another namespace.
        """
        examined: list[str] = []
        examine = kernel.examine_namespace

        def examining(location: kernel.NamespaceLocation
                      ) -> kernel.ExaminedNamespace:
            examined.append(location.path)
            self.add_ended(1)
            return examine(location)

        with mock.patch.object(kernel, 'examine_namespace', examining):
            lab.until(lambda: self.step() or any(
                each.endswith('/one') for each in examined))
        return [each.endswith('/one') for each in examined].index(True)

    def add_ended(self, count: int) -> None:
        """Add namespaces that end before they are examined."""
        for _ in range(count):
            self.ended += 1
            identity = NamespaceId(1, self.ended)
            self.finder._unexamined[identity[:2]] = kernel.NamespaceLocation(
                '/run/netns/ended', identity)

    def test_inode_of_an_ended_namespace(self) -> None:
        """A container does not wait for an earlier owner of its inode."""
        for search in self.finder.note_mounts, self.finder.mark_all:
            with self.subTest(search=search.__name__):
                self.add_stale(self.add_one().place)
                search()
                self.assert_bound(ONE)
                self.lab.del_netns('one')
                self.finder.note_mounts()
                self.assert_bound()

    def test_unnamed_with_the_inode_of_an_unexamined_name(self) -> None:
        """A name that was deleted does not hide a process's namespace."""
        self.work()
        pid = str(self.start_unnamed().pid)
        status = os.stat('/proc/%s/ns/net' % pid)
        place = status.st_dev, status.st_ino
        self.finder._unexamined[place] = kernel.NamespaceLocation(
            '/run/netns/ended', NamespaceId(*place))
        os.mkdir(self.PROC)
        os.symlink('/proc/' + pid, '%s/%s' % (self.PROC, pid))
        self.finder._search_new()
        self.assertFalse(self.finder._unexamined[place].is_named)

    def test_late_end_of_the_namespace_that_had_the_inode(self) -> None:
        """A late event does not replace the path of the new namespace."""
        one = self.add_one()
        self.add_stale(one.place)
        self.finder._unexamined[one.place] = one
        with mock.patch.object(self.finder, '_events') as events:
            events.get.return_value = kernel.events.Changes(
                set(), {77}, set(), False, False, False, 1)
            self.finder.read_events()
        self.assert_bound(ONE)

    def test_name_with_the_inode_of_an_unexamined_namespace(self) -> None:
        """A namespace with a name does not wait for many others."""
        one = self.add_one()
        self.finder._unexamined[one.place] = one._replace(
            path='/proc/0/ns/net')
        self.add_ended(500)
        self.finder._mounts_changed = True
        self.finder._search_new()
        self.assertEqual(one, [*self.finder._unexamined.values()][-1])
        self.assert_bound(ONE)

    def test_namespace_before_many_others(self) -> None:
        """A namespace does not wait for all namespaces that arrive later."""
        one = self.add_one()
        self.finder._unexamined[one.place] = one
        self.add_ended(9)
        with mock.patch.object(self.finder, '_search_if_due'):
            self.assertLess(self.count_examined(), 9)

    def test_full_search_omits_ended_namespaces(self) -> None:
        self.work()
        self.add_ended(500)
        self.finder.mark_all()
        with mock.patch.object(finder, '_STEP', 0):
            lab.until(lambda: self.step() or len(
                self.finder._unexamined) < 400)
        self.assertLess(len(self.finder._unexamined), 10)


class TestBounds(FinderTestCase):

    def test_more_addresses_that_others_had_bound(self) -> None:
        """Rebuilt records stay beyond the limit of discovered addresses."""
        addresses = ['100.75.30.%d' % (100 + number)
                     for number in range(binder.MAX_ADDRESSES + 5)]
        path = self.lab.add_pod('one', *addresses, mac='02:00:00:00:00:01')
        self.bind(*addresses, netns=path, mac_of_pod='02:00:00:00:00:01')
        shutil.rmtree('/run/kuryr-break0')
        self.manager().sync()
        self.assertEqual(set(addresses), self.bound())
        self.finder.mark_all()
        self.assert_bound(*addresses)

    def test_namespaces_without_containers_that_end(self) -> None:
        self.work()
        with mock.patch.object(binder, 'Engine') as engine:
            for number in range(9):
                self.finder._remove(namespace.Namespace(
                    kernel.NamespaceLocation(
                        '/run/netns/gone', NamespaceId(1, 2, number))))
            self.work()
        engine.assert_not_called()
        self.assertEqual(0, len(self.finder._ended))

    def test_refusals_that_are_logged(self) -> None:
        def refuse() -> None:
            for number in range(9):
                self.finder._binder._log_refusal(
                    *base.addresses('10.0.0.%d' % number),
                    mock.Mock(namespace=NamespaceId(1, 2)), 'of the test')

        with mock.patch.object(binder, '_MAX_REFUSALS', 4), \
                self.assertLogs('kuryr_break0', 'WARNING') as logs:
            refuse()
            refuse()
            self.assertEqual(4, len(logs.output))
            with mock.patch.object(time, 'monotonic', return_value=(
                    time.monotonic() + binder._REFUSAL_SECONDS)):
                refuse()
            self.assertEqual(8, len(logs.output))


class TestNoisy(FinderTestCase):
    """A container that causes much work delays no other container."""

    def setUp(self) -> None:
        super().setUp()
        self.spent = 0.0
        clock = mock.patch.object(time, 'thread_time', lambda: self.spent)
        clock.start()
        self.addCleanup(clock.stop)
        read = kernel.list_macvlans_in

        def reading(netns: str, *args: Any) -> list[kernel.Macvlan]:
            if netns.endswith('/noisy'):
                self.spent += 1000
            return read(netns, *args)

        patch = mock.patch.object(kernel, 'list_macvlans_in', reading)
        patch.start()
        self.addCleanup(patch.stop)

    def change(self, verb: str, address: str, name: str) -> None:
        self.lab.run('ip', 'address', verb, address + '/24', 'dev', 'eth0',
                     netns=name)

    def test_delays_no_other(self) -> None:
        self.lab.add_pod('noisy', ONE)
        self.assert_bound(ONE)
        # The finder has spent the CPU budget of "noisy", which must wait.
        self.change('add', LATER, 'noisy')
        self.lab.add_pod('one', TWO)
        self.finder.note_mounts()
        self.assert_bound(ONE, TWO)
        for verb, expected in (('add', {ONE, TWO, '100.75.30.83'}),
                               ('del', {ONE, TWO})):
            self.change(verb, '100.75.30.83', 'one')
            self.assert_bound(*expected)
        self.lab.del_netns('one')
        self.assert_bound(ONE)
        # The address added by "noisy" is bound after the wait.
        now = time.monotonic
        with mock.patch.object(time, 'monotonic', lambda: now() + 10 ** 6):
            self.assert_bound(ONE, LATER)

    def test_many_addresses_are_bound_by_and_by(self) -> None:
        addresses = ['100.75.30.%d' % (100 + number) for number in range(9)]
        self.lab.add_pod('one', *addresses)
        with mock.patch.object(binder, '_TURN', 0.0):
            while not self.bound():
                self.step()
            self.assertLess(len(self.bound()), len(addresses))
            self.assert_bound(*addresses)

    def test_what_is_bound_stays_beyond_the_limits(self) -> None:
        self.lab.add_pod('one', ONE)
        self.assert_bound(ONE)
        with mock.patch.object(kernel, 'QUICK_LIMITS', kernel.Limits(4, 3, 4)):
            for number in range(9):
                self.lab.add_macvlan('one', 'aa%d' % number)
                self.lab.run('ip', 'address', 'add', '10.0.0.%d' % number,
                             'dev', 'aa%d' % number, netns='one')
                self.lab.run('ip', 'address', 'add', '10.0.1.%d' % number,
                             'dev', 'eth0', netns='one')
            # The last address added is the last that the kernel lists.
            self.change('del', ONE, 'one')
            self.change('add', ONE, 'one')
            self.finder.mark_all()
            self.assert_bound(ONE)
            self.lab.run('ip', 'link', 'del', 'eth0', netns='one')
            self.assert_bound()

    def test_work_is_bounded(self) -> None:
        self.lab.add_pod('one', ONE)
        self.assert_bound(ONE)
        for number in range(9):
            self.lab.add_macvlan('one', 'aa%d' % number)
        limits = kernel.Limits(4, 3, 4)
        with mock.patch.object(kernel, 'QUICK_LIMITS', limits), \
                mock.patch.object(
                    kernel.Netlink, 'address_states', autospec=True,
                    side_effect=kernel.Netlink.address_states) as read:
            found = kernel.list_macvlans_in(
                '/run/netns/one', None, kernel.QUICK_LIMITS, ['aa8'])
        self.assertEqual(3, read.call_count)
        self.assertEqual('aa8', found[0].link.name)
        self.assertLess(len(found), 7)
        self.assertEqual(3, sum(each.is_whole for each in found))


class TestEvents(FinderTestCase):

    def test_old_process_with_a_new_macvlan(self) -> None:
        """The parent's event reveals a new macvlan in an old namespace."""
        pid = str(self.start_unnamed().pid)
        self.work()
        with mock.patch.object(kernel.search._Processes, 'new',
                               return_value=[]):
            os.mkdir(self.PROC)
            os.symlink('/proc/' + pid, '%s/%s' % (self.PROC, pid))
            self.lab.run('ip', 'link', 'add', 'mv', 'link', 'eth0', 'netns',
                         pid, 'type', 'macvlan', 'mode', 'bridge')
            self.lab.run('nsenter', '--net', '--target', pid, 'ip', 'link',
                         'set', 'mv', 'up')
            self.lab.run('nsenter', '--net', '--target', pid, 'ip', 'address',
                         'add', ONE + '/24', 'dev', 'mv')
            self.assert_bound(ONE)

    def test_a_process_that_ends_in_a_namespace_with_a_name(self) -> None:
        """The finder examines a namespace by its name, not by a process.

        The search has found the namespace by both.
        """
        os.mkdir(self.PROC)
        self.work()
        self.lab.add_pod('one', ONE)
        self.finder.note_mounts()
        self.finder._search_new()
        process = subprocess.Popen(['ip', 'netns', 'exec', 'one', 'sleep',
                                    '1000'])
        self.addCleanup(process.wait)
        self.addCleanup(process.kill)
        pid = str(process.pid)
        lab.until(lambda: os.stat('/proc/%s/ns/net' % pid).st_ino
                  == os.stat('/run/netns/one').st_ino)
        os.symlink('/proc/' + pid, '%s/%s' % (self.PROC, pid))
        self.finder._search_new()
        os.unlink('%s/%s' % (self.PROC, pid))
        with mock.patch.object(kernel.Search, 'all', return_value=[]):
            self.assert_bound(ONE)

    def test_another_namespace_of_the_same_name(self) -> None:
        """A new namespace at a known path replaces the old one.

        The finder has not received the event of the old namespace's end.
        """
        self.lab.add_pod('one', ONE)
        self.assert_bound(ONE)
        known, = (each for each in self.finder._namespaces.values()
                  if each.location.path.endswith('/one'))
        self.lab.del_netns('one')
        lab.until(lambda: kernel.judge_state(
            known.location.path,
            known.location.namespace) is kernel.State.GONE)
        while select.select(self.finder.list_readable(), [], [], 1)[0]:
            self.finder._events.get()
        self.lab.add_pod('one', TWO)
        with mock.patch.object(kernel.Search, 'all', return_value=[]), \
                mock.patch.object(kernel.Search, 'new', return_value=[]):
            self.finder._queue.mark(known, time.monotonic())
            self.assert_bound(TWO)

    def test_macvlans_of_known_namespaces_cause_no_search_for_all(self
                                                                  ) -> None:
        self.lab.add_netns('one')
        self.finder.note_mounts()
        self.work()
        with mock.patch.object(kernel.Search, 'all') as searched:
            self.lab.add_pod('two', TWO)
            self.finder.note_mounts()
            self.assert_bound(TWO)
            self.lab.add_macvlan('one')
            self.lab.run('ip', 'address', 'add', ONE + '/24', 'dev', 'eth0',
                         netns='one')
            self.assert_bound(ONE, TWO)
            self.lab.del_netns('two')
            self.assert_bound(ONE)
        searched.assert_not_called()

    def test_flood(self) -> None:
        """The finder drops a flood of events, and reads all state again."""
        self.lab.add_pod('one', ONE)
        self.assert_bound(ONE)
        events = self.finder._events
        assert events is not None
        with mock.patch.object(kernel.events, 'MAX_EVENTS', 9):
            for _ in range(9):
                for verb in ('add', 'del'):
                    self.lab.run('ip', 'address', verb, '10.0.0.1', 'dev',
                                 'eth0', netns='one')
            self.lab.run('ip', 'address', 'add', TWO + '/24', 'dev', 'eth0',
                         netns='one')
            self.lab.add_pod('two', LATER)
            self.finder.note_mounts()
            changes = events.get()
            self.assertEqual((True, 9), (changes.lost, changes.messages))
            self.assertEqual(0, events.get().messages)
            with mock.patch.object(events, 'get', side_effect=[changes]):
                self.finder.read_events()
            self.assert_bound(ONE, TWO, LATER)
        self.lab.run('ip', 'address', 'del', TWO + '/24', 'dev', 'eth0',
                     netns='one')
        self.assert_bound(ONE, LATER)

    def test_records_that_another_program_has_changed(self) -> None:
        self.lab.add_pod('one', ONE)
        self.lab.add_pod('two', TWO)
        self.assert_bound(ONE, TWO)
        record = self.snapshot().live[ipaddress.ip_address(ONE)]
        self.manager().unbind(record.owner, base.addresses(ONE))
        self.assertEqual({TWO}, self.bound())
        queue = self.finder._queue
        with mock.patch.object(queue, 'mark', side_effect=queue.mark) as mark:
            self.finder.note_records()
        self.assertEqual([record.namespace], [
            call.args[0].location.namespace for call in mark.mock_calls])
        self.assert_bound(ONE, TWO)

    def test_namespace_that_gets_a_name(self) -> None:
        """A record changes from a process's path to the namespace's name.

        The name exists as long as the namespace; the process can end
        earlier.
        """
        process = self.start_unnamed()
        pid = str(process.pid)
        os.mkdir(self.PROC)
        os.symlink('/proc/' + pid, '%s/%s' % (self.PROC, pid))
        self.finder.mark_all()
        self.lab.run('ip', 'link', 'add', 'eth0', 'link', 'eth0', 'netns', pid,
                     'type', 'macvlan', 'mode', 'bridge')
        self.lab.run('nsenter', '--net', '--target', pid, 'ip', 'address',
                     'add', ONE + '/24', 'dev', 'eth0')
        self.assert_bound(ONE)
        self.lab.run('ip', 'netns', 'attach', 'one', pid)
        self.finder.note_mounts()
        process.kill()
        process.wait()
        os.remove('%s/%s' % (self.PROC, pid))
        self.lab.run('ip', 'address', 'add', TWO + '/24', 'dev', 'eth0',
                     netns='one')
        self.assert_bound(ONE, TWO)
        self.assertEqual({'/run/netns/one'}, {
            record.netns for record in self.snapshot().live.values()})


class TestRecords(base.LabTestCase):

    def test_take_back_leaves_others(self) -> None:
        options = base.options()
        netns = self.lab.add_pod('one', ONE)
        self.manager().bind(Owner('discovered-7', 'eth0'),
                            base.addresses(ONE), parent='eth0', netns=netns,
                            origin=Origin.DISCOVERED)
        # The origin decides, not the name of the owner.
        self.manager().bind(Owner('discovered', 'eth0'),
                            base.addresses(TWO), parent='eth0', netns=netns,
                            origin=Origin.MANUAL)
        found = ledger.Ledger(options.state_dir)
        # If the result is False, the next sync tries again.
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
