# SPDX-License-Identifier: Apache-2.0

"""The identity of a ledger, and the break0 devices that it owns.

The alias of a break0 contains the id of its ledger. The kernel keeps the alias
even if the state directory is lost or replaced.
"""

from __future__ import annotations

import dataclasses
import enum
import json
import re
import secrets
from typing import Any, NamedTuple, Optional

from kuryr_break0 import exceptions
from kuryr_break0.kernel import values
from kuryr_break0.ledger import files
from kuryr_break0 import model

_VERSION = 1
_MAX_SIZE = 2 ** 16
_ALIAS = re.compile(r'kuryr-break0 ledger ([0-9a-f]{16}) in (/.*)')


class Alias(NamedTuple):
    """The alias of a break0: the id of its ledger, and the state directory."""

    ledger: str
    directory: str

    def __str__(self) -> str:
        return ('kuryr-break0 ledger %s in %s' % self)[:255]  # IFALIASZ

    @classmethod
    def parse(cls, text: Optional[str]) -> Optional[Alias]:
        """Parse an interface's alias; None if it names no ledger."""
        match = _ALIAS.fullmatch(text or '')
        return cls(match[1], match[2]) if match else None


@dataclasses.dataclass(frozen=True)
class Identity:
    """The identity of a ledger.

    :ivar id: 16 hexadecimal digits
    :ivar secret: random text, from which the MAC addresses of the break0
        devices are computed, so that no pod can compute them
    :ivar boot: id of the boot in which the identity was created
    :ivar devices: names of the break0 devices, by parent
    :ivar macs: MAC address of each break0, by name. A deleted break0 gets the
        same address when it is created again
    :ivar claimed: ids of lost ledgers of this directory, by the name of the
        break0 that this ledger has taken over from the lost ledger
    """

    id: str = ''
    secret: str = ''
    boot: str = ''
    devices: dict[str, str] = dataclasses.field(default_factory=dict)
    macs: dict[str, str] = dataclasses.field(default_factory=dict)
    claimed: dict[str, str] = dataclasses.field(default_factory=dict)

    @classmethod
    def new(cls) -> Identity:
        return cls(secrets.token_hex(8), secrets.token_hex(16), read_boot_id())

    def alias(self, directory: str) -> Alias:
        return Alias(self.id, directory)

    def to_json(self) -> str:
        return json.dumps({'version': _VERSION, **vars(self)})

    @classmethod
    def from_json(cls, text: str) -> Identity:
        """Parse the output of :meth:`to_json`.

        :raises ValueError: if the text is damaged
        """
        try:
            fields: dict[str, Any] = json.loads(text)
            if fields.pop('version') != _VERSION:
                raise ValueError('its format has another version')
            parsed = cls(**fields)
            if not (re.fullmatch('[0-9a-f]{16}', parsed.id)
                    and re.fullmatch('[0-9a-f]{32}', parsed.secret)
                    and isinstance(parsed.boot, str)
                    and all(isinstance(text, str) for names in (
                        parsed.devices, parsed.macs, parsed.claimed)
                        for pair in names.items() for text in pair)
                    and all(map(model.MAC.fullmatch, parsed.macs.values()))):
                raise ValueError('one of its values has the wrong format')
        except (AttributeError, KeyError, TypeError, RecursionError) as err:
            raise ValueError('it is not an identity (%r)' % err)
        return parsed


class Ownership(enum.Enum):
    """The relation of an interface to the ledger in a state directory."""

    #: Its alias names this ledger.
    OURS = enum.auto()
    #: Its alias names a lost ledger, which this ledger replaces.
    LOST = enum.auto()
    #: Its alias names another ledger, which may exist.
    OTHER = enum.auto()
    #: Its alias names no ledger.
    UNMARKED = enum.auto()

    @property
    def is_foreign(self) -> bool:
        """Return whether another ledger knows the pods of the interface."""
        return self in (Ownership.LOST, Ownership.OTHER)


def ownership(link: Optional[values.Link], own: Optional[Identity],
              directory: str) -> Ownership:
    """Return the relation of an interface to a ledger.

    A ledger is lost if its directory is lost. In different mount namespaces,
    two ledgers can have the same path, and each can take the other for lost.
    So that they do not take over a break0 from each other all the time, each
    ledger takes over a break0 only once.

    :param own: the identity of the ledger; None if it was never used
    :param directory: the state directory of the ledger
    """
    alias = Alias.parse(link.alias) if link is not None else None
    if link is None or alias is None:
        return Ownership.UNMARKED
    if own is not None and alias.ledger == own.id:
        return Ownership.OURS
    if alias.directory == directory and (own is None or (
            alias.ledger in own.claimed.values()
            and link.name not in own.claimed)):
        return Ownership.LOST
    return Ownership.OTHER


def read_boot_id() -> str:
    """Return the id of this boot; an empty text if it cannot be read."""
    try:
        with open('/proc/sys/kernel/random/boot_id') as file:
            return file.read().strip()
    except OSError:
        return ''


def read(path: str) -> Optional[Identity]:
    """Read the identity of a ledger; None if the file does not exist.

    :raises ValueError: if the file is damaged
    """
    try:
        return Identity.from_json(files.read(path, _MAX_SIZE))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as err:
        if err.errno in exceptions.RESOURCE_ERRNOS:  # not damage
            raise exceptions.SystemRefused(reason=err) from err
        raise ValueError(err.strerror or str(err))
