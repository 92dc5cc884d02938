# SPDX-License-Identifier: Apache-2.0

"""Executes the commands of the CNI plugin."""

from __future__ import annotations

import json
import os
from typing import Any, Callable, Iterator, Mapping, NamedTuple, Optional

from kuryr_break0.break0 import guard
from kuryr_break0.cni import request as requests
from kuryr_break0.cni.request import CNIError
from kuryr_break0.cni.request import Request
from kuryr_break0 import config
from kuryr_break0.engine import actual
from kuryr_break0.engine import problems
from kuryr_break0.engine.snapshot import by_interface
from kuryr_break0 import exceptions
from kuryr_break0 import failures
from kuryr_break0 import kernel
from kuryr_break0.ledger import files
from kuryr_break0.ledger import Ledger
from kuryr_break0 import log
from kuryr_break0.manager import Break0Manager
from kuryr_break0 import model

LOG = log.get_logger(__name__)

#: This plugin's own error codes; see doc/source/install/cni.rst.
NOT_REACHABLE, REFUSED, DIFFERS, FAILED, UNEXPECTED = (
    100, 101, 102, 103, 199)
_CODES: tuple[tuple[type[Exception], int], ...] = (
    (exceptions.LockTimeout, requests.TRY_AGAIN),
    (exceptions.SystemRefused, requests.TRY_AGAIN),
    (exceptions.InvalidOption, requests.INVALID),
    (exceptions.NotAMacvlan, NOT_REACHABLE),
    (exceptions.NetnsUnusable, NOT_REACHABLE),
    (exceptions.NotItsAddress, REFUSED),
    (exceptions.AddressRefused, REFUSED),
    (exceptions.InputRefused, REFUSED),
    (exceptions.Break0Error, FAILED))


class Answer(NamedTuple):
    """The answer to a runtime.

    :ivar status: exit status of the plugin
    :ivar output: standard output of the plugin
    :ivar undo: function that undoes this ADD, and no other ADD; None after an
        error, and for other commands
    """

    status: int
    output: str
    undo: Optional[Callable[[], None]] = None


def answer(environment: Mapping[str, str], data: bytes,
           load: Callable[[], config.Options]) -> Answer:
    """Execute the request in environment variables and standard input.

    :param load: function that returns the options or raises InvalidOption
    """
    try:
        request = requests.parse(environment, data)
        if request.command == requests.VERSION:
            result: Any = {'cniVersion': request.version,
                           'supportedVersions': list(requests.SUPPORTED)}
        else:
            plugin = Plugin(load(), request)
            result = plugin.run()
            if request.command == requests.ADD:
                return Answer(0, json.dumps(result) + '\n', plugin.undo)
        return Answer(0, json.dumps(result) + '\n' if result else '')
    except (CNIError, exceptions.Break0Error) as err:
        return failure(err, data)
    except Exception as err:  # a runtime cannot parse a traceback
        LOG.exception('The CNI request %s of %s for %s failed',
                      environment.get('CNI_COMMAND'),
                      environment.get('CNI_CONTAINERID'),
                      environment.get('CNI_ARGS') or 'an unnamed container')
        return failure(err, data)


def failure(err: Exception, data: bytes = b'') -> Answer:
    """Return the answer with an error."""
    code = err.code if isinstance(err, CNIError) else next(
        (code for kind, code in _CODES if isinstance(err, kind)), UNEXPECTED)
    text = str(err) if code != UNEXPECTED else (
        'break0 failed unexpectedly: %r. See the log of the agent.' % err)
    return Answer(1, json.dumps({
        'cniVersion': requests.version_of(data), 'code': code,
        'msg': text}) + '\n')


class Plugin:
    """Executes a request of a runtime."""

    def __init__(self, options: config.Options, request: Request) -> None:
        self._options = options
        self._request = request
        self._manager = Break0Manager(options)
        self._ledger = Ledger(options.state_dir)
        #: time of the request, which identifies its bind
        self._began = files.now()
        self._strict = (options.strict if request.strict is None
                        else request.strict)

    def run(self) -> Optional[dict[str, Any]]:
        """Execute the request; return its result, or None."""
        return {
            requests.ADD: self._add, requests.DEL: self._del,
            requests.CHECK: self._check, requests.GC: self._gc,
            requests.STATUS: self._status}[self._request.command]()

    @property
    def _owner(self) -> model.Owner:
        assert self._request.owner is not None
        return self._request.owner

    def _add(self) -> dict[str, Any]:
        """Bind the addresses of the interface; return the previous result.

        The ADD always fails if the request or an option is invalid, if the
        interface is not a macvlan that a break0 can reach, or if ``[break0]
        guard`` is on and the guard is missing. If the plugin is strict, any
        other error fails the ADD too. If not, other errors are only logged:
        the container starts, and a sync repairs it later.
        """
        request, owner = self._request, self._owner
        previous, addresses = request.previous, request.addresses()
        macvlan = self._macvlan()
        if not self._options.enabled:
            return previous
        own = [each for each in addresses
               if each.ip in macvlan.addresses]
        try:
            self._manager.bind(
                owner, [each.ip for each in own],
                parent=macvlan.parent, mac=macvlan.link.mac,
                subnets=list(dict.fromkeys(each.network for each in own)),
                netns=request.netns, pod=request.pod, origin=model.Origin.CNI,
                network=request.network, bound_at=self._began)
            if not addresses:
                raise exceptions.NoAddress(owner=owner)
            macvlan.require(each.ip for each in addresses)
        except exceptions.Break0Error as err:
            if self._strict or isinstance(err, exceptions.GuardUnavailable):
                self.undo()
                raise
            LOG.error('%s with %s may not be reachable from its node: %s',
                      '%s (%s)' % (request.pod, owner) if request.pod
                      else owner, ', '.join(str(each.ip) for each in addresses)
                      or 'no address', err)
        return previous

    def _macvlan(self) -> kernel.Macvlan:
        return kernel.find_macvlan(
            str(self._request.netns), self._owner.ifname,
            self._options.parent)

    def undo(self) -> None:
        """Undo this ADD.

        A later ADD of the runtime for the same container stays.
        """
        try:
            self._manager.unbind(
                self._owner, [each.ip for each in self._request.addresses()],
                self._request.netns, bound_at=self._began)
        except exceptions.Break0Error as err:
            # Only log this error: the caller reports the failure of the ADD.
            LOG.error('Cannot undo the ADD of %s, so its addresses may stay '
                      'bound until its end: %s', self._owner, err)

    def _del(self) -> None:
        """Unbind the addresses of the interface.

        The previous result contains the addresses. Without a previous result,
        the records are searched, which takes longer. The pod side is removed
        too, because the runtime may reuse the namespace.
        """
        request, owner = self._request, self._owner
        try:
            addresses = [each.ip for each in request.addresses()]
        except CNIError:
            addresses = []
        unbound = self._manager.unbind(
            owner, addresses, request.netns, request.mac,
            ends=True) if addresses else []
        if not unbound:
            self._manager.unbind(owner, None, request.netns, request.mac)

    def _check(self) -> None:
        """Compare record, route, neighbours and pod side with the kernel."""
        addresses = [each.ip for each in self._request.addresses()]
        self._macvlan()
        differences = '; '.join(self._differences(addresses))
        if differences:
            raise CNIError(DIFFERS, differences
                           + '. To repair it, run: kuryr-break0 sync')

    def _differences(self, addresses: list[model.IPAddress]) -> Iterator[str]:
        if not self._options.enabled:
            return
        with kernel.Netlink() as netlink:
            snapshot = actual.read(self._options, self._ledger, netlink)
        all_problems = problems.find(snapshot)
        namespace = kernel.identify(self._request.netns)
        own = []
        for address in addresses:
            record = snapshot.live.get(address)
            if record is None or (record.owner != self._owner and not (
                    record.namespace and namespace
                    and record.namespace.is_same(namespace))):
                yield 'the record of %s %s' % (
                    address, 'is missing' if record is None
                    else 'belongs to %s' % record.owner)
                continue
            own.append(record)
        for records in by_interface(own):
            all_problems += problems.of_pod(records, snapshot)
        for address, text in problems.by_address(all_problems).items():
            if address in addresses:
                yield '%s: %s' % (address, text)
        devices = {snapshot.parents[record.parent].device for record in own}
        yield from problems.of_node(
            each for each in all_problems if each.subject in devices)

    def _gc(self) -> None:
        """Unbind the claims of this network that are not valid attachments.

        libcni writes null for an empty list of attachments. The list can also
        be empty because of an error in the runtime. So for null, this method
        unbinds only containers that provably no longer exist.
        """
        request = self._request
        valid = request.attachments()
        failure = failures.Failures()
        for claims in list(self._ledger.records.find_containing(
                request.network)):
            for claim in claims:
                if (claim.network != request.network
                        or claim.origin is not model.Origin.CNI):
                    continue
                if valid is None:
                    unwanted = kernel.judge_state(
                        claim.netns, claim.namespace) is kernel.State.GONE
                else:
                    unwanted = claim.owner not in valid
                if unwanted:
                    with failure.collect():
                        self._manager.unbind(claim.owner, [claim.address])
        failure.raise_first()

    def _status(self) -> None:
        """Raise an error if an ADD would fail."""
        options = self._options
        try:
            if os.geteuid() != 0:
                raise exceptions.NotPermitted(
                    action='change the network', capability='CAP_NET_ADMIN')
            if options.guard == config.ON and not guard.is_installed():
                raise exceptions.GuardUnavailable(
                    device=options.device, reason=guard.NO_NFT)
            if self._strict:
                self._ledger.prepare()
                if options.parent and not kernel.has_interface(options.parent):
                    raise exceptions.ParentNotFound(parent=options.parent)
        except exceptions.Break0Error as err:
            raise CNIError(requests.UNAVAILABLE, str(err)) from err
