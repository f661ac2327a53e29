# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.4", "numpy"]
# ///
"""DeLoRA where no layer can be replaced: as a parametrization of any module's weight.

    python examples/anywhere.py             about 30 seconds on two CPU cores
    python examples/anywhere.py --quick     the same path in seconds, too short for good losses

`inject` puts a layer around a linear layer. An embedding, a convolution and nn.MultiheadAttention,
whose in_proj_weight is q, k and v in one, are none. But torch can compute a module's weight:

    module.weight.requires_grad_(False)
    parametrize.register_parametrization(module, "weight", DeLoRA(module.weight))

From then on module.weight is W + ΔW. This is done to a small model of bytes, whose head is adapted
by `inject`; all of it is trained, looked at, saved, reloaded and merged. What is subtle:

- Freeze W yourself, as above: `param_groups` refuses a W that would move beside ΔW. (`inject` and
  `load_adapter` freeze all of a model that is no adapter.)
- A kernel (out, in/groups, k) is read as (out, the rest): w has a number for each column of that.
- ΔW moves every row of an embedding, also those of tokens that training never meets and that of
  padding_idx. sparse=True has to go: a sparse gradient cannot pass through W + ΔW.
- ΔW (out, in) is formed at each read of the weight, and backward forms the gradient of W + ΔW, as
  if W were trained. `inject` forms neither: take it where a layer can be replaced.
- nn.MultiheadAttention reads in_proj_weight three to five times in one forward pass. Within
  `with parametrize.cached():` ΔW is formed once; leave that before the optimiser's step, or what
  was cached is used again.
- If W is tied, the other module keeps W while the adapter is on. `remove_parametrizations` writes
  W + ΔW into the very Parameter that is tied, so the other module has it too, and outputs change.
  To prevent it, give the other one a weight of its own: `merge` does that for a DeLoRALinear. And
  parametrize one of the two only; W would get ΔW twice.
- There is no unmerge: W is overwritten. And a deepcopy of a parametrized module has the same class,
  from which `remove_parametrizations` deletes the weight: make copies before you register.
"""

import argparse
import copy
import sys
import time

import torch
from experiments.common import CACHE, CONTEXT, Progress, english, python, train, validate
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

from delora import DeLoRA, adapter_state_dict, inject, load_adapter, merge, param_groups

WIDTH, HEADS, KERNEL = 128, 4, 4
RANK = 8
TARGETS = {"token": "weight", "conv": "weight", "attention": "in_proj_weight"}


class ByteModel(nn.Module):
    """A causal language model over bytes: a convolution over the last few, attention, an MLP."""

    def __init__(self):
        super().__init__()
        self.token = nn.Embedding(256, WIDTH)
        self.conv = nn.Conv1d(WIDTH, WIDTH, KERNEL)
        self.norm1 = nn.LayerNorm(WIDTH)
        self.attention = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)
        self.norm2 = nn.LayerNorm(WIDTH)
        self.up = nn.Linear(WIDTH, 4 * WIDTH)
        self.down = nn.Linear(4 * WIDTH, WIDTH)
        self.norm3 = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, 256)

    def forward(self, tokens):
        x = self.token(tokens)  # (batch, time, width)
        past = F.pad(x.transpose(1, 2), (KERNEL - 1, 0))  # (batch, width, kernel - 1 + time)
        x = x + F.gelu(self.conv(past)).transpose(1, 2)
        h = self.norm1(x)
        time = tokens.shape[1]
        mask = torch.ones(time, time, dtype=torch.bool, device=x.device).triu(1)  # what is later
        h, _ = self.attention(h, h, h, attn_mask=mask, need_weights=False)
        x = x + h  # (batch, time, width)
        x = x + self.down(F.gelu(self.up(self.norm2(x))))
        return self.head(self.norm3(x))  # (batch, time, 256)


def register(model):
    """The weight of each of TARGETS becomes W + ΔW."""
    for path, name in TARGETS.items():
        module = model.get_submodule(path)
        weight = getattr(module, name)
        weight.requires_grad_(False)
        parametrize.register_parametrization(module, name, DeLoRA(weight, RANK))


def merge_all(model):
    """Plain modules that hold W + ΔW."""
    merge(model)  # first, for a W that is tied: the head gets a weight of its own
    for path, name in TARGETS.items():
        module = model.get_submodule(path)
        parametrize.remove_parametrizations(module, name, leave_parametrized=True)


def bounds(model):
    """A line for each DeLoRA, however it came into the model. Are all within their bounds?"""
    within = True
    print(f"    {'':<43} r      λ   ‖ΔW‖   bound    ‖W‖")
    for name, module in model.named_modules():
        if isinstance(module, DeLoRA):
            moved = module.delta_weight().norm().item()
            bound = module.norm_bound()
            norm = module.w.norm().item()  # w has the norms of W's columns
            numbers = f"{module.lam.item():6.2f} {moved:6.1f} {bound:7.1f} {norm:6.1f}"
            print(f"    {name:<43} {len(module.A)} {numbers}")
            within = within and moved <= bound
    return within


def check(what, right):
    """A line of the report. If it is not right, the script ends here, with status 1."""
    print(f"  {what}: {'yes' if right else 'NO'}")
    if not right:
        sys.exit(f"Something is wrong. This should be so, and is not: {what}")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="the whole path in seconds")
    args = parser.parse_args()
    start = time.monotonic()
    pretraining, steps, windows = (10, 10, 16) if args.quick else (300, 250, 128)
    old, new = english(), python()
    probe = new["valid"][: 8 * CONTEXT].view(8, CONTEXT).long()  # (8, time)

    print("1. A model pretrained on English")
    torch.manual_seed(0)
    model = ByteModel()
    optimizer = torch.optim.AdamW(model.parameters(), lr=6e-3)
    train(model, old["train"], optimizer, pretraining, 0, Progress("pretraining", pretraining))
    fresh = copy.deepcopy(model)
    before = validate(model, new["valid"], windows)

    print("2. Adapted with DeLoRA to Python source code")
    with torch.no_grad():
        pretrained = model(probe)  # (8, time, 256)
        register(model)
        inject(model, ["head"], r=RANK)
        same = torch.equal(model(probe), pretrained)
    check("the start is the pretrained model, bit for bit", same)
    optimizer = torch.optim.AdamW(param_groups(model, lr=1e-2, lambda_lr=5e-3))
    train(model, new["train"], optimizer, steps, 0, Progress("adapting", steps))
    after = validate(model, new["valid"], windows)
    check(f"the loss falls, {before:.3f} -> {after:.3f} nats per byte", after < before)
    check("every ΔW is within its bound", bounds(model))

    print("3. Saved, reloaded into a fresh copy of the pretrained model, merged")
    path = CACHE / "anywhere.pt"
    CACHE.mkdir(exist_ok=True)
    torch.save(adapter_state_dict(model), path)
    register(fresh)  # before loading: only the head's adapter is made by load_adapter
    load_adapter(fresh, torch.load(path, weights_only=True))
    with torch.no_grad():
        adapted = model(probe)  # (8, time, 256)
        same = torch.equal(fresh(probe), adapted)
        merge_all(model)
        difference = (model(probe) - adapted).abs().max().item()
    check("the reloaded model has the same outputs, bit for bit", same)
    check("the merged model has plain modules only", str(model) == str(ByteModel()))
    # A logit of the head was a sum of WIDTH + 2r products, and is one of WIDTH now.
    rounding = 8 * torch.finfo(torch.float32).eps * (WIDTH + 2 * RANK) * adapted.abs().max().item()
    check(f"its outputs are the same up to rounding, {difference:.1e}", difference <= rounding)
    print(f"All is right, after {time.monotonic() - start:.0f} s with torch {torch.__version__}")


if __name__ == "__main__":
    main()
