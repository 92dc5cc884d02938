# SPDX-License-Identifier: Apache-2.0

"""Value types that all modules share. They do no I/O."""

from __future__ import annotations

import dataclasses
import enum
import functools
import hashlib
import ipaddress
import re
from typing import (ClassVar, Iterable, NamedTuple, Optional, TypeVar,
                    Union)

IPAddress = Union[ipaddress.IPv4Address, ipaddress.IPv6Address]
IPNetwork = Union[ipaddress.IPv4Network, ipaddress.IPv6Network]
IPInterface = Union[ipaddress.IPv4Interface, ipaddress.IPv6Interface]

#: Pattern of paths, and of names of owners and interfaces. It limits their
#: length, and excludes control characters, which could forge lines of a log or
#: a table.
NAME = re.compile(r'[^\x00-\x1f\x7f\u2028\u2029]{0,512}')
MAC = re.compile(r'[0-9a-f]{2}(:[0-9a-f]{2}){5}')

#: First bytes of IPv4 addresses. An address with one of these first bytes is
#: neither reserved, loopback, link-local nor multicast.
_HOSTS = frozenset(range(1, 224)) - {127, 169}


class _CachedText:
    """Computes the hash and the text of an address once.

    The base class computes both in Python at each call, and a sync needs about
    20 hashes of each address. Subclasses define the slots.
    """

    __slots__ = ()
    _hash: int
    _text: str

    def __hash__(self) -> int:
        try:
            return self._hash
        except AttributeError:
            self._hash = super().__hash__()  # type: ignore[misc]
            return self._hash

    def __str__(self) -> str:
        try:
            return self._text
        except AttributeError:
            self._text = super().__str__()  # type: ignore[misc]
            return self._text


class IPv4Address(_CachedText, ipaddress.IPv4Address):
    """Equal to an :class:`ipaddress.IPv4Address`, with the same hash."""

    __slots__ = ('_hash', '_text')


class IPv6Address(_CachedText, ipaddress.IPv6Address):
    """Equal to an :class:`ipaddress.IPv6Address`, with the same hash."""

    __slots__ = ('_hash', '_text')


#: Maximum number of entries in the cache of a function.
CACHE_SIZE = 2 ** 15


@functools.lru_cache(maxsize=CACHE_SIZE)
def address_from_bytes(packed: bytes) -> IPAddress:
    """Return the address with these 4 or 16 bytes.

    The cache returns the same object for the same bytes. A look-up in a dict
    is faster with the same object than with an equal object.
    """
    return (IPv4Address if len(packed) == 4 else IPv6Address)(packed)


@functools.lru_cache(maxsize=CACHE_SIZE)
def address_from_text(text: str) -> IPAddress:
    """Parse an address.

    An address without a scope is the object of :func:`address_from_bytes`.

    :raises ValueError: if the text is not an address
    """
    address = ipaddress.ip_address(text)
    return (address if getattr(address, 'scope_id', None)
            else address_from_bytes(address.packed))


def address_order(address: IPAddress) -> tuple[int, int]:
    """Return a sort key: IPv4 before IPv6, then by number."""
    return address.version, int(address)


def explain_non_host(address: IPAddress) -> Optional[str]:
    """Return why an address cannot belong to a pod; None if it can.

    An IPv4-mapped IPv6 address cannot belong to a pod, because such an address
    represents the address of an IPv4 node (RFC 4291, 2.5.5.2).
    """
    if address.version == 4 and address.packed[0] in _HOSTS:
        return None
    for kind in ('multicast', 'unspecified', 'loopback', 'link_local'):
        if getattr(address, 'is_' + kind):
            return '%s %s address' % ('an' if kind[0] == 'u' else 'a',
                                      kind.replace('_', '-'))
    if address.version == 4 and address.packed[0] not in _HOSTS | {169}:
        return 'a reserved address'
    if getattr(address, 'ipv4_mapped', None):
        return 'an IPv4-mapped address'
    return None


class NamespaceId(NamedTuple):
    """Identity of a network namespace, unique within this boot.

    :ivar device: device of nsfs, the same for all namespaces
    :ivar inode: inode number, which the kernel reuses
    :ivar cookie: number that the kernel never reuses (NS_GET_ID, Linux 6.18);
        None on older kernels
    """

    device: int
    inode: int
    cookie: Optional[int] = None

    def is_same(self, other: NamespaceId) -> bool:
        """Return whether both identities may be of the same namespace.

        Without both cookies, the result is also True for a reused inode
        number.
        """
        if None not in (self.cookie, other.cookie):
            return self.cookie == other.cookie
        return self[:2] == other[:2]


class Tap(NamedTuple):
    """The macvtap of a VM, and the network namespace that contains it."""

    namespace: NamespaceId
    mac: str


@dataclasses.dataclass(frozen=True)
class Owner:
    """The owner of an address: a sandbox and one of its interfaces.

    CNI passes the same values in ADD and DEL (CNI_CONTAINERID, CNI_IFNAME).
    """

    container_id: str
    ifname: str

    #: Prefix of the text in place of an unknown container id.
    ADOPTED: ClassVar[str] = 'adopted-'

    @classmethod
    def adopted(cls, namespace: NamespaceId, ifname: str) -> Owner:
        """Return the owner of a sandbox with an unknown container id.

        The sandbox was created before break0 was in use, or its record was
        lost. The namespace identifies the sandbox, and the DEL of the sandbox
        contains the path of the namespace too.
        """
        return cls('%s%d' % (cls.ADOPTED, namespace.cookie
                             or namespace.inode), ifname)

    def __str__(self) -> str:
        return '%s/%s' % (self.container_id, self.ifname)


class Origin(enum.Enum):
    """The origin of a claim."""

    KURYR = 'kuryr'
    CNI = 'cni'
    MANUAL = 'manual'
    DISCOVERED = 'discovered'


@dataclasses.dataclass(frozen=True)
class Record:
    """A claim of a sandbox on an address, as recorded in the ledger.

    :ivar parent: present name of the parent of the pod's macvlan
    :ivar mac: MAC address of the pod's interface
    :ivar subnets: networks of the interface
    :ivar netns: path of the pod's network namespace, in the mount namespace of
        the process that wrote the record
    :ivar namespace: identity of the pod's network namespace
    :ivar pod: namespace/name in Kubernetes, or the container's name, if known
    :ivar configured: digest of the node addresses that were configured on the
        pod's side; None if it was not configured
    :ivar bound_at: seconds since the boot; see :func:`ledger.files.now`
    :ivar siblings: MAC addresses of the sandbox's other interfaces on the
        parent, from which the sandbox may send too
    :ivar origin: None if unknown
    :ivar network: name of the CNI network
    :ivar parent_index: ifindex of the parent, which a rename does not change
    :ivar tap: macvtap of a VM, if it was found
    """

    address: IPAddress
    owner: Owner
    parent: str
    mac: Optional[str] = None
    subnets: tuple[IPNetwork, ...] = ()
    netns: Optional[str] = None
    namespace: Optional[NamespaceId] = None
    pod: Optional[str] = None
    configured: Optional[str] = None
    bound_at: float = 0.0
    siblings: tuple[str, ...] = ()
    origin: Optional[Origin] = None
    network: Optional[str] = None
    parent_index: Optional[int] = None
    tap: Optional[Tap] = None

    @property
    def place(self) -> tuple[Optional[str], Optional[NamespaceId],
                             Optional[Tap]]:
        """Return the arguments of :meth:`kernel.Judge.judge`."""
        return self.netns, self.namespace, self.tap

    @property
    def is_rebuilt(self) -> bool:
        """Return whether the claim was rebuilt from routes and neighbours."""
        return self.origin is None and self.owner.container_id.startswith(
            Owner.ADOPTED)

    @property
    def owner_text(self) -> str:
        """Return the owner, with the name of the pod or container if known.

        Users do not know the id of a discovered container.
        """
        return '%s (%s)' % (self.owner, self.pod) if self.pod else str(
            self.owner)

    @property
    def macs(self) -> tuple[str, ...]:
        """Return all MAC addresses from which the pod may send."""
        return () if self.mac is None else (self.mac, *self.siblings)


class HostRoute(NamedTuple):
    """A route to a single address: /32, for IPv6 /128.

    :ivar oif: ifindex of the outgoing interface; None if the route has no such
        interface or several
    :ivar src: preferred source address
    :ivar metric: the route with the lowest metric is used; in a deletion, None
        matches any metric
    :ivar direct: whether the route is unicast without gateway, MTU or
        encapsulation and, for IPv4, has scope link
    """

    dst: IPAddress
    oif: Optional[int]
    protocol: int
    table: int
    src: Optional[IPAddress] = None
    metric: Optional[int] = None
    direct: bool = True


def best_metric(address: IPAddress) -> int:
    """Return the lowest possible metric in the address's family.

    In IPv6 the kernel replaces 0 by 1024 (IP6_RT_PRIO_USER).
    """
    return 0 if address.version == 4 else 1


class Neighbour(NamedTuple):
    """A permanent neighbour.

    :ivar protocol: number of the program that set the neighbour, like the
        protocol of a route; None if the neighbour has no such number
    """

    dst: IPAddress
    ifindex: int
    mac: str
    protocol: Optional[int]


class Pair(NamedTuple):
    """A guard entry: the source addresses of packets that the guard accepts.

    :ivar address: the IP address of the pod, packed
    :ivar mac: the MAC address of the pod, packed; None for any MAC address
    """

    address: bytes
    mac: Optional[bytes]

    @classmethod
    def of(cls, address: IPAddress, mac: Optional[str]) -> Pair:
        """Return the guard entry of an address.

        :param mac: None for any MAC address
        """
        return cls(address.packed,
                   bytes.fromhex(mac.replace(':', '')) if mac else None)

    @property
    def dst(self) -> IPAddress:
        """Return the address of the pod. Each kind of item has a ``dst``."""
        return address_from_bytes(self.address)

    @property
    def set_name(self) -> str:
        """Return the name of the nftables set for this entry."""
        return '%s%d' % ('addresses' if self.mac is None else 'pairs',
                         4 if len(self.address) == 4 else 6)

    @property
    def key(self) -> bytes:
        """Return the key of the entry in the nftables set.

        nftables pads each field of a key to a multiple of 4 bytes.
        """
        return (b'' if self.mac is None else self.mac + bytes(2)
                ) + self.address


#: An entry of the tables that rtnetlink changes.
Entry = Union[HostRoute, Neighbour]
#: A route, neighbour or guard entry of an address on a break0.
Item = Union[Entry, Pair]
_Item = TypeVar('_Item', bound=Item)


def by_address(items: Iterable[_Item]) -> dict[IPAddress, list[_Item]]:
    """Group items by address, and keep the order of the items."""
    by_dst: dict[IPAddress, list[_Item]] = {}
    for item in items:
        by_dst.setdefault(item.dst, []).append(item)
    return by_dst


def of_kind(kind: type[_Item], items: Iterable[Item]) -> list[_Item]:
    """Return the items of one kind, in their order."""
    return [item for item in items if isinstance(item, kind)]


@dataclasses.dataclass(frozen=True)
class NodeAddresses:
    """The node addresses that a pod must know.

    :ivar addresses: the node addresses, in a constant order
    :ivar mac: MAC address of break0, by which the pod reaches these addresses
    """

    addresses: tuple[IPAddress, ...]
    mac: str

    @property
    def digest(self) -> str:
        """Return a digest, which the record of a configured pod contains."""
        text = ' '.join(map(str, (self.mac, *self.addresses)))
        return hashlib.sha256(text.encode()).hexdigest()[:16]
