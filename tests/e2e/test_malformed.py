# SPDX-License-Identifier: Apache-2.0

"""Tests the real daemon with malformed requests."""

from __future__ import annotations

import os
from typing import Any

from hypothesis import given
from hypothesis import HealthCheck
from hypothesis import Phase
from hypothesis import settings
from hypothesis import strategies as st
import requests

from kuryr_break0 import manager
from tests.e2e.base import DaemonTestCase
from tests.functional import base
from tests.support import kuryr
from tests.support import lab

EXAMPLES = int(os.environ.get('FUZZ_EXAMPLES', 40))
POD, OTHER = '100.75.30.71', '100.75.30.72'

anything = (st.text(max_size=20) | st.none() | st.integers() | st.lists(
    st.text(max_size=3), max_size=2) | st.dictionaries(
        st.text(max_size=3), st.text(max_size=3), max_size=2)
    | st.sampled_from(['x' * 5000, 'a\nb', '\0', '../..', '--help', '%s']))
FIELDS = {
    'CNI_CONTAINERID': anything,
    'CNI_IFNAME': anything | st.sampled_from(
        ['', 'lo', 'eth0', 'break0', 'eth0 ', 'eth/0', 'a' * 15, 'a' * 16]),
    'CNI_NETNS': anything | st.sampled_from(
        ['', '/', '/dev/tty', '/dev/zero', '/proc/1/ns/net',
         '/proc/self/ns/net', '/proc/self/ns/mnt', '/run/netns/none',
         'run/netns/other', '/run/netns/other\0', '/run']),
    'CNI_ARGS': anything | st.sampled_from(
        ['K8S_POD_NAMESPACE=default;K8S_POD_NAME=other', 'K8S_POD_NAME',
         '=;=', 'K8S_POD_NAMESPACE=\n;K8S_POD_NAME=..'])}


class TestMalformed(DaemonTestCase):

    def ask(self, command: str, body: Any) -> requests.Response:
        return requests.post(
            'http://%s/%sNetwork' % (kuryr.ADDRESS, command.lower()),
            headers={'Connection': 'close'}, timeout=lab.PATIENCE,
            **({'data': body} if isinstance(body, bytes)
               else {'json': body}))

    def state(self) -> list[Any]:
        """Return the node's interfaces and the parent's addresses."""
        return [{link['ifname']: (link['address'], link['flags'])
                 for link in self.node.lab.ip('link', 'show')},
                self.node.lab.ip('address', 'show', 'dev', lab.PARENT)]

    def test_requests(self) -> None:
        self.node.start_daemon()
        first = self.node.add_pod('first', POD)
        self.add(first)
        # The end of the parent's duplicate address detection is a change too.
        self.node.lab.settle()
        other = self.node.add_pod('other', OTHER)
        before = self.state()

        # Shrinking is disabled, since it takes as long as hundreds of requests
        # for one failure.
        @settings(max_examples=EXAMPLES, deadline=None, database=None,
                  phases=[Phase.generate],
                  suppress_health_check=list(HealthCheck))
        @given(st.sampled_from(['ADD', 'DEL']), st.one_of(
            *(value.map(lambda value, name=name: {name: value})
              for name, value in FIELDS.items()),
            st.binary(max_size=40), anything))
        def ask(command: str, changes: Any) -> None:
            if isinstance(changes, dict):
                changes = {**other.params(command), 'config_kuryr': {},
                           **changes}
            answer = self.ask(command, changes)
            self.assertIn(answer.status_code,
                          (202, 204, 400, 410, 415, 500, 504), answer.text)
            self.assertEqual(before, self.state(), changes)
            self.assertTrue(self.node.lab.ping(POD), changes)

        ask()
        # An ADD with another valid CNI_IFNAME creates an interface with the
        # pod's MAC address. The interface and its claim end with the sandbox.
        self.node.lab.del_netns('other')
        self.node.lab.add_netns('other')
        self.add(other)
        self.assertTrue(self.node.lab.ping(OTHER))
        self.delete(other)
        self.delete(first)
        manager.Break0Manager(base.options()).sync()
        self.assertEqual({}, self.node.lab.routes())
