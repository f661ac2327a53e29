"""examples/distributed.py: started as its users start it, and its costs against what FSDP2 sends."""

import os
import re
import subprocess
import sys
from pathlib import Path

import distributed
import pytest
import test_hosts
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from delora import DeLoRALinear, inject

SCRIPT = Path(__file__).parent / "distributed.py"


def run(*command: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *command], env=environment, capture_output=True, text=True, timeout=300
    )


def test_two_processes_train_save_once_and_one_reloads():
    if not hasattr(pytest.importorskip("torch.distributed.fsdp"), "fully_shard"):
        pytest.skip("FSDP2 is torch 2.6's")
    done = run("-m", "torch.distributed.run", "--nproc-per-node=2", str(SCRIPT), "--quick", "--cpu")
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("Report, after") == 1
    new = re.search(r"new text +([\d.]+) -> ([\d.]+)", done.stdout)
    assert float(new[2]) < float(new[1])
    whole, held = map(
        float, re.search(r"parameters +([\d.]+) MiB in all, ([\d.]+) MiB", done.stdout).groups()
    )
    assert whole / 2 <= held + 0.01 < 0.51 * whole


def test_without_torchrun_one_line_says_what_to_type():
    done = run(str(SCRIPT))
    assert done.returncode == 1 and done.stderr.startswith(
        "distributed.py is started by torchrun: torchrun --nproc"
    )
    assert len(done.stderr.splitlines()) == 1


def two_layers(device: str) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(64, 48, bias=False, device=device), nn.Linear(48, 64, bias=False, device=device)
    )


def job_traffic(rank: int, folder: Path) -> None:
    """The bytes that a process sends or receives in the second step, by kind of collective."""
    from torch.distributed.fsdp import fully_shard

    sent = {"allgather": 0, "reduce_scatter": 0}

    class Collectives(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            for kind in sent:
                if f"c10d._{kind}_base" in str(function):
                    sent[kind] += max(args[0].nbytes, args[1].nbytes)  # of all processes together
            return function(*args, **(kwargs or {}))

    block, x = two_layers("cpu"), torch.randn(3, 64)
    inject(block, "all-linear", r=4)
    model = nn.Sequential(block)
    fully_shard(block)
    fully_shard(model)
    model(x).sum().backward()
    with Collectives():
        model(x).sum().backward()
    torch.save(sent, folder / f"{rank}.pt")


def test_the_costs_are_what_fsdp2_sends(tmp_path):
    test_hosts.in_two_processes(job_traffic, tmp_path)
    counted = distributed.costs_of(two_layers("meta"), "all-linear", r=4, world=2)
    for rank in (0, 1):
        sent = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        total = (sent["allgather"] + sent["reduce_scatter"]) / 2  # half of it is a process' own
        padding = (
            3 * 2 * 4 / 2
        )  # λ has one element, and goes as two: 3 collectives, 2 layers, 4 bytes
        assert total == counted["traffic"] + counted["base traffic"] + padding
        assert (
            sent["allgather"] > 2 * counted["base"]
            and 0 < sent["reduce_scatter"] < sent["allgather"] / 4
        )


def test_the_costs_count_the_tensors_of_a_layer_by_hand():
    layer = nn.ModuleDict({"q": nn.Linear(64, 48, bias=False, device="meta", dtype=torch.bfloat16)})
    counted = distributed.costs_of(layer, ["q"], r=5, world=8)
    trained = 4 * (5 * 64 + 48 * 5 + 1)
    adapter = trained + 4 * (5 * 64 + 48 * 5 + 64)
    assert isinstance(layer["q"], DeLoRALinear)
    assert counted == {"base": 2 * 64 * 48, "adapter": adapter, "training": 3 * trained,
                       "traffic": 7 / 8 * (2 * adapter + trained), "base traffic": 7 / 8 * 2 * 2 * 64 * 48}  # fmt: skip


def test_the_table_of_costs_in_the_docstring_is_what_the_script_prints(capsys):
    distributed.print_costs(r=16, world=8)
    printed = capsys.readouterr().out
    assert printed[printed.index("| model") :] in distributed.__doc__
