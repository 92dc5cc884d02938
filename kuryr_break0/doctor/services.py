# SPDX-License-Identifier: Apache-2.0

"""Checks of systemd and NetworkManager, which can change break0 or its routes.

The checks read files, because a program that has ended can have changed
break0, and because a container has no networkctl or nmcli.
"""

from __future__ import annotations

import fnmatch
import glob
import os
from typing import Iterable, Iterator, Optional, Sequence

from kuryr_break0.doctor.findings import Finding
from kuryr_break0.doctor.findings import KINDS
from kuryr_break0 import kernel

_NETWORKD_LINKS = '/run/systemd/netif/links'
#: Directories, highest precedence first for files of the same name
#: (systemd.syntax(7)).
_SYSTEMD = ('/etc/systemd', '/run/systemd', '/usr/local/lib/systemd',
            '/usr/lib/systemd', '/lib/systemd')
#: States of an unmanaged link. A managed link has another state, such as
#: ``configuring`` (networkctl(1)).
_NETWORKD_LEAVES_ALONE = ('', 'unmanaged', 'pending', 'initialized', 'linger')
_NETWORKMANAGER = ('/etc', '/run', '/usr/lib')
_NETWORKMANAGER_DEVICES = '/run/NetworkManager/devices'


def check(links: Sequence[kernel.Link]) -> Iterator[Finding]:
    """Report settings of systemd and NetworkManager for existing break0s."""
    for link in links:
        yield from _check_link(link)
    yield from _check_foreign_routes([(link.name, link.mac) for link in links])


def check_drop_ins(name: str) -> Iterator[Finding]:
    """Report settings, and missing drop-ins, for a future break0."""
    findings = list(_check_foreign_routes([(name, '')]))
    yield from findings
    for who, config_dir, is_known, command in (
            ('systemd-networkd', _NETWORKD_LINKS,
             findings or _file_for('network', name, '')[0],
             KINDS['networkd-manages-break0'].commands[0]),
            ('NetworkManager', _NETWORKMANAGER_DEVICES, any(
                'interface-name:' + name in line
                for directory in _NETWORKMANAGER for path in glob.glob(
                    directory + '/NetworkManager/conf.d/*.conf')
                for line in _lines(path)),
             KINDS['networkmanager-manages-break0'].commands[1])):
        if os.path.isdir(config_dir) and not is_known:
            yield KINDS['drop-in-missing'].finding(
                'the node has %s, but no file of %s names %s' % (
                    who, who, name),
                command=command % {'device': name})


def _check_foreign_routes(devices: Iterable[tuple[str, str]]
                          ) -> Iterator[Finding]:
    """Report a break0 on which systemd-networkd deletes foreign routes.

    systemd-networkd manages only interfaces that match one of its files.
    """
    where = _manages_foreign_routes()
    if where is None or not os.path.isdir(_NETWORKD_LINKS):
        return
    for name, mac in devices:
        path, lines = _file_for('network', name, mac)
        if path and not _is_true(dict(_assignments(
                lines, 'Link')).get('Unmanaged', '')):
            yield KINDS['networkd-foreign-routes'].finding(
                '%s matches %s, and systemd-networkd has '
                'ManageForeignRoutes=yes %s' % (path, name, where),
                device=name)
            return


def _check_link(link: kernel.Link) -> Iterator[Finding]:
    networkd, manager = (
        dict(_assignments(_lines('%s/%d' % (directory, link.index))))
        for directory in (_NETWORKD_LINKS, _NETWORKMANAGER_DEVICES))
    state = networkd.get('ADMIN_STATE', '')
    if state not in _NETWORKD_LEAVES_ALONE:
        yield KINDS['networkd-manages-break0'].finding(
            'systemd-networkd manages %s (state %s), because of %s' % (
                link.name, state,
                networkd.get('NETWORK_FILE') or 'an unknown file'),
            device=link.name)
    if _is_true(manager.get('managed', '')):
        yield KINDS['networkmanager-manages-break0'].finding(
            'NetworkManager manages %s (interface %d)' % (
                link.name, link.index), device=link.name)
    # MACAddressPolicy=persistent is harmless: it does not change an interface
    # that was created with a MAC address, like break0 (systemd.link(5)).
    path, lines = _file_for('link', link.name, link.mac)
    for key, value in dict(_assignments(lines, 'Link')).items():
        if key == 'MACAddress' or (key, value) == ('MACAddressPolicy',
                                                   'random'):
            yield KINDS['udev-sets-mac'].finding(
                '%s matches %s and has %s=%s' % (path, link.name, key, value),
                device=link.name)
            return


def _file_for(suffix: str, name: str, mac: str) -> tuple[str, list[str]]:
    """Return the file of systemd for an interface, and the file's lines.

    systemd applies the first matching file, in the order of file names.

    :returns: empty if no file matches, or if a condition cannot be evaluated
    """
    for path in _files('network', '*.' + suffix):
        lines = list(_lines(path))
        matches = [_matches(key, value, name, mac) for key, value
                   in _assignments(lines, 'Match')]
        if lines and False not in matches:  # an empty file matches nothing
            return ('', []) if None in matches else (path, lines)
    return '', []


def _files(directory: str, pattern: str) -> list[str]:
    """Return the file of highest precedence for each file name of systemd."""
    by_name: dict[str, str] = {}
    for place in _SYSTEMD:
        for path in glob.glob(os.path.join(place, directory, pattern)):
            by_name.setdefault(os.path.basename(path), path)
    return [path for _, path in sorted(by_name.items())]


def _matches(key: str, value: str, name: str, mac: str) -> Optional[bool]:
    """Return whether an interface meets a condition; None if not known."""
    actual = {'OriginalName': name, 'Name': name, 'Kind': 'macvlan',
              'Type': 'ether', 'MACAddress': mac, 'Driver': '', 'Path': '',
              'PermanentMACAddress': ''}.get(key)
    if actual is None:
        return None
    return value.startswith('!') != any(
        fnmatch.fnmatchcase(actual, pattern)
        for pattern in value.lstrip('!').split())


def _manages_foreign_routes() -> Optional[str]:
    """Return the origin of ManageForeignRoutes=yes, such as "by default".

    With this setting, systemd-networkd deletes routes of other programs.

    :returns: None if the setting is off, or if no files of systemd-networkd
        exist here, as in a container
    """
    value, where = True, 'by default'
    files = [*_files('', 'networkd.conf'),
             *_files('networkd.conf.d', '*.conf')]
    if not files and not _files('', 'systemd-networkd'):
        return None
    for path in files:
        for key, text in _assignments(_lines(path), 'Network'):
            if key == 'ManageForeignRoutes':
                value, where = text == '' or _is_true(text), 'by ' + path
    return where if value else None


def _lines(path: str) -> Iterator[str]:
    """Yield the lines of a file, without comments; none if unreadable."""
    try:
        with open(path, errors='replace') as file:
            for line in map(str.strip, file):
                if line and line[0] not in '#;':
                    yield line
    except OSError:
        pass


def _assignments(lines: Iterable[str], section: Optional[str] = None
                 ) -> Iterator[tuple[str, str]]:
    """Yield the settings of a section, or of all sections."""
    within = ''
    for line in lines:
        key, equals, value = line.partition('=')
        if line.startswith('['):
            within = line.strip('[]')
        elif equals and section in (None, within):
            yield key.strip(), value.strip()


def _is_true(text: str) -> bool:
    return text.lower() in ('1', 'yes', 'y', 'true', 't', 'on')
