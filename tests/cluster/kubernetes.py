# SPDX-License-Identifier: Apache-2.0

"""The control plane of Kubernetes, and a client of its API."""

from __future__ import annotations

import glob
import json
import os
import subprocess
from typing import Any, Optional

import requests
import urllib3
import yaml

from tests.cluster import machine as machines
from tests.support import lab

PORT = 6443
URL = 'https://%s:%d' % (lab.LAN, PORT)
TOKEN = 'cluster-token'
SERVICES = '10.96.0.0/16'
#: All programs and tests use this account.
KUBECONFIG = json.dumps({
    'apiVersion': 'v1', 'kind': 'Config', 'current-context': 'cluster',
    'clusters': [{'name': 'cluster', 'cluster': {
        'server': URL, 'insecure-skip-tls-verify': True}}],
    'users': [{'name': 'admin', 'user': {'token': TOKEN}}],
    'contexts': [{'name': 'cluster', 'context': {
        'cluster': 'cluster', 'user': 'admin'}}]})

CONFIG = '/etc/kubernetes/kubeconfig'
_CERTIFICATES = '/etc/kubernetes'
_TYPES = {'pods': 'api/v1', 'nodes': 'api/v1', 'events': 'api/v1',
          'services': 'api/v1', 'endpoints': 'api/v1',
          'serviceaccounts': 'api/v1', 'configmaps': 'api/v1',
          'namespaces': 'api/v1', 'deployments': 'apis/apps/v1',
          'statefulsets': 'apis/apps/v1', 'daemonsets': 'apis/apps/v1',
          'cronjobs': 'apis/batch/v1beta1', 'jobs': 'apis/batch/v1',
          'kuryrports': 'apis/openstack.org/v1'}


class ControlPlane:
    """etcd, the API server, the controller manager and the scheduler.

    :param programs: the directory with the programs of Kubernetes
    :param crds: the directory with the resource definitions of Kuryr
    """

    def __init__(self, machine: machines.Machine, programs: str,
                 crds: str) -> None:
        self._machine = machine
        self._crds = crds
        machine.write(CONFIG, KUBECONFIG, 0o600)
        machine.write('/etc/kubernetes/tokens',
                      '%s,admin,admin,system:masters\n' % TOKEN, 0o600)
        machine.run('openssl', 'genrsa', '-out',
                    _CERTIFICATES + '/accounts.key', '2048')
        self.etcd = machine.add('etcd', [
            'etcd', '--data-dir=/var/lib/cluster/etcd',
            '--listen-client-urls=http://127.0.0.1:2379',
            '--advertise-client-urls=http://127.0.0.1:2379',
            '--listen-peer-urls=http://127.0.0.1:2380'],
            is_ready=lambda: _answers('http://127.0.0.1:2379/health'))
        self.server = machine.add('kube-apiserver', [
            programs + '/kube-apiserver',
            '--etcd-servers=http://127.0.0.1:2379',
            '--bind-address=0.0.0.0', '--secure-port=%d' % PORT,
            '--advertise-address=' + lab.LAN,
            '--cert-dir=' + _CERTIFICATES,
            '--token-auth-file=/etc/kubernetes/tokens',
            '--authorization-mode=RBAC', '--allow-privileged=true',
            '--service-cluster-ip-range=' + SERVICES,
            '--feature-gates=IPv6DualStack=true',
            '--service-account-issuer=' + URL,
            '--service-account-key-file=%s/accounts.key' % _CERTIFICATES,
            '--service-account-signing-key-file=%s/accounts.key'
            % _CERTIFICATES, '--kubelet-preferred-address-types=InternalIP'],
            is_ready=lambda: _answers(URL + '/readyz'))
        client = ['--kubeconfig=' + CONFIG, '--leader-elect=false']
        self.manager = machine.add('kube-controller-manager', [
            programs + '/kube-controller-manager', *client,
            '--root-ca-file=%s/apiserver.crt' % _CERTIFICATES,
            '--service-account-private-key-file=%s/accounts.key'
            % _CERTIFICATES,
            # The API reports a halted node after this time.
            '--node-monitor-grace-period=20s'],
            is_ready=lambda: _answers('https://127.0.0.1:10257/healthz'))
        self.scheduler = machine.add('kube-scheduler', [
            programs + '/kube-scheduler', *client],
            is_ready=lambda: _answers('https://127.0.0.1:10259/healthz'))

    def start_api(self) -> None:
        """Start the API, with the resource definitions of Kuryr."""
        self.etcd.start()
        self.server.start()
        for path in glob.glob(os.path.join(self._crds, '*.yaml')):
            with open(path) as file:
                call('POST', '/apis/apiextensions.k8s.io/v1/'
                     'customresourcedefinitions', yaml.safe_load(file))
        lab.until(lambda: 'kuryrports' in call(
            'GET', '/apis/openstack.org/v1', check=False).text)

    def start_managers(self) -> None:
        """Start the programs that create and place pods."""
        self.manager.start(wait=False)
        self.scheduler.start()
        self.manager.wait_ready()
        # The API admits no pod without a service account.
        lab.until(lambda: names('serviceaccounts'))


def _answers(url: str) -> bool:
    try:
        return _request('GET', url).ok
    except requests.RequestException:
        return False


def _request(method: str, url: str, **options: Any) -> requests.Response:
    with requests.Session() as session:
        # The environment's certificates and proxies do not apply here.
        session.trust_env = False
        urllib3.disable_warnings(urllib3.exceptions.InsecureRequestWarning)
        return session.request(
            method, url, verify=False, timeout=30,
            **{'headers': {'Authorization': 'Bearer ' + TOKEN}, **options})


def call(method: str, path: str, body: Optional[Any] = None,
         kind: str = 'application/json', check: bool = True
         ) -> requests.Response:
    """Call the API."""
    answer = _request(method, URL + path, data=body and json.dumps(body),
                      headers={'Authorization': 'Bearer ' + TOKEN,
                               'Content-Type': kind})
    assert answer.ok or not check, '%s %s: %d %s' % (
        method, path, answer.status_code, answer.text)
    return answer


def path(plural: str, name: str = '', namespace: str = 'default') -> str:
    where = '' if plural in ('nodes', 'namespaces') else (
        '/namespaces/' + namespace)
    return '/%s%s/%s%s' % (_TYPES[plural], where, plural, name and '/' + name)


def create(plural: str, obj: dict[str, Any],
           namespace: str = 'default') -> None:
    call('POST', path(plural, namespace=namespace), obj)


def patch(plural: str, name: str, change: dict[str, Any]) -> None:
    call('PATCH', path(plural, name), change,
         'application/strategic-merge-patch+json')


def delete(plural: str, name: str, seconds: Optional[int] = None,
           check: bool = True) -> None:
    """Delete an object.

    :param seconds: the grace period; 0 deletes by force
    """
    call('DELETE', path(plural, name), {
        'kind': 'DeleteOptions', 'apiVersion': 'v1',
        'propagationPolicy': 'Background',
        **({} if seconds is None else {'gracePeriodSeconds': seconds})},
        check=check)


def items(plural: str, selector: str = '',
          namespace: str = 'default') -> list[dict[str, Any]]:
    """Return the objects of a kind, filtered by a label selector."""
    found: list[dict[str, Any]] = call(
        'GET', path(plural, namespace=namespace) + (
            '?labelSelector=' + selector if selector else '')).json()['items']
    return found


def names(plural: str, selector: str = '') -> list[str]:
    return [each['metadata']['name'] for each in items(plural, selector)]


def kubectl(machine: machines.Machine, *args: str, check: bool = True
            ) -> subprocess.CompletedProcess[str]:
    """Run kubectl on a machine."""
    return machine.run('kubectl', '--kubeconfig=' + CONFIG, *args,
                       check=check)
