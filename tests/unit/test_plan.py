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
import unittest

from hypothesis import given
from hypothesis import strategies as st

from kuryr_break0 import plan
from kuryr_break0.plan import HostRoute

DEVICE = 7
PROTOCOL = 176
TABLE = 254

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


@st.composite
def desired(draw: st.DrawFn) -> dict[plan.IPAddress, HostRoute]:
    return {address: HostRoute(address, DEVICE, PROTOCOL, TABLE,
                               draw(sources))
            for address in draw(st.sets(addresses))}


# A table has one route to an address, but for metrics.
actual = st.lists(routes, unique_by=lambda route: (route.dst, route.table))


def applied(to_do: plan.Plan, before: list[HostRoute]) -> set[HostRoute]:
    """What the kernel has after it: a replaced route is one no more."""
    after = {(route.dst, route.table): route for route in before}
    for route in to_do.delete:
        del after[route.dst, route.table]
    for route in to_do.replace:
        after[route.dst, route.table] = route
    return set(after.values())


def compute(wanted: dict[plan.IPAddress, HostRoute],
            before: list[HostRoute], **kwargs: bool) -> plan.Plan:
    return plan.compute(wanted, before, device=DEVICE, protocol=PROTOCOL,
                        **kwargs)


def is_foreign(route: HostRoute) -> bool:
    return route.oif != DEVICE and route.protocol != PROTOCOL


class TestPlan(unittest.TestCase):

    @given(desired(), actual)
    def test_applied_gives_what_is_desired(
            self, wanted: dict[plan.IPAddress, HostRoute],
            before: list[HostRoute]) -> None:
        after = applied(compute(wanted, before, takeover=True), before)
        self.assertLessEqual(set(wanted.values()), after)
        ours = {route for route in after
                if route.oif == DEVICE and route.protocol == PROTOCOL}
        self.assertEqual(set(wanted.values()), ours)

    @given(desired(), actual, st.booleans())
    def test_applied_there_is_no_more_to_do(
            self, wanted: dict[plan.IPAddress, HostRoute],
            before: list[HostRoute], takeover: bool) -> None:
        after = applied(compute(wanted, before, takeover=takeover), before)
        self.assertFalse(compute(wanted, list(after), takeover=takeover))

    @given(desired(), actual)
    def test_foreign_routes_are_not_touched(
            self, wanted: dict[plan.IPAddress, HostRoute],
            before: list[HostRoute]) -> None:
        after = applied(compute(wanted, before), before)
        self.assertLessEqual(set(filter(is_foreign, before)), after)

    @given(desired(), actual)
    def test_nothing_but_ours_is_deleted(
            self, wanted: dict[plan.IPAddress, HostRoute],
            before: list[HostRoute]) -> None:
        for route in compute(wanted, before).delete:
            self.assertEqual((DEVICE, PROTOCOL), (route.oif, route.protocol))

    @given(desired(), actual, st.randoms())
    def test_order_does_not_matter(
            self, wanted: dict[plan.IPAddress, HostRoute],
            before: list[HostRoute], random: object) -> None:
        first = compute(wanted, before)
        random.shuffle(before)  # type: ignore[attr-defined]
        self.assertEqual(first, compute(
            dict(reversed(list(wanted.items()))), before))

    def test_what_is_kept_is_not_deleted(self) -> None:
        address = ipaddress.ip_address('10.0.0.1')
        route = HostRoute(address, DEVICE, PROTOCOL, TABLE)
        self.assertEqual((route,), compute({}, [route]).delete)
        self.assertFalse(plan.compute({}, [route], device=DEVICE,
                                      protocol=PROTOCOL, keep={address}))

    def test_each_difference_is_mended(self) -> None:
        address = ipaddress.ip_address('10.0.0.1')
        route = HostRoute(address, DEVICE, PROTOCOL, TABLE,
                          ipaddress.ip_address('10.0.0.9'))
        self.assertFalse(compute({address: route}, [route]))
        for change in ({'oif': 3}, {'protocol': 3}, {'src': None},
                       {'direct': False}):
            with self.subTest(change=change):
                other = dataclasses.replace(route, **change)
                self.assertEqual(plan.Plan(replace=(route,)),
                                 compute({address: route}, [other]))
        other = dataclasses.replace(route, table=100)
        self.assertEqual(plan.Plan(replace=(route,), delete=(other,)),
                         compute({address: route}, [other]))
