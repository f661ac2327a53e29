# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.4", "peft>=0.21", "matplotlib"]
# ///
"""What an adapted layer costs, beside the frozen layer, plain LoRA and PEFT: time, memory, and how far from the floor.

    python examples/benchmark.py                  all tables for this machine, and a figure: about three minutes
    python examples/benchmark.py --device cuda --dtype bfloat16    and a Llama-3-8B-shaped stack, eager and compiled
    python examples/benchmark.py --quick          the same path in seconds, too short for figures to quote

Every figure is a ratio. In a round each implementation takes one forward and backward pass, gradient to x included, one
after the other in an order that changes; the ratios are of two times in one round, and the table has their median and,
in brackets, their quartiles. So whatever slows the machine down slows both. On a GPU, CUDA events take the time.

The floors are what any implementation of the same update has to spend in one forward and backward pass:

    operations    4·T·in·out for the frozen layer (y, and the gradient of x); for an update of rank k whose factors have
                  r trainable components 4·T·k·(in + out) + 2·T·r·(in + out) more. LoRA: k = r. DeLoRA: k = 2r.
    bytes         W twice, x, y and their gradients once each, the trainable factors and their gradients once each

The time at the floor is the larger of operations / rate and bytes / bandwidth, at the highest rate and bandwidth that
were seen on this machine: in a large matrix product, in a large copy, or in one of the layers.

Needs torch. Without peft its columns are left empty; without matplotlib there is no figure. Both are said.
"""

import argparse
import importlib.util
import json
import os
import re
import shutil
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path

warnings.filterwarnings("ignore", message="Failed to initialize NumPy")  # torch without numpy, which is not needed
HERE = Path(__file__).resolve().parent
sys.path.append(str(HERE.parent))  # delora.py is there, also where it is not installed

import quickstart
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from delora import inject

PEFT = importlib.util.find_spec("peft") is not None
SHAPES = ((1024, 768, 768, 8), (1024, 2048, 2048, 16), (4096, 768, 3072, 16), (256, 1024, 1024, 8),
          (16, 2048, 2048, 16))  # tokens, in, out, r
FEW = 64  # tokens; shapes with fewer are not in the medians: there every small operation shows, and nothing else
FROZEN, LORA, PEFT_LORA, PEFT_DELORA, OURS = "frozen layer", "LoRA", "PEFT LoRA", "PEFT DeLoRA", "DeLoRA"
NAMES = (FROZEN, LORA, PEFT_LORA, PEFT_DELORA, OURS)


# ------------------------------------------------------------------------------------------------ what is compared


class PlainLoRA(nn.Module):
    """LoRA as it is usually written, from B = 0, with α = r: two F.linear and an add."""

    def __init__(self, base: nn.Linear, r: int):
        super().__init__()
        like = {"dtype": torch.float32, "device": base.weight.device}
        self.base = base.requires_grad_(False)
        self.A = nn.Parameter(nn.init.kaiming_uniform_(torch.empty(r, base.in_features, **like), a=5**0.5))  # (r, in)
        self.B = nn.Parameter(torch.zeros(base.out_features, r, **like))  # (out, r)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + F.linear(F.linear(x, self.A.to(x.dtype)), self.B.to(x.dtype))  # (..., out)


def adapt(model: nn.Module, name: str, targets: list[str], r: int) -> nn.Module:
    """The model with those layers adapted in the way of that name, everything else frozen."""
    model.requires_grad_(False)
    if name == OURS:
        inject(model, targets, r=r)
    elif name == LORA:
        for path, module in [*model.named_modules()]:
            if path.rpartition(".")[2] in targets:
                parent, _, child = path.rpartition(".")
                setattr(model.get_submodule(parent), child, PlainLoRA(module, r))
    elif name != FROZEN:
        import peft

        config = peft.LoraConfig if name == PEFT_LORA else peft.DeloraConfig
        model = peft.get_peft_model(model, config(r=r, target_modules=targets)).base_model.model
    return model


def one_layer(name: str, n_in: int, n_out: int, r: int, **like) -> nn.Module:
    torch.manual_seed(0)
    return adapt(nn.ModuleDict({"layer": nn.Linear(n_in, n_out, **like)}), name, ["layer"], r)["layer"]


# ------------------------------------------------------------------------------------------------ clocks


def seconds(step: Callable[[], object], device: str) -> float:
    if device != "cuda":
        start = time.perf_counter()
        step()
        return time.perf_counter() - start
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    step()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1000


def side_by_side(steps: dict[str, Callable[[], object]], budget: float, device: str) -> dict[str, list[float]]:
    """Seconds of every step in every round, for about budget seconds, at least five rounds."""
    times, names = {name: [] for name in steps}, [*steps]
    for _ in range(2):  # what is allocated, compiled or chosen at the first call
        for step in steps.values():
            step()
    end = time.monotonic() + budget
    while time.monotonic() < end or len(times[names[0]]) < 5:
        for name in names:
            times[name].append(seconds(steps[name], device))
        names = names[1:] + names[:1]
    return times


def ratio(times: dict[str, list[float]], name: str, against: str) -> list[float] | None:
    """[median, lower quartile, upper quartile] of the ratio within a round."""
    if name not in times or against not in times:
        return None
    low, middle, high = statistics.quantiles([a / b for a, b in zip(times[name], times[against], strict=True)], n=4)
    return [middle, low, high]


def forward_backward(layer: nn.Module, x: Tensor, g: Tensor) -> Callable[[], None]:
    def step() -> None:
        layer(x.detach().requires_grad_()).backward(g)
        for p in layer.parameters():
            p.grad = None

    return step


# ------------------------------------------------------------------------------------------------ floors


def operations(tokens: int, n_in: int, n_out: int, k: int, r: int) -> int:
    """Of y and the gradient of x through W and an update of rank k, and of the gradients of r components."""
    return 4 * tokens * n_in * n_out + (4 * k + 2 * r) * tokens * (n_in + n_out)


def traffic(tokens: int, n_in: int, n_out: int, r: int, item: int) -> int:
    """Bytes: W twice, x, y and their gradients, and in float32 the trainable factors and their gradients."""
    return item * (2 * n_in * n_out + 2 * tokens * (n_in + n_out)) + 4 * 2 * r * (n_in + n_out)


def ranks(name: str, r: int) -> tuple[int, int]:
    """(rank of the update, trainable components). PEFT's DeLoRA has no frozen copy, so its update has rank r."""
    return {FROZEN: (0, 0), OURS: (2 * r, r)}.get(name, (r, r))


def machine(device: str, dtype: torch.dtype, quick: bool) -> tuple[float, float]:
    """Operations a second of a large matrix product, and bytes a second of a large copy: the best of several."""
    n = 512 if quick else 8192 if device == "cuda" else 2048
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    c, d = (torch.zeros(64 * n * n // 16, device=device) for _ in range(2))
    product = side_by_side({"": lambda: torch.mm(a, b)}, 0.1 if quick else 2, device)[""]
    copy = side_by_side({"": lambda: c.copy_(d)}, 0.1 if quick else 2, device)[""]
    return 2 * n**3 / min(product), 2 * c.nbytes / min(copy)


# ------------------------------------------------------------------------------------------------ memory, step, inject


def kept(name: str, tokens: int, width: int, r: int) -> float:
    """MiB kept for the backward pass of q, k and v on one x (tokens, width), beyond x and the parameters."""
    layers = [one_layer(name, width, width, r) for _ in range(3)]
    x = torch.randn(tokens, width, requires_grad=True)
    known = {t.untyped_storage().data_ptr() for t in (x, *(p for layer in layers for p in layer.parameters()))}
    storages = {}

    def pack(t: Tensor) -> Tensor:
        storages[t.untyped_storage().data_ptr()] = t.untyped_storage()  # held, so that no other gets its address
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        outputs = [layer(x) for layer in layers]
    assert all(y.requires_grad for y in outputs)
    return sum(s.nbytes() for pointer, s in storages.items() if pointer not in known) / 2**20


def training_step(name: str, device: str) -> Callable[[], None]:
    """Forward, backward and AdamW of the quickstart's model, q and v adapted with r = 8."""
    torch.manual_seed(0)
    model = adapt(quickstart.ByteTransformer(), name, ["q", "v"], 8).to(device)
    text = quickstart.english()["train"][: quickstart.BATCH * (quickstart.CONTEXT + 1)]
    windows = text.view(quickstart.BATCH, -1).long().to(device)  # (batch, time + 1)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)

    def step() -> None:
        loss = quickstart.loss_of(model, windows)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


LLAMA_7B = {"q": (4096, 4096), "k": (4096, 4096), "v": (4096, 4096), "o": (4096, 4096),
            "gate": (4096, 11008), "up": (4096, 11008), "down": (11008, 4096)}  # (in, out) of a decoder layer


def injection(quick: bool) -> tuple[float, float]:
    """Milliseconds a linear layer, r = 16: of all 224 on the meta device; of one decoder layer's seven in float32,
    beyond a single read of their weights. The median of several."""

    def decoder_layer(shrink: int = 1, device: str = "cpu") -> dict[str, nn.Linear]:
        return {n: nn.Linear(i // shrink, o // shrink, False, device) for n, (i, o) in LLAMA_7B.items()}

    inject(nn.ModuleDict(decoder_layer(device="meta")), "all-linear")  # at the first one torch imports a second's worth
    meta = nn.ModuleList(nn.ModuleDict(decoder_layer(device="meta")) for _ in range(32))
    on_meta = seconds(lambda: inject(meta, "all-linear", r=16), "cpu") / 224
    real, beyond = decoder_layer(8 if quick else 1), []
    for _ in range(2 if quick else 7):
        model = nn.ModuleDict(real)
        read = seconds(lambda: [layer.weight.sum() for layer in real.values()], "cpu")
        beyond.append((seconds(lambda model=model: inject(model, "all-linear", r=16), "cpu") - read) / len(real))
    return 1000 * on_meta, 1000 * statistics.median(beyond)


# ------------------------------------------------------------------------------------------------ a stack, for a GPU


class Attention(nn.Module):
    """The four linear layers of a decoder layer's attention with grouped keys, and what stands between them."""

    def __init__(self, width: int, **like):
        super().__init__()
        self.norm = nn.LayerNorm(width, **like)
        shapes = {"q": (width, width), "k": (width, width // 4), "v": (width, width // 4), "o": (width, width)}
        self.q, self.k, self.v, self.o = (nn.Linear(*shape, bias=False, **like) for shape in shapes.values())

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)  # (batch, time, width)
        q, k, v = (p(h).unflatten(-1, (-1, 128)).transpose(1, 2) for p in (self.q, self.k, self.v))  # (b, h, t, 128)
        k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], dim=1) for t in (k, v))  # (b, h, t, 128)
        return x + self.o(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(-2))


def stack(device: str, dtype: torch.dtype, names: list[str], budget: float, quick: bool) -> dict:
    """Forward and backward of a stack shaped like Llama-3 8B's attention: q, k, v and o adapted, r = 16. On a CPU
    torch.compile needs g++; without it the stack runs eager only."""
    width, batch, context, layers = (512, 1, 64, 1) if quick else (4096, 4, 2048, 4)
    x = torch.randn(batch, context, width, device=device, dtype=dtype)
    rows = []
    for compiled in (False, True) if device == "cuda" or shutil.which("g++") else (False,):
        steps, peaks = {}, {}
        for name in names:
            torch.manual_seed(0)
            model = nn.Sequential(*(Attention(width, device=device, dtype=dtype) for _ in range(layers)))
            model = adapt(model, name, ["q", "k", "v", "o"], 16)
            step = forward_backward(torch.compile(model) if compiled else model, x, torch.ones_like(x))
            for _ in range(2):  # the second pass has the memory of every later one
                if device == "cuda":
                    torch.cuda.synchronize()
                    torch.cuda.reset_peak_memory_stats()
                    before = torch.cuda.memory_allocated()
                step()
                if device == "cuda":
                    peaks[name] = (torch.cuda.max_memory_allocated() - before) / 2**20
            steps[name] = step
        times = side_by_side(steps, budget, device)
        rows += [{"compiled": compiled, "name": name, "ms": 1000 * statistics.median(times[name]),
                  "ratio": ratio(times, name, FROZEN), "peak": peaks.get(name)} for name in names]
    return {"layers": layers, "width": width, "tokens": batch * context, "rows": rows}


# ------------------------------------------------------------------------------------------------ tables


def cell(value: list[float] | None, spread: bool = True) -> str:
    return "-" if value is None else f"{value[0]:.2f}" + (f" ({value[1]:.2f}-{value[2]:.2f})" if spread else "")


def line(label: object, cells: list[str], width: int = 19) -> str:
    label = ", ".join(map(str, label)) if isinstance(label, (list, tuple)) else label
    return f"  {label:22}" + "".join(f"{c:>{width}}" for c in cells)


def report(found: dict) -> str:
    """The tables, from what speed.json holds."""
    shapes, peers = found["shapes"], NAMES[:-1]
    lines = [f"Forward and backward of one adapted layer in {found['dtype']}: time / the frozen layer's (quartiles)"]
    lines += [line("tokens, in, out, r", NAMES[1:])]
    lines += [line(row["shape"], [cell(row["frozen"][name]) for name in NAMES[1:]]) for row in shapes]
    lines += ["", "Time of DeLoRA / each other's (quartiles)", line("tokens, in, out, r", peers)]
    lines += [line(row["shape"], [cell(row["ours"][name]) for name in peers]) for row in shapes]
    many = [row for row in shapes if row["shape"][0] >= FEW]
    medians = {n: [statistics.median(row["ours"][n][0] for row in many)] if many[0]["ours"][n] else None for n in peers}
    lines += [line(f"median, from {FEW} tokens", [cell(medians[name], spread=False) for name in peers])]
    # A product or a copy may have met a slow moment: what a layer was seen to reach, the machine can do.
    done = [(row["floor"][n], row["ms"][n] / 1000) for row in shapes for n in NAMES if row["ms"][n]]
    rate = max(found["rate"], *(floor["operations"] / time for floor, time in done))
    bandwidth = max(found["bandwidth"], *(floor["bytes"] / time for floor, time in done))
    machine = f"{rate / 1e9:.0f} GFLOP/s, {bandwidth / 1e9:.0f} GB/s"
    lines += ["", f"Time / the floor of the same method ({machine}), and the floor of DeLoRA"]
    lines += [line("tokens, in, out, r", [*NAMES, "GFLOP", "MiB", "ms"], 14)]
    for row in shapes:
        least = {n: 1000 * max(f["operations"] / rate, f["bytes"] / bandwidth) for n, f in row["floor"].items()}  # ms
        above = [f"{row['ms'][n] / least[n]:.2f}" if row["ms"][n] else "-" for n in NAMES]
        floor = row["floor"][OURS]
        numbers = [f"{floor['operations'] / 1e9:.2f}", f"{floor['bytes'] / 2**20:.1f}", f"{least[OURS]:.2f}"]
        lines += [line(row["shape"], [*above, *numbers], 14)]
    (tokens, width, r), kept = found["kept"]["shape"], found["kept"]
    lines += ["", f"MiB kept for backward beyond x and the parameters, q, k, v on {tokens} x {width}, r = {r}:"]
    lines += ["  " + ", ".join(f"{name} {kept[name]:.2f}" for name in NAMES[1:] if name in kept)]
    lines += ["A training step of the quickstart's model, q and v adapted, time of DeLoRA / each other's:"]
    lines += ["  " + ", ".join(f"{name} {cell(found['step'][name])}" for name in peers if found["step"][name])]
    lines += ["Injection into the shapes of Llama 7B, ms a linear layer:"]
    on_meta, beyond = found["injection"]
    lines += [f"  {on_meta:.1f} on the meta device, {beyond:.1f} in float32 beyond one read of its weight"]
    if "stack" in found:
        shape = "{layers} of width {width}, {tokens} tokens".format(**found["stack"])
        lines += [f"Attention layers with q, k, v and o adapted, {shape}: time / the frozen stack's (quartiles)"]
    for row in found.get("stack", {}).get("rows", []):
        peak = "" if row["peak"] is None else f", {row['peak']:.0f} MiB above the parameters at the peak"
        lines += [f"  {'compiled' if row['compiled'] else 'eager':8} {row['name']:14}{cell(row['ratio'])}, "
                  f"{row['ms']:.1f} ms{peak}"]
    return "\n".join(lines)


def draw(found: dict, path: Path) -> None:
    """The ratios to the frozen layer, per shape."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    colours = {LORA: "#999999", PEFT_LORA: "#6699cc", PEFT_DELORA: "#cc7722", OURS: "#228844"}
    names = [n for n in NAMES[1:] if found["shapes"][0]["frozen"][n] is not None]
    figure, axes = pyplot.subplots(figsize=(8, 3.6), layout="constrained", facecolor="white")
    for i, name in enumerate(names):
        values = [row["frozen"][name] for row in found["shapes"]]
        places = [x + (i - (len(names) - 1) / 2) * 0.2 for x in range(len(values))]
        bars = [[v[0] - v[1] for v in values], [v[2] - v[0] for v in values]]
        heights = [v[0] - 1 for v in values]
        axes.bar(places, heights, 0.18, bottom=1, yerr=bars, color=colours[name], label=name, capsize=2)
    axes.axhline(1, color="black", linewidth=1)
    labels = ["{} tokens\n{} to {}\nr = {}".format(*row["shape"]) for row in found["shapes"]]
    axes.set_xticks(range(len(labels)), labels)
    axes.margins(y=0.15)
    axes.set_ylabel("time / that of the frozen layer")
    axes.set_title(f"Forward + backward of one layer, {found['dtype']} on {found['where']}", fontsize=10)
    axes.legend(ncols=len(names), frameon=False, fontsize=9)
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
    pyplot.close(figure)


def where(device: str) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo")
    known = re.search(r"model name\s*: (.*)", info.read_text()) if info.exists() else None
    return f"{torch.get_num_threads()} cores of {known[1] if known else 'a CPU'}"


def measured(found: dict) -> str:
    peft = f", peft {found['peft']}" if found["peft"] else ""
    how = f"torch {found['torch']}{peft}{', --quick' * found['quick']}"
    return f"Measured on {found['where']} with {how}, in {found['took']} s."


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"), help="of W and x")
    parser.add_argument("--seconds", type=float, default=20, help="for each shape (default: 20)")
    parser.add_argument("--quick", action="store_true", help="the whole path in seconds, on small shapes")
    parser.add_argument("--out", type=Path, help="folder of the numbers and the figure (default: examples/figures)")
    parser.add_argument("--redraw", action="store_true", help="tables and figure from the last run's numbers")
    args = parser.parse_args()
    start, out = time.monotonic(), args.out or (quickstart.CACHE if args.quick else HERE / "figures")
    # The README shows a CPU in float32. Another device or dtype has files of its own beside that.
    name = "speed" if (args.device, args.dtype) == ("cpu", "float32") else f"speed-{args.device}-{args.dtype}"
    numbers, figure = out / f"{name}.json", out / f"{name}.svg"
    device, dtype, budget = args.device, getattr(torch, args.dtype), 0.3 if args.quick else args.seconds
    if device == "cuda" and not torch.cuda.is_available():
        sys.exit("--device cuda: torch finds no GPU here.")
    if args.redraw:
        found = json.loads(numbers.read_text())
    else:
        found = measure(device, dtype, budget, args.quick)
        found["took"] = round(time.monotonic() - start)
        out.mkdir(exist_ok=True)
        numbers.write_text(json.dumps(found, indent=1) + "\n")
    print(f"\n{report(found)}\n\n{measured(found)}")
    if not found["peft"]:
        print("peft is not installed: its columns are empty.")
    if importlib.util.find_spec("matplotlib"):
        draw(found, figure)
        print(f"Figure and numbers: {os.path.relpath(figure)}, {os.path.relpath(numbers)}")
    else:
        print("matplotlib is not installed: no figure.")


def measure(device: str, dtype: torch.dtype, budget: float, quick: bool) -> dict:
    names = [name for name in NAMES if PEFT or "PEFT" not in name]
    like, found = {"device": device, "dtype": dtype}, {"dtype": str(dtype).removeprefix("torch."), "quick": quick}
    found |= {"torch": torch.__version__, "where": where(device), "peft": None, "shapes": []}
    if PEFT:
        import peft

        found["peft"] = peft.__version__
    found["rate"], found["bandwidth"] = machine(device, dtype, quick)
    for shape in SHAPES:
        tokens, n_in, n_out, r = shape = tuple(max(n // 8, 2) for n in shape) if quick else shape
        print(f"  {tokens} tokens, {n_in} to {n_out}, r = {r} ...", flush=True)
        x, g = torch.randn(tokens, n_in, **like), torch.randn(tokens, n_out, **like)
        layers = {name: one_layer(name, n_in, n_out, r, **like) for name in names}
        times = side_by_side({name: forward_backward(layers[name], x, g) for name in names}, budget, device)
        floor = {}
        for name in NAMES:
            flops = operations(tokens, n_in, n_out, *ranks(name, r))
            size = traffic(tokens, n_in, n_out, ranks(name, r)[1], dtype.itemsize)
            floor[name] = {"operations": flops, "bytes": size}
        found["shapes"].append({
            "shape": shape, "rounds": len(times[OURS]), "floor": floor,
            "ms": {name: 1000 * statistics.median(times[name]) if name in times else None for name in NAMES},
            "frozen": {name: ratio(times, name, FROZEN) for name in NAMES},
            "ours": {name: ratio(times, OURS, name) for name in NAMES}})
    tokens, width, r = (128, 64, 4) if quick else (2048, 1024, 16)
    found["kept"] = {"shape": (tokens, width, r)} | {name: kept(name, tokens, width, r) for name in names}
    print("  a training step ...", flush=True)
    times = side_by_side({name: training_step(name, device) for name in names if name != FROZEN}, budget, device)
    found["step"] = {name: ratio(times, OURS, name) for name in NAMES}
    print("  injection ...", flush=True)
    found["injection"] = injection(quick)
    if device == "cuda" or quick:
        print("  a stack, eager and compiled ...", flush=True)
        found["stack"] = stack(device, dtype, names, budget, quick)
    return found


if __name__ == "__main__":
    main()
