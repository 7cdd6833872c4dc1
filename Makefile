# Every target installs what it needs first: Debian packages and a virtual environment in .venv, only what is missing.
SHELL   := /bin/sh
PYTHON  ?= python3
VENV    ?= .venv
PREFIX  ?= /opt/ipsecq
ETC     ?= /etc/ipsecq
BIN     ?= /usr/local/bin
UNITS   ?= /etc/systemd/system
SHARE   ?= /usr/local/share
DESTDIR ?=
PYTEST  ?=
BENCH   ?=
export PYTHON DESTDIR

PACKAGES_BUILD := build-essential python3-dev python3-venv libnetfilter-queue-dev libssl-dev
PACKAGES_RUN   := nftables iptables iproute2
PACKAGES_LAB   := $(PACKAGES_RUN) iperf3 tcpdump ethtool procps iputils-ping util-linux
PACKAGES_IKE   := openiked charon-systemd strongswan-swanctl
PACKAGES_WATCH := prometheus chromium fonts-dejavu-core
PACKAGES_BENCH := $(PACKAGES_LAB) wireguard-go wireguard-tools charon-systemd strongswan-swanctl \
	libcharon-extra-plugins libstrongswan-standard-plugins
PACKAGES_TEST  := $(PACKAGES_LAB) $(PACKAGES_IKE) $(PACKAGES_WATCH) systemd groff-base conntrack tshark user-mode-linux kmod
PACKAGES_SYSTEM := $(PACKAGES_LAB) user-mode-linux kmod qemu-system-x86 mmdebstrap e2fsprogs cpio lintian

.PHONY: help demo test test-system check fuzz sanitize chaos overload soak bench bench-keys bench-policy bench-scrape scenarios \
	docs wheel install deb uninstall clean

help: ## show this
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' Makefile
	@echo '  make test PYTEST="tests/unit -k replay"  passes arguments on to pytest; bench takes BENCH=, all take PYTHON='

demo: ## two gateways and two hosts in network namespaces, real traffic through ESP (root)
	@.ci/need-packages $(PACKAGES_BUILD) $(PACKAGES_LAB)
	@.ci/need-venv $(VENV)
	@$(VENV)/bin/python -m ipsecq.lab.demo $(DEMO)

test: ## the whole test suite, linters included (root)
	@.ci/need-packages $(PACKAGES_BUILD) $(PACKAGES_TEST)
	@.ci/need-venv $(VENV) test
	@$(VENV)/bin/python -m pytest $(PYTEST)

test-system: ## the package on a whole Debian machine in QEMU: install, tunnel to the kernel's IPsec, restart, reboot (root)
	@.ci/need-packages $(PACKAGES_BUILD) $(PACKAGES_SYSTEM)
	@.ci/need-venv $(VENV) test
	@$(VENV)/bin/python -m pytest -x tests/system $(PYTEST)

check: ## ruff, mypy --strict, and the contract that imports only point down
	@.ci/need-packages $(PACKAGES_BUILD)
	@.ci/need-venv $(VENV) test
	@$(VENV)/bin/ruff check --quiet --output-format=concise .
	@$(VENV)/bin/mypy --no-error-summary
	@$(VENV)/bin/lint-imports --no-logo >/dev/null || $(VENV)/bin/lint-imports
	@echo "check: clean"

fuzz: ## ten minutes of coverage-guided fuzzing of every parser and the engine; FUZZ="--seconds 60 setkey"
	@.ci/need-packages $(PACKAGES_BUILD)
	@.ci/need-venv $(VENV) fuzz
	@$(VENV)/bin/python tests/fuzz/run.py $(FUZZ)

sanitize: ## the compiled modules' tests under AddressSanitizer
	@.ci/need-packages $(PACKAGES_BUILD)
	@.ci/need-venv $(VENV) test
	@.ci/sanitize $(VENV)

chaos: ## ten minutes of kills, full disks, reloads and attacks under load; CHAOS="--seconds 60 --seed 1" (root)
	@.ci/need-packages $(PACKAGES_BUILD) $(PACKAGES_LAB)
	@.ci/need-venv $(VENV)
	@$(VENV)/bin/python -m ipsecq.lab.chaos $(CHAOS)

overload: ## a minute of several times the capacity: who keeps his share, what it costs to refuse a packet; OVERLOAD= (root)
	@.ci/need-packages $(PACKAGES_BUILD) $(PACKAGES_LAB)
	@.ci/need-venv $(VENV)
	@$(VENV)/bin/python -m ipsecq.lab.overload $(OVERLOAD)

soak: ## an hour at half load: nothing may grow; SOAK="--seconds 600" (root)
	@.ci/need-packages $(PACKAGES_BUILD) $(PACKAGES_LAB)
	@.ci/need-venv $(VENV)
	@$(VENV)/bin/python -m ipsecq.lab.soak $(SOAK)

bench: ## throughput of the demo topology: plain forwarding, ipsecq, and other ways to do it; writes docs/benchmarks.md (root)
	@.ci/need-packages $(PACKAGES_BUILD) $(PACKAGES_BENCH)
	@.ci/need-venv $(VENV) lab
	@$(VENV)/bin/python -m ipsecq.lab.bench $(or $(BENCH),--write docs/benchmarks.md)

bench-keys: ## SAs added a second, a dump of 100,000, time until all workers have an ADD (root)
	@.ci/need-packages $(PACKAGES_BUILD) $(PACKAGES_LAB)
	@.ci/need-venv $(VENV) lab
	@$(VENV)/bin/python -m ipsecq.lab.bench_keys $(BENCH)

bench-policy: ## cost of policy look-ups at 10 to 100,000 policies and SAs
	@.ci/need-packages $(PACKAGES_BUILD)
	@.ci/need-venv $(VENV)
	@$(VENV)/bin/python -m ipsecq.lab.bench_policy $(BENCH)

bench-scrape: ## seconds that a scrape of /metrics takes with 10,000 SAs (root)
	@.ci/need-packages $(PACKAGES_BUILD) $(PACKAGES_LAB)
	@.ci/need-venv $(VENV) lab
	@$(VENV)/bin/python -m ipsecq.lab.bench_scrape $(BENCH)

scenarios: ## write docs/scenarios.md from tests/scenarios
	@.ci/need-packages $(PACKAGES_BUILD)
	@.ci/need-venv $(VENV)
	@$(VENV)/bin/python tests/helpers/scenario_docs.py

docs: ## write the reference pages and the default ipsecq.toml from the program's own tables
	@.ci/need-packages $(PACKAGES_BUILD)
	@.ci/need-venv $(VENV)
	@$(VENV)/bin/python -m ipsecq.cli.manual default ipsecq/daemon/ipsecq.toml
	@$(VENV)/bin/python -m ipsecq.cli.manual docs docs
	@$(VENV)/bin/python -m ipsecq.metrics.reference >docs/metrics.md

install: ## install for real: /opt/ipsecq, /usr/local/bin/ipsecq, /etc/ipsecq (never overwritten), units, man pages (root)
	@.ci/need-packages $(PACKAGES_BUILD) $(PACKAGES_RUN)
	@.ci/install '$(PREFIX)' '$(BIN)' '$(ETC)' '$(UNITS)' '$(SHARE)'

wheel: ## a wheel with the compiled modules in dist/, for this Python, processor and OpenSSL
	@.ci/need-packages $(PACKAGES_BUILD)
	@.ci/need-venv $(VENV)
	@$(VENV)/bin/python -m pip wheel --quiet --disable-pip-version-check --no-deps --wheel-dir dist .
	@ls dist/*.whl

deb: ## a Debian package in build/ for this machine's Debian and architecture
	@.ci/need-packages $(PACKAGES_BUILD)
	@.ci/deb build

uninstall: ## take it away again; /etc/ipsecq and /var/lib/ipsecq stay (root)
	@.ci/uninstall '$(PREFIX)' '$(BIN)' '$(ETC)' '$(UNITS)' '$(SHARE)'

clean: ## remove the virtual environment and everything generated
	@rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +
