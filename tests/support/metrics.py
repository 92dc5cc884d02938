# SPDX-License-Identifier: Apache-2.0

"""Requests to an agent, like those of Prometheus and the kubelet."""

from __future__ import annotations

import contextlib
import http.client
from typing import NamedTuple, Optional

from prometheus_client import parser

from tests.support import lab

DEFAULT = '127.0.0.1:9817'


class Answer(NamedTuple):
    status: int
    text: str


def get(path: str = '/metrics', where: str = DEFAULT,
        timeout: float = lab.PATIENCE) -> Optional[Answer]:
    """Return an answer of the agent, or None if no agent listens."""
    connection = http.client.HTTPConnection(where, timeout=timeout)
    with contextlib.closing(connection):
        try:
            connection.request('GET', path)
            answer = connection.getresponse()
            return Answer(answer.status, answer.read().decode())
        except (ConnectionError, http.client.IncompleteRead):
            return None  # also for an agent that is ending


def value(name: str, where: str = DEFAULT, **labels: str) -> Optional[float]:
    """Return the value of one of our metrics, or None if it is missing."""
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
    """Return the sum of a metric over all labels, or None if it is missing."""
    answer = get(where=where)
    if answer is None:
        return None
    assert answer.status == 200, answer
    found = [sample.value for family in
             parser.text_string_to_metric_families(answer.text)
             for sample in family.samples
             if sample.name == 'kuryr_break0_' + name]
    return sum(found) if found else None
