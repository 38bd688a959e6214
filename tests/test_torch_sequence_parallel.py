"""cusru.torch.sequence_parallel_*: the results of the whole sequence, whatever slices of it lie where; and that what is wrong at
one rank is an error at every rank.

Four processes run all of it once (`python tests/test_torch_sequence_parallel.py FOLDER`), of whose results the tests then ask."""

from __future__ import annotations

import contextlib
import os
import random
import re
import subprocess
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import oracle
import pytest
from conftest import scripted

torch = pytest.importorskip("torch", reason='needs torch: pip install "cusru[torch]"')

import torch.distributed as dist  # noqa: E402

import cusru.torch  # noqa: E402
from cusru.torch import operator, sequence_parallel_linear_recurrence, sequence_parallel_qrnn, sequence_parallel_sru  # noqa: E402

if not dist.is_available() or not dist.is_gloo_available():
    pytest.skip("this torch has no gloo", allow_module_level=True)

ROOT = Path(__file__).parents[1]
WORLD = 4
FAMILIES = ("sru", "qrnn", "linear_recurrence")
PARALLEL = dict(
    zip(FAMILIES, (sequence_parallel_sru, sequence_parallel_qrnn, sequence_parallel_linear_recurrence), strict=True)
)  # fmt: skip
OVER_TIME = ("u", "x", "b", "mask_pad", "starts", "zoneout")  # and a with three axes
WITH_GRADIENT = ("u", "x", "bias", "a", "b", "c0")
DRAWN = 120
DTYPES = ("float64", "float64", "float64", "float32", "float16", "bfloat16")


class _NoGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, h: torch.Tensor) -> torch.Tensor:
        return h.new_zeros((), dtype=torch.float64)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> None:
        return None


class Case:
    """A whole problem, drawn, and how it is cut. `inputs` are the keyword arguments of a function of cusru.torch."""

    def __init__(self, seed: int) -> None:
        draw = random.Random(seed)
        torch.manual_seed(seed)
        self.family, self.dtype = FAMILIES[seed % 3], DTYPES[seed // 3 % len(DTYPES)]
        own = getattr(torch, self.dtype)
        state = torch.float64 if own == torch.float64 else torch.float32
        self.lengths = [draw.choice([0, 1, 2, 5, 12]) for _ in range(WORLD)]
        length, batch, width = sum(self.lengths), draw.randint(1, 3), draw.choice([2, 4, 6])

        def normal(*shape: int, dtype: Any = own) -> torch.Tensor:
            return torch.randn(shape, dtype=torch.float64).to(dtype)

        def parameter(*shape: int) -> torch.Tensor:
            return normal(*shape, dtype=draw.choice([own, state]))

        self.inputs: dict[str, Any] = {"bidirectional": draw.random() < 0.6, "reverse": draw.random() < 0.4}
        if draw.random() < 0.7:
            self.inputs["c0"] = parameter(batch, width)
        if draw.random() < 0.5:
            self.inputs["mask_pad"] = torch.rand(length, batch) < draw.choice([0.2, 0.8])
        if draw.random() < 0.6:
            starts = torch.rand(length, batch) < draw.choice([0.1, 0.4])
            for first in np.cumsum([0, *self.lengths[:-1]]):
                if first < length and draw.random() < 0.5:  # a slice begins with one, in some batches
                    starts[first] |= torch.rand(batch) < 0.7
            self.inputs["starts"] = starts if draw.random() < 0.5 else starts.to(torch.uint8)
        if self.family == "sru":
            k = draw.choice([3, 4])
            self.inputs |= dict(u=normal(length, batch, width, k), activation=draw.choice(["identity", "tanh", "relu", "selu"]))
            self.inputs |= dict(candidate=draw.choice(["identity", "tanh"]), mask_target=draw.choice(["state", "gate"]))
            if k == 3 and draw.random() < 0.8:
                self.inputs |= dict(x=normal(length, batch, width), scale_x=draw.choice([0.5, torch.tensor(1.5, dtype=state)]))
            if draw.random() < 0.7:
                self.inputs["bias"] = parameter(*draw.choice([(2, width), (2 * width,)]))
            if draw.random() < 0.5:
                self.inputs["mask_c"] = (torch.rand(batch, width) < 0.7).to(own) / 0.5
        elif self.family == "qrnn":
            pooling = draw.choice(["f", "fo", "ifo"])
            self.inputs |= dict(u=normal(length, batch, width, 1 + len(pooling)))
            self.inputs |= dict(pooling=pooling, gate=draw.choice(["forget", "update"]))
            self.inputs["zoneout"] = draw.choice([None, 0.3, torch.rand(length, batch, width) < 0.3])
        else:
            form = draw.choice(["affine", "complement", "blend"])
            a = torch.rand(draw.choice([(length, batch, width), (batch, width), (width,)]), dtype=torch.float64)
            a = (2 * a - 1 if form == "affine" else 1.5 * a).to(draw.choice([own, state]))
            self.inputs |= dict(a=a, b=normal(length, batch, width), form=form)
        self.save_every = draw.choice([1, 3, 32])
        self.grad_h = normal(length, batch, width)
        self.grad_c_last = normal(WORLD, batch, width, dtype=state)  # of each rank's loss
        self.uses = [draw.choice(["h and c_last", "h", "c_last", "nothing"]) for _ in range(WORLD)]
        self.mine = [slice(sum(self.lengths[:rank]), sum(self.lengths[: rank + 1])) for rank in range(WORLD)]

    def whole(self, name: str, a: Any) -> bool:
        return not isinstance(a, torch.Tensor) or not (name in OVER_TIME or (name == "a" and a.dim() == 3))

    def run(self, rank: int) -> dict[str, torch.Tensor]:
        """The slice's h, c_last and gradients, and what is had without a graph."""
        given = {n: a if self.whole(n, a) else a[self.mine[rank]] for n, a in self.inputs.items()}
        if rank == 1 and "starts" in given and not given["starts"].any():
            del given["starts"]  # it may: nothing begins there
        of = PARALLEL[self.family]
        with torch.no_grad():
            h, c_last = of(**given, save_every=None)
        found = {"h without a graph": h, "c_last without a graph": c_last}
        leaves = {n: given[n].requires_grad_() for n in WITH_GRADIENT if given.get(n) is not None}
        h, c_last = of(**given, save_every=self.save_every)
        loss = _NoGradient.apply(h)  # even so its backward has to come
        if "h" in self.uses[rank].split():
            loss = loss + (h * self.grad_h[self.mine[rank]]).sum()
        if "c_last" in self.uses[rank]:
            loss = loss + (c_last * self.grad_c_last[rank]).sum()
        gradients = torch.autograd.grad(loss, list(leaves.values()))
        return found | {"h": h.detach(), "c_last": c_last.detach()} | dict(zip(leaves, gradients, strict=True))


def wide(a: Any) -> Any:
    return a.detach().to(torch.float64).numpy() if isinstance(a, torch.Tensor) and a.is_floating_point() else a


# ---- what the four processes do ----------------------------------------------------------------------------------------


def normal(*shape: int, seed: int = 0, dtype: Any = torch.float64) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed + sum(shape))).to(dtype)


LONG = 600  # steps of a rank's slice


def long_memory() -> dict[str, dict[str, torch.Tensor]]:
    """By family, what remembers 2,400 steps in float32."""
    shape = WORLD * LONG, 2, 4
    gates = 9 + normal(*shape, 1, dtype=torch.float32)
    u = torch.cat([normal(*shape, 1, dtype=torch.float32), gates, normal(*shape, 1, seed=2, dtype=torch.float32)], -1)
    a = 1e-4 * torch.rand(shape, generator=torch.Generator().manual_seed(0))
    return {"sru": dict(u=u), "qrnn": dict(u=u), "linear_recurrence": dict(a=a, b=u[..., 0], form="complement")}


def sliced(given: dict[str, Any], rank: int) -> dict[str, Any]:
    return {n: a[rank * LONG :][:LONG] if isinstance(a, torch.Tensor) else a for n, a in given.items()}


def not_numbers() -> dict[str, tuple[str, dict[str, Any]]]:
    """What there is of NaN and infinity, and where it must not be; two steps on each rank."""
    u = normal(8, 2, 4, 3, seed=1)
    starts = torch.zeros(8, 2, dtype=torch.bool)
    starts[4, 0] = True
    reset, gate = u.clone(), u.clone()
    reset[1, :, :, 2] = torch.nan  # of no state
    gate[3, :, 1, 1] = torch.nan
    skip = torch.full((8, 2, 4), torch.inf, dtype=torch.float64)
    b = torch.zeros(8, 2, 4, dtype=torch.float64)
    b[7] = 1
    both = dict(bidirectional=True, starts=starts)
    return {
        "a reset gate": ("sru", dict(u=reset, bidirectional=True)),
        "a skip": ("sru", dict(u=u, x=skip, bidirectional=True, activation="selu")),
        "a forget gate before a start": ("qrnn", dict(u=gate, **both)),
        "a state before a start": ("linear_recurrence", dict(a=b, b=b.index_fill(0, torch.tensor([2]), torch.inf), **both)),
        "a factor beyond the largest number": ("linear_recurrence", dict(a=b.new_full((4,), 1e200), b=b)),
    }


def wrong(rank: int) -> dict[str, Any]:
    """Calls in which something is wrong at one rank or another."""
    u, c0 = normal(2, 3, 4, 3), normal(3, 4)
    return {
        "a shape": lambda: sequence_parallel_sru(u, bias=normal(2, 5 if rank == 2 else 4)),
        "no tensor": lambda: sequence_parallel_qrnn([1.0] if rank == 1 else u),
        "a long text": lambda: sequence_parallel_qrnn(u, pooling="\u20ac" * 2000 if rank == 3 else "fo"),
        "a gradient and no states": lambda: sequence_parallel_qrnn(
            u.clone().requires_grad_(rank == 0), save_every=None if rank == 0 else 1
        ),
        "D": lambda: sequence_parallel_qrnn(normal(2, 3, 6 if rank == 2 else 4, 3)),
        "a gradient asked for": lambda: sequence_parallel_qrnn(u.clone().requires_grad_(rank < 2)),
        "the function": lambda: (sequence_parallel_qrnn if rank else sequence_parallel_sru)(u),
        "c0 and direction": lambda: sequence_parallel_qrnn(u, c0=c0 if rank else None, reverse=rank == 3),
        "SRU v2": lambda: sequence_parallel_sru(u, weight_c=normal(2, 4) if rank == 3 else None),
        "mapped": lambda: torch.vmap(sequence_parallel_qrnn)(u.unsqueeze(0)) if rank == 0 else sequence_parallel_qrnn(u),
    }


class Layers(torch.nn.Module):
    """Two side by side, and a third on top; one bias for all."""

    def __init__(self, of: Any) -> None:
        super().__init__()
        self.of = of
        self.weights = torch.nn.ParameterList([normal(12, 4, seed=i) for i in range(3)])
        self.bias = torch.nn.Parameter(normal(2, 4))

    def forward(self, x: torch.Tensor) -> Any:
        def layer(x: torch.Tensor, i: int, **options: Any) -> Any:
            return self.of((x @ self.weights[i].T).unflatten(-1, (4, 3)), x, bias=self.bias, **options)

        return layer(layer(x, 0)[0] + layer(x, 1, reverse=True)[0], 2, bidirectional=True)


def work(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", rank=rank, world_size=WORLD, init_method=f"file://{folder}/store", timeout=timedelta(minutes=1)
    )
    found: dict[str, Any] = {"drawn": [Case(seed).run(rank) for seed in range(DRAWN)]}
    found["long"] = {n: PARALLEL[n](**sliced(given, rank)) for n, given in long_memory().items()}
    found["not numbers"] = {}
    for name, (family, given) in not_numbers().items():
        mine = {n: a[2 * rank :][:2] if isinstance(a, torch.Tensor) and a.dim() > 1 else a for n, a in given.items()}
        found["not numbers"][name] = PARALLEL[family](**mine)
    found["wrong"] = {}
    for name, call in wrong(rank).items():
        try:
            found["wrong"][name] = call()
        except Exception as error:
            found["wrong"][name] = type(error).__name__, str(error)
    two = [sequence_parallel_qrnn(normal(2, 3, 4, 3, seed=i).requires_grad_()) for i in range(2)]
    found["another order"] = []
    for h, _ in two[:: -1 if rank == 2 else 1]:
        try:
            found["another order"].append(h.sum().backward(retain_graph=True))
        except RuntimeError as error:
            found["another order"].append(str(error))
    sum(h.sum() for h, _ in two).backward()
    odd = dist.new_group([1, 3])
    u = normal(4, 3, 4, 3)
    if rank % 2:
        found["of two"] = sequence_parallel_qrnn(u.chunk(2)[rank // 2], group=odd)
    else:
        with pytest.raises(ValueError, match="not in the group"):
            sequence_parallel_qrnn(u, group=odd)
    model = torch.nn.parallel.DistributedDataParallel(Layers(sequence_parallel_sru))
    for context in (model.no_sync(), contextlib.nullcontext()):
        with context:
            h, c_last = model(normal(8, 3, 4).chunk(WORLD)[rank])
            (c_last.sum() if rank == 2 else h.sin().sum()).backward()
    found["layers"] = [a.grad for a in model.parameters()]
    torch.save(found, f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What each found."""
    folder = tmp_path_factory.mktemp("ranks")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    command = [sys.executable, __file__, str(folder)]
    done = subprocess.run(command, env=environment, text=True, capture_output=True, timeout=180)
    assert done.returncode == 0, done.stderr
    return [torch.load(folder / f"{rank}.pt") for rank in range(WORLD)]


# ---- what they found ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(DRAWN))
def test_the_slices_are_those_of_the_whole(ranks, seed):
    """Against the oracle, which knows the whole: results, and gradients summed up where they are shares."""
    case, found = Case(seed), [rank["drawn"][seed] for rank in ranks]
    inputs = {n: wide(a) if n != "scale_x" else float(a) for n, a in case.inputs.items()}
    of = oracle if case.family == "sru" else None
    forward, backward = (
        getattr(of or oracle, way if of else f"{case.family}_{way}") for way in ("forward", "backward")
    )  # fmt: skip
    expected = forward(**inputs, save_every=None)
    for kind in ("", " without a graph"):
        h = torch.cat([one[f"h{kind}"] for one in found])
        assert h.dtype == case.grad_h.dtype
        for one in found:
            assert torch.equal(one[f"c_last{kind}"], found[0]["c_last"])
        oracle.check({"h": wide(h), "c_last": wide(found[0]["c_last"])}, expected, case.dtype)
    weights = torch.cat([case.grad_h[mine] * ("h" in use.split()) for mine, use in zip(case.mine, case.uses, strict=True)])
    of_last = sum(wide(g) * ("c_last" in use) for g, use in zip(case.grad_c_last, case.uses, strict=True))
    wanted = backward(wide(weights), of_last, **inputs)
    names = [n for n in WITH_GRADIENT if case.inputs.get(n) is not None]
    gradients = {}
    for name in names:
        shares = [one[name] for one in found]
        assert {g.dtype for g in shares} == {case.inputs[name].dtype}
        whole = case.whole(name, case.inputs[name])
        gradients[name] = sum(map(wide, shares)) if whole else np.concatenate([wide(g) for g in shares])
    oracle.check(gradients, wanted, case.dtype, ())


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_remembered_for_long_keeps_its_digits(ranks, family):
    given = {n: wide(a) for n, a in long_memory()[family].items()}
    forward = oracle.forward if family == "sru" else getattr(oracle, f"{family}_forward")
    h = torch.cat([rank["long"][family][0] for rank in ranks])
    oracle.check({"h": wide(h), "c_last": wide(ranks[0]["long"][family][1])}, forward(**given, save_every=None), "float32")


def test_backwards_in_another_order_at_one_rank_are_an_error_at_all(ranks):
    for rank in ranks:
        assert len(rank["another order"]) == 2
        for text in rank["another order"]:
            assert "the ranks run the backwards of different calls" in text


@pytest.mark.parametrize("what", not_numbers())
def test_what_is_no_number_is_where_it_would_be_in_one_process(ranks, what):
    family, given = not_numbers()[what]
    h, c_last = getattr(cusru.torch, family)(**given)
    found = torch.cat([rank["not numbers"][what][0] for rank in ranks])
    torch.testing.assert_close(found, h, rtol=1e-12, atol=1e-12, equal_nan=True)
    torch.testing.assert_close(ranks[0]["not numbers"][what][1], c_last, rtol=1e-12, atol=1e-12, equal_nan=True)


@pytest.mark.parametrize(
    ("what", "kind", "text", "at"),
    [
        ("a shape", "ValueError", r"bias has shape \(2, 5\); expected \(2, 4\)", 2),
        ("no tensor", "TypeError", "u must be a torch.Tensor, not list", 1),
        ("a long text", "ValueError", "pooling must be one of", 3),
        ("a gradient and no states", "ValueError", "save_every=None keeps no states", 0),
        ("SRU v2", "ValueError", "not linear in c.* Pipeline over the batch", 3),
        ("mapped", "NotImplementedError", "vmap", 0),
    ],
)
def test_what_is_wrong_at_one_rank_is_an_error_at_all(ranks, what, kind, text, at):
    for rank, found in enumerate(ranks):
        name, said = found["wrong"][what]
        assert name == kind
        assert re.search(text, said)
        assert ("rank" in said.split(":")[0]) == (rank != at)
        assert rank == at or f"rank {at} of 4" in said


@pytest.mark.parametrize(
    ("what", "text"),
    [
        ("D", "sequence_parallel_qrnn: the ranks' calls differ in D (4 at rank 0, 1, 3, 6 at rank 2)"),
        ("a gradient asked for", "in asking for gradients (True at rank 0, 1, False at rank 2, 3)"),
        ("the function", "in the function (sequence_parallel_sru at rank 0, sequence_parallel_qrnn at rank 1, 2, 3); "),
        (
            "c0 and direction",
            "in reverse (False at rank 0, 1, 2, True at rank 3); c0 (absent at rank 0, float64 at rank 1, 2, 3)",
        ),
    ],
)
def test_calls_that_differ_are_an_error_at_every_rank(ranks, what, text):
    for found in ranks:
        name, said = found["wrong"][what]
        assert name == "ValueError"
        assert text in said


def test_a_group_may_be_some_of_the_processes(ranks):
    h, c_last = cusru.torch.qrnn(normal(4, 3, 4, 3))
    torch.testing.assert_close(torch.cat([ranks[1]["of two"][0], ranks[3]["of two"][0]]), h, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(ranks[1]["of two"][1], c_last, rtol=1e-12, atol=1e-12)


def test_layers_learn_under_distributed_data_parallel(ranks):
    """Calls side by side, two batches' gradients, and a loss that not every rank has from h: the mean, times the ranks, is the
    gradient."""
    model = Layers(cusru.torch.sru)
    h, c_last = model(normal(8, 3, 4))
    (c_last.sum() + torch.cat([h[:4], h[6:]]).sin().sum()).backward()
    for rank in ranks:
        for share, a in zip(rank["layers"], model.parameters(), strict=True):
            torch.testing.assert_close(share * WORLD, 2 * a.grad, rtol=1e-12, atol=1e-12)


# ---- in one process ----------------------------------------------------------------------------------------------------


@pytest.fixture
def alone(tmp_path, monkeypatch):
    """A group of one."""
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group("gloo", rank=0, world_size=1, init_method=f"file://{tmp_path}/store")
    yield
    dist.destroy_process_group()


def test_without_a_group_it_says_what_to_do():
    with pytest.raises(RuntimeError, match=r"init_process_group.*cusru.torch.qrnn in one process"):
        sequence_parallel_qrnn(normal(2, 3, 4, 3))


def both(of: Any, u: torch.Tensor) -> torch.Tensor:
    h, c_last = of(u, bidirectional=True)
    return h.sin().sum() + c_last.cos().sum()


@pytest.mark.parametrize("of", FAMILIES)
def test_tensors_that_are_not_plain_take_the_operators(alone, monkeypatch, of):
    def unusual(*_: Any, **__: Any) -> Any:
        raise operator._Unusual

    def gradients(function: Any) -> Any:
        inputs = [normal(5, 3, 4, *(3,) * (of != "linear_recurrence"), seed=i).requires_grad_() for i in range(2)]
        inputs = inputs if of == "linear_recurrence" else inputs[:1]
        c0 = normal(3, 4).requires_grad_()
        h, c_last = function(*inputs, c0=c0, save_every=2, bidirectional=True)
        return h, c_last, *torch.autograd.grad(h.sin().sum() + c_last.cos().sum(), (*inputs, c0))

    expected = gradients(getattr(cusru.torch, of))
    monkeypatch.setattr(operator, "_run", unusual)
    torch.testing.assert_close(gradients(PARALLEL[of]), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("shape", [(0, 3, 4), (2, 0, 4), (2, 3, 0), (0, 0, 0)])
@pytest.mark.parametrize("of", FAMILIES)
def test_nothing_is_no_error(alone, of, shape):
    inputs = [normal(*shape, *(3,) * (of != "linear_recurrence")).requires_grad_()] * (1 + (of == "linear_recurrence"))
    c0 = normal(*shape[1:], seed=1).requires_grad_()
    h, c_last = PARALLEL[of](*inputs, c0=c0, bidirectional=True, starts=torch.ones(shape[:2], dtype=torch.bool))
    (h.sum() + c_last.sum()).backward()
    assert h.shape == inputs[0].grad.shape[:3] == shape
    if not shape[0]:
        assert torch.equal(c_last, c0)
        assert torch.equal(c0.grad, torch.ones_like(c0))


def test_one_state_in_so_many_is_kept_and_none_without_a_graph(alone):
    kept: list[tuple[int, ...]] = []
    u = normal(5, 3, 4, 3)
    with torch.autograd.graph.saved_tensors_hooks(lambda a: kept.append(tuple(a.shape)), lambda a: a):
        sequence_parallel_qrnn(u)
        assert not kept
        sequence_parallel_qrnn(u.requires_grad_(), save_every=2)
    assert kept.count((3, 3, 4)) == 1  # c
    assert (5, 3, 4) not in kept


class Module(torch.nn.Module):
    def forward(self, u: torch.Tensor) -> torch.Tensor:
        return sequence_parallel_qrnn(u)[0]


@pytest.mark.parametrize("how", ["compiled", "checkpointed"])
def test_it_works_under(alone, how):
    """torch.compile breaks the graph there; a checkpoint exchanges once more."""
    u = normal(5, 3, 4, 3).requires_grad_()
    (expected,) = torch.autograd.grad(both(cusru.torch.qrnn, u), u)
    if how == "compiled":
        loss = torch.compile(lambda u: both(sequence_parallel_qrnn, 2 * u), backend="eager")(u / 2)
    else:
        loss = torch.utils.checkpoint.checkpoint(lambda u: both(sequence_parallel_qrnn, u), u, use_reentrant=False)
    torch.testing.assert_close(torch.autograd.grad(loss, u)[0], expected, rtol=1e-12, atol=1e-12)


def test_what_it_does_not_work_under_is_refused(alone):
    u = normal(5, 3, 4, 3).requires_grad_()
    for transform in (torch.vmap(sequence_parallel_qrnn), torch.func.grad(lambda u: both(sequence_parallel_qrnn, u[0]))):
        with pytest.raises(NotImplementedError, match="reverse-mode autograd alone"):
            transform(u.detach().unsqueeze(0))
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(u.detach(), torch.ones_like(u))
        with pytest.raises(NotImplementedError, match="reverse-mode autograd alone"):
            sequence_parallel_qrnn(dual)
    with pytest.raises(NotImplementedError, match="reverse-mode autograd alone"):
        torch.export.export(Module(), (u.detach(),), strict=False)
    (gradient,) = torch.autograd.grad(both(sequence_parallel_qrnn, u), u, create_graph=True)
    with pytest.raises(NotImplementedError, match="no derivative of the gradients of sequence_parallel_qrnn"):
        gradient.sum().backward()
    with pytest.raises(TypeError, match=r"group must be a torch.distributed.ProcessGroup or None, not int"):
        sequence_parallel_qrnn(u, group=3)
    with pytest.raises(ValueError, match="on meta"):
        sequence_parallel_qrnn(u.to("meta"))


@scripted
def test_a_trace_of_it_is_refused(alone):
    with pytest.raises(NotImplementedError, match="reverse-mode autograd alone"):
        torch.jit.trace(sequence_parallel_qrnn, normal(5, 3, 4, 3))


if __name__ == "__main__":  # one import of torch for all
    processes = [
        torch.multiprocessing.get_context("fork").Process(target=work, args=(rank, sys.argv[1])) for rank in range(WORLD)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    sys.exit(max(abs(process.exitcode) for process in processes))
