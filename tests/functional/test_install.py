# SPDX-License-Identifier: Apache-2.0

"""``make install`` and ``make uninstall``, without their pip steps."""

from __future__ import annotations

import os
import pathlib

from tests.functional.base import POD
from tests.functional.cli_base import CLITestCase
from tests.support import program

DEST = pathlib.Path('/run/dest')
CIDRS = 'CIDRS=100.75.30.0/24,fd00:30::/64'


class TestInstall(CLITestCase):

    def make(self, target: str, *args: str, code: int = 0) -> str:
        # A separate process namespace hides the macvlans of other tests from
        # etc/networks.
        done = self.lab.run('unshare', '--pid', '--fork', '--mount-proc',
                            'make', '--silent', target, *args, check=False)
        self.assertEqual(code, done.returncode, done.stdout)
        return str(done.stdout)

    def install(self, *args: str, code: int = 0) -> str:
        return self.make('install-files', 'DESTDIR=%s' % DEST, *args,
                         code=code)

    def test_it_proposes_networks(self) -> None:
        self.lab.add_ipv6()
        self.assertIn('make install CIDRS=192.168.1.0/24',
                      self.install(code=2))
        self.lab.add_pod('one', POD, 'fd00:30::71')
        self.assertIn('This host has these: make install ' + CIDRS,
                      self.install(code=2))
        self.assertFalse(DEST.exists())

    def test_a_text_that_is_no_network(self) -> None:
        for text, answer in (('foo', 'is no network'),
                             ('100.75.30.51/24',
                              'did you mean 100.75.30.0/24?'),
                             ('100.75.30.0/24,', 'is no network'),
                             ('100.75.30.51', '100.75.30.51 has no prefix '
                              'length: did you mean 100.75.30.0/24?'),
                             ('fd00:30::71', 'did you mean fd00:30::/64?')):
            shown = self.install('CIDRS=' + text, code=2)
            self.assertIn(answer, shown)
            self.assertEqual(2, shown.count('\n'), shown)  # one is make's
        self.assertFalse(DEST.exists())

    def test_a_failure_of_pip_leaves_no_file(self) -> None:
        # make exports its variables to pip.
        shown = self.make('install', 'DESTDIR=%s' % DEST, CIDRS,
                          'PIP_NO_INDEX=1', 'PIP_FIND_LINKS=/nowhere', code=2)
        self.assertIn('Nothing was installed', shown)
        self.assertEqual([], [path for path in DEST.rglob('*')
                              if not path.is_dir()])

    def test_the_printed_commands_change_the_networks(self) -> None:
        self.install('CIDRS=100.75.31.0/24')
        settings = DEST / 'etc/kuryr-break0/kuryr-break0.conf'
        shown = self.install(CIDRS)
        self.assertIn('has other networks than CIDRS', shown)
        command, = (line for line in shown.splitlines()
                    if line.startswith('sed '))
        self.lab.run('sh', '-c', command)
        self.assertIn('\nallowed_%s\n' % CIDRS.lower().replace('=', ' = '),
                      settings.read_text())
        self.assertNotIn('has other networks', self.install(CIDRS))

    def test_installed_and_kept_files(self) -> None:
        self.assertNotIn('Kept', self.install(CIDRS))
        for path in ('etc/systemd/networkd.conf.d/kuryr-break0.conf',
                     'etc/systemd/network/10-kuryr-break0.network',
                     'etc/NetworkManager/conf.d/kuryr-break0.conf',
                     'etc/iproute2/rt_protos.d/kuryr-break0.conf',
                     'usr/local/share/bash-completion/completions/'
                     'kuryr-break0',
                     'usr/local/share/fish/vendor_completions.d/'
                     'kuryr-break0.fish',
                     'usr/local/share/zsh/site-functions/_kuryr-break0'):
            self.assertTrue((DEST / path).is_file(), path)
        settings = DEST / 'etc/kuryr-break0/kuryr-break0.conf'
        before = settings.read_text()
        self.assertIn(CIDRS[6:], before)
        (DEST / 'etc/NetworkManager/conf.d/kuryr-break0.conf').write_text('')
        (DEST / 'etc/kuryr').mkdir()
        (DEST / 'etc/kuryr/kuryr.conf').touch()
        shown = self.install('CIDRS=10.0.0.0/8')
        self.assertIn('Kept %s, which has other networks' % settings, shown)
        self.assertIn('/opt/kuryr-break0/share/kuryr-break0/'
                      'kuryr-break0.conf.sample.', before)
        self.assertIn('Kept %s/etc/NetworkManager' % DEST, shown)
        self.assertIn('%s/etc/kuryr/kuryr.conf is read in place of %s'
                      % (DEST, settings), shown)
        self.assertEqual(before, settings.read_text())
        self.assertIn('Kept %s. To delete it: rm -r' % settings,
                      self.make('uninstall', 'DESTDIR=%s' % DEST))
        left = {str(path.relative_to(DEST)) for path in DEST.rglob('*')
                if not path.is_dir()}
        self.assertEqual({'etc/kuryr-break0/kuryr-break0.conf',
                          'etc/kuryr/kuryr.conf',
                          'etc/NetworkManager/conf.d/kuryr-break0.conf'},
                         left)

    def test_uninstall_refuses_while_it_is_in_use(self) -> None:
        os.makedirs('/run/prefix/bin')
        os.symlink(program.BREAK0, '/run/prefix/bin/kuryr-break0')
        uninstall = ('PREFIX=/run/prefix', 'LOCAL=/run/local',
                     'UNITS=/run/units', 'SHIM=/run/shim', 'DROP_INS=')
        self.bind(POD)
        self.assertIn('kuryr-break0 cleanup',
                      self.make('uninstall', *uninstall, code=2))
        self.assertTrue(os.path.exists('/run/prefix/bin'))
        self.call('cleanup')
        self.make('uninstall', *uninstall)
        self.assertFalse(os.path.exists('/run/prefix'))
