# Everything a fresh Debian 12+ machine needs is installed by the targets themselves.
VENV := .venv
PYTHON := $(VENV)/bin/python
STAMP := $(VENV)/.complete
VM_STAMP := $(VENV)/.complete-vm
BENCH_STAMP := $(VENV)/.complete-bench
# For bench-seed: --readme puts what it finds into README.md, --entries=N takes so many of /usr, --only=NAME
# measures one way of mounting, --control two mounts by hand.
SEED :=

DESTDIR :=
PREFIX := /usr
LIB := $(DESTDIR)$(PREFIX)/lib
SBIN := $(DESTDIR)$(PREFIX)/sbin
BIN := $(DESTDIR)$(PREFIX)/bin
SHARE := $(DESTDIR)$(PREFIX)/share

.PHONY: demo test test-vm bench bench-seed setup install deb clean

demo: $(STAMP)
	$(PYTHON) -m tests.demo

test: $(STAMP)
	$(PYTHON) -m pytest

# What needs another kernel, in a virtual machine; and the clients of the newest systemd, in another one.
test-vm: $(VM_STAMP)
	$(PYTHON) -m pytest tests/vm/test_vm.py tests/vm/test_newest.py

bench: $(STAMP)
	$(PYTHON) -m tests.bench

bench-seed: $(BENCH_STAMP)
	$(PYTHON) -m tests.bench.seed $(SEED)

setup: $(STAMP)

$(STAMP): pyproject.toml Makefile tests/packages.txt tests/setup tests/composefs
	tests/setup $(VENV)
	touch $@

$(VM_STAMP): $(STAMP) tests/vm/packages.txt
	tests/setup $(VENV) tests/vm/packages.txt
	touch $@

$(BENCH_STAMP): $(STAMP) tests/bench/packages.txt
	tests/setup $(VENV) tests/bench/packages.txt
	touch $@

# For the system's own Python: the modules lie where nothing else is, and the programs ignore the environment.
install:
	install -D -m 0644 -t "$(SHARE)/polkit-1/actions" units/polkit-1/actions/io.mountd.policy
	install -d "$(LIB)/mountd" "$(LIB)/mountd/policy.d" "$(LIB)/systemd/system" "$(LIB)/tmpfiles.d" \
	  "$(LIB)/sysusers.d" "$(BIN)" "$(SBIN)"
	find mountd -name '*.py' -exec install -D -m 0644 {} "$(LIB)/mountd/python/{}" \;
	install -D -m 0644 -t "$(LIB)/mountd/python/mountd/protocol" protocol/*.varlink
	install -D -m 0644 -t "$(LIB)/mountd/json" protocol/json/*.schema.json
	install -m 0644 -t "$(LIB)/mountd/policy.d" units/policy.d/*.toml
	install -m 0644 -t "$(LIB)/tmpfiles.d" units/tmpfiles.d/mountd.conf
	install -m 0644 -t "$(LIB)/sysusers.d" units/sysusers.d/mountd.conf
	install -m 0644 -t "$(LIB)/systemd/system" units/systemd/mountd.socket units/systemd/mountd-pull.socket \
	  units/systemd/mountd-mountfsd.socket
	for unit in mountd mountd-pull; do \
	  sed 's|@SBINDIR@|$(PREFIX)/sbin|' units/systemd/$$unit.service > "$(LIB)/systemd/system/$$unit.service" && \
	  chmod 0644 "$(LIB)/systemd/system/$$unit.service" || exit; \
	done
	for section in 1 5 7 8; do \
	  install -D -m 0644 -t "$(SHARE)/man/man$$section" units/man/*.$$section || exit; \
	done
	install -D -m 0644 units/completion/mountctl.bash "$(SHARE)/bash-completion/completions/mountctl"
	install -D -m 0644 units/completion/mountctl.zsh "$(SHARE)/zsh/vendor-completions/_mountctl"
	install -D -m 0644 units/completion/mountctl.fish "$(SHARE)/fish/vendor_completions.d/mountctl.fish"
	units/program mountd.daemon.main "$(PREFIX)/lib/mountd/python" > "$(SBIN)/mountd"
	units/program mountd.cli.mount_helper "$(PREFIX)/lib/mountd/python" > "$(SBIN)/mount.mountd"
	units/program mountd.cli.umount_helper "$(PREFIX)/lib/mountd/python" > "$(SBIN)/umount.mountd"
	units/program mountd.cli.mountctl "$(PREFIX)/lib/mountd/python" > "$(BIN)/mountctl"
	chmod 0755 "$(SBIN)/mountd" "$(SBIN)/mount.mountd" "$(SBIN)/umount.mountd" "$(BIN)/mountctl"
# Who runs the programs may not write here, so that it is now or at every start; a package does it when it is installed.
	[ -n "$(DESTDIR)" ] || /usr/bin/python3 -I -m compileall -q "$(LIB)/mountd/python"

# A package for Debian 13 and later, into dist/.
deb:
	units/build_deb dist

clean:
	rm -rf $(VENV) dist .mypy_cache .ruff_cache .pytest_cache
