# SPDX-License-Identifier: Apache-2.0

"""The os-vif plugin that installs the driver in kuryr-daemon.

kuryr-daemon and kuryr-cni load all os-vif plugins. kuryr-k8s-controller may
share their virtual environment, and its VIF pools know Kuryr's VIF classes by
name. So this module imports nothing slow, and changes only kuryr-daemon,
before kuryr-daemon forks.
"""

from __future__ import annotations

import contextlib
import gc
import sys
from typing import Any

import os_vif.objects
from os_vif import plugin

from kuryr_break0 import log

LOG = log.get_logger(__name__)

#: A module that only kuryr-daemon imports.
_DAEMON_MODULE = 'kuryr_kubernetes.cni.daemon.service'


class Break0Plugin(plugin.PluginBase):  # type: ignore[misc]
    """Plugs nothing: Kuryr's VIFs use Kuryr's own plugin, ``noop``."""

    @classmethod
    def load(cls, plugin_name: str) -> Break0Plugin:
        """Load the plugin. ``os_vif.initialize()`` calls this method once."""
        if _DAEMON_MODULE in sys.modules:
            try:
                _install_driver()
            except Exception:
                # An error would stop the daemon, and with it all ADDs.
                LOG.exception('break0 is not in use, because its driver '
                              'cannot be loaded. Kuryr binds pods without '
                              'break0. For the reason, run: kuryr-break0 '
                              'doctor')
        loaded: Break0Plugin = super().load(plugin_name)
        return loaded

    def describe(self) -> Any:
        return os_vif.objects.host_info.HostPluginInfo(
            plugin_name='kuryr_break0', vif_info=[])

    def plug(self, vif: Any, instance_info: Any) -> None:
        pass

    def unplug(self, vif: Any, instance_info: Any) -> None:
        pass


def _install_driver() -> None:
    """Let break0's driver bind nested macvlan VIFs.

    The VIF class is registered only after the driver was loaded, because each
    ADD would fail without a driver. Modules that each request needs are
    imported here, once.
    """
    import netrc  # noqa: F401 (requests imports it for each API call)

    from kuryr_kubernetes.cni.binding import base as b_base
    from oslo_config import cfg
    from oslo_versionedobjects import base as obj_base
    from stevedore import driver as stv_driver

    from kuryr_break0 import config
    from kuryr_break0 import exceptions
    from kuryr_break0 import kernel
    from kuryr_break0.kernel import ipdb
    from kuryr_break0.kuryr import comparison
    from kuryr_break0.kuryr import patches
    from kuryr_break0.kuryr import vif

    name = vif.VIFMacvlanBreak0.__name__
    driver: Any = stv_driver.DriverManager(
        namespace=b_base._BINDING_NAMESPACE, name=name).driver
    obj_base.VersionedObjectRegistry.register(vif.VIFMacvlanBreak0)
    ipdb.preload()
    patches.record_pod_names()
    patches.protect_node_interfaces()
    bound = '%s VIFs are bound by %s.%s' % (
        vif.VIFMacvlanBreak0.obj_name(), driver.__module__, driver.__name__)
    for text in config.list_unknown(cfg.CONF):
        LOG.warning('%s. It has no effect.', text)
    try:
        options = config.load(cfg.CONF)
    except exceptions.InvalidOption as err:
        LOG.info('%s: without break0, because an option is invalid', bound)
        LOG.error('Kuryr binds pods without break0, so that their node cannot '
                  'reach them: %s. Correct the option, and restart '
                  'kuryr-daemon',
                  str(err).rstrip('.'))
    else:
        LOG.info('%s: %s', bound, 'break0 is enabled' if options.enabled else
                 'without break0, because [break0] enabled is false')
        LOG.info('Options of break0: %s', options)
        driver.note_options(options)
        if options.pod_binding == config.AUTO:
            comparison_ = comparison.compare()
            LOG.info('%s creates the interfaces of pods. The binding code of '
                     'Kuryr: %s', 'kuryr-break0'
                     if comparison_.is_known else 'Kuryr', comparison_.text)
        if options.guard != config.OFF:
            # A kernel without nftables refuses. Each bind reports the error.
            with contextlib.suppress(exceptions.KernelRefused):
                kernel.share_nft()
    # Forked processes share the pages of all present objects. Exclude these
    # objects from garbage collection: in a request, a collection would write
    # to them, and so copy the pages, which takes longer than the bind.
    gc.collect()
    gc.freeze()
