"""The recurrences over time that lies in slices on the ranks of a process group: `sequence_parallel_sru`,
`sequence_parallel_qrnn`, `sequence_parallel_linear_recurrence`.

Where c is affine in the state before, a slice takes the state that enters a column to A * c + B, and so does what runs back
through it: with the same A, and another B. A rank works out its own two numbers, gathers everyone's, goes through the slices
that come before its own, and runs its own with the state that enters it. B is the c_last of a run without c0. A is c_last's
derivative by c0, which a backward has as grad_c0: of the gate alone, so that nothing else of the slice, a NaN say, is in it.

A reversed column begins anew at the last step of a slice where `starts` has the first row of the next one: it is the next one's
rank that hands over nothing there (`_Cuts.outset`). What begins anew is told by flags, not by A = 0, which would keep a NaN.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from cusru.arguments import GRADIENTS, INPUTS
from cusru.problem import Options
from cusru.torch import operator
from cusru.torch.compiler import when_loaded
from cusru.torch.operator import SAVE_EVERY, Recurrence, Results, type_name

_BIAS, _WEIGHT_C, _C0 = (INPUTS.index(slot) for slot in ("bias", "weight_c", "c0"))
_WORD = 1024  # bytes that a rank says about its call


def sequence_parallel_sru(
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
    starts: Tensor | None = None,
    reverse: bool = False,
    group: Any = None,
) -> Results:
    """`cusru.torch.sru` of a sequence whose slices of time lie on the ranks of a process group, SRU v1 alone, differentiable.

    Rank 0 has the first steps, the last rank the last ones; L may differ from rank to rank and be 0. All ranks call it, and all
    run the backward through h or c_last, of several calls in the same order (one backward sees to that): a rank whose loss has
    neither adds `0 * c_last.sum()`. The loss is the sum of the ranks' losses, and the results are those of one call of the whole
    sequence, up to rounding.

    Args:
        u, x, mask_pad, starts: this rank's slice, as `sru` takes it. A rank where nothing is padded, or begins, may leave out
            mask_pad, or starts. `starts` at a slice's first step cuts it from the slice before, in both directions.
        bias, mask_c: the same on every rank. A parameter's gradient is this rank's share: summed over the group (all_reduce; of
            DistributedDataParallel's mean, the group's size times as much) it is the gradient.
        c0: (B, D): the initial state of the whole sequence, the same on every rank. Its gradient too is a share: all of it where
            the column begins, on the first rank or for a reversed column on the last, and 0 on the others.
        weight_c: refused: SRU v2 is not linear in c.
        activation, candidate, scale_x, mask_target, bidirectional, reverse: as for `sru`, the same on every rank.
        save_every: as for `sru`.
        group: a torch.distributed.ProcessGroup; None: the default one.

    The ranks exchange 1 KB each about their calls, then 2 * B * D + 2 * B values of the state's dtype, and in the backward
    2 * B * D + 1. Call and backward wait for these; a rank that does not come is the group's time-out. With a group that has gloo
    alone for u's device they go by way of the CPU.

    Returns:
        h: (L, B, D), u's dtype, of this rank's slice; and c_last: (B, D), the state's dtype, the state after each column's last
        step in the whole sequence, the same on every rank.

    Raises:
        As `sru`: on every rank, if one rank's arguments are wrong, with that rank's words.
        ValueError: weight_c is given; calls differ between ranks in what is to be the same.
        ValueError, TypeError, RuntimeError: this process is not in the group, `group` is none, there is no group: on this rank.
        NotImplementedError: forward-mode differentiation, a derivative of the gradients, torch.func's transforms, a trace or an
            export. torch.compile breaks the graph here.
    """
    inputs = u, x, bias, weight_c, c0, mask_c, mask_pad, starts, None, scale_x
    options = Options((activation, candidate, mask_target), bidirectional, save_every, reverse)
    return _run("sequence_parallel_sru", operator.SRU, inputs, options, group)


def sequence_parallel_qrnn(
    u: Tensor,
    *,
    pooling: str = "fo",
    gate: str = "forget",
    c0: Tensor | None = None,
    zoneout: float | Tensor | None = None,
    mask_pad: Tensor | None = None,
    bidirectional: bool = False,
    save_every: int | None = SAVE_EVERY,
    starts: Tensor | None = None,
    reverse: bool = False,
    group: Any = None,
) -> Results:
    """`cusru.torch.qrnn` of a sequence whose slices of time lie on the ranks of a process group, differentiable.

    Args:
        u, mask_pad, starts: this rank's slice, as for `sequence_parallel_sru`.
        zoneout: a number, the same on every rank; or this rank's slice (L, B, D), bool or uint8.
        c0: (B, D): the initial state of the whole sequence, as for `sequence_parallel_sru`.
        pooling, gate, bidirectional, reverse: as for `qrnn`, the same on every rank.
        save_every: as for `sru`.
        group: a torch.distributed.ProcessGroup; None: the default one.

    Returns:
        h: (L, B, D) of this rank's slice; and c_last: (B, D) of the whole sequence, the same on every rank.

    Raises:
        As `sequence_parallel_sru`.
    """
    inputs = u, None, None, None, c0, None, mask_pad, starts, zoneout
    options = Options((pooling, gate), bidirectional, save_every, reverse)
    return _run("sequence_parallel_qrnn", operator.QRNN, inputs, options, group)


def sequence_parallel_linear_recurrence(
    a: Tensor,
    b: Tensor,
    *,
    form: str = "affine",
    c0: Tensor | None = None,
    mask_pad: Tensor | None = None,
    bidirectional: bool = False,
    save_every: int | None = SAVE_EVERY,
    starts: Tensor | None = None,
    reverse: bool = False,
    group: Any = None,
) -> Results:
    """`cusru.torch.linear_recurrence` of a sequence whose slices of time lie on the ranks of a process group; differentiable.

    Args:
        a: this rank's slice (L, B, D); or (B, D) or (D,), the same on every rank, whose gradient is this rank's share.
        b, mask_pad, starts: this rank's slice, as for `sequence_parallel_sru`.
        c0: (B, D): the initial state of the whole sequence, as for `sequence_parallel_sru`.
        form, bidirectional, reverse: as for `linear_recurrence`, the same on every rank.
        save_every: as for `sru`.
        group: a torch.distributed.ProcessGroup; None: the default one.

    Returns:
        h: (L, B, D) of this rank's slice; and c_last: (B, D) of the whole sequence, the same on every rank.

    Raises:
        As `sequence_parallel_sru`.
    """
    inputs = b, None, None, a, c0, None, mask_pad, starts
    options = Options((form,), bidirectional, save_every, reverse)
    return _run("sequence_parallel_linear_recurrence", operator.LINEAR, inputs, options, group)


# ---- a call ----------------------------------------------------------------------------------------------------------


class _Ranks(NamedTuple):
    """The group, seen from one of its ranks."""

    group: Any
    size: int
    rank: int
    device: torch.device  # on which it exchanges what a CPU has to read
    backends: dict[str, str]  # by the type of device
    number: int = 0  # of a call, the same at all ranks


class _Cuts(NamedTuple):
    """Where what enters a slice does not leave it."""

    slices: Tensor  # (ranks, 2, B, 1): of columns that run forward and backward in time
    outset: Tensor | None  # (B, 1): where this rank's slice is cut off from the one before; None: nowhere


class _Chain(NamedTuple):
    """The slices, seen from one of them."""

    entering: Tensor  # (B, D): the state that enters its columns
    leaving: Tensor  # the one that leaves the whole sequence's
    factors: Tensor  # (ranks, B, D)
    cuts: _Cuts


class _Call(NamedTuple):
    """One rank's, after the checks."""

    one: Recurrence
    inputs: tuple[Any, ...]  # by slot
    options: Options
    recorded: bool  # for a backward


def _run(name: str, one: Recurrence, inputs: tuple[Any, ...], options: Options, group: Any) -> Results:
    if torch.jit.is_tracing() or torch.compiler.is_compiling():  # torch.export, where nothing can be told to the others
        raise NotImplementedError(_EAGER.format(name))
    ranks = _ranks(name, inputs[0], group)
    try:
        call = _look(name, one, inputs, options)
        with torch.no_grad():  # now, for what fails here, as where CuPy is missing, can be told to the others
            own = _factor(call), _summand(call)
    except Exception as error:
        _exchange(ranks, error=_kind(error), text=str(error))
        raise
    lengths, number = _agree(name, ranks, call)
    ranks = ranks._replace(number=number)
    with torch.no_grad():
        factors, summands, cuts = _gather_summaries(ranks, call, *own, is_first=not any(lengths[: ranks.rank]))
        c0 = call.inputs[_C0]
        first = torch.zeros_like(own[1]) if c0 is None else c0.to(own[1].dtype)
        chain = _Chain(*_through(ranks, call.options, first, factors, summands, cuts), factors, cuts)
        if not call.recorded:
            h, _, _ = operator.run_forward(one, _with_c0(call.inputs, chain.entering), call.options._replace(save_every=None))
            return h, chain.leaving
    return _SequenceParallel.apply(ranks, call, chain, *call.inputs)  # type: ignore[no-any-return]


_EAGER = (
    "{} exchanges numbers with other processes, under reverse-mode autograd alone: not in forward mode, in torch.func's "
    "transforms (vmap, grad, jvp), in a trace or an export"
)


def _look(name: str, one: Recurrence, inputs: tuple[Any, ...], options: Options) -> _Call:
    if one is operator.SRU and inputs[_WEIGHT_C] is not None:
        raise ValueError(
            f"{name} takes no weight_c: SRU v2 is not linear in c, so that no two numbers of a slice say what becomes of the "
            "state that enters it. Pipeline over the batch: each rank runs cusru.torch.sru on its slice of time, one micro-batch "
            "after the other, with the c_last of the rank before as c0, while that rank runs the next micro-batch"
        )
    if torch._C._are_functorch_transforms_active() or any(map(_is_dual, inputs)):
        raise NotImplementedError(_EAGER.format(name))
    given = one.named(operator.arguments_with_care(one, inputs, options))
    operator.check_without_memory(one, "forward", given)
    u = one.first(given)
    if u.device.type == "meta":
        raise ValueError(f"{one.forward.public('u')} is on meta, where there is nothing to exchange")
    recorded = torch.is_grad_enabled() and any(isinstance(a, Tensor) and a.requires_grad for a in given.values())
    *choices, bidirectional, every, reverse = [
        given[option] for option in (*one.forward.choices, "bidirectional", "save_every", "reverse")
    ]
    return _Call(one, one.by_slot(given), Options(tuple(choices), bidirectional, every, reverse), recorded)


def _is_dual(a: Any) -> bool:
    forward_ad = torch.autograd.forward_ad
    return isinstance(a, Tensor) and forward_ad._current_level >= 0 and forward_ad.unpack_dual(a).tangent is not None


def _with_c0(inputs: tuple[Any, ...], c0: Tensor | None) -> tuple[Any, ...]:
    return (*inputs[:_C0], c0, *inputs[_C0 + 1 :])


# ---- summaries -------------------------------------------------------------------------------------------------------


def _factor(call: _Call) -> Tensor:
    """A: (B, D), the state's dtype."""
    one, u, choices = call.one, call.inputs[0], call.options.choices
    length, batch, width = u.shape[:3]
    zero = u.new_zeros((), dtype=operator.state_dtype(u))
    inputs = list(_with_c0(call.inputs, zero.expand(batch, width)))
    if one is operator.LINEAR:
        inputs[0] = u.new_zeros(()).expand(u.shape)
    elif one is operator.QRNN:  # its gate, whatever else there is
        inputs[0], choices = u[..., 1:2].expand(length, batch, width, 2), ("f", choices[1])
    else:
        inputs = list(_of_state_alone(tuple(inputs)))
        inputs[0], choices = u[..., 1:2].expand(length, batch, width, 3), ("identity", "identity", "state")
        if (bias := inputs[_BIAS]) is not None:
            inputs[_BIAS] = bias.reshape(2, width)[:1].expand(2, width)
    options = call.options._replace(choices=choices, save_every=SAVE_EVERY)
    found = operator.run_backward(
        one, tuple(inputs), options, zero.expand(-(-length // SAVE_EVERY), batch, width), u.new_zeros(()).expand(u.shape[:3]),
        (zero + 1).expand(batch, width), ("grad_c0",),
    )["grad_c0"]  # fmt: skip
    assert found is not None
    return found


def _summand(call: _Call) -> Tensor:
    """B: (B, D), the state's dtype."""
    one, inputs, choices = call.one, _with_c0(call.inputs, None), call.options.choices
    if one is operator.SRU:
        inputs, choices = _of_state_alone(inputs), ("identity", choices[1], "state")
    _, _, c_last = operator.run_forward(one, inputs, call.options._replace(choices=choices, save_every=None))
    return c_last


def _of_state_alone(inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """SRU's, but for what only h needs."""
    left_out = {"x": None, "mask_c": None, "scale_x": 1.0}
    return tuple([left_out.get(slot, a) for slot, a in zip(INPUTS, inputs, strict=False)])


def _gather_summaries(
    ranks: _Ranks, call: _Call, factor: Tensor, summand: Tensor, is_first: bool
) -> tuple[Tensor, Tensor, _Cuts]:
    """(ranks, B, D) each. is_first: no rank before this one has a step."""
    starts, length = call.inputs[INPUTS.index("starts")], call.inputs[0].shape[0]
    cuts, outset = factor.new_zeros(2, factor.shape[0], 1, dtype=torch.bool), None
    if starts is not None and length:
        begins = (starts != 0).unsqueeze(-1)
        cuts[0], cuts[1] = begins.any(0), begins[1:].any(0)
        if not is_first:
            outset = begins[0]
            cuts[1] |= outset
            summand = summand.clone()
            for columns, backward in _halves(call.options, summand.shape[1]):
                if backward:
                    summand[:, columns] = summand[:, columns].masked_fill(outset, 0)
    parts = factor, summand, cuts.to(factor.dtype)
    factors, summands, flags = _gather(ranks, torch.cat([part.flatten() for part in parts])).split([p.numel() for p in parts], 1)
    of_slices = flags.unflatten(1, cuts.shape) != 0
    return factors.unflatten(1, factor.shape), summands.unflatten(1, summand.shape), _Cuts(of_slices, outset)


def _halves(options: Options, width: int) -> Iterator[tuple[slice, bool]]:
    """Columns, and whether they run backward in time."""
    half = width // 2 if options.bidirectional else width
    yield slice(0, half), options.reverse
    yield slice(half, width), not options.reverse


def _through(
    ranks: _Ranks, options: Options, first: Tensor, factors: Tensor, summands: Tensor, cuts: _Cuts, against: bool = False
) -> tuple[Tensor, Tensor]:
    """What enters this rank's slice, and what leaves the last one. against: from each column's end to its beginning."""
    entering, leaving = torch.empty_like(first), torch.empty_like(first)
    for columns, backward in _halves(options, first.shape[1]):
        state, order = first[:, columns], range(ranks.size)
        for rank in reversed(order) if backward != against else order:
            if rank == ranks.rank:
                entering[:, columns] = state
            ignored = cuts.slices[rank, int(backward)] | (state == 0)  # 0 * inf is 0 here
            factor, summand = factors[rank, :, columns], summands[rank, :, columns]
            state = torch.where(ignored, summand, factor * state + summand)
        if against and backward and cuts.outset is not None:
            entering[:, columns] = entering[:, columns].masked_fill(cuts.outset, 0)
        leaving[:, columns] = state
    return entering, leaving


# ---- autograd --------------------------------------------------------------------------------------------------------


class _SequenceParallel(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, ranks: _Ranks, call: _Call, chain: _Chain, *inputs: Any) -> Results:
        entering, c_last, factors, cuts = chain
        h, c, _ = operator.run_forward(call.one, _with_c0(inputs, entering), call.options)
        tensors = [a if isinstance(a, Tensor) else None for a in inputs]
        ctx.numbers = [None if isinstance(a, Tensor) else a for a in inputs]
        ctx.save_for_backward(entering, c, factors, *cuts, *tensors)
        ctx.ranks, ctx.one, ctx.options = ranks, call.one, call.options
        ctx.set_materialize_grads(False)
        return h, c_last

    @staticmethod
    def backward(ctx: Any, grad_h: Tensor | None, grad_c_last: Tensor | None) -> tuple[Any, ...]:
        entering, c, factors, slices, outset, *tensors = ctx.saved_tensors
        inputs = [number if a is None else a for a, number in zip(tensors, ctx.numbers, strict=True)]
        call = _Call(ctx.one, tuple(inputs), ctx.options, True)
        needed = ctx.needs_input_grad[3:]
        wanted = tuple([slot for slot, yes in zip(GRADIENTS, needed, strict=False) if yes])
        found = _Gradients.apply(ctx.ranks, call, wanted, entering, c, factors, _Cuts(slices, outset), grad_h, grad_c_last)
        gradients = dict(zip(wanted, found, strict=True))
        return (*(None,) * 3, *[gradients.get(f"grad_{slot}") for slot, _ in zip(INPUTS, inputs, strict=False)])


class _Gradients(torch.autograd.Function):
    """All ranks come here when one does, whatever they are to find."""

    @staticmethod
    def forward(
        ctx: Any, ranks: _Ranks, call: _Call, wanted: tuple[str, ...], entering: Tensor, c: Tensor, factors: Tensor, cuts: _Cuts,
        grad_h: Tensor | None, grad_c_last: Tensor | None,
    ) -> tuple[Tensor | None, ...]:  # fmt: skip
        one, options = call.one, call.options
        inputs, u, c0 = _with_c0(call.inputs, entering), call.inputs[0], call.inputs[_C0]
        if grad_h is None:
            grad_h = u.new_zeros(()).expand(u.shape[:3])
        if grad_c_last is None:
            grad_c_last = torch.zeros_like(entering)
        summand = operator.run_backward(one, inputs, options, c, grad_h, None, ("grad_c0",))["grad_c0"]
        assert summand is not None
        own = torch.cat([summand.flatten(), grad_c_last.flatten(), summand.new_full((1,), ranks.number)])
        rows = _gather(ranks, own)
        summands, of_c_last = rows[:, :-1].unflatten(1, (2, *summand.shape)).unbind(1)
        same = (rows[:, -1] == ranks.number).all()
        if rows.is_cpu and not same:
            raise RuntimeError(_ORDER.format(one.family))
        summands = torch.where(same, summands, torch.nan)  # on a device, which nobody waits for
        first = of_c_last.sum(0)  # of all ranks' losses
        arriving, _ = _through(ranks, options, first, factors, summands, cuts, against=True)
        gradients = operator.run_backward(one, inputs, options, c, grad_h, arriving, wanted)
        if (of_c0 := gradients.get("grad_c0")) is not None and c0 is not None:
            for columns, backward in _halves(options, of_c0.shape[1]):
                if ranks.rank != (ranks.size - 1 if backward else 0):
                    of_c0[:, columns] = 0
            gradients["grad_c0"] = of_c0.to(c0.dtype)
        ctx.family = one.family
        return tuple([gradients[slot] for slot in wanted])

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        raise NotImplementedError(
            f"cusru has no derivative of the gradients of sequence_parallel_{ctx.family} (double backward, create_graph=True)"
        )


_ORDER = (
    "sequence_parallel_{0}: the ranks run the backwards of different calls. Several backwards must come in the same order on "
    "every rank, or be one: of the sum of the losses"
)


# ---- the group -------------------------------------------------------------------------------------------------------


def _ranks(name: str, u: Any, group: Any) -> _Ranks:
    if not dist.is_available() or not dist.is_initialized():
        raise RuntimeError(
            f"{name} needs a process group: call torch.distributed.init_process_group(...) in each process first, or call "
            f"cusru.torch.{name.removeprefix('sequence_parallel_')} in one process"
        )
    if group is None:
        group = dist.group.WORLD
    rank = dist.get_rank(group) if isinstance(group, dist.ProcessGroup) else -1
    if rank < 0:
        if group == dist.GroupMember.NON_GROUP_MEMBER or isinstance(group, dist.ProcessGroup):
            raise ValueError(f"{name}: this process is not in the group")
        raise TypeError(f"group must be a torch.distributed.ProcessGroup or None, not {type_name(group)}")
    config = dist.distributed_c10d.get_backend_config(group)
    backends = dict(pair.split(":", 1) for pair in config.split(","))
    device = torch.device("cpu")
    if "cpu" not in backends:
        if isinstance(u, Tensor) and u.device.type in backends:
            device = u.device
        else:
            kind = next(iter(backends))
            device = torch.device(kind, torch.get_device_module(kind).current_device())
    return _Ranks(group, dist.get_world_size(group), rank, device, backends)


def _gather(ranks: _Ranks, own: Tensor) -> Tensor:
    """(ranks, ...), all of the same shape."""
    straight = ranks.backends.get(own.device.type, "gloo") != "gloo"
    sent = own.contiguous() if straight else own.to(ranks.device).contiguous()
    rows = sent.new_empty((ranks.size, *sent.shape))
    if sent.numel():
        dist.all_gather(list(rows.unbind()), sent, group=ranks.group)
    return rows.to(own.device)


# ---- a word before ---------------------------------------------------------------------------------------------------

_ERRORS = {one.__name__: one for one in (ValueError, TypeError, NotImplementedError, RuntimeError, ImportError)}


def _kind(error: Exception) -> str:
    return next((one.__name__ for one in type(error).__mro__ if one.__name__ in _ERRORS), "RuntimeError")


def _agree(name: str, ranks: _Ranks, call: _Call) -> tuple[list[int], int]:
    """Every rank's L, once all have said that nothing is wrong there, and the same of their calls; and the number of rank 0's
    choice, below 2^24, that float32 holds."""
    words = _exchange(ranks, length=call.inputs[0].shape[0], number=secrets.randbits(24), call=_description(name, call))
    for rank, word in enumerate(words):
        if "error" in word:
            raise _ERRORS[word["error"]](f"{name}, rank {rank} of {ranks.size}: {word['text']}")
    if differences := list(_differences([word["call"] for word in words])):
        raise ValueError(f"{name}: the ranks' calls differ in {'; '.join(differences)}")
    return [word["length"] for word in words], words[0]["number"]


def _exchange(ranks: _Ranks, **said: Any) -> list[dict[str, Any]]:
    """What each rank says."""
    with torch._C._DisableFuncTorch():  # which would wrap the word too, where it is the error
        own = torch.tensor(list(_packed(said)), dtype=torch.uint8, device=ranks.device)
        return [json.loads(bytes(word)) for word in _gather(ranks, own).tolist()]


def _packed(said: dict[str, Any]) -> bytes:
    packed = json.dumps(said).encode()
    while len(packed) > _WORD:
        said = {**said, "text": said["text"][: -(len(packed) - _WORD) // 6 - 4] + "..."}
        packed = json.dumps(said).encode()
    return packed.ljust(_WORD)


def _description(name: str, call: _Call) -> dict[str, Any]:
    """What is to be the same on every rank."""
    one, u = call.one, call.inputs[0]
    told: dict[str, Any] = {"the function": name, "the device": u.device.type, **dict(zip("BDk", u.shape[1:], strict=False))}
    told |= dict(zip(one.forward.choices, call.options.choices, strict=True))
    told |= {"bidirectional": call.options.bidirectional, "reverse": call.options.reverse, "asking for gradients": call.recorded}
    for slot in one.forward.inputs:
        a = call.inputs[INPUTS.index(slot)]
        if slot in ("zoneout", "scale_x"):
            told[slot] = "a tensor" if isinstance(a, Tensor) else repr(a)
        elif slot not in ("mask_pad", "starts"):
            dtype = "absent" if a is None else str(a.dtype).removeprefix("torch.")
            told[one.forward.public(slot)] = f"{dtype}, {a.dim()} axes" if slot == "weight_c" and a is not None else dtype
    return told


def _differences(calls: list[dict[str, Any]]) -> Iterator[str]:
    for what in dict.fromkeys(what for call in calls for what in call):
        ranks: dict[Any, list[int]] = {}
        for rank, call in enumerate(calls):
            ranks.setdefault(call.get(what, "absent"), []).append(rank)
        if len(ranks) > 1:
            yield f"{what} ({', '.join(f'{value} at rank {_listed(at)}' for value, at in ranks.items())})"


def _listed(ranks: list[int]) -> str:
    return ", ".join(map(str, ranks[:4])) + (", ..." if len(ranks) > 4 else "")


def _tell_dynamo() -> None:
    global _run
    _run = torch.compiler.disable(_run)
    for function in (_SequenceParallel, _Gradients):
        function.backward = staticmethod(torch.compiler.disable(function.backward))  # type: ignore[method-assign]


when_loaded("torch._dynamo", _tell_dynamo)
