# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.4", "numpy", "matplotlib"]
# ///
"""The rate of λ alone, the rate of A and B alone, and both (Fig. 6).

    python examples/experiments/rates.py            all runs: about 10 minutes on two cores
    python examples/experiments/rates.py --redraw   tables and figure of the last run
    python examples/experiments/rates.py --quick    in seconds, too short for figures to quote

Strength and angles have parameters of their own, and so may have learning rates of their own. The
runs are those of robustness.py (150 steps, r = 8, λ = 15 at the start, three seeds), in three
sweeps of six rates from 1e-3 to 10:

    λ alone          A and B at 1e-2
    A and B alone    λ at 5e-3
    both             λ at the same rate as A and B

λ alone is also run with a rate of 0: λ stays 15. Kept are the loss on the new text, and the λ of
all 24 layers at the end.

Without matplotlib there is no figure, which is said.
"""

import statistics

from common import (
    GREY,
    OLIVE,
    OURS,
    PINK,
    SEEDS,
    TEAL,
    adapted_and_trained,
    curve,
    deloras,
    experiment,
    over_seeds,
    prepare,
)

STRENGTH_ALONE = "λ alone"
ANGLES_ALONE = "A and B alone"
BOTH = "both"
SWEEPS = (STRENGTH_ALONE, ANGLES_ALONE, BOTH)
RATES = (1e-3, 1e-2, 10**-1.5, 1e-1, 1.0, 10.0)
STYLES = {
    STRENGTH_ALONE: {"color": OLIVE, "marker": "v"},
    ANGLES_ALONE: {"color": TEAL, "marker": "s"},
    BOTH: {"color": PINK, "marker": "o"},
}


def both_rates(sweep, rate):
    """(rate of A and B, rate of λ)."""
    if sweep == STRENGTH_ALONE:
        return 1e-2, rate
    if sweep == ANGLES_ALONE:
        return rate, 5e-3
    return rate, rate


def strengths(model):
    """The λ of every layer."""
    return {"strengths": [round(delora.lam.item(), 4) for delora in deloras(model).values()]}


def one(job):
    lr, lambda_lr = both_rates(job["sweep"], job["rate"])
    return adapted_and_trained(job, lambda model: prepare(model, OURS, lr, lambda_lr), strengths)


def plan(quick):
    jobs = []
    for sweep in SWEEPS:
        rates = RATES[1::3] if quick else RATES
        if sweep == STRENGTH_ALONE:
            rates = (0.0, *rates)
        for rate in rates:
            for seed in SEEDS[:1] if quick else SEEDS:
                jobs.append({"sweep": sweep, "rate": rate, "seed": seed})
    return jobs


def report(found):
    runs = found["runs"]
    rates = sorted({run["rate"] for run in runs})
    lines = [f"Loss on the new text (before: {found['before']['new']:.2f}), nats per byte, mean"]
    lines.append("over seeds; in the second table the lowest to highest λ of all layers and seeds")
    lines.append(f"  {'rate of':16}" + "".join(f"{rate:>9.1e}" for rate in rates))
    for sweep in SWEEPS:
        row = f"  {sweep:16}"
        for rate in rates:
            losses = over_seeds(runs, "new", sweep=sweep, rate=rate)
            row += f"{statistics.fmean(losses):>9.3f}" if losses else f"{'-':>9}"
        lines.append(row)
    lines.append("")
    for sweep in SWEEPS:
        row = f"  {sweep:16}"
        for rate in rates:
            layers_by_seed = over_seeds(runs, "strengths", sweep=sweep, rate=rate)
            every = [strength for layers in layers_by_seed for strength in layers]
            cell = f"{min(every):.0f}..{max(every):.0f}" if every else "-"
            row += f"{cell:>9}"
        lines.append(row)
    return "\n".join(lines)


def draw(found, figure):
    runs = found["runs"]
    axes = figure.subplots()
    for sweep in SWEEPS:
        # a logarithmic axis has no 0
        rates = sorted({run["rate"] for run in runs if run["sweep"] == sweep} - {0.0})
        losses = [over_seeds(runs, "new", sweep=sweep, rate=rate) for rate in rates]
        curve(axes, rates, losses, sweep, **STYLES[sweep])
    fixed = statistics.fmean(over_seeds(runs, "new", sweep=STRENGTH_ALONE, rate=0.0))
    before = found["before"]["new"]
    for height, what, right in ((fixed, "λ fixed", 0.99), (before, "before training", 0.6)):
        axes.axhline(height, color=GREY, linewidth=0.8, linestyle=":")
        place = (right, height)
        axes.annotate(what, place, xycoords=("axes fraction", "data"), ha="right", va="bottom")
    axes.set(xscale="log", xlabel="the learning rate that is swept")
    axes.set(ylabel="loss on the new text, nats per byte", ylim=(None, before + 0.3))
    axes.legend(frameon=False, fontsize=9)


if __name__ == "__main__":
    experiment("rates", __doc__, one, plan, report, draw, size=(6.4, 3.6))
