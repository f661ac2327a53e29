# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.4", "matplotlib"]
# ///
"""A picture of the method: the ball, the angle and the strength, on the smallest layer that has all three.

    python examples/geometry.py            train three layers, print where they end, and draw the figure: seconds
    python examples/geometry.py --quick    the same, into examples/.cache

A layer with one input and two outputs has a weight W of two numbers, a point in the plane, and so is its update. With
r = 1 and w = 1 DeLoRA's learned term is λ b̂ (â is 1 or -1), a point on the circle of radius λ around the origin. The
frozen copy shifts it, so W + ΔW = (W - λ b̂₀ â₀) + λ b̂ â is on a circle of radius λ that starts in W. Training turns b̂
along the circle and sets λ, which scales the whole step from W. Nothing leaves the ball of radius 2λ around W.

Drawn are real runs of SGD towards the same target, at three learning rates, for LoRA and for DeLoRA with λ fixed.

Needs torch. Without matplotlib there is no figure, which is said.
"""
