"""pytest-benchmark's table and baseline hold ratios: the time of a pass over that of a copy of as many bytes, in the same run."""

from __future__ import annotations

from typing import Any

import pytest

from cusru.__main__ import look_around


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


def pytest_benchmark_scale_unit(unit: str) -> tuple[str, float]:
    return ("copie" if unit == "seconds" else "", 1.0)  # pytest-benchmark appends an s


def pytest_benchmark_update_machine_info(machine_info: dict[str, Any]) -> None:
    """Device and versions instead of the computer's name."""
    machine_info.pop("node", None)
    machine, versions, _ = look_around()
    machine_info |= {"backend": machine.backend, "device": machine.device, "versions": versions}
