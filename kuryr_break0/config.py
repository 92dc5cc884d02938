# SPDX-License-Identifier: Apache-2.0

"""The ``[break0]`` options of kuryr.conf."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import difflib
import glob
import ipaddress
import os
import re
from typing import Any, Iterable, NamedTuple, Optional

from oslo_config import cfg
from oslo_config import types

from kuryr_break0 import exceptions
from kuryr_break0.model import IPAddress
from kuryr_break0.model import IPNetwork

GROUP = 'break0'
#: Values of pod_binding, beside auto
KURYR = 'kuryr'
DIRECT = 'direct'
#: Values of guard
AUTO = 'auto'
ON = 'on'
OFF = 'off'

#: The kernel's limit is IFNAMSIZ, 16 bytes with the closing NUL; ``/`` and
#: white space are refused by dev_valid_name(), and ``%d`` stands for a number
#: that it chooses.
_DEVICE_NAME = r'(?!\.{1,2}$)[^/:%\s\x00-\x1f\x7f]{1,15}'


class Endpoint(NamedTuple):
    """An address and a TCP port of it."""

    address: IPAddress
    port: int

    def __str__(self) -> str:
        form = '[%s]:%d' if self.address.version == 6 else '%s:%d'
        return form % self


class _Checked(types.ConfigType):
    """A configuration value that a function parses or refuses."""

    def __init__(self, type_name: str) -> None:
        super().__init__(type_name=type_name)

    def __repr__(self) -> str:
        return self.type_name

    def _formatter(self, value: Any) -> str:
        return str(value)

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other)

    __hash__ = None  # type: ignore[assignment]


class DeviceName(_Checked):
    """A name that the kernel takes for a network interface."""

    def __init__(self) -> None:
        super().__init__('interface name')

    def __call__(self, value: str) -> str:
        if (not re.fullmatch(_DEVICE_NAME, value)
                or len(value.encode('utf-8', 'surrogateescape')) > 15):
            raise ValueError(
                '%r is not an interface name: 1 to 15 characters without '
                'white space, "/", ":" and "%%" are allowed' % value)
        return value


class DeviceNames(_Checked):
    """Names of interfaces by the names of their parents."""

    def __init__(self) -> None:
        super().__init__('parent:interface pairs')

    def _formatter(self, value: Any) -> str:
        return ','.join('%s:%s' % pair for pair in value.items())

    def __call__(self, value: Any) -> dict[str, str]:
        if isinstance(value, dict):
            return value
        found: dict[str, str] = {}
        for pair in filter(None, map(str.strip, value.split(','))):
            parent, colon, device = pair.partition(':')
            if not colon:
                raise ValueError('%r is not a pair of two interfaces: what '
                                 'is allowed looks like eth1:break1' % pair)
            names = DeviceName()
            parent, device = names(parent.strip()), names(device.strip())
            if parent in found or device in found.values():
                raise ValueError('%r has %s twice' % (
                    value, parent if parent in found else device))
            found[parent] = device
        return found


class HostAddress(_Checked):
    """An address of a single host; /32 or /128 may follow it."""

    def __init__(self) -> None:
        super().__init__('host address')

    def __call__(self, value: Any) -> IPAddress:
        if isinstance(value, (ipaddress.IPv4Address, ipaddress.IPv6Address)):
            return value
        try:
            interface = ipaddress.ip_interface(value)
        except ValueError:
            raise ValueError('%r is not an IPv4 or IPv6 address' % value)
        if interface.network.num_addresses != 1:
            # A shorter prefix would add an on-link route for all of it.
            raise ValueError(
                '%r has a prefix: only a host address is allowed, %s' %
                (value, interface.ip))
        reason = not_a_host(interface.ip)
        if reason:
            raise ValueError('%r is %s: only the address of a single host '
                             'is allowed' % (value, reason))
        return interface.ip


class Network(_Checked):
    """A network in CIDR notation, without host bits."""

    def __init__(self) -> None:
        super().__init__('network in CIDR notation')

    def __call__(self, value: Any) -> IPNetwork:
        if isinstance(value, (ipaddress.IPv4Network, ipaddress.IPv6Network)):
            return value
        try:
            return ipaddress.ip_network(value)
        except ValueError as err:
            raise ValueError('%r is not a network: %s; what is allowed looks '
                             'like 10.0.0.0/16 or fd00::/64' % (value, err))


class UnicastMAC(_Checked):
    """A MAC address of a single interface, as six hexadecimal octets."""

    def __init__(self) -> None:
        super().__init__('MAC address')

    def __call__(self, value: str) -> str:
        if not re.fullmatch(r'([0-9A-Fa-f]{2}:){5}[0-9A-Fa-f]{2}', value):
            raise ValueError('%r is not a MAC address: six hexadecimal '
                             'octets with colons are allowed' % value)
        if int(value[:2], 16) & 1 or not value.strip('0:'):
            raise ValueError('%r is not the address of one interface: only '
                             'unicast MAC addresses are allowed' % value)
        return value.lower()


class WholeNumber(types.Integer):
    """A whole number within limits, whose error names value and limits."""

    def __call__(self, value: Any) -> Any:
        try:
            return super().__call__(value)
        except ValueError:
            raise ValueError('%r is not a whole number from %s to %s' %
                             (value, self.min, self.max))


class YesOrNo(types.Boolean):
    """A truth value, whose error names the value and what is allowed."""

    def __call__(self, value: Any) -> Any:
        try:
            return super().__call__(value)
        except ValueError:
            raise ValueError('%r is neither true nor false' % value)


class OneOf(types.String):
    """One of a few words, whose error names the value and all of them."""

    def __call__(self, value: Any) -> Any:
        try:
            return super().__call__(value)
        except ValueError:
            raise ValueError('%r is none of: %s' %
                             (value, ', '.join(self.choices or ())))


class ListeningOn(_Checked):
    """An endpoint to listen on; empty for none."""

    def __init__(self) -> None:
        super().__init__('address and port')

    def __call__(self, value: Any) -> Optional[Endpoint]:
        if value == '' or isinstance(value, Endpoint):
            return value or None
        # No names: what is listened on must not hang on a resolver.
        found = re.fullmatch(r'(?:\[([^]]*:[^]]*)\]|([^][:]*)):(\d{1,5})',
                             value)
        try:
            if found is None or not 0 < int(found[3]) < 65536:
                raise ValueError
            return Endpoint(ipaddress.ip_address(found[1] or found[2]),
                            int(found[3]))
        except ValueError:
            raise ValueError('%r is not an IP address and a port: what is '
                             'allowed looks like 127.0.0.1:9817, [::1]:9817 '
                             'or is empty' % value)


class AbsolutePath(_Checked):
    """A path that does not depend on where a process was started."""

    def __init__(self) -> None:
        super().__init__('absolute path')

    def __call__(self, value: str) -> str:
        if not value.startswith('/') or '\0' in value:
            raise ValueError('%r is not an absolute path' % value)
        return value


def not_a_host(address: IPAddress) -> Optional[str]:
    """Return why an address cannot be that of any pod; None if it can.

    IPv4-mapped IPv6 addresses count as what they map, since no packet of
    theirs may be on a wire (RFC 4291, 2.5.5.2).
    """
    for kind in ('multicast', 'unspecified', 'loopback', 'link_local'):
        if getattr(address, 'is_' + kind):
            return 'a %s address' % kind.replace('_', '-')
    if address.version == 4 and (address.is_reserved
                                 or int(address) >> 24 == 0):
        return 'a reserved address'
    if getattr(address, 'ipv4_mapped', None):
        return 'an IPv4-mapped address'
    return None


OPTS = [
    cfg.Opt(
        'enabled',
        type=YesOrNo(),
        default=True,
        help='Make new pods reachable through break0. If false, Kuryr alone '
             'binds new pods. Pods that are bound already are unbound when '
             'they go.'),
    cfg.Opt(
        'pod_binding',
        type=OneOf(choices=[
            (AUTO, 'kuryr-break0 if Kuryr\'s code for that is known, as that '
             'of Kuryr 6.0.0 to 10.0.0; Kuryr if that was changed'),
            (KURYR, 'Kuryr, with IPDB: on the node under a temporary name, '
             'then moved, renamed and configured'),
            (DIRECT, 'kuryr-break0: in the namespace of the pod, with two '
             'requests. The result is the same, in a tenth of the time')]),
        default=AUTO,
        help='What creates the macvlan interface of a pod. If enabled is '
             'false, Kuryr does. The log of kuryr-daemon says what auto '
             'stands for. You can change this on a node with pods.'),
    cfg.Opt(
        'device',
        type=DeviceName(),
        default='break0',
        help='Name of the macvlan interface in the namespace of the node: 1 '
             'to 15 characters without white space, "/" and ":". If an '
             'interface with this name exists that is not a macvlan in '
             'bridge mode on the parent of the pods, it is not changed, and '
             'pods are not bound. If pods are on several interfaces, this is '
             'the name for the first.'),
    cfg.Opt(
        'devices',
        type=DeviceNames(),
        default={},
        help='Names of macvlan interfaces for further parents: '
             'eth1:break1,eth2:break2. By default they are named after '
             'device and parent (break0-eth1), or numbered if that is too '
             'long.'),
    cfg.Opt(
        'parent',
        type=DeviceName(),
        help='Interface that the pods must be on. Pods on another one are '
             'not bound, with an error in the log. By default pods may be on '
             'any interface, and each such interface gets a break0.'),
    cfg.ListOpt(
        'addr',
        item_type=HostAddress(),
        default=[],
        help='Addresses of break0 itself, separated by commas. They are '
             'added as /32 or /128. By default break0 has no address, and '
             'the node uses its own towards its pods. They must differ on '
             'each node: if kuryr.conf is the same for all nodes, set the '
             'environment variable OS_BREAK0__ADDR instead.'),
    cfg.Opt(
        'mac',
        type=UnicastMAC(),
        help='MAC address of break0. By default it is derived from a secret '
             'of the node, and stays the same when break0 is created again. '
             'It must differ on each node.'),
    cfg.Opt(
        'static_neighbours',
        type=YesOrNo(),
        default=True,
        help='Set permanent neighbours, so that neither side has to ask for '
             'the other: on the node one for each address of a pod, in each '
             'pod one for each address of the node. If false, they ask by '
             'ARP. Then the LAN hears requests with the MAC address of '
             'break0, which port security of Neutron may drop as spoofed, '
             'and IPv6 does not work from pod to node.'),
    cfg.ListOpt(
        'host_addresses',
        item_type=HostAddress(),
        default=[],
        help='Addresses of the node that pods reach through break0, '
             'separated by commas. By default all addresses of the parent, '
             'those that the node uses towards its pods, and those of '
             'all_addresses. Addresses that the node does not have are '
             'ignored. They differ on each node, like addr.'),
    cfg.Opt(
        'all_addresses',
        type=YesOrNo(),
        default=False,
        help='Let pods also reach addresses on other interfaces of the node '
             'through break0, and so answer what the node masquerades with '
             'these: the sources of its routes, and of each interface the '
             'first IPv4 address and the IPv6 addresses, at most 16, none of '
             'dummy interfaces. Set it where kube-proxy or Docker masquerades '
             'with the address of another NIC. Do not where containers have '
             'interfaces on several NICs. Where the parent has no address, '
             'pods know these in any case.'),
    cfg.Opt(
        'route_protocol',
        type=WholeNumber(min=5, max=255),
        default=176,
        help='Number that marks our routes (ip route: proto), 5 to 255. Only '
             'routes on break0 with this number are ever changed or deleted, '
             'so no other program on the node may use it. Change it only on '
             'a node without bound pods.'),
    cfg.Opt(
        'route_table',
        type=WholeNumber(min=1, max=4294967295),
        default=254,
        help='Number of the routing table for the routes. 254 is the table '
             'main. For any other table, add the routing rule that leads to '
             'it (ip rule) yourself. If the parents are in a VRF, set the '
             'table of that, which needs no rule.'),
    cfg.ListOpt(
        'allowed_cidrs',
        item_type=Network(),
        default=[],
        help='Networks that addresses of pods must be in, separated by '
             'commas: 10.0.0.0/16,fd00:10::/64. Other addresses get no '
             'route, with an error in the log. By default any address is '
             'allowed, except those of the node, its next hops, and '
             'addresses that are not of a single host. Set it to the subnets '
             'of the pods: otherwise anyone who can write a KuryrPort can '
             'redirect the node\'s traffic to other addresses.'),
    cfg.Opt(
        'discover',
        type=YesOrNo(),
        default=False,
        help='Let the agent find containers of any engine: every macvlan in '
             'bridge mode in another network namespace, on an interface of '
             'the node. Their addresses are bound when they appear and '
             'unbound when they go. This needs allowed_cidrs, because a '
             'container can give itself any address.'),
    cfg.ListOpt(
        'discover_parents',
        item_type=DeviceName(),
        default=[],
        help='Interfaces of the node whose containers are found, separated '
             'by commas. By default all.'),
    cfg.ListOpt(
        'engine_sockets',
        item_type=AbsolutePath(),
        default=['/run/docker.sock', '/run/podman/podman.sock'],
        help='Absolute paths of API sockets of container engines, separated '
             'by commas. If an engine answers, status and metrics show the '
             'names of discovered containers. Nothing else depends on it.'),
    cfg.Opt(
        'guard',
        type=OneOf(choices=[
            (AUTO, 'if nft is installed; otherwise pods are bound without it'),
            (ON, 'always; without it the ADD of a pod fails'),
            (OFF, 'never')]),
        default=AUTO,
        help='Use an nftables table that admits through break0 only packets '
             'from MAC address and address of a bound pod, and lets no frame '
             'with the MAC address of break0 leave the node. This needs the '
             'program nft, and for the latter Linux 5.16.'),
    cfg.Opt(
        'takeover',
        type=YesOrNo(),
        default=False,
        help='Replace routes to addresses of pods that another program has '
             'set, on another interface and with another protocol number. One '
             'with another metric stays, but ours is used. By default they '
             'are reported and ours is not set, because two programs that '
             'set the same route would never stop. If true, a route that '
             'returns within a minute stays.'),
    cfg.Opt(
        'resync_interval',
        type=WholeNumber(min=1, max=86400),
        default=60,
        help='Interval between full reconciliations by the agent, in '
             'seconds. The agent repairs at once what the kernel sends '
             'events about, and everything else at this interval.'),
    cfg.Opt(
        'strict',
        type=YesOrNo(),
        default=False,
        help='Fail the ADD of a pod that cannot be bound, so that kubelet '
             'tries again. By default that is an error in the log, and the '
             'pod runs, but its node cannot reach it until it is repaired.'),
    cfg.Opt(
        'state_dir',
        type=AbsolutePath(),
        default='/run/kuryr-break0',
        help='Absolute path of the directory that records which sandbox each '
             'address belongs to. It is created with mode 0700. It must not '
             'survive a reboot, since pods do not either, so put it on a '
             'tmpfs. It must be the same for kuryr-daemon, agent and '
             'command. If it is not writable, pods are bound with an error '
             'in the log.'),
    cfg.ListOpt(
        'netns_dirs',
        item_type=AbsolutePath(),
        default=['/run/netns', '/var/run/netns'],
        help='Absolute paths of directories with network namespaces of pods, '
             'separated by commas. "kuryr-break0 adopt" and the rebuilding '
             'of a lost ledger search them, and then the namespaces of all '
             'processes (proc_dirs).'),
    cfg.ListOpt(
        'proc_dirs',
        item_type=AbsolutePath(),
        default=['/proc', '/host_proc'],
        help='Absolute paths of directories that show the processes of the '
             'node, as /proc does, separated by commas. Missing ones are '
             'ignored. In a container without the process namespace of the '
             'node, mount its /proc there.'),
    cfg.Opt(
        'sysctl_dir',
        type=AbsolutePath(),
        default='/proc/sys',
        help='Absolute path of the directory through which sysctls of break0 '
             'are set. In an unprivileged container /proc/sys is read-only: '
             'mount the /proc/sys/net of the node as "net" in another '
             'directory, and set this to that directory.'),
    cfg.Opt(
        'lock_timeout',
        type=WholeNumber(min=1, max=170),
        default=10,
        help='Time to wait for another process that is changing break0, in '
             'seconds. After that, a pod is bound without the lock, and '
             'operations that delete something fail. Kuryr gives up a '
             'request after 180 seconds.'),
    cfg.Opt(
        'metrics_bind',
        type=ListeningOn(),
        default='127.0.0.1:9817',
        help='IP address and TCP port on which the agent serves /metrics, '
             '/healthz and /livez. Write an IPv6 address in brackets: '
             '[::1]:9817. By default only the node itself can reach it. '
             'There is no password and no TLS: protect other addresses with '
             'a firewall. Empty for none.'),
]


@dataclasses.dataclass(frozen=True)
class Options:
    """The ``[break0]`` options as valid, immutable values.

    The fields are the options; see their help.
    """

    enabled: bool
    pod_binding: str
    device: str
    devices: dict[str, str]
    parent: Optional[str]
    addr: tuple[IPAddress, ...]
    mac: Optional[str]
    static_neighbours: bool
    host_addresses: tuple[IPAddress, ...]
    all_addresses: bool
    route_protocol: int
    route_table: int
    allowed_cidrs: tuple[IPNetwork, ...]
    discover: bool
    discover_parents: tuple[str, ...]
    engine_sockets: tuple[str, ...]
    guard: str
    takeover: bool
    resync_interval: int
    strict: bool
    state_dir: str
    netns_dirs: tuple[str, ...]
    proc_dirs: tuple[str, ...]
    sysctl_dir: str
    lock_timeout: int
    metrics_bind: Optional[Endpoint]

    @property
    def patience(self) -> int:
        """Seconds without a sync after which the agent is not well."""
        return 3 * self.resync_interval + self.lock_timeout


def register(conf: cfg.ConfigOpts) -> None:
    """Make the options known to ``conf``; again is harmless."""
    conf.register_opts(OPTS, group=GROUP)


def _plain(text: str) -> str:
    """oslo.config's error without the representation of its objects."""
    found = re.search(r"detail='([^']*)'\) is not valid: (.*)", text)
    return '%s (from %s)' % found.group(2, 1) if found else text


def load(conf: cfg.ConfigOpts) -> Options:
    """Read and check all options.

    :raises InvalidOption: naming the first option whose value is not
        allowed, the value, where it stands and what is allowed
    """
    register(conf)
    options = Options(**{opt.dest: _value(conf, opt) for opt in OPTS})
    if options.device in options.devices.values():
        raise exceptions.InvalidOption(
            option='devices', reason='%s is [break0] device, so it cannot be '
            'another one too' % options.device)
    if options.discover and not options.allowed_cidrs:
        raise exceptions.InvalidOption(
            option='discover', reason='it needs [break0] allowed_cidrs, the '
            'networks of the containers, as 192.0.2.0/24: a container can '
            'give itself any address')
    return options


def unknown(conf: cfg.ConfigOpts) -> list[str]:
    """Return what is said in ``[break0]`` that is no option, a line each.

    As a misspelt name, which would silently drop a protection. Files that
    cannot be read have been reported by oslo.config.
    """
    known = [opt.dest for opt in OPTS]
    found: dict[str, str] = {}
    # A program that has read no files yet, as a user of os-vif may, has no
    # such options.
    for path in (*(getattr(conf, 'config_file', None) or ()), *(
            path for directory in getattr(conf, 'config_dir', None) or ()
            for path in sorted(glob.glob(os.path.join(
                glob.escape(directory), '*.conf'))))):
        sections: dict[str, Any] = {}
        with contextlib.suppress(OSError, ValueError, cfg.ParseError):
            cfg.ConfigParser(path, sections).parse()
        for name in sections.get(GROUP, {}):
            found.setdefault(name.replace('-', '_'), path)
    prefix = 'OS_%s__' % GROUP.upper()
    for name in os.environ:
        if name.startswith(prefix):
            found.setdefault(name[len(prefix):].lower(), 'the environment')
    texts = []
    for name, where in sorted(found.items()):
        if name not in known:
            texts.append('[break0] %s in %s is no option%s' % (
                name[:64], where, close_to(name, known)))
    return texts


def close_to(name: str, known: Iterable[str]) -> str:
    """Return a question for the known name that was meant, if there is one."""
    close = difflib.get_close_matches(name, known, 1)
    return ': did you mean %s?' % close[0] if close else ''


def link_iface(conf: cfg.ConfigOpts) -> Optional[str]:
    """Read the interface that Kuryr is configured to put pods on.

    :param conf: one that Kuryr has not registered its options with
    """
    conf.register_opt(cfg.StrOpt('link_iface'), group='binding')
    return conf.binding.link_iface or None


def device_name(conf: cfg.ConfigOpts) -> str:
    """Read the name of break0 alone, whatever is wrong with the options."""
    return str(_value_or_default(conf, 'device'))


def device_names(conf: cfg.ConfigOpts) -> set[str]:
    """Read the names that break0s are given, as :func:`device_name`."""
    return {device_name(conf), *_value_or_default(conf, 'devices').values()}


def _value_or_default(conf: cfg.ConfigOpts, name: str) -> Any:
    register(conf)
    opt = next(opt for opt in OPTS if opt.dest == name)
    try:
        return _value(conf, opt)
    except exceptions.InvalidOption:
        return opt.default


def _value(conf: cfg.ConfigOpts, opt: cfg.Opt) -> Any:
    try:
        value = getattr(conf[GROUP], opt.dest)
    except (cfg.Error, ValueError) as err:
        raise exceptions.InvalidOption(option=opt.name,
                                       reason=_plain(str(err))) from err
    except RecursionError as err:
        raise exceptions.InvalidOption(
            option=opt.name, reason='its value refers to itself') from err
    return tuple(value) if isinstance(value, list) else value


def list_opts() -> list[tuple[cfg.OptGroup, list[cfg.Opt]]]:
    """Return the options for oslo-config-generator (``oslo.config.opts``)."""
    group = cfg.OptGroup(
        GROUP,
        title='Node-to-pod connectivity through break0',
        help='Each option can also be set by an environment variable of the '
             'process, which wins over the file: OS_BREAK0__ADDR for addr. '
             'If a value is invalid, kuryr-daemon logs an error when it '
             'starts and for each pod, and Kuryr binds pods alone, so that '
             'their node cannot reach them.')
    return [(group, copy.deepcopy(OPTS))]
