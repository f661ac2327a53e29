"""Which layers can be adapted: read, measured or refused by name. The hosts here are small fakes.

    pytest examples/tests/test_layers.py    needs torch alone

delora.py reads the weight of nn.Linear. That of any other linear layer it measures, from outputs,
and does not ask how the layer stores it. Fakes do what a real host does, and no more than that; the
hosts themselves are in test_hosts.py.
"""

import copy
import warnings

import pytest
import torch
import torch.nn.utils.prune
from torch import nn
from torch.nn import functional as F

from delora import DeLoRALinear, adapter_state_dict, inject, load_adapter, merge, unmerge
from test_delora import (
    TOKENS,
    Attention,
    distance,
    same_bits,
    snapshot,
    through_a_file,
    tol,
    trained,
)

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


# ------------------------------------------------------------------------------------------------
# Fakes of what hosts do
# ------------------------------------------------------------------------------------------------


class Sealed(nn.Module):
    """Acts like nn.Linear, contains one, and shows no weight."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner
        self.in_features = inner.in_features
        self.out_features = inner.out_features

    def forward(self, x):
        return self.inner(x)


class Conv1D(nn.Module):
    """As in Hugging Face's GPT-2: a linear layer whose weight is stored transposed."""

    def __init__(self, n_in, n_out):
        super().__init__()
        self.nf = n_out
        self.weight = nn.Parameter(torch.randn(n_in, n_out))
        self.bias = nn.Parameter(torch.randn(n_out))

    def forward(self, x):
        y = torch.addmm(self.bias, x.flatten(0, -2), self.weight)  # (tokens, out)
        return y.view(*x.shape[:-1], self.nf)

    def exact(self):
        """W (out, in) and b (out,)."""
        return self.weight.T, self.bias


class Int8Linear(nn.Module):
    """A layer whose weight cannot be read: eight bits and a scale for each output."""

    def __init__(self, linear):
        super().__init__()
        self.in_features = linear.in_features
        self.out_features = linear.out_features
        weight = linear.weight.detach()  # (out, in)
        scale = weight.abs().amax(1, keepdim=True) / 127  # (out, 1)
        self.register_buffer("packed", (weight / scale).round().to(torch.int8))
        self.register_buffer("scale", scale)
        self.offset = None if linear.bias is None else linear.bias.detach().clone()

    @property
    def weight(self):
        raise RuntimeError("packed")

    def forward(self, x):
        return F.linear(x, self.packed.to(x.dtype) * self.scale.to(x.dtype), self.offset)

    def exact(self):
        """W (out, in) and b (out,)."""
        return self.packed * self.scale, self.offset


class Codes(nn.Module):
    """A quantised layer that has no floating-point tensor, and takes x as it comes."""

    def __init__(self, n_in, n_out):
        super().__init__()
        self.in_features = n_in
        self.out_features = n_out
        self.seen = set()  # the dtypes it was called in
        codes = torch.randint(-64, 65, (n_out, n_in), dtype=torch.int8)
        self.codes = nn.Parameter(codes, requires_grad=False)

    def forward(self, x):
        self.seen.add(x.dtype)
        return F.linear(x, self.codes.to(x.dtype) / 512)


class Repacked(nn.Module):
    """As a 4-bit layer of bitsandbytes on some CPUs: an input without requires_grad ends training.

    The first such input makes it pack its weight anew, for inference only.
    """

    def __init__(self, linear):
        super().__init__()
        self.in_features = linear.in_features
        self.out_features = linear.out_features
        self.packed = False
        self.register_buffer("codes", linear.weight.detach())

    def forward(self, x):
        if not x.requires_grad:
            self.packed = True
        if self.packed:
            x = x.detach()
        return F.linear(x, self.codes)


class Packed(torch.Tensor):
    """A weight as quantised tensors of torchao are: it can be multiplied with, but not read."""

    @staticmethod
    def __new__(cls, codes):
        return torch.Tensor._make_wrapper_subclass(cls, codes.shape, dtype=torch.float32)

    def __init__(self, codes):
        self.codes = codes

    def __tensor_flatten__(self):
        return ["codes"], None

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if function is F.linear:
            return F.linear(args[0], args[1].codes.float() / 64, *args[2:])
        return super().__torch_function__(function, types, args, kwargs or {})

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        if function is torch.ops.aten.detach.default:
            return cls(args[0].codes)
        raise NotImplementedError(f"{function} on a packed weight")


class TermByTerm(nn.Module):
    """A linear layer that sums in the order that rounds worst.

    Every third that is added makes an error of the same sign.
    """

    def __init__(self, n_in):
        super().__init__()
        self.in_features = n_in
        self.out_features = 2
        self.register_buffer("thirds", torch.full((n_in, 2), 1 / 3))

    def forward(self, x):
        return sum(x[:, j, None] * self.thirds[j] for j in range(self.in_features))


class Router(nn.Linear):
    """A linear layer that returns a tuple."""

    def forward(self, x):
        return super().forward(x), x


class Picky(nn.Linear):
    """A layer that fails in its own way."""

    def forward(self, x):
        return [][len(x)]


class Broken(nn.Module):
    """What has the sizes of a linear layer, and fails when it is called."""

    in_features = 8
    out_features = 8

    def forward(self, x):
        return x.no_such_method()


def lazy():
    """A model one of whose layers does not have its weight yet."""
    model = Attention()
    model.proj = nn.LazyLinear(8)
    return model


def offloaded(model, name):
    """As accelerate leaves a layer whose weight is on a disk.

    It is on the meta device, with a forward that fetches the weight.
    """
    layer = model.get_submodule(name)
    weight = layer.weight.detach().clone()
    bias = None if layer.bias is None else layer.bias.detach().clone()
    layer.to("meta")
    layer.forward = lambda x: F.linear(x, weight, bias)
    return model


# ------------------------------------------------------------------------------------------------
# Which layer is meant, and what it is called by
# ------------------------------------------------------------------------------------------------


def test_a_layer_that_cannot_be_measured_is_named_and_changes_nothing():
    model = Attention()
    model.proj = Broken()
    before = snapshot(model)
    with pytest.raises(AttributeError, match="proj: .*no_such_method"):
        inject(model, "all-linear")
    assert snapshot(model) == before


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Router(8, 8), "^proj: Router is not linear: it returns a tuple"),
        (
            lambda: nn.Linear(8, 8, dtype=torch.complex64),
            r"^proj: torch.complex64, \(8, 8\) is no matrix",
        ),
        (lambda: Picky(8, 8), "^proj: list index out of range"),
        (lambda: nn.Linear(0, 8), r"^proj: torch.float32, \(8, 0\) is no matrix"),
    ],
    ids=("a tuple", "complex numbers", "an error of its own", "no inputs"),
)
@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_what_cannot_be_adapted_is_refused_by_name(make, message):
    model = Attention()
    model.proj = make()
    before = snapshot(model)
    with pytest.raises((TypeError, ValueError, IndexError), match=message):
        inject(model, "all-linear")
    assert snapshot(model) == before
    inject(model, "all-linear", exclude=["proj"])


def test_an_uninitialised_layer_that_is_no_target_stays_uninitialised():
    model = lazy()
    inject(model, ["q_proj"])
    assert not model.proj.weight.requires_grad
    assert nn.parameter.is_lazy(model.proj.weight)
    merge(model)


@pytest.mark.parametrize(
    ("targets", "names"),
    [
        (["proj"], {"proj"}),
        ("proj.*", {"proj.inner"}),
        ("all-linear", {"proj.inner", "head"}),
    ],
)
def test_of_layers_inside_one_another_one_is_adapted(targets, names):
    """By name the outer one if it is meant; an expression and "all-linear" take the inner ones."""
    model = nn.ModuleDict({"proj": Sealed(nn.Linear(8, 8)), "head": nn.Linear(8, 2)})
    before = model["proj"](torch.ones(8))
    adapters = inject(model, targets)
    assert set(adapters) == names
    assert same_bits(model["proj"](torch.ones(8)), before)
    for name, p in model.named_parameters():
        assert not p.requires_grad or ".delora." in name, name
    if targets == "all-linear":
        with pytest.raises(ValueError, match="leave no layer"):
            inject(model, "all-linear")


def test_a_layer_and_what_is_in_it_are_not_both_adapted():
    model = nn.ModuleDict({"proj": Sealed(nn.Linear(8, 8))})
    with pytest.raises(ValueError, match="proj contains another target"):
        inject(model, ["proj", "proj.inner"])


def test_a_name_or_an_attribute_alone_makes_no_transposed_layer():
    class Conv1D(Sealed):
        """The name of Hugging Face's layer, without its attribute nf."""

    base = Conv1D(nn.Linear(3, 5))
    wanted = base.inner.weight
    assert distance(DeLoRALinear(base).weight, wanted) <= tol(torch.float32, 1, wanted)

    base = nn.Linear(3, 5)
    base.nf = 5  # the attribute, without the name
    model = nn.Sequential(base)
    adapters = inject(model, ["0"])
    assert same_bits(adapters["0"].weight, base.weight)
    unmerge(model, merge(model))  # which compares the sizes


@pytest.mark.parametrize("size", ("in_features", "out_features"))
def test_one_of_the_two_sizes_makes_no_linear_layer(size):
    model = nn.ModuleDict({"proj": nn.Linear(3, 5), "other": nn.Identity()})
    setattr(model["other"], size, 3)
    assert set(inject(model, "all-linear")) == {"proj"}


def test_an_embedding_with_an_attribute_of_conv1d_is_no_linear_layer():
    embedding = nn.Embedding(5, 3)
    embedding.nf = 3
    with pytest.raises(TypeError, match="no linear layer"):
        DeLoRALinear(embedding)


def test_sizes_and_ranks_may_be_any_integers():
    """As code that computes them with numpy passes them: np.int64 is no int."""
    np = pytest.importorskip("numpy")
    first = nn.Linear(np.prod((2, 3)), np.int64(4))
    second = nn.Linear(4, np.int32(2))
    model = nn.Sequential(first, second)
    adapters = inject(model, "all-linear", r=np.int64(2), lambda_init=np.float32(3))
    assert set(adapters) == {"0", "1"}
    assert model[0].delora.A.shape == (2, 6)
    assert model[0].delora.lam.item() == 3
    unmerge(model, merge(model))
    for r in (np.float64(2), np.bool_(True), np.int64(0)):
        with pytest.raises(ValueError, match="r must be"):
            DeLoRALinear(nn.Linear(2, 2), r)


# ------------------------------------------------------------------------------------------------
# What the adapter takes over from its base layer
# ------------------------------------------------------------------------------------------------


def test_a_new_adapter_takes_the_mode_of_its_base_and_leaves_that_alone():
    base = Sealed(nn.Linear(4, 4))
    base.inner.eval()
    layer = DeLoRALinear(base, dropout=0.5)
    assert layer.training
    assert layer.dropout.training
    assert base.training
    assert not base.inner.training

    layer = DeLoRALinear(nn.Linear(4, 4).eval(), dropout=0.5)
    assert not layer.training
    assert not layer.dropout.training


def test_the_output_keeps_the_dtype_of_the_base_layer():
    """A layer may compute in a precision of its own: here bfloat16, whatever it is given."""

    class Bfloat16Linear(nn.Linear):
        def forward(self, x):
            return F.linear(x.bfloat16(), self.weight.bfloat16(), self.bias.bfloat16())

    base = Bfloat16Linear(8, 8)
    x = torch.randn(3, 8)
    assert base(x).dtype == torch.bfloat16
    assert same_bits(DeLoRALinear(base, 2)(x), base(x))


def test_a_base_layer_that_is_wider_than_autocast_is_not_rounded():
    class Wide(nn.Linear):
        """As bitsandbytes' 4-bit layer, which returns the dtype of x."""

        def forward(self, x):
            with torch.autocast("cpu", enabled=False):
                return F.linear(x, self.weight, self.bias)

    layer = DeLoRALinear(Wide(6, 5), 2)
    x = torch.randn(3, 6)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
        assert y.dtype == torch.float32
        assert same_bits(y, layer.base_layer(x))


@pytest.mark.parametrize("n_out", (1, 63, 64, 65, 200))
@pytest.mark.parametrize("dtype", DTYPES)
def test_column_norms_are_right_whatever_the_number_of_rows(n_out, dtype):
    torch.manual_seed(n_out)
    base = nn.Linear(7, n_out, dtype=torch.float64).to(dtype)
    columns = base.weight.double().unbind(1)
    wanted = torch.stack([column.square().sum().sqrt() for column in columns])  # (in,)
    w = DeLoRALinear(base, 2).delora.w  # (in,)
    assert w.dtype == torch.promote_types(dtype, torch.float32)
    assert distance(w, wanted) <= tol(w.dtype, n_out, wanted)


# ------------------------------------------------------------------------------------------------
# What is measured is right
# ------------------------------------------------------------------------------------------------

ACT_LIKE_LINEAR = {
    "conv1d": lambda: Conv1D(12, 5),
    "a square conv1d": lambda: Conv1D(12, 12),
    "int8": lambda: Int8Linear(nn.Linear(12, 5)),
    "int8 without bias": lambda: Int8Linear(nn.Linear(12, 5, bias=False)),
    "int8, wider than a block": lambda: Int8Linear(nn.Linear(700, 5)),
}


@pytest.mark.parametrize("make", ACT_LIKE_LINEAR.values(), ids=ACT_LIKE_LINEAR)
def test_layers_that_act_like_linear_are_adapted_and_merged(make):
    torch.manual_seed(0)
    base = make()
    weight, bias = base.exact()
    n_in = weight.shape[1]
    model = nn.Sequential(base, nn.ReLU())
    x = torch.randn(2, 3, n_in)
    before = model(x)
    adapter = inject(model, "all-linear", r=2)["0"]
    assert same_bits(model(x), before)
    rounding = tol(torch.float32, 1, weight)
    if bias is not None:
        rounding += tol(torch.float32, 1, bias)
    assert distance(adapter.weight, weight) <= rounding
    assert (adapter.bias is None) == (bias is None)
    assert distance(adapter.delora.w, weight.norm(dim=0)) <= rounding * n_in**0.5

    adapter.delora.A.data.normal_()
    adapted = model(x)
    assert not torch.equal(adapted, before)
    taken = merge(model)
    assert type(model[0]) is nn.Linear
    assert model[0].weight.is_contiguous()
    assert distance(model(x), adapted) <= tol(torch.float32, n_in, adapted)
    unmerge(model, taken)
    assert same_bits(model(x), adapted)


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
@pytest.mark.parametrize("offset", (10.0, -100.0, 100.0, 0.0))
@pytest.mark.parametrize("scale", (1, 100))
def test_a_large_bias_does_not_round_a_measured_weight_away(dtype, offset, scale):
    torch.manual_seed(0)
    linear = nn.Linear(300, 5)
    linear.weight.data *= scale
    linear.bias.data.fill_(offset)
    linear.to(dtype)
    adapter = DeLoRALinear(Sealed(linear))
    size = linear.weight.abs().max().item() + abs(offset) / 512  # the identity is scaled by 512
    assert distance(adapter.weight, linear.weight) <= tol(dtype, 1, size)
    if offset == 0:
        assert adapter.bias is None
    else:
        assert same_bits(adapter.bias, linear.bias)


@pytest.mark.parametrize("offset", (0.0, 0.3))
@pytest.mark.parametrize("n_in", (3072, 8192))
@pytest.mark.parametrize("bias", (1e-3, 0.1, 10.0))
def test_a_wide_layer_in_bfloat16_is_linear_whatever_its_bias(n_in, offset, bias):
    """Beside a large 512 W a small bias is rounded away, column for column to the same side.

    What adds up like a sum must not look like a bend. Nor must a mean of W that is far from zero.
    """
    torch.manual_seed(0)
    linear = nn.Linear(n_in, 32)
    nn.init.normal_(linear.weight, offset, 0.05)
    nn.init.normal_(linear.bias, 0, bias)
    linear.bfloat16()
    adapter = DeLoRALinear(Sealed(linear), r=1)
    size = linear.weight.abs().max().item() + linear.bias.abs().max().item() / 512
    assert distance(adapter.weight, linear.weight) <= tol(torch.bfloat16, 1, size)


def test_a_weight_that_a_bias_hides_from_one_side_is_measured_exactly_from_two():
    linear = nn.Linear(16, 4)
    nn.init.normal_(linear.weight, 1, 0.1)
    linear.bias.data.fill_(0.9)  # 512 W has steps of 2 and of 4 in bfloat16
    linear.to(torch.bfloat16)
    assert distance(DeLoRALinear(Sealed(linear), r=1).weight, linear.weight) == 0


def test_a_large_weight_in_float16_is_measured():
    """Neither 512 W nor the difference of two such outputs overflows, up to |W| = 65504 / 1024."""
    linear = nn.Linear(4, 3, bias=False).half()
    linear.weight.data.fill_(60)
    assert distance(DeLoRALinear(Sealed(linear), r=1).weight, linear.weight) == 0


def test_a_layer_that_returns_its_input_is_the_identity():
    base = nn.Identity()
    base.in_features = 5
    base.out_features = 5
    assert distance(DeLoRALinear(base, r=1).weight, torch.eye(5)) == 0


@pytest.mark.parametrize("sealed", (False, True))
def test_a_layer_of_zeros_is_linear_too(sealed):
    """A head may start at zero.

    w is zero then, and the adapter without effect, except with weight_norm=None.
    """
    base = nn.Linear(4, 3)
    nn.init.zeros_(base.weight)
    nn.init.zeros_(base.bias)
    if sealed:
        base = Sealed(base)
    layer = DeLoRALinear(base)
    layer.delora.A.data.normal_()
    assert layer(torch.randn(2, 4)).count_nonzero() == 0
    assert layer.delora.norm_bound() == 0


def test_a_measured_layer_may_sum_in_any_order():
    base = TermByTerm(1024)
    found = DeLoRALinear(base).weight.T  # (in, out)
    assert distance(found, base.thirds) <= tol(torch.float32, 1, base.thirds)


def test_measuring_leaves_autocast_and_gradients_out():
    """W is measured in the layer's own precision, and is a constant.

    Its gradient reaches no parameter of the layer.
    """
    torch.manual_seed(0)
    base = Sealed(nn.Linear(20, 30))
    wanted = base.inner.weight
    with torch.autocast("cpu", torch.bfloat16):
        layer = DeLoRALinear(base)
        weight = layer.weight
    w = layer.delora.w
    assert distance(weight, wanted) <= tol(torch.float32, 1, wanted)
    assert distance(w, wanted.norm(dim=0)) <= tol(torch.float32, 30, w)

    base.requires_grad_(True)
    layer.weight.sum().backward()
    assert base.inner.weight.grad is None
    assert layer.delora.A.grad is not None


def test_measuring_leaves_a_layer_fit_for_training():
    base = Repacked(nn.Linear(300, 5))
    x = torch.randn(2, 300, requires_grad=True)
    layer = DeLoRALinear(base)
    layer(x).sum().backward()
    assert not base.packed
    assert x.grad.count_nonzero()


# ------------------------------------------------------------------------------------------------
# What is not linear is refused
# ------------------------------------------------------------------------------------------------


def normalised(x):
    return F.layer_norm(x, x.shape[-1:])


def clamped(y):
    return y.clamp(-1, 1)


def clamped_from_below(x):
    return x.clamp(min=-6)


def bent_behind(linear, function):
    """A layer whose output passes through the function."""
    base = Sealed(linear)
    base.register_forward_hook(lambda module, inputs, y: function(y))
    return base


def bent_before(linear, function):
    """A layer whose input passes through the function."""
    base = Sealed(linear)
    base.register_forward_pre_hook(lambda module, inputs: function(inputs[0]))
    return base


BENDS = [(bent_behind, f) for f in (torch.tanh, torch.relu, torch.sqrt, torch.square, clamped)]
BENDS += [(bent_before, f) for f in (torch.relu, torch.abs, F.gelu, F.normalize)]
BENDS += [(bent_before, f) for f in (normalised, clamped_from_below)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n_in", (768, 3))
def test_a_layer_that_is_not_linear_is_refused_in_every_dtype(n_in, dtype):
    """Sizes and a weight do not make a layer linear."""
    torch.manual_seed(0)
    for bent, function in BENDS:
        base = bent(nn.Linear(n_in, 16).to(dtype), function)
        with pytest.raises(TypeError, match="Sealed is not linear"):
            DeLoRALinear(base)
            pytest.fail(f"{bent.__name__}, {function}")
        assert all(p.requires_grad for p in base.parameters())


def test_a_quantised_layer_that_bends_is_refused():
    class Bent(Codes):
        def forward(self, x):
            return super().forward(x).relu()

    with pytest.raises(TypeError, match="Bent is not linear"):
        DeLoRALinear(Bent(64, 16))


def test_one_output_that_is_not_linear_is_found_beside_large_ones():
    class Half(nn.Linear):
        def forward(self, x):
            y = super().forward(x)  # (..., out)
            return torch.cat((y[..., :1].abs(), y[..., 1:]), dim=-1)

    base = Half(4, 3, bias=False)
    base.weight.data[0] = torch.tensor([1e-3, 2e-3, 3e-3, 4e-3])
    base.weight.data[1:] = 1e3
    with pytest.raises(TypeError, match="not linear"):
        DeLoRALinear(base, 2)


def test_a_layer_that_drops_at_random_is_not_linear_where_its_precision_is_known():
    class Dropping(nn.Linear):
        def forward(self, x):
            return F.linear(F.dropout(x, 0.05, self.training), self.weight, self.bias)

    torch.manual_seed(0)
    with pytest.raises(TypeError, match="Dropping is not linear"):
        DeLoRALinear(Dropping(1024, 64))
    DeLoRALinear(Dropping(1024, 64).eval())


def test_a_layer_may_round_inside_to_fewer_bits_than_it_returns():
    """bfloat16 products in a layer that is given and returns float32.

    It is linear, but for rounding that shows nowhere.
    """

    class Inside(Codes):
        def forward(self, x):
            return F.linear(x.bfloat16(), self.codes.bfloat16() / 512).float() + 1

    torch.manual_seed(0)
    base = Inside(300, 40)
    assert distance(DeLoRALinear(base).weight, base.codes / 512) <= tol(torch.bfloat16, 1, 1)


# ------------------------------------------------------------------------------------------------
# Quantised layers
# ------------------------------------------------------------------------------------------------


def test_a_weight_that_is_packed_into_a_tensor_subclass_is_measured():
    torch.manual_seed(0)
    base = nn.Linear(6, 4)
    x = torch.randn(3, 6)
    codes = torch.randint(-64, 65, (4, 6), dtype=torch.int8)
    base.weight = nn.Parameter(Packed(codes), requires_grad=False)
    layer = DeLoRALinear(base)
    assert same_bits(layer(x), base(x))

    layer.delora.A.data.normal_()
    measured = layer.weight - layer.delora.delta_weight()
    assert distance(measured, codes / 64) <= tol(torch.float32, 2, 1 + layer.delora.norm_bound())
    assert distance(layer.merged()(x), layer(x)) <= tol(torch.float32, 8, layer(x))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_quantised_layer_without_a_float_is_measured_and_merged_in_torch_s_default_dtype(dtype):
    """It does not say in which dtype it is called. A merged one can be cast."""
    torch.manual_seed(0)
    model = nn.Sequential(Codes(6, 6), nn.Linear(6, 6), Codes(6, 4)).to(dtype)
    x = torch.randn(2, 6, dtype=dtype)
    base = model[2]
    adapter = inject(model, ["0", "2"], r=2)["2"]
    assert base.seen == {torch.float32}
    assert adapter.delora.A.dtype == torch.float32

    adapter.delora.A.data.normal_()
    adapted = model(x)
    assert adapted.dtype == dtype
    assert adapter.weight.dtype == torch.float32
    assert adapter.bias is None

    taken = merge(model)
    narrow = torch.float32 if dtype == torch.float64 else dtype  # it was measured in float32
    rounding = tol(narrow, 3 * 6, adapted.abs().max().item() + 6)
    assert distance(model.to(dtype)(x), adapted) <= rounding
    unmerge(model, taken)
    assert same_bits(model(x), adapted)


def test_the_dtype_of_scales_is_that_of_a_quantised_layer_alone():
    base = Codes(6, 4)
    base.scales = nn.Parameter(torch.ones(4, dtype=torch.bfloat16))
    assert DeLoRALinear(base).weight.dtype == torch.bfloat16
    assert base.seen == {torch.bfloat16}


@pytest.mark.parametrize("trained_on", ("floats", "codes"))
def test_an_adapter_loads_on_a_quantised_layer_and_one_of_a_quantised_layer_on_floats(trained_on):
    """As with QLoRA: what is trained on codes can be merged into the floats that they came from.

    And the reverse.
    """
    torch.manual_seed(0)
    floats = Attention()
    codes = copy.deepcopy(floats)
    codes.proj = Int8Linear(codes.proj)
    model, fresh = (floats, codes) if trained_on == "floats" else (codes, floats)
    base = fresh.proj
    inject(model, ["proj", "q_proj"], r=2)
    state = through_a_file(adapter_state_dict(trained(model)))
    load_adapter(fresh, state)
    assert same_bits(fresh.proj.delora.delta_weight(), model.proj.delora.delta_weight())
    assert fresh.proj.base_layer is base


@pytest.mark.parametrize(("scale", "warned"), [(1.1, False), (1.3, True)])
def test_codes_may_be_further_off_the_weight_that_was_adapted_than_floats(scale, warned):
    model = Attention()
    codes = Attention()
    codes.load_state_dict(model.state_dict())
    codes.proj.weight.data *= scale
    codes.proj = Int8Linear(codes.proj)
    inject(model, ["proj"], r=2)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        load_adapter(codes, adapter_state_dict(model))
    assert len(seen) == warned


# ------------------------------------------------------------------------------------------------
# Weights that are computed: hooks, parametrizations, a forward of one layer's own
# ------------------------------------------------------------------------------------------------


def pruned(layer):
    return nn.utils.prune.random_unstructured(layer, "weight", 0.4)


def with_a_pruned_bias(layer):
    return nn.utils.prune.random_unstructured(layer, "bias", 0.4)


COMPUTED = {
    "weight_norm": nn.utils.weight_norm,
    "spectral_norm": nn.utils.spectral_norm,
    "prune": pruned,
    "pruned bias": with_a_pruned_bias,
    "parametrized": nn.utils.parametrizations.weight_norm,
}


@pytest.mark.filterwarnings("ignore::FutureWarning:torch")
@pytest.mark.parametrize("make", COMPUTED.values(), ids=COMPUTED)
def test_a_weight_that_a_hook_computes_is_measured_right_at_once(make):
    """After load_state_dict and before any forward, `layer.weight` is of the weights before."""
    torch.manual_seed(0)
    layer = make(nn.Linear(6, 4)).eval()
    other = make(nn.Linear(6, 4)).eval()
    with torch.no_grad():
        for p in other.parameters():
            p.mul_(3.0)
    layer.load_state_dict(other.state_dict())
    adapter = DeLoRALinear(layer, 2)
    bias = other(torch.zeros(6)).detach()  # (out,)
    weight = (other(torch.eye(6)) - bias).T.detach()  # (out, in)
    rounding = tol(torch.float32, 6, weight.abs().max().item() + bias.abs().max().item())
    assert distance(adapter.weight, weight) <= rounding
    assert distance(adapter.bias, bias) <= rounding
    assert distance(adapter.delora.w, weight.norm(dim=0)) <= 3 * rounding

    adapter.delora.A.data.normal_()
    x = torch.randn(5, 6)
    y = adapter(x)
    assert distance(adapter.merged()(x), y) <= tol(torch.float32, 16, y) + 4 * rounding


def test_a_parametrized_weight_is_read_and_not_measured():
    """Measured beside so large a bias, the weight would lose half of its digits."""
    torch.manual_seed(0)
    base = nn.utils.parametrizations.weight_norm(nn.Linear(4, 3))
    base.bias.data.fill_(1e7)
    assert same_bits(DeLoRALinear(base, 2).weight, base.weight)


def test_a_forward_that_was_put_on_one_layer_decides_what_its_weight_is():
    """As offloading and other tools do, without a class of their own."""
    torch.manual_seed(0)
    base = nn.Linear(4, 3)
    base.forward = lambda x: F.linear(x, 2 * base.weight, base.bias)
    wanted = 2 * base.weight
    rounding = tol(torch.float32, 1, wanted) + tol(torch.float32, 1, base.bias)
    assert distance(DeLoRALinear(base, 2).weight, wanted) <= rounding


# ------------------------------------------------------------------------------------------------
# Values that are not here: on the meta device, or offloaded
# ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("replaced", (True, False), ids=("a forward of its own", "bare"))
def test_a_layer_whose_weight_is_not_here_is_refused_by_name(replaced):
    """Seen: an adapter built on the meta device, with outputs out of uninitialised memory.

    They were other ones each time.
    """
    torch.manual_seed(0)
    source = Attention()
    inject(source, ["proj", "q_proj"], r=2)
    state = adapter_state_dict(source)
    model = Attention()
    if replaced:
        offloaded(model, "proj")
        assert model(TOKENS).isfinite().all()  # it can be called all the same
    else:
        model.proj.to("meta")
    before = snapshot(model)
    for call in (
        lambda: inject(model, "all-linear"),
        lambda: inject(model, ["q_proj", "proj"], r=2),
        lambda: load_adapter(model, state),
    ):
        with pytest.raises(ValueError, match="^proj.* on the meta device, without values"):
            call()
        assert snapshot(model) == before
    others = inject(model, "all-linear", exclude=["proj"])
    assert set(others) == {"q_proj", "first", "second", "head"}


def test_an_adapter_whose_values_are_gone_is_not_saved_merged_or_loaded_into():
    """Seen: a checkpoint full of meta tensors, which torch.save takes: the training is lost."""
    model = Attention()
    inject(model, ["proj", "q_proj"], r=2)
    state = adapter_state_dict(model)
    gone = copy.deepcopy(model)
    gone.proj.delora.to("meta")
    without_w = copy.deepcopy(model)
    without_w.proj.base_layer.to("meta")
    for broken, call, message in (
        (gone, adapter_state_dict, r"^proj\.delora\.A is on the meta device"),
        (gone, merge, "^proj is on the meta device"),
        (gone, lambda m: load_adapter(m, state), r"^proj\.delora\.A is on the meta device"),
        (without_w, merge, "^proj is on the meta device"),
    ):
        before = snapshot(broken)
        with pytest.raises(ValueError, match=message):
            call(broken)
        assert snapshot(broken) == before


def test_a_checkpoint_does_not_load_into_a_model_that_is_wholly_on_the_meta_device():
    """Its values would be lost without a word."""
    source = Attention()
    inject(source, ["proj", "q_proj"], r=2)
    state = adapter_state_dict(source)
    model = Attention().to("meta")
    with pytest.raises(ValueError, match="meta device"):
        load_adapter(model, state)
