# SPDX-License-Identifier: Apache-2.0

"""Lists the pods of this node with Kuryr's API client."""

from __future__ import annotations

import calendar
import dataclasses
import time
from typing import Any, Iterator, Optional, Sequence
from urllib import parse

from kuryr_kubernetes import clients
from kuryr_kubernetes import config as k_config
from kuryr_kubernetes import constants as k_const
from kuryr_kubernetes import exceptions as k_exc
from kuryr_kubernetes import objects as k_objects
from kuryr_kubernetes.objects import vif as k_vif
from kuryr_kubernetes import utils as k_utils
import os_vif
from os_vif.objects import base as osv_base

from kuryr_break0 import exceptions
from kuryr_break0.kuryr import vif as break0_vif
from kuryr_break0 import model

_NO_VIF = 'it has no VIF yet'


@dataclasses.dataclass(frozen=True)
class Port:
    """An interface of a pod.

    :ivar pod: namespace/name of the pod
    :ivar ifname: its name in the KuryrPort
    :ivar mac: its MAC address
    :ivar subnets: its networks
    :ivar refusal: the reason why it cannot be bound; None for a nested
        macvlan of a running pod
    :ivar damaged: the reason why it cannot be read, or None
    """

    pod: str
    ifname: str = ''
    mac: str = ''
    addresses: tuple[model.IPAddress, ...] = ()
    subnets: tuple[model.IPNetwork, ...] = ()
    refusal: Optional[str] = None
    damaged: Optional[str] = None


def configure(files: Sequence[str], directories: Sequence[str]) -> None:
    """Let Kuryr's modules read their options.

    :raises oslo_config.cfg.Error: if the options cannot be read
    """
    k_config.CONF([], project='kuryr', default_config_files=files,
                  default_config_dirs=directories)


def link_iface() -> Optional[str]:
    """Return Kuryr's option for the parent of the pods, or None."""
    return k_config.CONF.binding.link_iface or None


def find_proc() -> str:
    """Return the directory of the node's processes, such as /proc."""
    daemon = k_config.CONF.cni_daemon
    return (daemon.docker_mode and daemon.netns_proc_dir) or '/proc'


def list_ports() -> list[Port]:
    """List the interfaces of the pods of this node.

    :raises KubernetesUnavailable: if Kuryr's objects cannot be read
    """
    os_vif.initialize()
    k_objects.register_locally_defined_vifs()
    kuryrports, pods = _read()
    by_name = {_name(pod): pod for pod in pods}
    return [port for kuryrport in kuryrports
            for port in _ports(kuryrport, by_name.get(_name(kuryrport)))]


def list_waiting_pods(seconds: float, timeout: int) -> list[str]:
    """List the pods of this node whose KuryrPorts have no VIF.

    :param seconds: minimum age of such a KuryrPort
    :param timeout: seconds to wait for an answer of the API
    :raises KubernetesUnavailable: if Kuryr's objects cannot be read
    """
    for option in ('watch_connection_timeout', 'watch_read_timeout'):
        k_config.CONF.set_override(option, timeout, 'kubernetes')
    kuryrports, pods = _read()
    by_name = {_name(pod): pod for pod in pods}
    return sorted(_name(each) for each in kuryrports if _has_waited(
        each, by_name.get(_name(each)), seconds))


def node_name() -> str:
    """Return Kuryr's name of this node."""
    return str(k_utils.get_nodename())


def list_nodes() -> list[str]:
    """List the nodes with KuryrPorts; none if the API denies the request."""
    try:
        ports = clients.get_kubernetes_client().get(
            k_const.K8S_API_CRD_KURYRPORTS)['items']
        return sorted({str(each['metadata']['labels'][
            k_const.KURYRPORT_LABEL]) for each in ports})
    except (k_exc.K8sClientException, RuntimeError, OSError, KeyError,
            TypeError, ValueError, AttributeError):
        return []


def _read() -> tuple[list[Any], list[Any]]:
    node = k_utils.get_nodename()
    try:
        clients.setup_kubernetes_client()
        client = clients.get_kubernetes_client()
        # kuryr-daemon watches with the same selectors.
        kuryrports, pods = (
            client.get('%s?%s' % (path, parse.urlencode({
                selector: '%s=%s' % (field, node)})))['items']
            for path, selector, field in (
                (k_const.K8S_API_CRD_KURYRPORTS, 'labelSelector',
                 k_const.KURYRPORT_LABEL),
                (k_const.K8S_API_PODS, 'fieldSelector', 'spec.nodeName')))
        return kuryrports, pods
    # Errors of requests are OSErrors. A missing file causes a RuntimeError, a
    # missing variable of the environment a KeyError.
    except (k_exc.K8sClientException, RuntimeError, OSError, KeyError,
            ValueError, TypeError, AttributeError) as err:
        # If another program answers, Kuryr's client raises a ValueError,
        # TypeError or AttributeError.
        raise exceptions.KubernetesUnavailable(
            url=k_config.CONF.kubernetes.api_root or 'its service address',
            reason='%s is missing' % err if isinstance(err, KeyError)
            else ' '.join(str(err).split()) or repr(err)) from err


def _name(obj: Any) -> str:
    return '%(namespace)s/%(name)s' % obj['metadata']


def _ports(kuryrport: Any, pod: Optional[Any]) -> Iterator[Port]:
    name, ifname = _name(kuryrport), ''
    try:
        reason = _not_running(kuryrport, pod)
        if reason is not None:
            yield Port(name, refusal=reason)
            return
        for ifname, value in kuryrport['status']['vifs'].items():
            yield _port(name, ifname, value['vif'])
    except Exception as err:  # a KuryrPort may contain anything
        yield Port(name, ifname, damaged='it cannot be read: %r' % err)


def _port(pod: str, ifname: str, primitive: Any) -> Port:
    vif = osv_base.VersionedObject.obj_from_primitive(primitive)
    if not isinstance(vif, k_vif.VIFMacvlanNested):
        return Port(pod, ifname, refusal='it is a %s' % vif.obj_name())
    return Port(pod, ifname, str(vif.address).lower(),
                tuple(break0_vif.addresses(vif)),
                tuple(break0_vif.subnets(vif)))


def _has_waited(kuryrport: Any, pod: Optional[Any], seconds: float) -> bool:
    try:
        created = calendar.timegm(time.strptime(
            kuryrport['metadata']['creationTimestamp'], '%Y-%m-%dT%H:%M:%SZ'))
        return (_not_running(kuryrport, pod) == _NO_VIF
                and time.time() - created >= seconds)
    except Exception:  # a KuryrPort may contain anything
        return False


def _not_running(kuryrport: Any, pod: Optional[Any]) -> Optional[str]:
    """Return the reason why a KuryrPort has no running pod, or None."""
    if pod is None:
        return 'its pod is gone'
    if (kuryrport['metadata'].get('deletionTimestamp')
            or pod['metadata'].get('deletionTimestamp')):
        return 'it is being deleted'
    if (kuryrport['spec']['podUid'] != pod['metadata']['uid']
            and not kuryrport['spec'].get('podStatic')):
        return 'it belongs to an earlier pod with this name'
    if k_utils.is_host_network(pod):
        return 'it uses the network of the node'
    if pod.get('status', {}).get('phase') in ('Succeeded', 'Failed'):
        return 'it has ended'
    if not kuryrport.get('status', {}).get('vifs'):
        return _NO_VIF
    return None
