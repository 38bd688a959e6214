"""cusru's own kernels under the compiler's sanitizers, on the simulator; each check also with a fault planted in them."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from cusru import raw_kernels, simulator

RUN = """
import numpy as np
import cusru
from cusru import raw_kernels, simulator

source, fault, remedy = raw_kernels.source(), FAULT, REMEDY
if remedy:
    assert source.count(remedy) >= 1, "the line to break is gone"
    raw_kernels.source = lambda: source.replace(remedy, fault)
rng = np.random.default_rng(0)
for simulator.multiprocessors, raw_kernels.split in WAYS:
    for length, batch, width, k, save_every in CASES:
        def normal(*shape):
            return rng.standard_normal(shape).astype("f4")
        arguments = dict(
            u=normal(length, batch, width, k), bias=normal(2, width), c0=normal(batch, width),
            weight_c=normal(2, width) if k == 3 else normal(length, batch, width, 2),
            x=normal(length, batch, width) if k == 3 else None,
            mask_pad=rng.random((length, batch)) < 0.2, bidirectional=width % 2 == 0, save_every=save_every,
        )
        o = [np.empty(s, "f4") for s in ((length, batch, width), (-(-length // save_every), batch, width), (batch, width))]
        o = cusru.sru_forward(**arguments, out=o)
        workspace = np.empty(cusru.workspace_size("backward", **arguments), "u1")
        o.h[3::9] = np.inf  # where time is split carries that must be walked, and told
        cusru.sru_backward(o.h, o.c_last, o.c, **arguments, workspace=workspace)
"""
AFFINE = """
for simulator.multiprocessors, raw_kernels.split in WAYS:
    for length, batch, width, save_every in ((70, 3, 24, 40), (33, 2, 7, 1)):
        def normal(*shape):
            return rng.standard_normal(shape).astype("f4")
        shared = dict(
            c0=normal(batch, width), starts=rng.random((length, batch)) < 0.1, save_every=save_every, reverse=width % 2 == 1,
            mask_pad=rng.random((length, batch)) < 0.2,
        )
        u, zoneout, b = normal(length, batch, width, 4), rng.random((length, batch, width)) < 0.2, normal(length, batch, width)
        o = cusru.qrnn_forward(u, pooling="ifo", zoneout=zoneout, **shared)
        cusru.qrnn_backward(o.h, o.c_last, o.c, u, pooling="ifo", zoneout=zoneout, **shared)
        b[3::9] = np.inf
        for a in (normal(batch, width) / 4, normal(width) / 4, normal(length, batch, width) / 4):
            o = cusru.linear_recurrence_forward(a, b, form="blend", **shared)
            cusru.linear_recurrence_backward(o.h, o.c_last, o.c, a, b, form="blend", **shared)
    for save_every in (1, 3, 20):  # tiles of two steps
        u, weight = normal(60, 2, 7, 3), normal(60, 2, 7, 2)
        o = cusru.sru_forward(u, weight_c=weight, activation="tanh", save_every=save_every)
        cusru.sru_backward(o.h, o.c_last, o.c, u, weight_c=weight, activation="tanh", save_every=save_every)
"""
GUESSED = """
raw_kernels.split = (8, 2)  # several turns of a warp, slices of several tiles
rng, length = np.random.default_rng(0), 300
u, weight = rng.standard_normal((length, 1, 12, 3)).astype("f4"), rng.uniform(-1, 1, (2, 12)).astype("f4")
cusru.sru_forward(u, weight_c=weight, save_every=8, bidirectional=True)
"""
WAYS = [(0, ()), (132, ()), (132, (2, 2))]  # a warp a block; several that take turns; spans of time, a block each
CASES = [(5, 3, 24, 3, 1), (150, 2, 7, 4, 1), (70, 3, 24, 3, 40), (150, 2, 7, 4, 4)]

FAULTS = {  # sanitizer, the line, the line broken, what the sanitizer says
    "a state stored a row too far": (
        "address",
        "args.c_last.at(0, thread.b, thread.d + i, 0)",
        "args.c_last.at(0, thread.b + 1, thread.d + i, 0)",
        "heap-buffer-overflow",
    ),
    "a record past the shared memory": (
        "address",
        "return records + row * In::BYTES;",
        "return records + (row + 1) * In::BYTES;",
        "AddressSanitizer",
    ),
    "an array indexed past its end": (
        "undefined",
        "retreat<V>(linear[t][i], carry[i], gc[t][i])",
        "retreat<V>(linear[t][i], carry[i], gc[t + (t == T - 1)][i])",
        "out of bounds",
    ),
    "a state handed on before it is there": (
        "thread",
        "\n            barrier_arrive(BARRIER + to, 64);",
        "\n            barrier_arrive(BARRIER + to, 64), slot(to, 0) = value[0];",
        "data race",
    ),
    "warps that do not wait for one another": ("thread", "__syncthreads();", ";", "data race"),
    "a flag stored without release": (
        "thread",
        "store_release(flag(span), before | kind);",
        "store_relaxed(flag(span), before | kind);",
        "data race",
    ),
    "a flag read without acquire": (
        "thread",
        "do kinds = load_acquire(flag(span));",
        "do kinds = load_relaxed(flag(span));",
        "data race",
    ),
    "an end not waited for": ("thread", "if (lane_ == 0) wait(END, from + k);", "", "data race"),
    "a lane that says that states have merged before others have looked": (
        "thread",
        "            __syncwarp();  // its own lanes have looked; a vote orders no memory\n",
        "",
        "data race",
    ),
    "a block counted without acquire and release": (
        "thread",
        "add_acquire_release(counter())",
        "atomicAdd(counter(), 1u)",
        "data race",
    ),
    "a flag stored before the whole warp has written": (
        "thread",
        "        __syncwarp();\n        if (threadIdx.x % 32 == 0) store",
        "        if (threadIdx.x % 32 == 0) store",
        "data race",
    ),
}
LIBRARIES = {"address": "asan", "undefined": "ubsan", "thread": "tsan"}


def _files(text: str) -> list[str]:
    folder = Path(raw_kernels.__file__).parent / "kernels"
    return [path.name for path in sorted(folder.iterdir()) if path.is_file() and text in path.read_text()]


def run(sanitizer: str, remedy: str = "", fault: str = "") -> subprocess.CompletedProcess[str]:
    name = f"lib{LIBRARIES[sanitizer]}.so"
    library = subprocess.run([simulator.compiler(), f"-print-file-name={name}"], capture_output=True, text=True).stdout.strip()
    if not os.path.isabs(library):
        pytest.skip(f"this compiler comes without {name}")
    environment = os.environ | {
        "CUSRU_SIMULATE": "1",
        "CUSRU_SIMULATE_FLAGS": f"-fsanitize={sanitizer} -fno-sanitize-recover=all -g1",  # lines alone: -g compiles longer
        "LD_PRELOAD": library,
        "ASAN_OPTIONS": "detect_leaks=0",
        "TSAN_OPTIONS": "halt_on_error=1 exitcode=66",
        "OPENBLAS_NUM_THREADS": "1",
        "PYTHONPATH": str(Path(__file__).parents[1]),
    }
    # ThreadSanitizer cannot live with much randomness of addresses.
    prefix = ["setarch", "-R"] if sanitizer == "thread" and shutil.which("setarch") else []
    files = _files(remedy) if remedy else []
    ways = WAYS[-1:] if files in (["split.cuh"], ["guess.cuh"]) else WAYS  # no other has that fault
    code = f"WAYS, CASES, REMEDY, FAULT = {ways!r}, {CASES!r}, {remedy!r}, {fault!r}\n{RUN}"
    code += GUESSED * (files in ([], ["guess.cuh"])) + AFFINE * (not remedy)
    return subprocess.run([*prefix, sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=300)


@pytest.fixture(autouse=True)
def _needs_a_compiler() -> None:
    try:
        simulator.compiler()
    except RuntimeError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize("sanitizer", LIBRARIES)
def test_the_kernels_are_clean(sanitizer: str) -> None:
    done = run(sanitizer)
    assert done.returncode == 0, done.stderr[-4000:]
    assert "Sanitizer" not in done.stderr, done.stderr[-4000:]


@pytest.mark.parametrize("case", FAULTS)
def test_a_fault_planted_in_the_kernels_is_found(case: str) -> None:
    sanitizer, remedy, fault, says = FAULTS[case]
    done = run(sanitizer, remedy, fault)
    assert done.returncode != 0, "the fault went unseen"
    assert says in done.stderr, done.stderr[-4000:]
