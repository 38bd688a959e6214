"""SRU++ (`cusru.torch.SRUpp` and its parts): held to the sru package 3.0.0.dev6 and to its equations written out.

dev6 runs in a process of its own (data/run_sru3.py), where CUSRU_TEST_SRU3 names the folder of a `pip install --target`.
alpha is never left at its initial 0, where attention does not show.
"""

from __future__ import annotations

import copy
import io
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import scripted

torch = pytest.importorskip("torch", reason='torch is missing: pip install ".[torch]"')

from torch import nn  # noqa: E402
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence  # noqa: E402
from torch.utils.checkpoint import checkpoint  # noqa: E402

import cusru.torch  # noqa: E402
from cusru.torch import SRUCell, SRUpp, SRUppAttention, SRUppCell, SRUppProjectedLinear, sru  # noqa: E402

Tensor = torch.Tensor
DATA = Path(__file__).parent / "data"
INF = float("inf")


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Any:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def normal(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed + sum(shape)))


def assert_close(ours: Tensor | None, theirs: Tensor | None, where: Any = "") -> None:
    assert (ours is None) == (theirs is None), where
    if ours is None or theirs is None:
        return
    assert ours.shape == theirs.shape, where
    assert bool(ours.isfinite().all()), where
    error, scale = float((ours.detach() - theirs.detach()).abs().max()), float(theirs.detach().abs().max()) or 1.0
    assert error <= 1e-12 * scale, (where, error, scale)


def perturbed(state: dict[str, Tensor], seed: int = 0) -> dict[str, Tensor]:
    """Other values than the initial ones: alpha is not 0, LayerNorm's weights not 1."""
    generator = torch.Generator().manual_seed(seed)
    noise = {
        name: torch.randn(value.shape, generator=generator, dtype=torch.float64).to(value.dtype) for name, value in state.items()
    }
    return {n: noise[n].abs() + 0.5 if n.endswith("scale_x") else v + 0.4 * noise[n] for n, v in state.items()}


def model(*sizes: int, seed: int = 0, **options: Any) -> Any:
    """In float64, with perturbed parameters."""
    torch.manual_seed(seed)
    made = SRUpp(*(sizes or (5, 4, 6)), **options)
    made.load_state_dict(perturbed(made.state_dict(), seed))
    return made.double()


# ---- the equations, written out ---------------------------------------------------------------------------------------------


def attended(module: Any, x: Tensor, visible: Any, memory: Tensor | None = None, added: Tensor | None = None) -> Tensor:
    """U of x (L, B, n), query by query, head by head; visible(b, t, s): whether step t of row b may see key s."""
    length, batch, _ = x.shape
    earlier = 0 if memory is None else len(memory)
    z = (x if memory is None else torch.cat([memory, x])) @ module.linear1.weight.t()
    of_queries = z
    if module.layer_norm is not None and not module.normalize_after:
        of_queries = module.layer_norm(z)
    k, v = (of_queries @ module.linear2.weight.t()).split(module.proj_features, -1)
    size, rows = module.proj_features // module.num_heads, []
    for t in range(length):
        row = []
        for b in range(batch):
            parts = []
            for head in range(module.num_heads):
                own = slice(head * size, (head + 1) * size)
                keys = [s for s in range(len(z)) if visible(b, t, s) and (added is None or added[t, s] > -INF)]
                if not keys:
                    parts.append(torch.zeros(size, dtype=x.dtype))
                    continue
                q = of_queries[earlier + t, b, own]
                scores = torch.stack([q @ k[s, b, own] / size**0.5 + (0 if added is None else added[t, s]) for s in keys])
                weights = (scores - scores.max()).exp()
                parts.append((weights / weights.sum()) @ torch.stack([v[s, b, own] for s in keys]))
            row.append(torch.cat(parts))
        rows.append(torch.stack(row))
    z = module.alpha * torch.stack(rows) + z[earlier:]
    if module.layer_norm is not None and module.normalize_after:
        z = module.layer_norm(z)
    return z @ module.linear3.weight.t()


CASES: dict[str, tuple[dict[str, Any], Any]] = {
    "plain": ({}, ""),
    "two heads, normalised": (dict(num_heads=2, layer_norm=True), ""),
    "three heads, normalised before": (dict(num_heads=3, layer_norm=True, normalize_after=False), "memory"),
    "padding": (dict(num_heads=2), "padding"),
    "a mask": (dict(num_heads=2), "mask"),
    "a mask and padding": (dict(num_heads=2), "mask padding"),
    "memory": (dict(num_heads=2), "memory"),
    "memory, padded, and a mask": (dict(layer_norm=True), "memory padding mask"),
    "starts": (dict(num_heads=2), "starts"),
    "starts, memory, padding, a mask": (dict(), "starts memory padding mask"),
}


@pytest.mark.parametrize("name", CASES)
def test_attention_is_its_equations_gradients_included(name: str) -> None:
    options, given = CASES[name]
    torch.manual_seed(0)
    module = SRUppAttention(5, 7, 6, rezero_init_alpha=0.7, **options)
    module.load_state_dict(perturbed(module.state_dict()))
    module.double()
    x, memory = normal(4, 3, 5).requires_grad_(), normal(3, 3, 5, seed=2).requires_grad_() if "memory" in given else None
    earlier = 0 if memory is None else 3
    pad = (
        torch.tensor([[0, 0, 1], [0, 1, 1], [0, 0, 1], [0, 1, 1]]) if "padding" in given else torch.zeros(4, 3, dtype=torch.long)
    )
    memory_pad = torch.tensor([[1, 0, 1], [0, 0, 1], [0, 1, 1]])[:earlier] if "padding" in given else torch.zeros(earlier, 3)
    added = normal(4, earlier + 4, seed=3) if "mask" in given else None
    if added is not None:
        added[0, 1], added[2, :], added[3, 0] = -INF, -INF, -INF
        added.requires_grad_()
    starts = (
        torch.tensor([[0, 1, 0], [0, 0, 0], [1, 0, 0], [0, 1, 0]]) if "starts" in given else torch.zeros(4, 3, dtype=torch.long)
    )
    hidden, pieces = torch.cat([memory_pad, pad]), torch.cat([torch.zeros(earlier, 3), starts]).cumsum(0)

    def visible(b: int, t: int, s: int) -> bool:
        return not hidden[s, b] and bool(pieces[s, b] == pieces[earlier + t, b])

    ours = module(
        x,
        mask_pad=pad.to(torch.uint8) if "padding" in given else None,
        attn_mask=added,
        memory=memory,
        memory_mask_pad=memory_pad if "padding" in given and earlier else None,
        starts=starts if "starts" in given else None,
    )
    theirs = attended(module, x, visible, memory, added)
    assert_close(ours, theirs, name)
    leaves = [x, *module.parameters(), *(a for a in (memory, added) if a is not None)]
    weights = normal(*ours.shape)
    expected = torch.autograd.grad(theirs, leaves, weights, allow_unused=True)
    for a, b in zip(torch.autograd.grad(ours, leaves, weights, allow_unused=True), expected, strict=True):
        assert_close(a, torch.zeros_like(a) if b is None else b, name)


@pytest.mark.parametrize(
    "options", [{}, dict(rescale=True, layer_norm=True), dict(bidirectional=True, normalize_after=True, layer_norm=True)], ids=str
)
def test_a_layer_is_the_recurrence_of_sru_on_what_attention_gives(options: dict[str, Any]) -> None:
    cell = model(5, 4, 6, 1, num_heads=2, **options)[0]
    x, c0 = normal(6, 3, 5), normal(3, cell.output_size)
    h, c = cell(x, c0)
    seen = cell.layer_norm(x) if cell.layer_norm is not None and not cell.normalize_after else x
    u = attended(cell.transform_module, seen, lambda b, t, s: True).view(6, 3, cell.output_size, 4)
    expected, state = sru(u, bias=cell.bias, weight_c=cell.weight_c, c0=c0, mask_target="gate", bidirectional=cell.bidirectional)
    if cell.layer_norm is not None and cell.normalize_after:
        expected = cell.layer_norm(expected)
    assert_close(h, expected)
    assert_close(c, state)


# ---- beside sru 3.0.0.dev6 --------------------------------------------------------------------------------------------------

COUNT = 36


def case(number: int) -> dict[str, Any]:
    """Of that number: what is built, and how it is called."""
    rng = np.random.default_rng([5, number])

    def pick(*options: Any) -> Any:
        return options[int(rng.integers(len(options)))]

    hidden, both = pick(3, 4), pick(False, True)
    out = hidden * (2 if both else 1)
    size, heads, layers = pick(5, out), pick(1, 2, 3), pick(1, 2, 3)
    arguments = dict(
        num_layers=layers, dropout=pick(0.0, 0.0, 0.3), num_heads=heads, bidirectional=both, layer_norm=pick(False, True),
        normalize_after=pick(False, True), attn_layer_norm=pick(True, False), highway_bias=pick(-2.0, 0.5),
        rescale=pick(False, True), nn_rnn_compatible_return=pick(False, True), proj_input_to_hidden_first=pick(False, True),
        weight_c_init=pick(1.0, 0.5), **pick({}, {}, dict(attention_every_n_layers=2), dict(attention_last_n_layers=1)),
    )  # fmt: skip
    made = model(size, hidden, 6, seed=number, **arguments)
    length, batch = pick(1, 4, 6), pick(1, 3)
    memory = pick(0, 0, 3)
    mask = normal(length, memory + length, seed=number) if pick(False, True) else None
    if mask is not None:  # causal, as a language model's
        mask.masked_fill_(torch.ones(length, memory + length).triu(memory + 1).bool(), -INF)
    pad = torch.from_numpy(rng.random((length, batch)) < 0.3) if pick(False, True) else None
    if pad is not None:
        pad[0] = False  # all-padded rows are NaN there
    widths = [made.input_size if made.input_to_hidden is None else out, *[out] * (layers - 1)]
    h, c, _ = made(normal(length, batch, size))
    return dict(
        seed=number, sizes=(size, hidden, 6), arguments=arguments, train=pick(False, True),
        x=normal(length, batch, size, seed=number),
        state={n: v.float() for n, v in made.state_dict().items()}, c0=normal(layers, batch, out) if pick(False, True) else None,
        mask_pad=pad, attn_mask=mask, memory=[normal(memory, batch, w, seed=i) for i, w in enumerate(widths)] if memory else None,
        memory_mask_pad=torch.from_numpy(rng.random((memory, batch)) < 0.3) if memory and pick(False, True) else None,
        **{"weights of h": normal(*h.shape, seed=8), "weights of c": normal(*c.shape, seed=9)},
    )  # fmt: skip


@pytest.fixture(scope="module")
def dev6(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What it computed for the cases, and two of its models."""
    package = os.environ.get("CUSRU_TEST_SRU3")
    if not package:
        pytest.skip("CUSRU_TEST_SRU3 names no folder: pip install --target FOLDER --no-deps sru==3.0.0.dev6")
    folder = tmp_path_factory.mktemp("dev6")
    torch.save([case(number) for number in range(COUNT)], folder / "cases.pt")
    compiled = Path(package) / "torch_extensions"  # a folder of its own: 2.6 compiles under the same name
    command = [sys.executable, DATA / "run_sru3.py", package, folder / "cases.pt", folder / "found.pt"]
    done = subprocess.run(
        command, text=True, capture_output=True, env={**os.environ, "TORCH_EXTENSIONS_DIR": str(compiled)}, timeout=600
    )
    assert done.returncode == 0, done.stderr
    return torch.load(folder / "found.pt")


@pytest.mark.parametrize("number", range(COUNT))
def test_any_configuration_has_the_parameters_outputs_and_gradients_of_dev6(dev6: dict[str, Any], number: int) -> None:
    given, theirs = case(number), dev6["found"][number]
    torch.manual_seed(given["seed"])
    ours = SRUpp(*given["sizes"], **given["arguments"])
    assert torch.equal(torch.get_rng_state(), theirs["drawn"]), "parameters were drawn otherwise"
    assert list(ours.state_dict()) == list(theirs["initial"]) == list(given["state"])
    for name, value in ours.state_dict().items():
        assert torch.equal(value, theirs["initial"][name]), name
    ours.load_state_dict(given["state"], strict=True)
    ours = ours.double().train(given["train"])
    x, c0 = (None if a is None else a.clone().requires_grad_() for a in (given["x"], given["c0"]))
    memory = None if given["memory"] is None else [a.clone().requires_grad_() for a in given["memory"]]
    torch.manual_seed(given["seed"])
    h, c, saved = ours(
        x, c0, mask_pad=given["mask_pad"], attn_mask=given["attn_mask"], memory=memory, memory_mask_pad=given["memory_mask_pad"]
    )
    assert torch.equal(torch.get_rng_state(), theirs["masks drawn"]), "dropout was drawn otherwise"
    torch.autograd.backward([h, c], [given["weights of h"], given["weights of c"]])
    gradients = {"x": x.grad, "c0": None if c0 is None else c0.grad} | {n: p.grad for n, p in ours.named_parameters()}
    gradients |= {} if memory is None else {f"memory {i}": a.grad for i, a in enumerate(memory)}
    assert_close(h, theirs["h"], number)
    assert_close(c, theirs["c"], number)
    for a, b in zip(saved["saved_inputs"], theirs["saved"], strict=True):
        assert_close(a, b, number)
    assert list(gradients) == list(theirs["gradients"])
    for name, gradient in gradients.items():
        assert_close(gradient, theirs["gradients"][name], (number, name))


def test_the_sweep_takes_every_value_of_everything() -> None:
    cases = [case(number) for number in range(COUNT)]
    for name in cases[0]["arguments"]:
        assert len({c["arguments"][name] for c in cases}) > 1, name
    for name in ("c0", "mask_pad", "attn_mask", "memory", "memory_mask_pad"):
        assert {c[name] is None for c in cases} == {False, True}, name
    assert {c["train"] for c in cases if c["arguments"]["dropout"]} == {False, True}
    assert any("attention_last_n_layers" in c["arguments"] for c in cases)
    assert any("attention_every_n_layers" in c["arguments"] for c in cases)


def test_models_that_dev6_pickled_whole_load_without_it(dev6: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    kept = {name: sys.modules.pop(name) for name in [*sys.modules] if name.split(".")[0] in ("sru", "cuda_functional")}
    finders = [*sys.meta_path]
    try:
        cusru.torch.install_as_sru()
        stack, cell = torch.load(io.BytesIO(dev6["models"]), weights_only=False)
        package, modules = sys.modules["sru"], sys.modules["sru.modules"]
        assert package.SRUpp is modules.SRUpp is SRUpp is type(stack)
        assert package.SRUppCell is modules.SRUppCell is SRUppCell is type(cell)
        assert modules.SRUppAttention is SRUppAttention is type(stack[1].transform_module)
        assert modules.SRUppProjectedLinear is SRUppProjectedLinear is type(stack[0].transform_module)
        again = copy.deepcopy(stack)
        fresh = SRUpp(5, 4, 6, num_heads=2, attention_every_n_layers=2, bidirectional=True)
        fresh.load_state_dict(stack.state_dict())
        x = torch.rand(4, 2, 5)
        for one in (again, fresh):
            assert torch.equal(one(x)[0], stack(x)[0])
        assert cell(x)[0].shape == (4, 2, 4)
    finally:
        for name in [name for name in sys.modules if name.split(".")[0] in ("sru", "cuda_functional")]:
            del sys.modules[name]
        sys.modules |= kept
        sys.meta_path[:] = finders


# ---- laws -------------------------------------------------------------------------------------------------------------------


def causal(length: int, earlier: int = 0) -> Tensor:
    return torch.zeros(length, earlier + length, dtype=torch.float64).masked_fill(
        torch.ones(length, earlier + length).triu(earlier + 1).bool(), -INF
    )


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.float32])
def test_a_padded_batch_equals_single_sequences_gradients_included(dtype: Any, bidirectional: bool) -> None:
    made = model(5, 4, 6, num_heads=2, bidirectional=bidirectional)
    x, lengths = normal(6, 3, 5), (6, 4, 1)
    pad = torch.arange(6).unsqueeze(1) >= torch.tensor(lengths)
    given = x.masked_fill(pad.unsqueeze(-1), 1e3)
    h, c, _ = made(given, mask_pad=pad.to(dtype))
    alone = [made(x[:length, row : row + 1]) for row, length in enumerate(lengths)]
    for row, (one, state, _) in enumerate(alone):
        assert_close(h[: lengths[row], row], one[:, 0])
        assert_close(c[:, row], state[:, 0])
        assert not h[lengths[row] :, row].any()
    together = torch.autograd.grad(h.sin().sum() + c.cos().sum(), list(made.parameters()))
    apart = torch.autograd.grad(sum(one.sin().sum() + state.cos().sum() for one, state, _ in alone), list(made.parameters()))
    for a, b in zip(together, apart, strict=True):
        assert_close(a, b)


@pytest.mark.parametrize("enforce_sorted", [False, True])
def test_a_packed_sequence_comes_back_packed(enforce_sorted: bool) -> None:
    made, x, lengths = model(bidirectional=True), normal(6, 3, 5), [6, 4, 2] if enforce_sorted else [4, 2, 6]
    packed = pack_padded_sequence(x, torch.tensor(lengths), enforce_sorted=enforce_sorted)
    h, c, saved = made(packed)
    pad = torch.arange(6).unsqueeze(1) >= torch.tensor(lengths)
    expected, state, _ = made(x, mask_pad=pad)
    assert torch.equal(h.batch_sizes, packed.batch_sizes)
    assert_close(pad_packed_sequence(h)[0], expected)
    assert_close(c, state)
    assert saved["saved_inputs"][0].shape == (6, 3, 5)
    for name in ("mask_pad", "starts"):
        with pytest.raises(ValueError, match=f"{name} cannot be given with a PackedSequence"):
            made(packed, **{name: pad})


def test_a_row_that_is_all_padding_and_a_step_that_sees_nothing_give_no_nan() -> None:
    made, x = model(5, 4, 6, num_heads=2), normal(4, 3, 5).requires_grad_()
    pad = torch.zeros(4, 3, dtype=torch.bool)
    pad[:, 1] = True
    mask = causal(4)
    mask[2] = -INF
    for masks in (dict(mask_pad=pad), dict(attn_mask=mask), dict(mask_pad=pad, attn_mask=mask)):
        h, c, _ = made(x, **masks)
        gradients = torch.autograd.grad(h.sum() + c.sum(), [x, *made.parameters()])
        assert all(bool(a.isfinite().all()) for a in (h, c, *gradients))
    assert not made(x, mask_pad=pad)[0][:, 1].any()


@pytest.mark.parametrize("cuts", [(3, 2, 2), (1,) * 7, (6, 1)])
@pytest.mark.parametrize(
    "options", [{}, dict(layer_norm=True, normalize_after=True), dict(proj_input_to_hidden_first=True, num_heads=2)], ids=str
)
def test_chunks_with_memory_and_c0_equal_the_whole(options: dict[str, Any], cuts: tuple[int, ...]) -> None:
    made, x = model(**options), normal(7, 2, 5)
    whole, last, _ = made(x, attn_mask=causal(7))
    memory, c, parts, done = None, None, [], 0
    for chunk in x.split(cuts):
        h, c, saved = made(chunk, c, attn_mask=causal(len(chunk), done), memory=memory)
        inputs = saved["saved_inputs"]
        memory = inputs if memory is None else [torch.cat(pair) for pair in zip(memory, inputs, strict=True)]
        done += len(chunk)
        parts.append(h)
    assert_close(torch.cat(parts), whole)
    assert_close(c, last)


@pytest.mark.parametrize("options", [{}, dict(bidirectional=True, num_heads=2, layer_norm=True)], ids=str)
def test_sequences_end_to_end_equal_the_pieces(options: dict[str, Any]) -> None:
    made, x = model(**options), normal(9, 1, 5)
    starts = torch.zeros(9, 1, dtype=torch.uint8)
    starts[[0, 4, 5]] = 1
    h, _, _ = made(x, starts=starts)
    alone = torch.cat([made(piece)[0] for piece in x.split([4, 1, 4])])
    assert_close(h, alone)
    ours, theirs = (torch.autograd.grad(a.square().sum(), list(made.parameters())) for a in (h, alone))
    for a, b in zip(ours, theirs, strict=True):
        assert_close(a, b)


def test_memory_belongs_to_what_is_before_the_first_start() -> None:
    made, x, starts = model(), normal(5, 1, 5), torch.zeros(5, 1, dtype=torch.bool)
    _, c, saved = made(normal(3, 1, 5, seed=4))
    starts[2] = True
    h, _, _ = made(x, c, memory=saved["saved_inputs"], starts=starts)
    first, _, _ = made(x[:2], c, memory=saved["saved_inputs"])
    assert_close(h, torch.cat([first, made(x[2:])[0]]))


# ---- interface and what it works under --------------------------------------------------------------------------------------


def test_cells_are_sru_s_and_take_a_weight_of_their_own() -> None:
    for sizes, projection in (((5, 4), 0), ((4, 4), 3)):
        cell = SRUppCell(*sizes, projection_size=projection)
        assert isinstance(cell, SRUCell)
        h, c = cell(torch.rand(3, 2, sizes[0]))
        assert (h.shape, c.shape) == ((3, 2, 4), (2, 4))
        assert cell(torch.rand(2, sizes[0]))[1].shape == (2, 4)
        other = pickle_round(cell)
        assert list(other.state_dict()) == list(cell.state_dict())
        with pytest.warns(UserWarning, match="weight_c is not in the state dict"):
            other.load_state_dict({n: v for n, v in cell.state_dict().items() if n != "weight_c"}, strict=False)


def pickle_round(module: nn.Module) -> Any:
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def test_a_transform_module_and_a_cell_of_one_s_own_need_know_of_no_starts() -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 12)

        def forward(self, input: Tensor, mask_pad: Any, attn_mask: Any, memory: Any, memory_mask_pad: Any) -> Tensor:
            assert attn_mask is None
            return self.linear(input)

    class Cell(SRUppCell):
        def forward(self, input, c0=None, mask_pad=None, attn_mask=None, memory=None, memory_mask_pad=None):  # type: ignore
            return super().forward(input, c0, mask_pad, attn_mask, memory, memory_mask_pad)

    with pytest.warns(UserWarning, match=r"transform_module \(Own\) has no reset_parameters"):
        cell = Cell(4, 4, transform_module=Own())
    made = SRUpp(4, 4, 2, num_layers=1)
    made.rnn_lst[0] = cell
    assert made(torch.rand(3, 2, 4))[0].shape == (3, 2, 4)


def test_compiled_as_one_graph_and_trained() -> None:
    made, x = model(5, 4, 6, num_heads=2).float(), torch.rand(5, 3, 5)
    compiled = torch.compile(made, fullgraph=True, backend="aot_eager")
    pad = torch.arange(5).unsqueeze(1) >= torch.tensor([5, 4, 2])
    for masks in ({}, dict(mask_pad=pad, attn_mask=causal(5).float()), dict(starts=pad)):
        torch.testing.assert_close(compiled(x, **masks)[0], made(x, **masks)[0])
        compiled(x, **masks)[0].sum().backward()


def test_exported_for_any_length_and_batch() -> None:
    made = model(5, 4, 6).float().eval()
    steps, batch = torch.export.Dim("steps"), torch.export.Dim("batch")
    both = {0: steps, 1: batch}
    program = torch.export.export(
        made,
        (torch.rand(5, 3, 5),),
        dict(mask_pad=torch.zeros(5, 3, dtype=torch.bool)),
        dynamic_shapes=dict(input=both, mask_pad=both),
    ).module()
    for sizes in ((5, 3), (2, 7), (9, 2)):
        x, pad = torch.rand(*sizes, 5), torch.arange(sizes[0]).unsqueeze(1) >= torch.arange(1, sizes[1] + 1)
        torch.testing.assert_close(program(x, mask_pad=pad)[0], made(x, mask_pad=pad)[0])


@scripted
@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
def test_scripted_and_saved() -> None:
    made = model(5, 4, 6, num_heads=2, attention_every_n_layers=2, bidirectional=True, layer_norm=True).float().eval()
    file = io.BytesIO()
    torch.jit.save(torch.jit.script(made), file)
    file.seek(0)
    loaded, x = torch.jit.load(file), torch.rand(5, 3, 5)
    pad = torch.arange(5).unsqueeze(1) >= torch.tensor([5, 4, 2])
    memory = [torch.rand(2, 3, 5), torch.rand(2, 3, 8)]
    for given in ((), (torch.rand(2, 3, 8), pad), (None, pad, causal(5, 2).float(), memory, None, pad)):
        with torch.no_grad():
            ours, theirs = loaded(x, *given), made(x, *given)
        torch.testing.assert_close(ours[0], theirs[0])
        torch.testing.assert_close(ours[1], theirs[1])
        torch.testing.assert_close(ours[2]["saved_inputs"], theirs[2]["saved_inputs"])


def test_autocast_and_16_bits() -> None:
    made, x = model(5, 4, 6, num_heads=2).float(), torch.rand(5, 3, 5)
    expected = made(x, attn_mask=causal(5))[0]
    with torch.autocast("cpu", torch.bfloat16):
        h, c, saved = made(x, attn_mask=causal(5))
        h2, _, _ = made(x, c, attn_mask=causal(5, 5), memory=saved["saved_inputs"])
    assert h2.shape == h.shape
    assert c.dtype == torch.float32
    assert float((h.float() - expected).abs().max()) < 0.1
    h, c, _ = copy.deepcopy(made).bfloat16()(x.bfloat16(), attn_mask=causal(5))
    assert (h.dtype, c.dtype) == (torch.bfloat16, torch.float32)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointing_draws_the_same_masks_again(use_reentrant: bool) -> None:
    made, x = model(5, 4, 6, dropout=0.3, attn_dropout=0.2), normal(4, 2, 5)
    results = []
    for run in (made, lambda a: checkpoint(made, a, use_reentrant=use_reentrant)):
        made.zero_grad()
        torch.manual_seed(3)
        run(x.clone().requires_grad_())[0].sum().backward()
        results.append([p.grad.clone() for p in made.parameters()])
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


def test_attention_dropout_keeps_the_expectation_and_acts_in_training_alone() -> None:
    module = SRUppAttention(4, 4, 4, attn_dropout=0.5, rezero_init_alpha=1.0).double()
    x = normal(5, 2, 4)
    plain = module.eval()(x)
    assert torch.equal(module(x), plain)
    torch.manual_seed(0)
    drawn = torch.stack([module.train()(x) for _ in range(4000)])
    assert drawn.std(0).min() > 1e-3
    assert float(((drawn.mean(0) - plain) / (drawn.std(0) / 4000**0.5)).abs().max()) < 5


def call(*more: Any, x: Any = None, **masks: Any) -> Any:
    return SRUpp(5, 4, 6)(torch.rand(3, 2, 5) if x is None else x, *more, **masks)


REFUSED: dict[str, tuple[Any, Any, str]] = {
    "both": (lambda: SRUpp(5, 4, 6, attention_every_n_layers=2, attention_last_n_layers=1), ValueError, r"_every_n_layers and"),
    "heads": (lambda: SRUpp(5, 4, 6, num_heads=4), ValueError, r"proj_size = 6 must be a multiple of num_heads = 4"),
    "heads of one": (lambda: SRUppAttention(5, 4, 6, num_heads=4), ValueError, r"proj_features = 6 must be a multiple"),
    "every": (lambda: SRUpp(5, 4, 6, attention_every_n_layers=0), ValueError, r"attention_every_n_layers"),
    "dropout": (lambda: SRUpp(5, 4, 6, attn_dropout=1.0), ValueError, r"attn_dropout must be a probability"),
    "bound": (lambda: SRUpp(5, 4, 6, weight_c_init=-1), ValueError, r"weight_c_init must be at least 0"),
    "module": (lambda: SRUppCell(5, 4, transform_module=3), TypeError, r"transform_module must be a torch.nn.Module or None"),
    "input": (lambda: call(x=torch.rand(3, 5)), ValueError, r"input has shape \[3, 5\]"),
    "one step": (lambda: SRUpp(5, 4, 6)[0](torch.rand(3, 5)), ValueError, r"input has shape \[3, 5\]; .*one step is L = 1"),
    "dtype": (lambda: call(x=torch.rand(3, 2, 5).double()), TypeError, r"input has dtype torch.float64"),
    "c0": (lambda: call(torch.rand(2, 4)), ValueError, r"c0 has shape \[2, 4\]; expected \[2, 2, 4\]"),
    "mask_pad": (lambda: call(mask_pad=torch.zeros(2, 3)), ValueError, r"mask_pad has shape"),
    "starts": (lambda: call(starts=torch.zeros(2, 3)), ValueError, r"starts has shape"),
    "bool mask": (
        lambda: call(attn_mask=torch.ones(3, 3).bool()), TypeError, r"attn_mask has dtype .*bool.*-inf where not"
    ),
    "mask's shape": (lambda: call(attn_mask=torch.ones(3, 4)), ValueError, r"attn_mask has shape .*expected \[3, 3\]"),
    "mask's type": (lambda: call(attn_mask=[1]), TypeError, r"attn_mask must be a torch.Tensor, not list"),
    "memory": (lambda: call(memory=torch.rand(2, 2, 5)), TypeError, r"memory must be a list .* not Tensor"),
    "memories": (lambda: call(memory=[None]), ValueError, r"memory has 1 entries; expected one for each of the 2"),
    "memory's shape": (
        lambda: call(memory=[torch.rand(2, 3, 5), None]), ValueError, r"memory has shape \[2, 3, 5\]"
    ),
    "memory_mask_pad": (
        lambda: call(memory=[torch.rand(2, 2, 5), None], memory_mask_pad=torch.zeros(3, 2)),
        ValueError, r"memory_mask_pad has shape \[3, 2\]; expected \[2, 2\]"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_had_is_refused_by_name(name: str) -> None:
    refused, error, words = REFUSED[name]
    with pytest.raises(error, match=words):
        refused()
