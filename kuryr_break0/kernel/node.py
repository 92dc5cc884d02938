# SPDX-License-Identifier: Apache-2.0

"""Reads this thread's namespace by plain sockets and /proc.

In Python, a request by netlink takes ten times as long.
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
from kuryr_break0 import model

#: Flags in /proc/net/route and ipv6_route (linux/route.h, ipv6_route.h)
RTF_GATEWAY = 0x2
RTF_LOCAL = 0x80000000
#: The capability to enter namespaces (linux/capability.h)
CAP_SYS_ADMIN = 21
#: The mounts of this process
MOUNTS = '/proc/self/mountinfo'
#: Directories of programs that the PATH of a service or a user may not contain
_DIRECTORIES = '/usr/sbin:/sbin'


@contextlib.contextmanager
def tolerate_absence(what: str) -> Iterator[None]:
    """Suppress an OSError, unless this process lacks descriptors or memory.

    :param what: description of the failure, for SystemRefused
    :raises SystemRefused: if this process lacks descriptors or memory
    """
    try:
        yield
    except OSError as err:
        if err.errno in exceptions.RESOURCE_ERRNOS:
            raise exceptions.SystemRefused(
                reason='%s: %s' % (what, err)) from err


def find_program(name: str) -> Optional[str]:
    """Return the path of a program; None if it is not installed."""
    return shutil.which(name) or shutil.which(name, path=_DIRECTORIES)


def read_capabilities() -> int:
    """Return the effective capabilities of this thread, as bits."""
    with open('/proc/thread-self/status') as file:
        return next(int(line.split()[1], 16) for line in file
                    if line.startswith('CapEff:'))


def read_release() -> tuple[int, int]:
    """Return the first two numbers of the kernel release."""
    numbers = re.findall('[0-9]+', platform.release())
    return int(numbers[0]), int(numbers[1])


def find_ifindex(device: str) -> Optional[int]:
    """Return the ifindex of an interface; None if it does not exist.

    :raises SystemRefused: if this process lacks file descriptors
    """
    for _ in range(2):  # the interface may appear between the two look-ups
        # Python's error is the same for a missing interface and for a lack of
        # descriptors.
        with contextlib.suppress(OSError):
            return socket.if_nametoindex(device)
        if not _has_settings(device):
            return None
    raise exceptions.SystemRefused(
        reason='cannot read the ifindex of ' + device)


def has_interface(device: str) -> bool:
    """Return whether an interface exists, without raising an error."""
    with contextlib.suppress(OSError):
        return socket.if_nametoindex(device) > 0
    return _has_settings(device)


def _has_settings(device: str) -> bool:
    return (device not in ('', '.', '..', 'all', 'default')
            and '/' not in device
            and os.path.isdir('/proc/sys/net/ipv4/conf/' + device))


def format_ifname(ifindex: Optional[int]) -> str:
    """Return the name of an interface, for messages.

    :param ifindex: None for a route with several interfaces or no interface
    """
    if ifindex is None:
        return 'no single interface'
    try:
        return socket.if_indextoname(ifindex)
    except OSError:
        return 'if%d' % ifindex  # the notation of ip(8)


def find_current_name(name: str, ifindex: Optional[int]) -> str:
    """Return the present name of an interface that may have a new name.

    :param name: the recorded name. If no interface has the recorded ifindex,
        the function returns this name
    :param ifindex: the recorded ifindex, or None
    """
    with contextlib.suppress(OSError):
        return socket.if_indextoname(ifindex or 0)
    return name


def find_source(address: model.IPAddress,
                device: Optional[str] = None) -> Optional[model.IPAddress]:
    """Return the source address that the node uses towards an address.

    For an address of the node, the source is the address itself. The function
    connects a datagram socket, which sends nothing.

    :param device: the interface to leave by; None for any
    :returns: None if there is no route, or if the source is link-local
    :raises PermissionError: if the route to the address is of type prohibit,
        or the address is the broadcast address of a subnet
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
    # If the node has no address of this family, the source is 0.0.0.0 or ::1.
    return (None if source.is_link_local or source.is_unspecified
            or source.is_loopback and not address.is_loopback else source)


def count_host_routes(devices: Collection[str]) -> int:
    """Count the host routes on interfaces, in table main.

    Routes with a gateway do not count. Reading /proc takes about a microsecond
    for each route.
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
    # An interface name may contain any byte.
    with contextlib.suppress(OSError), \
            open('/proc/thread-self/net/' + name,
                 errors='surrogateescape') as file:
        yield from map(str.split, file)


def list_mounts() -> list[tuple[str, str, str]]:
    """List the mounts: root, path, type of file system."""
    return list(map(parse_mount, read_mounts()))


def read_mounts() -> list[str]:
    """List the mounts as lines of mountinfo (proc(5))."""
    with open(MOUNTS, errors='surrogateescape') as file:
        return file.readlines()


def parse_mount(line: str) -> tuple[str, str, str]:
    """Parse a line of :func:`read_mounts`: root, path, type."""
    # ID parent major:minor root point options ... - type source ...
    _, _, _, root, point, rest = line.split(' ', 5)
    return (root, re.sub(r'\\([0-7]{3})', lambda code: chr(int(code[1], 8)),
                         point), rest.partition(' - ')[2].split(' ', 1)[0])


def read_sysctl(path: str) -> Optional[int]:
    """Read a sysctl of this thread's network namespace.

    :param path: below /proc/sys/net, with slashes
    :returns: None if the sysctl does not exist. For example, if IPv6 is
        disabled, no IPv6 sysctl exists
    :raises SystemRefused: if this process lacks descriptors or memory
    """
    full = '/proc/sys/net/' + path
    with tolerate_absence('cannot read a sysctl'), \
            contextlib.suppress(ValueError), open(full) as sysctl:
        return int(sysctl.read())
    return None


def effective_sysctl(path: str, device: str) -> int:
    """Return the larger value of a sysctl of ``all`` and of an interface.

    For arp_filter, arp_ignore and rp_filter, the kernel uses this value
    (ip-sysctl.rst).

    :param path: path below /proc/sys/net, with ``%s`` for the interface
    """
    return max(read_sysctl(path % name) or 0 for name in ('all', device))


def write_sysctl(path: str, value: int,
                 directory: str = '/proc/sys') -> None:
    """Set a sysctl of this thread's network namespace.

    :param path: below /proc/sys/net, with slashes
    :param directory: /proc/sys, or the directory of [break0] sysctl_dir
    :raises KernelRefused: if the sysctl cannot be written
    """
    full = '%s/net/%s' % (directory, path)
    try:
        with open(full, 'w') as sysctl:
            sysctl.write(str(value))
    except OSError as err:
        raise exceptions.KernelRefused(
            'set %s to %d' % (full, value), err.strerror or str(err),
            err.errno or 0, 'In a container, /proc/sys must be writable: run '
            'the container privileged, or set [break0] sysctl_dir.') from err
