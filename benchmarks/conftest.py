"""pytest-benchmark's table and baseline hold ratios: the time of a pass over that of a copy of as many bytes, in the same run."""

from __future__ import annotations

from typing import Any

import pytest

from cusru.measuring import look_around


class Clock:
    """The timer that pytest-benchmark reads. It stands still but for `advance`."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def __repr__(self) -> str:
        return "copies of as many bytes"

    def advance(self, copies: float) -> None:
        self.now += copies


CLOCK = Clock()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "benchmark" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.benchmark(timer=CLOCK))


@pytest.fixture
def clock() -> Clock:
    return CLOCK


@pytest.hookimpl(optionalhook=True)  # without pytest-benchmark nobody knows these
def pytest_benchmark_scale_unit(unit: str) -> tuple[str, float]:
    return ("copie" if unit == "seconds" else "", 1.0)  # pytest-benchmark appends an s


@pytest.hookimpl(optionalhook=True)
def pytest_benchmark_update_machine_info(machine_info: dict[str, Any]) -> None:
    """Device and versions instead of the computer's name."""
    for name in ("node", "release"):
        machine_info.pop(name, None)
    machine, versions, _ = look_around()
    machine_info |= {"device": machine.device, "versions": versions}


@pytest.hookimpl(optionalhook=True)
def pytest_benchmark_update_commit_info(commit_info: dict[str, Any]) -> None:
    commit_info.pop("project", None)  # the checkout's folder


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """Each figure as GB/s of the floor's bytes and as a fraction of a copy, ours and what ran beside it."""
    session = getattr(config, "_benchmarksession", None)
    measured = [(one.param, one.extra_info) for one in session.benchmarks if one.extra_info] if session else []
    if not measured:
        return
    terminalreporter.section("GB/s (fraction of a copy of as many bytes)")
    for name, row in measured:
        figures = (f"{who} {f['gb_per_s']:.4g} ({f['of_copy']:.3g})" for who, f in row["times"].items())
        terminalreporter.write_line(f"{name:<48}{row['copy_gb_per_s']:>8.4g} copy   " + "   ".join(figures))
