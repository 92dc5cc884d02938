# SPDX-License-Identifier: Apache-2.0

"""Reads a ledger without changing it, at one moment with the kernel."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from typing import Callable, Optional, TypeVar

from kuryr_break0.kernel import node
from kuryr_break0.ledger import files
from kuryr_break0.ledger.lock import Lock
from kuryr_break0.ledger import records
from kuryr_break0.ledger.records import NewerVersion
from kuryr_break0.ledger.records import Records
from kuryr_break0.model import address_order
from kuryr_break0.model import IPAddress
from kuryr_break0.model import Record

#: Retries when the ledger changed while it was being read.
_RETRIES = 5

B = TypeVar('B')


@dataclasses.dataclass(frozen=True)
class Contents:
    """All that is in a state directory, as it is.

    :ivar claims: on each address, the newest first; ordered by address
    :ivar damaged: the path of each record that is none, and why
    :ivar newer: the same of those that a later version has written
    :ivar quarantined: the paths of those that were moved there
    :ivar unreadable: the addresses of all of these
    :ivar stamps: of the files of claims
    """

    claims: dict[IPAddress, tuple[Record, ...]]
    damaged: dict[str, str]
    newer: dict[str, str]
    quarantined: tuple[str, ...]
    unreadable: frozenset[IPAddress]
    stamps: dict[IPAddress, Optional[files.Stamp]] = dataclasses.field(
        default_factory=dict)


def inspect(ledger: Records, known: Optional[Contents] = None) -> Contents:
    """Read all there is, and leave it as it is: nothing is moved.

    :param known: what was read a moment ago. A file that has not been
        replaced since, which takes a tenth of the time to find out, is not
        read again.
    :raises LedgerUnavailable: if the directory cannot be read
    """
    claims: dict[IPAddress, tuple[Record, ...]] = {}
    unreadable: set[IPAddress] = set()
    stamps: dict[IPAddress, Optional[files.Stamp]] = {}
    damaged, newer, quarantined = {}, {}, []
    for name in ledger.names(ledger.directory):
        path = os.path.join(ledger.directory, name)
        found = set()  # no address, if that is what is wrong
        try:
            found = {records.address_of(name)}
            for address in found:
                stamps[address] = files.stamp(path)
                claims[address] = _still(
                    known, address, stamps[address]) or ledger.parsed(
                        path, address)
        except (FileNotFoundError, NotADirectoryError):
            pass  # unbound meanwhile
        except NewerVersion as err:
            newer[path] = str(err)
            unreadable |= found
        except (ValueError, OSError) as err:
            damaged[path] = str(err)
            unreadable |= found
    for name in ledger.names(ledger.quarantine):
        quarantined.append(os.path.join(ledger.quarantine, name))
        with contextlib.suppress(ValueError):
            unreadable.add(records.address_of(name))
    return Contents(
        {address: claims[address]
         for address in sorted(claims, key=address_order)},
        damaged, newer, tuple(sorted(quarantined)),
        frozenset(unreadable - claims.keys()), stamps)


def _still(known: Optional[Contents], address: IPAddress,
           stamp: Optional[files.Stamp]) -> tuple[Record, ...]:
    """Return the claims that were read before, if nothing has changed.

    A parent that was renamed meanwhile has another name in them.
    """
    found = known.claims.get(address, ()) if known is not None else ()
    if known is None or stamp is None or stamp != known.stamps.get(address):
        return ()
    return found if all(
        claim.parent == node.current_name(claim.parent, claim.parent_index)
        for claim in found) else ()


def at_one_moment(ledger: Records, lock: Lock, look: Callable[[], B],
                  patience: float, known: Optional[Contents] = None
                  ) -> tuple[Contents, B, bool]:
    """Read records, and something else that must agree with them.

    In between, who holds the lock is waited for, since what belongs to its
    record may be half done. If a record has come or gone meanwhile, both are
    read again, a few times.

    :param patience: seconds to wait for
    :param known: as for :func:`inspect`
    :returns: what they return, and whether it is of one moment
    :raises OSError: if the lock file cannot be opened
    """
    for _ in range(_RETRIES):
        before = files.stamp(ledger.directory)
        found = known = inspect(ledger, known)
        is_free = lock.is_free_within(patience)
        other = look()
        is_steady = is_free and before == files.stamp(ledger.directory)
        if is_steady or not is_free:
            break
    return found, other, is_steady
