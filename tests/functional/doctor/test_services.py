# SPDX-License-Identifier: Apache-2.0


from __future__ import annotations

import os

from tests.functional.doctor.base import DoctorTestCase


class TestServices(DoctorTestCase):

    def write(self, path: str, text: str) -> None:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, 'w') as file:
            file.write(text)

    def index(self) -> int:
        link = self.lab.link('break0')
        assert link is not None
        return int(link['ifindex'])

    def replace_etc(self) -> None:
        """Give the lab its own files of systemd, and hide the machine's."""
        for name in ('upper', 'work'):
            os.makedirs('/run/etc/' + name)
        self.mount('overlay', '/etc', '-o', 'lowerdir=/etc,upperdir='
                   '/run/etc/upper,workdir=/run/etc/work')
        os.makedirs('/etc/systemd', exist_ok=True)
        for path in ('/etc/systemd', '/usr/lib/systemd',
                     '/usr/local/lib/systemd'):
            if os.path.isdir(path):
                self.mount('tmpfs', path)

    def mount(self, kind: str, path: str, *args: str) -> None:
        self.lab.run('mount', '-t', kind, kind, path, *args)
        self.addCleanup(self.lab.run, 'umount', path)

    def networkd(self, state: str) -> None:
        self.write('/run/systemd/netif/links/%d' % self.index(),
                   '# This is private data. Do not parse.\n' + state)

    def test_udev_sets_the_mac_address(self) -> None:
        self.replace_etc()
        self.write('/etc/systemd/network/99-default.link',
                   '[Match]\nOriginalName=*\n[Link]\n'
                   'MACAddressPolicy=persistent\n')
        self.write('/etc/systemd/network/20-eth.link',
                   '[Match]\nOriginalName=eth* !break0\n[Link]\n'
                   'MACAddress=02:00:00:00:00:01\n')
        self.write('/etc/systemd/network/30-path.link',
                   '[Match]\nPath=pci-*\n[Link]\nMACAddressPolicy=random\n')
        self.assertEqual({}, self.findings())
        self.write('/etc/systemd/network/40-all.link',
                   '# All.\n[Match]\nKind=macvlan\n[Link]\n'
                   'MACAddressPolicy=random\n')
        finding = self.assert_found(
            'udev-sets-mac', '40-all.link matches break0 and has '
            'MACAddressPolicy=random', severity='warning')
        self.lab.run('sh', '-c', finding['commands'][0])
        self.assertEqual({}, self.findings())

    def test_udev_in_doubt(self) -> None:
        self.replace_etc()
        self.write('/etc/systemd/network/10-vm.link',
                   '[Match]\nVirtualization=vm\n[Link]\n'
                   'MACAddressPolicy=none\n')
        self.write('/etc/systemd/network/40-all.link',
                   '[Match]\nOriginalName=*\n[Link]\n'
                   'MACAddressPolicy=random\n')
        self.assertEqual({}, self.findings())
        # In systemd, an empty file masks a file of the same name.
        self.write('/run/systemd/network/10-vm.link', '')
        self.assertEqual({}, self.findings())
        self.write('/etc/systemd/network/10-vm.link', '')
        self.assert_found('udev-sets-mac', '40-all.link')

    def test_networkd_leaves_it_alone(self) -> None:
        self.replace_etc()
        self.networkd('ADMIN_STATE=unmanaged\nOPER_STATE=degraded\n')
        self.assertEqual({}, self.findings())

    def test_networkd_manages_it(self) -> None:
        self.replace_etc()
        self.networkd('ADMIN_STATE=configured\n'
                      'NETWORK_FILE=/etc/systemd/network/any.network\n')
        finding = self.assert_found('networkd-manages-break0',
                                    '/etc/systemd/network/any.network')
        self.assertIn('Unmanaged=yes', finding['commands'][0])

    def test_networkd_with_a_file_for_the_nic(self) -> None:
        """A healthy node has no findings, with or without the drop-ins."""
        self.replace_etc()
        self.networkd('ADMIN_STATE=unmanaged\n')
        self.write('/etc/systemd/networkd.conf', '[Network]\n')
        self.write('/etc/systemd/network/20-lan.network',
                   '[Match]\nName=eth0\n[Network]\nDHCP=yes\n')
        self.assertEqual({}, self.findings())
        self.write('/etc/systemd/network/30-any.network',
                   '[Match]\nName=*\n[Network]\nDHCP=yes\n')
        self.assert_found('networkd-foreign-routes', '30-any.network matches '
                          'break0', severity='warning')
        with open('etc/systemd/network/10-kuryr-break0.network') as file:
            self.write('/etc/systemd/network/10-kuryr-break0.network',
                       file.read())
        self.assertEqual({}, self.findings())

    def for_all(self) -> None:
        """Write a file of networkd that also matches break0."""
        self.write('/etc/systemd/network/30-any.network',
                   '[Match]\nType=ether\n[Network]\nDHCP=yes\n')

    def test_networkd_and_foreign_routes(self) -> None:
        self.replace_etc()
        self.networkd('ADMIN_STATE=unmanaged\n')
        self.for_all()
        self.write('/etc/systemd/networkd.conf',
                   '[Network]\n#ManageForeignRoutes=no\n[DHCPv4]\n'
                   'ManageForeignRoutes=no\n')
        self.assert_found('networkd-foreign-routes', 'by default',
                          severity='warning')
        self.write('/run/systemd/networkd.conf.d/90.conf',
                   '[Network]\nManageForeignRoutes = no\n')
        self.assertEqual({}, self.findings())
        self.write('/etc/systemd/networkd.conf.d/95.conf',
                   '[Network]\nManageForeignRoutes=yes\n')
        self.assert_found('networkd-foreign-routes',
                          'by /etc/systemd/networkd.conf.d/95.conf')
        # A file in /etc hides a file of the same name in /run.
        self.write('/run/systemd/networkd.conf.d/95.conf', '[Network]\n')
        self.assert_found('networkd-foreign-routes', '95.conf')
        os.unlink('/etc/systemd/networkd.conf.d/95.conf')
        self.assertEqual({}, self.findings())

    def test_networkd_does_as_it_is_told(self) -> None:
        self.replace_etc()
        self.networkd('ADMIN_STATE=unmanaged\n')
        self.for_all()
        self.write('/etc/systemd/networkd.conf', '[Network]\n')
        finding = self.assert_found('networkd-foreign-routes')
        for command in finding['commands'][:-1]:  # the last is a restart
            self.lab.run('sh', '-c', command)
        self.assertEqual({}, self.findings())

    def test_network_manager(self) -> None:
        device = '/run/NetworkManager/devices/%d' % self.index()
        self.write(device, '[device]\nmanaged=false\n')
        self.assertEqual({}, self.findings())
        self.write(device, '[device]\nmanaged=true\nconnection-uuid=1\n')
        self.assert_found('networkmanager-manages-break0', 'break0')
