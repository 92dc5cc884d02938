# SPDX-License-Identifier: Apache-2.0

"""A black-box suite for a CNI plugin that is chained after macvlan.

The suite tests both ways to run break0, and the executable in the environment
variable CNI_PLUGIN, if it is set.
"""

from __future__ import annotations

import json
import os
import subprocess
import threading
from typing import Any

from tests.functional.cni import base
from tests.functional.cni.base import ID
from tests.functional.cni.base import network
from tests.functional.cni.base import OTHER_ID
from tests.support import dhcp
from tests.support import lab
from tests.support import program

VERSIONS = ['0.3.1', '0.4.0', '1.0.0', '1.1.0']


class PluginSuite(base.CNITestCase):
    """The plugin follows the CNI specification and break0's documentation."""

    def setUp(self) -> None:
        super().setUp()
        self.netns = self.lab.add_netns('one')
        self.lan = network()

    def bound_for(self, *containers: str) -> set[str]:
        """Return the recorded addresses of these containers."""
        return {str(record.address)
                for record in self.snapshot().live.values()
                if record.owner.container_id in containers}

    # ADD and DEL

    def test_both_families_both_ways(self) -> None:
        result = self.runtime.add(self.lan, self.netns)
        ipv4, ipv6 = base.addresses(result)
        self.assert_reachable(ipv4, 'one')
        self.assert_reachable(ipv6, 'one')
        self.assertEqual([], self.problems())
        self.runtime.remove(self.lan, self.netns)
        self.assertEqual({}, self.lab.routes())
        self.assertEqual(set(), self.bound())
        self.assertEqual([], self.lab.ip('neigh', 'show', 'dev', 'break0'))

    def test_a_second_add_with_other_addresses(self) -> None:
        for number in (201, 202):
            self.lan['plugins'][0]['ipam'] = {
                'type': 'static', 'addresses': [
                    {'address': '100.75.30.%d/24' % number},
                    {'address': 'fd00:30::%d/64' % number}]}
            self.lab.run('ip', 'link', 'del', 'eth0', netns='one',
                         check=number == 202)
            added = set(base.addresses(self.runtime.add(self.lan,
                                                        self.netns)))
        self.assertEqual(4, len(self.bound()))
        self.runtime.remove(self.lan, self.netns)
        # The sandbox stays, so only the DEL ends the first ADD's claims.
        lab.until(lambda: not (self.manager().sync(), self.bound())[1])
        self.assertEqual({}, self.lab.routes())
        # The DEL does not end claims of a later ADD.
        self.runtime.add(self.lan, self.netns)
        self.manager().sync()
        self.assertEqual(added, self.bound())

    def test_static_addresses(self) -> None:
        self.lan['plugins'][0]['ipam'] = {
            'type': 'static', 'addresses': [
                {'address': '100.75.30.201/24'},
                {'address': 'fd00:30::201/64'}]}
        self.runtime.add(self.lan, self.netns)
        self.assert_reachable('100.75.30.201', 'one')
        self.assert_reachable('fd00:30::201', 'one')
        self.runtime.remove(self.lan, self.netns)
        self.assertEqual({}, self.lab.routes())

    def test_dhcp(self) -> None:
        server = dhcp.serve('100.75.30.210', '100.75.30.219')
        daemon = subprocess.Popen([base.PLUGINS + '/dhcp', 'daemon'],
                                  stderr=subprocess.DEVNULL)
        for each in (server, daemon):
            self.addCleanup(each.wait)
            self.addCleanup(each.kill)
        lab.until(lambda: os.path.exists('/run/cni/dhcp.sock'))
        self.lan['plugins'][0]['ipam'] = {'type': 'dhcp'}
        address, = base.addresses(self.runtime.add(self.lan, self.netns))
        self.assertRegex(address, r'100\.75\.30\.21\d')
        self.assert_reachable(address, 'one')
        self.runtime.remove(self.lan, self.netns)
        self.assertEqual({}, self.lab.routes())

    def test_each_version_as_it_is(self) -> None:
        for version in VERSIONS[:3]:  # macvlan 1.1.1 rejects later versions
            lan = network(version=version)
            result = self.runtime.add(lan, self.netns)
            self.assertEqual(version, result['cniVersion'])
            self.assert_reachable(base.addresses(result)[0], 'one')
            self.runtime.remove(lan, self.netns)
        result = {**self.runtime.macvlan('ADD', self.lan, self.netns),
                  'cniVersion': '1.1.0', 'of others': [1e-7, None, 'ü']}
        self.assertEqual(result, self.runtime.call(
            'ADD', self.runtime.single(network(version='1.1.0'),
                                       previous=result), netns=self.netns))

    def test_addresses_of_its_interface_only(self) -> None:
        previous = self.runtime.macvlan('ADD', self.lan, self.netns)
        own = next(number for number, each in enumerate(
            previous['interfaces']) if each['name'] == 'eth0')
        previous['interfaces'] += [
            {'name': 'eth0', 'mac': '02:00:00:00:00:09'},
            {'name': 'eth1', 'sandbox': self.netns}]
        for number, text in ((own + 1, '100.75.30.97/24'),
                             (own + 2, '100.75.30.98/24')):
            previous['ips'].append({'address': text, 'interface': number})
        self.runtime.call('ADD', self.runtime.single(
            self.lan, previous=previous), netns=self.netns)
        self.assertEqual(set(base.addresses(previous)[:-2]), self.bound())

    def test_addresses_without_interfaces(self) -> None:
        previous = self.runtime.macvlan('ADD', self.lan, self.netns)
        previous.pop('interfaces')
        for each in previous['ips']:
            each.pop('interface')
        self.runtime.call('ADD', self.runtime.single(
            self.lan, previous=previous), netns=self.netns)
        self.assert_reachable(base.addresses(previous)[0], 'one')

    def test_without_prev_result(self) -> None:
        self.assert_fails(7, 'prevResult', 'ADD',
                          self.runtime.single(self.lan), netns=self.netns)
        self.assertEqual(set(), self.bound())

    def test_mode_private(self) -> None:
        lan = network(mode='private')
        previous = self.runtime.macvlan('ADD', lan, self.netns)
        self.assert_fails(100, 'private mode on eth0', 'ADD',
                          self.runtime.single(lan, previous=previous),
                          netns=self.netns)

    def test_on_no_nic_of_this_node(self) -> None:
        self.lab.run('ip', 'link', 'add', 'veth', 'type', 'veth', 'peer',
                     'name', 'inner', netns='one')
        self.lab.run('ip', 'link', 'add', 'eth0', 'link', 'inner', 'type',
                     'macvlan', 'mode', 'bridge', netns='one')
        previous = {'cniVersion': '1.0.0', 'ips': [
            {'address': '100.75.30.9/24'}]}
        for ifname, text in (('eth0', 'its parent is not on this node'),
                             ('veth', 'it is a veth'),
                             ('nope', 'it does not exist')):
            self.assert_fails(100, text, 'ADD', self.runtime.single(
                self.lan, previous=previous), netns=self.netns,
                ifname=ifname)

    def test_name_of_the_pod(self) -> None:
        for args, pod in (
                ('IgnoreUnknown=1;K8S_POD_NAMESPACE=shop;K8S_POD_NAME=web-0;'
                 'K8S_POD_INFRA_CONTAINER_ID=x', 'shop/web-0'),
                ('K8S_POD_NAMESPACE=web;K8S_POD_NAME=web', 'web'),
                ('K8S_POD_NAME=web', 'web'), ('', None),
                ('K8S_POD_NAMESPACE=a b;K8S_POD_NAME=x\ny', None)):
            self.runtime.add(self.lan, self.netns, args=args)
            record, *_ = self.snapshot().live.values()
            self.assertEqual((pod, 'lan'), (record.pod, record.network))
            self.runtime.remove(self.lan, self.netns)

    def test_del_in_all_states(self) -> None:
        for with_result in (True, False):
            for netns in (self.netns, None, '/run/netns/gone'):
                self.runtime.add(self.lan, self.netns)
                for _ in range(2):
                    self.runtime.call(
                        'DEL', self.runtime.single(
                            self.lan, previous=self.runtime.results[
                                'lan', ID, 'eth0'] if with_result else None),
                        netns=netns)
                    self.assertEqual(set(), self.bound(), (with_result,
                                                           netns))
                self.runtime.macvlan('DEL', self.lan, self.netns)

    def test_del_of_an_interface_that_is_down(self) -> None:
        self.runtime.add(self.lan, self.netns)
        self.lab.run('ip', 'link', 'set', 'eth0', 'down', netns='one')
        self.runtime.remove(self.lan, self.netns)
        self.assertEqual({}, self.lab.routes())

    def test_late_del_takes_nothing_of_others(self) -> None:
        lan = self.lan
        lan['plugins'][0]['ipam'] = {'type': 'static', 'addresses': [
            {'address': '100.75.30.201/24'}]}
        self.runtime.add(lan, self.netns)
        self.runtime.macvlan('DEL', lan, self.netns)
        self.lab.add_netns('two')
        self.runtime.add(lan, '/run/netns/two', OTHER_ID)
        for with_result in (True, False):
            for container, ifname in ((ID, 'eth0'), (OTHER_ID, 'eth1'),
                                      ('nobody', 'eth0')):
                self.runtime.remove(lan, None, container, ifname,
                                    with_result)
                if with_result:
                    self.runtime.call('DEL', self.runtime.single(
                        lan, previous=self.runtime.results[
                            'lan', ID, 'eth0']), container=container,
                        ifname=ifname)
        self.assert_reachable('100.75.30.201', 'two')
        self.assertEqual({'100.75.30.201'}, self.bound_for(OTHER_ID))

    def test_del_with_damaged_result(self) -> None:
        for previous in ('text', [], 7, {'ips': 'text'}, {'ips': [7]},
                         {'ips': [{'address': 'nonsense'}]},
                         {'interfaces': [{}], 'ips': [{'address': None}]}):
            self.runtime.add(self.lan, self.netns)
            self.runtime.call('DEL', self.runtime.single(
                self.lan, previous=previous), netns=self.netns)
            self.assertEqual(set(), self.bound(), previous)
            self.runtime.macvlan('DEL', self.lan, self.netns)

    # CHECK

    def test_check(self) -> None:
        ipv4, ipv6 = base.addresses(self.runtime.add(self.lan, self.netns))
        self.runtime.check(self.lan, self.netns)
        mac = self.lab.link('break0') or {}
        for fault, text in (
                (('ip', 'route', 'del', ipv4, 'dev', 'break0'),
                 'its route is missing'),
                (('ip', '-6', 'route', 'del', ipv6, 'dev', 'break0'),
                 'its route is missing'),
                (('ip', 'neigh', 'del', ipv4, 'dev', 'break0'),
                 'neighbour entry is missing'),
                (('ip', 'netns', 'exec', 'one', 'ip', 'neigh', 'del',
                  lab.NODE, 'dev', 'eth0'), 'not configured to reach'),
                (('rm', '/run/kuryr-break0/addresses/%s.json' % ipv4),
                 'the record of %s is missing' % ipv4)):
            # A running agent would repair the fault before the CHECK.
            self.paused('STOP')
            self.lab.run(*fault)
            with self.assertRaises(base.Failed) as failed:
                self.check_directly()
            self.assertEqual(102, failed.exception.code)
            self.assertIn(text, failed.exception.text)
            self.paused('CONT')
            self.lab.run(program.BREAK0, '--config-file', base.CONF, 'sync')
            # The agent may be repairing the same fault.
            lab.until(self.is_checked)
        self.assertEqual(mac, self.lab.link('break0') or {})

    def is_checked(self) -> bool:
        try:
            self.runtime.check(self.lan, self.netns)
        except base.Failed:
            return False
        return True

    def paused(self, signal: str) -> None:
        """Send a signal to the agent, if one runs.

        :param signal: "STOP" or "CONT"
        """
        agent = getattr(self, 'agent', None)
        if agent is not None:
            self.lab.run('kill', '-' + signal, str(agent.pid))

    def check_directly(self) -> None:
        """Call CHECK in one process, without the agent."""
        self.runtime.call(
            'CHECK', self.runtime.single(self.lan, previous=self.runtime
                                         .results['lan', ID, 'eth0']),
            netns=self.netns, plugin=self.script())

    def script(self) -> str:
        path = '/run/one-process/break0'
        if not os.path.exists(path):
            os.mkdir('/run/one-process')
            self.lab.run(program.BREAK0, '--config-file', base.CONF,
                         'cni-install', '--without-agent', '--bin-dir',
                         '/run/one-process')
        return path

    def test_check_of_nothing(self) -> None:
        previous = self.runtime.macvlan('ADD', self.lan, self.netns)
        config = self.runtime.single(self.lan, previous=previous)
        self.assert_fails(102, 'is missing', 'CHECK', config,
                          netns=self.netns)
        self.assert_fails(7, 'prevResult', 'CHECK',
                          self.runtime.single(self.lan), netns=self.netns)
        self.assert_fails(100, 'does not exist', 'CHECK', config,
                          netns='/run/netns/none')

    # Several networks

    def test_two_networks_on_two_nics(self) -> None:
        self.lab.run('ip', 'link', 'add', 'eth1', 'type', 'veth', 'peer',
                     'name', 'nic1', 'netns', 'lan')
        self.lab.run('ip', 'link', 'set', 'eth1', 'up')
        self.lab.run('ip', 'link', 'set', 'nic1', 'up', netns='lan')
        self.lab.run('ip', 'address', 'add', '10.9.0.1/24', 'dev', 'eth1')
        storage = network('storage', master='eth1',
                          subnets=('10.9.0.128/25',))
        first, _ = base.addresses(self.runtime.add(self.lan, self.netns))
        second, = base.addresses(self.runtime.add(
            storage, self.netns, ifname='net1'))
        self.assert_reachable(first, 'one')
        self.assertEqual((True, True), (
            self.lab.ping(second), self.lab.ping('10.9.0.1', 'one')))
        self.assertEqual({second}, set(self.lab.routes('break0-eth1')))
        self.runtime.check(storage, self.netns, ifname='net1')
        self.runtime.remove(storage, self.netns, ifname='net1')
        self.assertEqual({}, self.lab.routes('break0-eth1'))
        self.assert_reachable(first, 'one')

    def test_gc_of_one_network_among_others(self) -> None:
        other = network('other', subnets=('100.75.30.64/26',))
        kept = set()
        for number, (listed, container) in enumerate((
                (self.lan, ID), (self.lan, OTHER_ID), (other, ID))):
            self.lab.add_netns('n%d' % number)
            found = base.addresses(self.runtime.add(
                listed, '/run/netns/n%d' % number, container,
                ifname='eth0' if listed is self.lan else 'net1',
                # A pod with the network's name must not match the network.
                args='K8S_POD_NAME=lan'))
            if container == OTHER_ID or listed is other:
                kept.update(found)
        self.lab.add_pod('kuryr', '100.75.30.40')
        self.bind('100.75.30.40', netns='/run/netns/kuryr')
        self.lab.add_pod('manual', '100.75.30.41')
        self.lab.run(program.BREAK0, '--config-file', base.CONF, 'bind',
                     '--owner', 'lan', '--netns', '/run/netns/manual')
        lan = self.runtime.single({**self.lan, 'cniVersion': '1.1.0'})
        valid = 'cni.dev/valid-attachments'
        self.assert_fails(7, valid, 'GC', lan)
        self.assert_fails(7, valid, 'GC', {**lan, valid: 'all'})
        self.assert_fails(7, valid, 'GC', {**lan, valid: [{}]})
        self.runtime.call('GC', {**lan, valid: None})
        before = self.bound()
        self.assertEqual(kept | self.bound_for(ID) | {
            '100.75.30.40', '100.75.30.41'}, before)
        self.runtime.call('GC', {**lan, valid: [
            {'containerID': OTHER_ID, 'ifname': 'eth0'},
            {'containerID': ID, 'ifname': 'eth7'}]})
        self.assertEqual(kept | {'100.75.30.40', '100.75.30.41'},
                         self.bound())
        self.assertEqual(self.bound(), set(self.lab.routes()))
        self.runtime.call('GC', {**lan, valid: []}, container=None,
                          ifname=None)
        self.assertEqual(self.bound_for(ID) | {
            '100.75.30.40', '100.75.30.41'}, self.bound())

    # Invalid requests

    def test_variables(self) -> None:
        config = self.runtime.single(self.lan, previous={
            'cniVersion': '1.0.0', 'ips': []})
        for variable, values, text in (
                ('command', (None, '', 'add', 'NOPE', 'ADD\n'),
                 'CNI_COMMAND'),
                ('container', (None, '', '../../etc', 'a/b', 'a\nb', 'a b',
                               '-a', '.', 'x' * 300, 'ü'),
                 'CNI_CONTAINERID'),
                ('ifname', (None, '', '.', '..', 'a/b', 'a b', 'a:b',
                            'x' * 16, 'ü' * 8, 'a\nb'), 'CNI_IFNAME'),
                ('netns', (None, '', 'relative', '/run/netns/a\nb',
                           '/' + 'x' * 600), 'CNI_NETNS'),
                ('args', ('nonsense', 'A=1;B', ';;C'), 'CNI_ARGS'),
                ('CNI_PATH', (None, ''), 'CNI_PATH')):
            for value in values:
                given: dict[str, Any] = {
                    'command': 'ADD', 'netns': self.netns, variable: value}
                with self.subTest(variable=variable, value=value):
                    self.assert_fails(4, text, given.pop('command'), config,
                                      **given)
        self.assertEqual(set(), self.bound())
        self.assertIsNone(self.lab.link('break0'))

    def test_namespace_that_is_none(self) -> None:
        config = self.runtime.single(self.lan, previous={
            'cniVersion': '1.0.0', 'ips': [{'address': '100.75.30.9/24'}]})
        os.mkfifo('/run/fifo')
        open('/run/file', 'w').close()
        for netns in ('/run/none', '/run', '/run/fifo', '/run/file',
                      '/dev/null', '/proc/self/ns/mnt'):
            self.assert_fails(100, 'does not exist, or is another|cannot be '
                              'entered', 'ADD', config, netns=netns)
        self.assert_fails(100, 'namespace of the node itself', 'ADD', config,
                          netns='/proc/1/ns/net' if os.path.samefile(
                              '/proc/1/ns/net', '/proc/self/ns/net')
                          else '/proc/%d/ns/net' % os.getpid())

    def test_input(self) -> None:
        for command in ('ADD', 'DEL', 'CHECK', 'GC', 'STATUS'):
            for data in (b'', b' \n', b'{', b'nonsense', b'[]', b'"text"',
                         b'null', b'\xff\xfe', b'\0', b'{"a": NaN}',
                         b'{"a": 1e999}', b'[' * 100000,
                         b'{"a":' * 100000 + b'1' + b'}' * 100000,
                         b' ' * (2 ** 20) + b'{}',
                         b'{"a": "' + b'x' * 2 ** 21 + b'"}'):
                with self.subTest(command=command, data=data[:20]):
                    self.assert_fails(6, 'input', command, data,
                                      netns=self.netns)
            break  # all commands share the code that reads the input
        self.assert_fails(6, 'cniVersion', 'ADD', {'cniVersion': 1},
                          netns=self.netns)

    def test_configuration(self) -> None:
        good = self.runtime.single(self.lan, previous={
            'cniVersion': '1.0.0', 'ips': []})
        for keys, code, text in (
                ({'cniVersion': '0.2.0'}, 1, 'cniVersion'),
                ({'cniVersion': '9.9.9'}, 1, 'cniVersion'),
                ({'cniVersion': ''}, 1, 'cniVersion'),
                ({'name': ''}, 7, 'name'), ({'name': None}, 7, 'name'),
                ({'name': '../x'}, 7, 'name'), ({'name': 'a\nb'}, 7, 'name'),
                ({'strict': 'yes'}, 7, 'strict'),
                ({'prevResult': None}, 7, 'prevResult'),
                ({'prevResult': []}, 7, 'prevResult'),
                ({'prevResult': {'ips': {}}}, 7, 'ips'),
                ({'prevResult': {'ips': [{'address': '1.2.3.4'}]}}, 7,
                 'address'),
                ({'prevResult': {'ips': [{'address': 5}]}}, 7, 'address'),
                ({'prevResult': {'interfaces': [{'name': 'eth9'}]}}, 7,
                 'no interface eth0')):
            with self.subTest(keys=keys):
                self.assert_fails(code, text, 'ADD', {**good, **keys},
                                  netns=self.netns)
        missing = dict(good)
        missing.pop('cniVersion')
        self.assert_fails(1, "'0.1.0'", 'ADD', missing, netns=self.netns)

    def test_commands_that_came_later(self) -> None:
        for version, commands in (('0.3.1', ('CHECK', 'GC', 'STATUS')),
                                  ('0.4.0', ('GC', 'STATUS')),
                                  ('1.0.0', ('GC', 'STATUS'))):
            for command in commands:
                self.assert_fails(
                    1, '%s needs cniVersion' % command, command,
                    self.runtime.single(network(version=version)),
                    netns=self.netns)

    def test_version(self) -> None:
        for config, version in ((b'', '1.1.0'),
                                ({'cniVersion': '0.4.0'}, '0.4.0'),
                                ({'cniVersion': '1.1.0'}, '1.1.0')):
            self.assertEqual(
                {'cniVersion': version, 'supportedVersions': VERSIONS},
                self.runtime.call('VERSION', config, container=None,
                                  ifname=None, CNI_PATH=''))
        self.assert_fails(6, 'input', 'VERSION', b'{"a"')

    def test_status(self) -> None:
        config = self.runtime.single(network(version='1.1.0'))
        self.assertIsNone(self.runtime.call('STATUS', config, container=None,
                                            ifname=None))

    def test_input_in_pieces_and_a_closed_pipe(self) -> None:
        previous = self.runtime.macvlan('ADD', self.lan, self.netns)
        data = json.dumps(self.runtime.single(
            self.lan, previous=previous)).encode()
        environ = {'CNI_COMMAND': 'ADD', 'CNI_CONTAINERID': ID,
                   'CNI_IFNAME': 'eth0', 'CNI_NETNS': self.netns,
                   'CNI_PATH': base.PLUGINS, 'PATH': os.environ['PATH']}
        plugin = subprocess.Popen(
            [self.runtime.plugin], stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, env=environ)
        assert plugin.stdin and plugin.stdout
        for start in range(0, len(data), 97):
            plugin.stdin.write(data[start:start + 97])
            plugin.stdin.flush()
        plugin.stdin.close()
        self.assertEqual(previous, json.loads(plugin.stdout.read()))
        plugin.stdout.close()
        self.assertEqual(0, plugin.wait())
        reader, writer = os.pipe()
        os.close(reader)
        done = subprocess.run([self.runtime.plugin], input=data,
                              stdout=writer, stderr=subprocess.PIPE,
                              env=environ)
        os.close(writer)
        self.assertNotEqual(0, done.returncode)
        self.assertNotIn(b'Traceback', done.stderr)

    def test_many_at_once(self) -> None:
        containers = ['c%d' % number for number in range(12)]
        for name in containers:
            self.lab.add_netns(name)
        results = {}

        def add(name: str) -> None:
            results[name] = self.runtime.add(
                self.lan, '/run/netns/' + name, name)

        threads = [threading.Thread(target=add, args=(name,))
                   for name in containers]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        self.assertEqual(set(containers), set(results))
        for name in containers:
            self.assert_reachable(base.addresses(results[name])[0], name)


class TestShim(base.WithShim, PluginSuite):
    pass


class TestOneProcess(base.InOneProcess, PluginSuite):
    pass


if 'CNI_PLUGIN' in os.environ:
    class TestGiven(base.Given, PluginSuite):
        pass

del PluginSuite  # an abstract suite, which unittest must not load
