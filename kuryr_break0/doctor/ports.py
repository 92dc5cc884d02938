# SPDX-License-Identifier: Apache-2.0

"""Reports pods for which kuryr-controller has created no port."""

from __future__ import annotations

import shlex
import time
from typing import Callable, Iterator

from kuryr_break0.doctor.findings import Finding
from kuryr_break0.doctor.findings import KINDS

#: Seconds within which kuryr-controller should create the port of a pod.
_PATIENCE = 60.0
#: Seconds between two queries. If the clock of the node is ahead of the clock
#: of the API, the first query also returns pods that are just starting.
_PAUSE = 2.0


def check(waiting: Callable[[float], list[str]]) -> Iterator[Finding]:
    """Report pods with a KuryrPort that has no VIF.

    :param waiting: returns the pods of this node that have waited for a VIF
        for a given number of seconds
    :raises KubernetesUnavailable: if the API does not answer
    """
    pods = waiting(_PATIENCE)
    if pods:
        time.sleep(_PAUSE)
        still = waiting(_PATIENCE)
        pods = [pod for pod in pods if pod in still]
    if pods:
        namespace, _, name = pods[0].partition('/')
        yield KINDS['port-missing'].finding(
            'kuryr-controller has created no port for pods of this node',
            pods, namespace=shlex.quote(namespace), pod=shlex.quote(name))
