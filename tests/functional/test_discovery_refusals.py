# SPDX-License-Identifier: Apache-2.0

"""Discovered addresses that must not be bound, and their return."""

from __future__ import annotations

from kuryr_break0.discovery import binder
from kuryr_break0 import kernel
from kuryr_break0.model import Origin
from kuryr_break0.model import Owner
from tests.functional import base
from tests.functional.discovery_base import CONF
from tests.functional.discovery_base import DiscoveryTestCase
from tests.functional.discovery_base import ONE
from tests.functional.discovery_base import ONE6
from tests.functional.discovery_base import TWO
from tests.support import lab
from tests.support import program


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
                             'through break0.*set the route again')
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
        self.lab.run(program.BREAK0, '--config-file', CONF, 'sync',
                     check=False)
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
        self.assertEqual(binder.MAX_DISCOVERED, self.log().count(
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
