# SPDX-License-Identifier: Apache-2.0

"""Lets a node and the macvlan pods on its NICs reach each other.

The tables in doc/source/contributor/architecture.rst describe each module.
The following hazards have all occurred; each is handled in the named code.

The kernel

- The kernel deletes all routes of a break0 that is set down, all routes whose
  source address is removed from the node, and a break0 together with its
  parent: ``reconciler``.
- A renamed parent keeps its macvlans and its ifindex, so names in records are
  outdated: ``ledger.records``, ``devices.Names``.
- The kernel reuses the inode number of a deleted namespace, in about half of
  all cases. The path of a namespace can lead to a placeholder file or to
  another namespace. If a process may not see a namespace, as in a container,
  the kernel reports the namespace as gone: ``kernel.existence``.
- The kernel interrupts the dump of a table if the table changes meanwhile:
  ``kernel.netlink``.
- The kernel ignores an alias in the request that creates an interface. A
  macvlan without an address answers the LAN for the node's addresses, joins
  multicast groups and solicits routers: ``device``.
- A namespace outlives its interface. The next interface with that name has
  another MAC address, and the kernel attaches the nftables chain of the
  earlier interface to the next one: ``kernel.nft``, ``podside``.
- The kernel closes a netfilter socket only when deleted objects are freed,
  which takes 12 to 15 ms and blocks all other changes of nftables:
  ``kernel.nft``.
- In IPv6, the kernel accepts a second route to an address, and uses the route
  with the lower metric without an error: ``model.best_metric``.
- Closing a file ends all fcntl(2) locks that the process holds on the file. So
  a scrape of the metrics ended the lock of a sync: ``ledger.lock``.

Kuryr

- Kuryr selects the driver by the name of a class. If two entry points have the
  same name, the ADD of each pod fails: ``kuryr.os_vif_plugin``.
- For the DEL of an old sandbox, Kuryr passes the addresses of a new sandbox to
  the driver, or does not call the driver: ``claims.is_own``,
  ``manager.Break0Manager.housekeep``.
- If the path of a namespace is empty, Kuryr deletes eth0 of the node. If the
  path does not exist, Kuryr creates a namespace there: ``kuryr.driver``.
- A killed Kuryr process leaves an interface on the node. Kuryr deletes any
  interface whose name is in a KuryrPort: ``kuryr.pod_binding``.
- Kuryr reads all routes and neighbours of the node for each pod. If many pods
  are added at once, its IPDB fails: ``kuryr.patches``.

The ledger

- The ledger is wiped, is another directory in another container, dates from an
  earlier boot, has records of a wrong structure, or has no room for a record:
  ``reconciler``, ``ledger.identity``, ``ledger.records``.
- Two sandboxes claim one address: ``claims``, which keeps both claims.
- The clock is set back: ``ledger.files.now``.

Pods and other programs

- A pod changes the entries of its pod side, or its MAC address: ``podside``.
- A pod makes the kernel send thousands of events: ``agent.event_filter``,
  ``discovery.finder``.
- A container gives itself the address of another container, of the node or of
  the gateway: ``discovery.finder``, ``policy``.
- A runtime abandons an ADD and sends the DEL, although the ADD is completed
  later: ``agent.cni_server``.
- A container engine sends an answer with values of unexpected types:
  ``discovery.engines``.
"""
