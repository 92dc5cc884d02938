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

"""Lets Kuryr give a pod its addresses once more, if the first try fails.

Kuryr does so by IPDB, after the driver has returned. While many pods are added
at once, IPDB now and then misses what it waits for, and gives up with a
RuntimeError that says nothing, and so does the ADD.
"""

from __future__ import annotations

from typing import Any

from kuryr_kubernetes.cni.binding import base as b_base
from oslo_log import log as logging

from kuryr_break0 import netlink

LOG = logging.getLogger(__name__)

#: As often as IPDB itself tries to set addresses.
_TRIES = 3

_stock = getattr(b_base, '_configure_l3', None)


def repeat_if_disturbed() -> None:
    """For the addresses that Kuryr is about to configure in this process.

    What is there from a first try is fine for the next. Where the function
    of Kuryr's is not the one that is known here, it is left.
    """
    if _stock is not None and getattr(b_base, '_configure_l3',
                                      None) is _stock:
        b_base._configure_l3 = _configure_l3


def _configure_l3(*args: Any) -> None:
    assert _stock is not None
    b_base._configure_l3 = _stock
    for _ in range(_TRIES - 1):
        try:
            _stock(*args)
            return
        except netlink.IPDB_DISTURBED as err:
            LOG.warning('Configuring the addresses of a pod again, since '
                        'IPDB has failed: %r', err)
    _stock(*args)
