"""`python -m benchmarks.layers --out DIR`: what one layer takes, SRU and QRNN beside LSTM, GRU and convolutions.

It makes figure 2 of "Training RNNs as Fast as CNNs" (Lei et al. 2017, https://arxiv.org/abs/1709.02755) anew: forward and
backward of one layer from D to D features, with a batch of 32. It runs on the GPU that torch finds, or on the CPU, where cusru's
layers run on NumPy.

    LSTM, GRU               torch.nn's, on a GPU cuDNN's
    conv1d, 2 and 3 wide    torch.nn.Conv1d of D filters on (B, D, L), its own layout, with a bias and no activation; padded by
                            width - 1 steps, as a causal one is
    QRNN, window 1 and 2    cusru.torch.QRNN
    SRU v1, SRU v2          cusru.torch.SRU
    SRU++                   cusru.torch.SRUpp, as Lei 2021 has it: D / 4 features and one head attend, here to all steps

Whole layers, their GEMMs included: forward alone, without gradients, and forward and backward, with those of the input and of
all parameters. A round runs all of them one after the other, each for some time in a row, as a training job does. A time is the
median of the rounds, and what the LSTM takes over it that of the rounds' own ratios. On a GPU time is that between CUDA events
around the calls in a row: the device's, or Python's where it is longer. There float32 has TF32 in every GEMM, and bfloat16 is
measured too.

FLOPs are twice the multiplications of the forward's GEMMs, and the same on any machine; a backward has twice as many.
DIR receives layers.json, in the form of the device's report, and layers.png. The exit status is 1 if a
layer failed.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

from benchmarks import peers
from benchmarks import report as reports
from cusru import measuring

Row = dict[str, Any]
Call = Callable[[], Any]
Shape = tuple[int, int, int]  # L, B, D

SHAPES = {
    "cpu": [(L, 32, D) for D in (128, 256, 512) for L in (32, 128, 512)],
    "cuda": [(L, 32, D) for D in (256, 512, 1024) for L in (32, 128, 512, 1024)],
    "quick": [(8, 2, 16), (16, 2, 16)],
}
DTYPES = {"cpu": ("float32",), "cuda": ("float32", "bfloat16")}
TURN = {"cpu": 0.1, "cuda": 0.01, "quick": 0.002}  # seconds of one layer's calls in a row, one at least


class Cell(NamedTuple):
    make: Callable[[Any, int], Any]  #: torch.nn, D -> one layer
    products: Callable[[int, int], int]  #: L, D -> multiplications of the forward's GEMMs for one sequence


def _ours(name: str, *sizes: int, **options: Any) -> Any:
    module = peers.import_or_say_why("cusru.torch")
    if not hasattr(module, name):
        raise peers.Unavailable(f"this cusru.torch has no {name}")
    return getattr(module, name)(*sizes, num_layers=1, **options)


def _attending(L: int, D: int) -> int:
    P = D // 4  # D -> P; keys and values; scores and what they weigh; P -> 3 D
    return L * (D * P + 2 * P * P + 2 * L * P + 3 * P * D)


CELLS = {
    "LSTM": Cell(lambda nn, D: nn.LSTM(D, D), lambda L, D: 8 * L * D * D),
    "GRU": Cell(lambda nn, D: nn.GRU(D, D), lambda L, D: 6 * L * D * D),
    "conv1d, 2 wide": Cell(lambda nn, D: nn.Conv1d(D, D, 2, padding=1), lambda L, D: 2 * (L + 1) * D * D),
    "conv1d, 3 wide": Cell(lambda nn, D: nn.Conv1d(D, D, 3, padding=2), lambda L, D: 3 * (L + 2) * D * D),
    "QRNN, window 1": Cell(lambda nn, D: _ours("QRNN", D, D, window=1), lambda L, D: 3 * L * D * D),
    "QRNN, window 2": Cell(lambda nn, D: _ours("QRNN", D, D, window=2), lambda L, D: 6 * L * D * D),
    "SRU v1": Cell(lambda nn, D: _ours("SRU", D, D, v1=True), lambda L, D: 3 * L * D * D),
    "SRU v2": Cell(lambda nn, D: _ours("SRU", D, D), lambda L, D: 3 * L * D * D),
    "SRU++": Cell(lambda nn, D: _ours("SRUpp", D, D, D // 4, num_heads=1), _attending),
}


def passes(torch: Any, cell: Cell, shape: Shape, dtype: str, device: str) -> tuple[Any, dict[str, Call]]:
    """One layer, and its two calls, ready to be timed. `both` returns the gradients of the input and of each parameter."""
    L, B, D = shape
    to = {"device": device, "dtype": getattr(torch, dtype)}
    layer, for_inference = (cell.make(torch.nn, D).to(**to) for _ in range(2))
    for_inference.eval()  # in which cuDNN keeps nothing for a backward
    is_conv = isinstance(layer, torch.nn.Conv1d)
    x = torch.randn((B, D, L) if is_conv else shape, requires_grad=True, **to)
    leaves = [x, *(parameter for parameter in layer.parameters() if parameter.requires_grad)]

    def run(layer: Any) -> Any:
        return layer(x) if is_conv else layer(x)[0]

    def forward() -> Any:
        with torch.no_grad():
            return run(for_inference)

    grad = torch.randn_like(forward())
    return layer, {"forward": forward, "both": lambda: torch.autograd.grad(run(layer), leaves, grad)}


def _clock(torch: Any, device: str) -> Callable[[Call, int], float]:
    """Seconds of a call, of so many in a row."""

    def on_cpu(call: Call, count: int) -> float:
        start = time.perf_counter()
        for _ in range(count):
            call()
        return (time.perf_counter() - start) / count

    def on_gpu(call: Call, count: int) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        start.record()
        for _ in range(count):
            call()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) / 1e3 / count

    return on_gpu if device == "cuda" else on_cpu


def measure(torch: Any, shape: Shape, dtype: str, device: str, rounds: int, turn: float) -> Iterator[Row]:
    """A row for each cell: its times, or why there are none."""
    clock = _clock(torch, device)
    L, B, D = shape
    rows = {name: {"cell": name, "shape": [*shape], "dtype": dtype} for name in CELLS}
    calls: dict[tuple[str, str], tuple[Call, int]] = {}
    for name, cell in CELLS.items():
        try:
            layer, of = passes(torch, cell, shape, dtype, device)
            once = {which: min(clock(call, 1) for _ in range(2)) for which, call in of.items()}  # warmed up by the first
        except peers.Unavailable as error:
            rows[name]["missing"] = str(error)
        except Exception as error:
            rows[name]["failed"] = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        else:
            calls |= {(name, which): (call, max(1, round(turn / once[which]))) for which, call in of.items()}
            parameters = sum(parameter.numel() for parameter in layer.parameters() if parameter.requires_grad)
            rows[name] |= {"parameters": parameters, "flops": 2 * B * cell.products(L, D), "seconds": {}, "lstm_over_it": {}}
    times = [{key: clock(*call) for key, call in calls.items()} for _ in range(rounds)]
    for name, which in calls:
        rows[name]["seconds"][which] = statistics.median(of[name, which] for of in times)
        if ("LSTM", which) in calls:
            rows[name]["lstm_over_it"][which] = statistics.median(of["LSTM", which] / of[name, which] for of in times)
    yield from rows.values()


def environment(torch: Any, device: str) -> Row:
    """What measures: the device and versions, and nothing that names this computer."""
    versions = measuring.look_around()[1]
    if device == "cpu":
        about: Row = {"device": measuring.Numpy().device, "threads of torch": torch.get_num_threads()}
    else:
        about = {"device": torch.cuda.get_device_name(), "CUDA": versions.get("CUDA", f"runtime {torch.version.cuda}")}
        about |= {"cuDNN": torch.backends.cudnn.version(), "CuPy": versions["CuPy"]}
    about |= {"torch": torch.__version__, "cusru": versions["cusru"], "NumPy": versions["NumPy"]}
    return about | {"Python": versions["Python"].split(",")[0]}


def rows(device: str | None = None, quick: bool = False, rounds: int = 5) -> Iterator[Row]:
    """First what measures, then a row for each dtype, shape and cell. device: cpu, cuda, or the GPU if there is one.
    On a CPU cusru runs on NumPy here, whatever CUSRU_SIMULATE says."""
    try:
        torch = peers.import_or_say_why("torch", 'pip install ".[torch]"')
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        if device == "cuda" and not torch.cuda.is_available():
            raise peers.Unavailable("this torch has no CUDA device")
    except peers.Unavailable as error:
        yield {"cell": "all of them", "missing": str(error)}
        return
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = True  # by default only cuDNN's GEMMs may
    with mock.patch.dict(os.environ, {"CUSRU_SIMULATE": ""}):
        yield environment(torch, device)
        size = "quick" if quick else device
        for dtype in DTYPES[device]:
            for shape in SHAPES[size]:
                yield from measure(torch, shape, dtype, device, 1 if quick else rounds, TURN[size])


def main(arguments: list[str] | None = None) -> int:
    about, details = (__doc__ or "\n").split("\n", 1)
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.layers", description=about, epilog=details, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--out", type=Path, metavar="DIR", help="where layers.json and layers.png go; made if it is not there")
    parser.add_argument("--rounds", type=int, default=5, help="of all layers, one after the other (5)")
    parser.add_argument("--quick", action="store_true", help="small shapes, one round: to try the command, not to measure")
    options = parser.parse_args(arguments)
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)

    start, date = time.monotonic(), datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    found: list[Row] = []
    for row in rows(quick=options.quick, rounds=options.rounds):
        if row.get("shape") not in (None, found[-1].get("shape") if found else None):
            print(f"{', '.join(map(str, row['shape']))}, {row['dtype']}", file=sys.stderr, flush=True)
        found.append(row)
    seconds = round(time.monotonic() - start, 1)
    shown = "".join(f" --{name}" for name in ("quick",) if options.quick) + f" --rounds {options.rounds}" * (options.rounds != 5)
    report: Row = {
        "date": date, "command": f"python -m benchmarks.layers --out DIR{shown}", "seconds": seconds, "environment": found[0],
        "steps": {"layers": {"status": "ok", "seconds": seconds, "rows": found}},
    }  # fmt: skip
    print("\n".join(reports.layers(report)))
    if options.out:
        (options.out / "layers.json").write_text(json.dumps(report, indent=1) + "\n")
        try:
            reports.picture_of_layers(report, options.out / "layers.png")
        except ImportError as error:
            print(f'no picture: {error}: pip install ".[examples]"', file=sys.stderr)
    return 1 if any("failed" in row for row in found) or not any("seconds" in row for row in found) else 0


if __name__ == "__main__":
    measuring.run_command(main)
