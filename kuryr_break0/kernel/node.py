# SPDX-License-Identifier: Apache-2.0

"""Reads the namespace of this thread with plain sockets and /proc.

That takes a tenth of the time that a netlink message takes in Python.
"""

from __future__ import annotations

import contextlib
import ipaddress
import os
import platform
import re
import shutil
import socket
from typing import Collection, Iterator, Optional

from kuryr_break0 import exceptions
from kuryr_break0.kernel.wire import family_of
from kuryr_break0.model import IPAddress

#: Flags in /proc/net/route and ipv6_route (linux/route.h, ipv6_route.h)
RTF_GATEWAY = 0x2
RTF_LOCAL = 0x80000000
#: Of capabilities (linux/capability.h); to enter namespaces.
CAP_SYS_ADMIN = 21
#: The mounts that this process sees.
MOUNTS = '/proc/self/mountinfo'
#: Of programs; they are in none that a service or a user may search.
_DIRECTORIES = '/usr/sbin:/sbin'


@contextlib.contextmanager
def absence(what: str) -> Iterator[None]:
    """Take an error as absence, unless it is a fault of this process.

    :param what: what fails then
    :raises SystemRefused: for such a fault
    """
    try:
        yield
    except OSError as err:
        if err.errno in exceptions.EXHAUSTED:
            raise exceptions.SystemRefused(
                reason='%s: %s' % (what, err)) from err


def find_program(name: str) -> Optional[str]:
    """Return the path of a program; None if it is not installed."""
    return shutil.which(name) or shutil.which(name, path=_DIRECTORIES)


def capabilities() -> int:
    """Return the effective capabilities of this thread, as bits."""
    with open('/proc/thread-self/status') as file:
        return next(int(line.split()[1], 16) for line in file
                    if line.startswith('CapEff:'))


def release() -> tuple[int, int]:
    """Return the first two numbers of the kernel's version."""
    numbers = re.findall('[0-9]+', platform.release())
    return int(numbers[0]), int(numbers[1])


def index_of(device: str) -> Optional[int]:
    """Return the ifindex of an interface; None if there is none.

    :raises SystemRefused: if this process lacks descriptors
    """
    for _ in range(2):  # it may come in between
        # An error of Python's, which does not say why.
        with contextlib.suppress(OSError):
            return socket.if_nametoindex(device)
        if not _has_settings(device):
            return None
    raise exceptions.SystemRefused(
        reason='cannot ask for the number of ' + device)


def exists(device: str) -> bool:
    """Return whether there is an interface of a name; needs no descriptor."""
    try:
        return socket.if_nametoindex(device) > 0
    except OSError:
        return _has_settings(device)


def _has_settings(device: str) -> bool:
    return (device not in ('', '.', '..', 'all', 'default')
            and '/' not in device
            and os.path.isdir('/proc/sys/net/ipv4/conf/' + device))


def name_of(ifindex: Optional[int]) -> str:
    """Return the name of an interface of this namespace, for people.

    :param ifindex: None is what the kernel says of a route through none, or
        through several
    """
    if ifindex is None:
        return 'no single interface'
    try:
        return socket.if_indextoname(ifindex)
    except OSError:
        return 'if%d' % ifindex  # as ip(8) writes it


def current_name(name: str, ifindex: Optional[int]) -> str:
    """Return the name that an interface has now: a rename keeps its ifindex.

    :param name: the one that it had, for an interface that is not there
    :param ifindex: None where it was not noted
    """
    with contextlib.suppress(OSError):
        return socket.if_indextoname(ifindex or 0)
    return name


def source_for(address: IPAddress,
               device: Optional[str] = None) -> Optional[IPAddress]:
    """Return the source address that the node uses towards another.

    It is the address itself where that is one of the node's own. A datagram
    socket is connected for it, which sends nothing.

    :param device: the interface that it would have to leave by
    :returns: None where there is no way, or no address but link-local ones
    :raises PermissionError: where the routes say that it is no host's: for
        the broadcast address of a subnet, or a prohibited one
    """
    with socket.socket(family_of(address), socket.SOCK_DGRAM) as probe:
        try:
            if device is not None:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE,
                                 os.fsencode(device))
            probe.connect((str(address), 9))
            source = ipaddress.ip_address(probe.getsockname()[0])
        except PermissionError:
            raise
        except OSError:
            return None
    # A node without an address of the family would send from 0.0.0.0 or ::1.
    return (None if source.is_link_local or source.is_unspecified
            or source.is_loopback and not address.is_loopback else source)


def count_host_routes(devices: Collection[str]) -> int:
    """Count the routes to single addresses on interfaces, in table main.

    Not those through another address. In the texts of /proc, which take
    about a microsecond a route.
    """
    count = 0
    # Iface Destination Gateway Flags RefCnt Use Metric Mask ...
    for fields in _proc_net('route'):
        count += (fields[0] in devices and fields[7] == 'FFFFFFFF'
                  and not int(fields[3], 16) & RTF_GATEWAY)
    # destination length source length gateway metric ref use flags Iface
    for fields in _proc_net('ipv6_route'):
        count += (fields[-1] in devices and fields[1] == '80'
                  and not int(fields[8], 16) & (RTF_GATEWAY | RTF_LOCAL))
    return count


def _proc_net(name: str) -> Iterator[list[str]]:
    # The name of an interface may have any byte.
    with contextlib.suppress(OSError), \
            open('/proc/thread-self/net/' + name,
                 errors='surrogateescape') as file:
        yield from map(str.split, file)


def mounts() -> list[tuple[str, str, str]]:
    """List what of which file system is mounted where: root, path, type."""
    return list(map(parse_mount, read_mounts()))


def read_mounts() -> list[str]:
    """List the mounts as the kernel writes them (proc(5), mountinfo)."""
    with open(MOUNTS, errors='surrogateescape') as file:
        return file.readlines()


def parse_mount(line: str) -> tuple[str, str, str]:
    """Read one of :func:`read_mounts`: root, path, type."""
    # ID parent major:minor root point options ... - type source ...
    _, _, _, root, point, rest = line.split(' ', 5)
    return (root, re.sub(r'\\([0-7]{3})', lambda code: chr(int(code[1], 8)),
                         point), rest.partition(' - ')[2].split(' ', 1)[0])


def read_sysctl(path: str) -> Optional[int]:
    """Read a sysctl of the network namespace that this thread is in.

    :param path: below /proc/sys/net, with slashes
    :returns: None where there is none, as all of IPv6's where that is off
    :raises SystemRefused: if this process lacks descriptors or memory
    """
    full = '/proc/sys/net/' + path
    with absence('cannot read a sysctl'), \
            contextlib.suppress(ValueError), open(full) as sysctl:
        return int(sysctl.read())
    return None


def write_sysctl(path: str, value: int,
                 directory: str = '/proc/sys') -> None:
    """Set a sysctl of the network namespace that this thread is in.

    :param path: below /proc/sys/net, with slashes
    :param directory: where /proc/sys is writable
    :raises KernelRefused: for one that can't be written
    """
    full = '%s/net/%s' % (directory, path)
    try:
        with open(full, 'w') as sysctl:
            sysctl.write(str(value))
    except OSError as err:
        raise exceptions.KernelRefused(
            'set %s to %d' % (full, value), err.strerror or str(err),
            err.errno or 0, 'In a container, /proc/sys must be writable: '
            'run it privileged, or see [break0] sysctl_dir.') from err
