# SPDX-License-Identifier: Apache-2.0

"""All monkey patches of Kuryr: four functions.

Two are private functions of ``kuryr_kubernetes.cni.binding.base``, tried with
Kuryr 6.0.0 to 10.0.0. They are changed in the process of one request only, and
only where they are what they were when this module was imported. The others
are changed in kuryr-daemon before it forks.

``get_ipdb``: Kuryr opens IPDB on the node's namespace twice per pod, and IPDB
reads all routes and neighbours. break0 has one of each per pod, while Kuryr
reads only the interfaces and their addresses.

``_configure_l3``: Kuryr gives a pod its addresses by IPDB, after the driver
has returned. While many pods are added at once, IPDB now and then misses
what it waits for, gives up with a RuntimeError that says nothing, and the ADD
fails. So it is tried again, or with ``pod_binding`` = direct done otherwise.

``cleanup``, of the same module: Kuryr calls it for a DEL whose KuryrPort is
gone, and it deletes the interface named CNI_IFNAME. If CNI_NETNS is empty, it
does so in the namespace of kuryr-daemon: the node loses its NIC, unless that
is hardware. containerd 1.6 repeats a DEL in this way for most pods. So Kuryr's
function is called for the namespaces of pods only.

``K8sCNIRegistryPlugin._do_work``: it knows the name of the pod, and does not
pass it on to the driver. It is noted before, for people.
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

#: As often as IPDB itself tries to set addresses.
_TRIES = 3

_get_ipdb = getattr(b_base, 'get_ipdb', None)
_configure_l3 = getattr(b_base, '_configure_l3', None)
_cleanup = getattr(b_base, 'cleanup', None)


_POD = re.compile(r'[A-Za-z0-9./_-]{1,320}')
_pod: Optional[str] = None


def note_pod_names() -> None:
    """Have each request note which pod it is for, in its process."""
    from kuryr_kubernetes.cni.plugins import k8s_cni_registry
    kind = getattr(k8s_cni_registry, 'K8sCNIRegistryPlugin', None)
    work = getattr(kind, '_do_work', None)
    if work is None or hasattr(work, '__wrapped__'):
        return

    @functools.wraps(work)
    def noting(self: Any, params: Any, *args: Any, **kwargs: Any) -> Any:
        global _pod
        try:
            name = str(self._get_obj_name(params))
            _pod = name if _POD.fullmatch(name) else None
        except Exception:  # it is for people only
            _pod = None
        return work(self, params, *args, **kwargs)

    setattr(kind, '_do_work', noting)


def keep_node_interfaces() -> None:
    """Have Kuryr clean up in no namespace but those of pods."""
    if _cleanup is not None and getattr(b_base, 'cleanup', None) is _cleanup:
        b_base.cleanup = _cleanup_sandbox


def _cleanup_sandbox(ifname: str, netns: str) -> None:
    assert _cleanup is not None
    try:
        pod_binding.sandbox_path(netns)
    except exceptions.NetnsUnusable as err:
        LOG.info('Nothing to clean up: %s', err)
    else:
        _cleanup(ifname, netns)


def pod_name() -> Optional[str]:
    """Return the namespace and name of the pod of this request, if known."""
    return _pod


@contextlib.contextmanager
def interfaces_only() -> Iterator[None]:
    """Have Kuryr read only the interfaces of the node, within the block.

    Its view of a pod's namespace is as ever.
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
    return (not netns and ipdb.ipdb_of_interfaces()) or _get_ipdb(netns)


def replace_configure_l3(configure: Callable[..., None],
                         vif: Optional[Any] = None) -> None:
    """Have the next VIF of this process configured by another function.

    :param configure: takes what Kuryr's function does
    :param vif: the one that is meant; None for any
    """
    present = getattr(b_base, '_configure_l3', None)
    # One of ours was not used for a VIF that Kuryr gave no addresses.
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
    """Configure the addresses of a pod as Kuryr does, again if IPDB fails.

    What is there from a first try is fine for the next.
    """
    assert _configure_l3 is not None
    for _ in range(_TRIES - 1):
        try:
            _configure_l3(*args)
            return
        except ipdb.IPDB_DISTURBED as err:
            LOG.warning('Configuring the addresses of a pod again, since '
                        'IPDB failed: %r', err)
    _configure_l3(*args)
