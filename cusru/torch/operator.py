"""The recurrence as a differentiable operator of torch: `sru`, and what torch's transforms need to know about it.

Plain tensors, where nobody but autograd looks, go a straight way (`_Straight`), to `call.py` at once. For all others there are
three layers, each for those above it. The operators `torch.ops.cusru.sru_forward` and `sru_backward` let torch own the
memory: they allocate results and workspace and hand them to cusru's public functions; export, compile and script see these
alone. The autograd functions around them add what an operator lacks: a rule for vmap, and errors instead of silent
zeros for the derivatives that are not there. `sru` names the arguments.

The operators are defined by `torch.library.Library`, not by `custom_op`, whose first call loads torch._dynamo; what that has to
know of cusru it is told when somebody else loads it.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

import cusru
from cusru import call, dlpack, problem
from cusru.arguments import ARRAYS, BACKWARD, FORWARD, MASK, OPERATORS, OPTIONS, Operator
from cusru.problem import Options
from cusru.torch.compiler import when_loaded

_FEW = 48 << 10  # values of u: their states, 64 KB in float32, are kept rather than recomputed, whatever save_every says
SAVE_EVERY = 32  # by default: states are then 0.4% of the bytes that a float32 training step moves

_TENSORS = FORWARD.inputs
_OF_BACKWARD = tuple(name for name in BACKWARD.inputs if name not in _TENSORS)  # grad_h, grad_c_last, c
_NAMES = (*_TENSORS, *OPTIONS)  # an operator's arguments


def sru(
    u: Tensor,
    x: Tensor | None = None,
    *,
    bias: Tensor | None = None,
    weight_c: Tensor | None = None,
    c0: Tensor | None = None,
    mask_c: Tensor | None = None,
    mask_pad: Tensor | None = None,
    activation: str = "identity",
    candidate: str = "identity",
    scale_x: float | Tensor = 1.0,
    mask_target: str = "state",
    bidirectional: bool = False,
    save_every: int | None = SAVE_EVERY,
) -> tuple[Tensor, Tensor]:
    """The SRU recurrence over all steps of all columns, differentiable.

    At each step of a column, with u = (u0, u1, u2[, u3])::

        f = sigmoid(u1 + b_f + v_f * c_prev)
        r = sigmoid(u2 + b_r + v_r * c_prev)
        c = f * c_prev + (1 - f) * candidate(u0)
        h = r * mask_c * activation(c) + (1 - r) * s          s = scale_x * x, or u3, or 0

    (Lei et al. 2018, https://arxiv.org/abs/1709.02755, equations 3 to 6.) Works under autograd, torch.compile, torch.export,
    torch.func.grad and vmap, activation checkpointing and CUDA graphs, on the current stream, with memory of torch's
    allocator. Derivatives are those of reverse mode, once.

    Args:
        u: (L, B, D, k), k = 3 or 4: the projected input, float64, float32, float16 or bfloat16. The state is kept in float64
            for float64 and in float32 for the others; candidate and state may reach half that dtype's largest number.
        x: (L, B, D), u's dtype: the skip input, with k = 3; absent: no skip.
        bias: (2, D) or (2*D,): forget row, reset row. Parameters, `c0` and `mask_c` are in u's dtype or the state's.
        weight_c: (2, D) or (2*D,): v of SRU v2; or per step (L, B, D, 2); absent: SRU v1.
        c0: (B, D): initial state; absent: zeros.
        mask_c: (B, D): dropout mask, the same at every step, already scaled by 1 / (1 - p); no gradient.
        mask_pad: (L, B), bool or uint8: non-zero where a step is padding: there the state passes and h is 0.
        activation: "identity", "tanh", "relu" or "selu".
        candidate: "identity" (SRU) or "tanh" (QRNN).
        scale_x: a number, or a tensor of one element, of u's dtype or the state's, that the kernel reads; no gradient.
        mask_target: "state": h as above. "gate": h = s + mask_c * r * (activation(c) - s), as in the sru package from 2.5 on.
        bidirectional: D is even, and the second half of the columns runs backward in time.
        save_every: one state in so many is kept for the backward, which recomputes the others bit for bit; a few, of 64 KB or
            less, may all be kept. None: none is kept, and there is no backward.

    Tensors may have any strides; none is copied. h lies in memory as u does: batch-first u, as a transposed view, makes
    batch-first h.

    Returns:
        h: (L, B, D), u's dtype; and c_last: (B, D), the state's dtype, the state after each column's last step.

    Raises:
        ValueError: a shape, a device or an option; names the argument.
        TypeError: a dtype, an object that is no tensor, or a gradient asked for `mask_c` or `scale_x`.
        NotImplementedError: forward-mode differentiation, or a derivative of the gradients.
        ImportError, RuntimeError: CUDA tensors without CuPy or without a working CUDA.
    """
    return _sru(
        u, x, bias, weight_c, c0, mask_c, mask_pad, scale_x, activation, candidate, mask_target, bidirectional, save_every
    )


def _sru(*arguments: Any) -> tuple[Tensor, Tensor]:
    """The tensors in the order of the kernels' arguments, then the options."""
    inputs, options = arguments[: len(_TENSORS)], Options(*arguments[len(_TENSORS) :])
    results = _straight(inputs, options)
    if results is not None:
        return results
    given, scale = dict(zip(_TENSORS, inputs, strict=True)), 1.0
    scale_x = given["scale_x"]
    if problem.is_number("scale_x", scale_x) or isinstance(scale_x, torch.SymFloat | torch.SymInt):
        scale, given["scale_x"] = float(scale_x), None
    elif not isinstance(scale_x, Tensor):
        raise TypeError(f"scale_x must be a number or a tensor of one element, not {type_name(scale_x)}")
    for name, value in given.items():
        if isinstance(value, Tensor):
            if name != "scale_x":  # whose one element is read whatever it is
                dlpack.check_torch(value, name)  # torch's own wrappers would stumble over a sparse one
        elif value is not None or name == "u":
            raise TypeError(f"{name} must be a torch.Tensor, not {type_name(value)}")
    wanted = [n for n, a in given.items() if a is not None and a.requires_grad] if torch.is_grad_enabled() else []
    for name in _WITHOUT_GRADIENT:
        if name in wanted:
            raise TypeError(_NO_GRADIENT.format(name))
    problem.check_options(options.activation, options.candidate, options.mask_target)
    every = problem.check_save_every(options.save_every)
    options = options._replace(bidirectional=problem.check_flag("bidirectional", options.bidirectional), save_every=every or 0)
    if every is None and wanted:
        raise ValueError("save_every=None keeps no states, and the backward needs them: give 1 or more, or use torch.no_grad()")
    arguments = (*given.values(), scale, *options)
    traced = torch.jit.is_tracing()
    if (traced or torch.compiler.is_compiling()) and torch.onnx.is_in_onnx_export():
        from cusru.torch import onnx

        with untraced():
            _check_without_memory("forward", _named(arguments))
        run: Any = onnx.sru_forward
    else:
        run = torch.ops.cusru.sru_forward if traced else _Forward.apply  # a trace is saved with operators only
    h, _, c_last = run(*arguments)
    return h, c_last


# ---- the straight way ----------------------------------------------------------------------------------------------


class _Unusual(Exception):
    """The tensors are to be looked at with care."""


def _straight(inputs: tuple[Any, ...], options: Options) -> tuple[Tensor, Tensor] | None:
    """For plain tensors where nobody but autograd looks: no dispatch, no second look. None where anything is unusual or wrong."""
    kind, every = type(inputs[0]), options.save_every
    if (kind is not Tensor and kind is not Parameter) or (every is not None and (type(every) is not int or every < 1)):
        return None
    try:
        if torch.is_grad_enabled():
            recorded = [slot for slot, a in enumerate(inputs) if isinstance(a, Tensor) and a.requires_grad]
            if recorded:
                if every is None or recorded[-1] >= len(BACKWARD.results) or dlpack.watched_by_torch():
                    return None
                return _Straight.apply(options, *inputs)  # type: ignore[no-any-return]
        h, _, c_last = _run(FORWARD, inputs, Options(*options[:-1], None))  # states are for a backward
        return h, c_last
    except _Unusual:
        return None


def _run(
    operator: Operator, inputs: tuple[Any, ...], options: Options, unwanted: tuple[str, ...] = (), out: Any = None
) -> list[Any]:
    found = call.look(operator, inputs, options, out, like_inputs=True, unwanted=unwanted)
    results = None if found is None else call.start(found)
    if results is None:
        raise _Unusual
    return results


class _Straight(torch.autograd.Function):
    """What `_Forward` and `_Backward` do, without what they do for torch's transforms, in which it is not called."""

    @staticmethod
    def forward(ctx: Any, options: Options, *inputs: Any) -> tuple[Tensor, Tensor]:
        ctx.as_operator = _somebody_takes_what_is_saved()
        if ctx.as_operator:
            c = _new_states(inputs[0], options.save_every)
            c[-1].zero_()
            h, _, c_last = _run(FORWARD, inputs, options, out=(None, c[:-1], None))
        else:
            if inputs[0].numel() <= _FEW:
                options = Options(*options[:-1], 1)  # no bit depends on it
            h, c, c_last = _run(FORWARD, inputs, options)
        *tensors, scale_x = inputs
        by_value = not isinstance(scale_x, Tensor)
        ctx.save_for_backward(c, *tensors, None if by_value else scale_x)
        ctx.scale, ctx.options = scale_x if by_value else 1.0, options
        ctx.set_materialize_grads(False)
        return h, c_last

    @staticmethod
    def backward(ctx: Any, grad_h: Tensor | None, grad_c_last: Tensor | None) -> tuple[Any, ...]:
        if grad_h is None and grad_c_last is None:
            return (None,) * (1 + len(_TENSORS))
        saved, *tensors, scale_x = ctx.saved_tensors
        c = saved[:-1] if ctx.as_operator else saved
        u = tensors[0]
        if grad_h is None:
            grad_h = u.new_zeros(()).expand(u.shape[:3])
        if not torch.is_grad_enabled():  # else there is to be a graph of this, whose derivative is an error
            unwanted = tuple([g for g, needed in zip(BACKWARD.results, ctx.needs_input_grad[1:], strict=False) if not needed])
            inputs = *tensors, ctx.scale if scale_x is None else scale_x, None, c, None, grad_h, grad_c_last
            try:
                return (None, *_run(BACKWARD, inputs, ctx.options, unwanted), *_NONE)
            except _Unusual:
                pass
        if not ctx.as_operator:
            saved = torch.cat([c, torch.zeros_like(c[:1])])
        gradients = _Backward.apply(grad_h, grad_c_last, saved, *tensors, scale_x, ctx.scale, *ctx.options)
        return (None, *_present(tensors, gradients), *_NONE)


def _somebody_takes_what_is_saved() -> bool:
    """For the backward. Who compares it, as checkpointing does, is to find what the operator saves, which may run next time."""
    ask = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)
    return ask is None or ask(True) is not None


def _present(tensors: Sequence[Tensor | None], gradients: Sequence[Any]) -> list[Any]:
    """None for the gradient of an input that is absent, which an operator cannot return."""
    return [None if a is None else g for a, g in zip(tensors, gradients, strict=False)]


_NONE = (None,) * (len(_TENSORS) - len(BACKWARD.results))  # of the inputs that have no gradient
_WITHOUT_GRADIENT = tuple(name for name in _TENSORS[len(BACKWARD.results) :] if ARRAYS[name].dtype != MASK)
_NO_GRADIENT = "{0} requires grad, and cusru has no gradient for it: pass {0}.detach()"


def type_name(value: Any) -> str:
    """For messages."""
    return f"{type(value).__module__}.{type(value).__qualname__}".removeprefix("builtins.")


@contextmanager
def untraced() -> Iterator[None]:
    """Within it torch.jit.trace does not look, and sizes are numbers: those it sees are traced, and to compare them warns."""
    state = torch._C._get_tracing_state()
    if state is None:
        yield
        return
    torch._C._set_tracing_state(None)
    try:
        yield
    finally:
        torch._C._set_tracing_state(state)


def sizes_of(a: Tensor) -> list[int]:
    """Its shape in numbers, in a trace too."""
    with untraced():
        return list(a.shape)


# ---- the operators: torch owns the memory --------------------------------------------------------------------------


def _named(arguments: tuple[Any, ...]) -> dict[str, Any]:
    """An operator's arguments as those of cusru's functions; its save_every = 0 stands for None."""
    given = dict(zip(_NAMES, arguments, strict=True))
    scale = given.pop("scale")
    if given["scale_x"] is None:
        given["scale_x"] = scale
    given["save_every"] = given["save_every"] or None
    return given


def _new_states(u: Tensor, save_every: int) -> Tensor:
    """One row more than is used, for torch.export specialises a size that is 1 in its example."""
    length, batch, width, _ = u.shape
    blocks = -(-length // save_every) if save_every else 0
    return u.new_empty((blocks + 1, batch, width), dtype=_state(u))


def _state(u: Tensor) -> torch.dtype:
    return torch.float64 if u.dtype == torch.float64 else torch.float32


def _new_outputs(u: Tensor, save_every: int) -> tuple[Tensor, Tensor, Tensor]:
    h = torch.empty_like(u.select(-1, 0))  # its axes in the order of u's: a batch-first u makes a batch-first h
    return h, _new_states(u, save_every), u.new_empty(u.shape[1:3], dtype=_state(u))


def _new_gradients(*tensors: Tensor | None) -> tuple[Tensor, ...]:
    """An empty tensor stands for None, which an operator cannot return."""
    return tuple(tensors[0].new_empty(0) if a is None else torch.empty_like(a) for a in tensors)  # type: ignore[union-attr]


def _workspace(direction: str, given: dict[str, Any]) -> Tensor | None:
    """None on a CPU, where NumPy takes none. To ask for its size is to check the arguments, so this comes before all else; on a
    CPU cusru's own call checks them, but for what would keep the results from being allocated."""
    u = given["u"]
    if u.is_cpu and u.dim() == 4 and u.layout is torch.strided:
        return None
    return u.new_empty(cusru.workspace_size(direction, **given), dtype=torch.uint8)


def _forward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    given = _named(arguments)
    workspace = _workspace("forward", given)
    h, c, c_last = _new_outputs(given["u"], arguments[-1])
    c[-1].zero_()  # an operator's results must be the same each time
    out = (h, c[:-1] if arguments[-1] else None, c_last)
    cusru.sru_forward(**given, out=out, workspace=workspace)
    return h, c, c_last


def _backward(grad_h: Tensor, grad_c_last: Tensor | None, c: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    given = _named(arguments)
    workspace = _workspace("backward", given)
    wanted = arguments[: len(BACKWARD.results)]
    gradients = _new_gradients(*wanted)
    out = [None if a is None else g for a, g in zip(wanted, gradients, strict=True)]
    cusru.sru_backward(grad_h, grad_c_last, c[:-1], **given, out=out, workspace=workspace)
    return gradients


def _forward_without_memory(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    _check_without_memory("forward", _named(arguments))
    return _new_outputs(arguments[0], arguments[-1])


def _backward_without_memory(grad_h: Tensor, grad_c_last: Tensor | None, c: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    _check_without_memory("backward", _named(arguments) | dict(grad_h=grad_h, grad_c_last=grad_c_last, c=c[:-1]))
    return _new_gradients(*arguments[: len(BACKWARD.results)])


def _check_without_memory(direction: str, arguments: dict[str, Any]) -> None:
    """The checks of cusru's functions for tensors of a tracer, which have all that is looked at but memory."""
    described = {n: _describe(n, a) if isinstance(a, Tensor) else a for n, a in arguments.items()}
    options = Options(*(described[name] for name in Options._fields))
    inputs = {n: described[n] for n in OPERATORS[direction].inputs if n in described}
    problem.check(direction, inputs, options, 0)


def _describe(name: str, a: Tensor) -> dlpack.Array:
    device = ("meta", 0) if a.device.type == "meta" else dlpack.device_of(a, name)
    dlpack.check_torch(a, name)
    dtype = str(a.dtype).removeprefix("torch.")
    return dlpack.Array(name, 0, tuple(a.shape), a.stride(), dtype, device, False, "torch", None, a)


# ---- autograd ------------------------------------------------------------------------------------------------------


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    n = len(_TENSORS)
    ctx.save_for_backward(output[1], *inputs[:n])
    ctx.options = inputs[n:]
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[1])


def _gradients(ctx: Any, backward: Any, grad_h: Tensor | None, grad_c_last: Tensor | None) -> tuple[Any, ...]:
    for name, needed in zip(_TENSORS, ctx.needs_input_grad, strict=False):
        if needed and name in _WITHOUT_GRADIENT:  # unseen by `_sru` where vmap hides it
            raise TypeError(_NO_GRADIENT.format(name))
    c, *tensors = ctx.saved_tensors
    none = _NONE + (None,) * len(ctx.options)
    if grad_h is None and grad_c_last is None:
        return (None,) * len(BACKWARD.results) + none
    u = tensors[0]
    if grad_h is None:
        grad_h = u.new_zeros(()).expand(u.shape[:3])
    gradients = backward(grad_h, grad_c_last, c, *tensors, *ctx.options)
    return (*_present(tensors, gradients), *none)


_NO_JVP = "cusru has no forward-mode derivative of the SRU recurrence: use reverse mode (backward, torch.func.grad or vjp)"
_NO_DOUBLE_BACKWARD = (
    "cusru has no derivative of the SRU recurrence's gradients (double backward, create_graph=True, torch.func.hessian)"
)


class _Forward(torch.autograd.Function):
    """cusru::sru_forward with a rule for vmap, which a custom operator's own autograd has not."""

    @staticmethod
    def forward(*arguments: Any) -> Any:
        return torch.ops.cusru.sru_forward(*arguments)

    setup_context = staticmethod(_keep)

    @staticmethod
    def backward(ctx: Any, grad_h: Tensor | None, _: None, grad_c_last: Tensor | None) -> tuple[Any, ...]:
        return _gradients(ctx, _Backward.apply, grad_h, grad_c_last)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *arguments: Any) -> Any:
        return _vmap(_Forward, _NAMES, FORWARD.results, info.batch_size, in_dims, arguments)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        raise NotImplementedError(_NO_JVP)


class _Backward(torch.autograd.Function):
    """cusru::sru_backward, likewise; its own derivative is an error."""

    @staticmethod
    def forward(*arguments: Any) -> Any:
        return torch.ops.cusru.sru_backward(*arguments)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        raise NotImplementedError(_NO_DOUBLE_BACKWARD)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *arguments: Any) -> Any:
        results = tuple(name.removeprefix("grad_") for name in BACKWARD.results)
        return _vmap(_Backward, (*_OF_BACKWARD, *_NAMES), results, info.batch_size, in_dims, arguments)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        raise NotImplementedError(_NO_JVP)


# ---- vmap ----------------------------------------------------------------------------------------------------------


def _vmap(
    function: Any, names: tuple[str, ...], results: tuple[str, ...], size: int, in_dims: tuple[int | None, ...], arguments: Any
) -> tuple[tuple[Tensor, ...], tuple[int | None, ...]]:
    """`size` problems as one of `size` times the columns, for a column has its own parameters and its own gradients of them.
    Padding and scale_x are shared by all columns: where they differ, the problems run one after the other."""
    values, dims = dict(zip(names, arguments, strict=True)), dict(zip(names, in_dims, strict=True))
    if function is _Forward and size:  # the caller knows the sizes of one problem
        one = tuple(a if d is None else a.select(d, 0) for a, d in zip(arguments, in_dims, strict=True))
        _check_without_memory("forward", _named(one))
    if dims["mask_pad"] is not None or dims["scale_x"] is not None:
        each = [
            function.apply(*(a if d is None else a.select(d, i) for a, d in zip(arguments, in_dims, strict=True)))
            for i in range(size)
        ]
        return tuple(torch.stack(same) for same in zip(*each, strict=True)), (0,) * len(results)

    rank = {n: a.ndim - (dims[n] is not None) for n, a in values.items() if isinstance(a, Tensor)}
    directions = 2 if values["bidirectional"] else 1
    width = [n for i, n in enumerate(values["u"].shape) if i != dims["u"]][2] // directions
    for name in rank.keys() - {"mask_pad", "scale_x"}:
        a = values[name]
        a = a.unsqueeze(0).expand(size, *a.shape) if dims[name] is None else a.movedim(dims[name], 0)
        if rank[name] == 1:  # a flat parameter
            a = a.unflatten(1, (2, a.shape[1] // 2))
        values[name] = _fold(a, _axis(rank[name]), directions)
    outputs, out_dims = [], []
    for name, a in zip(results, function.apply(*values.values()), strict=True):
        absent = name in values and values[name] is None  # and so is its gradient
        if not absent:
            a = _unfold(a, _axis(rank.get(name)), size, directions, width)
            if rank.get(name) == 1:
                a = a.flatten(1)
        outputs.append(a)
        out_dims.append(None if absent else 0)
    return tuple(outputs), tuple(out_dims)


def _axis(rank: int | None) -> int:
    """Of the columns: u and a weight_c per step have one more axis behind."""
    return -2 if rank == 4 else -1


def _fold(a: Tensor, axis: int, directions: int) -> Tensor:
    """(size, ..., D, ...) -> (..., size * D, ...), where D is (directions, width) and becomes (directions, size, width)."""
    a = a.unflatten(axis, (directions, a.shape[axis] // directions)).movedim(0, axis - 1)
    return a.flatten(axis - 2 + a.ndim, axis + a.ndim)


def _unfold(a: Tensor, axis: int, size: int, directions: int, width: int) -> Tensor:
    """The reverse of _fold."""
    a = a.unflatten(axis, (directions, size, width)).movedim(axis - 1, 0)
    return a.flatten(axis - 1 + a.ndim, axis + a.ndim)


# ---- telling torch -------------------------------------------------------------------------------------------------


def _library() -> torch.library.Library:
    """The one that holds the operators. The namespace keeps it, so that to import cusru again, after it was removed from
    sys.modules, replaces them: torch would refuse a second definition."""
    namespace = torch.ops.cusru
    if (earlier := vars(namespace).get("_library")) is not None:
        earlier._destroy()
    namespace._library = torch.library.Library("cusru", "DEF")
    return namespace._library


def _define(
    library: torch.library.Library, operator: Operator, run: Callable[..., Any], without_memory: Callable[..., Any],
    backward: Callable[..., Any], setup_context: Callable[..., Any] | None,
) -> None:  # fmt: skip
    """The autograd is for those who call the operator itself: TorchScript, and graphs that were exported."""
    name = f"sru_{operator.direction}"
    tensors = _TENSORS if operator is FORWARD else (*_OF_BACKWARD, *_TENSORS)
    arguments = [f"Tensor{'' if a in operator.required else '?'} {a}" for a in tensors]
    arguments += [f"{kind} {option}" for option, kind in OPTIONS.items()]
    schema = f"{name}({', '.join(arguments)}) -> ({', '.join(['Tensor'] * len(operator.results))})"
    as_traced = getattr(torch.Tag, "needs_exact_strides", torch.Tag.needs_fixed_stride_order)  # newer: torch's own default
    library.define(schema, tags=(torch.Tag.pt2_compliant_tag, as_traced))
    _KERNELS[name] = run
    library.impl(name, lambda *arguments: _KERNELS[name](*arguments), "CompositeExplicitAutograd")
    torch.library.register_fake(f"cusru::{name}", without_memory, lib=library)
    torch.library.register_autograd(f"cusru::{name}", backward, setup_context=setup_context, lib=library)


_KERNELS: dict[str, Callable[..., Any]] = {}


def _tell_dynamo() -> None:
    torch.compiler.allow_in_graph(_sru)  # it is to trace the operators alone, not the checks and rules around them
    # A compiled function that calls backward() itself would have dynamo compile this, and fail; ...
    for function in (_Forward, _Straight):
        function.backward = staticmethod(torch.compiler.disable(function.backward))  # type: ignore[method-assign]
    for name, run in _KERNELS.items():  # ... and these, where they run within a frame that it has skipped.
        _KERNELS[name] = torch.compiler.disable(run)


def _tell_torch() -> None:
    library = _library()
    _define(
        library, FORWARD, _forward, _forward_without_memory,
        lambda ctx, grad_h, _, grad_c_last: _gradients(ctx, torch.ops.cusru.sru_backward, grad_h, grad_c_last), _keep,
    )  # fmt: skip
    _define(
        library, BACKWARD,
        _backward, _backward_without_memory, _Backward.backward, None,
    )  # fmt: skip
    for rules in (_Forward, _Backward):  # else Function.apply calls inspect.signature each time
        rules.forward.__signature__ = inspect.signature(rules.forward)  # type: ignore[attr-defined]
    when_loaded("torch._dynamo", _tell_dynamo)


_tell_torch()
