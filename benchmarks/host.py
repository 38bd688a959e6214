"""`python -m benchmarks.host`: what the Python before a kernel costs, and on a CPU a call as a whole.

    python -m benchmarks.host [--json] [--only launch]

    launch    cusru's functions with CuPy's arrays, the driver replaced by nothing (stand_in.py); no GPU is needed
    torch     cusru.torch.sru on a CPU, the recurrence replaced by nothing, over a bare torch.autograd.Function
    whole     nothing replaced, beside torch.nn.LSTM and the `sru` package
    import    cusru.torch's import beyond torch's
    device    with the driver and a GPU: the time that Python takes to enqueue a call, and its share of the kernel's

Of what is on one line the times are from one run, in turn, and on a CPU those of one thread: ratios last, microseconds drift with
the machine. Function calls are counted by sys.setprofile, Python's and those of C apart, without the stand-in's. With --json one
object a line:

    group, what, shape        shape: [L, B, D]
    us                        ours
    beside, beside_us         what ran in turn with it
    ratio, ratio_of           "ours / theirs" or "theirs / ours"
    goal                      of us or of the ratio
    gemm_share                of ours: what torch's matrix product alone takes
    python_calls, c_calls     of ours
    missing                   why there are no figures
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import os
import platform
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple
from unittest import mock

import numpy as np

import cusru
from benchmarks import peers, stand_in
from benchmarks.cases import CASES, Case
from benchmarks.workload import Workload
from cusru import measuring, reference
from cusru.measuring import Calls

Call = Callable[[], object]
SHAPE = (64, 8, 256)  # L, B, D, where nothing is computed
OURS, THEIRS = "ours / theirs", "theirs / ours"


class Row(NamedTuple):
    group: str
    what: str
    shape: tuple[int, ...] | None = None
    us: float | None = None
    beside: str | None = None
    beside_us: float | None = None
    ratio: float | None = None
    ratio_of: str | None = None
    goal: str | None = None
    gemm_share: float | None = None
    python_calls: int | None = None
    c_calls: int | None = None
    missing: str | None = None


def _compared(
    group: str, what: str, shape: tuple[int, ...], of: str, goal: str | None, beside: str, times: Mapping[str, float],
    calls: Calls | None = None, gemm: str | None = None,
) -> Row:  # fmt: skip
    """Of the times "ours", `beside` and perhaps `gemm`."""
    ours, theirs = times["ours"] * 1e6, times[beside] * 1e6
    ratio = ours / theirs if of == OURS else theirs / ours
    share = times[gemm] * 1e6 / ours if gemm else None
    return Row(group, what, shape, ours, beside, theirs, ratio, of, goal, share, *(calls or (None, None)))


def _or_why(group: str, what: str, measured: Iterator[Row]) -> Iterator[Row]:
    """What can be measured, and why not the rest."""
    try:
        yield from measured
    except peers.Unavailable as error:
        yield Row(group, what, missing=str(error))


# ---- cusru's functions ---------------------------------------------------------------------------------------------------

Arrays = dict[str, np.ndarray]


def problem(shape: tuple[int, int, int] = SHAPE) -> tuple[Arrays, Arrays]:
    """The inputs of an SRU v2, and the two gradients. Zeros: only their sizes count."""
    batch, width = shape[1:]
    inputs = dict(u=(*shape, 3), x=shape, bias=(2, width), weight_c=(2, width), c0=(batch, width))
    gradients = dict(grad_h=shape, grad_c_last=(batch, width))

    def zeros(shapes: dict[str, tuple[int, ...]]) -> Arrays:
        return {name: np.zeros(of, np.float32) for name, of in shapes.items()}

    return zeros(inputs), zeros(gradients)


def functions(put: Callable[[np.ndarray], Any]) -> dict[str, Call]:
    """sru_forward and sru_backward, ready to be called, with memory given and with results allocated."""
    given, gradients = ({name: put(a) for name, a in group.items()} for group in problem())
    forward = functools.partial(cusru.sru_forward, **given)
    out = [put(np.empty(of, np.float32)) for of in (SHAPE, SHAPE, SHAPE[1:])]
    backward = functools.partial(cusru.sru_backward, *gradients.values(), out[1], **given)
    gradients_out = [put(np.empty_like(a)) for a in problem()[0].values()]
    calls: dict[str, Call] = {}
    for call, memory in ((forward, out), (backward, gradients_out)):
        name = call.func.__name__
        workspace = put(np.empty(cusru.workspace_size(name.removeprefix("sru_"), **given), np.uint8))
        calls[f"{name}, out and workspace given"] = functools.partial(call, out=memory, workspace=workspace)
        calls[f"{name}, results allocated"] = call
    return calls


GOALS = {
    "sru_forward, out and workspace given": "15 us",
    "sru_forward, results allocated": "25 us",
    "sru_backward, out and workspace given": "20 us",
    "sru_backward, results allocated": "30 us",
}


def count(call: Call) -> Calls:
    call(), call()  # what is kept for the next call is there
    return measuring.count_calls(call, without=stand_in.__file__)


def launch() -> Iterator[Row]:
    peers.import_or_say_why("cupy", 'pip install ".[cuda13]"')
    with stand_in.no_driver() as cupy:
        calls = functions(functools.partial(stand_in.put, cupy))
        kernel, scope = cupy.RawKernel("", ""), cupy.cuda.Device(0)
        own: dict[str, Call] = {
            "a launch": functools.partial(kernel, (1,), (1,), (None,)),
            "the current stream": functools.partial(cupy.cuda.get_current_stream, 0),
            "a device or stream made current": functools.partial(_enter, scope),
            "an allocation, with CuPy's part": functools.partial(cupy.empty, SHAPE, np.float32),
        }
        times = measuring.in_turn({**calls, **own, EMPTY: _empty_calls})
        for name in calls:
            of = {"ours": times[name], EMPTY: times[EMPTY]}
            yield _compared("launch", name, SHAPE, OURS, GOALS[name], EMPTY, of, count(calls[name]))
        for name in own:
            yield Row("launch", f"(of this, the stand-in's: {name})", us=times[name] * 1e6)


EMPTY = "100 empty Python calls"  # what a microsecond is worth on this machine, at this moment


def _empty_calls() -> None:
    for _ in range(100):
        _nothing()


def _enter(scope: Any) -> None:
    with scope:
        pass


# ---- cusru.torch.sru -----------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def one_thread(torch: Any) -> Iterator[None]:
    """Threads that wait for one another are timed by who else is on the machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@contextlib.contextmanager
def no_recurrence() -> Iterator[None]:
    """NumPy's, for torch's tensors on a CPU."""
    with mock.patch.multiple(reference, forward=_nothing, backward=_nothing):
        yield


def _nothing(*_: Any, **__: Any) -> None:
    pass


class Operators(NamedTuple):
    """The same tensors, five of the eight that there may be, through cusru.torch.sru and through a torch.autograd.Function that
    does what any must: it allocates its results, saves its inputs and allocates their gradients."""

    ours: dict[str, Call]
    bare: dict[str, Call]


NO_GRAD, BOTH = "cusru.torch.sru, no grad", "cusru.torch.sru, forward and backward"


def operators(device: str = "cpu", shape: tuple[int, int, int] = SHAPE) -> Operators:
    torch = peers.import_or_say_why("torch", 'pip install ".[torch]"')
    sru = peers.import_or_say_why("cusru.torch").sru

    class Bare(torch.autograd.Function):  # type: ignore[name-defined,misc]
        @staticmethod
        def forward(ctx: Any, u: Any, x: Any, bias: Any, weight_c: Any, c0: Any, *others: Any) -> Any:
            ctx.save_for_backward(u, x, bias, weight_c, c0, *others)
            return torch.empty_like(x), torch.empty_like(c0)

        @staticmethod
        def backward(ctx: Any, grad_h: Any, grad_c_last: Any) -> Any:
            u, x, bias, weight_c, c0, *_ = ctx.saved_tensors
            gradients = (torch.empty_like(u), torch.empty_like(x), torch.empty_like(bias), torch.empty_like(weight_c))
            return (*gradients, torch.empty_like(c0), None, None, None)

    inputs, gradients = problem(shape)
    leaves = {name: torch.from_numpy(a).to(device).requires_grad_() for name, a in inputs.items()}
    grads = [torch.from_numpy(a).to(device) for a in gradients.values()]
    u, others = leaves["u"], {name: a for name, a in leaves.items() if name != "u"}

    def both(forward: Call) -> tuple[Call, Call]:
        def no_grad() -> None:
            with torch.no_grad():
                forward()

        return no_grad, functools.partial(_gradients, torch, forward, list(leaves.values()), grads)

    pairs = both(functools.partial(sru, u, **others)), both(functools.partial(Bare.apply, *leaves.values(), None, None, None))
    return Operators(*(dict(zip((NO_GRAD, BOTH), pair, strict=True)) for pair in pairs))


def _gradients(torch: Any, forward: Call, leaves: list[Any], grads: list[Any]) -> None:
    torch.autograd.grad(forward(), leaves, grads)


def multiples(found: Operators, rounds: int = 50) -> dict[str, dict[str, float]]:
    """The seconds of ours and of the bare Function, in turn."""
    return {name: measuring.in_turn({"ours": found.ours[name], "bare Function": found.bare[name]}, rounds) for name in found.ours}


def torch() -> Iterator[Row]:
    found = operators()
    with no_recurrence(), one_thread(sys.modules["torch"]):
        times, counted = multiples(found), {name: count(call) for name, call in found.ours.items()}
    for name, goal in ((NO_GRAD, "at most 4"), (BOTH, "at most 3")):
        yield _compared("torch", name, SHAPE, OURS, goal, "bare Function", times[name], counted[name])


# ---- nothing replaced ----------------------------------------------------------------------------------------------------


def whole() -> Iterator[Row]:
    torch = peers.import_or_say_why("torch", 'pip install ".[torch]"')
    peers.import_or_say_why("cusru.torch")
    with one_thread(torch), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a package that compiles when it is imported, and of gradients on a CPU
        yield _layer(torch)
        yield from _or_why("whole", "SRU beside the sru package's", _beside_sru(torch))


def _beside_sru(torch: Any) -> Iterator[Row]:
    sru = peers.import_or_say_why("sru", 'pip install ".[peers]"').SRU
    for shape in ((1, 1, 512), (1, 8, 256)):
        for layers in (1, 4):
            yield _inference(torch, sru, f"SRU, one step, {_layers(layers)}, no grad", shape, layers, "at least 0.8")
    yield _inference(torch, sru, "SRU, 1 layer, no grad", (100, 1, 512), 1, "at least 1.0")
    for layers in (1, 4):
        yield _decoder(torch, sru, layers)


def _layers(number: int) -> str:
    return f"{number} layer{'s' if number > 1 else ''}"


def _layer(torch: Any) -> Row:
    """GEMM and recurrence, forward and backward, over an LSTM."""
    shape = length, batch, width = 2, 1, 32
    sru, lstm = sys.modules["cusru.torch"].sru, torch.nn.LSTM(width, width)
    torch.manual_seed(0)
    x, weight = torch.randn(shape, requires_grad=True), torch.randn(width, 3 * width, requires_grad=True)
    bias, weight_c = torch.zeros(2, width, requires_grad=True), torch.zeros(2, width, requires_grad=True)
    grads = [torch.ones(shape)]

    def gemm() -> Any:
        return x.view(-1, width) @ weight

    def ours() -> Any:
        return sru(gemm().view(length, batch, width, 3), x, bias=bias, weight_c=weight_c)[:1]

    calls: dict[str, Call] = {
        "ours": functools.partial(_gradients, torch, ours, [x, weight, bias, weight_c], grads),
        "nn.LSTM": functools.partial(_gradients, torch, lambda: lstm(x)[:1], [x, *lstm.parameters()], grads),
        "gemm": functools.partial(_gradients, torch, gemm, [x, weight], [torch.ones(length * batch, 3 * width)]),
    }
    what, times = "GEMM and cusru.torch.sru, forward and backward", measuring.in_turn(calls)
    return _compared("whole", what, shape, THEIRS, "at least 1", "nn.LSTM", times, count(calls["ours"]), "gemm")


def _pair(sru: Any, width: int, layers: int) -> tuple[Any, Any]:
    """The same layers, ours and theirs."""
    theirs = sru(width, width, layers).eval()
    ours = sys.modules["cusru.torch"].SRU(width, width, layers).eval()
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


def _inference(torch: Any, sru: Any, what: str, shape: tuple[int, int, int], layers: int, goal: str) -> Row:
    """From a state that is given, as it is from one step to the next."""
    ours, theirs = _pair(sru, shape[2], layers)
    x, c = torch.randn(shape), torch.randn(layers, *shape[1:])
    weights = [layer.weight for layer in ours.rnn_lst]

    def gemms() -> None:
        for weight in weights:
            x.view(-1, shape[2]) @ weight

    calls: dict[str, Call] = {"ours": lambda: ours(x, c), "sru": lambda: theirs(x, c), "gemm": gemms}
    with torch.no_grad():
        return _compared("whole", what, shape, THEIRS, goal, "sru", measuring.in_turn(calls), count(calls["ours"]), "gemm")


def _decoder(torch: Any, sru: Any, layers: int) -> Row:
    """Each step is fed the last one's output and state; then the gradients of all parameters."""
    steps, shape = 20, (1, 8, 256)
    start, grads = torch.randn(shape), [torch.ones(shape)]

    def run(model: Any) -> Any:
        x, c = start, None
        for _ in range(steps):
            x, c = model(x, c)
        return [x]

    ours, theirs = _pair(sru, shape[2], layers)
    calls = {
        name: functools.partial(
            _gradients, torch, functools.partial(run, model), [p for p in model.parameters() if p.requires_grad], grads
        )
        for name, model in (("ours", ours), ("sru", theirs))
    }
    times, what = measuring.in_turn(calls, rounds=10), f"SRU, a decoder's loop of {steps} steps, {_layers(layers)}, with gradient"
    return _compared("whole", what, shape, THEIRS, "at least 0.9", "sru", times, count(calls["ours"]))


# ---- imports -------------------------------------------------------------------------------------------------------------

_IMPORTS = """
import time
start = time.perf_counter()
import torch
middle = time.perf_counter()
import cusru.torch
print(middle - start, time.perf_counter() - middle)
"""


def imports() -> Iterator[Row]:
    """The best of three processes."""
    what = "import cusru.torch, beyond torch's own"
    runs = [subprocess.run([sys.executable, "-c", _IMPORTS], capture_output=True, text=True) for _ in range(3)]
    if failed := next((run for run in runs if run.returncode), None):
        yield Row("import", what, missing=failed.stderr.strip().splitlines()[-1])
        return
    theirs, ours = (min(times) * 1e6 for times in zip(*(map(float, run.stdout.split()) for run in runs), strict=True))
    yield Row("import", what, None, ours, "import torch", theirs, ours / theirs, OURS, "0.2 s")


# ---- with a driver -------------------------------------------------------------------------------------------------------

ON_DEVICE = (
    Case("one-step", 1, 8, 512, weight_c="column"),
    Case("streaming", 512, 1, 256, weight_c="column"),
    *(CASES[name] for name in ("short", "square-v2", "separation-k3")),
)
QUEUE = 50  # calls of a turn: fewer launches than the driver takes before it lets the host wait


def on_device() -> Iterator[Row]:
    """The time to enqueue a call, beside the kernels' own by events, L2 cold."""
    try:
        here = measuring.find("gpu")
    except RuntimeError as error:
        raise peers.Unavailable(str(error)) from error
    assert isinstance(here, measuring.Cuda)
    wait = here.cupy.cuda.Device().synchronize

    def enqueued(calls: Mapping[str, Call]) -> dict[str, float]:
        return measuring.in_turn(calls, rounds=5, turn=0.01, most=QUEUE, clock=time.perf_counter, settle=wait)

    for case in ON_DEVICE:
        shape, work, calls = case[1:4], Workload(here, case, "float32"), dict[str, Call]()
        for direction in work.results:
            allocated = functools.partial(getattr(cusru, f"sru_{direction}"), *(work.gradients * (direction == "backward")))
            calls[f"sru_{direction}, out and workspace given"] = functools.partial(work.run, direction)
            calls[f"sru_{direction}, results allocated"] = functools.partial(allocated, **work.given)
        times = enqueued(calls)
        for name, call in calls.items():
            of = {"ours": times[name], "the kernel, by events": here.time(call)}
            yield _compared("device", f"{name}: {case.name}", shape, OURS, None, "the kernel, by events", of, count(call))
        yield from _or_why("device", f"cusru.torch.sru: {case.name}", _torch_on_device(here, case, enqueued))


def _torch_on_device(here: measuring.Cuda, case: Case, enqueued: Callable[..., dict[str, float]]) -> Iterator[Row]:
    torch, shape = peers.import_or_say_why("torch", 'pip install ".[torch]"'), case[1:4]
    if not torch.cuda.is_available():
        raise peers.Unavailable("this torch has no CUDA device")
    found, lstm = operators("cuda", shape), _lstm(torch, "cuda", shape)
    for name, call in found.ours.items():
        of = enqueued({"ours": call, "bare Function": found.bare[name], "nn.LSTM": lstm[name]})
        of["the kernel, by events"] = here.time(call)
        for beside in ("bare Function", "nn.LSTM", "the kernel, by events"):
            yield _compared("device", f"{name}: {case.name}", shape, OURS, None, beside, of)


def _lstm(torch: Any, device: str, shape: tuple[int, int, int]) -> dict[str, Call]:
    layer, x = torch.nn.LSTM(shape[2], shape[2]).to(device), torch.randn(shape, device=device, requires_grad=True)

    def no_grad() -> None:
        with torch.no_grad():
            layer(x)

    leaves, grads = [x, *layer.parameters()], [torch.ones(shape, device=device)]
    return {NO_GRAD: no_grad, BOTH: functools.partial(_gradients, torch, lambda: layer(x)[:1], leaves, grads)}


# ---- the report ----------------------------------------------------------------------------------------------------------

GROUPS: dict[str, Callable[[], Iterator[Row]]] = {
    "launch": launch, "torch": torch, "whole": whole, "import": imports, "device": on_device
}  # fmt: skip


TITLES = {
    "launch": "the driver replaced by nothing", "torch": "on a CPU, the recurrence replaced by nothing",
    "whole": "on a CPU, nothing replaced", "import": "imports", "device": "calls enqueued, with the driver",
}  # fmt: skip


def rows(groups: Sequence[str] | None = None) -> Iterator[Row]:
    """CPU arrays are NumPy's here, whatever CUSRU_SIMULATE says."""
    with mock.patch.dict(os.environ, {"CUSRU_SIMULATE": ""}):
        for name in groups or GROUPS:
            yield from _or_why(name, "all of it", GROUPS[name]())


def line(row: Row) -> list[str]:
    """The cells of a table: what, shape, ours, beside, its time, ratio, goal, Python's calls and C's, GEMM."""

    def cell(value: Any, form: str = "") -> str:
        return "" if value is None else format(value, form)

    if row.missing:
        return [row.what, cell(row.shape and ", ".join(map(str, row.shape))), "", f"missing: {row.missing}", *[""] * 6]
    return [
        row.what, cell(row.shape and ", ".join(map(str, row.shape))), cell(row.us, ".1f"), cell(row.beside),
        cell(row.beside_us, ".1f"), cell(row.ratio, ".2f"), cell(row.goal), cell(row.python_calls), cell(row.c_calls),
        cell(row.gemm_share, ".0%"),
    ]  # fmt: skip


def as_object(row: Row) -> dict[str, Any]:
    return {name: round(value, 3) if isinstance(value, float) else value for name, value in row._asdict().items()}


HEADS = ("what", "L, B, D", "ours, us", "beside", "us", "ratio", "goal", "Python calls", "C calls", "GEMM")
WIDTHS = (62, 13, 10, 22, 10, 7, 13, 13, 8, 5)


def main(arguments: list[str] | None = None) -> int:
    about, details = (__doc__ or "\n").split("\n", 1)
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.host", description=about, epilog=details, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--json", action="store_true", help="one JSON object a line instead of a table")
    parser.add_argument("--only", action="append", choices=list(GROUPS), help="this group alone (may be given again)")
    options = parser.parse_args(arguments)

    def show(cells: Any) -> None:
        left = (0, 1, 3, 6)
        shown = (f"{c:<{w}}" if i in left else f"{c:>{w}}" for i, (c, w) in enumerate(zip(cells, WIDTHS, strict=True)))
        print("  ".join(shown).rstrip(), flush=True)

    if not options.json:
        machine, versions, _ = measuring.look_around()
        print(f"{machine.device}; cusru {cusru.__version__}, Python {platform.python_version()}, CuPy {versions['CuPy']}\n")
        show(HEADS)
    for row in rows(options.only):
        print(json.dumps(as_object(row)), flush=True) if options.json else show(line(row))
    return 0


if __name__ == "__main__":
    measuring.run_command(main)
