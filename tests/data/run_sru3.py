"""What sru 3.0 itself computes for SRU++, for tests/test_torch_srupp.py: python run_sru3.py FOLDER CASES OUT.

In a process of its own, for 3.0 is called sru too, and with no part of cusru in it. CASES and OUT are files of torch.save: a list
of cases, and for each the parameters, random states, outputs and gradients; then two models, pickled whole.
"""

import io
import sys
import warnings

import torch


def run(sru, case):
    torch.manual_seed(case["seed"])
    model = sru.SRUpp(*case["sizes"], **case["arguments"])
    found = {"initial": {n: v.clone() for n, v in model.state_dict().items()}, "drawn": torch.get_rng_state()}
    model.load_state_dict(case["state"])  # other values, alpha above all
    model = model.double().train(case["train"])
    x, c0 = (None if a is None else a.clone().requires_grad_() for a in (case["x"], case["c0"]))
    memory = None if case["memory"] is None else [a.clone().requires_grad_() for a in case["memory"]]
    torch.manual_seed(case["seed"])
    h, c, saved = model(
        x, c0, mask_pad=case["mask_pad"], attn_mask=case["attn_mask"], memory=memory, memory_mask_pad=case["memory_mask_pad"]
    )
    found["masks drawn"] = torch.get_rng_state()
    torch.autograd.backward([h, c], [case["weights of h"], case["weights of c"]])
    gradients = {"x": x.grad, "c0": None if c0 is None else c0.grad} | {n: p.grad for n, p in model.named_parameters()}
    gradients |= {} if memory is None else {f"memory {i}": a.grad for i, a in enumerate(memory)}
    found |= {"h": h.detach(), "c": c.detach(), "saved": [a.detach() for a in saved["saved_inputs"]], "gradients": gradients}
    return found


def main(folder, cases, out):
    sys.path.insert(0, folder)
    warnings.simplefilter("ignore")
    import sru

    assert sru.__version__ == "3.0.0.dev6"
    torch.set_num_threads(1)
    models = io.BytesIO()
    torch.manual_seed(1)
    whole = [sru.SRUpp(5, 4, 6, num_heads=2, attention_every_n_layers=2, bidirectional=True), sru.SRUppCell(5, 4)]
    torch.save(whole, models)
    torch.save({"found": [run(sru, case) for case in torch.load(cases)], "models": models.getvalue()}, out)


if __name__ == "__main__":
    main(*sys.argv[1:])
