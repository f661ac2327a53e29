# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.4", "matplotlib"]
# ///
"""A picture of the method: the ball, the angle and the strength, on the smallest layer that has all three.

    python examples/geometry.py            train six layers, print where they end, draw the figure: seconds
    python examples/geometry.py --quick    the same, into examples/.cache

A layer with one input and two outputs has a weight W of two numbers, a point in the plane, and so is every update. With
r = 1 the learned term λ w b̂ â is an arrow of length λw (â is 1 or -1 here, w is the length of W). The frozen copy is
subtracted, so W + ΔW lies on a circle of radius λw around W - λ w b̂₀ â₀, and starts in W. Training turns b̂ (the angle),
which walks along the circle, and sets λ (the strength), which scales the way from W. Nothing leaves the ball of radius
2λw around W: the points that turn b̂ all the way round reach it.

Drawn are real runs: 40 steps of SGD towards one target, at three learning rates. LoRA's steps grow with A and B, and at
the highest rate they leave the picture. DeLoRA, here with λ = 0.8 fixed to show the circle, cannot.

Needs torch. Without matplotlib there is no figure, which is said.
"""

import argparse
import functools
import importlib.util
import math
import os

import torch
from benchmark import HERE, LORA, OURS, PlainLoRA
from quickstart import CACHE
from robustness import COLOURS, picture
from torch import Tensor, nn

from delora import DeLoRALinear

W, TARGET = (1.0, 0.2), (0.2, 1.3)  # of one input and two outputs: points in the plane
STRENGTH, STEPS = 0.8, 40
RATES = (0.03, 0.3, 3.0)


def base() -> nn.Linear:
    layer = nn.Linear(1, 2, bias=False)
    layer.weight.data = torch.tensor(W).view(2, 1)
    return layer


def walk(layer: nn.Module, lr: float) -> list[Tensor]:
    """W + ΔW (2,) before and after every step of SGD on the squared distance to the target."""
    points, one = [], torch.ones(1)
    optimizer = torch.optim.SGD([p for p in layer.parameters() if p.requires_grad], lr=lr)
    for _ in range(STEPS + 1):
        point = layer(one)  # (2,)
        points.append(point.detach())
        optimizer.zero_grad()
        (point - torch.tensor(TARGET)).square().sum().backward()
        optimizer.step()
    return points


def lora() -> PlainLoRA:
    layer = PlainLoRA(base(), r=1)
    layer.A.data.fill_(1.0)
    return layer


def delora() -> DeLoRALinear:
    layer = DeLoRALinear(base(), r=1, lambda_init=STRENGTH)
    for name, value in {"A": [[1.0]], "A0": [[1.0]], "B": [[0.9], [-0.44]], "B0": [[0.9], [-0.44]]}.items():
        getattr(layer, f"delora_{name}").data = torch.tensor(value)
    layer.delora_lambda.requires_grad_(False)
    return layer


def report(walks: dict[str, list[list[Tensor]]], bound: float) -> str:
    lines = [f"Bound 2λw = {bound:.2f}; the target is {math.dist(W, TARGET):.2f} from W", "Farthest ‖ΔW‖ of the walk:"]
    for name, points in walks.items():
        far = [max((p - torch.tensor(W)).norm().item() for p in path) for path in points]
        lines += [f"  {name:8}" + ", ".join(f"{f:.3g} at lr {lr:g}" for f, lr in zip(far, RATES, strict=True))]
    return "\n".join(lines)


def draw(walks: dict[str, list[list[Tensor]]], centre: Tensor, radius: float, figure) -> None:
    panels = figure.subplots(1, 2)
    for axes, (name, paths) in zip(panels, walks.items(), strict=True):
        for path, lr, line in zip(paths, RATES, (":", "--", "-"), strict=True):
            x, y = zip(*(point.tolist() for point in path), strict=True)
            axes.plot(x, y, line, color=COLOURS[name], marker=".", markersize=4, linewidth=1, label=f"lr {lr:g}")
        axes.plot(*W, "o", color="black", markersize=5)
        axes.annotate("W", W, (7, -4), textcoords="offset points")
        axes.plot(*TARGET, "*", color="black", markersize=9)
        axes.annotate("target", TARGET, (-12, 12), textcoords="offset points")
        axes.set(aspect="equal", xlim=(-1.7, 2.9), ylim=(-1.6, 2.1), xlabel="first output's weight")
        axes.legend(frameon=False, fontsize=8, loc="lower left")
    panels[0].set_title("LoRA: a high rate leaves the picture", fontsize=10)
    panels[0].set_ylabel("second output's weight")
    axes = panels[1]
    axes.set_title("DeLoRA: turn b̂ along the circle, λ is its radius", fontsize=10)
    from matplotlib.patches import Circle

    axes.add_patch(Circle(centre.tolist(), radius, fill=False, color="black", linewidth=0.8))
    axes.add_patch(Circle(W, 2 * radius, fill=True, facecolor=COLOURS[OURS], alpha=0.08, linewidth=0))
    axes.add_patch(Circle(W, 2 * radius, fill=False, color="black", linewidth=0.8, linestyle="--"))
    axes.annotate("", W, centre.tolist(), arrowprops={"arrowstyle": "->", "color": "black"})
    axes.annotate("frozen λwb̂₀", ((W[0] + centre[0]) / 2, (W[1] + centre[1]) / 2), (-4, -12),
                  textcoords="offset points", fontsize=8, ha="right")
    end = walks[OURS][1][-1]
    axes.annotate("", end.tolist(), centre.tolist(), arrowprops={"arrowstyle": "->", "color": COLOURS[OURS]})
    axes.annotate("learned λwb̂", ((end + centre) / 2).tolist(), (-4, 4), textcoords="offset points", fontsize=8,
                  color=COLOURS[OURS], ha="right")
    axes.annotate("", end.tolist(), W, arrowprops={"arrowstyle": "->", "color": "#009988", "linewidth": 1.5})
    axes.annotate("ΔW", ((end + torch.tensor(W)) / 2).tolist(), (-24, -8), textcoords="offset points", color="#009988")
    axes.annotate("‖ΔW‖ ≤ 2λw", (W[0], W[1] - 2 * radius), (0, 6), textcoords="offset points", fontsize=8, ha="center")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="the same, into examples/.cache")
    path = (CACHE if parser.parse_args().quick else HERE / "figures") / "geometry.svg"
    walks = {LORA: [walk(lora(), lr) for lr in RATES], OURS: [walk(delora(), lr) for lr in RATES]}
    layer = delora()
    radius = STRENGTH * layer.delora_w_norm.item()
    centre = torch.tensor(W) - radius * nn.functional.normalize(layer.delora_B0.detach(), dim=0).squeeze(1)  # (2,)
    print(report(walks, layer.norm_bound()))
    if importlib.util.find_spec("matplotlib"):
        picture(functools.partial(draw, walks, centre, radius), path, (8, 3.9))
        print(f"Figure: {os.path.relpath(path)}")
    else:
        print("matplotlib is not installed: no figure.")


if __name__ == "__main__":
    main()
