"""What the figures rest on: the measures, the variants that are compared, the numbers in README."""

import copy
import functools
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
import ladder
import learned
import pytest
import rates
import robustness
import start
import strength
import torch
import turning
import width
from torch import nn

from delora import DeLoRALinear, inject, param_groups

ROOT = Path(__file__).parent.parent.parent
SCRIPTS = ROOT / "examples" / "experiments"
README = (ROOT / "README.md").read_text(encoding="utf-8")
EXAMPLES = (ROOT / "examples" / "README.md").read_text(encoding="utf-8")
EXPERIMENTS = {
    "robustness": robustness,
    "turning": turning,
    "rates": rates,
    "strength": strength,
    "learned": learned,
    "forgetting": forgetting,
    "start": start,
    "width": width,
    "ablation": ablation,
    "ladder": ladder,
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
    if method == common.PEFT_DORA:  # it divides each column by its norm, and multiplies by it
        assert (common.weights(model) - before).abs().max() <= 16 * EPS * before.abs().max()
    else:
        assert torch.equal(common.weights(model), before)
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert sum(p.numel() for group in groups for p in group["params"]) == trainable
    width, layers = common.WIDTH, common.LAYERS
    pairs = 8 * layers * (4 * 2 * width + 2 * 5 * width)  # A and B of q, k, v, o, up and down
    magnitudes = layers * 9 * width  # DoRA's, one for each row of every W (out, in)
    wanted = {common.FULL: total, common.LORA: pairs, common.PEFT_DORA: pairs + magnitudes}
    assert trainable == wanted.get(method, pairs + 6 * layers)
    strengths = 6 * layers if "DeLoRA" in method else 0
    sizes = {}
    for group in groups:
        if group["params"]:
            sizes[group["lr"]] = sum(p.numel() for p in group["params"])
    assert sizes.pop(1e-3) == trainable - strengths
    assert sizes == ({5e-4: strengths} if strengths else {})


@pytest.mark.parametrize("method", common.without_peft((common.PEFT_DELORA, common.OURS)))
def test_the_rate_of_lambda_can_be_given(method):
    groups = common.prepare(new_model(), method, 1e-2, lambda_lr=0.0)
    sizes = {group["lr"]: sum(p.numel() for p in group["params"]) for group in groups}
    assert sizes[0.0] == 6 * common.LAYERS and sizes[1e-2] > 6 * common.LAYERS


def test_zero_b_with_a_clamp_is_what_peft_does():
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    ours = start.Clamped(nn.Linear(6, 5), r=2, lambda_init=15.0)
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


def test_the_share_at_an_angle_is_the_chord():
    """lr·√(3·in) is the tangent: 0, 60 and 90 degrees have the chords 0, 1 and √2."""
    for tangent, chord in ((0.0, 0.0), (3**0.5, 1.0), (1e12, 2**0.5)):
        for n_in in (128, 4096):
            lr = tangent / (3 * n_in) ** 0.5
            assert width.by_angle(n_in, lr) == pytest.approx(chord, rel=1e-9)


def test_the_learned_term_is_the_update_without_the_frozen_copy():
    """A frozen copy of zeros has no direction and drops out. After that it must not count."""
    model = new_model()
    inject(model, common.LEAVES, r=8, lambda_init=4.0)
    for delora in common.deloras(model).values():
        delora.B.data = torch.randn(delora.B.shape)
        wanted = width.learned_term(delora)
        delora.A0.data.zero_()
        delora.B0.data.zero_()
        alone = delora.delta_weight().norm().item()
        # the sum over r terms, and the norm of what has out · in entries
        assert alone == pytest.approx(wanted, rel=8 * (8 + 4) * EPS)


@pytest.mark.slow
def test_a_run_of_width_py_has_the_width_the_rate_and_the_warm_up_of_its_job(monkeypatch):
    monkeypatch.setattr(width, "base", lambda quick: new_model())
    for n_in, warm_up in ((common.WIDTH, 1), (common.WIDTH, 9), (768, 1)):
        job = {"width": n_in, "warm_up": warm_up, "lr": 1e-2, "seed": 0, "quick": True}
        first = width.one(job)["share"][0]
        assert first == pytest.approx(width.by_angle(n_in, 1e-2 / warm_up), rel=0.1), job


def test_the_sweeps_and_the_rows_train_at_the_rates_of_their_jobs(monkeypatch):
    """{rate: how many numbers have it}, for the groups that each script trains."""

    def sizes(job, groups, look=None):
        found = {}
        for group in groups(new_model()):
            for p in group["params"]:
                found[group["lr"]] = found.get(group["lr"], 0) + p.numel()
        return found

    for script in (rates, robustness, strength, ladder):
        monkeypatch.setattr(script, "adapted_and_trained", sizes)
    pairs, layers = 8 * common.LAYERS * 18 * common.WIDTH, 6 * common.LAYERS
    for sweep in rates.SWEEPS:
        lr, lambda_lr = rates.both_rates(sweep, 0.7)
        wanted = {lr: pairs}
        wanted[lambda_lr] = wanted.get(lambda_lr, 0) + layers
        assert rates.one({"sweep": sweep, "rate": 0.7}) == wanted
    ours = {"method": common.OURS, "lr": 0.7}
    assert robustness.one(ours) == {0.7: pairs, 0.35: layers}
    for method in (start.CLAMPED, start.FROZEN_COPY):
        job = {"method": method, "lr": 0.7, "strength": 8.0}
        assert strength.one(job) == {0.7: pairs, 0.35: layers}
    for rung in ladder.RUNGS:
        found = ladder.one({"rung": rung, "lr": 0.7, "strength": 4.0})
        assert found.get(0.35, 0) == (0 if rung == ladder.ETHER_PLUS else layers), rung


def test_a_negative_lambda_keeps_its_sign():
    model = new_model()
    inject(model, common.LEAVES, r=8)
    for n, delora in enumerate(common.deloras(model).values()):
        delora.lam.data.fill_(n - 12.0)
    assert rates.strengths(model) == {"strengths": [n - 12.0 for n in range(24)]}


@pytest.mark.parametrize("rung", ladder.RUNGS)
def test_a_rung_has_the_strength_of_its_cell_and_halves_of_their_own(rung):
    directions, strengths = ladder.groups(new_model(), rung, 1e-2, strength=4.0)
    count = 0 if rung == ladder.ETHER_PLUS else 24
    assert [p.item() for p in strengths["params"]] == [4.0] * count
    starts = {p.data_ptr() for p in directions["params"]}
    assert len(starts) == len(directions["params"])  # no two share their memory


def test_the_best_cell_is_the_one_with_the_lowest_mean():
    runs = []
    for lr, lam, losses in ((1, 4, (3, 3)), (1, 8, (1, 3)), (2, 4, (0, 5)), (2, 8, (4, 4))):
        for new in losses:
            runs.append({"rung": "x", "lr": lr, "strength": lam, "new": new})
    assert ladder.best(runs, "x") == {"rung": "x", "lr": 1, "strength": 8}
    assert common.over_seeds(runs, "new", lr=2, strength=4) == [0, 5]
    runs = [{"method": "x", "new": [5, 2, 4]}, {"method": "x", "new": [5, 3, 0]}]
    assert forgetting.best_stop({"runs": runs}, "x") == 2


def test_turns_by_different_angles_are_averaged():
    """Every other a_i and b_i is turned by a right angle: half of that in the mean."""
    model = new_model()
    inject(model, common.LEAVES, r=8)
    for delora in common.deloras(model).values():
        for rows in (delora.A.data, delora.B.data.T):  # (r, in), (r, out)
            some = rows[::2].clone()
            rows[::2, 0::2], rows[::2, 1::2] = -some[:, 1::2], some[:, 0::2]
    found = robustness.turning(model)
    assert found["turned_a"] == pytest.approx(45, abs=0.1)
    assert found["turned_b"] == pytest.approx(45, abs=0.1)


def test_angles_and_lengths_of_every_step_are_those_that_were_made(monkeypatch):
    """90 degrees and twice as long, then 0 and three times as long, then 90 again."""

    def made(model, text, optimizer, steps, seed, watch, share, batch):
        assert [group["weight_decay"] for group in optimizer.param_groups] == [0.5, 0.0]
        assert [group["lr"] for group in optimizer.param_groups] == [1e-2, 5e-3]
        for step, (turn, longer) in enumerate(((True, 2), (False, 3), (True, 1)), start=1):
            for delora in common.deloras(model).values():
                A = delora.A.data  # (r, in)
                if turn:
                    A = torch.stack((-A[:, 1::2], A[:, 0::2]), dim=2).flatten(1)
                delora.A.data.copy_(longer * A)
            watch(step, 0.0)

    monkeypatch.setattr(turning, "base", lambda quick: new_model())
    monkeypatch.setattr(turning, "train", made)
    found = turning.one({"quick": True, "lr": 1e-2, "decay": 0.5, "seed": 0})
    assert found["angle"] == pytest.approx([90, 0, 90], abs=1e-4)  # kept to four digits
    shares = [length / found["length"][0] for length in found["length"]]
    assert shares == pytest.approx([1, 2, 6, 6], rel=1e-3)


def test_what_is_kept_of_a_layer_is_what_it_learned(monkeypatch):
    """b_i turned round at λ = 3: the update is twice the learned term."""
    seen = {}

    def turned(model, text, optimizer, steps, seed, watch, batch):
        for name, delora in common.deloras(model).items():
            delora.B.data.neg_()
            delora.lam.data.fill_(3.0)
            seen[name] = delora

    monkeypatch.setattr(learned, "base", lambda quick: new_model())
    monkeypatch.setattr(learned, "train", turned)
    found = learned.one({"quick": True, "seed": 0})
    assert len(seen) == 24
    for name, delora in seen.items():
        norms = new_model().get_parameter(f"{name}.weight").norm(dim=0)  # (in,)
        assert found["strength"][name] == 3
        assert found["moved"][name] == pytest.approx(2 * width.learned_term(delora), abs=1e-4)
        assert found["bound"][name] == pytest.approx(6 * norms.max().item(), abs=1e-4)
        ends = [norms.min().item(), norms.max().item()]
        assert found["norms"][name][::4] == pytest.approx(ends, abs=1e-4)


@pytest.mark.parametrize("method", (start.CLAMPED, start.FROZEN_COPY))
def test_how_far_a_start_went_is_measured_from_w(method, monkeypatch):
    def step(model, text, optimizer, steps, seed, watch, share, batch):
        assert [group["lr"] for group in optimizer.param_groups] == [1e-2, 5e-3]
        layer = model.blocks[0].q
        (layer.base if method == start.CLAMPED else layer.base_layer).weight.data += 0.5
        watch(1, 0.0)

    monkeypatch.setattr(start, "base", lambda quick: new_model())
    monkeypatch.setattr(start, "train", step)
    found = start.one({"quick": True, "start": method, "lr": 1e-2, "seed": 0})
    assert found["moved"][0] == 0
    assert found["moved"][1] == pytest.approx(0.5 * common.WIDTH, rel=1e-5)  # kept to six digits


def test_prolonged_training_has_two_rates_of_lambda(monkeypatch):
    seen = []

    def keep(model, text, optimizer, *rest, **more):
        seen.append([group["lr"] for group in optimizer.param_groups])

    monkeypatch.setattr(forgetting, "base", lambda quick: new_model())
    monkeypatch.setattr(forgetting, "train", keep)
    for method in (common.OURS, forgetting.SLOW):
        forgetting.one({"quick": True, "method": method, "lr": 1e-2, "seed": 0})
    assert seen == [[1e-2, 5e-3], [1e-2, 1e-3]]


def test_a_run_is_trained_on_python_and_measured_on_both_texts(monkeypatch):
    seen = {}

    def groups(model):
        seen["draw"] = torch.rand(1).item()
        model.blocks[0].q.weight.data += 0.5
        return [{"params": [*model.parameters()]}]

    def trained(model, text, optimizer, steps, seed, watch, batch):
        seen["model"], seen["text"], seen["seed"] = model, text, seed
        seen["decay"] = optimizer.param_groups[0]["weight_decay"]

    monkeypatch.setattr(common, "base", lambda quick: new_model())
    monkeypatch.setattr(common, "train", trained)
    found = common.adapted_and_trained({"quick": True, "seed": 7}, groups)
    assert torch.equal(seen["text"], common.python()["train"])
    assert (seen["seed"], seen["decay"]) == (7, 0)
    torch.manual_seed(7)
    assert seen["draw"] == torch.rand(1).item()
    assert found["new"] == common.validate(seen["model"], common.python()["valid"], 16)
    assert found["old"] == common.validate(seen["model"], common.english()["valid"], 16)
    # of the norm's n entries of 0.5, each is off by a rounding of up to 0.5 · EPS
    assert found["moved"] == pytest.approx(0.5 * common.WIDTH, rel=16 * EPS)


def test_a_step_does_not_see_the_gradients_of_the_one_before():
    after = []
    for stale in (0.0, 1.0):
        model = new_model()
        for p in model.parameters():
            p.grad = torch.full_like(p, stale)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        text = common.english()["train"][:2048]
        common.train(model, text, optimizer, 1, 0, lambda *_: None, lambda step: 1.0, batch=2)
        after.append(common.weights(model))
    assert torch.equal(*after)


@pytest.mark.parametrize(
    "method", common.without_peft((common.LORA, common.PEFT_LORA, common.PEFT_DORA))
)
def test_the_peers_add_ba_and_do_not_scale_it(method):
    model = new_model()
    W = model.blocks[0].q.weight.detach().clone()  # (out, in)
    common.prepare(model, method, 1e-3)
    layer = model.blocks[0].q
    found = {}
    for name, p in layer.named_parameters():
        for letter in "AB":
            if name == letter or f"lora_{letter}" in name:
                found[letter] = p.data
    found["B"].normal_()
    wanted = W + found["B"] @ found["A"]
    if method == common.PEFT_DORA:  # rows keep their lengths
        wanted *= W.norm(dim=1, keepdim=True) / wanted.norm(dim=1, keepdim=True)
    measured = layer(torch.eye(common.WIDTH)).detach().T
    # r terms and W; DoRA's norms sum over the width, and the lengths come in twice
    roundings = 8 + 1 + (2 * common.WIDTH if method == common.PEFT_DORA else 0)
    assert (measured - wanted).abs().max() <= roundings * EPS * found["B"].norm(dim=1).max()


@pytest.mark.parametrize("method", common.without_peft((common.PEFT_DELORA, common.OURS)))
def test_lambda_starts_at_15(method):
    strengths = common.prepare(new_model(), method, 1e-2)[1]["params"]
    assert [p.item() for p in strengths] == [15.0] * 24


@pytest.mark.parametrize("rung", ladder.RUNGS)
def test_a_rung_starts_at_w_and_is_the_product_that_its_name_says(rung):
    pretrained = new_model()
    model = copy.deepcopy(pretrained)
    groups = ladder.groups(model, rung, 1e-2, strength=4.0)
    assert torch.equal(common.weights(model), common.weights(pretrained))
    trainable = [p for p in model.parameters() if p.requires_grad]
    assert sum(p.numel() for p in trainable) == ladder.trainable(model)["trainable"]
    assert {p for group in groups for p in group["params"]} == set(trainable)
    assert [group["lr"] for group in groups] == [1e-2, 5e-3]
    if rung == common.OURS:
        return  # that is test_delora.py's business
    adapter = model.blocks[1].up.parametrizations.weight[0].double()
    for p in adapter.parameters():
        p.data += torch.randn(p.shape) if p.numel() > 1 else 1.0
    W = torch.randn(5, common.WIDTH, dtype=torch.float64)  # (out, in)
    factors = {name: p.detach() for name, p in adapter.named_parameters()}
    lam = factors.get("lam", torch.ones(1)).double()
    if rung == "+ relaxed":
        pairs = [(factors["B"].T, factors["A"], 1), (factors["D"].T, factors["C"], -1)]
    else:
        names = "uv" if "u" in factors else "UV"
        pairs = [(factors[names[0]], factors[names[0]], 1), (factors[names[1]],) * 2 + (-1,)]
    E = torch.zeros(common.WIDTH, common.WIDTH, dtype=torch.float64)  # (in, in)
    for left, right, sign in pairs:
        for b, a in zip(left, right, strict=True):
            E += sign * lam / len(left) * b.outer(a) / (b.norm() * a.norm())
    wanted = W - W @ E
    assert (adapter(W) - wanted).abs().max() <= 1e-12 * wanted.abs().max()


def test_the_three_sweeps_move_the_rates_that_they_say():
    wanted = {"λ alone": (1e-2, 0.7), "A and B alone": (0.7, 5e-3), "both": (0.7, 0.7)}
    assert {sweep: rates.both_rates(sweep, 0.7) for sweep in rates.SWEEPS} == wanted
    model = new_model()
    common.prepare(model, common.OURS, 1e-2, lambda_lr=0.0)
    assert rates.strengths(model) == {"strengths": [15.0] * 24}
    still = [run for run in FOUND["rates"]["runs"] if run["rate"] == 0]
    assert {strength for run in still for strength in run["strengths"]} == {15.0}


def test_both_starts_have_the_same_lambda():
    for method in (start.CLAMPED, start.FROZEN_COPY):
        model = new_model()
        job = {"method": method, "lr": 1e-2, "strength": 8.0}
        directions, strengths = strength.groups(model, job)
        assert [p.item() for p in strengths["params"]] == [8.0] * 24
        assert (directions["lr"], strengths["lr"]) == (1e-2, 5e-3)


def test_the_share_is_root_two_when_all_a_stand_at_right_angles_to_their_start():
    model = new_model()
    inject(model, common.LEAVES, r=8)
    assert width.share(model, common.WIDTH) == 0
    for delora in common.deloras(model).values():
        directions = torch.eye(delora.A.shape[1])  # (in, in)
        delora.A.data, delora.A0.data = directions[:8], directions[8:16]
        delora.B.data.copy_(delora.B0)
        delora.w.fill_(1.0)
    assert width.share(model, common.WIDTH) == pytest.approx(2**0.5, rel=64 * EPS)


def test_the_first_step_turns_by_the_angle_that_width_py_says():
    for lr in width.RATES:
        model = new_model()
        inject(model, common.LEAVES, r=8)
        optimizer = torch.optim.AdamW(param_groups(model, lr, lambda_lr=0.0), weight_decay=0)
        text = common.english()["train"][:2048]
        constant, silent = (lambda step: 1.0), (lambda step, loss: None)
        common.train(model, text, optimizer, 1, 0, silent, constant, batch=2)
        # Entries are drawn uniformly, hence lengths vary by 4 % and the mean of shares by less.
        wanted = width.by_angle(common.WIDTH, lr)
        assert width.share(model, common.WIDTH) == pytest.approx(wanted, rel=0.1)


def test_lengths_and_angles_are_those_of_the_components():
    model = new_model()
    inject(model, common.LEAVES, r=8)
    for delora in common.deloras(model).values():
        for p, start_of_p, dim in ((delora.A, delora.A0, 1), (delora.B, delora.B0, 0)):
            p.data = torch.randn(p.shape)
            p.data *= 3 / p.data.norm(dim=dim, keepdim=True)
            start_of_p.data = -p.data if dim else p.data.clone()
    found = robustness.turning(model)
    assert found["length_a"] == pytest.approx(3) and found["length_b"] == pytest.approx(3)
    assert found["turned_a"] == pytest.approx(180, abs=0.1)
    assert found["turned_b"] == pytest.approx(0, abs=0.1)
    lora = new_model()
    common.prepare(lora, common.LORA, 1e-2)
    assert robustness.turning(lora) == {}


def test_the_drawn_walk_stays_on_the_circle_and_in_the_ball():
    W = torch.tensor(geometry.W)
    for lam in geometry.STRENGTHS:
        delora = geometry.delora(lam).delora
        radius = lam * delora.w.item()
        centre = W - radius * nn.functional.normalize(delora.B0.detach(), dim=0).squeeze(1)  # (2,)
        drawn = geometry.circle(geometry.delora(lam))
        assert drawn == (pytest.approx(centre.tolist()), pytest.approx(radius))
        for lr in (0.03, geometry.RATE, 1e6):
            points = torch.stack(geometry.walk(geometry.delora(lam), lr))  # (steps + 1, 2)
            assert torch.equal(points[0], W)
            assert ((points - centre).norm(dim=1) - radius).abs().max() <= 16 * EPS
            assert (points - W).norm(dim=1).max() <= delora.norm_bound() * (1 + 4 * EPS)


def test_the_drawn_walks_are_as_the_figure_says():
    """LoRA's third step leaves the picture for good; DeLoRA ends next to a target out of reach."""
    target = torch.tensor(geometry.TARGET)
    walk = torch.stack(geometry.walk(geometry.lora(), geometry.RATE))  # (steps + 1, 2)
    assert walk[:3].abs().max() < 2 and walk[3].abs().max() > 10
    assert not walk.isfinite().all()
    for lam in geometry.STRENGTHS:
        centre, radius = geometry.circle(geometry.delora(lam))
        distance = math.dist(centre, geometry.TARGET) - radius
        end = geometry.walk(geometry.delora(lam), geometry.RATE)[-1]
        assert distance > 0.1 and (end - target).norm().item() == pytest.approx(distance, rel=1e-2)


# ------------------------------------------------------------------------------------------------
# What is quoted
# ------------------------------------------------------------------------------------------------


def test_prolonged_training_has_each_method_s_best_rate_and_seven_times_its_best_stop():
    runs, found = FOUND["robustness"]["runs"], FOUND["forgetting"]
    rates = {run["lr"] for run in runs}
    steps = found["runs"][0]["step"]
    for method in {run["method"] for run in found["runs"]}:
        where = common.OURS if method == forgetting.SLOW else method
        sums = {lr: sum(common.over_seeds(runs, "new", method=where, lr=lr)) for lr in rates}
        assert forgetting.RATES[method] == min(sums, key=sums.get), method
        assert steps[-1] >= 7 * steps[forgetting.best_stop(found, method)], method


def test_strength_py_has_the_best_rates_of_both_methods():
    runs = FOUND["robustness"]["runs"]
    tried = {run["lr"] for run in runs}
    for method, chosen in ((common.OURS, strength.RATES), (common.LORA, strength.LORA_RATES)):
        sums = {lr: sum(common.over_seeds(runs, "new", method=method, lr=lr)) for lr in tried}
        assert set(chosen) == set(sorted(tried, key=sums.get)[: len(chosen)])


def test_before_is_measured_on_the_windows_of_every_other_row():
    """All runs of forgetting.py begin with the same losses, those of the table's first line."""
    found = FOUND["forgetting"]
    first = forgetting.report(found).splitlines()[0]
    for key, what in (("new", "new text"), ("old", "old text")):
        starts = {run[key][0] for run in found["runs"] if run["method"] != common.PEFT_DORA}
        assert len(starts) == 1
        assert f"{what} {starts.pop():.2f}" in first


def test_what_two_experiments_share_came_out_alike():
    """LoRA, and DeLoRA as it is by default: the same draws in two scripts, in two runs.

    Alike to the digits that the tables show. Beyond its best rate LoRA is compared no more: there
    training makes a difference in the last bit as large as that between two seeds.
    """
    pairs = {common.LORA: common.LORA, "+ w, by column": common.OURS}
    compared = 0
    for run in FOUND["ablation"]["runs"]:
        if run["method"] not in pairs:
            continue
        which = {"method": pairs[run["method"]], "lr": run["lr"], "seed": run["seed"]}
        if run["method"] == common.LORA and run["lr"] > forgetting.RATES[common.LORA]:
            continue
        for key, shown in (("new", 1e-3), ("old", 1e-3), ("moved", 0.1)):
            wanted = common.over_seeds(FOUND["robustness"]["runs"], key, **which)
            assert wanted == pytest.approx([run[key]], abs=shown / 2), (which, key)
        compared += 1
    assert compared == 3 * (3 + 6)  # seeds; rates of LoRA, of DeLoRA


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_the_figures_that_are_quoted_are_those_of_the_last_run(name):
    found = FOUND[name]
    pattern = rf"python examples/experiments/{name}\.py`[^`]*```text\n(.*?)```"
    block = re.search(pattern, EXAMPLES, re.DOTALL)[1]
    lines = [*EXPERIMENTS[name].report(found).splitlines(), common.measured(found)]
    assert not [line for line in block.splitlines() if line.strip() and line not in lines]
    assert not found["quick"] and round(found["took"] / 60) <= 25  # minutes
    assert {run["seed"] for run in found["runs"]} == {0, 1, 2}


def luminance(colour):
    """The relative luminance of #rrggbb (WCAG)."""
    channels = [int(colour[n : n + 2], 16) / 255 for n in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one, other):
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def test_every_colour_is_seen_on_white_and_on_a_dark_page():
    others = (common.GREY, common.TEAL, common.PINK, common.OLIVE)
    colours = [*common.COLOURS.values(), *others]
    assert len(set(colours)) == len(colours)
    for page in ("#ffffff", "#0d1117"):
        assert min(contrast(colour, page) for colour in colours) >= 3
        assert contrast(common.GREY, page) >= 4


def test_every_figure_is_shown_once_is_small_and_has_no_background():
    known = {*common.COLOURS.values(), common.GREY, common.TEAL, common.PINK, common.OLIVE}
    shown = re.findall(r"!\[[^\]]{20,}\]\(experiments/results/(\S+\.svg)\)", EXAMPLES)
    assert sorted(shown) == sorted(path.name for path in common.RESULTS.glob("*.svg"))
    for name in shown:
        text = (common.RESULTS / name).read_text(encoding="utf-8")
        assert len(text.encode()) < 200_000, name
        assert set(re.findall(r"#[0-9a-f]{6}\b", text)) <= known, name
        assert '" style="fill: none"/>' in text[:2000], name
        texts = re.findall(r"<!-- .* -->\n\s*(<g.*>)", text)  # black is what has no style
        assert texts and all('style="fill: #' in group for group in texts), name
    assert len(re.findall(r"!\[[^\]]{20,}\]\(examples/experiments/results/", README)) == 1


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_a_figure_is_drawn_again_from_its_numbers(name, tmp_path):
    pytest.importorskip("matplotlib")
    path = tmp_path / f"{name}.svg"
    common.picture(functools.partial(EXPERIMENTS[name].draw, FOUND[name]), path, (8, 4))
    assert path.stat().st_size > 10_000


@pytest.mark.slow
def test_the_command_line_shows_the_numbers_of_the_last_run_again(tmp_path):
    command = [sys.executable, str(SCRIPTS / "rates.py"), "--redraw", "--out", str(tmp_path)]
    how = {"capture_output": True, "text": True, "timeout": 300}
    done = subprocess.run(command, **how)
    assert done.returncode == 2 and "run without --redraw first" in done.stderr
    (tmp_path / "rates.json").write_text(json.dumps(FOUND["rates"]))
    done = subprocess.run(command, **how)
    assert done.returncode == 0, done.stderr[-2000:]
    assert rates.report(FOUND["rates"]) in done.stdout
    assert (tmp_path / "rates.svg").exists() == common.MATPLOTLIB


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
    assert "peft is not installed: its methods are left out." in done.stdout
    assert "matplotlib is not installed: no figure." in done.stdout
    assert "PEFT DeLoRA" not in done.stdout
    assert re.search(r"^  DeLoRA +\d", done.stdout, re.MULTILINE)
    assert [path.name for path in tmp_path.iterdir()] == ["robustness.json"]
