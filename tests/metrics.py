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

"""Asks an agent, as Prometheus and kubelet do."""

from __future__ import annotations

import contextlib
import http.client
from typing import NamedTuple, Optional

from prometheus_client import parser

DEFAULT = '127.0.0.1:9817'


class Answer(NamedTuple):
    status: int
    text: str


def get(path: str = '/metrics', where: str = DEFAULT) -> Optional[Answer]:
    """An answer of the agent; None if nobody gives one."""
    connection = http.client.HTTPConnection(where, timeout=20)
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
