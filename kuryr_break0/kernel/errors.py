# SPDX-License-Identifier: Apache-2.0

"""pyroute2's errors, as ours; and dumps that are repeated."""

from __future__ import annotations

import contextlib
import os
import random
import time
from typing import Any, Callable, Iterator, TypeVar

from pyroute2.ipdb import exceptions as ipdb_exceptions
from pyroute2.netlink import exceptions as nl_exceptions

from kuryr_break0 import exceptions

#: An interrupted dump is repeated this often. Each try meets about as many
#: changes as the last, so what counts is their number, not their distance.
_DUMP_TRIES = 20
_DUMP_PAUSE = 0.05  # seconds, at most

#: What IPDB raises if it misses something: RuntimeError if it could not
#: even go back to what was before.
IPDB_DISTURBED = (RuntimeError, ipdb_exceptions.CommitException,
                  nl_exceptions.NetlinkDumpInterrupted)

_T = TypeVar('_T')


@contextlib.contextmanager
def translated(action: str, advice: str = '') -> Iterator[None]:
    """Let no error of pyroute2 or the socket out.

    :param action: what is done, for the error
    :raises KernelRefused: in place of each
    """
    try:
        yield
    except nl_exceptions.NetlinkError as err:
        reason = os.strerror(err.code) if err.code > 0 else str(err)
        raise exceptions.KernelRefused(action, reason, err.code,
                                       advice) from err
    except OSError as err:  # of the socket
        raise exceptions.KernelRefused(action, err.strerror or str(err),
                                       err.errno or 0, advice) from err
    except (ipdb_exceptions.CommitException,
            ipdb_exceptions.CreateException) as err:
        raise exceptions.KernelRefused(action, str(err), 0, advice) from err


def undisturbed(action: str, function: Callable[..., _T], *args: Any) -> _T:
    """Call what reads the node by dumps, and again if one is interrupted.

    The kernel marks a dump that the table has changed under; pyroute2 raises
    that as an error. ``function`` must be safe to repeat.

    :param action: what it does, for the error
    :raises KernelRefused: for a netlink error of another kind, or if every
        try was interrupted
    """
    with translated(action):
        for _ in range(_DUMP_TRIES - 1):
            try:
                return function(*args)
            except nl_exceptions.NetlinkDumpInterrupted:
                time.sleep(random.uniform(0, _DUMP_PAUSE))
        return function(*args)
