# SPDX-License-Identifier: Apache-2.0

"""Run random sequences of a node's events against a kernel in memory.

The engine has these invariants: an address has the route, neighbour and guard
entry of its newest live claim, and no others; an address without a live claim
has none; an address that a foreign route blocks, or that is a next hop of the
node, has none; foreign routes stay untouched; a second sync changes nothing.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import errno
import ipaddress
import itertools
import logging
import os
import shutil
import tempfile
from typing import Any, Callable, Iterator, Optional
import unittest
from unittest import mock

import hypothesis
from hypothesis import stateful
from hypothesis import strategies as st

from kuryr_break0.engine import reconciler
from kuryr_break0 import exceptions
from kuryr_break0 import kernel
from kuryr_break0 import ledger
from kuryr_break0.ledger import records
from kuryr_break0 import manager
from kuryr_break0.model import best_metric
from kuryr_break0.model import HostRoute
from kuryr_break0.model import IPAddress
from kuryr_break0.model import NamespaceId
from kuryr_break0.model import Origin
from kuryr_break0.model import Owner
from tests.functional import base
from tests.unit import fake

ADDRESSES = [ipaddress.ip_address(text) for text in (
    '10.0.0.71', '10.0.0.72', 'fd00::71')]
PARENTS = 'eth0', 'eth1'
PATHS = ['/run/netns/%d' % number for number in range(4)]

addresses = st.sampled_from(ADDRESSES)
#: The number of steps before the process is killed, or None. Nine of the
#: sixteen choices are None.
kills = st.sampled_from((*[None] * 9, *range(7)))
errors = st.sampled_from((*[0] * 9, errno.ENOBUFS))
some = st.integers(0, 2 ** 16)


# Shrinking takes minutes, so only the variable SHRINK enables it.
PHASES = [hypothesis.Phase.generate] + (
    [hypothesis.Phase.shrink] if os.environ.get('SHRINK') else [])


class Killed(BaseException):
    """Stands for the end of the process by SIGKILL."""


@dataclasses.dataclass
class Sandbox:
    """A namespace with a macvlan; a later namespace can have the same path."""

    path: str
    namespace: NamespaceId
    parent: str
    mac: str
    owner: Owner
    addresses: set[IPAddress] = dataclasses.field(default_factory=set)
    lives: bool = True


@dataclasses.dataclass(frozen=True)
class Add:
    """A request to bind, which a rule can undo, repeat or deliver late."""

    sandbox: int
    address: IPAddress
    bound_at: float


class Node(stateful.RuleBasedStateMachine):
    """The node: rules change it, and invariants compare it with the claims."""

    def __init__(self) -> None:
        super().__init__()
        self._stack = contextlib.ExitStack()
        directory = self._stack.enter_context(tempfile.TemporaryDirectory(
            dir='/dev/shm' if os.path.isdir('/dev/shm') else None))
        self.options = base.options(state_dir=os.path.join(directory, 's'))
        self.fake = fake.FakeKernel()
        for number, parent in enumerate(PARENTS):
            self.fake.add_link(parent)
            self.fake.owned += [
                (parent, ipaddress.ip_address('10.0.%d.1' % number)),
                (parent, ipaddress.ip_address('fd00::%d:1' % number))]
        for patcher in fake.patchers(self.fake):
            self._stack.enter_context(patcher)
        self.sandboxes: list[Sandbox] = []
        self.adds: list[Add] = []
        #: The sandboxes that claim an address, newest first.
        self.claims: dict[IPAddress, list[Sandbox]] = (
            collections.defaultdict(list))
        self.bound_at: dict[tuple[IPAddress, int], float] = {}
        #: Claims that were rebuilt after the loss of the ledger. Their records
        #: name no container.
        self.rebuilt: set[tuple[IPAddress, int]] = set()
        self.discovered: set[tuple[IPAddress, int]] = set()
        # Rebuilt claims have the monotonic time of this boot, and requests of
        # the model have to be newer.
        self.clock = itertools.count(2 ** 40)
        self.was_killed = False
        #: Whether a kill or an error since the last sync can have left items
        #: behind.
        self.is_unsettled = False
        self.foreign: dict[fake.RouteKey, HostRoute] = {}
        #: The addresses that were next hops since the ledger began.
        self.earlier_next_hops: set[IPAddress] = set()
        self.others = HostRoute(ipaddress.ip_address('10.9.9.9'), 1, 4, 254)
        self.fake.set_route(self.others)

    def teardown(self) -> None:
        try:
            self.settle()
        finally:
            self._stack.close()

    # Events

    @stateful.initialize(where=st.lists(addresses, min_size=3, max_size=3))
    def some_containers(self, where: list[IPAddress]) -> None:
        for path, parent, address in zip(PATHS, ('eth0', *PARENTS), where):
            self.new_sandbox(path, parent)
            self.add(-1, address, False, None, 0)

    @stateful.rule(path=st.sampled_from(PATHS),
                   parent=st.sampled_from(('eth0', *PARENTS)))
    def new_sandbox(self, path: str, parent: str) -> None:
        if path in self.fake.namespaces:
            return
        number = len(self.sandboxes)
        # The kernel reuses the inode numbers of namespaces, and never their
        # cookies.
        namespace = NamespaceId(4, 100 + PATHS.index(path), 1000 + number)
        self.fake.namespaces[path] = namespace
        self.sandboxes.append(Sandbox(
            path, namespace, parent, 'fa:16:3e:00:00:%02x' % number,
            Owner('container-%d' % number, 'eth0')))

    @stateful.precondition(lambda self: self.sandboxes)
    @stateful.rule(which=some)
    def end_sandbox(self, which: int) -> None:
        found = self.sandbox(which)
        if found.lives:
            del self.fake.namespaces[found.path]
            self.end(found)

    def end(self, sandbox: Sandbox) -> None:
        sandbox.lives = False
        self.fake.gone.add(sandbox.namespace)

    def sandbox(self, which: int) -> Sandbox:
        return self.sandboxes[which % len(self.sandboxes)]

    @stateful.precondition(lambda self: self.sandboxes)
    @stateful.rule(which=some, address=addresses, yields=st.booleans(),
                   killed=kills,
                   fails=errors)
    def add(self, which: int, address: IPAddress, yields: bool,
            killed: Optional[int], fails: int) -> None:
        sandbox = self.sandbox(which)
        if sandbox.lives:
            made = Add(self.sandboxes.index(sandbox), address,
                       float(next(self.clock)))
            self.adds.append(made)
            self.bind(made, yields, killed, fails)

    @stateful.precondition(lambda self: self.sandboxes)
    @stateful.rule(which=some, address=addresses)
    def add_by_an_engine(self, which: int, address: IPAddress) -> None:
        self.add(which, address, False, None, 0)

    @stateful.precondition(lambda self: self.sandboxes)
    @stateful.rule(which=some, address=addresses)
    def two_claims(self, which: int, address: IPAddress) -> None:
        """Two sandboxes claim an address; the newer one ends before a sync."""
        for number in which, which + 1:
            self.add(number, address, False, None, 0)
        self.end_sandbox(which + 1)
        self.settle()

    @stateful.precondition(lambda self: self.adds)
    @stateful.rule(which=some)
    def add_late(self, which: int) -> None:
        """A request waits for the lock longer than newer requests."""
        made = self.adds[which % len(self.adds)]
        if self.sandboxes[made.sandbox].lives:
            self.bind(made, False, None, 0)

    def bind(self, made: Add, yields: bool, killed: Optional[int],
             fails: int) -> None:
        sandbox = self.sandboxes[made.sandbox]
        sandbox.addresses.add(made.address)
        present = self.claims[made.address]
        key = made.address, made.sandbox
        owner = sandbox.owner
        if yields:  # discovery
            owner = Owner('discovered-%d' % made.sandbox, 'eth0')
        is_known = key in self.bound_at and sandbox in present and (
            key not in self.rebuilt)
        if is_known and (key in self.discovered) != yields:
            return  # other tests cover an engine's bind of a discovered pod
        rivals = [each for each in present
                  if each.lives and each is not sandbox]
        is_late = is_known and self.bound_at[key] > made.bound_at
        is_refused = self.is_refused(made.address, yields)
        is_blocked = self.is_blocked(made.address)
        ended = self.attempt(made.address, sandbox, killed, fails, lambda: (
            manager.Break0Manager(self.options).bind(
                owner, [made.address], parent=sandbox.parent,
                mac=sandbox.mac, netns=sandbox.path, yielding=yields,
                origin=Origin.DISCOVERED if yields else Origin.CNI,
                bound_at=made.bound_at)))
        if is_refused:
            assert isinstance(ended, (
                exceptions.AddressRefused, Killed)), ended
            return
        if is_late:
            assert ended is None or killed is not None, ended
            return
        if yields and rivals:
            assert isinstance(ended, (exceptions.AddressTaken, Killed)), ended
            return
        is_foreign = isinstance(ended, exceptions.ForeignRoute)
        if ended is None or is_foreign:
            assert is_foreign == is_blocked, (ended, self.fake.host)
        if ended is None or is_foreign and not yields:
            self.claims[made.address] = [sandbox, *(
                each for each in present if each is not sandbox)]
            self.note(made, yields)
        elif self.recorded(made.address)[:1] == [sandbox] and (
                self.ledger().records.claims(made.address)[0].bound_at
                == made.bound_at):
            self.note(made, yields)
        if ended is None and not self.is_unsettled:
            self.assert_served(made.address)

    def note(self, made: Add, yields: bool) -> None:
        key = made.address, made.sandbox
        self.bound_at[key] = made.bound_at
        self.discovered.discard(key)
        if yields:
            self.discovered.add(key)
        self.rebuilt.discard(key)

    @stateful.precondition(lambda self: self.adds)
    @stateful.rule(which=some, undoes=st.booleans(),
                   all_of_it=st.booleans(),
                   killed=kills,
                   fails=errors)
    def delete(self, which: int, undoes: bool, all_of_it: bool,
               killed: Optional[int], fails: int) -> None:
        """A DEL arrives in time, late or twice, or a bind is undone."""
        made = self.adds[which % len(self.adds)]
        sandbox = self.sandboxes[made.sandbox]
        key = made.address, made.sandbox
        owner = (Owner('discovered-%d' % made.sandbox, 'eth0')
                 if key in self.discovered else sandbox.owner)
        was_it = not undoes or self.bound_at.get(key) == made.bound_at
        ended = self.attempt(made.address, sandbox, killed, fails, lambda: (
            manager.Break0Manager(self.options).unbind(
                owner, None if all_of_it and not undoes else [made.address],
                sandbox.path, sandbox.mac,
                bound_at=made.bound_at if undoes else None)))
        if ended is not None:
            return
        for address in ADDRESSES if all_of_it and not undoes else [
                made.address]:
            present, each = self.claims[address], (address, made.sandbox)
            if each in self.rebuilt:
                # A rebuilt claim names no container, so the namespace at the
                # path has to match.
                is_own = not undoes and sandbox.lives
            else:
                is_own = was_it and (each in self.discovered) == (
                    key in self.discovered)
            if is_own and sandbox in present:
                present.remove(sandbox)

    @stateful.rule()
    def housekeep(self) -> None:
        with contextlib.suppress(exceptions.Break0Error):
            manager.Break0Manager(self.options).housekeep()

    @stateful.rule(killed=st.integers(0, 9))
    def killed_sync(self, killed: int) -> None:
        with self.dying(killed), contextlib.suppress(
                Killed, exceptions.Break0Error):
            self.sync()

    @stateful.rule(address=addresses, metric=st.sampled_from((None, 9)))
    def foreign_route(self, address: IPAddress, metric: Optional[int]) -> None:
        """Another program sets a route, as "ip route replace" does."""
        route = HostRoute(address, 1, 4, 254, None,
                          best_metric(address) if metric is None else metric)
        self.foreign[fake.route_key(route)] = route
        self.fake.set_route(route)

    @stateful.precondition(lambda self: self.foreign)
    @stateful.rule(which=some)
    def foreign_route_goes(self, which: int) -> None:
        key = list(self.foreign)[which % len(self.foreign)]
        del self.foreign[key], self.fake.host[key]

    @stateful.rule(address=addresses, is_through_break0=st.booleans())
    def next_hop(self, address: IPAddress, is_through_break0: bool) -> None:
        """A route makes an address a next hop; the agent syncs."""
        (self.fake.through_break0 if is_through_break0
         else self.fake.next_hops).add(address)
        self.sync()
        self.earlier_next_hops.add(address)

    @stateful.rule(address=addresses)
    def next_hop_goes(self, address: IPAddress) -> None:
        self.fake.next_hops.discard(address)
        self.fake.through_break0.discard(address)
        self.sync()

    @stateful.rule(address=addresses, what=st.integers(0, 4))
    def another_program_deletes(self, address: IPAddress, what: int) -> None:
        if what == 0:
            for route in self.our_routes(address):
                del self.fake.host[fake.route_key(route)]
        elif what == 1:
            for key in [key for key in self.fake.known if key[1] == address]:
                del self.fake.known[key]
        elif what == 2:
            for pairs in self.fake.tables.values():
                pairs.clear()
        elif what == 3:
            for name in [name for name in self.fake.links
                         if name.startswith('break0')]:
                self.fake.lose(name)
        elif what == 4:
            for name in [name for name in self.fake.links
                         if name.startswith('break0')]:
                self.fake.replace(self.fake.links[name], mtu=1400)

    @stateful.rule(really=st.sampled_from((True, *[False] * 4)))
    def lose_the_ledger(self, really: bool) -> None:
        if not really:
            return
        self.settle()
        served = {address: self.claims[address][0] for address in ADDRESSES
                  if self.our_routes(address)}
        shutil.rmtree(self.options.state_dir, ignore_errors=True)
        for address in ADDRESSES:
            self.claims[address] = []
            if address in served:
                sandbox = served[address]
                number = self.sandboxes.index(sandbox)
                self.claims[address] = [sandbox]
                self.rebuilt.add((address, number))
                self.discovered.discard((address, number))
                self.bound_at.pop((address, number), None)
        self.earlier_next_hops.clear()
        for address in ADDRESSES:
            if address in served:
                continue
            # A blocked address can have an unclaimed neighbour, from which no
            # record is rebuilt.
            for key in [key for key in self.fake.known if key[1] == address]:
                del self.fake.known[key]
        self.sync()
        self.settle()

    @stateful.rule(really=st.sampled_from((True, False)))
    def settle(self, really: bool = True) -> None:
        """One sync sets all items, and the next sync changes nothing."""
        if not really:
            return
        self.sync()
        outcome = self.sync()
        if self.is_unsettled and outcome.unset:
            # A killed process can leave an item of another claim on the
            # address. The first sync, which drops a gone claim, keeps this
            # item, and the second sync deletes it.
            assert not outcome.set, outcome
            outcome = self.sync()
        assert not outcome, outcome
        # A bind can fail or be killed before it sets an item. If its pod then
        # ends, the items of the previous pod have no known owner.
        doubtful = {item.dst for item in outcome.unclaimed}
        assert self.was_killed or not doubtful, outcome
        assert not outcome.errors, outcome.errors
        self.is_unsettled = False
        for address in ADDRESSES:
            self.claims[address] = [each for each in self.claims[address]
                                    if each.lives]
            assert self.recorded(address) == self.claims[address], (
                address, self.recorded(address), self.claims[address])
            if address not in doubtful:
                self.assert_served(address)
        served = doubtful.union(address for address in ADDRESSES
                                if self.claims[address])
        assert {dst for _, dst in self.fake.known} <= served
        assert {each.address for each in self.fake.pairs} <= {
            each.packed for each in served}

    # Invariants

    def assert_served(self, address: IPAddress) -> None:
        """The newest live claim has its items; the address has no others."""
        living = [each for each in self.claims[address] if each.lives]
        routes = self.our_routes(address)
        known = {index: each.mac for (index, dst), each
                 in self.fake.known.items() if dst == address}
        pairs = [each.mac for each in self.fake.pairs
                 if each.address == address.packed]
        if self.is_blocked(address):
            assert not pairs, pairs
            return
        if not living or self.is_refused(address, (
                address, self.sandboxes.index(living[0])) in self.discovered):
            assert (routes, known, pairs) == ([], {}, [])
            return
        sandbox = living[0]
        parent = self.fake.links[sandbox.parent].index
        index = next(each.index for each in self.fake.links.values()
                     if each.kind == 'macvlan' and each.lower == parent)
        assert [(route.oif, route.metric) for route in routes] == [
            (index, best_metric(address))], routes
        assert known == {index: sandbox.mac}, (known, sandbox)
        assert pairs == [bytes.fromhex(sandbox.mac.replace(':', ''))], pairs

    @stateful.invariant()
    def others_are_as_they_were(self) -> None:
        for key, route in self.foreign.items():
            assert self.fake.host.get(key) is route
        assert self.fake.routes_to(self.others.dst) == [self.others]

    # Helpers

    def our_routes(self, address: IPAddress) -> list[HostRoute]:
        return [route for route in self.fake.routes_to(address)
                if route.protocol == 176]

    def is_blocked(self, address: IPAddress) -> bool:
        """Return whether a foreign route blocks the route of a pod.

        A foreign route with a higher metric than ours blocks ours only as long
        as ours does not exist.
        """
        return bool(self.fake.routes_to(address)) and not self.our_routes(
            address)

    def is_refused(self, address: IPAddress, is_discovered: bool) -> bool:
        return address in self.fake.next_hops or is_discovered and (
            address in self.fake.through_break0
            or address in self.earlier_next_hops)

    def ledger(self) -> ledger.Ledger:
        return ledger.Ledger(self.options.state_dir, 1)

    def recorded(self, address: IPAddress) -> list[Sandbox]:
        by_namespace = {each.namespace: each for each in self.sandboxes}
        return [by_namespace[claim.namespace] for claim
                in self.ledger().records.claims(address)
                if claim.namespace is not None]

    def sync(self) -> reconciler.Outcome:
        link = self.fake.links['eth0']
        self.fake.macvlans_found = [
            kernel.Macvlan(each.path, each.namespace, each.parent,
                           dataclasses.replace(link, name='eth0',
                                               mac=each.mac),
                           tuple(sorted(each.addresses, key=str)))
            for each in self.sandboxes if each.lives]
        return reconciler.Reconciler(self.options, self.ledger()).sync()

    def attempt(self, address: IPAddress, sandbox: Sandbox,
                killed: Optional[int], fails: int,
                action: Callable[[], Any]) -> Optional[BaseException]:
        """Run an action that may fail or be killed; return the error, or None.

        After an error, the claim of the sandbox may be recorded or not. Claims
        of other sandboxes have to be unchanged.
        """
        self.fake.fail = lambda verb, item: fails
        try:
            with self.dying(killed):
                action()
            return None
        except (Killed, exceptions.Break0Error) as err:
            self.is_unsettled = True
            self.was_killed |= bool(fails)
            for each in ADDRESSES:
                before = [other for other in self.claims[each]
                          if other is not sandbox and other.lives]
                found = [other for other in self.recorded(each)
                         if other.lives]
                assert [other for other in found
                        if other is not sandbox] == before, (found, before)
                self.claims[each] = found
            return err
        finally:
            self.fake.fail = lambda verb, item: 0

    @contextlib.contextmanager
    def dying(self, left: Optional[int]) -> Iterator[None]:
        """Raise Killed at the step with this number; None raises nothing."""
        if left is None:
            yield
            return
        steps = itertools.count()

        def counted(original: Any) -> Any:
            def step(*args: Any) -> Any:
                if next(steps) == left:
                    self.was_killed = self.is_unsettled = True
                    raise Killed
                return original(*args)
            return step

        with contextlib.ExitStack() as stack:
            for owner, name in ((records.Records, 'put'),
                                (records.Records, 'remove'),
                                (fake.FakeNetlink, 'change'),
                                (fake.FakeNft, 'add'),
                                (fake.FakeNft, 'delete'),
                                (fake.FakeNetlink, 'set_link_up')):
                stack.enter_context(mock.patch.object(
                    owner, name, counted(getattr(owner, name))))
            yield


class TestModel(unittest.TestCase):

    def test_any_order_of_events(self) -> None:
        logger = logging.getLogger('kuryr_break0')
        self.addCleanup(logger.setLevel, logger.level)
        logger.setLevel(logging.CRITICAL)
        stateful.run_state_machine_as_test(
            Node, settings=hypothesis.settings(
                max_examples=int(os.environ.get('EXAMPLES', 60)),
                stateful_step_count=40, deadline=None, database=None,
                phases=PHASES,
                derandomize='EXAMPLES' not in os.environ,
                suppress_health_check=list(hypothesis.HealthCheck)))
