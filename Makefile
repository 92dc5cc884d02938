# README.rst and doc/source/contributor/testing.rst describe the targets.

PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
SPHINX = $(BIN)/sphinx-build -W --keep-going -q
IN_LAB = tools/in-lab $(BIN)/python -W ignore
# With -qq, pip prints errors only.
PIP = $(BIN)/pip install -qq --disable-pip-version-check \
    --constraint constraints.txt

.PHONY: demo test quick lint unit functional e2e boot bench bench-plots docs \
        genconfig clean debian-packages

demo: debian-packages $(VENV)/demo
	$(IN_LAB) -m tools.demo

# Lint, documentation and tests run at once, because tests wait longer than
# they compute.
test: debian-packages $(VENV)/installed
	@mkdir -p build
	@$(MAKE) lint genconfig-check docs >build/checks 2>&1 & checks=$$!; \
	tools/run; status=$$?; \
	wait $$checks || { status=$$?; cat build/checks; }; exit $$status

# For daily work: lint and the tests that need neither root nor Debian
# packages.
quick: lint genconfig-check
	tools/run-quick

lint: $(VENV)/installed
	$(BIN)/flake8
	$(BIN)/mypy
	$(BIN)/lint-imports

unit functional e2e: debian-packages $(VENV)/installed
	tools/run tests.$@

debian-packages:
	tools/debian-packages

# As root: boot a Debian with break0. "make test" does not include this test,
# which takes five minutes or more.
boot:
	tools/boot $(SUITE)

# The shim: a CNI plugin that needs no Python on the host. It sends its
# requests to the agent, which may run in a container.
CNI_CC ?= $(shell command -v musl-gcc || command -v cc)
.PHONY: cni
cni: build/cni/break0
build/cni/break0: kuryr_break0/cni/shim.c
	@mkdir -p $(@D)
	$(CNI_CC) -static -Os -s -std=gnu11 -Wall -Wextra -Werror -o $@ $<

# Install on a host of Docker, Podman or another engine, without Kuryr:
# doc/source/install/docker.rst. DESTDIR and PREFIX have their usual meaning in
# makefiles.
PREFIX ?= /opt/kuryr-break0
UNITS = $(DESTDIR)/etc/systemd/system
LOCAL = $(DESTDIR)/usr/local
SHARE = $(LOCAL)/share
MAN = $(SHARE)/man/man8
SHIM = $(DESTDIR)/usr/libexec/kuryr-break0/break0
SETTINGS = $(DESTDIR)/etc/kuryr-break0/kuryr-break0.conf
# Files of etc/ with which systemd-networkd and NetworkManager do not change
# break0, and with which ip(8) prints the name of its protocol number.
DROP_INS = systemd/network/10-kuryr-break0.network \
    systemd/networkd.conf.d/kuryr-break0.conf \
    NetworkManager/conf.d/kuryr-break0.conf \
    iproute2/rt_protos.d/kuryr-break0.conf
# Configuration files that kuryr-break0 reads in place of SETTINGS: see the
# output of "kuryr-break0 --help".
EARLIER = $(addprefix $(DESTDIR)/etc/,kuryr/kuryr.conf kuryr.conf \
    kuryr/kuryr-break0.conf kuryr-break0.conf)
.PHONY: install install-files networks uninstall
# If pip fails at the first installation, delete the virtual environment again.
install: networks
	@command -v nft >/dev/null || [ -e /usr/sbin/nft ] || \
	    echo 'nftables is not installed: break0 will have no guard.'
	@[ -e $(DESTDIR)$(PREFIX) ] || first=yes; \
	pip="$(DESTDIR)$(PREFIX)/bin/pip install --quiet \
	    --disable-pip-version-check"; \
	$(PYTHON) -m venv $(DESTDIR)$(PREFIX) && \
	$$pip --constraint constraints.txt \
	    --requirement etc/cni/requirements.txt && \
	$$pip --no-deps --force-reinstall . || { \
	    [ -z "$$first" ] || rm -rf $(DESTDIR)$(PREFIX); \
	    echo 'Nothing was installed: see the error above. On Debian,' \
	    'python3 -m venv needs the package python3-venv.' >&2; exit 1; }
	@$(MAKE) --no-print-directory install-files
	@echo 'Start it: systemctl enable --now kuryr-break0-agent'

networks:
ifeq ($(CIDRS),)
	@[ -e $(SETTINGS) ] || { found=$$($(PYTHON) etc/networks); \
	    echo 'Name the networks of your containers.' \
	    "$${found:+This host has these: }make install" \
	    "CIDRS=$${found:-192.168.1.0/24}" >&2; exit 2; }
else
	@$(PYTHON) etc/networks '$(CIDRS)'
endif

install-files: networks
	install -D -m 644 etc/man/kuryr-break0.8 $(MAN)/kuryr-break0.8
	install -D -m 644 kuryr_break0/cli/completion/kuryr-break0 \
	    $(SHARE)/bash-completion/completions/kuryr-break0
	install -D -m 644 kuryr_break0/cli/completion/_kuryr-break0 \
	    $(SHARE)/zsh/site-functions/_kuryr-break0
	install -D -m 644 kuryr_break0/cli/completion/kuryr-break0.fish \
	    $(SHARE)/fish/vendor_completions.d/kuryr-break0.fish
	install -d $(UNITS) $(dir $(SETTINGS)) $(LOCAL)/bin
	cp -r etc/systemd/system/kuryr-break0-agent.service \
	    etc/systemd/system/kuryr-break0-agent.service.d $(UNITS)
	ln -sf $(PREFIX)/bin/kuryr-break0 $(LOCAL)/bin/
	[ ! -e build/cni/break0 ] || install -D -m 755 build/cni/break0 $(SHIM)
	@for each in $(DROP_INS); do \
	    file=$(DESTDIR)/etc/$$each; \
	    if [ ! -e $$file ]; then install -D -m 644 etc/$$each $$file; \
	    elif ! cmp -s etc/$$each $$file; then \
	        echo "Kept $$file, which differs from etc/$$each"; fi; done
	@line='allowed_cidrs = $(CIDRS)'; \
	if [ ! -e $(SETTINGS) ]; then \
	    sed "s|@CIDRS@|$(CIDRS)|; s|/usr/share|$(PREFIX)/share|" \
	        etc/kuryr-break0.conf.discover >$(SETTINGS); \
	elif [ -z '$(CIDRS)' ] || grep -qxF "$$line" $(SETTINGS); then \
	    echo 'Kept $(SETTINGS), which exists'; \
	else echo 'Kept $(SETTINGS), which has other networks than CIDRS.' \
	    'To change them, run:'; \
	    echo "sed -i '/allowed_cidrs *=/c $$line' $(SETTINGS)"; \
	    echo 'systemctl reload-or-restart kuryr-break0-agent'; fi
	@for each in $(EARLIER); do [ ! -e $$each ] || echo "$$each is read" \
	    'in place of $(SETTINGS): set [break0] discover and allowed_cidrs' \
	    'there.'; done
	@echo 'If they run: systemctl restart systemd-networkd;' \
	    'nmcli general reload'

# If break0 is in use, refuse: without the command, break0, its routes and its
# guard would stay.
uninstall:
ifeq ($(DESTDIR),)
	@[ ! -x $(PREFIX)/bin/kuryr-break0 ] || { \
	    $(PREFIX)/bin/kuryr-break0 cleanup --dry-run >/dev/null 2>&1; \
	    [ $$? -ne 1 ]; } || { echo 'break0 is in use. First run:' \
	    'systemctl disable --now kuryr-break0-agent;' \
	    'kuryr-break0 cleanup' >&2; exit 1; }
endif
	@for each in $(DROP_INS); do cmp -s etc/$$each $(DESTDIR)/etc/$$each && \
	    rm $(DESTDIR)/etc/$$each || true; done
	rm -rf $(UNITS)/kuryr-break0-agent.service \
	    $(UNITS)/kuryr-break0-agent.service.d $(DESTDIR)$(PREFIX) \
	    $(LOCAL)/bin/kuryr-break0 $(MAN)/kuryr-break0.8 $(SHIM) \
	    $(SHARE)/bash-completion/completions/kuryr-break0 \
	    $(SHARE)/zsh/site-functions/_kuryr-break0 \
	    $(SHARE)/fish/vendor_completions.d/kuryr-break0.fish
	@[ ! -e $(SETTINGS) ] || echo 'Kept $(SETTINGS). To delete it:' \
	    'rm -r $(dir $(SETTINGS))'

# The Debian packages. A host needs only the packages, and no clone.
DEB = build/deb
.PHONY: deb deb-test
deb:
	tools/debian-packages deb
	rm -rf $(DEB)
	mkdir -p $(DEB)/source
	cp -r LICENSE Makefile README.rst debian etc kuryr_break0 pyproject.toml \
	    requirements.txt setup.cfg setup.py $(DEB)/source
	cd $(DEB)/source && dpkg-buildpackage --build=binary --no-sign \
	    --no-check-builddeps >../log 2>&1 || { tail ../log; exit 1; }
	rm -r $(DEB)/source
	@ls $(DEB)/*.deb

# As root: build the packages on a minimal Debian 12, and install, upgrade and
# remove them on a minimal Debian of each of SUITES.
deb-test:
	tools/deb $(SUITES)

# As root on Debian 12: run a Kubernetes cluster with Kuryr and Neutron. The
# first run builds Kubernetes, which takes minutes.
.PHONY: cluster cluster-plot cluster-test cluster-core cluster-releases \
        cluster-programs
cluster: cluster-programs
	@mkdir -p build
	tools/in-root-lab $(BIN)/python -W ignore -m tests.cluster.demo \
	    build/cluster.json

# Draw the results of the last make cluster.
cluster-plot: $(VENV)/plots
	$(BIN)/python -m tests.cluster.plot build/cluster.json \
	    doc/source/images/cluster.svg

# All tests take half an hour. For a part: make cluster-test TESTS=test_faults
cluster-test: cluster-programs
	tools/in-root-lab $(BIN)/python -W ignore -m tests.cluster $(TESTS)

# The tests in CORE of tests/cluster/__main__.py.
cluster-core: cluster-programs
	tools/in-root-lab $(BIN)/python -W ignore -m tests.cluster --core

# The tests in RELEASES of tests/cluster/__main__.py, with other releases of
# Kuryr.
RELEASES ?= 6.0.1:3.11 8.0.0:3.11 10.0.0:3.11
cluster-releases: cluster-programs
	KURYR_SOURCES='$(abspath $(VENV)/kuryr-sources)' \
	    RUN='tools/in-root-lab python -W ignore -m tests.cluster --releases' \
	    tools/compat $(RELEASES)

cluster-programs:
	@tests/cluster/programs --check
	@$(MAKE) --silent debian-packages $(VENV)/demo
	tools/debian-packages cluster
	tools/kuryr-sources $(VENV)/kuryr-sources
	tests/cluster/programs

# Run kernel-dependent tests under other kernels, in QEMU. All tests take
# hours. For a part:
# make kernels KERNEL=5.10 PLACE=own TESTS=tests.functional.test_border
.PHONY: kernels kernels-core kernels-table
kernels: debian-packages $(VENV)/installed
	tools/debian-packages test kernels
	make --silent cni
	$(BIN)/python -m tests.kernels $(KERNEL:%=--kernel %) \
	    $(PLACE:%=--place %) $(TESTS)

# Run a selection of each suite, under Linux 5.10 and 7.x.
kernels-core:
	$(MAKE) --silent kernels KERNEL='5.10 7' PLACE=own TESTS='core-kuryr core'

# Write the table of doc/source/install/supported.rst from the results so far.
kernels-table: $(VENV)/installed
	$(BIN)/python -m tests.kernels --table

# As root, the benchmark includes containerd, which needs root of the machine.
BENCH_LAB = $(if $(filter 0,$(shell id -u)),tools/in-root-lab,tools/in-lab)
bench: $(VENV)/installed
	tools/debian-packages test
	make --silent cni
	VENV=$(VENV) tools/kuryr-cni-in-go build/kuryr-cni
	$(BENCH_LAB) $(BIN)/python -W ignore -m tests.bench \
	    --json build/bench.json

# Find out in about a minute if a change has made break0 slower. bench-ratios
# writes the ratios with which bench-check compares. If the user may use
# chrt(1), the benchmark has priority over the other processes of the machine,
# so that they do not delay it.
FIRST = $(shell chrt -r 10 true 2>/dev/null && echo chrt -r 10)
.PHONY: bench-check bench-ratios
bench-check: debian-packages $(VENV)/installed
	tools/debian-packages test
	make --silent cni
	$(FIRST) $(IN_LAB) -m tests.bench.check

bench-ratios: debian-packages $(VENV)/installed
	tools/debian-packages test
	make --silent cni
	$(FIRST) $(IN_LAB) -m tests.bench.check --renew tests/bench/ratios.json

# Draw the results of the last "make bench".
bench-plots: $(VENV)/plots
	$(BIN)/python -m tests.bench.plots build/bench.json \
	    doc/source/images/cost.svg

$(VENV)/plots: $(VENV)/installed tests/bench/requirements.txt
	$(PIP) --requirement tests/bench/requirements.txt
	touch $@

# Build the pages, the man page and the release notes; a warning is an error.
# If the man page differs from the man page in git, fail.
docs: $(VENV)/installed doc/build/man/kuryr-break0.8
	$(SPHINX) -d doc/build/doctrees -b html doc/source doc/build/html
	cmp $(word 2,$^) etc/man/kuryr-break0.8 || { echo 'Run: make man'; exit 1; }
	$(SPHINX) -a -E -b html releasenotes/source releasenotes/build/html

.PHONY: doc/build/man/kuryr-break0.8 man
doc/build/man/kuryr-break0.8: $(VENV)/installed
	$(SPHINX) -d doc/build/doctrees -D today='kuryr-break0' -b man doc/source \
	    doc/build/man

man: doc/build/man/kuryr-break0.8
	@mkdir -p etc/man
	cp $< etc/man

genconfig: $(VENV)/installed
	$(BIN)/oslo-config-generator \
	    --config-file etc/kuryr-break0-config-generator.conf

# Write the shell completion. If the files in git are outdated, a test fails.
.PHONY: completion
completion: $(VENV)/installed
	$(BIN)/python -m tools.completion

.PHONY: genconfig-check
# If the sample in git does not match the options, fail.
genconfig-check: $(VENV)/installed
	$(BIN)/oslo-config-generator \
	    --config-file etc/kuryr-break0-config-generator.conf \
	    --output-file $(VENV)/sample
	diff -u etc/kuryr-break0.conf.sample $(VENV)/sample

# The virtual environment. If one of its requirement files changes, make
# installs it again. $(VENV)/demo has the package and the requirements of the
# demo, $(VENV)/installed also those of tests, lint and documentation.
$(VENV)/demo: requirements.txt tools/core-requirements.txt constraints.txt \
              pyproject.toml setup.cfg
	$(PYTHON) -m venv --clear $(VENV)
	@echo 'Installing kuryr-break0 and Kuryr; this takes about half a minute.'
	@$(PIP) --requirement tools/core-requirements.txt --editable .
	@touch $@

$(VENV)/installed: $(VENV)/demo test-requirements.txt doc/requirements.txt
	@echo 'Installing the tools of the tests and of the documentation.'
	@$(PIP) --requirement test-requirements.txt \
	    --requirement doc/requirements.txt
	@touch $@

clean:
	rm -rf $(VENV) .mypy_cache build dist *.egg-info doc/build \
	    doc/source/configuration/_static releasenotes/build
