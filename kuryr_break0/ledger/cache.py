# SPDX-License-Identifier: Apache-2.0

"""Keep what is expensive to read and seldom changes, for some seconds.

Each request is a process of its own, so it is kept in files.
"""

from __future__ import annotations

import contextlib
import json
import os
from typing import Any, Optional

from kuryr_break0.ledger import files

#: Bytes, as of the next hops of a router.
_MAX_SIZE = 2 ** 20
SUFFIX = '.json'
#: Seconds for which what was read of the node is fresh: its next hops, its
#: addresses, and that break0 is what it should be. That it is there and up,
#: the kernel says to each pod.
MAX_AGE = 30


class Cache:
    """Lists of facts by their names.

    Nothing depends on it: what is absent, damaged or old is read again.
    """

    def __init__(self, directory: str) -> None:
        self._directory = directory

    def get(self, name: str, max_age: Optional[float] = None
            ) -> Optional[list[Any]]:
        """Return the facts of a name, unless they are older.

        :param max_age: seconds; None for any age
        """
        try:
            content = json.loads(files.read(self._path(name), _MAX_SIZE))
            age = files.now() - content['at']
            if age < 0 or max_age is not None and age >= max_age:
                return None  # a clock that is ahead is of another boot
            return list(content['facts'])
        except (OSError, ValueError, TypeError, KeyError, RecursionError):
            return None

    def number(self, name: str) -> int:
        """Return a number that was kept; 0 for anything else."""
        value = next(iter(self.get(name) or ()), 0)
        return value if isinstance(value, int) and value >= 0 else 0

    def fresh(self, name: str) -> Optional[list[Any]]:
        """Return the facts of a name, unless they are to be read again."""
        return self.get(name, MAX_AGE)

    def put(self, name: str, facts: list[Any]) -> None:
        """Keep facts; failing is harmless."""
        with contextlib.suppress(OSError):
            files.replace(self._path(name), json.dumps(
                {'at': files.now(), 'facts': facts}))

    def drop(self, name: str) -> None:
        """Drop a fact, so that it is read again."""
        with contextlib.suppress(OSError):
            os.unlink(self._path(name))

    def _path(self, name: str) -> str:
        # What a caller says of a parent may be no name of an interface.
        return os.path.join(self._directory, (
            name.encode().hex() if '/' in name else name) + SUFFIX)
