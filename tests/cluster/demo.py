# SPDX-License-Identifier: Apache-2.0

"""Show a Deployment in a real cluster, with Kuryr alone and with break0.

::

    python -m tests.cluster.demo [JSON]

The file JSON gets the number of ready pods and of restarts over time;
``tests.cluster.plot`` draws it. The exit status is 1 if a check fails.
"""

from __future__ import annotations

import collections
import functools
import json
import pathlib
import sys
import time
from typing import Any, Callable

import prettytable

from tests.cluster import cluster as clusters
from tests.cluster import kubernetes
from tests.support import lab

REPLICAS = 4
#: Maximum seconds to watch Kuryr alone, until all pods have restarted.
WATCHED = 60


class Demo:

    def __init__(self, cluster: clusters.Cluster) -> None:
        self.cluster = cluster
        self.wrong = 0
        #: For each part: seconds, number of ready pods, number of restarts
        self.timelines: dict[str, list[tuple[float, int, int]]] = {}

    def watch(self, part: str, is_over: Callable[[list[dict[str, Any]]], bool]
              ) -> float:
        """Create the Deployment, and record its pods until they are as wanted.

        :returns: the duration in seconds
        """
        timeline = self.timelines[part] = []
        began = time.monotonic()
        self.cluster.deploy('web', REPLICAS)

        def sample() -> bool:
            pods = self.cluster.pods('web')
            timeline.append((
                time.monotonic() - began, sum(map(clusters.is_ready, pods)),
                sum(map(clusters.restarts, pods))))
            return is_over(pods)

        lab.until(sample, self.cluster.report)
        return time.monotonic() - began

    def say(self, text: str) -> None:
        print('\n' + text, flush=True)

    def check(self, text: str, is_fine: bool) -> None:
        """Count and print a failed check."""
        if not is_fine:
            self.wrong += 1
            print('WRONG: ' + text, flush=True)

    def show_pods(self, seconds: float) -> None:
        """Print the pods and their warning events."""
        reasons: dict[str, collections.Counter[str]] = (
            collections.defaultdict(collections.Counter))
        for event in kubernetes.items('events'):
            if event['type'] == 'Warning':
                reasons[event['involvedObject']['name']][
                    event['reason']] += event.get('count') or 1
        table = prettytable.PrettyTable(
            ['pod', 'node', 'address', 'ready', 'restarts', 'state',
             'warnings'])
        for pod in self.cluster.pods('web'):
            name = pod['metadata']['name']
            statuses = pod['status'].get('containerStatuses') or [{}]
            state: dict[str, dict[str, str]] = statuses[0].get('state', {})
            table.add_row([
                name, pod['spec'].get('nodeName', '-'),
                pod['status'].get('podIP', '-'),
                'yes' if clusters.is_ready(pod) else 'no',
                clusters.restarts(pod), ', '.join(
                    each.get('reason', kind) for kind, each in state.items()),
                ', '.join('%d %s' % (count, reason) for reason, count
                          in sorted(reasons[name].items())) or '-'])
        print('After %d s:\n%s' % (seconds, table), flush=True)

    def show_probes(self) -> None:
        """Print the messages of failed probes, each message once."""
        messages = collections.Counter(
            (event['reason'],
             event['message'].replace('"', '').split('dial tcp ')[-1])
            for event in self.cluster.events('Unhealthy', 'BackOff',
                                             'Killing'))
        print('$ kubectl get events', flush=True)
        for (reason, message), _ in sorted(messages.items())[:8]:
            print('%-10s %s' % (reason, message[:90].strip()), flush=True)
        if not messages:
            print('No probe has failed.', flush=True)

    def show_routes(self) -> None:
        for node in self.cluster.nodes:
            shown = node.machine.run('ip', 'route', 'show', 'dev', 'break0',
                                     check=False)
            print('%s $ ip route show dev break0\n%s' % (
                node.name, shown.stdout.strip() or '(no route)'), flush=True)
            own = {clusters.address(pod) for pod in self.cluster.pods('web')
                   if pod['spec']['nodeName'] == node.name}
            self.check('routes of ' + node.name, node.routes() == own)

    def show_pairs(self) -> None:
        """Print Neutron's allowed address pairs of the nodes' ports."""
        for node in self.cluster.nodes:
            pairs = self.cluster.neutron.pairs(self.cluster.ports[node.name])
            print('Allowed address pairs of the port of %s in Neutron:'
                  % node.name)
            for address, mac in sorted(pairs.items()):
                print('  %-14s %s' % (address, mac))
            device = node.machine.ip('link', 'show', 'break0')[0]['address']
            print('  break0 has %s, which is not among them.' % device,
                  flush=True)
            self.check('the MAC address of break0 is in Neutron',
                       device not in pairs.values())
            self.check('address pairs of ' + node.name, set(pairs) == {
                clusters.address(pod) for pod in self.cluster.pods('web')
                if pod['spec']['nodeName'] == node.name})

    def run_stock(self) -> None:
        self.say('1. Kuryr alone: the probes of kubelet do not reach the pods '
                 'of its node.')
        ends = time.monotonic() + WATCHED
        self.show_pods(self.watch('Kuryr alone', lambda pods: (
            time.monotonic() > ends or len(pods) == REPLICAS
            and all(map(clusters.restarts, pods)))))
        self.show_probes()
        self.check('a pod is ready without break0',
                   not self.cluster.ready('web'))
        self.check('each probe was answered without break0',
                   bool(self.cluster.unanswered_probes()))
        self.cluster.delete_by_force()

    def run_break0(self) -> None:
        self.say('2. The same Deployment with kuryr-break0 installed.')
        ready_after: list[float] = []

        def are_steady(pods: list[dict[str, Any]]) -> bool:
            if not ready_after and len(pods) == REPLICAS and all(
                    map(clusters.is_ready, pods)):
                ready_after.append(time.monotonic())
            # Without break0, the first liveness probes fail within 8 seconds.
            return bool(ready_after) and (
                time.monotonic() - ready_after[0] > 8)

        began = time.monotonic()
        self.watch('with break0', are_steady)
        self.show_pods(ready_after[0] - began)
        self.show_probes()
        for pod in self.cluster.pods('web'):
            self.check('%s was restarted' % pod['metadata']['name'],
                       not clusters.restarts(pod))
        for message in self.cluster.unanswered_probes():
            self.check(message, False)
        self.show_routes()
        self.show_pairs()

    def run_deletion(self) -> None:
        self.say('3. After the Deployment was deleted.')
        self.cluster.delete_by_force()
        print('No route, neighbour, guard entry, record or Neutron port is '
              'left.', flush=True)

    def run(self) -> int:
        stock = self.cluster.stock
        clusters.at_once(*(functools.partial(node.remove_break0, stock)
                           for node in self.cluster.nodes))
        self.run_stock()
        clusters.at_once(*(node.install_break0
                           for node in self.cluster.nodes))
        self.run_break0()
        self.run_deletion()
        return self.wrong


def main() -> int:
    print('Starting a cluster of two nodes: etcd, Kubernetes, containerd, '
          'MariaDB, Neutron and Kuryr.', flush=True)
    began = time.monotonic()
    # The NIC of a node is not named eth0: when Kuryr alone deletes the eth0 of
    # a pod, it also deletes an eth0 of the node that is a virtual interface.
    with clusters.running(2, parent='ens3', is_dual=False) as cluster:
        print('It runs after %d s.' % (time.monotonic() - began), flush=True)
        demo = Demo(cluster)
        wrong = demo.run()
        for path in sys.argv[1:]:
            pathlib.Path(path).write_text(json.dumps(demo.timelines))
    if wrong:
        print('\n%d results are not as expected. The logs of all programs are '
              'in %s.' % (wrong, cluster.logs), file=sys.stderr)
        return 1
    print('\nAll results are as expected.')
    return 0


if __name__ == '__main__':
    sys.exit(main())
