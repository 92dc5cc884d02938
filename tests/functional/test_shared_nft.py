# SPDX-License-Identifier: Apache-2.0

"""The nftables socket that the workers of kuryr-daemon share."""

from __future__ import annotations

import errno
import os
import signal
from typing import Callable
from unittest import mock

from kuryr_break0 import exceptions
from kuryr_break0 import kernel
from kuryr_break0.kernel import netlink
from kuryr_break0.kernel import nft
from kuryr_break0 import ledger
from kuryr_break0.model import Owner
from kuryr_break0.model import Pair
from tests.functional import base

TABLE = 'kuryr-break0-break0'
POD, OTHER = '100.75.30.71', '100.75.30.72'
MAC = 'fa:16:3e:00:00:0%d'
#: A sequence number that two processes choose by chance.
NUMBER = 1001


class TestSharedSocket(base.LabTestCase):

    def setUp(self) -> None:
        super().setUp()
        self.bind(POD, mac_of_pod=MAC % 1)  # creates the table
        patched = mock.patch.object(nft, '_shared', None)
        patched.start()
        self.addCleanup(patched.stop)
        kernel.share_nft()
        assert nft._shared is not None
        self.shared = nft._shared[1]
        self.addCleanup(self.shared._socket.close)
        own = base.options()
        self.ledger = ledger.Ledger(own.state_dir)

    def child(self, function: Callable[[], bool]) -> int:
        """Call a function in a child that has the lock; return its status."""
        def held() -> None:
            with self.ledger.lock():
                assert function()
        return base.wait_for(base.in_child(held))

    def admitted(self) -> set[str]:
        with kernel.Nft() as own:
            return {'.'.join(map(str, pair.address))
                    for pair in own.elements(TABLE)}

    def test_only_the_holder_of_the_lock_gets_it(self) -> None:
        self.assertIsNot(self.shared, kernel.open_node_nft())
        self.assertFalse(self.ledger.is_locked)
        with self.ledger.lock():
            self.assertTrue(self.ledger.is_locked)
            self.assertIs(self.shared, kernel.open_node_nft(exclusive=True))
        self.assertFalse(self.ledger.is_locked)

    def test_a_lock_that_is_not_had_is_not_held(self) -> None:
        own = base.options()
        impatient = ledger.Ledger(own.state_dir, 0)
        with self.ledger.lock():
            with self.assertRaises(exceptions.LockTimeout):
                with impatient.lock():
                    pass
            self.assertFalse(impatient.is_locked)
            self.assertTrue(self.ledger.is_locked)

    def test_not_in_another_namespace(self) -> None:
        path = self.lab.add_pod('pod', OTHER)
        with kernel.enter_namespace(path):
            self.assertIsNot(self.shared, kernel.open_node_nft(exclusive=True))

    def test_workers_open_none_of_their_own(self) -> None:
        """Workers use the shared nftables socket and open no other.

        When the kernel closes an nftables socket, it delays all workers.
        """
        def bound() -> bool:
            with mock.patch.object(nft, 'Nft', side_effect=AssertionError):
                self.bind(OTHER, mac_of_pod=MAC % 2,
                          owner=Owner('other', 'eth0'))
                self.unbind(POD)
            return True

        self.assertEqual(0, base.wait_for(base.in_child(bound)))
        self.assertEqual({OTHER}, self.admitted())

    def test_without_a_lock_each_has_its_own(self) -> None:
        def bound() -> bool:
            with mock.patch.object(ledger.Ledger, 'lock', side_effect=(
                    exceptions.LockTimeout(path='/run', timeout=0))), \
                    mock.patch.object(self.shared, 'take_over',
                                      side_effect=AssertionError):
                self.bind(OTHER, mac_of_pod=MAC % 2,
                          owner=Owner('other', 'eth0'))
            return True

        self.assertEqual(0, base.wait_for(base.in_child(bound)))
        self.assertIn(OTHER, self.admitted())

    def test_errors_of_posted_messages_disturb_no_request(self) -> None:
        """Errors of posted messages stay unread until the next request."""
        refused = netlink.Message(1 << 8 | 99, 0, bytes(4))
        for _ in range(3):
            nft.post([refused])
        with self.ledger.lock():
            kernel.open_node_nft(exclusive=True)
            nft.post([refused])  # as a process without the lock can do
            pair = Pair(bytes((100, 75, 30, 99)), None)
            self.shared.add(TABLE, [pair])
            nft.post([refused])
            self.assertIn(pair, self.shared.elements(TABLE))

    def test_an_answer_that_another_has_read(self) -> None:
        """A request fails if another process has read the answer.

        Another process can read the answer if the state directory was
        replaced, and the lock with it.
        """
        pair = Pair(bytes((100, 75, 30, 99)), None)
        with mock.patch.object(netlink, 'messages', return_value=[]), \
                self.assertRaises(exceptions.KernelRefused) as caught:
            self.shared.add(TABLE, [pair])
        self.assertEqual(errno.EAGAIN, caught.exception.errno)
        self.assert_works()

    def test_very_many_unread_answers(self) -> None:
        for _ in range(3000):
            nft.post([netlink.Message(1 << 8 | 99, 0, bytes(4))])
        self.assert_works()

    def killed(self, *messages: netlink.Message) -> None:
        """Send messages from a worker that is killed before it reads."""
        def die() -> bool:
            self.shared._socket.send(b''.join(
                message.packed(NUMBER + 1 + number)
                for number, message in enumerate(messages)))
            os.kill(os.getpid(), signal.SIGKILL)
            return False

        self.assertEqual(-signal.SIGKILL, self.child(die))

    def assert_works(self) -> None:
        """Expect the next worker to ignore the killed worker's answers."""
        pair = Pair(bytes((100, 75, 30, 99)), None)

        def changed() -> bool:
            with mock.patch.object(os, 'urandom', return_value=(
                    NUMBER << 1).to_bytes(4, 'big')):
                shared = kernel.open_node_nft(exclusive=True)
            assert shared._sequence == NUMBER
            shared.add(TABLE, [pair])
            assert pair in shared.elements(TABLE)
            shared.delete(TABLE, [pair])
            return pair not in shared.elements(TABLE) and bool(
                shared.rules(TABLE))

        self.assertEqual(0, self.child(changed))

    def test_a_worker_is_killed_with_an_answer_unread(self) -> None:
        edge = (nft._BATCH_BEGIN, nft._BATCH_END)
        begin, end = (netlink.Message(kind, 0, b'\0\0\0\x0a')
                      for kind in edge)
        gone = nft._elements('addresses4', [
            Pair(bytes((192, 0, 2, 9)), None)])
        # The kernel answers with an error, since no such element exists.
        self.killed(begin, nft._message(nft._DELSETELEM, netlink.NLM_F_ACK,
                                        TABLE, gone), end)
        self.assert_works()

    def test_a_worker_is_killed_within_a_dump(self) -> None:
        with kernel.Nft() as own:
            own.add(TABLE, [Pair(bytes((10, 9, high, low)), None)
                            for high in range(20) for low in range(100)])
        self.killed(nft._message(
            nft._GETSETELEM, netlink.NLM_F_DUMP, TABLE,
            netlink.text(2, 'addresses4')))
        self.assert_works()
