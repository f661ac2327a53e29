"""Train the quickstart's model on several processes with FSDP2, save its adapter once, reload it in one process.

    torchrun --nproc-per-node=2 examples/distributed.py                 gloo on the CPU, nccl on GPUs
    torchrun --nproc-per-node=2 examples/distributed.py --quick         the same path in seconds
    python examples/distributed.py --costs                              what an adapter costs in a large model

The order is: load the pretrained model, `inject`, `fully_shard`, `param_groups`. Every process then has its part of W,
of A, B and λ, of the frozen copy, of the gradients and of the optimiser's state. `adapter_state_dict` puts the parts
together: every process has to call it, one saves. What comes out is the same file as from one process.

--costs counts the adapter's tensors on Llamas without memory (the meta device). Of each decoder layer it prints what is
stored, and what every process receives for it in a step: FSDP2 gathers all parameters for the forward pass and, if
they are not kept, once more for the backward pass, and scatters the gradients of those that are trained. In MiB for a
decoder layer, with r = 16 in float32, the base in bfloat16 and 8 processes ("training" is gradients and AdamW's state,
"a process" the adapter's memory in each, "traffic" what each receives, and its share of what the base's weights need):

| model | adapted | base | adapter | training | a process | traffic | of the base's | adapters in all, GiB |
| --- | --- | --- | --- | --- | --- | --- | --- | --- |
| Llama-3 8B | q, v | 416.00 | 1.66 | 2.44 | 0.51 | 3.61 | 0.5% | 0.05 |
| Llama-3 8B | q, k, v, o | 416.00 | 3.31 | 4.88 | 1.02 | 7.22 | 1.0% | 0.10 |
| Llama-3 8B | all seven | 416.00 | 10.15 | 15.00 | 3.14 | 22.13 | 3.0% | 0.32 |
| Llama-3 70B | q, v | 1632.00 | 3.19 | 4.69 | 0.98 | 6.95 | 0.2% | 0.25 |
| Llama-3 70B | q, k, v, o | 1632.00 | 6.38 | 9.38 | 1.97 | 13.89 | 0.5% | 0.50 |
| Llama-3 70B | all seven | 1632.00 | 20.05 | 29.63 | 6.21 | 43.72 | 1.5% | 1.57 |

On many nodes nothing changes in the code of the model. torchrun --nnodes=4 --nproc-per-node=8 --rdzv-endpoint=HOST:PORT
starts it on every node, and fully_shard(..., mesh=init_device_mesh("cuda", (4, 8), mesh_dim_names=("replicate",
"shard"))) keeps the gathering inside a node and sends only the gradients of the adapter between nodes. A model that no
process can hold is made on the meta device, injected, sharded and then filled; a test of test_hosts.py does it. With
mixed precision the start is still exactly zero.
"""

import argparse
import contextlib
import os
import sys
import time
import warnings
from datetime import timedelta

warnings.filterwarnings(
    "ignore", message="Failed to initialize NumPy"
)  # torch without numpy, which is not needed

import torch
import torch.distributed as dist
from quickstart import (
    BATCH,
    CACHE,
    CONTEXT,
    Progress,
    english,
    loss_of,
    pretrained,
    python,
    rounding,
    validate,
)
from torch import nn

from delora import adapter_state_dict, inject, load_adapter, param_groups

LLAMAS = {  # name: (width, width of keys and values, width of the MLP, layers)
    "Llama-3 8B": (4096, 1024, 14336, 32),
    "Llama-3 70B": (8192, 1024, 28672, 80),
}
TARGETS = {"q, v": ["q", "v"], "q, k, v, o": ["q", "k", "v", "o"], "all seven": "all-linear"}


# ------------------------------------------------------------------------------------------------ training


def shard(model: nn.Module) -> nn.Module:
    """Every block is gathered when it is needed, and what stands outside of the blocks together."""
    from torch.distributed.fsdp import fully_shard

    for block in model.blocks:
        fully_shard(block)
    return fully_shard(model)


def train(
    model: nn.Module, text: torch.Tensor, steps: int, rank: int, world: int, device: str
) -> None:
    """Steps of AdamW. The processes share out the windows that a single one would take."""
    optimizer = torch.optim.AdamW(param_groups(model, lr=1e-2, lambda_lr=5e-3))
    generator, progress = torch.Generator().manual_seed(0), Progress("adapting", steps)
    model.train()
    for step in range(1, steps + 1):
        starts = torch.randint(len(text) - CONTEXT, (BATCH,), generator=generator).tolist()[
            rank::world
        ]
        windows = (
            torch.stack([text[i : i + CONTEXT + 1] for i in starts]).long().to(device)
        )  # (b / world, time + 1)
        optimizer.zero_grad()
        loss = loss_of(model, windows)
        loss.backward()  # FSDP2 averages the gradients
        optimizer.step()
        if rank == 0:
            progress(step, loss.item())
    model.eval()


def main(args: argparse.Namespace) -> None:
    start, rank, world = time.monotonic(), int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if BATCH % world:
        sys.exit(f"the batch of {BATCH} windows does not divide among {world} processes")
    device, backend = "cpu", "gloo"
    if torch.cuda.is_available() and not args.cpu:
        device, backend = f"cuda:{os.environ['LOCAL_RANK']}", "nccl"
        torch.cuda.set_device(device)
    dist.init_process_group(backend, timeout=timedelta(minutes=10))
    steps, windows = (4, 16) if args.quick else (100, 128)
    old, new = english()["valid"], python()

    silent = contextlib.redirect_stdout(None) if rank else contextlib.nullcontext()
    with silent:  # one process pretrains and caches, the others then read
        for turn in range(2):
            if turn == (rank > 0):
                base = pretrained(20 if args.quick else 600, device)
            dist.barrier()
        print(f"Adapted with DeLoRA under FSDP2, {world} processes ({backend})")
    before = validate(base, old, windows), validate(base, new["valid"], windows)

    torch.manual_seed(0)
    inject(base, "all-linear", r=8, exclude=["head"])
    whole = sum(p.nbytes for p in base.parameters())
    model = shard(base)
    held = sum(p.to_local().nbytes for p in model.parameters())
    train(model, new["train"], steps, rank, world, device)
    after = validate(model, old, windows), validate(model, new["valid"], windows)
    probe = new["valid"][: 4 * CONTEXT].view(4, CONTEXT).long().to(device)  # (4, time)
    with torch.no_grad():
        sharded = model(probe)  # (4, time, 256)

    state = adapter_state_dict(model)  # all processes: each has a part of every tensor
    path = CACHE / "adapter-distributed.pt"
    if rank == 0:
        torch.save(state, path)
    dist.barrier()
    dist.destroy_process_group()
    if rank:
        return

    fresh = pretrained(20 if args.quick else 600, device)
    load_adapter(fresh, torch.load(path, map_location=device, weights_only=True))
    with torch.no_grad():
        alone = fresh(probe)  # (4, time, 256)
    error = (alone - sharded).abs().max().item()
    print(f"""
Report, after {time.monotonic() - start:.0f} s on {world} x {device.split(":")[0]} with torch {torch.__version__}\
{" (--quick)" if args.quick else ""}
  loss, new text       {before[1]:.3f} -> {after[1]:.3f}   Python source code, nats per byte
  loss, old text       {before[0]:.3f} -> {after[0]:.3f}   English, what was forgotten
  parameters           {whole / 2**20:.2f} MiB in all, {held / 2**20:.2f} MiB in the first process
  checkpoint           {path.stat().st_size / 1024:.0f} KiB in {os.path.relpath(path)}
  in one process       logits differ by {error:.1e} at most, of up to {sharded.abs().max():.0f}""")
    if error > rounding(sharded):
        sys.exit("The reloaded adapter gives other outputs than the sharded one.")


# ------------------------------------------------------------------------------------------------ what it costs


def decoder_layer(width: int, width_kv: int, width_mlp: int) -> nn.ModuleDict:
    """The linear layers of one Llama decoder layer, without memory."""
    shapes = {
        "q": (width, width), "k": (width, width_kv), "v": (width, width_kv), "o": (width, width),
        "gate": (width, width_mlp), "up": (width, width_mlp), "down": (width_mlp, width),
    }  # fmt: skip
    like = {"bias": False, "device": "meta", "dtype": torch.bfloat16}
    return nn.ModuleDict(
        {name: nn.Linear(n_in, n_out, **like) for name, (n_in, n_out) in shapes.items()}
    )


def costs_of(layer: nn.Module, targets: list[str] | str, r: int, world: int) -> dict[str, float]:
    """Bytes of one layer. The adapter is float32 and is gathered so, the base bfloat16."""
    inject(layer, targets, r=r)
    adapter = [p for name, p in layer.named_parameters() if ".delora_" in name]
    trained = sum(p.nbytes for p in adapter if p.requires_grad)
    parameters, base = sum(p.nbytes for p in adapter), sum(p.nbytes for p in layer.parameters())
    base -= parameters
    received = (
        world - 1
    ) / world  # of what is gathered or scattered, a process has its own part already
    return {
        "base": base,
        "adapter": parameters,
        "training": 3 * trained,  # the gradients, and AdamW's two averages
        "traffic": received * (2 * parameters + trained),
        "base traffic": received * 2 * base,
    }


def print_costs(r: int, world: int) -> None:
    print(f"""Of one decoder layer, r = {r}, adapters in float32, base in bfloat16; MiB.
"training" is the gradients and AdamW's state, "a process" all of the adapter's memory in one of {world} processes,
"traffic" what each receives in a step for the adapter, "of the base's" its share of what the base's weights need.

| model | adapted | base | adapter | training | a process | traffic | of the base's | adapters in all, GiB |
| --- | --- | --- | --- | --- | --- | --- | --- | --- |""")
    for model, (width, width_kv, width_mlp, layers) in LLAMAS.items():
        for adapted, targets in TARGETS.items():
            c = costs_of(decoder_layer(width, width_kv, width_mlp), targets, r, world)
            stored = c["adapter"] + c["training"]
            numbers = [c["base"], c["adapter"], c["training"], stored / world, c["traffic"]]
            cells = [f"{number / 2**20:.2f}" for number in numbers]
            cells += [
                f"{c['traffic'] / c['base traffic']:.1%}",
                f"{layers * c['adapter'] / 2**30:.2f}",
            ]
            print(f"| {model} | {adapted} | {' | '.join(cells)} |")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--quick", action="store_true", help="the whole path in seconds, too short for good losses"
    )
    parser.add_argument(
        "--cpu", action="store_true", help="gloo on the CPU, even if there are GPUs"
    )
    parser.add_argument(
        "--costs",
        action="store_true",
        help="print memory and communication of large models, and exit",
    )
    parser.add_argument(
        "--rank", type=int, default=16, metavar="R", help="of the adapters in --costs (default: 16)"
    )
    parser.add_argument("--processes", type=int, default=8, help="in --costs (default: 8)")
    arguments = parser.parse_args()
    if arguments.costs:
        print_costs(arguments.rank, arguments.processes)
    elif "RANK" not in os.environ:
        sys.exit(
            "distributed.py is started by torchrun: torchrun --nproc-per-node=2 examples/distributed.py"
        )
    else:
        main(arguments)
