# SPDX-License-Identifier: Apache-2.0

"""Neutron on MariaDB, and Kuryr's controller."""

from __future__ import annotations

import os
import shutil
from typing import Any, Optional
import uuid

import requests

from tests.cluster import machine as machines
from tests.support import lab

PORT = 9696
URL = 'http://%s:%d' % (lab.LAN, PORT)
PROJECT = uuid.uuid5(uuid.NAMESPACE_DNS, 'kuryr-break0').hex

DATABASE = '/var/lib/cluster/mysql'
SOCKET = '/run/mariadb.sock'

#: The port of a node has an address pair for each pod. The default of
#: max_allowed_address_pair, 10, is too small.
CONF = '''\
[DEFAULT]
auth_strategy = noauth
transport_url = fake://
api_paste_config = %(paste)s
core_plugin = ml2
service_plugins = revisions,tag,timestamp
max_allowed_address_pair = 500
notify_nova_on_port_status_changes = false
notify_nova_on_port_data_changes = false
use_stderr = true
[database]
connection = mysql+pymysql://root@localhost/neutron?unix_socket=%(socket)s
[ml2]
type_drivers = flat
tenant_network_types =
mechanism_drivers = binds_all
extension_drivers = port_security
[ml2_type_flat]
flat_networks = lan
[oslo_concurrency]
lock_path = /run/neutron-locks
[quotas]
quota_port = -1
'''

#: Neutron parses the arguments of the process. A command such as
#: waitress-serve would have arguments of its own, so the server runs by python
#: -c. It loads the policies before the first request. Otherwise the first
#: request loads them, and requests of other threads meanwhile are answered as
#: if no port and no subnet existed.
SERVER = '''
from neutron import policy
from neutron.wsgi import api
import waitress
policy.init()
waitress.serve(api.application, listen='%s:%d', threads=8)
'''

#: No agent of Neutron runs here, so this mechanism driver binds the ports.
DRIVER = '''\
from neutron_lib.plugins.ml2 import api


class BindsAll(api.MechanismDriver):

    def initialize(self):
        pass

    def bind_port(self, context):
        segment = context.segments_to_bind[0]
        context.set_binding(segment[api.ID], 'other', {}, status='ACTIVE')
'''
ENTRY_POINT = '''\
[neutron.ml2.mechanism_drivers]
binds_all = binds_all:BindsAll
'''

#: Kuryr's own drivers support a single subnet for a pod.
SUBNETS_DRIVER = '''\
from kuryr_kubernetes.controller.drivers import base
from kuryr_kubernetes import utils
from oslo_config import cfg


class TwoSubnets(base.PodSubnetsDriver):

    def get_subnets(self, pod, project_id):
        return {each: utils.get_subnet(each) for each in
                cfg.CONF.neutron_defaults.pod_subnet.split(',')}
'''
SUBNETS_ENTRY_POINT = '''\
[kuryr_kubernetes.controller.drivers.pod_subnets]
two = two_subnets:TwoSubnets
'''

CONTROLLER_CONF = '''\
[DEFAULT]
debug = true
use_stderr = true
[kubernetes]
api_root = %(api)s
token_file = /etc/kuryr/token
ssl_verify_server_crt = false
enabled_handlers = vif,kuryrport
pod_vif_driver = %(driver)s
pod_subnets_driver = %(subnets_driver)s
vif_pool_driver = noop
[neutron]
auth_type = none
endpoint = %(neutron)s
[neutron_defaults]
project = %(project)s
pod_subnet = %(pod_subnets)s
pod_security_groups = %(group)s
service_subnet = %(subnet)s
[pod_vif_nested]
worker_nodes_subnets = %(subnet)s
[oslo_concurrency]
lock_path = /run/kuryr-locks
'''


class Neutron:
    """Neutron with the network of the LAN.

    :param machine: the machine of Neutron
    :param kept: the directory into which ``tests/cluster/programs`` installs
        Neutron
    """

    def __init__(self, machine: machines.Machine, kept: str) -> None:
        self._machine = machine
        self._kept = kept
        self._bin = os.path.join(kept, 'neutron/bin')
        self.network = self.subnet = self.subnet6 = self.group = ''
        self.database = machine.add(
            'mariadb', ['mariadbd', '--no-defaults', '--user=root',
                        '--datadir=' + DATABASE, '--skip-networking',
                        '--skip-grant-tables', '--socket=' + SOCKET,
                        '--pid-file=/run/mariadb.pid'],
            is_ready=lambda: machine.run(
                'mariadb-admin', '--no-defaults', '--socket=' + SOCKET,
                'ping', check=False).returncode == 0)
        self.server = machine.add(
            'neutron', [self._bin + '/python', '-c', SERVER % (
                lab.LAN, PORT)],
            environ={'PYTHONPATH': '/opt/neutron-driver',
                     'OS_NEUTRON_CONFIG_FILES': '/etc/neutron.conf',
                     'OS_NEUTRON_CONFIG_DIR': '/etc'},
            is_ready=self._answers)

    def start(self) -> None:
        """Start Neutron, wait until it serves, and create its network."""
        self._machine.write('/etc/neutron.conf', CONF % {
            'socket': SOCKET, 'paste': os.path.join(
                self._kept, 'neutron/etc/neutron/api-paste.ini')})
        _add_entry_point(self._machine, '/opt/neutron-driver/binds_all',
                         DRIVER, ENTRY_POINT)
        self._make_database()
        self.server.start()
        if not self.network:
            self._make_network()

    def _make_database(self) -> None:
        """Start MariaDB, and create Neutron's tables at the first start."""
        directory = self._machine.path(DATABASE)
        made = os.path.join(self._kept, 'database')
        if os.path.isdir(made) and not os.path.isdir(directory):
            shutil.copytree(made, directory)
        if os.path.isdir(directory):
            self.database.start()
            return
        os.makedirs(directory)
        self._machine.run('mariadb-install-db', '--no-defaults',
                          '--user=root', '--datadir=' + DATABASE,
                          '--auth-root-authentication-method=normal')
        self.database.start()
        self._machine.run('mariadb', '--no-defaults', '--socket=' + SOCKET,
                          '--execute=CREATE DATABASE neutron')
        self._machine.run(self._bin + '/neutron-db-manage', '--config-file',
                          '/etc/neutron.conf', 'upgrade', 'heads')
        self.database.terminate()
        shutil.rmtree(made + '.new', ignore_errors=True)
        shutil.copytree(directory, made + '.new')
        os.rename(made + '.new', made)
        self.database.start()

    def _make_network(self) -> None:
        self.network = self.create(
            'network', {'name': 'lan', 'project_id': PROJECT,
                        'provider:network_type': 'flat',
                        'provider:physical_network': 'lan'})['id']
        self.subnet = self.create(
            'subnet', {'name': 'lan', 'network_id': self.network,
                       'project_id': PROJECT, 'ip_version': 4,
                       'cidr': '100.75.30.0/24', 'gateway_ip': lab.LAN,
                       'enable_dhcp': False, 'allocation_pools': [
                           {'start': '100.75.30.100',
                            'end': '100.75.30.250'}]})['id']
        self.subnet6 = self.create(
            'subnet', {'name': 'lan6', 'network_id': self.network,
                       'project_id': PROJECT, 'ip_version': 6,
                       'cidr': 'fd00:30::/64', 'gateway_ip': lab.LAN6,
                       'enable_dhcp': False, 'allocation_pools': [
                           {'start': 'fd00:30::1000',
                            'end': 'fd00:30::ffff'}]})['id']
        self.group = next(
            each['id'] for each in self.items('security-groups')
            if each['project_id'] == PROJECT)

    def _answers(self) -> bool:
        try:
            return self._call('GET', 'networks').ok
        except requests.ConnectionError:
            return False

    def _call(self, method: str, path: str,
              body: Optional[Any] = None) -> requests.Response:
        return requests.request(
            method, '%s/v2.0/%s' % (URL, path), json=body, timeout=60,
            headers={'X-Project-Id': PROJECT, 'X-Roles': 'admin'})

    def _checked(self, method: str, path: str,
                 body: Optional[Any] = None) -> Any:
        answer = self._call(method, path, body)
        assert answer.ok, '%s %s: %d %s' % (method, path, answer.status_code,
                                            answer.text)
        return answer.json() if answer.text else None

    def create(self, kind: str, fields: dict[str, Any]) -> dict[str, Any]:
        found: dict[str, Any] = self._checked(
            'POST', kind + 's', {kind: fields})[kind]
        return found

    def update(self, kind: str, uid: str, **fields: Any) -> None:
        self._checked('PUT', '%ss/%s' % (kind, uid), {kind: fields})

    def delete(self, kind: str, uid: str) -> None:
        self._checked('DELETE', '%ss/%s' % (kind, uid))

    def items(self, kinds: str) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = self._checked('GET', kinds)[
            kinds.replace('-', '_')]
        return found

    def add_node(self, name: str, address: str, mac: str) -> str:
        """Create the Neutron port of a node, and return its ID."""
        found: str = self.create('port', {
            'name': name, 'network_id': self.network, 'project_id': PROJECT,
            'mac_address': mac, 'admin_state_up': True, 'fixed_ips': [
                {'subnet_id': self.subnet, 'ip_address': address}],
            'device_owner': 'compute:nova', 'binding:host_id': name})['id']
        return found

    def pools(self) -> list[dict[str, str]]:
        """Return the ranges of the pods' addresses."""
        found: list[dict[str, str]] = self._checked(
            'GET', 'subnets/' + self.subnet)['subnet']['allocation_pools']
        return found

    def set_pools(self, pools: list[dict[str, str]]) -> None:
        self.update('subnet', self.subnet, allocation_pools=pools)

    def pods(self) -> dict[str, dict[str, Any]]:
        """Return the ports that Kuryr has created, by IPv4 address."""
        return {each['fixed_ips'][0]['ip_address']: each
                for each in self.items('ports')
                if each['device_owner'] == 'compute:kuryr'}

    def pairs(self, port: str) -> dict[str, str]:
        """Return the allowed address pairs of a port: MAC by IP address."""
        found = self._checked('GET', 'ports/' + port)['port']
        return {each['ip_address']: each['mac_address']
                for each in found['allowed_address_pairs']}


class Controller:
    """kuryr-controller.

    :param driver: [kubernetes] pod_vif_driver
    :param is_dual: whether pods have an address of each family
    """

    def __init__(self, machine: machines.Machine, neutron: Neutron,
                 api: str, token: str, program: str, driver: str,
                 is_dual: bool) -> None:
        self._is_dual = is_dual
        self._machine = machine
        self._neutron = neutron
        self._fields = {'api': api, 'driver': driver, 'neutron': URL,
                        'project': PROJECT}
        self._token = token
        self.program = machine.add(
            'kuryr-controller', [program, '--config-file',
                                 '/etc/kuryr/kuryr.conf'], is_family=True,
            environ={'PYTHONPATH': '/opt/kuryr-driver'},
            is_ready=self._answers)

    def start(self) -> None:
        subnet = self._neutron.subnet
        _add_entry_point(self._machine, '/opt/kuryr-driver/two_subnets',
                         SUBNETS_DRIVER, SUBNETS_ENTRY_POINT)
        self._machine.write('/etc/kuryr/token', self._token)
        self._machine.write('/etc/kuryr/kuryr.conf', CONTROLLER_CONF % {
            **self._fields, 'subnet': subnet, 'pod_subnets': ','.join(
                [subnet, self._neutron.subnet6] if self._is_dual
                else [subnet]),
            'subnets_driver': 'two' if self._is_dual else 'default',
            'group': self._neutron.group})
        self.program.start()

    @staticmethod
    def _answers() -> bool:
        try:
            return requests.get('http://127.0.0.1:8082/alive',
                                timeout=5).ok
        except requests.RequestException:
            return False


def _add_entry_point(machine: machines.Machine, path: str, module: str,
                     entry_point: str) -> None:
    """Write a module with an entry point, like an installed module.

    :param path: the path of the module, without its suffix
    """
    machine.write(path + '.py', module)
    machine.write(path + '-1.dist-info/entry_points.txt', entry_point)
    machine.write(path + '-1.dist-info/METADATA', 'Metadata-Version: 2.1\n'
                  'Name: %s\nVersion: 1\n' % os.path.basename(path))
