# SPDX-License-Identifier: Apache-2.0

"""A whole Kubernetes cluster with Kuryr and Neutron, in namespaces.

The cluster runs the real programs: etcd, the programs of Kubernetes,
containerd, MariaDB, Neutron, and Kuryr's controller, daemon and CNI plugin.
Two parts are stand-ins: a mechanism driver of Neutron that binds each port,
and an image with busybox.
``tests/cluster/programs`` builds the programs that Debian has no package for.

``machine`` makes namespaces and runs programs in them, ``openstack`` and
``kubernetes`` are the control plane, ``node`` is a node, and ``cluster``
combines these parts.
"""
