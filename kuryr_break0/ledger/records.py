# SPDX-License-Identifier: Apache-2.0

"""The owners of addresses: one small file for each address.

A file contains the claims of all sandboxes on the address, the newest first.
rename(2) replaces the file, so the file is complete even if its writer is
killed.

The methods raise LedgerUnavailable if a file cannot be read or written.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import ipaddress
import json
import os
import struct
from typing import Any, Callable, Iterable, Iterator, Optional, Sequence
from typing import TypeVar

from kuryr_break0 import exceptions
from kuryr_break0.kernel import existence
from kuryr_break0.kernel import node
from kuryr_break0.ledger import files
from kuryr_break0 import log
from kuryr_break0 import model

LOG = log.get_logger(__name__)

_T = TypeVar('_T')
_Namer = Callable[[str, Optional[int]], str]

VERSION = 2
SUFFIX = '.json'
_MAX_SIZE = 2 ** 16  # bytes; a usual record has a hundredth of this size
#: Maximum claims of an address, and maximum networks and sibling MAC addresses
#: of a claim.
MAX_CLAIMS = 8
MAX_SUBNETS = 16
MAX_SIBLINGS = 8

_ORIGINS: dict[Any, model.Origin] = {each.value: each for each in model.Origin}

_network = functools.lru_cache(maxsize=128)(ipaddress.ip_network)


class NewerVersion(Exception):
    """A later version of this program has written the record."""


def to_json(claims: Sequence[model.Record]) -> str:
    """Return the text of a record: its claims, the newest first."""
    return json.dumps({
        'version': VERSION, 'address': str(claims[0].address),
        'claims': [{
            'owner': vars(claim.owner), 'parent': claim.parent,
            'mac': claim.mac,
            'subnets': list(map(str, claim.subnets[:MAX_SUBNETS])),
            'netns': claim.netns, 'namespace': claim.namespace,
            'pod': claim.pod, 'configured': claim.configured,
            'bound_at': claim.bound_at,
            'siblings': claim.siblings[:MAX_SIBLINGS],
            'origin': claim.origin and claim.origin.value,
            'network': claim.network, 'parent_index': claim.parent_index,
            'tap': claim.tap}
            for claim in claims[:MAX_CLAIMS]]})


def from_json(text: str) -> tuple[model.Record, ...]:
    """Parse the output of :func:`to_json`.

    :raises NewerVersion: if a later version has written it
    :raises ValueError: if it is damaged
    """
    try:
        fields = json.loads(text)
        version = fields['version']
        if isinstance(version, int) and version > VERSION:
            raise NewerVersion('its format is version %d, but this program '
                               'reads only version %d' % (version, VERSION))
        if version != VERSION:
            raise ValueError('its format is version %r' % version)
        address = model.address_from_text(_text(fields['address']))
        claims = fields['claims']
        if not claims:
            raise ValueError('it has no claims')
        return tuple(_claim(address, claim) for claim in claims[:MAX_CLAIMS])
    except (AttributeError, KeyError, TypeError, RecursionError,
            OverflowError) as err:
        raise ValueError('it is not a record (%r)' % err)


def _claim(address: model.IPAddress, fields: dict[str, Any]) -> model.Record:
    if isinstance(fields['subnets'], str):
        raise ValueError('its subnets are a text, not a list')
    index = _optional(_number, fields.get('parent_index'))
    return model.Record(
        address, model.Owner(**{name: _text(text) for name, text
                                in fields['owner'].items()}),
        _text(fields['parent']),
        _optional(_mac, fields['mac']),
        tuple(map(_network, map(_text, fields['subnets'][:MAX_SUBNETS]))),
        _optional(_text, fields['netns']),
        _optional(_namespace, fields['namespace']),
        _optional(_text, fields['pod']),
        _optional(_text, fields['configured']), _seconds(fields['bound_at']),
        tuple(map(_mac, fields.get('siblings', ()))),
        # If only a later version defines the origin, the origin is unknown.
        _ORIGINS.get(fields.get('origin')),
        _optional(_text, fields.get('network')), index,
        _optional(_tap, fields.get('tap')))


def _optional(read: Callable[[Any], _T], value: Any) -> Optional[_T]:
    return None if value is None else read(value)


def _tap(value: Any) -> model.Tap:
    namespace, mac = value
    return model.Tap(_namespace(namespace), _mac(mac))


def _namespace(value: Any) -> model.NamespaceId:
    device, inode, cookie = value
    return model.NamespaceId(_number(device), _number(inode),
                             _optional(_number, cookie))


def _number(value: Any) -> int:
    if not isinstance(value, int) or not 0 <= value < 2 ** 64:
        raise ValueError('%r is not an unsigned number of 64 bits' % (value,))
    return value


def _seconds(value: Any) -> float:
    if not isinstance(value, (int, float)) or not 0 <= value < 2 ** 63:
        raise ValueError('%r is not a time since the boot' % (value,))
    return float(value)


def _mac(value: Any) -> str:
    if not isinstance(value, str) or not model.MAC.fullmatch(value):
        raise ValueError('%r is not a MAC address' % (value,))
    return value


def _text(value: Any) -> str:
    if not isinstance(value, str) or not model.NAME.fullmatch(value):
        raise ValueError('%r is not a text of one line' % (value,))
    return value


class Records:
    """The records in a directory.

    :param directory: directory of the records; the ledger creates it
    :param quarantine: directory for unreadable records
    """

    def __init__(self, directory: str, quarantine: str) -> None:
        self.directory = directory
        self.quarantine = quarantine
        #: by address, the stamp of the file that was read, and its claims
        self.parsed_files: dict[model.IPAddress, tuple[
            Optional[files.Stamp], tuple[model.Record, ...]]] = {}

    def claims(self, address: model.IPAddress) -> tuple[model.Record, ...]:
        """Return the claims on an address, the newest first.

        If the record is damaged, this method moves the file to quarantine,
        logs a warning, and returns no claims.

        :raises RecordNewer: if a later version has written the record
        """
        try:
            with self._convert_errors(), contextlib.suppress(
                    FileNotFoundError, NotADirectoryError):
                return self.parse(address)
        except ValueError as err:
            self._quarantine(self.path(address), err)
        except NewerVersion as err:
            raise exceptions.RecordNewer(
                address=address, path=os.path.dirname(self.directory),
                reason=err) from err
        return ()

    def get(self, address: model.IPAddress) -> Optional[model.Record]:
        """Return the newest claim on an address, or None."""
        return next(iter(self.claims(address)), None)

    def update_newest(self, expected: model.Record,
                      **fields: Any) -> tuple[model.Record, ...]:
        """Change fields of the newest claim on an address.

        If the newest claim is no longer ``expected``, this method changes
        nothing. The caller must hold the lock of the ledger.

        :param expected: the newest claim when the caller read the record
        :returns: the claims on the address before the change
        :raises LedgerUnavailable: if the record cannot be read or written
        """
        claims = self.claims(expected.address)
        if claims[:1] == (expected,):
            self.put([dataclasses.replace(expected, **fields), *claims[1:]])
        return claims

    def find_containing(self, *texts: str
                        ) -> Iterator[tuple[model.Record, ...]]:
        """Find the records in which a string begins with one of the texts.

        This method parses only files that contain such a string, because
        parsing takes ten times as long as reading. It skips unreadable
        records, unless this process lacks descriptors or memory.

        :param texts: for example, a container id
        :raises LedgerUnavailable: if the directory cannot be read, or this
            process lacks descriptors or memory
        """
        quoted = [json.dumps(text)[:-1] for text in texts]
        for name in self.names(self.directory):
            try:
                address = address_of(name)
                with self._convert_errors():
                    content = files.read(self.path(address), _MAX_SIZE)
                if not any(text in content for text in quoted):
                    continue
                claims = self.claims(address)
            except ValueError:
                continue  # the record is damaged, so its owner is unknown
            except exceptions.LedgerUnavailable as err:
                if getattr(err.__cause__, 'errno',
                           0) in exceptions.RESOURCE_ERRNOS:
                    raise
                continue
            if claims:
                yield claims

    def exists(self, address: model.IPAddress) -> bool:
        """Return whether an address has a record, even an unreadable one."""
        return os.path.lexists(self.path(address))

    def parse(self, address: model.IPAddress,
              current_name: Optional[_Namer] = None
              ) -> tuple[model.Record, ...]:
        """Return the claims of a file; parse the file only if it is new.

        The file is new if its stamp differs from the stamp at the last parse.
        To compare the stamps takes a tenth of the time of parsing.
        The present name of the parent replaces the recorded name.

        :param current_name: function to call instead of
            :func:`node.find_current_name`, such as a cached function
        :raises ValueError: if the file is damaged
        :raises NewerVersion: if a later version has written the file
        :raises OSError: if the file does not exist or cannot be read
        """
        path = self.path(address)
        current = current_name or node.find_current_name
        stamp, claims = self.parsed_files.get(address, (None, ()))
        if stamp is None or stamp != files.stamp(path):
            text, stamp = files.read_stamped(path, _MAX_SIZE)
            claims = from_json(text)
            if claims[0].address != address:
                raise ValueError('it contains the address %s' %
                                 claims[0].address)
        names = [current(claim.parent, claim.parent_index)
                 for claim in claims]
        if names != [claim.parent for claim in claims]:
            claims = tuple(dataclasses.replace(claim, parent=name)
                           for claim, name in zip(claims, names))
        self.parsed_files[address] = stamp, claims
        return claims

    def put(self, claims: Sequence[model.Record]) -> None:
        """Replace the record of an address.

        :param claims: the claims on the address, the newest first
        :raises LedgerUnavailable: if the record cannot be written; then the
            old record remains
        """
        with self._convert_errors():
            files.replace(self.path(claims[0].address), to_json(claims))

    def remove(self, address: model.IPAddress) -> None:
        """Delete the record of an address; do nothing if there is none."""
        with self._convert_errors(), contextlib.suppress(FileNotFoundError,
                                                         NotADirectoryError):
            os.unlink(self.path(address))

    def may_be_gone(self, address: model.IPAddress,
                    judge: existence.Judge) -> bool:
        """Return whether a sandbox with a claim on an address may be gone.

        This method takes a third of the time of :meth:`claims`, because it
        parses no addresses and networks.

        :returns: False if the address has no record; True if the record is
            damaged
        """
        try:
            fields = json.loads(files.read(self.path(address), _MAX_SIZE))
            return any(judge.judge(
                claim['netns'], _optional(_namespace, claim['namespace']),
                _optional(_tap, claim.get('tap'))
            ).state is existence.State.GONE for claim in fields['claims'])
        except (FileNotFoundError, NotADirectoryError):
            return False
        except (OSError, ValueError, KeyError, TypeError, RecursionError,
                OverflowError, AttributeError, struct.error):
            return True  # the record is damaged

    def addresses(self) -> list[model.IPAddress]:
        """List the addresses with a record, sorted."""
        return sorted(self._parse_names(self.names(self.directory)),
                      key=model.address_order)

    def count(self) -> int:
        """Count the records, in a tenth of the time of :meth:`addresses`."""
        return len(self.names(self.directory))

    def list_part(self, position: int,
                  most: int) -> tuple[list[model.IPAddress], int]:
        """List a part of the addresses with a record, and count all of them.

        The addresses are in the order of their file names. If the part reaches
        the last address, it continues with the first address.

        :param position: position of the first address to list, modulo the
            number of addresses
        :param most: maximum addresses to list
        """
        names = sorted(self.names(self.directory))
        count = len(names)
        if count > most:
            start = position % count
            names = (names + names)[start:start + most]
        return self._parse_names(names), count

    def delete_unfinished(self) -> None:
        """Delete the temporary files of killed writers.

        The caller must hold the lock.
        """
        for directory in (self.directory, os.path.dirname(self.directory)):
            with contextlib.suppress(OSError):
                for name in os.listdir(directory):
                    if name.startswith(files.UNFINISHED):
                        os.unlink(os.path.join(directory, name))

    def _parse_names(self, names: Iterable[str]) -> list[model.IPAddress]:
        addresses = []
        for name in names:
            try:
                addresses.append(address_of(name))
            except ValueError as err:
                self._quarantine(os.path.join(self.directory, name), err)
        return addresses

    def names(self, directory: str) -> list[str]:
        """List the names of the records in a directory."""
        with self._convert_errors(), contextlib.suppress(FileNotFoundError):
            return [name for name in os.listdir(directory)
                    if name.endswith(SUFFIX)
                    and not name.startswith(files.UNFINISHED)]
        return []

    def _quarantine(self, path: str, reason: ValueError) -> None:
        moved = os.path.join(self.quarantine, os.path.basename(path))
        try:
            os.makedirs(self.quarantine, mode=0o700, exist_ok=True)
            os.replace(path, moved)
        except OSError as err:
            LOG.error('Cannot move the damaged record %s to quarantine: %s. '
                      'Delete it, then run: kuryr-break0 sync', path, err)
        else:
            LOG.warning('Moved the damaged record %s to %s: %s. To rebuild '
                        'it, run: kuryr-break0 sync', path, moved, reason)

    def path(self, address: model.IPAddress) -> str:
        return '%s/%s%s' % (self.directory, address, SUFFIX)

    def _convert_errors(self) -> contextlib.AbstractContextManager[None]:
        return files.convert_errors(os.path.dirname(self.directory))


@functools.lru_cache(maxsize=model.CACHE_SIZE)
def address_of(name: str) -> model.IPAddress:
    """Return the address in the name of a record's file.

    :raises ValueError: if the name contains no address, or an address that is
        not in the notation of :mod:`ipaddress`
    """
    address = model.address_from_text(name[:-len(SUFFIX)])
    if str(address) + SUFFIX != name or getattr(address, 'scope_id', None):
        raise ValueError('its name must be the address %s' % address)
    return address
