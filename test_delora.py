"""What must hold for delora.py, property by property: P1 to P11 of the README's table, then the helpers around them.

    pytest test_delora.py

Shapes are drawn from extremes, numbers over the range that floats have, and every tolerance follows from the precision
and the number of roundings: see `tol`.
"""

import copy
import io
import math
import shutil

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import delora
from delora import (
    DeLoRALinear,
    adapter_state_dict,
    disabled,
    inject,
    load_adapter,
    merge,
    param_groups,
    unmerge,
)

settings.register_profile("fast", deadline=None, max_examples=40, print_blob=True)
settings.load_profile("fast")

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
MODES = ("column", "frobenius", None)
SHAPES = ((1, 1), (1, 9), (9, 1), (4, 4), (5, 17), (17, 5), (64, 32))  # (in, out)


def tol(dtype: torch.dtype, n: int) -> float:
    """The relative error of n roundings that all point the same way, with a factor of 8 for the products of them."""
    return 8 * n * torch.finfo(dtype).eps


def relative(actual: torch.Tensor, wanted: torch.Tensor, scale: float = 0.0) -> float:
    """Largest difference, relative to the largest entry of what is wanted, or to scale if that is larger."""
    actual, wanted = actual.detach().double(), wanted.detach().double()
    largest = max(wanted.abs().max().item() if wanted.numel() else 0.0, scale)
    return ((actual - wanted).abs().max().item() / largest) if wanted.numel() and largest else 0.0


@st.composite
def zero_start(draw, dtypes=DTYPES, dropout=0.0):
    """A layer as it is after construction, from the shapes and options at the edge of what is allowed."""
    torch.manual_seed(draw(st.integers(0, 999), label="seed"))
    n_in, n_out = draw(st.sampled_from(SHAPES), label="(in, out)")
    dtype = draw(st.sampled_from(dtypes), label="dtype")
    base = nn.Linear(n_in, n_out, bias=draw(st.booleans(), label="bias"), dtype=dtype)
    if draw(st.booleans(), label="a zero column in W"):
        base.weight.data[:, 0] = 0
    r = draw(st.sampled_from((1, min(n_in, n_out), min(n_in, n_out) + 3)), label="r")
    mode, tied = draw(st.sampled_from(MODES), label="weight_norm"), draw(st.booleans(), label="tie_lambda")
    return DeLoRALinear(base, r, 3.0, weight_norm=mode, tie_lambda=tied, dropout=dropout)


@st.composite
def moved(draw, dtypes=(torch.float64,), spread=6):
    """A layer somewhere else: random A and B, components of very different lengths, any λ, now and then a zero row."""
    layer = draw(zero_start(dtypes))
    exponents = st.integers(-spread, spread)
    with torch.no_grad():
        for p, dim in ((layer.delora_A, 0), (layer.delora_B, 1)):
            for component in p.normal_().unbind(dim):
                component *= 10.0 ** draw(exponents, label="length of a component, power of ten")
        if draw(st.booleans(), label="a zero row in A"):
            layer.delora_A[0] = 0
        layer.delora_lambda.fill_(draw(st.sampled_from((3.0, 1e-3, -2.0, 0.0, 1e6)), label="λ"))
    return layer


def some_input(layer: DeLoRALinear) -> torch.Tensor:
    return torch.randn(2, 3, layer.in_features, dtype=layer.base_layer.weight.dtype)


def nuclear(matrix: torch.Tensor) -> float:
    return torch.linalg.svdvals(matrix.detach().double()).sum().item()


def snapshot(model: nn.Module) -> list:
    """All that a failed call must leave alone: which modules, which tensors, their bits, what is trainable."""
    modules = [(name, id(module), module.training) for name, module in model.named_modules(remove_duplicate=False)]
    tensors = list(model.named_parameters(remove_duplicate=False)) + list(model.named_buffers())
    return [modules, [(name, id(t), t._version, t.requires_grad) for name, t in tensors]]


class Attention(nn.Module):
    """A small model with what real ones have: names that end alike, a norm, a tied head, a layer with two names."""

    def __init__(self, d=8):
        super().__init__()
        self.embed = nn.Embedding(16, d)
        self.q_proj, self.proj = nn.Linear(d, d), nn.Linear(d, d, bias=False)
        self.norm, self.first = nn.LayerNorm(d), nn.Linear(d, d)
        self.second = self.first
        self.head = nn.Linear(d, 16, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens):
        x = self.embed(tokens)
        x = x + self.proj(torch.tanh(self.q_proj(self.norm(x))))
        return self.head(x + self.second(torch.tanh(self.first(x))))


TOKENS = torch.arange(12).view(2, 6)


def trained(model: nn.Module, steps: int = 3, lr: float = 0.05) -> nn.Module:
    """Some steps of AdamW on a loss that moves every adapter."""
    optimizer = torch.optim.AdamW(param_groups(model, lr))
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(model(TOKENS).flatten(0, 1), TOKENS.flatten().flip(0)).backward()
        optimizer.step()
    return model


# ------------------------------------------------------------------------------------------------ P1 zero start


@given(layer=zero_start(dropout=0.3), other=st.sampled_from(DTYPES), grad=st.booleans())
def test_a_new_adapter_changes_no_bit_of_the_output(layer, other, grad):
    """ΔW = 0 at the start (Eq. 9): layer(x) = base(x), in every dtype, after a cast, under autocast, with dropout."""
    with torch.set_grad_enabled(grad):
        x = some_input(layer)
        assert torch.equal(layer(x), layer.base_layer(x))
        assert torch.equal(layer.weight, layer.base_layer.weight)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(layer(x), layer.base_layer(x))
            assert torch.equal(layer.weight, layer.base_layer.weight)
        layer.to(other)
        assert torch.equal(layer(x.to(other)), layer.base_layer(x.to(other)))


@pytest.mark.parametrize("mode", MODES)
def test_the_zero_start_survives_inputs_near_the_end_of_float16(mode):
    """No product on the way is larger than the input: ∞ · 0 would be NaN, not zero."""
    base = nn.Linear(1, 4096, bias=False).half()
    nn.init.normal_(base.weight)
    x = torch.full((2, 1), 1e4, dtype=torch.float16)
    assert base(x).isfinite().all() and torch.equal(DeLoRALinear(base, weight_norm=mode)(x), base(x))


@given(layer=zero_start((torch.float32,)), stored=st.sampled_from(DTYPES[1:]), cast=st.sampled_from(DTYPES[2:]))
def test_an_adapter_of_any_precision_works_under_autocast_to_any_other(layer, stored, cast):
    x = some_input(layer).to(stored)
    layer.to(stored)
    with torch.autocast("cpu", cast):
        assert torch.equal(layer(x), layer.base_layer(x)) and layer(x).dtype == layer.base_layer(x).dtype


@given(layer=zero_start())
def test_the_frozen_copy_has_storage_of_its_own(layer):
    """Sharing it would keep ΔW at zero for ever: on a CPU, nothing else ever separates the two."""
    for trainable, frozen in ((layer.delora_A, layer.delora_A0), (layer.delora_B, layer.delora_B0)):
        assert torch.equal(trainable, frozen) and not frozen.requires_grad
        assert trainable.untyped_storage().data_ptr() != frozen.untyped_storage().data_ptr()


def test_what_is_frozen_stays_so_even_if_all_is_declared_trainable():
    """`model.requires_grad_(True)` is common; A₀, B₀, λ₀ and w are constants of the method all the same (Eq. 9)."""
    layer = DeLoRALinear(nn.Linear(5, 4), 2, tie_lambda=False)
    layer.requires_grad_(True)
    layer(torch.randn(3, 5)).square().sum().backward()
    for name, p in layer.named_parameters(recurse=False):
        assert (p.grad is not None) == (name in ("delora_A", "delora_B", "delora_lambda")), name


@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs g++")
@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")
def test_the_zero_start_survives_compilation():
    base = nn.Linear(48, 40)
    for tied in (True, False):
        layer, x = DeLoRALinear(base, 4, tie_lambda=tied), torch.randn(8, 48)
        compiled = torch.compile(layer, fullgraph=True)
        assert torch.equal(compiled(x), torch.compile(base, fullgraph=True)(x))
    with torch.no_grad():
        layer.delora_A[0] = 0
        layer.delora_B.normal_()
    for model in (compiled, layer):
        model(x).square().sum().backward()
    # both passes summed into the same .grad: compiled and eager gradients are equal, and finite at the zero row
    total = layer.delora_B.grad.clone()
    layer.zero_grad()
    layer(x).square().sum().backward()
    assert relative(total, 2 * layer.delora_B.grad) < tol(torch.float32, 48)
    assert torch.equal(layer.delora_A.grad[0], torch.zeros(48))


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_zero_start_survives_the_fused_encoder_layer(dtype):
    """In inference nn.TransformerEncoderLayer calls none of its layers: it reads their weights."""
    encoder = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, dtype=dtype).eval()
    x = torch.randn(2, 5, 16, dtype=dtype)
    with torch.no_grad():
        before = encoder(x)
        inject(encoder, ["linear1", "linear2", "out_proj"], r=4)
        assert torch.equal(encoder(x), before)


# ------------------------------------------------------------------------------------------------ P2 bound


@given(layer=moved((torch.float64, torch.float32), spread=30))
def test_the_update_never_exceeds_the_bound(layer):
    """‖ΔW‖_F ≤ ‖ΔW‖_* ≤ 2 |λ| max w, or (|λ| + |λ₀|) max w untied, whatever A and B are (Eq. 6, 7)."""
    n = layer.in_features + layer.out_features
    assert nuclear(layer.delta_weight()) <= layer.norm_bound() * (1 + tol(layer.delora_A.dtype, n))
    strengths = [layer.delora_lambda, layer.delora_lambda if layer.delora_lambda0 is None else layer.delora_lambda0]
    assert layer.norm_bound() == sum(abs(s.item()) for s in strengths) * layer.delora_w_norm.max().item()


@given(layer=zero_start((torch.float32,)), sgd=st.booleans(), lr=st.sampled_from((1e-3, 1.0, 1e3)))
def test_no_learning_rate_leaves_the_bound(layer, sgd, lr):
    """The bound is no property of small steps: it holds after any step of any optimiser."""
    optimizer = (torch.optim.SGD if sgd else torch.optim.AdamW)([p for p in layer.parameters() if p.requires_grad], lr)
    for _ in range(4):
        optimizer.zero_grad()
        x = some_input(layer)
        (layer(x) - 1).square().mean().backward()
        optimizer.step()
        delta = layer.delta_weight()
        assert delta.isfinite().all()
        n = layer.in_features + layer.out_features
        assert nuclear(delta) <= layer.norm_bound() * (1 + tol(torch.float32, n))


@pytest.mark.parametrize("r", (1, 4))
def test_the_bound_is_attained_by_aligned_components(r):
    """All r components equal, those of the frozen copy opposite: ‖ΔW‖_F = ‖ΔW‖_* = 2 |λ| w."""
    layer = DeLoRALinear(nn.Linear(6, 5).double(), r, weight_norm="frobenius")
    with torch.no_grad():
        layer.delora_A.copy_(torch.randn(6).double().expand(r, 6))
        layer.delora_B.copy_(torch.randn(5, 1).double().expand(5, r))
        layer.delora_A0.copy_(layer.delora_A)
        layer.delora_B0.copy_(-layer.delora_B)
    assert layer.delta_weight().norm().item() == pytest.approx(layer.norm_bound(), rel=tol(torch.float64, 11))


# ------------------------------------------------------------------------------------------------ P3 to P6


@given(layer=moved(spread=3), powers=st.tuples(st.integers(-140, 140), st.integers(-140, 140)))
@example(layer=None, powers=(-37, 37))
def test_rescaling_a_component_changes_nothing(layer, powers):
    """a_i → c a_i, b_i → c b_i, c > 0: the same ΔW and the same ∂L/∂λ (Eq. 5)."""
    layer = layer or DeLoRALinear(nn.Linear(5, 7).double(), 2)

    def delta_and_gradient():
        layer.delora_lambda.grad = None
        delta = layer.delta_weight()
        delta.cos().sum().backward()
        return delta.detach(), layer.delora_lambda.grad

    delta, gradient = delta_and_gradient()
    with torch.no_grad():
        layer.delora_A[-1] *= 10.0 ** powers[0]
        layer.delora_B[:, 0] *= 10.0 ** powers[1]
    delta2, gradient2 = delta_and_gradient()
    n = layer.in_features + layer.out_features
    assert relative(delta2, delta) <= tol(torch.float64, n)
    terms = delta.abs().sum().item() / max(abs(layer.delora_lambda.item()), 1)  # what the sum behind ∂L/∂λ is made of
    assert relative(gradient2, gradient, scale=layer.norm_bound() + terms + 1) <= tol(torch.float64, n * n)


@given(layer=moved(spread=3))
def test_gradients_turn_angles_and_never_stretch_them(layer):
    """⟨∂L/∂a_i, a_i⟩ = 0 = ⟨∂L/∂b_i, b_i⟩ for every i and loss; finite everywhere, and zero at zero."""
    (layer(some_input(layer)).sin().sum()).backward()
    for p, dim in ((layer.delora_A, 1), (layer.delora_B, 0)):
        assert p.grad.isfinite().all()
        size = (p.grad.abs() * p.abs()).sum(dim)  # what would be cancelled
        noise = abs(layer.delora_lambda.item()) * layer.delora_w_norm.max() + 1
        assert ((p.grad * p).sum(dim).abs() <= tol(torch.float64, 100) * (size + noise)).all()
        zero = p.detach().norm(dim=dim) == 0
        assert (p.grad.norm(dim=dim)[zero] == 0).all()


@given(layer=moved(), c=st.sampled_from((-2.0, 0.0, 0.5, 4.0)))
def test_lambda_is_strength_alone(layer, c):
    """Tied: ΔW(cλ) = c ΔW(λ), and λ ∂L/∂λ = ⟨∂L/∂ΔW, ΔW⟩ (Eq. 7)."""
    layer.delora_lambda0 = None
    delta = layer.delta_weight()
    delta.retain_grad()
    delta.cos().sum().backward()
    inner, n = (delta.grad * delta).sum(), layer.in_features * layer.out_features
    size = (delta.grad * delta).abs().sum().item() + abs(layer.norm_bound())
    assert relative(layer.delora_lambda * layer.delora_lambda.grad, inner, scale=size) <= tol(torch.float64, n)
    with torch.no_grad():
        layer.delora_lambda *= c
    assert relative(layer.delta_weight(), c * delta) <= tol(torch.float64, 1)


@pytest.mark.parametrize("optimizer", (torch.optim.SGD, torch.optim.Adam))
@pytest.mark.parametrize("tied", (True, False))
def test_the_first_step_is_as_long_as_the_learning_rate(optimizer, tied):
    """‖ΔW‖ after one step is proportional to lr (PEFT's B = 0 jumps to full strength at every lr instead)."""
    moves = []
    for lr in (1e-7, 1e-6, 1e-5, 1e-4):
        torch.manual_seed(0)
        layer = DeLoRALinear(nn.Linear(32, 24).double(), 4, tie_lambda=tied)
        step = optimizer([layer.delora_A, layer.delora_B, layer.delora_lambda], lr)
        layer(torch.randn(16, 32).double()).square().mean().backward()
        step.step()
        moves.append(layer.delta_weight().norm().item() / lr)
    assert moves[0] > 0
    assert max(moves) / min(moves) < 1.01  # what is left is the curvature of the step at 1e-4


# ------------------------------------------------------------------------------------------------ P7 one linear map


@given(layer=moved(DTYPES, spread=2))
def test_output_weight_and_merged_layer_are_one_linear_map(layer):
    """layer(x) = F.linear(x, layer.weight, layer.bias) = layer.merged()(x), to rounding."""
    dtype = layer.base_layer.weight.dtype
    layer.delora_lambda.data.clamp_(-3, 3)
    x = some_input(layer)
    wanted = F.linear(x, layer.weight, layer.bias)
    assert layer(x).dtype == dtype and wanted.dtype == dtype
    size = x.double().abs().sum(-1).max().item() * (layer.weight.double().abs().max().item() + layer.norm_bound())
    assert relative(layer(x), wanted, scale=size) <= tol(dtype, 2)
    merged = layer.merged()
    assert type(merged) is nn.Linear and torch.equal(merged.weight, layer.weight) and torch.equal(merged(x), wanted)
    with torch.autocast("cpu", torch.bfloat16):  # W + ΔW is float32 or wider whatever the context
        assert torch.equal(layer.weight, merged.weight) and torch.equal(layer.merged().weight, merged.weight)


def test_dropout_acts_in_training_alone_and_on_the_adapter_alone():
    torch.manual_seed(0)
    layer, x = DeLoRALinear(nn.Linear(64, 64), 4, dropout=0.5), torch.randn(8, 64)
    assert torch.equal(layer(x), layer.base_layer(x))  # training, but there is nothing to drop yet
    layer.delora_A.data.normal_()
    assert not torch.equal(layer(x), layer(x))
    layer.eval()
    assert torch.equal(layer(x), layer(x)) and relative(layer(x), F.linear(x, layer.weight, layer.bias)) < 1e-5


def test_the_output_keeps_the_dtype_of_the_base_layer():
    """A layer may compute in a precision of its own: here bfloat16, whatever it is given."""

    class Bfloat16Linear(nn.Linear):
        def forward(self, x):
            return F.linear(x.bfloat16(), self.weight.bfloat16(), self.bias.bfloat16())

    base, x = Bfloat16Linear(8, 8), torch.randn(3, 8)
    layer = DeLoRALinear(base, 2)
    assert layer(x).dtype == base(x).dtype == torch.bfloat16 and torch.equal(layer(x), base(x))


@given(layer=moved(spread=1))
def test_gradcheck(layer):
    """The gradients of A, B, λ and x are those of the output, through `forward` and through `weight`."""
    x = some_input(layer).requires_grad_()
    with torch.no_grad():  # a zero row has no derivative to compare with
        layer.delora_A[layer.delora_A.norm(dim=1) == 0] = 1
        layer.delora_lambda.clamp_(-3, 3)
        for p in (layer.delora_A, layer.delora_B):
            p /= p.norm(dim=1 if p is layer.delora_A else 0, keepdim=True)
    inputs = (layer.delora_A, layer.delora_B, layer.delora_lambda, x)
    assert torch.autograd.gradcheck(lambda *_: layer(x), inputs, fast_mode=True)
    assert torch.autograd.gradcheck(lambda *_: F.linear(x, layer.weight), inputs, fast_mode=True)


def test_code_that_reads_the_weight_sees_the_adapter_and_trains_it():
    """nn.MultiheadAttention reads out_proj.weight; the fused nn.TransformerEncoderLayer reads all of them."""
    torch.manual_seed(0)
    encoder, x = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True), torch.randn(2, 5, 16)
    adapters = inject(encoder, ["linear1", "linear2", "self_attn.out_proj"], r=4)
    optimizer = torch.optim.SGD(param_groups(encoder, lr=0.1))
    for _ in range(2):
        optimizer.zero_grad()
        encoder(x).square()[..., 0].sum().backward()
        assert all(a.delora_A.grad.abs().sum() > 0 and a.delora_B.grad.abs().sum() > 0 for a in adapters.values())
        optimizer.step()
    slow = encoder(x)
    with torch.no_grad(), disabled(encoder):
        base = encoder.eval()(x)
    with torch.no_grad():
        fused = encoder(x)
    assert relative(fused, slow) < tol(torch.float32, 32) < 1e-2 < relative(fused, base)


@pytest.mark.filterwarnings("ignore::FutureWarning:torch", "ignore::DeprecationWarning:torch")
def test_a_model_whose_layers_are_read_and_not_called_can_be_exported():
    encoder, x = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True), torch.randn(2, 5, 16)
    for adapter in inject(encoder, ["linear1", "linear2", "out_proj"], r=2).values():
        adapter.delora_A.data.normal_()
    exported = torch.export.export(encoder, (x,)).module()
    assert relative(exported(x), encoder(x)) <= tol(torch.float32, 32)


# ------------------------------------------------------------------------------------------------ P8 merge


@pytest.mark.parametrize("dtype", DTYPES)
def test_merge_and_unmerge_restore_every_bit(dtype):
    """W + ΔW is rounded once; merging touches nobody else's tensor; unmerging gives back the same objects."""
    torch.manual_seed(0)
    model = Attention()
    inject(model, "all-linear", r=3)
    trained(model).to(dtype).eval()
    before = snapshot(model)
    bits = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    adapted = model(TOKENS)
    for _ in range(5):
        taken = merge(model)
        assert sorted(taken) == ["first", "head", "proj", "q_proj", "second"] and model.first is model.second
        assert not any(isinstance(module, DeLoRALinear) for module in model.modules())
        assert not any(p.requires_grad for p in model.parameters())
        for name, adapter in taken.items():
            plain, wide = model.get_submodule(name), torch.promote_types(dtype, torch.float32)
            assert plain.weight.dtype == dtype and not plain.training
            exact = (adapter.base_layer.weight.to(wide) + adapter.delta_weight().to(wide)).to(dtype)
            assert torch.equal(plain.weight, exact)
        assert relative(model(TOKENS), adapted) <= tol(dtype, 8)
        assert torch.equal(model.embed.weight, bits["embed.weight"]) and model.head.weight is not model.embed.weight
        unmerge(model, taken)
    assert snapshot(model) == before
    assert all(torch.equal(tensor, bits[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(model(TOKENS), adapted)


def test_merge_refuses_what_is_not_finite_and_changes_nothing():
    model = Attention().half()
    inject(model, ["q_proj", "proj"], r=1)
    with torch.no_grad():
        model.proj.delora_A.neg_()
        model.proj.delora_w_norm.fill_(6e4)
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"^proj: .*not finite"):
        merge(model)
    assert snapshot(model) == before
    with pytest.raises(ValueError, match="Linear .* nothing holds it|model itself"):
        merge(DeLoRALinear(nn.Linear(2, 2)))
    with pytest.raises(ValueError, match="Attention has no DeLoRALinear"):
        merge(Attention())


def test_unmerge_follows_the_mode_of_the_model_and_refuses_what_does_not_fit():
    model = Attention()
    inject(model, ["q_proj", "first"], dropout=0.5)
    taken = merge(model)
    before = snapshot(model)
    for wrong in ({"q_proj": nn.Linear(8, 8)}, {"norm": taken["q_proj"]}, {"nowhere": taken["q_proj"]}, {"embed": 3}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            unmerge(model, taken | wrong)
        assert snapshot(model) == before
    model.eval().to("meta")  # stands for any other device
    unmerge(model, taken)
    assert all(p.is_meta for p in model.parameters())
    assert model.q_proj is taken["q_proj"] and not model.q_proj.training and not model.q_proj.dropout.training
    with pytest.raises(ValueError, match="q_proj"):
        unmerge(model, taken)


def test_disabled_is_the_pretrained_model_and_nests():
    model = Attention()
    base = model(TOKENS)
    inject(model, ["q_proj", "second"], r=2)
    adapted = trained(model)(TOKENS)
    assert relative(adapted, base) > 1e-3
    with pytest.raises(KeyError), disabled(model):
        with disabled(model):
            assert torch.equal(model(TOKENS), base)
            assert torch.equal(model.first.weight, model.first.base_layer.weight)
        assert torch.equal(model(TOKENS), base)
        raise KeyError
    assert torch.equal(model(TOKENS), adapted)


# ------------------------------------------------------------------------------------------------ P9 oracle


def oracle(layer: DeLoRALinear, tied: bool) -> torch.Tensor:
    """ΔW as the sum over rank-one components that Eq. 9 is, in float64, one entry at a time."""
    A, B, A0, B0, w = (
        getattr(layer, f"delora_{name}").detach().double().tolist() for name in ("A", "B", "A0", "B0", "w_norm")
    )
    strength = layer.delora_lambda.item()
    total = torch.zeros(layer.out_features, layer.in_features, dtype=torch.float64)
    for rows, columns, factor in ((A, B, strength), (A0, B0, -(strength if tied else layer.delora_lambda0.item()))):
        for k, a in enumerate(rows):
            b = [row[k] for row in columns]
            length = math.hypot(*a) * math.hypot(*b)
            for i in range(len(b)) if length else ():
                for j in range(len(a)):
                    total[i, j] += factor / len(rows) * (b[i] / math.hypot(*b)) * (a[j] / math.hypot(*a)) * w[j]
    return total


@settings(max_examples=20)
@given(layer=moved((torch.float64, torch.float32)))
def test_the_update_equals_a_loop_over_rank_one_components(layer):
    """ΔW = Σ_i (λ/r) (b_i a_iᵀ / (‖b_i‖ ‖a_i‖) − the same of the copy) diag(w)   (Eq. 8, 9)."""
    wanted = oracle(layer, layer.delora_lambda0 is None)
    n = layer.in_features + layer.out_features
    assert relative(layer.delta_weight(), wanted, scale=layer.norm_bound()) <= tol(layer.delora_A.dtype, n)
    left, right = layer.factors()
    r = layer.delora_A.shape[0]
    assert left.shape == (layer.out_features, 2 * r) and right.shape == (2 * r, layer.in_features)
    with torch.no_grad():
        layer.delora_lambda.clamp_(-3, 3)
        layer.to(torch.bfloat16)  # parameters in bfloat16, arithmetic in float32
    wanted = oracle(layer, layer.delora_lambda0 is None)
    assert layer.delta_weight().dtype == torch.float32
    assert relative(layer.delta_weight(), wanted, scale=layer.norm_bound()) <= tol(torch.float32, n)


def test_the_weight_norm_is_measured_as_the_mode_says():
    """w: column norms over the outputs, the Frobenius norm, or one (Eq. 8, 7)."""
    base = nn.Linear(2, 2, bias=False).double()
    base.weight.data = torch.tensor([[3.0, 0.0], [4.0, 2.0]]).double()
    for mode, w in (("column", [5.0, 2.0]), ("frobenius", [29**0.5] * 2), (None, [1.0, 1.0])):
        layer = DeLoRALinear(base, 1, weight_norm=mode)
        assert layer.delora_w_norm.tolist() == pytest.approx(w, rel=tol(torch.float64, 4))
        assert not any(p.requires_grad for p in base.parameters())


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
def test_the_weight_norm_of_a_narrow_base_is_measured_in_float32(dtype):
    base = nn.Linear(9, 300).to(dtype)
    layer = DeLoRALinear(base)
    assert layer.delora_w_norm.dtype == torch.float32
    assert relative(layer.delora_w_norm, base.weight.double().norm(dim=0)) <= tol(torch.float32, 300)


# ------------------------------------------------------------------------------------------------ P10 checkpoint


def through_a_file(state: dict) -> dict:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


@pytest.mark.parametrize("tied", (True, False))
@pytest.mark.parametrize("mode", MODES)
def test_a_checkpoint_restores_the_outputs_bit_for_bit_without_a_configuration(tied, mode):
    torch.manual_seed(0)
    pretrained = Attention()
    model = copy.deepcopy(pretrained)
    inject(model, ["q_proj"], r=3, weight_norm=mode, tie_lambda=tied)
    inject(model, ["second"], r=2, lambda_init=2.0)
    model.norm.requires_grad_(True)
    model.q_proj.base_layer.bias.requires_grad_(True)
    trained(model)
    state = through_a_file(adapter_state_dict(model))
    changed = {"norm.weight", "norm.bias", "q_proj.base_layer.bias"}
    assert {key for key in state if "delora_" not in key} == changed
    assert {key.split(".")[0] for key in state if "delora_" in key} == {"q_proj", "first", "second"}

    fresh = copy.deepcopy(pretrained)
    adapters = load_adapter(fresh, state)
    assert torch.equal(fresh(TOKENS), model(TOKENS))
    assert set(adapters) == {"q_proj", "first", "second"} and fresh.first is fresh.second
    trainable = {name for name, p in fresh.named_parameters() if p.requires_grad}
    assert trainable == {name for name, p in model.named_parameters() if p.requires_grad}
    again = adapter_state_dict(fresh)
    assert again.keys() == state.keys() and all(torch.equal(again[key], state[key]) for key in state)

    saved = adapter_state_dict(fresh)
    trained(fresh)  # a checkpoint is a copy: training on leaves it alone, and loading it again goes back to it
    assert all(torch.equal(saved[key], state[key]) for key in state)
    assert not torch.equal(fresh(TOKENS), model(TOKENS))
    load_adapter(fresh, state)
    assert torch.equal(fresh(TOKENS), model(TOKENS))


def test_a_single_layer_is_a_model_too():
    """The adapter itself as the root: its checkpoint has no prefix, and what it wraps is no target."""
    torch.manual_seed(0)
    base = nn.Linear(4, 4)
    layer, fresh = DeLoRALinear(copy.deepcopy(base), 2), DeLoRALinear(copy.deepcopy(base), 2)
    layer.delora_A.data.normal_()
    state = through_a_file(adapter_state_dict(layer))
    assert "delora_A" in state and set(load_adapter(fresh, state)) == {""}
    assert torch.equal(fresh(torch.ones(4)), layer(torch.ones(4)))
    for model, call in ((layer, lambda: inject(layer, "all-linear")), (base, lambda: load_adapter(base, state))):
        before = snapshot(model)
        with pytest.raises(ValueError, match="matches none of|delora_A"):
            call()
        assert snapshot(model) == before


def test_a_model_that_is_named_as_in_peft_keeps_its_names():
    torch.manual_seed(0)
    model = nn.ModuleDict({"base_model": nn.ModuleDict({"model": Attention()})})
    fresh = copy.deepcopy(model)
    inject(model, ["q_proj"], r=2)["base_model.model.q_proj"].delora_A.data.normal_()
    assert set(load_adapter(fresh, adapter_state_dict(model))) == {"base_model.model.q_proj"}
    inner, same = model["base_model"]["model"], fresh["base_model"]["model"]
    assert torch.equal(inner(TOKENS), same(TOKENS))


def test_a_peft_checkpoint_loads_as_it_is():
    """PEFT's formula, (λ/r) B Ξ A diag(w) without a frozen copy, under PEFT's keys."""
    torch.manual_seed(0)
    model, state = Attention(), {}
    A, B, w = torch.randn(2, 8), torch.randn(8, 2), torch.rand(8)
    for leaf, value in (("A", A), ("B", B), ("lambda", torch.tensor([7.0])), ("w_norm", w)):
        state[f"base_model.model.q_proj.delora_{leaf}"] = value
    adapter = load_adapter(model, state)["q_proj"]
    wanted = 7 / 2 * (B / B.norm(dim=0)) @ (A / A.norm(dim=1, keepdim=True)) * w
    assert relative(adapter.delta_weight(), wanted) <= tol(torch.float32, 8)
    state |= {"base_model.model.q_proj.base_layer.bias": torch.ones(8)}  # PEFT's bias="all"
    model = Attention()
    load_adapter(model, state)
    assert torch.equal(model.q_proj.bias, torch.ones(8)) and model.q_proj.bias.requires_grad
    state["base_model.model.q_proj.delora_B"] = B * torch.tensor([1.0, 1e-6])
    with pytest.raises(ValueError, match=r"q_proj\.delora_B"):
        load_adapter(Attention(), state)


def test_a_checkpoint_that_does_not_fit_is_refused_by_key_and_changes_nothing():
    source = Attention()
    inject(source, ["q_proj", "first"], r=3, tie_lambda=False)
    state = adapter_state_dict(source)
    adapted = Attention()
    inject(adapted, ["q_proj", "first"], r=2, tie_lambda=False)
    more = Attention()
    inject(more, ["q_proj", "proj"], r=3, tie_lambda=False)
    fresh = Attention()
    fresh.codes = nn.Parameter(torch.zeros(8, dtype=torch.int8), requires_grad=False)
    A = "q_proj.delora_A"
    cases = [(fresh, {k: v for k, v in state.items() if k != key}, key) for key in state if "lambda0" not in key]
    cases = [(model, wrong, key) for model, wrong, key in cases if not key.startswith(("first", "second"))]
    cases += [
        (fresh, state | {A: torch.randn(3, 7)}, A),
        (fresh, state | {A: torch.randn(8)}, A),
        (fresh, state | {A: torch.tensor(1.0)}, A),
        (fresh, state | {A: torch.ones(3, 8, dtype=torch.int64)}, A),
        (fresh, state | {A: "text"}, A),
        (fresh, state | {A: state[A] * math.nan}, "not finite .*q_proj.delora_A"),
        (fresh, state | {"q_proj.delora_C": torch.randn(1)}, "q_proj.delora_C"),
        (fresh, state | {"layers.9.delora_A": torch.randn(3, 8)}, "layers.9.delora_A"),
        (fresh, state | {"norm.delora_A": torch.randn(3, 8)}, "norm.delora_A"),
        (fresh, state | {"norm.weight": torch.randn(9)}, "norm.weight"),
        (fresh, state | {"codes": torch.randn(8)}, "codes: .*nothing of that name"),
        (fresh, state | {"second.delora_lambda": torch.tensor([1.0])}, r"(first|second)\.delora_lambda: tied"),
        (fresh, {"q_proj.lora_A.weight": torch.randn(3, 8)}, "q_proj.lora_A.weight"),
        (fresh, {"norm.weight": torch.randn(8)}, "lacks DeLoRA tensors"),
        (fresh, {}, "lacks DeLoRA tensors"),
        (fresh, "adapter.pt", "adapter.pt"),
        (adapted, state, r"q_proj.delora_A: \(3, 8\) in the checkpoint, \(2, 8\) in the model"),
        (more, state, r"proj.delora_A"),
    ]
    for model, wrong, message in cases:
        before = snapshot(model)
        with pytest.raises((ValueError, TypeError), match=message):
            load_adapter(model, wrong)
        assert snapshot(model) == before, message


# ------------------------------------------------------------------------------------------------ P11 nothing half done


def poisoned(value: float) -> Attention:
    model = Attention()
    model.proj.weight.data[0, 0] = value
    return model


def lazy() -> Attention:
    model = Attention()
    model.proj = nn.LazyLinear(8)
    return model


class Tanh(nn.Module):
    in_features = out_features = 8

    def forward(self, x):
        return x.tanh()


class Broken(Tanh):
    def forward(self, x):
        return x.no_such_method()


def crooked(layer: type[nn.Module] = Tanh) -> Attention:
    model = Attention()
    model.proj = layer()
    return model


def test_a_layer_that_cannot_be_measured_is_named_and_changes_nothing():
    model = crooked(Broken)
    before = snapshot(model)
    with pytest.raises(AttributeError, match="proj: .*no_such_method"):
        inject(model, "all-linear")
    assert snapshot(model) == before


@pytest.mark.parametrize(
    ("model", "arguments", "message"),
    [
        (Attention, {"target_modules": ["q_proj", "oj"]}, "'oj' matches none of q_proj, proj, first, second, head"),
        (Attention, {"target_modules": "q_pro"}, "'q_pro' .*regular expression.* matches none of q_proj, proj"),
        (Attention, {"target_modules": []}, r"target_modules=\[\]"),
        (Attention, {"target_modules": None}, "None"),
        (Attention, {"target_modules": ["q_proj", 3]}, r"\['q_proj', 3\]"),
        (Attention, {"target_modules": "*q"}, r"\*q"),
        (Attention, {"exclude": ["nowhere"]}, "nowhere"),
        (Attention, {"target_modules": ["q_proj"], "exclude": ["q_proj"]}, "leave no layer"),
        (Attention, {"target_modules": ["q_proj", "norm"]}, "norm: LayerNorm does not act like nn.Linear"),
        (Attention, {"target_modules": ["q_proj", "embed"]}, "embed: Embedding"),
        (Attention, {"target_modules": ["q_proj", ""]}, "the model contains another target"),
        (Attention, {"target_modules": [""]}, "the model itself: Attention"),
        (lambda: nn.Linear(4, 4), {}, "the model itself"),
        (lambda: poisoned(math.nan), {}, "proj: .*not finite"),
        (lambda: poisoned(math.inf), {"weight_norm": None}, "proj: .*not finite"),
        (lazy, {}, "proj: .*not initialised"),
        (crooked, {}, "proj: .*Tanh is not linear"),
        (Attention, {"r": 0}, "q_proj: r must be a positive int, got 0"),
        (Attention, {"r": -1}, "q_proj: .*-1"),
        (Attention, {"r": True}, "q_proj: .*True"),
        (Attention, {"r": 2.0}, "q_proj: .*2.0"),
        (Attention, {"lambda_init": 0}, "q_proj: lambda_init .*got 0"),
        (Attention, {"lambda_init": -1.0}, "q_proj: lambda_init .*-1"),
        (Attention, {"lambda_init": math.nan}, "q_proj: lambda_init .*nan"),
        (Attention, {"lambda_init": math.inf}, "q_proj: lambda_init .*inf"),
        (Attention, {"lambda_init": True}, "q_proj: lambda_init .*True"),
        (Attention, {"lambda_init": "15"}, "q_proj: lambda_init .*'15'"),
        (Attention, {"dropout": 1.0}, "q_proj: dropout .*1.0"),
        (Attention, {"dropout": -0.1}, "q_proj: dropout .*-0.1"),
        (Attention, {"dropout": math.nan}, "q_proj: dropout .*nan"),
        (Attention, {"dropout": None}, "q_proj: dropout .*None"),
        (Attention, {"weight_norm": "row"}, "q_proj: weight_norm .*'row'"),
        (Attention, {"weight_norm": [1]}, r"q_proj: weight_norm .*\[1\]"),
        (Attention, {"rank": 8}, "rank"),
    ],
)
def test_bad_input_is_named_and_changes_nothing(model, arguments, message):
    model = model()
    before = snapshot(model)
    with pytest.raises((ValueError, TypeError), match=message):
        inject(model, **({"target_modules": "all-linear"} | arguments))
    assert snapshot(model) == before


def test_an_adapted_layer_is_not_adapted_again():
    model = Attention()
    inject(model, ["q_proj"])
    before = snapshot(model)
    for targets in (["q_proj"], ["proj", "q_proj"], "q_proj"):
        with pytest.raises((ValueError, TypeError), match="q_proj"):
            inject(model, targets)
        assert snapshot(model) == before
    with pytest.raises(TypeError, match="DeLoRALinear .* is adapted already"):
        DeLoRALinear(model.q_proj)
    adapters = inject(model, "all-linear")  # the rest, and nothing inside the adapter that is there
    assert set(adapters) == {"proj", "first", "second", "head"} and type(model.q_proj.base_layer) is nn.Linear
    with pytest.raises(ValueError, match="matches none of"):
        inject(model, "all-linear")


# ------------------------------------------------------------------------------------------------ inject


@pytest.mark.parametrize(
    ("targets", "exclude", "names"),
    [
        (["proj"], (), {"proj"}),
        (["blocks.1.proj", "q_proj"], (), {"blocks.0.q_proj", "blocks.1.q_proj", "blocks.1.proj", "q_proj"}),
        (("first",), (), {"first", "second", "blocks.0.first", "blocks.0.second", "blocks.1.first", "blocks.1.second"}),
        (r"blocks\.1\..*proj", (), {"blocks.1.q_proj", "blocks.1.proj"}),
        (r"blocks\.1\..*", ["first", "head"], {"blocks.1.q_proj", "blocks.1.proj"}),
        ("all-linear", r"blocks.*", {"q_proj", "proj", "first", "second", "head"}),
        ("all-linear", ["blocks"], {"q_proj", "proj", "first", "second", "head"}),
    ],
)
def test_names_match_whole_or_at_a_dot_and_expressions_match_whole(targets, exclude, names):
    class Deep(Attention):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList([Attention(), Attention()])

    model = Deep()
    if targets == ["proj"]:
        model.blocks = None
    adapters = inject(model, targets, exclude=exclude)
    assert set(adapters) == names
    assert all(model.get_submodule(name) is adapter for name, adapter in adapters.items())
    for name, p in model.named_parameters():
        assert p.requires_grad == name.endswith(("delora_A", "delora_B", "delora_lambda")), name


def test_an_uninitialised_layer_that_is_no_target_stays_uninitialised():
    model = lazy()
    inject(model, ["q_proj"])
    assert not model.proj.weight.requires_grad and nn.parameter.is_lazy(model.proj.weight)
    merge(model)


class Sealed(nn.Module):
    """Acts like nn.Linear, contains one, and shows no weight."""

    def __init__(self, inner: nn.Linear):
        super().__init__()
        self.inner, self.in_features, self.out_features = inner, inner.in_features, inner.out_features

    def forward(self, x):
        return self.inner(x)


def test_of_layers_inside_one_another_one_is_adapted():
    """By name the outer one if it is meant; a regular expression and "all-linear" take the inner ones."""
    for targets, names in ((["proj"], {"proj"}), ("proj.*", {"proj.inner"}), ("all-linear", {"proj.inner", "head"})):
        model = nn.ModuleDict({"proj": Sealed(nn.Linear(8, 8)), "head": nn.Linear(8, 2)})
        before = model["proj"](torch.ones(8))
        adapters = inject(model, targets)
        assert set(adapters) == names and torch.equal(model["proj"](torch.ones(8)), before)
        assert not any(p.requires_grad for name, p in model.named_parameters() if "delora_" not in name)
    with pytest.raises(ValueError, match="matches none of"):
        inject(model, "all-linear")
    model = nn.ModuleDict({"proj": Sealed(nn.Linear(8, 8))})
    with pytest.raises(ValueError, match="proj contains another target"):
        inject(model, ["proj", "proj.inner"])


def test_a_new_adapter_takes_the_mode_of_its_base_and_leaves_that_alone():
    base = Sealed(nn.Linear(4, 4))
    base.inner.eval()
    layer = DeLoRALinear(base, dropout=0.5)
    assert layer.training and layer.dropout.training and base.training and not base.inner.training
    layer = DeLoRALinear(nn.Linear(4, 4).eval(), dropout=0.5)
    assert not layer.training and not layer.dropout.training


def test_a_name_alone_makes_no_transposed_layer():
    base = type("Conv1D", (Sealed,), {})(nn.Linear(3, 5))
    assert relative(DeLoRALinear(base).weight, base.inner.weight) <= tol(torch.float32, 1)


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
def test_a_large_bias_does_not_round_a_measured_weight_away(dtype):
    torch.manual_seed(0)
    linear = nn.Linear(300, 5).to(dtype)
    linear.bias.data.fill_(10.0)
    adapter = DeLoRALinear(Sealed(linear))
    largest, eps = linear.weight.abs().max().item(), torch.finfo(dtype).eps
    assert relative(adapter.weight, linear.weight) <= 2 * eps * (largest + 10 / 1024) / largest
    assert torch.equal(adapter.bias, linear.bias)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_layer_that_is_not_linear_is_refused_in_every_dtype(dtype):
    """Sizes and a weight do not make a layer linear: here the output passes through tanh, ReLU or a clamp."""
    for function in (torch.tanh, torch.relu, torch.sqrt, lambda y: y.clamp(-1, 1)):
        base = Sealed(nn.Linear(768, 16).to(dtype))
        base.register_forward_hook(lambda module, x, y, function=function: function(y))
        with pytest.raises(TypeError, match="Sealed is not linear"):
            DeLoRALinear(base)
        assert all(p.requires_grad for p in base.parameters())


def test_names_that_look_like_ours_are_the_users_own():
    """A model may have a module called base_layer: nothing is mistaken for an adapter's."""
    torch.manual_seed(0)
    pretrained = nn.ModuleDict({"base_layer": nn.ModuleDict({"fc": nn.Linear(4, 4)}), "fc": nn.Linear(4, 4)})
    model = copy.deepcopy(pretrained)
    inject(model, ["base_layer.fc"])
    assert not model["fc"].weight.requires_grad
    inject(model, "fc")
    for adapter in (model["fc"], model["base_layer"]["fc"]):
        adapter.delora_A.data.normal_()
    fresh = copy.deepcopy(pretrained)
    load_adapter(fresh, through_a_file(adapter_state_dict(model)))
    x = torch.ones(4)
    assert torch.equal(fresh["fc"](x), model["fc"](x))
    assert torch.equal(fresh["base_layer"]["fc"](x), model["base_layer"]["fc"](x))


def test_merging_while_disabled_loses_nothing():
    model = Attention()
    inject(model, ["q_proj"])
    adapted = trained(model)(TOKENS)
    with disabled(model):
        merge(model)
    assert relative(model(TOKENS), adapted) <= tol(torch.float32, 8)


def test_a_second_injection_adds_and_leaves_the_first_as_it_was():
    model = Attention()
    first = inject(model, ["q_proj"], r=2, lambda_init=4.0)["q_proj"]
    first.delora_lambda.requires_grad_(False)
    model.eval()
    second = inject(model, ["proj"], r=5)["proj"]
    assert model.q_proj is first and first.delora_A.requires_grad and not first.delora_lambda.requires_grad
    assert second.delora_A.shape == (5, 8) and not second.training and second.delora_B.requires_grad
    assert second.delora_A.dtype == torch.float32
    assert DeLoRALinear(nn.Linear(2, 2).double()).delora_A.dtype == torch.float64
    assert DeLoRALinear(nn.Linear(2, 2).half()).delora_B.dtype == torch.float32


class Conv1D(nn.Module):
    """As in Hugging Face's GPT-2: a linear layer whose weight is stored transposed."""

    def __init__(self, n_in, n_out):
        super().__init__()
        self.nf = n_out
        self.weight, self.bias = nn.Parameter(torch.randn(n_in, n_out)), nn.Parameter(torch.randn(n_out))

    def forward(self, x):
        return torch.addmm(self.bias, x.flatten(0, -2), self.weight).view(*x.shape[:-1], self.nf)


class Int8Linear(nn.Module):
    """A layer whose weight cannot be read: eight bits and a scale for each output."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        scale = linear.weight.detach().abs().amax(1, keepdim=True) / 127  # (out, 1)
        self.register_buffer("packed", (linear.weight.detach() / scale).round().to(torch.int8))
        self.register_buffer("scale", scale)
        self.offset = None if linear.bias is None else linear.bias.detach().clone()

    @property
    def weight(self):
        raise RuntimeError("packed")

    def forward(self, x):
        return F.linear(x, self.packed.to(x.dtype) * self.scale.to(x.dtype), self.offset)


@pytest.mark.parametrize("kind", ("conv1d", "int8", "int8 without bias", "int8, wider than a block"))
def test_layers_that_act_like_linear_are_adapted_and_merged(kind):
    torch.manual_seed(0)
    wide = 700 if "wider" in kind else 12
    if kind == "conv1d":
        base = Conv1D(12, 5)
        weight, bias = base.weight.T, base.bias
    else:
        linear = nn.Linear(wide, 5, bias="without" not in kind)
        base = Int8Linear(linear)
        weight, bias = base.packed * base.scale, base.offset
    model, x = nn.Sequential(base, nn.ReLU()), torch.randn(2, 3, wide)
    before = model(x)
    adapter = inject(model, "all-linear", r=2)["0"]
    assert torch.equal(model(x), before)
    rounding = tol(torch.float32, 1) * (1 + (0 if bias is None else bias.abs().max().item()))
    assert relative(adapter.weight, weight) <= rounding
    assert (adapter.bias is None) == (bias is None)
    assert relative(adapter.delora_w_norm, weight.norm(dim=0)) <= rounding * wide**0.5
    with torch.no_grad():
        adapter.delora_A.normal_()
    adapted = model(x)
    taken = merge(model)
    assert type(model[0]) is nn.Linear and model[0].weight.is_contiguous()
    assert relative(model(x), adapted, scale=10) <= tol(torch.float32, wide)
    unmerge(model, taken)
    assert torch.equal(model(x), adapted) and relative(adapted, before) > 0.01


def test_the_forward_pass_never_builds_the_update():
    """Forward and backward make no more tensors of W's size than the base layer alone; of x's size, none is kept."""
    n, tokens = 256, 64
    layer, x = DeLoRALinear(nn.Linear(n, n, bias=False), 4), torch.randn(tokens, n, requires_grad=True)

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            sizes.extend(t.numel() for t in (out if isinstance(out, (tuple, list)) else [out]) if torch.is_tensor(t))
            return out

    of_the_size_of_w = []
    for layer.enabled in (False, True):
        sizes = []
        with Sizes():
            layer(x).sum().backward()
        of_the_size_of_w.append(sizes.count(n * n))
    assert of_the_size_of_w[1] == of_the_size_of_w[0] > 0

    kept = {}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.update({t.data_ptr(): t}) or t, lambda t: t):
        y = layer(x)
    known = {t.data_ptr() for t in (x, *layer.parameters())}
    kept_for_the_adapter = sum(t.untyped_storage().nbytes() for pointer, t in kept.items() if pointer not in known)
    assert y.requires_grad and 0 < kept_for_the_adapter < x.nbytes


# ------------------------------------------------------------------------------------------------ param_groups


def test_lambda_has_its_own_learning_rate_and_no_weight_decay():
    model = Attention()
    adapters = inject(model, ["q_proj", "first"])
    model.norm.requires_grad_(True)
    rest, strengths = param_groups(model, 1e-2, lambda_lr=0.0, weight_decay=0.1)
    assert (rest["lr"], rest["weight_decay"], strengths["lr"], strengths["weight_decay"]) == (1e-2, 0.1, 0.0, 0.0)
    assert {id(p) for p in strengths["params"]} == {id(a.delora_lambda) for a in adapters.values()}
    everything = [id(p) for p in rest["params"] + strengths["params"]]
    assert sorted(everything) == sorted(id(p) for p in model.parameters() if p.requires_grad)
    assert param_groups(model, 1e-2)[1]["lr"] == 1e-2


def test_what_needs_adapters_says_so_when_there_are_none():
    for call in (merge, adapter_state_dict, lambda m: param_groups(m, 1e-3), lambda m: disabled(m).__enter__()):
        with pytest.raises(ValueError, match="Attention has no DeLoRALinear"):
            call(Attention())


def test_the_public_names_are_those_of_the_module():
    assert delora.__all__ == ["DeLoRALinear", "inject", "merge", "unmerge", "disabled", "param_groups",
                              "adapter_state_dict", "load_adapter"]  # fmt: skip
    assert all(getattr(delora, name).__doc__ for name in delora.__all__)
