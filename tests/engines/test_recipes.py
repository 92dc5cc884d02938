# SPDX-License-Identifier: Apache-2.0

"""Runs the commands of the page "Recipes for Docker hosts"."""

from __future__ import annotations

import os
import pathlib
import re
import shutil
import subprocess
from typing import Callable
import unittest

from tests.engines import base
from tests.engines import runners
from tests.support import firewalls
from tests.support import images
from tests.support import pages
from tests.support import program

PAGE = 'install/recipes.rst'
NODE = '192.168.1.10'
NAME_SERVER = ('dnsmasq', '--user=root', '--keep-in-foreground',
               '--no-resolv', '--no-hosts',
               '--address=/www.example.org/192.0.2.80',
               '--local=/www.example.org/')
#: The command in an environment without Kuryr, as on a Docker host
PROGRAM = os.path.join(program.BIN, '../without-kuryr/bin/kuryr-break0')
#: Commands of the images that replace the page's images
IMAGES = {
    'pihole/pihole': NAME_SERVER,
    'homeassistant': ('httpd', '-f', '-p', '8123', '-h', '/www'),
    'nginx': ('nc', '-ll', '-p', '80', '-e', 'nc', '192.168.1.225', '8123'),
}
#: Namespaces of the page's other hosts
HOSTS = {'other': 'lan', 'phone': 'phone'}
#: Parts of outputs that vary between runs
_VARIES = re.compile(r'([0-9a-f]{2}:){5}[0-9a-f]{2}|\d+\.\d{3}(?!\.\d)|'
                     r'\d+(?=ms)|ref \d|used \S+|(?<=/proc/)\d+')


@unittest.skipUnless(os.path.exists(PROGRAM), 'needs tools/without-kuryr')
class TestRecipes(base.EngineTestCase):

    conf = 'discover = true\nallowed_cidrs = 192.168.1.0/24\nmetrics_bind =\n'
    maxDiff = None

    def setUp(self) -> None:
        super().setUp()
        for device, netns, address in (('eth0', None, NODE),
                                       ('nic', 'lan', '192.168.1.1')):
            self.lab.run('ip', 'address', 'flush', 'dev', device, 'scope',
                         'global', netns=netns)
            self.lab.run('ip', 'address', 'add', address + '/24', 'dev',
                         device, netns=netns)
        self.lab.run('ip', 'route', 'add', 'default', 'via', '192.168.1.1')
        # The page calls the other host's interface eth0.
        self.lab.run('ip', 'link', 'set', 'nic', 'down', netns='lan')
        self.lab.run('ip', 'link', 'set', 'nic', 'name', 'eth0', 'up',
                     netns='lan')
        # Changes to the page's commands and files for the lab
        self.more: dict[str, str] = {}  # additional lines, by file
        self.instead: dict[str, Callable[[], object]] = {}
        os.mkdir('/run/bin')
        with open('/run/bin/kuryr-break0', 'w') as file:
            os.fchmod(file.fileno(), 0o755)
            file.write('#!/bin/sh\nexec %s --config-file %s "$@"\n'
                       % (PROGRAM, base.CONF))
        os.symlink('/bin/busybox', '/run/bin/wget')

    def start_host(self) -> None:
        """Start Docker with its bridge, the agent, and the containers."""
        root = images.rootfs('/run')
        for name in ('nslookup', 'wget'):
            os.symlink('busybox', '%s/bin/%s' % (root, name))
        os.makedirs(root + '/var/run')
        os.mkdir(root + '/www')
        for path, text in (('/www/index.html', '<h1>Home Assistant</h1>'),
                           ('/etc/passwd', 'root:x:0:0::/:/bin/sh'),
                           ('/etc/group', 'root:x:0:')):
            os.makedirs(os.path.dirname(root + path), exist_ok=True)
            pathlib.Path(root + path).write_text(text + '\n')
        for path in ('/usr/sbin/dnsmasq', *re.findall(
                r'(/\S+) \(',
                self.lab.run('ldd', '/usr/sbin/dnsmasq').stdout)):
            into = root + path.replace('/usr/sbin', '/bin')
            os.makedirs(os.path.dirname(into), exist_ok=True)
            shutil.copy(path, into)
        self.docker = base.Docker(self, bridge=True)
        for name, command in IMAGES.items():
            # With a trap, the first process ends when Docker stops the
            # container.
            self.docker('import', '--change', 'CMD trap exit TERM; %s & wait'
                        % ' '.join(command), images.tar('/run'), name)
        self.start_agent()
        self.follow('Example host')

    def follow(self, title: str) -> None:
        """Run a section's commands, and compare their output."""
        for step in pages.steps(PAGE, title):
            shown = re.fullmatch(r'(?:cat|grep \S+) (\S+)', step.command)
            if shown:
                self.write(shown[1], step.output)
            elif step.command in self.instead:
                self.instead[step.command]()
            else:
                self.run_step(step)

    def write(self, name: str, text: str) -> None:
        """Write a file in the lab, without a change to the machine's files."""
        path = pathlib.Path('/run', name)
        if path.is_file():
            os.makedirs('/run/files', exist_ok=True)
            private = '/run/files/' + path.name
            pathlib.Path(private).touch()
            self.lab.run('mount', '--bind', private, str(path))
        elif path.is_absolute() and not str(path).startswith('/run/'):
            there = next(each for each in path.parents if each.is_dir())
            self.assertGreater(len(there.parts), 2)
            self.lab.run('mount', '-t', 'tmpfs', 'private', str(there))
            path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + '\n' + self.more.get(name, ''))

    def run_step(self, step: pages.Step) -> None:
        command = step.command
        if shutil.which('docker-compose'):  # the command on Debian 12
            command = command.replace('docker compose', 'docker-compose')
        place = (['nsenter', '--net=/run/netns/' + HOSTS[step.host]]
                 if step.host else [])
        outputs = []

        def done() -> bool:
            done = subprocess.run(
                [*place, 'sh', '-c', command], text=True, cwd='/run',
                stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env={
                    **os.environ, 'COLUMNS': '80',
                    'PATH': '/run/bin:' + os.environ['PATH']})
            outputs.append(done.stdout)
            if not step.output:
                self.assertEqual(0, done.returncode, (step, done.stdout))
            return not step.output or masked(done.stdout) == masked(
                step.output)

        if re.match('(docker exec|firewall-cmd --get|getent|ip (route|neigh)|'
                    'kuryr-break0|ping|wget) ', command):
            try:
                self.until(done)
            except AssertionError:
                self.assertEqual(step.output, outputs[-1], self.logs())
                raise
        elif not done():
            self.assertEqual(step.output, outputs[-1], self.logs())

    def test_ufw(self) -> None:
        self.start_host()
        self.start(*NAME_SERVER, '--listen-address=' + NODE,
                   '--bind-interfaces', '--pid-file=')
        firewalls.set_up_ufw()
        self.addCleanup(self.lab.run, 'ufw', '--force', 'disable')
        self.follow('ufw: allow services of the host')

    def test_firewalld(self) -> None:
        self.start_host()
        self.start(*NAME_SERVER, '--listen-address=' + NODE,
                   '--bind-interfaces', '--pid-file=')
        firewalls.start_firewalld(self)
        self.follow('firewalld: allow services of the host')

    def test_dns_proxy_and_compose(self) -> None:
        self.start_host()
        self.follow('A container as the name server of its host')
        self.follow('A reverse proxy on a bridge')
        self.follow('Docker Compose')
        self.instead['systemctl restart docker'] = self.docker.restart
        self.follow('Restart or upgrade of Docker')

    def test_vpn_and_keepalived(self) -> None:
        self.start_host()
        self.lab.add_netns('phone')
        self.lab.run('ip', 'link', 'add', 'wg0', 'type', 'veth', 'peer',
                     'name', 'wg0', 'netns', 'phone')
        for netns, number in ((None, 1), ('phone', 2)):
            self.lab.run('ip', 'link', 'set', 'wg0', 'up', netns=netns)
            self.lab.run('ip', 'address', 'add', '10.8.0.%d/24' % number,
                         'dev', 'wg0', netns=netns)
        self.lab.run('ip', 'route', 'add', 'default', 'via', '10.8.0.1',
                     netns='phone')
        self.follow('A VPN that ends on the host')
        servers = []
        self.instead['systemctl start keepalived'] = lambda: servers.append(
            self.start('keepalived', '--dont-fork', '--log-console'))
        self.instead['systemctl stop keepalived'] = lambda: (
            servers[0].terminate(), servers[0].wait())
        self.follow('keepalived: an address that moves between hosts')

    def test_lxc(self) -> None:
        lxc = runners.LXC(self)
        self.more['/var/lib/lxc/nas/config'] = (
            'lxc.rootfs.path = dir:%s\nlxc.init.cmd = /bin/sleep 1000\n'
            'lxc.apparmor.profile = unconfined\n' % lxc.rootfs('nas'))
        self.addCleanup(self.lab.run, 'lxc-stop', '--kill', 'nas',
                        check=False)
        self.start_agent()
        self.follow('LXC: the mode of the interface')


def masked(text: str) -> str:
    """Remove the varying parts and the line breaks of an output."""
    return ' '.join(_VARIES.sub('', text).split())
