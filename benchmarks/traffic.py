"""`python -m benchmarks.traffic`: the bytes that the kernels move, counted by the simulator, beside the bytes that they must.

Needs a C++ compiler and no GPU. With --json one object a line:

    pass, case, shape, dtype, options
    bytes_read, bytes_written   what the kernels' requests moved, workspace included; lanes that touch the same bytes count once
    floor_bytes                 each input read once, each output written once, at their own dtypes
    ratio                       (bytes_read + bytes_written) / floor_bytes
    sector_efficiency           useful bytes / (32 * the distinct 32-byte sectors that a warp touches in one tile)
    requests_per_kib            accesses of a warp for 1024 bytes moved: 2 where they are of 16 bytes
    workspace_bytes             of the bytes moved, scratch memory

Arrays begin at multiples of 256 bytes, as a device's allocator places them.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterator
from typing import Any

from benchmarks import cases
from benchmarks.cases import Case
from benchmarks.workload import PASSES, Workload
from cusru import measuring

# The same problem in both layouts of u, without and with the weights of SRU v2; and v2 with fewer states saved.
_SHORT = cases.CASES["short"]._replace(dtypes=("float32", "float16"))
_V2 = _SHORT._replace(weight_c="column")
LAYOUTS = tuple(
    case._replace(name=f"short-{version}-{layout}", layout=layout)
    for version, case in (("v1", _SHORT), ("v2", _V2))
    for layout in ("k_inner", "d_inner")
)
STATES = (
    _V2._replace(name="short-v2-inference", save_every=None),
    _V2._replace(name="short-v2-S32", save_every=32),
    _V2._replace(name="short-v2-S100", save_every=100),
)
_SHAPE = dict(L=_SHORT.L, B=_SHORT.B, D=_SHORT.D, dtypes=_SHORT.dtypes)
FAMILIES = (
    _V2._replace(name="short-v2-starts", starts=True),
    Case("short-qrnn-fo", family="qrnn", cell="fo", **_SHAPE),
    Case("short-qrnn-zoneout", family="qrnn", cell="ifo", zoneout=0.1, save_every=32, **_SHAPE),
    Case("short-linear", family="linear_recurrence", cell="affine", **_SHAPE),
    Case("short-linear-S32", family="linear_recurrence", cell="blend", save_every=32, **_SHAPE),
    Case("short-linear-column", family="linear_recurrence", cell="complement", a="column", **_SHAPE),
)
# So few columns that the planner splits time: what spans tell one another is in the bytes moved, and in the workspace's.
_SPANS = Case("spans", 512, 1, 704)
SPANS = (
    _SPANS,
    _SPANS._replace(name="spans-inference", save_every=None),
    _SPANS._replace(name="spans-S32", save_every=32),
    Case("spans-narrow", 2048, 1, 128, save_every=32),
)
CASES = LAYOUTS + STATES + FAMILIES + SPANS


def rows(case: Case, dtype: str, multiprocessors: int = 132) -> Iterator[dict[str, Any]]:
    """The forward's row, and the backward's where states are saved. multiprocessors: of the GPU that launches are planned for."""
    from cusru import simulator

    planned_for, simulator.multiprocessors = simulator.multiprocessors, multiprocessors
    try:
        work = Workload(measuring.find("simulator"), case, dtype)
        for direction in PASSES:
            if direction not in work.results:
                continue
            with simulator.report() as report:
                work.run(direction)
            moved, floor = report.bytes_read + report.bytes_written, work.floor(direction).bytes
            yield {
                "pass": direction, "case": case.name, "shape": [case.L, case.B, case.D], "dtype": dtype,
                "options": {
                    "weight_c": case.weight_c, "layout": case.layout, "save_every": case.save_every,
                    "multiprocessors": multiprocessors, **case.options,
                },
                "bytes_read": report.bytes_read, "bytes_written": report.bytes_written, "floor_bytes": floor,
                "ratio": round(moved / floor, 5), "sector_efficiency": round(report.sector_efficiency, 5),
                "requests_per_kib": round(report.requests_per_kib, 3), "workspace_bytes": report.workspace_bytes,
            }  # fmt: skip
    finally:
        simulator.multiprocessors = planned_for


def main(arguments: list[str] | None = None) -> int:
    named = {case.name: case for case in (*CASES, *cases.CASES.values())}
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.traffic", description=(__doc__ or "").split("\n", 1)[0], allow_abbrev=False
    )
    parser.add_argument("--json", action="store_true", help="one JSON object a line instead of a table")
    which = "this case, with its own dtypes (may be given again); default: " + ", ".join(case.name for case in CASES)
    parser.add_argument("--case", action="append", choices=list(named), metavar="NAME", help=which)
    size = "of the GPU that is planned for (default 132); 0: every block is one warp"
    parser.add_argument("--multiprocessors", type=int, default=132, metavar="N", help=size)
    options = parser.parse_args(arguments)
    if not 0 <= options.multiprocessors <= 10_000:
        parser.error(f"--multiprocessors must be from 0 to 10000; got {options.multiprocessors}")

    os.environ["CUSRU_SIMULATE"] = "1"
    line = "{case:<20}{dtype:<10}{pass:<10}{ratio:>14}{sector_efficiency:>9}{requests_per_kib:>14}{workspace:>11}"
    if not options.json:
        heads = dict(ratio="moved / floor", sector_efficiency="sectors", requests_per_kib="requests/KiB", workspace="workspace")
        print(line.format(**{"case": "case", "dtype": "dtype", "pass": "pass"}, **heads))
    try:
        for case in [named[name] for name in options.case] if options.case else CASES:
            for dtype in case.dtypes:
                for row in rows(case, dtype, options.multiprocessors):
                    share = f"{row['workspace_bytes'] / row['floor_bytes']:.2%}"
                    print(json.dumps(row) if options.json else line.format(**row, workspace=share), flush=True)
    except RuntimeError as error:  # no C++ compiler
        print(f"benchmarks.traffic: {error}", file=sys.stderr)
        return 1
    except ImportError as error:
        print(f'benchmarks.traffic: bfloat16 needs ml_dtypes ({error}): pip install ".[test]"', file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    measuring.run_command(main)
