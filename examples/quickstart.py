# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.4", "numpy"]
# ///
"""DeLoRA from end to end on real text, on two CPU cores, offline, in about 80 seconds.

    python examples/quickstart.py              the first run also pretrains the model, and keeps it
    python examples/quickstart.py --quick      the same path in seconds, too short for good losses
    python examples/quickstart.py --device cuda

A small byte-level transformer, pretrained on English documentation, is adapted to Python source
code; then it is looked at, merged, saved, and reloaded into a fresh copy of the pretrained model.
The model, the texts and the training loop are in experiments/common.py: an ordinary PyTorch model
and loop.
"""

import argparse
import sys
import time

import torch
from experiments.common import (
    CACHE,
    CONTEXT,
    LAYERS,
    LEAVES,
    PRETRAINING_STEPS,
    QUICK_STEPS,
    Progress,
    english,
    pretrained,
    python,
    train,
    validate,
)

from delora import adapter_state_dict, inject, load_adapter, merge, param_groups, unmerge


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="cpu", help="cpu, cuda, mps ... (default: cpu)")
    parser.add_argument("--quick", action="store_true", help="the whole path in seconds")
    parser.add_argument("--seed", type=int, default=0, help="of adapter and training (default: 0)")
    args = parser.parse_args()
    start = time.monotonic()
    pretraining = QUICK_STEPS if args.quick else PRETRAINING_STEPS
    steps, windows = (20, 16) if args.quick else (250, 128)
    old, new = english()["valid"], python()["valid"]

    print("1. A model pretrained on English")
    model = pretrained(pretraining, args.device)
    total = sum(p.numel() for p in model.parameters())
    old_before, new_before = validate(model, old, windows), validate(model, new, windows)

    print("2. Adapted with DeLoRA to Python source code")
    torch.manual_seed(args.seed)
    adapters = inject(model, "all-linear", r=8, exclude=["head"])
    optimizer = torch.optim.AdamW(param_groups(model, lr=1e-2, lambda_lr=5e-3))
    train(model, python()["train"], optimizer, steps, args.seed, Progress("adapting", steps))
    old_after, new_after = validate(model, old, windows), validate(model, new, windows)
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)

    print("3. Merged, unmerged, saved, reloaded into a fresh copy of the pretrained model")
    probe = new[: 8 * CONTEXT].view(8, CONTEXT).long().to(args.device)  # (8, time)
    path = CACHE / "adapter.pt"
    with torch.no_grad():
        adapted = model(probe)  # (8, time, 256)
        taken = merge(model)  # plain nn.Linear layers
        difference = (model(probe) - adapted).abs().max()
        unmerge(model, taken)  # every bit as before
        torch.save(adapter_state_dict(model), path)
        fresh = pretrained(pretraining, args.device)
        load_adapter(fresh, torch.load(path, map_location=args.device, weights_only=True))
        same = torch.equal(fresh(probe), adapted)

    quick = " (--quick)" if args.quick else ""
    seconds = time.monotonic() - start
    print(f"\nReport, after {seconds:.0f} s on {args.device} with torch {torch.__version__}{quick}")
    print(f"  trainable       {trainable:,} of {total:,} parameters, {trainable / total:.1%}")
    print(f"  loss, new text  {new_before:.3f} -> {new_after:.3f}   Python, nats per byte")
    print(f"  loss, old text  {old_before:.3f} -> {old_after:.3f}   English, what was forgotten")
    print(f"  merged model    logits of up to {adapted.abs().max():.0f} differ by {difference:.1e}")
    print(f"  checkpoint      {path.stat().st_size / 1024:.0f} KiB in examples/.cache/adapter.pt")
    print(f"  reloaded model  {'the same outputs, bit for bit' if same else 'OTHER OUTPUTS'}")
    print("  how far each layer moved, and could have: ‖ΔW‖ / its bound")
    print("    " + " " * 8 + "".join(f"{leaf:>14}" for leaf in LEAVES))
    within = True
    for i in range(LAYERS):
        row = f"    block {i} "
        for leaf in LEAVES:
            delora = adapters[f"blocks.{i}.{leaf}"].delora
            moved, bound = delora.delta_weight().norm().item(), delora.norm_bound()
            within = within and moved <= bound
            row += f"{f'{moved:.1f} / {bound:.1f}':>14}"
        print(row)
    if not (within and same):
        sys.exit("Something is wrong: a layer is beyond its bound, or the outputs differ.")


if __name__ == "__main__":
    main()
