# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.4", "numpy", "matplotlib"]
# ///
"""A picture of the method: the angle, the strength and the ball, on the smallest layer that has all
three.

    python examples/experiments/geometry.py            train three layers, draw the figure: seconds
    python examples/experiments/geometry.py --quick    the same, into examples/.cache

A layer with one input and two outputs has a weight W of two numbers, a point in the plane, and so
is every update. With r = 1 the learned term λ w b̂ â is an arrow of length λw (â is 1 or -1 here, w
is the length of W). The frozen copy is subtracted, so W + ΔW lies on a circle of radius λw around
W - λ w b̂₀ â₀, and starts in W. Training turns b̂ (the angle), which walks along the circle, and
sets λ (the strength), which is the circle's size. Nothing leaves the ball of radius 2λw around W:
the point of the circle that is opposite W reaches it.

Drawn are real runs: 40 steps of SGD towards one target, all at the same learning rate. It is too
high for LoRA, whose steps grow with A and B until they leave the picture. DeLoRA cannot leave its
circle. It is trained with two values of λ, each fixed to show its circle, and the target lies
outside both: it comes as near as the circle does. To reach it λ would have to grow.

Without matplotlib there is no figure, which is said.
"""

import argparse
import functools
import math
import os

import torch
from common import (
    CACHE,
    COLOURS,
    GREY,
    LORA,
    MATPLOTLIB,
    OURS,
    RESULTS,
    TEAL,
    PlainLoRA,
    picture,
)
from torch import nn

from delora import DeLoRALinear

W = (1.0, 0.2)  # of one input and two outputs: points in the plane
TARGET = (0.2, 1.3)
STRENGTHS = (0.3, 0.6)  # λ; drawn to scale
STEPS = 40
RATE = 0.8


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


def delora(strength):
    layer = DeLoRALinear(base(), r=1, lambda_init=strength)
    adapter = layer.delora
    for a in (adapter.A, adapter.A0):
        a.data.fill_(1.0)
    for b in (adapter.B, adapter.B0):
        b.data = torch.tensor([[0.9], [-0.44]])
    adapter.lam.requires_grad_(False)
    return layer


def circle(layer):
    """Centre W - λ w b̂₀ (x, y) and radius λw of the circle on which W + ΔW lies."""
    adapter = layer.delora
    radius = (adapter.lam.detach() * adapter.w).item()
    frozen = nn.functional.normalize(adapter.B0, dim=0).squeeze(1)  # b̂₀ (2,); â₀ is 1
    centre = torch.tensor(W) - radius * frozen
    return centre.tolist(), radius


def runs():
    """LoRA's points, and by λ DeLoRA's points, centre, radius and bound."""
    found = {LORA: walk(lora(), RATE)}
    for strength in STRENGTHS:
        centre, radius = circle(delora(strength))
        bound = delora(strength).delora.norm_bound()
        found[strength] = (walk(delora(strength), RATE), centre, radius, bound)
    return found


def farthest(points):
    """The largest ‖ΔW‖ of a walk, infinite if it diverged."""
    distances = [math.dist(point.tolist(), W) for point in points]
    return math.inf if any(math.isnan(d) for d in distances) else max(distances)


def report(found):
    lines = [f"The target is {math.dist(W, TARGET):.2f} from W. Farthest ‖ΔW‖ at lr {RATE:g}:"]
    lines.append(f"  {LORA:17}{farthest(found[LORA]):.3g}")
    for strength in STRENGTHS:
        points, _, _, bound = found[strength]
        name = f"{OURS}, λ = {strength:g}"
        lines.append(f"  {name:17}{farthest(points):.3g}, bound 2λw = {bound:.3g}")
    return "\n".join(lines)


# ------------------------------------------------------------------------------------------------
# Figure
# ------------------------------------------------------------------------------------------------


def around(centre, radius, degrees):
    """The point at that angle of a circle."""
    angle = math.radians(degrees)
    return centre[0] + radius * math.cos(angle), centre[1] + radius * math.sin(angle)


def angle_of(centre, point):
    """The angle of a point of a circle, in degrees."""
    return math.degrees(math.atan2(point[1] - centre[1], point[0] - centre[0]))


def on_the_way(tail, head, share=0.5):
    return tail[0] + share * (head[0] - tail[0]), tail[1] + share * (head[1] - tail[1])


def label(axes, text, at, offset, **style):
    """Text beside a point: its middle so many typographic points right of it and above it."""
    style = {"fontsize": 9, "ha": "center", "va": "center"} | style
    axes.annotate(text, at, offset, textcoords="offset points", **style)


def arrow(axes, tail, head, colour, bend=0.0, **style):
    """From tail to head, bent to the right of the straight line by that part of its length."""
    style = {"arrowstyle": "-|>", "shrinkA": 0, "shrinkB": 0, "linewidth": 1.2} | style
    style |= {"color": colour, "connectionstyle": f"arc3,rad={bend}"}
    axes.annotate("", head, tail, arrowprops=style)


def ring(axes, centre, radius, **style):
    from matplotlib.patches import Circle

    axes.add_patch(Circle(centre, radius, linewidth=0.9, **style))


def dots(axes, points, colour):
    """The points of a walk after the first, which is W; the last one is larger."""
    x = [point[0].item() for point in points[1:]]
    y = [point[1].item() for point in points[1:]]
    axes.plot(x, y, "o", color=colour, markersize=3.5)
    axes.plot(x[-1], y[-1], "o", color=colour, markersize=6)


def draw_lora(axes, points):
    """Three steps: over the target, back over W, and out of the picture."""
    red, bottom = COLOURS[LORA], -1.7
    start, first, second, third = [point.tolist() for point in points[:4]]
    dots(axes, points[:3], red)
    in_sight = (bottom - second[1]) / (third[1] - second[1])  # that share of the third step
    edge = on_the_way(second, third, in_sight)
    short = {"shrinkA": 4, "shrinkB": 4}
    arrow(axes, start, first, red, bend=0.25, **short)
    arrow(axes, first, second, red, bend=0.4, **short)
    arrow(axes, second, edge, red, shrinkA=4)
    label(axes, "W", W, (10, 6))
    label(axes, "target", TARGET, (3, -12))
    label(axes, "step 1", first, (9, 6), ha="left", color=red)
    label(axes, "step 2", second, (9, 3), ha="left", color=red)
    text = f"step 3, to ({third[0]:.0f}, {third[1]:.0f})".replace("-", "−")
    label(axes, text, on_the_way(second, edge), (-12, -6), ha="right", color=red)
    axes.set(xlim=(-1, 3), ylim=(bottom, 2.3), xticks=(-1, 0, 1, 2, 3), yticks=(-1, 0, 1, 2))


def draw_angle(axes, points, centre, radius):
    """One circle: the frozen arrow to W, the learned arrow, and ΔW from one head to the other."""
    blue = COLOURS[OURS]
    end = points[-1].tolist()
    ring(axes, centre, radius, fill=False, color=blue)
    dots(axes, points, blue)
    arrow(axes, centre, W, GREY, shrinkB=3)
    arrow(axes, centre, end, blue, shrinkB=3)
    arrow(axes, W, end, TEAL, shrinkA=3, shrinkB=3)
    axes.plot(*centre, "o", color=GREY, markersize=3.5)
    first = angle_of(centre, W)
    sweep = angle_of(centre, end) - first
    outside = []  # an arc along the walk
    for n in range(21):
        outside.append(around(centre, 1.18 * radius, first + sweep * (0.2 + n / 40)))
    axes.plot(*zip(*outside[:-1], strict=True), color=blue, linewidth=1.2)
    arrow(axes, outside[-2], outside[-1], blue)
    label(axes, "W", W, (10, -5))
    label(axes, "target", TARGET, (-8, 0), ha="right")
    label(axes, "W − λwb̂$_0$", centre, (-16, -13))
    label(axes, "λwb̂$_0$", on_the_way(centre, W, 0.3), (4, 8), rotation=first)
    label(axes, "λwb̂", on_the_way(centre, end), (-14, -2), color=blue)
    label(axes, "ΔW", on_the_way(W, end), (12, 8), color=TEAL)
    label(axes, "training\nturns b̂", outside[10], (7, 8), ha="left", color=blue)
    axes.set(xlim=(-0.4, 1.6), ylim=(-0.4, 1.6), xticks=(0, 0.5, 1, 1.5), yticks=(0, 0.5, 1, 1.5))


def draw_strength(axes, walks):
    """Two circles through W, and their balls around W."""
    blue = COLOURS[OURS]
    for points, centre, radius, bound in walks:
        ring(axes, W, bound, facecolor=blue, edgecolor="none", alpha=0.08)
        ring(axes, W, bound, fill=False, color=GREY, linestyle="--")
        ring(axes, centre, radius, fill=False, color=blue)
        dots(axes, points, blue)
    (_, inner, _, _), (_, outer, radius, bound) = walks
    blue_text = {"color": blue, "fontsize": 8}
    label(axes, f"λ = {STRENGTHS[0]:g}", inner, (0, 0), **blue_text)
    label(axes, f"λ = {STRENGTHS[1]:g}", around(outer, 0.52 * radius, 190), (0, 0), **blue_text)
    arrow(axes, W, around(W, bound, -40), GREY, arrowstyle="-")
    label(axes, "2λw", around(W, 0.75 * bound, -40), (9, 8))
    label(axes, "W", W, (0, -13))
    label(axes, "target", TARGET, (-8, 0), ha="right")
    axes.set(xlim=(-0.4, 2.4), ylim=(-1.2, 1.6), xticks=(0, 1, 2), yticks=(-1, 0, 1))


def draw(found, figure):
    panels = figure.subplots(1, 3)
    titles = (
        f"LoRA, lr {RATE:g}: steps grow",
        f"DeLoRA, lr {RATE:g}: the angle turns",
        "DeLoRA: λ is the size of the circle",
    )
    for axes, title in zip(panels, titles, strict=True):
        axes.plot(*W, "o", color=GREY, markersize=6)
        axes.plot(*TARGET, "*", color=GREY, markersize=10)
        axes.set_aspect("equal")
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("first output's weight")
    panels[0].set_ylabel("second output's weight")
    walks = [found[strength] for strength in STRENGTHS]
    draw_lora(panels[0], found[LORA])
    draw_angle(panels[1], *walks[-1][:3])
    draw_strength(panels[2], walks)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="the same, into examples/.cache")
    path = (CACHE if parser.parse_args().quick else RESULTS) / "geometry.svg"
    found = runs()
    print(report(found))
    if MATPLOTLIB:
        picture(functools.partial(draw, found), path, (9.6, 3.5))
        print(f"Figure: {os.path.relpath(path)}")
    else:
        print("matplotlib is not installed: no figure.")


if __name__ == "__main__":
    main()
