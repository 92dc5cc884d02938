# SPDX-License-Identifier: Apache-2.0

"""Caches values that are expensive to read and rarely change.

Each request runs in a process of its own, so the cache consists of files.
"""

from __future__ import annotations

import contextlib
import json
import os
from typing import Any, Optional

from kuryr_break0.ledger import files

#: Maximum bytes of a file; the next hops of a router need this much.
_MAX_SIZE = 2 ** 20
SUFFIX = '.json'
#: Seconds for which values of the node are cached: its next hops, its
#: addresses, and whether break0 is configured. A bind always reads from the
#: kernel whether break0 exists and is up.
MAX_AGE = 30


class Cache:
    """Cached lists of values by name.

    Nothing depends on the cache: a missing, damaged or outdated value is read
    again.
    """

    def __init__(self, directory: str) -> None:
        self._directory = directory

    def get(self, name: str, max_age: Optional[float] = None
            ) -> Optional[list[Any]]:
        """Return a list, or None if it is missing or outdated.

        :param max_age: maximum age in seconds; None for any
        """
        try:
            content = json.loads(files.read(self._path(name), _MAX_SIZE))
            age = files.now() - content['at']
            if age < 0 or max_age is not None and age >= max_age:
                return None  # a negative age: from an earlier boot
            return list(content['facts'])
        except (OSError, ValueError, TypeError, KeyError, RecursionError):
            return None

    def get_number(self, name: str) -> int:
        """Return a cached number; 0 if it is missing or damaged."""
        value = next(iter(self.get(name) or ()), 0)
        return value if isinstance(value, int) and value >= 0 else 0

    def get_recent(self, name: str) -> Optional[list[Any]]:
        """Return a list unless it is older than MAX_AGE."""
        return self.get(name, MAX_AGE)

    def put(self, name: str, facts: list[Any]) -> None:
        """Write a list; an error is harmless."""
        with contextlib.suppress(OSError):
            files.replace(self._path(name), json.dumps(
                {'at': files.now(), 'facts': facts}))

    def drop(self, name: str) -> None:
        """Delete a list, so that the next caller reads the values again."""
        with contextlib.suppress(OSError):
            os.unlink(self._path(name))

    def _path(self, name: str) -> str:
        # A parent that a caller names may not be a valid interface name.
        return os.path.join(self._directory, (
            name.encode().hex() if '/' in name else name) + SUFFIX)
