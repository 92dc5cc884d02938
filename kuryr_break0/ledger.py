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

"""Who owns which address: one small file each, and the lock.

kuryr-daemon serves every request in a new process, and is restarted at will,
so what must be remembered is in files. They live on a tmpfs and end with the
boot, as pods do. Each is replaced as a whole by rename(2), so one that is
there is complete, at whatever instruction its writer was killed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import fcntl
import functools
import ipaddress
import json
import os
import re
import stat
import time
from typing import Any, Callable, Iterator, Optional, Sequence, TextIO, TypeVar

from oslo_concurrency import lockutils
from oslo_log import log as logging

from kuryr_break0.config import IPAddress
from kuryr_break0.config import IPNetwork
from kuryr_break0 import exceptions

LOG = logging.getLogger(__name__)

VERSION = 1
_SUFFIX = '.json'
#: Bytes; an entry has a tenth of it.
_MAX_SIZE = 4096
#: Bytes of what is remembered, as the next hops of a router.
_MAX_REMEMBERED = 2 ** 20
#: Times that is looked at once more what has changed meanwhile.
_LOOKS = 5


A = TypeVar('A')
B = TypeVar('B')


@dataclasses.dataclass(frozen=True)
class Owner:
    """The sandbox that an address belongs to, and its interface there.

    CNI calls both the same in ADD and DEL (CNI_CONTAINERID, CNI_IFNAME).
    """

    container_id: str
    ifname: str

    @classmethod
    def adopted(cls, netns: str, ifname: str) -> Optional[Owner]:
        """Who stands for a sandbox whose container id is not known.

        That is one that Kuryr bound before break0 was in use. It is told
        from all others by its network namespace, which lives as long as it
        does, and which its DEL names too.

        :param netns: path of the namespace
        :returns: None if there is none
        """
        found = netns_id(netns)
        return cls('adopted-%d' % found[1], ifname) if found else None

    def __str__(self) -> str:
        return '%s/%s' % (self.container_id, self.ifname)


# What most entries have in common is read once: that is a third of the time.
_network = functools.lru_cache(maxsize=128)(ipaddress.ip_network)
_node_address = functools.lru_cache(maxsize=128)(ipaddress.ip_address)


@dataclasses.dataclass(frozen=True)
class Peer:
    """The node, as its pods are to know it.

    :ivar addresses: in their order
    :ivar mac: what they are at on the link; None to be asked for by ARP
    """

    addresses: tuple[IPAddress, ...]
    mac: Optional[str]


@dataclasses.dataclass(frozen=True)
class Entry:
    """An address and whose it is.

    :ivar parent: the interface that the pod's macvlan is on
    :ivar mac: MAC address of the pod's interface
    :ivar subnets: the networks that it is in on the link
    :ivar netns: path of its namespace, as the writer saw it
    :ivar netns_id: device and inode of that, which tell it from a later one
        of the same path
    :ivar peer: what the pod has been told of the node; None for nothing
    :ivar pod: its namespace and name in Kubernetes, where known
    :ivar bound_at: seconds since the epoch
    """

    address: IPAddress
    owner: Owner
    parent: str
    mac: Optional[str] = None
    subnets: tuple[IPNetwork, ...] = ()
    netns: Optional[str] = None
    netns_id: Optional[tuple[int, int]] = None
    peer: Optional[Peer] = None
    pod: Optional[str] = None
    bound_at: float = dataclasses.field(default_factory=time.time)

    def to_json(self) -> str:
        """The content of the entry's file, format :data:`VERSION`."""
        fields = {'version': VERSION, **vars(self), 'owner': vars(self.owner),
                  'peer': self.peer and vars(self.peer)}
        return json.dumps(fields, default=str)  # addresses, networks

    @property
    def sandbox_gone(self) -> bool:
        """Whether its namespace is known not to exist any more.

        Either another one has its path, or the path is not there though
        what it was in is: in another container than the writer's, a path
        that is not there says nothing.
        """
        return _is_gone(self.netns, self.netns_id)

    @classmethod
    def from_json(cls, text: str) -> Entry:
        """Read what :meth:`to_json` wrote.

        :raises NewerVersion: for what a later version wrote
        :raises ValueError: for anything else
        """
        try:
            fields = json.loads(text)
            version = fields.pop('version')
            if isinstance(version, int) and version > VERSION:
                raise NewerVersion('its format is version %d, which is newer '
                                   'than this program' % version)
            if version != VERSION:
                raise ValueError('its format is version %r' % version)
            for name in ('parent', 'mac', 'netns', 'pod'):
                if not isinstance(fields[name], (str, type(None))):
                    raise ValueError('its %s is no text' % name)
            fields['address'] = ipaddress.ip_address(fields['address'])
            fields['owner'] = Owner(**fields['owner'])
            if fields['netns_id'] is not None:
                device, inode = fields['netns_id']
                fields['netns_id'] = (int(device), int(inode))
            fields['subnets'] = tuple(map(_network, fields['subnets']))
            if fields['peer'] is not None:
                fields['peer'] = Peer(
                    tuple(map(_node_address, fields['peer']['addresses'])),
                    fields['peer']['mac'])
            return cls(**fields)
        except (AttributeError, KeyError, TypeError, RecursionError) as err:
            raise ValueError('it is not an entry (%r)' % err)


def netns_id(path: Optional[str]) -> Optional[tuple[int, int]]:
    """Device and inode of a network namespace; None if it is not there."""
    if path is None:
        return None
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_dev, found.st_ino


def _is_gone(path: Optional[str],
             known: Optional[Sequence[int]]) -> bool:
    if path is None or known is None:
        return False
    try:
        found = os.stat(path)
    except FileNotFoundError:
        of_process = re.fullmatch(r'(/.+)/\d+/ns/net', path)
        return os.path.isdir(
            os.path.join(of_process[1], '1') if of_process
            else os.path.dirname(path))
    except OSError:
        return False
    return (found.st_dev, found.st_ino) != tuple(known)


@dataclasses.dataclass(frozen=True)
class Contents:
    """All that is in a state directory, as it is.

    :ivar entries: ordered by address
    :ivar damaged: the path of each entry that is none, and why
    :ivar newer: the same of those that a later version has written
    :ivar aside: the paths of those that were set aside
    :ivar unreadable: the addresses of all of these
    """

    entries: tuple[Entry, ...]
    damaged: dict[str, str]
    newer: dict[str, str]
    aside: tuple[str, ...]
    unreadable: frozenset[IPAddress]


class NewerVersion(Exception):
    """An entry's format is not known yet."""


def _content(path: str, max_size: int = _MAX_SIZE) -> str:
    """Read a small regular file.

    :param max_size: bytes
    :raises ValueError: if it is anything else
    """
    try:
        # A link or a pipe is none of ours; neither must hold up a pod.
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK
                     | os.O_CLOEXEC)
    except OSError as err:
        if err.errno == errno.ELOOP:
            raise ValueError('it is a link')
        raise
    try:
        found = os.fstat(fd)
        if not stat.S_ISREG(found.st_mode):
            raise ValueError('it is not a regular file')
        if found.st_size > max_size:
            raise ValueError('it is larger than %d bytes' % max_size)
        content = os.read(fd, found.st_size)
    finally:
        os.close(fd)
    return content.decode()


def _stamp(path: str) -> Optional[tuple[int, int, int]]:
    """What tells a file from a later one of its name; None for none."""
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_ino, found.st_mtime_ns, found.st_size


def _address_of(name: str) -> IPAddress:
    """The address of an entry by the name of its file.

    :raises ValueError: if it is none
    """
    return ipaddress.ip_address(name[:-len(_SUFFIX)])


def _order(address: IPAddress) -> tuple[int, int]:
    return address.version, int(address)


class Ledger:
    """The entries in a state directory.

    :param path: the directory; it is created when it is first needed
    :param lock_timeout: seconds that :meth:`lock` waits
    :ivar lock_path: the file that the lock is on
    :ivar attendance_path: the file that says of a repairer; see
        :meth:`attend`
    """

    def __init__(self, path: str, lock_timeout: float) -> None:
        self._path = path
        self._entries = os.path.join(path, 'addresses')
        self._damaged = os.path.join(path, 'damaged')
        self.attendance_path = os.path.join(path, 'attended')
        self._stamps: dict[IPAddress, Optional[tuple[int, int, int]]] = {}
        self.lock_path = os.path.join(path, 'lock')
        self._lock_timeout = lock_timeout

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Keep all other threads and processes of this state directory out.

        The kernel frees it when its holder dies (fcntl(2) record lock).

        :raises LockTimeout: when another held it for too long
        :raises LedgerUnavailable: when the lock file cannot be made
        """
        self._prepare()
        lock = lockutils.external_lock('lock', lock_path=self._path)
        with lockutils.internal_lock(self._path):
            # Where processors are scarce, let the kernel stop this process
            # now rather than while it keeps the others waiting.
            os.sched_yield()
            try:
                # Waiters look again every so many seconds, which is what they
                # may lose. The lock is held for half a millisecond; those
                # who look too often take the processor from its holder.
                acquired = lock.acquire(delay=0.01, max_delay=0.05,
                                        timeout=self._lock_timeout)
            except OSError as err:
                raise self._unavailable(err) from err
            if not acquired:
                raise exceptions.LockTimeout(
                    path=self.lock_path, timeout=self._lock_timeout)
            try:
                yield
            finally:
                lock.release()

    def get(self, address: IPAddress) -> Optional[Entry]:
        """Return the entry of an address, or None.

        One that is damaged is set aside, with a warning, and is none.

        :raises LedgerUnavailable: if there is one that cannot be read, or
            that a later version of this program has written
        """
        path = self._file(address)
        try:
            return self._read(path, address)
        except (FileNotFoundError, NotADirectoryError):
            return None
        except ValueError as err:
            self._set_aside(path, err)
            return None
        except (OSError, NewerVersion) as err:
            raise self._unavailable(err) from err

    @staticmethod
    def _read(path: str, address: IPAddress) -> Entry:
        entry = Entry.from_json(_content(path))
        if entry.address != address:
            raise ValueError('it is of %s' % entry.address)
        return entry

    def may_be_gone(self, address: IPAddress) -> bool:
        """Whether the sandbox of an address is to be looked at.

        False if it is there, or if there is no entry; found at a third of
        what it takes to :meth:`get` the entry, since most of that is to make
        addresses and networks of texts. What is odd is to be looked at.
        """
        try:
            fields = json.loads(_content(self._file(address)))
            return _is_gone(fields['netns'], fields['netns_id'])
        except (FileNotFoundError, NotADirectoryError):
            return False
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            return True

    def put(self, entry: Entry) -> None:
        """Write an entry; what its address had before is gone.

        To be called under the lock.

        :raises LedgerUnavailable: if it cannot be written; then what was
            there before is still there
        """
        self._prepare()
        try:
            self._replace(self._file(entry.address), entry.to_json())
        except OSError as err:
            raise self._unavailable(err) from err

    def remove(self, address: IPAddress) -> None:
        """Remove the entry of an address; none is fine.

        :raises LedgerUnavailable: if it cannot be removed
        """
        try:
            os.unlink(self._file(address))
        except (FileNotFoundError, NotADirectoryError):
            pass
        except OSError as err:
            raise self._unavailable(err) from err

    def entries(self) -> list[Entry]:
        """Read all entries, ordered by address; see :meth:`read`."""
        return self.read()[0]

    def read(self) -> tuple[list[Entry], set[IPAddress]]:
        """Read all entries, ordered by address.

        :returns: them, and the addresses of which it is not known whose
            they are, since their entry is damaged or cannot be read
        :raises LedgerUnavailable: if the directory cannot be read
        """
        entries, unreadable = [], set()
        for address in self.addresses():
            self._stamps[address] = _stamp(self._file(address))
            try:
                entry = self.get(address)
            except exceptions.LedgerUnavailable as err:
                LOG.warning('Ignoring the entry of %s: %s', address, err)
                unreadable.add(address)
                continue
            if entry is not None:
                entries.append(entry)
        unreadable.update(self._listed(self._damaged))
        return entries, unreadable - {entry.address for entry in entries}

    def is_as_read(self, address: IPAddress) -> bool:
        """Whether the entry of an address is the one that was last read.

        It is at a tenth of what it takes to read it again. For that the
        file has to be another one, or of another time, since one is never
        written twice.
        """
        stamp = _stamp(self._file(address))
        return stamp is not None and stamp == self._stamps.get(address)

    def look(self) -> Contents:
        """Read all there is, and leave it as it is: nothing is set aside.

        :raises LedgerUnavailable: if the directory cannot be read
        """
        entries = []
        unreadable: set[IPAddress] = set()
        damaged, newer, aside = {}, {}, []
        for name in self._names(self._entries):
            path = os.path.join(self._entries, name)
            found = set()  # no address, if that is what is wrong
            try:
                found = {_address_of(name)}
                entries.append(self._read(path, *found))
            except (FileNotFoundError, NotADirectoryError):
                pass  # unbound meanwhile
            except NewerVersion as err:
                newer[path] = str(err)
                unreadable |= found
            except (ValueError, OSError) as err:
                damaged[path] = str(err)
                unreadable |= found
        for name in self._names(self._damaged):
            aside.append(os.path.join(self._damaged, name))
            with contextlib.suppress(ValueError):
                unreadable.add(_address_of(name))
        return Contents(
            tuple(sorted(entries, key=lambda entry: _order(entry.address))),
            damaged, newer, tuple(sorted(aside)),
            frozenset(unreadable - {entry.address for entry in entries}))

    def wait(self, timeout: float) -> bool:
        """Wait until who holds the lock now has let it go.

        It is taken for an instant, and unlike :meth:`lock` nothing is made.
        Not for who holds it, whose lock would end with that (fcntl(2)).

        :returns: whether it was free within so many seconds
        :raises LedgerUnavailable: if the lock file cannot be opened
        """
        deadline = time.monotonic() + timeout
        try:
            with open(self.lock_path, 'r+b') as file:
                while True:
                    try:
                        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                        return True
                    except (BlockingIOError, PermissionError):
                        if time.monotonic() > deadline:
                            return False
                    time.sleep(0.001)
        except FileNotFoundError:
            return True  # nobody has ever held it
        except OSError as err:
            raise self._unavailable(err) from err

    def beside(self, read: Callable[[], A], look: Callable[[], B],
               patience: float) -> tuple[A, B, bool]:
        """Read entries, and look at what is to agree with them.

        In between, who holds the lock is waited for, since what belongs to
        its entry may be half done. If an entry has come or gone meanwhile,
        both are done again, a few times.

        :param patience: seconds to wait for
        :returns: what they return, and whether it is of one moment
        :raises LedgerUnavailable: if the lock file cannot be opened
        """
        for _ in range(_LOOKS):
            stamp = _stamp(self._entries)
            entries = read()
            free = self.wait(patience)
            found = look()
            steady = free and stamp == _stamp(self._entries)
            if steady or not free:
                break
        return entries, found, steady

    def addresses(self) -> list[IPAddress]:
        """List the addresses that have an entry, in their order.

        :raises LedgerUnavailable: if the directory cannot be read
        """
        return sorted(self._listed(self._entries), key=_order)

    def count(self) -> int:
        """Count the entries, at a tenth of what it takes to list them.

        :raises LedgerUnavailable: if the directory cannot be read
        """
        return len(self._names(self._entries))

    def some(self, position: int, most: int) -> tuple[list[IPAddress], int]:
        """List some of the addresses that have an entry, and how many do.

        They are in some order, and from its end on from its beginning.

        :param position: in that order, of the first
        :raises LedgerUnavailable: if the directory cannot be read
        """
        names = sorted(self._names(self._entries))
        count = len(names)
        if count > most:
            start = position % count
            names = (names + names)[start:start + most]
        return self._parsed(self._entries, names), count

    def exists(self) -> bool:
        """Whether there is a state directory."""
        return os.path.isdir(self._path)

    def clear(self) -> None:
        """Remove the directory with all that this package puts there.

        It stays, empty, where it is a mount point, as in a container.

        To be called under the lock, which is lost with it: who waits for it
        at that moment has another one than who comes later.

        :raises LedgerUnavailable: if something cannot be removed
        """
        try:
            for directory in (self._entries, self._damaged, self._path):
                with contextlib.suppress(FileNotFoundError):
                    for name in os.listdir(directory):
                        if (name.endswith(_SUFFIX) or name in (
                                '.unfinished', 'attended', 'journal', 'lock')):
                            os.unlink(os.path.join(directory, name))
                    os.rmdir(directory)
        except OSError as err:
            # Others have put something there, or mounted it.
            if err.errno not in (errno.ENOTEMPTY, errno.EBUSY):
                raise self._unavailable(err) from err

    def _listed(self, directory: str) -> list[IPAddress]:
        return self._parsed(directory, self._names(directory))

    def _parsed(self, directory: str, names: list[str]) -> list[IPAddress]:
        found = []
        for name in names:
            try:
                found.append(_address_of(name))
            except ValueError as err:
                if directory == self._entries:
                    self._set_aside(os.path.join(directory, name), err)
        return found

    def _names(self, directory: str) -> list[str]:
        try:
            return [name for name in os.listdir(directory)
                    if name.endswith(_SUFFIX)]
        except FileNotFoundError:
            return []
        except OSError as err:
            raise self._unavailable(err) from err

    def _set_aside(self, path: str, reason: ValueError) -> None:
        aside = os.path.join(self._damaged, os.path.basename(path))
        try:
            os.makedirs(self._damaged, mode=0o700, exist_ok=True)
            os.replace(path, aside)
        except OSError as err:
            LOG.error('Cannot set the damaged entry %s aside: %s', path, err)
        else:
            LOG.warning('Set the damaged entry %s aside, as %s: %s', path,
                        aside, reason)

    def recall(self, name: str, max_age: float) -> Optional[list[Any]]:
        """Return what :meth:`remember` wrote, if not so many seconds ago.

        For what is dear to read from the kernel, and seldom changes.
        """
        path = os.path.join(self._path, name + _SUFFIX)
        try:
            if time.time() - os.stat(path).st_mtime < max_age:
                return list(json.loads(_content(path, _MAX_REMEMBERED)))
        except (OSError, ValueError, TypeError, RecursionError):
            pass  # absent or damaged: it is only a copy
        return None

    def remember(self, name: str, facts: list[Any]) -> None:
        """Keep something to :meth:`recall`; failing is harmless."""
        with contextlib.suppress(OSError, exceptions.LedgerUnavailable):
            self._prepare()
            self._replace(os.path.join(self._path, name + _SUFFIX),
                          json.dumps(facts))

    @contextlib.contextmanager
    def attend(self) -> Iterator[Callable[[], None]]:
        """Let others know, by :meth:`attended`, that somebody repairs.

        The kernel ends that with the process (flock(2)).

        :returns: what is to be called with each repair, as a sign of life
        """
        with contextlib.ExitStack() as stack:
            file: Optional[TextIO] = None
            try:
                self._prepare()
                file = stack.enter_context(open(self.attendance_path, 'w'))
                fcntl.flock(file, fcntl.LOCK_SH)
            except (OSError, exceptions.LedgerUnavailable) as err:
                LOG.error('Nobody will know that the agent is there: %s', err)

            def alive() -> None:
                with contextlib.suppress(OSError):
                    if file is not None:
                        os.utime(file.fileno())

            yield alive

    def watch(self) -> Optional[int]:
        """Let the kernel send SIGIO when entries come or go (F_NOTIFY).

        :returns: a file descriptor, as long as which is open; or None
        """
        with contextlib.suppress(OSError, exceptions.LedgerUnavailable):
            self._prepare()
            watched = os.open(self._entries, os.O_RDONLY | os.O_CLOEXEC)
            fcntl.fcntl(watched, fcntl.F_NOTIFY,
                        fcntl.DN_CREATE | fcntl.DN_DELETE | fcntl.DN_RENAME
                        | fcntl.DN_MULTISHOT)
            return watched
        return None

    def attended(self) -> Optional[float]:
        """Seconds since the last sign of life of who is in :meth:`attend`.

        None if nobody is.
        """
        try:
            with open(self.attendance_path) as file:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    return time.time() - os.fstat(file.fileno()).st_mtime
        except OSError:
            pass
        return None

    def _replace(self, path: str, text: str) -> None:
        # The name of the unfinished file is always the same, so a killed
        # writer leaves one at most. The lock keeps writers of entries apart;
        # what is to be recalled has files of its own.
        unfinished = os.path.join(
            self._path, '.unfinished' if path.startswith(self._entries)
            else '.' + os.path.basename(path))
        with open(unfinished, 'w') as file:
            file.write(text)
        os.replace(unfinished, path)

    def _file(self, address: IPAddress) -> str:
        return '%s/%s%s' % (self._entries, address, _SUFFIX)

    def _prepare(self) -> None:
        """Make sure of the directory, and that nobody else can write it."""
        try:
            if not os.path.isdir(self._path):
                os.makedirs(self._path, mode=0o700, exist_ok=True)
            found = os.stat(self._path)
            if found.st_uid != os.geteuid():
                raise self._unavailable('it belongs to user %d, not to %d' %
                                        (found.st_uid, os.geteuid()))
            used = os.path.isdir(self._entries)
            if stat.S_IMODE(found.st_mode) & 0o077:
                # An empty one may be of kubelet, for a volume.
                LOG.log(logging.WARNING if used else logging.DEBUG,
                        'Others could use the state directory %s (mode %o); '
                        'now they cannot', self._path,
                        stat.S_IMODE(found.st_mode))
                os.chmod(self._path, 0o700)
            if not used:
                os.makedirs(self._entries, mode=0o700, exist_ok=True)
        except OSError as err:
            raise self._unavailable(err) from err

    def _unavailable(self, err: Any) -> exceptions.LedgerUnavailable:
        return exceptions.LedgerUnavailable(path=self._path, reason=err)
