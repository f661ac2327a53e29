# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.4", "matplotlib"]
# ///
"""The first fifty steps: why DeLoRA subtracts a frozen copy and does not start from B = 0.

    python examples/start.py            all runs, the tables and the figure: about three minutes on two cores
    python examples/start.py --redraw   tables and figure from the numbers of the last run
    python examples/start.py --quick    the same path in seconds, too short for figures to quote

Both starts give the pretrained model before the first step. What comes after differs. From B = 0 a norm has to be kept
away from zero, by a clamp at 1e-4 as in PEFT 0.21.2 (a test compares the class below with it). The first step of AdamW
makes every entry of B as large as the learning rate, and then B is normalised: at any rate that brings its norm above
the clamp, the first step goes to full strength, in whatever direction the first batch has. With the frozen copy the
first step is as small as the rate.

The model, the texts and the batches are those of robustness.py, on all 24 matrices of the blocks with r = 8 and λ = 15,
at four constant learning rates (λ has half of it) without warm-up, three seeds. After every step ‖ΔW‖ is measured, and
the loss on 32 windows of the new text's validation part.

Needs torch. Without matplotlib there is no figure, which is said.
"""

import copy

import torch
from quickstart import train, validate
from robustness import COLOURS, LEAVES, OURS, PEFT_DELORA, SEEDS, base, curve, experiment, over_seeds, texts, weights
from torch import Tensor, nn
from torch.nn import functional as F

from delora import inject, param_groups

CLAMPED = "zero B, clamp"
FROZEN = "frozen copy"
RATES = (1e-5, 1e-4, 1e-3, 1e-2)


class Clamped(nn.Module):
    """y = (W + λ/r · B Ξ A · diag(w)) x + b from B = 0, with every norm in Ξ held above a floor."""

    def __init__(self, base: nn.Linear, r: int, lambda_init: float = 15.0, floor: float = 1e-4):
        super().__init__()
        self.base, self.floor = base.requires_grad_(False), floor
        self.register_buffer("w", base.weight.norm(dim=0))  # (in,)
        self.A = nn.Parameter(nn.init.kaiming_uniform_(torch.empty(r, base.in_features), a=5**0.5))  # (r, in)
        self.B = nn.Parameter(torch.zeros(base.out_features, r))  # (out, r)
        self.delora_lambda = nn.Parameter(torch.full((1,), lambda_init))  # (1,)

    def forward(self, x: Tensor) -> Tensor:
        norms = self.A.norm(dim=1).clamp(self.floor) * self.B.norm(dim=0).clamp(self.floor)  # (r,)
        h = F.linear(x * self.w, self.A) * (self.delora_lambda / len(self.A) / norms)  # (..., r)
        return self.base(x) + F.linear(h, self.B)  # (..., out)


def clamp(model: nn.Module, r: int) -> None:
    """Put Clamped in the place of every layer that the experiments adapt, and freeze the rest."""
    model.requires_grad_(False)
    for block in model.blocks:
        for leaf in LEAVES:
            setattr(block, leaf, Clamped(getattr(block, leaf), r))


def clamped_groups(model: nn.Module, lr: float) -> list[dict]:
    """As `param_groups(model, lr, lr / 2)`, of a model that has Clamped layers."""
    layers = [module for module in model.modules() if isinstance(module, Clamped)]
    return [{"params": [p for layer in layers for p in (layer.A, layer.B)], "lr": lr},
            {"params": [layer.delora_lambda for layer in layers], "lr": lr / 2}]


def one(job: dict) -> dict:
    """The loss and ‖ΔW‖ before the first step and after each."""
    (_, new), before, steps = texts(), weights(base(job["quick"])), 5 if job["quick"] else 50
    model, found = copy.deepcopy(base(job["quick"])), {"loss": [], "moved": []}
    torch.manual_seed(job["seed"])
    if job["start"] == CLAMPED:
        clamp(model, r=8)
        groups = clamped_groups(model, job["lr"])
    else:
        inject(model, LEAVES, r=8)
        groups = param_groups(model, job["lr"], lambda_lr=job["lr"] / 2)

    def watch(step: int, loss: float) -> None:
        found["loss"].append(round(validate(model, new["valid"], windows=32), 6))
        found["moved"].append(float(f"{(weights(model) - before).norm().item():.6g}"))

    watch(0, 0.0)
    optimizer = torch.optim.AdamW(groups, weight_decay=0)
    train(model, new["train"], optimizer, steps, job["seed"], watch, share=lambda step: 1.0, batch=8)
    return job | found


def plan(quick: bool) -> list[dict]:
    seeds, rates = (SEEDS[:1], RATES[::3]) if quick else (SEEDS, RATES)
    return [{"start": start, "lr": lr, "seed": s} for start in (CLAMPED, FROZEN) for lr in rates for s in seeds]


def per_step(found: dict, key: str, start: str, lr: float) -> list[list[float]]:
    """That number at every step, one for each seed."""
    return [[*values] for values in zip(*over_seeds(found["runs"], key, start=start, lr=lr), strict=True)]


def report(found: dict) -> str:
    rates, lines = [*dict.fromkeys(run["lr"] for run in found["runs"])], []
    last = len(found["runs"][0]["loss"]) - 1
    for key, title, form in (("moved", "‖ΔW‖ (lowest to highest seed)", "{:.4g}"), ("loss", "Loss", "{:.3f}")):
        lines += [f"{title} after so many steps"]
        lines += [f"  {'start':15}{'lr':>8}" + "".join(f"{n:>22}" for n in (0, 1, last))]
        for start in (FROZEN, CLAMPED):
            for lr in rates:
                values = per_step(found, key, start, lr)
                cells = [f"{form} to {form}".format(min(values[n]), max(values[n])) for n in (0, 1, last)]
                lines += [f"  {start:15}{lr:>8.0e}" + "".join(f"{cell:>22}" for cell in cells)]
        lines += [""]
    return "\n".join(lines[:-1])


def draw(found: dict, figure) -> None:
    rates = [*dict.fromkeys(run["lr"] for run in found["runs"])]
    left, right = figure.subplots(1, 2)
    lines = [":", "-.", "--", "-"]
    for start, colour in ((CLAMPED, COLOURS[PEFT_DELORA]), (FROZEN, COLOURS[OURS])):
        for lr, line in zip(rates, lines, strict=False):
            style = {"color": colour, "linestyle": line}
            moved, loss = (per_step(found, key, start, lr) for key in ("moved", "loss"))
            curve(left, [*range(1, len(moved))], moved[1:], f"{start}, lr {lr:.0e}", **style)
            curve(right, [*range(len(loss))], loss, f"{start}, lr {lr:.0e}", **style)
    left.set(yscale="log", ylabel="‖ΔW‖, all adapted matrices", title="How far from W: 0 at step 0 for both")
    right.set(ylabel="loss on the new text, nats per byte", title="What it does to the loss")
    for axes in (left, right):
        axes.set_xlabel("step of AdamW, without warm-up")
        axes.title.set_size(10)
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False, fontsize=8)


if __name__ == "__main__":
    experiment("start", __doc__, one, plan, report, draw, size=(8, 4.2))
