# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.4", "safetensors", "peft>=0.21"]
# ///
"""Write an adapted model as a folder that PEFT loads, as DeLoRA or as plain LoRA, and prove that it gives the outputs.

    python examples/export.py                     adapt the quickstart's model, write both folders, load them with PEFT
    python examples/export.py --to lora --out my_adapter
    python examples/export.py --quick             the same path in seconds, too short for good losses

`export(model, folder, to)` is the function to copy. No approximation and no SVD is in it, since ΔW has both forms:

    LoRA, for every mode    ΔW = left @ right with left (out, 2r), right (2r, in): the pair of `DeLoRALinear.factors`
                            as it is, with alpha = rank. Whatever serves LoRA serves this.
    PEFT's DeLoRA, if tied  ΔW = (2λ / 2r) · B' Ξ' A' · diag(w) with A' = [A; A₀], B' = [B, −B₀]: rank 2r, strength 2λ.

Layers of different rank are padded with zeros to the largest, so that a server needs no rank of its own per layer. What
PEFT could not give the same outputs from is refused with the module's name: λ and λ₀ that differ, as DeLoRA; a layer
that is no nn.Linear, as DeLoRA; a layer with two names, of which PEFT adapts one.

The folder holds adapter_config.json and adapter_model.safetensors; `PeftModel.from_pretrained(model, folder)` needs the
pretrained model. Other trainable layers (a head) go along as PEFT's modules_to_save.
"""

import argparse
import json
import os
import re
import sys
import time
import warnings
from pathlib import Path

warnings.filterwarnings(
    "ignore", message="Failed to initialize NumPy"
)  # torch without numpy, which is not needed
sys.path.append(
    str(Path(__file__).resolve().parent.parent)
)  # delora.py is there, also where it is not installed

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from delora import DeLoRALinear, _unit, inject, param_groups

RANGE = (
    1e-4,
    1e15,
)  # PEFT takes the norm of a float32 vector within it as it is: no clamp, no overflow


def lora_tensors(adapter: DeLoRALinear, rank: int) -> dict[str, Tensor]:
    """lora_B @ lora_A = ΔW, padded with zeros to that rank."""
    left, right = adapter.factors()  # (out, 2r), (2r, in)
    pad = rank - len(right)
    return {
        "lora_A.weight": F.pad(right, (0, 0, 0, pad)),
        "lora_B.weight": F.pad(left, (0, pad)),
    }  # (R, in), (out, R)


def delora_tensors(adapter: DeLoRALinear, rank: int) -> dict[str, Tensor]:
    """(λ' / R) B' Ξ' A' diag(w) = ΔW with R = rank and λ' / R = 2λ / 2r, padded with zeros to that rank."""
    A = torch.cat((adapter.delora_A, adapter.delora_A0))  # (2r, in)
    B = torch.cat((adapter.delora_B, -adapter.delora_B0), dim=1)  # (out, 2r)
    r = len(adapter.delora_A)
    for v, dim in ((A, 1), (B, 0)):
        norm = v.norm(dim=dim, keepdim=True)  # (2r, 1) or (1, 2r)
        v.copy_(torch.where((norm >= RANGE[0]) & (norm <= RANGE[1]), v, _unit(v, dim)))
    A, B = F.pad(A, (0, 0, 0, rank - 2 * r)), F.pad(B, (0, rank - 2 * r))  # (R, in), (out, R)
    return {"delora_A": A, "delora_B": B, "delora_lambda": adapter.delora_lambda * (rank / r),
            "delora_w_norm": adapter.delora_w_norm}  # fmt: skip


def check(model: nn.Module, adapters: dict[str, DeLoRALinear], to: str) -> None:
    """A ValueError where PEFT would give other outputs."""
    if to not in ("lora", "delora"):
        raise ValueError(f"to must be 'lora' or 'delora', got {to!r}")
    if not adapters:
        raise ValueError(
            f"{type(model).__name__} has no DeLoRALinear: nothing was injected, or it is merged"
        )
    names = [name for name, _ in model.named_modules(remove_duplicate=False)]
    for name, adapter in adapters.items():
        again = [n for n in names if n != name and model.get_submodule(n) is adapter]
        if again:
            raise ValueError(
                f"{name}: the same layer as {again[0]}, and PEFT adapts only one name of a layer"
            )
        if (
            to == "delora"
            and adapter.delora_lambda0 is not None
            and adapter.delora_lambda0 != adapter.delora_lambda
        ):
            raise ValueError(f"{name}: λ is {adapter.delora_lambda.item()}, λ₀ is {adapter.delora_lambda0.item()}, and "
                             "PEFT's DeLoRA has one strength for all components: export to LoRA")  # fmt: skip
        if to == "delora" and not isinstance(adapter.base_layer, nn.Linear):
            kind = type(adapter.base_layer).__name__
            raise ValueError(
                f"{name}: PEFT's DeLoRA takes nn.Linear, and this is a {kind}: export to LoRA"
            )


def trained_besides(
    model: nn.Module, adapters: dict[str, DeLoRALinear]
) -> tuple[dict[str, Tensor], list[str]]:
    """The tensors of all else that is trainable, and the names of the modules that PEFT is to keep a copy of for them.

    PEFT copies whole modules, and every one whose name ends alike. The bias under an adapter needs no copy.
    """
    tensors, modules, seen = {}, {}, {}
    inside = tuple(f"{name}." for name in adapters)
    for name, p in model.named_parameters(remove_duplicate=False):
        owner = name.rpartition(".")[0]
        if not p.requires_grad or re.search(r"\.delora_\w+$", name):
            continue
        if p in seen:
            raise ValueError(
                f"{name}: the same parameter as {seen[p]}, trained, and PEFT would copy only one of them"
            )
        seen[p] = name
        if name.startswith(inside) and name.endswith(".base_layer.bias"):
            tensors[name] = p
        elif (
            name.startswith(inside) or not owner or any(a.startswith(f"{owner}.") for a in adapters)
        ):
            raise ValueError(f"{name} is trainable, and PEFT has no place for it")
        else:
            modules[owner] = model.get_submodule(owner)
    alike = [n for n, _ in model.named_modules() if n.endswith(tuple(modules)) and n not in modules]
    if alike:
        raise ValueError(
            f"{alike[0]}: PEFT would take it for one of the trainable {[*modules]}, whose names end alike"
        )
    for owner, module in modules.items():
        tensors |= {f"{owner}.{name}": tensor for name, tensor in module.state_dict().items()}
    return tensors, [*modules]


@torch.no_grad()
def export(
    model: nn.Module, folder: str | os.PathLike, to: str = "lora", base_model: str | None = None
) -> None:
    """Write the adapters of a model, and what else is trainable, as a folder for `PeftModel.from_pretrained`.

    Args:
        model: a model with DeLoRALinear layers. It is not changed.
        folder: is made if it does not exist.
        to: "lora", or "delora" as PEFT defines it.
        base_model: the name or path of the pretrained model, for tools that read it in the configuration.

    Raises:
        ValueError: PEFT could not give the same outputs. The message names the module, and no file is written.
    """
    from safetensors.torch import save_file

    adapters = {
        name: module for name, module in model.named_modules() if isinstance(module, DeLoRALinear)
    }
    check(model, adapters, to)
    others, modules = trained_besides(model, adapters)
    rank = max(2 * len(adapter.delora_A) for adapter in adapters.values())
    convert = {"lora": lora_tensors, "delora": delora_tensors}[to]
    tensors = {
        f"{n}.{leaf}": t
        for n, adapter in adapters.items()
        for leaf, t in convert(adapter, rank).items()
    }

    # A name means every module that ends in it. Where that is too much, a regular expression says which.
    ends = tuple(f".{name}" for name in adapters)
    more = [n for n, _ in model.named_modules() if n.endswith(ends) and n not in adapters]
    biases = any(name.endswith(".base_layer.bias") for name in others)
    config = {
        "peft_type": to.upper(),
        "base_model_name_or_path": base_model,
        "task_type": None,
        "inference_mode": True,
        "r": rank,
        "target_modules": "|".join(map(re.escape, adapters)) if more else [*adapters],
        "modules_to_save": modules or None,
        "bias": f"{to}_only" if biases else "none",
    }
    transposed = [not isinstance(adapter.base_layer, nn.Linear) for adapter in adapters.values()]
    lora = {"lora_alpha": rank, "lora_dropout": 0.0, "fan_in_fan_out": all(transposed)}
    config |= (
        lora if to == "lora" else {"delora_lambda": 1, "module_dropout": 0.0}
    )  # each layer's λ is a tensor

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    prefixed = {
        f"base_model.model.{n}": t.detach().cpu().contiguous().clone()
        for n, t in (tensors | others).items()
    }
    save_file(prefixed, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--to", choices=("lora", "delora", "both"), default="both")
    parser.add_argument(
        "--out", type=Path, help="the folder to write, or with --to both the one to write two into"
    )
    parser.add_argument(
        "--quick", action="store_true", help="the whole path in seconds, too short for good losses"
    )
    args = parser.parse_args()
    try:
        import peft
        import safetensors  # noqa: F401
    except ImportError as error:
        sys.exit(
            f"export.py needs {error.name}, which is not installed: pip install peft safetensors"
        )
    from quickstart import (
        CACHE,
        CONTEXT,
        Progress,
        english,
        pretrained,
        python,
        rounding,
        train,
        validate,
    )

    start, steps = time.monotonic(), 600 if not args.quick else 20
    old, new, windows = english()["valid"], python(), 16 if args.quick else 128
    model = pretrained(steps)
    torch.manual_seed(0)
    inject(model, ["q", "v"], r=8)
    inject(model, ["up"], r=4)
    optimizer = torch.optim.AdamW(param_groups(model, lr=1e-2, lambda_lr=5e-3))
    adapting = 20 if args.quick else 100
    train(model, new["train"], optimizer, adapting, 0, Progress("adapting", adapting))
    probe = new["valid"][: 8 * CONTEXT].view(8, CONTEXT).long()  # (8, time)
    with torch.no_grad():
        before, ours = pretrained(steps)(probe), model(probe)  # (8, time, 256)

    rows = [
        (
            "here",
            "q, v: 8, up: 4",
            "",
            validate(model, new["valid"], windows),
            validate(model, old, windows),
            0.0,
        )
    ]
    for to in ("lora", "delora") if args.to == "both" else (args.to,):
        folder = args.out or CACHE / "export"
        folder = folder / to if args.to == "both" else folder
        export(model, folder, to)
        served = peft.PeftModel.from_pretrained(pretrained(steps), folder).eval()
        size = f"{(folder / 'adapter_model.safetensors').stat().st_size / 1024:.0f} KiB"
        with torch.no_grad():
            error = (served(probe) - ours).abs().max().item()
        losses = validate(served, new["valid"], windows), validate(served, old, windows)
        rows.append((f"PEFT, {to}", f"{served.peft_config['default'].r}", size, *losses, error))
    print(f"""
Report, after {time.monotonic() - start:.0f} s with torch {torch.__version__}, peft {peft.__version__}\
{" (--quick)" if args.quick else ""}
  logits up to {ours.abs().max():.0f}, which the adapter moved by up to {(ours - before).abs().max():.1f}
  {"":<14}{"rank":<16}{"size":<10}{"new text":<10}{"old text":<10}logits differ by""")
    for name, rank, size, *losses, error in rows:
        print(f"  {name:<14}{rank:<16}{size:<10}{losses[0]:<10.4f}{losses[1]:<10.4f}{error:.1e}")
    if max(row[-1] for row in rows) > rounding(ours):
        sys.exit(
            f"PEFT gives other outputs: by more than rounding, which is {rounding(ours):.1e} at most"
        )


if __name__ == "__main__":
    main()
