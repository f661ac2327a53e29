"""examples/benchmark.py: its floors against counted operations, its path without the peers, and README's figures."""

import json
import re
import subprocess
import sys
from pathlib import Path

import benchmark
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

HERE = Path(__file__).parent
README = (HERE.parent / "README.md").read_text(encoding="utf-8")
FOUND = json.loads((HERE / "figures" / "speed.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", (benchmark.FROZEN, benchmark.LORA, benchmark.OURS))
def test_no_implementation_is_below_the_floor(name):
    tokens, n_in, n_out, r = 32, 24, 40, 3
    layer, x = benchmark.one_layer(name, n_in, n_out, r), torch.randn(tokens, n_in)
    with FlopCounterMode(display=False) as counter:
        benchmark.forward_backward(layer, x, torch.randn(tokens, n_out))()
    floor = benchmark.operations(tokens, n_in, n_out, *benchmark.ranks(name, r))
    # What is above it: the gradient of the frozen half of both factors, which is computed and dropped.
    unused = 2 * r * tokens * (n_in + n_out) if name == benchmark.OURS else 0
    assert counter.get_total_flops() == floor + unused


def test_what_is_compared_computes_what_its_name_says():
    torch.manual_seed(0)
    base, x = nn.Linear(6, 5), torch.randn(3, 6)
    lora = benchmark.PlainLoRA(base, 2)
    assert torch.equal(lora(x), base(x))
    nn.init.normal_(lora.B)
    assert torch.allclose(lora(x), x @ (base.weight + lora.B @ lora.A).T + base.bias)
    for name in (benchmark.FROZEN, benchmark.LORA, benchmark.OURS):
        model = benchmark.adapt(
            nn.ModuleDict({"q": nn.Linear(6, 5), "k": nn.Linear(6, 5)}), name, ["q"], 2
        )
        trainable = {key.split(".")[0] for key, p in model.named_parameters() if p.requires_grad}
        assert trainable == (set() if name == benchmark.FROZEN else {"q"})
        assert model["q"](x).shape == (3, 5)


def test_the_readme_says_how_many_operations_a_step_takes():
    views = {
        "view",
        "t",
        "transpose",
        "permute",
        "detach",
        "slice",
        "select",
        "expand",
        "_unsafe_view",
        "unsqueeze",
    }

    class Names(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            names.append(func.__name__.split(".")[0])
            return func(*args, **(kwargs or {}))

    counts = []
    for name in (benchmark.OURS, benchmark.LORA):
        layer, x, names = benchmark.one_layer(name, 16, 16, 2), torch.randn(4, 16), []
        with Names():
            benchmark.forward_backward(layer, x, torch.randn(4, 16))()
        counts.append(len([name for name in names if name not in views]))
    said = re.search(
        r"(\d+) operations,\s+forward\s+and\s+backward,\s+where\s+LoRA\s+has\s+(\d+)", README
    )
    assert all(
        abs(count - int(number)) <= int(number) / 5
        for count, number in zip(counts, said.groups(), strict=True)
    )


def test_a_ratio_is_taken_within_a_round():
    times = {
        "slow": [2.0, 20.0, 2.2, 3.0, 2.0],
        "fast": [1.0, 10.0, 1.0, 1.0, 1.0],
    }  # the machine stalled in round two
    assert benchmark.ratio(times, "slow", "fast")[0] == 2.0
    assert benchmark.ratio(times, "slow", "not installed") is None


def test_the_order_of_the_steps_changes_from_round_to_round():
    called = []
    times = benchmark.side_by_side(
        {name: lambda name=name: called.append(name) for name in "abc"}, 0, "cpu"
    )
    assert "".join(called) == "abcabc" + "abcbcacababcbca" and all(
        len(t) == 5 for t in times.values()
    )


def test_without_the_peers_the_columns_are_empty_and_it_says_so(tmp_path):
    """A second process, in which peft and matplotlib are not found."""
    code = "import runpy, sys; sys.modules.update(peft=None, matplotlib=None); sys.argv = sys.argv[1:]; "
    code += "sys.path.insert(0, sys.argv[0].rpartition('/')[0]); "
    code += "runpy.run_path(sys.argv[0], run_name='__main__')"
    command = [
        sys.executable,
        "-c",
        code,
        str(HERE / "benchmark.py"),
        "--quick",
        "--dtype",
        "bfloat16",
    ]
    done = subprocess.run(
        [*command, "--out", str(tmp_path)], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "peft is not installed: its columns are empty." in done.stdout
    assert "matplotlib is not installed: no figure." in done.stdout
    row = next(line for line in done.stdout.splitlines() if line.startswith("  128, 96, 96, 2"))
    assert re.fullmatch(r"  128, 96, 96, 2 +\d\.\d\d \(.*\) +- +- +\d+\.\d\d \(.*\)", row)
    assert [path.name for path in tmp_path.iterdir()] == [
        "speed-cpu-bfloat16.json"
    ]  # not where README's figures are


def test_the_figures_of_the_readme_are_those_of_the_last_run():
    block = re.search(
        r"python examples/benchmark.py` \(float32.*?```text\n(.*?)```", README, re.DOTALL
    )[1]
    lines = [*benchmark.report(FOUND).splitlines(), benchmark.measured(FOUND)]
    shown = [line for line in block.splitlines() if line.strip()]
    assert len(shown) > 10 and not [line for line in shown if line not in lines]
    assert not FOUND["quick"]


def test_what_is_kept_for_backward_is_what_the_readme_says():
    name, shape = benchmark.OURS, FOUND["kept"]["shape"]
    assert f"{benchmark.kept(name, *shape):.2f}" == f"{FOUND['kept'][name]:.2f}"
