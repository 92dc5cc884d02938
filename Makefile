# The two commands of the README, and what they need.

PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
SPHINX = $(BIN)/sphinx-build -W --keep-going -q
IN_LAB = tests/in-lab $(BIN)/python -W ignore
# Quiet about all but errors.
PIP = $(BIN)/pip install -qq --disable-pip-version-check \
    --constraint constraints.txt

.PHONY: demo test quick lint unit functional e2e boot bench bench-plots docs \
        genconfig clean debian-packages

demo: debian-packages $(VENV)/demo
	$(IN_LAB) -m tests.demo

test: debian-packages lint genconfig-check docs $(VENV)/installed
	tests/run

# While you work: all that needs neither root nor Debian packages.
quick: lint genconfig-check
	tests/run-quick

lint: $(VENV)/installed
	$(BIN)/flake8
	$(BIN)/mypy
	$(BIN)/lint-imports

unit functional e2e: debian-packages $(VENV)/installed
	tests/run tests.$@

debian-packages:
	tests/debian-packages

# As root. Not a part of the tests, since it takes some minutes.
boot:
	tests/boot $(SUITE)

# The CNI plugin for hosts without Python, in which the agent runs elsewhere.
CNI_CC ?= $(shell command -v musl-gcc || command -v cc)
.PHONY: cni
cni: build/cni/break0
build/cni/break0: kuryr_break0/cni/shim.c
	@mkdir -p $(@D)
	$(CNI_CC) -static -Os -s -std=gnu11 -Wall -Wextra -Werror -o $@ $<

# For a host of Docker, Podman or others, without Kuryr; see
# doc/source/install/docker.rst. DESTDIR and PREFIX are as usual.
PREFIX ?= /opt/kuryr-break0
UNITS = $(DESTDIR)/etc/systemd/system
MAN = $(DESTDIR)/usr/local/share/man/man8
SETTINGS = $(DESTDIR)/etc/kuryr-break0/kuryr-break0.conf
.PHONY: install install-files uninstall
install: install-files
	$(PYTHON) -m venv $(DESTDIR)$(PREFIX)
	$(DESTDIR)$(PREFIX)/bin/pip install --quiet \
	    --disable-pip-version-check --constraint constraints.txt \
	    --requirement etc/cni/requirements.txt
	$(DESTDIR)$(PREFIX)/bin/pip install --quiet \
	    --disable-pip-version-check --no-deps --force-reinstall .
	@echo 'Start it: systemctl enable --now kuryr-break0-agent'

install-files:
ifeq ($(CIDRS),)
	@[ -e $(SETTINGS) ] || { echo 'Name the networks of the containers,' \
	    'as: make install CIDRS=192.0.2.0/24' >&2; exit 2; }
endif
	install -d $(UNITS) $(dir $(SETTINGS)) $(DESTDIR)/usr/local/bin $(MAN)
	install -m 644 etc/man/kuryr-break0.8 $(MAN)
	cp -r etc/systemd/system/kuryr-break0-agent.service \
	    etc/systemd/system/kuryr-break0-agent.service.d $(UNITS)
	ln -sf $(PREFIX)/bin/kuryr-break0 $(DESTDIR)/usr/local/bin/
	[ -e $(SETTINGS) ] || sed 's|@CIDRS@|$(CIDRS)|' \
	    etc/kuryr-break0.conf.discover >$(SETTINGS)

# What break0 has set up is taken away by "kuryr-break0 cleanup", before.
uninstall:
	rm -rf $(UNITS)/kuryr-break0-agent.service \
	    $(UNITS)/kuryr-break0-agent.service.d $(DESTDIR)$(PREFIX) \
	    $(DESTDIR)/usr/local/bin/kuryr-break0 $(MAN)/kuryr-break0.8

# What depends on the kernel, under other ones, emulated: all of it takes hours.
# A part: make kernels KERNEL=5.10 PLACE=own TESTS=tests.functional.test_border
.PHONY: kernels kernels-core kernels-table
kernels: $(VENV)/installed
	tests/debian-packages test kernels
	make --silent cni
	$(BIN)/python -m tests.kernels $(KERNEL:%=--kernel %) \
	    $(PLACE:%=--place %) $(TESTS)

# What CI runs of it.
kernels-core:
	$(MAKE) --silent kernels KERNEL='5.10 7' PLACE=own TESTS='core-kuryr core'

# The table of the documentation, of what was run so far.
kernels-table: $(VENV)/installed
	$(BIN)/python -m tests.kernels --table

bench: $(VENV)/installed
	tests/debian-packages test
	@mkdir -p build
	$(IN_LAB) -m tests.bench --json build/bench.json

# Whether a change has made something slower; some minutes. bench-ratios says
# what is to be compared with from now on.
.PHONY: bench-check bench-ratios
bench-check: $(VENV)/installed
	tests/debian-packages test
	make --silent cni
	$(IN_LAB) -m tests.bench.check

bench-ratios: $(VENV)/installed
	tests/debian-packages test
	make --silent cni
	$(IN_LAB) -m tests.bench.check --renew tests/bench/ratios.json

# Of the last make bench.
bench-plots: $(VENV)/plots
	$(BIN)/python -m tests.bench.plots build/bench.json \
	    doc/source/images/cost.svg

$(VENV)/plots: $(VENV)/installed tests/bench/requirements.txt
	$(PIP) --requirement tests/bench/requirements.txt
	touch $@

# The pages, the man page and the release notes; a warning is an error. The man
# page that is in git is compared with the one that is built.
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

# What is in git is compared with it by the tests.
.PHONY: completion
completion: $(VENV)/installed
	$(BIN)/kuryr-break0 --shell_completion bash >etc/bash-completion/kuryr-break0
	$(BIN)/kuryr-break0 --shell_completion zsh >etc/zsh/_kuryr-break0

.PHONY: genconfig-check
# The sample that is in git is what the options say.
genconfig-check: $(VENV)/installed
	$(BIN)/oslo-config-generator \
	    --config-file etc/kuryr-break0-config-generator.conf \
	    --output-file $(VENV)/sample
	diff -u etc/kuryr-break0.conf.sample $(VENV)/sample

# Each is made again when what it is made of changes. What tests, lint and
# documentation need comes on top of the package and what the demo needs.
$(VENV)/demo: requirements.txt tests/core-requirements.txt constraints.txt \
              pyproject.toml setup.cfg
	$(PYTHON) -m venv --clear $(VENV)
	@echo 'Installing kuryr-break0 and Kuryr; this takes about half a minute.'
	@$(PIP) --requirement tests/core-requirements.txt --editable .
	@touch $@

$(VENV)/installed: $(VENV)/demo test-requirements.txt doc/requirements.txt
	@echo 'Installing the tools of the tests and of the documentation.'
	@$(PIP) --requirement test-requirements.txt \
	    --requirement doc/requirements.txt
	@touch $@

clean:
	rm -rf $(VENV) .stestr .mypy_cache build dist *.egg-info doc/build \
	    doc/source/configuration/_static releasenotes/build
