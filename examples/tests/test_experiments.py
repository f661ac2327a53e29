"""What the figures rest on: the measures, the variants that are compared, the numbers that the README quotes."""

import json
import math
import re
import subprocess
import sys
from pathlib import Path

import ablation
import forgetting
import geometry
import pytest
import quickstart
import robustness
import start
import torch
from torch import nn

from delora import DeLoRALinear, inject

HERE = Path(__file__).parent
FIGURES = HERE / "figures"
README = (HERE.parent / "README.md").read_text(encoding="utf-8")
EXPERIMENTS = {
    "robustness": robustness,
    "start": start,
    "forgetting": forgetting,
    "ablation": ablation,
}
FOUND = {
    name: json.loads((FIGURES / f"{name}.json").read_text(encoding="utf-8")) for name in EXPERIMENTS
}
EPS = torch.finfo(torch.float32).eps


def trained(steps: int, groups, seed: int = 0, **options) -> float:
    """‖W' - W‖ of a small, not pretrained model after so many steps."""
    torch.manual_seed(seed)
    model = quickstart.ByteTransformer()
    before = robustness.weights(model)
    optimizer = torch.optim.AdamW(groups(model), weight_decay=0)
    text = quickstart.english()["train"][:2048]
    quickstart.train(
        model, text, optimizer, steps, seed, lambda step, loss: None, batch=2, **options
    )
    return (robustness.weights(model) - before).norm().item()


# ------------------------------------------------------------------------------------------------ measures


def test_the_measured_weights_are_those_that_the_layers_apply():
    torch.manual_seed(0)
    model = quickstart.ByteTransformer()
    adapters = inject(model, robustness.LEAVES, r=2)
    with torch.no_grad():
        for adapter in adapters.values():
            adapter.delora_B.normal_()
            if adapter.base_layer.bias is not None:
                adapter.base_layer.bias.normal_()
    wanted = torch.cat(
        [adapter.weight.detach().T.flatten() for adapter in adapters.values()]
    )  # (sum of in · out,)
    measured = robustness.weights(model)
    # Of every entry: the sum over one input and 2r components, plus the bias which is added and taken away again.
    biases = [p.abs().max().item() for name, p in model.named_parameters() if "bias" in name]
    assert (measured - wanted).abs().max() <= 16 * EPS * max(wanted.abs().max().item(), *biases)
    assert len(adapters) == 6 * quickstart.LAYERS and max(biases) > 1


def test_a_width_is_that_of_the_range_around_the_best_rate():
    rates = [1e-3, 1e-2, 1e-1, 1.0, 10.0]
    inf = math.inf
    for losses, limit, wanted in (
        ([3.0, 2.0, 1.0, 2.0, 3.0], 1.5, (1.0, True)),  # half a decade on either side
        ([1.0, 1.0, 1.0, 1.0, 1.0], 1.0, (4.0, False)),
        (
            [1.0, 2.0, 1.0, 2.0, 0.5],
            1.0,
            (1 / 3, False),
        ),  # a second range beyond a gap does not count
        ([inf, inf, 1.0, inf, 3.0], 1.5, (0.0, True)),
        ([3.0, 2.0, 1.0, 2.0, 3.0], 0.9, (0.0, True)),
        ([1.2, 1.1, 1.0, 2.0, inf], 1.5, (2.5, False)),
    ):
        assert robustness.width(rates, losses, limit) == pytest.approx(wanted), losses


def test_the_share_of_the_learning_rate_rises_over_6_percent_and_falls_to_zero():
    share = quickstart.decay(100)
    assert [share(step) for step in (0, 2, 5, 50, 99)] == pytest.approx(
        [1 / 6, 0.5, 0.95, 0.5, 0.01]
    )
    still = trained(
        1, lambda model: robustness.prepare(model, robustness.LORA, 1e-3), share=lambda step: 0.0
    )
    assert still == 0


# ------------------------------------------------------------------------------------------------ what is compared


@pytest.mark.parametrize("method", robustness.METHODS)
def test_every_method_starts_at_the_pretrained_weights_and_trains_what_it_says(method):
    torch.manual_seed(0)
    model = quickstart.ByteTransformer()
    before, total = robustness.weights(model), sum(p.numel() for p in model.parameters())
    groups = robustness.prepare(model, method, 1e-3)
    assert torch.equal(robustness.weights(model), before)
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert sum(p.numel() for group in groups for p in group["params"]) == trainable
    width, layers = quickstart.WIDTH, quickstart.LAYERS
    pairs = 8 * layers * (4 * 2 * width + 2 * 5 * width)  # A and B of q, k, v, o, up and down
    assert trainable == {robustness.FULL: total, robustness.LORA: pairs}.get(
        method, pairs + 6 * layers
    )
    sizes = {
        group["lr"]: sum(p.numel() for p in group["params"]) for group in groups if group["params"]
    }
    strengths = 6 * layers if "DeLoRA" in method else 0
    assert sizes == {1e-3: trainable - strengths} | ({5e-4: strengths} if strengths else {})


def test_zero_b_with_a_clamp_is_what_peft_does():
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    ours = start.Clamped(nn.Linear(6, 5), r=2)
    config = peft.DeloraConfig(r=2, target_modules=["0"])
    theirs = peft.get_peft_model(nn.Sequential(ours.base), config).base_model.model[0]
    own = {"A": ours.A, "B": ours.B, "lambda": ours.delora_lambda}
    other = {name: getattr(theirs, f"delora_{name}")["default"] for name in own}
    x = torch.randn(3, 6)
    for B in (torch.zeros(5, 2), 1e-5 * torch.randn(5, 2), torch.randn(5, 2)):
        ours.B.data = B
        for name, p in own.items():
            other[name].data = p.data.clone()
        y, z = ours(x), theirs(x)  # (3, 5)
        assert (y - z).abs().max() <= 32 * EPS * y.abs().max()
        gradients = [
            torch.autograd.grad(out.square().sum(), [*ps.values()])
            for out, ps in ((y, own), (z, other))
        ]
        for mine, theirs_is in zip(*gradients, strict=True):
            assert (mine - theirs_is).abs().max() <= 64 * EPS * (1 + theirs_is.abs().max())


def test_from_zero_b_one_step_goes_to_full_strength_at_any_rate_and_with_the_frozen_copy_it_does_not():
    def clamped(lr):
        def groups(model):
            start.clamp(model, r=8)
            return start.clamped_groups(model, lr)

        return groups

    jumps = [trained(1, clamped(lr)) for lr in (1e-4, 1e-2)]
    assert jumps[0] == pytest.approx(jumps[1], rel=1e-2)  # λ has moved by 0.005 of 15
    low, high = (
        trained(1, lambda model, lr=lr: robustness.prepare(model, robustness.OURS, lr))
        for lr in (1e-5, 1e-4)
    )
    assert high / low == pytest.approx(10, rel=0.02) and high < jumps[0] / 100


def test_the_rows_of_the_ablation_start_alike_and_train_what_they_say():
    torch.manual_seed(0)
    pretrained = quickstart.ByteTransformer()
    before, reach = robustness.weights(pretrained), {}
    for row in ablation.ROWS:
        model = quickstart.ByteTransformer()
        model.load_state_dict(pretrained.state_dict())
        groups = ablation.groups(model, row, 1e-3)
        assert torch.equal(robustness.weights(model), before), row
        layers = [module for module in model.modules() if isinstance(module, DeLoRALinear)]
        strengths = sum(p.numel() for p in groups[-1]["params"]) if len(groups) == 2 else 0
        assert strengths == (0 if row in (ablation.LORA, "by column, λ fixed") else 24), row
        if layers:
            squares = [(a.delora_lambda * a.delora_w_norm).square().mean() for a in layers]
            reach[row] = torch.stack(squares).sum().sqrt().item()
            assert {layer.delora_lambda0 is None for layer in layers} == {
                row != "by column, λ untied"
            }
            spread = max((a.delora_w_norm.max() - a.delora_w_norm.min()).item() for a in layers)
            assert (spread > 0) == ("column" in row), row
            rate = groups[-1]["lr"] / layers[0].delora_lambda.item()
            assert rate == pytest.approx(5e-4 / ablation.STRENGTH)
    assert len(reach) == 5 and max(reach.values()) == pytest.approx(min(reach.values()), rel=1e-4)


def test_the_drawn_walk_stays_on_the_circle_and_in_the_ball():
    layer = geometry.delora()
    radius, W = geometry.STRENGTH * layer.delora_w_norm.item(), torch.tensor(geometry.W)
    centre = W - radius * nn.functional.normalize(layer.delora_B0.detach(), dim=0).squeeze(
        1
    )  # (2,)
    for lr in (*geometry.RATES, 1e6):
        points = torch.stack(geometry.walk(geometry.delora(), lr))  # (steps + 1, 2)
        assert torch.equal(points[0], W)
        assert ((points - centre).norm(dim=1) - radius).abs().max() <= 16 * EPS
        assert (points - W).norm(dim=1).max() <= layer.norm_bound() * (1 + 4 * EPS)
    assert not torch.stack(geometry.walk(geometry.lora(), geometry.RATES[-1])).isfinite().all()


# ------------------------------------------------------------------------------------------------ what is quoted


def test_prolonged_training_has_each_method_s_best_rate_and_ten_times_its_best_stop():
    runs, found = FOUND["robustness"]["runs"], FOUND["forgetting"]
    for method in {run["method"] for run in runs}:
        mean = {
            lr: sum(robustness.over_seeds(runs, "new", method=method, lr=lr))
            for lr in {run["lr"] for run in runs}
        }
        assert forgetting.RATES[method] == min(mean, key=mean.get), method
        steps = found["runs"][0]["step"]
        assert steps[-1] >= 10 * steps[forgetting.best_stop(found, method)], method


def test_what_two_experiments_share_came_out_alike():
    """LoRA, and DeLoRA as it is by default: the same draws in two scripts, in two runs."""
    pairs = {robustness.LORA: robustness.LORA, "+ w, by column": robustness.OURS}
    for row, method in pairs.items():
        rates = {run["lr"] for run in FOUND["ablation"]["runs"]}
        for key in ("new", "old", "moved"):
            one, other = (
                {
                    (run["lr"], run["seed"]): run[key]
                    for run in FOUND[name]["runs"]
                    if run["method"] == which
                }
                for name, which in (("ablation", row), ("robustness", method))
            )
            assert len(one) == 3 * len(rates) and all(
                other[which] == value for which, value in one.items()
            ), (row, key)


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_the_figures_that_the_readme_quotes_are_those_of_the_last_run(name):
    found = FOUND[name]
    block = re.search(rf"python examples/{name}\.py`[^`]*```text\n(.*?)```", README, re.DOTALL)[1]
    lines = [*EXPERIMENTS[name].report(found).splitlines(), robustness.measured(found)]
    assert not [line for line in block.splitlines() if line.strip() and line not in lines]
    assert (
        not found["quick"]
        and found["took"] <= 25 * 60
        and {run["seed"] for run in found["runs"]} == {0, 1, 2}
    )


def test_every_figure_of_the_readme_is_there_is_small_and_stands_on_white():
    shown = re.findall(r"!\[[^\]]{20,}\]\((examples/figures/\w+\.svg)\)", README)
    assert sorted(shown) == sorted(
        f"examples/figures/{path.name}" for path in FIGURES.glob("*.svg")
    )
    for path in shown:
        text = (HERE.parent / path).read_text(encoding="utf-8")
        assert len(text.encode()) < 200_000 and "fill: #ffffff" in text[:2000], path


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_a_figure_is_drawn_again_from_its_numbers(name, tmp_path):
    pytest.importorskip("matplotlib")
    (tmp_path / f"{name}.json").write_text(json.dumps(FOUND[name]))
    command = [sys.executable, str(HERE / f"{name}.py"), "--redraw", "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert EXPERIMENTS[name].report(FOUND[name]) in done.stdout
    assert (
        "Figure and numbers" in done.stdout and (tmp_path / f"{name}.svg").stat().st_size > 10_000
    )


def test_without_the_peers_an_experiment_runs_and_says_what_is_left_out(tmp_path):
    """A second process, in which peft and matplotlib are not found."""
    code = "import runpy, sys; sys.modules.update(peft=None, matplotlib=None); sys.argv = sys.argv[1:]; "
    code += "sys.path.insert(0, sys.argv[0].rpartition('/')[0]); "
    code += "runpy.run_path(sys.argv[0], run_name='__main__')"
    command = [
        sys.executable,
        "-c",
        code,
        str(HERE / "robustness.py"),
        "--quick",
        "--out",
        str(tmp_path),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "peft is not installed: its DeLoRA is left out." in done.stdout
    assert "matplotlib is not installed: no figure." in done.stdout
    assert "PEFT DeLoRA" not in done.stdout and re.search(
        r"^  DeLoRA +\d", done.stdout, re.MULTILINE
    )
    assert [path.name for path in tmp_path.iterdir()] == ["robustness.json"]
