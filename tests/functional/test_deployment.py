# SPDX-License-Identifier: Apache-2.0

"""The agent works in the container that the overlay describes."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
from typing import Any, Callable, Optional

import psutil

from kuryr_break0 import kernel
from tests.functional import base
from tests.functional.base import POD
from tests.functional.cni import base as cni_base
from tests.functional import discovery_base
from tests.support import lab
from tests.support import overlay
from tests.support import program

#: The container's root directory, on the node.
ROOT = '/run/container'
CONF = '/run/config/kuryr.conf'
LOG = '/run/agent.log'
MAC = '02:00:00:00:00:71'


def script(daemon_set: dict[str, Any], name: str,
           command: Optional[list[str]] = None) -> str:
    """Return shell commands that start a container as an engine does.

    Run the commands in a new mount namespace, to which mounts of the node
    propagate. The programs of this machine replace the image, and are
    read-only like the image.

    :param command: the command to run instead of the container's own
    """
    container = overlay.container(daemon_set, name)
    volumes = overlay.volumes(daemon_set)
    rights = container['securityContext']
    assert rights['readOnlyRootFilesystem']
    lines = ['set -eu', 'mkdir -p %s' % ROOT,
             'mount -t tmpfs root %s' % ROOT]
    for entry in os.listdir('/'):
        if os.path.islink('/' + entry):
            lines.append('cp -a /%s %s/' % (entry, ROOT))
        elif os.path.isdir('/' + entry) and entry not in (
                'etc', 'host', 'proc', 'run', 'sys', 'var'):
            lines += ['mkdir %s/%s' % (ROOT, entry),
                      'mount --rbind -o ro /%s %s/%s' % (entry, ROOT, entry)]
    # An unprivileged container has its own process namespace and a read-only
    # /proc/sys. In Kuryr's image, /var/run is a link to /run.
    lines += ['cd %s' % ROOT,
              'mkdir -p etc proc run sys var', 'ln -s ../run var/run',
              'mount -t proc proc proc']
    if not rights.get('privileged'):
        lines += ['mount --bind proc/sys proc/sys',
                  'mount -o remount,bind,ro proc/sys']
    for mount in container['volumeMounts']:
        volume = volumes[mount['name']]
        source = (volume['hostPath']['path'] if 'hostPath' in volume
                  else os.path.dirname(CONF))
        if volume.get('hostPath', {}).get('type') == 'DirectoryOrCreate':
            lines.append('mkdir -p -m 755 %s' % source)
        # Avoid the link /var/run: before chroot, a link can resolve outside of
        # ROOT.
        target = ROOT + mount['mountPath'].replace('/var/run', '/run')
        lines += ['mkdir -p %s' % target,
                  'mount --rbind %s %s' % (source, target)]
        if mount.get('readOnly'):
            lines.append('mount -o remount,bind,ro %s' % target)
        lines.append('mount --make-r%s %s' % (
            'slave' if mount.get('mountPropagation') == 'HostToContainer'
            else 'private', target))
    lines.append('mount -o remount,ro %s' % ROOT)
    capabilities = ','.join(
        ['-all'] + ['+' + capability.lower() for capability
                    in rights['capabilities'].get('add', ())])
    command = [program.BREAK0, *(command or container['command'])[1:]]
    lines.append(
        'exec chroot . setpriv --bounding-set=%s --inh-caps=-all '
        '--no-new-privs %s' % (capabilities, shlex.join(command)))
    return '\n'.join(lines)


class ContainerTestCase(base.LabTestCase):
    """A node with the agent of a DaemonSet in its container."""

    name = overlay.AGENT

    def setUp(self) -> None:
        super().setUp()
        os.mkdir(os.path.dirname(CONF))
        with open(CONF, 'w') as file:
            file.write('[break0]\nresync_interval = 1\n')
        self.daemon_set = overlay.build()['DaemonSet']

    def start(self) -> None:
        environment = {
            variable['name']: variable['value'] for variable
            in overlay.container(self.daemon_set, self.name)['env']
            if 'value' in variable}
        with open(LOG, 'wb') as log:
            self.agent = subprocess.Popen(
                ['unshare', '--mount', '--propagation', 'slave', '--pid',
                 '--fork', '--kill-child', 'sh', '-c',
                 script(self.daemon_set, self.name)],
                stdout=log, stderr=log, env={**os.environ, **environment})
        self.addCleanup(self.agent.wait)
        self.addCleanup(self.agent.kill)
        self.wait_for(lambda: 'Watching ' in self.log())

    def log(self) -> str:
        with open(LOG) as file:
            return file.read()

    def wait_for(self, condition: Callable[[], bool]) -> None:
        lab.until(lambda: condition() or self.agent.poll() is not None,
                  self.log)
        self.assertIsNone(self.agent.poll(), self.log())


class TestAgentInItsContainer(ContainerTestCase):

    def test_repairs_all(self) -> None:
        self.start()
        # The new namespace reaches the container only by mount propagation.
        netns = self.lab.add_pod('pod', POD, mac=MAC)
        self.bind(netns='/var' + netns, mac_of_pod=MAC)
        for what, command, right in (
                ('device and sysctls', 'ip link del break0',
                 lambda: self.lab.ping(POD, cold=False)),
                ('neighbours', 'ip neigh flush dev break0',
                 lambda: self.lab.ip('neigh', 'show', 'dev', 'break0')),
                ('neighbours of the pod',
                 'ip address add 100.75.30.52/24 dev eth0',
                 lambda: '100.75.30.52' in {
                     entry['dst'] for entry in self.lab.ip(
                         'neigh', 'show', 'nud', 'permanent',
                         netns='pod')})):
            with self.subTest(what):
                self.lab.run(*command.split())
                self.wait_for(right)
        self.assertIn('ipv4.conf.break0.arp_filter = 1', self.lab.run(
            'sysctl', 'net.ipv4.conf.break0.arp_filter').stdout)
        self.assertNotIn('ERROR', self.log())
        # The agent must have the capabilities of the DaemonSet only.
        process, = psutil.Process(self.agent.pid).children()
        with open('/proc/%d/status' % process.pid) as file:
            status = dict(line.split(':\t') for line in file)
        rights = 1 << 12 | 1 << 21  # CAP_NET_ADMIN, CAP_SYS_ADMIN
        for kind in ('CapPrm', 'CapEff', 'CapBnd'):
            self.assertEqual(rights, int(status[kind], 16), kind)

    def test_a_pod_that_has_gone(self) -> None:
        self.start()
        netns = self.lab.add_pod('pod', POD, mac=MAC)
        self.bind(netns='/var' + netns, mac_of_pod=MAC)
        # Wait for two syncs of the timer: a sysctl causes no event.
        for _ in range(2):
            kernel.write_sysctl('ipv4/conf/break0/arp_filter', 0)
            self.wait_for(lambda: kernel.read_sysctl(
                'ipv4/conf/break0/arp_filter') == 1)
        self.assertIn(POD, self.lab.routes())
        self.lab.del_netns('pod')
        # The unmount propagates into the container.
        self.wait_for(lambda: POD not in self.lab.routes())

    def test_state_is_the_nodes(self) -> None:
        self.start()
        self.wait_for(
            lambda: os.path.isdir('/run/kuryr-break0/addresses'))
        self.assertEqual(
            0o700, os.stat('/run/kuryr-break0').st_mode & 0o777)

    def test_removal(self) -> None:
        """The readiness probe of remove.yaml cleans up the node."""
        netns = self.lab.add_pod('pod', POD, mac=MAC)
        before = self.lab.state()
        self.bind(netns='/var' + netns, mac_of_pod=MAC)
        self.assertTrue(self.lab.ping(POD))
        patched = overlay.patched(self.daemon_set, 'remove.yaml')
        probe = overlay.container(patched, self.name)['readinessProbe']
        # The state directory is a mount point below a read-only root, so a
        # cleanup can only empty the state directory.
        for output in (r'(?s)- route %s .*- directory /run/kuryr-break0\n'
                       % POD, r'\A\Z'):
            done = subprocess.run(
                ['unshare', '--mount', '--propagation', 'slave', 'sh', '-c',
                 script(patched, self.name, probe['exec']['command'])],
                text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
            self.assertEqual(0, done.returncode, done.stdout)
            self.assertRegex(done.stdout, output)
        self.assertEqual([], os.listdir('/run/kuryr-break0'))
        self.assertEqual(before, self.lab.state())


class TestWithoutKuryr(ContainerTestCase):
    """The DaemonSet of etc/cni installs a working CNI plugin."""

    name = 'agent'

    def setUp(self) -> None:
        super().setUp()
        self.daemon_set = overlay.without_kuryr()

    def test_plugin_of_the_init_container(self) -> None:
        # The test machine's programs replace the image, so the shim comes
        # from the checkout.
        self.lab.run('mount', '-t', 'tmpfs', 'opt', '/opt')
        self.addCleanup(self.lab.run, 'umount', '/opt')
        done = subprocess.run(
            ['unshare', '--mount', '--propagation', 'slave', 'sh', '-c',
             script(self.daemon_set, 'install')], text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        self.assertEqual(0, done.returncode, done.stdout)
        self.assertIn('Installed /host/opt/cni/bin/break0: the shim',
                      done.stdout)
        self.start()
        runtime = cni_base.Runtime('/opt/cni/bin/break0')
        listed = cni_base.network(subnets=('100.75.30.128/25',))
        self.lab.add_netns('one')
        self.wait_for(lambda: os.path.exists('/run/kuryr-break0/cni.sock'))
        # containerd passes paths below /var/run.
        address, = cni_base.addresses(runtime.add(listed,
                                                  '/var/run/netns/one'))
        self.assertTrue(self.lab.ping(address))
        self.assertTrue(self.lab.ping(lab.NODE, 'one'))
        self.lab.run('ip', 'route', 'flush', 'dev', 'break0')
        self.wait_for(lambda: address in self.lab.routes())
        runtime.check(listed, '/var/run/netns/one')
        runtime.remove(listed, '/var/run/netns/one')
        self.assertEqual({}, self.lab.routes())
        self.assertNotIn('ERROR', self.log())


class TestUnit(discovery_base.DiscoveryTestCase):
    """The systemd unit permits every system call of the agent.

    tools/boot runs the unit under systemd.
    """

    @staticmethod
    def allowed() -> set[str]:
        """Return the names of the system calls that the unit allows."""
        with open(os.path.join(overlay.ROOT, 'etc', 'systemd', 'system',
                               'kuryr-break0-agent.service')) as file:
            waiting = re.findall(r'^SystemCallFilter=(.*)$', file.read(),
                                 re.MULTILINE)[0].split()
        found = set()
        while waiting:
            each = waiting.pop()
            if each.startswith('@'):
                waiting += [line.strip() for line in subprocess.check_output(
                    ['systemd-analyze', 'syscall-filter', each], text=True
                ).splitlines()[1:] if '#' not in line]
            found.add(each)
        return found

    def test_system_calls(self) -> None:
        strace = self.start(discovery_base.OPTIONS, 'strace', '-f', '-qq',
                            '-o', '/run/trace', '--signal=none')
        agent, = psutil.Process(strace.pid).children()
        self.addCleanup(lambda: agent.is_running() and agent.kill())
        self.lab.add_pod('pod', POD)
        self.until_bound(POD)
        self.lab.run('ip', 'link', 'del', 'break0')
        self.until(lambda: POD in self.lab.routes())
        self.lab.del_netns('pod')
        self.until(lambda: POD not in self.lab.routes())
        agent.terminate()
        strace.wait()
        with open('/run/trace') as file:
            made = set(re.findall(r'^\d+ +(\w+)\(', file.read(),
                                  re.MULTILINE))
        self.assertLessEqual({'setns', 'bind', 'openat'}, made)
        self.assertEqual(set(), made - self.allowed())
