# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.4", "numpy", "peft>=0.21", "matplotlib"]
# ///
"""Training far too long on little text: who drifts away from the pretrained model, who forgets
(Fig. 3).

    python examples/experiments/forgetting.py            all runs: about 25 minutes on two cores
    python examples/experiments/forgetting.py --redraw   table and figure of the last run
    python examples/experiments/forgetting.py --quick    in seconds, too short for figures to quote

The quickstart's model is adapted to the first 12 KB of Python source code, so little that it is
soon known by heart: the loss on other Python code is lowest at some step and then rises. Training
goes on for 1250 steps, at least seven times as long. AdamW has each method's best rate by
robustness.py, constant after 10 steps of warm-up. DeLoRA is run twice: with λ at half the rate of A
and B, as in the other experiments, and with λ at 1e-3, the paper's rate for this figure.

At 22 moments, the first before training, four numbers are measured, with three seeds: the loss on
unseen new text, the loss on the *old* text (English, what was pretrained), each on the same 64
windows every time, ‖W' - W‖, and the mean of all λ, since the bound moves with it.

Without peft its methods are left out; without matplotlib there is no figure. Both are said.
"""

import copy
import statistics

import torch
from common import (
    COLOURS,
    FULL,
    LORA,
    MARKERS,
    OURS,
    PEFT_DELORA,
    PEFT_DORA,
    SEEDS,
    base,
    curve,
    each,
    english,
    experiment,
    per_step,
    prepare,
    python,
    train,
    validate,
    warm_up,
    weights,
    without_peft,
)

SLOW = "DeLoRA, λ at 1e-3"  # the rate of λ in the paper's Fig. 3
METHODS = without_peft((LORA, PEFT_DORA, FULL, PEFT_DELORA, OURS, SLOW))
TEXT = 12 * 1024  # bytes
RATES = {  # best by robustness.py
    LORA: 1e-2,
    PEFT_DORA: 1e-2,
    FULL: 1e-3,
    PEFT_DELORA: 1e-2,
    OURS: 10**-1.5,
    SLOW: 10**-1.5,
}
CHECKPOINTS = (
    *(0, 5, 10, 20, 30, 40, 50, 65, 80, 100, 125, 150, 175, 200, 250, 300, 400, 500),
    *(650, 800, 1000, 1250),
)
STYLES = {
    SLOW: {"color": COLOURS[OURS], "marker": "o", "linestyle": "--", "markerfacecolor": "none"}
}
for name in (LORA, PEFT_DORA, FULL, PEFT_DELORA, OURS):
    STYLES[name] = {"color": COLOURS[name], "marker": MARKERS[name]}
MOMENTS = (175, 400, 1000, 1250)  # for the table of distances


def one(job):
    """The losses, ‖W' - W‖ and the mean λ at every checkpoint."""
    quick = job["quick"]
    before = weights(base(quick))
    windows = 16 if quick else 64
    model = copy.deepcopy(base(quick))
    found = {"step": [], "new": [], "old": [], "moved": [], "strength": []}
    torch.manual_seed(job["seed"])
    if job["method"] == SLOW:
        groups = prepare(model, OURS, job["lr"], lambda_lr=1e-3)
    else:
        groups = prepare(model, job["method"], job["lr"])
    optimizer = torch.optim.AdamW(groups, weight_decay=0)
    strengths = []
    for name, p in model.named_parameters():
        if name.endswith(".delora.lam") or "delora_lambda" in name:  # ours, PEFT's
            strengths.append(p)

    def watch(step, loss):
        if step not in CHECKPOINTS:
            return
        mean = statistics.fmean(p.item() for p in strengths) if strengths else None
        found["step"].append(step)
        found["new"].append(round(validate(model, python()["valid"], windows), 5))
        found["old"].append(round(validate(model, english()["valid"], windows), 5))
        found["moved"].append(round((weights(model) - before).norm().item(), 4))
        found["strength"].append(None if mean is None else round(mean, 4))
        model.train()

    watch(0, 0.0)
    steps = 20 if quick else CHECKPOINTS[-1]
    text = python()["train"][:TEXT]
    train(model, text, optimizer, steps, job["seed"], watch, warm_up(10), batch=8)
    return job | found


def plan(quick):
    jobs = []
    for method in METHODS:
        for seed in SEEDS[:1] if quick else SEEDS:
            jobs.append({"method": method, "lr": RATES[method], "seed": seed})
    return jobs


def best_stop(found, method):
    """Which checkpoint has the lowest mean loss on unseen new text."""
    means = [statistics.fmean(values) for values in per_step(found, "new", method=method)]
    return means.index(min(means))


def report(found):
    steps = found["runs"][0]["step"]
    methods = each(found["runs"], "method")
    rates = {run["method"]: run["lr"] for run in found["runs"]}
    before = []  # on the 64 windows of the curves; found["before"] is of 128
    for key, what in (("new", "new text"), ("old", "old text")):
        before.append(f"{what} {per_step(found, key, method=methods[0])[0][0]:.2f}")
    lines = [f"‖W‖ = {found['norm']:.0f}. Before: {', '.join(before)}. Means over seeds:"]
    head = f"  {'':17}{'lr':>8}{'step':>7}{'‖ΔW‖':>11}{'λ':>7}{'new text':>10}{'old text':>10}"
    lines.append(f"{head}   by seed, when")
    for method in methods:
        places = (("best stop", best_stop(found, method)), ("the end", len(steps) - 1))
        for place, n in places:
            moved = statistics.fmean(per_step(found, "moved", method=method)[n])
            new = statistics.fmean(per_step(found, "new", method=method)[n])
            old = per_step(found, "old", method=method)[n]
            row = f"  {method:17}{rates[method]:>8.1e}{steps[n]:>7}{moved:>11.1f}"
            strengths = per_step(found, "strength", method=method)[n]
            if None in strengths:
                row += f"{'-':>7}"
            else:
                row += f"{statistics.fmean(strengths):>7.1f}"
            row += f"{new:>10.2f}{statistics.fmean(old):>10.2f}"
            lines.append(f"{row}   {min(old):.2f} to {max(old):.2f}, {place}")

    moments = [step for step in MOMENTS if step in steps] or steps[-1:]
    lines.append("")
    lines.append(
        "‖ΔW‖ after so many steps, mean over seeds; growth from the first of them to the end"
    )
    lines.append(f"  {'':17}" + "".join(f"{step:>9}" for step in moments) + f"{'growth':>10}")
    for method in methods:
        moved = [
            statistics.fmean(per_step(found, "moved", method=method)[steps.index(n)])
            for n in moments
        ]
        row = f"  {method:17}" + "".join(f"{distance:>9.1f}" for distance in moved)
        lines.append(row + f"{moved[-1] / moved[0] - 1:>+10.0%}")
    return "\n".join(lines)


def draw(found, figure):
    panels = figure.subplots(1, 3)
    methods = each(found["runs"], "method")
    steps = found["runs"][0]["step"][1:]
    titles = (
        ("moved", "‖W' − W‖, all adapted matrices", "Distance"),
        ("new", "nats per byte", "Loss on unseen new text"),
        ("old", "nats per byte", "Loss on the old text: forgetting"),
    )
    for axes, (key, label, title) in zip(panels, titles, strict=True):
        for method in methods:
            values = per_step(found, key, method=method)[1:]
            curve(axes, steps, values, method, markersize=3, **STYLES[method])
        axes.set(xscale="log", xlabel="step", ylabel=label)
        axes.set_title(title, fontsize=10)
    # full fine-tuning goes far above the adapters, out of panels in which these can be told apart
    for axes, key in ((panels[1], "new"), (panels[2], "old")):
        means = []
        for method in methods:
            if method != FULL:
                steps = per_step(found, key, method=method)[1:]
                means += [statistics.fmean(losses) for losses in steps]
        margin = 0.1 * (max(means) - min(means))
        axes.set_ylim(min(means) - margin, max(means) + margin)
    lines = panels[0].get_legend_handles_labels()
    figure.legend(*lines, loc="outside lower center", ncols=6, frameon=False, fontsize=8)


if __name__ == "__main__":
    experiment("forgetting", __doc__, one, plan, report, draw, size=(9, 4), with_peft=True)
