# SPDX-License-Identifier: Apache-2.0

"""Untrusted input is accepted, or refused with an error of the package.

``FUZZ_EXAMPLES=10000 tools/run tests.unit.test_fuzz`` runs more examples than
the default.
"""

from __future__ import annotations

import contextlib
import io
import ipaddress
import json
import logging
import os
import shlex
import socket
import subprocess
import tempfile
from typing import Any
import unittest
from unittest import mock

from hypothesis import given
from hypothesis import HealthCheck
from hypothesis import settings
from hypothesis import strategies as st

from kuryr_break0.agent import cni_server
from kuryr_break0.agent import http
from kuryr_break0.cli import main
from kuryr_break0.cni import plugin
from kuryr_break0.cni import request
from kuryr_break0 import config
from kuryr_break0.discovery import engines
from kuryr_break0.engine import admission
from kuryr_break0 import exceptions
from kuryr_break0.kernel import events
from kuryr_break0.kernel import netlink
from kuryr_break0.kernel import nft
from kuryr_break0.kernel import wire
from kuryr_break0.kuryr import vif as break0_vif
from kuryr_break0 import ledger
from kuryr_break0.ledger import identity
from kuryr_break0.ledger import records
from kuryr_break0.model import MAC
from kuryr_break0.model import NAME
from kuryr_break0.model import Owner
from kuryr_break0.model import Record
from kuryr_break0 import option_types
from tests.functional import base
from tests.functional.cni.base import SHIM
from tests.support import kuryr
from tests.support import lab

EXAMPLES = int(os.environ.get('FUZZ_EXAMPLES', 200))
fuzzed = settings(max_examples=EXAMPLES, deadline=None,
                  suppress_health_check=[HealthCheck.too_slow])

POD = ipaddress.ip_address('10.0.0.1')
addresses = st.ip_addresses()
hostile = st.text() | st.sampled_from(
    ['', '\n', 'a\nb', '\0', '\x1b[2J', 'x' * 5000, '/etc/passwd', '../..',
     'fd00::51%x', 'fa:16:3e:00:00:01\n', '01:00:5e:00:00:01', '--help'])
leaves = (st.none() | st.booleans() | st.integers() | st.floats() | hostile
          | addresses.map(str))
trees = st.recursive(leaves, lambda inner: st.lists(inner, max_size=4)
                     | st.dictionaries(st.text(max_size=8), inner,
                                       max_size=4), max_leaves=12)


class TestEntrance(unittest.TestCase):
    """The manager validates the arguments of every bind."""

    @fuzzed
    @given(hostile, hostile, st.lists(addresses, max_size=80), hostile,
           st.none() | hostile, st.none() | hostile, st.none() | hostile)
    def test_nothing_hostile_goes_in(
            self, container_id: str, ifname: str, given_addresses: list[Any],
            parent: str, mac: Any, netns: Any, pod: Any) -> None:
        owner = Owner(container_id, ifname)
        try:
            taken, mac = admission.validate(owner, given_addresses, parent,
                                            mac, netns, pod)
        except exceptions.InputRefused as err:
            self.assertNotRegex(str(err), r'[\x00-\x1f\x7f]')
            self.assertLess(len(str(err)), 1000)
            return
        self.assertEqual(len(set(taken)), len(taken))
        for text in (container_id, ifname, parent, netns, pod):
            if text is not None:
                self.assertRegex(text, NAME)
                self.assertNotRegex(text, r'[\x00-\x1f\x7f]')
        if mac is not None:
            self.assertEqual(0, int(mac[:2], 16) & 1)
            self.assertTrue(MAC.fullmatch(mac))
        # The ledger can read a record of the accepted values.
        if taken and taken[0] == given_addresses[0]:
            record = Record(taken[0], owner, parent, mac, (), netns, None,
                            pod, None, 1.0)
            self.assertEqual((record,), records.from_json(
                records.to_json([record])))


class TestVIF(unittest.TestCase):

    @fuzzed
    @given(trees, st.sampled_from(['address', 'cidr', 'ips', 'subnets',
                                   'vif_name']))
    def test_any_content_of_a_kuryrport(self, tree: Any, where: str) -> None:
        primitive = kuryr.macvlan_vif(
            '100.75.30.71', 'fd00::71',
            subnets=['100.75.30.0/24', 'fd00::/64']).obj_to_primitive()
        self._put(primitive, where, tree)
        try:
            vif = break0_vif.VIFMacvlanBreak0._obj_from_primitive(
                None, '1.0', primitive)
            found = break0_vif.addresses(vif)
            break0_vif.subnets(vif)
        except (ValueError, TypeError, AttributeError, KeyError,
                NotImplementedError):
            return  # oslo.versionedobjects refuses the primitive
        except Exception as err:
            self.assertTrue(type(err).__module__.startswith('oslo_'),
                            repr(err))
            return
        for address in found:
            self.assertIsInstance(address, (ipaddress.IPv4Address,
                                            ipaddress.IPv6Address))

    def _put(self, primitive: Any, where: str, tree: Any) -> bool:
        """Replace the first value of a key, depth first.

        :returns: whether the key exists
        """
        for value in (primitive.values() if isinstance(primitive, dict)
                      else primitive):
            if isinstance(value, dict) and where in value:
                value[where] = tree
                return True
            if isinstance(value, (dict, list)) and self._put(value, where,
                                                             tree):
                return True
        return False


class TestFiles(unittest.TestCase):

    @fuzzed
    @given(st.text() | trees.map(json.dumps))
    def test_a_record(self, text: str) -> None:
        self._read(text)

    @fuzzed
    @given(st.sampled_from(['version', 'address', 'claims', 'owner', 'mac',
                            'netns', 'namespace', 'subnets', 'bound_at',
                            'siblings', 'configured']), trees)
    def test_a_record_with_one_field_changed(self, name: str,
                                             tree: Any) -> None:
        fields = json.loads(records.to_json([Record(
            POD, Owner('a', 'eth0'), 'eth0', None, (), '/run/netns/a', None,
            None, None, 1.0)]))
        (fields if name in fields else fields['claims'][0])[name] = tree
        self._read(json.dumps(fields))

    def _read(self, text: str) -> None:
        try:
            found = records.from_json(text)
        except (ValueError, records.NewerVersion):
            return
        self.assertTrue(found)
        self.assertEqual(found, records.from_json(records.to_json(found)))

    @fuzzed
    @given(st.text() | trees.map(json.dumps))
    def test_an_identity(self, text: str) -> None:
        with contextlib.suppress(ValueError):
            self.assertTrue(identity.Identity.from_json(text).id)

    @fuzzed
    @given(st.none() | hostile | st.from_regex(
        r'kuryr-break0 ledger .* in .*'))
    def test_an_alias(self, text: Any) -> None:
        found = identity.Alias.parse(text)
        if found is not None:
            self.assertEqual(text[:255], str(found))


#: Netlink attributes of the parsed kinds, with correct and incorrect lengths.
attributes = st.lists(st.tuples(
    st.integers(0, 60), st.binary(max_size=24) | st.builds(
        lambda kind, inner: netlink.attribute(kind, inner),
        st.integers(0, 20), st.binary(max_size=16))), max_size=6).map(
            lambda pairs: b''.join(netlink.attribute(*each)
                                   for each in pairs))
bodies = st.binary(max_size=80) | st.builds(
    lambda fixed, rest: fixed + rest,
    st.binary(min_size=8, max_size=16), attributes)


@st.composite
def datagrams(draw: st.DrawFn) -> bytes:
    body = draw(bodies)
    length = draw(st.just(len(body) + 16) | st.integers(0, 2 ** 32 - 1))
    kind = draw(st.sampled_from([2, 3, 16, 17, 20, 21, 24, 25, 28, 29, 88])
                | st.integers(0, 2 ** 16 - 1))
    return netlink.HEADER.pack(
        length, kind, draw(st.integers(0, 2 ** 16 - 1)),
        draw(st.integers(0, 2 ** 32 - 1)), 0) + body


class TestNetlink(unittest.TestCase):

    @fuzzed
    @given(st.binary(max_size=200) | st.lists(datagrams(), max_size=3).map(
        b''.join))
    def test_messages(self, data: bytes) -> None:
        for message in netlink.messages(data):
            with contextlib.suppress(OSError):
                wire.parse(message)
            wire.route_protocol(message.body)
            message.error()
            list(nft._keys(message.body))

    @fuzzed
    @given(datagrams())
    def test_events(self, data: bytes) -> None:
        self.events(data)

    def test_an_event_that_is_cut_off(self) -> None:
        """A route with thousands of next hops does not fit into the buffer."""
        body = bytes(12) + bytes(2 ** 17)
        self.assertEqual({'lost'}, self.events(netlink.HEADER.pack(
            16 + len(body), wire.RTM_NEWROUTE, 0, 0, 0) + body))

    def events(self, data: bytes) -> set[str]:
        told, heard = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
        with told, heard:
            heard.setblocking(False)
            with mock.patch.object(events.Events, '__init__',
                                   return_value=None):
                made = events.Events()
            made._socket = heard
            told.send(data)
            found = {event.kind for event in made.get()}
        self.assertLessEqual(found, {'lost', 'link', 'address', 'route',
                                     'nexthop', 'neighbour'})
        return found


class TestCommandLine(unittest.TestCase):

    @fuzzed
    @given(st.sampled_from(['status', 'sync', 'bind', 'unbind', 'doctor',
                            'probe', 'cleanup', 'adopt', '']),
           st.lists(hostile | st.sampled_from(
               ['--owner', '--netns', '--json', '--mac', '--dry-run',
                '--config-file', '--state', 'fd00::1%eth0', '10.0.0.1']),
               min_size=1, max_size=5))
    def test_arguments(self, verb: str, arguments: list[str]) -> None:
        out, errors = io.StringIO(), io.StringIO()
        argv = [verb, *arguments, '--no-such-option']
        with contextlib.redirect_stdout(out), \
                contextlib.redirect_stderr(errors):
            try:
                code: Any = main.main(argv)
            except SystemExit as err:
                code = err.code
        shown = shlex.join(argv)
        # argparse exits with 0 if it reaches --help without an error, and
        # otherwise with 2.
        self.assertIn(code, (0,) if '--help' in arguments and not errors
                      .getvalue() else (2,), shown)
        self.assertNotIn('Traceback', errors.getvalue(), shown)

    @fuzzed
    @given(hostile)
    def test_types_of_arguments(self, text: str) -> None:
        for kind in (option_types.host_address, option_types.device_name):
            with contextlib.suppress(ValueError):
                self.assertNotRegex(str(kind(text)), r'[\s\x00-\x1f\x7f/]')


def _refuse_all() -> config.Options:
    raise exceptions.InvalidOption(option='device', reason='of the test')


class TestCNI(unittest.TestCase):
    """The CNI plugin answers any request of a container runtime."""

    variables = st.fixed_dictionaries({}, optional={
        'CNI_COMMAND': st.sampled_from(
            ['ADD', 'DEL', 'CHECK', 'GC', 'STATUS', 'VERSION']) | hostile,
        'CNI_CONTAINERID': st.just('c0ffee') | hostile,
        'CNI_IFNAME': st.just('eth0') | hostile,
        'CNI_NETNS': st.just('/run/netns/none') | hostile,
        'CNI_ARGS': st.just('K8S_POD_NAME=web') | hostile,
        'CNI_PATH': st.just('/opt/cni/bin') | hostile})
    configs = st.fixed_dictionaries({}, optional={
        'cniVersion': st.sampled_from(['0.3.1', '1.1.0']) | leaves,
        'name': st.just('lan') | leaves, 'strict': leaves,
        'prevResult': trees | st.fixed_dictionaries({
            'interfaces': trees, 'ips': trees}),
        'cni.dev/valid-attachments': trees})

    def assert_answered(self, environment: dict[str, str],
                        data: bytes) -> None:
        status, output, _ = plugin.answer(environment, data, _refuse_all)
        found = json.loads(output)
        if status == 0:
            self.assertEqual('VERSION', environment['CNI_COMMAND'])
            return
        self.assertLess(found['code'], 100)  # 199: unforeseen error
        self.assertNotRegex(found['msg'], r'[\x00-\x1f\x7f]')
        self.assertLess(len(found['msg']), 400)

    @fuzzed
    @given(variables, st.binary(max_size=200))
    def test_any_input(self, environment: dict[str, str],
                       data: bytes) -> None:
        self.assert_answered(environment, data)

    @fuzzed
    @given(variables, configs)
    def test_any_configuration(self, environment: dict[str, str],
                               fields: dict[str, Any]) -> None:
        self.assert_answered(environment, json.dumps(fields).encode())

    @fuzzed
    @given(configs)
    def test_addresses_of_a_good_request(self, fields: dict[str, Any]) -> None:
        """Addresses of a parsed request belong to their networks."""
        with contextlib.suppress(request.CNIError):
            found = request.parse(
                {'CNI_COMMAND': 'ADD', 'CNI_CONTAINERID': 'c0ffee',
                 'CNI_IFNAME': 'eth0', 'CNI_NETNS': '/run/netns/none',
                 'CNI_PATH': '/opt/cni/bin'},
                json.dumps({**fields, 'cniVersion': '1.0.0',
                            'name': 'lan'}).encode())
            for each in found.addresses():
                self.assertIn(each.ip, each.network)

    @fuzzed
    @given(st.binary(max_size=300))
    def test_frames_of_the_socket(self, data: bytes) -> None:
        with contextlib.suppress(ValueError):
            environment, body = cni_server._parse(data)
            self.assertTrue(data.endswith(body))
            self.assertLessEqual(len(environment), data.count(b'\0') + 1)

    @unittest.skipUnless(SHIM.exists(), 'needs the shim: make cni')
    @settings(fuzzed, max_examples=min(EXAMPLES, 500))
    @given(st.binary(max_size=300) | configs.map(
        lambda fields: json.dumps(fields).encode()))
    def test_shim_without_agent(self, data: bytes) -> None:
        done = subprocess.run(
            [SHIM], input=data, stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL, env={'CNI_COMMAND': 'ADD'})
        self.assertEqual(1, done.returncode)
        self.assertIn(json.loads(done.stdout)['code'], (6, 7, 11))


@unittest.skipIf(os.geteuid(), 'needs root, as under tools/in-lab')
class TestSocketOfTheAgent(unittest.TestCase):
    """The agent's CNI server survives any request of another root process.

    The agent carries out these requests on a node with a pod.
    """

    POD = '100.75.30.71'
    netns = st.sampled_from([
        '/run/netns/pod', '/run/netns/none', '/proc/self/ns/net', '/dev/zero',
        '/proc/self/ns/mnt', '/', '/run/netns/pod/../pod'])
    variables = st.fixed_dictionaries({
        'CNI_COMMAND': st.sampled_from(
            ['ADD', 'DEL', 'CHECK', 'GC', 'STATUS', 'VERSION']),
        'CNI_CONTAINERID': st.just('c0ffee') | hostile,
        'CNI_IFNAME': st.just('eth0') | hostile,
        'CNI_PATH': st.just('/opt/cni/bin')}, optional={
            'CNI_NETNS': netns | hostile, 'CNI_ARGS': hostile})
    results = trees | st.fixed_dictionaries({
        'ips': trees | st.lists(st.fixed_dictionaries({
            'address': st.just(POD + '/24') | addresses.map(str) | leaves}),
            max_size=3)}, optional={'interfaces': trees})
    configs = st.fixed_dictionaries(
        {'cniVersion': st.sampled_from(['0.3.1', '1.1.0']),
         'name': st.just('lan') | leaves}, optional={
            'strict': leaves, 'prevResult': results,
            'cni.dev/valid-attachments': trees})

    @classmethod
    def setUpClass(cls) -> None:
        super().setUpClass()
        cls.node = lab.Lab()
        cls.addClassCleanup(cls.node.close)
        cls.node.add_pod('pod', cls.POD)
        # Each refused request logs a line.
        logging.disable(logging.ERROR)
        cls.addClassCleanup(logging.disable, logging.NOTSET)
        options = base.options(metrics_bind='')
        ledger.Ledger(options.state_dir).prepare()
        cls.server = cni_server.CNIServer()
        cls.addClassCleanup(cls.server.close)
        cls.server.listen(options)
        cls.path = os.path.join(options.state_dir, cni_server.NAME)

    def ask(self, data: bytes, ends: bool = True) -> bytes:
        with socket.socket(socket.AF_UNIX) as client:
            client.settimeout(lab.PATIENCE)
            client.connect(self.path)
            with contextlib.suppress(ConnectionError):
                client.sendall(data)
                if not ends:
                    return b''  # the client disconnects without reading
                client.shutdown(socket.SHUT_WR)
                return b''.join(iter(lambda: client.recv(4096), b''))
        return b''

    def assert_served(self) -> None:
        head, _, body = self.ask(
            b'CNI_COMMAND=VERSION\0CNI_PATH=/\0\0').partition(b'\n')
        self.assertEqual(b'0 %d' % len(body), head)
        self.assertIn('supportedVersions', json.loads(body))
        self.assertTrue(self.server.is_complete)

    @fuzzed
    @given(st.binary(max_size=300), st.booleans())
    def test_any_data(self, data: bytes, ends: bool) -> None:
        self.assert_answer(self.ask(data, ends))
        self.assert_served()

    @fuzzed
    @given(variables, configs)
    def test_requests(self, environment: dict[str, str],
                      fields: dict[str, Any]) -> None:
        data = ''.join('%s=%s\0' % each for each in environment.items())
        before = self.interfaces()
        self.assert_answer(self.ask(
            data.encode(errors='surrogatepass') + b'\0'
            + json.dumps(fields).encode()))
        self.assertEqual(before, self.interfaces())
        self.assert_served()

    def interfaces(self) -> dict[str, list[str]]:
        """Return the flags of the node's interfaces except break0, by name."""
        return {link['ifname']: link['flags'] for link
                in self.node.ip('link', 'show')
                if link['ifname'] != 'break0'}

    def assert_answer(self, answer: bytes) -> None:
        if not answer:
            return
        head, _, body = answer.partition(b'\n')
        self.assertRegex(head, rb'\A[01] \d+\Z')
        self.assertEqual(int(head[2:]), len(body))
        found = json.loads(body) if body else {}
        if head[:1] == b'1':
            self.assertNotEqual(plugin.UNEXPECTED, found['code'], found)
            self.assertNotRegex(found['msg'], r'[\x00-\x1f\x7f]')


@unittest.skipUnless(SHIM.exists(), 'needs the shim: make cni')
class TestShim(unittest.TestCase):
    """The shim survives any answer of the agent."""

    def setUp(self) -> None:
        super().setUp()
        directory = tempfile.TemporaryDirectory()
        self.addCleanup(directory.cleanup)
        self.path = os.path.join(directory.name, 'socket')
        self.listening = socket.socket(socket.AF_UNIX)
        self.addCleanup(self.listening.close)
        self.listening.bind(self.path)
        self.listening.listen()
        self.listening.settimeout(lab.PATIENCE)

    def run_shim(self, answer: bytes, **environ: str) -> tuple[int, bytes]:
        data = json.dumps({'cniVersion': '1.0.0',
                           'socket': self.path}).encode()
        with subprocess.Popen(
                [SHIM], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL, env=environ) as shim:
            assert shim.stdin is not None and shim.stdout is not None
            shim.stdin.write(data)
            shim.stdin.close()
            client, _ = self.listening.accept()
            with client, contextlib.suppress(ConnectionError):
                sent = b''.join(iter(lambda: client.recv(4096), b''))
                self.assertTrue(sent.endswith(b'\0' + data))
                client.sendall(answer)
            output = shim.stdout.read()
        return shim.returncode, output

    @settings(fuzzed, max_examples=min(EXAMPLES, 500))
    @given(st.binary(max_size=100) | st.builds(
        lambda status, length, output: b'%d %d\n%s' % (
            status, len(output) if length is None else length, output),
        st.integers(), st.none() | st.integers(), st.binary(max_size=40)))
    def test_answers(self, answer: bytes) -> None:
        status, output = self.run_shim(answer, CNI_COMMAND='ADD')
        self.assertGreaterEqual(status, 0)
        if output.startswith(b'{"cniVersion"'):
            self.assertEqual((1, 11), (status, json.loads(output)['code']))
        else:
            self.assertTrue(answer.endswith(output))


class TestEngines(unittest.TestCase):
    """Discovery survives any answer at a container engine's socket."""

    @fuzzed
    @given(trees | st.lists(st.fixed_dictionaries({}, optional={
        'Id': st.just('abc') | leaves, 'Names': trees}), max_size=3),
        trees | st.fixed_dictionaries({}, optional={
            'NetworkSettings': trees | st.fixed_dictionaries({
                'SandboxKey': leaves}), 'State': trees}))
    def test_answers(self, listed: Any, details: Any) -> None:
        def get(path: str, url: str) -> Any:
            found = listed if url == '/containers/json' else details
            if not isinstance(found, list if found is listed else dict):
                raise ValueError(url)
            return found

        with mock.patch.object(engines, '_fetch', get), \
                contextlib.suppress(ValueError):
            for name, netns in engines.list_containers('/nowhere', ('/proc',)):
                self.assertRegex(name, NAME)
                self.assertTrue(netns.startswith('/'))


@unittest.skipIf(os.geteuid(), 'needs root, as under tools/in-lab')
class TestHTTP(unittest.TestCase):

    @classmethod
    def setUpClass(cls) -> None:
        super().setUpClass()
        node = lab.Lab()
        cls.addClassCleanup(node.close)
        with mock.patch('prometheus_client.make_wsgi_app'):
            cls.server = http.Server(mock.Mock(),
                                     {'/healthz': lambda: None})
        cls.endpoint = option_types.Endpoint(
            ipaddress.ip_address('127.0.0.1'), 19817)
        cls.server.listen(cls.endpoint)
        cls.addClassCleanup(cls.server.close)

    def ask(self, data: bytes) -> bytes:
        with socket.create_connection(('127.0.0.1', 19817), 10) as client:
            with contextlib.suppress(ConnectionError):
                client.sendall(data)
                client.shutdown(socket.SHUT_WR)
                answer = b''
                while True:
                    more = client.recv(4096)
                    if not more:
                        return answer
                    answer += more
            return b''

    @fuzzed
    @given(st.binary(max_size=300) | st.builds(
        lambda method, path, name, value: b'%s %s HTTP/1.1\r\n%s: %s\r\n\r\n'
        % (method, path, name, value),
        st.sampled_from([b'GET', b'POST', b'HEAD', b'PUT', b'']),
        st.binary(max_size=40), st.sampled_from(
            [b'Host', b'Content-Length', b'Transfer-Encoding', b'Expect',
             b'X']), st.binary(max_size=40)))
    def test_requests(self, data: bytes) -> None:
        answer = self.ask(data)
        if answer:
            self.assertRegex(answer, rb'\AHTTP/1\.[01] \d\d\d ')
        self.assertNotIn(b'Traceback', answer)
        self.assertIn(b'\r\n\r\nok\n', self.ask(
            b'GET /healthz HTTP/1.0\r\n\r\n'))
