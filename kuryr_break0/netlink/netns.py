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

"""Other network namespaces."""

from __future__ import annotations

import contextlib
import ctypes
import os
from typing import Iterator

import pyroute2
from pyroute2 import netns as pyroute2_netns

from kuryr_break0 import exceptions
from kuryr_break0.netlink.errors import translated
from kuryr_break0.netlink.errors import undisturbed
from kuryr_break0.netlink.link import Link
from kuryr_break0.netlink.link import parse

#: libc, as this process has it already. Left alone, pyroute2 looks for it by
#: running ldconfig, or a compiler with files in /tmp.
_LIBC = ctypes.CDLL(None, use_errno=True)


@contextlib.contextmanager
def entered(netns: str) -> Iterator[None]:
    """Be in another network namespace; this thread, within the block.

    :param netns: its path
    :raises NetnsUnusable: if it cannot be entered
    """
    with opened('/proc/thread-self/ns/net') as own:
        with opened(netns) as other:
            try:
                pyroute2_netns.setns(other, libc=_LIBC)
            except OSError as err:
                raise exceptions.NetnsUnusable(
                    netns=netns, reason='cannot be entered: %s'
                    % os.strerror(err.errno or 0)) from err
        try:
            yield
        finally:
            pyroute2_netns.setns(own, libc=_LIBC)


@contextlib.contextmanager
def opened(netns: str) -> Iterator[int]:
    """A file descriptor of a namespace, within the block.

    :param netns: its path
    :raises NetnsUnusable: if it cannot be entered
    """
    try:
        opened = os.open(netns, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as err:
        raise exceptions.NetnsUnusable(
            netns=netns, reason='cannot be entered: %s'
            % os.strerror(err.errno or 0)) from err
    try:
        yield opened
    finally:
        os.close(opened)


def macvlans_in(netns: str) -> list[Link]:
    """List the macvlans of another namespace on interfaces of this one.

    So their ``lower`` counts here.

    :param netns: its path
    :raises NetnsUnusable: if it cannot be entered
    :raises KernelRefused: if its interfaces cannot be listed
    """
    action = 'list the interfaces of ' + netns
    own = os.open('/proc/thread-self/ns/net', os.O_RDONLY | os.O_CLOEXEC)
    try:
        with entered(netns), pyroute2.IPRoute() as ipr:
            found = undisturbed(action, lambda: list(ipr.get_links()))
            # Whoever lists interfaces gives a number to each namespace that
            # one of them is on; the number of one that none is on is -1.
            with translated(action):
                here = ipr.get_netnsid(fd=own)['nsid']
    finally:
        os.close(own)
    return [link for link, at in
            ((parse(message), message.get_attr('IFLA_LINK_NETNSID'))
             for message in found)
            if link.kind == 'macvlan' and at == here]


def prepare_entering() -> None:
    """Let pyroute2 look for the C library, by another process, only once."""
    with opened('/proc/thread-self/ns/net') as own:
        pyroute2_netns.setns(own)
