"""`python -m cusru`: what it prints, and what it exits with."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import oracle
import pytest

import cusru
from cusru import __main__ as main
from cusru import measuring, raw_kernels

ROOT = Path(__file__).parent.parent


@pytest.fixture
def small(monkeypatch):
    """On NumPy, with a problem that takes no time."""
    monkeypatch.setitem(main.SHAPES, "numpy", (6, 2, 20))
    monkeypatch.delenv("CUSRU_SIMULATE", raising=False)
    monkeypatch.setattr(measuring, "find_gpu", lambda: None)
    monkeypatch.setitem(sys.modules, "cupy", None)


def test_reports_each_pass_and_dtype_and_exits_with_0():
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    environment.pop("CUSRU_SIMULATE", None)
    run = subprocess.run(
        [sys.executable, "-m", "cusru"], env=environment, capture_output=True, text=True, timeout=120, stdin=subprocess.DEVNULL
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert run.stderr == ""
    assert f"cusru {cusru.__version__}" in run.stdout
    assert np.__version__ in run.stdout
    assert "All results are within their bounds." in run.stdout
    rows = [line.split()[:2] for line in run.stdout.splitlines() if " ms" in line]
    for dtype in ("float64", "float32", "float16"):
        assert [dtype, "forward"] in rows
        assert [dtype, "backward"] in rows
    assert "bfloat16" in run.stdout  # measured or said to be skipped


def test_json_says_the_same(small, capsys):
    assert main.main(["--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["ok"] is True
    assert report["backend"] == "NumPy"
    assert report["cusru"] == cusru.__version__
    assert report["shape"] == [6, 2, 20]
    for row in report["rows"]:
        assert 0 <= row["error"] <= 1
        assert row["seconds"] > 0
        assert row["gb_per_s"] > 0
        assert row["of_copy"] > 0


@pytest.mark.parametrize(
    ("direction", "result"), [("forward", "h"), ("forward", "c_last"), ("backward", "u"), ("backward", "bias")]
)
@pytest.mark.parametrize("wrong", [1.01, np.nan])
def test_an_error_out_of_bounds_exits_with_1(small, monkeypatch, capsys, direction, result, wrong):
    right = getattr(cusru, f"sru_{direction}")

    def broken(*args, **kwargs):
        results = right(*args, **kwargs)
        got = getattr(results, result)
        if not isinstance(got, measuring.Bits):
            got[...] *= wrong
        return results

    monkeypatch.setattr(cusru, f"sru_{direction}", broken)
    assert main.main([]) == 1
    printed = capsys.readouterr().out
    assert f"OUT OF BOUNDS: float64 {direction}, result {result}" in printed
    assert "All results" not in printed


@pytest.mark.parametrize(
    ("driver", "command"),
    [
        (13000, 'pip install "cusru[cuda13]"'),
        (12040, 'pip install "cusru[cuda12]"'),
        (None, 'pip install "cusru[cuda13]"    (with a CUDA 12 driver: "cusru[cuda12]")'),
    ],
)
def test_a_gpu_without_cupy_gets_the_install_line_and_runs_on_numpy(small, monkeypatch, capsys, driver, command):
    monkeypatch.setattr(measuring, "find_gpu", lambda: measuring.Driver("NVIDIA H100", driver))
    assert main.main([]) == 0
    lines = [line.strip() for line in capsys.readouterr().out.splitlines()]
    assert command in lines
    assert any(line.startswith("There is NVIDIA H100") and "no CuPy" in line for line in lines)
    assert ["backend", "NumPy"] in [line.split() for line in lines]


def test_cupy_without_a_device_says_so_and_runs_on_numpy(small, monkeypatch, capsys):
    class Cupy:
        __version__ = "14.2.0"

        class cuda:
            class runtime:
                @staticmethod
                def driverGetVersion():
                    raise RuntimeError("cudaErrorNoDevice: no CUDA-capable device is detected")

            class nvrtc:
                pass

    monkeypatch.setitem(sys.modules, "cupy", Cupy)
    assert main.main([]) == 0
    printed = capsys.readouterr().out
    assert "CuPy is installed but cannot be used here" in printed
    assert "cudaErrorNoDevice" in printed
    Cupy.__version__ = "13.6.0"
    assert main.main([]) == 0
    printed = capsys.readouterr().out
    assert "CuPy is installed but cannot be used here" in printed
    assert "this is CuPy 13.6.0, and cusru needs 14.2 or later: pip install" in " ".join(printed.split())


def test_without_ml_dtypes_every_dtype_is_measured_on_a_cpu(small, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "ml_dtypes", None)
    assert main.main([]) == 0
    rows = [line.split()[:2] for line in capsys.readouterr().out.splitlines() if line.startswith("  ")]
    assert all([dtype, direction] in rows for dtype in main.TOLERANCE for direction in ("forward", "backward"))


def test_the_truth_it_measures_by_is_the_oracle_s():
    values = {name: a.astype(np.float64) for name, a in main.make((40, 3, 20)).items()}
    truth = main.truth(**values)
    grad_h, grad_c_last = values.pop("grad_h"), values.pop("grad_c_last")
    expected = oracle.backward(grad_h, grad_c_last, **values) | {
        name: oracle.forward(**values)[name] for name in ("h", "c", "c_last")
    }
    for name, (value, magnitude) in truth.items():
        np.testing.assert_allclose(value, expected[name].reshape(value.shape), rtol=1e-9, atol=1e-12, err_msg=name)
        assert (magnitude > 0).all()


@pytest.mark.parametrize(
    ("shell", "status", "says"),
    [
        ("{} | head -n 1", 0, ""),
        ("{} --help | true", 0, ""),
        ("{} >&-", 0, ""),
        ("{} >/dev/full", 1, "cannot write what there is to say"),
        ("CUSRU_SIMULATE=1 CXX= PATH= {}", 2, "apt-get install g++"),
        ("CUSRU_SIMULATE=maybe {}", 2, "CUSRU_SIMULATE is 'maybe'"),
    ],
)
def test_whatever_becomes_of_its_output_there_is_no_traceback(shell, status, says):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "CUSRU_SIMULATE": ""}
    line = shell.format(f"{sys.executable} -m cusru")
    run = subprocess.run(["/bin/sh", "-c", line], env=environment, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert run.returncode == status, run.stderr
    assert says in run.stderr
    assert bool(run.stderr) == bool(says), run.stderr
    assert "Traceback" not in run.stderr


@pytest.mark.parametrize("simulated", [True, False])
def test_every_spelling_of_yes_and_no_is_understood(simulated, monkeypatch):
    u = np.ones((3, 2, 4, 3), "f4")
    used = []
    monkeypatch.setattr(cusru.raw_kernels, "run", lambda *_: used.append("simulator"))
    monkeypatch.setattr(cusru.call, "_run_numpy", lambda *_: used.append("NumPy"))
    spellings = ("1", "true", "True", "YES", "on", " 1 ") if simulated else ("0", "false", "FALSE", "No", "off", "", " ")
    for value in spellings:
        monkeypatch.setenv("CUSRU_SIMULATE", value)
        cusru.sru_forward(u)
        assert raw_kernels.simulated() == simulated
    assert used == ["simulator" if simulated else "NumPy"] * len(spellings)


@pytest.mark.parametrize("value", ["2", "y", "none", "simulate", "1,0"])
def test_any_other_spelling_is_refused_at_the_call(value, monkeypatch):
    monkeypatch.setenv("CUSRU_SIMULATE", value)
    h = np.full((3, 2, 4), 7, "f4")
    with pytest.raises(ValueError, match=f"CUSRU_SIMULATE is '{value}'; allowed are 1, true, yes and on, or 0, false"):
        cusru.sru_forward(np.ones((3, 2, 4, 3), "f4"), out=(h, None, None))
    assert (h == 7).all()


def test_who_only_calls_cusru_does_not_load_what_measures_it():
    line = "import sys, cusru; sys.exit('cusru.measuring' in sys.modules)"
    run = subprocess.run(
        [sys.executable, "-c", line], env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
