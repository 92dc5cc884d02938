# SPDX-License-Identifier: Apache-2.0

"""Show the effect of break0, with the real kuryr-daemon and kuryr-cni.

Exits with 1 if a check fails.
"""

from __future__ import annotations

import concurrent.futures
import json
import sys
from typing import Optional

import prettytable

from tests.support import kuryr
from tests.support import lab

PODS = {'pod-1': '100.75.30.71', 'pod-2': '100.75.30.72',
        'pod-3': '100.75.30.73'}
HOSTS = {'node': lab.NODE, 'LAN host': lab.LAN, **PODS}


class Demo:

    def __init__(self, node: kuryr.Node) -> None:
        self.node = node
        self.pods: dict[str, kuryr.Pod] = {}
        self.wrong = 0

    def say(self, text: str) -> None:
        print('\n' + text, flush=True)

    def check(self, what: str, fine: bool) -> None:
        """Count and print a failed check."""
        if not fine:
            self.wrong += 1
            print('WRONG: ' + what, flush=True)

    def cni(self, command: str, *names: str) -> None:
        """Run kuryr-cni for pods, as a container runtime does."""
        for name in names:
            done = self.node.cni(self.pods[name], command)
            print('kuryr-cni %s %s: exit %d%s' % (
                command, name, done.returncode,
                ', ' + json.loads(done.stdout)['ips'][0]['address']
                if done.stdout and not done.returncode else ''), flush=True)
            self.check(done.stdout + done.stderr, done.returncode == 0)

    def reachability(self, gone: Optional[str], by_break0: bool) -> None:
        """Ping all hosts from all hosts with empty neighbour tables.

        :param gone: the name of a host that must not answer, if any
        :param by_break0: whether the node and the pods must reach each other
        """
        names = [name for name in HOSTS if name != gone]
        table = prettytable.PrettyTable(
            ['from \\ to', 'address', *HOSTS])
        rows = {name: [name, HOSTS[name]] for name in names}
        for target in HOSTS:
            self.node.lab.forget_neighbours()
            # A ping without an answer takes a second, so all pings run at
            # once.
            with concurrent.futures.ThreadPoolExecutor() as threads:
                answers = list(threads.map(
                    lambda source: source != target and self.node.lab.ping(
                        HOSTS[target], {'node': None, 'LAN host': 'lan'}.get(
                            source, source), cold=False), names))
            for source, answered in zip(names, answers):
                if source == target:
                    rows[source].append('-')
                    continue
                across = {source, target} & {'node'} and (
                    {source, target} & set(PODS))
                expected = target != gone and (by_break0 or not across)
                rows[source].append('yes' if answered else 'no')
                self.check('from %s to %s: %s' % (
                    source, target, rows[source][-1]), answered == expected)
        table.add_rows(list(rows.values()))
        print(table, flush=True)

    def kernel(self, *bound: str) -> None:
        """Show break0 and its routes, and check them."""
        shown = self.node.lab.run('ip', '-details', 'link', 'show', 'break0',
                                  check=False).stdout
        print('$ ip -details link show break0\n' + shown, end='')
        routes = self.node.lab.routes()
        if shown and 'does not exist' not in shown:
            print('$ ip route show dev break0')
            print(self.node.lab.run('ip', 'route', 'show', 'dev',
                                    'break0').stdout, end='', flush=True)
        self.check('the routes are %s' % sorted(routes),
                   set(routes) == {PODS[name] for name in bound})

    def run(self) -> int:
        """Show the three steps, and return the number of failed checks."""
        for name, address in PODS.items():
            self.pods[name] = self.node.add_pod(name, address)

        self.say('1. Kuryr alone ([break0] enabled = false): the kernel keeps '
                 'the node and its pods apart.')
        self.node.start_daemon('enabled = false')
        self.cni('ADD', *PODS)
        self.reachability(None, by_break0=False)
        self.cni('DEL', *PODS)
        self.node.kill_daemon()

        self.say('2. With break0: each reaches all others.')
        self.node.start_daemon()
        self.cni('ADD', *PODS)
        self.reachability(None, by_break0=True)
        self.kernel(*PODS)

        self.say('3. After pod-2 was deleted: its route is gone, the others '
                 'stay.')
        self.cni('DEL', 'pod-2')
        self.node.delete_pod(self.pods['pod-2'])
        self.reachability('pod-2', by_break0=True)
        self.kernel('pod-1', 'pod-3')
        return self.wrong


def main() -> int:
    print('A node (%s) with a NIC on a LAN and three pods; all of it is in '
          'namespaces that end with this program.' % lab.NODE)
    with kuryr.Node() as node:
        wrong = Demo(node).run()
        if wrong:
            print('\n%s\n%d results are not as expected; above is the log of '
                  'kuryr-daemon.' % (node.output(), wrong), file=sys.stderr)
            return 1
    print('\nAll results are as expected.')
    return 0


if __name__ == '__main__':
    sys.exit(main())
