# SPDX-License-Identifier: Apache-2.0

"""The drop-ins for systemd-networkd and iproute2 work."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from typing import Optional

from tests.functional import base
from tests.functional.base import POD
from tests.support import lab
from tests.support import overlay

ETC = os.path.join(overlay.ROOT, 'etc')
NETWORKD = '/lib/systemd/systemd-networkd'
LOG = '/run/networkd.log'


class TestNetworkd(base.LabTestCase):
    """systemd-networkd, configured to manage every interface."""

    def setUp(self) -> None:
        super().setUp()
        for directory in ('netif', 'network', 'networkd.conf.d'):
            os.makedirs('/run/systemd/' + directory)
        with open('/run/systemd/network/50-all.network', 'w') as file:
            file.write('[Match]\nName=*\n[Network]\nLinkLocalAddressing=no\n')
        # In a container with a read-only /sys, networkd works without udev.
        # networkd switches to the user systemd-network, and the lab has
        # only root: the passwd file maps this user to root.
        with open('/run/systemd/container', 'w') as file:
            file.write('lab')
        with open('/run/passwd', 'w') as file:
            file.write('systemd-network:x:0:0::/:/bin/sh\n')
        self.lab.run('mount', '--bind', '/run/passwd', '/etc/passwd')
        self.addCleanup(self.lab.run, 'umount', '/etc/passwd')
        self.lab.run('mount', '-t', 'sysfs', '-o', 'ro', 'sysfs', '/sys')
        self.addCleanup(self.lab.run, 'umount', '/sys')
        self.bind()

    def start(self) -> None:
        with open(LOG, 'w') as log:
            networkd = subprocess.Popen(
                [NETWORKD], stderr=log,
                env={'SYSTEMD_LOG_LEVEL': 'debug',
                     'SYSTEMD_LOG_TARGET': 'console'})
        self.addCleanup(networkd.wait)
        self.addCleanup(networkd.kill)

    def log(self) -> str:
        with open(LOG) as file:
            return file.read()

    def state(self, name: str) -> Optional[str]:
        """Return networkd's final ADMIN_STATE of an interface."""
        link = self.lab.link(name)
        assert link is not None

        def found() -> Optional[str]:
            with contextlib.suppress(FileNotFoundError), open(
                    '/run/systemd/netif/links/%d' % link['ifindex']) as file:
                return dict(line.strip().split('=', 1) for line in file
                            if '=' in line).get('ADMIN_STATE')
            return None

        lab.until(lambda: found() in ('configured', 'unmanaged'), self.log)
        return found()

    def takes_note_of_the_route(self) -> bool:
        """Return whether networkd has recorded the pod's route."""
        return ('break0: Received new foreign route (configured): dst: %s/32'
                % POD) in self.log()

    def test_without(self) -> None:
        self.start()
        self.assertEqual('configured', self.state('eth0'))
        self.assertEqual('configured', self.state('break0'))
        self.assertTrue(self.takes_note_of_the_route())

    def test_with(self) -> None:
        for directory in ('network', 'networkd.conf.d'):
            shutil.copytree(os.path.join(ETC, 'systemd', directory),
                            '/run/systemd/' + directory, dirs_exist_ok=True)
        self.start()
        self.assertEqual('configured', self.state('eth0'))
        self.assertEqual('unmanaged', self.state('break0'))
        self.assertFalse(self.takes_note_of_the_route())
        # networkd logs a complaint for every unknown key of a drop-in.
        self.assertNotRegex(self.log(), 'kuryr-break0.*(nknown|ailed|gnor)')
        self.assertIn(POD, self.lab.routes())


class TestIproute2(base.LabTestCase):

    def test_name(self) -> None:
        self.bind(mac_of_pod='02:00:00:00:00:71')
        self.assertIn('proto 176', self.lab.run('ip', 'route').stdout)
        # Newer releases of iproute2 keep their names outside /etc.
        if os.path.isdir('/etc/iproute2'):
            shutil.copytree('/etc/iproute2', '/run/etc/iproute2')
        shutil.copytree(os.path.join(ETC, 'iproute2'), '/run/etc/iproute2',
                        dirs_exist_ok=True)
        self.lab.run('mount', '--bind', '/run/etc', '/etc')
        self.addCleanup(self.lab.run, 'umount', '/etc')
        for command in ('ip route', 'ip neighbour show dev break0'):
            self.assertRegex(self.lab.run(*command.split()).stdout,
                             r'%s .*proto break0' % POD)
        self.assertIn(POD, self.lab.run(
            'ip', 'route', 'show', 'proto', 'break0').stdout)
