# SPDX-License-Identifier: Apache-2.0

"""A driver of kuryr-controller for nested macvlan.

Only kuryr-controller imports this module, if ``[kubernetes] pod_vif_driver``
names the driver. Kuryr's own driver, in 6.0.0 to 10.0.0, has two faults.
First, it does not initialize its base classes, so no pod gets a port. Second,
it reads the port of the node before it takes the lock for writing that port.
If many pods were created at once, most pods would therefore get no port, and
the ports of failed attempts would stay in Neutron.
"""

from __future__ import annotations

import contextlib
import functools
from typing import Any, Callable, ClassVar, Optional

from kuryr.lib import constants as kl_const
from kuryr.lib import exceptions as kl_exc
from kuryr_kubernetes import clients
from kuryr_kubernetes import config as k_config
from kuryr_kubernetes.controller.drivers import nested_macvlan_vif
from kuryr_kubernetes.controller.drivers import utils as k_utils
from kuryr_kubernetes.controller.drivers import vif_pool
from kuryr_kubernetes import exceptions as k_exc
from kuryr_kubernetes.objects import vif as k_vif
from kuryr_kubernetes import os_vif_util
from openstack import exceptions as os_exc

from kuryr_break0.kuryr import address_pairs
from kuryr_break0 import log

LOG = log.get_logger(__name__)

#: The name of the driver's entry point.
NAME = 'nested-macvlan-break0'
#: The errors for a node's port and for another port that does not exist.
_ABSENT = (kl_exc.NoResourceException, os_exc.ResourceNotFound)


class PortNotReady(k_exc.PortNotReady):  # type: ignore[misc]
    """For a temporary reason, a port was not created or not deleted.

    Kuryr recognises the name of this class. It calls the driver again for up
    to 500 seconds, and does not report its handler as unhealthy. An unhealthy
    handler would restart the controller (kuryr_kubernetes.handlers.retry).
    """

    def __init__(self, text: str) -> None:
        Exception.__init__(self, text)


class NestedMacvlanDriver(
        nested_macvlan_vif.NestedMacvlanPodVIFDriver):  # type: ignore[misc]
    """Creates and deletes a pod's port, and its pairs on the node's port."""

    #: The pairs of each node's port, by the address of the node. All drivers
    #: of the process share them, because Kuryr can create several drivers.
    _nodes: ClassVar[dict[str, address_pairs.AddressPairs]] = {}

    def __init__(self) -> None:
        # Kuryr's class has an __init__ that does not call its base class.
        super(nested_macvlan_vif.NestedMacvlanPodVIFDriver, self).__init__()
        if k_config.CONF.kubernetes.pod_vif_driver == NAME:
            # Kuryr looks up the driver that activates and releases a VIF in a
            # table, by the class of the VIF. No option can extend the table.
            vif_pool.VIF_TYPE_TO_DRIVER_MAPPING[
                k_vif.VIFMacvlanNested.__name__] = NAME

    def request_vif(self, pod: Any, project_id: str, subnets: Any,
                    security_groups: Any) -> Optional[Any]:
        """Create the port of a pod; return its VIF.

        :returns: None if the pod is being deleted
        :raises PortNotReady: if Neutron fails, or refuses the pairs; the port
            and its pairs are deleted then
        :raises openstack.exceptions.HttpException: if Neutron refuses to
            create a port; Kuryr waits if the quota is exceeded, or if a
            security group is gone
        """
        if pod['metadata'].get('deletionTimestamp'):
            self._remove_others(pod)
            return None
        if not _node(pod):
            raise PortNotReady('kubelet has not reported the address of the '
                               'node of pod %s yet' % _name(pod))
        try:
            port = clients.get_network_client().create_port(
                **self._get_port_request(pod, project_id, subnets,
                                         security_groups))
        except Exception as err:
            if (isinstance(err, os_exc.ResourceNotFound)
                    or not address_pairs.is_transient(err)):
                raise
            raise _failed(pod, err) from err
        try:
            if port.binding_vif_type == 'binding_failed':
                raise PortNotReady('Neutron could not bind its port %s to '
                                   'the node. The log of the Neutron server '
                                   'says why' % port.id)
            if not self._tag_on_creation:
                k_utils.tag_neutron_resources([port])
            vif = os_vif_util.neutron_to_osvif_vif_nested_macvlan(port,
                                                                  subnets)
            self._pairs(_node(pod)).assign(port.mac_address, (
                each['ip_address'] for each in port.fixed_ips))
            return vif
        except BaseException as err:  # also if the controller is stopped
            self._remove(pod, port.id, port.mac_address)
            if not isinstance(err, Exception):
                raise
            raise _failed(pod, err) from err

    def request_vifs(self, *args: Any, **kwargs: Any) -> Any:
        raise k_exc.InvalidKuryrConfiguration(
            'There are no pools of nested macvlan ports. Set [kubernetes] '
            'vif_pool_driver = noop.')

    def release_vif(self, pod: Any, vif: Any, *args: Any,
                    **kwargs: Any) -> None:
        """Delete all ports of a pod that ends, and their pairs.

        :raises PortNotReady: if a port or a pair is left
        """
        is_removed = self._remove(pod, vif.id, str(vif.address))
        if not self._remove_others(pod) or not is_removed:
            raise PortNotReady('Port %s of pod %s is not released yet' % (
                vif.id, _name(pod)))

    def _remove_others(self, pod: Any) -> bool:
        """Delete the ports of a pod that no VIF names.

        A controller leaves such a port if it is killed after it has created
        the port, and before it has written the VIF into the KuryrPort.

        :returns: whether no port is left
        """
        metadata = pod['metadata']
        # If the pod is gone, Kuryr passes the metadata of its KuryrPort.
        uids = [metadata['uid'], *(
            owner['uid'] for owner in metadata.get('ownerReferences', ())
            if owner['kind'] == 'Pod')]
        try:
            ports = list(clients.get_network_client().ports(
                device_owner=kl_const.DEVICE_OWNER, device_id=uids))
        except Exception as err:
            LOG.error('The ports of pod %s cannot be listed: %s', _name(pod),
                      _reason(err))
            return False
        return all([self._remove(pod, port.id, port.mac_address)
                    for port in ports if port.device_id in uids])

    def _remove(self, pod: Any, port: str, mac: str) -> bool:
        """Delete a port and its pairs; return whether neither is left.

        If one deletion fails, the other is tried all the same, since Kuryr
        does not always call the driver again.
        """
        is_removed = True
        node = _node(pod)
        try:
            if not node:
                LOG.warning('Pod %s is deleted without an address of its '
                            'node. If the port of the node has an allowed '
                            'address pair with MAC address %s, remove it.',
                            _name(pod), mac)
            elif not self._is_found(
                    functools.partial(self._pairs(node).assign, mac)):
                LOG.info('No port in Neutron has the address %s of the node '
                         'of pod %s, so no allowed address pair is removed',
                         node, _name(pod))
        except Exception as err:
            is_removed = False
            LOG.error('The allowed address pairs with MAC address %s of pod '
                      '%s may still be on the port of its node (%s): %s',
                      mac, _name(pod), node, _reason(err))
        try:
            delete = functools.partial(
                clients.get_network_client().delete_port, port,
                ignore_missing=False)
            address_pairs.repeat(functools.partial(self._is_found, delete))
        except Exception as err:
            is_removed = False
            LOG.error('Port %s of pod %s could not be deleted: %s. If '
                      'the port still exists when the pod is gone, run: '
                      'openstack port delete %s',
                      port, _name(pod), _reason(err), port)
        return is_removed

    def _is_found(self, request: Callable[[], Any]) -> bool:
        """Send a request for a port; return False if the port does not exist.

        Just after its start, Neutron can answer for existing ports that they
        do not exist (neutron.policy.init sets the enforcer before the rules).
        So the answer only counts if Neutron then shows another port, and
        gives the same answer again.

        :raises Exception: if the request fails, or if Neutron shows no port
        """
        try:
            request()
            return True
        except _ABSENT:
            if not self._shows_ports():
                raise
        try:
            request()
            return True
        except _ABSENT:
            return False

    def _shows_ports(self) -> bool:
        """Return whether Neutron shows any port in the nodes' subnets."""
        subnets = self.nodes_subnets_driver.get_nodes_subnets(
            raise_on_empty=True)
        return any(True for _ in clients.get_network_client().ports(
            fixed_ips=['subnet_id=%s' % subnet for subnet in subnets],
            limit=1))

    def _pairs(self, node: str) -> address_pairs.AddressPairs:
        return self._nodes.setdefault(node, address_pairs.AddressPairs(
            functools.partial(self._get_parent_port_by_host_ip, node),
            self._update_port_address_pairs))


def _node(pod: Any) -> str:
    """Return the address of a pod's node; empty if it is not known."""
    return str(pod.get('status', {}).get('hostIP') or '')


def _name(pod: Any) -> str:
    return '%(namespace)s/%(name)s' % pod['metadata']


def _failed(pod: Any, err: Exception) -> PortNotReady:
    """Report that a pod gets no port; return the error to raise."""
    text = 'Pod %s gets no port on node %s (%s): %s' % (
        _name(pod), pod['spec'].get('nodeName'), _node(pod), _reason(err))
    LOG.error('%s', text)
    with contextlib.suppress(Exception):  # for kubectl describe pod
        clients.get_kubernetes_client().add_event(pod, 'NoPort', text,
                                                  'Warning')
    return PortNotReady(text)


def _reason(err: BaseException) -> str:
    if address_pairs.is_exhausted(err):
        return ('the port of the node has as many allowed address pairs as '
                'Neutron permits. Set max_allowed_address_pair, in the '
                'section [DEFAULT] of neutron.conf, to the number of pod '
                'addresses that a node may have, and restart the Neutron '
                'server (%s)' % err)
    if isinstance(err, kl_exc.NoResourceException):
        return ('no port in Neutron has this address in one of the subnets '
                'of [pod_vif_nested] worker_nodes_subnets')
    return ' '.join(str(err).split()) or repr(err)
