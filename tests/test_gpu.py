"""On a CUDA device: the table's full-size cases against the oracle, more than 2^31 elements, torch's streams and graphs.

What else holds on a GPU is in test_properties.py and test_laws.py, whose tests run there too.
"""

import copy
import math

import numpy as np
import oracle
import pytest
import strategies
from conftest import missing, to_host

import cusru
from benchmarks import cases
from cusru.measuring import Cuda

REASON = missing("gpu")
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(REASON is not None, reason=REASON or "")]
COLUMNS = 2048  # that the oracle, which is slow, looks at


@pytest.mark.parametrize(
    ("case", "dtype"),
    [pytest.param(c, d, id=f"{c.name}-{d}") for c in cases.BENCHMARKS for d in c.dtypes],
)
def test_the_cases_of_the_table(case, dtype):
    """Full size on the device; a slice of the batch, all of its columns and times, against the oracle."""
    import cupy

    device = Cuda(cupy)
    inputs = cases.make(case, dtype, put=device.put)
    grad_h, grad_c_last = cases.make_gradients(case, dtype, put=device.put)
    output = cusru.sru_forward(**inputs)
    gradients = cusru.sru_backward(grad_h, grad_c_last, output.c, **inputs)

    some = slice(case.B - max(1, min(case.B, COLUMNS // case.D)), None)
    batch_axis = {"c0": 0, "mask_c": 0, "c_last": 0, "grad_c_last": 0}

    def part(name, a):
        if not hasattr(a, "get"):
            return a
        if name not in ("bias", "weight_c") or a.ndim == 4:
            a = a[some] if batch_axis.get(name) == 0 else a[:, some]
        return to_host(a)

    problem = strategies.Problem(
        {"case": case.name},
        {n: part(n, a) for n, a in inputs.items()},
        part("grad_h", grad_h),
        part("grad_c_last", grad_c_last),
        dtype,
        0,
    )
    problem.check(cusru.Output(*(part(n, a) for n, a in output._asdict().items())), problem.expected_forward())
    summed_over_the_batch = dict(bias=None, weight_c=None if case.weight_c == "column" else gradients.weight_c)
    expected = problem.expected_backward()
    results = {n: part(n, a) for n, a in gradients._replace(**summed_over_the_batch)._asdict().items() if a is not None}
    held_in_state = [n for n, a in results.items() if a.dtype == strategies.state_of(dtype)]
    oracle.check(results, expected, dtype, held_in_state)


def test_more_than_two_to_the_31_elements():
    case = cases.Case("huge", 8, 5600, 16384, skip="none", save_every=8)
    assert case.elements * case.k > 2**31
    import cupy

    if cupy.cuda.runtime.memGetInfo()[0] < 24 << 30:
        pytest.skip("needs 24 GiB of free device memory")
    u = cupy.asarray(np.random.default_rng(0).standard_normal((8, 1, 64, 3)).astype("float16"))
    whole = cupy.zeros((case.L, case.B, case.D, case.k), "float16")
    whole[:, -1:, -64:] = u
    output, wanted = cusru.sru_forward(whole, save_every=8), cusru.sru_forward(u, save_every=8)
    grad_h = cupy.zeros(output.h.shape, "float16")
    grad_h[:, -1:, -64:] = wanted.h
    got = cusru.sru_backward(grad_h, None, output.c, whole, save_every=8).u[:, -1:, -64:]
    expected = oracle.backward(wanted.h.get(), None, u.get(), save_every=8)
    oracle.check({"h": output.h[:, -1:, -64:].get()}, oracle.forward(u.get()), "float16")
    oracle.check({"u": got.get()}, expected, "float16")
    assert not output.h[:, :-1].any()


# ---- torch -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def torch():
    torch = pytest.importorskip("torch", reason='needs torch: pip install "cusru[torch]"')
    if not torch.cuda.is_available():
        pytest.skip("this torch has no CUDA device")
    return torch


def pair(torch, **options):
    """The same layers on the CPU and on the device."""
    from cusru.torch import SRU

    torch.manual_seed(0)
    layers = SRU(24, 16, 2, bidirectional=True, rescale=True, **options)
    with torch.no_grad():
        for parameter in layers.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return layers, copy.deepcopy(layers).cuda()


def loss_of(result):
    return result[0].sin().sum() + result[1].square().sum()


def test_layers_of_torch_give_what_they_give_on_a_cpu(torch):
    here, there = pair(torch, batch_first=True)
    x = torch.randn(5, 60, 24)
    mask = torch.rand(5, 60) < 0.2
    results = here(x, mask_pad=mask), there(x.cuda(), mask_pad=mask.cuda())
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(b.cpu(), a, rtol=1e-4, atol=1e-4)
    for result in results:
        loss_of(result).backward()
    for a, b in zip(here.parameters(), there.parameters(), strict=True):
        torch.testing.assert_close(b.grad.cpu(), a.grad, rtol=1e-3, atol=1e-3)
    with torch.autocast("cuda", torch.float16):
        h, c = there(x.cuda())
    assert (h.dtype, c.dtype) == (torch.float32, torch.float32)
    assert there.rnn_lst[0](x[:, 0].cuda())[0].shape == (5, 32)


def test_forward_and_backward_stay_on_the_streams_that_are_current(torch):
    """What is enqueued before them takes a while; on another stream they would read the zeros that lay there."""
    _, layers = pair(torch)
    given = torch.randn(60, 5, 24, device="cuda")
    x = torch.zeros_like(given)
    wanted = torch.autograd.grad(loss_of(layers(given)), list(layers.parameters()))
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)
        x.copy_(given)
        loss = loss_of(layers(x))
        torch.cuda._sleep(100_000_000)  # the backward's kernels come after this one, on the forward's stream
    found = torch.autograd.grad(loss, list(layers.parameters()))  # from another stream than the forward's
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


def test_captured_in_a_cuda_graph_they_follow_new_inputs(torch):
    _, layers = pair(torch)
    x = torch.randn(60, 5, 24, device="cuda", requires_grad=True)
    graphed = torch.cuda.make_graphed_callables(copy.deepcopy(layers), (x,))
    for seed in range(3):
        torch.manual_seed(seed)
        x = torch.randn(60, 5, 24, device="cuda", requires_grad=True)
        found, wanted = (torch.autograd.grad(loss_of(run(x)), x)[0] for run in (graphed, layers))
        assert torch.equal(found, wanted)


def test_packed_sequences_keep_their_rows_places(torch):
    here, there = pair(torch)
    lengths = torch.tensor([3] * 8 + [2] * 7 + [1] * 5)[torch.randperm(20)]
    pack = torch.nn.utils.rnn.pack_padded_sequence
    packed = pack(torch.randn(3, 20, 24), lengths, enforce_sorted=False)
    (h, c), (h_there, c_there) = here(packed), there(packed.to("cuda"))
    for a, b in ((h.data, h_there.data), (h.sorted_indices, h_there.sorted_indices), (c, c_there)):
        torch.testing.assert_close(b.cpu(), a, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_they_give_what_they_give_eagerly(torch, backend):
    _, layers = pair(torch)
    x = torch.randn(40, 5, 24, device="cuda")
    wanted = torch.autograd.grad(loss_of(layers(x)), list(layers.parameters()))
    torch._dynamo.reset()
    found = torch.autograd.grad(loss_of(torch.compile(layers, backend=backend, fullgraph=True)(x)), list(layers.parameters()))
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_what_is_written_into_tells_autograd(torch):
    u = torch.randn(20, 3, 8, 3, device="cuda")
    h = torch.randn(20, 3, 8, device="cuda")
    weight = torch.ones((), device="cuda", requires_grad=True)
    squared = (weight * h).sum()  # keeps h
    cusru.sru_forward(u, out=(h, None, None), save_every=None)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        squared.backward()


def test_a_device_that_is_not_the_current_one(torch):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    here, there = pair(torch)
    x = torch.randn(60, 6, 24)
    expected = here(x)
    result = there.to("cuda:1")(x.to("cuda:1"))
    loss_of(result).backward()
    torch.testing.assert_close(result[0].cpu(), expected[0], rtol=1e-4, atol=1e-4)
    parallel = torch.nn.DataParallel(there.to("cuda:0"), dim=1)
    torch.testing.assert_close(parallel(x.cuda())[0].cpu(), expected[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("save_every", [1, 32])
@pytest.mark.parametrize(
    "wanted", [("u", "x", "bias", "weight_c", "c0"), ("u",), ("bias", "c0"), ("x", "weight_c")], ids="-".join
)
def test_the_straight_way_gives_the_operator_s_bits(torch, monkeypatch, wanted, save_every):
    """On the current stream and on another, aligned and not; gradients that nobody asks for are left out."""
    from cusru.torch import operator, sru

    def gradients(offset):
        generator = torch.Generator("cuda").manual_seed(0)

        def normal(*shape):
            memory = torch.empty(math.prod(shape) + offset, device="cuda")
            a = memory[offset:].view(shape).normal_(generator=generator)
            return a.detach()

        shapes = dict(u=(65, 40, 64, 3), x=(65, 40, 64), bias=(2, 64), weight_c=(128,), c0=(40, 64))
        given = {n: normal(*shape).requires_grad_(n in wanted) for n, shape in shapes.items()}
        h, c_last = sru(**given, scale_x=0.7, save_every=save_every)
        return [h, c_last, *torch.autograd.grad(loss_of((h, c_last)), [given[n] for n in wanted])]

    for offset in (0, 1):
        found = gradients(offset)
        with torch.cuda.stream(torch.cuda.Stream()):
            elsewhere = gradients(offset)
        torch.cuda.synchronize()
        with monkeypatch.context() as patch:
            patch.setattr(operator, "_straight", lambda *_: None)
            expected = gradients(offset)
        for a, b, c in zip(found, elsewhere, expected, strict=True):
            assert torch.equal(a, c)
            assert torch.equal(b, c)


def test_a_workspace_for_another_stream_is_none_of_torch_s_memory(torch):
    """torch would hand it out again on its current stream, before the kernels have run on this one."""
    u, h, bias = (torch.zeros(shape, device="cuda") for shape in ((64, 40, 64, 3), (64, 40, 64), (2, 64)))
    assert cusru.workspace_size("backward", u, bias=bias) > 0
    out, stream = cusru.sru_backward(h, None, h, u, bias=bias), torch.cuda.Stream()
    torch.cuda.synchronize()
    before = torch.cuda.memory_stats()["allocation.all.allocated"]
    cusru.sru_backward(h, None, h, u, bias=bias, out=out, stream=stream.cuda_stream)
    torch.cuda.synchronize()
    assert torch.cuda.memory_stats()["allocation.all.allocated"] == before


def test_a_graph_replays_what_was_captured_whatever_is_called_meanwhile():
    """The struct of arguments is the call's own copy: other calls of the same signature change nothing in it."""
    import cupy

    rng = np.random.default_rng(0)
    u, x = cupy.asarray(rng.standard_normal((40, 8, 64, 3)), "f4"), cupy.asarray(rng.standard_normal((40, 8, 64)), "f4")
    out, others = cusru.sru_forward(u, x), cusru.sru_forward(u, x)
    stream = cupy.cuda.Stream(non_blocking=True)
    cupy.cuda.Device().synchronize()
    with stream:
        stream.begin_capture()
        cusru.sru_forward(u, x, out=out)
        graph = stream.end_capture()
    for scale in (1, 2):
        u *= scale
        cusru.sru_forward(u * 3, x * 3, out=others, scale_x=0.1)
        expected = cusru.sru_forward(u, x)
        cupy.cuda.Device().synchronize()
        with stream:
            graph.launch()
            stream.synchronize()
        for a, b in zip(out, expected, strict=True):
            cupy.testing.assert_array_equal(a, b)
