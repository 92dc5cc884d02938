# SPDX-License-Identifier: Apache-2.0

"""The types of options and arguments.

The functions parse a text. They raise a ValueError that contains the text and
the allowed values.
"""

from __future__ import annotations

import contextlib
import ipaddress
import re
from typing import Any, Callable, NamedTuple, Optional

from oslo_config import types

from kuryr_break0 import model

#: The kernel limits a name to IFNAMSIZ, 16 bytes with the final NUL.
#: dev_valid_name() refuses ``/``, ``:`` and white space, and the kernel
#: replaces ``%d`` by a number. An interface named ``all`` or ``default`` gets
#: no sysctls of its own (sysctl_dev_name_is_allowed).
_DEVICE_NAME = r'(?!(?:\.{1,2}|all|default)$)[^/:%\s\x00-\x1f\x7f]{1,15}'


class Endpoint(NamedTuple):
    """An IP address and a TCP port."""

    address: model.IPAddress
    port: int

    def __str__(self) -> str:
        form = '[%s]:%d' if self.address.version == 6 else '%s:%d'
        return form % self


def device_name(text: str) -> str:
    """Return the text, if it is a valid name of a network interface."""
    if (not re.fullmatch(_DEVICE_NAME, text)
            or len(text.encode('utf-8', 'surrogateescape')) > 15):
        raise ValueError('%r is not an interface name: it must have 1 to 15 '
                         'characters, without white space, "/", ":" and '
                         '"%%", and must not be "all" or "default"' % text)
    return text


def host_address(text: str) -> model.IPAddress:
    """Return the address of a single host, with or without /32 or /128."""
    try:
        interface = ipaddress.ip_interface(text)
    except ValueError:
        raise ValueError('%r is not an IPv4 or IPv6 address' % text)
    if interface.network.num_addresses != 1:
        # A shorter prefix would add an on-link route for the whole network.
        raise ValueError('%r is a network: it must be a single address, such '
                         'as %s' % (text, interface.ip))
    reason = model.explain_non_host(interface.ip)
    if reason:
        raise ValueError('%r is %s: it must be the address of a single host'
                         % (text, reason))
    return interface.ip


def network(text: str) -> model.IPNetwork:
    """Return a network in CIDR notation, without host bits."""
    try:
        return ipaddress.ip_network(text)
    except ValueError as err:
        raise ValueError('%r is not a network: %s; it must be like '
                         '10.0.0.0/16 or fd00::/64' % (text, err))


def unicast_mac(text: str) -> str:
    """Return the MAC address of a single interface, in lower case."""
    if not re.fullmatch(r'([0-9A-Fa-f]{2}:){5}[0-9A-Fa-f]{2}', text):
        raise ValueError('%r is not a MAC address: it must be six hexadecimal '
                         'octets separated by colons' % text)
    if int(text[:2], 16) & 1 or not text.strip('0:'):
        raise ValueError('%r is not the address of one interface: it must be '
                         'a unicast MAC address' % text)
    return text.lower()


def listening_on(text: str) -> Optional[Endpoint]:
    """Return an endpoint to listen on; None for an empty text."""
    if not text:
        return None
    # Host names are refused: listening must not depend on a resolver.
    match = re.fullmatch(r'(?:\[([^]]*:[^]]*)\]|([^][:]*)):(\d{1,5})', text)
    try:
        if match is None or not 0 < int(match[3]) < 65536:
            raise ValueError
        return Endpoint(ipaddress.ip_address(match[1] or match[2]),
                        int(match[3]))
    except ValueError:
        raise ValueError('%r is not an IP address and a port: it must be like '
                         '127.0.0.1:9817 or [::1]:9817, or empty' % text)


def absolute_path(text: str) -> str:
    """Return the text, if it is an absolute path."""
    if not re.fullmatch(r'/[^\x00-\x1f\x7f]*', text):
        raise ValueError('%r is not an absolute path' % text)
    return text


class Checked(types.ConfigType):
    """An option type with a parsing function.

    :param type_name: name of the type in the sample configuration
    :param parse: the parsing function
    """

    def __init__(self, type_name: str, parse: Callable[[str], Any]) -> None:
        super().__init__(type_name=type_name)
        self._parse = parse

    def __call__(self, value: Any) -> Any:
        # oslo.config passes a default too, which can be a parsed value.
        return self._parse(value) if isinstance(value, str) else value

    def __repr__(self) -> str:
        return self.type_name

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Checked) and other._parse is self._parse

    __hash__ = None  # type: ignore[assignment]

    def _formatter(self, value: Any) -> str:
        return str(value)


class WholeNumber(types.Integer):
    """A whole number in a range; its error contains value and range."""

    def __call__(self, value: Any) -> Any:
        number = None  # oslo.config returns None for an empty text too
        with contextlib.suppress(ValueError):
            number = super().__call__(value)
        if number is None:
            raise ValueError('%r is not a whole number from %s to %s' %
                             (value, self.min, self.max))
        return number


class YesOrNo(types.Boolean):
    """A boolean; its error contains the value and the allowed values."""

    def __call__(self, value: Any) -> Any:
        try:
            return super().__call__(value)
        except ValueError:
            raise ValueError('%r must be true or false' % value)


class OneOf(types.String):
    """One of several words; its error contains the value and the words."""

    def __call__(self, value: Any) -> Any:
        try:
            return super().__call__(value)
        except ValueError:
            words = self.choices or ()
            raise ValueError('%r must be %s or %s' % (
                value, ', '.join(list(words)[:-1]), list(words)[-1]))


DEVICE_NAME = Checked('interface name', device_name)
HOST_ADDRESS = Checked('host address', host_address)
NETWORK = Checked('network in CIDR notation', network)
LISTENING_ON = Checked('address and port', listening_on)
ABSOLUTE_PATH = Checked('absolute path', absolute_path)
