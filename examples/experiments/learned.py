# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.4", "numpy", "matplotlib"]
# ///
"""What λ the layers learn, one by one, and how long the columns of W are (Fig. 4).

    python examples/experiments/learned.py            all runs: about six minutes on two cores
    python examples/experiments/learned.py --redraw   tables and figure of the last run
    python examples/experiments/learned.py --quick    in seconds, too short for figures to quote

The quickstart's model is adapted to Python source code as in robustness.py, but ten times as long:
1500 steps on 8 windows, AdamW without weight decay, linear warm-up over 6 % and linear decay, r = 8
on all 24 matrices of the blocks, three seeds. A and B have their best rate by robustness.py,
3.2e-2; λ has half of it. Every λ starts at 15, so what differs at the end was learned.

Beside λ stand the norms ‖W[:, j]‖ of the pretrained weights, which λ multiplies: the same λ means
an update of another size in another kind of layer.

Without matplotlib there is no figure, which is said.
"""

import copy
import statistics

import torch
from common import (
    COLOURS,
    GREY,
    LAYERS,
    LEAVES,
    OURS,
    SEEDS,
    TEAL,
    base,
    deloras,
    experiment,
    finite,
    prepare,
    python,
    spread,
    train,
    validate,
)

QUARTILES = torch.tensor([0.0, 0.25, 0.5, 0.75, 1.0])


def one(job):
    """By the layer's name: λ, ‖ΔW‖, its bound, and the quartiles of ‖W[:, j]‖."""
    quick = job["quick"]
    model = copy.deepcopy(base(quick))
    torch.manual_seed(job["seed"])
    groups = prepare(model, OURS, 10**-1.5)
    optimizer = torch.optim.AdamW(groups, weight_decay=0)
    steps = 20 if quick else 1500
    silent = lambda step, loss: None  # noqa: E731
    train(model, python()["train"], optimizer, steps, job["seed"], silent, batch=8)
    found = {"strength": {}, "moved": {}, "bound": {}, "norms": {}}
    for name, delora in deloras(model).items():
        found["strength"][name] = round(delora.lam.item(), 4)
        found["moved"][name] = round(delora.delta_weight().norm().item(), 4)
        found["bound"][name] = round(delora.norm_bound(), 4)
        found["norms"][name] = [round(norm, 4) for norm in delora.w.quantile(QUARTILES).tolist()]
    new = validate(model, python()["valid"], 16 if quick else 128)
    return job | found | {"new": finite(new)}


def plan(quick):
    return [{"seed": seed} for seed in (SEEDS[:1] if quick else SEEDS)]


def of(found, key, block, leaf):
    """That number of that layer, one for each seed."""
    return [run[key][f"blocks.{block}.{leaf}"] for run in found["runs"]]


def report(found):
    losses = [run["new"] for run in found["runs"]]
    before = found["before"]["new"]
    lines = [f"Loss on the new text: {before:.3f} before, {statistics.fmean(losses):.3f} after"]
    lines.append("λ at the end, from 15: mean over seeds, lowest to highest")
    lines.append(f"  {'':9}" + "".join(f"{leaf:>21}" for leaf in LEAVES))
    for block in range(LAYERS):
        cells = [spread(of(found, "strength", block, leaf), ".1f") for leaf in LEAVES]
        lines.append(f"  block {block:<3}" + "".join(f"{cell:>21}" for cell in cells))
    lines.append("")
    lines.append("‖W[:, j]‖: median over the columns, lowest to highest")
    for block in range(LAYERS):
        row = f"  block {block:<3}"
        for leaf in LEAVES:
            low, _, middle, _, high = of(found, "norms", block, leaf)[0]  # W is that of all seeds
            cell = f"{middle:.2f} ({low:.2f} to {high:.2f})"
            row += f"{cell:>21}"
        lines.append(row)
    lines.append("")
    lines.append("‖ΔW‖ as a share of its bound, mean over seeds")
    for block in range(LAYERS):
        row = f"  block {block:<3}"
        for leaf in LEAVES:
            pairs = zip(
                of(found, "moved", block, leaf), of(found, "bound", block, leaf), strict=True
            )
            row += f"{statistics.fmean(moved / bound for moved, bound in pairs):>21.2f}"
        lines.append(row)
    return "\n".join(lines)


def draw(found, figure):
    left, right = figure.subplots(1, 2)
    for place, leaf in enumerate(LEAVES):
        for block in range(LAYERS):
            x = place + (block - (LAYERS - 1) / 2) * 0.2
            style = {"color": COLOURS[OURS], "marker": "o", "markersize": 4, "capsize": 2}
            values = of(found, "strength", block, leaf)
            mean = statistics.fmean(values)
            ends = [[mean - min(values)], [max(values) - mean]]
            left.errorbar([x], [mean], ends, **style)
            low, first, middle, third, high = of(found, "norms", block, leaf)[0]
            right.plot([x, x], [low, high], color=TEAL, linewidth=1)
            right.plot([x, x], [first, third], color=TEAL, linewidth=3)
            right.plot([x], [middle], "_", color=TEAL, markersize=6.5)
    left.axhline(15, color=GREY, linewidth=0.8, linestyle=":")
    place = {"textcoords": "offset points", "ha": "right", "fontsize": 8}
    left.annotate("at the start", (5.4, 15), (0, -10), **place)
    left.set_ylabel("λ")
    left.set_title("λ after 1500 steps: mean, lowest to highest seed", fontsize=10)
    right.set_ylabel("‖W[:, j]‖")
    right.set_title("Norms of W's columns: all, and the middle half", fontsize=10)
    for axes in (left, right):
        axes.set_xticks(range(len(LEAVES)), LEAVES)
        axes.set_xlabel("layer: blocks 0 to 3 from left to right")


if __name__ == "__main__":
    experiment("learned", __doc__, one, plan, report, draw)
