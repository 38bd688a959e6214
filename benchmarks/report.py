"""What `python -m benchmarks.device` and `benchmarks.layers` found, as Markdown and as pictures."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from benchmarks import host
from benchmarks.workload import PASSES

Row = dict[str, Any]
SIMULATED = "Simulated on a CPU: no time here says anything about a GPU."


def markdown(report: Row) -> str:
    lines = [f"# cusru on {report['environment']['device']}", ""]
    if report["simulated"]:
        lines += [f"**{SIMULATED}**", ""]
    lines += [f"- {name}: {value}" for name, value in report["environment"].items() if name != "device"]
    runs = [run for run in (report.get("before"), report) if run]
    lines += [f"- date: {report['date']}", *(f"- command: `{run['command']}`, {run['seconds']:.0f} s" for run in runs), ""]
    steps = report["steps"].items()
    lines += [
        "## Steps",
        "",
        *_table("step | status | seconds | why", ([n, s["status"], s["seconds"], s.get("why", "")] for n, s in steps)),
    ]
    for section in (_tests, _sanitizer, _bandwidth, _goals, _profile, _passes, _host, layers, _peers):
        lines += section(report)
    if "picture" in report:
        lines += ["", f"![fraction of the ceiling]({report['picture']})"]
    return "\n".join(lines) + "\n"


def _tests(report: Row) -> Iterator[str]:
    if found := _rows(report, "tests", "outcome"):
        outcomes = [row["outcome"] for row in found]
        yield from ("", "## Tests", "", ", ".join(f"{outcomes.count(o)} {o}" for o in dict.fromkeys(outcomes)) + ".")
        why = {row["test"]: f": {row['reason']}" for row in _rows(report, "tests", "reason")}
        failed = [row for row in found if row["outcome"] in ("failed", "error")]
        bad = [f"- {row['outcome']}: `{row['test']}`{why.get(row['test'], '')}" for row in failed]
        yield from ["", *bad] if bad else []


def _sanitizer(report: Row) -> Iterator[str]:
    if found := _rows(report, "sanitizer", "tool"):
        yield from ("", "## compute-sanitizer, on the small cases", "")
        yield from _table("tool | passes run | says", ([row["tool"], row["passes_run"], _says(row)] for row in found))

    for row in found:
        if "reports" in row:
            yield from ("", "What racecheck reports of hand-overs between warps (benchmarks/hand_over.cu):", "")
            yes_or_no = ({True: "yes", False: "no"}[reported] for both in row["reports"].values() for reported in both)
            yield from _table("form | the right one | the planted race", zip(row["reports"], yes_or_no, yes_or_no, strict=True))
        if row.get("hazards"):
            yield from ("", f"Hazards of {row['tool']}, the first of them:", "")
            for one in row["hazards"]:
                lines = "".join(f"; `{line}`" for line in one["lines"])
                during = ", ".join(map(str, one["during"].values()))
                yield f"- {during}: {one['bytes']} bytes, threads {one['threads']}, shared {one['address']}: {one['at']}{lines}"


def _says(row: Row) -> str:
    says = [row[key] for key in ("failed", "skipped", "summary", "doubted") if key in row]
    return "; ".join(says[:1] + says[1:] * ("doubted" in row)) if says else "exit status 0"


def _bandwidth(report: Row) -> Iterator[str]:
    if found := _rows(report, "bandwidth", "kernel"):
        kinds = dict.fromkeys((row["kernel"], row["read_share"]) for row in found)
        of = {(row["kernel"], row["read_share"], row["bytes"]): f"{row['gb_per_s']:.0f}" for row in found}
        heads = " | ".join(["MiB", *(f"{kernel}, {share:.0%} reads" for kernel, share in kinds)])
        sizes = dict.fromkeys(row["bytes"] for row in found)
        yield from ("", "## Yardsticks, L2 cold", "", "GB/s, bytes read and bytes written counted together.", "")
        yield from _table(heads, ([f"{size / 2**20:g}", *(of.get((*kind, size), "") for kind in kinds)] for size in sizes))
    for row in _rows(report, "bandwidth", "datasheet_gb_per_s"):
        peak, failed = f"{row['datasheet_gb_per_s']:.0f} GB/s", f": {row['failed']}" if "failed" in row else ""
        yield from ("", f"The fastest is {row['reached']:.2f} of {peak}, the memory's clock times its width{failed}.")


def _goals(report: Row) -> Iterator[str]:
    if found := _rows(report, "goals", "times"):
        yield from (
            "",
            "## Goals, L2 cold",
            "",
            "Reached / goal, where there is one; rows as benchmarks/cases.py numbers its goals. Of the plain case: what is",
            "reached of the ceiling, over what v1 or v2 of the same shape reaches of its own. Yardstick: the ceiling's GB/s.",
            "Row 12's goal, of other packages, is below, under peers.",
            "",
        )
        heads = (
            "row | L, B, D | dtype | case | save_every | pass | us | yardstick | of the ceiling | of the original | of the plain"
        )
        yield from _table(f"{heads} | launches", map(_goal, found))
    failed = _rows(report, "goals", "failed")
    yield from ["", *(f"- failed: {row['case']}, {row['dtype']}: {row['failed']}" for row in failed)] if failed else []


def _goal(row: Row) -> list[str]:
    ours, original = row["times"]["cusru"], row["times"].get("original")
    reached = {"of_ceiling": ours["of_ceiling"], "of_plain": row.get("of_plain"), "launches": row["launches"],
               "of_original": original and original["seconds"] / ours["seconds"]}  # fmt: skip
    cells = {
        name: "" if value is None else f"{value:.3g}" + (f" / {row['goal'][name]:g}" if name in row["goal"] else "")
        for name, value in reached.items()
    }
    yardstick = f"{ours['gb_per_s'] / ours['of_ceiling']:.0f}"
    return [*_named(row), f"{ours['seconds'] * 1e6:.4g}", yardstick,
            *(cells[name] for name in ("of_ceiling", "of_original", "of_plain", "launches"))]  # fmt: skip


def _profile(report: Row) -> Iterator[str]:
    if found := _rows(report, "profile", "us"):
        yield from ("", "## What ncu counts, L2 cold", "")
        heads = "row | L, B, D | dtype | case | save_every | pass | us | DRAM, % of peak | DRAM bytes / floor | cycles a step"
        lines = (
            [*_named(row), f"{row['us']:.4g}", f"{row['dram_percent']:.1f}", f"{row['dram_bytes'] / row['floor_bytes']:.3f}",
             f"{row['cycles_a_step']:.1f}", f"{row['instructions']:.4g}", f"{row['registers']:.0f}"]
            for row in found
        )  # fmt: skip
        yield from _table(f"{heads} | instructions of warps | registers", lines)
    for row in _rows(report, "profile", "tool"):
        if why := row.get("skipped") or row.get("failed"):
            yield from ("", f"{row['tool']}: {why}.")


def _named(row: Row) -> list[str]:
    return [row["row"], _shape(row), row["dtype"], row["case"].rsplit("-", 1)[0], str(row["save_every"]), row["pass"]]


def _passes(report: Row) -> Iterator[str]:
    found = _rows(report, "table", "times")
    for cache in dict.fromkeys(row["cache"] for row in found):
        yield from ("", f"## Passes, L2 {cache}", "")
        yield from (_LEGEND, "")
        heads = "case | L, B, D | dtype | pass | ms | GB/s | of a copy | of the ceiling | original: ms | its time / ours"
        yield from _table(heads, (_pass(row) for row in found if row["cache"] == cache))
    failed = _rows(report, "table", "failed")
    yield from ["", *(f"- failed: {row['case']}, {row['dtype']}: {row['failed']}" for row in failed)] if failed else []


_LEGEND = (
    "GB/s: each input read once and each output written once, over the time. Of a copy: a device-to-device copy of as many "
    "bytes; of the ceiling: the faster of that copy and a kernel that reads and writes just these bytes; all from one run. "
    "Where the bytes are many times L2, a warm cache is as good as a cold one."
)


def _pass(row: Row) -> list[str]:
    ours, original = row["times"]["cusru"], row["times"].get("original")
    line = [row["case"], _shape(row), row["dtype"], row["pass"], _ms(ours["seconds"]), f"{ours['gb_per_s']:.4g}"]
    line += [f"{ours['of_copy']:.3g}", f"{ours['of_ceiling']:.3g}"]
    return line + ([_ms(original["seconds"]), f"{original['seconds'] / ours['seconds']:.2f}"] if original else ["", ""])


def _host(report: Row) -> Iterator[str]:
    found = _rows(report, "host", "what")
    for group in dict.fromkeys(row["group"] for row in found):
        yield from ("", f"## The host: {host.TITLES[group]}", "")
        yield from _table(" | ".join(host.HEADS), (host.line(host.Row(**row)) for row in found if row["group"] == group))


def _peers(report: Row) -> Iterator[str]:
    if found := _rows(report, "peers", "seconds"):
        yield from ("", "## Peers, L2 cold", "")
        yield from ("GB/s: of the bytes that each must move; they do not compute the same (benchmarks/peers.py).", "")
        lines = (
            [row["case"], _shape(row), row["dtype"], row["peer"], row["pass"], _ms(row["seconds"]), f"{row['gb_per_s']:.4g}",
             f"{row['of_copy']:.3g}"]
            for row in found
        )  # fmt: skip
        yield from _table("case | L, B, D | dtype | peer | pass | ms | GB/s | of a copy", lines)
    goals = [
        f"- {row['case']}, {row['dtype']}, {row['pass']}: {row['of_peer']:.3g} / {row['goal']['of_peer']:g} ({row['fastest']})"
        for row in _rows(report, "peers", "of_peer")
    ]
    yield from ["", "The time of the fastest scan over ours / goal:", "", *goals] if goals else []
    missing = dict.fromkeys((row["peer"], row["skipped"]) for row in _rows(report, "peers", "skipped"))
    missing |= dict.fromkeys((row["peer"], "failed: " + row["failed"]) for row in _rows(report, "peers", "failed"))
    yield from ["", "Not run:", "", *(f"- {peer}: {why}" for peer, why in missing)] if missing else []


WHICH = {"both": "forward and backward", "forward": "forward"}


def layers(report: Row) -> Iterator[str]:
    """benchmarks/layers.py's table of each pass, and what each layer computes."""
    if found := _rows(report, "layers", "seconds"):
        cells = list(dict.fromkeys(row["cell"] for row in found))
        yield from ("", "## One layer", "")
        yield from (f"{name}: {value}  " for row in _rows(report, "layers", "torch") for name, value in row.items())
        yield from (
            "",
            "Milliseconds; in brackets the LSTM's time over it. What they compute is not the same (benchmarks/layers.py).",
        )
        for which, title in WHICH.items():
            for dtype in dict.fromkeys(row["dtype"] for row in found):
                lines: dict[str, dict[str, str]] = {}
                for row in found:
                    if row["dtype"] == dtype:
                        over = f" ({row['lstm_over_it'][which]:.2f})" if which in row["lstm_over_it"] else ""
                        lines.setdefault(_shape(row), {})[row["cell"]] = f"{_ms(row['seconds'][which])}{over}"
                yield from ("", f"{title[0].upper()}{title[1:]}, {dtype}:", "")
                heads = " | ".join(["L, B, D", *cells])
                yield from _table(heads, ([shape, *(of.get(cell, "") for cell in cells)] for shape, of in lines.items()))
        last = [row for row in found if (row["shape"], row["dtype"]) == (found[-1]["shape"], found[-1]["dtype"])]
        yield from ("", f"At {_shape(last[0])}:", "")
        counts = ([row["cell"], f"{row['parameters']:,}", f"{row['flops'] / 1e9:.4g}"] for row in last)
        yield from _table("layer | parameters | GEMMs, forward: GFLOP", counts)
    missing = {row["cell"]: row["missing"] for row in _rows(report, "layers", "missing")}
    missing |= {
        f"{row['cell']}, {_shape(row)}, {row['dtype']}": f"failed: {row['failed']}" for row in _rows(report, "layers", "failed")
    }
    yield from ["", "Layers that did not run:", "", *(f"- {cell}: {why}" for cell, why in missing.items())] if missing else []


def _rows(report: Row, step: str, key: str) -> list[Row]:
    return [row for row in report["steps"].get(step, {}).get("rows", []) if key in row]


def _table(heads: str, rows: Iterable[Iterable[Any]]) -> Iterator[str]:
    columns = heads.split(" | ")
    yield f"| {heads} |"
    yield "| " + " | ".join("---" for _ in columns) + " |"
    for row in rows:
        yield "| " + " | ".join(str(cell).replace("|", "\\|").replace("\n", " ") for cell in row) + " |"


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.4g}"


def _shape(row: Row) -> str:
    return ", ".join(map(str, row["shape"]))


def picture(report: Row, path: Path) -> bool:
    """The fraction of the ceiling over shape, a panel for each pass, L2 cold; hollow: the original design. Whether there was
    anything to draw."""
    found = _rows(report, "table", "times")
    rows = [row for row in found if row["cache"] == found[0]["cache"]]
    if not rows:
        return False
    from matplotlib.figure import Figure

    shapes = {row["case"]: _shape(row) for row in rows}
    names, dtypes = list(shapes), list(dict.fromkeys(row["dtype"] for row in rows))
    figure = Figure(figsize=(max(6.0, 1.0 * len(names)), 8), layout="constrained")
    panels = figure.subplots(len(PASSES), 1, sharex=True)
    for panel, direction in zip(panels, PASSES, strict=True):
        panel.axhline(1, color="grey", linewidth=0.8)
        for i, dtype in enumerate(dtypes):
            for who, face in (("cusru", f"C{i}"), ("original", "none")):
                points = [
                    (names.index(row["case"]), row["times"][who]["of_ceiling"])
                    for row in rows
                    if row["pass"] == direction and row["dtype"] == dtype and who in row["times"]
                ]
                if points:
                    panel.scatter(*zip(*points, strict=True), s=50, facecolors=face, edgecolors=f"C{i}", label=f"{who}, {dtype}")
        panel.set(ylabel=f"{direction}: fraction of the ceiling", ylim=(0, None))
        panel.grid(axis="y", alpha=0.3)
    panels[0].legend(ncols=2, fontsize="small")
    title = f"{report['environment']['device'].split(' (')[0]}, L2 {rows[0]['cache']}, {report['date'][:10]}"
    panels[0].set_title(f"{title}\n{SIMULATED}" if report["simulated"] else title)
    panels[-1].set_xticks(range(len(names)), [f"{name}\n{shape}" for name, shape in shapes.items()])
    panels[-1].tick_params("x", rotation=60, labelsize="small")
    figure.savefig(path, dpi=110)
    return True


LOOKS = {  # of a layer: colour, line, marker; two of one kind share the colour
    "LSTM": ("black", "-", "o"), "GRU": ("grey", "-", "o"),
    "conv1d, 2 wide": ("#e69f00", "-", "s"), "conv1d, 3 wide": ("#e69f00", "--", "s"),
    "QRNN, window 1": ("#009e73", "-", "^"), "QRNN, window 2": ("#009e73", "--", "^"),
    "SRU v1": ("#0072b2", "-", "D"), "SRU v2": ("#0072b2", "--", "D"), "SRU++": ("#cc3377", ":", "v"),
}  # fmt: skip


def picture_of_layers(report: Row, path: Path) -> bool:
    """Milliseconds of forward and backward over L, a panel for each D, a row of panels for each dtype. Whether there was
    anything to draw."""
    found = _rows(report, "layers", "seconds")
    if not found:
        return False
    from matplotlib.figure import Figure

    dtypes, widths = (list(dict.fromkeys(values)) for values in zip(*((r["dtype"], r["shape"][2]) for r in found), strict=True))
    figure = Figure(figsize=(9.5, 0.6 + 3.4 * len(dtypes)), layout="constrained")
    panels = figure.subplots(len(dtypes), len(widths), sharex=True, sharey=True, squeeze=False)
    for dtype, in_row in zip(dtypes, panels, strict=True):
        for D, panel in zip(widths, in_row, strict=True):
            of_panel = [row for row in found if row["dtype"] == dtype and row["shape"][2] == D]
            for i, (cell, (color, line, marker)) in enumerate(LOOKS.items()):
                points = sorted((row["shape"][0], row["seconds"]["both"] * 1e3) for row in of_panel if row["cell"] == cell)
                if points:
                    wide = 1 + 0.1 * i  # and below: of lines that coincide each is seen
                    look = {"color": color, "linestyle": line, "marker": marker, "linewidth": 1.2 * wide, "markersize": 4 * wide}
                    panel.plot(*zip(*points, strict=True), **look, zorder=20 - i, label=cell)
            lengths = sorted({row["shape"][0] for row in of_panel})
            panel.set(xscale="log", yscale="log", title=f"D = {D}" + f", {dtype}" * (len(dtypes) > 1))
            panel.set_xticks(lengths, map(str, lengths))
            panel.minorticks_off()
            panel.grid(alpha=0.3)
        in_row[0].set_ylabel("milliseconds")
    for panel in panels[-1]:
        panel.set_xlabel("L, steps")
    figure.legend(*panels[0][0].get_legend_handles_labels(), loc="outside right center", fontsize="small", frameon=False)
    device = _rows(report, "layers", "torch")[0]["device"]
    figure.suptitle(
        f"One layer, forward and backward, batch {found[0]['shape'][1]}: {device}, {' and '.join(dtypes)}, {report['date'][:10]}",
        fontsize="medium",
    )
    figure.savefig(path, dpi=100 if len(dtypes) == 1 else 80, pil_kwargs={"optimize": True})  # under 150 KB
    return True
