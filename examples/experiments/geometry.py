# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.4", "numpy", "matplotlib"]
# ///
"""A picture of the method: the ball, the angle and the strength, on the smallest layer that has all
three.

    python examples/experiments/geometry.py            train six layers, draw the figure: seconds
    python examples/experiments/geometry.py --quick    the same, into examples/.cache

A layer with one input and two outputs has a weight W of two numbers, a point in the plane, and so
is every update. With r = 1 the learned term λ w b̂ â is an arrow of length λw (â is 1 or -1 here, w
is the length of W). The frozen copy is subtracted, so W + ΔW lies on a circle of radius λw around W
- λ w b̂₀ â₀, and starts in W. Training turns b̂ (the angle), which walks along the circle, and sets
λ (the strength), which scales the way from W. Nothing leaves the ball of radius 2λw around W: the
points that turn b̂ all the way round reach it.

Drawn are real runs: 40 steps of SGD towards one target, at three learning rates. LoRA's steps grow
with A and B, and at the highest rate they leave the picture. DeLoRA, here with λ = 0.8 fixed to
show the circle, cannot.

Without matplotlib there is no figure, which is said.
"""

import argparse
import functools
import math
import os

import torch
from common import CACHE, COLOURS, LORA, MATPLOTLIB, OURS, RESULTS, PlainLoRA, picture
from torch import nn

from delora import DeLoRALinear

W = (1.0, 0.2)  # of one input and two outputs: points in the plane
TARGET = (0.2, 1.3)
STRENGTH = 0.8
STEPS = 40
RATES = (0.03, 0.3, 3.0)


def base():
    layer = nn.Linear(1, 2, bias=False)
    layer.weight.data = torch.tensor(W).view(2, 1)
    return layer


def walk(layer, lr):
    """W + ΔW (2,) before and after every step of SGD on the squared distance to the target."""
    points = []
    trainable = [p for p in layer.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trainable, lr=lr)
    for _ in range(STEPS + 1):
        point = layer(torch.ones(1))  # (2,)
        points.append(point.detach())
        optimizer.zero_grad()
        (point - torch.tensor(TARGET)).square().sum().backward()
        optimizer.step()
    return points


def lora():
    layer = PlainLoRA(base(), r=1)
    layer.A.data.fill_(1.0)
    return layer


def delora():
    layer = DeLoRALinear(base(), r=1, lambda_init=STRENGTH)
    adapter = layer.delora
    for a in (adapter.A, adapter.A0):
        a.data.fill_(1.0)
    for b in (adapter.B, adapter.B0):
        b.data = torch.tensor([[0.9], [-0.44]])
    adapter.lam.requires_grad_(False)
    return layer


def report(walks, bound):
    lines = [f"Bound 2λw = {bound:.2f}; the target is {math.dist(W, TARGET):.2f} from W"]
    lines.append("Farthest ‖ΔW‖ of the walk:")
    for name, paths in walks.items():
        cells = []
        for path, lr in zip(paths, RATES, strict=True):
            far = max((point - torch.tensor(W)).norm().item() for point in path)
            cells.append(f"{far:.3g} at lr {lr:g}")
        lines.append(f"  {name:8}" + ", ".join(cells))
    return "\n".join(lines)


def draw(walks, centre, radius, figure):
    from matplotlib.patches import Circle

    panels = figure.subplots(1, 2)
    for axes, (name, paths) in zip(panels, walks.items(), strict=True):
        for path, lr, line in zip(paths, RATES, (":", "--", "-"), strict=True):
            x = [point[0].item() for point in path]
            y = [point[1].item() for point in path]
            style = {"color": COLOURS[name], "marker": ".", "markersize": 4, "linewidth": 1}
            axes.plot(x, y, line, label=f"lr {lr:g}", **style)
        axes.plot(*W, "o", color="black", markersize=5)
        axes.annotate("W", W, (7, -4), textcoords="offset points")
        axes.plot(*TARGET, "*", color="black", markersize=9)
        axes.annotate("target", TARGET, (-12, 12), textcoords="offset points")
        axes.set(aspect="equal", xlim=(-1.7, 2.9), ylim=(-1.6, 2.1))
        axes.set_xlabel("first output's weight")
        axes.legend(frameon=False, fontsize=8, loc="lower left")
    panels[0].set_title("LoRA: a high rate leaves the picture", fontsize=10)
    panels[0].set_ylabel("second output's weight")

    axes = panels[1]
    axes.set_title("DeLoRA: turn b̂ along the circle, λ is its radius", fontsize=10)
    centre = centre.tolist()
    end = walks[OURS][1][-1].tolist()
    blue, green = COLOURS[OURS], "#009988"
    outline = {"fill": False, "color": "black", "linewidth": 0.8}
    axes.add_patch(Circle(centre, radius, **outline))
    axes.add_patch(Circle(W, 2 * radius, facecolor=blue, alpha=0.08, linewidth=0))
    axes.add_patch(Circle(W, 2 * radius, linestyle="--", **outline))
    small = {"textcoords": "offset points", "fontsize": 8}

    def arrow(tail, head, colour, width=1.0):
        style = {"arrowstyle": "->", "color": colour, "linewidth": width}
        axes.annotate("", head, tail, arrowprops=style)

    def middle(tail, head):
        return (tail[0] + head[0]) / 2, (tail[1] + head[1]) / 2

    arrow(centre, W, "black")
    axes.annotate("frozen λwb̂₀", middle(centre, W), (-4, -12), ha="right", **small)
    arrow(centre, end, blue)
    axes.annotate("learned λwb̂", middle(centre, end), (-4, 4), color=blue, ha="right", **small)
    arrow(W, end, green, 1.5)
    axes.annotate("ΔW", middle(W, end), (-24, -8), textcoords="offset points", color=green)
    axes.annotate("‖ΔW‖ ≤ 2λw", (W[0], W[1] - 2 * radius), (0, 6), ha="center", **small)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="the same, into examples/.cache")
    path = (CACHE if parser.parse_args().quick else RESULTS) / "geometry.svg"
    walks = {
        LORA: [walk(lora(), lr) for lr in RATES],
        OURS: [walk(delora(), lr) for lr in RATES],
    }
    adapter = delora().delora
    radius = STRENGTH * adapter.w.item()
    frozen = nn.functional.normalize(adapter.B0.detach(), dim=0).squeeze(1)  # b̂₀ (2,)
    centre = torch.tensor(W) - radius * frozen
    print(report(walks, adapter.norm_bound()))
    if MATPLOTLIB:
        picture(functools.partial(draw, walks, centre, radius), path, (8, 3.9))
        print(f"Figure: {os.path.relpath(path)}")
    else:
        print("matplotlib is not installed: no figure.")


if __name__ == "__main__":
    main()
