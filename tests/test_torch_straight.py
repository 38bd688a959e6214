"""The straight way of eager torch against the operator's: the same bits, errors and autograd, whoever looks."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="needs PyTorch: pip install torch")

from test_torch import DIFFERENTIABLE, VARIANTS, B, D, L, gradients, leaves, normal, variants  # noqa: E402
from torch.overrides import TorchFunctionMode  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402

from cusru import dlpack, reference  # noqa: E402
from cusru.torch import operator, sru  # noqa: E402


@pytest.fixture
def straight(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Of each call of sru from here on, whether it went the straight way."""
    went: list[bool] = []
    run = operator._straight

    def watched(*args: Any) -> Any:
        results = run(*args)
        went.append(results is not None)
        return results

    monkeypatch.setattr(operator, "_straight", watched)
    return went


def the_old_way(monkeypatch: pytest.MonkeyPatch, run: Any) -> Any:
    with monkeypatch.context() as patch:
        patch.setattr(operator, "_straight", lambda *_: None)
        return run()


def equal(found: dict[str, Any], expected: dict[str, Any]) -> bool:
    return found.keys() == expected.keys() and all(
        torch.equal(a, expected[n]) and a.dtype == expected[n].dtype and a.stride() == expected[n].stride()
        for n, a in found.items()
    )


@variants
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("batch_first", [False, True])
def test_bits_and_memory_are_those_of_the_operator(variant, dtype, batch_first, monkeypatch, straight):
    def given():
        arguments = {
            n: a.detach().to(dtype).requires_grad_(a.requires_grad)
            if isinstance(a, torch.Tensor) and a.is_floating_point()
            else a
            for n, a in leaves(**variant).items()
        }
        if batch_first:
            for name in ("u", "x"):
                if name in arguments:
                    a = arguments[name].detach()
                    arguments[name] = a.transpose(0, 1).contiguous().transpose(0, 1).requires_grad_()
        return arguments

    assert equal(gradients(given()), the_old_way(monkeypatch, lambda: gradients(given())))
    with torch.no_grad():
        found = dict(zip(("h", "c_last"), sru(**given()), strict=True))
        assert equal(found, the_old_way(monkeypatch, lambda: dict(zip(("h", "c_last"), sru(**given()), strict=True))))
    assert straight == [True, True]


@pytest.mark.parametrize("wanted", [("u",), ("x",), ("bias",), ("weight_c", "c0"), ("c0",), ("u", "bias")], ids="-".join)
@pytest.mark.parametrize("step", [False, True])
def test_what_nobody_asks_for_is_not_computed(wanted, step, monkeypatch):
    """needs_input_grad: the others are not even given memory, and those that are asked for keep their bits."""
    expected = gradients(leaves(step=step))
    computed: list[set[str]] = []
    run = reference.backward

    def watched(*args, **keywords):
        computed.append({name for name in DIFFERENTIABLE if keywords[f"grad_{name}"] is not None})
        run(*args, **keywords)

    monkeypatch.setattr(reference, "backward", watched)
    given = leaves(step=step)
    for name in DIFFERENTIABLE:
        given[name].requires_grad_(name in wanted)
    h, c_last = sru(**given)
    loss = (h * normal(*h.shape)).sum() + (c_last * normal(*c_last.shape)).sum()
    found = dict(zip(wanted, torch.autograd.grad(loss, [given[n] for n in wanted]), strict=True))
    assert computed == [set(wanted)]
    assert equal(found, {n: expected[n] for n in wanted})


def test_few_states_are_kept_rather_than_recomputed():
    """Memory that nobody would notice; and many are not."""
    if operator._somebody_takes_what_is_saved():
        pytest.skip("a torch that cannot be asked: there what is saved is always what the operator saves")
    for length, kept in ((L, L), (1500, -(-1500 // 32))):
        h, _ = sru(normal(length, B, D, 3).requires_grad_(), save_every=32)
        assert h.grad_fn.saved_tensors[0].shape == (kept, B, D)


# ---- who looks -------------------------------------------------------------------------------------------------------


class Modes(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.seen.append(str(function))
        return function(*args, **(kwargs or {}))


def test_a_dispatch_mode_sees_the_operators(straight):
    given, expected = leaves(), gradients(leaves())
    with Modes() as mode:
        found = gradients(given)
    assert equal(found, expected)
    assert straight == [True, False]
    assert {"cusru.sru_forward.default", "cusru.sru_backward.default"} <= set(mode.seen)


def test_a_dispatch_mode_around_the_backward_alone_sees_its_operator():
    given, expected = leaves(), gradients(leaves())
    h, c_last = sru(**given)
    loss = (h * normal(*h.shape)).sum() + (c_last * normal(*c_last.shape)).sum()
    with Modes() as mode:
        found = torch.autograd.grad(loss, [given[n] for n in expected])
    assert equal(dict(zip(expected, found, strict=True)), expected)
    assert "cusru.sru_backward.default" in mode.seen


def test_a_function_mode_and_a_default_device_go_the_operator_s_way(straight):
    class Watching(TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            return function(*args, **(kwargs or {}))

    expected = gradients(leaves())
    for mode in (Watching(), torch.device("cpu")):
        with mode:
            assert equal(gradients(leaves()), expected)
    assert straight == [True, False, False]


def test_a_subclass_goes_the_operator_s_way(straight):
    class Own(torch.Tensor):
        pass

    given = leaves()
    with torch.no_grad():
        expected = sru(**given)
        for name in ("u", "bias"):
            found = sru(**given | {name: given[name].as_subclass(Own)})
            assert torch.equal(found[0].as_subclass(torch.Tensor), expected[0])
    assert straight == [True, False, False]


def test_parameters_go_straight(straight):
    given = leaves()
    expected = gradients(given)
    parameters = {n: torch.nn.Parameter(a.detach()) for n, a in given.items()}
    parameters["u"] = given["u"]
    assert equal(gradients(parameters), expected)
    assert straight == [True, True]


def test_hooks_see_the_same_gradients(monkeypatch):
    def hooked():
        given, seen = leaves(), []
        for name, a in given.items():
            a.register_hook(lambda g, name=name: seen.append((name, g.clone())) or g * 2)
        h, _ = sru(**given)
        h.grad_fn.register_hook(lambda inputs, outputs: seen.append(("node", len([g for g in inputs if g is not None]))))
        h.square().sum().backward()
        return seen, {n: a.grad for n, a in given.items()}

    (seen, found), (seen_before, expected) = hooked(), the_old_way(monkeypatch, hooked)
    assert equal(found, expected)
    assert sorted(n for n, _ in seen) == sorted(n for n, _ in seen_before)
    assert dict(seen)["node"] == dict(seen_before)["node"] == len(found)


def test_saved_tensor_hooks_may_move_what_is_saved(monkeypatch):
    """What comes back lies elsewhere, in another order."""

    def moved():
        packed = []

        def pack(a):
            packed.append(tuple(a.shape))
            return a.numpy(force=True).copy(order="F")

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda a: torch.from_numpy(np.asfortranarray(a))):
            return gradients(leaves(save_every=2)), packed

    (found, packed), expected = moved(), gradients(leaves(save_every=2))
    assert all(torch.equal(found[n], expected[n]) for n in expected)
    assert (L, B, D, 3) in packed


def test_anomaly_mode_names_the_forward(monkeypatch):
    def fails():
        u = normal(L, B, D, 3).requires_grad_()
        h, _ = sru(u)
        h.register_hook(lambda g: g * float("nan"))
        with (
            pytest.warns(UserWarning, match="Traceback of forward call"),
            pytest.raises(RuntimeError, match="returned nan values"),
        ):
            h.sum().backward()

    with torch.autograd.detect_anomaly(check_nan=True):
        fails()
        the_old_way(monkeypatch, fails)


def test_a_saved_tensor_that_was_changed_is_noticed(monkeypatch):
    def changed(name):
        given = leaves()
        h, _ = sru(**given)
        with torch.no_grad():
            given[name].add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            h.sum().backward()

    for name in ("u", "bias"):
        changed(name)
        the_old_way(monkeypatch, lambda name=name: changed(name))


def test_a_graph_serves_twice_if_it_is_kept_and_only_then():
    given = leaves()
    h, _ = sru(**given)
    first = torch.autograd.grad(h.sum(), given["u"], retain_graph=True)[0]
    assert torch.equal(torch.autograd.grad(h.sum(), given["u"])[0], first)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(h.sum(), given["u"])


def test_many_gradients_at_once(straight):
    """torch.autograd.grad(is_grads_batched=True) maps the backward with vmap."""
    given = leaves()
    h, _ = sru(**given)
    assert straight == [True]
    several = torch.stack([normal(L, B, D, seed=seed) for seed in range(3)])
    names = [n for n in DIFFERENTIABLE if n in given]
    batched = torch.autograd.grad(h, [given[n] for n in names], several, is_grads_batched=True, retain_graph=True)
    for i, g in enumerate(several):
        for a, b in zip(torch.autograd.grad(h, [given[n] for n in names], g, retain_graph=True), batched, strict=True):
            torch.testing.assert_close(b[i], a, rtol=1e-12, atol=1e-12)


def test_a_graph_of_the_gradients_has_their_bits_and_no_derivative(straight):
    expected, given = gradients(leaves()), leaves()
    h, c_last = sru(**given)
    loss = (h * normal(*h.shape)).sum() + (c_last * normal(*c_last.shape)).sum()
    names = [n for n in DIFFERENTIABLE if n in given]
    found = torch.autograd.grad(loss, [given[n] for n in names], create_graph=True)
    assert straight == [True, True]
    assert all(torch.equal(a, expected[n]) for n, a in zip(names, found, strict=True))
    with pytest.raises(NotImplementedError, match="double backward"):
        found[0].sum().backward()


def test_a_lazily_negated_view_is_refused_as_before(monkeypatch):
    u = torch.complex(normal(L, B, D, 3), normal(L, B, D, 3)).conj().imag
    assert u.is_neg()
    for way in (lambda run: run(), lambda run: the_old_way(monkeypatch, run)):
        with pytest.raises(TypeError, match="lazily conjugated or negated"):
            way(lambda: sru(u))


@pytest.mark.parametrize("name", ["u", "bias"])
def test_memory_that_was_given_back_is_refused_as_before(name, monkeypatch):
    given = leaves()
    with torch.no_grad():
        sru(**given)
        given[name].untyped_storage().resize_(0)

        def error() -> tuple[type, str]:
            try:
                sru(**given)
            except Exception as error:
                return type(error), str(error)
            raise AssertionError("it read memory that is not there")

        assert error() == the_old_way(monkeypatch, error)


def test_inputs_are_left_resizable():
    given = leaves()
    gradients(given)
    assert all(a.untyped_storage().resizable() for a in given.values())


@pytest.mark.parametrize("name", list(VARIANTS))
def test_the_kernels_own_source_goes_the_same_way(name, monkeypatch, straight):
    from conftest import missing

    if reason := missing("simulator"):
        pytest.skip(reason)
    monkeypatch.setenv("CUSRU_SIMULATE", "1")
    given = VARIANTS[name]
    assert equal(gradients(leaves(**given)), the_old_way(monkeypatch, lambda: gradients(leaves(**given))))
    assert straight == [True]


# ---- what an adversary found -----------------------------------------------------------------------------------------


def test_a_checkpoint_may_be_run_under_a_mode_the_first_time_or_the_second(straight):
    """The operator runs then at one time, and the straight way at the other: they save tensors of the same shapes."""
    from torch.utils.checkpoint import checkpoint

    expected = gradients(leaves())
    for first in (True, False):
        given, modes = leaves(), [Modes(), Modes()]
        with modes[0] if first else torch.enable_grad():
            h, c_last = checkpoint(lambda **keywords: sru(**keywords), use_reentrant=False, **given)
        loss = (h * normal(*h.shape)).sum() + (c_last * normal(*c_last.shape)).sum()
        with modes[1] if not first else torch.enable_grad():
            found = torch.autograd.grad(loss, [given[n] for n in expected])
        assert equal(dict(zip(expected, found, strict=True)), expected)
    assert {True, False} <= set(straight)


@pytest.mark.parametrize("name", ["scale_x"])
def test_a_negated_scale_is_read_as_what_it_is(name, monkeypatch):
    scale = torch.complex(torch.ones(1), torch.full((1,), 2.0)).conj().imag
    assert scale.is_neg()
    u, x = normal(L, B, D, 3, dtype=torch.float32), normal(L, B, D, dtype=torch.float32)
    with torch.no_grad():
        expected = sru(u, x, scale_x=-2.0)[0]
        assert torch.equal(sru(u, x, **{name: scale})[0], expected)
        assert torch.equal(the_old_way(monkeypatch, lambda: sru(u, x, **{name: scale}))[0], expected)


def test_results_of_expanded_inputs_lie_as_torch_lays_them(monkeypatch):
    def run():
        u = normal(1, B, D, 3).expand(L, B, D, 3).requires_grad_()
        bias = normal(2, 1).expand(2, D).requires_grad_()
        h, c_last = sru(u, bias=bias)
        return dict(zip("hcub", (h, c_last, *torch.autograd.grad(h.sum(), [u, bias])), strict=True))

    assert equal(run(), the_old_way(monkeypatch, run))


def test_the_order_of_axes_is_that_of_torchs_empty_like():
    rng = np.random.default_rng(0)
    for _ in range(3000):
        rank = int(rng.integers(1, 5))
        shape = tuple(int(n) for n in rng.integers(1, 5, rank))
        order = rng.permutation(rank).tolist()
        a = torch.empty([shape[axis] for axis in order]).permute(np.argsort(order).tolist())
        for axis in range(rank):
            if rng.random() < 0.3:
                a = a.narrow(axis, 0, 1).expand([4 if i == axis else n for i, n in enumerate(a.shape)])
        like, axes = torch.empty_like(a), dlpack.order_like(tuple(a.shape), a.stride())
        extents = list(a.shape)
        laid = dlpack.blank(tuple(extents), "float32", axes).strides
        assert [s for s, n in zip(laid, extents, strict=True) if n > 1] == [
            s for s, n in zip(like.stride(), extents, strict=True) if n > 1
        ], (a.shape, a.stride())
