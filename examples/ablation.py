# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.4", "matplotlib"]
# ///
"""What each part of DeLoRA brings, from LoRA one change at a time (Table 1).

    python examples/ablation.py            all runs, the tables and the figure: about 20 minutes on two cores
    python examples/ablation.py --redraw   table and figure from the numbers of the last run
    python examples/ablation.py --quick    the same path in seconds, too short for figures to quote

The runs are those of robustness.py (150 steps, r = 8, three seeds), at six learning rates from 1e-3 to 0.3:

    LoRA                   BA
    + normalised, λ        λ / r · (B Ξ A - B₀ Ξ₀ A₀), w = 1
    + w, by column         times diag(w), w_j = ‖W[:, j]‖: DeLoRA as it is by default
    + w, Frobenius         w_j = ‖W‖_F
    by column, λ untied    the frozen copy keeps the initial λ (Eq. 9)
    by column, λ fixed     only A and B are trained
    by column, zero B      no frozen copy; from B = 0, norms clamped at 1e-4 (start.py)

A λ of 15 means another strength for another w. So that the scaling is compared and not the strength, each mode starts
with the λ at which the learned terms of all 24 matrices could be as large together as with 15 by column; λ's learning
rate is in proportion.

Needs torch. Without matplotlib there is no figure, which is said.
"""

from benchmark import LORA
from quickstart import ByteTransformer
from robustness import LEAVES, RATES, SEEDS, curve, experiment, over_seeds, prepare, report, run
from start import clamp, clamped_groups

from delora import inject, param_groups

STRENGTH = 15.0
ROWS = {  # options of inject
    LORA: None,
    "+ normalised, λ": {"weight_norm": None},
    "+ w, by column": {},
    "+ w, Frobenius": {"weight_norm": "frobenius"},
    "by column, λ untied": {"tie_lambda": False},
    "by column, λ fixed": {},
    "by column, zero B": None,
}
STYLES = [{"color": colour, "marker": marker} for colour, marker in (
    ("#cc3311", "s"), ("#777777", "^"), ("#0077bb", "o"), ("#009988", "D"), ("#33bbee", "x"), ("#000000", "+"),
    ("#ee9922", "v"))]  # fmt: skip


def reach(model: ByteTransformer, weight_norm: str | None) -> float:
    """How far λ = 1 lets the learned terms of all layers go together, where the a_i are spread over the inputs."""
    squares = 0.0
    for W in (getattr(block, leaf).weight for block in model.blocks for leaf in LEAVES):  # (out, in)
        whole = W.square().sum().item()
        squares += {"column": whole / W.shape[1], "frobenius": whole, None: 1.0}[weight_norm]  # the mean of w_j²
    return squares**0.5


def groups(model: ByteTransformer, row: str, lr: float) -> list[dict]:
    """Adapt model as that row says. Returns the groups for the optimiser."""
    if row == LORA:
        return prepare(model, LORA, lr)
    if row == "by column, zero B":
        clamp(model, r=8)
        return clamped_groups(model, lr)
    options = ROWS[row]
    share = reach(model, "column") / reach(model, options.get("weight_norm", "column"))
    adapters = inject(model, LEAVES, r=8, lambda_init=STRENGTH * share, **options)
    if row == "by column, λ fixed":
        for adapter in adapters.values():
            adapter.delora_lambda.requires_grad_(False)
    return param_groups(model, lr, lambda_lr=share * lr / 2)


def one(job: dict) -> dict:
    return run(job, lambda model: groups(model, job["method"], job["lr"]))


def plan(quick: bool) -> list[dict]:
    rates, seeds = (RATES[2:3], SEEDS[:1]) if quick else (RATES[2:8], SEEDS)
    return [{"method": row, "lr": lr, "seed": seed} for row in ROWS for lr in rates for seed in seeds]


def draw(found: dict, figure) -> None:
    axes = figure.subplots()
    rates = [*dict.fromkeys(run["lr"] for run in found["runs"])]
    for (row, _), style in zip(ROWS.items(), STYLES, strict=True):
        values = [[min(v, 99.0) for v in over_seeds(found["runs"], "new", method=row, lr=lr)] for lr in rates]
        curve(axes, rates, values, row, **style)
    axes.set(xscale="log", xlabel="learning rate of A and B", ylabel="loss on the new text, nats per byte")
    axes.set_ylim(None, found["before"]["new"] + 0.05)
    figure.legend(loc="outside right", frameon=False, fontsize=8)


if __name__ == "__main__":
    experiment("ablation", __doc__, one, plan, report, draw)
