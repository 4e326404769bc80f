"""-seccomp-report: what each kind of thread may ask of the kernel, and why."""

from __future__ import annotations

import sys

from stratovirt.sandbox import KIND_NAMES, KINDS
from stratovirt.sandbox.rules import Rule, allowed_calls, calls_of_a_process, rules_of

PROCESS_BOUND, VCPU_BOUND = 55, 27  # fewer than, at most


def print_report() -> int:
    """The exit status."""
    sys.stdout.write(report())
    return 0


def report() -> str:
    lines: list[str] = []
    for kind in KINDS:
        allowed = [rule for rule in rules_of(kind) if rule.allows]
        lines.append(f"{KIND_NAMES[kind]}: {len(allowed_calls(kind))} system calls")
        lines += [f"  {rule.call:<18}{rule.reason}{_arguments(rule)}" for rule in allowed]
        lines.append("")
    refused = dict.fromkeys((rule.call, rule.reason) for kind in KINDS for rule in rules_of(kind) if not rule.allows)
    lines.append("answered with ENOSYS:")
    lines += [f"  {call:<18}{reason}" for call, reason in refused]
    lines += ["", "Everything else ends the process with a line in the log (SIGSYS).",
              f"{calls_of_a_process()} system calls in all; at most " + ", ".join(
                  f"{KIND_NAMES[kind]} {calls_of_a_process((kind,))}" for kind in KINDS)]
    return "\n".join(lines) + "\n"


def _arguments(rule: Rule) -> str:
    words = "; ".join(test.words for test in rule.tests)
    return f" [{words}]" if words else ""
