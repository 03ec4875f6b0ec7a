# One entry point for every chore; `make help` lists them.

TARGET_DIR := $(or $(CARGO_TARGET_DIR),target)
PREFIX     ?= /usr/local
DESTDIR    ?=
UNIT_DIR   ?= /etc/systemd/system
# More for the command, e.g. `make demo ARGS="--sabotage flip"`.
ARGS       ?=
# Lives of the simulation; SEED=n lives one of them aloud.
SEEDS      ?= 2000
KVFERRY    := $(TARGET_DIR)/release/kvferry
# The Python package is built by maturin, with its own features of the same dependencies: make test-python.
RUST       := --locked --workspace --exclude kvferry-python

.DEFAULT_GOAL := help
.PHONY: help demo test test-full wheel test-python test-sglang lint late-writes late-writes-peers soak sim mutants bench release install clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-18s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))
	@echo '  What a target needs and this machine lacks is installed with apt; KVFERRY_NO_INSTALL=1 forbids it.'

demo: ## two daemons, real engine processes, every byte checked (about a minute after the build)
	@tests/prepare.sh demo
	@$(MAKE) --no-print-directory release
	$(KVFERRY) demo $(ARGS)

test: ## formatting, lints, every test, the docs (under 10 minutes from a fresh clone on two cores)
	@tests/prepare.sh test
	@$(MAKE) --no-print-directory lint
	@# The tests of whole daemons run the binaries as processes of their own. All targets in one go, so that
	@# dependencies are built once, with one set of features.
	cargo build $(RUST) --all-targets
	@# Most of these wait for somebody to be silent or to come back, so more of them than there are cores run at once.
	cargo test $(RUST) --no-fail-fast -- --test-threads=4
	@# With examples among the targets, of which there are none, dependencies keep the features they were linted with.
	RUSTDOCFLAGS="-D warnings" cargo doc $(RUST) --no-deps --lib --bin kvferry --examples

test-full: ## the long cases, against the release build of the daemon
	@tests/prepare.sh test-full
	@$(MAKE) --no-print-directory release
	KVFERRY_LONG=1 KVFERRYD_BIN=$(abspath $(TARGET_DIR))/release/kvferryd KVFERRY_BIN=$(abspath $(KVFERRY)) \
	  cargo test $(RUST) --no-fail-fast --test '*' -- --nocapture --test-threads=1
	cargo test --locked -p kvferry-proto --features generate

wheel: ## the Python package, into dist/
	@tests/prepare.sh python
	client/python/wheel.sh

test-python: ## builds the wheel, installs it, and moves bytes between two processes behind two daemons
	@tests/prepare.sh python
	client/python/test.sh

test-sglang: ## sglang's own prefill and decode, from PyPI (3 GB, once), over kvferry; every byte checked
	@tests/prepare.sh python
	tests/sglang/run.sh $(ARGS)

lint: ## formatting and lints, warnings denied
	cargo fmt --all --check
	cargo clippy $(RUST) --all-targets -- -D warnings

RUNS ?= 100
late-writes: ## is memory touched after a terminal answer? every probe RUNS=100 times; 1 on any late byte
	@tests/prepare.sh demo
	cargo build --locked --release -p kvferryd -p kvferry-tests --bins
	$(TARGET_DIR)/release/late-writes $(RUNS)

late-writes-peers: ## the same probe against what users have today: it must find late bytes there, or it is blind
	@tests/prepare.sh late-writes-peers
	@tests/peers/prepare.sh $(abspath $(TARGET_DIR))/peers
	$(TARGET_DIR)/peers/python tests/peers/late_writes.py

MINUTES ?= 2
soak: ## load on paths that keep failing, for MINUTES=2; 1 where a byte is wrong or late, or a session is lost
	@tests/prepare.sh demo
	cargo build --locked --release -p kvferryd -p kvferry-tests --bins
	$(TARGET_DIR)/release/soak $$(($(MINUTES) * 60))

bench: ## every workload over tcp and within one daemon, beside the raw limits of this machine
	@tests/prepare.sh demo
	@$(MAKE) --no-print-directory release
	$(KVFERRY) bench --path tcp --workload all $(ARGS)
	$(KVFERRY) bench --path local --workload all $(ARGS)

sim: ## SEEDS lives of the deterministic simulation, or SEED=n aloud
	@tests/prepare.sh test
	cargo run --locked -p kvferry-tests --bin sim -- $(if $(SEED),--seed $(SEED),--seeds $(SEEDS))

mutants: ## breaks a rule at a time and sees that the simulation, or a named test, notices (MUTANTS=names)
	@tests/prepare.sh test
	tests/mutants/run.sh $(MUTANTS)

release:
	cargo build --locked --release -p kvferryd -p kvferry-cli --bins

install: release ## both binaries, the unit and the example config (PREFIX, DESTDIR, UNIT_DIR)
	install -D -m 0755 $(TARGET_DIR)/release/kvferryd $(DESTDIR)$(PREFIX)/bin/kvferryd
	install -D -m 0755 $(KVFERRY) $(DESTDIR)$(PREFIX)/bin/kvferry
	install -d $(DESTDIR)$(UNIT_DIR) $(DESTDIR)/etc/kvferry
	sed 's|/usr/local/bin|$(PREFIX)/bin|' deploy/kvferryd.service > $(DESTDIR)$(UNIT_DIR)/kvferryd.service
	@# A configuration that is there already is somebody's own.
	test -e $(DESTDIR)/etc/kvferry/kvferryd.toml || \
	  install -m 0644 deploy/kvferryd.example.toml $(DESTDIR)/etc/kvferry/kvferryd.toml

clean: ## everything that was built
	cargo clean
