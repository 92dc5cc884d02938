# SPDX-License-Identifier: Apache-2.0

"""Status, doctor, metrics and log show unbound containers."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import time
from typing import Any
from unittest import mock
import urllib.request

from oslo_config import cfg

from kuryr_break0 import config
from kuryr_break0.doctor import examination
from kuryr_break0.doctor import host
from kuryr_break0.engine import containers
from kuryr_break0 import kernel
from kuryr_break0 import ledger
from kuryr_break0.model import Owner
from tests.functional import base
from tests.functional import discovery_base
from tests.support import lab
from tests.support import program

ONE, ONE6 = '100.75.30.81', 'fd00:30::81'
#: Makes the node a Docker host. On a node of Kuryr, the doctor advises adopt.
NO_KURYR = mock.patch.object(host.installation, 'is_for_kuryr',
                             lambda: False)


class UnservedTestCase(discovery_base.DiscoveryTestCase):

    def configure(self, *lines: str) -> None:
        with open(discovery_base.CONF, 'w') as file:
            file.write('[break0]\n' + '\n'.join((*lines, '')))

    def call(self, verb: str, *args: str) -> subprocess.CompletedProcess[str]:
        done = program.run(
            [program.BREAK0, '--config-file', discovery_base.CONF, verb,
             *args],
            text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            env={**os.environ, 'COLUMNS': '500'})  # no line is folded
        self.assertNotIn('Traceback', done.stderr)
        return done

    def status(self) -> list[tuple[Any, str]]:
        """Return the unbound addresses that status shows, and the reasons."""
        done = self.call('status', '--json')
        found = json.loads(done.stdout)
        self.assertEqual(int(not found['in_sync']), done.returncode)
        if found['unserved']:
            self.assertEqual(1, done.returncode)
            text = self.call('status').stdout
            for each in found['unserved']:
                self.assertIn(each['problem'], text)
        return [(each['address'], each['reason'])
                for each in found['unserved']]

    def finding(self, expected: str) -> dict[str, Any]:
        done = json.loads(self.call('doctor', '--json').stdout)
        found: dict[str, Any] = {each['id']: each
                                 for each in done['findings']}
        self.assertIn(expected, found)
        finding: dict[str, Any] = found[expected]
        return finding

    def follow(self, expected: str) -> None:
        """Run the doctor's commands, except systemctl and kuryr-break0."""
        commands = [each for each in self.finding(expected)['commands']
                    if not each.startswith(('systemctl', 'kuryr-break0'))]
        self.assertTrue(commands)
        for command in commands:
            self.lab.run('sh', '-c', command)


class TestReasons(UnservedTestCase):

    def test_without_discovery(self) -> None:
        self.configure('enabled = true')
        self.assertEqual([], self.status())
        self.lab.add_pod('one', ONE)
        self.assertEqual([(ONE, 'not_discovered')], self.status())
        finding = self.finding('container-not-discovered')
        # The command reads the configuration that this doctor has read.
        self.assertEqual(['kuryr-break0 --config-file %s adopt'
                          % discovery_base.CONF], finding['commands'])
        self.assertEqual('Bind pods that ran before the installation with '
                         'adopt.', finding['remedy'])

    def test_disabled(self) -> None:
        self.configure('enabled = false\ndiscover = true\n'
                       'allowed_cidrs = 100.75.30.0/24')
        self.lab.add_pod('one', ONE)
        self.assertEqual([(ONE, 'not_discovered')], self.status())
        self.assertEqual({'disabled', 'agent-not-running'},
                         set(self.examined()))

    def test_its_advice_without_kuryr(self) -> None:
        self.configure('enabled = true')
        self.lab.add_pod('one', ONE)
        self.lab.run('ip', 'address', 'add', '100.99.0.9/16', 'dev',
                     lab.PARENT)
        self.lab.add_pod('two', '100.99.7.2')
        base.add_unit()
        with NO_KURYR:
            found = self.examined()
        finding = found['container-not-discovered']
        self.assertEqual('Let the agent discover containers in these '
                         'networks.', finding.remedy)
        self.assertEqual('systemctl enable --now kuryr-break0-agent',
                         finding.commands[-1])
        for command in finding.commands:
            if not command.startswith('systemctl'):
                self.lab.run('sh', '-c', command)
        options = config.load(self.conf())
        self.assertTrue(options.discover)
        self.assertEqual(['100.75.30.0/24', '100.99.0.0/16'],
                         list(map(str, options.allowed_cidrs)))

    def test_its_advice_without_a_directory(self) -> None:
        path = '/run/no such/kuryr-break0.conf'
        for command in host.Host(path, False, False).set(discover='true'):
            self.lab.run('sh', '-c', command)
        with open(path) as file:
            self.assertIn('discover = true', file.read())

    def test_its_name(self) -> None:
        """A pod's name is known if another of its addresses is bound."""
        self.configure('discover = true', 'allowed_cidrs = fd00:30::/64')
        netns = self.lab.add_pod('one', ONE, ONE6)
        self.manager().bind(Owner('c0ffee', 'eth0'), base.addresses(ONE6),
                            parent=lab.PARENT, netns=netns, pod='shop/web')
        text = '%s, on eth0 in shop/web (%s), is not bound' % (ONE, netns)
        self.assertIn(text, self.call('status').stdout)
        self.assertIn(text, self.finding('container-not-allowed')['seen'])

    @staticmethod
    def conf() -> Any:
        conf = cfg.ConfigOpts()
        conf([], default_config_files=[discovery_base.CONF])
        return conf

    def examined(self) -> dict[str, Any]:
        return {each.id: each for each in examination.examine(
            self.conf(), False).findings}

    def test_no_agent(self) -> None:
        self.configure('discover = true', 'allowed_cidrs = 100.75.0.0/16')
        self.lab.add_pod('one', ONE)
        self.assertEqual([(ONE, 'not_discovered')], self.status())
        base.add_unit()
        with NO_KURYR:
            self.assertEqual(
                ('systemctl enable --now kuryr-break0-agent',),
                self.examined()['container-not-discovered'].commands)

    def test_outside_of_allowed_cidrs(self) -> None:
        self.lab.add_pod('one', ONE, ONE6)
        self.start('discover = true\nallowed_cidrs = 100.76.0.0/16,'
                   'fd00:30::/64\n', 'env')
        self.until_bound(ONE6)
        self.assertEqual([(ONE, 'not_allowed')], self.status())
        # The agent logs the reason once.
        self.assertEqual(1, self.log().count('it is outside [break0]'))
        self.follow('container-not-allowed')
        self.until_bound(ONE, ONE6)  # the agent has read the options again
        self.assertEqual([], self.status())

    def test_of_no_single_host(self) -> None:
        self.lab.add_pod('one', '224.0.0.7')
        self.configure('discover = true', 'allowed_cidrs = 100.75.0.0/16')
        finding = self.finding('container-refused')
        self.assertIn('a multicast address', finding['seen'])
        self.assertEqual([], finding['commands'])

    def test_the_address_of_break0(self) -> None:
        """Another value of allowed_cidrs would not help."""
        self.lab.add_pod('one', ONE)
        self.configure('discover = true', 'allowed_cidrs = 100.76.0.0/16',
                       'addr = ' + ONE)
        self.assertIn('an address of the node itself',
                      self.finding('container-refused')['seen'])
        self.assertEqual([(ONE, 'refused')], self.status())

    def test_another_parent(self) -> None:
        self.lab.add_pod('one', ONE)
        self.start(discovery_base.OPTIONS + 'parent = eth7\n', 'env')
        self.until(lambda: self.status() == [(ONE, 'other_parent')])
        finding = self.finding('container-other-parent')
        self.assertIn('parent is eth7, and there is no such interface',
                      finding['seen'])
        self.follow('container-other-parent')
        self.until_bound(ONE)
        self.assertEqual([], self.status())

    def test_another_parent_beside_the_one_that_is_set(self) -> None:
        self.lab.run('ip', 'link', 'add', 'eth1', 'up', 'type', 'veth',
                     'peer', 'name', 'nic1', 'netns', 'lan')
        self.lab.add_pod('one', ONE, parent='eth1')
        self.configure(discovery_base.OPTIONS, 'parent = eth0')
        self.assertEqual([(ONE, 'other_parent')], self.status())
        self.follow('container-other-parent')
        self.assertEqual([(ONE, 'not_discovered')], self.status())

    def test_modes(self) -> None:
        path = self.lab.add_pod('one', ONE)
        self.start()
        self.until_bound(ONE)
        for mode in ('private', 'vepa'):
            self.lab.run('ip', 'link', 'set', lab.PARENT, 'type', 'macvlan',
                         'mode', mode, netns='one')
            self.until(lambda: self.bound() == set())
            self.assertEqual([(ONE, 'mode')], self.status())
            finding = self.finding('container-mode')
            self.assertIn(path, finding['seen'])
            self.assertIn('lxc.net.0.macvlan.mode = bridge',
                          finding['remedy'])
            self.follow('container-mode')
            self.until_bound(ONE)
            self.assertEqual([], self.status())

    def test_a_name_that_a_shell_would_run(self) -> None:
        name = 'x;cd>$HOME;#'
        self.lab.run('ip', 'netns', 'add', 'one')
        self.lab.add_macvlan('one', name, mode='private')
        self.lab.run('ip', 'address', 'add', ONE + '/24', 'dev', name,
                     netns='one')
        self.start()
        self.until(lambda: self.status() == [(ONE, 'mode')])
        with mock.patch.dict(os.environ, HOME='/run/ran'):
            self.follow('container-mode')
            self.until_bound(ONE)
        self.assertFalse(os.path.exists('/run/ran'))
        # The command in a message must be fit for pasting too.
        done = self.call('bind', ONE, '--owner', 'x', '--parent', 'eth0')
        self.assertEqual(1, done.returncode)
        self.assertIn("--ifname '%s'" % name, done.stderr)

    def test_refused(self) -> None:
        """Addresses of other containers, the node and next hops are refused.

        Addresses of no single host, and addresses with a foreign route, are
        refused too.
        """
        self.bind(ONE, mac_of_pod='02:00:00:00:00:01')
        self.lab.run('ip', 'route', 'add', '100.75.30.84', 'dev', 'lo')
        self.lab.add_pod('one', ONE, lab.NODE)
        self.lab.add_pod('two', lab.LAN, '100.75.30.84', '100.75.30.255')
        self.start()
        self.until(lambda: 'another' in self.log()
                   or 'belongs to' in self.log())
        self.assertEqual(
            {(ONE, 'claimed'), *((each, 'refused') for each in (
                lab.NODE, lab.LAN, '100.75.30.84', '100.75.30.255'))},
            set(self.status()))
        self.assertIn('container-refused', str(self.finding(
            'container-refused')))

    def test_addresses_that_are_not_ready(self) -> None:
        self.lab.add_pod('one')
        self.configure('discover = true', 'allowed_cidrs = fd00:30::/64')
        self.assertEqual([(None, 'no_address')], self.status())
        self.lab.run('sysctl', '-w', 'net.ipv6.conf.eth0.dad_transmits=200',
                     netns='one')
        self.lab.run('ip', 'address', 'add', ONE6 + '/64', 'dev', 'eth0',
                     netns='one')
        self.assertEqual([(ONE6, 'tentative')], self.status())
        self.assertIn('duplicate address detection',
                      self.finding('container-pending')['seen'])

    def test_a_duplicate(self) -> None:
        self.lab.run('ip', 'address', 'add', ONE6 + '/64', 'dev', 'nic',
                     'nodad', netns='lan')
        self.configure('discover = true', 'allowed_cidrs = fd00:30::/64')
        self.lab.add_pod('one')
        self.lab.run('ip', 'address', 'add', ONE6 + '/64', 'dev', 'eth0',
                     netns='one')
        self.until_reason((ONE6, 'duplicate'))

    def until_reason(self, expected: tuple[str, str]) -> None:
        def is_it() -> bool:
            # The reason may change between the two commands in status().
            with contextlib.suppress(AssertionError):
                return self.status() == [expected]
            return False

        lab.until(is_it)


class TestBound(UnservedTestCase):

    def test_a_bound_container_is_not_listed(self) -> None:
        """A bound container is recognised by namespace or MAC address."""
        self.configure('enabled = true')
        self.bind(ONE, netns=self.lab.add_pod('one', ONE))
        mac = '02:00:00:00:00:82'
        self.lab.add_pod('two', '100.75.30.82', mac=mac)
        self.bind('100.75.30.82', mac_of_pod=mac, owner=base.OTHER_OWNER)
        self.assertEqual([], self.status())
        # The owner of a bound container chooses the addresses to bind.
        self.lab.run('ip', 'address', 'add', '100.75.30.83/24', 'dev',
                     'eth0', netns='one')
        self.assertEqual([], self.status())

    def test_metrics_and_log(self) -> None:
        self.lab.add_pod('one', ONE)
        self.start('metrics_bind = 127.0.0.1:9817\nresync_interval = 1\n')

        def metrics() -> str:
            with urllib.request.urlopen('http://127.0.0.1:9817/metrics',
                                        timeout=lab.PATIENCE) as answer:
                return str(answer.read().decode())

        def count() -> bool:
            if 'Serving /metrics' not in self.log():
                return False
            return ('kuryr_break0_containers_unserved{'
                    'reason="not_discovered"} 1.0' in metrics())

        self.until(count)
        time.sleep(3)  # several resyncs
        self.assertEqual(1, self.log().count('%s, on eth0 in /run/netns/one, '
                                             'is not bound' % ONE))
        self.bind(ONE, netns='/run/netns/one')
        self.until(lambda: not count())

    def test_the_log_of_one_with_many_addresses(self) -> None:
        self.lab.add_pod('one', *('100.75.30.%d' % number
                                  for number in range(100, 120)))
        self.start('resync_interval = 1\n')
        self.until(lambda: '12 more addresses of containers are unbound'
                   in self.log())
        self.assertEqual(8, self.log().count('is not bound'))


class TestPodSide(UnservedTestCase):

    def test_entries_flushed(self) -> None:
        self.configure('enabled = true')
        self.bind(ONE, netns=self.lab.add_pod('one', ONE))
        self.assertEqual(0, self.call('status').returncode)
        self.lab.run('ip', 'neigh', 'flush', 'dev', 'eth0', 'nud',
                     'permanent', netns='one')
        done = self.call('status')
        self.assertEqual(1, done.returncode)
        self.assertIn('its container is not configured',
                      ' '.join(done.stdout.split()))
        self.call('sync')
        self.assertEqual(0, self.call('status').returncode)

    def test_interface_gone(self) -> None:
        self.configure('enabled = true')
        self.bind(ONE, netns=self.lab.add_pod('one', ONE))
        self.lab.run('ip', 'link', 'del', 'eth0', netns='one')
        done = self.call('status')
        self.assertEqual(1, done.returncode)
        self.assertIn('has no interface eth0. If it was deleted '
                      'with its parent, restart the container',
                      ' '.join(done.stdout.split()))

    def test_an_unexamined_address_is_named(self) -> None:
        self.configure('enabled = true')
        self.bind(ONE)
        done = self.call('status')
        self.assertEqual(0, done.returncode, done.stdout)
        self.assertIn('Not examined in the container: 1 addresses, for '
                      'example %s: '
                      'its namespace is not recorded' % ONE,
                      done.stdout)

    def test_ipv6_disabled(self) -> None:
        self.configure('enabled = true')
        self.bind(ONE6, netns=self.lab.add_pod('one', ONE6))
        self.lab.run('sysctl', '-w', 'net.ipv6.conf.break0.disable_ipv6=1')
        done = self.call('status')
        self.assertEqual(1, done.returncode)
        command = done.stdout.partition('Enable it: ')[2].splitlines()[0]
        self.lab.run('sh', '-c', 'PATH=%s:$PATH; %s' % (
            program.BIN, command))
        self.assertEqual(0, self.call('status').returncode)


class TestCost(base.LabTestCase):

    def test_addresses_of_other_interfaces_are_not_read(self) -> None:
        """The addresses of a namespace's other interfaces are not read.

        Any process can unshare a namespace and add many addresses there.
        """
        read = kernel.Netlink.address_states
        seen: list[int] = []

        def states(self: kernel.Netlink, ifindex: int = 0) -> Any:
            found = read(self, ifindex)
            seen.append(len(found))
            return found

        path = self.lab.add_netns('one')
        for number in range(9):
            self.lab.run('ip', 'address', 'add', '10.0.0.%d' % number, 'dev',
                         'lo', netns='one')
        with mock.patch.object(kernel.Netlink, 'address_states', states):
            self.assertEqual([], kernel.list_macvlans_in(path))
            self.assertEqual([], seen)
            self.lab.add_macvlan('one')
            self.lab.run('ip', 'address', 'add', ONE, 'dev', 'eth0',
                         netns='one')
            (found,) = kernel.list_macvlans_in(path)
            self.assertEqual(tuple(base.addresses(ONE)), found.addresses)
            self.assertLess(sum(seen), 3)

    def test_one_with_thousands_of_addresses(self) -> None:
        self.lab.add_pod('one', *('100.75.30.%d' % number
                                  for number in range(100, 109)))
        with mock.patch.object(containers, 'MAX_UNSERVED', 5):
            self.assertEqual(5, len(containers.unserved(
                self.snapshot(), ledger.Ledger('/run/kuryr-break0'))))

    def test_a_sync_costs_nothing_more(self) -> None:
        """A sync does not look for unbound containers; the agent does."""
        self.bind(ONE)
        with mock.patch.object(containers, 'unserved') as look:
            self.manager().sync()
        look.assert_not_called()
