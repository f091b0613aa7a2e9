"""`pytest --ptx tests/kernels tests/ops`: kernel tests on compiled code, run by the machine of `benchmarks.aot.ptx`.

Loaded by tests/conftest.py. `--ptx-arch` or PTX_ARCH names the chip (sm_89). A fault that the machine finds fails the
test in which it happens. Launches of tests that leave the interpreter's CPU tensors go the same way.
"""

from __future__ import annotations

import os

import pytest

ARCHES = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_120")


def add_options(parser: pytest.Parser) -> None:
    """The plugin's flags."""
    parser.addoption("--ptx", action="store_true", help="run Triton kernels from their PTX, not in the interpreter")
    parser.addoption("--ptx-arch", choices=ARCHES, default=os.environ.get("PTX_ARCH", "sm_89"), help="chip of --ptx")


class PtxPlugin:
    """Takes the launches over for the whole session, and says at its end what ran."""

    def __init__(self, arch: str) -> None:
        os.environ["TRITON_INTERPRET"] = "0"  # before triton is imported
        from benchmarks.aot.ptx.host import Host

        self.host = Host(arch)
        self._taken = self.host.taking_over()
        self._taken.__enter__()

    @pytest.hookimpl(trylast=True)
    def pytest_runtest_teardown(self) -> None:
        self.host.fresh.forget()

    def pytest_unconfigure(self) -> None:
        self._taken.__exit__(None, None, None)

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        host = self.host
        blocks = [entered > 0 for kernel in host.kernels.values() for entered in kernel.executed]
        steps = sum(kernel.lane_steps for kernel in host.kernels.values())
        terminalreporter.write_line(
            f"PTX {host.arch}: {host.launches} launches of {len(host.kernels)} programs, {steps / 1e6:.0f} M lane "
            f"steps, {sum(blocks)} of {len(blocks)} blocks entered"
        )
