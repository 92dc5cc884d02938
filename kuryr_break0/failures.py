# SPDX-License-Identifier: Apache-2.0

"""Work on several things, of which one that fails does not stop the others."""

from __future__ import annotations

import contextlib
from typing import Iterator

from kuryr_break0 import exceptions
from kuryr_break0 import log
from kuryr_break0.model import IPAddress

LOG = log.get_logger(__name__)


class Failures:
    """Goes on after an error, and raises the first one in the end.

    :ivar errors: all of them
    :ivar failed: the addresses that they are about
    """

    def __init__(self) -> None:
        self.errors: list[exceptions.Break0Error] = []
        self.failed: set[IPAddress] = set()

    def note(self, err: exceptions.Break0Error,
             *addresses: IPAddress) -> None:
        """Keep the first error, and log others that differ from it."""
        if self.errors and str(err) != str(self.errors[0]):
            LOG.error('%s', err)
        self.errors.append(err)
        self.failed.update(addresses)

    @contextlib.contextmanager
    def noted(self, *addresses: IPAddress) -> Iterator[None]:
        """:meth:`note` what is raised in the block."""
        try:
            yield
        except exceptions.Break0Error as err:
            self.note(err, *addresses)
        except OSError as err:  # as EMFILE, at whatever was to be opened
            self.note(exceptions.SystemRefused(reason=err), *addresses)

    @contextlib.contextmanager
    def logged(self) -> Iterator[None]:
        """Log what is raised in the block, and be content."""
        try:
            yield
        except (exceptions.Break0Error, OSError) as err:
            LOG.error('%s', err)

    def raise_first(self) -> None:
        """Raise the first error, if there was one."""
        if self.errors:
            raise self.errors[0]
