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

"""Finds the network namespaces on the node that have a macvlan on it."""

from __future__ import annotations

import contextlib
import os
import socket
from typing import Iterable, NamedTuple

from oslo_log import log as logging

from kuryr_break0 import exceptions
from kuryr_break0.ledger import netns_id
from kuryr_break0 import netlink

LOG = logging.getLogger(__name__)


class Macvlan(NamedTuple):
    """A macvlan on an interface of the node, in another namespace.

    :ivar netns: path of that
    :ivar parent: the interface of the node
    """

    netns: str
    parent: str
    link: netlink.Link


def macvlans(directories: Iterable[str], proc: str) -> list[Macvlan]:
    """List the macvlans on interfaces of the node, in all namespaces.

    A namespace that cannot be looked at is logged, and has none.

    :param directories: where namespaces have names
    :param proc: the /proc of the node
    """
    found = []
    for path in find(directories, proc):
        try:
            links = netlink.macvlans_in(path)
        except (exceptions.NetnsUnusable, exceptions.KernelRefused) as err:
            LOG.warning('Left out: %s', err)
            continue
        for link in links:
            with contextlib.suppress(OSError):  # just deleted
                found.append(Macvlan(
                    path, socket.if_indextoname(link.lower or 0), link))
    return found


def find(directories: Iterable[str], proc: str) -> list[str]:
    """List the namespaces but the own one, by one path each.

    A name in a directory lives as long as the namespace. One that has none
    goes by the process that has been in it for longest: any other may end
    before it does.
    """
    own = netns_id('/proc/thread-self/ns/net')
    paths: dict[tuple[int, int], str] = {}
    for directory in directories:
        with contextlib.suppress(FileNotFoundError):
            for name in sorted(os.listdir(directory)):
                path = os.path.join(directory, name)
                found = netns_id(path)
                # What is on another device is not a namespace.
                if found and own and found[0] == own[0]:
                    paths.setdefault(found, path)
    oldest: dict[tuple[int, int], tuple[int, str]] = {}
    for name in os.listdir(proc):
        if not name.isdigit():
            continue
        path = os.path.join(proc, name, 'ns/net')
        found = netns_id(path)
        if found and found not in paths:
            with contextlib.suppress(OSError):  # it has just ended
                candidate = _started(os.path.join(proc, name)), path
                oldest[found] = min(oldest.get(found, candidate), candidate)
    paths.update({found: path for found, (_, path) in oldest.items()})
    return [path for found, path in paths.items() if found != own]


def _started(process: str) -> int:
    """When a process was started, in ticks since the boot (proc(5))."""
    with open(os.path.join(process, 'stat')) as file:
        # The name of the program, in parentheses, may have any character.
        return int(file.read().rpartition(')')[2].split()[19])
