# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.4", "numpy", "matplotlib"]
# ///
"""From ETHER+ to DeLoRA, one rung at a time (Eq. 10 to 14; Tables 1 and 2 from the other side).

    python examples/experiments/ladder.py            all runs: about 25 minutes on two cores
    python examples/experiments/ladder.py --redraw   tables and figure of the last run
    python examples/experiments/ladder.py --quick    in seconds, too short for figures to quote

DeLoRA has two parents. ablation.py comes from LoRA; this comes from ETHER+ (arXiv 2405.20271),
which multiplies W by a matrix near the identity. Here that acts on the input side of W (out, in):

    ETHER+, one-sided   W (I - u uᵀ + v vᵀ), u and v of length one: nothing to choose
    + free λ            W (I - λ (u uᵀ - v vᵀ)): ETHER+ has λ = 1
    + rank r            W (I - λ/r (U Σ Uᵀ - V Θ Vᵀ)): r pairs; Σ, Θ divide by squared lengths
    + relaxed           W (I - λ/r (B Ξ A - D Φ C)): left and right factors of their own
    DeLoRA              W + λ/r (B Ξ A - B₀ Ξ₀ A₀) diag(w): delora.py itself

How the last rung follows from the one before it:

    W (I + E) = W + W E with E = -λ/r (B Ξ A - D Φ C), where B and D are (in, r)
    in W E, free B and D of size (out, r) take the place of W B and W D; the sign goes into them
    the length that W gave comes back by column, on the right: diag(w), w_j = ‖W[:, j]‖
    D and C stay at their start B₀ and A₀: ΔW = λ/r (B Ξ A - B₀ Ξ₀ A₀) diag(w)

At the start λ has about the same meaning on every rung that has the same r. For random directions
W b_i / ‖b_i‖ is about as long as a column of W, ‖W‖_F / √in. So each half of the difference starts
at about λ ‖W‖_F / √(r · in), multiplied or added, and one grid of λ serves all. The halves are
equal then, and W' is W to the bit. What training can reach is not the same. Multiplied, a half is
up to λ times the largest singular value of W; added, up to λ max_j w_j. So the same λ lets the
former go further.

The model, the texts and the training are those of robustness.py: 150 steps, all 24 matrices of the
blocks, r = 8 where there is a rank, λ at half the rate of the directions, three seeds. Learning
rate and λ are searched on the same grid for every rung (the first has no λ). The best cell is the
one with the lowest mean loss on the new text. That loss is also what is reported, so a rung with a
λ had twelve chances where the first had three. The gain is over the rung above, seed by seed, both
at their best.

Where this departs from the papers. ETHER+ proper also multiplies on the output side and may cut the
reflections into diagonal blocks; here, as in the tables, it does neither. Its code starts with
v = -u and this with v = u, which is the same v vᵀ. Eq. 10 to 14 count u and v together: r/2 pairs.
Here r is the number of pairs, so that "+ rank r" trains as many numbers as DeLoRA, and λ is theirs
halved: 1 for ETHER+, not 2. How the rungs between were started was not found in public code: here
as DeLoRA, with V = U, D = B and C = A. "Relaxed" brings more than its name: its B starts with
longer columns than U and V have, so it turns more slowly at the same rate, and it has twice as many
trained numbers as its neighbours. The last rung is not one change but three: additive, with w, one
half frozen.

Without matplotlib there is no figure, which is said.
"""

import statistics

import torch
from common import (
    COLOURS,
    GREY,
    LEAVES,
    OURS,
    SEEDS,
    adapted_and_trained,
    experiment,
    over_seeds,
    spread,
)
from torch import nn
from torch.nn.utils.parametrize import register_parametrization

from delora import inject, param_groups

RANK = 8
RATES = (1e-2, 10**-1.5, 1e-1)
STRENGTHS = (1.0, 4.0, 15.0, 45.0)


# ------------------------------------------------------------------------------------------------
# The rungs: each maps W (out, in) to W', and is made for W with λ = strength
# ------------------------------------------------------------------------------------------------


def drawn(rows, columns):
    """A trainable matrix, drawn as DeLoRA draws A and B: uniform in ±1/√columns."""
    matrix = nn.Parameter(torch.empty(rows, columns))
    nn.init.kaiming_uniform_(matrix, a=5**0.5)
    return matrix


def twin(matrix):
    """A trainable matrix of its own that starts with the same values."""
    return nn.Parameter(matrix.detach().clone())


def unit(vectors, dim):
    """Each vector along dim divided by its length."""
    return vectors / vectors.norm(dim=dim, keepdim=True)


class OneSided(nn.Module):
    """W (I - u uᵀ + v vᵀ). There is no λ: strength is not used."""

    def __init__(self, W, strength):
        super().__init__()
        self.u = drawn(1, W.shape[1])  # (1, in)
        self.v = twin(self.u)  # (1, in)

    def forward(self, W):
        u = unit(self.u, dim=1)  # (1, in)
        v = unit(self.v, dim=1)  # (1, in)
        # W times the vectors first: (out, 1). No matrix (in, in) is formed
        return W - ((W @ u.T) @ u - (W @ v.T) @ v)  # (out, in)


class FreeStrength(nn.Module):
    """W (I - λ (u uᵀ - v vᵀ)), that is λ/r with r = 1."""

    def __init__(self, W, strength):
        super().__init__()
        self.u = drawn(1, W.shape[1])  # (1, in)
        self.v = twin(self.u)  # (1, in)
        self.lam = nn.Parameter(torch.tensor([strength]))  # (1,)

    def forward(self, W):
        u = unit(self.u, dim=1)  # (1, in)
        v = unit(self.v, dim=1)  # (1, in)
        return W - self.lam * ((W @ u.T) @ u - (W @ v.T) @ v)  # (out, in)


class Pairs(nn.Module):
    """W (I - λ/r (U Σ Uᵀ - V Θ Vᵀ)). The columns of U and V are rows here."""

    def __init__(self, W, strength):
        super().__init__()
        self.U = drawn(RANK, W.shape[1])  # (r, in)
        self.V = twin(self.U)  # (r, in)
        self.lam = nn.Parameter(torch.tensor([strength]))  # (1,)

    def forward(self, W):
        U = unit(self.U, dim=1)  # (r, in), with the square root of Σ in it
        V = unit(self.V, dim=1)  # (r, in), likewise of Θ
        return W - self.lam / RANK * ((W @ U.T) @ U - (W @ V.T) @ V)  # (out, in)


class Relaxed(nn.Module):
    """W (I - λ/r (B Ξ A - D Φ C))."""

    def __init__(self, W, strength):
        super().__init__()
        self.A = drawn(RANK, W.shape[1])  # (r, in)
        self.B = drawn(W.shape[1], RANK)  # (in, r)
        self.C, self.D = twin(self.A), twin(self.B)
        self.lam = nn.Parameter(torch.tensor([strength]))  # (1,)

    def forward(self, W):
        first = (W @ unit(self.B, dim=0)) @ unit(self.A, dim=1)  # (out, in), W B Ξ A
        second = (W @ unit(self.D, dim=0)) @ unit(self.C, dim=1)  # (out, in), W D Φ C
        return W - self.lam / RANK * (first - second)  # (out, in)


ETHER_PLUS = "ETHER+, one-sided"
RUNGS = {
    ETHER_PLUS: OneSided,
    "+ free λ": FreeStrength,
    "+ rank r": Pairs,
    "+ relaxed": Relaxed,
    OURS: None,  # delora.py
}


# ------------------------------------------------------------------------------------------------
# The runs
# ------------------------------------------------------------------------------------------------


def groups(model, rung, lr, strength):
    """Adapt model as that rung does. Returns the groups for the optimiser, λ at half the rate."""
    if rung == OURS:
        inject(model, LEAVES, r=RANK, lambda_init=strength)
        return param_groups(model, lr, lambda_lr=lr / 2)
    model.requires_grad_(False)
    directions, strengths = [], []
    for block in model.blocks:
        for leaf in LEAVES:
            layer = getattr(block, leaf)
            adapter = RUNGS[rung](layer.weight, strength)
            for name, p in adapter.named_parameters():
                group = strengths if name == "lam" else directions
                group.append(p)
            register_parametrization(layer, "weight", adapter)
    return [{"params": directions, "lr": lr}, {"params": strengths, "lr": lr / 2}]


def trainable(model):
    """How many numbers are trained."""
    return {"trainable": sum(p.numel() for p in model.parameters() if p.requires_grad)}


def one(job):
    adapt = lambda model: groups(model, job["rung"], job["lr"], job["strength"])  # noqa: E731
    return adapted_and_trained(job, adapt, trainable)


def plan(quick):
    jobs = []
    for rung in RUNGS:
        strengths = STRENGTHS[1:2] if quick else STRENGTHS
        if rung == ETHER_PLUS:
            strengths = (1.0,)
        for lr in RATES[1:2] if quick else RATES:
            for strength in strengths:
                for seed in SEEDS[:1] if quick else SEEDS:
                    jobs.append({"rung": rung, "lr": lr, "strength": strength, "seed": seed})
    return jobs


# ------------------------------------------------------------------------------------------------
# What came out
# ------------------------------------------------------------------------------------------------


def grid(runs, rung, key):
    """The values of key ("lr" or "strength") that were tried on that rung."""
    return sorted({run[key] for run in runs if run["rung"] == rung})


def best(runs, rung):
    """The cell of the grid, as arguments for over_seeds, with the lowest mean loss on new text."""
    least, found = None, None
    for lr in grid(runs, rung, "lr"):
        for strength in grid(runs, rung, "strength"):
            cell = {"rung": rung, "lr": lr, "strength": strength}
            mean = statistics.fmean(over_seeds(runs, "new", **cell))
            if least is None or mean < least:
                least, found = mean, cell
    return found


def marked(value, tried, form):
    """The value, with a star if it is at the edge of what was tried."""
    at_the_edge = len(tried) > 1 and value in (tried[0], tried[-1])
    return f"{value:{form}}" + ("*" if at_the_edge else " ")


def report(found):
    runs = found["runs"]
    before = found["before"]
    lines = [
        "Each rung at its best rate and λ: loss on the new text "
        f"(before: {before['new']:.2f}), nats per byte,",
        "gain over the rung above, ‖W' - W‖ "
        f"(‖W‖ = {found['norm']:.0f}), loss on the old text (before: {before['old']:.2f}), size",
        f"  {'rung':18}{'new text':>22}{'gain':>26}{'rate':>9}{'λ':>5}"
        f"{'moved':>8}{'old':>7}{'trained':>9}",
    ]
    above = None  # the losses on the rung above, one for each seed
    for rung in RUNGS:
        cell = best(runs, rung)
        losses = over_seeds(runs, "new", **cell)
        gain = ""
        if above:
            gains = [old - new for old, new in zip(above, losses, strict=True)]
            gain = spread(gains, "+.3f")
        above = losses
        rate = marked(cell["lr"], grid(runs, rung, "lr"), ".1e")
        strength = marked(cell["strength"], grid(runs, rung, "strength"), ".0f")
        moved = statistics.fmean(over_seeds(runs, "moved", **cell))
        old = statistics.fmean(over_seeds(runs, "old", **cell))
        count = over_seeds(runs, "trainable", **cell)[0]
        lines.append(
            f"  {rung:18}{spread(losses, '.3f'):>22}{gain:>26}{rate:>10}{strength:>5}"
            f"{moved:>7.1f}{old:>7.2f}{count:>9}"
        )
    lines.append("  * at the edge of the grid: the best may lie beyond it")

    rates = grid(runs, OURS, "lr")
    lines.append("")
    lines.append("Loss on the new text at every cell of the grid, mean over seeds")
    lines.append(f"  {'rung':18}{'λ':>4}  lr" + "".join(f"{lr:>9.1e}" for lr in rates))
    for rung in RUNGS:
        for strength in grid(runs, rung, "strength"):
            row = f"  {rung:18}{strength:>4.0f}    "
            for lr in rates:
                losses = over_seeds(runs, "new", rung=rung, lr=lr, strength=strength)
                row += f"{statistics.fmean(losses):>9.3f}"
            lines.append(row)
    return "\n".join(lines)


def draw(found, figure):
    runs = found["runs"]
    axes = figure.subplots()
    means = []
    for place, rung in enumerate(RUNGS):
        losses = over_seeds(runs, "new", **best(runs, rung))
        mean = statistics.fmean(losses)
        means.append(mean)
        ends = [[mean - min(losses)], [max(losses) - mean]]  # how far the bar goes down and up
        style = {"color": COLOURS[OURS] if rung == OURS else GREY, "marker": "o"}
        axes.errorbar([place], [mean], ends, capsize=5, linestyle="none", **style)
        axes.annotate(f"{mean:.3f}", (place, mean), (9, 3), textcoords="offset points", fontsize=9)
    axes.plot(range(len(means)), means, color=GREY, linewidth=0.8, zorder=0)
    axes.set_xticks(range(len(means)), list(RUNGS))
    axes.set_xlim(-0.4, len(means) - 0.4)
    axes.set_ylabel("loss on the new text, nats per byte")
    axes.set_title("Each rung at its best rate and λ, lowest to highest seed", fontsize=10)


if __name__ == "__main__":
    experiment("ladder", __doc__, one, plan, report, draw)
