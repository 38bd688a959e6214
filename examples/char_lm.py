"""A character language model on cusru: embedding, SRU or QRNN layers, softmax; NumPy or CuPy alone, no framework.

    python examples/char_lm.py                  # trains for a minute on the source of Python's standard library
    python examples/char_lm.py --resume         # goes on from the checkpoint, for another minute
    python examples/char_lm.py --cell qrnn      # the same with QRNN layers; the picture shows both curves

Needs `pip install ".[examples]"`, which brings matplotlib and tqdm; on a GPU also CuPy (".[cuda13]") with cuBLAS for the GEMMs
(`pip install nvidia-cublas`; for CUDA 12 ".[cuda12]" and nvidia-cublas-cu12).

The recurrences and their gradients are `cusru.sru_forward`, `sru_backward`, `qrnn_forward` and `qrnn_backward`; all else that
learns is here, in the order: model, loss, Adam, training. What serves it, such as text, files and options, is in
char_lm_support.py. Both cells get the same text in the same batches, the same width, Adam and rates, and the same seconds or
steps; not the same number of parameters, which the picture names. Nothing in training depends on the clock, or on when a run
ends: N steps, and --resume up to M, give bit for bit what M steps in one go give (same machine, backend, libraries and number of
threads).
"""

from __future__ import annotations

import math
import os
import sys
from pathlib import Path
from typing import Any

# On the two shared cores that this was tuned on, two threads took up to 16 times as long over these small GEMMs as one.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import char_lm_support as support
import numpy as np
from char_lm_support import Problem, choice, number

import cusru

Array = Any  # NumPy's or CuPy's, whose module is `xp`
BITS = 1 / math.log(2)  # in a nat
RESET_BIAS = -1.0  # at the start: a highway that is rather open
BETA1, BETA2, EPSILON = 0.9, 0.99, 1e-8  # Adam's
WARM_UP, HALF_LIFE = 30, 1000  # steps: the rate rises linearly, then falls as 1 / (1 + step / HALF_LIFE)
TEMPERATURE = 0.7  # of the sample; below 1 the probable characters are preferred

CELLS = ("sru", "qrnn")
OPTIONS = {  # all that training depends on but the text; they lie in the checkpoint
    "cell": (choice(*CELLS), "sru", "of the layers, sru or qrnn: each has a checkpoint of its own"),
    "width": (number(int, 1, 16384), 128, "of the embedding and of each layer"),
    "layers": (number(int, 1, 64), 2, "layers of the cell"),
    "batch": (number(int, 1, 65536), 32, "streams of text that are read side by side"),
    "length": (number(int, 1, 65536), 64, "characters of each stream in a step, through which gradients go back"),
    "rate": (number(float, 1e-9, 1), 0.01, "Adam's learning rate at its highest"),
    "clip": (number(float, 1e-9, 1e9), 1.0, "largest norm of a step's gradient"),
    "eval_every": (number(int, 1, 10**9), 100, "steps between evaluations, each of which saves the checkpoint"),
    "seed": (number(int, 0, 2**63 - 1), 0, "of the random numbers"),
}

# ---- model and loss ----------------------------------------------------------------------------------------------------


class Model:
    """Parameters and their gradients lie in one flat array each, so that Adam, clipping and the checkpoint see one vector."""

    def __init__(self, xp: Any, vocabulary: int, width: int, layers: int, cell: str = "sru", dtype: str = "float32") -> None:
        self.xp, self.vocabulary, self.width, self.layers, self.cell, self.dtype = xp, vocabulary, width, layers, cell, dtype
        shapes: dict[str, tuple[int, ...]] = {"embedding": (vocabulary, width)}
        for i in range(layers):
            if cell == "sru":
                shapes |= {f"weight{i}": (width, 3 * width), f"bias{i}": (2, width), f"weight_c{i}": (2, width)}
            else:  # a window of 2, QRNN's least (with 1 it is an SRU without highway): rows for x of step t - 1, then of t
                shapes |= {f"weight{i}": (2 * width, 3 * width), f"bias{i}": (3, width)}
        shapes |= {"softmax_weight": (width, vocabulary), "softmax_bias": (vocabulary,)}
        self.size = sum(map(math.prod, shapes.values()))
        self.parameters, self.gradient = xp.zeros(self.size, dtype), xp.zeros(self.size, dtype)
        self.p: dict[str, Array] = {}  # by name: views
        self.g: dict[str, Array] = {}
        start = 0
        for name, shape in shapes.items():
            part = slice(start, start := start + math.prod(shape))
            self.p[name], self.g[name] = self.parameters[part].reshape(shape), self.gradient[part].reshape(shape)
        self.scale_x = math.sqrt(1 + 2 * math.exp(RESET_BIAS))

    def initialise(self, rng: np.random.Generator) -> None:
        """Lei et al. 2018, https://arxiv.org/abs/1709.02755, section 3.2: weights uniform in +-sqrt(3 / d), so that each
        product keeps its input's variance, and the highway's input scaled by sqrt(1 + 2 exp(bias)). QRNN's biases are 0."""
        for name, a in self.p.items():
            if name.startswith("bias"):
                a[1] = RESET_BIAS if self.cell == "sru" else 0
            elif name != "softmax_bias":
                bound = 0.5 if name.startswith("weight_c") else math.sqrt(3 / (1 if name == "embedding" else len(a)))
                a[...] = self.xp.asarray(rng.uniform(-bound, bound, a.shape).astype(a.dtype))

    def fresh_state(self, batch: int) -> list[Array]:
        """Of each layer, zeros: c; for the QRNN c and the last x, which the window reaches back to."""
        shape = (batch, self.width) if self.cell == "sru" else (2, batch, self.width)
        return [self.xp.zeros(shape, self.dtype) for _ in range(self.layers)]

    def layer(self, i: int, x: Array, state: Array, keep: bool) -> tuple[Array, Array, Any]:
        """(L, B, D) -> (L, B, D), the state after the last step, and, where kept, what `layer_backward` needs."""
        xp, (length, batch, width), p, save_every = self.xp, x.shape, self.p, 1 if keep else None
        joined = x if self.cell == "sru" else xp.concatenate([xp.concatenate([state[1:], x[:-1]]), x], axis=2)
        u = joined.reshape(length * batch, -1) @ p[f"weight{i}"]  # one GEMM for all steps and the three projections
        u = u.reshape(length, batch, 3, width).transpose(0, 1, 3, 2)  # (L, B, D, 3)
        if self.cell == "sru":
            options = dict(bias=p[f"bias{i}"], weight_c=p[f"weight_c{i}"], c0=state, scale_x=self.scale_x)
            h, c, after = cusru.sru_forward(u, x, **options, save_every=save_every)
        else:  # Bradbury et al. 2016, https://arxiv.org/abs/1611.01576, fo-pooling
            u += p[f"bias{i}"].T
            options = dict(pooling="fo", c0=state[0])
            h, c, c_last = cusru.qrnn_forward(u, **options, save_every=save_every)
            after = xp.stack([c_last, x[-1]])
        return h, after, (c, u, joined, options) if keep else None

    def layer_backward(self, i: int, grad_h: Array, kept: Any) -> Array:
        """Fills the layer's part of `gradient`; returns the gradient of its input."""
        xp, (length, batch, width), g, (c, u, joined, options) = self.xp, grad_h.shape, self.g, kept
        grad_u = xp.empty((length, batch, 3, width), u.dtype)  # in memory as u is, for the GEMMs
        out: Any = grad_u.transpose(0, 1, 3, 2), None
        # No gradient arrives at the last state: back-propagation through time is truncated there.
        if self.cell == "sru":
            out = *out, g[f"bias{i}"], g[f"weight_c{i}"], None
            grad_x = cusru.sru_backward(grad_h, None, c, u, joined, **options, out=out).x
        else:
            cusru.qrnn_backward(grad_h, None, c, u, **options, out=out)
            grad_u.sum(axis=(0, 1), out=g[f"bias{i}"])
        grad_u = grad_u.reshape(-1, 3 * width)
        g[f"weight{i}"][...] = joined.reshape(length * batch, -1).T @ grad_u
        grad_joined = (grad_u @ self.p[f"weight{i}"].T).reshape(joined.shape)
        if self.cell == "sru":
            return grad_x + grad_joined
        grad_x = grad_joined[..., width:].copy()
        grad_x[:-1] += grad_joined[1:, :, :width]  # the first step's is the earlier chunk's: cut there too
        return grad_x

    def forward(self, characters: Array, state: list[Array], keep: bool = True) -> Any:
        """(L, B) characters -> (L*B, V) logits, the states after the last step, and, where kept, `backward`'s tape."""
        p, after, tape = self.p, [], []
        x = p["embedding"][characters]
        for i in range(self.layers):
            x, last, kept = self.layer(i, x, state[i], keep)
            after.append(last)
            tape.append(kept)
        x = x.reshape(-1, self.width)
        return x @ p["softmax_weight"] + p["softmax_bias"], after, [*tape, x]

    def backward(self, characters: Array, grad_logits: Array, tape: list[Any]) -> None:
        """Fills `gradient`, given the loss's with respect to the logits."""
        xp, p, g = self.xp, self.p, self.g
        g["softmax_weight"][...] = tape[-1].T @ grad_logits
        g["softmax_bias"][...] = grad_logits.sum(axis=0)
        grad_h = (grad_logits @ p["softmax_weight"].T).reshape(*characters.shape, self.width)
        for i in reversed(range(self.layers)):
            grad_h = self.layer_backward(i, grad_h, tape[i])
        # The rows' sum by character, as a GEMM: unlike add.at on a GPU it always adds in the same order.
        one_hot = (xp.arange(self.vocabulary)[:, None] == characters.reshape(1, -1)).astype(grad_h.dtype)
        g["embedding"][...] = one_hot @ grad_h.reshape(-1, self.width)


def cross_entropy(xp: Any, logits: Array, targets: Array) -> tuple[Array, Array]:
    """The mean over the rows, in nats, and its gradient with respect to the logits, which are overwritten."""
    row, targets = xp.arange(len(logits)), targets.reshape(-1)
    logits -= logits.max(axis=1, keepdims=True)
    right = logits[row, targets]
    xp.exp(logits, out=logits)
    total = logits.sum(axis=1, keepdims=True)
    nats = (xp.log(total[:, 0]) - right).mean(dtype=np.float64)
    logits /= total
    logits[row, targets] -= 1
    logits /= len(logits)
    return nats, logits


# ---- Adam --------------------------------------------------------------------------------------------------------------


def learning_rate(highest: float, step: int) -> float:
    return highest * min(1, step / WARM_UP) / (1 + step / HALF_LIFE)


def clip(xp: Any, gradient: Array, largest: float) -> float:
    """To at most this norm, of all parameters together. Returns what it was."""
    norm = float(xp.sqrt(xp.square(gradient).sum()))
    if norm > largest:
        gradient *= largest / norm
    return norm


def adam(xp: Any, parameters: Array, gradient: Array, m: Array, v: Array, step: int, rate: float) -> None:
    """Kingma & Ba 2014, https://arxiv.org/abs/1412.6980, algorithm 1; `step` counts from 1. In place."""
    m += (1 - BETA1) * (gradient - m)
    v += (1 - BETA2) * (xp.square(gradient) - v)
    root = xp.sqrt(v / (1 - BETA2**step))
    root += EPSILON
    parameters -= rate / (1 - BETA1**step) * m / root


# ---- training ----------------------------------------------------------------------------------------------------------


class Run:
    """All that training depends on, and its history: what a checkpoint holds. `config`: the options by name."""

    def __init__(self, xp: Any, text: support.Text, config: dict[str, Any]) -> None:
        self.xp, self.text, self.config = xp, text, config
        self.chunks = len(text.train) // config["batch"] // config["length"]  # in an epoch
        if not self.chunks or len(text.heldout) < 2:
            size = f"--batch {config['batch']} times --length {config['length']}"
            raise Problem(f"{len(text.train)} characters to train on, {len(text.heldout)} held out: too few for {size}")
        self.model = Model(xp, len(text.vocabulary), config["width"], config["layers"], config["cell"])
        self.m, self.v = xp.zeros_like(self.model.parameters), xp.zeros_like(self.model.parameters)
        self.rng = np.random.default_rng(config["seed"])
        self.model.initialise(self.rng)
        self.step = self.chunk = self.start = 0
        self.state = self.model.fresh_state(config["batch"])
        self.train_bits: list[float] = []  # per character, of each step
        self.heldout_bits: list[tuple[int, float]] = []  # (step, bits), every eval_every steps
        self.train_text, self.windows = xp.asarray(text.train), xp.asarray(support.heldout_windows(text.heldout))

    def next_chunk(self) -> Array:
        """(L + 1, B) characters. The text is a ring, cut into B streams; chunk after chunk they are read on, from state to
        state. Each epoch cuts elsewhere."""
        batch, length, size = self.config["batch"], self.config["length"], len(self.text.train)
        if self.chunk == 0:
            self.start = int(self.rng.integers(size))
            self.state = self.model.fresh_state(batch)
        stream = self.start + np.arange(batch) * (size // batch)
        places = (stream + self.chunk * length + np.arange(length + 1)[:, None]) % size
        self.chunk = (self.chunk + 1) % self.chunks
        return self.train_text[self.xp.asarray(places)]

    def train_step(self) -> None:
        xp, model, characters = self.xp, self.model, self.next_chunk()
        logits, self.state, tape = model.forward(characters[:-1], self.state)
        nats, grad_logits = cross_entropy(xp, logits, characters[1:])
        model.backward(characters[:-1], grad_logits, tape)
        norm, bits = clip(xp, model.gradient, self.config["clip"]), float(nats) * BITS
        if not math.isfinite(norm + bits):  # before it reaches the parameters, which the checkpoint may take
            raise Problem(f"step {self.step + 1} diverged: loss {bits}, norm of the gradient {norm}; try a smaller --rate")
        self.step += 1
        adam(xp, model.parameters, model.gradient, self.m, self.v, self.step, learning_rate(self.config["rate"], self.step))
        self.train_bits.append(bits)

    def evaluate(self) -> float:
        """Bits per character of the held-out windows. Changes nothing."""
        total, length, state = 0.0, 64, self.model.fresh_state(self.windows.shape[1])
        for start in range(0, len(self.windows) - 1, length):
            part = self.windows[start : start + length + 1]
            logits, state, _ = self.model.forward(part[:-1], state, keep=False)
            total += float(cross_entropy(self.xp, logits, part[1:])[0]) * (len(part) - 1)
        return total / (len(self.windows) - 1) * BITS

    def sample(self, count: int) -> str:
        """Text that the model makes up, after a line's end. Random numbers of its own: training's are not touched."""
        rng, state = np.random.default_rng([self.config["seed"], self.step]), self.model.fresh_state(1)
        vocabulary, text = self.text.vocabulary, ""
        character = max(vocabulary.find("\n"), 0)
        for _ in range(count):
            logits, state, _ = self.model.forward(self.xp.asarray([[character]]), state, keep=False)
            scores = support.host(logits)[0].astype(np.float64) / TEMPERATURE
            scores[0] = -np.inf  # what stands for all other characters is none to write
            character = int(np.argmax(scores + rng.gumbel(size=len(scores))))  # the softmax's distribution
            text += vocabulary[character]
        return text


def train(run: Run, steps: int | None, seconds: float, path: Path) -> int:
    """To a number of steps, or for so long (one step at least). Saves at each evaluation and at the end, also where the end is
    that nobody reads the output any more. Returns 0, or the signal that ended it."""
    with support.signals_noted() as signals, support.Progress(run, steps, seconds) as progress:
        try:
            while progress.done < progress.goal and not signals:
                run.train_step()
                if evaluated := run.step % run.config["eval_every"] == 0:
                    run.heldout_bits.append((run.step, run.evaluate()))
                    support.save(run, path)
                progress.show(evaluated)
        except OSError:  # of the output; what a step that diverged has left is not saved
            support.save(run, path)
            raise
        support.save(run, path)
    return signals[0] if signals else 0


def other_runs(run: Run, folder: Path) -> list[Run]:
    """The other cell's, where its checkpoint lies in the folder and all but the cell is the same."""
    found = []
    for cell in CELLS:
        path, config = support.checkpoint_path(folder, cell), run.config | {"cell": cell}
        if cell == run.config["cell"] or not path.exists():
            continue
        try:
            about, arrays = support.read_checkpoint(path)
            differ = [support.flag(name) for name, value in config.items() if about["config"].get(name) != value]
            if about["text_sha256"] != run.text.sha256:
                differ.insert(0, "--text")
            if differ:
                raise Problem(f"{path} was trained with another {', '.join(differ)}")
            support.restore(other := Run(run.xp, run.text, config), about, arrays)
            found.append(other)
        except Problem as problem:
            print(f"not drawn: {problem}")
    return found


def first_logits(xp: Any) -> Array:
    """Of a small model: whether a backend can do all that it takes."""
    return Model(xp, 64, 64, 1).forward(xp.zeros((1, 1), int), [xp.zeros((1, 64), "float32")])[0]


@support.command
def main(arguments: list[str] | None) -> int:
    options, about, arrays = support.parse(arguments, OPTIONS)
    checkpoint, picture = support.checkpoint_path(options.out, options.cell), options.out / "loss.png"
    xp, backend = support.choose_backend(options.backend, first_logits)
    support.prepare_folder(checkpoint, picture)
    print(f"backend   {backend}")
    text = support.prepare(options.text)
    if about and about["text_sha256"] != text.sha256:
        raise Problem(f"argument --text: {checkpoint} was trained on another text: {about['text']}; this is: {text.source}")
    run = Run(xp, text, {name: getattr(options, name) for name in OPTIONS})
    predicted = support.host(run.windows)[1:]
    print(f"text      {text.source}")
    print(f"          {len(text.train):,} characters to train on, {predicted.size:,} of {len(text.heldout):,} held out")
    print(f"model     {options.cell.upper()}, {run.model.size:,} parameters, {len(text.vocabulary)} characters in the vocabulary")
    if about:
        support.restore(run, about, arrays)
        print(f"resumed   at step {run.step} of {checkpoint}")
    if ended := train(run, options.steps, options.seconds, checkpoint):
        print(f"interrupted: {checkpoint} holds step {run.step}; --resume goes on from there")
        return 128 + ended
    reached, unigram = run.evaluate(), float(text.unigram[predicted].mean())
    reaches = [(run, reached), *((other, other.evaluate()) for other in other_runs(run, options.out))]
    support.draw(picture, sorted(reaches, key=lambda pair: CELLS.index(pair[0].config["cell"])), unigram)
    print(f"\nafter {run.step} steps:")
    print(f"  held-out bits per character  {reached:.3f}")
    print(f"  unigram entropy              {unigram:.3f}   of the held-out text, under the training text's character frequencies")
    print(f"  below it by                  {unigram - reached:.3f}")
    for other, bits in reaches[1:]:
        what = f"{other.config['cell'].upper()}, {other.model.size:,} parameters, after {other.step} steps"
        print(f"drawn beside it: {what}: {bits:.3f}")
    print(f"wrote {checkpoint} and {picture}")
    if options.sample:
        print(f"\na sample:\n{run.sample(options.sample)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
