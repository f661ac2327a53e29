# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.9", "numpy"]
# ///
"""Train the quickstart's model on several processes with FSDP2, save its adapter once, reload it.

    torchrun --nproc-per-node=2 examples/distributed.py            gloo on the CPU, nccl on GPUs
    torchrun --nproc-per-node=2 examples/distributed.py --quick    the same path in seconds
    torchrun --nproc-per-node=2 examples/distributed.py --cpu      gloo, even if there are GPUs
    python examples/distributed.py --costs                what an adapter costs in a large model

The order is: load the pretrained model, `inject`, `fully_shard`, `param_groups`. Every process then
has its part of each tensor: of W, of A, B and λ, of the frozen copy, of the gradients and of the
optimiser's state. delora.py saves, loads and merges whole tensors only. Between the two stand
`gathered_adapter` and `scatter_adapter` below, to be copied:

    state = gathered_adapter(model)    every process calls it, and one saves
    load_adapter(model, state)         into a model in one process: the file is the same
    scatter_adapter(model, state)      into a sharded model: load, inject, fully_shard, scatter

To merge, load the file in one process.

What it costs. --costs counts the adapter's tensors in Llamas without memory (on the meta device),
with r = 16 in float32, the base in bfloat16, 8 processes. In MiB for a decoder layer: "training" is
gradients and AdamW's state, "a process" the adapter's memory in each, "traffic" what each receives
in a step (FSDP2 gathers all parameters for the forward pass, again for the backward pass unless
they are kept, and scatters the gradients of those that are trained), "share" what that is of the
traffic for the base's weights. "In all" is the adapter of the whole model, in GiB:

| model | adapted | base | adapter | training | a process | traffic | share | in all |
| --- | --- | --- | --- | --- | --- | --- | --- | --- |
| Llama-3 8B | q, v | 416.00 | 1.66 | 2.44 | 0.51 | 3.61 | 0.5% | 0.05 |
| Llama-3 8B | q, k, v, o | 416.00 | 3.31 | 4.88 | 1.02 | 7.22 | 1.0% | 0.10 |
| Llama-3 8B | all seven | 416.00 | 10.15 | 15.00 | 3.14 | 22.13 | 3.0% | 0.32 |
| Llama-3 70B | q, v | 1632.00 | 3.19 | 4.69 | 0.98 | 6.95 | 0.2% | 0.25 |
| Llama-3 70B | q, k, v, o | 1632.00 | 6.38 | 9.38 | 1.97 | 13.89 | 0.5% | 0.50 |
| Llama-3 70B | all seven | 1632.00 | 20.05 | 29.63 | 6.21 | 43.72 | 1.5% | 1.57 |

Many nodes. The code stays as it is, and every node starts it by the same command:

    torchrun --nnodes=4 --nproc-per-node=8 --rdzv-backend=c10d --rdzv-endpoint=HOST:PORT ...

On a mesh of nodes and their processes FSDP2 gathers inside a node, and sends from node to node
nothing but the gradients of the adapter: fully_shard(module, mesh=mesh), where

    mesh = init_device_mesh("cuda", (4, 8), mesh_dim_names=("node", "shard"))

A model that no process can hold is made on the meta device, injected and sharded there, given
memory by model.to_empty(device=...), and filled, the weights tensor by tensor as they come from
their files, by `set_model_state_dict`; the adapter by `scatter_adapter`, with the tensors of
DeLoRA(W).state_dict(), which take one W at a time.

Mixed precision, fully_shard(module, mp_policy=...), leaves the start exactly zero.

Before torch 2.9, FSDP2 on the CPU adds gradients up where it should average them. Before 2.8, W and
the adapter have to be of one dtype.
"""

import argparse
import io
import os
import sys
import time
from datetime import timedelta

import torch
import torch.distributed as dist
from experiments.common import (
    BATCH,
    CACHE,
    CONTEXT,
    PRETRAINING_STEPS,
    QUICK_STEPS,
    Progress,
    decay,
    english,
    loss_of,
    pretrained,
    python,
    rounding,
    validate,
    windows_at,
)
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    set_model_state_dict,
)

from delora import DeLoRA, inject, load_adapter, param_groups

LLAMAS = {  # name: (width, width of keys and values, width of the MLP, layers)
    "Llama-3 8B": (4096, 1024, 14336, 32),
    "Llama-3 70B": (8192, 1024, 28672, 80),
}
TARGETS = {"q, v": ["q", "v"], "q, k, v, o": ["q", "k", "v", "o"], "all seven": "all-linear"}


# ------------------------------------------------------------------------------------------------
# Saving and loading, to be copied
# ------------------------------------------------------------------------------------------------


def adapter_parts(model):
    """What `adapter_state_dict` saves, by its keys, but of each tensor the part in this process.

    That is every tensor of a DeLoRA, and every other parameter that is trainable.
    """
    # subtle: this comes first. A forward pass may leave parameters whole, and in the dtype of mixed
    # precision; get_model_state_dict has FSDP2 put the parts back in their place. It sends nothing.
    parts = get_model_state_dict(model)
    adapted = set()
    for module in model.modules():
        if isinstance(module, DeLoRA):
            adapted.update(module.parameters())
    found = {}
    for key, p in model.named_parameters(remove_duplicate=False):
        if p in adapted or p.requires_grad:
            found[key] = parts[key]
    return found


def gathered_adapter(model):
    """What `adapter_state_dict` returns for the same model in one process, on the CPU.

    Every process has to call it, and gets all of it. W is not gathered.
    """
    state = {}
    for key, part in adapter_parts(model).items():
        whole = part.full_tensor() if hasattr(part, "full_tensor") else part
        state[key] = whole.to("cpu", copy=True)
    return state


def scatter_adapter(model, state):
    """Load what `gathered_adapter` returned into a model with the same adapters, sharded or not.

    Every process has to call it, with all of state. What is trainable stays so.

    Raises:
        ValueError: a tensor is missing, unknown, of another shape, or differs from one that it is
            tied to. The message has the key. Every process raises it, and the model is as it was.
    """
    parts = adapter_parts(model)
    for key, part in parts.items():
        if key not in state:
            raise ValueError(f"{key} is missing")
        shape = getattr(state[key], "shape", None)
        if shape != part.shape:  # of a part, .shape is that of the whole
            raise ValueError(f"{key}: {shape} in the file, {part.shape} here")
    for key in state:
        if key not in parts:
            raise ValueError(f"{key}: the model has no adapter and nothing trainable of that name")

    # A tensor with several names is loaded by the first of them.
    first_keys = {}
    for key, p in model.named_parameters(remove_duplicate=False):
        if key not in state:
            continue
        first = first_keys.setdefault(p, key)
        if first != key and not torch.equal(state[first], state[key]):
            raise ValueError(f"{key}: tied to {first} in the model, not in the file")
    values = {key: state[key] for key in first_keys.values()}
    # Not strict, since W is not in the file.
    options = StateDictOptions(full_state_dict=True, strict=False)
    set_model_state_dict(model, values, options=options)


# ------------------------------------------------------------------------------------------------
# Training
# ------------------------------------------------------------------------------------------------


def shard(model, **options):
    """A block is gathered when it is needed; so is, together, what stands outside of the blocks."""
    from torch.distributed.fsdp import fully_shard  # not in every torch that can print the costs

    for block in model.blocks:
        fully_shard(block, **options)
    return fully_shard(model, **options)


def train(model, optimizer, text, steps, rank, world):
    """Each process takes its share of the windows that a single one would take."""
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(0)
    progress = Progress("adapting", steps)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, decay(steps))
    model.train()
    for step in range(1, steps + 1):
        starts = torch.randint(len(text) - CONTEXT, (BATCH,), generator=generator).tolist()
        windows = windows_at(text, starts[rank::world], device)  # (batch / world, time + 1)
        optimizer.zero_grad()
        loss = loss_of(model, windows)
        loss.backward()  # FSDP2 averages the gradients
        optimizer.step()
        schedule.step()
        progress(step, loss.item())
    model.eval()


def sizes(tensors):
    """MiB of tensors that are in parts: of the whole, and of the parts in this process."""
    whole, here = 0, 0
    for tensor in tensors:
        whole += tensor.nbytes
        here += tensor.to_local().nbytes
    return f"{whole / 2**20:.2f} MiB in all, {here / 2**20:.2f} MiB in the first process"


def main(args):
    start = time.monotonic()
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if BATCH % world:
        sys.exit(f"the batch of {BATCH} windows does not divide among {world} processes")
    device, backend = "cpu", "gloo"
    if torch.cuda.is_available() and not args.cpu:
        device, backend = f"cuda:{os.environ['LOCAL_RANK']}", "nccl"
        torch.cuda.set_device(device)
    dist.init_process_group(backend, timeout=timedelta(minutes=10))
    if rank > 0:
        sys.stdout = io.StringIO()  # the first process speaks for all
    pretraining = QUICK_STEPS if args.quick else PRETRAINING_STEPS
    steps, windows = (10, 16) if args.quick else (100, 128)
    old, new = english()["valid"], python()["valid"]

    print("1. A model pretrained on English: one process makes it, the others read it")
    if rank > 0:
        dist.barrier()
    model = pretrained(pretraining, device)
    if rank == 0:
        dist.barrier()
    old_before, new_before = validate(model, old, windows), validate(model, new, windows)

    print(f"2. Adapted with DeLoRA under FSDP2, on {world} processes ({backend})")
    torch.manual_seed(0)
    inject(model, "all-linear", r=8, exclude=["head"])
    shard(model)
    optimizer = torch.optim.AdamW(param_groups(model, lr=1e-2, lambda_lr=5e-3))
    train(model, optimizer, python()["train"], steps, rank, world)
    old_after, new_after = validate(model, old, windows), validate(model, new, windows)

    print("3. Gathered, saved, and scattered again into another model in parts")
    probe = new[: 4 * CONTEXT].view(4, CONTEXT).long().to(device)  # (4, time)
    state = gathered_adapter(model)
    path = CACHE / "adapter-distributed.pt"
    if rank == 0:
        torch.save(state, path)
    again = pretrained(pretraining, device)
    inject(again, "all-linear", r=8, exclude=["head"])
    shard(again)
    scatter_adapter(again, state)
    with torch.no_grad():
        sharded = model(probe)  # (4, time, 256)
        same = torch.equal(again(probe), sharded)
    parameters = sizes(model.state_dict().values())
    averages = []
    for of_one_parameter in optimizer.state.values():
        averages += [of_one_parameter["exp_avg"], of_one_parameter["exp_avg_sq"]]
    optimizer_state = sizes(averages)
    dist.barrier()
    dist.destroy_process_group()
    if rank > 0:
        return

    print("4. Reloaded in one process")
    fresh = pretrained(pretraining, device)
    load_adapter(fresh, torch.load(path, map_location=device, weights_only=True))
    with torch.no_grad():
        alone = fresh(probe)  # (4, time, 256)
    error, allowed = (alone - sharded).abs().max().item(), rounding(sharded)

    seconds = time.monotonic() - start
    where = f"{world} x {device.split(':')[0]} with torch {torch.__version__}"
    print(f"\nReport, after {seconds:.0f} s on {where}{' (--quick)' if args.quick else ''}")
    print(f"  loss, new text       {new_before:.3f} -> {new_after:.3f}   Python, nats per byte")
    print(f"  loss, old text       {old_before:.3f} -> {old_after:.3f}   English, forgotten")
    print(f"  parameters           {parameters}")
    print(f"  AdamW's state        {optimizer_state}")
    print(f"  checkpoint           {path.stat().st_size / 1024:.0f} KiB in {os.path.relpath(path)}")
    print(f"  scattered again      {'the same outputs, bit for bit' if same else 'OTHER OUTPUTS'}")
    print(f"  in one process       logits of up to {sharded.abs().max():.0f} differ by {error:.1e}")
    if not same or error > allowed:
        sys.exit("Something is wrong: the reloaded adapter gives other outputs.")


# ------------------------------------------------------------------------------------------------
# What it costs
# ------------------------------------------------------------------------------------------------


def decoder_layer(width, width_kv, width_mlp):
    """The linear layers of one Llama decoder layer, without memory."""
    shapes = {
        "q": (width, width),
        "k": (width, width_kv),
        "v": (width, width_kv),
        "o": (width, width),
        "gate": (width, width_mlp),
        "up": (width, width_mlp),
        "down": (width_mlp, width),
    }
    layer = nn.ModuleDict()
    for name, (n_in, n_out) in shapes.items():
        layer[name] = nn.Linear(n_in, n_out, bias=False, device="meta", dtype=torch.bfloat16)
    return layer


def costs_of(layer, targets, r, world):
    """Bytes of one layer, which is adapted here."""
    base = sum(p.nbytes for p in layer.parameters())
    adapter, trained = 0, 0
    for adapted in inject(layer, targets, r=r).values():
        for p in adapted.delora.parameters():
            adapter += p.nbytes
            if p.requires_grad:
                trained += p.nbytes
    # What is gathered or scattered comes from all the others: a process has its own part already.
    received = (world - 1) / world
    return {
        "base": base,
        "adapter": adapter,
        "training": 3 * trained,  # the gradients, and AdamW's two averages
        "traffic": received * (2 * adapter + trained),
        "base traffic": received * 2 * base,
    }


def print_costs(r, world):
    print(f"Of one decoder layer, r = {r}, adapters in float32, base in bfloat16; MiB.")
    print(
        '"training" is gradients and AdamW\'s state, "a process" the adapter\'s memory in each of'
    )
    print(
        f'{world}, "traffic" what each receives in a step for the adapter, "share" what that is of'
    )
    print('the traffic for the base\'s weights, "in all" the adapter of the whole model in GiB.\n')
    print("| model | adapted | base | adapter | training | a process | traffic | share | in all |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    for model, (width, width_kv, width_mlp, layers) in LLAMAS.items():
        for adapted, targets in TARGETS.items():
            costs = costs_of(decoder_layer(width, width_kv, width_mlp), targets, r, world)
            in_each = (costs["adapter"] + costs["training"]) / world
            stored = [costs["base"], costs["adapter"], costs["training"], in_each, costs["traffic"]]
            cells = [model, adapted]
            for size in stored:
                cells.append(f"{size / 2**20:.2f}")
            cells.append(f"{costs['traffic'] / costs['base traffic']:.1%}")
            cells.append(f"{layers * costs['adapter'] / 2**30:.2f}")
            print(f"| {' | '.join(cells)} |")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="the whole path in seconds")
    parser.add_argument("--cpu", action="store_true", help="gloo, even if there are GPUs")
    parser.add_argument("--costs", action="store_true", help="print the costs only")
    parser.add_argument(
        "--rank", type=int, default=16, metavar="R", help="in --costs (default: 16)"
    )
    parser.add_argument("--processes", type=int, default=8, help="in --costs (default: 8)")
    arguments = parser.parse_args()
    if arguments.costs:
        print_costs(arguments.rank, arguments.processes)
    elif "RANK" not in os.environ:
        command = "torchrun --nproc-per-node=2 examples/distributed.py"
        sys.exit(f"distributed.py is started by torchrun: {command}")
    else:
        main(arguments)
