"""What the examples and experiments share: texts, a small model, its training, the methods, the
pictures.

Nothing here is about DeLoRA itself. The text ships inside CPython, so that nothing is downloaded:
English is the reference manual that `help()` shows, Python the modules of the standard library. The
model is a byte-level transformer of 0.9 million parameters, pretrained on the English once and kept
in examples/.cache.

Needs torch and delora. peft and matplotlib are used where they are installed.
"""

import argparse
import contextlib
import copy
import functools
import hashlib
import importlib.metadata
import importlib.util
import io
import json
import math
import os
import pydoc_data.topics
import re
import statistics
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context, parent_process
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

from delora import DeLoRALinear, inject, param_groups

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results"
CACHE = HERE.parent / ".cache"
PEFT = importlib.util.find_spec("peft") is not None
MATPLOTLIB = importlib.util.find_spec("matplotlib") is not None

CONTEXT, WIDTH, LAYERS, HEADS = 128, 128, 4, 4
BATCH = 16
PRETRAINING_STEPS = 600
QUICK_STEPS = 20
LEAVES = ("q", "k", "v", "o", "up", "down")  # the linear layers of a block


# ------------------------------------------------------------------------------------------------
# Texts
# ------------------------------------------------------------------------------------------------


def split(data):
    """The first nine tenths of data to train on, the last to validate on, as bytes 0 ... 255."""
    text = torch.frombuffer(bytearray(data), dtype=torch.uint8)  # (bytes,)
    end = len(text) * 9 // 10
    return {"train": text[:end], "valid": text[end:]}


@functools.cache
def english():
    """The reference manual that `help()` shows: about half a megabyte."""
    topics = pydoc_data.topics.topics
    pages = [topics[name] for name in sorted(topics)]
    return split("\n\n".join(pages).encode())


@functools.cache
def python():
    """The modules at the top of the standard library: about 5 MB of source code."""
    files = sorted(Path(os.__file__).parent.glob("*.py"))
    return split(b"\n\n".join(path.read_bytes() for path in files))


# ------------------------------------------------------------------------------------------------
# Model
# ------------------------------------------------------------------------------------------------


class Block(nn.Module):
    """Pre-norm attention and MLP."""

    def __init__(self, width=WIDTH):
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.q = nn.Linear(width, width, bias=False)
        self.k = nn.Linear(width, width, bias=False)
        self.v = nn.Linear(width, width, bias=False)
        self.o = nn.Linear(width, width, bias=False)
        self.norm2 = nn.LayerNorm(width)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)

    def forward(self, x):
        h = self.norm1(x)  # (batch, time, width)
        q = self.heads(self.q(h))  # (batch, heads, time, width / heads)
        k = self.heads(self.k(h))
        v = self.heads(self.v(h))
        h = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.o(h.transpose(1, 2).flatten(-2))  # (batch, time, width)
        return x + self.down(F.gelu(self.up(self.norm2(x))))

    @staticmethod
    def heads(h):
        """(batch, time, width) to (batch, heads, time, width / heads)."""
        return h.unflatten(-1, (HEADS, -1)).transpose(1, 2)


class ByteTransformer(nn.Module):
    """A causal language model over bytes."""

    def __init__(self, width=WIDTH, layers=LAYERS):
        super().__init__()
        self.token = nn.Embedding(256, width)
        self.position = nn.Embedding(CONTEXT, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 256, bias=False)
        for name, p in self.named_parameters():
            if p.dim() < 2:
                continue
            adds_to_the_residual = "down" in name or ".o." in name
            nn.init.normal_(p, std=0.02 / (2 * layers) ** 0.5 if adds_to_the_residual else 0.02)

    def forward(self, tokens):
        x = self.token(tokens) + self.position.weight[: tokens.shape[1]]  # (batch, time, width)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))  # (batch, time, 256)


# ------------------------------------------------------------------------------------------------
# Training
# ------------------------------------------------------------------------------------------------


def loss_of(model, windows):
    """Mean cross-entropy, in nats per byte, of windows (batch, time + 1)."""
    logits = model(windows[:, :-1])  # (batch, time, 256)
    return F.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())


def windows_at(text, starts, device="cpu"):
    """Windows (batch, time + 1) of text that begin at starts, as int64."""
    rows = [text[i : i + CONTEXT + 1] for i in starts]
    return torch.stack(rows).long().to(device)


@torch.no_grad()
def validate(model, text, windows=128):
    """The loss on windows spread evenly over text, the same ones at every call."""
    device = next(model.parameters()).device
    starts = torch.linspace(0, len(text) - CONTEXT - 1, windows).long().tolist()
    total = 0.0
    for batch in windows_at(text, starts, device).split(BATCH):
        total += loss_of(model, batch).item() * len(batch)
    return total / windows


def rounding(logits):
    """How far logits may be apart that were computed in two ways: by the sums of all layers."""
    terms = LAYERS * (4 * WIDTH + WIDTH + 4 * WIDTH) + WIDTH  # q, k, v, o, up and down; the head
    return 8 * torch.finfo(logits.dtype).eps * terms * logits.abs().max().item()


class Progress:
    """One line, rewritten on a terminal; a line for every fifth of the way in a log."""

    def __init__(self, label, steps):
        self.label = label
        self.steps = steps
        self.start = time.monotonic()
        self.fifth = 0

    def __call__(self, step, loss=None):
        spent = time.monotonic() - self.start
        left = spent / step * (self.steps - step)
        bar = "#" * (step * 20 // self.steps)
        loss = "" if loss is None else f"loss {loss:.3f}, "
        count = f"{step}/{self.steps}, {loss}{spent:.0f} s, {left:.0f} s left"
        line = f"  {self.label} {bar:.<20} {count}"
        if sys.stdout.isatty():
            print(f"\r{line:<78}", end="\n" if step == self.steps else "", flush=True)
        elif step * 5 // self.steps > self.fifth:
            self.fifth = step * 5 // self.steps
            print(line, flush=True)


def decay(steps):
    """The share of the learning rate at each step: warm-up over 6 %, then linear decay to zero."""
    warmup = max(1, steps * 6 // 100)
    return lambda step: min((step + 1) / warmup, (steps - step) / steps)


def warm_up(steps):
    """The share of the learning rate at each step: it rises over so many steps, and stays whole."""
    return lambda step: min((step + 1) / steps, 1.0)


def train(model, text, optimizer, steps, seed, watch, share=None, batch=BATCH):
    """Steps of the optimiser on random windows of text.

    After each, watch(step, loss) is called. share(step) says which part of the learning rate a step
    has, `decay(steps)` if None.
    """
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(seed)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, share or decay(steps))
    model.train()
    for step in range(1, steps + 1):
        starts = torch.randint(len(text) - CONTEXT, (batch,), generator=generator).tolist()
        loss = loss_of(model, windows_at(text, starts, device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        watch(step, loss.item())
    model.eval()


def pretrained(steps=PRETRAINING_STEPS, device="cpu"):
    """The model pretrained on English, from the cache if it is there and whole.

    The cache file begins with the SHA-256 of what follows, so that damage is noticed. Its name
    holds a hash of the text and of all that shapes the model, so that a change of either is noticed
    too.
    """
    text = english()["train"]
    shape = (CONTEXT, WIDTH, LAYERS, HEADS, BATCH, steps, torch.__version__)
    recipe = repr(shape).encode() + bytes(text.tolist())
    path = CACHE / f"pretrained-{hashlib.sha256(recipe).hexdigest()[:16]}.pt"
    if path.exists():
        data = path.read_bytes()
        if hashlib.sha256(data[32:]).digest() == data[:32]:
            model = ByteTransformer()
            model.load_state_dict(torch.load(io.BytesIO(data[32:]), weights_only=True))
            print(f"  from the cache: {path.name}")
            return model.to(device).eval()
        print(f"  the cache file {path.name} is damaged: pretraining again")
    torch.manual_seed(0)
    model = ByteTransformer().to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3, weight_decay=0.01)
    train(model, text, optimizer, steps, 0, Progress("pretraining", steps))
    buffer = io.BytesIO()
    torch.save({name: tensor.cpu() for name, tensor in model.state_dict().items()}, buffer)
    CACHE.mkdir(exist_ok=True)
    draft = path.with_suffix(f".{os.getpid()}")  # renamed when complete: nobody sees half a file
    draft.write_bytes(hashlib.sha256(buffer.getvalue()).digest() + buffer.getvalue())
    draft.replace(path)
    return model


# ------------------------------------------------------------------------------------------------
# Methods
# ------------------------------------------------------------------------------------------------

FROZEN = "frozen layer"
FULL = "full fine-tuning"
LORA = "LoRA"
PEFT_LORA = "PEFT LoRA"
PEFT_DORA = "PEFT DoRA"
PEFT_DELORA = "PEFT DeLoRA"
OURS = "DeLoRA"
# A figure has no background: each colour has to be seen on a white page and on a dark one (a test
# computes the contrasts). A method has its own in every figure.
COLOURS = {
    LORA: "#d23c1c",
    PEFT_DORA: "#9955bb",
    FULL: "#228833",
    PEFT_DELORA: "#cc7711",
    OURS: "#1f78d1",
}
GREY = "#757c84"  # text, axes, lines to compare with
TEAL, PINK, OLIVE = "#0a93a3", "#d6479a", "#8f8000"  # for what is no method
MARKERS = {LORA: "s", PEFT_DORA: "D", FULL: "^", PEFT_DELORA: "v", OURS: "o"}


class PlainLoRA(nn.Module):
    """LoRA as it is usually written, from B = 0, with α = r: two F.linear and an add."""

    def __init__(self, base, r):
        super().__init__()
        like = {"dtype": torch.float32, "device": base.weight.device}
        self.base = base.requires_grad_(False)
        self.A = nn.Parameter(torch.empty(r, base.in_features, **like))  # (r, in)
        self.B = nn.Parameter(torch.zeros(base.out_features, r, **like))  # (out, r)
        nn.init.kaiming_uniform_(self.A, a=5**0.5)

    def forward(self, x):
        h = F.linear(x, self.A.to(x.dtype))  # (..., r)
        return self.base(x) + F.linear(h, self.B.to(x.dtype))  # (..., out)


def adapt(model, method, targets, r):
    """The model with those layers adapted by that method, everything else frozen."""
    model.requires_grad_(False)
    if method == OURS:
        inject(model, targets, r=r)
    elif method == LORA:
        for path, module in list(model.named_modules()):
            parent, _, leaf = path.rpartition(".")
            if leaf in targets:
                setattr(model.get_submodule(parent), leaf, PlainLoRA(module, r))
    elif method != FROZEN:
        import peft

        options = {"r": r, "target_modules": list(targets)}
        if method == PEFT_DELORA:
            config = peft.DeloraConfig(**options)
        else:
            config = peft.LoraConfig(lora_alpha=r, use_dora=method == PEFT_DORA, **options)
        model = peft.get_peft_model(model, config).base_model.model
    return model


def prepare(model, method, lr, lambda_lr=None):
    """Adapt model by that method, r = 8 on all blocks. Returns the groups for the optimiser.

    λ has half the rate of A and B unless lambda_lr is given.
    """
    lambda_lr = lr / 2 if lambda_lr is None else lambda_lr
    if method == FULL:
        return [{"params": [*model.parameters()], "lr": lr}]
    adapt(model, method, LEAVES, r=8)
    if method == OURS:
        return param_groups(model, lr, lambda_lr=lambda_lr)
    strengths, others = [], []
    for name, p in model.named_parameters():
        if p.requires_grad:
            group = strengths if "delora_lambda" in name else others  # PEFT's name
            group.append(p)
    return [{"params": others, "lr": lr}, {"params": strengths, "lr": lambda_lr}]


def without_peft(methods):
    """Those of the methods that can be run here."""
    return [method for method in methods if PEFT or not method.startswith("PEFT")]


def deloras(model):
    """The DeLoRA of every layer that has one, by the layer's name."""
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, DeLoRALinear):
            found[name] = module.delora
    return found


@torch.no_grad()
def weights(model):
    """What the layers of all blocks apply, in one row, measured from their outputs.

    A layer maps row j of the identity to column j of its weight, plus the bias.
    """
    found = []
    for block in model.blocks:
        for leaf in LEAVES:
            layer = getattr(block, leaf)
            n_in = 4 * WIDTH if leaf == "down" else WIDTH
            columns = layer(torch.eye(n_in)) - layer(torch.zeros(1, n_in))  # (in, out)
            found.append(columns.flatten())
    return torch.cat(found)


# ------------------------------------------------------------------------------------------------
# Experiments: many runs, kept as JSON, a report and a picture
# ------------------------------------------------------------------------------------------------

SEEDS = (0, 1, 2)
NEAR = 0.05  # nats per byte from a method's best: the range whose width is reported


@functools.cache
def base(quick):
    """The pretrained model, once for each process. Only the first of them says what it does."""
    steps = QUICK_STEPS if quick else PRETRAINING_STEPS
    if parent_process() is None:
        return pretrained(steps)
    with contextlib.redirect_stdout(io.StringIO()):
        return pretrained(steps)


def finite(number):
    """JSON knows no NaN."""
    return number if math.isfinite(number) else None


def adapted_and_trained(job, groups, look=lambda model: {}):
    """Adapt by groups(model), which returns an optimiser's groups, and train. The job with what
    came out, and with what look(model) finds.
    """
    quick = job["quick"]
    windows = 16 if quick else 128
    model = copy.deepcopy(base(quick))
    torch.manual_seed(job["seed"])
    optimizer = torch.optim.AdamW(groups(model), weight_decay=0)
    steps = 10 if quick else 150
    train(model, python()["train"], optimizer, steps, job["seed"], lambda step, loss: None, batch=8)
    moved = (weights(model) - weights(base(quick))).norm().item()
    new = validate(model, python()["valid"], windows)
    old = validate(model, english()["valid"], windows)
    return job | {"new": finite(new), "old": finite(old), "moved": finite(moved)} | look(model)


def sweep(one, jobs):
    """one(job) of each of jobs, in their order: a process for every core, one thread in each."""
    cores = torch.get_num_threads()
    pool = ProcessPoolExecutor(cores, get_context("spawn"), torch.set_num_threads, (1,))
    progress = Progress("runs", len(jobs))
    found = []
    with pool:
        for result in pool.map(one, jobs):
            found.append(result)
            progress(len(found))
    return found


def where(device):
    """The machine, for a caption."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo")
    known = re.search(r"model name\s*: (.*)", info.read_text()) if info.exists() else None
    return f"{torch.get_num_threads()} cores of {known[1] if known else 'a CPU'}"


def versions(device, quick):
    """What a report says at its end."""
    found = {"torch": torch.__version__, "where": where(device), "peft": None, "quick": quick}
    if PEFT:
        found["peft"] = importlib.metadata.version("peft")
    return found


def measured(found):
    peft = f", peft {found['peft']}" if found["peft"] else ""
    quick = ", --quick" if found["quick"] else ""
    how = f"torch {found['torch']}{peft}{quick}"
    return f"Measured on {found['where']} with {how}, in {found['took']} s."


def write_json(found, path):
    """The numbers, a run on a line."""
    rows = ",\n  ".join(json.dumps(run) for run in found["runs"])
    head = json.dumps(found | {"runs": []}, indent=1)
    text = head.replace('"runs": []', f'"runs": [\n  {rows}\n ]')
    path.parent.mkdir(exist_ok=True, parents=True)
    path.write_text(text + "\n", encoding="utf-8")


def experiment(name, about, one, plan, report, draw, size=(8, 3.6), with_peft=False):
    """The command line that the experiments share: run and keep the numbers, or read them; then
    show.

    about is the script's docstring; plan(quick) the jobs, one(job) what came out of it;
    report(found) the tables; draw(found, figure) the picture. with_peft: some methods are peft's.
    """
    parser = argparse.ArgumentParser(description=about.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="the whole path in seconds")
    parser.add_argument("--redraw", action="store_true", help="show the numbers of the last run")
    parser.add_argument("--out", type=Path, help="folder of numbers and figure (default: results)")
    args = parser.parse_args()
    start = time.monotonic()
    out = args.out or (CACHE if args.quick else RESULTS)
    numbers = out / f"{name}.json"
    if args.redraw and not numbers.exists():
        parser.error(f"{numbers} is not there: run without --redraw first")
    if args.redraw:
        found = json.loads(numbers.read_text(encoding="utf-8"))
    else:
        windows = 16 if args.quick else 128
        model = base(args.quick)
        old = validate(model, english()["valid"], windows)
        new = validate(model, python()["valid"], windows)
        jobs = plan(args.quick)
        for job in jobs:
            job["quick"] = args.quick
        found = versions("cpu", args.quick)
        found["before"] = {"old": old, "new": new}
        found["norm"] = weights(model).norm().item()
        found["runs"] = sweep(one, jobs)
        found["took"] = round(time.monotonic() - start)
        write_json(found, numbers)
    print(f"\n{report(found)}\n{measured(found)}")
    if with_peft and not found["peft"]:
        print("peft is not installed: its methods are left out.")
    if MATPLOTLIB:
        picture(functools.partial(draw, found), out / f"{name}.svg", size)
        print(f"Figure and numbers: {os.path.relpath(out / name)}.svg, {os.path.relpath(numbers)}")
    else:
        print("matplotlib is not installed: no figure.")


def over_seeds(runs, key, **which):
    """run[key] of every run that matches which, one for each seed; infinite if it diverged."""
    chosen = []
    for run in runs:
        if all(run[name] == value for name, value in which.items()):
            chosen.append(math.inf if run[key] is None else run[key])
    return chosen


def per_step(found, key, **which):
    """What a run keeps as one number a step: at every step a list of one for each seed."""
    runs = over_seeds(found["runs"], key, **which)
    steps = []
    for values in zip(*runs, strict=True):
        # min() and max() pass over NaN, but not over infinity
        steps.append([math.inf if v is not None and math.isnan(v) else v for v in values])
    return steps


def each(runs, key):
    """The values of run[key], each once, in the order of the runs."""
    return list(dict.fromkeys(run[key] for run in runs))


def spread(values, form):
    """The mean, and in brackets the lowest and the highest."""
    mean = statistics.fmean(values)
    return f"{mean:{form}} ({min(values):{form}} to {max(values):{form}})"


def picture(draw, path, size):
    """A figure without a background, in a GREY that is legible on a white page and on a dark one.

    The same numbers give the same file.
    """
    import matplotlib

    matplotlib.use("Agg")
    style = {"svg.hashsalt": "delora", "axes.spines.top": False, "axes.spines.right": False}
    for surface in ("figure.facecolor", "axes.facecolor"):
        style[surface] = "none"
    texts = ("text.color", "axes.labelcolor", "axes.titlecolor")
    for part in (*texts, "axes.edgecolor", "xtick.color", "ytick.color"):
        style[part] = GREY
    matplotlib.rcParams.update(style)
    from matplotlib import pyplot

    figure = pyplot.figure(figsize=size, layout="constrained")
    draw(figure)
    path.parent.mkdir(exist_ok=True, parents=True)
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
    pyplot.close(figure)


def curve(axes, x, values, name, **style):
    """The mean over seeds as a line, from the lowest to the highest seed as a band."""
    style = {"markersize": 4} | style
    means = [statistics.fmean(seeds) for seeds in values]
    lowest = [min(seeds) for seeds in values]
    highest = [max(seeds) for seeds in values]
    axes.plot(x, means, label=name, **style)
    axes.fill_between(x, lowest, highest, color=style["color"], alpha=0.2, linewidth=0)
