"""What the figures rest on: the measures, the variants that are compared, the numbers in README."""

import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import ablation
import common
import forgetting
import geometry
import pytest
import robustness
import start
import torch
from torch import nn

from delora import DeLoRALinear, inject

ROOT = Path(__file__).parent.parent.parent
SCRIPTS = ROOT / "examples" / "experiments"
README = (ROOT / "README.md").read_text(encoding="utf-8")
EXPERIMENTS = {
    "robustness": robustness,
    "start": start,
    "forgetting": forgetting,
    "ablation": ablation,
}
FOUND = {}
for experiment in EXPERIMENTS:
    numbers = common.RESULTS / f"{experiment}.json"
    FOUND[experiment] = json.loads(numbers.read_text(encoding="utf-8"))
EPS = torch.finfo(torch.float32).eps


def new_model():
    torch.manual_seed(0)
    return common.ByteTransformer()


def trained(steps, groups, share=None):
    """‖W' - W‖ of a small, not pretrained model after so many steps."""
    model = new_model()
    before = common.weights(model)
    optimizer = torch.optim.AdamW(groups(model), weight_decay=0)
    text = common.english()["train"][:2048]
    common.train(model, text, optimizer, steps, 0, lambda step, loss: None, share, batch=2)
    return (common.weights(model) - before).norm().item()


# ------------------------------------------------------------------------------------------------
# Measures
# ------------------------------------------------------------------------------------------------


def test_the_measured_weights_are_those_that_the_layers_apply():
    model = new_model()
    adapters = inject(model, common.LEAVES, r=2)
    with torch.no_grad():
        for adapter in adapters.values():
            adapter.delora.B.normal_()
            if adapter.base_layer.bias is not None:
                adapter.base_layer.bias.normal_()
    wanted = [adapter.weight.detach().T.flatten() for adapter in adapters.values()]
    wanted = torch.cat(wanted)  # (sum of in · out,)
    measured = common.weights(model)
    # Of each entry: the sum over an input and 2r components, and the bias, added and taken away.
    biases = [p.abs().max().item() for name, p in model.named_parameters() if "bias" in name]
    largest = max(wanted.abs().max().item(), *biases)
    assert (measured - wanted).abs().max() <= 16 * EPS * largest
    assert len(adapters) == 6 * common.LAYERS and max(biases) > 1


def test_a_width_is_that_of_the_range_around_the_best_rate():
    rates = [1e-3, 1e-2, 1e-1, 1.0, 10.0]
    inf = math.inf
    for losses, limit, wanted in (
        ([3.0, 2.0, 1.0, 2.0, 3.0], 1.5, (1.0, True)),  # half a decade on either side
        ([1.0, 1.0, 1.0, 1.0, 1.0], 1.0, (4.0, False)),
        ([1.0, 2.0, 1.0, 2.0, 0.5], 1.0, (1 / 3, False)),  # beyond a gap nothing counts
        ([inf, inf, 1.0, inf, 3.0], 1.5, (0.0, True)),
        ([3.0, 2.0, 1.0, 2.0, 3.0], 0.9, (0.0, True)),
        ([1.2, 1.1, 1.0, 2.0, inf], 1.5, (2.5, False)),
    ):
        assert robustness.width(rates, losses, limit) == pytest.approx(wanted), losses


def test_the_share_of_the_learning_rate_rises_over_6_percent_and_falls_to_zero():
    share = common.decay(100)
    shares = [share(step) for step in (0, 2, 5, 50, 99)]
    assert shares == pytest.approx([1 / 6, 0.5, 0.95, 0.5, 0.01])
    still = trained(
        1, lambda model: common.prepare(model, common.LORA, 1e-3), share=lambda step: 0.0
    )
    assert still == 0


# ------------------------------------------------------------------------------------------------
# What is compared
# ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", robustness.METHODS)
def test_every_method_starts_at_the_pretrained_weights_and_trains_what_it_says(method):
    model = new_model()
    before = common.weights(model)
    total = sum(p.numel() for p in model.parameters())
    groups = common.prepare(model, method, 1e-3)
    assert torch.equal(common.weights(model), before)
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert sum(p.numel() for group in groups for p in group["params"]) == trainable
    width, layers = common.WIDTH, common.LAYERS
    pairs = 8 * layers * (4 * 2 * width + 2 * 5 * width)  # A and B of q, k, v, o, up and down
    wanted = {common.FULL: total, common.LORA: pairs}
    assert trainable == wanted.get(method, pairs + 6 * layers)
    strengths = 6 * layers if "DeLoRA" in method else 0
    sizes = {}
    for group in groups:
        if group["params"]:
            sizes[group["lr"]] = sum(p.numel() for p in group["params"])
    assert sizes.pop(1e-3) == trainable - strengths
    assert sizes == ({5e-4: strengths} if strengths else {})


def test_zero_b_with_a_clamp_is_what_peft_does():
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    ours = start.Clamped(nn.Linear(6, 5), r=2)
    config = peft.DeloraConfig(r=2, target_modules=["0"])
    theirs = peft.get_peft_model(nn.Sequential(ours.base), config).base_model.model[0]
    own = [ours.A, ours.B, ours.lam]
    other = [getattr(theirs, f"delora_{name}")["default"] for name in ("A", "B", "lambda")]
    x = torch.randn(3, 6)
    for B in (torch.zeros(5, 2), 1e-5 * torch.randn(5, 2), torch.randn(5, 2)):
        ours.B.data = B
        for mine, peers in zip(own, other, strict=True):
            peers.data = mine.data.clone()
        y, z = ours(x), theirs(x)  # (3, 5)
        assert (y - z).abs().max() <= 32 * EPS * y.abs().max()
        gradients = torch.autograd.grad(y.square().sum(), own)
        wanted = torch.autograd.grad(z.square().sum(), other)
        for mine, peers in zip(gradients, wanted, strict=True):
            assert (mine - peers).abs().max() <= 64 * EPS * (1 + peers.abs().max())


def test_from_zero_b_one_step_goes_to_full_strength_at_any_rate_and_with_the_frozen_copy_not():
    def clamped(lr):
        def groups(model):
            start.clamp(model, r=8)
            return start.clamped_groups(model, lr)

        return groups

    def ours(lr):
        return lambda model: common.prepare(model, common.OURS, lr)

    jumps = [trained(1, clamped(lr)) for lr in (1e-4, 1e-2)]
    assert jumps[0] == pytest.approx(jumps[1], rel=1e-2)  # λ has moved by 0.005 of 15
    low, high = trained(1, ours(1e-5)), trained(1, ours(1e-4))
    assert high / low == pytest.approx(10, rel=0.02) and high < jumps[0] / 100


def test_the_rows_of_the_ablation_start_alike_and_train_what_they_say():
    pretrained = new_model()
    before = common.weights(pretrained)
    reach = {}
    for row in ablation.ROWS:
        model = common.ByteTransformer()
        model.load_state_dict(pretrained.state_dict())
        groups = ablation.groups(model, row, 1e-3)
        assert torch.equal(common.weights(model), before), row
        deloras = [module.delora for module in model.modules() if isinstance(module, DeLoRALinear)]
        strengths = 0
        if len(groups) == 2:
            strengths = sum(p.numel() for p in groups[-1]["params"])
        assert strengths == (0 if row in (common.LORA, ablation.FIXED) else 24), row
        if not deloras:
            continue
        squares = [(delora.lam * delora.w).square().mean() for delora in deloras]
        reach[row] = torch.stack(squares).sum().sqrt().item()
        tied = {delora.lam0 is None for delora in deloras}
        assert tied == {row != "by column, λ untied"}
        spread = max((delora.w.max() - delora.w.min()).item() for delora in deloras)
        assert (spread > 0) == ("column" in row), row
        rate = groups[-1]["lr"] / deloras[0].lam.item()
        assert rate == pytest.approx(5e-4 / ablation.STRENGTH)
    assert len(reach) == 5
    assert max(reach.values()) == pytest.approx(min(reach.values()), rel=1e-4)


def test_the_drawn_walk_stays_on_the_circle_and_in_the_ball():
    delora = geometry.delora().delora
    W = torch.tensor(geometry.W)
    radius = geometry.STRENGTH * delora.w.item()
    centre = W - radius * nn.functional.normalize(delora.B0.detach(), dim=0).squeeze(1)  # (2,)
    for lr in (*geometry.RATES, 1e6):
        points = torch.stack(geometry.walk(geometry.delora(), lr))  # (steps + 1, 2)
        assert torch.equal(points[0], W)
        assert ((points - centre).norm(dim=1) - radius).abs().max() <= 16 * EPS
        assert (points - W).norm(dim=1).max() <= delora.norm_bound() * (1 + 4 * EPS)
    walk = geometry.walk(geometry.lora(), geometry.RATES[-1])
    assert not torch.stack(walk).isfinite().all()


# ------------------------------------------------------------------------------------------------
# What is quoted
# ------------------------------------------------------------------------------------------------


def test_prolonged_training_has_each_method_s_best_rate_and_ten_times_its_best_stop():
    runs, found = FOUND["robustness"]["runs"], FOUND["forgetting"]
    rates = {run["lr"] for run in runs}
    steps = found["runs"][0]["step"]
    for method in {run["method"] for run in runs}:
        sums = {lr: sum(common.over_seeds(runs, "new", method=method, lr=lr)) for lr in rates}
        assert forgetting.RATES[method] == min(sums, key=sums.get), method
        assert steps[-1] >= 10 * steps[forgetting.best_stop(found, method)], method


def test_what_two_experiments_share_came_out_alike():
    """LoRA, and DeLoRA as it is by default: the same draws in two scripts, in two runs."""
    pairs = {common.LORA: common.LORA, "+ w, by column": common.OURS}
    for row, method in pairs.items():
        for key in ("new", "old", "moved"):
            wanted = {}
            for run in FOUND["robustness"]["runs"]:
                if run["method"] == method:
                    wanted[run["lr"], run["seed"]] = run[key]
            compared = 0
            for run in FOUND["ablation"]["runs"]:
                if run["method"] == row:
                    assert run[key] == wanted[run["lr"], run["seed"]], (row, key)
                    compared += 1
            assert compared == 3 * 6  # seeds, rates


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_the_figures_that_the_readme_quotes_are_those_of_the_last_run(name):
    found = FOUND[name]
    pattern = rf"python examples/experiments/{name}\.py`[^`]*```text\n(.*?)```"
    block = re.search(pattern, README, re.DOTALL)[1]
    lines = [*EXPERIMENTS[name].report(found).splitlines(), common.measured(found)]
    assert not [line for line in block.splitlines() if line.strip() and line not in lines]
    assert not found["quick"] and found["took"] <= 25 * 60
    assert {run["seed"] for run in found["runs"]} == {0, 1, 2}


def test_every_figure_of_the_readme_is_there_is_small_and_stands_on_white():
    shown = re.findall(r"!\[[^\]]{20,}\]\((examples/experiments/results/\w+\.svg)\)", README)
    kept = [path.relative_to(ROOT).as_posix() for path in common.RESULTS.glob("*.svg")]
    assert sorted(shown) == sorted(kept)
    for path in shown:
        text = (ROOT / path).read_text(encoding="utf-8")
        assert len(text.encode()) < 200_000 and "fill: #ffffff" in text[:2000], path


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_a_figure_is_drawn_again_from_its_numbers(name, tmp_path):
    pytest.importorskip("matplotlib")
    (tmp_path / f"{name}.json").write_text(json.dumps(FOUND[name]))
    command = [sys.executable, str(SCRIPTS / f"{name}.py"), "--redraw", "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert EXPERIMENTS[name].report(FOUND[name]) in done.stdout
    assert "Figure and numbers" in done.stdout
    assert (tmp_path / f"{name}.svg").stat().st_size > 10_000


@pytest.mark.slow
def test_without_the_peers_an_experiment_runs_and_says_what_is_left_out(tmp_path):
    """A second process, in which peft and matplotlib are not found."""
    code = (
        "import runpy, sys\n"
        "sys.modules.update(peft=None, matplotlib=None)\n"
        "sys.argv = sys.argv[1:]\n"
        "runpy.run_path(sys.argv[0], run_name='__main__')\n"
    )
    script = str(SCRIPTS / "robustness.py")
    command = [sys.executable, "-c", code, script, "--quick", "--out", str(tmp_path)]
    environment = os.environ | {"PYTHONPATH": str(SCRIPTS)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "peft is not installed: its DeLoRA is left out." in done.stdout
    assert "matplotlib is not installed: no figure." in done.stdout
    assert "PEFT DeLoRA" not in done.stdout
    assert re.search(r"^  DeLoRA +\d", done.stdout, re.MULTILINE)
    assert [path.name for path in tmp_path.iterdir()] == ["robustness.json"]
