"""What a call costs before its kernel starts stays what was reached; and benchmarks/host.py measures what it says."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from benchmarks import device, host, report, stand_in
from cusru import measuring

# What was reached: 2026-11-26, CPython 3.11, CuPy 14.2, torch 2.13.
CALLS = {  # of Python's functions
    "sru_forward, out and workspace given": 23,
    "sru_forward, results allocated": 32,
    "sru_backward, out and workspace given": 23,
    "sru_backward, results allocated": 49,
    host.NO_GRAD: 34,
    host.BOTH: 108,
}
MULTIPLES = {host.NO_GRAD: 2.4, host.BOTH: 2.6}  # of the bare autograd.Function's time
MORE = 1.5  # times as much is a failure


@pytest.fixture
def cupy(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    pytest.importorskip("cupy", reason='needs CuPy: pip install "cusru[cuda13]"')
    with stand_in.no_driver() as cupy:
        yield cupy


@pytest.fixture
def torch(monkeypatch: pytest.MonkeyPatch) -> Any:
    torch = pytest.importorskip("torch", reason='needs torch: pip install "cusru[torch]"')
    pytest.importorskip("cusru.torch")
    monkeypatch.setenv("CUSRU_SIMULATE", "")
    return torch


# ---- what was reached is kept --------------------------------------------------------------------------------------------


def test_functions_take_no_more_python_calls_than_was_reached(cupy: Any) -> None:
    for name, call in host.functions(lambda a: stand_in.put(cupy, a)).items():
        assert host.count(call).python <= MORE * CALLS[name], name


def test_the_operator_takes_no_more_python_calls_than_was_reached(torch: Any) -> None:
    operators = host.operators()
    with host.no_recurrence():
        for name, call in operators.ours.items():
            assert host.count(call).python <= MORE * CALLS[name], name


def test_the_operator_s_time_stays_the_multiple_of_a_bare_function_s_that_was_reached(torch: Any) -> None:
    operators = host.operators()
    with host.no_recurrence(), host.one_thread(torch):
        for name, times in host.multiples(operators).items():
            assert times["ours"] <= MORE * MULTIPLES[name] * times["bare Function"], name


# ---- the instrument ------------------------------------------------------------------------------------------------------


def test_calls_are_counted_each_time_alike_but_for_those_of_another_file() -> None:
    def inner(values: list[int]) -> int:
        return len(values)

    def outer() -> int:
        return inner([1]) + inner([2])

    assert measuring.count_calls(outer) == measuring.count_calls(outer) == (3, 2)
    assert measuring.count_calls(outer, without=__file__) == (0, 0)
    assert sys.getprofile() is None


def test_a_time_is_the_best_of_turns_that_alternate() -> None:
    """a takes 2 s, then 1, then 3; b twice as long."""
    now, order, pace = 0.0, [], iter([2.0] * 8 + [1.0] * 2 + [3.0] * 2)

    def take(name: str, seconds: float) -> None:
        nonlocal now
        order.append(name)
        now += seconds * next(pace)

    calls = {"a": lambda: take("a", 1), "b": lambda: take("b", 2)}
    assert measuring.in_turn(calls, rounds=2, clock=lambda: now) == {"a": 1, "b": 2}
    assert order == ["a"] * 4 + ["b"] * 4 + ["a", "b"] * 2


def test_the_stand_in_takes_the_launches_and_gives_the_memory(cupy: Any) -> None:
    """One launch forward, two backward; memory for what is not given, and for nothing else. Afterwards CuPy is as it was."""
    calls, allocated, give = host.functions(lambda a: stand_in.put(cupy, a)), [], cupy.cuda.get_allocator()
    cupy.cuda.set_allocator(lambda size: allocated.append(size) or give(size))
    try:
        for (name, call), launches, arrays in zip(calls.items(), (1, 1, 2, 2), (0, 3, 0, 6), strict=True):
            before, allocated[:] = stand_in.Kernel.launches, []
            results = call()
            assert (stand_in.Kernel.launches - before, len(allocated)) == (launches, arrays), name
            assert all(isinstance(a, cupy.ndarray) for a in results)  # type: ignore[attr-defined]
    finally:
        cupy.cuda.set_allocator(give)


def test_afterwards_cupy_is_as_it_was() -> None:
    cupy = pytest.importorskip("cupy", reason='needs CuPy: pip install "cusru[cuda13]"')

    def parts() -> list[Any]:
        cuda = cupy.cuda
        return [cupy.RawKernel, cuda.Device, cuda.get_current_stream, cuda.Stream, cuda.runtime.getDevice, cuda.get_allocator()]

    before = parts()
    with stand_in.no_driver():
        assert all(a is not b for a, b in zip(before, parts(), strict=True))
    assert parts() == before


def test_layers_that_are_compared_compute_the_same(torch: Any) -> None:
    sru = pytest.importorskip("sru", reason='sru is missing: pip install ".[peers]"').SRU
    ours, theirs = host._pair(sru, 8, 2)
    x, c = torch.randn(1, 3, 8), torch.randn(2, 3, 8)
    with torch.no_grad():
        for a, b in zip(ours(x, c), theirs(x, c), strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.filterwarnings("ignore")  # of sru, when it is imported
def test_the_command_says_each_figure_or_what_is_missing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A call takes 2 us and 3 us what is beside it."""
    monkeypatch.setattr(measuring, "in_turn", lambda calls, *_, **__: {name: 3e-6 - 1e-6 * (name == "ours") for name in calls})
    only = [word for group in ("launch", "torch", "whole", "device") for word in ("--only", group)]
    assert host.main(["--json", *only]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert {row["group"] for row in rows} == {"launch", "torch", "whole", "device"}
    for row in rows:
        if row["missing"] or row["what"].startswith("("):
            continue
        assert row["python_calls"] > 0
        if row["group"] in ("torch", "whole"):
            assert (row["us"], row["beside_us"]) == (2, 3)
            assert row["ratio"] == pytest.approx(2 / 3 if row["ratio_of"] == host.OURS else 3 / 2, abs=1e-3)
    for name in ("cupy", "torch", "sru"):
        monkeypatch.setitem(sys.modules, name, None)  # type: ignore[arg-type]
    assert host.main(["--json", *only]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["group"] for row in rows] == ["launch", "torch", "whole", "device"]
    assert all("pip install" in row["missing"] for row in rows)


def test_without_sru_the_rest_is_measured(torch: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sru", None)  # type: ignore[arg-type]
    monkeypatch.setattr(measuring, "in_turn", lambda calls, *_, **__: dict.fromkeys(calls, 1e-6))
    layer, missing = host.whole()
    assert layer.ratio == 1
    assert "pip install" in str(missing.missing)


def test_an_import_is_held_against_torch_s(torch: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    said = iter(["2.0 0.75", "4.0 0.5", "3.0 1.0"])
    monkeypatch.setattr(host.subprocess, "run", lambda *_, **__: SimpleNamespace(returncode=0, stdout=next(said)))
    (row,) = host.imports()
    assert (row.us, row.beside_us, row.ratio) == (0.5e6, 2e6, 0.25)


def test_with_a_device_the_host_s_time_is_held_against_the_kernel_s(cupy: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The stand-in's device, on which a kernel takes a millisecond."""
    machine = measuring.Cuda.__new__(measuring.Cuda)
    machine.cupy = cupy
    monkeypatch.setattr(machine, "put", lambda a: stand_in.put(cupy, a))
    monkeypatch.setattr(machine, "bytes", lambda count: cupy.empty(count, np.uint8))
    monkeypatch.setattr(machine, "time", lambda call: 1e-3)
    monkeypatch.setattr(measuring, "find", lambda name: machine)
    rows = [row for row in host.on_device() if not row.missing]
    assert len(rows) == 4 * len(host.ON_DEVICE)
    for row in rows:
        assert row.beside_us == pytest.approx(1000)
        assert row.us is not None
        assert row.ratio == pytest.approx(row.us / 1000)
        assert row.python_calls


def test_an_lstm_is_run_as_the_operator_is(torch: Any) -> None:
    lstm = host._lstm(torch, "cpu", (3, 2, 4))
    assert lstm.keys() == host.operators("cpu", (3, 2, 4)).ours.keys()
    for call in lstm.values():
        call()


def test_the_device_report_has_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    row = host.Row("device", "sru_forward: short", (128, 32, 512), 12.34, "the kernel, by events", 24.68, 0.5, python_calls=20)
    monkeypatch.setattr(host, "rows", lambda groups: iter([row._replace(group=groups[0])]))
    for simulate, group in ((True, "launch"), (False, "device")):
        found = list(device.host(simulate, seconds=35))
        assert json.loads(json.dumps(found))[0]["group"] == group
        lines = list(report._host({"steps": {"host": {"rows": json.loads(json.dumps(found))}}}))
        assert f"## The host: {host.TITLES[group]}" in lines
        assert "| sru_forward: short | 128, 32, 512 | 12.3 | the kernel, by events | 24.7 | 0.50 |  | 20 |  |  |" in lines


def test_the_operators_that_are_compared_allocate_alike(torch: Any) -> None:
    """The bare Function's results and gradients have the shapes and dtypes of ours."""
    operators, seen = host.operators("cpu", (3, 2, 4)), []
    grad = torch.autograd.grad
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.autograd, "grad", lambda *args: seen.append((args[0], grad(*args))))
        for calls in operators:
            calls[host.BOTH]()
    (ours, bare) = [[(a.shape, a.dtype) for results in call for a in results] for call in seen]
    assert ours == bare


def test_every_cell_has_a_head_and_every_group_a_title() -> None:
    for row in (host.Row("launch", "x"), host.Row("launch", "x", missing="y")):
        assert len(host.line(row)) == len(host.HEADS) == len(host.WIDTHS)
    assert host.GROUPS.keys() == host.TITLES.keys()
