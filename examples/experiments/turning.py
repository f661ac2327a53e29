# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.4", "numpy", "matplotlib"]
# ///
"""Steps make a_i longer, and a longer vector turns less: the other half of the robustness.

    python examples/experiments/turning.py            all runs: about 5 minutes on two cores
    python examples/experiments/turning.py --redraw   table and figure of the last run
    python examples/experiments/turning.py --quick    in seconds, too short for figures to quote

The bound holds at any learning rate. That DeLoRA still learns at a high one has a second reason.
The gradient of a_i is at right angles to a_i, so a step of SGD makes it longer. AdamW rescales the
gradient, but its steps make it longer too, as is measured here. The longer a_i is, the smaller is
the angle by which a step of the same length turns it. So the angular rate falls, though
the learning rate does not. Weight decay makes a_i shorter again, and keeps it turning.

The model, the text and the batches are those of robustness.py: r = 8 on all 24 matrices of the
blocks, λ = 15 with half the rate, 150 steps of AdamW, three seeds. But the learning rate stays
constant after the warm-up over the first 9 steps, so that nothing else lowers the angular rate.
Three weight decays of A and B: none, torch's default of 0.01, and 1. After every step the mean of
‖a_i‖ over all components of all layers is kept, and the mean angle by which that step turned them.

Without matplotlib there is no figure, which is said.
"""

import copy
import statistics

import torch
from common import (
    LEAVES,
    OLIVE,
    PINK,
    SEEDS,
    TEAL,
    base,
    curve,
    deloras,
    each,
    experiment,
    finite,
    over_seeds,
    per_step,
    python,
    train,
    validate,
    warm_up,
)
from torch.nn import functional as F

from delora import inject, param_groups

RATES = (1e-3, 1e-2, 1e-1)
DECAYS = (0.0, 0.01, 1.0)
RATE_COLOURS = dict(zip(RATES, (OLIVE, TEAL, PINK), strict=True))
LINES = dict(zip(DECAYS, ("-", "--", ":"), strict=True))
WARM_UP = 9  # steps


def one(job):
    """Mean length of a_i before the first step and after each, mean angle in degrees of each."""
    quick = job["quick"]
    model = copy.deepcopy(base(quick))
    torch.manual_seed(job["seed"])
    inject(model, LEAVES, r=8)
    lr = job["lr"]
    groups = param_groups(model, lr, lambda_lr=lr / 2, weight_decay=job["decay"])
    rows = [delora.A for delora in deloras(model).values()]  # (r, in) each
    last = [A.detach().clone() for A in rows]
    lengths = torch.cat([A.norm(dim=1) for A in last])  # (layers · r,)
    found = {"length": [round(lengths.mean().item(), 4)], "angle": []}

    @torch.no_grad()
    def watch(step, loss):
        lengths, angles = [], []
        for A, old in zip(rows, last, strict=True):
            # by the chord: acos is inexact for small angles
            chord = (F.normalize(A, dim=1) - F.normalize(old, dim=1)).norm(dim=1)  # (r,)
            lengths.append(A.norm(dim=1))
            angles.append(2 * (chord / 2).asin().rad2deg())
            old.copy_(A)
        found["length"].append(round(torch.cat(lengths).mean().item(), 4))
        found["angle"].append(round(torch.cat(angles).mean().item(), 4))

    steps = 10 if quick else 150
    optimizer = torch.optim.AdamW(groups)
    rise = warm_up(WARM_UP)
    train(model, python()["train"], optimizer, steps, job["seed"], watch, rise, batch=8)
    new = validate(model, python()["valid"], 16 if quick else 128)
    return job | found | {"new": finite(new)}


def plan(quick):
    jobs = []
    for lr in RATES[1:2] if quick else RATES:
        for decay in DECAYS:
            for seed in SEEDS[:1] if quick else SEEDS:
                jobs.append({"lr": lr, "decay": decay, "seed": seed})
    return jobs


def report(found):
    runs = found["runs"]
    last = len(runs[0]["angle"])
    warm = min(WARM_UP, last)
    before = statistics.fmean(per_step(found, "length", lr=runs[0]["lr"], decay=0.0)[0])
    lines = [f"Means over components and seeds; ‖a_i‖ is {before:.3f} before the first step"]
    head = f"  {'lr':8}{'decay':>7}{'‖a_i‖ after':>13}{warm:>5}{last:>7}"
    lines.append(f"{head}{'degrees in step 1':>20}{warm:>5}{last:>7}{'loss':>9}")
    for lr in each(runs, "lr"):
        for decay in DECAYS:
            lengths = per_step(found, "length", lr=lr, decay=decay)
            angles = per_step(found, "angle", lr=lr, decay=decay)
            row = f"  {lr:<8.0e}{decay:>7.2f}{'':>11}"
            row += "".join(f"{statistics.fmean(lengths[n]):>7.2f}" for n in (warm, last))
            row += f"{'':>10}"
            row += "".join(f"{statistics.fmean(angles[n - 1]):>7.2f}" for n in (1, warm, last))
            losses = over_seeds(runs, "new", lr=lr, decay=decay)
            lines.append(f"{row}{statistics.fmean(losses):>9.3f}")
    return "\n".join(lines)


def draw(found, figure):
    left, right = figure.subplots(1, 2)
    for lr in each(found["runs"], "lr"):
        for decay in DECAYS:
            style = {"color": RATE_COLOURS[lr], "linestyle": LINES[decay]}
            lengths = per_step(found, "length", lr=lr, decay=decay)
            angles = per_step(found, "angle", lr=lr, decay=decay)
            name = f"lr {lr:.0e}, decay {decay:g}"
            # every other step is enough to see it, and keeps the file small
            curve(left, range(0, len(lengths), 2), lengths[::2], name, **style)
            curve(right, range(1, len(angles) + 1, 2), angles[::2], name, **style)
    left.set(yscale="log", xlabel="step", ylabel="mean ‖a_i‖")
    left.set_title("How long the rows of A become", fontsize=10)
    right.set(yscale="log", xlabel="step", ylabel="degrees")
    right.set_title("By what angle a step turns them", fontsize=10)
    for axes, ticks in ((left, (0.6, 1, 2, 4, 8)), (right, (0.2, 0.5, 1, 2, 5, 10))):
        axes.minorticks_off()
        axes.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    lines = left.get_legend_handles_labels()
    figure.legend(*lines, loc="outside lower center", ncols=3, frameon=False, fontsize=8)


if __name__ == "__main__":
    experiment("turning", __doc__, one, plan, report, draw, size=(8, 4))
