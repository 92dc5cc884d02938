# SPDX-License-Identifier: Apache-2.0

"""The bases of tests with the real kuryr-daemon."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from typing import Any
import unittest

from tests.functional import schemas
from tests.support import kuryr
from tests.support import lab
from tests.support import program

POD = '100.75.30.71'


def macvlans(node: kuryr.Node) -> list[str]:
    """Return the names of the macvlans in the node's own namespace."""
    return [link['ifname'] for link in node.lab.ip('link', 'show')
            if link.get('linkinfo', {}).get('info_kind') == 'macvlan']


class DaemonTestCase(unittest.TestCase):

    def setUp(self) -> None:
        super().setUp()
        self.node = kuryr.Node()
        self.node.__enter__()
        self.addCleanup(self.node.__exit__)

    def start_patient_daemon(self, break0: str = '') -> None:
        """Start a daemon with long lock timeouts; see base.patient().

        :param break0: lines of the section ``[break0]``
        """
        with open(os.path.join(self.node.dir, 'sitecustomize.py'),
                  'w') as file:
            file.write('from kuryr_break0 import ledger\n'
                       'from kuryr_break0.ledger import journal\n'
                       'ledger.Ledger.__init__.__defaults__ = (170,)\n'
                       'journal._PATIENCE = 170\n')
        self.node.start_daemon(break0, PYTHONPATH=self.node.dir)

    def add(self, pod: kuryr.Pod) -> None:
        """Send an ADD that must succeed."""
        answer = self.node.request(pod, 'ADD')
        self.assertEqual(202, answer.status, answer.body + self.node.errors())

    def delete(self, pod: kuryr.Pod, **overrides: str) -> None:
        answer = self.node.request(pod, 'DEL', **overrides)
        self.assertEqual(204, answer.status, answer.body + self.node.errors())

    def assert_reachable(self, pod: kuryr.Pod, expected: bool = True) -> None:
        address = str(pod.vifs['eth0'].network.subnets.objects[0]
                      .ips.objects[0].address)
        self.assertEqual(
            (expected, expected),
            (self.node.lab.ping(address),
             self.node.lab.ping(lab.NODE, pod.name)))

    def probe(self, program: str) -> str:
        """Run Python code in a process of its own, and return its output."""
        return subprocess.run(
            [sys.executable, '-W', 'ignore', '-c', textwrap.dedent(program)],
            check=True, text=True, stdout=subprocess.PIPE).stdout.strip()


POD6 = 'fd00:30::71'
OTHER = '100.75.30.72'
SUBNETS = ['%s/%d' % (lab.LAN, lab.PREFIX), lab.LAN6 + '/64']


class AdoptTestCase(DaemonTestCase):

    def call(self, *args: str, code: int = 0, **environ: str) -> str:
        """Run kuryr-break0 on the node, and return its output."""
        done = program.run(
            [program.BREAK0, '--config-file', self.node.conf, *args],
            text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            env={**os.environ, 'KUBERNETES_NODE_NAME': kuryr.NODENAME,
                 **environ})
        self.assertEqual(code, done.returncode, done.stdout + done.stderr)
        # stderr has only the command's own error message.
        self.assertEqual(code in (2, 3), bool(done.stderr), done.stderr)
        return done.stderr if code in (2, 3) else done.stdout

    def adopt(self, *args: str, code: int = 0,
              **environ: str) -> dict[str, Any]:
        """Run ``adopt``, and return its findings by pod and interface."""
        findings = json.loads(self.call('adopt', '--json', *args, code=code,
                                        **environ))
        schemas.validator('adopt').validate(findings)
        found = {'%(pod)s/%(ifname)s' % each: each for each in findings}
        self.assertEqual(len(findings), len(found))
        return found

    def outcomes(self, *args: str, code: int = 0,
                 **environ: str) -> dict[str, str]:
        return {name: each['outcome'] for name, each in self.adopt(
            *args, code=code, **environ).items()}

    def running_pod(self, name: str, *addresses: str, ifname: str = 'eth0',
                    **kwargs: Any) -> kuryr.Pod:
        """Create a pod in API and lab, with a macvlan like Kuryr's."""
        vif = kuryr.macvlan_vif(*addresses, subnets=[
            subnet for subnet in SUBNETS
            if any((':' in each) == (':' in subnet) for each in addresses)])
        self.node.lab.add_pod(name, *addresses, mac=str(vif.address))
        return self.node.add_pod(name, vif=vif,
                                 netns='/run/netns/' + name, **kwargs)
