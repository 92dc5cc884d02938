# SPDX-License-Identifier: Apache-2.0

"""The cluster: a control plane and nodes on one LAN."""

from __future__ import annotations

import concurrent.futures
import contextlib
import functools
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from typing import Any, Callable, Iterator, Optional

from tests.cluster import kubernetes
from tests.cluster import machine as machines
from tests.cluster import node as nodes
from tests.cluster import openstack
from tests.support import images
from tests.support import kuryr
from tests.support import lab

BIN = os.path.dirname(sys.executable)
#: kuryr-break0's pod_vif_driver, a replacement of Kuryr's nested-macvlan.
DRIVER = 'nested-macvlan-break0'
IMAGE = 'cluster/box:1'


def kept_programs() -> str:
    """Return the directory of the programs built by tests/cluster/programs."""
    return os.path.realpath(os.path.join(
        os.environ.get('XDG_CACHE_HOME', '/var/tmp'), 'kuryr-break0-cluster'))


class Cluster:
    """A control plane and its nodes, which run within the context.

    The calling process has namespaces of its own (tools/in-root-lab). The
    network namespace of the process becomes the LAN.

    :param size: the number of nodes
    :param logs: the directory of the logs of all programs
    :param parent: the name of the NIC of each node
    :param driver: [kubernetes] pod_vif_driver of kuryr-controller
    :param is_dual: whether pods also have an IPv6 address
    """

    def __init__(self, size: int, logs: str, parent: str = 'eth0',
                 driver: str = DRIVER, is_dual: bool = True) -> None:
        self._is_dual = is_dual
        self._parent = parent
        self.kept = kept_programs()
        self.logs = logs
        self._stack = contextlib.ExitStack()
        self._size = size
        self._driver = driver
        self.nodes: list[nodes.Node] = []
        #: The ID of each node's Neutron port, by the node's name.
        self.ports: dict[str, str] = {}

    def __enter__(self) -> Cluster:
        with contextlib.ExitStack() as stack:
            self._start(stack)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._stack.close()

    def _start(self, stack: contextlib.ExitStack) -> None:
        shutil.rmtree(self.logs, ignore_errors=True)
        os.makedirs(self.logs)
        # The directory is in memory, because databases wait for their disk.
        directory = tempfile.mkdtemp(prefix='cluster-')
        stack.callback(os.rmdir, directory)
        _run('mount', '-t', 'tmpfs', '-o', 'size=60%,mode=755', 'cluster',
             directory)
        stack.callback(_run, 'umount', '--lazy', directory)
        os.symlink(os.path.abspath(self.logs), directory + '/logs')
        self._directory = directory
        _run('mount', '-t', 'tmpfs', 'run', '/run')
        os.mkdir('/run/netns')
        stack.callback(_run, 'umount', '--lazy', '/run')
        self._make_lan()
        self.control = machines.Machine('control', directory, is_on_lan=True)
        stack.callback(self.control.halt)
        self.control.boot()
        sources = os.environ.get('KURYR_SOURCES', os.path.join(
            sysconfig.get_path('data'), 'kuryr-sources'))
        crds = next(each.path for each in os.scandir(sources)
                    if each.is_dir()) + '/kubernetes_crds/kuryr_crds'
        self.plane = kubernetes.ControlPlane(
            self.control, self.kept + '/bin', crds)
        self.neutron = openstack.Neutron(self.control, self.kept)
        self.controller = openstack.Controller(
            self.control, self.neutron, kubernetes.URL, kubernetes.TOKEN,
            BIN + '/kuryr-k8s-controller', self._driver, self._is_dual)
        image = images.saved(directory, 'docker.io/' + IMAGE, '/bin/sh', '-c',
                             'exec sleep 100000')
        self.nodes = [nodes.Node(number, directory, self.kept, image, BIN,
                                 self._parent)
                      for number in range(1, self._size + 1)]
        for node in self.nodes:
            stack.callback(node.halt)
            node.boot()
            node.install()
        at_once(self._start_openstack, self.plane.start_api,
                *(node.prepare for node in self.nodes))
        at_once(self.controller.start, self.plane.start_managers,
                *(node.start for node in self.nodes))

    @staticmethod
    def _make_lan() -> None:
        for command in (
                'link set lo up', 'link add lan type bridge mcast_snooping 0',
                'link set lan up', 'address add %s/24 dev lan' % lab.LAN,
                'address add %s/64 dev lan nodad' % lab.LAN6):
            _run('ip', *command.split())

    def _start_openstack(self) -> None:
        self.neutron.start()
        for node in self.nodes:
            self.ports[node.name] = self.neutron.add_node(
                node.name, node.address, node.mac)

    @functools.cached_property
    def stock(self) -> str:
        """Return the bin directory of an environment without kuryr-break0."""
        return kuryr.stock_environment(self._directory + '/stock')

    # Methods for tests and the demo

    def deploy(self, name: str, replicas: int,
               node: Optional[nodes.Node] = None, **spec: Any) -> None:
        """Create a Deployment of pods that answer HTTP on port 80."""
        kubernetes.create('deployments', deployment(
            name, replicas, node.name if node else None, **spec))

    def pods(self, app: str) -> list[dict[str, Any]]:
        return kubernetes.items('pods', 'app=' + app)

    def ready(self, app: str) -> list[dict[str, Any]]:
        """Return the pods of an application that are ready."""
        return [pod for pod in self.pods(app) if is_ready(pod)]

    def events(self, *reasons: str) -> list[dict[str, Any]]:
        """Return the events of the existing pods.

        kubelet can report an event of a pod after the pod was deleted.
        """
        existing = {pod['metadata']['uid'] for pod in kubernetes.items('pods')}
        return [event for event in kubernetes.items('events')
                if event['involvedObject'].get('uid') in existing
                and event['reason'] in reasons]

    def unanswered_probes(self) -> list[str]:
        """Return the messages of the failed probes of the existing pods.

        A refused probe is not among them: it has reached the pod, whose
        server does not listen yet.
        """
        return [event['message'] for event in self.events('Unhealthy')
                if 'connection refused' not in event['message']]

    def until_ready(self, app: str, count: int) -> float:
        """Wait until exactly `count` pods exist and are ready.

        :returns: the duration in seconds
        """
        return lab.until(lambda: len(self.pods(app)) == count == len(
            self.ready(app)), self.report)

    def report(self) -> str:
        """Return the pods, the latest events and the directory of the logs."""
        return '\n'.join([
            kubernetes.kubectl(self.control, 'get', 'pods', '-o', 'wide',
                               '--all-namespaces', check=False).stdout,
            kubernetes.kubectl(
                self.control, 'get', 'events', '--sort-by=.lastTimestamp',
                check=False).stdout[-3000:],
            'The logs of all programs are in ' + self.logs])

    def delete_by_force(self) -> None:
        """Delete all workloads with their pods, without waiting for kubelet.

        Without force, a pod stays in the API until kubelet has removed its
        sandbox. kubelet removes the sandboxes of a node one by one, and Kuryr
        waits for 5 s within each DEL (k8s_cni_registry.py).
        """
        for plural in ('deployments', 'statefulsets', 'cronjobs', 'jobs'):
            for name in kubernetes.names(plural):
                kubernetes.delete(plural, name, check=False)
        # A ReplicaSet or a Job replaces its deleted pods until it is deleted
        # too.
        lab.until(lambda: all(
            'deletionTimestamp' in pod['metadata']
            or 'ownerReferences' not in pod['metadata']
            for pod in kubernetes.items('pods')), self.report)
        for name in kubernetes.names('pods'):
            kubernetes.delete('pods', name, 0, check=False)
        lab.until(lambda: not kubernetes.names('pods')
                  and not self.leftovers()
                  and not any(node.sandboxes() for node in self.nodes),
                  lambda: '\n'.join([*self.leftovers(), self.report()]))

    def leftovers(self) -> list[str]:
        """Return the leftover and the missing items of the pods.

        The items are routes, neighbours, guard entries and records of each
        node, and ports and address pairs of Neutron.
        """
        pods = {(pod['spec']['nodeName'], address)
                for pod in kubernetes.items('pods')
                if not pod['spec'].get('hostNetwork')
                for address in addresses(pod)}
        found: list[str] = []

        def compare(name: str, has: set[str], wanted: set[str]) -> None:
            found.extend('%s without a pod: %s' % (name, each)
                         for each in sorted(has - wanted))
            found.extend('%s missing: %s' % (name, each)
                         for each in sorted(wanted - has))

        bound = {address for _, address in pods}
        compare('Neutron port', {
            fixed['ip_address'] for port in self.neutron.pods().values()
            for fixed in port['fixed_ips']}, bound)
        for node in self.nodes:
            own = {address for name, address in pods if name == node.name}
            compare('address pair of ' + node.name, set(
                self.neutron.pairs(self.ports[node.name])), own)
            compare('route of ' + node.name, node.routes(), own)
            compare('neighbour of ' + node.name, node.neighbours(), own)
            compare('record of ' + node.name, node.recorded(), own)
            compare('guard entry of ' + node.name, node.admitted(), own)
        return found


def deployment(name: str, replicas: int, node: Optional[str] = None,
               **spec: Any) -> dict[str, Any]:
    """Return the Deployment of pods that answer HTTP on port 80."""
    return {'apiVersion': 'apps/v1', 'kind': 'Deployment',
            'metadata': {'name': name},
            'spec': {'replicas': replicas,
                     'selector': {'matchLabels': {'app': name}},
                     'template': template(name, node, **spec)}}


def template(name: str, node: Optional[str] = None, *, period: int = 2,
             **spec: Any) -> dict[str, Any]:
    """Return the template of a pod that answers HTTP on port 80.

    The timeout of its probes leaves time for a busy machine, and for TCP,
    which retransmits a lost first packet after a second.

    :param node: the node to run on; any by default
    :param period: seconds between two probes of each kind
    """
    probe = {'httpGet': {'path': '/', 'port': 80}, 'periodSeconds': period,
             'timeoutSeconds': 3}
    return {'metadata': {'labels': {'app': name}}, 'spec': {
        **({'nodeSelector': {'kubernetes.io/hostname': node}}
           if node else {}),
        'terminationGracePeriodSeconds': 1, 'dnsPolicy': 'Default',
        'tolerations': [{'operator': 'Exists'}],
        'containers': [{
            'name': 'web', 'image': IMAGE, 'imagePullPolicy': 'Never',
            'command': ['sh', '-c', 'mkdir /www; hostname >/www/index.html; '
                        'exec httpd -f -p [::]:80 -h /www'],
            'readinessProbe': probe,
            'livenessProbe': {**probe, 'failureThreshold': 3}}],
        **spec}}


def is_ready(pod: dict[str, Any]) -> bool:
    return 'deletionTimestamp' not in pod['metadata'] and any(
        each['type'] == 'Ready' and each['status'] == 'True'
        for each in pod['status'].get('conditions', ()))


def restarts(pod: dict[str, Any]) -> int:
    return sum(each['restartCount'] for each in
               pod['status'].get('containerStatuses', ()))


def address(pod: dict[str, Any]) -> str:
    """Return the IPv4 address of a pod."""
    found: str = pod['status']['podIP']
    return found


def addresses(pod: dict[str, Any]) -> set[str]:
    """Return all addresses that a pod has so far."""
    return {each['ip'] for each in pod['status'].get('podIPs', ())}


def at_once(*calls: Callable[[], None]) -> None:
    """Call functions in threads, and wait for all of them.

    :raises Exception: the error of the first argument that failed
    """
    with concurrent.futures.ThreadPoolExecutor(len(calls)) as pool:
        for each in [pool.submit(call) for call in calls]:
            each.result()


def _run(*command: str) -> None:
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True,
                          stderr=subprocess.STDOUT)
    assert not done.returncode, '%s: %s' % (' '.join(command), done.stdout)


@contextlib.contextmanager
def running(size: int, logs: str = 'build/cluster', **options: Any
            ) -> Iterator[Cluster]:
    """Yield a cluster. If the block fails, print the path of its logs."""
    cluster = Cluster(size, logs, **options)
    try:
        with cluster:
            yield cluster
    except BaseException:
        print('The logs of all programs are in ' + os.path.abspath(logs),
              file=sys.stderr)
        raise
