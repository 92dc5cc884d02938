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

from tests import kubeapi
from tests import lab
from tests import program

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
    """Whether somebody accepts connections for the daemon."""
    host, port = address.split(':')
    try:
        socket.create_connection((host, int(port)), lab.PATIENCE).close()
    except OSError:
        return False
    return True


class Answer(NamedTuple):
    """What the daemon said: HTTP status, and the body as it came."""

    status: int
    body: str


def macvlan_vif(*addresses: str, mac: Optional[str] = None,
                mtu: int = 1500, subnets: Optional[list[str]] = None) -> Any:
    """A VIF as an unmodified controller makes it, of a Neutron port.

    :param subnets: CIDRs of the subnets that the addresses are in, the
        lab's LAN by default; the first address of each is its gateway
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
    """Kuryr reads a Neutron port as a mapping here and by attribute there."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name)


def random_mac() -> str:
    """A MAC address as Neutron gives them."""
    return 'fa:16:3e:%02x:%02x:%02x' % tuple(os.urandom(3))


def stock_environment(path: str) -> str:
    """Make an environment with all but kuryr-break0; where its programs are.

    What is installed is linked, not installed again.
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
    """A pod that the API knows, with a sandbox on the node."""

    def __init__(self, name: str, vifs: dict[str, Any], netns: str,
                 uid: str) -> None:
        self.name = name
        self.vifs = vifs
        self.netns = netns
        self.uid = uid
        self.container_id = uuid.uuid4().hex

    def params(self, command: str, **overrides: str) -> dict[str, str]:
        """The environment that a CNI plugin gets for it."""
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
    """A lab with the stand-in for the API, and a kuryr-daemon on demand.

    :param node: the lab; by default a new one, which ends with this
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
        """Start kuryr-daemon and wait until it serves.

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
        """Kill the daemon and all its workers; none is fine."""
        if self.daemon is not None:
            # Its services have process groups of their own.
            family = []
            with contextlib.suppress(psutil.NoSuchProcess):
                family.append(psutil.Process(self.daemon.pid))
                family += family[0].children(recursive=True)
            for process in family:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
            self.daemon.wait()
            # To wait for one by a pidfd is an error before 6.16, if it is gone
            # and others of its group are not.
            lab.until(lambda: not any(each.is_running() for each in family))
            self.daemon = None
            # One that it was just starting has the socket for a moment.
            lab.until(lambda: not serves())

    def output(self) -> str:
        """All that the daemon has logged or printed."""
        text = ''
        for path in (os.path.join(self.dir, 'output'), self.log):
            with contextlib.suppress(FileNotFoundError), open(path) as file:
                text += file.read()
        return text

    def errors(self) -> str:
        """What of that is an error, with its traceback."""
        # A traceback within a message has lines of its own.
        return ''.join(re.findall(
            r'(?m)^\S+ \S+ \d+ (?:ERROR|CRITICAL) .*\n'
            r'(?:(?!\d{4}-\d\d-\d\d ).*\n)*', self.output()))

    def add_pod(self, name: str, *addresses: str, vif: Any = None,
                extra_vifs: Optional[dict[str, Any]] = None,
                netns: Optional[str] = None, has_port: bool = True) -> Pod:
        """Create a pod, its KuryrPort and its sandbox's namespace.

        :param netns: path of a namespace that is there, or will be
        :param has_port: whether it has its KuryrPort yet; see add_port()
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
        """Send what kuryr-cni sends to the daemon."""
        response = requests.post(
            'http://%s/%sNetwork' % (ADDRESS, command.lower()),
            json={**pod.params(command, **overrides), 'config_kuryr': {}},
            headers={'Connection': 'close'},
            timeout=max(180, lab.PATIENCE))
        return Answer(response.status_code, response.text)

    def requests(self, pods: list[Pod], command: str) -> list[Answer]:
        """The same for many pods at once."""
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
    """A node on which kuryr-daemon runs."""
    with Node() as it:
        it.start_daemon(break0)
        yield it
