"""examples/distributed.py, and delora.py on several processes: DDP and FSDP2, on the CPU by gloo.

Two processes run a job, and answer by files in a folder; what one process does is the measure. The
script is started as its users start it, and its costs are compared with what FSDP2 sends.
"""

import io
import os
import re
import socket
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import distributed
import pytest
import torch
import torch.distributed as dist
from distributed import gathered_adapter, scatter_adapter, shard
from experiments.common import ByteTransformer, english, loss_of
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.utils._python_dispatch import TorchDispatchMode

from delora import (
    DeLoRA,
    DeLoRALinear,
    adapter_state_dict,
    inject,
    load_adapter,
    merge,
    param_groups,
)
from test_delora import distance, same_bits, tol

SCRIPT = Path(__file__).parent.parent / "distributed.py"
TEXT = english()["train"][:4096].long() % 128  # (bytes,), of ASCII
TOKENS = TEXT[:24].view(2, 12)  # (batch, time)

needs_fsdp2 = pytest.mark.skipif(
    torch.__version__ < "2.9",
    reason="before torch 2.9, FSDP2 on the CPU fails, or adds gradients up instead of averaging",
)


# ------------------------------------------------------------------------------------------------
# Models, and two processes
# ------------------------------------------------------------------------------------------------


def byte_transformer(**options):
    """The quickstart's model as it is before pretraining, with adapters on all but the head."""
    torch.manual_seed(0)
    model = ByteTransformer()
    inject(model, "all-linear", exclude=["head"], r=4, **options)
    return model


def loss_on_text(model, batch):
    """On windows of 33 bytes of English, of which the model takes those in batch."""
    return loss_of(model, TEXT[: 4 * 33].view(4, 33)[batch])


def half(rank):
    """The windows of one process."""
    return slice(2 * rank, 2 * rank + 2)


def descend(model, batch):
    """Three steps of gradient descent.

    They are as exact as its gradients. (Adam divides what is almost zero by itself.)
    """
    optimizer = torch.optim.SGD(param_groups(model, lr=5.0, lambda_lr=100.0))
    for _ in range(3):
        optimizer.zero_grad()
        loss_on_text(model, batch).backward()
        optimizer.step()


def depth(model):
    """The roundings in a row from first to last layer: the terms of the sums in all of them."""
    terms = 0
    for module in model.modules():
        weight = getattr(module, "weight", None)
        if torch.is_tensor(weight):
            terms += weight.shape[-1]
    return terms


class Awkward(nn.Module):
    """A layer with two names, a head tied to the embedding, a buffer, sizes that halve badly."""

    def __init__(self):
        super().__init__()
        self.token = nn.Embedding(5, 3)
        self.one = nn.Linear(3, 3)
        self.same = self.one
        self.narrow = nn.Linear(3, 1)
        self.wide = nn.Linear(1, 3)
        self.head = nn.Linear(3, 5, bias=False)
        self.head.weight = self.token.weight
        self.register_buffer("calls", torch.zeros(2))

    def forward(self, tokens):
        h = self.token(tokens)  # (batch, 3)
        h = self.same(self.one(h))
        return self.head(self.wide(self.narrow(h)))  # (batch, 5)


def awkward():
    """Adapted, untied, with a head that is trained."""
    torch.manual_seed(0)
    model = Awkward()
    inject(model, ["one", "narrow", "wide"], r=3, tie_lambda=False)
    model.head.requires_grad_(True)
    return model


def sharded_after_a_forward():
    """Awkward in two processes, in mixed precision. A forward pass leaves it whole, in bfloat16."""
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    model = awkward()
    fully_shard(model, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))
    with torch.no_grad():
        model(torch.arange(4))
    assert model.narrow.delora.A.dtype == torch.bfloat16
    return model


def nodes():
    """A mesh as of two nodes with one process each."""
    return init_device_mesh("cpu", (2, 1), mesh_dim_names=("node", "shard"))


def bytes_of(state):
    """The file that torch.save makes of it."""
    file = io.BytesIO()
    torch.save(state, file)
    return file.getvalue()


def equal(state, other):
    """Whether two checkpoints have the same keys in the same order, and the same bits."""
    if list(state) != list(other):
        return False
    return all(same_bits(state[key], other[key]) for key in state)


def worker(rank, job, folder):
    """Run job(rank, folder) in one of two processes."""
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", 2)
    timeout = timedelta(seconds=60)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=timeout)
    try:
        job(rank, Path(folder))
        dist.barrier()  # what the other process still waits for is done
    finally:
        dist.destroy_process_group()
    # subtle: after the job is done, torch's threads can abort a process that is taken down in order
    os._exit(0)


def in_two_processes(job, folder):
    """What each of them saved as RANK.pt in folder."""
    torch.multiprocessing.spawn(worker, (job, str(folder)), nprocs=2)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in (0, 1)]


# ------------------------------------------------------------------------------------------------
# Training
# ------------------------------------------------------------------------------------------------


def ends_like_one_process(state, **options):
    """What two processes reached is what one reaches on all windows, and not on half of them."""
    ends = []
    for batch in (slice(0, 4), half(0)):
        model = byte_transformer(**options)
        descend(model, batch)
        ends.append(adapter_state_dict(model))
    on_all, on_half = ends
    assert list(state) == list(on_all)
    told_apart = 0
    for key, value in on_all.items():
        rounding = tol(torch.float32, 3 * 4 * 32, value)  # three steps, each a sum over the tokens
        assert distance(state[key], value) <= rounding, key
        if distance(on_half[key], value) > 2 * rounding:
            told_apart += 1
    # A, B and λ of v, o, up and down in four blocks. (Untrained attention hardly moves q and k.)
    assert told_apart >= 3 * 4 * 4


def job_ddp(rank, folder):
    model = nn.parallel.DistributedDataParallel(byte_transformer())
    descend(model, half(rank))
    torch.save(adapter_state_dict(model.module), folder / f"{rank}.pt")


@pytest.mark.slow
def test_two_processes_under_ddp_end_at_the_weights_of_one(tmp_path):
    first, second = in_two_processes(job_ddp, tmp_path)
    assert equal(first, second)
    ends_like_one_process(first)


def job_fsdp2(rank, folder):
    answers = {}
    for tied in (True, False):
        options = {} if tied else {"mesh": nodes()}
        model = byte_transformer(tie_lambda=tied)
        start = model(TOKENS)
        shard(model, **options)
        assert same_bits(model(TOKENS), start)
        descend(model, half(rank))
        for key, p in model.named_parameters():
            assert hasattr(p, "full_tensor"), key  # it is in parts
            if p.requires_grad:
                assert hasattr(p.grad, "full_tensor"), key
        state = gathered_adapter(model)

        again = shard(byte_transformer(tie_lambda=tied), **options)
        scatter_adapter(again, state)
        assert same_bits(again(TOKENS), model(TOKENS))
        answers[tied] = {"adapter": state, "logits": model(TOKENS).detach()}
    torch.save(answers, folder / f"{rank}.pt")


@needs_fsdp2
def test_two_processes_under_fsdp2_end_at_the_weights_of_one_and_save_one_file(tmp_path):
    """Tied, and on a mesh of nodes untied. One process loads the file, and gives the outputs."""
    first, second = in_two_processes(job_fsdp2, tmp_path)
    for tied in (True, False):
        state, logits = first[tied]["adapter"], first[tied]["logits"]
        assert equal(state, second[tied]["adapter"])
        ends_like_one_process(state, tie_lambda=tied)
        torch.manual_seed(0)
        single = ByteTransformer()
        load_adapter(single, state)
        assert distance(single(TOKENS), logits) <= tol(torch.float32, depth(single), logits)


class Recorder(nn.Module):
    """A model that remembers what it was given."""

    def __init__(self):
        super().__init__()
        self.logits = nn.Parameter(torch.zeros(256))
        self.seen = []

    def forward(self, tokens):
        self.seen += tokens.tolist()
        return self.logits.expand(*tokens.shape, 256)


def test_the_processes_share_out_the_windows_that_a_single_one_would_take():
    seen = []
    for rank, world in ((0, 1), (0, 2), (1, 2)):
        model = Recorder()
        optimizer = torch.optim.SGD(model.parameters())
        distributed.train(model, optimizer, english()["train"], 2, rank, world)
        seen.append(model.seen)
    single, first, second = seen
    assert len(first) == len(second) == 16
    assert sorted(first + second) == sorted(single)


def job_mixed_precision(rank, folder):
    from torch.distributed.fsdp import MixedPrecisionPolicy

    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    base = byte_transformer()
    for module in base.modules():
        if isinstance(module, DeLoRALinear):
            module.enabled = False
    shard(base, mp_policy=policy)
    for tied in (True, False):
        model = shard(byte_transformer(tie_lambda=tied), mp_policy=policy)
        with torch.no_grad():
            start = model(TOKENS)
            assert start.dtype == torch.bfloat16
            assert same_bits(start, base(TOKENS))
        descend(model, half(rank))
        assert not same_bits(model(TOKENS), start)
        for key, value in gathered_adapter(model).items():
            assert value.dtype == torch.float32, key
    torch.save("done", folder / f"{rank}.pt")


@needs_fsdp2
def test_the_start_is_zero_to_the_bit_in_mixed_precision(tmp_path):
    assert in_two_processes(job_mixed_precision, tmp_path) == ["done", "done"]


def job_from_meta(rank, folder):
    with torch.device("meta"):
        model = ByteTransformer()
    adapters = inject(model, "all-linear", exclude=["head"], r=4)
    shard(model)
    model.to_empty(device="cpu")

    torch.manual_seed(0)
    files = ByteTransformer().state_dict()  # of which only one tensor is used at a time
    not_strict = StateDictOptions(full_state_dict=True, strict=False)
    for key, value in files.items():
        name, _, leaf = key.rpartition(".")
        if name in adapters:
            key = f"{name}.base_layer.{leaf}"
        set_model_state_dict(model, {key: value}, options=not_strict)
    state = {}
    for name in adapters:
        delora = DeLoRA(files[f"{name}.weight"], r=4)
        for leaf, value in delora.state_dict().items():
            state[f"{name}.delora.{leaf}"] = value
    scatter_adapter(model, state)

    start = model(TOKENS).detach()
    descend(model, half(rank))
    answer = {"start": start, "files": state, "adapter": gathered_adapter(model)}
    torch.save(answer, folder / f"{rank}.pt")


@pytest.mark.slow
@needs_fsdp2
def test_a_model_that_no_process_holds_is_filled_tensor_by_tensor(tmp_path):
    """It starts as the pretrained model, and ends as one that was loaded, injected and sharded."""
    first, second = in_two_processes(job_from_meta, tmp_path)
    whole = byte_transformer()
    assert equal(first["files"], adapter_state_dict(whole))
    with torch.no_grad():
        assert same_bits(first["start"], whole(TOKENS))
    assert equal(first["adapter"], second["adapter"])
    ends_like_one_process(first["adapter"])


# ------------------------------------------------------------------------------------------------
# Saving and loading
# ------------------------------------------------------------------------------------------------


def job_file(rank, folder):
    from torch.distributed.fsdp import fully_shard

    model = awkward()
    fully_shard(model)
    states = [gathered_adapter(model), gathered_adapter(sharded_after_a_forward())]
    torch.save([bytes_of(state) for state in states], folder / f"{rank}.pt")


@needs_fsdp2
def test_the_file_is_that_of_one_process_byte_for_byte(tmp_path):
    """Seen: after a forward pass in mixed precision, tensors in bfloat16; frozen ones missing."""
    wanted = bytes_of(adapter_state_dict(awkward()))
    assert in_two_processes(job_file, tmp_path) == [[wanted, wanted], [wanted, wanted]]


def changed(state):
    """The same tensors with other values. What is tied stays so."""
    return {key: value + 1 for key, value in state.items()}


def job_load(rank, folder):
    other = changed(adapter_state_dict(awkward()))
    model = sharded_after_a_forward()
    trainable = [key for key, p in model.named_parameters() if p.requires_grad]
    passed = dict(other)
    scatter_adapter(model, passed)
    assert passed.keys() == other.keys()  # set_model_state_dict writes into what it is given
    assert all(passed[key] is other[key] for key in other)
    assert trainable == [key for key, p in model.named_parameters() if p.requires_grad]
    everything = {}
    for key, p in model.named_parameters():
        everything[key] = p.full_tensor().detach().clone()
    torch.save({"adapter": gathered_adapter(model), "all": everything}, folder / f"{rank}.pt")


@needs_fsdp2
def test_what_is_scattered_is_what_is_gathered_and_nothing_else_changes(tmp_path):
    """Also where a layer has two names, and where the last forward pass left the model whole."""
    model = awkward()
    other = changed(adapter_state_dict(model))
    for answer in in_two_processes(job_load, tmp_path):
        assert equal(answer["adapter"], other)
        for key, p in model.named_parameters():
            assert same_bits(answer["all"][key], other.get(key, p.detach())), key


def test_a_model_in_one_process_is_saved_and_loaded_too():
    model = awkward()
    state = gathered_adapter(model)
    assert equal(state, adapter_state_dict(model))
    other = changed(state)
    scatter_adapter(model, other)
    assert equal(adapter_state_dict(model), other)
    assert equal(state, adapter_state_dict(awkward()))  # a copy, which did not follow


def wrong_states():
    """(a checkpoint that does not fit, the message that names the key)"""
    right = changed(adapter_state_dict(awkward()))
    for key in ("narrow.delora.A", "wide.delora.lam0", "same.delora.w", "head.weight"):
        less = dict(right)
        del less[key]
        yield less, f"^{key} is missing"
    yield right | {"narrow.weight": torch.ones(1, 3)}, "^narrow.weight: the model has no adapter"
    yield right | {"calls": torch.ones(2)}, "^calls: the model has no adapter"
    wrong = {"wide.delora.B": torch.ones(2, 3)}
    yield right | wrong, r"^wide.delora.B: .*2, 3.* in the file, .*3, 3.* here"
    yield right | {"one.delora.lam": 3.0}, "^one.delora.lam: None in the file"
    wrong = {"same.delora.A": torch.ones(3, 3)}
    yield right | wrong, "^same.delora.A: tied to one.delora.A in the model, not in the file"


def job_refuse(rank, folder):
    model = sharded_after_a_forward()
    before = gathered_adapter(model)
    for state, message in wrong_states():
        with pytest.raises(ValueError, match=message):
            scatter_adapter(model, state)
        assert equal(gathered_adapter(model), before), message
    torch.save("done", folder / f"{rank}.pt")


@needs_fsdp2
def test_a_checkpoint_that_does_not_fit_is_refused_by_its_key_in_every_process(tmp_path):
    assert in_two_processes(job_refuse, tmp_path) == ["done", "done"]


# ------------------------------------------------------------------------------------------------
# delora.py itself
# ------------------------------------------------------------------------------------------------


def layers_of_all_sizes():
    """Adapted layers with an input of 1 to 5, tied and untied, λ below zero and not λ₀."""
    torch.manual_seed(0)
    model = nn.ModuleList()
    for n_in in (1, 2, 3, 5):
        for tied in (True, False):
            layer = DeLoRALinear(nn.Linear(n_in, 4), r=1, tie_lambda=tied)
            layer.delora.lam.data.fill_(-7.3)
            model.append(layer)
    return model


def bounds(model):
    return [layer.delora.norm_bound() for layer in model]


def job_norm_bound(rank, folder):
    from torch.distributed.fsdp import fully_shard

    found = []
    for options in ({}, {"mesh": nodes()}):
        model = layers_of_all_sizes()
        for layer in model:
            fully_shard(layer, **options)
        found.append(bounds(model))
    torch.save(found, folder / f"{rank}.pt")


@pytest.mark.slow
@needs_fsdp2
def test_the_norm_bound_is_the_same_number_in_every_process(tmp_path):
    """Seen: of w (1,) the second process has nothing. It raised, and the first waited for it."""
    wanted = bounds(layers_of_all_sizes())
    assert in_two_processes(job_norm_bound, tmp_path) == [[wanted, wanted], [wanted, wanted]]


def job_alone(rank, folder):
    """The second process does nothing: if the first waited for it, it would wait in vain."""
    model = shard(byte_transformer())
    answer = []
    if rank == 0:
        answer.append(repr(model))
        state = adapter_state_dict(byte_transformer())
        for call in (adapter_state_dict, merge, lambda model: load_adapter(model, state)):
            with pytest.raises(TypeError) as caught:
                call(model)
            answer.append(str(caught.value))
    torch.save(answer, folder / f"{rank}.pt")


@needs_fsdp2
def test_one_process_alone_can_print_a_sharded_model_and_is_refused_to_save_it(tmp_path):
    (printed, *refusals), nothing = in_two_processes(job_alone, tmp_path)
    assert nothing == []
    assert "4 x FSDPBlock" in printed  # sharded block by block
    assert printed.count("r=4, lam=") == 6  # blocks that print alike are printed once
    sharded = "is sharded. For FSDP2 see examples/distributed.py"
    assert refusals[0] == f"blocks.0.q.delora.A {sharded}"
    assert refusals[1] == f"blocks.0.q {sharded}"
    assert refusals[2] == f"blocks.0.q.delora.A {sharded}"


def job_refuse_to_save(rank, folder):
    model = sharded_after_a_forward()
    with pytest.raises(TypeError) as caught:
        adapter_state_dict(model)
    torch.save(str(caught.value), folder / f"{rank}.pt")


@needs_fsdp2
def test_what_a_forward_pass_left_whole_is_refused_as_well(tmp_path):
    """Seen: saved without a word, in the bfloat16 of mixed precision."""
    for message in in_two_processes(job_refuse_to_save, tmp_path):
        assert message.startswith("token.weight is sharded")


# ------------------------------------------------------------------------------------------------
# The script
# ------------------------------------------------------------------------------------------------


def launch(*command, **variables):
    """A Python process that has one thread."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | variables
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, *command], env=environment, **pipes)


def finish(process):
    """Its exit status, and what it printed."""
    try:
        printed, errors = process.communicate(timeout=300)
    finally:
        process.kill()
    return process.returncode, printed, errors


def free_port():
    with socket.socket() as candidate:
        candidate.bind(("localhost", 0))
        return candidate.getsockname()[1]


@needs_fsdp2
@pytest.mark.slow
@pytest.mark.parametrize("count", (1, 2), ids=("one node", "two nodes"))
def test_two_processes_train_save_once_and_one_reloads(count):
    torchrun = [
        "-m",
        "torch.distributed.run",
        f"--nnodes={count}",
        f"--nproc-per-node={2 // count}",
    ]
    torchrun += ["--rdzv-backend=c10d", f"--rdzv-endpoint=localhost:{free_port()}"]
    started = [launch(*torchrun, str(SCRIPT), "--quick", "--cpu") for _ in range(count)]
    report = ""
    for node in started:
        status, printed, errors = finish(node)
        assert status == 0, errors[-2000:]
        report += printed
    assert report.count("Report, after") == 1
    before, after = re.search(r"new text +([\d.]+) -> ([\d.]+)", report).groups()
    assert float(after) < float(before)
    for what in ("parameters", "AdamW's state"):
        whole, held = re.search(rf"{what} +([\d.]+) MiB in all, ([\d.]+) MiB", report).groups()
        assert abs(float(held) - float(whole) / 2) <= 0.01  # which is what is printed
    assert "scattered again      the same outputs, bit for bit" in report


@pytest.mark.slow
@pytest.mark.parametrize(
    ("variables", "message"),
    (
        ({}, "distributed.py is started by torchrun: torchrun --nproc"),
        ({"RANK": "0", "WORLD_SIZE": "3"}, "the batch of 16 windows does not divide among 3"),
    ),
    ids=("without torchrun", "three processes"),
)
def test_what_cannot_be_started_says_why_in_one_line(variables, message):
    status, _, errors = finish(launch(str(SCRIPT), **variables))
    assert status == 1
    assert errors.startswith(message)
    assert len(errors.splitlines()) == 1


# ------------------------------------------------------------------------------------------------
# What it costs
# ------------------------------------------------------------------------------------------------


def two_layers(device):
    like = {"bias": False, "device": device, "dtype": torch.bfloat16}
    return nn.Sequential(nn.Linear(64, 48, **like), nn.Linear(48, 64, **like))


class Received(TorchDispatchMode):
    """Counts the bytes that this process receives from others, by kind of collective."""

    def __init__(self):
        super().__init__()
        self.bytes = {"gather": 0, "scatter": 0, "reduce": 0}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = str(function)
        if "c10d._allgather_base_" in name:  # the first is the result
            self.bytes["gather"] += args[0].nbytes - args[1].nbytes
        elif "c10d._reduce_scatter_base_" in name:
            self.bytes["scatter"] += args[1].nbytes - args[0].nbytes
        elif "c10d.allreduce_" in name:
            self.bytes["reduce"] += sum(tensor.nbytes for tensor in args[0])
        elif "c10d" in name:
            raise AssertionError(f"{name} is not counted")
        return function(*args, **(kwargs or {}))


def job_traffic(rank, folder):
    from torch.distributed.fsdp import fully_shard

    answer = {}
    kinds = {"default": {}, "kept": {"reshard_after_forward": False}, "nodes": {"mesh": nodes()}}
    for kind, options in kinds.items():
        torch.manual_seed(0)
        block = two_layers("cpu")
        x = torch.randn(3, 64, dtype=torch.bfloat16)
        y = block(x)
        inject(block, "all-linear", r=4)
        model = nn.Sequential(block)
        fully_shard(block, **options)
        fully_shard(model, mesh=options.get("mesh"))
        assert same_bits(model(x), y)
        model(x).sum().backward()
        with Received() as received:  # the second step
            model(x).sum().backward()
        answer[kind] = received.bytes
    torch.save(answer, folder / f"{rank}.pt")


@pytest.mark.slow
@needs_fsdp2
def test_the_costs_are_what_fsdp2_sends(tmp_path):
    """W in bfloat16, the adapter in float32. Between nodes: the gradients, and nothing else."""
    costs = distributed.costs_of(two_layers("meta"), "all-linear", r=4, world=2)
    # λ has one element, and goes as two: in two layers 8 bytes, of which a process receives half.
    padding = 4
    gather = (costs["base"] + costs["adapter"]) / 2 + padding
    gradients = costs["training"] / 3
    for received in in_two_processes(job_traffic, tmp_path):
        scatter = gradients / 2 + padding
        assert received["default"] == {"gather": 2 * gather, "scatter": scatter, "reduce": 0}
        assert received["kept"] == {"gather": gather, "scatter": scatter, "reduce": 0}
        assert received["nodes"] == {"gather": 0, "scatter": 0, "reduce": gradients}
        total = sum(received["default"].values())
        assert total == costs["traffic"] + costs["base traffic"] + 3 * padding


def test_the_costs_count_the_tensors_of_a_layer_by_hand():
    layer = nn.ModuleDict({"q": nn.Linear(64, 48, bias=False, device="meta", dtype=torch.bfloat16)})
    counted = distributed.costs_of(layer, ["q"], r=5, world=8)
    trained = 4 * (5 * 64 + 48 * 5 + 1)
    adapter = trained + 4 * (5 * 64 + 48 * 5 + 64)
    assert isinstance(layer["q"], DeLoRALinear)
    assert counted == {
        "base": 2 * 64 * 48,
        "adapter": adapter,
        "training": 3 * trained,
        "traffic": 7 / 8 * (2 * adapter + trained),
        "base traffic": 7 / 8 * 2 * 2 * 64 * 48,
    }


def test_the_table_of_costs_in_the_docstring_is_what_the_script_prints(capsys):
    distributed.print_costs(r=16, world=8)
    printed = capsys.readouterr().out
    assert printed[printed.index("| model") :] in distributed.__doc__
