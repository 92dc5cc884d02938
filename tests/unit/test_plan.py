# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import dataclasses
import ipaddress
from typing import Any
import unittest

from hypothesis import given
from hypothesis import HealthCheck
from hypothesis import settings
from hypothesis import strategies as st

from kuryr_break0.engine import plan
from kuryr_break0.model import best_metric
from kuryr_break0.model import HostRoute
from kuryr_break0.model import IPAddress
from kuryr_break0.model import Item
from kuryr_break0.model import Neighbour
from kuryr_break0.model import of_kind
from kuryr_break0.model import Pair

# The duration of an example depends on the load of the machine, so hypothesis
# does not check it.
settings.register_profile('untimed', deadline=None,
                          suppress_health_check=[HealthCheck.too_slow])
settings.load_profile('untimed')

DEVICE = 7
PROTOCOL = 176
TABLE = 254
MAC = 'fa:16:3e:00:00:01'
OTHER_MAC = 'fa:16:3e:00:00:02'
Desired = dict[IPAddress, tuple[Item, ...]]

ADDRESS = ipaddress.ip_address('10.0.0.1')

# A small set of addresses makes conflicting routes likely.
addresses = st.sampled_from(
    [ipaddress.ip_address(text) for text in
     ('10.0.0.1', '10.0.0.2', '10.0.0.3', 'fd00::1', 'fd00::2')])
sources = st.none() | st.sampled_from(
    [ipaddress.ip_address('10.0.0.9'), ipaddress.ip_address('10.0.0.8')])


@st.composite
def route(draw: st.DrawFn) -> HostRoute:
    address = draw(addresses)
    return HostRoute(
        address, draw(st.sampled_from([None, 3, DEVICE])),
        draw(st.sampled_from([3, PROTOCOL])),
        draw(st.sampled_from([100, TABLE])), draw(sources),
        draw(st.sampled_from([best_metric(address), 1024])),
        draw(st.booleans()))


neighbours = st.builds(
    Neighbour, addresses, st.just(DEVICE), st.sampled_from([MAC, OTHER_MAC]),
    st.sampled_from([None, PROTOCOL]))


@st.composite
def desired(draw: st.DrawFn) -> Desired:
    return {address: (
        HostRoute(address, DEVICE, PROTOCOL, TABLE, draw(sources),
                  best_metric(address)),
        *draw(st.sampled_from([(), (Neighbour(address, DEVICE, MAC,
                                              PROTOCOL),)])))
            for address in draw(st.sets(addresses))}


@dataclasses.dataclass
class Held:
    """Routes and neighbours in the kernel."""

    routes: list[HostRoute]
    neighbours: list[Neighbour] = dataclasses.field(default_factory=list)

    def after(self, to_do: plan.Plan) -> Held:
        """Return the kernel's state after a plan, without replaced items."""
        routes = {key(each): each for each in self.routes}
        for each in of_kind(HostRoute, to_do.unset):
            del routes[key(each)]
        for each in of_kind(HostRoute, to_do.set):
            routes[key(each)] = each
        neighbours = {each.dst: each for each in self.neighbours}
        for neighbour in of_kind(Neighbour, to_do.unset):
            del neighbours[neighbour.dst]
        for neighbour in of_kind(Neighbour, to_do.set):
            neighbours[neighbour.dst] = neighbour
        return Held(list(routes.values()), list(neighbours.values()))


def key(route: HostRoute) -> Any:
    """Return the key by which the kernel identifies a route."""
    return route.dst, route.table, route.metric


actual = st.builds(
    Held, st.lists(route(), unique_by=key),
    st.lists(neighbours, unique_by=lambda each: each.dst))


def compute(wanted: Desired, before: Held,
            **kwargs: Any) -> plan.Plan:
    return plan.compute(wanted, [*before.routes, *before.neighbours],
                        device=DEVICE, protocol=PROTOCOL, **kwargs)


def is_ours(route: HostRoute) -> bool:
    return route.oif == DEVICE and route.protocol == PROTOCOL


def is_foreign(route: HostRoute) -> bool:
    return route.oif != DEVICE and route.protocol != PROTOCOL


class TestPlan(unittest.TestCase):

    @given(desired(), actual)
    def test_an_applied_plan_gives_the_desired_items(
            self, wanted: Desired,
            before: Held) -> None:
        to_do = compute(wanted, before)
        after = before.after(to_do)
        # An address with a foreign route gets no new items, and keeps the
        # present items.
        blocked = {route.dst for route in to_do.foreign}
        ours = {route for route in after.routes if is_ours(route)
                and route not in to_do.unclaimed}
        neighbours = {each for each in after.neighbours
                      if each.protocol == PROTOCOL
                      and each not in to_do.unclaimed}
        for address, items in wanted.items():
            for item in items:
                if address not in blocked:
                    self.assertIn(item, ours | neighbours)
        every = [item for items in wanted.values() for item in items]
        self.assertLessEqual(ours, set(of_kind(HostRoute, every)))
        self.assertLessEqual(
            {each for each in neighbours if each.dst not in blocked},
            set(of_kind(Neighbour, every)))

    @given(desired(), actual)
    def test_applied_there_is_no_more_to_do(
            self, wanted: Desired, before: Held) -> None:
        after = before.after(compute(wanted, before))
        self.assertFalse(compute(wanted, after))

    @given(desired(), actual)
    def test_foreign_routes_are_not_touched(
            self, wanted: Desired,
            before: Held) -> None:
        after = before.after(compute(wanted, before))
        self.assertLessEqual(set(filter(is_foreign, before.routes)),
                             set(after.routes))

    @given(desired(), actual)
    def test_foreign_routes_are_not_overridden(
            self, wanted: Desired,
            before: Held) -> None:
        to_do = compute(wanted, before)
        for route in of_kind(HostRoute, to_do.set):
            others = [each for each in before.routes if is_foreign(each)
                      and (each.dst, each.table) == (route.dst, route.table)]
            # A route of ours that exists already may be replaced beside a
            # foreign route.
            self.assertTrue(not others or any(
                not is_foreign(each) and key(each) == key(route)
                for each in before.routes))
        # The plan reports each desired route that is not set, and reports no
        # address twice.
        self.assertEqual(
            {route.dst for route in to_do.foreign},
            {each.dst for items in wanted.values()
             for each in of_kind(HostRoute, items)
             if each not in before.after(to_do).routes}
            | {each.dst for each in before.routes
               if is_foreign(each) and each.dst in wanted
               and key(each) == key(wanted[each.dst][0])})
        self.assertEqual(len(to_do.foreign),
                         len({route.dst for route in to_do.foreign}))

    @given(desired(), actual)
    def test_nothing_but_ours_is_deleted(
            self, wanted: Desired,
            before: Held) -> None:
        to_do = compute(wanted, before)
        for route in of_kind(HostRoute, to_do.unset):
            self.assertEqual((DEVICE, PROTOCOL), (route.oif, route.protocol))
        for each in of_kind(Neighbour, to_do.unset):
            self.assertEqual((DEVICE, PROTOCOL),
                             (each.ifindex, each.protocol))

    @given(desired(), actual, st.randoms())
    def test_order_does_not_matter(
            self, wanted: Desired, before: Held,
            random: Any) -> None:
        first = compute(wanted, before)
        random.shuffle(before.routes)
        random.shuffle(before.neighbours)
        self.assertEqual(first, compute(
            dict(reversed(list(wanted.items()))), before))

    @given(desired(), actual)
    def test_an_item_without_a_record_is_never_deleted(
            self, wanted: Desired,
            before: Held) -> None:
        to_do = compute(wanted, before)
        self.assertLessEqual({each.dst for each in to_do.unset}, set(wanted))
        self.assertEqual(
            {each for each in before.routes
             if is_ours(each) and each.dst not in wanted}
            | {each for each in before.neighbours
               if each.protocol == PROTOCOL and each.dst not in wanted},
            set(to_do.unclaimed))

    def test_withdrawn_items_are_deleted(self) -> None:
        held = Held([HostRoute(ADDRESS, DEVICE, PROTOCOL, TABLE)],
                    [Neighbour(ADDRESS, DEVICE, MAC, PROTOCOL)])
        self.assertEqual(plan.Plan(unset=(*held.routes, *held.neighbours)),
                         compute({}, held, withdrawn={ADDRESS}))
        self.assertEqual(
            plan.Plan(unclaimed=(*held.routes, *held.neighbours)),
            compute({}, held))
        self.assertEqual(plan.Plan(),
                         compute({}, held, claimed={ADDRESS}))

    def test_a_better_route_than_ours_there_is_none(self) -> None:
        for text in ('10.0.0.1', 'fd00::1'):
            address = ipaddress.ip_address(text)
            route = HostRoute(address, DEVICE, PROTOCOL, TABLE,
                              metric=best_metric(address))
            wanted = {address: (route,)}
            worse = route._replace(metric=1024, oif=3, protocol=3)
            # Our route would override a foreign route, and so is not set. If
            # the foreign route is added later, our route stays.
            self.assertEqual(plan.Plan(foreign=(worse,)),
                             compute(wanted, Held([worse])))
            self.assertEqual(plan.Plan(), compute(wanted, Held([
                route, worse])))
            for others in ({'table': 100}, {'protocol': PROTOCOL},
                           {'oif': DEVICE}):
                other = worse._replace(**others)
                self.assertEqual(plan.Plan(set=(route,)),
                                 compute(wanted, Held([other])))
            # Version 1 of break0 set IPv6 routes with this metric.
            older = route._replace(metric=1024)
            self.assertEqual(plan.Plan(set=(route,), unset=(older,)),
                             compute(wanted, Held([older])))
            same = worse._replace(metric=route.metric)
            self.assertEqual(plan.Plan(foreign=(same,)),
                             compute(wanted, Held([same])))
            self.assertEqual(plan.Plan(foreign=(same,)),
                             compute(wanted, Held([worse, same])))

    def test_each_difference_is_mended(self) -> None:
        route = HostRoute(ADDRESS, DEVICE, PROTOCOL, TABLE,
                          ipaddress.ip_address('10.0.0.9'))
        wanted = {ADDRESS: (route,)}
        self.assertFalse(compute(wanted, Held([route])))
        for change in ({'oif': 3}, {'protocol': 3}, {'src': None},
                       {'direct': False}):
            with self.subTest(change=change):
                other = route._replace(**change)
                self.assertEqual(plan.Plan(set=(route,)),
                                 compute(wanted, Held([other])))
        other = route._replace(table=100)
        self.assertEqual(plan.Plan(set=(route,), unset=(other,)),
                         compute(wanted, Held([other])))

    def test_each_difference_of_a_neighbour_is_mended(self) -> None:
        route = HostRoute(ADDRESS, DEVICE, PROTOCOL, TABLE)
        neighbour = Neighbour(ADDRESS, DEVICE, MAC, PROTOCOL)
        wanted = {ADDRESS: (route, neighbour)}
        self.assertFalse(compute(wanted, Held([route], [neighbour])))
        for held in ([], [neighbour._replace(mac=OTHER_MAC)],
                     [neighbour._replace(protocol=None)]):
            with self.subTest(held=held):
                self.assertEqual(plan.Plan(set=(neighbour,)),
                                 compute(wanted, Held([route], held)))
        # Without a recorded MAC address, the kernel has to resolve the
        # address, and a permanent neighbour prevents the resolution.
        self.assertEqual(
            plan.Plan(unset=(neighbour,)),
            compute({ADDRESS: (route,)}, Held([route], [neighbour])))

    def test_guard_entries(self) -> None:
        """A guard entry follows its route, unless its record is unreadable."""
        route = HostRoute(ADDRESS, DEVICE, PROTOCOL, TABLE, metric=0)
        other = ADDRESS + 1
        entry, stale = Pair.of(ADDRESS, MAC), Pair.of(ADDRESS, OTHER_MAC)
        wanted: Desired = {ADDRESS: (route, entry)}
        ours = HostRoute(other, DEVICE, PROTOCOL, TABLE)
        lost = Pair.of(other, MAC)
        foreign = route._replace(oif=3, protocol=3)
        for present, options, expected in (
                ([route], {}, plan.Plan(set=(entry,))),
                ([route, entry], {}, plan.Plan()),
                ([route, entry, stale], {}, plan.Plan(unset=(stale,))),
                ([foreign, entry], {}, plan.Plan(unset=(entry,),
                                                 foreign=(foreign,))),
                ([route, entry, lost], {}, plan.Plan(unset=(lost,))),
                ([route, entry, lost, ours], {},
                 plan.Plan(unclaimed=(ours, lost))),
                ([route, entry, lost], {'unreadable': {other}}, plan.Plan()),
                ([route, entry, ours], {'is_refilled': True},
                 plan.Plan(set=(Pair.of(other, None),), unclaimed=(ours,))),
                ([route, entry, ours, Pair.of(other, None)],
                 {'is_refilled': True},
                 plan.Plan(unclaimed=(ours, Pair.of(other, None))))):
            with self.subTest(present=present, options=options):
                self.assertEqual(expected, plan.compute(
                    wanted, present, device=DEVICE, protocol=PROTOCOL,
                    **options))
