# SPDX-License-Identifier: Apache-2.0

"""Parses and validates the request of a CNI runtime.

An invalid request raises a CNIError.
"""

from __future__ import annotations

import contextlib
import dataclasses
import ipaddress
import json
import math
import re
from typing import Any, Mapping, Optional

from kuryr_break0 import model

#: Versions of the specification, the newest last.
SUPPORTED = ('0.3.1', '0.4.0', '1.0.0', '1.1.0')
ADD, DEL, CHECK, GC, STATUS, VERSION = (
    'ADD', 'DEL', 'CHECK', 'GC', 'STATUS', 'VERSION')
#: The version of the specification that introduced a command, by command
_SINCE = {CHECK: '0.4.0', GC: '1.1.0', STATUS: '1.1.0'}
#: Error codes of the specification
UNSUPPORTED, BAD_VARIABLE, UNREADABLE, INVALID, TRY_AGAIN, UNAVAILABLE = (
    1, 4, 6, 7, 11, 50)
#: Maximum bytes of input
LIMIT = 2 ** 20

# The same patterns as in libcni (utils.ValidateContainerID,
# ValidateNetworkName).
_NAME = re.compile(r'[A-Za-z0-9][A-Za-z0-9_.\-]{0,255}')
_IFNAME = re.compile(r'(?!\.{1,2}$)[^/:\s\x00-\x1f\x7f]{1,15}')
_POD = re.compile(r'[A-Za-z0-9][A-Za-z0-9_.\-]{0,252}')


class CNIError(Exception):
    """An error for the runtime.

    :ivar code: error code: below 100, a code of the specification; from 100, a
        code of this plugin
    """

    def __init__(self, code: int, message: str) -> None:
        super().__init__(message)
        self.code = code


@dataclasses.dataclass(frozen=True)
class Request:
    """A request of a runtime.

    :ivar command: one of the commands of the specification
    :ivar version: version of the specification for the answer
    :ivar config: the network configuration
    :ivar owner: container and interface; None for GC, STATUS and VERSION
    :ivar netns: path of the container's namespace; None if it is gone
    :ivar pod: the container's name in Kubernetes or the engine
    """

    command: str
    version: str
    config: dict[str, Any]
    owner: Optional[model.Owner] = None
    netns: Optional[str] = None
    pod: Optional[str] = None

    @property
    def network(self) -> str:
        """Return the name of the network."""
        name = self.config.get('name')
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            raise CNIError(INVALID, 'The name of the network is %s: it must '
                           'consist of letters, digits, "_", "." and "-"'
                           % _short(name))
        return name

    @property
    def strict(self) -> Optional[bool]:
        """Return whether the ADD must fail if the bind fails.

        None if the option [break0] strict decides.
        """
        strict = self.config.get('strict')
        if strict is not None and not isinstance(strict, bool):
            raise CNIError(INVALID, 'strict is %s: it must be true or false'
                           % _short(strict))
        return strict

    @property
    def previous(self) -> dict[str, Any]:
        """Return the result of the previous plugin."""
        previous = self.config.get('prevResult')
        if not isinstance(previous, dict):
            raise CNIError(INVALID, 'There is no prevResult: put break0 after '
                           'macvlan in the list of plugins')
        return previous

    def _interfaces(self) -> dict[int, dict[str, Any]]:
        """Return the previous result's entries of this interface, by index."""
        assert self.owner is not None
        interfaces = _objects(self.previous, 'interfaces')
        own = {number: each for number, each in enumerate(interfaces)
               if each.get('name') == self.owner.ifname
               and each.get('sandbox')}
        if interfaces and not own:
            raise CNIError(INVALID, 'prevResult has no interface %s in a '
                           'sandbox' % self.owner.ifname)
        return own

    def addresses(self) -> list[model.IPInterface]:
        """Return this interface's addresses with their prefix lengths."""
        own = self._interfaces()
        return [_address(each.get('address'))
                for each in _objects(self.previous, 'ips')
                if each.get('interface') in (None, *own)]

    @property
    def mac(self) -> Optional[str]:
        """Return this interface's MAC address, or None."""
        with contextlib.suppress(CNIError):
            for each in self._interfaces().values():
                if isinstance(each.get('mac'), str):
                    return str(each['mac']).lower()
        return None

    def attachments(self) -> Optional[set[model.Owner]]:
        """Return the valid attachments; None if the list is null."""
        key = 'cni.dev/valid-attachments'
        if key not in self.config:
            raise CNIError(INVALID, 'There is no %s, so no attachment is '
                           'known to be invalid' % key)
        if self.config[key] is None:
            return None
        attachments = set()
        for each in _objects(self.config, key):
            fields = each.get('containerID'), each.get('ifname')
            if not all(isinstance(field, str) and field for field in fields):
                raise CNIError(INVALID, '%s has an entry without containerID '
                               'and ifname' % key)
            attachments.add(model.Owner(*map(str, fields)))
        return attachments


def parse(environment: Mapping[str, str], data: bytes) -> Request:
    """Parse a request."""
    command = environment.get('CNI_COMMAND', '')
    if command not in (ADD, DEL, CHECK, GC, STATUS, VERSION):
        raise CNIError(BAD_VARIABLE, 'CNI_COMMAND is %s: it must be ADD, DEL, '
                       'CHECK, GC, STATUS or VERSION'
                       % _short(command) if command
                       else 'CNI_COMMAND is not set')
    owner, netns, pod = _container(command, environment)
    if command == VERSION and not data.strip():
        return Request(command, SUPPORTED[-1], {})
    config = _config(data)
    version = config.get('cniVersion', '0.1.0')
    if not isinstance(version, str):
        raise CNIError(UNREADABLE, 'cniVersion is %s: it must be a string'
                       % _short(version))
    if command == VERSION:
        return Request(command, version, config)
    if version not in SUPPORTED:
        raise CNIError(UNSUPPORTED, 'cniVersion is %s: it must be one of %s'
                       % (_short(version), ', '.join(SUPPORTED)))
    since = _SINCE.get(command, SUPPORTED[0])
    if SUPPORTED.index(version) < SUPPORTED.index(since):
        raise CNIError(UNSUPPORTED, '%s needs cniVersion %s, but the network '
                       'has %s' % (command, since, version))
    request = Request(command, version, config, owner, netns, pod)
    request.network, request.strict  # raise a CNIError if invalid
    return request


def version_of(data: bytes) -> str:
    """Return the version of the specification for an answer with an error."""
    try:
        version = _config(data).get('cniVersion')
    except CNIError:
        version = None
    return version if version in SUPPORTED else SUPPORTED[-1]


def _container(command: str, environment: Mapping[str, str]
               ) -> tuple[Optional[model.Owner], Optional[str], Optional[str]]:
    if command == VERSION:
        return None, None, None
    _variable(environment, 'CNI_PATH')
    if command in (GC, STATUS):
        return None, None, None
    container_id = _variable(environment, 'CNI_CONTAINERID')
    if not _NAME.fullmatch(container_id):
        raise CNIError(BAD_VARIABLE, 'CNI_CONTAINERID is %s: it must '
                       'consist of letters, digits, "_", "." and "-"'
                       % _short(container_id))
    ifname = _variable(environment, 'CNI_IFNAME')
    if not _IFNAME.fullmatch(ifname) or len(ifname.encode()) > 15:
        raise CNIError(BAD_VARIABLE, 'CNI_IFNAME is %s: it must be a valid '
                       'name of an interface' % _short(ifname))
    netns = environment.get('CNI_NETNS') or None
    if netns is None and command != DEL:
        raise CNIError(BAD_VARIABLE, 'CNI_NETNS is not set')
    if netns is not None and (not netns.startswith('/') or len(netns) > 512
                              or not netns.isprintable()):
        raise CNIError(BAD_VARIABLE, 'CNI_NETNS is %s: it must be an absolute '
                       'path' % _short(netns))
    return model.Owner(container_id, ifname), netns, _pod(environment)


def _variable(environment: Mapping[str, str], name: str) -> str:
    value = environment.get(name)
    if not value:
        raise CNIError(BAD_VARIABLE, '%s is not set' % name)
    return value


def _pod(environment: Mapping[str, str]) -> Optional[str]:
    arguments = {}
    for pair in filter(None, environment.get('CNI_ARGS', '').split(';')):
        name, equals, value = pair.partition('=')
        if not equals:
            raise CNIError(BAD_VARIABLE, 'CNI_ARGS has %s: it must be '
                           'NAME=VALUE' % _short(pair))
        arguments[name] = value
    namespace, name = (arguments.get('K8S_POD_NAMESPACE', ''),
                       arguments.get('K8S_POD_NAME', ''))
    # Podman passes the container's name as namespace and as name.
    parts = [name] if namespace in ('', name) else [namespace, name]
    # The name is for messages only.
    return '/'.join(parts) if all(map(_POD.fullmatch, parts)) else None


def _config(data: bytes) -> dict[str, Any]:
    if len(data) > LIMIT:
        raise CNIError(UNREADABLE, 'The input has more than 1 MiB')
    if not data.strip():
        raise CNIError(UNREADABLE, 'The input is empty: it must be a network '
                       'configuration in JSON')
    try:
        config = json.loads(data, parse_constant=_refuse, parse_float=_finite)
    except (ValueError, RecursionError) as err:
        raise CNIError(UNREADABLE, 'The input is not JSON: %s' % err) from err
    if not isinstance(config, dict):
        raise CNIError(UNREADABLE, 'The input is not a JSON object')
    return config


def _refuse(constant: str) -> float:
    raise ValueError('it contains %s' % constant)


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError('it contains a number that is out of range')
    return value


def _objects(of: dict[str, Any], key: str) -> list[dict[str, Any]]:
    value = of.get(key)
    if value is None:
        return []
    if not isinstance(value, list) or not all(isinstance(each, dict)
                                              for each in value):
        raise CNIError(INVALID, '%s must be a list of objects' % key)
    return value


def _address(text: Any) -> model.IPInterface:
    if isinstance(text, str) and '/' in text:
        with contextlib.suppress(ValueError):
            return ipaddress.ip_interface(text)
    raise CNIError(INVALID, 'prevResult has the address %s: it must be an '
                   'address with a prefix length' % _short(text))


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + '...'
