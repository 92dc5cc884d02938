# SPDX-License-Identifier: Apache-2.0

"""The base of tests that discover containers of an engine."""

from __future__ import annotations

from kuryr_break0.model import Origin
from tests.engines import base
from tests.support import lab


#: The option allowed_cidrs: all subnets of the engines' networks
CIDRS = '100.75.30.0/24,fd00:30::/64,10.9.0.0/24'


class DiscoveryTestCase(base.EngineTestCase):

    conf = ('discover = true\nallowed_cidrs = %s\nmetrics_bind =\n'
            'resync_interval = 3600\n' % CIDRS)

    def bound_times(self, engine: base.Engine, count: int, *options: str
                    ) -> list[float]:
        """Return the seconds from the end of "run" to the first answer."""
        times = []
        for number in range(count):
            name = 'timed-%d' % number
            engine.run(name, '--network', 'lan', *options)
            address = engine.address(name)
            times.append(self.until(lambda: self.lab.run(
                'ping', '-c', '1', '-W', '0.02', address,
                check=False).returncode == 0))
        return times

    def reach(self, engine: base.Engine, name: str,
              network: str = 'lan') -> str:
        """Wait until node and container reach each other.

        :returns: the container's IPv4 address
        """
        found = engine.attachment(name, network)
        inside = engine.inside(name)
        for address, node in ((found['IPAddress'], lab.NODE),
                              (found['GlobalIPv6Address'], lab.NODE6)):
            if address:
                self.until(lambda: self.lab.ping(address, cold=False))
                self.until(lambda: inside('ping', '-c', '1', '-W', '1',
                                          node))
        return str(found['IPAddress'])

    def core(self, engine: base.Engine) -> None:
        """Check that an engine's containers are bound, and unbound again."""
        engine.run('before', '--network', 'lan')
        self.start_agent()
        self.reach(engine, 'before')
        engine.run('web', '--network', 'lan')
        address = self.reach(engine, 'web')
        record, = (record for record in self.snapshot().live.values()
                   if str(record.address) == address)
        self.assertIs(Origin.DISCOVERED, record.origin)
        engine('restart', '--time', '0', 'web')
        self.reach(engine, 'web')
        engine('stop', '--time', '0', 'web')
        self.until(lambda: len(self.bound()) in (1, 2)
                   and self.bound() <= self.addresses(engine, 'before'))
        engine('start', 'web')
        self.reach(engine, 'web')
        engine('kill', 'web')
        self.until(lambda: self.bound() <= self.addresses(engine, 'before'))
        engine('start', 'web')
        self.reach(engine, 'web')
        engine('rm', '--force', 'web', 'before')
        self.assert_nothing_left()

    @staticmethod
    def addresses(engine: base.Engine, name: str) -> set[str]:
        found = engine.attachment(name, 'lan')
        return {found['IPAddress'], found['GlobalIPv6Address']} - {''}
