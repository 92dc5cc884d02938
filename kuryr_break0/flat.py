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

"""Keeps Kuryr's binding from reading what grows with the pods of the node.

Kuryr opens IPDB on the node's namespace twice per pod, and IPDB reads all
routes and neighbours. break0 has a route and a neighbour for each pod, while
Kuryr looks at the interfaces and their addresses alone.
"""

from __future__ import annotations

import contextlib
from typing import Any, Iterator, Optional

from kuryr_kubernetes.cni.binding import base as b_base

from kuryr_break0 import netlink

_stock = getattr(b_base, 'get_ipdb', None)


@contextlib.contextmanager
def view() -> Iterator[None]:
    """Let Kuryr see of the node its interfaces only, within the block.

    Its view of a pod's namespace is as ever. What is changed for that is a
    function of Kuryr's, in this process: of kuryr-daemon, that is the one of
    the request. Where it is not the one that is known here, it is left.
    """
    if _stock is None or getattr(b_base, 'get_ipdb', None) is not _stock:
        yield
        return
    b_base.get_ipdb = _get_ipdb
    try:
        yield
    finally:
        b_base.get_ipdb = _stock


def _get_ipdb(netns: Optional[str] = None) -> Any:
    assert _stock is not None
    return (not netns and netlink.ipdb_of_interfaces()) or _stock(netns)
