# SPDX-License-Identifier: Apache-2.0

"""The ledger records which sandbox owns which address, until the next boot.

kuryr-daemon serves each request in a new process and may be restarted at any
time, so the records are files in the state directory. The files can be lost or
outdated; see :mod:`kuryr_break0.engine.reconciler`.

The methods raise LedgerUnavailable if a file cannot be read or written.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import functools
import logging
import os
import stat
from typing import Callable, Iterable, Iterator, Optional, TypeVar

from kuryr_break0 import config
from kuryr_break0 import exceptions
from kuryr_break0.kernel import node
from kuryr_break0.ledger.cache import Cache
from kuryr_break0.ledger import files
from kuryr_break0.ledger.heartbeat import Heartbeat
from kuryr_break0.ledger import identity
from kuryr_break0.ledger.identity import Identity
from kuryr_break0.ledger.journal import Journal
from kuryr_break0.ledger import lock
from kuryr_break0.ledger.records import address_of
from kuryr_break0.ledger.records import NewerVersion
from kuryr_break0.ledger.records import Records
from kuryr_break0 import log
from kuryr_break0.model import address_order
from kuryr_break0.model import IPAddress
from kuryr_break0.model import Owner
from kuryr_break0.model import Record

LOG = log.get_logger(__name__)

__all__ = ('Contents', 'Ledger', 'Owner', 'Record')

T = TypeVar('T')

#: Attempts to read the ledger, if it changes during each read.
_RETRIES = 5
#: Files in the state directory, except those that end with .json.
_FILES = ('cni.sock', 'heartbeat', 'identity', 'journal', 'lock')
#: Directories that a state directory without records may contain.
_FOREIGN_DIRECTORIES = ('quarantine', 'lost+found')
#: Subdirectory of the quarantine for records of earlier boots.
_EARLIER_BOOT = 'earlier-boot'
#: Maximum next hops to record, including next hops of deleted routes.
MAX_NEXT_HOPS = 1024
#: Maximum number of recorded DELs. A sync deletes the earlier DELs.
MAX_ENDED = 256


@dataclasses.dataclass(frozen=True)
class Contents:
    """The contents of a state directory.

    :ivar claims: the claims by address. The dictionary is in the order of the
        addresses, and the newest claim on an address is the first
    :ivar damaged: the reason for each damaged record, by path
    :ivar newer: a description of each record of a later version, by path
    :ivar quarantined: the paths of the records in quarantine
    :ivar unreadable: the addresses of the damaged, newer and quarantined
        records
    """

    claims: dict[IPAddress, tuple[Record, ...]]
    damaged: dict[str, str]
    newer: dict[str, str]
    quarantined: tuple[str, ...]
    unreadable: frozenset[IPAddress]

    def is_still(self, records: Records, address: IPAddress) -> bool:
        """Return whether the claims on an address are unchanged."""
        claims = self.claims.get(address, ())
        stamp = files.stamp(records.path(address))  # decides most cases
        try:
            return records.parsed_files.get(address) == (stamp, claims) or (
                records.claims(address) == claims)
        except exceptions.RecordNewer:
            return address in self.unreadable


class Ledger:
    """A state directory.

    :param path: the directory; it is created at the first use
    :param lock_timeout: seconds that :meth:`lock` waits
    :ivar is_locked: whether this object holds the lock
    :ivar records: the owners of addresses
    :ivar cache: values that are expensive to read from the kernel
    :ivar journal: counts of operations, for the metrics
    :ivar heartbeat: the agent's sign of life
    """

    def __init__(self, path: str,
                 lock_timeout: float = config.LOCK_TIMEOUT) -> None:
        self.path = path
        self.records = Records(os.path.join(path, 'addresses'),
                               os.path.join(path, 'quarantine'))
        self.cache = Cache(path)
        self.journal = Journal(path)
        self.heartbeat = Heartbeat(os.path.join(path, 'heartbeat'))
        self.lock_path = os.path.join(path, 'lock')
        self.is_locked = False
        self._lock_timeout = lock_timeout
        self._identity_path = os.path.join(path, 'identity')

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the ledger's lock within the block.

        :raises LockTimeout: if another process or thread has held the lock for
            the whole ``lock_timeout``
        """
        self.prepare()
        with contextlib.ExitStack() as stack:
            with self._convert_errors():
                stack.enter_context(lock.hold(self.lock_path,
                                              self._lock_timeout))
            self.is_locked = True
            try:
                yield
            finally:
                self.is_locked = False

    def is_free_within(self, seconds: float) -> bool:
        """Wait until the lock is free; see :func:`lock.is_free_within`."""
        with self._convert_errors():
            return lock.is_free_within(self.lock_path, seconds)

    def inspect(self, read_other: Callable[[], T], patience: float
                ) -> tuple[Contents, T, bool]:
        """Read all records, and other values that must match them.

        The method changes nothing. Between the two reads, it waits until the
        lock is free, because the holder may be in the middle of an operation.
        If a record was added, replaced or removed meanwhile, it repeats both
        reads, with at most _RETRIES attempts.

        :param read_other: reads the other values
        :param patience: seconds to wait for the lock
        :returns: the contents, the other values, and whether the records did
            not change between the two reads
        """
        directory = self.records.directory
        with self._convert_errors():
            for _ in range(_RETRIES):
                before = files.stamp(directory)
                contents = self.contents()
                is_free = lock.is_free_within(self.lock_path, patience)
                other = read_other()
                is_steady = is_free and before == files.stamp(directory)
                if is_steady or not is_free:
                    break
        return contents, other, is_steady

    def contents(self) -> Contents:
        """Read all records without moving damaged ones to quarantine."""
        read: list[tuple[IPAddress, tuple[Record, ...]]] = []
        unreadable: set[IPAddress] = set()
        damaged, newer, quarantined = {}, {}, []
        current_name = functools.lru_cache(node.find_current_name)
        for name in self.records.names(self.records.directory):
            path = '%s/%s' % (self.records.directory, name)
            addresses: tuple[IPAddress, ...] = ()  # if the name is invalid
            try:
                address = address_of(name)
                addresses = (address,)
                read.append((address, self.records.parse(address,
                                                         current_name)))
            except (FileNotFoundError, NotADirectoryError):
                pass  # unbound meanwhile
            except NewerVersion as err:
                newer[path] = str(err)
                unreadable.update(addresses)
            except (ValueError, OSError) as err:
                damaged[path] = str(err)
                unreadable.update(addresses)
        claims = dict(sorted(read, key=lambda each: address_order(each[0])))
        parsed = self.records.parsed_files
        if len(parsed) > len(claims):
            self.records.parsed_files = {
                address: parsed[address]
                for address in claims if address in parsed}
        for name in self.records.names(self.records.quarantine):
            quarantined.append(os.path.join(self.records.quarantine, name))
            with contextlib.suppress(ValueError):
                unreadable.add(address_of(name))
        return Contents(
            claims, damaged, newer, tuple(sorted(quarantined)),
            frozenset(unreadable - claims.keys()))

    def identity(self) -> Optional[Identity]:
        """Return the identity of the ledger; None before its first use."""
        try:
            return identity.read(self._identity_path)
        except ValueError as err:
            raise exceptions.LedgerUnavailable(
                path=self.path, reason='%s: %s' % (self._identity_path, err)
            ) from err

    def ensure_identity(self) -> Identity:
        """Return the identity of the ledger; create it if it is missing.

        A new identity also replaces a damaged identity and the identity of an
        earlier boot. The caller must hold the lock.
        """
        try:
            current = identity.read(self._identity_path)
        except ValueError as err:
            LOG.error('The identity of the ledger in %s is damaged: %s. '
                      'Created a new one; if pods lose their routes, run: '
                      'kuryr-break0 sync --claim', self.path, err)
            current = None
        boot = identity.read_boot_id()
        if current is not None and boot and current.boot not in ('', boot):
            # At each boot, the kernel numbers namespaces from the start again,
            # so records of an earlier boot can match namespaces of this boot.
            LOG.warning('The state directory %s has records of an earlier '
                        'boot; their pods no longer exist. Moved them to '
                        'quarantine. Use a directory on a tmpfs: see [break0] '
                        'state_dir', self.path)
            self._quarantine_all()
            current = None
        if current is None:
            current = Identity.new()
            self.put_identity(current)
        return current

    def put_identity(self, current: Identity) -> None:
        """Write the identity of the ledger."""
        with self._convert_errors():
            files.replace(self._identity_path, current.to_json())

    def _quarantine_all(self) -> None:
        target = os.path.join(self.records.quarantine, _EARLIER_BOOT)
        with self._convert_errors():
            os.makedirs(target, mode=0o700, exist_ok=True)
            for name in os.listdir(self.records.directory):
                os.replace(os.path.join(self.records.directory, name),
                           os.path.join(target, name))

    def list_recent_next_hops(self) -> list[str]:
        """Return the last MAX_NEXT_HOPS next hops of the node in this boot."""
        boot, *addresses = self.cache.get('next_hops_seen') or ['']
        return addresses if boot == identity.read_boot_id() else []

    def add_next_hops(self, next_hops: Iterable[IPAddress]) -> None:
        """Add next hops to :meth:`list_recent_next_hops`."""
        recent = self.list_recent_next_hops()
        new = {str(each) for each in next_hops
               if not each.is_link_local}.difference(recent)
        if new:
            self.cache.put('next_hops_seen', [
                identity.read_boot_id(),
                *[*recent, *sorted(new)][-MAX_NEXT_HOPS:]])

    def list_ended(self) -> dict[Owner, float]:
        """Return the owners of the recent DELs, with the times of the DELs.

        The ledger keeps the last DEL of each owner, and at most the last
        MAX_ENDED DELs of all owners. A DEL names only the addresses of the
        last ADD, so claims of an earlier ADD remain until the next sync drops
        the claims of these owners.
        """
        ended = {}
        for each in self.cache.get('ended') or ():
            with contextlib.suppress(TypeError, ValueError):
                container_id, ifname, when = each
                ended[Owner(str(container_id), str(ifname))] = float(when)
        return ended

    def add_end(self, owner: Owner, when: float) -> None:
        """Add a DEL to :meth:`list_ended`. The caller must hold the lock."""
        ended = self.list_ended()
        ended.pop(owner, None)  # the new DEL must be the last item
        self._put_ended({**ended, owner: when})

    def delete_ends(self, before: float) -> None:
        """Delete DELs before a time. The caller must hold the lock."""
        ended = self.list_ended()
        kept = {owner: when for owner, when in ended.items()
                if when >= before}
        if kept != ended:
            self._put_ended(kept)

    def _put_ended(self, ended: dict[Owner, float]) -> None:
        self.cache.put('ended', [[*vars(owner).values(), when] for owner, when
                                 in list(ended.items())[-MAX_ENDED:]])

    def exists(self) -> bool:
        """Return whether the state directory exists and is not empty."""
        try:
            return bool(os.listdir(self.path))
        except OSError:
            return os.path.isdir(self.path)

    def list_foreign_files(self) -> list[str]:
        """Return the names of files that other programs have created.

        For example, if the directory is /run, the caller must refuse the
        directory. A change of its mode or the deletion of files would break
        other programs.
        """
        return sorted(name for name in os.listdir(self.path) if not (
            name in _FOREIGN_DIRECTORIES or _is_own_file(name)))

    def clear(self) -> None:
        """Delete this package's files, and the directory if it is empty.

        If the directory is a mount point, as in a container, it remains. The
        caller must hold the lock. The file of the lock is deleted too.
        """
        quarantine = self.records.quarantine
        try:
            for directory in (
                    self.records.directory, os.path.join(
                        quarantine, _EARLIER_BOOT), quarantine, self.path):
                with contextlib.suppress(FileNotFoundError):
                    for name in os.listdir(directory):
                        if _is_own_file(name):
                            os.unlink(os.path.join(directory, name))
                    os.rmdir(directory)
        except OSError as err:
            # The directory has foreign files, or is a mount point or a link.
            # For a mount point in a read-only directory, rmdir(2) fails with
            # EROFS.
            is_mounted = (err.errno == errno.EROFS
                          and err.filename == self.path)
            if not is_mounted and err.errno not in (
                    errno.ENOTEMPTY, errno.EBUSY, errno.ENOTDIR):
                raise exceptions.LedgerUnavailable(path=self.path,
                                                   reason=err) from err

    def prepare(self) -> None:
        """Create the directory, and deny other users access to it."""
        with self._convert_errors():
            if not os.path.isdir(self.path):
                os.makedirs(self.path, mode=0o700, exist_ok=True)
            status = os.stat(self.path)
            if status.st_uid != os.geteuid():
                raise OSError('it belongs to user %d, not to %d' %
                              (status.st_uid, os.geteuid()))
            used = os.path.isdir(self.records.directory)
            if not used and self.list_foreign_files():
                raise OSError('it has no records, but a file of another '
                              'program: %s. Use an empty directory' %
                              self.list_foreign_files()[0])
            mode = stat.S_IMODE(status.st_mode)
            if mode & 0o077:
                # For a volume, kubelet creates an empty directory with such a
                # mode.
                LOG.log(logging.WARNING if used else logging.DEBUG,
                        'Other users had access to the state directory %s '
                        '(mode %o). Changed its mode to 700', self.path, mode)
                os.chmod(self.path, 0o700)
            if not used:
                os.makedirs(self.records.directory, mode=0o700,
                            exist_ok=True)

    def _convert_errors(self) -> contextlib.AbstractContextManager[None]:
        return files.convert_errors(self.path)


def _is_own_file(name: str) -> bool:
    return (name in _FILES or name.endswith('.json')
            or name.startswith((files.UNFINISHED, 'cni.sock.')))
