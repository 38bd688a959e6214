"""Other packages' recurrences at a case's shape, run beside ours where they can be imported.

Each function lays its arrays out and returns a `Peer`: two calls, forward and backward, and the bytes that each must move.
`Unavailable` says why there is none: not installed, no such variant, no such dtype, does not build.

    lstm            torch's LSTM layer (cuDNN's on a GPU) from and to D features: a whole layer, its GEMMs included
    sru_layer       ours as a whole layer: torch's GEMM, then cusru; to be held against the LSTM
    hgrn            flash-linear-attention's HGRN: h_t = a_t h_{t-1} + b_t, its gates in logarithms, features innermost
    scan            accelerated-scan: the same recurrence, time innermost
    sru_operator    the `sru` package's own operator on the case's own values (on a CPU: compiled forward, autograd through its
                    Python recurrence backward; on a GPU: its CUDA kernels, where they build)

The order is that of the time they may take: the last two compile C++ and CUDA when they are imported. torch's current stream and
CuPy's are both the default one, on which the caller's events lie.
"""

from __future__ import annotations

import contextlib
import importlib
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import cusru
from benchmarks.workload import PASSES, Workload


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


def _import(name: str, extra: str = "") -> Any:
    try:
        return importlib.import_module(name)
    except Exception as error:  # a package that compiles when it is imported can raise anything
        hint = f"; {extra}" if extra else ""
        why = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        raise Unavailable(f"{name} cannot be imported: {why}{hint}", altogether=True) from error


def _torch(work: Workload) -> Any:
    torch = _import("torch", 'pip install ".[torch]"')
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
    if case.candidate != "identity" or case.weight_c == "step" or case.activation not in ("identity", "tanh"):
        raise Unavailable("the sru package has no such variant")
    if case.mask_c is not None and (case.mask_target == "state" or not on_gpu):
        raise Unavailable("the sru package has dropout on the gate only, and none in its CPU operator")
    if work.dtype != "float32":
        raise Unavailable("compared in float32, which its CPU operator is compiled for")
    torch = _torch(work)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        ops = _import("sru.ops", 'pip install ".[peers]"')
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
        torch.tensor([case.scale_x], device=u.device), t.get("mask_c"), t.get("mask_pad"),
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
    generator = torch.Generator().manual_seed(0)
    return (torch.randn(*shape, generator=generator) * scale).to(_device(work), getattr(torch, work.dtype)).requires_grad_()


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


def _recurrence(torch: Any, save_every: int) -> Any:
    """The two public calls in torch's autograd."""

    class Recurrence(torch.autograd.Function):  # type: ignore[name-defined,misc]
        @staticmethod
        def forward(ctx: Any, u: Any, x: Any, bias: Any, weight_c: Any) -> Any:
            h, c, _ = cusru.sru_forward(u, x, bias=bias, weight_c=weight_c, save_every=save_every)
            ctx.save_for_backward(c, u, x, bias, weight_c)
            return h

        @staticmethod
        def backward(ctx: Any, grad_h: Any) -> Any:
            c, u, x, bias, weight_c = ctx.saved_tensors
            g = cusru.sru_backward(grad_h, None, c, u, x, bias=bias, weight_c=weight_c, save_every=save_every)
            return g.u, g.x, g.bias, g.weight_c

    return Recurrence


def sru_layer(work: Workload) -> Peer:
    torch, case = _torch(work), work.case
    if case.bidirectional:
        raise Unavailable("shown in one direction")
    recurrence = _recurrence(torch, case.save_every or 1)
    x = _leaf(torch, work, case.L, case.B, case.D)
    weight = _leaf(torch, work, 3 * case.D, case.D, scale=case.D**-0.5)
    bias, weight_c = _leaf(torch, work, 2, case.D), _leaf(torch, work, 2, case.D, scale=0.5)

    def call() -> Any:
        u = torch.nn.functional.linear(x, weight).view(case.L, case.B, case.D, 3)
        return recurrence.apply(u, x, bias, weight_c)

    h = call()
    leaves = [x, weight, bias, weight_c]
    moved = sum(a.nbytes for a in leaves)
    return _peer(torch, call, torch.ones_like(h), leaves, moved + h.nbytes, 2 * moved + 2 * h.nbytes)


def scan(work: Workload) -> Peer:
    torch, case = _torch(work), work.case
    module = _scan_module(power_of_two=case.L & (case.L - 1) == 0)
    token = _leaf(torch, work, case.B, case.D, case.L)
    gate = token.detach().sigmoid().requires_grad_()
    return _peer(torch, lambda: module.scan(gate, token), torch.ones_like(token), [gate, token], *_bytes_of_a_scan(token))


def _scan_module(power_of_two: bool) -> Any:
    """Its C++ kernel, which takes lengths that are powers of two and is built when it is imported; else its Triton one."""
    if power_of_two:
        with contextlib.suppress(Unavailable):
            return _import("accelerated_scan.warp")
    return _import("accelerated_scan.scalar", "pip install accelerated-scan")


def hgrn(work: Workload) -> Peer:
    torch, case = _torch(work), work.case
    if work.machine.name != "gpu":
        raise Unavailable("flash-linear-attention's kernels need a GPU", altogether=True)
    module = _import("fla.ops.hgrn", "pip install flash-linear-attention")
    if work.dtype == "float64":
        raise Unavailable("HGRN's kernels compute in float32")
    x = _leaf(torch, work, case.B, case.L, case.D)
    gate = torch.nn.functional.logsigmoid(x.detach().float()).to(x.dtype).requires_grad_()
    # Its recurrent kernel walks as the original SRU's does; the other splits time into chunks of 128.
    function = module.chunk_hgrn if case.L >= 4 * 128 and case.B * case.D < 2**14 else module.fused_recurrent_hgrn
    return _peer(torch, lambda: function(x, gate)[0], torch.ones_like(x), [x, gate], *_bytes_of_a_scan(x))


def _bytes_of_a_scan(one: Any) -> tuple[int, int]:
    """Two inputs and a state forward; the state's gradient, the gates, the states and two gradients backward."""
    return 3 * one.nbytes, 5 * one.nbytes


PEERS: dict[str, Callable[[Workload], Peer]] = {
    "lstm": lstm, "sru_layer": sru_layer, "hgrn": hgrn, "scan": scan, "sru_operator": sru_operator,
}  # fmt: skip

if __name__ == "__main__":  # builds what compiles when it is imported, so that it is there when its turn comes
    for name in ("sru.ops", "accelerated_scan.warp"):
        with contextlib.suppress(Unavailable):
            _import(name)
