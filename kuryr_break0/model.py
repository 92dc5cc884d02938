# SPDX-License-Identifier: Apache-2.0

"""Value types that all modules share. None of them does any I/O."""

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

#: What names an owner, an interface, a path: no control characters, which
#: could forge lines of a log or a table, and no more than a name can have.
NAME = re.compile(r'[^\x00-\x1f\x7f\u2028\u2029]{0,512}')
MAC = re.compile(r'[0-9a-f]{2}(:[0-9a-f]{2}){5}')

#: First bytes of IPv4 addresses that are of hosts, whatever follows.
_HOSTS = frozenset(range(1, 224)) - {127, 169}


class _Kept:
    """Computes the hash and the text of an address once.

    The base class does so in Python each time, and a sync needs some 20
    hashes of each address. Subclasses have the slots.
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


class IPv4Address(_Kept, ipaddress.IPv4Address):
    """Equal to an :class:`ipaddress.IPv4Address`, with the same hash."""

    __slots__ = ('_hash', '_text')


class IPv6Address(_Kept, ipaddress.IPv6Address):
    """Equal to an :class:`ipaddress.IPv6Address`, with the same hash."""

    __slots__ = ('_hash', '_text')


#: Addresses, or names of records, that are kept.
KEPT = 2 ** 15


@functools.lru_cache(maxsize=KEPT)
def address_from_bytes(packed: bytes) -> IPAddress:
    """Return an address of 4 or 16 bytes; the same object each time.

    A table finds the same object faster than an equal one.
    """
    return (IPv4Address if len(packed) == 4 else IPv6Address)(packed)


@functools.lru_cache(maxsize=KEPT)
def address_from_text(text: str) -> IPAddress:
    """Return an address; one without a scope is the same object each time.

    :raises ValueError: if the text is none
    """
    address = ipaddress.ip_address(text)
    return (address if getattr(address, 'scope_id', None)
            else address_from_bytes(address.packed))


def address_order(address: IPAddress) -> tuple[int, int]:
    """Return a sort key: IPv4 before IPv6, then by number."""
    return address.version, int(address)


def not_a_host(address: IPAddress) -> Optional[str]:
    """Return why an address cannot be that of any pod; None if it can.

    IPv4-mapped IPv6 addresses count as what they map, since no packet of
    theirs may be on a wire (RFC 4291, 2.5.5.2).
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

    :ivar device: of nsfs, which is the same for all
    :ivar inode: the kernel uses it again once the namespace is gone
    :ivar cookie: the kernel never uses it again (NS_GET_ID, linux 6.18);
        None on a kernel that does not provide it
    """

    device: int
    inode: int
    cookie: Optional[int] = None

    def is_same(self, other: NamespaceId) -> bool:
        """Return whether both name one namespace, as far as is known."""
        if None not in (self.cookie, other.cookie):
            return self.cookie == other.cookie
        return self[:2] == other[:2]


class Tap(NamedTuple):
    """The interface of a VM, and the namespace of the node that it is in."""

    namespace: NamespaceId
    mac: str


@dataclasses.dataclass(frozen=True)
class Owner:
    """The sandbox that an address belongs to, and its interface there.

    CNI names both the same in ADD and DEL (CNI_CONTAINERID, CNI_IFNAME).
    """

    container_id: str
    ifname: str

    #: Begins the container id that stands for an unknown one.
    ADOPTED: ClassVar[str] = 'adopted-'

    @classmethod
    def adopted(cls, namespace: NamespaceId, ifname: str) -> Owner:
        """Return the owner that stands for an unknown container id.

        That is a sandbox bound before break0 was in use, or whose record
        was lost. Its namespace identifies it, and its DEL names that too.
        """
        return cls('%s%d' % (cls.ADOPTED, namespace.cookie
                             or namespace.inode), ifname)

    def __str__(self) -> str:
        return '%s/%s' % (self.container_id, self.ifname)


class Origin(enum.Enum):
    """By which way a claim came."""

    KURYR = 'kuryr'
    CNI = 'cni'
    MANUAL = 'manual'
    DISCOVERED = 'discovered'


@dataclasses.dataclass(frozen=True)
class Record:
    """A claim of a sandbox on an address, as the ledger keeps it.

    :ivar parent: the interface that the pod's macvlan is on, by the name
        that it has now
    :ivar mac: MAC address of the pod's interface
    :ivar subnets: the networks that it is in on the link
    :ivar netns: path of its namespace, as the writer saw it
    :ivar namespace: what that namespace is
    :ivar pod: its namespace and name in Kubernetes, where known
    :ivar configured: digest of the node addresses that the pod side was
        configured with; None if it was not
    :ivar bound_at: seconds since the boot, as of :func:`ledger.files.now`
    :ivar siblings: MAC addresses of other interfaces of the sandbox on the
        parent; it may answer by any of them
    :ivar origin: by which way it came; None if that is not known
    :ivar network: name of the CNI network that it is an attachment to
    :ivar parent_index: ifindex of the parent, which it keeps when it is
        renamed
    :ivar tap: its macvtap, if it is a VM and that was seen
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
        """Return what tells whether its sandbox still exists."""
        return self.netns, self.namespace, self.tap

    @property
    def is_rebuilt(self) -> bool:
        """Return whether it was made of what the kernel holds."""
        return self.origin is None and self.owner.container_id.startswith(
            Owner.ADOPTED)

    @property
    def whose(self) -> str:
        """Return its owner, with the name that people know, if there is one.

        The id of a container that was discovered says nothing to anybody.
        """
        return '%s (%s)' % (self.owner, self.pod) if self.pod else str(
            self.owner)

    @property
    def macs(self) -> tuple[str, ...]:
        """Return all MAC addresses that the address may come from."""
        return () if self.mac is None else (self.mac, *self.siblings)


class HostRoute(NamedTuple):
    """A route to a single address: /32, for IPv6 /128.

    :ivar oif: ifindex of its interface; None for one without, or several
    :ivar src: the node's address that it speaks from
    :ivar metric: of several routes to an address the lowest one wins; None
        in a deletion means any
    :ivar direct: whether it leads to a neighbour on that interface: unicast,
        without gateway, MTU and encapsulation, and, for IPv4, scoped to the
        link
    """

    dst: IPAddress
    oif: Optional[int]
    protocol: int
    table: int
    src: Optional[IPAddress] = None
    metric: Optional[int] = None
    direct: bool = True


def best_metric(address: IPAddress) -> int:
    """Return the metric that no other route can be better than.

    The kernel takes 0 for 1024 in IPv6 (IP6_RT_PRIO_USER).
    """
    return 0 if address.version == 4 else 1


class Neighbour(NamedTuple):
    """The MAC address of an address on an interface, set for good.

    :ivar protocol: who set it, as of a route; None if no program marked it
    """

    dst: IPAddress
    ifindex: int
    mac: str
    protocol: Optional[int]


class Pair(NamedTuple):
    """A guard entry: the addresses that packets of a pod may come from.

    :ivar address: the address of the pod, packed
    :ivar mac: its MAC address, packed; None for any
    """

    address: bytes
    mac: Optional[bytes]

    @classmethod
    def of(cls, address: IPAddress, mac: Optional[str]) -> Pair:
        """Return the guard entry of an address; without MAC, for any."""
        return cls(address.packed,
                   bytes.fromhex(mac.replace(':', '')) if mac else None)

    @property
    def dst(self) -> IPAddress:
        """Return the address that the entry is for, as of other items."""
        return address_from_bytes(self.address)

    @property
    def set_name(self) -> str:
        """Return the name of its set in the table."""
        return '%s%d' % ('addresses' if self.mac is None else 'pairs',
                         4 if len(self.address) == 4 else 6)

    @property
    def key(self) -> bytes:
        """Return its key in that set: each part is padded to 4 bytes."""
        return (b'' if self.mac is None else self.mac + bytes(2)
                ) + self.address


#: An entry of the tables that rtnetlink changes.
Entry = Union[HostRoute, Neighbour]
#: An item that an address has on a break0.
Item = Union[Entry, Pair]
_Item = TypeVar('_Item', bound=Item)


def by_address(items: Iterable[_Item]) -> dict[IPAddress, list[_Item]]:
    """Return items by their addresses, in the order of the items."""
    found: dict[IPAddress, list[_Item]] = {}
    for item in items:
        found.setdefault(item.dst, []).append(item)
    return found


def of_kind(kind: type[_Item], items: Iterable[Item]) -> list[_Item]:
    """Return the items of one kind, in their order."""
    return [item for item in items if isinstance(item, kind)]


@dataclasses.dataclass(frozen=True)
class NodeAddresses:
    """The node's addresses, as a pod must know them.

    :ivar addresses: in their order
    :ivar mac: the MAC address of break0, which they are reached at
    """

    addresses: tuple[IPAddress, ...]
    mac: str

    @property
    def digest(self) -> str:
        """Return a digest, which a record keeps of what its pod has."""
        text = ' '.join(map(str, (self.mac, *self.addresses)))
        return hashlib.sha256(text.encode()).hexdigest()[:16]
