# SPDX-License-Identifier: Apache-2.0

"""Each finding's commands fit the kind of host, and can be pasted.

tools/deb pastes the commands under a real systemd.
"""

from __future__ import annotations

import json
import os
from typing import Any
from unittest import mock

from kuryr_break0.doctor import host as hosts
from kuryr_break0.doctor import installation
from kuryr_break0.doctor import records
from tests.functional import base
from tests.functional.doctor.base import DoctorTestCase
from tests.functional.doctor.base import POD4
from tests.support import lab
from tests.support import program

CONF = '/run/mine.conf'
ROLL_OUT = ('kubectl --namespace kube-system rollout restart '
            'daemonset/kuryr-cni-ds')
NO_KURYR = mock.patch.object(installation, 'is_for_kuryr',
                             return_value=False)
IN_POD = mock.patch.dict(os.environ, KUBERNETES_SERVICE_HOST='10.96.0.1')


class TestAgent(DoctorTestCase):

    def test_on_a_bare_node_with_the_unit(self) -> None:
        base.add_unit()
        self.agent.close()
        self.assertEqual(
            ['systemctl enable --now kuryr-break0-agent'],
            self.assert_found('agent-not-running')['commands'])

    def test_in_a_pod(self) -> None:
        self.agent.close()
        with IN_POD:
            self.assertEqual(
                [ROLL_OUT], self.assert_found('agent-not-running')['commands'])
            with NO_KURYR:
                self.assertEqual(
                    [ROLL_OUT.replace('kuryr-cni-ds', 'break0')],
                    self.assert_found('agent-not-running')['commands'])

    def test_with_another_configuration(self) -> None:
        """The unit reads another configuration than the one in use.

        So the command names the configuration in use.
        """
        base.add_unit()
        self.agent.close()
        with open(CONF, 'w') as file:
            file.write('[break0]\nresync_interval = 50\n')
        done = self.call('--json', '--no-probe', code=4, config=CONF)
        finding, = json.loads(done.stdout)['findings']
        command, = finding['commands']
        self.assertEqual('kuryr-break0 --config-file %s agent' % CONF, command)
        # The command, pasted unchanged, starts the agent with these options.
        started = program.start([program.BREAK0, *command.split()[1:]])
        self.addCleanup(started.wait)
        self.addCleanup(started.kill)
        lab.until(lambda: not self.findings_of(CONF))

    def findings_of(self, conf: str) -> list[dict[str, Any]]:
        done = self.call('--json', '--no-probe', code=None, config=conf)
        found: list[dict[str, Any]] = json.loads(done.stdout)['findings']
        return found


class TestOptions(DoctorTestCase):

    def test_disabled(self) -> None:
        with open(CONF, 'w') as file:
            file.write('[break0]\nenabled = false\n')
        finding, = json.loads(self.call(
            '--json', '--no-probe', code=4, config=CONF).stdout)['findings']
        self.assertEqual('disabled', finding['id'])
        self.follow(finding)
        self.call('--no-probe', config=CONF)

    def test_a_section_with_a_similar_name(self) -> None:
        for section in '[ break0 ]', '[break-0]', '[kuryr_break0]':
            with self.subTest(section):
                with open(CONF, 'w') as file:
                    file.write('%s\nresync_interval = 50\n' % section)
                shown = self.call('--no-probe', code=4, config=CONF).stdout
                self.assertIn('the section %s in %s is not read: did you '
                              'mean [break0]? why' % (section, CONF),
                              ' '.join(shown.split()))
        with open(CONF, 'w') as file:  # oslo.config accepts this name
            file.write('[Break0]\nresync_interval = 50\n')
        self.call('--no-probe', config=CONF)

    def test_in_a_pod(self) -> None:
        with IN_POD:
            finding = self.assert_found('disabled', enabled=False)
        self.assertEqual(['kubectl --namespace kube-system set env '
                          'daemonset/kuryr-cni-ds OS_BREAK0__ENABLED=true'],
                         finding['commands'])

    def test_commands_name_the_configuration_in_use(self) -> None:
        with open(CONF, 'w') as file:
            file.write('[break0]\n')
        self.lab.run('ip', 'route', 'del', POD4)
        found = json.loads(self.call('--json', '--no-probe', code=1,
                                     config=CONF).stdout)['findings']
        self.assertEqual('kuryr-break0 --config-file %s sync' % CONF,
                         found[0]['commands'][0])
        self.follow(found[0])
        self.call('--no-probe', config=CONF)


class TestDaemon(DoctorTestCase):

    def restart(self, cgroup: str = '/', **fields: Any) -> str:
        with open('/run/cgroup', 'w') as file:
            file.write('0::%s\n' % cgroup)
        real = open

        def opened(path: Any, *args: Any, **kwargs: Any) -> Any:
            return real('/run/cgroup' if str(path) == '/proc/7/cgroup'
                        else path, *args, **kwargs)

        with mock.patch.object(installation, 'daemons', return_value=[
                (7, '/opt/bin/kuryr-daemon', 0.0)]), mock.patch.object(
                hosts, 'open', opened, create=True):
            return hosts.Host('/etc/kuryr/kuryr.conf', True, True,
                              **fields).restart_daemon

    def test_on_a_bare_node(self) -> None:
        self.assertEqual('systemctl restart kuryr-daemon', self.restart())
        self.assertEqual(
            'systemctl restart devstack@kuryr-daemon.service',
            self.restart('/system.slice/devstack@kuryr-daemon.service'))
        self.assertEqual('systemctl restart kuryr-daemon', self.restart(
            '/user.slice/user-0.slice/user@0.service/app.slice'))

    def test_in_a_pod(self) -> None:
        self.assertEqual(ROLL_OUT, self.restart(daemon_set='kuryr-cni-ds'))


class TestStateDirectory(DoctorTestCase):

    def test_elsewhere(self) -> None:
        # The doctor reports every overlay as persistent. /root may be on a
        # tmpfs, which the doctor would not report.
        for name in 'lower', 'upper', 'work', 'mount':
            os.makedirs('/run/overlay/' + name)
        self.lab.run(
            'mount', '-t', 'overlay', 'overlay', '-o', 'lowerdir=lower,'
            'upperdir=upper,workdir=work'.replace('=', '=/run/overlay/'),
            '/run/overlay/mount')
        with open(CONF, 'w') as file:
            file.write('[break0]\nstate_dir = /run/overlay/mount/state\n')
        done = self.call('--json', '--no-probe', code=None, config=CONF)
        finding = next(each for each in json.loads(done.stdout)['findings']
                       if each['id'] == 'state-dir-persistent')
        self.follow(finding)
        with open(CONF) as file:
            self.assertIn('state_dir = /run/kuryr-break0\n', file.read())

    def test_the_default_on_a_disk(self) -> None:
        """No command sets state_dir to its present value."""
        with mock.patch.object(records, '_mount_of', return_value=(
                '/', 'ext4')):
            finding = self.assert_found('state-dir-persistent')
        self.assertEqual([
            "echo 'kuryr-break0 /run/kuryr-break0 tmpfs mode=0700 0 0' "
            '>>/etc/fstab', 'mkdir -p /run/kuryr-break0',
            'mount /run/kuryr-break0'], finding['commands'])
