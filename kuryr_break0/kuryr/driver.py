# SPDX-License-Identifier: Apache-2.0

"""The binding driver that Kuryr calls."""

from __future__ import annotations

import contextlib
import types
from typing import Any, Iterator, Optional

from kuryr_kubernetes.cni.binding import nested
from kuryr_kubernetes import config as k_config
from kuryr_kubernetes import exceptions as k_exc

from kuryr_break0 import config
from kuryr_break0 import exceptions
from kuryr_break0 import kernel
from kuryr_break0.kernel import ipdb
from kuryr_break0.kuryr import comparison
from kuryr_break0.kuryr import patches
from kuryr_break0.kuryr import pod_binding
from kuryr_break0.kuryr import vif as break0_vif
from kuryr_break0.ledger import Ledger
from kuryr_break0.ledger import readers
from kuryr_break0 import log
from kuryr_break0.manager import Break0Manager
from kuryr_break0 import model

LOG = log.get_logger(__name__)

_IFF_LOOPBACK = 8  # linux/if.h


class PodNotConnected(k_exc.CNITimeout):  # type: ignore[misc]
    """The ADD failed for a temporary reason.

    For a CNITimeout, kuryr-daemon returns CNI's code 11, "try again later",
    and kubelet tries again. After three errors of other classes, kuryr-daemon
    restarts, but a restart would not help here.
    """


class Break0MacvlanDriver(nested.MacvlanDriver):  # type: ignore[misc]
    """Binds a pod as Kuryr does, then makes it reachable from its node."""

    #: The configuration that the first process of kuryr-daemon has read.
    _reader: Optional[readers.Reader] = None

    def __init__(self) -> None:
        super().__init__()
        self._parent: Optional[str] = None

    @classmethod
    def note_options(cls, options: config.Options) -> None:
        """Store a digest of kuryr-daemon's options, and the time.

        The first process of kuryr-daemon calls this method when it starts.
        Each bind stores the same options again, because the state directory
        may not have existed before.
        """
        if cls._reader is None:
            cls._reader = readers.describe(k_config.CONF)
        readers.store(Ledger(options.state_dir), readers.DAEMON, cls._reader)

    def connect(self, vif: Any, ifname: str, netns: str,
                container_id: str) -> None:
        """Bind a VIF. Kuryr configures the pod's addresses afterwards.

        :raises PodNotConnected: if the kernel refuses the pod's interface or,
            in strict mode, if break0 cannot bind the pod
        """
        owner = model.Owner(container_id, ifname)
        unreachable = '%s may not be reachable from its node' % _describe(
            owner, vif)
        options = None
        with self._logged(unreachable):
            options = config.load(k_config.CONF)
        try:
            sandbox = pod_binding.sandbox_path(netns)
            if _is_reserved_name(vif.vif_name,
                                 config.read_device_name(k_config.CONF)):
                raise exceptions.NameOfBreak0(name=str(vif.vif_name))
            pod_binding.remove_leftover(str(vif.vif_name))
            if self._is_direct(options):
                self._connect_directly(vif, ifname, sandbox)
                patches.replace_configure_l3(self._configure_l3, vif)
            else:
                with patches.read_interfaces_only():
                    ipdb.repeat_dumps('connect ' + ifname, super().connect,
                                      vif, ifname, netns, container_id)
                pod_binding.clear_group(sandbox, ifname)
                patches.replace_configure_l3(patches.configure_l3_repeatedly)
        except exceptions.Break0Error as err:
            raise PodNotConnected(str(err)) from err
        if options is None or not options.enabled:
            return
        try:
            assert self._parent is not None  # set by _detect_iface_name
            Break0Manager(options).bind(
                owner, break0_vif.addresses(vif), parent=self._parent,
                mac=str(vif.address), netns=sandbox,
                subnets=break0_vif.subnets(vif), origin=model.Origin.KURYR,
                pod=patches.pod_name())
            self._housekeep(options)
        except Exception as err:  # the pod starts despite any error
            _log(unreachable, err)
            if options.strict or isinstance(
                    err, exceptions.GuardUnavailable):
                with self._logged('Cannot undo the ADD'):
                    self.disconnect(vif, ifname, netns, container_id)
                raise PodNotConnected(str(err)) from err
        finally:
            with self._logged('Cannot record the options'):
                self.note_options(options)

    def disconnect(self, vif: Any, ifname: str, netns: str,
                   container_id: str) -> None:
        """Unbind a VIF from break0, then let Kuryr unbind it.

        If the namespace is gone, its interfaces are gone too, and Kuryr is not
        called.
        """
        owner = model.Owner(container_id, ifname)
        still_routed = '%s may still have a route through break0' % _describe(
            owner, vif)
        options = sandbox = None
        with self._logged(still_routed):
            options = config.load(k_config.CONF)
        try:
            sandbox = pod_binding.sandbox_path(netns)
        except exceptions.NetnsUnusable as err:
            LOG.info('%s has no interface to delete: %s',
                     _describe(owner, vif), err)
        if options is not None:
            # Delete the route before the interface. In the other order, the
            # node's packets to the pod would be sent to the LAN meanwhile.
            with self._logged(still_routed):
                Break0Manager(options).unbind(
                    owner, break0_vif.addresses(vif), sandbox,
                    mac=str(vif.address), interface_goes=True, ends=True)
        try:
            if sandbox is not None and self._is_direct(options):
                pod_binding.disconnect(sandbox, ifname, vif.vif_name)
            elif sandbox is not None:
                with patches.read_interfaces_only():
                    ipdb.repeat_dumps('disconnect ' + ifname,
                                      super().disconnect, vif, ifname, netns,
                                      container_id)
        except exceptions.KernelRefused as err:
            raise k_exc.CNIBindingFailure(str(err)) from err
        finally:
            if options is not None:
                self._housekeep(options)

    def _get_iface_create_args(self, vif: Any) -> dict[str, Any]:
        """Mark the macvlan that Kuryr creates, to recognize a leftover."""
        return {**super()._get_iface_create_args(vif),
                'group': pod_binding.UNFINISHED_GROUP}

    def _detect_iface_name(self, h_ipdb: Any) -> str:
        """Detect the parent as Kuryr does, but never return break0.

        Kuryr's fallback is the first interface except the loopback.
        """
        device = config.read_device_name(k_config.CONF)
        if k_config.CONF.binding.link_iface == device:
            raise k_exc.CNIBindingFailure(
                '[binding] link_iface is %s, which is [break0] device. Set '
                'it to the parent of %s.' % (device, device))
        # Copy in one step, because a thread of IPDB may change the interfaces.
        interfaces = {
            name: link for name, link in dict(h_ipdb.interfaces).items()
            if not _is_reserved_name(name, device)}
        self._parent = super()._detect_iface_name(
            types.SimpleNamespace(interfaces=interfaces))
        return self._parent

    @staticmethod
    def _is_direct(options: Optional[config.Options]) -> bool:
        return options is not None and options.enabled and (
            options.pod_binding == config.AUTO
            and comparison.compare().is_known)

    def _connect_directly(self, vif: Any, ifname: str, sandbox: str) -> None:
        """Bind a VIF with the same result and the same errors as Kuryr."""
        with kernel.Netlink() as netlink:
            parent = self._find_parent(netlink)
            if parent.mtu < vif.network.mtu:
                raise k_exc.CNIBindingFailure(
                    'MTU of interface %s (%d) is smaller than MTU of pod '
                    'network %s (%d). Please make sure pod network has the '
                    'same or smaller MTU as node (VM) network.' % (
                        parent.name, parent.mtu, vif.network.id,
                        vif.network.mtu))
            pod_binding.connect(netlink, sandbox, ifname, parent,
                                mac=str(vif.address), mtu=vif.network.mtu,
                                temporary_name=vif.vif_name)

    @staticmethod
    def _configure_l3(vif: Any, ifname: str, netns: str,
                      is_default_gateway: bool) -> None:
        """Configure the addresses as Kuryr does after connect.

        :raises PodNotConnected: if the kernel refuses the request
        """
        try:
            pod_binding.configure_l3(vif, ifname, pod_binding.sandbox_path(
                netns), is_default_gateway)
        except exceptions.Break0Error as err:
            raise PodNotConnected(str(err)) from err

    def _find_parent(self, netlink: kernel.Netlink) -> kernel.Link:
        """Return the parent that Kuryr would use."""
        link_iface = k_config.CONF.binding.link_iface
        link = (netlink.link(link_iface) if kernel.find_ifindex(link_iface)
                else None)
        if link is not None and link.name == link_iface:
            links, addresses = [link], []
        else:  # Kuryr ignores alternative names
            links, addresses = netlink.links(), netlink.addresses()
        name = self._detect_iface_name(types.SimpleNamespace(interfaces={
            link.name: {'flags': _IFF_LOOPBACK if link.loopback else 0,
                        'ipaddr': [(str(address), address.max_prefixlen)
                                   for index, address in addresses
                                   if index == link.index]}
            for link in links}))
        return next(link for link in links if link.name == name)

    def _housekeep(self, options: config.Options) -> None:
        with self._logged('Other pods of this node may not be reachable, '
                          'because they cannot be repaired'):
            Break0Manager(options).housekeep()

    @staticmethod
    @contextlib.contextmanager
    def _logged(consequence: str) -> Iterator[None]:
        """Log and suppress an error in the block, so that Kuryr proceeds."""
        try:
            yield
        except Exception as err:
            _log(consequence, err)


def _describe(owner: model.Owner, vif: Any) -> str:
    """Return the pod with its name, owner and addresses, for log lines."""
    addresses: list[str] = []
    with contextlib.suppress(Exception):  # a KuryrPort may contain anything
        addresses = list(map(str, break0_vif.addresses(vif)))
    return 'Pod %s with %s' % (
        '%s (%s)' % (patches.pod_name(), owner) if patches.pod_name()
        else owner, ', '.join(addresses) or 'no address')


def _is_reserved_name(name: Any, device: str) -> bool:
    """Return whether a name is reserved for a break0."""
    return str(name) == device or str(name).startswith(device[:6] + '-')


def _log(what: str, err: Exception) -> None:
    # Log a traceback for unexpected errors only.
    LOG.error('%s: %s', what, err,
              exc_info=not isinstance(err, exceptions.Break0Error))
