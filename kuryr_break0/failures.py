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

"""Work on several things, of which one that fails does not stop the others."""

from __future__ import annotations

import contextlib
from typing import Iterator, Optional

from oslo_log import log as logging

from kuryr_break0 import exceptions

LOG = logging.getLogger(__name__)


class Failures:
    """Goes on after an error, and raises the first one in the end.

    :ivar device_lost: whether one was that of an interface down or gone
    """

    def __init__(self) -> None:
        self._first: Optional[exceptions.Break0Error] = None
        self.device_lost = False

    def note(self, err: exceptions.Break0Error) -> None:
        """Keep the first error, and log the others."""
        if isinstance(err, exceptions.KernelRefused):
            self.device_lost |= err.device_lost
        if self._first is None:
            self._first = err
        else:
            LOG.error('%s', err)

    @contextlib.contextmanager
    def noted(self) -> Iterator[None]:
        """:meth:`note` what is raised in the block."""
        try:
            yield
        except exceptions.Break0Error as err:
            self.note(err)

    @contextlib.contextmanager
    def logged(self) -> Iterator[None]:
        """Log what is raised in the block, and be content."""
        try:
            yield
        except exceptions.Break0Error as err:
            LOG.error('%s', err)

    def raise_first(self) -> None:
        """Raise the first error, if there was one."""
        if self._first is not None:
            raise self._first
