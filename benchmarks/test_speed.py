"""Forward and backward over the cases of `cases.py`: `pytest benchmarks/`.

NumPy runs the small cases, a GPU those of BENCHMARKS. pytest-benchmark's own table shows a call as its caller sees it; under
`extra_info` (in --benchmark-json) stand GB/s of the floor's bytes and the fraction of a copy that moves as many, in the same run.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import pytest

import cusru
from benchmarks import cases
from benchmarks.cases import Case
from cusru.__main__ import Cpu, Gpu

NUMPY = [(case, dtype) for case in cases.SMALL for dtype in case.dtypes] + [(cases.CASES["short"], "float32")]
GPU = [(case, dtype) for case in cases.BENCHMARKS for dtype in case.dtypes]


@functools.cache
def machine(module: str) -> Cpu | Gpu:
    if module == "numpy":
        return Cpu(simulated=False)
    cupy = pytest.importorskip("cupy", reason='no CuPy: pip install ".[cuda13]"')
    try:
        return Gpu(cupy)
    except Exception as error:
        pytest.skip(f"no CUDA device: {type(error).__name__}")


def parameters() -> Iterator[Any]:
    for module, table in (("numpy", NUMPY), ("cupy", GPU)):
        for case, dtype in table:
            for direction in ("forward", "backward"):
                marks = [pytest.mark.gpu] if module == "cupy" else []
                yield pytest.param(module, case, dtype, direction, marks=marks, id=f"{module}-{case.name}-{dtype}-{direction}")


@pytest.mark.parametrize(("module", "case", "dtype", "direction"), list(parameters()))
def test_speed(benchmark: Any, monkeypatch: pytest.MonkeyPatch, module: str, case: Case, dtype: str, direction: str) -> None:
    monkeypatch.delenv("CUSRU_SIMULATE", raising=False)
    if dtype == "bfloat16":
        pytest.importorskip("ml_dtypes", reason='no ml_dtypes: pip install ".[test]"')
    here = machine(module)
    given = cases.make(case, dtype, put=here.put)
    function: Any = cusru.sru_forward
    inputs = [a for a in given.values() if hasattr(a, "nbytes")]
    if direction == "backward":
        grad_h, grad_c_last = cases.make_gradients(case, dtype, put=here.put)
        c = cusru.sru_forward(**given).c
        function = functools.partial(cusru.sru_backward, grad_h, grad_c_last, c)
        inputs += [grad_h, grad_c_last, c]
    workspace = here.bytes(cusru.workspace_size(direction, **given))
    results = function(**given)

    def run() -> None:
        function(**given, out=results, workspace=workspace)

    def run_and_wait() -> None:
        run()
        if isinstance(here, Gpu):
            here.cupy.cuda.get_current_stream().synchronize()

    floor = sum(a.nbytes for a in (*inputs, *results) if a is not None)
    source, target = here.bytes(floor // 2), here.bytes(floor // 2)
    of_copy = here.seconds(functools.partial(here.copy, source, target))
    seconds = here.seconds(run)
    benchmark.extra_info |= {"floor_bytes": floor, "gb_per_s": floor / seconds / 1e9, "of_copy": of_copy / seconds}
    benchmark.pedantic(run_and_wait, rounds=5, warmup_rounds=1)
