# SPDX-License-Identifier: Apache-2.0

"""The real kuryr-daemon and kuryr-cni, on the node of a lab."""

from __future__ import annotations

import concurrent.futures
import contextlib
import ipaddress
import json
import os
import re
import socket
import subprocess
import sys
import sysconfig
import tempfile
from typing import Any, Iterator, NamedTuple, Optional
import uuid
import venv

from kuryr_kubernetes import objects
from kuryr_kubernetes import os_vif_util
import os_vif
from os_vif.objects import network as osv_network
from os_vif.objects import route as osv_route
from os_vif.objects import subnet as osv_subnet
import psutil
import requests

from tests.support import kubeapi
from tests.support import lab
from tests.support import program

NODENAME = 'node-1'
ADDRESS = '127.0.0.1:5036'
BIN = os.path.dirname(sys.executable)

CONF = """\
[DEFAULT]
debug = true
log_file = %(log)s
use_stderr = false

[kubernetes]
api_root = %(api)s
token_file =
ssl_client_crt_file =
ssl_client_key_file =
watch_read_timeout = 20

[cni_daemon]
bind_address = %(address)s
worker_num = 30

[cni_health_server]
port = 8090

[oslo_concurrency]
lock_path = %(locks)s

[binding]
link_iface = eth0

"""


def serves(address: str = ADDRESS) -> bool:
    """Return whether the daemon's address accepts connections."""
    host, port = address.split(':')
    try:
        socket.create_connection((host, int(port)), lab.PATIENCE).close()
    except OSError:
        return False
    return True


class Answer(NamedTuple):
    """The daemon's answer: the HTTP status and the unparsed body."""

    status: int
    body: str


def macvlan_vif(*addresses: str, mac: Optional[str] = None,
                mtu: int = 1500, subnets: Optional[list[str]] = None) -> Any:
    """Return the VIF that Kuryr's controller creates for a Neutron port.

    :param mac: the port's MAC address; random by default
    :param subnets: CIDRs of the subnets of the addresses, by default the lab's
        LAN; the first address of each subnet is its gateway
    """
    os_vif.initialize()
    objects.register_locally_defined_vifs()
    network_id = str(uuid.uuid4())
    networks = {}
    for cidr in subnets or ['%s/%d' % (lab.LAN, lab.PREFIX)]:
        subnet = ipaddress.ip_interface(cidr).network
        networks[cidr] = osv_network.Network(id=network_id, mtu=mtu)
        networks[cidr].subnets.objects.append(osv_subnet.Subnet(
            uuid=str(uuid.uuid4()), cidr=str(subnet), dns=[],
            gateway=str(subnet[1]), routes=osv_route.RouteList(objects=[])))
    fixed_ips = [{'subnet_id': cidr, 'ip_address': address}
                 for address in addresses for cidr in networks
                 if ipaddress.ip_address(address)
                 in ipaddress.ip_interface(cidr).network]
    assert len(fixed_ips) == len(addresses), (addresses, list(networks))
    return os_vif_util.neutron_to_osvif_vif_nested_macvlan(
        _Port(id=str(uuid.uuid4()), network_id=network_id,
              mac_address=mac or random_mac(),
              fixed_ips=fixed_ips, status='ACTIVE'), networks)


class _Port(dict):  # type: ignore[type-arg]
    """A Neutron port. Kuryr reads its fields as items and attributes."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name)


def random_mac() -> str:
    """Return a random MAC address with Neutron's prefix."""
    return 'fa:16:3e:%02x:%02x:%02x' % tuple(os.urandom(3))


def stock_environment(path: str) -> str:
    """Make an environment without kuryr-break0; return its bin directory.

    The new environment links to the packages of the current environment.
    """
    venv.create(path, with_pip=False)
    bin_dir = os.path.join(path, 'bin')
    python = os.path.join(bin_dir, 'python')
    ours = sysconfig.get_path('purelib')
    theirs = sysconfig.get_path('purelib', vars={'base': path,
                                                 'platbase': path})
    for name in os.listdir(ours):
        if name.endswith('.pth'):
            continue  # an editable installation
        if not re.match(r'(__editable__.*)?kuryr[_-]break0', name):
            os.symlink(os.path.join(ours, name), os.path.join(theirs, name))
    for name in ('kuryr-daemon', 'kuryr-cni'):
        with open(os.path.join(BIN, name)) as file:
            text = file.read().split('\n', 1)[1]
        with open(os.path.join(bin_dir, name), 'w') as file:
            file.write('#!%s\n%s' % (python, text))
        os.chmod(os.path.join(bin_dir, name), 0o755)
    probe = subprocess.run([python, '-c', 'import kuryr_break0'], cwd=path,
                           stderr=subprocess.PIPE, text=True)
    assert "No module named 'kuryr_break0'" in probe.stderr, probe.stderr
    return bin_dir


class Pod:
    """A pod in the API, with a sandbox on the node."""

    def __init__(self, name: str, vifs: dict[str, Any], netns: str,
                 uid: str) -> None:
        self.name = name
        self.vifs = vifs
        self.netns = netns
        self.uid = uid
        self.container_id = uuid.uuid4().hex

    def params(self, command: str, **overrides: str) -> dict[str, str]:
        """Return the environment variables of a CNI request for the pod."""
        return {'CNI_COMMAND': command,
                'CNI_CONTAINERID': self.container_id,
                'CNI_NETNS': self.netns,
                'CNI_IFNAME': 'eth0',
                'CNI_PATH': '/opt/cni/bin',
                'CNI_ARGS': 'IgnoreUnknown=1;K8S_POD_NAMESPACE=default;'
                            'K8S_POD_NAME=%s;K8S_POD_INFRA_CONTAINER_ID=%s'
                            % (self.name, self.container_id),
                **overrides}


class Node:
    """A lab with a fake API, and a kuryr-daemon on demand.

    :param node: the lab; by default a new one, which this node closes
    """

    def __init__(self, node: Optional[lab.Lab] = None) -> None:
        self._stack = contextlib.ExitStack()
        self.lab = node or lab.Lab()
        if node is None:
            self._stack.callback(self.lab.close)
        self.api = self._stack.enter_context(kubeapi.KubeAPI())
        self.dir = self._stack.enter_context(tempfile.TemporaryDirectory())
        self.log = os.path.join(self.dir, 'kuryr-daemon.log')
        self.conf = os.path.join(self.dir, 'kuryr.conf')
        self.daemon: Any = None
        self._stack.callback(self.kill_daemon)

    def __enter__(self) -> Node:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._stack.close()

    def write_conf(self, break0: str = '') -> None:
        """Write the kuryr.conf of the node.

        :param break0: lines of the section ``[break0]``
        """
        with open(self.conf, 'w') as conf:
            conf.write(CONF % {'log': self.log, 'api': self.api.url,
                               'address': ADDRESS,
                               'locks': os.path.join(self.dir, 'locks')})
            conf.write('[break0]\n%s\n' % break0)

    def start_daemon(self, break0: str = '', bin_dir: str = BIN,
                     **environ: str) -> None:
        """Start kuryr-daemon, and wait until it accepts connections.

        :param break0: lines of the section ``[break0]``
        """
        self.write_conf(break0)
        self.daemon = program.start(
            [os.path.join(bin_dir, 'kuryr-daemon'),
             '--config-file', self.conf], cwd=self.dir,
            env={**os.environ, 'KUBERNETES_NODE_NAME': NODENAME,
                 'HOME': self.dir, **environ},
            stdout=open(os.path.join(self.dir, 'output'), 'ab'),
            stderr=subprocess.STDOUT)
        daemon = self.daemon
        lab.until(lambda: serves() or daemon.poll() is not None, self.output)
        if daemon.poll() is not None:
            raise AssertionError('kuryr-daemon ended:\n' + self.output())

    def kill_daemon(self) -> None:
        """Kill the daemon, if one runs, and all of its workers."""
        if self.daemon is not None:
            # The daemon's services have process groups of their own.
            family = []
            with contextlib.suppress(psutil.NoSuchProcess):
                family.append(psutil.Process(self.daemon.pid))
                family += family[0].children(recursive=True)
            for process in family:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
            self.daemon.wait()
            # Poll: before Linux 6.16, a wait by pidfd fails if the process has
            # ended and another process of its process group is running.
            lab.until(lambda: not any(each.is_running() for each in family))
            self.daemon = None
            # A service that was just starting keeps the socket for a moment.
            lab.until(lambda: not serves())

    def output(self) -> str:
        """Return all log lines and other output of the daemon."""
        text = ''
        for path in (os.path.join(self.dir, 'output'), self.log):
            with contextlib.suppress(FileNotFoundError), open(path) as file:
                text += file.read()
        return text

    def errors(self) -> str:
        """Return the daemon's errors, with their tracebacks."""
        # A message with a traceback has further lines without a date.
        return ''.join(re.findall(
            r'(?m)^\S+ \S+ \d+ (?:ERROR|CRITICAL) .*\n'
            r'(?:(?!\d{4}-\d\d-\d\d ).*\n)*', self.output()))

    def add_pod(self, name: str, *addresses: str, vif: Any = None,
                extra_vifs: Optional[dict[str, Any]] = None,
                netns: Optional[str] = None, has_port: bool = True) -> Pod:
        """Create a pod, its KuryrPort and its sandbox's namespace.

        :param netns: the path of a namespace that exists or will exist; by
            default a new one
        :param has_port: False creates no KuryrPort; see add_port()
        """
        vifs = {'eth0': vif or macvlan_vif(*addresses), **(extra_vifs or {})}
        manifest = self.api.create('pods', kubeapi.pod(name, NODENAME))
        pod = Pod(name, vifs, netns or self.lab.add_netns(name),
                  manifest['metadata']['uid'])
        if has_port:
            self.add_port(pod)
        return pod

    def add_port(self, pod: Pod) -> None:
        """Create the KuryrPort of a pod, as Kuryr's controller does."""
        self.api.create('kuryrports', kubeapi.kuryrport(
            self.api.get('pods', 'default', pod.name),
            {ifname: each.obj_to_primitive()
             for ifname, each in pod.vifs.items()}, NODENAME))

    def delete_pod(self, pod: Pod) -> None:
        """Delete the KuryrPort and the pod from the API."""
        for plural in ('kuryrports', 'pods'):
            obj = self.api.get(plural, 'default', pod.name)
            obj['metadata'].pop('finalizers', None)
            self.api.update(plural, obj)
            self.api.delete(plural, 'default', pod.name)

    def request(self, pod: Pod, command: str, **overrides: str) -> Answer:
        """Send kuryr-cni's request for a pod to the daemon."""
        response = requests.post(
            'http://%s/%sNetwork' % (ADDRESS, command.lower()),
            json={**pod.params(command, **overrides), 'config_kuryr': {}},
            headers={'Connection': 'close'},
            timeout=max(180, lab.PATIENCE))
        return Answer(response.status_code, response.text)

    def requests(self, pods: list[Pod], command: str) -> list[Answer]:
        """Send the same request for several pods at once."""
        with concurrent.futures.ThreadPoolExecutor(len(pods)) as pool:
            return list(pool.map(lambda pod: self.request(pod, command),
                                 pods))

    def cni(self, pod: Pod, command: str, bin_dir: str = BIN,
            **overrides: str) -> subprocess.CompletedProcess[str]:
        """Run kuryr-cni as a container runtime does."""
        return subprocess.run(
            [os.path.join(bin_dir, 'kuryr-cni')],
            input=json.dumps({'cniVersion': '0.3.1', 'name': 'kuryr',
                              'type': 'kuryr-cni', 'kuryr_conf': self.conf}),
            env={**os.environ, 'HOME': self.dir,
                 **pod.params(command, **overrides)},
            cwd=self.dir, text=True, stdout=subprocess.PIPE,
            stderr=subprocess.PIPE)


@contextlib.contextmanager
def node(break0: str = '') -> Iterator[Node]:
    """Yield a node with a running kuryr-daemon."""
    with Node() as it:
        it.start_daemon(break0)
        yield it
