"""The simulator itself: CUDA's semantics, its hostility, its statistics, and that sanitizers find planted faults."""

from __future__ import annotations

import os
import pathlib
import re
import shutil
import subprocess
import sys
import textwrap
import threading

import numpy as np
import pytest

from cusru import simulator

ROOT = pathlib.Path(__file__).parent.parent

try:
    simulator.compiler()
except RuntimeError as error:
    pytest.skip(str(error), allow_module_level=True)

BODY_LINE = 6  # of a kernel's first line in the source below


def source(body: str) -> str:
    return (
        '#include "cuda_on_cpu.h"\n'
        "struct Args { const void* in; void* out; unsigned* flags; int n; };\n"
        'extern "C" __global__ void __launch_bounds__(1024) kernel(const Args args) {\n'
        "    const float* in = static_cast<const float*>(args.in); float* out = static_cast<float*>(args.out);\n"
        "    int i = blockIdx.x * blockDim.x + threadIdx.x, lane = threadIdx.x % 32; (void)in, (void)out, (void)i, (void)lane;\n"
        + textwrap.dedent(body).strip("\n")
        + "\n}\nCUSRU_SIMULATED_KERNEL(kernel, Args)\n"
    )


ARGS = np.dtype([("in", "u8"), ("out", "u8"), ("flags", "u8"), ("n", "i4")], align=True)


def launch(
    body: str,
    out: np.ndarray,
    inputs: np.ndarray | None = None,
    *,
    grid: int = 1,
    block: int = 32,
    flags: np.ndarray | None = None,
    offset: int = 0,
) -> np.ndarray:
    args = np.zeros((), ARGS)
    args["out"] = out.ctypes.data + offset
    args["in"] = inputs.ctypes.data if inputs is not None else 0
    args["flags"] = flags.ctypes.data if flags is not None else 0
    args["n"] = out.size
    simulator.load(source(body), "kernel")(grid, block, args[()])
    return out


def aligned(count: int, dtype: type = np.float32) -> np.ndarray:
    """Zeros that begin at a sector."""
    size = count * np.dtype(dtype).itemsize
    raw = np.zeros(size + 64, np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : start + size].view(dtype)


@pytest.fixture
def seeds(monkeypatch: pytest.MonkeyPatch):
    def each(count: int = 20):
        for seed in range(count):
            monkeypatch.setattr(simulator, "seed", seed)
            yield seed

    return each


# ---- semantics ----


def test_indices_cover_the_grid() -> None:
    body = "float v = i + 1000 * gridDim.x + 100000 * blockDim.x; global_store<4>(out + i, &v);"
    out = launch(body, np.zeros(7 * 40, np.float32), grid=7, block=40)
    np.testing.assert_array_equal(out, np.arange(280) + 7000 + 4000000)


REVERSE = """
CUSRU_SHARED(float, tile, 256);
float v = i;
tile[threadIdx.x] = v;
__syncthreads();
v = tile[blockDim.x - 1 - threadIdx.x];
__syncthreads();
tile[threadIdx.x] = 2 * v;
__syncthreads();
v = tile[threadIdx.x ^ 1];
global_store<4>(out + i, &v);
"""


def test_barrier(seeds) -> None:
    t = np.arange(256)
    expected = np.concatenate([2 * (255 - (t ^ 1)) + 256 * b for b in range(9)]).astype(np.float32)
    expected += np.repeat(256 * np.arange(9), 256)
    for _ in seeds():
        np.testing.assert_array_equal(launch(REVERSE, np.zeros(9 * 256, np.float32), grid=9, block=256), expected)


RELAY = """
CUSRU_SHARED(float, slot, 32);
int warp = threadIdx.x / 32, warps = (blockDim.x + 31) / 32, rounds = gridDim.x * 21;
float state = 1;
for (int round = warp; round < rounds; round += warps) {
    if (round > 0) {
        barrier_wait(1 + warp, 64);
        state = slot[lane ^ 1];
    }
    __syncwarp();
    state = fmaf(state, 0.75f, lane + round);
    slot[lane] = state;
    if (round + 1 < rounds) barrier_arrive(1 + (warp + 1) % warps, 64);
    global_store<4>(out + (blockIdx.x * rounds + round) * 32 + lane, &state);
}
"""


@pytest.mark.parametrize("block", [64, 96, 480])
def test_warps_hand_a_state_on_in_turn(block: int, seeds) -> None:
    rounds = 63
    expected, state = np.empty((rounds, 32), np.float32), np.ones(32, np.float32)
    for time in range(rounds):
        if time > 0:
            state = state[np.arange(32) ^ 1]
        state = np.float32(0.75 * np.float64(state) + np.arange(32) + time)  # rounded once
        expected[time] = state
    for _ in seeds():
        out = launch(RELAY, np.zeros((3, rounds, 32), np.float32), grid=3, block=block)
        np.testing.assert_array_equal(out, np.broadcast_to(expected, out.shape))


def test_all_who_wait_at_a_named_barrier_leave_it_together_and_incomplete_warps_count_whole(seeds) -> None:
    body = """
    CUSRU_SHARED(float, tile, 72);
    for (int round = 0; round < 9; ++round) {
        tile[threadIdx.x] = i + round;
        barrier_wait(15, 96);
        float v = tile[71 - threadIdx.x];
        global_store<4>(out + 72 * round + i, &v);
        barrier_wait(15, 96);
    }
    """
    for _ in seeds():
        out = launch(body, np.zeros((9, 72), np.float32), block=72)
        np.testing.assert_array_equal(out, 71 - np.arange(72) + np.arange(9)[:, None])


def test_a_giver_does_not_wait(seeds) -> None:
    """It may do all its work before the taker comes, which here waits for the giver's end."""
    body = """
    if (i < 32) {
        barrier_arrive(1, 64);
        barrier_arrive(2, 64);
        if (i == 0) store_release(args.flags, 1u);
    } else {
        while (load_acquire(args.flags) == 0) {}
        barrier_wait(2, 64);
        barrier_wait(1, 64);
    }
    """
    for _ in seeds():
        launch(body, np.zeros(1, np.float32), block=64, flags=np.zeros(1, np.uint32))


@pytest.mark.parametrize("width", [32, 16, 8, 4, 2])
@pytest.mark.parametrize("amount", [0, 1, 3, 7, 16, 31])
def test_shuffles(width: int, amount: int) -> None:
    body = """
    float v[4];
    int width = args.flags[0], amount = args.flags[1];
    v[0] = __shfl_sync(0xffffffffu, 10.0f + i, amount, width);
    v[1] = __shfl_up_sync(0xffffffffu, 10.0f + i, amount, width);
    v[2] = static_cast<float>(__shfl_down_sync(0xffffffffu, 10.0 + i, amount, width));
    v[3] = __shfl_xor_sync(0xffffffffu, 10 + i, amount, width);
    global_store<16>(out + 4 * i, v);
    """
    out = launch(body, np.zeros((64, 4), np.float32), block=64, flags=np.array([width, amount], np.uint32))
    lane = np.arange(64) % 32
    segment = lane // width * width
    xor = lane ^ amount
    lanes = [
        segment + amount % width,
        np.where(lane - amount < segment, lane, lane - amount),
        np.where(lane + amount >= segment + width, lane, lane + amount),
        np.where(xor >= segment + width, lane, xor),
    ]
    warp = np.arange(64) // 32 * 32
    np.testing.assert_array_equal(out, np.stack([10 + warp + source for source in lanes], axis=1))


def test_votes_and_partial_masks() -> None:
    body = """
    unsigned half = lane < 16 ? 0x0000ffffu : 0xffff0000u, v[4];
    v[0] = __ballot_sync(half, lane % 3 == 0);
    v[1] = __any_sync(0xffffffffu, i == 5) | __all_sync(half, lane < 16) << 1;
    __syncwarp();
    if (lane < 16) __syncwarp(half);
    v[2] = __activemask();
    v[3] = __shfl_sync(half, lane, lane ^ 16);  // a lane that the mask does not name: undefined, never its value
    global_store<16>(static_cast<unsigned*>(args.out) + 4 * i, v);
    """
    out = launch(body, np.zeros((64, 4), np.uint32), block=64)
    multiples = sum(1 << lane for lane in range(0, 32, 3))
    expected = np.where(np.arange(64) % 32 < 16, multiples & 0xFFFF, multiples & 0xFFFF0000)
    np.testing.assert_array_equal(out[:, 0], expected)
    np.testing.assert_array_equal(out[:, 1], np.where(np.arange(64) < 32, 1, 0) + np.where(np.arange(64) % 32 < 16, 2, 0))
    assert np.all(out[:, 2] >> (np.arange(64) % 32) & 1)
    np.testing.assert_array_equal(out[:, 3], np.uint32(0xFFFFFFFF))


LOOK_BACK = """
unsigned* flags = args.flags;
CUSRU_SHARED(unsigned, ticket, 1);
if (threadIdx.x == 0) ticket[0] = atomicAdd(flags, 1u);
__syncthreads();
unsigned tile = ticket[0];
if (threadIdx.x == 0) {
    float sum = 0, mine = 1 + tile;
    if (tile > 0) {
        while (load_acquire(flags + tile) == 0) {}
        workspace_load<4>(&sum, out + tile - 1);
    }
    sum += mine;
    workspace_store<4>(out + tile, &sum);
    STORE(flags + tile + 1, 1u);
}
"""


@pytest.mark.parametrize("store", ["store_release", "__threadfence(); store_relaxed"])
def test_blocks_wait_for_earlier_tickets(store: str, seeds) -> None:
    for _ in seeds(5):
        flags = np.zeros(51, np.uint32)
        out = launch(LOOK_BACK.replace("STORE", store), np.zeros(50, np.float32), grid=50, flags=flags)
        np.testing.assert_array_equal(out, np.cumsum(np.arange(1, 51)))


def test_shared_memory_is_one_per_declaration() -> None:
    body = """
    float sum = 0;
    for (int round = 0; round < 3; ++round) {
        CUSRU_SHARED(float, a, 32);
        CUSRU_SHARED(unsigned short, b, 3);
        CUSRU_SHARED(double, c, 32);
        if (round == 0) a[lane] = 1, c[lane] = 2;
        if (lane < 3 && round == 0) b[lane] = 4;
        __syncwarp();
        sum += a[lane ^ 1] + b[lane % 3] + static_cast<float>(c[31 - lane]);
        if ((reinterpret_cast<size_t>(a) | reinterpret_cast<size_t>(b) | reinterpret_cast<size_t>(c)) % 16) sum = -1;
    }
    global_store<4>(out + i, &sum);
    """
    np.testing.assert_array_equal(launch(body, np.zeros(64, np.float32), grid=2), 21)


def test_fused_multiply_add_and_flush_to_zero() -> None:
    body = """
    volatile float a, b, v[4]; float w[4];
    global_load<4>(w, in); a = w[0];
    global_load<4>(w, in + 1); b = w[0];
    v[0] = fmaf(a, a, -(a * a));
    v[1] = a * a - a * a;
    v[2] = b * 0.5f;
    v[3] = (b * 0.5f) * 2.0f;
    for (int j = 0; j < 4; ++j) w[j] = v[j];
    if (i == 0) global_store<16>(out, w);
    """
    a, tiny = np.float32(1.1), np.finfo(np.float32).tiny
    out = launch(body, np.zeros(4, np.float32), np.array([a, tiny], np.float32))
    assert out[0] == np.float32(np.float64(a) ** 2 - np.float64(a * a))
    np.testing.assert_array_equal(out[1:], 0)
    assert tiny * np.float32(0.5) > 0  # and the caller's arithmetic is as before


def test_doubles_never_flush() -> None:
    """Not even where the caller's own do."""
    body = """
    double v[2];
    global_load<16>(v, in + 4 * i);
    v[0] = v[0] * v[1];
    v[1] = v[0] * 1e10;
    global_store<16>(out + 4 * i, v);
    """
    text = source(body).replace("KERNEL(kernel, Args)", "KERNEL(kernel, Args, double)")
    pairs = np.tile([1e-300, 1e-15], 32)
    out, args = np.zeros(64), np.zeros((), ARGS)
    args["in"], args["out"] = pairs.ctypes.data, out.ctypes.data
    simulator.load(text, "kernel")(1, 32, args[()])
    np.testing.assert_array_equal(out, np.tile([1e-300 * 1e-15, 1e-300 * 1e-15 * 1e10], 32))
    assert out[0] > 0
    launch(body.replace("1e10", "1e10f"), out, pairs)  # a kernel of floats: the CPU flushes all
    np.testing.assert_array_equal(out, 0)


# ---- hostility ----


def test_order_of_warps_depends_on_the_seed_alone(seeds) -> None:
    body = "unsigned v = atomicAdd(args.flags, 1u); global_store<4>(static_cast<unsigned*>(args.out) + i, &v);"

    def order() -> bytes:
        return launch(body, np.zeros(256, np.uint32), block=128, grid=2, flags=np.zeros(1, np.uint32)).tobytes()

    orders = [(order(), order()) for _ in seeds(8)]
    assert all(first == again for first, again in orders)
    assert len({first for first, _ in orders}) == 8


def test_the_last_block_starts_first() -> None:
    body = (
        "unsigned v = atomicAdd(args.flags, 1u); if (i % 32 == 0) global_store<4>(static_cast<unsigned*>(args.out) + i / 32, &v);"
    )
    out = launch(body, np.zeros(64, np.uint32), grid=64, flags=np.zeros(1, np.uint32))
    assert out[:8].min() > out[-8:].max()


def test_missing_syncwarp_shows_in_either_direction(seeds) -> None:
    for step in ("lane + 1", "lane + 31"):
        body = f"""
        CUSRU_SHARED(float, tile, 32);
        tile[lane] = lane;
        float v = tile[({step}) % 32];
        global_store<4>(out + i, &v);
        """
        assert any(np.isnan(launch(body, np.zeros(32, np.float32))).sum() > 1 for _ in seeds())


@pytest.mark.parametrize("kind", ["float", "double", "unsigned short"])
def test_fresh_shared_memory_is_poisoned(kind: str) -> None:
    body = f"""
    CUSRU_SHARED({kind}, tile, 2048);
    {kind} v = tile[threadIdx.x * 4];
    tile[threadIdx.x * 4] = 0;
    global_store<sizeof v>(static_cast<{kind}*>(args.out) + i, &v);
    """
    dtype = {"float": np.float32, "double": np.float64, "unsigned short": np.float16}[kind]
    assert np.isnan(launch(body, np.zeros(64 * 40, dtype), grid=40, block=64)).all()


ERRORS = {
    "thread returned before a barrier": (
        "if (i == 3) return;\n__syncthreads();",
        64,
        ["divergent", f"line {BODY_LINE + 1}"],
    ),
    "two barriers": ("if (i < 32) __syncthreads();\nelse __syncthreads();", 64, ["divergent", f"line {BODY_LINE}"]),
    "a barrier some never reach": (
        "if (i < 32) __syncthreads();\nelse while (load_relaxed(args.flags) == 0) {}",
        64,
        ["deadlock", "32 at the __syncthreads"],
    ),
    "lane returned before a shuffle": (
        "if (i == 3) return;\n__shfl_sync(0xffffffffu, 1, 0);",
        32,
        ["mask 0xffffffff|waits for it"],
    ),
    "lane elsewhere": ("if (i == 3) __syncthreads();\nelse __shfl_sync(0xffffffffu, 1, 0);", 32, ["deadlock", "0x00000008"]),
    "lane not in its own mask": ("__shfl_sync(0x0fffffffu, 1, 0);", 32, ["does not name the calling lane"]),
    "masks that disagree": ("__ballot_sync(i < 8 ? 0xffu : 0xffffffffu, 1);", 32, ["0xffffffff"]),
    "operations that disagree": (
        "if (i < 8) __syncwarp(); else __ballot_sync(0xffffffffu, 1);",
        32,
        ["another operation|0x000000ff"],
    ),
    "mask wider than the warp": ("__syncwarp(0xffffffffu);", 16, ["does not exist"]),
    "a flag nobody sets": ("while (load_acquire(args.flags) == 0) {}", 32, ["deadlock", "flags that nobody changes"]),
    "a flag read without acquire": ("float v = 0;\nwhile (v == 0) workspace_load<4>(&v, args.flags);", 32, ["deadlock"]),
    "a block that waits for a later one": (
        "if (blockIdx.x == 1) while (load_acquire(args.flags) == 0) {}\nelse store_release(args.flags + 1, 1u);",
        32,
        ["deadlock"],
    ),
    "nobody arrives": (
        "if (threadIdx.x < 32) barrier_wait(3, 64);",
        64,
        ["deadlock", f"barrier 3 has 32 of 64 threads, .* line {BODY_LINE}"],
    ),
    "nobody takes": (
        "if (threadIdx.x >= 32) barrier_arrive(3, 64);",
        64,
        [f"barrier 3 has but 32 of 64 threads, .* line {BODY_LINE}"],
    ),
    "a giver overruns the taker": (
        "if (threadIdx.x < 32) { barrier_arrive(3, 64);\nbarrier_arrive(3, 64); }\nelse while (load_relaxed(args.flags) == 0) {}",
        64,
        [f"line {BODY_LINE + 1}: too many arrivals: .* 32 of 64"],
    ),
    "two givers, no taker": ("barrier_arrive(3, 64);", 64, [f"line {BODY_LINE}: too many arrivals: .* nobody waits"]),
    "counts that disagree": (
        "if (threadIdx.x < 32) barrier_wait(3, 64); else\nbarrier_arrive(3, 96);",
        96,
        ["barrier 3 of 96 threads, while .* one of 64|barrier 3 of 64 threads, while .* one of 96"],
    ),
    "part of a warp arrives": ("if (lane < 3) barrier_arrive(3, 64);", 64, [f"line {BODY_LINE}: .*returned|in line {BODY_LINE}"]),
    "part of a warp waits": (
        "if (lane < 3) barrier_wait(3, 64); else __syncwarp(0xfffffff8u), __shfl_sync(0xffffffffu, 1, 0);",
        32,
        ["barrier 3 of 64|another operation"],
    ),
    "a warp at two named barriers": (
        "if (lane < 3) barrier_wait(3, 32);\nelse barrier_wait(4, 32);",
        32,
        ["divergent barrier: .* barrier 3 of 32.* barrier 4 of 32|divergent barrier: .* barrier 4 of 32.* barrier 3 of 32"],
    ),
    "a named barrier in two lines": (
        "if (lane < 3) barrier_wait(3, 32);\nelse barrier_wait(3, 32);",
        32,
        [f"line {BODY_LINE},.* line {BODY_LINE + 1},|line {BODY_LINE + 1},.* line {BODY_LINE},", "divergent barrier"],
    ),
    "the barrier of __syncthreads": ("barrier_wait(0, 32);", 32, ["barriers 1 to 15"]),
    "no such barrier": ("barrier_arrive(16, 64);", 64, ["barriers 1 to 15"]),
    "threads that are not whole warps": ("barrier_wait(1, 48);", 64, ["32 for each warp"]),
    "more threads than the block has": ("barrier_wait(1, 96);", 64, ["32 for each warp"]),
    "too much shared memory": ("CUSRU_SHARED(float, tile, 12289);\ntile[0] = 1;", 32, ["48 KiB"]),
    "misaligned load": ("float v[2];\nglobal_load<8>(v, out + 1);", 32, ["misaligned", "8 bytes"]),
    "misaligned store": ("float v[4];\nglobal_store<16>(out + 2, v);", 32, ["misaligned", "16 bytes"]),
    "misaligned workspace": ("short v;\nworkspace_load<2>(&v, static_cast<char*>(args.out) + 1);", 32, ["misaligned"]),
    "null pointer": ("float v = 1;\nglobal_store<4>(const_cast<float*>(in) + i, &v);", 32, ["null"]),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors_are_reported(case: str, seeds) -> None:
    body, block, texts = ERRORS[case]
    for _ in seeds(6):
        with pytest.raises(RuntimeError, match=r"^kernel: ") as caught:
            launch(body, aligned(64), block=block, flags=np.zeros(4, np.uint32), grid=2)
        for text in texts:
            assert re.search(text, str(caught.value)), str(caught.value)
    test_barrier(seeds)  # a failed launch leaves nothing behind


def test_argument_size_and_bad_sources() -> None:
    kernel = simulator.load(source(""), "kernel")
    with pytest.raises(RuntimeError, match="32 bytes in the kernel, 4 in Python"):
        kernel(1, 32, np.zeros((), [("n", "i4")])[()])
    with pytest.raises(RuntimeError, match=r"error: .*undeclared"):
        simulator.load(source("undeclared();"), "kernel")
    with pytest.raises(RuntimeError, match="1 to 1024"):
        kernel(1, 1025, np.zeros((), ARGS)[()])
    kernel(0, 32, np.zeros((), ARGS)[()])


# ---- statistics ----

COPY = "float v; global_load<4>(&v, in + {index}); global_store<4>(out + i, &v);"


@pytest.mark.parametrize(
    ("index", "read", "sectors"),
    [
        ("i", 1024, 32),  # coalesced
        ("2 * i", 1024, 64),  # every other value
        ("8 * i", 1024, 256),  # a sector each
        ("blockIdx.x", 32, 8),  # one value for all lanes of a warp, 8 warps
        ("i + 1", 1024, 40),  # one value off
        ("255 - i", 1024, 32),  # backwards
    ],
)
def test_statistics(index: str, read: int, sectors: int) -> None:
    inputs, out = aligned(4096), aligned(256)
    with simulator.report() as report:
        launch(COPY.format(index=index), out, inputs, grid=2, block=128)
    assert (report.bytes_read, report.bytes_written) == (read, 1024)
    assert (report.read_requests, report.write_requests) == (8, 8)
    assert (report.sectors_read, report.sectors_written) == (sectors, 32)
    assert (report.useful_read, report.useful_written) == (read, 1024)
    assert report.sector_efficiency == pytest.approx((read + 1024) / (32 * (sectors + 32)))
    assert report.requests_per_kib == pytest.approx(16 / ((read + 1024) / 1024))


def test_statistics_of_tiles_and_vectors() -> None:
    packed = """
    float v[4], sum = 0;
    for (int j = 0; j < 4; ++j) global_load<4>(v + j, in + 4 * i + j), sum += v[j];
    BOUNDARY
    global_load<16>(v, in + 4 * i);
    workspace_store<4>(out + i, &sum);
    """
    inputs, out = aligned(128), aligned(32)
    with simulator.report() as outer:
        with simulator.report() as one:
            launch(packed.replace("BOUNDARY", ""), out, inputs)
        with simulator.report() as two:
            launch(packed.replace("BOUNDARY", "tile_boundary();"), out, inputs)
    # The packed value's four reads share their sectors within a tile; the vector reads them again in the next.
    assert (one.read_requests, one.bytes_read, one.useful_read, one.sectors_read) == (5, 1024, 512, 16)
    assert (two.read_requests, two.bytes_read, two.useful_read, two.sectors_read) == (5, 1024, 1024, 32)
    assert one.workspace_bytes == two.workspace_bytes == 128
    assert (outer.launches, outer.bytes_read) == (2, 2048)
    with simulator.report() as empty:
        pass
    assert (empty.launches, empty.sector_efficiency, empty.requests_per_kib) == (0, 1.0, 0.0)


# ---- arithmetic ----


def convert(body: str, inputs: np.ndarray, out: np.ndarray) -> np.ndarray:
    grid = (out.size + 1023) // 1024
    count = np.array([out.size], np.uint32)
    return launch("if (i >= args.n) return;\n" + body, out, inputs, grid=grid, block=1024, flags=count)


def test_half_and_bfloat_widen_exactly() -> None:
    bits = np.arange(1 << 16, dtype=np.uint16)
    body = """
    unsigned short v; global_load<2>(&v, static_cast<const unsigned short*>(args.in) + i);
    float w = WIDEN(v); global_store<4>(out + i, &w);
    """
    half = convert(body.replace("WIDEN", "half_to_float"), bits, np.zeros(1 << 16, np.float32))
    np.testing.assert_array_equal(half, bits.view(np.float16).astype(np.float32))
    np.testing.assert_array_equal(np.signbit(half), np.signbit(bits.view(np.float16)))
    bfloat = convert(body.replace("WIDEN", "bfloat_to_float"), bits, np.zeros(1 << 16, np.uint32).view(np.float32))
    np.testing.assert_array_equal(bfloat.view(np.uint32), bits.astype(np.uint32) << 16)


def test_half_and_bfloat_round_to_nearest_even() -> None:
    # Every 16-bit value, every midpoint between neighbours, and the floats next to both; and random floats.
    rng = np.random.default_rng(1)
    bits = np.arange(1 << 16, dtype=np.uint32)
    half = np.arange(1 << 16, dtype=np.uint16).view(np.float16).astype(np.float32)
    half = half[np.isfinite(half)]
    with np.errstate(over="ignore"):
        above = np.nextafter(half.astype(np.float16), np.float16(np.inf)).astype(np.float64)
    middle = (half.astype(np.float64) + above) / 2
    middle = middle[np.isfinite(middle)].astype(np.float32)
    points = [bits << 16, bits << 16 | 0x8000, half.view(np.uint32), middle.view(np.uint32)]
    points = np.concatenate([p + np.uint32(step) for p in points for step in (0, 1, 0xFFFFFFFF)])
    points = np.concatenate([points, rng.integers(0, 1 << 32, 1 << 18, dtype=np.uint32)])
    values = points.view(np.float32)
    body = """
    float v; global_load<4>(&v, in + i);
    unsigned short w = NARROW(v); global_store<2>(static_cast<unsigned short*>(args.out) + i, &w);
    """
    got = convert(body.replace("NARROW", "float_to_half"), values, np.zeros(values.size, np.uint16))
    with np.errstate(all="ignore"):
        expected = values.astype(np.float16)
    nan = np.isnan(values)
    np.testing.assert_array_equal(got[~nan], expected.view(np.uint16)[~nan])
    assert np.isnan(got[nan].view(np.float16)).all()

    got = convert(body.replace("NARROW", "float_to_bfloat"), values, np.zeros(values.size, np.uint16))
    wide = points.astype(np.uint64)
    rounded = (wide + 0x7FFF + (wide >> 16 & 1)) >> 16
    np.testing.assert_array_equal(got[~nan], rounded.astype(np.uint16)[~nan])
    assert np.isnan((got[nan].astype(np.uint32) << 16).view(np.float32)).all()


def approximate(function: str, values: np.ndarray) -> np.ndarray:
    body = f"float v; global_load<4>(&v, in + i); v = {function}(v); global_store<4>(out + i, &v);"
    return convert(body, values, np.zeros_like(values))


def test_ex2_reaches_its_documented_error() -> None:
    rng = np.random.default_rng(2)
    x = np.concatenate([rng.uniform(-126, 127.9, 1 << 17), rng.normal(0, 1, 1 << 17)]).astype(np.float32)
    exact = np.exp2(x.astype(np.float64))
    error = (approximate("ex2_approx", x) - exact) / exact
    assert np.abs(error).max() <= 2.0**-22
    assert error.max() > 0.99 * 2.0**-22
    assert error.min() < -0.99 * 2.0**-22
    np.testing.assert_array_equal(approximate("ex2_approx", x), approximate("ex2_approx", x))
    special = np.array([0, -0.0, 1e-40, -1e-40, np.inf, -np.inf, 128, -127.5, -150, np.nan, 1e38, -1e38], np.float32)
    expected = np.array([1, 1, 1, 1, np.inf, 0, np.inf, 0, 0, np.nan, np.inf, 0], np.float32)
    np.testing.assert_array_equal(approximate("ex2_approx", special), expected)


def test_rcp_reaches_its_documented_error() -> None:
    rng = np.random.default_rng(3)
    x = (rng.uniform(1, 2, 1 << 18) * 2.0 ** rng.integers(-125, 125, 1 << 18) * rng.choice([-1, 1], 1 << 18)).astype(np.float32)
    x = np.concatenate([x, 2.0 ** np.arange(-125, 125).astype(np.float32)])
    exact = 1 / x.astype(np.float64)
    ulp = 2.0 ** (np.floor(np.log2(np.abs(exact))) - 23)
    error = (approximate("rcp_approx", x) - exact) / ulp
    assert np.abs(error).max() <= 1
    assert error.max() > 0.99
    assert error.min() < -0.99
    special = np.array([0, -0.0, 1e-40, -1e-40, np.inf, -np.inf, np.nan, 3e38, -3e38], np.float32)
    expected = np.array([np.inf, -np.inf, np.inf, -np.inf, 0, -0.0, np.nan, 0, -0.0], np.float32)
    got = approximate("rcp_approx", special)
    np.testing.assert_array_equal(got, expected)
    np.testing.assert_array_equal(np.signbit(got), np.signbit(expected))


# ---- compiling and caching ----

SCRIPT = f"""
import os, sys, threading
sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "tests")!r}]
import numpy as np
import test_simulator as t
from cusru import simulator

compiled = []
compile = simulator._compile
simulator._compile = lambda *a: (compiled.append(a[2].name), compile(*a))

def check(body=t.REVERSE):
    out = t.launch(body, np.zeros(4 * 256, np.float32), grid=4, block=256)
    assert out[0] == 2 * 254, out
"""


def python(script: str, **environment: str) -> subprocess.Popen[str]:
    values = {**os.environ, **environment}
    return subprocess.Popen(
        [sys.executable, "-c", SCRIPT + textwrap.dedent(script)],
        env=values,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process: subprocess.Popen[str]) -> str:
    out, errors = process.communicate(timeout=100)
    assert process.returncode == 0, errors
    return out


def test_cold_cache_with_threads_and_processes(tmp_path: pathlib.Path) -> None:
    script = """
    start, failures = threading.Barrier(8), []
    def work():
        start.wait()
        try:
            for _ in range(50):
                check()
        except BaseException as error:
            failures.append(error)
    threads = [threading.Thread(target=work) for _ in range(8)]
    [one.start() for one in threads]
    [one.join() for one in threads]
    assert not failures, failures
    assert len(set(compiled)) == len(compiled) <= 2, compiled  # the runtime and the kernel
    print(len(compiled))
    """
    folder = tmp_path / "cold"
    both = [python(script, CUSRU_CACHE_DIR=str(folder)) for _ in range(2)]
    assert sum(int(finish(one)) for one in both) >= 2
    assert folder.stat().st_mode & 0o777 == 0o700
    assert {one.suffix for one in folder.iterdir()} == {".so", ".cpp"}  # nothing half-written is left
    assert finish(python(script, CUSRU_CACHE_DIR=str(folder))).strip() == "0"


def test_fork(tmp_path: pathlib.Path) -> None:
    """Also while another thread compiles, and holds that library's lock."""
    script = """
    check()
    other = t.REVERSE + "/* another */"
    inside = threading.Event()
    simulator._compile = lambda *a: (inside.set(), threading.Event().wait(1), compile(*a))
    thread = threading.Thread(target=check, args=(other,))
    thread.start()
    inside.wait()
    child = os.fork()
    if child == 0:
        try:
            check()
            check(other)
        except BaseException as error:
            print(error)
            os._exit(1)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    thread.join()
    check(other)
    """
    finish(python(script, CUSRU_CACHE_DIR=str(tmp_path / "cache")))


@pytest.mark.parametrize("mode", [0o770, 0o707])
def test_cache_that_others_can_write_is_not_used(mode: int, tmp_path: pathlib.Path) -> None:
    folder = tmp_path / "shared"
    folder.mkdir()
    folder.chmod(mode)
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    script = """
    check(); check()
    check(t.REVERSE + "/* another */")
    assert len(compiled) == 3  # the runtime once
    child = os.fork()
    if child == 0:
        check(t.REVERSE + "/* the child's */")
        os._exit(0)  # as multiprocessing's children end, without atexit
    assert os.waitpid(child, 0)[1] == 0
    check(t.REVERSE + "/* the parent's */")
    assert simulator.cache_folder() is None
    """
    finish(python(script, CUSRU_CACHE_DIR=str(folder), TMPDIR=str(temporary)))
    assert list(folder.iterdir()) == list(temporary.iterdir()) == []


def test_a_child_that_is_forked_while_its_parent_compiles_leaves_it_its_files(tmp_path: pathlib.Path) -> None:
    script = """
    run = simulator._run
    def fork_first(command):
        if "-o" in command:
            child = os.fork()
            if child == 0:
                sys.exit(0)  # all that is to be done at exit is done
            assert os.waitpid(child, 0)[1] == 0
        return run(command)
    simulator._run = fork_first
    check()
    """
    finish(python(script, CUSRU_CACHE_DIR=str(tmp_path / "cache")))


def test_another_home_between_two_kernels(tmp_path: pathlib.Path) -> None:
    script = """
    import shutil
    for home in sys.stdin.read().split():
        os.environ["HOME"] = home
        check(f"{t.REVERSE}// {home}")
        shutil.rmtree(simulator.cache_folder())  # somebody tidies up
        check(f"{t.REVERSE}// {home} again")
    print(len(compiled))
    """
    process = python(script, CUSRU_CACHE_DIR="", XDG_CACHE_HOME="")
    out, errors = process.communicate(f"{tmp_path}/a {tmp_path}/b", timeout=100)
    assert process.returncode == 0, errors
    assert out.split() == ["5"]  # the runtime once
    assert not list(tmp_path.rglob("runtime*"))


def test_a_cached_library_that_is_not_whole_is_built_again(tmp_path: pathlib.Path) -> None:
    """Cut short at any length, one bit of it changed, of a cusru that did not seal it, or another library altogether."""
    script = """
    def build(name):
        simulator._libraries.clear()
        del compiled[:]
        file = simulator._library(name, f'extern "C" int {name}() {{ return 1; }}', [], []).file
        return simulator.cache_folder() / file, len(compiled)
    (one, _), (two, _) = build("one"), build("two")
    whole, other = one.read_bytes(), two.read_bytes()
    spoiled = [whole[:length] for length in (0, 1, 63, 64, *range(1000, len(whole), 1000), -33, -32, -1)]
    spoiled += [whole[:2000] + bytes([whole[2000] ^ 1]) + whole[2001:], whole + b"0", other]
    for content in spoiled:
        one.unlink()  # for it is loaded
        one.write_bytes(content)
        assert build("one") == (one, 1), len(content)
        assert one.stat().st_size == len(whole)
        assert build("one") == (one, 0)
    one.unlink()
    one.symlink_to("nowhere")
    assert build("one") == (one, 1)
    """
    finish(python(script, CUSRU_CACHE_DIR=str(tmp_path)))


@pytest.mark.parametrize("mode", ["cut short", "exchanged"])
def test_a_spoiled_cache_is_not_fatal(mode: str, tmp_path: pathlib.Path) -> None:
    check = "check(); print(*sorted(compiled))"
    files = finish(python(check, CUSRU_CACHE_DIR=str(tmp_path))).split()
    kernel, runtime = (tmp_path / name for name in files)
    contents = [runtime.read_bytes(), kernel.read_bytes()] if mode == "exchanged" else [b"", runtime.read_bytes()[:5000]]
    kernel.write_bytes(contents[0])
    runtime.write_bytes(contents[1])
    assert finish(python(check, CUSRU_CACHE_DIR=str(tmp_path))).split() == files
    assert finish(python(check, CUSRU_CACHE_DIR=str(tmp_path))).split() == []


def test_a_cache_in_the_working_folder(tmp_path: pathlib.Path) -> None:
    script = f"""
    os.chdir({str(tmp_path)!r})
    os.chmod(".", 0o700)
    check()
    """
    finish(python(script, CUSRU_CACHE_DIR="."))
    assert {one.suffix for one in tmp_path.iterdir()} == {".so", ".cpp"}


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_signal_s_handler_may_compile_what_its_thread_is_compiling(when: str, tmp_path: pathlib.Path) -> None:
    script = f"""
    import signal
    other = t.REVERSE + "/* another */"
    signal.signal(signal.SIGUSR1, lambda *_: (check(), check(other)))
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.alarm(60)  # waiting for itself, the thread would wait for ever
    def interrupted(*a):
        simulator._compile = lambda *a: (compiled.append(a[2].name), compile(*a))
        if {when == "before"}:
            signal.raise_signal(signal.SIGUSR1)
        simulator._compile(*a)
        if {when == "after"}:
            signal.raise_signal(signal.SIGUSR1)
    simulator._compile = interrupted
    check(), check(other)
    assert len(set(compiled)) == 3, compiled
    """
    finish(python(script, CUSRU_CACHE_DIR=str(tmp_path / "cache")))


def test_cache_of_another_user_or_behind_a_link_is_not_used(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "mine"
    monkeypatch.setenv("CUSRU_CACHE_DIR", str(folder))
    assert simulator.cache_folder() == folder
    monkeypatch.setattr(os, "geteuid", lambda: folder.stat().st_uid + 1)
    assert simulator.cache_folder() is None
    monkeypatch.undo()
    link = tmp_path / "link"
    link.symlink_to(folder)
    monkeypatch.setenv("CUSRU_CACHE_DIR", str(link))
    assert simulator.cache_folder() is None
    monkeypatch.setenv("CUSRU_CACHE_DIR", str(tmp_path / "file"))
    (tmp_path / "file").touch()
    assert simulator.cache_folder() is None
    monkeypatch.delenv("CUSRU_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert simulator.cache_folder() == tmp_path / "xdg" / "cusru"


def test_portable_switching_of_stacks(monkeypatch: pytest.MonkeyPatch, seeds) -> None:
    """What other processors than x86-64 use."""
    monkeypatch.setenv("CUSRU_SIMULATE_FLAGS", "-DCUSRU_SIMULATOR_UCONTEXT")
    test_barrier(seeds)
    test_errors_are_reported("two barriers", seeds)


def test_missing_compiler_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(RuntimeError, match="apt-get install g\\+\\+"):
        simulator.load(source("// no compiler"), "kernel")


def test_threads_launch_at_the_same_time() -> None:
    failures = []
    expected = launch(REVERSE, np.zeros(64 * 256, np.float32), grid=64, block=256)

    def work() -> None:
        for _ in range(20):
            with simulator.report() as report:
                out = launch(REVERSE, np.zeros(64 * 256, np.float32), grid=64, block=256)
            if not np.array_equal(out, expected) or report.bytes_written != 64 * 1024:
                failures.append(report)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for one in threads:
        one.start()
    for one in threads:
        one.join()
    assert not failures


# ---- sanitizers ----

RUN = """
import sys
sys.path[:0] = [ROOT, ROOT + "/tests"]
import numpy as np
import test_simulator as t
with t.simulator.report():  # counting must not disturb a sanitizer
    t.launch(BODY, np.zeros(SIZE, np.float32), grid=GRID, block=64, flags=np.zeros(64, np.uint32))
"""

BOUNDS = "float v = 1;\nif (i < 100 + {}) global_store<4>(out + i, &v);"
SHARED_BOUNDS = "CUSRU_SHARED(float, a, 64);\nCUSRU_SHARED(float, b, 64);\na[threadIdx.x + {}] = 1;\nb[threadIdx.x] = 2;"
OVERFLOW = "volatile int v = 0x7ffffff0;\nv = v + threadIdx.x % 8 + (int)args.flags[0] - 3;\nint w = v;\nw += {};\nv = w;"
ALIGNMENT = """
alignas(8) volatile char bytes[16] = {{}};
volatile float v = *reinterpret_cast<volatile float*>(const_cast<char*>(bytes) + {});"""
BARRIER = "CUSRU_SHARED(float, a, 64);\na[threadIdx.x] = i;\n{}\nfloat v = a[63 - threadIdx.x];\nglobal_store<4>(out + i, &v);"
SECOND_BARRIER = """
CUSRU_SHARED(float, a, 64);
for (int round = 0; round < 3; ++round) {{
    a[threadIdx.x] = i;
    __syncthreads();
    float v = a[63 - threadIdx.x];
    global_store<4>(out + i, &v);
    {}
}}"""
WARP = "CUSRU_SHARED(float, a, 64);\na[threadIdx.x] = i;\n{};\nfloat v = a[threadIdx.x ^ 1];\nglobal_store<4>(out + i, &v);"
HAND_OVER = """
CUSRU_SHARED(float, slot, 32);
for (int round = 0; round < 3; ++round)
    if (threadIdx.x < 32) {
        if (round > 0) BACK;
        slot[lane] = i + round;
        barrier_arrive(1, 64);
    } else {
        TAKE;
        float v = slot[lane];
        if (round < 2) barrier_arrive(2, 64);
        global_store<4>(out + i, &v);
    }""".replace("{", "{{").replace("}", "}}")
TAKE = HAND_OVER.replace("TAKE", "{}").replace("BACK", "barrier_wait(2, 64)")
GIVE_BACK = HAND_OVER.replace("TAKE", "barrier_wait(1, 64)").replace("BACK", "{}")
ARRIVAL = """
CUSRU_SHARED(float, slot, 32);
if (threadIdx.x < 32) {{
    slot[lane] = 1;
    barrier_wait(1, 64);
}} else {{
    {}(1, 64);
    slot[lane] = 2;
}}"""
FLAG = LOOK_BACK.replace("{", "{{").replace("}", "}}").replace("STORE", "{}")
TICKET = """
float v = i;
workspace_store<4>(out + i, &v);
__syncthreads();
CUSRU_SHARED(unsigned, ticket, 1);
if (threadIdx.x == 0) {{
    {0};
    ticket[0] = atomicAdd(args.flags, 1u);
    {0};
}}
__syncthreads();
if (ticket[0] == gridDim.x - 1) {{
    float sum = 0;
    for (int j = threadIdx.x; j < 640; j += 64) workspace_load<4>(&v, out + j), sum += v;
    global_store<4>(out + 640 + threadIdx.x, &sum);
}}"""

FAULTS = {  # sanitizer, body, fault, remedy, grid, what it says, the line of the body that it names
    "out of bounds": ("address", BOUNDS, "1", "0", 2, "heap-buffer-overflow", 1),
    "out of shared bounds": ("address", SHARED_BOUNDS, "1", "0", 2, "use-after-poison", 2),
    "signed overflow": ("undefined", OVERFLOW, "0x7fffffff", "-1", 2, "signed integer overflow", 3),
    "misaligned pointer": ("undefined", ALIGNMENT, "1", "4", 2, "misaligned address", 1),
    "missing barrier": ("thread", BARRIER, "", "__syncthreads();", 2, "data race", 1),
    "missing second barrier": ("thread", SECOND_BARRIER, "", "__syncthreads();", 2, "data race", None),
    "a shuffle is no fence": ("thread", WARP, "__shfl_sync(0xffffffffu, 1, 0)", "__syncwarp()", 2, "data race", 3),
    "missing wait at a named barrier": ("thread", TAKE, "", "barrier_wait(1, 64)", 2, "data race", None),
    "missing wait before the next round": ("thread", GIVE_BACK, "", "barrier_wait(2, 64)", 2, "data race", None),
    "who arrives has not waited": ("thread", ARRIVAL, "barrier_arrive", "barrier_wait", 2, "data race", None),
    "relaxed flag": ("thread", FLAG, "store_relaxed", "store_release", 6, "data race", None),
    "ticket without fences": ("thread", TICKET, "", "__threadfence()", 10, "data race", None),
}


def sanitizer_library(name: str) -> str:
    found = subprocess.run(
        [simulator.compiler(), f"-print-file-name=lib{name}.so"], capture_output=True, text=True
    ).stdout.strip()
    return found if os.path.isabs(found) else ""


@pytest.mark.parametrize("case", FAULTS)
def test_sanitizers_find_planted_faults(case: str) -> None:
    sanitizer, body, fault, remedy, grid, text, line = FAULTS[case]
    library = sanitizer_library({"address": "asan", "undefined": "ubsan", "thread": "tsan"}[sanitizer])
    if not library:
        pytest.skip(f"this compiler comes without lib{sanitizer}")
    environment = dict(
        os.environ,
        LD_PRELOAD=library,
        CUSRU_SIMULATE_FLAGS=f"-fsanitize={sanitizer} -fno-sanitize-recover=all -g",
        ASAN_OPTIONS="detect_leaks=0",
        TSAN_OPTIONS="halt_on_error=1 exitcode=66",
        UBSAN_OPTIONS="print_stacktrace=1",
        OPENBLAS_NUM_THREADS="1",
    )
    # ThreadSanitizer cannot live with much randomness of addresses
    prefix = ["setarch", "-R"] if sanitizer == "thread" and shutil.which("setarch") else []
    size = 100 if sanitizer == "address" else 64 * grid + 64
    runs = [
        subprocess.Popen(
            [
                *prefix,
                sys.executable,
                "-c",
                f"ROOT, BODY, SIZE, GRID = {str(ROOT)!r}, {body.format(filler)!r}, {size}, {grid}\n{RUN}",
            ],
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        for filler in (fault, remedy)
    ]
    (_, found), (_, nothing) = (one.communicate(timeout=100) for one in runs)
    assert text in found, found
    assert runs[0].returncode != 0
    if line is not None:
        assert re.search(rf"kernel-\w+\.cpp:{BODY_LINE + line}\b", found), found
    assert runs[1].returncode == 0, nothing
    assert "Sanitizer" not in nothing, nothing
