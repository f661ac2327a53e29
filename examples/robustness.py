# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.4", "peft>=0.21", "matplotlib"]
# ///
"""The learning rate, from far too low to far too high: what it does to LoRA, DeLoRA and full fine-tuning (Fig. 2).

    python examples/robustness.py            all runs, the tables and the figure: about 15 minutes on two cores
    python examples/robustness.py --redraw   tables and figure from the numbers of the last run
    python examples/robustness.py --quick    the same path in seconds, too short for figures to quote

The quickstart's model, pretrained on English, is adapted to Python source code at nine learning rates over four
decades, with three seeds each (they set what an adapter starts from, and which text each step sees). Every run is 150
steps of AdamW on 8 windows of 128 bytes, without weight decay, with linear warm-up over 6 % and linear decay. The
adapters have r = 8 on all 24 matrices of the blocks; λ starts at 15 and learns at half the rate of A and B, so that a
sweep moves both. Full fine-tuning trains everything.

At the end of each run three numbers are kept: the loss on the new text's validation part, the loss on the old text's,
and ‖W' - W‖, the Frobenius norm over all 24 matrices. W' is not asked from the method but measured from its outputs. By
the width of a method is meant how many decades of learning rate around its best one keep the loss within 0.05 of its
own best, or of the best that any adapter reaches, with straight lines between the points; + says that they go on beyond
the sweep. In brackets are the lowest and the highest seed.

The other experiments (forgetting.py, start.py, ablation.py) take their methods, runs and pictures from here.

Needs torch. Without peft its DeLoRA is left out; without matplotlib there is no figure. Both are said.
"""

import argparse
import contextlib
import copy
import functools
import importlib.util
import io
import json
import math
import os
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context, parent_process
from pathlib import Path

warnings.filterwarnings("ignore", message="Failed to initialize NumPy")  # torch without numpy, which is not needed
HERE = Path(__file__).resolve().parent
sys.path.append(str(HERE.parent))  # delora.py is there, also where it is not installed

import torch
from benchmark import LORA, OURS, PEFT, PEFT_DELORA, adapt, measured, where
from quickstart import CACHE, WIDTH, ByteTransformer, Progress, english, pretrained, python, train, validate
from torch import Tensor

from delora import param_groups

FULL = "full fine-tuning"
METHODS = (LORA, FULL, *[PEFT_DELORA] * PEFT, OURS)
LEAVES = ("q", "k", "v", "o", "up", "down")  # what is adapted in each block
RATES = tuple(10 ** (k / 2) for k in range(-8, 1))  # 1e-4 ... 1
SEEDS = (0, 1, 2)
NEAR = 0.05  # nats per byte from a method's best: the range whose width is reported
COLOURS = {LORA: "#cc3311", FULL: "#777777", PEFT_DELORA: "#ee9922", OURS: "#0077bb"}
MARKERS = {LORA: "s", FULL: "^", PEFT_DELORA: "v", OURS: "o"}


# ------------------------------------------------------------------------------------------------ one run


@functools.cache
def texts() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    return english(), python()


@functools.cache
def base(quick: bool) -> ByteTransformer:
    """The pretrained model, once for each process. Only the first, which pretrains it if need be, says so."""
    with contextlib.redirect_stdout(io.StringIO()) if parent_process() else contextlib.nullcontext():
        return pretrained(20 if quick else 600)


def prepare(model: ByteTransformer, method: str, lr: float) -> list[dict]:
    """Adapt model in the way of that name. Returns the groups for the optimiser."""
    if method == FULL:
        return [{"params": [*model.parameters()], "lr": lr}]
    adapt(model, method, LEAVES, r=8)
    if method == OURS:
        return param_groups(model, lr, lambda_lr=lr / 2)
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    strengths = [p for name, p in trainable.items() if "delora_lambda" in name]  # PEFT's
    others = [p for name, p in trainable.items() if "delora_lambda" not in name]
    return [{"params": others, "lr": lr}, {"params": strengths, "lr": lr / 2}]


@torch.no_grad()
def weights(model: ByteTransformer) -> Tensor:
    """What the layers apply, all in one row. layer(row j of the identity) is column j of the weight, plus the bias."""
    found = []
    for block in model.blocks:
        for leaf in LEAVES:
            n_in = 4 * WIDTH if leaf == "down" else WIDTH
            layer = getattr(block, leaf)
            found.append((layer(torch.eye(n_in)) - layer(torch.zeros(1, n_in))).flatten())  # (in · out,)
    return torch.cat(found)


def finite(number: float) -> float | None:
    """JSON knows no NaN."""
    return number if math.isfinite(number) else None


def run(job: dict, groups: Callable[[ByteTransformer], list[dict]]) -> dict:
    """Adapt by groups, and train. Returns the job with what came out."""
    (old, new), quick = texts(), job["quick"]
    model, windows = copy.deepcopy(base(quick)), 16 if quick else 128
    torch.manual_seed(job["seed"])
    optimizer = torch.optim.AdamW(groups(model), weight_decay=0)
    train(model, new["train"], optimizer, 10 if quick else 150, job["seed"], lambda step, loss: None, batch=8)
    moved = (weights(model) - weights(base(quick))).norm().item()
    losses = validate(model, new["valid"], windows), validate(model, old["valid"], windows)
    return job | dict(zip(("new", "old", "moved"), map(finite, (*losses, moved)), strict=True))


def one(job: dict) -> dict:
    return run(job, lambda model: prepare(model, job["method"], job["lr"]))


# ------------------------------------------------------------------------------------------------ all runs


def sweep(job: Callable[[dict], dict], jobs: list[dict]) -> list[dict]:
    """job of each of jobs, in their order: a process for every core, with one thread in each."""
    with ProcessPoolExecutor(torch.get_num_threads(), get_context("spawn"), torch.set_num_threads, (1,)) as pool:
        progress, found = Progress("runs", len(jobs)), []
        for result in pool.map(job, jobs):
            found.append(result)
            progress(len(found))
    return found


def experiment(name: str, about: str, job: Callable[[dict], dict], plan: Callable[[bool], list[dict]],
               report: Callable[[dict], str], draw: Callable[[dict, object], None], size=(8, 3.6)) -> None:
    """The command line that the experiments share: run and keep the numbers, or read them; then tables and figure."""
    parser = argparse.ArgumentParser(description=about.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="the whole path in seconds, too short for good figures")
    parser.add_argument("--redraw", action="store_true", help="tables and figure from the numbers of the last run")
    parser.add_argument("--out", type=Path, help="folder of the numbers and the figure (default: examples/figures)")
    args = parser.parse_args()
    start, out = time.monotonic(), args.out or (CACHE if args.quick else HERE / "figures")
    numbers = out / f"{name}.json"
    if args.redraw:
        found = json.loads(numbers.read_text(encoding="utf-8"))
    else:
        found = {"torch": torch.__version__, "where": where("cpu"), "peft": None, "quick": args.quick}
        if PEFT:
            import peft

            found["peft"] = peft.__version__
        model, windows = base(args.quick), 16 if args.quick else 128
        found["before"] = {which: validate(model, text["valid"], windows)
                           for which, text in zip(("old", "new"), texts(), strict=True)}
        found["norm"] = weights(model).norm().item()
        found["runs"] = sweep(job, [dict(job, quick=args.quick) for job in plan(args.quick)])
        found["took"] = round(time.monotonic() - start)
        out.mkdir(exist_ok=True)
        rows = ",\n  ".join(json.dumps(run) for run in found["runs"])  # a run on a line
        head = json.dumps(found | {"runs": []}, indent=1)
        numbers.write_text(head.replace('"runs": []', f'"runs": [\n  {rows}\n ]') + "\n", encoding="utf-8")
    print(f"\n{report(found)}\n{measured(found)}")
    if not found["peft"]:
        print("peft is not installed: its DeLoRA is left out.")
    if importlib.util.find_spec("matplotlib"):
        picture(functools.partial(draw, found), out / f"{name}.svg", size)
        print(f"Figure and numbers: {os.path.relpath(out / name)}.svg, {os.path.relpath(numbers)}")
    else:
        print("matplotlib is not installed: no figure.")


# ------------------------------------------------------------------------------------------------ tables, pictures


def over_seeds(runs: Iterable[dict], key: str, **which) -> list[float]:
    """That number of all runs that match which, one for each seed; infinite where a run diverged."""
    chosen = [run[key] for run in runs if all(run[k] == v for k, v in which.items())]
    return [math.inf if value is None else value for value in chosen]


def picture(draw: Callable, path: Path, size: tuple[float, float]) -> None:
    """A figure on white, legible in a dark page too. The same numbers give the same file."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams |= {"svg.hashsalt": "delora", "axes.spines.top": False, "axes.spines.right": False}
    from matplotlib import pyplot

    figure = pyplot.figure(figsize=size, layout="constrained", facecolor="white")
    draw(figure)
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
    pyplot.close(figure)


def curve(axes, x: list[float], values: list[list[float]], name: str, **style) -> None:
    """The mean over seeds as a line, from the lowest to the highest seed as a band."""
    means = [statistics.fmean(v) for v in values]
    axes.plot(x, means, label=name, markersize=4, **style)
    ends = [[end(v) for v in values] for end in (min, max)]
    axes.fill_between(x, *ends, color=style["color"], alpha=0.2, linewidth=0)


# ------------------------------------------------------------------------------------------------ the learning rate


def plan(quick: bool) -> list[dict]:
    rates, seeds = (RATES[2::4], SEEDS[:2]) if quick else (RATES, SEEDS)
    return [{"method": m, "lr": lr, "seed": seed} for m in METHODS for lr in rates for seed in seeds]


def width(rates: list[float], losses: list[float], limit: float) -> tuple[float, bool]:
    """How many decades around the best rate have a loss up to limit, and whether they end before the sweep does."""
    best = losses.index(min(losses))
    if losses[best] > limit:
        return 0.0, True
    total, inside = 0.0, True
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


def report(found: dict) -> str:
    runs = found["runs"]
    rates, methods = ([*dict.fromkeys(run[key] for run in runs)] for key in ("lr", "method"))
    lines, wide = [], max(23, *(len(method) + 1 for method in methods))
    for key, title in (("new", f"Loss on the new text (before: {found['before']['new']:.2f}), nats per byte"),
                       ("old", f"Loss on the old text (before: {found['before']['old']:.2f}), nats per byte"),
                       ("moved", f"‖W' - W‖, with ‖W‖ = {found['norm']:.0f}")):
        lines += [f"{title}, mean over seeds", f"  {'lr':{wide}}" + "".join(f"{lr:>9.1e}" for lr in rates)]
        for method in methods:
            means = [statistics.fmean(over_seeds(runs, key, method=method, lr=lr)) for lr in rates]
            lines += [f"  {method:{wide}}" + "".join(f"{m:>9.{1 + (key != 'moved')}f}" for m in means)]
        lines += [""]
    curves = {m: [*zip(*(over_seeds(runs, "new", method=m, lr=lr) for lr in rates), strict=True)] for m in methods}
    least = min(statistics.fmean(min(losses) for losses in curves[m]) for m in methods if m != FULL)
    lines += [f"  {f'decades within {NEAR} of':{wide}}{'its own best':>22}{'the best adapter':>22}   loss, rate"]
    for method in methods:
        cells = []
        for limit in (None, least + NEAR):
            found = [width(rates, [*c], min(c) + NEAR if limit is None else limit) for c in curves[method]]
            numbers, more = [w for w, _ in found], "" if all(inside for _, inside in found) else "+"
            cells += [f"{statistics.fmean(numbers):.2f}{more} ({min(numbers):.2f} to {max(numbers):.2f})"]
        means = [statistics.fmean(losses) for losses in zip(*curves[method], strict=True)]
        best = f"best {min(means):.3f} at {rates[means.index(min(means))]:.1e}"
        lines += [f"  {method:{wide}}{cells[0]:>22}{cells[1]:>22}   {best}"]
    return "\n".join(lines)


def draw(found: dict, figure) -> None:
    runs, before = found["runs"], found["before"]["new"]
    rates, methods = ([*dict.fromkeys(run[key] for run in runs)] for key in ("lr", "method"))
    left, right = figure.subplots(1, 2)
    for method in methods:
        style = {"color": COLOURS[method], "marker": MARKERS[method]}
        for axes, key in ((left, "new"), (right, "moved")):  # what is far above the picture only has to be above it
            values = [[min(v, 1e6) for v in over_seeds(runs, key, method=method, lr=lr)] for lr in rates]
            curve(axes, rates, values, method, **style)
    for axes, height, what in ((left, before, "before training"), (right, found["norm"], "‖W‖")):
        axes.axhline(height, color="black", linewidth=0.8, linestyle=":")
        axes.annotate(what, (rates[0], height), (0, 3), textcoords="offset points", fontsize=8)
        axes.set(xscale="log", xlabel="learning rate")
    lowest = min(min(over_seeds(runs, "new", method=method)) for method in methods)
    left.set(ylim=(lowest - 0.05, before + 0.4), ylabel="nats per byte")
    left.set_title("Loss on the new text", fontsize=10)
    right.set(yscale="log", ylim=(None, 1e5), ylabel="‖W' − W‖")
    right.set_title("Distance from the pretrained weights", fontsize=10)
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False, fontsize=9)


if __name__ == "__main__":
    experiment("robustness", __doc__, one, plan, report, draw)
