# Build the image kuryr/cni by the steps of Kuryr's cni.Dockerfile, on Debian in
# place of CentOS and RDO. The build context contains:
#   kuryr            the sources of kuryr-kubernetes
#   constraints.txt  the constraints of this project
#   kuryr-cni        the CNI plugin, built from Kuryr's sources
#   machine          the network settings of pip and apt on this machine
FROM debian:bookworm
ARG OSLO_LOCK_PATH=/var/kuryr-lock
ARG VIRTUAL_ENV=/opt/venv
COPY machine /
COPY kuryr /opt/kuryr-kubernetes
COPY constraints.txt /tmp/
RUN python3 -m venv $VIRTUAL_ENV
ENV PATH="$VIRTUAL_ENV/bin:$PATH"
RUN python3 -m pip --no-cache-dir install -c /tmp/constraints.txt /opt/kuryr-kubernetes \
    && cp /opt/kuryr-kubernetes/cni_ds_init /usr/bin/cni_ds_init \
    && mkdir -p /etc/kuryr-cni \
    && cp /opt/kuryr-kubernetes/etc/cni/net.d/* /etc/kuryr-cni \
    && rm -rf /opt/kuryr-kubernetes /tmp/constraints.txt \
    && mkdir ${OSLO_LOCK_PATH}
COPY kuryr-cni /kuryr-cni
ENV CNI_DAEMON True
ENV OSLO_LOCK_PATH=${OSLO_LOCK_PATH}
ENTRYPOINT [ "cni_ds_init" ]
