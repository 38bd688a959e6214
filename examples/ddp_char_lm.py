"""A character language model of `cusru.torch.SRU`, trained data-parallel by torch's DistributedDataParallel.

    python examples/ddp_char_lm.py                         # one process
    torchrun --nproc-per-node 2 examples/ddp_char_lm.py    # two, and the same loss curve; on GPUs one for each

Needs `pip install ".[torch]"`; on GPUs CuPy too (".[cuda13]" or ".[cuda12]"). The text is that of char_lm.py, and as there each
step goes on from the last one's state. --batch is that of all processes together: each reads its share of the streams; gradients
are averaged, and so is the loss that is shown. So any number of processes has the same curve, but for rounding, which training
amplifies: over the first 40 steps two and one differed by at most 1e-4 bits in float32 and 2e-13 in float64. There is no dropout:
two processes would draw other masks than one.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import math
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

# As torchrun sets it for its processes. On two shared cores two threads took four times as long over these small steps as one.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import char_lm_support as support
import numpy as np
import torch
import torch.distributed as dist
from char_lm_support import Problem, number
from torch import Tensor

from cusru.torch import SRU

REPORT = 10  # steps from one report to the next, of which each waits for the device and for the other processes
CLIP = 1.0  # largest norm of a step's gradient
ALONE = {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0}  # where torchrun has set none of them


class Process(NamedTuple):
    rank: int
    count: int
    device: torch.device


@contextlib.contextmanager
def joined() -> Iterator[Process]:
    """This process, among those that torchrun started or alone."""
    launched, device = "RANK" in os.environ, torch.device("cpu")
    rank, count, local = (int(os.environ[name]) if launched else alone for name, alone in ALONE.items())
    if torch.cuda.is_available():
        if local >= torch.cuda.device_count():
            raise Problem(f"process {local} of this machine has no GPU: --nproc-per-node is at most {torch.cuda.device_count()}")
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)  # its current stream is the one that cusru's kernels run on
    if launched:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield Process(rank, count, device)
    finally:
        if launched:
            dist.destroy_process_group()


class Model(torch.nn.Module):
    def __init__(self, vocabulary: int, hidden: int, layers: int) -> None:
        super().__init__()
        self.embedding = torch.nn.Embedding(vocabulary, hidden)
        self.rnn = SRU(hidden, hidden, layers, highway_bias=-1.0, rescale=True)
        self.readout = torch.nn.Linear(hidden, vocabulary)

    def forward(self, characters: Tensor, c: Tensor | None) -> tuple[Tensor, Tensor]:
        """(L, B) characters, and the state of the step before -> (L, B, V) logits, and the last state."""
        h, c = self.rnn(self.embedding(characters), c)
        return self.readout(h), c


def chunks(text: np.ndarray, batch: int, length: int, seed: int) -> Iterator[tuple[np.ndarray, bool]]:
    """(L + 1, B) characters, and whether an epoch begins with them; without end. As in char_lm.py the text is a ring, cut into B
    streams that are read on from chunk to chunk, and each epoch cuts elsewhere."""
    rng, size = np.random.default_rng(seed), len(text)
    streams = np.arange(batch) * (size // batch)
    count = size // batch // length
    if not count:
        raise Problem(f"{size} characters to train on: too few for --batch {batch} times --length {length}")
    while True:
        start = rng.integers(size)
        for chunk in range(count):
            places = start + chunk * length + streams + np.arange(length + 1)[:, None]
            yield text[places % size].astype(np.int64), chunk == 0


def train(options: argparse.Namespace, text: support.Text, process: Process) -> Iterator[tuple[int, float]]:
    """Each step, and its loss in bits per character over the whole batch: the same in every process."""
    if options.batch % process.count:
        raise Problem(f"argument --batch: {options.batch} streams cannot be shared out evenly to {process.count} processes")
    share = options.batch // process.count
    own = slice(process.rank * share, (process.rank + 1) * share)
    torch.manual_seed(options.seed)
    model: torch.nn.Module = Model(len(text.vocabulary), options.hidden, options.layers)
    model = model.to(process.device, getattr(torch, options.dtype))
    if dist.is_initialized():
        model = torch.nn.parallel.DistributedDataParallel(model)
    optimizer = torch.optim.Adam(model.parameters(), options.rate, betas=(0.9, 0.99))
    losses: list[Tensor] = []
    c: Tensor | None = None
    steps = itertools.islice(chunks(text.train, options.batch, options.length, options.seed), options.steps)
    for step, (characters, anew) in enumerate(steps, 1):
        given = torch.from_numpy(characters[:, own]).to(process.device)
        logits, c = model(given[:-1], None if anew else c)
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), given[1:].flatten())
        optimizer.zero_grad()
        loss.backward()  # averages the gradients over the processes, whose shares are equal: that of the whole batch's mean
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)  # the same norm in all of them
        optimizer.step()
        c = c.detach()
        losses.append(loss.detach())
        if step % REPORT == 0 or step == options.steps:
            mean = torch.stack(losses)
            if dist.is_initialized():
                dist.all_reduce(mean)
            first, bits = step - len(losses) + 1, (mean / (process.count * math.log(2))).tolist()
            yield from enumerate(bits, first)
            losses.clear()


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="ddp_char_lm", description=__doc__.partition("\n")[0], allow_abbrev=False)
    default = "(default %(default)s)"
    for name, kind, value, what in (
        ("steps", number(int, 1, 10**9), 200, "of training"),
        ("batch", number(int, 1, 65536), 32, "streams of text that are read side by side, by all processes together"),
        ("length", number(int, 1, 65536), 64, "characters of each stream in a step, through which gradients go back"),
        ("hidden", number(int, 1, 16384), 128, "width of the embedding and of each layer"),
        ("layers", number(int, 1, 64), 2, "layers of SRU"),
        ("rate", number(float, 1e-9, 1), 0.01, "Adam's learning rate"),
        ("seed", number(int, 0, 2**63 - 1), 0, "of the weights and of where the text is cut"),
    ):
        parser.add_argument(f"--{name}", type=kind, default=value, help=f"{what} {default}")
    parser.add_argument(
        "--dtype", choices=("float32", "float64"), default="float32", help=f"of parameters and arithmetic {default}"
    )
    parser.add_argument("--text", type=Path, nargs="+", metavar="FILE", help="other text")
    parser.add_argument("--out", type=Path, metavar="FILE", help="for the curve, a line of JSON for each step")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    try:
        with joined() as process, contextlib.ExitStack() as stack:
            text, first = support.prepare(options.text), process.rank == 0
            out = stack.enter_context(open(options.out, "w", encoding="utf-8")) if first and options.out else None
            if first:
                print(f"{process.count} x {process.device.type}, {options.dtype}; {len(text.train):,} characters: {text.source}")
            for step, bits in train(options, text, process):
                if first and step % REPORT == 0:
                    print(f"step {step:6}   {bits:.4f} bits per character", flush=True)
                if out:
                    print(json.dumps({"step": step, "bits": bits}), file=out, flush=True)
    except (Problem, OSError) as error:
        print(f"ddp_char_lm: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
