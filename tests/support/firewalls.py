# SPDX-License-Identifier: Apache-2.0

"""The real ufw and firewalld, on the node of a lab."""

from __future__ import annotations

import os
import shutil
import subprocess
import unittest

from tests.support import lab


def _copy(path: str, into: str) -> None:
    try:
        shutil.copytree(path, into)
    except (OSError, shutil.Error) as err:
        raise unittest.SkipTest('as another user than root: %s' % err)


def set_up_ufw() -> None:
    """Let ufw write its files on this node, and not on the machine."""
    _copy('/etc/ufw', '/run/ufw')
    subprocess.run(['mount', '--bind', '/run/ufw', '/etc/ufw'], check=True)


def start_firewalld(test: unittest.TestCase) -> None:
    """Start firewalld as installed, until the test ends.

    The daemon of the system bus would switch to another user, which the lab's
    user namespace does not allow. Therefore firewalld gets a bus of its own.
    """
    _copy('/etc/firewalld', '/run/firewalld')
    bus = 'unix:path=/run/bus'
    os.environ['DBUS_SYSTEM_BUS_ADDRESS'] = bus
    test.addCleanup(os.environ.pop, 'DBUS_SYSTEM_BUS_ADDRESS')
    with open('/run/firewalld.log', 'ab') as log:
        for command in (
                ('dbus-daemon', '--session', '--nofork', '--nopidfile',
                 '--address=' + bus),
                ('firewalld', '--nofork', '--nopid', '--system-config',
                 '/run/firewalld', '--log-file', '/run/firewalld.log')):
            server = subprocess.Popen(command, stdout=log, stderr=log)
            test.addCleanup(server.wait)
            test.addCleanup(server.terminate)
            lab.until(lambda: os.path.exists('/run/bus'))
    lab.until(lambda: subprocess.run(
        ['firewall-cmd', '--state'], stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL).returncode == 0,
        open('/run/firewalld.log').read)
