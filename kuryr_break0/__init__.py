# SPDX-License-Identifier: Apache-2.0

"""Lets a node and the macvlan pods on its NICs reach each other.

Each module is one row of the table in doc/source/contributor/architecture.rst.
Below are the hazards that have really happened, and where each is handled.

The kernel

- It deletes all routes of a break0 that goes down, all routes whose source
  address leaves the node, and break0 with its parent: ``reconciler``.
- It keeps the macvlans and the ifindex of a parent that is renamed, so names
  in records are old: ``ledger.records``, ``devices.Names``.
- It uses inode numbers of namespaces again, in about half of all cases, and a
  path can be a placeholder or another namespace's. It calls a namespace that
  a process may not see gone, as in a container: ``kernel.existence``.
- It interrupts the dump of a table that changes: ``kernel.netlink``.
- It ignores an alias at creation; a macvlan without an address answers the
  LAN for the node's addresses, joins groups, asks for routers: ``device``.
- A namespace outlives its interface, and the next one there has another MAC
  address; a chain of nftables is attached to it too: ``kernel.nft``,
  ``podside``.
- Closing a netfilter socket waits about 15 ms until deleted objects are freed,
  and blocks all other changes of nftables: ``kernel.nft``.
- In IPv6 a route with a lower metric wins silently: ``model.best_metric``.
- Closing a file ends all locks of fcntl(2) that the process has on it. So a
  scrape ended the lock of a sync: ``ledger.lock``.

Kuryr

- It chooses the driver by the name of a class, and two entry points of one
  name fail each pod: ``kuryr.os_vif_plugin``.
- For the DEL of an old sandbox, it passes the addresses of a new sandbox to
  the driver, or does not call the driver: ``claims.is_own``,
  ``manager.Break0Manager.housekeep``.
- An empty namespace path makes it delete eth0 of the node, and one that is
  gone makes it create one: ``kuryr.driver``.
- If it is killed, it leaves an interface on the node. It deletes any interface
  that has the name in a KuryrPort: ``kuryr.pod_binding``.
- It reads all routes and neighbours of the node for each pod, and its IPDB
  fails in bursts: ``kuryr.patches``.

The ledger

- It is wiped, is another directory in another container, is of an earlier
  boot, has records of the wrong shape, or no room for one: ``reconciler``,
  ``ledger.identity``, ``ledger.records``.
- Two sandboxes claim one address: ``claims``, which keeps both.
- The clock is set back: ``ledger.files.now``.

Others on the node

- A pod changes its own entries or MAC address: ``podside``.
- A pod makes the kernel send thousands of events: ``agent.event_filter``,
  ``discovery.finder``.
- A container gives itself the address of another one, of the node or of the
  gateway: ``discovery.finder``, ``policy``.
- A runtime gives up a request that is done all the same, and sends a DEL
  before: ``agent.cni_server``.
- A container engine answers with parts of other types: ``discovery.engines``.
"""
