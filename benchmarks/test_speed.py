"""Forward and backward over the cases of `cases.py`, on every backend that this computer has: `pytest benchmarks/`.

NumPy and the simulator run the small cases, a GPU those of BENCHMARKS. The figures of pytest-benchmark's table are times in
copies: the time of a pass over that of a copy of its floor's bytes, measured in turn, so that a baseline stays good when the
machine's speed drifts. `extra_info` (in --benchmark-json) has seconds, GB/s and the fraction of a copy, also of what runs
beside ours: on a GPU and the simulator the original SRU's design (original.cu), on NumPy the `sru` package's operator.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import pytest

from benchmarks import cases, peers
from benchmarks.cases import Case
from benchmarks.workload import PASSES, Workload
from cusru import measuring

ROUNDS = 5
SMALL = [(case, dtype) for case in cases.SMALL for dtype in case.dtypes]
TABLES = {
    "numpy": [*SMALL, (cases.CASES["short"], "float32")],
    "simulator": SMALL,
    "gpu": [(case, dtype) for case in cases.BENCHMARKS for dtype in case.dtypes],
}


def parameters() -> Iterator[Any]:
    for backend, table in TABLES.items():
        for case, dtype in table:
            for direction in PASSES:
                marks = [pytest.mark.gpu] if backend == "gpu" else []
                yield pytest.param(backend, case, dtype, direction, marks=marks, id=f"{backend}-{case.name}-{dtype}-{direction}")


_latest: dict[tuple[str, Case, str], Workload] = {}


def workload(backend: str, case: Case, dtype: str) -> Workload:
    """Kept for the case's other pass; two at once might not fit on a device."""
    key = (backend, case, dtype)
    if key not in _latest:
        _latest.clear()
        _latest[key] = Workload(found(backend), case, dtype)
    return _latest[key]


@functools.cache
def found(backend: str) -> measuring.Machine:
    return measuring.find(backend)


@pytest.mark.parametrize(("backend", "case", "dtype", "direction"), list(parameters()))
def test_speed(
    benchmark: Any, clock: Any, monkeypatch: pytest.MonkeyPatch, backend: str, case: Case, dtype: str, direction: str
) -> None:
    monkeypatch.setenv("CUSRU_SIMULATE", "1" if backend == "simulator" else "")
    if dtype == "bfloat16":
        pytest.importorskip("ml_dtypes", reason='no ml_dtypes: pip install ".[test]"')
    try:
        found(backend)
    except RuntimeError as error:
        pytest.skip(str(error))
    work = workload(backend, case, dtype)
    others = {}
    if backend == "numpy":
        try:
            others["sru"] = getattr(peers.sru_operator(work), direction)
        except peers.Unavailable as error:
            benchmark.extra_info["no_sru"] = str(error)
    if benchmark.disabled:  # --benchmark-disable: each once, nothing timed
        benchmark(lambda: [call() for call in (work.calls(direction) | others).values()])
        return
    benchmark.extra_info |= work.measure(direction, others)
    run, floor, time = functools.partial(work.run, direction), work.floor(direction), work.machine.time
    # Each elsewhere in memory: on a CPU the speed of a small copy depends on where it lies.
    copies = [work.copy(floor)] * ROUNDS if backend == "gpu" else [work.copy(floor) for _ in range(ROUNDS)]
    benchmark.pedantic(lambda: clock.advance(time(run) / time(copies.pop())), rounds=ROUNDS)
