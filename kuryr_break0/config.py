# SPDX-License-Identifier: Apache-2.0

"""The ``[break0]`` options of kuryr.conf."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import glob
import os
import re
import socket
from typing import Any, Optional

from oslo_config import cfg

from kuryr_break0 import exceptions
from kuryr_break0 import model
from kuryr_break0 import option_types as types
from kuryr_break0.texts import close_to

GROUP = 'break0'
#: Value of pod_binding; the other value is AUTO.
KURYR = 'kuryr'
#: Values of guard
AUTO = 'auto'
ON = 'on'
OFF = 'off'
#: Seconds to wait for the lock of the ledger. After this time, a bind proceeds
#: without the lock, and an unbind fails. The CNI shim waits longer than this
#: time for the agent's answer.
LOCK_TIMEOUT = 10

OPTS = [
    cfg.Opt(
        'enabled',
        type=types.YesOrNo(),
        default=True,
        help='Make new pods reachable through break0. To let Kuryr bind '
             'pods alone again, set it to false. Pods that are already bound '
             'are unbound when they end.'),
    cfg.Opt(
        'pod_binding',
        type=types.OneOf(choices=[
            (AUTO, 'If the binding code of Kuryr is the same as in Kuryr '
             '6.0.0 to 10.0.0, kuryr-break0 creates the macvlan in the '
             'namespace of the pod. The result is the same, in a tenth of '
             'the time. Otherwise, Kuryr creates the macvlan'),
            (KURYR, 'Kuryr creates the macvlan with IPDB: on the node, under '
             'a temporary name. Then Kuryr moves, renames and configures '
             'it')]),
        default=AUTO,
        help='Program that creates the macvlan interface of a pod. If you '
             'want Kuryr to create the interface, set it to kuryr. If enabled '
             'is false, Kuryr creates the interface. With auto, kuryr-daemon '
             'logs which program creates it. You can change the option on a '
             'node with pods.'),
    cfg.Opt(
        'device',
        type=types.DEVICE_NAME,
        default='break0',
        help='Name of the macvlan interface in the namespace of the node: 1 '
             'to 15 characters without white space, "/", ":" and "%". Change '
             'it on nodes on which another program uses this name. An '
             'interface with this name that is not a macvlan in bridge mode '
             'on the parent of the pods is not changed, and pods are not '
             'bound. If pods are on several interfaces, the break0 of the '
             'first interface has this name. The name of another break0 also '
             'contains the interface (break0-eth1), or a number if that name '
             'is too long.'),
    cfg.Opt(
        'parent',
        type=types.DEVICE_NAME,
        help='Bind only pods on this interface. The log has an error for '
             'each pod on another interface, and discovery ignores it. By '
             'default, pods may be on any interface, and each interface with '
             'pods gets a break0.'),
    cfg.ListOpt(
        'addr',
        item_type=types.HOST_ADDRESS,
        default=[],
        help='Addresses of break0 itself, separated by commas. They are '
             'added as /32 or /128. Set it for services and firewall rules '
             'that need an address of the node that only its pods reach. By '
             'default break0 has no address, and the node uses its own '
             'addresses towards its pods. If MASQUERADE would use an address '
             'of another interface than the parent, break0 gets an address '
             'in 169.254.0.0/16 that only its pods know. The '
             'addresses must differ on each node: if kuryr.conf is the same '
             'for all nodes, set the environment variable OS_BREAK0__ADDR '
             'instead.'),
    cfg.Opt(
        'route_protocol',
        type=types.WholeNumber(min=5, max=255),
        default=176,
        help='Protocol number of break0\'s routes (ip route: proto), 5 to '
             '255. Change it on nodes on which another program uses 176: '
             'only routes on break0 with this number are changed or deleted. '
             'Change it only on a node without bound pods.'),
    cfg.Opt(
        'route_table',
        type=types.WholeNumber(min=1, max=4294967295),
        default=254,
        help='Number of the routing table for the routes. 254 is the table '
             'main. If the parent is in a VRF, set the table of the VRF. For '
             'any other table, add the routing rule (ip rule) yourself.'),
    cfg.ListOpt(
        'allowed_cidrs',
        item_type=types.NETWORK,
        default=[],
        help='Networks that addresses of pods must be in, separated by '
             'commas: 10.0.0.0/16,fd00:10::/64. Other addresses get no '
             'route, with an error in the log. By default any address is '
             'allowed, except those of the node, its next hops, and '
             'addresses that are not of a single host. Set it to the '
             'subnets of the pods on every node: otherwise any user with '
             'write access to KuryrPorts can redirect the node\'s traffic '
             'to other addresses.'),
    cfg.Opt(
        'discover',
        type=types.YesOrNo(),
        default=False,
        help='Let the agent find containers of any engine: every macvlan in '
             'bridge mode in another network namespace, on an interface of '
             'the node. For hosts without Kuryr. Addresses are bound when '
             'they appear and unbound when they disappear. Set '
             'allowed_cidrs too, because a container can give itself any '
             'address.'),
    cfg.Opt(
        'guard',
        type=types.OneOf(choices=[
            (AUTO, 'if nft is installed; otherwise pods are bound without it'),
            (ON, 'always; without it the ADD of a pod fails'),
            (OFF, 'never')]),
        default=AUTO,
        help='Use an nftables table that admits a packet through break0 '
             'only if its source MAC address and source address belong to a '
             'bound pod, and that stops each frame with the MAC address of '
             'break0 that would leave the node. The guard needs the program '
             'nft, and Linux 5.16 to stop these frames. Set it to on if you '
             'do not trust the pods, and to off if you trust all of them.'),
    cfg.Opt(
        'resync_interval',
        type=types.WholeNumber(min=1, max=86400),
        default=60,
        help='Interval between full reconciliations by the agent, in '
             'seconds. The agent repairs faults at once if the kernel sends '
             'an event, and other faults at this interval. Set a longer one '
             'on nodes with many thousands of addresses.'),
    cfg.Opt(
        'strict',
        type=types.YesOrNo(),
        default=False,
        help='Fail the ADD of a pod that cannot be bound, so that kubelet '
             'tries again. Set it to true if pods that cannot reach their '
             'node are of no use. By default an error is logged and the pod '
             'runs, but its node cannot reach it until it is repaired.'),
    cfg.Opt(
        'state_dir',
        type=types.ABSOLUTE_PATH,
        default='/run/kuryr-break0',
        help='Absolute path of the directory that records which sandbox each '
             'address belongs to. It is created with mode 0700. Put it on a '
             'tmpfs: it must not survive a reboot, because pods do not. It '
             'must be the same for kuryr-daemon, agent and command. Change '
             'it in containers in which /run is not the node\'s. If it is '
             'not writable, pods are bound with an error in the log.'),
    cfg.ListOpt(
        'proc_dirs',
        item_type=types.ABSOLUTE_PATH,
        default=['/proc', '/host_proc'],
        help='Absolute paths of directories that show the processes of the '
             'node, as /proc does, separated by commas. Missing '
             'directories are ignored. Set it for a container with its '
             'own PID namespace, if the node\'s /proc is mounted '
             'elsewhere.'),
    cfg.Opt(
        'sysctl_dir',
        type=types.ABSOLUTE_PATH,
        default='/proc/sys',
        help='Absolute path of the directory through which sysctls of break0 '
             'are set. Set it for an unprivileged container, in which '
             '/proc/sys is read-only: mount the /proc/sys/net of the node as '
             '"net" in another directory, and set this to that directory.'),
    cfg.Opt(
        'metrics_bind',
        type=types.LISTENING_ON,
        default='127.0.0.1:9817',
        help='IP address and TCP port on which the agent serves /metrics, '
             '/healthz and /livez. Write an IPv6 address in brackets: '
             '[::1]:9817. By default only the node itself can reach it. For '
             'a Prometheus on another host, set another address. There is no '
             'password and no TLS: protect it with a firewall. If it is '
             'empty, nothing is served.'),
]


@dataclasses.dataclass(frozen=True)
class Options:
    """The ``[break0]`` options as valid, immutable values.

    Each field is the option with the same name; see the help of the option.
    """

    enabled: bool
    pod_binding: str
    device: str
    parent: Optional[str]
    addr: tuple[model.IPAddress, ...]
    route_protocol: int
    route_table: int
    allowed_cidrs: tuple[model.IPNetwork, ...]
    discover: bool
    guard: str
    resync_interval: int
    strict: bool
    state_dir: str
    proc_dirs: tuple[str, ...]
    sysctl_dir: str
    metrics_bind: Optional[types.Endpoint]

    @property
    def patience(self) -> int:
        """Return the maximum age in seconds of a healthy agent's sync."""
        return 3 * self.resync_interval + LOCK_TIMEOUT


def register(conf: cfg.ConfigOpts) -> None:
    """Register the options with ``conf``; a repetition is harmless."""
    conf.register_opts(OPTS, group=GROUP)


def _shorten_error(text: str) -> str:
    """Return the text of oslo.config's error without the repr of objects."""
    match = re.search(r"detail='([^']*)'\) is not valid: (.*)", text)
    return '%s (from %s)' % match.group(2, 1) if match else text


def load(conf: cfg.ConfigOpts) -> Options:
    """Read and validate all options.

    :raises InvalidOption: for the first invalid value, with the option, the
        value, its source and the allowed values
    """
    register(conf)
    options = Options(**{opt.dest: _value(conf, opt) for opt in OPTS})
    with contextlib.suppress(OSError):  # the parent may be an altname
        options = dataclasses.replace(options, parent=socket.if_indextoname(
            socket.if_nametoindex(options.parent or '')))
    if options.discover and not options.allowed_cidrs:
        raise exceptions.InvalidOption(
            option='discover', reason='it needs [break0] allowed_cidrs, the '
            'networks of the containers, as 192.0.2.0/24: a container can '
            'give itself any address')
    return options


def list_files(conf: cfg.ConfigOpts) -> list[str]:
    """Return the paths of the configuration files that ``conf`` has read."""
    # ``conf`` has config_file and config_dir only after the program has called
    # it to parse the command line.
    paths = [*(getattr(conf, 'config_file', None) or ())]
    for directory in getattr(conf, 'config_dir', None) or ():
        paths += sorted(glob.glob(os.path.join(glob.escape(directory),
                                               '*.conf')))
    return paths


def parse_file(path: str) -> dict[str, Any]:
    """Return the options of each section, as far as the file is readable.

    oslo.config has reported unreadable files.
    """
    sections: dict[str, Any] = {}
    with contextlib.suppress(OSError, ValueError, cfg.ParseError):
        cfg.ConfigParser(path, sections).parse()
    return sections


def list_unknown(conf: cfg.ConfigOpts) -> list[str]:
    """Return a text for each unknown option and each misspelt section.

    oslo.config ignores misspelt names, so a protection could be off without an
    error.
    """
    known = [opt.dest for opt in OPTS]
    unknown: dict[str, str] = {}
    texts: list[str] = []
    for path in list_files(conf):
        for section, names in parse_file(path).items():
            if section.lower() == GROUP:  # oslo.config ignores the case
                unknown.update(dict.fromkeys(names, path))
            elif re.sub(r'\W|_', '', section).lower() in (
                    GROUP, 'kuryr' + GROUP):
                texts.append('the section [%s] in %s is not read: did you '
                             'mean [%s]?' % (section[:64], path, GROUP))
    prefix = 'OS_%s__' % GROUP.upper()
    for name in os.environ:
        if name.startswith(prefix):
            unknown.setdefault(name[len(prefix):].lower(), 'the environment')
    for name, where in sorted(unknown.items()):
        if name not in known:
            texts.append('[break0] %s in %s is no option%s' % (
                name[:64], where, close_to(name, known)))
    return texts


def read_link_iface(conf: cfg.ConfigOpts) -> Optional[str]:
    """Read Kuryr's option for the parent of the pods.

    :param conf: options among which Kuryr has not registered its own
    """
    conf.register_opt(cfg.StrOpt('link_iface'), group='binding')
    return conf.binding.link_iface or None


def has_api_root(conf: cfg.ConfigOpts) -> bool:
    """Return whether the configuration of Kuryr names a Kubernetes API.

    An empty name counts too: Kuryr then uses the service address of the API.

    :param conf: options among which Kuryr has not registered its own
    """
    conf.register_opt(cfg.StrOpt('api_root'), group='kubernetes')
    return conf.kubernetes.api_root is not None


def read_device_name(conf: cfg.ConfigOpts) -> str:
    """Read the name of break0, even if other options are invalid."""
    register(conf)
    opt = next(opt for opt in OPTS if opt.dest == 'device')
    try:
        return str(_value(conf, opt))
    except exceptions.InvalidOption:
        return str(opt.default)


def _value(conf: cfg.ConfigOpts, opt: cfg.Opt) -> Any:
    try:
        value = getattr(conf[GROUP], opt.dest)
    except (cfg.Error, ValueError) as err:
        raise exceptions.InvalidOption(
            option=opt.name, reason=_shorten_error(str(err))) from err
    except RecursionError as err:
        raise exceptions.InvalidOption(
            option=opt.name, reason='its value refers to itself') from err
    return tuple(value) if isinstance(value, list) else value


def list_opts() -> list[tuple[cfg.OptGroup, list[cfg.Opt]]]:
    """Return the options for oslo-config-generator (``oslo.config.opts``)."""
    group = cfg.OptGroup(
        GROUP,
        title='Node-to-pod connectivity through break0',
        help='You can also set each option by an environment variable of '
             'the process, which overrides the file: OS_BREAK0__ADDR for '
             'addr. If a value is invalid, kuryr-daemon logs an error when '
             'it starts and for each pod, and Kuryr binds pods without '
             'break0, so that their node cannot reach them.')
    return [(group, copy.deepcopy(OPTS))]
