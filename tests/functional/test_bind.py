# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import json
import os

from tests.functional.base import POD
from tests.functional.cli_base import add_unfit
from tests.functional.cli_base import CLITestCase
from tests.functional.cli_base import UNFIT
from tests.support import lab
from tests.support import program

ADDRESS = '100.75.30.80'
ADDRESS6 = 'fd00:30::80'
NETNS = '/run/netns/web'
OTHER_NETNS = '/run/netns/other'


class ByHandTestCase(CLITestCase):

    def setUp(self) -> None:
        super().setUp()
        self.lab.add_ipv6()
        self.lab.add_pod('web', ADDRESS, ADDRESS6)
        self.lab.settle()

    def run_it(self, *args: str, code: int = 0, **environ: str) -> str:
        done = self.call(*args, **environ)
        self.assertEqual(code, done.returncode, done.stdout + done.stderr)
        if code:
            # Log lines may precede the error, which is the last line.
            self.assertRegex(done.stderr, r'(\A|\n)kuryr-break0: [^\n]*\n\Z')
        return done.stderr if code else done.stdout

    def bind_web(self, *args: str, code: int = 0, **environ: str) -> str:
        return self.run_it('bind', ADDRESS, '--owner', 'web', *args,
                           code=code, **environ)

    def unbind_web(self, *args: str, code: int = 0) -> str:
        return self.run_it('unbind', ADDRESS, '--owner', 'web', *args,
                           code=code)

    def assert_in_sync(self, *unbound: str) -> None:
        """Check that status finds no problem but these unserved addresses."""
        done = self.call('status', '--json')
        self.assertEqual(1 if unbound else 0, done.returncode, done.stdout)
        status = json.loads(done.stdout)
        self.assertEqual((0, []), (status['totals']['out_of_sync'],
                                   status['problems']))
        self.assertEqual(sorted(unbound), sorted(
            each['address'] for each in status['unserved']))

    def assert_reachable(self, expected: bool = True) -> None:
        self.assertEqual(
            (expected, expected), (self.lab.ping(ADDRESS),
                                   self.lab.ping(lab.NODE, 'web')))


class TestBind(ByHandTestCase):

    def test_and_unbind(self) -> None:
        before = self.lab.state()
        self.assert_reachable(False)
        self.assertEqual(
            'Bound %s to break0 for web/eth0\n'
            'Bound %s to break0 for web/eth0\n' % (ADDRESS, ADDRESS6),
            self.run_it('bind', ADDRESS, ADDRESS + '/32', ADDRESS6,
                        '--owner', 'web', '--netns', NETNS))
        self.assert_reachable()
        self.assertTrue(self.lab.ping(ADDRESS6))
        self.assertTrue(self.lab.ping(lab.NODE6, 'web'))
        mac = self.lab.ip('link', 'show', lab.PARENT,
                          netns='web')[0]['address']
        self.assertEqual(
            {ADDRESS: mac, ADDRESS6: mac},
            {each['dst']: each['lladdr'] for each in self.lab.ip(
                'neighbour', 'show', 'dev', 'break0', 'nud', 'permanent')})
        self.assert_in_sync()
        self.assertEqual(
            'Unbound %s\nUnbound %s\n' % (ADDRESS, ADDRESS6),
            self.run_it('unbind', ADDRESS, ADDRESS6, ADDRESS, '--owner',
                        'web'))
        self.assert_reachable(False)
        self.lab.run('ip', 'link', 'del', 'break0')
        self.assertEqual(before, self.lab.state())
        self.assertEqual('%s was not bound\n' % ADDRESS, self.unbind_web())

    def test_again_is_harmless(self) -> None:
        for _ in range(2):
            self.bind_web('--netns', NETNS)
            # The operator chooses the addresses of a manual bind, so ADDRESS6
            # does not count as unserved.
            self.assert_in_sync()
        self.assert_reachable()

    def test_after_a_container_with_another_clock(self) -> None:
        for command, number in ((('unshare', '--time', '--boottime', '86400',
                                  program.BREAK0), 1), ((program.BREAK0,), 2)):
            self.lab.run('ip', 'link', 'set', 'dev', 'eth0', 'address',
                         '02:00:00:00:05:%02x' % number, netns='web')
            self.lab.run(*command, 'bind', ADDRESS, '--owner', 'web',
                         '--netns', NETNS)
            self.assert_reachable()
            self.assert_in_sync()

    def test_it_ends_with_its_namespace(self) -> None:
        self.bind_web('--netns', NETNS)
        self.lab.del_netns('web')
        self.run_it('sync')
        self.assertEqual({}, self.lab.routes())

    def test_without_a_namespace(self) -> None:
        self.bind_web('--parent', lab.PARENT)
        self.assert_reachable()
        self.assertEqual([], self.lab.ip('neighbour', 'show', 'dev',
                                         'break0', 'nud', 'permanent'))
        mac = self.lab.ip('link', 'show', lab.PARENT,
                          netns='web')[0]['address']
        self.bind_web('--parent', lab.PARENT, '--mac', mac.upper())
        self.assertEqual(mac, self.lab.ip(
            'neighbour', 'show', 'dev', 'break0', 'nud',
            'permanent')[0]['lladdr'])
        self.assert_reachable()

    def test_the_parent_that_is_configured(self) -> None:
        self.bind_web(OS_BREAK0__PARENT=lab.PARENT)
        self.unbind_web()
        self.bind_web(OS_BINDING__LINK_IFACE=lab.PARENT)
        self.assert_reachable()

    def test_another_interface(self) -> None:
        self.lab.run('ip', 'link', 'set', lab.PARENT, 'down', netns='web')
        self.lab.run('ip', 'link', 'set', lab.PARENT, 'name', 'net1',
                     netns='web')
        self.lab.run('ip', 'link', 'set', 'net1', 'up', netns='web')
        self.bind_web('--netns', NETNS, '--ifname', 'net1')
        self.assert_reachable()
        self.unbind_web(code=1)
        self.unbind_web('--ifname', 'net1')
        self.assertEqual({}, self.lab.routes())


class TestRefusals(ByHandTestCase):

    def test_not_an_argument(self) -> None:
        for args, text in (
                (('bind', '100.75.30.80/24', '--owner', 'web'),
                 'is a network'),
                (('bind', '127.0.0.1', '--owner', 'web'), 'loopback'),
                (('bind', ADDRESS, '--owner', 'a b'), 'is not a name'),
                (('bind', ADDRESS), '--owner'),
                (('bind', ADDRESS6, '--owner', 'web', '--parent', 'eth0'),
                 'give --mac or --netns'),
                (('bind', ADDRESS, '--owner', 'web', '--mac', 'x'),
                 'is not a MAC address'),
                (('bind', ADDRESS, '--owner', 'web', '--netns', 'web'),
                 'is not an absolute path'),
                (('unbind', 'x', '--owner', 'web'), 'not an IPv4 or IPv6')):
            with self.subTest(args=args):
                done = self.call(*args)
                self.assertEqual(2, done.returncode)
                self.assertIn(text, done.stderr)

    def test_no_parent_is_known(self) -> None:
        self.assertIn('Give --netns or --parent', self.bind_web(code=2))

    def test_a_parent_that_is_not_there(self) -> None:
        self.assertIn('eth7 does not exist on this node',
                      self.bind_web('--parent', 'eth7', code=2))

    def test_break0_as_the_parent(self) -> None:
        self.bind_web('--netns', NETNS)
        self.assertIn('break0: it is made by kuryr-break0', self.run_it(
            'bind', '100.75.30.81', '--owner', 'other', '--parent', 'break0',
            code=2))
        self.assertIsNone(self.lab.link('break0-break0'))

    def test_parents_that_no_macvlan_can_be_on(self) -> None:
        add_unfit(self.lab)
        for parent, text in UNFIT.items():
            found = self.bind_web('--parent', parent, code=2)
            self.assertIn('cannot be on %s: %s' % (parent, text), found)
            self.assertEqual(1, found.count('\n'), found)
        self.assertEqual(set(), self.bound())

    def test_macvtaps_that_cannot_be_reached(self) -> None:
        self.lab.run('ip', 'link', 'add', 'eth1', 'type', 'veth', 'peer',
                     'name', 'nic1', 'netns', 'lan')
        mac = '02:00:00:00:00:98'
        if self.lab.run('ip', 'link', 'add', 'link', lab.PARENT, 'name', 'tap',
                        'address', mac, 'type', 'macvtap', 'mode', 'vepa',
                        check=False).returncode:
            self.skipTest('needs the module macvtap')
        for parent, text in ((lab.PARENT, 'in vepa mode on eth0. Create it'),
                             ('eth1', 'Create it in bridge mode on eth1'),
                             ('tap', 'cannot be on tap: it is a macvtap')):
            self.assertIn(text, self.bind_web(
                '--parent', parent, '--mac', mac if parent != 'tap'
                else '02:00:00:00:00:99', code=2))

    def test_without_rights(self) -> None:
        done = self.lab.run(
            'setpriv', '--bounding-set', '-all', '--inh-caps', '-all',
            program.BREAK0, 'bind', ADDRESS, '--owner', 'web', '--parent',
            lab.PARENT, check=False)
        self.assertEqual(3, done.returncode, done.stdout)
        self.assertIn('not permitted. Run it as root, in a container with '
                      'CAP_NET_ADMIN', done.stdout)

    def test_a_mac_address_that_is_not_its_own(self) -> None:
        self.bind_web('--netns', NETNS)
        for name in lab.PARENT, 'break0':
            mac = self.lab.ip('link', 'show', name)[0]['address']
            self.assertIn('%s belongs to %s' % (mac, name), self.bind_web(
                '--parent', lab.PARENT, '--mac', mac, code=2))
        self.assertIn('does not have the address 02:00:00:00:00:08',
                      self.bind_web('--netns', NETNS, '--mac',
                                    '02:00:00:00:00:08', code=2))
        self.assert_reachable()

    def test_a_state_directory_that_is_none(self) -> None:
        for path in '/dev/null', '/sys/none':
            for verb in 'bind', 'unbind':
                done = self.call(verb, ADDRESS, '--owner', 'web', '--parent'
                                 if verb == 'bind' else '--ifname', 'eth0',
                                 OS_BREAK0__STATE_DIR=path)
                self.assertEqual(3, done.returncode, done.stderr)
                self.assertEqual(1, done.stderr.count('\n'), done.stderr)
                self.assertIn('state directory ' + path, done.stderr)

    def test_a_state_directory_that_is_read_only(self) -> None:
        """A failed unbind keeps the routes, since the record stays too."""
        self.bind_web('--netns', NETNS)
        for options in 'bind', 'remount,bind,ro':
            self.lab.run('mount', '-o', options, '/run/kuryr-break0',
                         '/run/kuryr-break0')
        self.addCleanup(self.lab.run, 'umount', '/run/kuryr-break0')
        self.assertIn('Read-only', self.unbind_web(code=3))
        self.assertTrue(self.lab.ping(ADDRESS))

    def test_another_parent(self) -> None:
        self.lab.run('ip', 'link', 'add', 'eth1', 'type', 'veth',
                     'peer', 'name', 'nic1', 'netns', 'lan')
        for environ, args in (({}, ('--parent', 'eth1')),
                              ({'OS_BREAK0__PARENT': 'eth1'}, ()),
                              ({'OS_BINDING__LINK_IFACE': 'eth1'}, ())):
            self.assertIn(
                'bridge mode on eth1: it is in bridge mode on eth0',
                self.bind_web('--netns', NETNS, *args, code=2, **environ))

    def test_no_namespace(self) -> None:
        self.assertIn('does not exist',
                      self.bind_web('--netns', '/run/netns/no', code=2))
        self.assertFalse(os.path.exists('/run/netns/no'))

    def test_no_macvlan_of_the_node(self) -> None:
        # The macvlan in "other" has its parent in the same namespace.
        self.lab.add_netns('other')
        self.lab.run('ip', 'link', 'add', 'veth0', 'type', 'veth',
                     'peer', 'name', 'veth1', netns='other')
        self.lab.run('ip', 'link', 'add', lab.PARENT, 'link', 'veth0',
                     'type', 'macvlan', 'mode', 'bridge', netns='other')
        self.assertIn('its parent is not on this node',
                      self.bind_web('--netns', OTHER_NETNS, code=2))
        # The parent of eth1 in "web" is in the namespace "other".
        self.lab.run('ip', 'link', 'add', 'eth1', 'link', 'veth0', 'netns',
                     '/run/netns/web', 'type', 'macvlan', 'mode', 'bridge',
                     netns='other')
        self.assertIn('its parent is not on this node',
                      self.bind_web('--netns', NETNS, '--ifname', 'eth1',
                                    code=2))

    def test_another_mode(self) -> None:
        self.lab.run('ip', 'link', 'del', lab.PARENT, netns='web')
        self.lab.add_macvlan('web', mode='private')
        self.assertIn('it is in private mode on eth0',
                      self.bind_web('--netns', NETNS, code=2))

    def test_an_interface_with_another_name(self) -> None:
        self.lab.run('ip', 'link', 'set', lab.PARENT, 'name', 'net1',
                     netns='web')
        self.assertRegex(self.bind_web('--netns', NETNS, code=2),
                         'does not exist.* Give the name of a macvlan with '
                         '--ifname')

    def test_an_address_of_the_node_or_its_gateway(self) -> None:
        for address in (lab.NODE, lab.LAN):
            self.lab.run('ip', 'address', 'add', address + '/32', 'dev',
                         lab.PARENT, netns='web')
            self.assertIn('gets no route through break0', self.run_it(
                'bind', address, '--owner', 'web', '--netns', NETNS, code=2))
        self.assertEqual({}, self.lab.routes())


class TestAddressesOfOthers(ByHandTestCase):

    def test_one_of_a_pod_is_left_to_it(self) -> None:
        netns = self.lab.add_pod('pod', POD)
        self.bind(POD, netns=netns)
        self.lab.run('ip', 'address', 'add', POD + '/32', 'dev', lab.PARENT,
                     netns='web')
        for command in ('bind', 'unbind'):
            self.assertIn(
                'belongs to sandbox-1/eth0, and was not bound',
                self.run_it(command, POD, '--owner', 'web', *(
                    ('--netns', NETNS) if command == 'bind' else ()),
                    code=1))
        self.assert_in_sync(POD, ADDRESS, ADDRESS6)
        self.assertTrue(self.lab.ping(POD))
        # The error names this command as the remedy.
        self.run_it('unbind', POD, '--owner', 'sandbox-1',
                    '--ifname', 'eth0')
        self.assertEqual({}, self.lab.routes())

    def test_one_of_a_pod_that_is_gone_is_free(self) -> None:
        netns = self.lab.add_pod('pod', ADDRESS)
        self.bind(ADDRESS, netns=netns)
        self.lab.del_netns('pod')
        self.bind_web('--netns', NETNS)
        self.assert_reachable()

    def test_a_pod_that_gets_it_takes_it_over(self) -> None:
        self.bind_web('--parent', lab.PARENT)
        self.bind(ADDRESS)
        self.unbind_web(code=1)
        self.assertEqual({ADDRESS}, set(self.lab.routes()))

    def test_a_foreign_route(self) -> None:
        self.lab.run('ip', 'route', 'add', ADDRESS, 'dev', 'lo')
        self.assertIn('has a foreign route',
                      self.bind_web('--netns', NETNS, code=1))
