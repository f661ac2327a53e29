"""Adapters of a model and their files: the rarer cases.

    pytest examples/tests/test_adapters.py    needs torch alone

Any warning is an error here, so a call without pytest.warns around it says nothing.
"""

import copy
import math
import warnings

import pytest
import torch
from torch import nn

from delora import (
    DeLoRA,
    DeLoRALinear,
    adapter_state_dict,
    disabled,
    inject,
    load_adapter,
    merge,
    param_groups,
    unmerge,
)
from test_delora import (
    TOKENS,
    Attention,
    distance,
    refuses,
    same_bits,
    snapshot,
    through_a_file,
    tol,
    trained,
)

# ------------------------------------------------------------------------------------------------
# Models of unusual make, and their names
# ------------------------------------------------------------------------------------------------


def test_a_single_layer_is_a_model_too():
    """The adapter as the root: its checkpoint has no prefix, and what it wraps is no target."""
    torch.manual_seed(0)
    base = nn.Linear(4, 4)
    layer = DeLoRALinear(copy.deepcopy(base), 2)
    fresh = DeLoRALinear(copy.deepcopy(base), 2)
    layer.delora.A.data.normal_()
    state = through_a_file(adapter_state_dict(layer))
    assert "delora.A" in state
    assert set(load_adapter(fresh, state)) == {""}
    assert same_bits(fresh(torch.ones(4)), layer(torch.ones(4)))

    before = snapshot(layer)
    with pytest.raises(ValueError, match="leave no layer"):
        inject(layer, "all-linear")
    assert snapshot(layer) == before
    before = snapshot(base)
    with pytest.raises(ValueError, match="delora.A"):
        load_adapter(base, state)
    assert snapshot(base) == before


def test_a_model_that_is_named_as_in_peft_keeps_its_names():
    torch.manual_seed(0)
    model = nn.ModuleDict({"base_model": nn.ModuleDict({"model": Attention()})})
    fresh = copy.deepcopy(model)
    adapters = inject(model, ["q_proj"], r=2)
    adapters["base_model.model.q_proj"].delora.A.data.normal_()
    assert set(load_adapter(fresh, adapter_state_dict(model))) == {"base_model.model.q_proj"}
    inner = model["base_model"]["model"]
    same = fresh["base_model"]["model"]
    assert same_bits(inner(TOKENS), same(TOKENS))


def test_names_that_look_like_ours_are_the_users_own():
    """A model may have a module called base_layer: nothing is mistaken for an adapter's."""
    torch.manual_seed(0)
    inner = nn.ModuleDict({"fc": nn.Linear(4, 4)})
    pretrained = nn.ModuleDict({"base_layer": inner, "fc": nn.Linear(4, 4)})
    model = copy.deepcopy(pretrained)
    inject(model, ["base_layer.fc"])
    assert not model["fc"].weight.requires_grad
    inject(model, "fc")
    for adapter in (model["fc"], model["base_layer"]["fc"]):
        adapter.delora.A.data.normal_()
    fresh = copy.deepcopy(pretrained)
    load_adapter(fresh, through_a_file(adapter_state_dict(model)))
    x = torch.ones(4)
    assert same_bits(fresh["fc"](x), model["fc"](x))
    assert same_bits(fresh["base_layer"]["fc"](x), model["base_layer"]["fc"](x))


@pytest.mark.parametrize("make", (lambda: nn.Sequential(nn.Conv2d(1, 1, 1)), nn.ReLU))
def test_a_model_without_a_linear_layer_is_told_what_it_asked_for(make):
    message = "target_modules='all-linear', exclude=.. leave no layer"
    with pytest.raises(ValueError, match=message):
        inject(make(), "all-linear")


def test_a_module_of_ones_own_may_train_what_stands_beside_a_delora():
    """Which of its parameters W is, only its author knows."""

    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.W = nn.Parameter(torch.randn(6, 6), requires_grad=False)
            self.adapter = DeLoRA(self.W, r=2)
            self.head = nn.Linear(6, 3)

        def forward(self, x):
            return self.head(x @ self.adapter(self.W).T)

    model = Own()
    others, strengths = param_groups(model, lr=0.1, lambda_lr=0.2)
    wanted = {model.adapter.A, model.adapter.B, *model.head.parameters()}
    assert set(others["params"]) == wanted
    assert strengths["params"] == [model.adapter.lam]


# ------------------------------------------------------------------------------------------------
# inject, merge and what they leave
# ------------------------------------------------------------------------------------------------


def test_a_second_injection_adds_and_leaves_the_first_as_it_was():
    model = Attention()
    first = inject(model, ["q_proj"], r=2, lambda_init=4.0)["q_proj"]
    first.delora.lam.requires_grad_(False)
    model.eval()
    second = inject(model, ["proj"], r=5)["proj"]
    assert model.q_proj is first
    assert first.delora.A.requires_grad
    assert not first.delora.lam.requires_grad
    assert second.delora.A.shape == (5, 8)
    assert second.delora.B.requires_grad
    assert not second.training


def test_an_adapted_layer_is_not_adapted_again():
    model = Attention()
    inject(model, ["q_proj"])
    for targets in (["q_proj"], ["proj", "q_proj"]):
        refuses(lambda m, targets=targets: inject(m, targets), model, "q_proj: .*adapted already")
    refuses(lambda m: inject(m, "q_proj"), model, "'q_proj' matches nothing")
    with pytest.raises(TypeError, match="DeLoRALinear is adapted already"):
        DeLoRALinear(model.q_proj)
    rest = inject(model, "all-linear")  # and nothing inside the adapter that is there
    assert sorted(rest) == ["first", "head", "proj", "second"]
    assert type(model.q_proj.base_layer) is nn.Linear
    refuses(lambda m: inject(m, "all-linear"), model, "leave no layer")


def test_unmerging_follows_the_mode_and_the_device_of_the_model():
    model = Attention()
    inject(model, ["q_proj", "first"], dropout=0.5)
    adapters = merge(model)
    for other in (nn.Linear(8, 9), nn.Linear(9, 8), DeLoRALinear(nn.Linear(8, 8))):
        changed = copy.deepcopy(model)
        changed.q_proj = other
        refuses(lambda m: unmerge(m, adapters), changed, "q_proj: .*this DeLoRALinear back for")
    model.eval().to("meta")  # stands for any other device
    unmerge(model, adapters)
    assert all(p.is_meta for p in model.parameters())
    assert model.q_proj is adapters["q_proj"]
    assert not model.q_proj.training and not model.q_proj.dropout.training


@pytest.mark.parametrize("call", (merge, adapter_state_dict, disabled, param_groups))
def test_what_needs_adapters_says_so_when_there_are_none(call):
    with pytest.raises(ValueError, match="there is no adapter here"):
        if call is param_groups:
            param_groups(Attention(), 1e-3)
        elif call is disabled:
            with disabled(Attention()):
                pass
        else:
            call(Attention())


def test_an_adapter_is_in_float32_or_in_float64_if_its_base_is():
    assert DeLoRALinear(nn.Linear(2, 2)).delora.A.dtype == torch.float32
    assert DeLoRALinear(nn.Linear(2, 2).double()).delora.A.dtype == torch.float64
    assert DeLoRALinear(nn.Linear(2, 2).half()).delora.B.dtype == torch.float32


def test_the_first_parameters_are_still_the_model_s():
    """Code asks next(model.parameters()).dtype for the dtype of a model; adapters are float32."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)).bfloat16()
    before = [id(p) for p in model.parameters()]
    inject(model, ["0"])
    assert next(model.parameters()).dtype == torch.bfloat16
    assert [id(p) for p in model[0].parameters()][:2] == before[:2]

    attention = nn.MultiheadAttention(4, 2, dtype=torch.bfloat16)
    adapter = DeLoRA(attention.in_proj_weight)
    nn.utils.parametrize.register_parametrization(attention, "in_proj_weight", adapter)
    assert next(attention.parameters()).dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
def test_adapters_in_16_bits_are_warned_of(dtype):
    """λ = 15 in bfloat16 is 1/16 from its neighbours: steps of 1e-2 change nothing."""
    model = Attention()
    inject(model, ["q_proj"])
    param_groups(model, 1e-2)
    model.to(dtype)
    with pytest.warns(UserWarning, match="cast first, then inject"):
        param_groups(model, 1e-2)

    model = Attention().to(dtype)
    inject(model, ["q_proj"])
    param_groups(model, 1e-2)


@pytest.mark.parametrize("mode", ("column", "frobenius"))
def test_a_weight_of_zeros_is_warned_of_and_learns_without_w(mode):
    """A residual branch that starts at zero: with w = 0 it stays there, whatever the optimiser."""
    torch.manual_seed(0)
    model = Attention()
    nn.init.zeros_(model.proj.weight)
    with pytest.warns(UserWarning, match="^proj: W is zero.*weight_norm=None") as seen:
        inject(model, ["q_proj", "proj"], r=2, weight_norm=mode)
    assert len(seen) == 1

    model = Attention()
    nn.init.zeros_(model.proj.weight)
    inject(model, ["q_proj", "proj"], r=2, weight_norm=None)
    trained(model)
    assert model.proj.delora.delta_weight().count_nonzero()


def test_merging_while_disabled_loses_nothing():
    model = Attention()
    inject(model, ["q_proj"])
    adapted = trained(model)(TOKENS)
    with disabled(model):
        merge(model)
    assert distance(model(TOKENS), adapted) <= tol(torch.float32, 8, adapted)


def test_an_adapter_is_taken_out_by_its_base_layer_and_hooks_on_that_are_not_merged():
    torch.manual_seed(0)
    model = Attention()
    before = model(TOKENS)
    inject(model, ["q_proj"], r=2)
    trained(model)
    hooked = copy.deepcopy(model)
    hooked.q_proj.base_layer.register_forward_hook(lambda layer, x, y: 2 * y)
    adapted = hooked(TOKENS)
    merge(hooked)
    assert distance(hooked(TOKENS), adapted) > 100 * tol(torch.float32, 8, adapted)

    model.q_proj = model.q_proj.base_layer
    assert same_bits(model(TOKENS), before)


# ------------------------------------------------------------------------------------------------
# What a file may hold
# ------------------------------------------------------------------------------------------------


def test_what_is_saved_hangs_on_no_graph():
    model = nn.Sequential(nn.Linear(4, 3))
    inject(model, ["0"], r=2)
    assert not any(tensor.requires_grad for tensor in adapter_state_dict(model).values())


class Normed(Attention):
    """With a layer that has buffers, and a buffer that is not finite."""

    def __init__(self):
        super().__init__()
        self.batch_norm = nn.BatchNorm1d(8)
        self.register_buffer("mask", torch.tensor([0.0, -math.inf]))


def normed_and_trained():
    """A Normed model as it is pretrained, and with adapters of which every value has moved."""
    torch.manual_seed(0)
    pretrained = Normed()
    model = copy.deepcopy(pretrained)
    inject(model, ["q_proj", "second"], r=2)
    model.norm.requires_grad_(True)
    trained(model)
    model.batch_norm.running_mean.fill_(3.0)
    model.batch_norm.num_batches_tracked.fill_(7)
    return pretrained, model


@pytest.mark.parametrize("whole", (True, False), ids=("the whole model", "the adapters"))
@pytest.mark.parametrize("adapted", (True, False))
def test_loading_freezes_all_but_the_adapters_whatever_the_file_holds(whole, adapted):
    """Hugging Face's Trainer saves the whole state_dict of the model, buffers too."""
    pretrained, model = normed_and_trained()
    state = model.state_dict() if whole else adapter_state_dict(model)
    fresh = copy.deepcopy(model if adapted else pretrained)
    load_adapter(fresh, state)
    wanted = set()
    for name in ("q_proj", "first"):
        wanted |= {f"{name}.delora.A", f"{name}.delora.B", f"{name}.delora.lam"}
    assert {name for name, p in fresh.named_parameters() if p.requires_grad} == wanted
    assert same_bits(fresh(TOKENS), model(TOKENS))
    others, strengths = param_groups(fresh, 1e-2)
    assert len(others["params"]) == 4
    assert len(strengths["params"]) == 2


def test_a_file_of_the_whole_model_restores_its_buffers_too():
    pretrained, model = normed_and_trained()
    load_adapter(pretrained, model.state_dict())
    wanted = model.state_dict()
    for key, value in pretrained.state_dict().items():
        assert same_bits(value, wanted[key]), key


def test_a_checkpoint_of_the_whole_model_brings_its_own_base():
    """Then w is compared with the norms of the W that comes along, not of the one it replaces."""
    torch.manual_seed(0)
    model = Attention()
    other = Attention()
    other.proj.weight.data *= 3
    inject(model, ["proj"], r=2)
    adapter = load_adapter(other, model.state_dict())["proj"]
    assert same_bits(adapter.base_layer.weight, model.proj.base_layer.weight)


def test_a_module_with_a_state_that_is_no_tensor_may_stand_beside_the_adapter():
    class Counter(nn.Identity):
        def get_extra_state(self):
            return {"calls": 3}

        def set_extra_state(self, state):
            pass

    model = nn.Sequential(nn.Linear(4, 3), Counter())
    fresh = copy.deepcopy(model)
    inject(model, ["0"], r=2)["0"].delora.A.data.normal_()
    load_adapter(fresh, adapter_state_dict(model))
    x = torch.randn(2, 4)
    assert same_bits(fresh(x), model(x))


def test_two_names_of_one_adapter_may_be_in_a_file_in_two_precisions():
    torch.manual_seed(0)
    layer = nn.Linear(4, 3, dtype=torch.float64)
    model = nn.ModuleDict({"first": layer, "second": layer})
    inject(model, ["first", "second"], r=2)
    wide = {}
    narrow = {}
    for key, value in adapter_state_dict(model).items():
        if key.startswith("first"):
            wide[key] = value
            narrow[key.replace("first", "second")] = value.float()
    load_adapter(model, wide | narrow)
    assert same_bits(model["second"].delora.A, wide["first.delora.A"])


def test_an_adapter_of_one_column_loads():
    model = nn.Sequential(nn.Linear(1, 3))
    fresh = copy.deepcopy(model)
    inject(model, ["0"], r=2)["0"].delora.A.data.normal_()
    load_adapter(fresh, adapter_state_dict(model))
    x = torch.randn(2, 1)
    assert same_bits(fresh(x), model(x))


# ------------------------------------------------------------------------------------------------
# What is refused when it is loaded
# ------------------------------------------------------------------------------------------------


def tied_model():
    """A model with a head that is tied to its embedding, and the adapters of another like it."""
    torch.manual_seed(0)
    source = Attention()
    inject(source, ["q_proj", "first"], r=2)
    torch.manual_seed(0)
    return Attention(), adapter_state_dict(source)


def test_a_checkpoint_that_unties_what_the_model_ties_is_refused():
    """PEFT saves a trained copy of one of two tied layers. It would change the other one too."""
    model, state = tied_model()
    head = state | {"head.weight": torch.randn(16, 8)}
    one_name = {key: value for key, value in state.items() if "second" not in key}
    for wrong, message in (
        (head, "^(embed|head).weight: tied"),
        (one_name, "^second.delora.A is missing"),
    ):
        before = snapshot(model)
        with pytest.raises(ValueError, match=message):
            load_adapter(model, wrong)
        assert snapshot(model) == before


def test_a_checkpoint_of_a_tied_weight_as_it_is_changes_no_tie():
    model, state = tied_model()
    model.bfloat16()
    state["head.weight"] = model.head.weight.detach().clone().float()
    load_adapter(model, state)
    assert not model.embed.weight.requires_grad
    assert model.head.weight is model.embed.weight


NOT_COPIED = {
    "text": "text",
    "none": None,
    "of numpy": torch.ones(8, 8).numpy(),
    "on the meta device": torch.ones(8, 8, device="meta"),
}


@pytest.mark.parametrize("value", NOT_COPIED.values(), ids=NOT_COPIED)
def test_a_head_that_cannot_be_copied_is_refused_before_anything_is(value):
    model = nn.ModuleDict({"body": nn.Linear(8, 8), "head": nn.Linear(8, 8)})
    inject(model, ["body"], r=2)
    state = adapter_state_dict(model)
    state["head.weight"] = value
    state["body.delora.A"] += 1
    before = snapshot(model)
    with pytest.raises(ValueError, match="^head.weight"):
        load_adapter(model, state)
    assert snapshot(model) == before


def test_a_load_that_fails_at_the_comparison_changes_nothing():
    """W is not finite any more; or warnings are errors."""
    torch.manual_seed(0)
    model = Attention()
    inject(model, ["q_proj", "proj"], r=2)
    state = adapter_state_dict(trained(copy.deepcopy(model)))
    model.proj.base_layer.weight.data[0, 0] = math.nan
    before = snapshot(model)
    with pytest.raises(ValueError, match="not finite"):
        load_adapter(model, state)
    assert snapshot(model) == before

    model.proj.base_layer.weight.data.fill_(1)
    before = snapshot(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match="^proj: w has norm"):
            load_adapter(model, state)
    assert snapshot(model) == before


# ------------------------------------------------------------------------------------------------
# An adapter of another base: its w says what W was
# ------------------------------------------------------------------------------------------------


measured_by = pytest.mark.parametrize("mode", ("column", "frobenius"))


def pretrained_and_adapted(mode):
    """A model, and a copy of it with two adapters, trained."""
    torch.manual_seed(0)
    pretrained = Attention()
    model = copy.deepcopy(pretrained)
    inject(model, ["q_proj", "proj"], r=2, weight_norm=mode)
    return pretrained, trained(model)


@measured_by
def test_an_adapter_of_the_same_base_loads_without_a_warning(mode):
    pretrained, model = pretrained_and_adapted(mode)
    state = adapter_state_dict(model)
    load_adapter(copy.deepcopy(pretrained), state)
    load_adapter(copy.deepcopy(pretrained).bfloat16(), state)
    load_adapter(model, state)


@measured_by
def test_an_adapter_of_another_base_is_warned_of(mode):
    pretrained, model = pretrained_and_adapted(mode)
    state = adapter_state_dict(model)
    if mode == "column":
        pretrained.proj.weight.data[:, 3] *= 1.2
    else:
        pretrained.proj.weight.data *= 1.2
    message = r"^proj: w has norm [\d.]+ in the checkpoint, [\d.]+ here"
    with pytest.warns(UserWarning, match=message) as seen:
        load_adapter(pretrained, state)
    assert len(seen) == 1


@pytest.mark.filterwarnings("ignore:.*w has norm")
@pytest.mark.parametrize("mode", ("column", "frobenius", None))
def test_the_mode_is_read_from_the_file_also_on_another_base(mode):
    model = Attention()
    inject(model, ["q_proj"], r=3, weight_norm=mode)
    fresh = Attention()
    load_adapter(fresh, adapter_state_dict(model))
    assert f"w={mode}, tied=True" in str(fresh)


@measured_by
def test_an_adapter_that_was_made_before_the_weights_were_loaded_is_warned_of(mode):
    torch.manual_seed(0)
    pretrained = Attention()
    late = copy.deepcopy(pretrained)
    for p in late.parameters():
        p.data *= 0.1
    inject(late, ["q_proj", "proj"], r=2, weight_norm=mode)
    for name in ("q_proj", "proj"):
        layer = pretrained.get_submodule(name)
        late.get_submodule(name).base_layer.load_state_dict(layer.state_dict())
    state = adapter_state_dict(late)
    with pytest.warns(UserWarning, match="weights were loaded or merged after it was made") as seen:
        load_adapter(pretrained, state)
    assert {str(w.message).partition(":")[0] for w in seen} == {"q_proj", "proj"}


@measured_by
def test_an_update_that_would_be_applied_twice_is_warned_of(mode):
    _, model = pretrained_and_adapted(mode)
    model.proj.delora.A.data.neg_()
    state = adapter_state_dict(model)
    merge(model)
    with pytest.warns(UserWarning, match="^(q_)?proj: w has norm"):
        load_adapter(model, state)


@pytest.mark.parametrize("mode", ("column", "frobenius", None))
def test_columns_of_equal_norms_are_no_sign_of_another_mode(mode):
    """As in orthogonal and in binary weights."""
    torch.manual_seed(0)
    for weight in (2 * torch.eye(8), 0.02 * torch.randn(8, 8).sign(), torch.full((8, 8), 0.1)):
        pretrained = Attention()
        pretrained.proj.weight.data.copy_(weight)
        model = copy.deepcopy(pretrained)
        inject(model, ["proj"], r=2, weight_norm=mode)
        adapter = load_adapter(pretrained, adapter_state_dict(model))["proj"]
        assert adapter.delora.weight_norm == mode


def test_without_weight_norm_there_is_nothing_to_compare():
    torch.manual_seed(0)
    pretrained = Attention()
    model = copy.deepcopy(pretrained)
    inject(model, ["q_proj"], r=2, weight_norm=None)
    state = adapter_state_dict(model)
    pretrained.q_proj.weight.data *= 3
    adapter = load_adapter(pretrained, state)["q_proj"]
    assert adapter.delora.w.tolist() == [1.0] * 8
    assert adapter.delora.weight_norm is None


def test_an_adapter_of_zeros_is_no_adapter_of_another_base():
    model = nn.Sequential(nn.Linear(4, 3))
    model[0].weight.data.zero_()
    fresh = copy.deepcopy(model)
    with pytest.warns(UserWarning, match="W is zero"):
        inject(model, ["0"], r=2)
    adapters = load_adapter(fresh, adapter_state_dict(model))
    assert adapters["0"].delora.norm_bound() == 0


def test_how_far_w_may_be_off_is_a_share_of_the_mean_norm():
    """A twentieth: 7 % of a large column are too much, all of a tiny one is not."""
    model = nn.Sequential(nn.Linear(3, 4))
    model[0].weight.data.copy_(torch.tensor([1.0, 1.1, 1e-3]).expand(4, 3))
    large = copy.deepcopy(model)
    tiny = copy.deepcopy(model)
    inject(model, ["0"], r=2)
    tiny[0].weight.data[:, 2] *= 2
    load_adapter(tiny, adapter_state_dict(model))
    large[0].weight.data[:, 0] *= 1.07
    with pytest.warns(UserWarning, match="w has norm"):
        load_adapter(large, adapter_state_dict(model))
