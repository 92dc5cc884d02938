# SPDX-License-Identifier: Apache-2.0

"""All that the doctor can find: the texts.

Each has an id that stays the same, for alerts, runbooks and searches. Whether
it is so, the other modules of this package find out.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Collection

#: Node and pods do not reach each other, or will not before long.
ERROR = 'error'
#: They do, but it hangs by a thread, or it harms others.
WARNING = 'warning'

_SYNC = 'kuryr-break0 sync'


@dataclasses.dataclass(frozen=True)
class Finding:
    """Something that is not as it should be.

    :ivar seen: what was found, in this case
    :ivar remedy: what to do about it
    :ivar commands: how, by commands that can be pasted into a shell
    :ivar subjects: what it is about, if it is several: addresses, files
    """

    id: str
    severity: str
    seen: str
    why: str
    remedy: str
    commands: tuple[str, ...] = ()
    subjects: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Kind:
    """A finding that was not made yet.

    :ivar commands: with fields of the form ``%(name)s``
    """

    id: str
    severity: str
    why: str
    remedy: str
    commands: tuple[str, ...] = ()

    def found(self, seen: str, subjects: Collection[Any] = (),
              commands: Collection[str] = (), **fields: Any) -> Finding:
        """Make the finding.

        :param subjects: named after what was seen, the first of them
        :param commands: in place of those of the kind
        :param fields: the values of the fields of the commands
        """
        return Finding(
            self.id, self.severity, seen, self.why, self.remedy,
            tuple(commands) or tuple(command % fields
                                     for command in self.commands),
            tuple(map(str, subjects)))


# Whether pods are bound by break0's driver at all

ENTRY_POINT_MISSING = Kind(
    'entry-point-missing', ERROR,
    'Kuryr finds the driver by these entry points. Without them pods are '
    'bound by Kuryr alone, unreachable from their node.',
    'Install the package into the Python environment of kuryr-daemon, and '
    'restart kuryr-daemon.',
    ('%(python)s -m pip install --force-reinstall --no-deps ./kuryr-break0',))

DRIVER_BROKEN = Kind(
    'driver-broken', ERROR,
    'kuryr-daemon starts all the same, and pods are bound by Kuryr alone, '
    'unreachable from their node.',
    'Repair the installation so that the module can be imported, and '
    'restart kuryr-daemon.',
    ('%(python)s -c "import %(module)s"',))

DEPENDENCY_UNFIT = Kind(
    'dependency-unfit', ERROR,
    'With other versions neither driver nor Kuryr have been seen to work: '
    'from pyroute2 0.8 on, for one, kuryr-daemon does not start.',
    'Install versions that fit, and restart kuryr-daemon.',
    ('%(python)s -m pip install %(requirements)s',))

DAEMON_ELSEWHERE = Kind(
    'daemon-elsewhere', ERROR,
    'The driver has to be in the Python environment of kuryr-daemon. What '
    'the doctor says of the installation is of its own.',
    'Install the package there, restart kuryr-daemon, and run the doctor '
    'from there.',
    ('%(directory)s/python -m pip install ./kuryr-break0',
     '%(directory)s/kuryr-break0 doctor'))

DAEMON_NOT_RESTARTED = Kind(
    'daemon-not-restarted', WARNING,
    'It has what was installed when it started: an earlier version, or no '
    'driver at all, and then pods are not reachable from their node.',
    'Restart kuryr-daemon. Running pods are not touched by that.',
    ('kubectl --namespace kube-system rollout restart daemonset '
     'kuryr-cni-ds',))

OPTIONS_INVALID = Kind(
    'options-invalid', ERROR,
    'With an invalid option pods are bound by Kuryr alone, unreachable from '
    'their node. The doctor cannot look further.',
    'Correct the option in kuryr.conf, or in the environment variable that '
    'sets it, and restart kuryr-daemon and the agent.')

OPTION_UNKNOWN = Kind(
    'option-unknown', WARNING,
    'It has no effect. If it is a misspelt name, the option has its default: '
    'without allowed_cidrs, for one, any address is allowed.',
    'Correct the name, or delete the line.')

DISABLED = Kind(
    'disabled', WARNING,
    'New pods are bound by Kuryr alone, unreachable from their node.',
    'Set [break0] enabled = true in kuryr.conf, and restart kuryr-daemon.')

# State directory, lock and agent

STATE_DIR_UNUSABLE = Kind(
    'state-dir-unusable', ERROR,
    'Without it nobody knows whose address is whose: nothing is repaired, '
    'and a late DEL of an old pod takes the route of the new one.',
    'Make it a directory that root can write, or set [break0] state_dir to '
    'one.',
    ('ls -ld %(path)s', 'findmnt --target %(path)s'))

STATE_DIR_MODE = Kind(
    'state-dir-mode', WARNING,
    'Who can write to it can draw the traffic of the node for any address '
    'to a pod.',
    'Let only root use it.',
    ('chown root %(path)s', 'chmod 0700 %(path)s'))

STATE_DIR_PERSISTENT = Kind(
    'state-dir-persistent', WARNING,
    'Pods end with the boot, and what is recorded of them has to end with '
    'it too: after the next one, addresses would be routed to pods that are '
    'gone.',
    'Set [break0] state_dir to a directory on a tmpfs, such as '
    '/run/kuryr-break0, while no pods run on the node.')

LEDGER_DAMAGED = Kind(
    'ledger-damaged', ERROR,
    'The address has a pod, but it is not known which: nothing is set or '
    'deleted for it. The next sync moves it to quarantine, and rebuilds it '
    'if the pod is found.',
    'Start the pod of the address again. Its ADD writes a new record.')

LEDGER_QUARANTINED = Kind(
    'ledger-quarantined', WARNING,
    'These records were damaged. Nothing is deleted for their addresses, '
    'whether they have pods or not, until they are bound again.',
    'Find out what wrote into the state directory, start pods again that '
    'have one of these addresses, then delete the files.',
    ('rm -r %(directory)s',))

LEDGER_LOST = Kind(
    'ledger-lost', ERROR,
    'Nothing says any more which sandbox has which address, so no route is '
    'repaired, and none of a pod that has gone is deleted.',
    'Have it rebuilt from the routes, the neighbours and the namespaces of '
    'the node, and find out what emptied the directory.', (_SYNC,))

LEDGER_OTHER = Kind(
    'ledger-other', ERROR,
    'What another ledger has bound is not known here, so nothing is repaired '
    'or deleted.',
    'Set [break0] state_dir of kuryr-daemon, agent and command to the same '
    'directory; in containers, mount the same one there. If the other ledger '
    'no longer exists, take its break0 over.',
    ('kuryr-break0 sync --claim',))

ADDRESS_CONTESTED = Kind(
    'address-contested', WARNING,
    'Traffic to the address goes to the sandbox that claimed it last. The '
    'others get it back when that one is gone.',
    'Find out why two sandboxes have one address, as by a duplicate '
    'KuryrPort, and delete the one that should not have it.')

ADDRESS_TWICE = Kind(
    'address-twice', WARNING,
    'The node reaches the one that the address belongs to. Others on the LAN '
    'reach either.',
    'Find out which container or pod should have it, and take it from the '
    'other one.')

LEDGER_NEWER = Kind(
    'ledger-newer', ERROR,
    'The program is older than what wrote them: nothing is set or deleted '
    'for their addresses.',
    'Install the later version again, or start the pods of these addresses '
    'again after deleting the files.',
    ('%(python)s -m pip install --upgrade ./kuryr-break0',))

LOCK_HELD = Kind(
    'lock-held', ERROR,
    'It is held for milliseconds. Each ADD, DEL and repair waits for it, and '
    'gives up after [break0] lock_timeout.',
    'See what the process is doing. If it is stopped, let it go on; if it '
    'hangs, end it: the kernel frees the lock.',
    ('fuser --verbose %(path)s',))

AGENT_NOT_RUNNING = Kind(
    'agent-not-running', WARNING,
    'What others do to break0 and its routes is repaired only by the next '
    'ADD or DEL of a pod, not at once.',
    'Start the agent, beside kuryr-daemon and with the same kuryr.conf.',
    ('kuryr-break0 agent',))

AGENT_STUCK = Kind(
    'agent-stuck', ERROR,
    'It looks at least every [break0] resync_interval seconds, so it is '
    'stopped or hangs. Until it goes on, the node is repaired only by the '
    'next ADD or DEL of a pod.',
    'See what the process is doing. If it is stopped, let it go on; if it '
    'hangs, restart it, which a liveness probe of /livez does by itself.',
    ('fuser --verbose %(path)s',))

SANDBOX_GONE = Kind(
    'sandbox-gone', WARNING,
    'The namespaces of these pods do not exist any more, and their '
    'addresses are still routed to break0. Kuryr reports no DEL for a pod '
    'that the API has forgotten.',
    'Nothing, if it passes: the agent and each ADD and DEL clean up. Else '
    'do it at once.', (_SYNC,))

ADDRESS_REFUSED = Kind(
    'address-refused', ERROR,
    'To be routed through break0 it would have to be taken from whoever '
    'has it, so it is not.',
    'Take the address out of the allocation pools of the pod subnets, and '
    'create the pod again. An address of break0 itself is set by [break0] '
    'addr.',
    ('openstack subnet set --no-allocation-pool --allocation-pool '
     'start=FIRST,end=LAST SUBNET',))

ADDRESS_NOT_ALLOWED = Kind(
    'address-not-allowed', ERROR,
    'It gets no route, so the pod is not reachable from its node.',
    'Add the network to [break0] allowed_cidrs in kuryr.conf if it is one '
    'of pods, and restart kuryr-daemon and the agent.')

# break0 itself

PARENT_MISSING = Kind(
    'parent-missing', ERROR,
    'The pods are on it and break0 has to be on the same, so without it '
    'there are neither.',
    'See why it is gone. If it has another name now, set [binding] '
    'link_iface to that, and [break0] parent to the same or not at all.',
    ('ip -details link show',))

PARENT_DOWN = Kind(
    'parent-down', ERROR,
    'What is stacked on it sends nothing, so no pod is reachable.',
    'Set it up.', ('ip link set %(parent)s up',))

PARENT_MISMATCH = Kind(
    'parent-mismatch', ERROR,
    'A macvlan reaches only those that are on the same interface.',
    'Set [break0] parent to the interface of the pods or not at all, and '
    'restart kuryr-daemon and the agent. Without it, pods may be on several '
    'interfaces, and each gets a break0.')

BREAK0_MISSING = Kind(
    'break0-missing', ERROR,
    'All traffic between the node and its pods goes through it.',
    'Create it and set the routes again. If it goes again, something on the '
    'node deletes it: the agent logs when.',
    (_SYNC, 'ip monitor link'))

BREAK0_FOREIGN = Kind(
    'break0-foreign', ERROR,
    'It leads to no pod. Since somebody may use it, it is left as it is, and '
    'no pod becomes reachable.',
    'Delete it if nobody uses it, or set [break0] device to another name.',
    ('ip link delete %(device)s', _SYNC))

BREAK0_WRONG_PARENT = Kind(
    'break0-wrong-parent', ERROR,
    'A macvlan reaches only those that are on the same interface. It is '
    'left as it is, and no pod becomes reachable.',
    'Delete it, and let it be made on the interface of the pods.',
    ('ip link delete %(device)s', _SYNC))

BREAK0_DOWN = Kind(
    'break0-down', ERROR,
    'It carries nothing, and the kernel has deleted its routes.',
    'Set it up together with its routes. If it goes down again, something '
    'on the node does that.', (_SYNC, 'ip monitor link'))

BREAK0_MTU = Kind(
    'break0-mtu', WARNING,
    'Packets that are too large for one of the two are lost.',
    'Make it that of the parent.', (_SYNC,))

BREAK0_MAC = Kind(
    'break0-mac', ERROR,
    'Pods know break0 by its MAC address, and with the old one the kernel '
    'has dropped what it knew of theirs.',
    'Set the configured one, if there is one, and tell it to the pods.',
    (_SYNC,))

BREAK0_ADDRESSES = Kind(
    'break0-addresses', WARNING,
    'Pods reach break0 itself at the addresses of [break0] addr. Any other '
    'draws the routes of its prefix, and is answered for on the LAN.',
    'Put the configured addresses on it, and take off the others.')

BREAK0_ANSWERS_LAN = Kind(
    'break0-answers-lan', ERROR,
    'The LAN then learns two MAC addresses for the node. Where a port may '
    'use only its own, as with Neutron port security, traffic to the node '
    'is lost.',
    'Switch it off. If it comes back, it is in a file of sysctl.d.',
    ('sysctl -w %(key)s=%(value)d', 'grep -rs %(name)s /etc/sysctl.conf '
     '/etc/sysctl.d /run/sysctl.d /usr/lib/sysctl.d'))

BREAK0_HEARD = Kind(
    'break0-heard', WARNING,
    'Frames with its MAC address go out on the LAN: duplicate address '
    'detection, MLD reports, router solicitations. Switches learn it, and '
    'port security may count it as an attack.',
    'Make it quiet again. If it comes back, it is in a file of sysctl.d.',
    (_SYNC, 'grep -rsE "%(names)s" /etc/sysctl.conf /etc/sysctl.d '
     '/run/sysctl.d /usr/lib/sysctl.d'))

BREAK0_OPEN = Kind(
    'break0-open', WARNING,
    'Through break0 a pod has a link to its node that no port security sees. '
    'These settings keep it from using that in the name of others.',
    'Set them again, and find out what changes them.', (_SYNC,))

GUARD_MISSING = Kind(
    'guard-missing', WARNING,
    'The table of nftables lets in what comes from the MAC address and the '
    'address of a bound pod, and lets nothing of break0 leave on the wire. '
    'Without it a pod can speak to its node in the name of others.',
    'Load it again; the agent does so by itself. If it goes again, find out '
    'what flushes the ruleset.', (_SYNC,))

GUARD_UNAVAILABLE = Kind(
    'guard-unavailable', WARNING,
    'Sysctls alone do not keep a pod from speaking to its node in the name of '
    'another pod, nor by IPv6 in anybody\'s.',
    'Install nftables where kuryr-daemon and the agent run, or set [break0] '
    'guard to off if that is wanted.')

IPV6_DISABLED = Kind(
    'ipv6-disabled', ERROR,
    'These pods are not reachable from their node by IPv6.',
    'Enable IPv6 on it, and set the routes again. If it is off again later, '
    'look for disable_ipv6 in sysctl.d.',
    ('sysctl -w net/ipv6/conf/%(device)s/disable_ipv6=0', _SYNC))

# Routes and neighbours of the node

ROUTE_MISSING = Kind(
    'route-missing', ERROR,
    'The pod is not reachable from its node.',
    'Set the routes again. If they go again, see who deletes them.',
    (_SYNC, 'ip monitor route'))

ROUTE_WRONG = Kind(
    'route-wrong', ERROR,
    'By another scope, source address, interface or protocol number the pod '
    'may not be reached, or the route not be recognised as ours.',
    'Set the routes again. If they change again, see who does it.',
    (_SYNC, 'ip monitor route'))

ROUTE_FOREIGN = Kind(
    'route-foreign', ERROR,
    'It leads elsewhere, so the pod is not reachable from its node. It is '
    'left alone, since two programs that set one route would not stop.',
    'Delete it, and see which program has set it; or set [break0] takeover '
    '= true in kuryr.conf to have it replaced.',
    ('ip route show table all %(address)s', _SYNC))

ROUTE_STALE = Kind(
    'route-stale', WARNING,
    'No record says whose the address is, and no namespace that can be seen '
    'from here has it. It is not deleted, since a pod may have it all the '
    'same.',
    'If a pod has the address, find out why it is not seen: run the command '
    'where the namespaces of pods are seen, as in the container of '
    'kuryr-daemon. If none has, delete what is left.',
    ('kuryr-break0 sync --delete-unclaimed',))

ROUTE_NOT_USED = Kind(
    'route-not-used', ERROR,
    'The routes through break0 are there, but a rule or a more preferred '
    'table takes the traffic elsewhere.',
    'Change or delete the rule, or put one before it. Where [break0] '
    'route_table is not 254, a rule has to lead to it.',
    ('ip route get %(get)s', 'ip rule show', 'ip -6 rule show'))

NEIGHBOUR_MISSING = Kind(
    'neighbour-missing', WARNING,
    'The node has to ask for the pod by broadcast, which is heard on the '
    'LAN.',
    'Set them again. If they go again, see who deletes them.',
    (_SYNC, 'ip monitor neigh'))

NEIGHBOUR_WRONG = Kind(
    'neighbour-wrong', ERROR,
    'What the node sends goes to another MAC address than the pod has.',
    'Set them again. If they change again, see who does it.',
    (_SYNC, 'ip monitor neigh'))

NEIGHBOUR_STALE = Kind(
    'neighbour-stale', WARNING,
    'No record says whose the address is, and no namespace that can be seen '
    'from here has it. It is not deleted, since a pod may have it all the '
    'same.',
    'If a pod has the address, find out why it is not seen: run the command '
    'where the namespaces of pods are seen, as in the container of '
    'kuryr-daemon. If none has, delete what is left.',
    ('kuryr-break0 sync --delete-unclaimed',))

PACKET_DROPPED = Kind(
    'packet-dropped', ERROR,
    'Node and pod do not reach each other, though all that break0 needs is '
    'set.',
    'Let the rule pass what goes between the node and its pods by break0, '
    'which a probe shows in full.',
    ('kuryr-break0 probe %(address)s --trace',))

PROBE_UNANSWERED = Kind(
    'probe-unanswered', WARNING,
    'All that break0 needs is set, and no rule of nftables drops the ping. '
    'The pod may not answer pings, as by a sysctl.',
    'See whether a service of the pod is reached, by its port. If so, ignore '
    'this finding.', ('kuryr-break0 probe %(address)s --trace',))

# From the pod to its node

POD_NOT_CONFIGURED = Kind(
    'pod-not-configured', ERROR,
    'A pod that does not know the MAC address of its node has to ask: by '
    'IPv6 it gets no answer, and one that is out of date leads nowhere.',
    'Configure them.', (_SYNC,))

POD_UNREADABLE = Kind(
    'pod-unreadable', WARNING,
    'What the pod knows of its node could not be looked at.',
    'Run the doctor where the paths of the pods\' namespaces are seen, as '
    'in the container of kuryr-daemon. If the namespace is broken, delete '
    'the pod.')

POD_APART = Kind(
    'pod-apart', ERROR,
    'Only macvlans in bridge mode on one parent reach each other.',
    'Set its mode to bridge. Where it is on another parent, or is no macvlan, '
    'start the pod again.')

POD_DOWN = Kind(
    'pod-down', ERROR,
    'Nothing goes in or out by an interface that is down.',
    'Set it up. Only who has NET_ADMIN in the pod can have set it down. Going '
    'down it has lost routes and addresses of IPv6: let the agent, or a sync, '
    'configure it again.')

POD_ADDRESS_MISSING = Kind(
    'pod-address-missing', ERROR,
    'The pod does not answer for the address.',
    'Give it back, or start the pod again. If it has it no more on purpose, '
    'unbind it.')

POD_MAC = Kind(
    'pod-mac', ERROR,
    'The node sends to the MAC address that the pod had when it was bound.',
    'Give the pod its MAC address back, which Neutron expects too, or '
    'delete the pod.')

POD_NEIGHBOUR_MISSING = Kind(
    'pod-neighbour-missing', ERROR,
    'The pod has to ask for the MAC address of its node: by IPv6 it gets no '
    'answer.',
    'Tell it again. Only who has NET_ADMIN in the pod can have deleted it.')

POD_NEIGHBOUR_WRONG = Kind(
    'pod-neighbour-wrong', ERROR,
    'What the pod sends to its node does not arrive.',
    'Tell it again. Only who has NET_ADMIN in the pod can have changed it.')

POD_ROUTE_MISSING = Kind(
    'pod-route-missing', WARNING,
    'The node is outside the subnets of the pod, which goes by its gateway '
    'then, while the node answers directly. Firewalls on the way see half '
    'of it.',
    'Tell it again. Only who has NET_ADMIN in the pod can have deleted it.')

RP_FILTER = Kind(
    'rp-filter', ERROR,
    'The node is outside the subnets of the pod, which goes by its gateway. '
    'What comes back that way the node drops, since its own way to the pod '
    'is through break0 (rp_filter = 1).',
    'Tell the pod the way, for which it has to be bound with the path of its '
    'namespace; or let the node be lenient, with 2.')

ARP_IGNORED = Kind(
    'arp-ignored', ERROR,
    'These pods ask for the MAC address of their node by ARP, and break0 '
    'does not answer, since the address is on another interface.',
    'Set [break0] static_neighbours = true, bind pods with the path of '
    'their namespace, or let break0 answer: pods only, as arp_filter sees '
    'to.',
    ('sysctl -w net/ipv4/conf/%(where)s/arp_ignore=0',))

IPV6_NOT_CONFIGURED = Kind(
    'ipv6-not-configured', ERROR,
    'Without static_neighbours a pod asks for the MAC address of its node by '
    'multicast, which break0 does not hear: these pods do not reach their '
    'node by IPv6.',
    'Set [break0] static_neighbours = true in kuryr.conf, and restart '
    'kuryr-daemon and the agent.')

# Other programs of the node

NETWORKD_MANAGES = Kind(
    'networkd-manages-break0', ERROR,
    'systemd-networkd removes addresses and routes that it has not set from '
    'the interfaces that it manages.',
    'Let it leave break0 alone.',
    ("printf '[Match]\\nName=%(device)s\\n\\n[Link]\\nUnmanaged=yes\\n' "
     '> /etc/systemd/network/05-%(device)s.network', 'networkctl reload'))

NETWORKD_FOREIGN_ROUTES = Kind(
    'networkd-foreign-routes', WARNING,
    'As soon as a .network file matches break0, be it with a wildcard, '
    'systemd-networkd deletes its routes, and again at each restart.',
    'Let it leave alone what it has not set.',
    ('mkdir -p /etc/systemd/networkd.conf.d',
     "printf '[Network]\\nManageForeignRoutes=no\\n' "
     '> /etc/systemd/networkd.conf.d/kuryr-break0.conf',
     'systemctl restart systemd-networkd'))

NETWORKMANAGER_MANAGES = Kind(
    'networkmanager-manages-break0', ERROR,
    'NetworkManager removes addresses and routes that it has not set from '
    'the interfaces that it manages, and may take them down.',
    'Let it leave break0 alone, now and after the next boot.',
    ('nmcli device set %(device)s managed no',
     "printf '[keyfile]\\nunmanaged-devices+=interface-name:%(device)s\\n' "
     '> /etc/NetworkManager/conf.d/kuryr-break0.conf', 'nmcli general reload'))

FIREWALL_DROPS = Kind(
    'firewall-drops', ERROR,
    'What the node and its pods say to each other passes its input and '
    'output chains with break0 as the interface, and is dropped there.',
    'Put a rule before it that accepts what comes from and goes to break0.',
    ('%(accept)s',))

FIREWALL_RESTRICTS = Kind(
    'firewall-restricts', WARNING,
    'Some of what goes through break0 is dropped, be it on purpose.',
    'If it is not on purpose, put a rule before it that accepts what comes '
    'from and goes to break0.',
    ('%(accept)s',))

#: All there are, in the order in which they are looked for.
KINDS = tuple(value for value in list(globals().values())
              if isinstance(value, Kind))
