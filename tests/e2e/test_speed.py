# SPDX-License-Identifier: Apache-2.0

"""The real daemon does slow steps before it forks for a request."""

from __future__ import annotations

import contextlib
import os
import textwrap

import psutil

from tests.e2e import base as e2e_base
from tests.support import kuryr


class TestRequests(e2e_base.DaemonTestCase):
    """A request's process imports nothing and skips old objects in GC."""

    # Text of sitecustomize.py, which Python imports when it starts.
    WATCH = '''
        import gc
        import os
        import sys

        def tell(*words):
            with open(%r, 'a') as file:
                file.write('%%d %%s %%s\\n' %% (os.getpid(), *words))

        class Watch:
            def find_spec(self, name, path=None, target=None):
                tell('import', name)

        def forked():
            tell('kept', gc.get_freeze_count())
            tell('collectable', len(gc.get_objects()))

        sys.meta_path.insert(0, Watch())
        os.register_at_fork(after_in_child=forked)
    '''

    def told(self, what: str, among: set[int]) -> dict[str, list[str]]:
        """Return the logged words of one kind, by the kind of process.

        :param what: kind of the words
        :param among: process ids of the services
        :returns: lists of the words from ``services`` and from ``requests``
        """
        found: dict[str, list[str]] = {'services': [], 'requests': []}
        with open(os.path.join(self.node.dir, 'told')) as file:
            for line in file:
                pid, kind, word = line.split()
                if kind == what:
                    found['services' if int(pid) in among
                          else 'requests'].append(word)
        return found

    def netfilter_sockets(self) -> set[str]:
        """Return the netfilter sockets of the daemon's processes."""
        with open('/proc/net/netlink') as file:
            inodes = {line.split()[-1] for line in file
                      if line.split()[1] == '12'}
        assert self.node.daemon is not None
        daemon = psutil.Process(self.node.daemon.pid)
        found: set[str] = set()
        for process in daemon.children(recursive=True):
            with contextlib.suppress(FileNotFoundError):  # the process ended
                for name in os.listdir('/proc/%d/fd' % process.pid):
                    with contextlib.suppress(FileNotFoundError):
                        link = os.readlink('/proc/%d/fd/%s' % (process.pid,
                                                               name))
                        found.add(link.partition('[')[2].rstrip(']'))
        return found & inodes

    def test_a_socket_of_nftables_outlives_requests(self) -> None:
        for guard, count in (('auto', 1), ('off', 0)):
            self.node.start_daemon('guard = ' + guard)
            pod = self.node.add_pod(guard, '100.75.30.71')
            for _ in range(2):
                self.add(pod)
                self.delete(pod)
                self.assertEqual(count, len(self.netfilter_sockets()))
            self.node.kill_daemon()

    def test_with_kuryrs_binding(self) -> None:
        self.check('kuryr')

    def test_with_the_direct_one(self) -> None:
        self.check('auto')

    def check(self, binding: str) -> None:
        path = os.path.join(self.node.dir, 'told')
        with open(path, 'w'):
            pass
        with open(os.path.join(self.node.dir, 'sitecustomize.py'),
                  'w') as file:
            file.write(textwrap.dedent(self.WATCH) % path)
        self.node.start_daemon('pod_binding = ' + binding,
                               PYTHONPATH=self.node.dir)
        self.node.lab.add_ipv6()
        for name in ('first', 'second'):  # the first creates break0
            pod = self.node.add_pod(
                name, vif=kuryr.macvlan_vif(
                    '100.75.30.71', 'fd00:30::71',
                    subnets=['100.75.30.0/24', 'fd00:30::/64']))
            self.add(pod)
            self.delete(pod)
        assert self.node.daemon is not None
        daemon = psutil.Process(self.node.daemon.pid)
        # A request's process is a child of one of the services.
        services = {daemon.pid, *(process.pid
                                  for process in daemon.children())}
        imports = self.told('import', services)
        self.assertIn('kuryr_break0.manager', imports['services'])
        self.assertEqual([], imports['requests'])
        # The garbage collector of a request skips all objects from before the
        # fork.
        collectable = self.told('collectable', services)['requests']
        kept = self.told('kept', services)['requests']
        self.assertLess(max(map(int, collectable)), min(map(int, kept)) / 5)
