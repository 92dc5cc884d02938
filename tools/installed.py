# SPDX-License-Identifier: Apache-2.0

"""The program that tools/deb runs in a minimal Debian.

The program needs only Python's standard library.
"""

from __future__ import annotations

import glob
import json
import os
import re
import signal
import subprocess
import sys
import time
import traceback
from typing import Any, Callable
import urllib.request

AGENT = 'kuryr-break0-agent'
ADDRESS = '100.75.30.71'
SETTINGS = '/etc/kuryr-break0/kuryr-break0.conf'
METRICS = '127.0.0.1:9471'
FILES = ('/usr/sbin/nft', '/usr/share/man/man8/kuryr-break0.8.gz',
         '/usr/share/bash-completion/completions/kuryr-break0',
         '/usr/share/fish/vendor_completions.d/kuryr-break0.fish',
         '/usr/share/zsh/vendor-completions/_kuryr-break0',
         '/usr/lib/NetworkManager/conf.d/kuryr-break0.conf',
         '/usr/lib/systemd/network/10-kuryr-break0.network',
         '/usr/lib/systemd/networkd.conf.d/kuryr-break0.conf',
         '/usr/lib/systemd/system/kuryr-break0-agent.service')


def run(command: str, code: int = 0, **kwargs: Any) -> str:
    """Return the output of a shell command, including its errors."""
    done = subprocess.run(command, shell=True, text=True,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                          **kwargs)
    assert done.returncode == code, '%s: %d: %s' % (
        command, done.returncode, done.stdout)
    return done.stdout


def failed_units() -> str:
    return run('systemctl list-units --failed --plain --no-legend')


def fails(command: str) -> bool:
    return subprocess.call(command, shell=True, stdout=subprocess.DEVNULL,
                           stderr=subprocess.DEVNULL) != 0


def until(condition: Callable[[], Any]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, run(
            'kuryr-break0 doctor; systemctl show {0} | grep -E "^(Active|Sub|'
            'Result|NRestarts|ExecMain|ExecReload)"; journalctl -u {0}; exit 0'
            .format(AGENT))
        time.sleep(0.1)


def apt(arguments: str) -> str:
    began = time.monotonic()
    shown = run('DEBIAN_FRONTEND=noninteractive apt-get -q -y ' + arguments)
    print('apt-get %s: %.1f s' % (
        arguments.split()[0], time.monotonic() - began))
    return shown


def state() -> str:
    return run('systemctl show -P ActiveState %s' % AGENT).strip()


def is_reached() -> bool:
    return not fails('ping -c 1 -W 1 ' + ADDRESS)


def has_metrics() -> bool:
    try:
        with urllib.request.urlopen('http://%s/metrics' % METRICS) as answer:
            return answer.status == 200
    except OSError:
        return False


def journal() -> str:
    run('journalctl --sync')
    return run('journalctl -o cat -u ' + AGENT)


def readme() -> list[str]:
    """Return the commands of the README for a host of Docker."""
    with open(os.path.join(os.path.dirname(__file__), '../README.rst')) as (
            file):
        block = re.search(r'\nDocker, .*?::\n\n((?:    .*\n)+)', file.read(),
                          re.DOTALL)
    assert block
    return [line.strip() for line in block[1].splitlines()]


def set_up() -> None:
    """Create a NIC and a container on it."""
    run('ip link set lo up; ip link add eth0 type veth peer name lan;'
        'ip link set lan up; ip link set eth0 up;'
        'ip address add 100.75.30.2/24 dev eth0; ip netns add one;'
        'ip link add mv0 link eth0 netns one type macvlan mode bridge;'
        'ip -n one address add %s/24 dev mv0; ip -n one link set mv0 up'
        % ADDRESS)
    assert not is_reached()


def install(kept: str) -> None:
    # In namespaces, some units of systemd cannot start.
    failed = failed_units()
    shown = apt('install %s/1.0/kuryr-break0_*_all.deb' % kept)
    assert re.search('Name the networks .* 100.75.30.0/24.*' + SETTINGS,
                     shown), shown
    with open(SETTINGS) as file:
        sample = re.search(r'explained in (\S+)\.\n', file.read())
    assert sample
    for path in (*FILES, sample[1]):
        assert os.path.exists(path), path
    assert fails('dpkg -s python3-pyroute2 python3-venv python3-pip')
    assert state() == 'inactive', state()
    assert ('Not started: name the networks of your containers by '
            'allowed_cidrs in ') in journal(), journal()
    # The package can be removed before it is configured.
    assert 'Not all' not in apt('remove kuryr-break0')
    apt('install %s/1.0/kuryr-break0_*_all.deb' % kept)
    assert run('systemctl is-enabled ' + AGENT) == 'enabled\n'
    assert failed_units() == failed, (failed, failed_units())


def configure() -> None:
    """Set the allowed networks: first an invalid value, then a valid one."""
    with open(SETTINGS) as file:
        text = file.read()
    with open(SETTINGS, 'w') as file:
        file.write(text.replace('# allowed_cidrs =', 'allowed_cidrs = nothing'
                                '\n#'))
    assert fails('systemctl restart ' + AGENT)
    assert state() == 'failed', state()
    assert 'nothing' in journal(), journal()
    with open(SETTINGS, 'w') as file:
        file.write(text)
    for command in readme()[1:3]:
        run(command.replace('192.168.1.0', '100.75.30.0'))
    until(is_reached)
    assert ADDRESS in run(readme()[3])
    run('echo metrics_bind = %s >>%s' % (METRICS, SETTINGS))
    run('systemctl restart ' + AGENT)
    until(is_reached)


def use(kept: str) -> None:
    assert ADDRESS in run('kuryr-break0 status')
    for command in ('doctor', 'probe ' + ADDRESS, 'sync --dry-run',
                    '--version'):
        run('kuryr-break0 ' + command)
    assert 'link/ether' in run('ip -d link show dev break0')
    run('ip link delete break0')  # the agent recreates it without pyroute2
    until(is_reached)
    with urllib.request.urlopen('http://%s/metrics' % METRICS) as answer:
        text = answer.read().decode()
    assert 'kuryr_break0_' in text and '_created' not in text, text
    assert 'break0' in run('man -V >/dev/null 2>&1; zcat ' + FILES[1])
    apt('install %s/1.0/kuryr-break0-cni_*.deb' % kept)
    answer = json.loads(run(
        'CNI_COMMAND=VERSION /usr/lib/cni/break0',
        input='{"cniVersion": "1.0.0"}'))
    assert '1.1.0' in answer['supportedVersions'], answer
    apt('remove kuryr-break0-cni')


def follow(expected: str) -> None:
    """Run the commands that the doctor prints against a fault.

    :param expected: the ID of the doctor's finding
    """
    done = subprocess.run(['kuryr-break0', 'doctor', '--no-probe', '--json'],
                          stdout=subprocess.PIPE, text=True)
    finding = next((each for each in json.loads(done.stdout)['findings']
                    if each['id'] == expected), None)
    assert finding, done.stdout
    assert finding['commands'], finding
    for command in finding['commands']:
        run(command)


def advice() -> None:
    """Cause faults, and check that the doctor's commands correct them."""
    run('systemctl stop ' + AGENT)
    follow('agent-not-running')
    # systemd sends the SIGHUP of a reload only to an agent that handles it.
    pid = run('systemctl show -P MainPID ' + AGENT)
    run('systemctl reload ' + AGENT)
    assert pid == run('systemctl show -P MainPID ' + AGENT)
    until(has_metrics)
    with open(SETTINGS) as file:
        text = file.read()
    for name, change in (
            ('address-not-allowed',
             's|^allowed_cidrs.*|allowed_cidrs = 10.0.0.0/8|'),
            ('disabled', '$ a enabled = false')):
        run("sed -i '%s' %s" % (change, SETTINGS))
        run('systemctl reload ' + AGENT)
        until(lambda: not is_reached())
        pid = run('systemctl show -P MainPID ' + AGENT)
        follow(name)
        until(is_reached)
        # A reload was enough: the agent is the same process.
        assert pid == run('systemctl show -P MainPID ' + AGENT)
        with open(SETTINGS, 'w') as file:
            file.write(text)
        run('systemctl reload ' + AGENT)
        until(is_reached)


def upgrade(kept: str) -> None:
    """Upgrade, and check that no ping is lost and the configuration stays."""
    before = run('systemctl show -P MainPID ' + AGENT)
    ping = subprocess.Popen(['ping', '-i', '0.02', '-q', ADDRESS],
                            stdout=subprocess.PIPE, text=True)
    apt('install %s/next/next.deb' % kept)
    until(lambda: run('systemctl show -P MainPID ' + AGENT)
          not in (before, '0\n'))
    until(lambda: journal().count('Watching') > 1)
    assert not fails('kuryr-break0 status')
    ping.send_signal(signal.SIGINT)
    counted = ping.communicate()[0]
    assert re.search(r'(\d{2,}) packets transmitted, \1 received', counted), (
        counted)
    with open(SETTINGS) as file:
        assert 'allowed_cidrs = 100.75.30.0/24' in file.read()


def remove() -> None:
    apt('remove kuryr-break0')
    for command in ('ip link show break0', 'systemctl is-active ' + AGENT,
                    'nft list ruleset | grep kuryr', 'test -e /run/kuryr-'
                    'break0', 'ip netns exec one nft list ruleset | grep .',
                    'command -v kuryr-break0'):
        assert fails(command), command
    assert os.path.exists(SETTINGS)
    assert 'mv0' in run('ip -n one link')
    assert not glob.glob('/usr/lib/python3/dist-packages/kuryr_break0/**')
    apt('purge kuryr-break0')
    assert not os.path.exists('/etc/kuryr-break0')
    assert not glob.glob('/etc/**/*kuryr-break0*', recursive=True), glob.glob(
        '/etc/**/*kuryr-break0*', recursive=True)


def main(kept: str) -> int:
    failed = 0
    for step in (set_up, lambda: install(kept), configure,
                 lambda: use(kept), advice, lambda: upgrade(kept), remove):
        try:
            step()
        except Exception:  # later steps need this one
            traceback.print_exc(file=sys.stdout)
            failed = 1
            break
    print('Failed: %d' % failed, flush=True)
    return failed


if __name__ == '__main__':
    sys.exit(main(*sys.argv[1:]))
