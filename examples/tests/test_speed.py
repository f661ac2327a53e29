"""speed.py: its floors against counted operations, without the peers, the figures quoted."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import common
import pytest
import speed
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).parent.parent.parent
EXAMPLES = (ROOT / "examples" / "README.md").read_text(encoding="utf-8")
FOUND = json.loads((common.RESULTS / "speed.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("method", (common.FROZEN, common.LORA, common.OURS))
def test_no_implementation_is_below_the_floor(method):
    tokens, n_in, n_out, r = 32, 24, 40, 3
    layer, x = speed.one_layer(method, n_in, n_out, r), torch.randn(tokens, n_in)
    with FlopCounterMode(display=False) as counter:
        speed.forward_backward(layer, x, torch.randn(tokens, n_out))()
    floor = speed.operations(tokens, n_in, n_out, *speed.ranks(method, r))
    # Above it: the gradient of the frozen half of both factors, which is computed and dropped.
    unused = 2 * r * tokens * (n_in + n_out) if method == common.OURS else 0
    assert counter.get_total_flops() == floor + unused


def test_what_is_compared_computes_what_its_name_says():
    torch.manual_seed(0)
    base, x = nn.Linear(6, 5), torch.randn(3, 6)
    lora = common.PlainLoRA(base, 2)
    assert torch.equal(lora(x), base(x))
    nn.init.normal_(lora.B)
    wanted = x @ (base.weight + lora.B @ lora.A).T + base.bias
    eps = torch.finfo(torch.float32).eps
    assert (lora(x) - wanted).abs().max() <= 8 * (6 + 2) * eps * wanted.abs().max()
    for method in (common.FROZEN, common.LORA, common.OURS):
        model = nn.ModuleDict({"q": nn.Linear(6, 5), "k": nn.Linear(6, 5)})
        model = common.adapt(model, method, ["q"], 2)
        trainable = {key.split(".")[0] for key, p in model.named_parameters() if p.requires_grad}
        assert trainable == (set() if method == common.FROZEN else {"q"})
        assert model["q"](x).shape == (3, 5)


class Names(TorchDispatchMode):
    """The operations that are dispatched, without those that only look at an array another way."""

    views = {"view", "t", "transpose", "permute", "detach", "slice", "select", "expand"}
    views |= {"_unsafe_view", "unsqueeze", "unbind"}

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.__name__.split(".")[0]
        if name not in self.views:
            self.seen.append(name)
        return func(*args, **(kwargs or {}))


def test_a_step_takes_as_many_operations_as_is_said():
    forward, both = {}, {}
    for method in (common.OURS, common.LORA):
        layer, x = speed.one_layer(method, 16, 16, 2), torch.randn(4, 16)
        with Names() as names, torch.no_grad():
            layer(x)
        forward[method] = len(names.seen)
        with Names() as names:
            speed.forward_backward(layer, x, torch.randn(4, 16))()
        both[method] = len(names.seen)
    assert forward[common.OURS] <= 25 and both[common.OURS] <= 70
    said = re.search(
        r"(\d+) operations, forward and backward, where LoRA has (\d+)", " ".join(EXAMPLES.split())
    )
    for method, number in zip((common.OURS, common.LORA), said.groups(), strict=True):
        assert abs(both[method] - int(number)) <= int(number) / 5  # versions of torch differ


def test_a_ratio_is_taken_within_a_round():
    # the machine stalled in round two
    times = {"slow": [2.0, 20.0, 2.2, 3.0, 2.0], "fast": [1.0, 10.0, 1.0, 1.0, 1.0]}
    assert speed.ratio(times, "slow", "fast")[0] == 2.0
    assert speed.ratio(times, "slow", "not installed") is None


def test_the_order_of_the_steps_changes_from_round_to_round():
    called = []
    steps = {name: lambda name=name: called.append(name) for name in "abc"}
    times = speed.side_by_side(steps, 0, "cpu")
    assert "".join(called) == "abcabc" + "abcbcacababcbca"
    assert all(len(seconds) == 5 for seconds in times.values())


@pytest.mark.slow
def test_without_the_peers_the_columns_are_empty_and_it_says_so(tmp_path):
    """A second process, in which peft and matplotlib are not found."""
    code = (
        "import runpy, sys\n"
        "sys.modules.update(peft=None, matplotlib=None)\n"
        "sys.argv = sys.argv[1:]\n"
        "runpy.run_path(sys.argv[0], run_name='__main__')\n"
    )
    script = str(ROOT / "examples" / "experiments" / "speed.py")
    command = [sys.executable, "-c", code, script, "--quick", "--dtype", "bfloat16"]
    command += ["--out", str(tmp_path)]
    environment = os.environ | {"PYTHONPATH": str(ROOT / "examples" / "experiments")}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "peft is not installed: its columns are empty." in done.stdout
    assert "matplotlib is not installed: no figure." in done.stdout
    rows = [line for line in done.stdout.splitlines() if line.startswith("  128, 96, 96, 2")]
    assert re.fullmatch(r"  128, 96, 96, 2 +\d\.\d\d \(.*\) +- +- +\d+\.\d\d \(.*\)", rows[0])
    # not where README's figures are
    assert [path.name for path in tmp_path.iterdir()] == ["speed-cpu-bfloat16.json"]


@pytest.mark.parametrize(
    ("name", "command"),
    [
        ("speed", r"python examples/experiments/speed\.py`"),
        ("speed-cuda-bfloat16", r"speed\.py --device cuda --dtype bfloat16 --seconds 5`"),
    ],
)
def test_the_figures_that_are_quoted_are_those_of_the_last_run(name, command):
    found = json.loads((common.RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    block = re.search(command + r".*?```text\n(.*?)```", EXAMPLES, re.DOTALL)[1]
    lines = [*speed.report(found).splitlines(), common.measured(found)]
    shown = [line for line in block.splitlines() if line.strip()]
    assert len(shown) > 10 and not [line for line in shown if line not in lines]
    assert not found["quick"]


def test_what_is_kept_for_backward_is_what_was_measured():
    kept = speed.kept(common.OURS, *FOUND["kept"]["shape"])
    assert f"{kept:.2f}" == f"{FOUND['kept'][common.OURS]:.2f}"
