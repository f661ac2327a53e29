# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.4", "peft>=0.21", "matplotlib"]
# ///
"""Training far too long on little text: who drifts away from the pretrained model, and who forgets (Fig. 3).

    python examples/forgetting.py            all runs, the table and the figure: about 20 minutes on two cores
    python examples/forgetting.py --redraw   table and figure from the numbers of the last run
    python examples/forgetting.py --quick    the same path in seconds, too short for figures to quote

The quickstart's model is adapted to the first 12 KB of Python source code, so little that it is soon known by heart:
the loss on other Python code is lowest at some step and then rises. Training goes on for 1750 steps, at least ten times
as long. AdamW has each method's best rate by robustness.py, constant after 10 steps of warm-up. At 23 steps on the way
the loss on unseen new text, the loss on the *old* text (English, what was pretrained) and ‖W' - W‖ are measured, with
three seeds, and with DeLoRA the mean of all λ, since the bound moves with it.

Needs torch. Without peft its DeLoRA is left out; without matplotlib there is no figure. Both are said.
"""

import copy
import statistics

import torch
from benchmark import LORA, OURS, PEFT_DELORA
from quickstart import train, validate
from robustness import (
    COLOURS,
    FULL,
    MARKERS,
    METHODS,
    SEEDS,
    base,
    curve,
    experiment,
    over_seeds,
    prepare,
    texts,
    weights,
)

TEXT = 12 * 1024  # bytes
RATES = {LORA: 1e-2, FULL: 1e-3, PEFT_DELORA: 1e-2, OURS: 10**-1.5}  # each method's best, by robustness.py
CHECKPOINTS = (0, 5, 10, 20, 30, 40, 50, 65, 80, 100, 125, 150, 175, 200, 250, 300, 400, 500, 650, 800, 1000, 1250,
               1500, 1750)  # fmt: skip


def one(job: dict) -> dict:
    """The losses and ‖W' - W‖ at every checkpoint."""
    (old, new), before, quick = texts(), weights(base(job["quick"])), job["quick"]
    windows, found = 16 if quick else 64, {"step": [], "new": [], "old": [], "moved": [], "strength": []}
    model = copy.deepcopy(base(quick))
    torch.manual_seed(job["seed"])
    optimizer = torch.optim.AdamW(prepare(model, job["method"], job["lr"]), weight_decay=0)

    strengths = [p for name, p in model.named_parameters() if "delora_lambda" in name]

    def watch(step: int, loss: float) -> None:
        if step in CHECKPOINTS:
            found["step"].append(step)
            found["new"].append(round(validate(model, new["valid"], windows), 5))
            found["old"].append(round(validate(model, old["valid"], windows), 5))
            found["moved"].append(round((weights(model) - before).norm().item(), 4))
            found["strength"].append(round(statistics.fmean(p.item() for p in strengths), 4) if strengths else None)
            model.train()

    watch(0, 0.0)
    steps = 20 if quick else CHECKPOINTS[-1]
    share = lambda step: min((step + 1) / 10, 1.0)  # noqa: E731
    train(model, new["train"][:TEXT], optimizer, steps, job["seed"], watch, share, batch=8)
    return job | found


def plan(quick: bool) -> list[dict]:
    seeds = SEEDS[:1] if quick else SEEDS
    return [{"method": method, "lr": RATES[method], "seed": seed} for method in METHODS for seed in seeds]


def at(found: dict, method: str, key: str) -> list[list[float]]:
    """That number at every checkpoint, one for each seed."""
    return [[*values] for values in zip(*over_seeds(found["runs"], key, method=method), strict=True)]


def best_stop(found: dict, method: str) -> int:
    """Which checkpoint has the lowest mean loss on unseen new text."""
    means = [statistics.fmean(values) for values in at(found, method, "new")]
    return means.index(min(means))


def report(found: dict) -> str:
    steps, lines = found["runs"][0]["step"], []
    new, old = found["before"]["new"], found["before"]["old"]
    lines += [f"‖W‖ = {found['norm']:.0f}. Before: new text {new:.2f}, old text {old:.2f}. Means over seeds:"]
    lines += [f"  {'':17}{'lr':>8}{'step':>7}{'‖ΔW‖':>11}{'λ':>7}{'new text':>10}{'old text':>10}   by seed, when"]
    for method in dict.fromkeys(run["method"] for run in found["runs"]):
        best = best_stop(found, method)
        for place, n in (("best stop", best), ("the end", len(steps) - 1)):
            moved, new, old = (at(found, method, key)[n] for key in ("moved", "new", "old"))
            strengths = [value for value in at(found, method, "strength")[n] if value is not None]
            strength = f"{statistics.fmean(strengths):.1f}" if strengths else "-"
            means = f"{statistics.fmean(moved):>11.1f}{strength:>7}"
            means += "".join(f"{statistics.fmean(losses):>10.2f}" for losses in (new, old))
            spread = f"{min(old):.2f} to {max(old):.2f}"
            lines += [f"  {method:17}{RATES[method]:>8.1e}{steps[n]:>7}{means}   {spread}, {place}"]
    return "\n".join(lines)


def draw(found: dict, figure) -> None:
    panels = figure.subplots(1, 3)
    steps = found["runs"][0]["step"][1:]
    titles = (("moved", "‖W' − W‖, all adapted matrices", "Distance"),
              ("new", "nats per byte", "Loss on unseen new text"),
              ("old", "nats per byte", "Loss on the old text: forgetting"))
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
