# SPDX-License-Identifier: Apache-2.0

"""All monkey patches of Kuryr: four functions.

``get_ipdb`` and ``_configure_l3`` are private functions of
``kuryr_kubernetes.cni.binding.base``, tested with Kuryr 6.0.0 to 10.0.0. Both
are replaced in the process of one request, and only if no other package has
replaced them since this module was imported. ``cleanup`` and ``_do_work`` are
replaced in kuryr-daemon before it forks.

``get_ipdb``: Kuryr opens IPDB in the node's namespace twice per pod, and IPDB
reads all routes and neighbours. break0 has a route and a neighbour per pod,
but Kuryr needs only interfaces and addresses. If other ADDs change the routes
meanwhile, IPDB fails with NetlinkDumpInterrupted: 26 of 240 ADDs failed in a
burst with Kuryr alone, and none with the patch ("make bench").

``_configure_l3``: Kuryr adds the pod's addresses with IPDB after the driver
has returned. If many pods are added at once, IPDB may miss an event, and raise
a RuntimeError without a text, so that the ADD fails. So the patch repeats the
function. With direct binding, another function replaces it.

``cleanup``, in the same module: for a DEL without a KuryrPort, Kuryr deletes
the interface named CNI_IFNAME. If CNI_NETNS is empty, Kuryr deletes the
interface in the namespace of kuryr-daemon: the node loses its NIC, unless the
NIC is a physical device. containerd 1.6 repeats a DEL with an empty CNI_NETNS
for most pods. So the patch calls Kuryr's function only for namespaces of pods.

``K8sCNIRegistryPlugin._do_work``: this method does not pass the pod's name to
the driver. The patch records the name first, for log lines and records.
"""

from __future__ import annotations

import contextlib
import functools
import re
from typing import Any, Callable, Iterator, Optional

from kuryr_kubernetes.cni.binding import base as b_base

from kuryr_break0 import exceptions
from kuryr_break0.kernel import ipdb
from kuryr_break0.kuryr import pod_binding
from kuryr_break0 import log

LOG = log.get_logger(__name__)

#: Attempts to configure addresses; IPDB itself makes as many.
_TRIES = 3

_get_ipdb = getattr(b_base, 'get_ipdb', None)
_configure_l3 = getattr(b_base, '_configure_l3', None)
_cleanup = getattr(b_base, 'cleanup', None)


_POD = re.compile(r'[A-Za-z0-9./_-]{1,320}')
_pod: Optional[str] = None


def record_pod_names() -> None:
    """Let each request record its pod's name in the request's process."""
    from kuryr_kubernetes.cni.plugins import k8s_cni_registry
    kind = getattr(k8s_cni_registry, 'K8sCNIRegistryPlugin', None)
    work = getattr(kind, '_do_work', None)
    if work is None or hasattr(work, '__wrapped__'):
        return

    @functools.wraps(work)
    def recording(self: Any, params: Any, *args: Any, **kwargs: Any) -> Any:
        global _pod
        try:
            name = str(self._get_obj_name(params))
            _pod = name if _POD.fullmatch(name) else None
        except Exception:  # the name is for messages only
            _pod = None
        return work(self, params, *args, **kwargs)

    setattr(kind, '_do_work', recording)


def protect_node_interfaces() -> None:
    """Restrict Kuryr's cleanup to the namespaces of pods."""
    if _cleanup is not None and getattr(b_base, 'cleanup', None) is _cleanup:
        b_base.cleanup = _cleanup_sandbox


def _cleanup_sandbox(ifname: str, netns: str) -> None:
    assert _cleanup is not None
    try:
        pod_binding.sandbox_path(netns)
    except exceptions.NetnsUnusable as err:
        LOG.info('Kuryr did not clean up the interface %s: %s', ifname, err)
    else:
        _cleanup(ifname, netns)


def pod_name() -> Optional[str]:
    """Return the namespace/name of this request's pod, if known."""
    return _pod


@contextlib.contextmanager
def read_interfaces_only() -> Iterator[None]:
    """Let Kuryr read only the interfaces of the node within the block.

    In a pod's namespace, Kuryr reads everything as before.
    """
    if _get_ipdb is None or getattr(b_base, 'get_ipdb',
                                    None) is not _get_ipdb:
        yield
        return
    b_base.get_ipdb = _get_ipdb_of_interfaces
    try:
        yield
    finally:
        b_base.get_ipdb = _get_ipdb


def _get_ipdb_of_interfaces(netns: Optional[str] = None) -> Any:
    assert _get_ipdb is not None
    return (not netns and ipdb.open_interfaces_ipdb()) or _get_ipdb(netns)


def replace_configure_l3(configure: Callable[..., None],
                         vif: Optional[Any] = None) -> None:
    """Let another function configure the next VIF of this process.

    :param configure: a function with the arguments of Kuryr's _configure_l3
    :param vif: call ``configure`` only for this VIF; None for any VIF
    """
    present = getattr(b_base, '_configure_l3', None)
    # If Kuryr added no addresses to an earlier VIF, the function for that VIF
    # is still in place.
    if _configure_l3 is None or (present is not _configure_l3 and not hasattr(
            present, 'is_of_break0')):
        return

    def once(*args: Any) -> None:
        b_base._configure_l3 = _configure_l3
        assert _configure_l3 is not None
        (configure if vif is None or vif is args[0]
         else _configure_l3)(*args)

    once.is_of_break0 = True  # type: ignore[attr-defined]
    b_base._configure_l3 = once


def configure_l3_repeatedly(*args: Any) -> None:
    """Configure a pod's addresses as Kuryr does; try again if IPDB fails.

    Addresses from an earlier attempt are no error.
    """
    assert _configure_l3 is not None
    for _ in range(_TRIES - 1):
        try:
            _configure_l3(*args)
            return
        except ipdb.IPDB_DISTURBED as err:
            LOG.warning('IPDB failed to configure the addresses of pod %s: '
                        '%r. Trying again. If the ADD fails and [break0] '
                        'pod_binding is kuryr, set it to auto',
                        pod_name() or 'unknown', err)
    _configure_l3(*args)
