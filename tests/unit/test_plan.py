# Licensed under the Apache License, Version 2.0 (the "License"); you may
# not use this file except in compliance with the License. You may obtain
# a copy of the License at
#
#      http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS, WITHOUT
# WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the
# License for the specific language governing permissions and limitations
# under the License.

from __future__ import annotations

import dataclasses
import ipaddress
from typing import Any
import unittest

from hypothesis import given
from hypothesis import HealthCheck
from hypothesis import settings
from hypothesis import strategies as st

from kuryr_break0 import plan
from kuryr_break0.plan import HostRoute
from kuryr_break0.plan import Neighbour
from kuryr_break0.plan import Wanted

# How long an example takes says how busy the machine is, and no more.
settings.register_profile('untimed', deadline=None,
                          suppress_health_check=[HealthCheck.too_slow])
settings.load_profile('untimed')

DEVICE = 7
PROTOCOL = 176
TABLE = 254
MAC = 'fa:16:3e:00:00:01'
OTHER_MAC = 'fa:16:3e:00:00:02'

ADDRESS = ipaddress.ip_address('10.0.0.1')

# Few values, so that routes meet.
addresses = st.sampled_from(
    [ipaddress.ip_address(text) for text in
     ('10.0.0.1', '10.0.0.2', '10.0.0.3', 'fd00::1', 'fd00::2')])
sources = st.none() | st.sampled_from(
    [ipaddress.ip_address('10.0.0.9'), ipaddress.ip_address('10.0.0.8')])
routes = st.builds(
    HostRoute, addresses, st.sampled_from([None, 3, DEVICE]),
    st.sampled_from([3, PROTOCOL]), st.sampled_from([100, TABLE]), sources,
    st.booleans())


neighbours = st.builds(
    Neighbour, addresses, st.just(DEVICE), st.sampled_from([MAC, OTHER_MAC]),
    st.sampled_from([None, PROTOCOL]))


@st.composite
def desired(draw: st.DrawFn) -> dict[plan.IPAddress, Wanted]:
    return {address: Wanted(
        HostRoute(address, DEVICE, PROTOCOL, TABLE, draw(sources)),
        draw(st.sampled_from([None, Neighbour(address, DEVICE, MAC,
                                              PROTOCOL)])))
            for address in draw(st.sets(addresses))}


@dataclasses.dataclass
class Held:
    """What the kernel holds."""

    routes: list[HostRoute]
    neighbours: list[Neighbour] = dataclasses.field(default_factory=list)

    def after(self, to_do: plan.Plan) -> Held:
        """What it holds then: what is replaced is no more."""
        routes = {(route.dst, route.table): route for route in self.routes}
        for route in to_do.delete:
            del routes[route.dst, route.table]
        for route in to_do.replace:
            routes[route.dst, route.table] = route
        neighbours = {each.dst: each for each in self.neighbours}
        for each in to_do.forget:
            del neighbours[each.dst]
        for each in to_do.learn:
            neighbours[each.dst] = each
        return Held(list(routes.values()), list(neighbours.values()))


# A table has one route to an address, but for metrics.
actual = st.builds(
    Held, st.lists(routes, unique_by=lambda route: (route.dst, route.table)),
    st.lists(neighbours, unique_by=lambda each: each.dst))


def compute(wanted: dict[plan.IPAddress, Wanted], before: Held,
            **kwargs: Any) -> plan.Plan:
    return plan.compute(wanted, before.routes, before.neighbours,
                        device=DEVICE, protocol=PROTOCOL, **kwargs)


def is_foreign(route: HostRoute) -> bool:
    return route.oif != DEVICE and route.protocol != PROTOCOL


class TestPlan(unittest.TestCase):

    @given(desired(), actual)
    def test_applied_gives_what_is_desired(
            self, wanted: dict[plan.IPAddress, Wanted],
            before: Held) -> None:
        after = before.after(compute(wanted, before, takeover=True))
        self.assertEqual(
            {each.route for each in wanted.values()},
            {route for route in after.routes
             if route.oif == DEVICE and route.protocol == PROTOCOL})
        self.assertEqual(
            {each.neighbour for each in wanted.values()} - {None},
            {each for each in after.neighbours
             if each.protocol == PROTOCOL})

    @given(desired(), actual, st.booleans())
    def test_applied_there_is_no_more_to_do(
            self, wanted: dict[plan.IPAddress, Wanted], before: Held,
            takeover: bool) -> None:
        after = before.after(compute(wanted, before, takeover=takeover))
        self.assertFalse(compute(wanted, after, takeover=takeover))

    @given(desired(), actual)
    def test_foreign_routes_are_not_touched(
            self, wanted: dict[plan.IPAddress, Wanted],
            before: Held) -> None:
        after = before.after(compute(wanted, before))
        self.assertLessEqual(set(filter(is_foreign, before.routes)),
                             set(after.routes))

    @given(desired(), actual)
    def test_nothing_but_ours_is_deleted(
            self, wanted: dict[plan.IPAddress, Wanted],
            before: Held) -> None:
        to_do = compute(wanted, before)
        for route in to_do.delete:
            self.assertEqual((DEVICE, PROTOCOL), (route.oif, route.protocol))
        for each in to_do.forget:
            self.assertEqual((DEVICE, PROTOCOL),
                             (each.ifindex, each.protocol))

    @given(desired(), actual, st.randoms())
    def test_order_does_not_matter(
            self, wanted: dict[plan.IPAddress, Wanted], before: Held,
            random: Any) -> None:
        first = compute(wanted, before)
        random.shuffle(before.routes)
        random.shuffle(before.neighbours)
        self.assertEqual(first, compute(
            dict(reversed(list(wanted.items()))), before))

    def test_what_is_kept_is_not_deleted(self) -> None:
        held = Held([HostRoute(ADDRESS, DEVICE, PROTOCOL, TABLE)],
                    [Neighbour(ADDRESS, DEVICE, MAC, PROTOCOL)])
        self.assertEqual(plan.Plan(delete=tuple(held.routes),
                                   forget=tuple(held.neighbours)),
                         compute({}, held))
        self.assertFalse(compute({}, held, keep={ADDRESS}))

    def test_each_difference_is_mended(self) -> None:
        route = HostRoute(ADDRESS, DEVICE, PROTOCOL, TABLE,
                          ipaddress.ip_address('10.0.0.9'))
        wanted = {ADDRESS: Wanted(route)}
        self.assertFalse(compute(wanted, Held([route])))
        for change in ({'oif': 3}, {'protocol': 3}, {'src': None},
                       {'direct': False}):
            with self.subTest(change=change):
                other = dataclasses.replace(route, **change)
                self.assertEqual(plan.Plan(replace=(route,)),
                                 compute(wanted, Held([other])))
        other = dataclasses.replace(route, table=100)
        self.assertEqual(plan.Plan(replace=(route,), delete=(other,)),
                         compute(wanted, Held([other])))

    def test_each_difference_of_a_neighbour_is_mended(self) -> None:
        route = HostRoute(ADDRESS, DEVICE, PROTOCOL, TABLE)
        neighbour = Neighbour(ADDRESS, DEVICE, MAC, PROTOCOL)
        wanted = {ADDRESS: Wanted(route, neighbour)}
        self.assertFalse(compute(wanted, Held([route], [neighbour])))
        for held in ([], [dataclasses.replace(neighbour, mac=OTHER_MAC)],
                     [dataclasses.replace(neighbour, protocol=None)]):
            with self.subTest(held=held):
                self.assertEqual(plan.Plan(learn=(neighbour,)),
                                 compute(wanted, Held([route], held)))
        # Where it is to be found by ARP, what is set for good is in the way.
        self.assertEqual(
            plan.Plan(forget=(neighbour,)),
            compute({ADDRESS: Wanted(route)}, Held([route], [neighbour])))
