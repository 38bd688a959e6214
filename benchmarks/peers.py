"""Other packages' recurrences at a case's shape, run beside ours where they can be imported.

Each function lays its arrays out and returns a `Peer`: two calls, forward and backward, and the bytes that each must move.
`Unavailable` says why there is none: not installed, no such variant, no such dtype, does not build.

    lstm            torch's LSTM layer (cuDNN's on a GPU) from and to D features: a whole layer, its GEMMs included
    sru_layer       ours as a whole layer: torch's GEMM, then cusru.torch.sru; to be held against the LSTM (TF32 allowed in both)
    linear_recurrence, qrnn     ours, as operators of torch: what the scans and HGRN compute, and the QRNN's fo-pooling
    associative_scan            torch's own, of the pairs (a, b), compiled
    jax_linear_recurrence       ours, in a program that JAX compiles
    jax_associative_scan        jax.lax's, of the pairs (a, b), likewise
    scan_triton, scan_warp      accelerated-scan: h_t = a_t h_{t-1} + b_t, time innermost; the second zeroes its output first
    hgrn_recurrent, hgrn_chunk  flash-linear-attention's HGRN: the same recurrence, its gates in logarithms, features innermost
    sru_operator    the `sru` package's own operator on the case's own values (on a CPU: compiled forward, autograd through its
                    Python recurrence backward; on a GPU: its CUDA kernels, where they build)

A backward is torch.autograd.grad on a graph that is kept, which may make cuDNN's LSTM copy what it reserved. torch's current
stream and CuPy's are both the default one, on which the caller's events lie; JAX has its own, so that its calls wait for the
device, and their time is the host's, what JAX takes to start a program included.

`python -m benchmarks.peers` holds cusru.jax.linear_recurrence against jax.lax.associative_scan, on this GPU or CPU.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import importlib
import os
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

from benchmarks import cases
from benchmarks.workload import PASSES, Workload
from cusru import measuring


class Unavailable(Exception):
    """Why a peer cannot be run here. `altogether`: nor with any other case."""

    def __init__(self, why: str, altogether: bool = False) -> None:
        super().__init__(why)
        self.altogether = altogether


class Peer(NamedTuple):
    forward: Callable[[], Any]
    backward: Callable[[], Any]
    forward_bytes: int  #: its inputs read once, its outputs written once
    backward_bytes: int
    waits: bool = False  #: for the device: then the host's clock tells the time


def import_or_say_why(name: str, extra: str = "") -> Any:
    try:
        return importlib.import_module(name)
    except Exception as error:  # a package that compiles when it is imported can raise anything
        hint = f"; {extra}" if extra else ""
        why = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        raise Unavailable(f"{name} cannot be imported: {why}{hint}", altogether=True) from error


def _torch(work: Workload) -> Any:
    torch = import_or_say_why("torch", 'pip install ".[torch]"')
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = True  # by default only cuDNN's GEMMs may
    if work.machine.name == "gpu" and not torch.cuda.is_available():
        raise Unavailable("this torch has no CUDA device", altogether=True)
    return torch


def _device(work: Workload) -> str:
    return "cuda" if work.machine.name == "gpu" else "cpu"


def _tensors(torch: Any, work: Workload) -> dict[str, Any]:
    """The case's arrays as torch's tensors, over the same memory."""
    convert = torch.utils.dlpack.from_dlpack if work.machine.name == "gpu" else torch.from_numpy
    given = {**work.given, **dict(zip(("grad_h", "grad_c_last"), work.gradients, strict=False))}
    return {name: convert(a) for name, a in given.items() if hasattr(a, "nbytes")}


def sru_operator(work: Workload) -> Peer:
    case, on_gpu = work.case, work.machine.name == "gpu"
    if (
        case.family != "sru"
        or case.starts
        or case.candidate != "identity"
        or case.weight_c == "step"
        or case.activation not in ("identity", "tanh")
    ):
        raise Unavailable("the sru package has no such variant")
    if case.mask_c is not None and (case.mask_target == "state" or not on_gpu):
        raise Unavailable("the sru package has dropout on the gate only, and none in its CPU operator")
    if work.dtype != "float32":
        raise Unavailable("compared in float32, which its CPU operator is compiled for")
    torch = _torch(work)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        ops = import_or_say_why("sru.ops", 'pip install ".[peers]"')
    failed = [str(w.message).splitlines()[0] for w in caught if "unsuccessful" in str(w.message)]
    if on_gpu and failed:
        raise Unavailable(f"its CUDA kernels do not build: {failed[0][:200]}", altogether=True)

    t, d = _tensors(torch, work), case.D
    u = t["u"].reshape(case.L, case.B, d * case.k)  # a copy where D is innermost: it knows no other layout

    def given(name: str, *shape: int) -> Any:
        return t[name].reshape(shape) if name in t else torch.zeros(shape, device=u.device)

    inputs = (u, given("x", case.L, case.B, d), given("weight_c", 2 * d), given("bias", 2 * d), given("c0", case.B, d))
    options = (
        int(case.activation == "tanh"), d // (2 if case.bidirectional else 1), case.bidirectional, case.skip != "none",
        None if case.scale_x == 1 else torch.tensor([case.scale_x], device=u.device), t.get("mask_c"), t.get("mask_pad"),
    )  # fmt: skip
    recurrence = ops.elementwise_recurrence_gpu if on_gpu else ops.elementwise_recurrence_naive  # differentiable

    def forward() -> Any:
        with torch.no_grad():  # in which the second of these calls the compiled operator
            return recurrence(*inputs, *options)

    leaves = [a.clone().requires_grad_() for a in inputs]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # "Running SRU on CPU with grad_enabled=True. Are you sure?"
        results = recurrence(*leaves, *options)
    wanted = [leaf for leaf in leaves if leaf is not leaves[1] or case.skip == "x"]

    def backward() -> Any:
        return torch.autograd.grad(results, wanted, (t["grad_h"], t["grad_c_last"]), retain_graph=True)

    return Peer(forward, backward, *(work.floor(direction).bytes for direction in PASSES))


def _leaf(torch: Any, work: Workload, *shape: int, scale: float = 1.0) -> Any:
    generator = torch.Generator(_device(work)).manual_seed(0)
    drawn = torch.randn(*shape, generator=generator, device=_device(work)) * scale
    return drawn.to(getattr(torch, work.dtype)).requires_grad_()


def _peer(torch: Any, call: Callable[[], Any], grad: Any, leaves: list[Any], forward_bytes: int, backward_bytes: int) -> Peer:
    kept = call()

    def forward() -> Any:
        with torch.no_grad():
            return call()

    return Peer(forward, lambda: torch.autograd.grad(kept, leaves, grad, retain_graph=True), forward_bytes, backward_bytes)


def lstm(work: Workload) -> Peer:
    torch, case = _torch(work), work.case
    layer = torch.nn.LSTM(case.D // (2 if case.bidirectional else 1), case.D // (2 if case.bidirectional else 1),
                          bidirectional=case.bidirectional).to(_device(work), getattr(torch, work.dtype))  # fmt: skip
    x = _leaf(torch, work, case.L, case.B, layer.input_size)
    leaves = [x, *layer.parameters()]
    h = layer(x)[0]
    moved = sum(a.nbytes for a in leaves)
    grad = torch.ones_like(h)
    return _peer(torch, lambda: layer(x)[0], grad, leaves, moved + h.nbytes, 2 * moved + 2 * h.nbytes)


def sru_layer(work: Workload) -> Peer:
    torch, case = _torch(work), work.case
    if case.bidirectional:
        raise Unavailable("shown in one direction")
    recurrence = import_or_say_why("cusru.torch").sru
    x = _leaf(torch, work, case.L, case.B, case.D)
    weight = _leaf(torch, work, 3 * case.D, case.D, scale=case.D**-0.5)
    bias, weight_c = _leaf(torch, work, 2, case.D), _leaf(torch, work, 2, case.D, scale=0.5)

    def call() -> Any:
        u = torch.nn.functional.linear(x, weight).view(case.L, case.B, case.D, 3)
        return recurrence(u, x, bias=bias, weight_c=weight_c, save_every=case.save_every or 1)[0]

    h = call()
    leaves = [x, weight, bias, weight_c]
    moved = sum(a.nbytes for a in leaves)
    return _peer(torch, call, torch.ones_like(h), leaves, moved + h.nbytes, 2 * moved + 2 * h.nbytes)


def linear_recurrence(work: Workload) -> Peer:
    torch, case = _torch(work), work.case
    function = import_or_say_why("cusru.torch").linear_recurrence
    b = _leaf(torch, work, case.L, case.B, case.D)
    a = b.detach().sigmoid().requires_grad_()
    return _peer(torch, lambda: function(a, b)[0], torch.ones_like(b), [a, b], *_bytes_of_a_scan(b))


def qrnn(work: Workload) -> Peer:
    torch, case = _torch(work), work.case
    function = import_or_say_why("cusru.torch").qrnn
    u = _leaf(torch, work, case.L, case.B, case.D, 3)
    h = function(u)[0]
    return _peer(torch, lambda: function(u)[0], torch.ones_like(h), [u], u.nbytes + h.nbytes, 2 * u.nbytes + h.nbytes)


def associative_scan(work: Workload) -> Peer:
    torch, case = _torch(work), work.case
    if work.machine.name != "gpu":
        raise Unavailable("torch's associative_scan, as it is to be used, is compiled for a GPU", altogether=True)
    scan = import_or_say_why("torch._higher_order_ops.associative_scan").associative_scan
    b = _leaf(torch, work, case.L, case.B, case.D).detach()
    a = b.sigmoid()

    def combine(one: Any, two: Any) -> Any:
        return one[0] * two[0], two[0] * one[1] + two[1]

    run = torch.compile(lambda a, b: scan(combine, (a, b), dim=0, combine_mode="pointwise")[1])

    def backward() -> Any:
        raise Unavailable("torch's associative_scan is run forward")

    forward_bytes, backward_bytes = _bytes_of_a_scan(b)
    return Peer(lambda: run(a, b), backward, forward_bytes, backward_bytes)


def jax_linear_recurrence(work: Workload) -> Peer:
    function = import_or_say_why("cusru.jax", 'pip install ".[jax]"').linear_recurrence
    return _in_jax(work, lambda a, b: function(a, b)[0])


def jax_associative_scan(work: Workload) -> Peer:
    lax = import_or_say_why("jax", 'pip install ".[jax]"').lax

    def combine(one: Any, two: Any) -> Any:
        return one[0] * two[0], two[0] * one[1] + two[1]

    return _in_jax(work, lambda a, b: lax.associative_scan(combine, (a, b))[1])


def _in_jax(work: Workload, function: Callable[[Any, Any], Any]) -> Peer:
    """A scan as two compiled programs; the second gets what the first one's derivative has kept."""
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # else little of a GPU's memory is left for CuPy and torch
    jax = import_or_say_why("jax", 'pip install ".[jax]"')
    platform = "gpu" if work.machine.name == "gpu" else "cpu"
    try:
        device = jax.devices(platform)[0]
    except RuntimeError as error:
        raise Unavailable(f"this JAX has no CUDA device: {' '.join(str(error).split())[:200]}", altogether=True) from error
    case = work.case
    if work.dtype == "float64":
        raise Unavailable("JAX's default has no float64")
    b = jax.random.normal(jax.random.key(0), (case.L, case.B, case.D), work.dtype)
    a, b = (jax.device_put(one, device) for one in (jax.nn.sigmoid(b), b))
    forward, derivative = jax.jit(function), jax.jit(lambda pull, grad: pull(grad))
    _, pull = jax.jit(lambda a, b: jax.vjp(function, a, b))(a, b)
    return Peer(
        lambda: jax.block_until_ready(forward(a, b)), lambda: jax.block_until_ready(derivative(pull, b)), *_bytes_of_a_scan(b),
        waits=True,
    )  # fmt: skip


def scan_triton(work: Workload) -> Peer:
    return _scan(work, "accelerated_scan.scalar")


def scan_warp(work: Workload) -> Peer:
    if work.case.L & (work.case.L - 1):
        raise Unavailable("accelerated-scan's C++ kernel takes lengths that are powers of two")
    return _scan(work, "accelerated_scan.warp")


def _scan(work: Workload, name: str) -> Peer:
    torch, case = _torch(work), work.case
    module = import_or_say_why(name, "pip install accelerated-scan")
    token = _leaf(torch, work, case.B, case.D, case.L)
    gate = token.detach().sigmoid().requires_grad_()
    return _peer(torch, lambda: module.scan(gate, token), torch.ones_like(token), [gate, token], *_bytes_of_a_scan(token))


def hgrn_recurrent(work: Workload) -> Peer:
    return _hgrn(work, "fused_recurrent_hgrn")


def hgrn_chunk(work: Workload) -> Peer:
    return _hgrn(work, "chunk_hgrn")


def _hgrn(work: Workload, name: str) -> Peer:
    torch, case = _torch(work), work.case
    if work.machine.name != "gpu":
        raise Unavailable("flash-linear-attention's kernels need a GPU", altogether=True)
    function = getattr(import_or_say_why("fla.ops.hgrn", "pip install flash-linear-attention"), name)
    if work.dtype == "float64":
        raise Unavailable("HGRN's kernels compute in float32")
    x = _leaf(torch, work, case.B, case.L, case.D)
    gate = torch.nn.functional.logsigmoid(x.detach().float()).to(x.dtype).requires_grad_()
    return _peer(torch, lambda: function(x, gate)[0], torch.ones_like(x), [x, gate], *_bytes_of_a_scan(x))


def _bytes_of_a_scan(one: Any) -> tuple[int, int]:
    """Two inputs and a state forward; the state's gradient, the gates, the states and two gradients backward."""
    return 3 * one.nbytes, 5 * one.nbytes


# In the order of the time that they may take before they run: the last compile C++ and CUDA when they are imported.
PEERS: dict[str, Callable[[Workload], Peer]] = {
    make.__name__: make
    for make in (
        lstm,
        sru_layer,
        linear_recurrence,
        qrnn,
        associative_scan,
        jax_linear_recurrence,
        jax_associative_scan,
        scan_triton,
        hgrn_recurrent,
        hgrn_chunk,
        scan_warp,
        sru_operator,
    )
}
SCANS = ("scan_triton", "hgrn_recurrent", "hgrn_chunk", "scan_warp")  # what the linear recurrence's goal is held against

OURS = ("cusru", "sru_layer", "linear_recurrence", "qrnn", "jax_linear_recurrence")
IN_JAX = ("jax_linear_recurrence", "jax_associative_scan")
SHAPES = ((512, 32, 512), (4096, 8, 256), (16384, 1, 64))


def time_of(peer: Peer, direction: str, machine: measuring.Machine) -> float:
    """Seconds of one pass, after a first one."""
    call = getattr(peer, direction)
    call()
    return (measuring.Numpy() if peer.waits else machine).time(call)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.peers", description=str(__doc__).split("`python")[-1])
    parser.add_argument("--build", action="store_true", help="only import what compiles, so that it is there when its turn comes")
    parser.add_argument("--quick", action="store_true", help="one small shape: to try the command, not to measure")
    options = parser.parse_args()
    if options.build:
        for name in ("sru.ops", "accelerated_scan.warp"):
            with contextlib.suppress(Unavailable):
                import_or_say_why(name)
        return
    machine = measuring.look_around()[0]
    if machine.name == "simulator":
        raise RuntimeError("the simulator is not to be measured: unset CUSRU_SIMULATE")
    try:
        jax = import_or_say_why("jax", 'pip install ".[jax]"')
    except Unavailable as error:
        raise RuntimeError(str(error)) from error
    print(f"{machine.device}; JAX {jax.__version__}; {datetime.date.today()}; milliseconds, of two compiled programs", end="\n\n")
    print(
        "| L, B, D | dtype | pass | cusru.jax.linear_recurrence | jax.lax.associative_scan | over |", "| --- " * 6 + "|", sep="\n"
    )
    for shape in ((64, 4, 16),) if options.quick else SHAPES:
        for dtype in ("float32", "bfloat16"):
            work = Workload(machine, cases.Case("scan", *shape, save_every=32), dtype)
            both = [PEERS[name](work) for name in IN_JAX]
            for direction in PASSES:
                ours, theirs = (time_of(peer, direction, machine) for peer in both)
                where = ", ".join(map(str, shape))
                print(
                    f"| {where} | {dtype} | {direction} | {1e3 * ours:.3g} | {1e3 * theirs:.3g} | {theirs / ours:.3g} |",
                    flush=True,
                )


if __name__ == "__main__":
    measuring.run_command(main)
