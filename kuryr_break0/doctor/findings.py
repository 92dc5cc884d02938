# SPDX-License-Identifier: Apache-2.0

"""The texts of all findings of the doctor.

Each finding has an id that never changes, for alerts, runbooks and searches.
The other modules of this package decide whether it applies. The documentation
prints the texts as they are here.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Collection

#: Node and pods cannot reach each other, or soon will not.
ERROR = 'error'
#: They can, but that depends on something that may end, or it harms others.
WARNING = 'warning'
#: It may be intended. It does not change the exit status.
NOTE = 'note'
#: What to do first.
SEVERITIES = (ERROR, WARNING, NOTE)


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
    """Template of a finding; ``found()`` fills it in.

    :ivar when: the condition under which it is reported, for the
        documentation
    :ivar why: why it matters
    :ivar remedy: what to do about it
    :ivar commands: with fields of the form ``%(name)s``
    """

    id: str
    severity: str
    when: str
    why: str
    remedy: str
    commands: tuple[str, ...] = ()

    def found(self, seen: str, subjects: Collection[Any] = (),
              commands: Collection[str] = (), **fields: Any) -> Finding:
        """Make the finding.

        :param subjects: printed after ``seen``, the first of them
        :param commands: used instead of the commands of the kind
        :param fields: values for the fields of the commands
        """
        return Finding(
            self.id, self.severity, seen, self.why, self.remedy,
            tuple(commands) or tuple(command % fields
                                     for command in self.commands),
            tuple(map(str, subjects)))


_SYNC = 'kuryr-break0 sync'
_AGAIN = ('Sync sets them again. If that does not last, find out what changes '
          'them.')
_POD_AGAIN = ('Sync sets it again, and so does the agent by its timer. Only a '
              'process with NET_ADMIN in the pod can have changed it.')
_ELSEWHERE = ('If a pod has it, run this where its namespace is seen, as in '
              'the container of the agent. Otherwise delete the %s.')
_DELETE_UNCLAIMED = 'kuryr-break0 sync --delete-unclaimed'
_TRACE = 'kuryr-break0 probe %(address)s --trace'
#: What is left out where there is no Kuryr.
OF_KURYR = ', and kuryr-daemon if there is one'
_RESTART = 'Then restart the agent%s.' % OF_KURYR
_GREP = ('grep -rsE "%(names)s" /etc/sysctl.conf /etc/sysctl.d /run/sysctl.d '
         '/usr/lib/sysctl.d')
_UNMANAGED = (
    "printf '[Match]\\nName=%(device)s\\n\\n[Link]\\nUnmanaged=yes\\n' "
    '> /etc/systemd/network/05-%(device)s.network')

# Installation and options

ENTRY_POINT_MISSING = Kind(
    'entry-point-missing', ERROR,
    'An entry point of the driver is missing from the Python environment of '
    'this command, or is there twice.',
    'Kuryr does not load the driver, so the node cannot reach new pods.',
    'Install the package where kuryr-daemon runs, then restart that.',
    ('%(python)s -m pip install --force-reinstall --no-deps ./kuryr-break0',))

DRIVER_BROKEN = Kind(
    'driver-broken', ERROR,
    'The module of an entry point cannot be imported.',
    'Kuryr runs without the driver, so the node cannot reach new pods.',
    'Repair the installation until this succeeds, then restart kuryr-daemon.',
    ('%(python)s -c "import %(module)s"',))

DEPENDENCY_UNFIT = Kind(
    'dependency-unfit', ERROR,
    'A required package is missing or has an unsupported version.',
    'With pyroute2 0.8, for example, kuryr-daemon does not start.',
    'Install supported versions, then restart kuryr-daemon.',
    ('%(python)s -m pip install %(requirements)s',))

DAEMON_ELSEWHERE = Kind(
    'daemon-elsewhere', ERROR,
    'A kuryr-daemon runs from another Python environment than this command. '
    'One in another container is not seen.',
    'The driver must be installed in its environment, which was not examined.',
    'Install it there, restart kuryr-daemon, and run the doctor from there.',
    ('%(directory)s/python -m pip install ./kuryr-break0',
     '%(directory)s/kuryr-break0 doctor'))

DAEMON_NOT_RESTARTED = Kind(
    'daemon-not-restarted', WARNING,
    'kuryr-daemon was started before the package was installed.',
    'It still runs an earlier version of the driver, or none.',
    'Restart kuryr-daemon. Running pods are not affected.',
    ('kubectl --namespace kube-system rollout restart daemonset '
     'kuryr-cni-ds',))

OPTIONS_INVALID = Kind(
    'options-invalid', ERROR,
    'An option of [break0] has a value that is not allowed. The doctor ends '
    'here, with exit status 2.',
    'No pod is bound, so the node cannot reach new ones.',
    'Correct it in kuryr.conf, or in the environment variable that sets it. '
    + _RESTART)

OPTION_UNKNOWN = Kind(
    'option-unknown', WARNING,
    'A name in the section [break0], or an environment variable '
    'OS_BREAK0__NAME, is not an option.',
    'It has no effect: an option whose name is misspelt keeps its default.',
    'Correct the name, or delete the line.')

DISABLED = Kind(
    'disabled', WARNING,
    '[break0] enabled is false.',
    'No pod is bound, so the node cannot reach new ones.',
    'Set [break0] enabled = true in kuryr.conf. ' + _RESTART)

# State directory, records, lock and agent

STATE_DIR_UNUSABLE = Kind(
    'state-dir-unusable', ERROR,
    'state_dir, or where it would be created, is no writable directory.',
    'Without records, nothing is bound, repaired or examined.',
    'Make it writable for root, or set [break0] state_dir to another one.',
    ('ls -ld %(path)s', 'findmnt --target %(path)s'))

STATE_DIR_FULL = Kind(
    'state-dir-full', ERROR,
    'The file system of state_dir is full.',
    'No record can be written, so no new pod is bound.',
    'Find out what fills it, and make room.',
    ('df -h %(path)s', 'df -i %(path)s', 'du -a %(path)s'))

STATE_DIR_MODE = Kind(
    'state-dir-mode', WARNING,
    'state_dir belongs to another user than root, or others have access.',
    "Anyone who can write to it can redirect the node's traffic to a pod.",
    'Give access to root only.',
    ('chown root %(path)s', 'chmod 0700 %(path)s'))

STATE_DIR_PERSISTENT = Kind(
    'state-dir-persistent', WARNING,
    'state_dir is on a file system that survives a reboot.',
    'Pods do not, so addresses of pods that are gone stay routed to break0.',
    'While no pods run, set [break0] state_dir to /run/kuryr-break0.')

LEDGER_DAMAGED = Kind(
    'ledger-damaged', ERROR,
    'Records in state_dir cannot be read.',
    'Nothing is set or deleted for an address whose owner is unknown.',
    'Sync rebuilds them, if it finds their pods. Restart the others.',
    (_SYNC,))

LEDGER_QUARANTINED = Kind(
    'ledger-quarantined', WARNING,
    'Damaged records were moved to the directory quarantine in state_dir.',
    'Until their addresses are bound again, nothing is deleted for them.',
    'Find out what wrote to the state directory. Restart pods whose addresses '
    'status does not show. Then delete the files.',
    ('rm -r %(directory)s',))

LEDGER_LOST = Kind(
    'ledger-lost', ERROR,
    'A break0 belongs to a ledger that was in this state_dir and is gone.',
    'No record says which pod has which address, so nothing is repaired.',
    'Sync rebuilds the ledger from routes, neighbours and namespaces. Find '
    'out what emptied the directory.', (_SYNC,))

LEDGER_OTHER = Kind(
    'ledger-other', ERROR,
    'A break0 belongs to the ledger of another state_dir.',
    'What that ledger has bound is unknown here, so nothing is repaired.',
    'Use one [break0] state_dir everywhere, and mount it in each container. '
    'If the other ledger no longer exists, take over its break0.',
    (_SYNC + ' --claim',))

ADDRESS_CONTESTED = Kind(
    'address-contested', WARNING,
    'Several existing sandboxes claim one address.',
    'The node reaches the one that claimed it last.',
    'Delete the one that should not have it, as a duplicate KuryrPort.')

ADDRESS_TWICE = Kind(
    'address-twice', WARNING,
    'An interface that nobody has bound has the address of a bound pod too.',
    'The node reaches the bound one. Other hosts on the LAN may reach either.',
    'Remove the address from the one that should not have it.')

LEDGER_NEWER = Kind(
    'ledger-newer', ERROR,
    'Records have the format of a later version.',
    'Nothing is set or deleted for their addresses.',
    'Install the later version again, or delete the files and restart their '
    'pods.',
    ('%(python)s -m pip install --upgrade ./kuryr-break0',))

LOCK_HELD = Kind(
    'lock-held', ERROR,
    'The lock of state_dir was not free for two seconds.',
    'No pod can be bound or unbound meanwhile, and nothing be repaired.',
    'Find out what the process does. If it is stopped, let it continue. If it '
    'hangs, kill it: the kernel then frees the lock.',
    ('fuser --verbose %(path)s',))

AGENT_NOT_RUNNING = Kind(
    'agent-not-running', WARNING,
    'No kuryr-break0 agent uses this state_dir.',
    'No container is discovered, and little is repaired.',
    'Start the agent, with the configuration of this command.',
    ('%(start)s',))

AGENT_STUCK = Kind(
    'agent-stuck', ERROR,
    'The agent has not completed a sync for three times [break0] '
    'resync_interval and 10 seconds.',
    'It is stopped or hangs, so nothing is repaired or discovered.',
    'Find out what the process does. If it is stopped, let it continue. If it '
    'hangs, restart it, as a liveness probe of /livez does.',
    ('fuser --verbose %(path)s',))

SANDBOX_GONE = Kind(
    'sandbox-gone', WARNING,
    'Records belong to sandboxes whose namespaces no longer exist.',
    'Their addresses are still routed to break0.',
    'Sync deletes their routes, as the agent does by itself.', (_SYNC,))

SANDBOX_UNKNOWN = Kind(
    'sandbox-unknown', WARNING,
    'This process cannot find out whether the sandbox of a record exists.',
    'Its address stays routed to break0, even if the pod is gone.',
    'Run kuryr-break0 with CAP_SYS_ADMIN in the first process namespace '
    '(hostPID), or mount the directory of namespaces with HostToContainer.')

ADDRESS_REFUSED = Kind(
    'address-refused', ERROR,
    'A pod has an address of the node, or of a next hop of its routes.',
    'A route to the pod would take the address from its holder.',
    'Take the address out of the allocation pools of the pod subnets, and '
    'create the pod again. To give break0 an address, use [break0] addr.',
    ('openstack subnet set --no-allocation-pool --allocation-pool '
     'start=FIRST,end=LAST SUBNET',))

ADDRESS_NOT_ALLOWED = Kind(
    'address-not-allowed', ERROR,
    'A pod has an address outside of [break0] allowed_cidrs.',
    'The address gets no route, so the node cannot reach the pod.',
    'If the network is one of pods, add it to [break0] allowed_cidrs in '
    'kuryr.conf. ' + _RESTART)

# Containers that are not bound

CONTAINER_NOT_DISCOVERED = Kind(
    'container-not-discovered', ERROR,
    'A container has a macvlan on an interface of the node, and nobody binds '
    'its addresses: [break0] discover is false, or no agent is running.',
    'The node cannot reach the container, nor the container the node.',
    'Let the agent discover containers in these networks. In Kubernetes, bind '
    'pods that ran before the installation with adopt.')

CONTAINER_NOT_ALLOWED = Kind(
    'container-not-allowed', ERROR,
    'The address of a container is outside of [break0] allowed_cidrs, or is '
    'no address of a single host.',
    'It is not bound, because a container can give itself any address.',
    'If the network is one of containers, add it to [break0] allowed_cidrs in '
    'kuryr.conf. ' + _RESTART)

CONTAINER_OTHER_PARENT = Kind(
    'container-other-parent', ERROR,
    'The macvlan of a container is on another interface than [break0] parent.',
    'Only containers on that interface are bound.',
    'Set parent in kuryr.conf, or remove it for all interfaces. If these '
    'containers are not to be reached, ignore this finding. ' + _RESTART)

CONTAINER_MODE = Kind(
    'container-mode', ERROR,
    'The macvlan of a container is in private, vepa, passthru or source mode.',
    'Only macvlans in bridge mode reach each other, and break0 is one.',
    'Set the mode to bridge, now and where the container is configured. '
    'Docker: docker network create --opt macvlan_mode=bridge. LXC, whose '
    'default is private: lxc.net.0.macvlan.mode = bridge. Podman, CNI: '
    '"mode": "bridge". In passthru mode, restart the container afterwards.')

CONTAINER_REFUSED = Kind(
    'container-refused', ERROR,
    'The address of a container is one of the node, a next hop, or belongs '
    'to another host.',
    'A route to the container would take the address from its holder.',
    'Give the container another address.')

CONTAINER_PENDING = Kind(
    'container-pending', WARNING,
    'A container has a macvlan on an interface of the node without an '
    'address, with one that duplicate address detection has not passed, or '
    'that the agent has not bound for a second.',
    'Until it is bound, the node cannot reach the container.',
    'Look at the log of the agent or, without an address, at the DHCP client.')

# break0 and its parent

PARENT_MISSING = Kind(
    'parent-missing', ERROR,
    'The interface that pods are on, or that [break0] parent names, does not '
    'exist.',
    'Pods and break0 are macvlans on it, and do not exist without it.',
    'Find out why it is gone. If it was renamed, set [binding] link_iface to '
    'the new name, and [break0] parent to the same name or not at all.',
    ('ip -details link show',))

PARENT_DOWN = Kind(
    'parent-down', ERROR,
    'The interface that the pods are on is down, or has no carrier.',
    'Macvlans on it send and receive nothing, not even to each other.',
    'Bring it up. If it has no carrier, look at the cable, the members of the '
    'bond, or the ports of the bridge.', ('ip link set %(parent)s up',))

PARENT_MISMATCH = Kind(
    'parent-mismatch', ERROR,
    'Pods are on another interface than [break0] parent.',
    'A macvlan reaches only macvlans on the same interface.',
    'Set [break0] parent to the interface of the pods, or remove the option: '
    'then each interface with pods gets its own break0. ' + _RESTART)

PARENT_VRF = Kind(
    'parent-vrf', ERROR,
    'The interface that the pods are on is in a VRF, and [break0] '
    'route_table is not the table of that VRF.',
    'In a VRF only its own table is used.',
    'Set [break0] route_table in kuryr.conf to the table of the VRF, and run '
    'the command. All parents of a node must be in one VRF. ' + _RESTART,
    ('OS_BREAK0__ROUTE_TABLE=%(table)d ' + _SYNC,))

BREAK0_MISSING = Kind(
    'break0-missing', ERROR,
    'Addresses are bound, but break0 does not exist.',
    'All traffic between the node and its pods goes through it.',
    'Sync creates it and sets the routes again. If it disappears again, '
    'another program deletes it: the agent logs when.',
    (_SYNC, 'ip monitor link'))

BREAK0_FOREIGN = Kind(
    'break0-foreign', ERROR,
    'The interface with this name is not a macvlan in bridge mode.',
    'It leads to no pod. It may be in use, so it is left as it is.',
    'Delete it if nobody uses it, or set [break0] device to another name.',
    ('ip link delete %(device)s', _SYNC))

BREAK0_WRONG_PARENT = Kind(
    'break0-wrong-parent', ERROR,
    'break0 is on another interface than the pods.',
    'A macvlan reaches only macvlans on the same interface.',
    'Delete it. Sync creates it on the interface of the pods.',
    ('ip link delete %(device)s', _SYNC))

BREAK0_DOWN = Kind(
    'break0-down', ERROR,
    'break0 is down.',
    'It carries no traffic, and the kernel has deleted its routes.',
    'Sync brings it up and sets the routes again. If it goes down again, '
    'another program does that.', (_SYNC, 'ip monitor link'))

BREAK0_VRF = Kind(
    'break0-vrf', ERROR,
    'break0 is not in the VRF of its parent, or in one and its parent is not.',
    'The node does not accept what pods send to its addresses.',
    'Sync corrects that, and sets the routes again.', (_SYNC,))

BREAK0_MTU = Kind(
    'break0-mtu', WARNING,
    'The MTU of break0 differs from that of its parent.',
    'Packets larger than the smaller MTU are lost.',
    'Sync sets the MTU of the parent.', (_SYNC,))

BREAK0_MAC = Kind(
    'break0-mac', ERROR,
    'The MAC address of break0 is not the one that pods were configured with.',
    'Pods send to the MAC address that they were configured with.',
    'Sync sets it again.',
    (_SYNC,))

UDEV_SETS_MAC = Kind(
    'udev-sets-mac', WARNING,
    'A .link file of systemd-udevd matches break0 and sets a MAC address.',
    'Whenever break0 is created, udev changes its MAC address afterwards. '
    'Until the next sync, pods send to the old one.',
    'Give break0 its own .link file, which comes first and changes nothing.',
    ("printf '[Match]\\nOriginalName=%(device)s\\n\\n[Link]\\n"
     "MACAddressPolicy=none\\n' "
     '> /etc/systemd/network/05-%(device)s.link', 'udevadm control --reload'))

BREAK0_ADDRESSES = Kind(
    'break0-addresses', WARNING,
    'break0 has an address that is not in [break0] addr, or lacks one, or the '
    'one that the node masquerades with.',
    'Pods reach break0 at these addresses. Any other attracts '
    'traffic to its prefix, and the LAN gets answers for it.',
    'Delete the other addresses. Sync adds those that are missing.')

BREAK0_ADDR_STALE = Kind(
    'break0-addr-stale', WARNING,
    'No other interface of the node has an address of [break0] addr, and it '
    'is in no network of the parent, or another host on the LAN has it.',
    'The node had it when addr was set. Now it answers the LAN for an address '
    'that is not its own.',
    'Set [break0] addr in kuryr.conf to addresses that the node has, or not '
    'at all. ' + _RESTART + ' Then delete the old one.',
    ('ip address delete %(address)s dev %(device)s',))

BREAK0_ANSWERS_LAN = Kind(
    'break0-answers-lan', ERROR,
    'break0 answers ARP requests from the LAN for addresses of the node '
    '(arp_filter = 0), or for all addresses that the node has a route to '
    '(proxy_arp = 1).',
    'The LAN learns two MAC addresses for the node. If the port accepts only '
    'its own, as with port security of Neutron, traffic to the node is lost.',
    'Set the sysctl. If it changes again, look for it in files of sysctl.d.',
    ('sysctl -w %(key)s=%(value)d', _GREP))

BREAK0_HEARD = Kind(
    'break0-heard', WARNING,
    'A setting of break0 makes it send on the LAN: multicast, addr_gen_mode, '
    'accept_ra, force_mld_version, forwarding.',
    'Switches learn its MAC address. Port security may call that an attack.',
    'Sync sets it again. If that does not last, look into files of sysctl.d.',
    (_SYNC, _GREP))

BREAK0_OPEN = Kind(
    'break0-open', WARNING,
    'Sysctls of break0 that protect the node were changed: rp_filter, '
    'accept_redirects and others.',
    'A pod can use the addresses of others: port security sees none of it.',
    'Sync sets them again. Find out what changes them.', (_SYNC, _GREP))

GUARD_MISSING = Kind(
    'guard-missing', WARNING,
    'The nftables table of break0 is missing, was changed, or does not admit '
    'exactly the bound pods.',
    'Without it a pod can use the addresses of another one, and frames of '
    'break0 can get on the wire. It is an error if a pod is not admitted.',
    'Sync loads it again. If that does not last, find out what flushes it.',
    (_SYNC,))

GUARD_UNAVAILABLE = Kind(
    'guard-unavailable', WARNING,
    'The program nft is not installed, and [break0] guard is auto.',
    'Sysctls alone do not stop a pod from using the addresses of another one.',
    'Install nftables where the agent runs%s. If you do not want the guard, '
    'set [break0] guard = off.' % OF_KURYR)

EGRESS_UNGUARDED = Kind(
    'egress-unguarded', WARNING,
    'The guard cannot see what leaves an interface, which needs Linux 5.16.',
    'A pod can use both addresses of another pod towards the node, and VMs '
    'cannot reach the node by IPv6.',
    'Use Linux 5.16 or later where pods are not trusted.')

IPV6_DISABLED = Kind(
    'ipv6-disabled', ERROR,
    'disable_ipv6 of break0 is 1, and pods have IPv6 addresses.',
    'The node cannot reach these pods by IPv6.',
    'Enable it. If that does not last, look for it in files of sysctl.d.',
    ('sysctl -w net/ipv6/conf/%(device)s/disable_ipv6=0', _SYNC))

SECOND_MACVLAN = Kind(
    'second-macvlan', WARNING,
    'The node has another macvlan in bridge mode on the interface of the '
    'pods that answers ARP requests for all addresses of the node.',
    'The LAN learns its MAC address for the node. If the port accepts only '
    'its own, as with port security of Neutron, traffic to the node is lost.',
    'If its purpose is that of break0, delete it. Otherwise let it answer for '
    'its own addresses only.',
    ('ip -details address show dev %(other)s',
     'sysctl -w net/ipv4/conf/%(other)s/arp_filter=1'))

# Routes and neighbours of the node

NODE_ADDRESS_MISSING = Kind(
    'node-address-missing', ERROR,
    'Pods have addresses of a version of IP of which the node has none.',
    'The node has no address to send from that pods can answer.',
    'Give the node its address again, on the interface of the pods.',
    ('ip address add ADDRESS/LENGTH dev %(parent)s',))

ROUTE_MISSING = Kind(
    'route-missing', ERROR,
    'The address of a pod has no route through break0.',
    'The node cannot reach the pod.',
    'Sync sets the routes again. If they disappear again, find out which '
    'program deletes them.',
    (_SYNC, 'ip monitor route'))

ROUTE_WRONG = Kind(
    'route-wrong', ERROR,
    'The route of a pod is not as it was set.',
    'The node may not reach the pod, or not know the route as its own later.',
    _AGAIN, (_SYNC, 'ip monitor route'))

ROUTE_FOREIGN = Kind(
    'route-foreign', ERROR,
    'The address of a pod has a route in our table that another program set.',
    'It leads elsewhere, so the node cannot reach the pod. It is not '
    'replaced: two programs that set the same route would never stop.',
    'Find out which program set it, then delete it. To have such routes '
    'replaced, set [break0] takeover = true in kuryr.conf.')

ROUTE_STALE = Kind(
    'route-stale', WARNING,
    'A route has our protocol number, and no record claims its address.',
    'A pod whose namespace is not seen from here may have the address.',
    _ELSEWHERE % 'route', (_DELETE_UNCLAIMED,))

ROUTE_NOT_USED = Kind(
    'route-not-used', ERROR,
    'The route of a pod exists, but the kernel would use another one.',
    'A routing rule, or a table that comes first, leads elsewhere.',
    'Change or delete the rule, or add a rule before it. If [break0] '
    'route_table is not 254, a rule must lead to that table.',
    ('ip route get %(get)s', 'ip %(family)s route show table all %(address)s',
     'ip %(family)s rule show'))

NEIGHBOUR_MISSING = Kind(
    'neighbour-missing', WARNING,
    'The address of a pod has no permanent neighbour on break0.',
    'The node asks for the MAC address of the pod on the LAN.',
    _AGAIN, (_SYNC, 'ip monitor neigh'))

NEIGHBOUR_WRONG = Kind(
    'neighbour-wrong', ERROR,
    'The neighbour of a pod on break0 has another MAC address than the pod.',
    'The node sends to a MAC address that the pod does not have.',
    _AGAIN, (_SYNC, 'ip monitor neigh'))

NEIGHBOUR_STALE = Kind(
    'neighbour-stale', WARNING,
    'A permanent neighbour on break0 has our protocol number, and no record '
    'claims its address.',
    'A pod whose namespace is not seen from here may have the address.',
    _ELSEWHERE % 'neighbour', (_DELETE_UNCLAIMED,))

PACKET_DROPPED = Kind(
    'packet-dropped', ERROR,
    'A ping between node and pod is not answered, and a rule in the pod drops '
    'it. At most 128 pods are pinged.',
    'Node and pod cannot reach each other, but break0 is as it should be.',
    'Let the rule in the pod accept traffic between the pod and its node.',
    (_TRACE,))

PACKET_LOST = Kind(
    'packet-lost', ERROR,
    'A ping between node and pod does not arrive, or is sent elsewhere, and '
    'no rule of a firewall drops it.',
    'Node and pod cannot reach each other: a route in the pod, a routing '
    'rule, a firewall mark, a sysctl or a queue (tc) is in the way.',
    'Look at routes, rules and queues, on the node and in the pod. The probe '
    'shows where packets were seen.',
    ('ip rule show', 'tc qdisc show', _TRACE))

ADDRESS_DUPLICATE = Kind(
    'address-duplicate', ERROR,
    'A ping between node and pod is not answered, nothing else explains it, '
    'and another host on the LAN says that it has the address.',
    'Other hosts, and the node, may reach either.',
    'Find the host with this MAC address. Give one of them another address.',
    ('kuryr-break0 probe %(address)s --conflict',))

PROBE_UNANSWERED = Kind(
    'probe-unanswered', WARNING,
    'A ping between node and pod arrives, but is not answered.',
    'break0 is as it should be. Who was pinged may not answer pings.',
    'Probe a service with --tcp PORT. If it answers, ignore this finding.',
    (_TRACE,))

# From the pod to its node

POD_NOT_CONFIGURED = Kind(
    'pod-not-configured', ERROR,
    'A pod is not configured with the addresses of the node, or with '
    'addresses that it no longer has.',
    'The pod has to ask for the node, which by IPv6 only the guard answers, '
    'or sends to an outdated MAC address.',
    'Sync configures the pods.', (_SYNC,))

SOLICITATIONS_UNANSWERED = Kind(
    'solicitations-unanswered', ERROR,
    'An IPv6 address is bound without a namespace, as that of a VM, and no '
    'guard answers it for the node.',
    'The VM asks for the MAC address of the node, and only the guard answers. '
    'It needs the program nft, and Linux 5.16 or later.',
    'Install nftables, do not set [break0] guard to off, and run a sync. '
    'Bind a container with --netns.', (_SYNC,))

POD_UNREADABLE = Kind(
    'pod-unreadable', WARNING,
    'The namespace of a pod cannot be entered, or has no interface of the '
    'recorded name.',
    'The pod could not be examined.',
    'If the interface was renamed or replaced, start the agent, which follows '
    'that, or bind the pod again. If the namespace is not seen from here, run '
    'the doctor where it is, for example in the container of the agent.')

POD_APART = Kind(
    'pod-apart', ERROR,
    'The interface of a pod is not a macvlan in bridge mode on its recorded '
    'parent.',
    'Only macvlans in bridge mode on the same parent reach each other.',
    'Set its mode to bridge or, if that is not what differs, restart the pod.')

POD_DOWN = Kind(
    'pod-down', ERROR,
    'The interface of a pod is down.',
    'It sends and receives nothing.',
    'Bring it up: what it lost, a sync sets again. Only a process with '
    'NET_ADMIN in the pod can have brought it down.')

POD_ADDRESS_MISSING = Kind(
    'pod-address-missing', ERROR,
    'The interface of a pod lacks an address that is bound for it.',
    'The pod does not answer for the address.',
    'Add it again, or restart the pod. If that was on purpose, unbind it.')

POD_MAC = Kind(
    'pod-mac', ERROR,
    'The interface of a pod has another MAC address than when it was bound.',
    'The node sends to the MAC address that the pod had when it was bound.',
    'Set it again, since Neutron expects it too, or delete the pod.')

POD_NEIGHBOUR_MISSING = Kind(
    'pod-neighbour-missing', ERROR,
    'A pod has no neighbour for an address of the node.',
    'The pod asks for the MAC address of its node: by IPv6 without an answer.',
    _POD_AGAIN, (_SYNC,))

POD_NEIGHBOUR_WRONG = Kind(
    'pod-neighbour-wrong', ERROR,
    'In a pod, the neighbour of an address of the node has another MAC '
    'address than break0.',
    'Packets from the pod to its node do not arrive.',
    _POD_AGAIN, (_SYNC,))

POD_ROUTE_MISSING = Kind(
    'pod-route-missing', WARNING,
    'A pod needs a route of its own to its node, and has none.',
    'The pod sends by its gateway, and the node answers directly. Firewalls '
    'on the way see half of the traffic. It is an error without a gateway.',
    _POD_AGAIN, (_SYNC,))

RP_FILTER = Kind(
    'rp-filter', ERROR,
    'A pod in another subnet than its node has no route of its own to it, '
    'and rp_filter of the interface of the pods is 1.',
    'The pod sends by its gateway. The node drops what comes that way, since '
    'its own route to the pod is through break0.',
    'Bind the pod with the path of its namespace, so that it gets a route to '
    'the node. Or set rp_filter to 2.')

ARP_IGNORED = Kind(
    'arp-ignored', ERROR,
    'arp_ignore of "all" or of break0 is set, as kube-proxy does in IPVS '
    'mode, and pods have to ask for their node: they could not be configured, '
    'or were bound without a namespace.',
    'break0 does not answer these pods by ARP, because the address of the '
    'node is on another interface.',
    'Bind pods with the path of their namespace. Or let break0 answer: it '
    'answers only pods.',
    ('sysctl -w net/ipv4/conf/%(where)s/arp_ignore=0',))

# Other programs of the node

NETWORKD_MANAGES = Kind(
    'networkd-manages-break0', ERROR,
    'systemd-networkd has configured break0, by its state in '
    '/run/systemd/netif/links.',
    'It removes addresses and routes that it did not set.',
    'Let it ignore break0.', (_UNMANAGED, 'networkctl reload'))

NETWORKD_FOREIGN_ROUTES = Kind(
    'networkd-foreign-routes', WARNING,
    'A .network file of systemd-networkd matches break0, as one with a '
    'wildcard, and ManageForeignRoutes is not switched off.',
    'It deletes the routes of interfaces that it manages, at each restart.',
    'Let it ignore break0, and keep routes that it did not set.',
    (_UNMANAGED, 'mkdir -p /etc/systemd/networkd.conf.d',
     "printf '[Network]\\nManageForeignRoutes=no\\n' "
     '> /etc/systemd/networkd.conf.d/kuryr-break0.conf',
     'systemctl restart systemd-networkd'))

NETWORKMANAGER_MANAGES = Kind(
    'networkmanager-manages-break0', ERROR,
    'NetworkManager manages break0, by its state in '
    '/run/NetworkManager/devices.',
    'It removes routes that it did not set, and may bring break0 down.',
    'Let it ignore break0, now and after the next boot.',
    ('nmcli device set %(device)s managed no',
     "printf '[keyfile]\\nunmanaged-devices+=interface-name:%(device)s\\n' "
     '> /etc/NetworkManager/conf.d/kuryr-break0.conf', 'nmcli general reload'))

FIREWALL_DROPS = Kind(
    'firewall-drops', ERROR,
    'A ping between node and pod is not answered, and a rule of the node '
    'drops it, by the trace of nftables or the counters of iptables.',
    'Traffic between the node and its pods passes the input and output '
    'chains with break0 as the interface.',
    'Add a rule before it that accepts traffic through break0.', (_TRACE,))

SOURCE_REWRITTEN = Kind(
    'source-rewritten', WARNING,
    'A pod sees another source address than the one that the node sends '
    'from, because of a MASQUERADE or SNAT rule. It is an error if the pod '
    'has no way back to that address, so that pings are not answered.',
    'The rule matches what the node itself sends, and not only what it '
    'forwards.',
    'Add a rule before it that excepts break0.', (_TRACE,))

SOURCE_KEPT = Kind(
    'source-kept', NOTE,
    'The node forwards packets, and a MASQUERADE or SNAT rule names the '
    'parent as the interface that they leave by, but none names break0.',
    'What the node forwards to its pods, as for clients of a VPN, leaves by '
    'break0, so the rule does not match it. Pods answer by their gateway, '
    'unless that has a route to the clients.',
    'If such clients do not reach pods, add the same rule for break0, but for '
    'what the node itself sends.', ('%(command)s',))

FIREWALL_RESTRICTS = Kind(
    'firewall-restricts', NOTE,
    'The firewall of the node, or of a pod, drops a connection of the pod to '
    'a TCP port on which nobody listens. Or that of the node drops pings of '
    'pods, but not connections to its services.',
    'Most firewalls accept only chosen ports, so this may be intended.',
    'If pods need more services of the node, such as DNS, accept their ports, '
    'or all that comes through break0.')

# Before the installation

CAPABILITY_MISSING = Kind(
    'capability-missing', ERROR,
    'kuryr-break0 check runs without CAP_NET_ADMIN or CAP_SYS_ADMIN.',
    'Interfaces and routes cannot be set, or namespaces not entered.',
    'Run it as root, in a container with these capabilities.')

CAPABILITY_USEFUL = Kind(
    'capability-useful', WARNING,
    'kuryr-break0 check runs without CAP_NET_RAW or CAP_NET_BROADCAST.',
    'Probes need NET_RAW. Without NET_BROADCAST, discovery has to poll.',
    'Give it these capabilities if you use these functions.')

KERNEL_OLD = Kind(
    'kernel-old', WARNING,
    'The kernel is older than 4.20.',
    'It cannot filter dumps, so they take longer.',
    'Use a later kernel on nodes with many routes.')

MACVLAN_IMPOSSIBLE = Kind(
    'macvlan-impossible', ERROR,
    'No macvlan can be created on the interface of the containers.',
    'break0 is a macvlan.',
    'Load the module. On another macvlan, or the loopback, none can be.',
    ('modprobe macvlan',))

PROTOCOL_TAKEN = Kind(
    'protocol-taken', ERROR,
    'Routes of other programs have the number of [break0] route_protocol.',
    'By this number break0 knows its own routes.',
    'Set [break0] route_protocol in kuryr.conf to a number that no other '
    'program uses.')

SYSCTLS_READ_ONLY = Kind(
    'sysctls-read-only', ERROR,
    'The sysctls of the network cannot be written.',
    'Without them break0 would speak on the LAN.',
    'In a container, mount /proc/sys/net of the node elsewhere, and name that '
    'by [break0] sysctl_dir.')

NAMESPACES_UNSEEN = Kind(
    'namespaces-unseen', WARNING,
    'kuryr-break0 check sees no network namespace besides that of the node.',
    'Pods in namespaces that are not seen cannot be configured.',
    'If containers run, mount the directory of their namespaces with '
    'HostToContainer: mount it at /run/netns.')

DROP_IN_MISSING = Kind(
    'drop-in-missing', NOTE,
    'systemd-networkd or NetworkManager is there, and no file tells it to '
    'leave break0 alone.',
    'When one of its files matches break0, it removes what it has not set.',
    'Install the drop-in of the project.', ('%(command)s',))

ENGINE_NOT_DISCOVERED = Kind(
    'engine-not-discovered', NOTE,
    'A container engine is there, and [break0] discover is false.',
    'Its containers are bound only by the CNI plugin or by hand.',
    'To have them found, set discover and allowed_cidrs of [break0] in '
    'kuryr.conf.')

#: All there are, in the order in which they are looked for.
KINDS = tuple(value for value in list(globals().values())
              if isinstance(value, Kind))
