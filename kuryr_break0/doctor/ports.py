# SPDX-License-Identifier: Apache-2.0

"""Reports pods that kuryr-controller has given no port."""

from __future__ import annotations

import shlex
import time
from typing import Callable, Iterator

from kuryr_break0.doctor.findings import Finding
from kuryr_break0.doctor.findings import KINDS

#: Seconds in which kuryr-controller creates the port of a pod.
_PATIENCE = 60.0
#: Seconds between two looks. If the clock of the node is ahead of the clock
#: of the API, the first one finds pods that have just been created.
_PAUSE = 2.0


def check(waiting: Callable[[float], list[str]]) -> Iterator[Finding]:
    """Report pods whose KuryrPort has no VIF.

    :param waiting: returns the pods of this node that have waited for a VIF
        for some seconds
    :raises KubernetesUnavailable: if the API cannot be asked
    """
    found = waiting(_PATIENCE)
    if found:
        time.sleep(_PAUSE)
        still = waiting(_PATIENCE)
        found = [pod for pod in found if pod in still]
    if found:
        namespace, _, name = found[0].partition('/')
        yield KINDS['port-missing'].found(
            'kuryr-controller has created no port for pods of this node',
            found, namespace=shlex.quote(namespace), pod=shlex.quote(name))
