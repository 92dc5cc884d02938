# SPDX-License-Identifier: Apache-2.0

"""Collects metrics for Prometheus, and describes the agent's health."""

from __future__ import annotations

import collections
import importlib.metadata
import time
from typing import Any, Iterator, Mapping, Optional, Sequence

import prometheus_client
from prometheus_client import core
from prometheus_client import registry as prometheus_registry

from kuryr_break0 import config
from kuryr_break0.engine import actual
from kuryr_break0.engine import containers
from kuryr_break0.engine import problems
from kuryr_break0.engine.snapshot import Snapshot
from kuryr_break0 import exceptions
from kuryr_break0 import kernel
from kuryr_break0.ledger import journal
from kuryr_break0.ledger.journal import Done
from kuryr_break0.ledger import Ledger
from kuryr_break0 import log
from kuryr_break0 import model
from kuryr_break0.pace import Pace

LOG = log.get_logger(__name__)

_PREFIX = 'kuryr_break0'
#: Upper limits of the buckets, in seconds.
_BUCKETS = (.001, .0025, .005, .01, .025, .05, .1, .25, .5, 1, 2.5, 5, 10)
#: Seconds after which a temporary reason for an unbound address, such as
#: duplicate address detection, counts as lasting.
_PASSES = 5.0
#: Seconds of one step of the search for unbound containers. Between two steps
#: the agent does other work.
_STEP = 0.02
#: Maximum number of log lines of one search, because a container can have
#: thousands of addresses and change them before each search.
_MAX_LINES = 8


class Metrics(prometheus_registry.Collector):
    """Metrics of a node.

    The first scrape after a sync reads addresses and routes; later scrapes
    repeat the values. The journal contains the binds and repairs of all
    processes.

    The agent's thread updates the metrics, and the server's threads read them.

    :ivar options: current options of the agent
    """

    def __init__(self, options: config.Options) -> None:
        self.options = options
        # Disable the second series of each counter, the time of its creation:
        # this time is always the start of the agent. The prometheus client of
        # Debian 12 has no function disable_created_metrics().
        prometheus_client.metrics._use_created = False
        self.registry = prometheus_client.CollectorRegistry()
        prometheus_client.ProcessCollector(registry=self.registry)
        self.registry.register(self)
        ours: dict[str, Any] = {'namespace': _PREFIX,
                                'registry': self.registry}
        timed = {**ours, 'buckets': _BUCKETS}
        prometheus_client.Info(
            'build', 'Version of kuryr-break0.', **ours).info(
                {'version': importlib.metadata.version('kuryr-break0')})
        self._seconds = {
            Done.BIND: prometheus_client.Histogram(
                'bind_seconds', 'Time to bind the addresses of a pod, in '
                'seconds.', **timed),
            Done.UNBIND: prometheus_client.Histogram(
                'unbind_seconds', 'Time to unbind the addresses of a pod, in '
                'seconds.', **timed)}
        self._failures = {
            Done.BIND_FAILED: prometheus_client.Counter(
                'bind_failures', 'Failed binds.', **ours),
            Done.UNBIND_FAILED: prometheus_client.Counter(
                'unbind_failures', 'Failed unbinds.', **ours)}
        repairs = prometheus_client.Counter(
            'repairs', 'Repairs made, by reason.', ['reason'], **ours)
        self._repairs = {each: repairs.labels(each.name.lower())
                         for each in journal.REPAIRS}
        self._sync_seconds = prometheus_client.Histogram(
            'sync_seconds', 'Duration of a full reconciliation, in '
            'seconds.', **timed)
        self._sync_failures = prometheus_client.Counter(
            'sync_failures', 'Failed reconciliations.', **ours)
        self._last_success = prometheus_client.Gauge(
            'sync_last_success_timestamp_seconds',
            'Time of the last successful reconciliation, in seconds since '
            'the epoch.', **ours)
        self._events = prometheus_client.Counter(
            'events_received', 'Netlink events received.', **ours)
        self._losses = prometheus_client.Counter(
            'events_lost', 'Number of times that netlink events were lost '
            'because the socket buffer was full.', **ours)
        unserved = prometheus_client.Gauge(
            'containers_unserved', 'Unbound addresses of containers, by '
            'reason.', ['reason'], **ours)
        self._unserved = {reason: unserved.labels(reason.value)
                          for reason in containers.Reason}
        #: texts of all unbound addresses at the last search
        self._last_texts: set[str] = set()
        self._logged: set[str] = set()
        #: search in progress, and its results so far
        self._search: Optional[Iterator[list[containers.Unserved]]] = None
        self._listed: list[containers.Unserved] = []
        self._pace = Pace()
        self._outdated = False
        self._gauges: list[core.Metric] = []
        self._error: Optional[str] = None
        self._succeeded: Optional[float] = None
        self._ended = time.monotonic()

    def record_sync(self, seconds: float, error: Optional[Exception]) -> None:
        """Record the end of a sync of the agent.

        :param seconds: duration of the sync
        :param error: reason of its failure; None after a success
        """
        self._sync_seconds.observe(seconds)
        self._ended = time.monotonic()
        self._error = str(error) if error is not None else None
        if error is not None:
            self._sync_failures.inc()
        else:
            self._last_success.set_to_current_time()
            self._succeeded = time.monotonic()
        self._outdated = True
        # Read the journal now: it has a maximum size, and could be full before
        # the next scrape.
        self._read_journal()

    def count_events(self, events: Sequence[kernel.Event]) -> None:
        lost = sum(event.kind == 'lost' for event in events)
        self._events.inc(len(events) - lost)
        self._losses.inc(lost)

    def look_for_unserved(self) -> float:
        """Count unbound addresses of containers, and log each address once.

        An address with a temporary reason counts from the second search that
        finds the address. A node can have thousands of namespaces, so one call
        searches only some of the namespaces.

        :returns: seconds until the next call
        """
        self._pace.begin()
        try:
            return max(self._continue_search(), self._pace.end())
        except (exceptions.Break0Error, OSError) as err:
            self._search = None
            LOG.error('Cannot search for unbound containers, and will try '
                      'again in %d seconds: %s',
                      self.options.resync_interval, err)
        return self.options.resync_interval

    def _continue_search(self) -> float:
        if self._search is None:
            snapshot = self._read_snapshot()
            if snapshot is None:
                return self.options.resync_interval
            self._listed = []
            self._search = containers.each_unserved(
                snapshot, Ledger(self.options.state_dir), kernel.QUICK_LIMITS)
        ends = time.monotonic() + _STEP
        for each in self._search:
            self._listed += each[:containers.MAX_UNSERVED - len(self._listed)]
            if time.monotonic() > ends:
                return 0.0
        self._search = None
        return self._report_unserved(self._listed)

    def _report_unserved(self, unserved: Sequence[containers.Unserved]
                         ) -> float:
        """Count and log addresses; return seconds until the next search."""
        texts = {str(each) for each in unserved}
        lasting = [each for each in unserved
                   if each.reason not in containers.PASSING
                   or str(each) in self._last_texts]
        new = [each for each in lasting if str(each) not in self._logged
               and not (self.options.discover
                        and each.reason in containers.FINDERS)]
        for each in new[:_MAX_LINES]:
            LOG.warning('A container is unreachable from this node: %s. For '
                        'the remedy, run: kuryr-break0 doctor', each)
        if new[_MAX_LINES:]:
            LOG.warning('%d more addresses of containers are unbound. List '
                        'them: kuryr-break0 doctor', len(new) - _MAX_LINES)
        self._logged = self._logged & texts | set(map(str, lasting))
        is_new = not texts <= self._last_texts
        self._last_texts = texts
        counts = collections.Counter(each.reason for each in lasting)
        for reason, gauge in self._unserved.items():
            gauge.set(counts[reason])
        return _PASSES if is_new else self.options.resync_interval

    def describe_failure(self) -> Optional[str]:
        """Return the reason why syncs fail, or None if they succeed."""
        if self._succeeded is None:
            since = 'yet'
        else:
            age = time.monotonic() - self._succeeded
            if age <= self.options.patience:
                return None
            since = 'for %d s' % age
        return 'No sync has succeeded %s: %s' % (
            since, self._error or 'the first sync has not ended')

    def describe_hang(self) -> Optional[str]:
        """Return the reason why the agent should be restarted, or None.

        A sync that ends with an error is no reason, because a restart does not
        repair the error.
        """
        age = time.monotonic() - self._ended
        if age <= self.options.patience:
            return None
        return 'No sync has ended for %d s' % age

    def refresh(self) -> None:
        """Read the values for :meth:`collect`.

        Two threads must not call this method at the same time.
        """
        self._read_journal()
        if self._outdated:
            # Clear the flag before the read, because a sync may end meanwhile.
            self._outdated = False
            snapshot = self._read_snapshot()
            self._gauges = [] if snapshot is None else list(
                _make_gauges(snapshot))

    def collect(self) -> Iterator[core.Metric]:
        """Return the values of the last :meth:`refresh`.

        :returns: no value if the refresh could not read the node
        """
        yield from self._gauges

    def _read_journal(self) -> None:
        for kind, times, seconds in journal.Journal(
                self.options.state_dir).drain():
            if kind in self._repairs:
                self._repairs[kind].inc(times)
                continue
            if kind in self._failures:
                self._failures[kind].inc(times)
            operation = (Done.BIND if kind in (Done.BIND, Done.BIND_FAILED)
                         else Done.UNBIND)
            self._seconds[operation].observe(seconds)

    def _read_snapshot(self) -> Optional[Snapshot]:
        options = self.options
        try:
            with kernel.Netlink() as netlink:
                return actual.read(options, Ledger(options.state_dir), netlink)
        except (exceptions.Break0Error, OSError) as err:
            LOG.error('Cannot read addresses and routes, so metrics of them '
                      'are missing until the next sync: %s', err)
            return None


def _make_gauges(snapshot: Snapshot) -> Iterator[core.Metric]:
    def make_gauge(name: str, text: str, values: Mapping[
            tuple[str, ...], int], *labels: str) -> core.Metric:
        gauge = core.GaugeMetricFamily('%s_%s' % (_PREFIX, name), text,
                                       labels=labels)
        for label_values, value in values.items():
            gauge.add_metric(label_values, value)
        return gauge

    all_problems, _ = problems.find_all(snapshot)
    wrong = collections.Counter(
        parent.name if parent else '' for parent
        in map(snapshot.parent_of, problems.by_address(all_problems)))
    rows = {parent.name: (
        len(parent.live), len(parent.routes),
        len({route.dst for route in parent.plan.foreign}),
        len({item.dst for item in parent.plan.unclaimed}),
        wrong[parent.name],
        int(parent.link is not None and parent.link.up))
        for parent in snapshot.parents.values()}
    # An unreadable record does not show its parent. Count it in a row without
    # a parent.
    if wrong[''] or not rows:
        rows[''] = (0, 0, 0, 0, wrong[''], 0)
    for column, (name, text) in enumerate((
            ('addresses_desired',
             'Addresses with a record and an existing sandbox.'),
            ('addresses_routed',
             'Addresses with a host route through break0.'),
            ('addresses_foreign',
             'Addresses of pods with a route of another program.'),
            ('addresses_unclaimed', 'Addresses with a route or neighbour of '
             'break0, but without a record.'),
            ('addresses_out_of_sync', 'Addresses that cannot be reached, or '
             'that a sync would change.'),
            ('device_up', '1 if break0 exists and is up, otherwise 0.'))):
        yield make_gauge(
            name, text, {(parent,): values[column] for parent, values
                         in rows.items()}, 'parent')
    yield make_gauge(
        'container_addresses', 'Addresses of discovered containers, by name '
        'of the container.', collections.Counter(
            (record.pod or record.owner.container_id, record.parent)
            for record in snapshot.live.values()
            if record.origin is model.Origin.DISCOVERED),
        'container', 'parent')
    for name, text, value in (
            ('ledger_records', 'Addresses with a record.',
             len(snapshot.contents.claims)),
            ('ledger_unreadable_records',
             'Records that are damaged or of a later version.',
             len(snapshot.contents.unreadable)),
            ('addresses_unjudged', 'Addresses of sandboxes that the agent '
             'cannot see, so they stay bound.', len(snapshot.unjudged)),
            ('node_problems', 'Faults of break0 itself or of the ledger.',
             len(problems.of_node(all_problems)))):
        yield make_gauge(name, text, {(): value})
