# SPDX-License-Identifier: Apache-2.0

"""Show a Deployment in a real cluster, with Kuryr alone and with break0.

Exits with 1 if a check fails.
"""

from __future__ import annotations

import collections
import sys
import time

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
            for event in kubernetes.items('events')
            if event['reason'] in ('Unhealthy', 'BackOff', 'Killing'))
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
        self.cluster.deploy('web', REPLICAS)
        began = time.monotonic()

        def are_failing() -> bool:
            pods = self.cluster.pods('web')
            return time.monotonic() - began > WATCHED or (
                len(pods) == REPLICAS and all(map(clusters.restarts, pods)))

        lab.until(are_failing, self.cluster.report)
        self.show_pods(time.monotonic() - began)
        self.show_probes()
        self.check('a pod is ready without break0',
                   not self.cluster.ready('web'))
        kubernetes.delete('deployments', 'web')
        lab.until(lambda: not self.cluster.pods('web')
                  and not self.cluster.neutron.pods(), self.cluster.report)
        kubernetes.kubectl(self.cluster.control, 'delete', 'events', '--all')

    def run_break0(self) -> None:
        self.say('2. The same Deployment with kuryr-break0 installed.')
        began = time.monotonic()
        self.cluster.deploy('web', REPLICAS)
        self.cluster.until_ready('web', REPLICAS)
        seconds = time.monotonic() - began
        # Without break0, the first liveness probes fail within 8 seconds.
        time.sleep(8)
        self.show_pods(seconds)
        self.show_probes()
        for pod in self.cluster.pods('web'):
            self.check('%s was restarted' % pod['metadata']['name'],
                       not clusters.restarts(pod))
        self.check('a probe has failed', not [
            event for event in kubernetes.items('events')
            if event['reason'] == 'Unhealthy'])
        self.show_routes()
        self.show_pairs()

    def run_deletion(self) -> None:
        self.say('3. After the Deployment was deleted.')
        kubernetes.delete('deployments', 'web')
        lab.until(lambda: not self.cluster.pods('web')
                  and not self.cluster.leftovers(), lambda: '\n'.join(
            self.cluster.leftovers()))
        print('No route, neighbour, guard entry, record or Neutron port is '
              'left.', flush=True)

    def run(self) -> int:
        for node in self.cluster.nodes:
            node.remove_break0(self.cluster.stock)
        self.run_stock()
        for node in self.cluster.nodes:
            node.install_break0()
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
        wrong = Demo(cluster).run()
    if wrong:
        print('\n%d results are not as expected. The logs of all programs are '
              'in %s.' % (wrong, cluster.logs), file=sys.stderr)
        return 1
    print('\nAll results are as expected.')
    return 0


if __name__ == '__main__':
    sys.exit(main())
