# Add kuryr-break0's driver for nested macvlan to Kuryr's controller image. At
# the top of the sources, run:
#   docker build -f etc/kubernetes/controller.Dockerfile \
#       --build-arg BASE=kuryr/controller:latest .

# The image that the cluster runs. Its user is kuryr.
ARG BASE=kuryr/controller:latest

FROM ${BASE} AS wheel
USER root
WORKDIR /src
COPY etc etc
COPY kuryr_break0 kuryr_break0
COPY LICENSE README.rst pyproject.toml requirements.txt setup.cfg setup.py ./
RUN python3 -m pip wheel --no-deps --wheel-dir /wheels .

FROM ${BASE}
USER root
COPY --from=wheel /wheels /tmp/wheels
COPY constraints.txt etc/kubernetes/install-package /tmp/
RUN /tmp/install-package /tmp/wheels/*.whl /tmp/constraints.txt \
    && rm -rf /tmp/wheels /tmp/constraints.txt /tmp/install-package
# If this import failed, kuryr-controller would not start.
RUN python3 -c 'import kuryr_break0.kuryr.pod_vif'
USER kuryr
