# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.4", "numpy", "matplotlib"]
# ///
"""How far the first step of AdamW goes, by the width of the model, and what a warm-up changes.

    python examples/experiments/width.py            all runs: about 3 minutes on two cores
    python examples/experiments/width.py --redraw   tables and figure of the last run
    python examples/experiments/width.py --quick    in seconds, too short for figures to quote

The first step of AdamW moves every entry of a_i by the learning rate, up or down, a vector of
length lr·√in. At the start ‖a_i‖ = √(1/3) = 0.577 at every width. So the step turns a_i by about
the angle whose tangent is lr·√(3·in): the wider the layer, the further. The share of full strength
is ‖ΔW‖ / ‖λ/r · B Ξ A diag(w)‖, the update over the learned term that it is a difference of: 0 at
the start, √2 once the learned term has nothing left of its start.

Measured is the mean share over q, k, v, o and up, whose input is as wide as the model, in the
quickstart's pretrained model (width 128) and in single blocks 768 and 4096 wide with the weights
they are initialised with, on windows of real text (8 of them, 2 for the wide ones), three seeds.
r = 8, λ = 15 at half the rate, no weight decay.

At width 128 training goes on for 50 steps, at a constant rate and with a warm-up over the first 9
of them, the 6 % of robustness.py's 150. The loss is that of 32 windows of the new text's validation
part.

Without matplotlib there is no figure, which is said.
"""

import copy
import math
import statistics

import torch
from common import (
    LEAVES,
    OLIVE,
    PINK,
    SEEDS,
    TEAL,
    WIDTH,
    ByteTransformer,
    base,
    curve,
    deloras,
    each,
    experiment,
    per_step,
    python,
    train,
    validate,
    warm_up,
)
from torch.nn import functional as F

from delora import inject, param_groups

WIDTHS = (WIDTH, 768, 4096)
RATES = (1e-3, 1e-2, 10**-1.5)
RATE_COLOURS = dict(zip(RATES, (OLIVE, TEAL, PINK), strict=True))
NO_WARM_UP, WARM_UP = 1, 9  # steps; the first step has the whole rate, or a ninth of it


def by_angle(width, lr):
    """The share if a_i turns by the angle whose tangent is lr·√(3·in), and b_i not at all.

    b_i, whose length is √(out/(3r)) and whose step is lr·√out long, turns less: its tangent is
    lr·√(3r).
    """
    return 2 * math.sin(math.atan(lr * (3 * width) ** 0.5) / 2)


@torch.no_grad()
def learned_term(delora):
    """The norm of λ/r · B Ξ A diag(w)."""
    directions = F.normalize(delora.B, dim=0) @ F.normalize(delora.A, dim=1)  # (out, in)
    return (delora.lam / len(delora.A) * directions * delora.w).norm().item()


@torch.no_grad()
def share(model, width):
    """‖ΔW‖ / ‖learned term‖, the mean over the layers with as many inputs as the width."""
    shares = []
    for delora in deloras(model).values():
        if delora.A.shape[1] == width:
            shares.append(delora.delta_weight().norm().item() / learned_term(delora))
    return statistics.fmean(shares)


def one(job):
    """The share after every step and, at width 128, the loss."""
    quick, width = job["quick"], job["width"]
    torch.manual_seed(job["seed"])
    if width == WIDTH:
        model = copy.deepcopy(base(quick))
        steps = 5 if quick else 50
    else:
        model = ByteTransformer(width, layers=1)
        steps = 1
    inject(model, LEAVES, r=8)
    found = {"share": [], "loss": []}

    def watch(step, loss):
        found["share"].append(float(f"{share(model, width):.6g}"))
        if width == WIDTH:
            found["loss"].append(round(validate(model, python()["valid"], windows=32), 6))

    groups = param_groups(model, job["lr"], lambda_lr=job["lr"] / 2)
    optimizer = torch.optim.AdamW(groups, weight_decay=0)
    rise = warm_up(job["warm_up"])
    batch = 8 if width == WIDTH else 2
    train(model, python()["train"], optimizer, steps, job["seed"], watch, rise, batch)
    return job | found


def plan(quick):
    widths = WIDTHS[:2] if quick else WIDTHS
    rates = RATES[1:2] if quick else RATES
    seeds = SEEDS[:1] if quick else SEEDS
    jobs = []
    for width in widths:
        for rise in (NO_WARM_UP, WARM_UP) if width == WIDTH else (NO_WARM_UP,):
            for lr in rates:
                for seed in seeds:
                    jobs.append({"width": width, "warm_up": rise, "lr": lr, "seed": seed})
    return jobs


def report(found):
    rates = each(found["runs"], "lr")
    widths = each(found["runs"], "width")
    lines = ["Share of full strength after one step (lowest to highest seed; by the angle alone)"]
    lines.append(f"  {'width':8}" + "".join(f"{f'lr {lr:.1e}':>24}" for lr in rates))
    for width in widths:
        row = f"  {width:<8}"
        for lr in rates:
            values = per_step(found, "share", width=width, warm_up=NO_WARM_UP, lr=lr)[0]
            cell = f"{min(values):.2f} to {max(values):.2f} ({by_angle(width, lr):.2f})"
            row += f"{cell:>24}"
        lines.append(row)
    last = len(found["runs"][0]["loss"])  # the first run is of the pretrained model
    moments = sorted({1, min(WARM_UP, last), last})
    lines.append("")
    lines.append(f"Width {WIDTH}: the share, then the loss, mean over seeds, after so many steps")
    lines.append(f"  {'lr':10}{'warm-up':>10}" + "".join(f"{n:>10}" for n in moments * 2))
    for lr in rates:
        for rise in (NO_WARM_UP, WARM_UP):
            name = "none" if rise == NO_WARM_UP else f"{rise} steps"
            row = f"  {lr:<10.1e}{name:>10}"
            for key, digits in (("share", 2), ("loss", 3)):
                values = per_step(found, key, width=WIDTH, warm_up=rise, lr=lr)
                for n in moments:
                    row += f"{statistics.fmean(values[n - 1]):>10.{digits}f}"
            lines.append(row)
    return "\n".join(lines)


def draw(found, figure):
    rates = each(found["runs"], "lr")
    widths = each(found["runs"], "width")
    left, right = figure.subplots(1, 2)
    for lr in rates:
        style = {"color": RATE_COLOURS[lr]}
        shares = []
        for width in widths:
            shares.append(per_step(found, "share", width=width, warm_up=NO_WARM_UP, lr=lr)[0])
        curve(left, widths, shares, f"lr {lr:.1e}", marker="o", **style)
        left.plot(widths, [by_angle(width, lr) for width in widths], ":", **style)
        for rise, line, what in ((NO_WARM_UP, "--", "no warm-up"), (WARM_UP, "-", "warm-up")):
            losses = per_step(found, "loss", width=WIDTH, warm_up=rise, lr=lr)
            name = f"lr {lr:.1e}, {what}"
            curve(right, range(1, len(losses) + 1), losses, name, linestyle=line, **style)
    left.set(xscale="log", yscale="log", xlabel="width", ylabel="‖ΔW‖ / ‖learned term‖")
    left.set_xticks(widths, [str(width) for width in widths])
    left.minorticks_off()
    left.set_title("One step of AdamW, and by the angle (dotted)", fontsize=10)
    left.legend(frameon=False, fontsize=8)
    right.set(xlabel="step", ylabel="loss on the new text, nats per byte")
    right.set_title(f"The first fifty steps, width {WIDTH}", fontsize=10)
    right.legend(frameon=False, fontsize=8)


if __name__ == "__main__":
    experiment("width", __doc__, one, plan, report, draw)
