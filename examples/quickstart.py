"""DeLoRA from end to end on real text, on two CPU cores, offline, in at most two minutes.

    python examples/quickstart.py                 # the first run also pretrains and caches the model
    python examples/quickstart.py --quick         # the same path in seconds, too short for good losses
    python examples/quickstart.py --device cuda

A byte-level transformer of 0.9 million parameters is pretrained on the English documentation that ships inside CPython
(`pydoc_data.topics`), adapted with DeLoRA to Python source code (the standard library's own files), merged, saved,
and reloaded into a fresh copy of the pretrained model. The report at the end says what was trained, what it brought on
the new text and cost on the old, how far every layer moved beside the bound on how far it could, and whether merged
and reloaded models are the model that was trained.

Needs torch alone. The other examples import the model, the texts and the training loop from here.
"""

import argparse
import hashlib
import io
import os
import pydoc_data.topics
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path

warnings.filterwarnings("ignore", message="Failed to initialize NumPy")  # torch would like it; nothing here needs it

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from delora import adapter_state_dict, inject, load_adapter, merge, param_groups, unmerge

CACHE = Path(__file__).resolve().parent / ".cache"
CONTEXT, WIDTH, LAYERS, HEADS = 128, 128, 4, 4
BATCH = 16


# ------------------------------------------------------------------------------------------------ text


def split(data: bytes) -> dict[str, Tensor]:
    """The first nine tenths of data to train on, the last to validate on, as bytes 0 ... 255."""
    text = torch.frombuffer(bytearray(data), dtype=torch.uint8)  # (bytes,)
    return {"train": text[: len(text) * 9 // 10], "valid": text[len(text) * 9 // 10 :]}


def english() -> dict[str, Tensor]:
    """The reference manual that `help()` shows: about half a megabyte of English."""
    topics = pydoc_data.topics.topics
    return split("\n\n".join(topics[name] for name in sorted(topics)).encode())


def python() -> dict[str, Tensor]:
    """The modules at the top of the standard library: about 5 MB of source code, whole files on either side."""
    files = sorted(Path(os.__file__).parent.glob("*.py"))
    return split(b"\n\n".join(path.read_bytes() for path in files))


# ------------------------------------------------------------------------------------------------ model


class Block(nn.Module):
    """Pre-norm attention and MLP."""

    def __init__(self):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.q, self.k, self.v, self.o = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(4))
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm1(x)  # (batch, time, width)
        q, k, v = (p(h).unflatten(-1, (HEADS, -1)).transpose(1, 2) for p in (self.q, self.k, self.v))  # (b, h, t, w/h)
        h = F.scaled_dot_product_attention(q, k, v, is_causal=True)  # (b, h, t, w/h)
        x = x + self.o(h.transpose(1, 2).flatten(-2))  # (b, t, w)
        return x + self.down(F.gelu(self.up(self.norm2(x))))  # (b, t, w)


class ByteTransformer(nn.Module):
    """A causal language model over bytes."""

    def __init__(self):
        super().__init__()
        self.token, self.position = nn.Embedding(256, WIDTH), nn.Embedding(CONTEXT, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(LAYERS))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 256, bias=False)
        for name, p in self.named_parameters():
            if p.dim() == 2:
                nn.init.normal_(p, std=0.02 if "down" not in name and ".o." not in name else 0.02 / (2 * LAYERS) ** 0.5)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.token(tokens) + self.position.weight[: tokens.shape[1]]  # (b, t, w)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))  # (b, t, 256)


# ------------------------------------------------------------------------------------------------ training


def loss_of(model: nn.Module, windows: Tensor) -> Tensor:
    """Mean cross-entropy, in nats per byte, of windows (batch, time + 1)."""
    logits = model(windows[:, :-1])  # (b, t, 256)
    return F.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())


@torch.no_grad()
def validate(model: nn.Module, text: Tensor, windows: int = 128) -> float:
    """The loss on windows spread evenly over text, the same ones at every call."""
    device = next(model.parameters()).device
    starts = torch.linspace(0, len(text) - CONTEXT - 1, windows).long()
    batches = torch.stack([text[i : i + CONTEXT + 1] for i in starts.tolist()]).long().to(device).split(BATCH)
    return sum(loss_of(model, batch).item() * len(batch) for batch in batches) / windows


def rounding(logits: Tensor) -> float:
    """How far logits may be apart that were computed in two ways: a row of sums, over the inputs of every layer."""
    terms = LAYERS * (4 * WIDTH + WIDTH + 4 * WIDTH) + WIDTH  # q, k, v, o, up and down of every block, and the head
    return 8 * torch.finfo(logits.dtype).eps * terms * logits.abs().max().item()


class Progress:
    """One line that is rewritten on a terminal, and a line for every fifth of the way in a log. A step may be a run."""

    def __init__(self, label: str, steps: int):
        self.label, self.steps, self.start, self.fifth = label, steps, time.monotonic(), 0

    def __call__(self, step: int, loss: float | None = None) -> None:
        spent = time.monotonic() - self.start
        left = spent / step * (self.steps - step)
        loss = "" if loss is None else f"loss {loss:.3f}, "
        bar = f"{'#' * (step * 20 // self.steps):.<20}"
        line = f"  {self.label} {bar} {step}/{self.steps}, {loss}{spent:.0f} s, {left:.0f} s left"
        if sys.stdout.isatty():
            print(f"\r{line:<78}", end="\n" if step == self.steps else "", flush=True)
        elif step * 5 // self.steps > self.fifth:
            self.fifth = step * 5 // self.steps
            print(line, flush=True)


def decay(steps: int) -> Callable[[int], float]:
    """The share of the learning rate at each step: linear warm-up over 6 % of the steps, linear decay to zero."""
    warmup = max(1, steps * 6 // 100)
    return lambda step: min((step + 1) / warmup, (steps - step) / steps)


def train(model: nn.Module, text: Tensor, optimizer: torch.optim.Optimizer, steps: int, seed: int,
          watch: Callable[[int, float], object], share: Callable[[int], float] | None = None, batch: int = BATCH):
    """Steps of the optimiser on random windows of text. After each, watch is told how many there were and the loss.

    share says which part of the learning rate a step has, `decay(steps)` if None.
    """
    device, generator = next(model.parameters()).device, torch.Generator().manual_seed(seed)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, share or decay(steps))
    model.train()
    for step in range(1, steps + 1):
        starts = torch.randint(len(text) - CONTEXT, (batch,), generator=generator)
        windows = torch.stack([text[i : i + CONTEXT + 1] for i in starts.tolist()]).long().to(device)  # (b, t + 1)
        loss = loss_of(model, windows)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        watch(step, loss.item())
    model.eval()


def pretrained(steps: int, device: str = "cpu") -> ByteTransformer:
    """The model pretrained on English, from the cache if it is there and whole.

    The cache file begins with the SHA-256 of what follows, so that damage is noticed. Its name holds a hash of the text
    and of all that shapes the model, so that a change of either is noticed too.
    """
    text = english()["train"]
    recipe = repr((CONTEXT, WIDTH, LAYERS, HEADS, BATCH, steps, torch.__version__)).encode() + bytes(text.tolist())
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
    draft = path.with_suffix(f".{os.getpid()}")  # renamed once it is complete: no other run sees half a file
    draft.write_bytes(hashlib.sha256(buffer.getvalue()).digest() + buffer.getvalue())
    draft.replace(path)
    return model


# ------------------------------------------------------------------------------------------------ the main job


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="cpu", help="cpu, cuda, mps ... (default: cpu)")
    parser.add_argument("--quick", action="store_true", help="the whole path in seconds, too short for good losses")
    parser.add_argument("--seed", type=int, default=0, help="of the adapter and its training (default: 0)")
    args = parser.parse_args()
    start = time.monotonic()
    steps, windows = (20, 16) if args.quick else (250, 128)
    old, new = english()["valid"], python()

    print("1. A model pretrained on English")
    model = pretrained(20 if args.quick else 600, args.device)
    before = validate(model, old, windows), validate(model, new["valid"], windows)

    print("2. Adapted with DeLoRA to Python source code")
    torch.manual_seed(args.seed)
    adapters = inject(model, "all-linear", r=8, exclude=["head"])
    optimizer = torch.optim.AdamW(param_groups(model, lr=1e-2, lambda_lr=5e-3))
    train(model, new["train"], optimizer, steps, args.seed, Progress("adapting", steps))
    after = validate(model, old, windows), validate(model, new["valid"], windows)

    print("3. Merged, unmerged, saved, reloaded into a fresh copy of the pretrained model")
    probe = new["valid"][: 8 * CONTEXT].view(8, CONTEXT).long().to(args.device)  # (8, time)
    with torch.no_grad():
        adapted = model(probe)  # (8, time, 256)
        taken = merge(model)
        merged = model(probe)
        unmerge(model, taken)
        path = CACHE / "adapter.pt"
        torch.save(adapter_state_dict(model), path)
        fresh = pretrained(20 if args.quick else 600, args.device)
        load_adapter(fresh, torch.load(path, map_location=args.device, weights_only=True))
        reloaded = fresh(probe)

    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    total = sum(p.numel() for name, p in model.named_parameters() if "delora_" not in name)
    moved = {name: (adapter.delta_weight().norm().item(), adapter.norm_bound()) for name, adapter in adapters.items()}
    within = all(norm <= bound for norm, bound in moved.values())
    same = torch.equal(reloaded, adapted)

    how = f"on {args.device} with torch {torch.__version__}{' (--quick)' if args.quick else ''}"
    print(f"""
Report, after {time.monotonic() - start:.0f} s {how}
  trainable            {trainable:,} of {total:,} parameters, {trainable / total:.1%}
  loss, new text       {before[1]:.3f} -> {after[1]:.3f}   Python source code, nats per byte
  loss, old text       {before[0]:.3f} -> {after[0]:.3f}   English, what was forgotten
  merged model         differs from the adapted one by {(merged - adapted).abs().max():.1e} at most, of logits up to \
{adapted.abs().max():.0f}
  checkpoint           {path.stat().st_size / 1024:.0f} KiB in {os.path.relpath(path)}
  reloaded model       {"gives the same outputs, bit for bit" if same else "DIFFERS from the adapted one"}
  how far each layer moved, and could have: ‖ΔW‖ / its bound, {"all within" if within else "NOT ALL WITHIN"}
    {"":8}{"".join(f"{leaf:>14}" for leaf in ("q", "k", "v", "o", "up", "down"))}""")
    for i in range(LAYERS):
        cells = [moved[f"blocks.{i}.{leaf}"] for leaf in ("q", "k", "v", "o", "up", "down")]
        print(f"    block {i:<2}" + "".join(f"{f'{norm:.1f} / {bound:.1f}':>14}" for norm, bound in cells))
    if not (within and same):
        sys.exit("Something is wrong: see the lines in capitals above.")


if __name__ == "__main__":
    main()
