"""Makes sru3_states.pt.gz and sru3_models.pt.gz beside it: models that the sru package 3.0 saved, and what they compute.

    pip install --target FOLDER --no-deps sru==3.0.0.dev6
    python tests/data/make_sru3.py FOLDER [OUT]

In a process of its own, with torch, ninja and a C++ compiler: 3.0 is called sru too, and compiles when it is imported. cusru has
no part in it. Everything is float64; h, c and the gradients are those of a weighted sum of h and c.
"""

import gzip
import io
import sys
import warnings
from pathlib import Path

import torch
from torch import nn

LENGTH, BATCH = 4, 2
PADDING = [[0, 0], [0, 0], [0, 1], [0, 1]]
# name -> class, input size, hidden size, the arguments that are given to 3.0
MODELS = {
    "plain": ("SRU", 5, 4, {}),
    "three matrices, rescaled": ("SRU", 4, 4, {"num_layers": 1, "rescale": True, "highway_bias": -1.0}),
    "projected": ("SRU", 5, 3, {"bidirectional": True, "projection_size": 2, "layer_norm": True, "use_tanh": True}),
    "normalised after": ("SRU", 6, 3, {"bidirectional": True, "layer_norm": True, "normalize_after": True, "v1": True}),
    "projections of its own each": (
        "SRU",
        5,
        4,
        {"num_layers": 3, "projection_size": [2, 0, 3], "proj_input_to_hidden_first": True, "nn_rnn_compatible_return": True},
    ),
    "without a skip": ("SRU", 5, 4, {"num_layers": 1, "has_skip_term": False, "weight_c_init": 0.5}),
    "projected wider": ("SRU", 3, 3, {"num_layers": 1, "projection_size": 5}),
    "cell": ("SRUCell", 5, 4, {"layer_norm": True, "rescale": True}),
    "cell, projected": ("SRUCell", 5, 4, {"projection_size": 2}),
    "modules of its own": ("SRU", 4, 4, {"transform_module": [nn.Linear(4, 12), nn.Sequential(nn.Linear(4, 12), nn.Tanh())]}),
}
WHOLE = ("plain", "projected", "projected wider", "cell", "modules of its own")  # are pickled too


def draw(shape, generator):
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def case(sru, number, kind, input_size, hidden_size, arguments):
    generator = torch.Generator().manual_seed(number)
    model = getattr(sru, kind)(input_size, hidden_size, **arguments).double()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(0.5 * draw(p.shape, generator) / p.shape[-1] ** 0.5)
        if arguments.get("v1"):
            for cell in model.rnn_lst:
                cell.weight_c.zero_()
    x = draw((LENGTH, BATCH, input_size), generator).requires_grad_()
    layers = () if kind == "SRUCell" else (model.num_layers,)
    c0 = draw((*layers, BATCH, model.output_size), generator).requires_grad_()
    h, c = model(x, c0, torch.tensor(PADDING, dtype=torch.uint8))
    weights = [draw(t.shape, generator) for t in (h, c)]
    torch.autograd.backward([h, c], weights)
    values = {"x": x, "c0": c0, "weights of h": weights[0], "weights of c": weights[1], "h": h, "c": c}
    values |= {f"gradient of {n}": p.grad for n, p in [*model.named_parameters(), ("x", x), ("c0", c0)] if p.grad is not None}
    made = {
        "class": kind,
        "sizes": (input_size, hidden_size),
        "arguments": {name: value for name, value in arguments.items() if name != "transform_module"},
        "state": model.state_dict(),
        "shapes": {name: tuple(value.shape) for name, value in values.items()},
        "values": torch.cat([value.detach().flatten() for value in values.values()]),  # in one: a file has 300 bytes for each
    }
    return model, made


def main():
    folder, out = sys.argv[1], Path(sys.argv[2] if len(sys.argv) > 2 else Path(__file__).parent)
    sys.path.insert(0, folder)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    import sru

    assert sru.__version__.startswith("3."), sru.__file__
    made = {name: case(sru, number, *rest) for number, (name, rest) in enumerate(MODELS.items())}
    states = {name: values for name, (_, values) in made.items()}
    models = {name: made[name][0] for name in WHOLE}
    for name, content in (("states", {"version": sru.__version__, "cases": states}), ("models", models)):
        file = io.BytesIO()
        torch.save(content, file)
        (out / f"sru3_{name}.pt.gz").write_bytes(gzip.compress(file.getvalue(), mtime=0))


if __name__ == "__main__":
    main()
