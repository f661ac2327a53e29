# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.4", "numpy", "peft>=0.21", "safetensors"]
# ///
"""Checkpoints between delora.py and PEFT, in both directions: exact, without an SVD.

    python examples/peft_checkpoints.py          adapt the quickstart's model, there and back again
    python examples/peft_checkpoints.py --quick  in seconds, too short for good losses

Three functions do it, each from a dict of tensors to a dict of tensors:

    load_adapter(model, from_peft(load_file("adapter_model.safetensors")))    PEFT's DeLoRA, here
    save_file(to_peft_lora(adapter_state_dict(model)), path)                  as plain LoRA
    save_file(to_peft_delora(adapter_state_dict(model)), path)                as PEFT's DeLoRA

PEFT wants a configuration beside the tensors. `save_for_peft` writes both, after a look at the
model for what PEFT would do differently:

    save_for_peft(model, "folder", "lora")    # or "delora"
    served = peft.PeftModel.from_pretrained(pretrained_model, "folder")

Why nothing is lost. delora.py has ΔW = (λ / r) · (B Ξ A − B₀ Ξ₀ A₀) · diag(w), and that is

    a LoRA of rank 2r       ΔW = left @ right = (α / R) · lora_B · lora_A
                            with the pair of `DeLoRA.factors`, in every mode, and α = R = 2r

    PEFT's DeLoRA,          ΔW = (2λ / 2r) · B′ Ξ′ A′ · diag(w) = (λ′ / R) · B′ Ξ′ A′ · diag(w)
    of rank 2r, if "tied"   with A′ = [A; A₀], B′ = [B, −B₀], λ′ = 2λ and R = 2r

PEFT's DeLoRA has no frozen copy, and the way back is shorter: A, B, λ and w are as they are, and
A₀ = B₀ = 0, for zero has no direction and nothing is subtracted.

What it costs: rank 2r, which is as many numbers as A, B, A₀ and B₀ are, and twice the work of a
LoRA of rank r. Layers of a smaller rank are padded with zeros to the largest, so that whatever
serves the folder needs no rank for each layer. Whoever trains on in PEFT trains all 2r components,
those that were the frozen copy among them.
"""

import argparse
import copy
import json
import os
import re
import sys
import time
from pathlib import Path

import torch
from experiments.common import (
    CACHE,
    CONTEXT,
    PRETRAINING_STEPS,
    QUICK_STEPS,
    Progress,
    english,
    pretrained,
    python,
    rounding,
    train,
    validate,
)
from torch import nn
from torch.nn import functional as F

from delora import (
    DeLoRA,
    DeLoRALinear,
    _unit,
    _wide,
    adapter_state_dict,
    inject,
    load_adapter,
    param_groups,
)

PREFIX = "base_model.model."  # of every key in PEFT
NAMES = {"delora_A": "A", "delora_B": "B", "delora_lambda": "lam", "delora_w_norm": "w"}
LORA_KEY = re.compile(r"\.lora_(A|B|embedding_A|embedding_B|magnitude_vector)(\.|$)")
LIVE_KEY = re.compile(r"\.delora_(A|B|lambda|w_norm)\.")  # of a model; in a file it ends there
PARTS = {  # what PEFT's adapted layers are made of
    "lora": (
        "base_layer",
        "lora_dropout",
        "lora_A",
        "lora_B",
        "lora_embedding_A",
        "lora_embedding_B",
        "lora_magnitude_vector",
    ),
    "delora": (
        "base_layer",
        "delora_dropout",
        "delora_A",
        "delora_B",
        "delora_lambda",
        "delora_w_norm",
    ),
}
CLAMP = 1e-4  # PEFT divides a shorter vector by this, and not by its norm
LENGTHS = (1e-3, 1e15)  # well between the clamp and what overflows float32 when it is squared


# ------------------------------------------------------------------------------------------------
# From PEFT
# ------------------------------------------------------------------------------------------------


def _require_tensors(state):
    if not isinstance(state, dict):
        raise TypeError(f"expected a dict, as of safetensors.torch.load_file, got {state!r:.99}")
    for key, value in state.items():
        if not torch.is_tensor(value):
            raise TypeError(f"{key} is a {type(value).__name__}, no tensor")


def _require_matrix(key, value):
    if value.dim() != 2:
        raise ValueError(f"{key}: {tuple(value.shape)} is no matrix")


def _require_normalised(key, value, dim):
    """An error if PEFT does not normalise a row (dim=1) or a column (dim=0) of value."""
    _require_matrix(key, value)
    norms = value.float().norm(dim=dim)  # (r,)
    short = norms[(norms > 0) & (norms < CLAMP)]
    if len(short):
        raise ValueError(
            f"{key}: a vector has norm {short[0]:.3g}. What is shorter than {CLAMP} PEFT does not "
            "normalise, delora.py does, and the outputs would not be the same"
        )


def from_peft(state):
    """A state dict for `load_adapter`, of what PEFT saved for its DeLoRA.

    Args:
        state: the tensors of adapter_model.safetensors by their keys, or what
            `peft.get_peft_model_state_dict` returns.

    What PEFT saved besides (biases, modules_to_save) comes under the model's own names.
    `load_adapter` loads it and freezes it: to train on, unfreeze it again.

    An adapter that was never trained in PEFT has B = 0 and gets no gradient here, since zero has no
    direction.

    Raises:
        TypeError, ValueError: a key is not PEFT's, or of another method; a layer lacks a tensor; a
            row of A or a column of B is so short that PEFT does not normalise it. The message has
            the key.
    """
    _require_tensors(state)
    found = {}
    layers = set()
    for key, value in state.items():
        if not key.startswith(PREFIX):
            raise ValueError(f"{key} is not PEFT's: its keys begin with {PREFIX}")
        own_key = key.removeprefix(PREFIX)
        name, _, leaf = own_key.rpartition(".")
        if leaf in NAMES:
            layers.add(name)
            found[f"{name}.delora.{NAMES[leaf]}"] = value
        elif LORA_KEY.search(key):
            raise ValueError(f"{key} is LoRA's, and this reads PEFT's DeLoRA")
        elif LIVE_KEY.search(key):
            raise ValueError(
                f"{key} is not as PEFT saves it. Of a model in memory, take the tensors by "
                "peft.get_peft_model_state_dict(model)"
            )
        else:
            found[own_key] = value
    if not layers:
        raise ValueError(f"no key ends in delora_A, there is no DeLoRA of PEFT in {[*state][:3]}")

    for name in layers:
        for peft_leaf, leaf in NAMES.items():
            if f"{name}.delora.{leaf}" not in found:
                raise ValueError(f"{PREFIX}{name}.{peft_leaf} is missing")
        A, B = found[f"{name}.delora.A"], found[f"{name}.delora.B"]  # (r, in), (out, r)
        _require_normalised(f"{PREFIX}{name}.delora_A", A, dim=1)
        _require_normalised(f"{PREFIX}{name}.delora_B", B, dim=0)
        found[f"{name}.delora.A0"] = torch.zeros_like(A)
        found[f"{name}.delora.B0"] = torch.zeros_like(B)
    return found


# ------------------------------------------------------------------------------------------------
# To PEFT
# ------------------------------------------------------------------------------------------------


def _deloras_and_others(state):
    """The DeLoRA of each layer by the layer's name; all the other tensors, under PEFT's keys."""
    _require_tensors(state)
    required = ("A", "B", "lam", "A0", "B0", "w")
    layers = {}
    others = {}
    for key, value in state.items():
        name, _, leaf = key.rpartition(".delora.")
        if name and leaf in (*required, "lam0"):  # lam0 if untied
            layers.setdefault(name, {})[leaf] = value
        elif ".parametrizations." in key:
            raise ValueError(f"{key} is of a parametrization, and PEFT adapts linear layers")
        else:
            others[PREFIX + key] = value
    if not layers:
        raise ValueError(f"no key ends in .delora.A, there is no adapted layer in {[*state][:3]}")

    deloras = {}
    for name, tensors in layers.items():
        for leaf in required:
            if leaf not in tensors:
                raise ValueError(f"{name}.delora.{leaf} is missing")
        A, B = tensors["A"], tensors["B"]  # (r, in), (out, r)
        _require_matrix(f"{name}.delora.A", A)
        _require_matrix(f"{name}.delora.B", B)
        # A module to put the tensors in, so that the equation is written once.
        weight = torch.empty(len(B), A.shape[1], device="meta")  # (out, in)
        delora = DeLoRA(weight, r=len(A), tie_lambda="lam0" not in tensors)
        for leaf, p in delora.named_parameters():
            here, wanted = tuple(tensors[leaf].shape), tuple(p.shape)
            if here != wanted:
                raise ValueError(f"{name}.delora.{leaf}: {here}, where {wanted} fits A and B")
        delora.load_state_dict(tensors, assign=True)
        deloras[name] = delora
    return deloras, others


def _common_rank(deloras):
    """PEFT's rank for all layers: the largest that one of them needs."""
    return max(2 * len(delora.A) for delora in deloras)


def _pad_rows(matrix, rank):
    return F.pad(matrix, (0, 0, 0, rank - len(matrix)))  # (rank, n)


def _pad_columns(matrix, rank):
    return F.pad(matrix, (0, rank - matrix.shape[1]))  # (n, rank)


def _safe_lengths(v, dim):
    """v, with v / ‖v‖ for every vector along dim that PEFT could not divide by its norm."""
    norms = v.norm(dim=dim, keepdim=True)
    shortest, longest = LENGTHS
    return torch.where((norms >= shortest) & (norms <= longest), v, _unit(v, dim))


@torch.no_grad()
def to_peft_lora(state):
    """An ordinary LoRA pair for each layer, under PEFT's keys: ΔW = lora_B @ lora_A.

    Args:
        state: what `adapter_state_dict` returned, in any mode. What it holds besides adapters is
            passed on under PEFT's key.

    In PEFT's configuration, r and lora_alpha are both the number of rows of every lora_A.

    Raises:
        TypeError, ValueError: no layer is adapted, a tensor is missing or of another shape, or one
            is of a parametrization. The message has the layer or the key.
    """
    deloras, found = _deloras_and_others(state)
    rank = _common_rank(deloras.values())
    for name, delora in deloras.items():
        left, right = delora.factors()  # (out, 2r), (2r, in)
        found[f"{PREFIX}{name}.lora_A.weight"] = _pad_rows(right, rank)  # (rank, in)
        found[f"{PREFIX}{name}.lora_B.weight"] = _pad_columns(left, rank)  # (out, rank)
    return found


@torch.no_grad()
def to_peft_delora(state):
    """PEFT's DeLoRA for each layer, under PEFT's keys: ΔW = (λ′ / R) B′ Ξ′ A′ diag(w).

    Args:
        state: what `adapter_state_dict` returned. What it holds besides adapters is passed on under
            PEFT's key.

    In PEFT's configuration, r is the number of rows of every delora_A. The strengths are tensors.

    Raises:
        TypeError, ValueError: as `to_peft_lora`; or λ is not what multiplies the frozen copy.
    """
    deloras, found = _deloras_and_others(state)
    rank = _common_rank(deloras.values())
    for name, delora in deloras.items():
        if delora.lam0 is not None and delora.lam0 != delora.lam:
            raise ValueError(
                f"{name}: lam is {delora.lam.item():.6g}, lam0 is {delora.lam0.item():.6g}, and "
                "PEFT's DeLoRA has one strength for all components. Plain LoRA can hold both"
            )
        A = torch.cat((delora.A, delora.A0))  # (2r, in)
        B = torch.cat((delora.B, -delora.B0), dim=1)  # (out, 2r)
        found[f"{PREFIX}{name}.delora_A"] = _pad_rows(_safe_lengths(A, dim=1), rank)  # (rank, in)
        found[f"{PREFIX}{name}.delora_B"] = _pad_columns(_safe_lengths(B, dim=0), rank)
        # PEFT divides by its rank where it has to be divided by r
        found[f"{PREFIX}{name}.delora_lambda"] = _wide(delora.lam) * (rank / len(delora.A))
        found[f"{PREFIX}{name}.delora_w_norm"] = delora.w.clone()  # (in,)
    return found


# ------------------------------------------------------------------------------------------------
# A folder for PEFT
# ------------------------------------------------------------------------------------------------


def _adapters_for_peft(model, to):
    """Every DeLoRALinear by name, or an error where PEFT's adapter would not do the same."""
    adapters = {}
    first_name = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if not isinstance(module, DeLoRALinear):
            continue
        if not name:
            raise ValueError(
                "the model itself is a DeLoRALinear: PEFT adapts layers inside a model"
            )
        if module in first_name:
            raise ValueError(
                f"{name}: the same layer as {first_name[module]}, and PEFT adapts one name only"
            )
        first_name[module] = name
        adapters[name] = module
    if not adapters:
        raise ValueError(
            f"{type(model).__name__} has no DeLoRALinear: none was injected, or all is merged"
        )

    # Of a DeLoRA that is no layer's, PEFT would find tensors and not know where to put them.
    known = {adapter.delora for adapter in adapters.values()}
    for name, module in model.named_modules():
        if isinstance(module, DeLoRA) and module not in known:
            raise ValueError(f"{name}: a DeLoRA outside of a DeLoRALinear, PEFT has none of these")

    for name, adapter in adapters.items():
        parent = model.get_submodule(name.rpartition(".")[0])
        if isinstance(parent, (nn.MultiheadAttention, nn.TransformerEncoderLayer)):
            raise ValueError(
                f"{name}: {type(parent).__name__} reads the weight and does not call the layer. It "
                "would pass over PEFT's adapter: merge, and save the model"
            )
        if to == "delora" and not isinstance(adapter.base_layer, nn.Linear):
            raise ValueError(
                f"{name}: PEFT's DeLoRA takes nn.Linear, and this is a "
                f"{type(adapter.base_layer).__name__}. Plain LoRA may do: to='lora'"
            )
    return adapters


def _modules_to_save(model, adapters, to):
    """The names of the modules that PEFT has to keep whole, since something in them is trainable.

    A trainable bias under an adapter needs none: PEFT has a key for it.
    """
    adapter_parameters = set()
    for adapter in adapters.values():
        adapter_parameters.update(adapter.delora.parameters())

    owners = []
    first_key = {}
    for key, p in model.named_parameters(remove_duplicate=False):
        if not p.requires_grad or p in adapter_parameters:
            continue
        if p in first_key:
            raise ValueError(
                f"{key}: the same parameter as {first_key[p]}, trainable, and PEFT would copy it "
                "for one name only"
            )
        first_key[p] = key
        layer, _, in_adapter = key.rpartition(".base_layer.")
        if layer in adapters and in_adapter == "bias":
            continue
        owner = key.rpartition(".")[0]
        inside = any(key.startswith(f"{name}.") for name in adapters)
        around = any(name.startswith(f"{owner}.") for name in adapters)
        containers = (nn.ModuleDict, nn.ModuleList, nn.ParameterDict, nn.ParameterList)
        is_container = isinstance(model.get_submodule(owner), containers)
        if not owner or inside or around or is_container:
            raise ValueError(f"{key} is trainable, and PEFT has no place for it")
        if owner not in owners:
            owners.append(owner)

    # What is inside of another one is kept with that.
    outer = []
    for owner in owners:
        if not any(owner.startswith(f"{other}.") for other in owners):
            outer.append(owner)

    # PEFT takes a name for the end of one, even in the middle of a word: "head" is "lm_head" too,
    # and "norm" is "delora_w_norm", which PEFT has in every layer that it adapts.
    names = [name for name, _ in model.named_modules(remove_duplicate=False)]
    for name in adapters:
        names += [f"{name}.{part}" for part in PARTS[to]]
    for owner in outer:
        for name in names:
            if name.endswith(owner) and name not in outer:
                raise ValueError(
                    f"{owner} is trainable, and PEFT would take {name} for it: they end alike"
                )
    return outer


def _target_modules(model, adapters):
    """The adapted layers, as PEFT wants to be told: their names, or one regular expression.

    PEFT takes a name for the end of one. Where that would be too much, an expression is exact.
    """
    ends = tuple(f".{name}" for name in adapters)
    for name, _ in model.named_modules(remove_duplicate=False):
        if name.endswith(ends) and name not in adapters:
            return "|".join(re.escape(name) for name in adapters)
    return [*adapters]


def save_for_peft(model, folder, to="lora", base_model=None):
    """Write adapters, and what else is trainable, as a folder for `PeftModel.from_pretrained`.

    The folder gets adapter_config.json and adapter_model.safetensors. For what else is trainable
    whole modules go along, PEFT's modules_to_save; for biases under adapters only these. A head
    that `load_adapter` loaded is frozen: unfreeze it first, or it stays behind.

    Args:
        model: a model with DeLoRALinear layers. It is not changed.
        folder: is made if it does not exist.
        to: "lora", or "delora" as PEFT defines it.
        base_model: the name or path of the pretrained model, for tools that read it in the
            configuration.

    Raises:
        TypeError, ValueError: PEFT could not give the same outputs, or a tensor is not here. The
            message names the module, and nothing is written.
    """
    from safetensors.torch import save_file

    if to not in ("lora", "delora"):
        raise ValueError(f"to must be 'lora' or 'delora', got {to!r}")
    adapters = _adapters_for_peft(model, to)
    modules = _modules_to_save(model, adapters, to)
    state = adapter_state_dict(model)
    for owner in modules:
        for leaf, tensor in model.get_submodule(owner).state_dict().items():
            state[f"{owner}.{leaf}"] = tensor

    config = {
        "peft_type": to.upper(),
        "base_model_name_or_path": base_model,
        "task_type": None,
        "inference_mode": True,
        "r": _common_rank(adapter.delora for adapter in adapters.values()),
        "target_modules": _target_modules(model, adapters),
        "modules_to_save": modules or None,
        "bias": "none",
    }
    if any(key.endswith(".base_layer.bias") for key in state):
        config["bias"] = f"{to}_only"
    if to == "lora":
        tensors = to_peft_lora(state)
        transposed = [not isinstance(a.base_layer, nn.Linear) for a in adapters.values()]
        config |= {"lora_alpha": config["r"], "lora_dropout": 0.0}
        config["fan_in_fan_out"] = all(transposed)  # Conv1D: (in, out)
    else:
        tensors = to_peft_delora(state)
        config |= {"delora_lambda": 1, "module_dropout": 0.0}  # each layer's λ is a tensor

    for key, tensor in tensors.items():
        tensors[key] = tensor.detach().cpu().contiguous().clone()  # as safetensors wants them
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")


# ------------------------------------------------------------------------------------------------
# There and back again
# ------------------------------------------------------------------------------------------------


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="the whole path in seconds")
    parser.add_argument(
        "--out", type=Path, default=CACHE / "peft", help="folder to write into (default: the cache)"
    )
    args = parser.parse_args()
    try:
        import peft
        from safetensors.torch import load_file
    except ImportError as error:
        sys.exit(
            f"peft_checkpoints.py needs {error.name}, which is not installed: "
            "pip install peft safetensors"
        )
    start = time.monotonic()
    pretraining = QUICK_STEPS if args.quick else PRETRAINING_STEPS
    steps, windows = (20, 16) if args.quick else (100, 128)
    old, new = english()["valid"], python()["valid"]
    probe = new[: 8 * CONTEXT].view(8, CONTEXT).long()  # (8, time)

    print("1. Adapted here, two layers of a block at rank 8, one at rank 4")
    base = pretrained(pretraining)
    model = copy.deepcopy(base)
    torch.manual_seed(0)
    inject(model, ["q", "v"], r=8)
    inject(model, ["up"], r=4)
    optimizer = torch.optim.AdamW(param_groups(model, lr=1e-2, lambda_lr=5e-3))
    train(model, python()["train"], optimizer, steps, 0, Progress("adapting", steps))
    with torch.no_grad():
        before = base(probe)  # (8, time, 256)
        adapted = model(probe)  # (8, time, 256)
    models = {"here": model}

    print("2. Written as LoRA and as PEFT's DeLoRA, and loaded by PEFT")
    for to in ("lora", "delora"):
        save_for_peft(model, args.out / to, to)
        served = peft.PeftModel.from_pretrained(copy.deepcopy(base), args.out / to)
        models[f"PEFT, {to}"] = served.eval()

    print("3. Saved by PEFT, and loaded here")
    models["PEFT, delora"].save_pretrained(args.out / "from_peft")
    state = load_file(args.out / "from_peft" / "adapter_model.safetensors")
    models["here again"] = copy.deepcopy(base)
    load_adapter(models["here again"], from_peft(state))

    allowed = rounding(adapted)
    same = True
    rows = []
    for name, other in models.items():
        losses = f"{validate(other, new, windows):<16.4f}{validate(other, old, windows):<16.4f}"
        with torch.no_grad():
            difference = (other(probe) - adapted).abs().max().item()
        same = same and difference <= allowed
        rows.append(f"  {name:<14}{losses}{difference:.1e}")

    quick = ", --quick" if args.quick else ""
    versions = f"torch {torch.__version__}, peft {peft.__version__}{quick}"
    size, moved = adapted.abs().max(), (adapted - before).abs().max()
    print(f"\nReport, after {time.monotonic() - start:.0f} s with {versions}")
    print(f"  logits of up to {size:.0f}, which the adapter moved by up to {moved:.1f}")
    print(f"  {'':<14}{'loss, new text':<16}{'loss, old text':<16}logits differ by")
    print("\n".join(rows))
    for folder in ("lora", "delora"):
        size = (args.out / folder / "adapter_model.safetensors").stat().st_size / 1024
        print(f"  {size:.0f} KiB in {os.path.relpath(args.out / folder)}")
    if not same:
        sys.exit(f"Something is wrong: outputs differ by more than rounding, {allowed:.1e}")


if __name__ == "__main__":
    main()
