# SPDX-License-Identifier: Apache-2.0

"""Caches values that are expensive to read and rarely change.

Each request runs in its own process, so the cache consists of files.
"""

from __future__ import annotations

import contextlib
import json
import os
from typing import Any, Optional

from kuryr_break0.ledger import files

#: Maximum bytes of a file. The next hops of a router can need this size.
_MAX_SIZE = 2 ** 20
SUFFIX = '.json'
#: Maximum age, in seconds, of the cached next hops and addresses of the node,
#: and of the check of break0's settings. A bind detects a break0 that is gone
#: or down without the cache.
MAX_AGE = 30


class Cache:
    """Cached lists of values by name.

    If a value is missing, damaged or outdated, the caller reads the value from
    its source again, or works without the value.
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
                return None  # a negative age is from an earlier boot
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
        """Write a list; ignore an error."""
        with contextlib.suppress(OSError):
            files.replace(self._path(name), json.dumps(
                {'at': files.now(), 'facts': facts}))

    def drop(self, name: str) -> None:
        """Delete a list, so that the next caller reads the values again."""
        with contextlib.suppress(OSError):
            os.unlink(self._path(name))

    def _path(self, name: str) -> str:
        # A caller can pass a parent that is no valid interface name.
        return os.path.join(self._directory, (
            name.encode().hex() if '/' in name else name) + SUFFIX)
