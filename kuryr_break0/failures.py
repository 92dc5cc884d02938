# SPDX-License-Identifier: Apache-2.0

"""Collects errors, so that one failed item does not stop the other items."""

from __future__ import annotations

import contextlib
from typing import Iterator

from kuryr_break0 import exceptions
from kuryr_break0 import log
from kuryr_break0 import model

LOG = log.get_logger(__name__)


class Failures:
    """Collects errors, and raises the first one at the end.

    :ivar errors: all errors
    :ivar failed: the addresses of the items that failed
    """

    def __init__(self) -> None:
        self.errors: list[exceptions.Break0Error] = []
        self.failed: set[model.IPAddress] = set()

    def add(self, err: exceptions.Break0Error,
            *addresses: model.IPAddress) -> None:
        """Add an error; log it if it differs from the first one."""
        if self.errors and str(err) != str(self.errors[0]):
            LOG.error('%s', err)
        self.errors.append(err)
        self.failed.update(addresses)

    @contextlib.contextmanager
    def collect(self, *addresses: model.IPAddress) -> Iterator[None]:
        """Collect the error that the block raises."""
        try:
            yield
        except exceptions.Break0Error as err:
            self.add(err, *addresses)
        except OSError as err:  # EMFILE, for example
            self.add(exceptions.SystemRefused(reason=err), *addresses)

    @contextlib.contextmanager
    def log_errors(self) -> Iterator[None]:
        """Log the error that the block raises, and continue after it."""
        try:
            yield
        except (exceptions.Break0Error, OSError) as err:
            LOG.error('%s', err)

    def raise_first(self) -> None:
        """Raise the first error, if any."""
        if self.errors:
            raise self.errors[0]
