# SPDX-License-Identifier: Apache-2.0

"""Lists the problems of a snapshot: of the node, break0s, addresses and pods.

A problem stops traffic, or is a difference that a sync repairs. The commands
status, sync and doctor, the metrics, and CHECK of the CNI plugin all use these
functions, so that their results agree.
"""

from __future__ import annotations

from typing import Iterable, Iterator, NamedTuple, Optional, Sequence, Union

from kuryr_break0.break0 import device
from kuryr_break0.break0.guard import is_installed
from kuryr_break0.break0.guard import NO_NFT
from kuryr_break0.break0 import missing
from kuryr_break0.break0 import podside
from kuryr_break0.engine.snapshot import Parent
from kuryr_break0.engine.snapshot import Snapshot
from kuryr_break0 import exceptions
from kuryr_break0 import kernel
from kuryr_break0.ledger.identity import Ownership
from kuryr_break0 import model
from kuryr_break0 import policy

#: Subject of the problems of the node itself.
NODE = 'the node'
#: Kinds of problems of a break0 that cause all problems of its addresses.
CAUSES = ('parent-missing', 'parent-mismatch', 'parent-vrf', 'parent-down',
          'macvlan-impossible', 'break0-foreign', 'break0-wrong-parent',
          'break0-missing', 'break0-vrf', 'break0-down', 'break0-mac')
_UNCONFIGURED = 'its container is not configured to reach the node'


class Problem(NamedTuple):
    """A problem of the node, a break0, an address or its pod.

    :ivar kind: the id of the doctor's finding
    :ivar subject: an address, the name of a break0, or NODE
    :ivar text: a sentence without a full stop
    :ivar is_error: whether the problem stops traffic, unlike other problems of
        its kind
    """

    kind: str
    subject: Union[model.IPAddress, str]
    text: str
    is_error: bool = False


def find(snapshot: Snapshot) -> list[Problem]:
    """Return the problems of the node, its break0s and addresses.

    The most important problem of an address comes first.
    """
    return [*_of_node(snapshot), *(
        problem for parent in snapshot.parents.values()
        for problem in of_device(parent, snapshot)), *_of_addresses(snapshot)]


def find_all(snapshot: Snapshot
             ) -> tuple[list[Problem], dict[model.IPAddress, str]]:
    """Return all problems, including the problems of the pod sides.

    :returns: the problems, and the addresses whose pod side could not be
        examined, with the reason
    """
    of_pods: list[Problem] = []
    unknown: dict[model.IPAddress, str] = {}
    for records in snapshot.interfaces():
        if records[0].netns is None:
            unknown.update((each.address, 'its namespace is not recorded')
                           for each in records)
            continue
        try:
            of_pods += of_pod(records, snapshot)
        except exceptions.Break0Error as err:
            unknown.update((each.address, str(err)) for each in records)
    # A lost interface or address is the cause of the other problems.
    lost = [each for each in of_pods if each.kind in (
        'pod-interface-gone', 'pod-address-missing')]
    return [*lost, *find(snapshot), *(each for each in of_pods
                                      if each not in lost)], unknown


def by_address(problems: Iterable[Problem]) -> dict[model.IPAddress, str]:
    """Return the first problem of each address, sorted by address."""
    texts: dict[model.IPAddress, str] = {}
    for problem in problems:
        if not isinstance(problem.subject, str):
            texts.setdefault(problem.subject, problem.text)
    return {address: texts[address]
            for address in sorted(texts, key=model.address_order)}


def of_node(problems: Iterable[Problem]) -> list[str]:
    """Return the texts of the problems of the node and its break0s."""
    return [each.text for each in problems if isinstance(each.subject, str)]


def _of_node(snapshot: Snapshot) -> Iterator[Problem]:
    if snapshot.is_lost:
        yield Problem('ledger-lost', NODE, 'the ledger in %s was lost; a sync '
                      'rebuilds it' % snapshot.options.state_dir)
    if snapshot.name_conflict is not None:
        link = snapshot.name_conflict
        yield Problem('break0-foreign', link.name, str(
            exceptions.DeviceConflict(
                device=link.name, found=link.description,
                expected='a macvlan in bridge mode on the parent of pods')))
    if snapshot.unjudged:
        yield Problem('sandbox-unknown', NODE, unjudged_text(snapshot))


def of_device(parent: Parent, snapshot: Snapshot) -> Iterator[Problem]:
    """Return the problems of one break0.

    A break0 without pods has a problem only if the break0 or its parent cannot
    be used, or if the break0 belongs to another ledger.
    """
    def problem(kind: str, text: str, is_error: bool = False) -> Problem:
        return Problem(kind, parent.device, text, is_error)

    name, lower, live = parent.device, parent.parent, parent.live
    if parent.conflict is not None:
        yield problem(_kind_of(parent), str(parent.conflict))
        return
    if parent.link is None:
        if live:
            yield problem(
                'break0-missing', '%s is missing on %s, but %d addresses are '
                'bound' % (name, parent.name, len(live)))
        return
    if parent.other is not None and (
            parent.ownership is not Ownership.LOST):
        yield problem('ledger-other', '%s belongs to the ledger %s in %s' % (
            name, *parent.other))
    if not live or lower is None:
        return
    table = snapshot.options.route_table
    if lower.vrf and lower.vrf.table != table:
        yield problem(
            'parent-vrf', '%s is in the VRF %s with table %d, but [break0] '
            'route_table is %d' % (lower.name, kernel.format_ifname(
                lower.vrf.ifindex), lower.vrf.table, table))
    if not (lower.up and lower.carrier):
        # Other problems of break0 have no effect on a parent without carrier.
        yield problem('parent-down', '%s, the parent of %s, %s' % (
            parent.name, name, 'has no carrier' if lower.up else 'is down'))
        return
    for kind, text in parent.differences:
        if kind != 'ipv6':
            yield problem('break0-' + kind, '%s: %s' % (name, text))
    # The guard contains the MAC address. If the MAC address is wrong, report
    # only 'mac': a sync repairs both.
    if parent.guard and all(kind != 'mac' for kind, _ in parent.differences):
        yield problem('guard-missing' if is_installed()
                      else 'guard-unavailable', '%s: %s' % (
                          name, parent.guard if is_installed()
                          else '%s, and %s' % (parent.guard, NO_NFT)))
    # The loop above omits 'ipv6', a difference that exists only if a sync can
    # enable IPv6. Report disabled IPv6 in all cases.
    if (parent.has_ipv6
            and kernel.read_sysctl(device.DISABLE_IPV6 % name) != 0):
        yield problem('ipv6-disabled', device.ipv6_text(name))


def _kind_of(parent: Parent) -> str:
    if isinstance(parent.conflict, exceptions.ParentNotFound):
        return 'parent-missing'
    if isinstance(parent.conflict, exceptions.ParentMismatch):
        return 'parent-mismatch'
    if isinstance(parent.conflict, exceptions.ParentUnfit):
        return 'macvlan-impossible'
    link = parent.present
    return 'break0-wrong-parent' if link is not None and (
        link.kind, link.mode) == ('macvlan', 'bridge') else 'break0-foreign'


def cause_of(parent: Parent, snapshot: Snapshot) -> Optional[Problem]:
    """Return the problem of a break0 that affects all its addresses."""
    return next((each for each in of_device(parent, snapshot)
                 if each.kind in CAUSES), None)


def _of_addresses(snapshot: Snapshot) -> Iterator[Problem]:
    for address in snapshot.contents.unreadable:
        name = '/%s.json' % address
        yield Problem(
            next((kind for kind, paths in (
                ('ledger-newer', snapshot.contents.newer),
                ('ledger-damaged', snapshot.contents.damaged))
                if any(path.endswith(name) for path in paths)),
                'ledger-quarantined'),
            address, 'its record in the ledger cannot be read')
    gone = {record.address for record in snapshot.gone} - snapshot.live.keys()
    for address in gone:
        yield Problem('sandbox-gone', address, 'its sandbox is gone')
    explained = {*gone, *snapshot.refused}
    for parent in snapshot.parents.values():
        cause = cause_of(parent, snapshot)
        for each in _on(parent, explained):
            yield each if cause is None else each._replace(
                kind=cause.kind, text=cause.text)
        if parent.other is not None:
            continue  # unclaimed items may have records in the other ledger
        for address in _destinations(parent.plan.unclaimed):
            yield Problem(
                'route-stale' if address in parent.routes
                else 'neighbour-stale', address, 'no container claims it')
    for address, reason in snapshot.refused.items():
        yield Problem(
            'address-not-allowed' if reason == policy.NOT_ALLOWED
            else 'address-refused', address, 'it is ' + reason)
    for address, rivals in snapshot.rivals.items():
        yield Problem('address-contested', address, 'it is claimed by %s too'
                      % ', '.join(rival.owner_text for rival in rivals))
    for record in snapshot.gone:
        if record.address not in gone:
            yield Problem('sandbox-gone', record.address, 'its sandbox is '
                          'gone (older claim of %s)' % record.owner_text)


def _on(parent: Parent, explained: set[model.IPAddress]) -> Iterator[Problem]:
    """Return the problems of the addresses of one break0.

    :param explained: addresses whose stale items another problem explains
    """
    plan = parent.plan
    foreign = {route.dst: route for route in plan.foreign}
    if parent.conflict is not None:
        for address in parent.live:
            yield Problem(_kind_of(parent), address, str(parent.conflict))
        return
    for route in foreign.values():
        yield Problem('route-foreign', route.dst, foreign_text(route))
    for address in parent.live:
        if address not in parent.desired and address not in explained:
            yield Problem('ipv6-disabled', address,
                          'IPv6 is disabled on ' + parent.device)
    for route in model.of_kind(model.HostRoute, plan.set):
        if route.dst not in foreign:
            is_wrong = route.dst in parent.routes
            yield Problem('route-wrong' if is_wrong else 'route-missing',
                          route.dst, 'its route is '
                          + ('wrong' if is_wrong else 'missing'))
    for neighbour in model.of_kind(model.Neighbour, plan.set):
        is_wrong = neighbour.dst in parent.neighbours
        yield Problem(
            'neighbour-wrong' if is_wrong else 'neighbour-missing',
            neighbour.dst, 'its neighbour entry is '
            + ('wrong' if is_wrong else 'missing'))
    if not parent.guard:
        for address in _destinations(model.of_kind(model.Pair, plan.set)):
            yield Problem('guard-missing', address, 'its guard entry is '
                          'missing', True)
    for kind, items, text in (
            ('route-extra', model.of_kind(model.HostRoute, plan.unset),
             'route'),
            ('neighbour-extra', model.of_kind(model.Neighbour, plan.unset),
             'neighbour entry'),
            ('guard-missing', model.of_kind(model.Pair, plan.unset)
             if not parent.guard else [], 'guard entry')):
        for address in _destinations(items):
            if address not in explained and address not in foreign:
                yield Problem(kind, address,
                              'it has a %s that no record needs' % text)
    for address, (through, get) in parent.astray.items():
        yield Problem('route-not-used', address, 'packets to it do not leave '
                      'through %s: %s. See: ip route get %s; ip -%d rule' % (
                          parent.device, through, get, address.version))


def _destinations(items: Iterable[model.Item]) -> Iterable[model.IPAddress]:
    return dict.fromkeys(item.dst for item in items)


def of_pod(records: Sequence[model.Record], snapshot: Snapshot,
           pause: float = missing.PAUSE) -> list[Problem]:
    """Return the problems of one pod side, causes before effects.

    :param records: the records of the interface, at least one
    :param pause: as for :func:`kuryr_break0.break0.missing.find`
    :raises Break0Error: if the pod side cannot be examined
    """
    parent = snapshot.parents[records[0].parent]
    if parent.node is None or records[0].netns is None:
        return []  # there is no break0, or no namespace to examine
    addresses = [record.address for record in records]
    cause = cause_of(parent, snapshot)
    try:
        all_problems = list(_in_pod(records, parent, snapshot, pause))
    except exceptions.InterfaceGone as err:
        return [Problem('pod-interface-gone', address, str(err))
                for address in addresses]
    except exceptions.Break0Error:
        if all(map(parent.is_configured, records)):
            raise
        all_problems = []
    if not all(map(parent.is_configured, records)):
        return [Problem('pod-not-configured', address, _UNCONFIGURED)
                if cause is None else cause._replace(subject=address)
                for address in addresses]
    return all_problems if cause is None else []


def _in_pod(records: Sequence[model.Record], parent: Parent,
            snapshot: Snapshot, pause: float) -> list[Problem]:
    assert parent.node is not None
    is_dropping = is_strict(parent)  # before the pod's namespace is entered
    all_problems: list[Problem] = []

    def add(kind: str, text: str, version: Optional[int] = None,
            is_error: bool = False) -> None:
        all_problems.extend(
            Problem(kind, record.address, text, is_error)
            for record in records
            if version in (None, record.address.version))

    with podside.entered(records[0]) as netlink:
        side = podside.PodSide(netlink, records, snapshot.options,
                               snapshot.contents.unreadable)
        link, record = side.link, side.record
        place = 'the interface %s of its container' % link.name
        # IFLA_LINK_NETNSID is not compared: each namespace has its own
        # number for the namespace of the parent.
        if parent.present is None or (link.kind, link.lower, link.mode) != (
                'macvlan', parent.present.lower, 'bridge'):
            add('pod-apart', '%s is %s, but must be in bridge mode on %s' % (
                place, link.description, record.parent))
            return all_problems
        if not link.up:
            add('pod-down', '%s is down' % place)
            # The kernel has deleted the interface's routes and neighbours.
            return all_problems
        all_problems += [
            Problem('pod-address-missing', each.record.address, str(each))
            for each in side.missing(pause)]
        is_changed = record.mac not in (None, link.mac)
        if is_changed:
            add('pod-mac', 'the MAC address of %s is %s, but was %s' % (
                place, link.mac, record.mac))
        macs = {each.dst: each.mac for each in netlink.neighbours(link.index)}
        for verb, item in side.changes(parent.node):
            host, text = item.dst, _UNCONFIGURED + ': '
            if verb is kernel.Verb.DELETE:
                add('pod-entry-extra', text + 'it has a stale %s for %s' % (
                    'route' if isinstance(item, model.HostRoute)
                    else 'neighbour', host))
            elif isinstance(item, model.HostRoute):
                is_reached = netlink.lookup(host) is not None
                is_dropped = is_reached and host.version == 4 and is_dropping
                add('rp-filter' if is_dropped else 'pod-route-missing',
                    text + 'it has no %sroute to the node address %s%s' % (
                        'direct ' if is_reached else '', host,
                        ', and rp_filter of %s is 1' % parent.name
                        if is_dropped else ''),
                    host.version, not is_reached)
            # If the MAC address of an interface changes, the kernel deletes
            # the interface's neighbours (neigh_changeaddr).
            elif not is_changed:
                mac = macs.get(host)
                add('pod-neighbour-wrong' if mac else 'pod-neighbour-missing',
                    text + 'the neighbour for the node address %s is %s, but '
                    'must be %s' % (host, mac or 'missing', item.mac),
                    host.version)
        if side.lacks_source_rule():
            add('pod-rule-missing', _UNCONFIGURED + ': it lacks the nftables '
                'rule that drops frames with another MAC address')
    return all_problems


def is_strict(parent: Parent) -> bool:
    """Return whether rp_filter of a parent is strict.

    A strict rp_filter drops packets that a pod sends through its gateway: the
    packets arrive on the parent, but the route to the pod uses break0.
    """
    return kernel.effective_sysctl('ipv4/conf/%s/rp_filter', parent.name) == 1


def unjudged_text(snapshot: Snapshot) -> str:
    """Describe the claims of sandboxes that may have ended.

    :returns: an empty text if there are no such claims
    """
    for record, reason in snapshot.unjudged.items():
        return ('cannot find out whether the sandboxes of %d addresses '
                'still exist, so they stay bound, for example %s of %s: %s' % (
                    len(snapshot.unjudged), record.address, record.owner_text,
                    reason))
    return ''


def foreign_text(route: model.HostRoute) -> str:
    """Describe the foreign route that conflicts with a pod's route."""
    return 'it has a route of another program, through %s with protocol %s' % (
        kernel.format_ifname(route.oif), route.protocol)


def guard_text(added: Iterable[model.Item], deleted: Iterable[model.Item]
               ) -> Iterator[str]:
    """Yield a text about missing and stale guard entries, if there are any.

    The text contains the number of their addresses, since an address can have
    several guard entries. Items of other kinds do not count.
    """
    lacking, stale = (
        len({pair.dst for pair in model.of_kind(model.Pair, items)})
        for items in (added, deleted))
    parts = ['has %s entries for %d address%s' % (
        kind, count, '' if count == 1 else 'es')
        for kind, count in (('no', lacking), ('stale', stale)) if count]
    if parts:
        yield 'its guard ' + ' and '.join(parts)
