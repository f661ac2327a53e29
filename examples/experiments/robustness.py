# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.4", "numpy", "peft>=0.21", "matplotlib"]
# ///
"""The learning rate, from far too low to far too high, for five methods (Fig. 2).

    python examples/experiments/robustness.py            all runs: about 23 minutes on two cores
    python examples/experiments/robustness.py --redraw   tables and figure of the last run
    python examples/experiments/robustness.py --quick    in seconds, too short for figures to quote

The quickstart's model, pretrained on English, is adapted to Python source code at nine learning
rates over four decades, with three seeds each (they set what an adapter starts from, and which text
each step sees). Every run is 150 steps of AdamW on 8 windows of 128 bytes, without weight decay,
with linear warm-up over 6 % and linear decay. The adapters have r = 8 on all 24 matrices of the
blocks; λ starts at 15 and learns at half the rate of A and B, so that a sweep moves both. DoRA and
one DeLoRA are PEFT's. Full fine-tuning trains everything.

At the end of each run three numbers are kept of every method: the loss on the new text's validation
part, the loss on the old text's, and ‖W' - W‖, the Frobenius norm over all 24 matrices. W' is not
asked from the method but measured from its outputs. By the width of a method is meant how many
decades of learning rate around its best one keep the loss within 0.05 of its own best, or of the
best that any adapter reaches, with straight lines between the points; + says that they go on beyond
the sweep. In brackets are the lowest and the highest seed. Of DeLoRA it is also kept how long the
rows a_i of A and the columns b_i of B became, and by what angle they turned away from their start.

Without peft its methods are left out; without matplotlib there is no figure. Both are said.
"""

import math
import statistics

import torch
from common import (
    COLOURS,
    FULL,
    GREY,
    LORA,
    MARKERS,
    NEAR,
    OURS,
    PEFT_DELORA,
    PEFT_DORA,
    SEEDS,
    adapted_and_trained,
    curve,
    deloras,
    each,
    experiment,
    over_seeds,
    prepare,
    without_peft,
)
from torch.nn import functional as F

METHODS = without_peft((LORA, PEFT_DORA, FULL, PEFT_DELORA, OURS))
RATES = tuple(10 ** (k / 2) for k in range(-8, 1))  # 1e-4 ... 1


@torch.no_grad()
def turning(model):
    """How long the rows of A and the columns of B became, and how far they turned, in degrees.

    Means over the components of all layers; nothing if the model has no DeLoRA.
    """
    found = {"length_a": [], "length_b": [], "turned_a": [], "turned_b": []}
    for delora in deloras(model).values():
        for key, new, old in (("a", delora.A, delora.A0), ("b", delora.B.T, delora.B0.T)):
            cosines = F.cosine_similarity(new, old, dim=1)  # (r,)
            found[f"length_{key}"] += new.norm(dim=1).tolist()
            found[f"turned_{key}"] += cosines.clamp(-1, 1).acos().rad2deg().tolist()
    return {key: statistics.fmean(values) for key, values in found.items() if values}


def one(job):
    groups = lambda model: prepare(model, job["method"], job["lr"])  # noqa: E731
    return adapted_and_trained(job, groups, turning)


def plan(quick):
    rates = RATES[2::4] if quick else RATES
    seeds = SEEDS[:2] if quick else SEEDS
    jobs = []
    for method in METHODS:
        for lr in rates:
            for seed in seeds:
                jobs.append({"method": method, "lr": lr, "seed": seed})
    return jobs


def width(rates, losses, limit):
    """How many decades around the best rate have a loss up to limit; whether they end inside."""
    best = losses.index(min(losses))
    if losses[best] > limit:
        return 0.0, True
    total = 0.0
    inside = True
    for step, end in ((1, len(losses) - 1), (-1, 0)):
        i = best
        while i != end and losses[i + step] <= limit:
            total += abs(math.log10(rates[i + step] / rates[i]))
            i += step
        if i == end:
            inside = False
        else:  # the share is 0 if the next loss is infinite
            share = (limit - losses[i]) / (losses[i + step] - losses[i])
            total += share * abs(math.log10(rates[i + step] / rates[i]))
    return total, inside


def by_seed(runs, method, rates):
    """A list for each seed: its losses on the new text at all rates."""
    by_rate = [over_seeds(runs, "new", method=method, lr=lr) for lr in rates]
    return [list(losses) for losses in zip(*by_rate, strict=True)]


def width_cell(rates, losses_by_seed, limit=None):
    """The mean width and its spread. Without a limit, NEAR each seed's own best."""
    widths, more = [], ""
    for losses in losses_by_seed:
        decades, inside = width(rates, losses, min(losses) + NEAR if limit is None else limit)
        widths.append(decades)
        if not inside:
            more = "+"
    return f"{statistics.fmean(widths):.2f}{more} ({min(widths):.2f} to {max(widths):.2f})"


def turning_table(runs, rates, wide):
    """The lines on lengths and angles; none if they were not measured (ablation.py)."""
    ours = [run for run in runs if "length_a" in run]
    if not ours:
        return []
    lines = ["DeLoRA's components after training, mean over layers and seeds"]
    rows = (
        ("length_a", 2, "‖a_i‖"),
        ("length_b", 2, "‖b_i‖"),
        ("turned_a", 0, "a_i turned by, degrees"),
        ("turned_b", 0, "b_i turned by, degrees"),
    )
    for key, digits, title in rows:
        row = f"  {title:{wide}}"
        for lr in rates:
            mean = statistics.fmean(over_seeds(ours, key, lr=lr))
            row += f"{mean:>9.{digits}f}"
        lines.append(row)
    return [*lines, ""]


def report(found):
    runs, before = found["runs"], found["before"]
    rates = each(runs, "lr")
    methods = each(runs, "method")
    wide = max(23, *(len(method) + 1 for method in methods))
    lines = []
    tables = (
        ("new", 2, f"Loss on the new text (before: {before['new']:.2f}), nats per byte"),
        ("old", 2, f"Loss on the old text (before: {before['old']:.2f}), nats per byte"),
        ("moved", 1, f"‖W' - W‖, with ‖W‖ = {found['norm']:.0f}"),
    )
    for key, digits, title in tables:
        lines.append(f"{title}, mean over seeds")
        lines.append(f"  {'lr':{wide}}" + "".join(f"{lr:>9.1e}" for lr in rates))
        for method in methods:
            row = f"  {method:{wide}}"
            for lr in rates:
                mean = statistics.fmean(over_seeds(runs, key, method=method, lr=lr))
                row += f"{mean:>9.{digits}f}"
            lines.append(row)
        lines.append("")
    lines += turning_table(runs, rates, wide)

    least = math.inf  # the best that any adapter reaches, in the mean over seeds
    for method in methods:
        if method != FULL:
            bests = [min(losses) for losses in by_seed(runs, method, rates)]
            least = min(least, statistics.fmean(bests))
    title = f"decades within {NEAR} of"
    lines.append(f"  {title:{wide}}{'its own best':>22}{'the best adapter':>22}   loss, rate")
    for method in methods:
        curves = by_seed(runs, method, rates)
        own, common = width_cell(rates, curves), width_cell(rates, curves, least + NEAR)
        means = [statistics.fmean(losses) for losses in zip(*curves, strict=True)]
        best = f"best {min(means):.3f} at {rates[means.index(min(means))]:.1e}"
        lines.append(f"  {method:{wide}}{own:>22}{common:>22}   {best}")
    return "\n".join(lines)


def draw(found, figure):
    runs, before = found["runs"], found["before"]["new"]
    rates = each(runs, "lr")
    methods = each(runs, "method")
    left, right = figure.subplots(1, 2)
    for method in methods:
        style = {"color": COLOURS[method], "marker": MARKERS[method]}
        for axes, key in ((left, "new"), (right, "moved")):
            values = []
            for lr in rates:  # what is far above the picture only has to be above it
                values.append([min(v, 1e6) for v in over_seeds(runs, key, method=method, lr=lr)])
            curve(axes, rates, values, method, **style)
    for axes, height, what in ((left, before, "before training"), (right, found["norm"], "‖W‖")):
        axes.axhline(height, color=GREY, linewidth=0.8, linestyle=":")
        axes.annotate(what, (rates[0], height), (0, 3), textcoords="offset points", fontsize=8)
        axes.set(xscale="log", xlabel="learning rate")
    lowest = min(min(over_seeds(runs, "new", method=method)) for method in methods)
    left.set(ylim=(lowest - 0.05, before + 0.4), ylabel="nats per byte")
    left.set_title("Loss on the new text", fontsize=10)
    right.set(yscale="log", ylim=(None, 1e5), ylabel="‖W' − W‖")
    right.set_title("Distance from the pretrained weights", fontsize=10)
    lines = left.get_legend_handles_labels()
    figure.legend(*lines, loc="outside lower center", ncols=5, frameon=False, fontsize=9)


if __name__ == "__main__":
    experiment("robustness", __doc__, one, plan, report, draw, with_peft=True)
