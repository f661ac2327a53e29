# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.4", "numpy", "peft>=0.21", "matplotlib"]
# ///
"""Training far too long on little text: who drifts away from the pretrained model, who forgets
(Fig. 3).

    python examples/experiments/forgetting.py            all runs: about 20 minutes on two cores
    python examples/experiments/forgetting.py --redraw   table and figure of the last run
    python examples/experiments/forgetting.py --quick    in seconds, too short for figures to quote

The quickstart's model is adapted to the first 12 KB of Python source code, so little that it is
soon known by heart: the loss on other Python code is lowest at some step and then rises. Training
goes on for 1750 steps, at least ten times as long. AdamW has each method's best rate by
robustness.py, constant after 10 steps of warm-up. At 23 steps on the way the loss on unseen new
text, the loss on the *old* text (English, what was pretrained) and ‖W' - W‖ are measured, with
three seeds, and with DeLoRA the mean of all λ, since the bound moves with it.

Without peft its DeLoRA is left out; without matplotlib there is no figure. Both are said.
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
    SEEDS,
    base,
    curve,
    english,
    experiment,
    over_seeds,
    prepare,
    python,
    train,
    validate,
    weights,
    without_peft,
)

METHODS = without_peft((LORA, FULL, PEFT_DELORA, OURS))
TEXT = 12 * 1024  # bytes
RATES = {LORA: 1e-2, FULL: 1e-3, PEFT_DELORA: 1e-2, OURS: 10**-1.5}  # best by robustness.py
CHECKPOINTS = (
    *(0, 5, 10, 20, 30, 40, 50, 65, 80, 100, 125, 150, 175, 200, 250, 300, 400, 500),
    *(650, 800, 1000, 1250, 1500, 1750),
)


def one(job):
    """The losses and ‖W' - W‖ at every checkpoint."""
    quick = job["quick"]
    before = weights(base(quick))
    windows = 16 if quick else 64
    model = copy.deepcopy(base(quick))
    found = {"step": [], "new": [], "old": [], "moved": [], "strength": []}
    torch.manual_seed(job["seed"])
    optimizer = torch.optim.AdamW(prepare(model, job["method"], job["lr"]), weight_decay=0)
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
    warm_up = lambda step: min((step + 1) / 10, 1.0)  # noqa: E731
    train(model, text, optimizer, steps, job["seed"], watch, warm_up, batch=8)
    return job | found


def plan(quick):
    jobs = []
    for method in METHODS:
        for seed in SEEDS[:1] if quick else SEEDS:
            jobs.append({"method": method, "lr": RATES[method], "seed": seed})
    return jobs


def at(found, method, key):
    """That number at every checkpoint, one for each seed."""
    runs = over_seeds(found["runs"], key, method=method)
    return [list(values) for values in zip(*runs, strict=True)]


def best_stop(found, method):
    """Which checkpoint has the lowest mean loss on unseen new text."""
    means = [statistics.fmean(values) for values in at(found, method, "new")]
    return means.index(min(means))


def report(found):
    steps = found["runs"][0]["step"]
    before = f"new text {found['before']['new']:.2f}, old text {found['before']['old']:.2f}"
    lines = [f"‖W‖ = {found['norm']:.0f}. Before: {before}. Means over seeds:"]
    head = f"  {'':17}{'lr':>8}{'step':>7}{'‖ΔW‖':>11}{'λ':>7}{'new text':>10}{'old text':>10}"
    lines.append(f"{head}   by seed, when")
    for method in dict.fromkeys(run["method"] for run in found["runs"]):
        places = (("best stop", best_stop(found, method)), ("the end", len(steps) - 1))
        for place, n in places:
            moved = statistics.fmean(at(found, method, "moved")[n])
            new = statistics.fmean(at(found, method, "new")[n])
            old = at(found, method, "old")[n]
            row = f"  {method:17}{RATES[method]:>8.1e}{steps[n]:>7}{moved:>11.1f}"
            strengths = at(found, method, "strength")[n]
            if method in (LORA, FULL):
                row += f"{'-':>7}"
            else:
                row += f"{statistics.fmean(strengths):>7.1f}"
            row += f"{new:>10.2f}{statistics.fmean(old):>10.2f}"
            lines.append(f"{row}   {min(old):.2f} to {max(old):.2f}, {place}")
    return "\n".join(lines)


def draw(found, figure):
    panels = figure.subplots(1, 3)
    steps = found["runs"][0]["step"][1:]
    titles = (
        ("moved", "‖W' − W‖, all adapted matrices", "Distance"),
        ("new", "nats per byte", "Loss on unseen new text"),
        ("old", "nats per byte", "Loss on the old text: forgetting"),
    )
    for axes, (key, label, title) in zip(panels, titles, strict=True):
        for method in dict.fromkeys(run["method"] for run in found["runs"]):
            values = at(found, method, key)[1:]
            curve(axes, steps, values, method, color=COLOURS[method], marker=MARKERS[method])
        axes.set(xscale="log", xlabel="step", ylabel=label)
        axes.set_title(title, fontsize=10)
    lines = panels[0].get_legend_handles_labels()
    figure.legend(*lines, loc="outside lower center", ncols=4, frameon=False, fontsize=8)


if __name__ == "__main__":
    experiment("forgetting", __doc__, one, plan, report, draw, size=(9, 3.6))
