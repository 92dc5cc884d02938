# SPDX-License-Identifier: Apache-2.0

"""Asks an agent, as Prometheus and kubelet do."""

from __future__ import annotations

import contextlib
import http.client
from typing import NamedTuple, Optional

from prometheus_client import parser

from tests import lab

DEFAULT = '127.0.0.1:9817'


class Answer(NamedTuple):
    status: int
    text: str


def get(path: str = '/metrics', where: str = DEFAULT,
        timeout: float = lab.PATIENCE) -> Optional[Answer]:
    """An answer of the agent; None if nobody gives one."""
    connection = http.client.HTTPConnection(where, timeout=timeout)
    with contextlib.closing(connection):
        try:
            connection.request('GET', path)
            answer = connection.getresponse()
            return Answer(answer.status, answer.read().decode())
        except (ConnectionError, http.client.IncompleteRead):
            return None  # also one that ends just now


def value(name: str, where: str = DEFAULT, **labels: str) -> Optional[float]:
    """The value of a figure of ours; None without one."""
    answer = get(where=where)
    if answer is None:
        return None
    assert answer.status == 200, answer
    for family in parser.text_string_to_metric_families(answer.text):
        for sample in family.samples:
            if (sample.name == 'kuryr_break0_' + name
                    and sample.labels == labels):
                return sample.value
    return None


def total(name: str, where: str = DEFAULT) -> Optional[float]:
    """The sum of a figure of ours over all its labels; None without one."""
    answer = get(where=where)
    if answer is None:
        return None
    assert answer.status == 200, answer
    found = [sample.value for family in
             parser.text_string_to_metric_families(answer.text)
             for sample in family.samples
             if sample.name == 'kuryr_break0_' + name]
    return sum(found) if found else None
