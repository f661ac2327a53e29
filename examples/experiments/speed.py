# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.4", "numpy", "peft>=0.21", "matplotlib"]
# ///
"""What an adapted layer costs, beside the frozen layer, plain LoRA and PEFT: time and memory.

    python examples/experiments/speed.py            all tables and a figure: about three minutes
    python examples/experiments/speed.py --quick    in seconds, too short for figures to quote
    python examples/experiments/speed.py --device cuda --dtype bfloat16
                                                    and a stack like Llama-3 8B, also compiled

Every figure is a ratio. In a round each implementation takes one step, one after the other in an
order that changes; the ratios are of two times in one round, and the table has their median and, in
brackets, their quartiles. So whatever slows the machine down slows both. On a GPU, CUDA events take
the time. A step is a forward and backward pass, gradient to x included; or, as when text is
generated with the adapter on, a forward pass alone under torch.no_grad().

The floors are what any implementation of the same update has to spend in one forward and backward
pass:

    operations    4·T·in·out for the frozen layer (y, and the gradient of x); for an update of rank
                  k whose factors have r trainable components 4·T·k·(in + out) + 2·T·r·(in + out)
                  more. LoRA: k = r. DeLoRA: k = 2r.
    bytes         W twice, x, y and their gradients once each, the trainable factors and their
                  gradients once each

The time at the floor is the larger of operations / rate and bytes / bandwidth, at the highest rate
and bandwidth that were seen on this machine: in a large matrix product, in a large copy, or in a
layer.

Without peft its columns are left empty; without matplotlib there is no figure. Both are said.
"""

import argparse
import functools
import json
import os
import shutil
import statistics
import sys
import time
from pathlib import Path

import common
import torch
from common import (
    CACHE,
    FROZEN,
    LORA,
    MATPLOTLIB,
    OURS,
    PEFT_DELORA,
    PEFT_LORA,
    RESULTS,
    adapt,
    measured,
    picture,
    versions,
    without_peft,
)
from torch import nn
from torch.nn import functional as F
from width import RATES, share

from delora import inject, param_groups

BOTH, ALONE = "forward + backward", "forward, no_grad"
STEPS = (  # what, tokens, in, out, r
    (BOTH, 1024, 768, 768, 8),
    (BOTH, 1024, 2048, 2048, 16),
    (BOTH, 4096, 768, 3072, 16),
    (BOTH, 256, 1024, 1024, 8),
    (BOTH, 16, 2048, 2048, 16),
    (ALONE, 16, 2048, 2048, 16),
    (ALONE, 1, 2048, 2048, 16),
)
MANY = 256  # tokens; below that every small operation shows, and the row is in no median
METHODS = (FROZEN, LORA, PEFT_LORA, PEFT_DELORA, OURS)
COLOURS = common.COLOURS | {PEFT_LORA: common.COLOURS[LORA]}


# ------------------------------------------------------------------------------------------------
# Clocks
# ------------------------------------------------------------------------------------------------


def seconds(step, device):
    if device != "cuda":
        start = time.perf_counter()
        step()
        return time.perf_counter() - start
    start = torch.cuda.Event(enable_timing=True)
    end = torch.cuda.Event(enable_timing=True)
    start.record()
    step()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1000


def side_by_side(steps, budget, device):
    """Seconds of every step in every round, for about budget seconds, at least five rounds."""
    for _ in range(2):  # what is allocated, compiled or chosen at the first call
        for step in steps.values():
            step()
    times = {name: [] for name in steps}
    names = list(steps)
    end = time.monotonic() + budget
    while time.monotonic() < end or len(times[names[0]]) < 5:
        for name in names:
            times[name].append(seconds(steps[name], device))
        names = names[1:] + names[:1]
    return times


def ratio(times, name, against):
    """[median, lower quartile, upper quartile] of the ratio within a round."""
    if name not in times or against not in times:
        return None
    ratios = [a / b for a, b in zip(times[name], times[against], strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4)
    return [middle, low, high]


def one_layer(method, n_in, n_out, r, **like):
    torch.manual_seed(0)
    model = nn.ModuleDict({"layer": nn.Linear(n_in, n_out, **like)})
    return adapt(model, method, ["layer"], r)["layer"]


def forward_backward(layer, x, g):
    def step():
        layer(x.detach().requires_grad_()).backward(g)
        for p in layer.parameters():
            p.grad = None

    return step


def forward_alone(layer, x, g):
    @torch.no_grad()
    def step():
        layer(x)

    return step


# ------------------------------------------------------------------------------------------------
# Floors
# ------------------------------------------------------------------------------------------------


def operations(tokens, n_in, n_out, k, r):
    """Of y and the gradient of x through W and an update of rank k; of r components' gradients."""
    return 4 * tokens * n_in * n_out + (4 * k + 2 * r) * tokens * (n_in + n_out)


def traffic(tokens, n_in, n_out, r, item):
    """Bytes: W twice, x, y, the trainable factors in float32, and the gradients of these."""
    return item * (2 * n_in * n_out + 2 * tokens * (n_in + n_out)) + 4 * 2 * r * (n_in + n_out)


def ranks(method, r):
    """(rank of the update, trainable components). Without a frozen copy the rank is r."""
    if method == FROZEN:
        return 0, 0
    return (2 * r, r) if method == OURS else (r, r)


def machine(device, dtype, quick):
    """Operations a second of a large product, bytes a second of a large copy: the best seen."""
    n = 512 if quick else 8192 if device == "cuda" else 2048
    budget = 0.1 if quick else 2
    a = torch.randn(n, n, device=device, dtype=dtype)
    b = torch.randn(n, n, device=device, dtype=dtype)
    c = torch.zeros(4 * n * n, device=device)
    d = torch.zeros(4 * n * n, device=device)
    product = side_by_side({"": lambda: torch.mm(a, b)}, budget, device)[""]
    copy = side_by_side({"": lambda: c.copy_(d)}, budget, device)[""]
    return 2 * n**3 / min(product), 2 * c.nbytes / min(copy)


# ------------------------------------------------------------------------------------------------
# Memory, a training step, injection
# ------------------------------------------------------------------------------------------------


def kept(method, tokens, width, r):
    """MiB kept for the backward pass of q, k and v on one x (tokens, width), beyond x and
    parameters.
    """
    layers = [one_layer(method, width, width, r) for _ in range(3)]
    x = torch.randn(tokens, width, requires_grad=True)
    known = {x.untyped_storage().data_ptr()}
    for layer in layers:
        known.update(p.untyped_storage().data_ptr() for p in layer.parameters())
    storages = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage  # held, so that no other gets its address
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        outputs = [layer(x) for layer in layers]
    if not all(y.requires_grad for y in outputs):
        raise RuntimeError(f"{method}: an output without a gradient keeps nothing")
    beyond = [s.nbytes() for pointer, s in storages.items() if pointer not in known]
    return sum(beyond) / 2**20


def training_step(method, device):
    """Forward, backward and AdamW of the quickstart's model, q and v adapted with r = 8."""
    torch.manual_seed(0)
    model = adapt(common.ByteTransformer(), method, ["q", "v"], 8).to(device)
    text = common.english()["train"][: common.BATCH * (common.CONTEXT + 1)]
    windows = text.view(common.BATCH, -1).long().to(device)  # (batch, time + 1)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)

    def step():
        loss = common.loss_of(model, windows)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


def llama_7b_layer(shrink=1, device="cpu"):
    """The linear layers of one decoder layer."""
    shapes = {name: (4096, 4096) for name in ("q", "k", "v", "o")}
    shapes |= {"gate": (4096, 11008), "up": (4096, 11008), "down": (11008, 4096)}  # (in, out)
    layers = nn.ModuleDict()
    for name, (n_in, n_out) in shapes.items():
        layers[name] = nn.Linear(n_in // shrink, n_out // shrink, bias=False, device=device)
    return layers


def injection(quick):
    """Milliseconds a linear layer, r = 16: on the meta device; in float32 beyond a read of the
    weights.

    Of all 224 layers, and of one decoder layer's seven: the median of several.
    """
    inject(llama_7b_layer(device="meta"), "all-linear")  # at the first one torch imports much
    whole = nn.ModuleList(llama_7b_layer(device="meta") for _ in range(32))
    on_meta = seconds(lambda: inject(whole, "all-linear", r=16), "cpu") / 224
    layers = llama_7b_layer(8 if quick else 1)
    beyond = []
    for _ in range(2 if quick else 7):
        model = nn.ModuleDict(layers)
        read = seconds(lambda: [layer.weight.sum() for layer in layers.values()], "cpu")
        spent = seconds(lambda model=model: inject(model, "all-linear", r=16), "cpu")
        beyond.append((spent - read) / len(layers))
    return 1000 * on_meta, 1000 * statistics.median(beyond)


# ------------------------------------------------------------------------------------------------
# A stack, for a GPU
# ------------------------------------------------------------------------------------------------


class Attention(nn.Module):
    """The attention of a decoder layer, with grouped keys."""

    def __init__(self, width, **like):
        super().__init__()
        self.norm = nn.LayerNorm(width, **like)
        self.q = nn.Linear(width, width, bias=False, **like)
        self.k = nn.Linear(width, width // 4, bias=False, **like)
        self.v = nn.Linear(width, width // 4, bias=False, **like)
        self.o = nn.Linear(width, width, bias=False, **like)

    def forward(self, x):
        h = self.norm(x)  # (batch, time, width)
        q = self.heads(self.q(h))  # (batch, heads, time, 128)
        k = self.heads(self.k(h)).repeat_interleave(4, dim=1)
        v = self.heads(self.v(h)).repeat_interleave(4, dim=1)
        h = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return x + self.o(h.transpose(1, 2).flatten(-2))

    @staticmethod
    def heads(h):
        return h.unflatten(-1, (-1, 128)).transpose(1, 2)


def stack(device, dtype, methods, budget, quick):
    """Forward and backward of a stack shaped like Llama-3 8B's attention, q, k, v, o adapted, r =
    16.

    On a CPU torch.compile needs g++; without it the stack runs eager only.
    """
    width, batch, context, layers = (512, 1, 64, 1) if quick else (4096, 4, 2048, 4)
    x = torch.randn(batch, context, width, device=device, dtype=dtype)
    rows = []
    for compiled in (False, True):
        if compiled and device != "cuda" and not shutil.which("g++"):
            continue
        steps, peaks = {}, {}
        for method in methods:
            torch.manual_seed(0)
            blocks = [Attention(width, device=device, dtype=dtype) for _ in range(layers)]
            model = adapt(nn.Sequential(*blocks), method, ["q", "k", "v", "o"], 16)
            model = torch.compile(model) if compiled else model
            step = forward_backward(model, x, torch.ones_like(x))
            for _ in range(2):  # the second pass has the memory of every later one
                if device == "cuda":
                    torch.cuda.synchronize()
                    torch.cuda.reset_peak_memory_stats()
                    before = torch.cuda.memory_allocated()
                step()
                if device == "cuda":
                    peaks[method] = (torch.cuda.max_memory_allocated() - before) / 2**20
            steps[method] = step
        times = side_by_side(steps, budget, device)
        for method in methods:
            ms = 1000 * statistics.median(times[method])
            row = {"compiled": compiled, "name": method, "ms": ms, "peak": peaks.get(method)}
            rows.append(row | {"ratio": ratio(times, method, FROZEN)})
    return {"layers": layers, "width": width, "tokens": batch * context, "rows": rows}


def first_step(device, dtype, quick):
    """The share of full strength after one step of AdamW, of a block of width 4096, by learning
    rate: [lowest, highest] of three seeds. As in width.py, but on this device and in this dtype.
    """
    wide = 128 if quick else 4096
    found = {}
    for lr in RATES:
        shares = []
        for seed in common.SEEDS:
            torch.manual_seed(seed)
            model = common.ByteTransformer(wide, layers=1).to(device, dtype)
            inject(model, common.LEAVES, r=8)
            groups = param_groups(model, lr, lambda_lr=lr / 2)
            optimizer = torch.optim.AdamW(groups, weight_decay=0)
            constant = lambda step: 1.0  # noqa: E731
            silent = lambda step, loss: None  # noqa: E731
            text = common.python()["train"]
            common.train(model, text, optimizer, 1, seed, silent, constant, batch=2)
            shares.append(share(model, wide))
        found[f"{lr:.1e}"] = [min(shares), max(shares)]
    return {"width": wide, "shares": found}


# ------------------------------------------------------------------------------------------------
# All measurements
# ------------------------------------------------------------------------------------------------


def measure_step(what, shape, methods, budget, device, dtype):
    tokens, n_in, n_out, r = shape
    like = {"device": device, "dtype": dtype}
    x, g = torch.randn(tokens, n_in, **like), torch.randn(tokens, n_out, **like)
    make = forward_backward if what == BOTH else forward_alone
    steps = {m: make(one_layer(m, n_in, n_out, r, **like), x, g) for m in methods}
    times = side_by_side(steps, budget, device)
    row = {"what": what, "shape": shape, "rounds": len(times[OURS])}
    row |= {"floor": {}, "ms": {}, "frozen": {}, "ours": {}}
    for method in METHODS:
        k, trainable = ranks(method, r)
        row["floor"][method] = {
            "operations": operations(tokens, n_in, n_out, k, trainable),
            "bytes": traffic(tokens, n_in, n_out, trainable, dtype.itemsize),
        }
        took = times.get(method)
        row["ms"][method] = None if took is None else 1000 * statistics.median(took)
        row["frozen"][method] = ratio(times, method, FROZEN)
        row["ours"][method] = ratio(times, OURS, method)
    return row


def measure(device, dtype, budget, quick):
    methods = without_peft(METHODS)
    found = {"dtype": str(dtype).removeprefix("torch."), **versions(device, quick)}
    found["rate"], found["bandwidth"] = machine(device, dtype, quick)
    found["steps"] = []
    for what, *shape in STEPS:
        if quick:
            shape = [max(n // 8, 2) for n in shape]
        print("  {}: {} tokens, {} to {}, r = {} ...".format(what, *shape), flush=True)
        found["steps"].append(measure_step(what, shape, methods, budget, device, dtype))
    tokens, wide, r = (128, 64, 4) if quick else (2048, 1024, 16)
    found["kept"] = {"shape": (tokens, wide, r)}
    for method in methods:
        found["kept"][method] = kept(method, tokens, wide, r)
    print("  a training step ...", flush=True)
    steps = {m: training_step(m, device) for m in methods if m != FROZEN}
    times = side_by_side(steps, budget, device)
    found["step"] = {method: ratio(times, OURS, method) for method in METHODS}
    print("  injection ...", flush=True)
    found["injection"] = injection(quick)
    if device == "cuda" or quick:
        print("  a stack, eager and compiled ...", flush=True)
        found["stack"] = stack(device, dtype, methods, budget, quick)
        print("  the first step ...", flush=True)
        found["first"] = first_step(device, dtype, quick)
    return found


# ------------------------------------------------------------------------------------------------
# Tables and figure
# ------------------------------------------------------------------------------------------------


def cell(value):
    return "-" if value is None else f"{value[0]:.2f} ({value[1]:.2f}-{value[2]:.2f})"


def row_of(label, cells, width=19):
    return f"  {label:22}" + "".join(f"{text:>{width}}" for text in cells)


def label_of(row):
    return ", ".join(str(number) for number in row["shape"])


def median(rows, key, method):
    """The median over the shapes of many tokens."""
    ratios = [row[key][method] for row in rows if row["what"] == BOTH and row["shape"][0] >= MANY]
    if not ratios or None in ratios:
        return "-"
    return f"{statistics.median(r[0] for r in ratios):.2f}"


def ratio_table(rows, key, title, methods):
    lines = []
    for what in (BOTH, ALONE):
        lines += [f"{what}: {title}", row_of("tokens, in, out, r", methods)]
        for row in rows:
            if row["what"] == what:
                lines.append(row_of(label_of(row), [cell(row[key][m]) for m in methods]))
        if what == BOTH:
            medians = [median(rows, key, method) for method in methods]
            lines.append(row_of(f"median, from {MANY} tokens", medians))
        lines.append("")
    return lines


def floor_table(found):
    """What a layer was seen to reach, the machine can do, even if product or copy were slower."""
    rows = [row for row in found["steps"] if row["what"] == BOTH]
    rate, bandwidth = found["rate"], found["bandwidth"]
    for row in rows:
        for method, floor in row["floor"].items():
            if row["ms"][method]:
                rate = max(rate, 1000 * floor["operations"] / row["ms"][method])
                bandwidth = max(bandwidth, 1000 * floor["bytes"] / row["ms"][method])
    machine = f"{rate / 1e9:.0f} GFLOP/s, {bandwidth / 1e9:.0f} GB/s"
    lines = [f"{BOTH}: time / the floor of the same method ({machine}), and the floor of DeLoRA"]
    lines.append(row_of("tokens, in, out, r", [*METHODS, "GFLOP", "MiB", "ms"], 14))
    for row in rows:
        cells = []
        for method in METHODS:
            floor = row["floor"][method]
            least = 1000 * max(floor["operations"] / rate, floor["bytes"] / bandwidth)  # ms
            ms = row["ms"][method]
            cells.append(f"{ms / least:.2f}" if ms else "-")
        # the last method is DeLoRA
        cells += [f"{floor['operations'] / 1e9:.2f}", f"{floor['bytes'] / 2**20:.1f}"]
        lines.append(row_of(label_of(row), [*cells, f"{least:.2f}"], 14))
    return lines


def stack_table(found):
    stack = found["stack"]
    shape = f"{stack['layers']} of width {stack['width']}, {stack['tokens']} tokens"
    adapted = "Attention layers with q, k, v and o adapted"
    lines = [f"{adapted}, {shape}: time / the frozen stack's (quartiles)"]
    for row in stack["rows"]:
        how = "compiled" if row["compiled"] else "eager"
        line = f"  {how:8} {row['name']:14}{cell(row['ratio'])}, {row['ms']:.1f} ms"
        if row["peak"] is not None:
            line += f", {row['peak']:.0f} MiB above the parameters at the peak"
        lines.append(line)
    return lines


def report(found):
    """The tables, from what speed.json holds."""
    rows = found["steps"]
    lines = ratio_table(rows, "frozen", "time / the frozen layer's (quartiles)", METHODS[1:])
    lines += ratio_table(rows, "ours", "time of DeLoRA / each other's (quartiles)", METHODS[:-1])
    lines += [*floor_table(found), ""]
    tokens, width, r = found["kept"]["shape"]
    on_what = f"q, k, v on {tokens} x {width}, r = {r}"
    lines.append(f"MiB kept for backward beyond x and the parameters, {on_what}:")
    kept = [f"{m} {found['kept'][m]:.2f}" for m in METHODS[1:] if m in found["kept"]]
    lines.append("  " + ", ".join(kept))
    lines.append(
        "A training step of the quickstart's model, q and v adapted, DeLoRA / each other's:"
    )
    steps = [f"{m} {cell(found['step'][m])}" for m in METHODS[1:-1] if found["step"][m]]
    lines.append("  " + ", ".join(steps))
    on_meta, beyond = found["injection"]
    lines.append("Injection into the shapes of Llama 7B, ms a linear layer:")
    lines.append(f"  {on_meta:.1f} on the meta device, {beyond:.1f} in float32 beyond a read of W")
    if "stack" in found:
        lines += ["", *stack_table(found)]
        shares = []
        for lr, (low, high) in found["first"]["shares"].items():
            shares.append(f"{low:.2f} to {high:.2f} at {lr}")
        shape = f"width {found['first']['width']}, {found['dtype']}"
        lines.append(f"Share of full strength after one step of AdamW, {shape}:")
        lines.append("  " + ", ".join(shares))
    return "\n".join(lines)


def draw(found, figure):
    """The ratios to the frozen layer, a group of bars for each row."""
    axes = figure.subplots()
    rows = found["steps"]
    methods = [m for m in METHODS[1:] if rows[0]["frozen"][m] is not None]
    for i, method in enumerate(methods):
        values = [row["frozen"][method] for row in rows]
        places = [x + (i - (len(methods) - 1) / 2) * 0.2 for x in range(len(values))]
        heights = [middle - 1 for middle, _, _ in values]
        below = [middle - low for middle, low, _ in values]
        above = [high - middle for middle, _, high in values]
        colour = COLOURS[method]
        # pale, so that the line from quartile to quartile is seen on it; hollow for peft's LoRA
        fill = "none" if method == PEFT_LORA else (colour, 0.5)
        style = {"label": method, "facecolor": fill, "edgecolor": colour}
        style["error_kw"] = {"color": colour, "ecolor": colour, "capsize": 2}
        axes.bar(places, heights, 0.18, bottom=1, yerr=[below, above], **style)
    axes.axhline(1, color=common.GREY, linewidth=1)
    labels = []
    for row in rows:
        tokens, n_in, n_out, r = row["shape"]
        name = "" if row["what"] == BOTH else "\nno_grad"
        labels.append(f"{tokens} tokens\n{n_in} to {n_out}\nr = {r}{name}")
    axes.set_xticks(range(len(labels)), labels, fontsize=8)
    axes.margins(y=0.15)
    axes.set_ylabel("time / that of the frozen layer")
    axes.set_title(f"One layer, {found['dtype']} on {found['where']}", fontsize=10)
    axes.legend(ncols=len(methods), frameon=False, fontsize=9)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    dtypes = ("float32", "bfloat16", "float16")
    parser.add_argument("--dtype", default="float32", choices=dtypes, help="of W and x")
    parser.add_argument("--seconds", type=float, default=20, help="for each row (default: 20)")
    parser.add_argument("--quick", action="store_true", help="in seconds, on small shapes")
    parser.add_argument("--out", type=Path, help="folder of numbers and figure (default: results)")
    parser.add_argument("--redraw", action="store_true", help="show the numbers of the last run")
    args = parser.parse_args()
    if args.device == "cuda" and not args.redraw and not torch.cuda.is_available():
        sys.exit("--device cuda: torch finds no GPU here.")
    start = time.monotonic()
    out = args.out or (CACHE if args.quick else RESULTS)
    # The plain name is for a CPU in float32. Another device or dtype has files of its own.
    name = f"speed-{args.device}-{args.dtype}"
    if name == "speed-cpu-float32":
        name = "speed"
    numbers, svg = out / f"{name}.json", out / f"{name}.svg"
    if args.redraw:
        found = json.loads(numbers.read_text(encoding="utf-8"))
    else:
        budget = 0.3 if args.quick else args.seconds
        found = measure(args.device, getattr(torch, args.dtype), budget, args.quick)
        found["took"] = round(time.monotonic() - start)
        out.mkdir(exist_ok=True, parents=True)
        numbers.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(f"\n{report(found)}\n\n{measured(found)}")
    if not found["peft"]:
        print("peft is not installed: its columns are empty.")
    if MATPLOTLIB:
        picture(functools.partial(draw, found), svg, (9, 3.8))
        print(f"Figure and numbers: {os.path.relpath(svg)}, {os.path.relpath(numbers)}")
    else:
        print("matplotlib is not installed: no figure.")


if __name__ == "__main__":
    main()
