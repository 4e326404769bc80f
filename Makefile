# Each target does all its own set-up on a bare Debian 12, as root or with sudo, and says what it does on stderr.
# GNU make itself ends with status 2 whenever a command fails; the command's own status is in its last line
# ("make: *** [run] Error 7"), and the scripts behind the targets (lab/stratovirt-run, lab/lab) end with it.

MAKEFLAGS += --no-print-directory
SHELL := /bin/sh
PYTHON := .venv/bin/python

# The command's text goes through the environment as it was typed: neither make nor the shell reads its `$` or quotes.
override CMD := $(value CMD)
export STRATOVIRT_CMD := $(value CMD)
unexport CMD

.PHONY: help run lab test bench setup assets clean-cache
.DEFAULT_GOAL := help

help:
	@echo "make run [CMD='…'] [ARCH=aarch64] a microVM: a shell in it, or one command's output"
	@echo "make lab [CMD='…'] [ARCH=aarch64] [SHARE=dir] [ICOUNT=1] [DEADLINE=seconds]"
	@echo "                                the emulated host, x86_64 or arm64: a shell in it, or one command's output"
	@echo "make test [TIER=unit|kvm|fuzz|readme|lab-x86|lab-arm] [LONG=1]"
	@echo "                                checks and tests; all tiers, or one; LONG=1: the long ones, too"
	@echo "make bench [BENCH=name] [ARCH=aarch64] side-by-side measurements, as JSON lines"
	@echo "make setup                       packages, .venv and guest assets, without running anything"
	@echo "make clean-cache                 remove built kernels, images and downloads"

run:
	@ARCH='$(ARCH)' lab/stratovirt-run

lab:
	@ARCH='$(ARCH)' SHARE='$(SHARE)' ICOUNT='$(ICOUNT)' DEADLINE='$(DEADLINE)' lab/lab

test:
	@lab/setup.sh base native test venv
	@LONG='$(LONG)' $(PYTHON) tests/tiers.py $(TIER)

bench:
	@lab/setup.sh base native guest lab venv
	@[ -z '$(ARCH)' ] || lab/setup.sh lab-arm
	@$(PYTHON) -m benches.run $(if $(ARCH),--arch $(ARCH)) $(BENCH)

setup:
	@lab/setup.sh base native guest lab test venv
	@$(PYTHON) -m guest.assets stock-elf stock-bzimage stock-initramfs microvm-initramfs root-disk >/dev/null
	@$(PYTHON) -m lab.run --prepare

clean-cache:
	@rm -rf "$${STRATOVIRT_CACHE:-$${XDG_CACHE_HOME:-$$HOME/.cache}/stratovirt}"
