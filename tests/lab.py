# Licensed under the Apache License, Version 2.0 (the "License"); you may
# not use this file except in compliance with the License. You may obtain
# a copy of the License at
#
#      http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS, WITHOUT
# WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the
# License for the specific language governing permissions and limitations
# under the License.

"""A node in namespaces of its own: what tests, demo and benchmark run on.

The calling process becomes the node: its network namespace gets a NIC,
``eth0``, whose other end is in the namespace ``lan``. Pods are further
namespaces. All of it ends with the process, also when it is killed, and
nothing of the machine itself is touched. ``tests/in-lab`` makes a process
that may do this, as any user.

What the kernel holds is read with ``ip -json``, not with the library under
test, so that a fault of that cannot hide itself.
"""

from __future__ import annotations

import ctypes
import ipaddress
import json
import os
import subprocess
from typing import Any, Optional

CLONE_NEWNS = 0x00020000
CLONE_NEWNET = 0x40000000
MS_REC = 0x4000
MS_PRIVATE = 1 << 18

NODE = '100.75.30.51'
LAN = '100.75.30.1'
PREFIX = 24
PARENT = 'eth0'

_libc = ctypes.CDLL(None, use_errno=True)


def _call(name: str, *args: Any) -> None:
    if getattr(_libc, name)(*args) != 0:
        error = ctypes.get_errno()
        raise OSError(error, '%s: %s. Run it under tests/in-lab.' %
                      (name, os.strerror(error)))


class Lab:
    """A node with a NIC on a LAN; entering it makes the process the node.

    A second one replaces the first, so each test can have a node of its own.
    """

    def __init__(self) -> None:
        _call('unshare', CLONE_NEWNET | CLONE_NEWNS)
        _call('mount', b'none', b'/', None, MS_REC | MS_PRIVATE, None)
        _call('mount', b'lab', b'/run', b'tmpfs', 0, None)
        os.mkdir('/run/netns')
        self.run('ip', 'link', 'set', 'lo', 'up')
        self.add_netns('lan')
        self.add_nic()

    def close(self) -> None:
        """Let go of the node; its namespaces end with their last process."""
        _call('umount2', b'/run', 2)  # MNT_DETACH

    def add_nic(self) -> None:
        """Plug in the NIC and give it the address of the node."""
        self.run('ip', 'link', 'add', PARENT, 'type', 'veth',
                 'peer', 'name', 'nic', 'netns', 'lan')
        self.run('ip', 'link', 'set', PARENT, 'up')
        self.run('ip', 'address', 'add', '%s/%d' % (NODE, PREFIX),
                 'dev', PARENT)
        self.run('ip', 'route', 'replace', 'default', 'via', LAN)
        self.run('ip', 'link', 'set', 'nic', 'up', netns='lan')
        self.run('ip', 'address', 'add', '%s/%d' % (LAN, PREFIX),
                 'dev', 'nic', netns='lan')

    def add_netns(self, name: str) -> str:
        """Add a namespace and return its path."""
        self.run('ip', 'netns', 'add', name)
        self.run('ip', 'link', 'set', 'lo', 'up', netns=name)
        return '/run/netns/' + name

    def add_pod(self, name: str, address: str, *,
                mac: Optional[str] = None) -> str:
        """Add a namespace with a macvlan on the NIC, as Kuryr would."""
        path = self.add_netns(name)
        self.run('ip', 'link', 'add', PARENT, 'link', PARENT, 'netns', name,
                 *(('address', mac) if mac else ()),
                 'type', 'macvlan', 'mode', 'bridge')
        interface = ipaddress.ip_interface(address)
        if interface.network.num_addresses == 1:
            address += '/%d' % PREFIX
        self.run('ip', 'address', 'add', address, 'dev', PARENT, netns=name)
        self.run('ip', 'link', 'set', PARENT, 'up', netns=name)
        return path

    def run(self, *command: str, netns: Optional[str] = None,
            check: bool = True) -> subprocess.CompletedProcess[str]:
        """Run a command on the node, or in another namespace."""
        if netns:
            command = ('ip', 'netns', 'exec', netns, *command)
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True,
                              stderr=subprocess.STDOUT)
        if check and done.returncode:
            raise AssertionError('%s: exit %d\n%s' % (
                ' '.join(command), done.returncode, done.stdout))
        return done

    def ip(self, *args: str, netns: Optional[str] = None) -> list[Any]:
        """What ``ip -json`` says, details included."""
        text = self.run('ip', '-json', '-details', *args, netns=netns).stdout
        # ip prints {} in place of what it was not asked for.
        return [item for item in json.loads(text or '[]') if item]

    def link(self, name: str) -> Optional[dict[str, Any]]:
        """One interface of the node, or None."""
        return next((link for link in self.ip('link', 'show')
                     if link['ifname'] == name), None)

    def routes(self, device: str = 'break0') -> dict[str, dict[str, Any]]:
        """The IPv4 and IPv6 routes on a device, by destination."""
        found = {}
        for family in ('-4', '-6'):
            for route in self.ip(family, 'route', 'show', 'table', 'all'):
                if (route.get('dev') == device
                        and route.get('type', 'unicast') == 'unicast'
                        and not route['dst'].startswith('fe80')):
                    assert route['dst'] not in found, route['dst'] + ' twice'
                    found[route['dst']] = route
        return found

    def ping(self, address: str, netns: Optional[str] = None, *,
             cold: bool = True) -> bool:
        """Whether a ping is answered; cold is without learnt neighbours."""
        if cold:
            for where in (None, *os.listdir('/run/netns')):
                self.run('ip', 'neighbour', 'flush', 'all', netns=where,
                         check=False)
        return self.run('ping', '-n', '-q', '-c', '1', '-W', '1', address,
                        netns=netns, check=False).returncode == 0
