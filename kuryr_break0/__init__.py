# SPDX-License-Identifier: Apache-2.0

"""Enables traffic between a node and its macvlan pods.

The kernel blocks this traffic: a macvlan does not reach its parent.

The tables in doc/source/contributor/architecture.rst describe each module.
Each of the following hazards has occurred. The code after the colon handles
it.

The kernel

- If break0 is set down, the kernel deletes its routes. If the node loses an
  address, the kernel deletes the routes with this source address. If the
  parent is deleted, the kernel deletes its break0 too: ``reconciler``.
- If the parent is renamed, its macvlans and its ifindex stay, but the records
  contain the old name: ``ledger.records``, ``devices.Names``.
- The kernel reuses the inode number of a deleted namespace, in about half of
  all cases. The path of a namespace can lead to another kind of file or to
  another namespace. If a process may not see a namespace, as in a container,
  the kernel reports the namespace as gone: ``kernel.existence``.
- If a table changes during its dump, the dump can lack entries
  (NLM_F_DUMP_INTR): ``kernel.netlink``.
- The kernel ignores an alias in the request that creates an interface. A
  macvlan without an address answers ARP requests of the LAN for the node's
  addresses, joins multicast groups and solicits routers: ``device``.
- A namespace outlives its interface. The next interface with that name has
  another MAC address, and the kernel attaches the nftables chain of the
  earlier interface to the next one: ``kernel.nft``, ``podside``.
- close(2) of a netfilter socket waits until the kernel has freed deleted
  objects. Meanwhile, the kernel accepts no other change of nftables:
  ``kernel.nft``.
- In IPv6, the kernel accepts a second route to an address, and uses the route
  with the lower metric without an error: ``model.best_metric``.
- If a process closes a file, the kernel releases all fcntl(2) locks of the
  process on this file. For example, a scrape of the metrics released the lock
  of a sync: ``ledger.lock``.

Kuryr

- Kuryr selects the driver by the class name of the VIF. If two entry points
  have this name, the ADD of each pod fails: ``kuryr.os_vif_plugin``.
- For the DEL of an old sandbox, Kuryr passes the addresses of a new sandbox to
  the driver, or does not call the driver: ``claims.is_own``,
  ``manager.Break0Manager.housekeep``.
- If the path of a namespace is empty, Kuryr deletes eth0 of the node. If the
  path does not exist, Kuryr creates a namespace there: ``kuryr.driver``.
- A killed Kuryr process leaves an interface on the node. Kuryr deletes any
  interface whose name is in a KuryrPort: ``kuryr.pod_binding``.
- Kuryr reads all routes and neighbours of the node for each pod. If many pods
  are added at once, Kuryr's IPDB fails: ``kuryr.patches``.

The ledger

- The ledger is wiped or dates from an earlier boot. Two containers see
  different directories at the path of the ledger. A record is damaged, or the
  file system is full: ``reconciler``, ``ledger.identity``, ``ledger.records``.
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
