# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.4", "numpy", "matplotlib"]
# ///
"""λ is a choice, as the learning rate is: what a larger one learns, and what it forgets.

    python examples/experiments/strength.py            all runs: about 14 minutes on two cores
    python examples/experiments/strength.py --redraw   table and figure of the last run
    python examples/experiments/strength.py --quick    in seconds, too short for figures to quote

The runs are those of robustness.py (150 steps, r = 8, three seeds), at the two best learning rates
of DeLoRA, with λ starting at 4, 8, 15 and 30 and learning at half the rate. Each is run from both
starts: the frozen copy, and B = 0 with every norm held above 1e-4 by a clamp (start.py). LoRA has
the three best of its rates beside them.

Without matplotlib there is no figure, which is said.
"""

import statistics

from common import (
    COLOURS,
    LEAVES,
    LORA,
    OURS,
    PEFT_DELORA,
    SEEDS,
    adapted_and_trained,
    experiment,
    over_seeds,
    prepare,
    spread,
)
from start import CLAMPED, FROZEN_COPY, clamp, clamped_groups

from delora import inject, param_groups

STRENGTHS = (4.0, 8.0, 15.0, 30.0)
RATES = (1e-2, 10**-1.5)
LORA_RATES = (10**-2.5, 1e-2, 10**-1.5)
STYLES = {
    LORA: {"color": COLOURS[LORA], "marker": "s"},
    CLAMPED: {"color": COLOURS[PEFT_DELORA], "marker": "v"},
    FROZEN_COPY: {"color": COLOURS[OURS], "marker": "o"},
}
ABOVE = {"xytext": (5, 5)}  # to the right
BELOW = {"xytext": (-5, -10), "ha": "right"}
BESIDE = {"xytext": (8, -3)}
OVER = {"xytext": (0, 7), "ha": "center"}
PLACES = {  # of the labels at the first and the last point of a curve: where no curve is
    (LORA, None): (ABOVE, ABOVE),
    (CLAMPED, RATES[0]): (BELOW, BESIDE),
    (CLAMPED, RATES[1]): (ABOVE, ABOVE),
    (FROZEN_COPY, RATES[0]): (BELOW, BELOW),
    (FROZEN_COPY, RATES[1]): (BELOW, OVER),
}


def groups(model, job):
    """Adapt model as the job says. Returns the groups for the optimiser."""
    method, lr, strength = job["method"], job["lr"], job["strength"]
    if method == LORA:
        return prepare(model, LORA, lr)
    if method == CLAMPED:
        clamp(model, 8, strength)
        return clamped_groups(model, lr)
    inject(model, LEAVES, r=8, lambda_init=strength)
    return param_groups(model, lr, lambda_lr=lr / 2)


def one(job):
    return adapted_and_trained(job, lambda model: groups(model, job))


def plan(quick):
    jobs = []
    for seed in SEEDS[:1] if quick else SEEDS:
        for lr in LORA_RATES[1:2] if quick else LORA_RATES:
            jobs.append({"method": LORA, "strength": None, "lr": lr, "seed": seed})
        for method in (CLAMPED, FROZEN_COPY):
            for lr in RATES[:1] if quick else RATES:
                for strength in STRENGTHS[::2] if quick else STRENGTHS:
                    job = {"method": method, "strength": strength, "lr": lr, "seed": seed}
                    jobs.append(job)
    return jobs


def settings(runs):
    """(method, rate, λ at the start) of all runs, each once, in their order."""
    found = [(run["method"], run["lr"], run["strength"]) for run in runs]
    return list(dict.fromkeys(found))


def report(found):
    runs, before = found["runs"], found["before"]
    text = f"before: {before['new']:.2f} on the new text, {before['old']:.2f} on the old"
    lines = [f"Losses, nats per byte ({text}): mean over seeds, lowest to highest"]
    lines.append(f"  {'':15}{'lr':>8}{'λ':>5}{'new text':>26}{'old text':>26}{'moved':>8}")
    for method, lr, strength in settings(runs):
        which = {"method": method, "lr": lr, "strength": strength}
        row = f"  {method:15}{lr:>8.1e}" + (f"{strength:>5.0f}" if strength else f"{'-':>5}")
        for key in ("new", "old"):
            cell = spread(over_seeds(runs, key, **which), ".3f")
            row += f"{cell:>26}"
        moved = over_seeds(runs, "moved", **which)
        lines.append(row + f"{statistics.fmean(moved):>8.1f}")
    return "\n".join(lines)


def draw(found, figure):
    runs = found["runs"]
    axes = figure.subplots()
    curves = {}  # {(method, rate): [(mean on the old text, on the new text, what is swept)]}
    for method, lr, strength in settings(runs):
        which = {"method": method, "lr": lr, "strength": strength}
        old = statistics.fmean(over_seeds(runs, "old", **which))
        new = statistics.fmean(over_seeds(runs, "new", **which))
        if method == LORA:
            curves.setdefault((method, None), []).append((old, new, f"lr {lr:.1e}"))
        else:
            curves.setdefault((method, lr), []).append((old, new, f"λ {strength:.0f}"))
    for (method, lr), points in curves.items():
        olds, news, names = zip(*points, strict=True)
        style = dict(STYLES[method])
        if lr == RATES[0]:
            style |= {"linestyle": "--", "markerfacecolor": "none"}
        name = f"{method}, its rate swept" if lr is None else f"{method}, λ swept, lr {lr:.1e}"
        axes.plot(olds, news, label=name, **style)
        text = {"textcoords": "offset points", "color": style["color"], "fontsize": 8}
        for n, place in zip((0, -1), PLACES[method, lr], strict=True):  # the ends
            axes.annotate(names[n], (olds[n], news[n]), **text, **place)
    axes.margins(x=0.09)
    axes.set(
        xlabel="loss on the old text: forgetting", ylabel="loss on the new text, nats per byte"
    )
    axes.set_title("λ = 4, 8, 15, 30 along DeLoRA's curves; lower left is better", fontsize=10)
    figure.legend(loc="outside right", frameon=False, fontsize=8)


if __name__ == "__main__":
    experiment("strength", __doc__, one, plan, report, draw)
