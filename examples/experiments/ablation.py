# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.4", "numpy", "matplotlib"]
# ///
"""What each part of DeLoRA brings, from LoRA one change at a time (Table 1).

    python examples/experiments/ablation.py            all runs: about 20 minutes on two cores
    python examples/experiments/ablation.py --redraw   table and figure of the last run
    python examples/experiments/ablation.py --quick    in seconds, too short for figures to quote

The runs are those of robustness.py (150 steps, r = 8, three seeds), at six learning rates, 1e-3 to
0.3:

    LoRA                   BA
    + normalised, λ        λ / r · (B Ξ A - B₀ Ξ₀ A₀), w = 1
    + w, by column         times diag(w), w_j = ‖W[:, j]‖: DeLoRA as it is by default
    + w, Frobenius         w_j = ‖W‖_F
    by column, λ untied    the frozen copy keeps the initial λ (Eq. 9)
    by column, λ fixed     only A and B are trained
    by column, zero B      no frozen copy; from B = 0, norms clamped at 1e-4 (start.py)

A λ of 15 means another strength for another w. So that the scaling is compared and not the
strength, each mode starts with the λ at which the learned terms of all 24 matrices could be as
large together as with 15 by column; λ's learning rate is in proportion.

Without matplotlib there is no figure, which is said.
"""

from common import (
    COLOURS,
    GREY,
    LEAVES,
    LORA,
    OLIVE,
    OURS,
    PEFT_DELORA,
    PINK,
    SEEDS,
    TEAL,
    adapted_and_trained,
    curve,
    experiment,
    over_seeds,
    prepare,
)
from robustness import RATES, report
from start import clamp, clamped_groups

from delora import inject, param_groups

STRENGTH = 15.0
FIXED = "by column, λ fixed"
ZERO_B = "by column, zero B"
ROWS = {  # options of inject
    LORA: None,
    "+ normalised, λ": {"weight_norm": None},
    "+ w, by column": {},
    "+ w, Frobenius": {"weight_norm": "frobenius"},
    "by column, λ untied": {"tie_lambda": False},
    FIXED: {},
    ZERO_B: None,
}
STYLES = {
    LORA: {"color": COLOURS[LORA], "marker": "s"},
    "+ normalised, λ": {"color": PINK, "marker": "^"},
    "+ w, by column": {"color": COLOURS[OURS], "marker": "o", "zorder": 3},
    "+ w, Frobenius": {"color": TEAL, "marker": "D"},
    "by column, λ untied": {"color": OLIVE, "marker": "x", "markersize": 8},
    FIXED: {"color": GREY, "marker": "+", "markersize": 9},
    ZERO_B: {"color": COLOURS[PEFT_DELORA], "marker": "v"},
}


def reach(model, weight_norm):
    """How far λ = 1 lets the learned terms of all layers go together, a_i spread out evenly."""
    squares = 0.0  # of the mean of w_j², summed
    for block in model.blocks:
        for leaf in LEAVES:
            W = getattr(block, leaf).weight  # (out, in)
            whole = W.square().sum().item()
            if weight_norm == "column":
                squares += whole / W.shape[1]
            elif weight_norm == "frobenius":
                squares += whole
            else:
                squares += 1.0
    return squares**0.5


def groups(model, row, lr):
    """Adapt model as that row says. Returns the groups for the optimiser."""
    if row == LORA:
        return prepare(model, LORA, lr)
    if row == ZERO_B:
        clamp(model, r=8)
        return clamped_groups(model, lr)
    options = ROWS[row]
    share = reach(model, "column") / reach(model, options.get("weight_norm", "column"))
    adapters = inject(model, LEAVES, r=8, lambda_init=STRENGTH * share, **options)
    if row == FIXED:
        for adapter in adapters.values():
            adapter.delora.lam.requires_grad_(False)
    return param_groups(model, lr, lambda_lr=share * lr / 2)


def one(job):
    return adapted_and_trained(job, lambda model: groups(model, job["method"], job["lr"]))


def plan(quick):
    jobs = []
    for row in ROWS:
        for lr in RATES[2:3] if quick else RATES[2:8]:
            for seed in SEEDS[:1] if quick else SEEDS:
                jobs.append({"method": row, "lr": lr, "seed": seed})
    return jobs


def draw(found, figure):
    axes = figure.subplots()
    rates = list(dict.fromkeys(run["lr"] for run in found["runs"]))
    for row in ROWS:
        values = []
        for lr in rates:  # what is far above the picture only has to be above it
            losses = over_seeds(found["runs"], "new", method=row, lr=lr)
            values.append([min(loss, 99.0) for loss in losses])
        curve(axes, rates, values, row, **STYLES[row])
    axes.set(xscale="log", xlabel="learning rate of A and B")
    axes.set_ylabel("loss on the new text, nats per byte")
    axes.set_ylim(None, found["before"]["new"] + 0.05)
    figure.legend(loc="outside right", frameon=False, fontsize=8)


if __name__ == "__main__":
    experiment("ablation", __doc__, one, plan, report, draw)
