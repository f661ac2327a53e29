# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.4", "numpy", "matplotlib"]
# ///
"""The first fifty steps: why DeLoRA subtracts a frozen copy and does not start from B = 0.

    python examples/experiments/start.py            all runs: about three minutes on two cores
    python examples/experiments/start.py --redraw   tables and figure of the last run
    python examples/experiments/start.py --quick    in seconds, too short for figures to quote

Both starts give the pretrained model before the first step. What comes after differs. From B = 0 a
norm has to be kept away from zero, by a clamp at 1e-4 as in PEFT 0.21.2 (a test compares the class
below with it). The first step of AdamW makes every entry of B as large as the learning rate, and
then B is normalised: at any rate that brings its norm above the clamp, the first step goes to full
strength, in whatever direction the first batch has. With the frozen copy the first step is as small
as the rate, as long as that is small for the width: this model is 128 wide, width.py has others.

The model, the texts and the batches are those of robustness.py, on all 24 matrices of the blocks
with r = 8 and λ = 15, at four constant learning rates (λ has half of it) without warm-up, three
seeds. After every step ‖ΔW‖ is measured, and the loss on 32 windows of the new text's validation
part.

Without matplotlib there is no figure, which is said.
"""

import copy

import torch
from common import (
    COLOURS,
    LEAVES,
    OURS,
    PEFT_DELORA,
    SEEDS,
    base,
    curve,
    each,
    experiment,
    per_step,
    python,
    train,
    validate,
    weights,
)
from torch import nn
from torch.nn import functional as F

from delora import inject, param_groups

CLAMPED = "zero B, clamp"
FROZEN_COPY = "frozen copy"
RATES = (1e-5, 1e-4, 1e-3, 1e-2)


class Clamped(nn.Module):
    """y = (W + λ/r · B Ξ A · diag(w)) x + b from B = 0, with every norm in Ξ held above a floor."""

    def __init__(self, base, r, lambda_init, floor=1e-4):
        super().__init__()
        self.base = base.requires_grad_(False)
        self.floor = floor
        self.register_buffer("w", base.weight.norm(dim=0))  # (in,)
        self.A = nn.Parameter(torch.empty(r, base.in_features))  # (r, in)
        self.B = nn.Parameter(torch.zeros(base.out_features, r))  # (out, r)
        self.lam = nn.Parameter(torch.full((1,), lambda_init))  # (1,)
        nn.init.kaiming_uniform_(self.A, a=5**0.5)

    def forward(self, x):
        norms = self.A.norm(dim=1).clamp(self.floor) * self.B.norm(dim=0).clamp(self.floor)  # (r,)
        h = F.linear(x * self.w, self.A) * (self.lam / len(self.A) / norms)  # (..., r)
        return self.base(x) + F.linear(h, self.B)  # (..., out)


def clamp(model, r, lambda_init=15.0):
    """Put Clamped in the place of every layer that the experiments adapt, and freeze the rest."""
    model.requires_grad_(False)
    for block in model.blocks:
        for leaf in LEAVES:
            setattr(block, leaf, Clamped(getattr(block, leaf), r, lambda_init))


def clamped_groups(model, lr):
    """As `param_groups(model, lr, lr / 2)`, of a model that has Clamped layers."""
    directions, strengths = [], []
    for module in model.modules():
        if isinstance(module, Clamped):
            directions += [module.A, module.B]
            strengths.append(module.lam)
    return [{"params": directions, "lr": lr}, {"params": strengths, "lr": lr / 2}]


def one(job):
    """The loss and ‖ΔW‖ before the first step and after each."""
    quick = job["quick"]
    before = weights(base(quick))
    steps = 5 if quick else 50
    model = copy.deepcopy(base(quick))
    found = {"loss": [], "moved": []}
    torch.manual_seed(job["seed"])
    if job["start"] == CLAMPED:
        clamp(model, r=8)
        groups = clamped_groups(model, job["lr"])
    else:
        inject(model, LEAVES, r=8)
        groups = param_groups(model, job["lr"], lambda_lr=job["lr"] / 2)

    def watch(step, loss):
        found["loss"].append(round(validate(model, python()["valid"], windows=32), 6))
        found["moved"].append(float(f"{(weights(model) - before).norm().item():.6g}"))

    watch(0, 0.0)
    optimizer = torch.optim.AdamW(groups, weight_decay=0)
    constant = lambda step: 1.0  # noqa: E731
    train(model, python()["train"], optimizer, steps, job["seed"], watch, constant, batch=8)
    return job | found


def plan(quick):
    rates = RATES[::3] if quick else RATES
    seeds = SEEDS[:1] if quick else SEEDS
    jobs = []
    for start in (CLAMPED, FROZEN_COPY):
        for lr in rates:
            for seed in seeds:
                jobs.append({"start": start, "lr": lr, "seed": seed})
    return jobs


def report(found):
    rates = each(found["runs"], "lr")
    last = len(found["runs"][0]["loss"]) - 1
    lines = []
    tables = (("moved", "‖ΔW‖ (lowest to highest seed)", ".4g"), ("loss", "Loss", ".3f"))
    for key, title, form in tables:
        if lines:
            lines.append("")
        lines.append(f"{title} after so many steps")
        lines.append(f"  {'start':15}{'lr':>8}" + "".join(f"{n:>22}" for n in (0, 1, last)))
        for start in (FROZEN_COPY, CLAMPED):
            for lr in rates:
                values = per_step(found, key, start=start, lr=lr)
                row = f"  {start:15}{lr:>8.0e}"
                for n in (0, 1, last):
                    cell = f"{min(values[n]):{form}} to {max(values[n]):{form}}"
                    row += f"{cell:>22}"
                lines.append(row)
    return "\n".join(lines)


def draw(found, figure):
    rates = each(found["runs"], "lr")
    left, right = figure.subplots(1, 2)
    for start, colour in ((CLAMPED, COLOURS[PEFT_DELORA]), (FROZEN_COPY, COLOURS[OURS])):
        for lr, line in zip(rates, (":", "-.", "--", "-"), strict=False):
            style = {"color": colour, "linestyle": line}
            moved = per_step(found, "moved", start=start, lr=lr)
            loss = per_step(found, "loss", start=start, lr=lr)
            name = f"{start}, lr {lr:.0e}"
            curve(left, list(range(1, len(moved))), moved[1:], name, **style)
            curve(right, list(range(len(loss))), loss, name, **style)
    left.set(yscale="log", ylabel="‖ΔW‖, all adapted matrices")
    left.set_title("How far from W: 0 at step 0 for both")
    right.set(ylabel="loss on the new text, nats per byte")
    right.set_title("What it does to the loss")
    for axes in (left, right):
        axes.set_xlabel("step of AdamW, without warm-up")
        axes.title.set_size(10)
    lines = left.get_legend_handles_labels()
    figure.legend(*lines, loc="outside lower center", ncols=4, frameon=False, fontsize=8)


if __name__ == "__main__":
    experiment("start", __doc__, one, plan, report, draw, size=(8, 4.2))
