"""What the contract in test_delora.py is tested with: right layers, and wrong ones.

    DELORA_SUBJECT=examples/tests/subjects.py:Dense pytest test_delora.py
    pytest -m slow examples/tests/test_subjects.py          all of them, one after the other

RIGHT: DeLoRA as a student or another team may write it, each in another way. The contract must pass
them all. Most are two classes: an nn.Module, and its description to the contract by four functions.

WRONG: one right layer, `Plain`, with one mistake in each, which the docstring says. The contract
must turn red. `tier` is where that is expected: in 1, the method, which every subject is tested
for; or only in 2, quality, which DELORA_QUALITY=1 adds.
"""

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrize


def unit(v, dim):
    """v / ‖v‖ along dim, and zero for zero."""
    norm = v.norm(dim=dim, keepdim=True)
    return v / norm.masked_fill(norm == 0, torch.inf)


class Described:
    """The four functions, for a layer that names its tensors as here and has these modes."""

    tier = 1  # what a right subject has to pass: tier one is enough
    layer = None
    modes = (("column", True),)

    @classmethod
    def build(cls, weight, bias, *, r, lambda_init, weight_norm, tie_lambda):
        if (weight_norm, tie_lambda) not in cls.modes:
            raise NotImplementedError(f"{weight_norm=}, {tie_lambda=}")
        return cls.layer(weight, bias, r, lambda_init)

    @staticmethod
    def tensors(layer):
        return {"A": layer.A, "B": layer.B, "lambda": layer.lam}

    @staticmethod
    def delta_weight(layer):
        return layer.delta_weight()

    @staticmethod
    def merge(layer):
        return layer.weight.detach()


# ----------------------------------------------------------------------------------------------
# Right
# ----------------------------------------------------------------------------------------------


class DenseLayer(nn.Module):
    def __init__(self, weight, bias, r, lambda_init, weight_norm, tie_lambda):
        super().__init__()
        self.W = weight  # (out, in)
        self.b = bias  # (out,) or None
        self.requires_grad_(False)
        n_out, n_in = weight.shape
        self.A = nn.Parameter(torch.randn(r, n_in, dtype=weight.dtype))
        self.B = nn.Parameter(torch.randn(n_out, r, dtype=weight.dtype))
        self.lam = nn.Parameter(torch.tensor([lambda_init], dtype=weight.dtype))
        self.A0 = nn.Parameter(self.A.detach().clone(), requires_grad=False)
        self.B0 = nn.Parameter(self.B.detach().clone(), requires_grad=False)
        self.lam0 = None
        if not tie_lambda:
            self.lam0 = nn.Parameter(self.lam.detach().clone(), requires_grad=False)
        if weight_norm == "column":
            w = weight.norm(dim=0)  # (in,)
        elif weight_norm == "frobenius":
            w = weight.norm()
        else:
            w = torch.ones(n_in, dtype=weight.dtype)
        self.w = nn.Parameter(w, requires_grad=False)

    def delta_weight(self):
        lam0 = self.lam if self.lam0 is None else self.lam0
        now = self.lam * unit(self.B, 0) @ unit(self.A, 1)
        start = lam0 * unit(self.B0, 0) @ unit(self.A0, 1)
        return (now - start) / len(self.A) * self.w

    @property
    def weight(self):
        return self.W + self.delta_weight()

    @property
    def bias(self):
        return self.b

    def forward(self, x):
        return F.linear(x, self.weight, self.b)


class Dense(Described):
    """ΔW straight from the equation, dense in every forward, in every mode."""

    @staticmethod
    def build(weight, bias, *, r, lambda_init, weight_norm, tie_lambda):
        return DenseLayer(weight, bias, r, lambda_init, weight_norm, tie_lambda)


class BuffersLayer(nn.Module):
    def __init__(self, weight, bias, r, lambda_init):
        super().__init__()
        n_out, n_in = weight.shape
        self.linear = nn.Linear(n_in, n_out, bias is not None, device="meta")
        self.linear.weight = weight
        self.linear.bias = bias
        for p in self.linear.parameters():
            p.requires_grad = False
        self.A = nn.Parameter(torch.empty(r, n_in, dtype=weight.dtype))
        self.B = nn.Parameter(torch.empty(n_out, r, dtype=weight.dtype))
        nn.init.kaiming_uniform_(self.A, a=5**0.5)
        nn.init.kaiming_uniform_(self.B, a=5**0.5)
        self.lam = nn.Parameter(torch.tensor(lambda_init, dtype=weight.dtype))  # zero-dimensional
        self.register_buffer("A0", self.A.detach().clone())
        self.register_buffer("B0", self.B.detach().clone())
        self.register_buffer("w", weight.detach().square().sum(0).sqrt())  # (in,)

    def term(self, A, B, x):
        """(λ/r) B Ξ A diag(w) x."""
        h = F.linear(x * self.w, unit(A, 1))  # (..., r)
        return self.lam / len(A) * F.linear(h, unit(B, 0))

    def forward(self, x):
        return self.linear(x) + (self.term(self.A, self.B, x) - self.term(self.A0, self.B0, x))

    def delta_weight(self):
        identity = torch.eye(len(self.w), dtype=self.w.dtype)
        return (self.term(self.A, self.B, identity) - self.term(self.A0, self.B0, identity)).T

    @property
    def weight(self):
        return self.linear.weight + self.delta_weight()

    @property
    def bias(self):
        return self.linear.bias


class Buffers(Described):
    """The frozen copy and w are buffers, λ is zero-dimensional, ΔW is what it does to identity."""

    layer = BuffersLayer

    @staticmethod
    def tensors(layer):
        return {"A": layer.A, "B": layer.B, "lambda": layer.lam.view(1)}


class Normalise(nn.Module):
    """v ↦ v / ‖v‖ along dim."""

    def __init__(self, dim):
        super().__init__()
        self.dim = dim

    def forward(self, v):
        return F.normalize(v, dim=self.dim, eps=1e-30)


class ParametrizedLayer(nn.Module):
    def __init__(self, weight, bias, r, lambda_init):
        super().__init__()
        self.W = weight.requires_grad_(False)  # (out, in)
        self.b = bias  # (out,) or None
        if bias is not None:
            bias.requires_grad_(False)
        n_out, n_in = weight.shape
        self.A = nn.Parameter(nn.init.xavier_normal_(torch.empty(r, n_in, dtype=weight.dtype)))
        self.B = nn.Parameter(nn.init.xavier_normal_(torch.empty(n_out, r, dtype=weight.dtype)))
        self.lam = nn.Parameter(torch.full((1,), float(lambda_init), dtype=weight.dtype))
        parametrize.register_parametrization(self, "A", Normalise(dim=1))  # now self.A is Â
        parametrize.register_parametrization(self, "B", Normalise(dim=0))
        self.register_buffer("A0", self.A.detach().clone())
        self.register_buffer("B0", self.B.detach().clone())
        self.register_buffer("w", torch.linalg.vector_norm(weight, dim=0))  # (in,)

    def delta_weight(self):
        return self.lam / len(self.A) * (self.B @ self.A - self.B0 @ self.A0) * self.w

    @property
    def weight(self):
        return self.W + self.delta_weight()

    @property
    def bias(self):
        return self.b

    def forward(self, x):
        return F.linear(x, self.weight, self.b)


class Parametrized(Described):
    """A and B are parametrized: layer.A has unit rows, and what is trained lies behind it."""

    layer = ParametrizedLayer

    @staticmethod
    def tensors(layer):
        hidden = layer.parametrizations
        return {"A": hidden.A.original, "B": hidden.B.original, "lambda": layer.lam}


class Update(nn.Module):
    """W ↦ W + ΔW."""

    def __init__(self, weight, r, lambda_init):
        super().__init__()
        n_out, n_in = weight.shape
        self.A = nn.Parameter(torch.randn(r, n_in, dtype=weight.dtype))
        self.B = nn.Parameter(torch.randn(n_out, r, dtype=weight.dtype))
        self.lam = nn.Parameter(torch.full((1,), float(lambda_init), dtype=weight.dtype))
        self.register_buffer("D0", self.directions().detach())
        self.register_buffer("w", weight.detach().norm(dim=0))  # (in,)

    def directions(self):
        A_hat = F.normalize(self.A, dim=1, eps=1e-30)  # (r, in)
        B_hat = F.normalize(self.B, dim=0, eps=1e-30)  # (out, r)
        return B_hat @ A_hat

    def delta_weight(self):
        return self.lam / len(self.A) * (self.directions() - self.D0) * self.w

    def forward(self, weight):
        return weight + self.delta_weight()


class ParametrizedWeight(Described):
    """An nn.Linear whose weight is parametrized: the weight that is read is W + ΔW."""

    @staticmethod
    def layer(weight, bias, r, lambda_init):
        linear = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device="meta")
        linear.weight = weight
        linear.bias = bias
        linear.requires_grad_(False)
        parametrize.register_parametrization(linear, "weight", Update(weight, r, lambda_init))
        return linear

    @staticmethod
    def tensors(layer):
        update = layer.parametrizations.weight[0]
        return {"A": update.A, "B": update.B, "lambda": update.lam}

    @staticmethod
    def delta_weight(layer):
        return layer.parametrizations.weight[0].delta_weight()


class Float32Layer(nn.Module):
    def __init__(self, weight, bias, r, lambda_init):
        super().__init__()
        self.W = weight.requires_grad_(False)  # (out, in)
        self.b = None if bias is None else bias.requires_grad_(False)  # (out,)
        n_out, n_in = weight.shape
        self.A = nn.Parameter(torch.randn(r, n_in, dtype=torch.float32))
        self.B = nn.Parameter(torch.randn(n_out, r, dtype=torch.float32))
        self.lam = nn.Parameter(torch.full((1,), float(lambda_init), dtype=torch.float32))
        self.register_buffer("A0", self.A.detach().clone())
        self.register_buffer("B0", self.B.detach().clone())
        self.register_buffer("w", weight.float().norm(dim=0))  # (in,)

    def factors(self, A, B):
        """(left (out, r), right (r, in)) of the term λ/r B Ξ A diag(w)."""
        return self.lam / len(A) * F.normalize(B, dim=0), F.normalize(A, dim=1) * self.w

    def delta_weight(self):
        left, right = self.factors(self.A, self.B)
        left0, right0 = self.factors(self.A0, self.B0)
        return left @ right - left0 @ right0

    @property
    def weight(self):
        return self.W + self.delta_weight()

    @property
    def bias(self):
        return self.b

    def forward(self, x):
        left, right = self.factors(self.A, self.B)
        left0, right0 = self.factors(self.A0, self.B0)
        update = F.linear(F.linear(x, right), left) - F.linear(F.linear(x, right0), left0)
        return F.linear(x, self.W, self.b) + update


class Float32Only(Described):
    """F.normalize with its own epsilon, in float32. Another dtype is declined."""

    @staticmethod
    def build(weight, bias, *, r, lambda_init, weight_norm, tie_lambda):
        if weight.dtype != torch.float32 or weight_norm != "column" or not tie_lambda:
            raise NotImplementedError
        return Float32Layer(weight, bias, r, lambda_init)


class Float32Breaks(Described):
    """F.normalize with its own epsilon, in float32. With another dtype it breaks when called."""

    layer = Float32Layer


class NoWeightLayer(nn.Module):
    def __init__(self, weight, bias, r, lambda_init, w):
        super().__init__()
        self.base = nn.ParameterList([weight])
        if bias is not None:
            self.base.append(bias)
        self.base.requires_grad_(False)
        n_out, n_in = weight.shape
        self.A = nn.Parameter(torch.rand(r, n_in, dtype=weight.dtype) * 2 - 1)
        self.B = nn.Parameter(torch.rand(n_out, r, dtype=weight.dtype) * 2 - 1)
        self.lam = nn.Parameter(torch.tensor([lambda_init], dtype=weight.dtype))
        self.A0 = nn.Parameter(self.A.detach().clone(), requires_grad=False)
        self.B0 = nn.Parameter(self.B.detach().clone(), requires_grad=False)
        self.register_buffer("w", w)

    def forward(self, x):
        y = F.linear(x, *self.base)  # (..., out)
        x = x * self.w * self.lam / len(self.A)  # (..., in)
        now = torch.einsum("...i,ri,or->...o", x, unit(self.A, 1), unit(self.B, 0))
        start = torch.einsum("...i,ri,or->...o", x, unit(self.A0, 1), unit(self.B0, 0))
        return y + (now - start)


class NoWeight(Described):
    """It has no .weight and no .bias, cannot be merged, and never forms ΔW itself."""

    @staticmethod
    def build(weight, bias, *, r, lambda_init, weight_norm, tie_lambda):
        if weight_norm is None or not tie_lambda:
            raise NotImplementedError
        weight.requires_grad_(False)
        w = weight.norm(dim=0)  # (in,)
        if weight_norm == "frobenius":
            w = w.norm()
        return NoWeightLayer(weight, bias, r, lambda_init, w)

    @staticmethod
    def delta_weight(layer):
        now = sum(map(torch.outer, unit(layer.B, 0).T, unit(layer.A, 1)))
        start = sum(map(torch.outer, unit(layer.B0, 0).T, unit(layer.A0, 1)))
        return layer.lam / len(layer.A) * (now - start) * layer.w

    @staticmethod
    def merge(layer):
        raise NotImplementedError


class NormalisedCopyLayer(nn.Module):
    def __init__(self, weight, bias, r, lambda_init, tie_lambda):
        super().__init__()
        self.W = weight  # (out, in)
        self.b = bias  # (out,) or None
        self.requires_grad_(False)
        self.A = nn.Parameter(torch.randn(r, weight.shape[1], dtype=weight.dtype))
        self.B = nn.Parameter(torch.randn(weight.shape[0], r, dtype=weight.dtype))
        self.lam = nn.Parameter(torch.tensor([lambda_init], dtype=weight.dtype))
        self.register_buffer("A0_hat", unit(self.A, 1).detach())
        self.register_buffer("B0_hat", unit(self.B, 0).detach())
        self.lam0 = None if tie_lambda else lambda_init

    def delta_weight(self):
        A_hat = unit(self.A, 1)  # (r, in)
        B_hat = unit(self.B, 0)  # (out, r)
        lam0 = self.lam if self.lam0 is None else self.lam0
        return (self.lam * (B_hat @ A_hat) - lam0 * (self.B0_hat @ self.A0_hat)) / len(A_hat)

    @property
    def weight(self):
        return self.W + self.delta_weight()

    @property
    def bias(self):
        return self.b

    def forward(self, x):
        return F.linear(x, self.W, self.b) + F.linear(x, self.delta_weight())


class NormalisedCopy(Described):
    """The frozen copy is stored with its components normalised; no w (Eq. 7)."""

    @staticmethod
    def build(weight, bias, *, r, lambda_init, weight_norm, tie_lambda):
        if weight_norm is not None:
            raise NotImplementedError
        return NormalisedCopyLayer(weight, bias, r, lambda_init, tie_lambda)


class ProductBufferLayer(nn.Module):
    def __init__(self, weight, bias, r, lambda_init):
        super().__init__()
        self.W = weight  # (out, in)
        self.b = bias  # (out,) or None
        self.requires_grad_(False)
        self.A = nn.Parameter(torch.randn(r, weight.shape[1], dtype=weight.dtype))
        self.B = nn.Parameter(torch.randn(weight.shape[0], r, dtype=weight.dtype))
        self.lam = nn.Parameter(torch.tensor([lambda_init], dtype=weight.dtype))
        self.register_buffer("D0", self.directions().detach())  # B̂₀Â₀ (out, in)
        self.register_buffer("w", weight.norm(dim=0))  # (in,)

    def directions(self):
        return unit(self.B, 0) @ unit(self.A, 1)

    def delta_weight(self):
        return self.lam / len(self.A) * (self.directions() - self.D0) * self.w

    @property
    def weight(self):
        return self.W + self.delta_weight()

    @property
    def bias(self):
        return self.b

    def forward(self, x):
        return F.linear(x, self.weight, self.b)


class ProductBuffer(Described):
    """The product B̂₀Â₀ is one buffer (out, in), and λ multiplies it: tied."""

    layer = ProductBufferLayer


class UntiedProductLayer(nn.Module):
    def __init__(self, weight, bias, r, lambda_init):
        super().__init__()
        self.W = weight  # (out, in)
        self.b = bias  # (out,) or None
        self.requires_grad_(False)
        self.A = nn.Parameter(torch.randn(r, weight.shape[1], dtype=weight.dtype))
        self.Bt = nn.Parameter(torch.randn(r, weight.shape[0], dtype=weight.dtype))  # B transposed
        self.strength = nn.Parameter(torch.tensor([[lambda_init]], dtype=weight.dtype))
        self.register_buffer("start", self.product().detach())  # (out, in), with λ₀ = λ in it
        self.register_buffer("w", weight.norm(dim=0))  # (in,)

    def product(self):
        """(λ/r) B Ξ A, (out, in)."""
        return self.strength / len(self.A) * unit(self.Bt, 1).T @ unit(self.A, 1)

    @property
    def weight(self):
        return self.W + (self.product() - self.start) * self.w

    @property
    def bias(self):
        return self.b

    def forward(self, x):
        return F.linear(x, self.weight, self.b)


class UntiedProductBuffer(Described):
    """The frozen term is one buffer (out, in), λ₀ included: untied. B is stored transposed."""

    layer = UntiedProductLayer
    modes = (("column", False),)

    @staticmethod
    def tensors(layer):
        return {"A": layer.A, "B": layer.Bt.T, "lambda": layer.strength.view(1)}

    @staticmethod
    def delta_weight(layer):
        return (layer.product() - layer.start) * layer.w


class TextbookLayer(nn.Module):
    def __init__(self, weight, bias, r, lambda_init):
        super().__init__()
        self.W = weight  # (out, in)
        self.b = bias  # (out,) or None
        self.requires_grad_(False)
        self.A = nn.Parameter(torch.randn(r, weight.shape[1], dtype=weight.dtype))
        self.B = nn.Parameter(torch.randn(weight.shape[0], r, dtype=weight.dtype))
        self.lam = nn.Parameter(torch.tensor([lambda_init], dtype=weight.dtype))
        self.register_buffer("A0", self.A.detach().clone())
        self.register_buffer("B0", self.B.detach().clone())
        self.register_buffer("w", weight.norm(dim=0))  # (in,)

    def directions(self, A, B):
        return (B / B.norm(dim=0)) @ (A / A.norm(dim=1, keepdim=True))

    def delta_weight(self):
        difference = self.directions(self.A, self.B) - self.directions(self.A0, self.B0)
        return self.lam / len(self.A) * difference * self.w

    @property
    def weight(self):
        return self.W + self.delta_weight()

    @property
    def bias(self):
        return self.b

    def forward(self, x):
        return F.linear(x, self.weight, self.b)


class Textbook(Described):
    """v / ‖v‖ as it is written: zero divided by zero is not a number. Right but for that."""

    layer = TextbookLayer


class FactoredLayer(nn.Module):
    def __init__(self, weight, bias, r, lambda_init, tie_lambda):
        super().__init__()
        self.W = weight  # (out, in)
        self.b = bias  # (out,) or None
        self.requires_grad_(False)
        self.A = nn.Parameter(torch.randn(r, weight.shape[1], dtype=weight.dtype))
        self.B = nn.Parameter(torch.randn(weight.shape[0], r, dtype=weight.dtype))
        self.lam = nn.Parameter(torch.tensor([lambda_init], dtype=weight.dtype))
        self.register_buffer("A0", self.A.detach().clone())
        self.register_buffer("B0", self.B.detach().clone())
        self.register_buffer("lam0", None if tie_lambda else self.lam.detach().clone())
        self.register_buffer("w", weight.norm(dim=0))  # (in,)

    def factors(self):
        """[λB̂, −λ₀B̂₀] (out, 2r) and [Â; Â₀] diag(w) / r (2r, in)."""
        lam0 = self.lam if self.lam0 is None else self.lam0
        left = torch.cat((self.lam * unit(self.B, 0), -lam0 * unit(self.B0, 0)), dim=1)
        right = torch.cat((unit(self.A, 1), unit(self.A0, 1)))
        return left, right * self.w / len(self.A)

    def delta_weight(self):
        left, right = self.factors()
        return left @ right

    @property
    def weight(self):
        return self.W + self.delta_weight()

    @property
    def bias(self):
        return self.b

    def forward(self, x):
        left, right = self.factors()
        return F.linear(x, self.W, self.b) + F.linear(F.linear(x, right), left)


class Factored(Described):
    """[B̂, −B̂₀] · [Â; Â₀] as one product, which at the start is zero up to rounding only."""

    @staticmethod
    def build(weight, bias, *, r, lambda_init, weight_norm, tie_lambda):
        if weight_norm != "column":
            raise NotImplementedError
        return FactoredLayer(weight, bias, r, lambda_init, tie_lambda)


class Strength(nn.Module):
    """The class itself is the subject. Three arguments, no keywords, no .merged."""

    tier = 1

    def __init__(self, base_layer, r, lambda_init):
        super().__init__()
        self.base_layer = base_layer.requires_grad_(False)
        like = base_layer.weight
        self.A = nn.Parameter(torch.randn(r, base_layer.in_features).to(like))
        self.B = nn.Parameter(torch.randn(base_layer.out_features, r).to(like))
        self.lam = nn.Parameter(torch.tensor([lambda_init], dtype=like.dtype))
        self.register_buffer("A0", self.A.detach().clone())
        self.register_buffer("B0", self.B.detach().clone())
        self.register_buffer("w", like.norm(dim=0))  # (in,)

    def delta_weight(self):
        now = unit(self.B, 0) @ unit(self.A, 1)  # (out, in)
        start = unit(self.B0, 0) @ unit(self.A0, 1)
        return self.lam / len(self.A) * (now - start) * self.w

    @property
    def weight(self):
        return self.base_layer.weight + self.delta_weight()

    @property
    def bias(self):
        return self.base_layer.bias

    def forward(self, x):
        return self.base_layer(x) + x @ self.delta_weight().T


# ----------------------------------------------------------------------------------------------
# The right layer that the wrong ones are made of
# ----------------------------------------------------------------------------------------------


def wide(value):
    """In float32 at least: float64 stays as it is."""
    return value if value.dtype == torch.float64 else value.float()


class Plain(nn.Module):
    """Right in both tiers. Its methods are the places where a mistake is planted."""

    tier = 2

    def __init__(self, base_layer, r, lambda_init, *, weight_norm="column", tie_lambda=True):
        super().__init__()
        if weight_norm != "column" or not tie_lambda:
            raise NotImplementedError
        if r < 1:
            raise ValueError(f"r must be 1 or more, got {r}")
        self.W = base_layer.weight  # (out, in)
        self.b = base_layer.bias  # (out,) or None
        self.requires_grad_(False)
        n_out, n_in = self.W.shape
        self.register_buffer("w", self.measure())  # (in,)
        self.A = nn.Parameter(self.w.new_empty(r, n_in))
        self.B = nn.Parameter(self.w.new_empty(n_out, r))
        self.lam = nn.Parameter(self.w.new_full((1,), lambda_init))
        nn.init.kaiming_uniform_(self.A, a=5**0.5)
        nn.init.kaiming_uniform_(self.B, a=5**0.5)
        self.register_buffer("A0", self.A.detach().clone())
        self.register_buffer("B0", self.B.detach().clone())
        self.plant()

    def plant(self):
        """Nothing. Some wrong layers change here what was built."""

    def measure(self):
        """w (in,)."""
        return wide(self.W).norm(dim=0)

    def size(self, norm):
        """What a vector of this norm is divided by. Zero stays zero, without a gradient."""
        return norm.masked_fill(norm < torch.finfo(norm.dtype).tiny ** 0.5, torch.inf)

    def unit(self, v, dim):
        v = wide(v)
        return v / self.size(v.norm(dim=dim, keepdim=True))

    def unit_A(self, A):
        return self.unit(A, dim=1)

    def unit_B(self, B):
        return self.unit(B, dim=0)

    def directions(self):
        """B̂Â − B̂₀Â₀ (out, in), by differences that are zero to the bit at the start."""
        A, A0 = self.unit_A(self.A), self.unit_A(self.A0)
        B, B0 = self.unit_B(self.B), self.unit_B(self.B0)
        return (B - B0) @ A + B0 @ (A - A0)

    def strength(self):
        """λ / r."""
        return wide(self.lam) / len(self.A)

    def scale(self):
        """w, as it is applied."""
        return wide(self.w)

    def delta_weight(self):
        """ΔW (out, in)."""
        device = "cpu" if self.A.is_meta else self.A.device.type
        with torch.autocast(device, enabled=False):
            return self.strength() * self.directions() * self.scale()

    @property
    def weight(self):
        """W + ΔW (out, in), rounded once."""
        return (self.W + self.delta_weight()).to(self.W.dtype)

    @property
    def bias(self):
        return self.b

    def forward(self, x):
        return F.linear(x, self.weight, self.b)

    def merge(self):
        """W + ΔW (out, in), in memory of its own."""
        return self.weight.detach()

    def merged(self):
        """A new nn.Linear."""
        n_out, n_in = self.W.shape
        linear = nn.Linear(n_in, n_out, self.b is not None, device="meta")
        linear.weight = nn.Parameter(self.merge(), requires_grad=False)
        if self.b is not None:
            linear.bias = nn.Parameter(self.b.detach().clone(), requires_grad=False)
        return linear


# ----------------------------------------------------------------------------------------------
# Wrong: what is trained
# ----------------------------------------------------------------------------------------------


class WIsTrained(Plain):
    """W is left trainable."""

    tier = 1

    def plant(self):
        self.W.requires_grad_(True)


class BiasIsTrained(Plain):
    """b is left trainable."""

    tier = 1

    def plant(self):
        if self.b is not None:
            self.b.requires_grad_(True)


class WAndBCopied(Plain):
    """W and b are copied: a weight that was tied to another module is not any more."""

    tier = 1

    def plant(self):
        self.W = nn.Parameter(self.W.detach().clone(), requires_grad=False)
        if self.b is not None:
            self.b = nn.Parameter(self.b.detach().clone(), requires_grad=False)


class ExtraBias(Plain):
    """A bias of its own is trained, too."""

    tier = 1

    def plant(self):
        self.extra = nn.Parameter(torch.zeros(len(self.W), dtype=self.W.dtype))

    def forward(self, x):
        return super().forward(x) + self.extra


class AIsABuffer(Plain):
    """A is a buffer that requires a gradient: no optimiser is given it."""

    tier = 1

    def plant(self):
        A = self.A.detach().requires_grad_(True)
        del self.A
        self.register_buffer("A", A)


class LambdaIsABuffer(Plain):
    """λ is a buffer that requires a gradient: no optimiser is given it."""

    tier = 1

    def plant(self):
        lam = self.lam.detach().requires_grad_(True)
        del self.lam
        self.register_buffer("lam", lam)


class LambdaDetached(Plain):
    """λ is detached, and has no gradient."""

    tier = 1

    def strength(self):
        return super().strength().detach()


class CopyIsTrained(Plain):
    """The frozen copy is trained, too."""

    tier = 1

    def plant(self):
        A0, B0 = self.A0, self.B0
        del self.A0, self.B0
        self.A0 = nn.Parameter(A0)
        self.B0 = nn.Parameter(B0)


# ----------------------------------------------------------------------------------------------
# Wrong: the start
# ----------------------------------------------------------------------------------------------


class AllPositive(Plain):
    """A and B start with no negative entry."""

    tier = 1

    def plant(self):
        for value in (self.A, self.B, self.A0, self.B0):
            value.data.abs_()


class SetsTheSeed(Plain):
    """Building sets the seed: all layers start alike, and the user's random numbers repeat."""

    tier = 1

    def measure(self):  # before A and B are drawn
        torch.manual_seed(0)
        return super().measure()


class AllComponentsAlike(Plain):
    """All components start alike, and stay so: the rank is two."""

    tier = 1

    def plant(self):
        for A in (self.A, self.A0):
            A.data.copy_(A.data[:1].clone().expand_as(A))
        for B in (self.B, self.B0):
            B.data.copy_(B.data[:, :1].clone().expand_as(B))


class IgnoresLambdaInit(Plain):
    """λ starts at one, whatever lambda_init is."""

    tier = 1

    def plant(self):
        self.lam.data.fill_(1)


class CopySharesStorage(Plain):
    """The frozen copy shares its storage with A and B: ΔW is zero for ever."""

    tier = 1

    def plant(self):
        self.A0 = self.A.detach()
        self.B0 = self.B.detach()


class CopyInBfloat16(Plain):
    """The frozen copy is rounded to bfloat16: ΔW does not start at zero."""

    tier = 1

    def plant(self):
        self.A0 = self.A0.bfloat16().to(self.A0.dtype)
        self.B0 = self.B0.bfloat16().to(self.B0.dtype)


class NoCopy(Plain):
    """There is no frozen copy: ΔW does not start at zero."""

    tier = 1

    def directions(self):
        return self.unit_B(self.B) @ self.unit_A(self.A)


class ZeroBWithClamp(Plain):
    """B starts at zero, norms are clamped at 1e-4, and there is no frozen copy."""

    tier = 1

    def plant(self):
        self.B.data.zero_()
        self.B0.zero_()

    def size(self, norm):
        return norm.clamp(min=1e-4)


class ZeroAAndBWithEpsilon(Plain):
    """A and B start at zero, with an epsilon in the norm: they never move."""

    tier = 1

    def plant(self):
        for value in (self.A, self.B, self.A0, self.B0):
            value.data.zero_()

    def size(self, norm):
        return norm + 1e-8


# ----------------------------------------------------------------------------------------------
# Wrong: the equation
# ----------------------------------------------------------------------------------------------


class WrongAxisOfA(Plain):
    """A is normalised over its components instead of within each."""

    tier = 1

    def unit_A(self, A):
        return self.unit(A, dim=0)


class WrongAxisOfB(Plain):
    """B is normalised over its components instead of within each."""

    tier = 1

    def unit_B(self, B):
        return self.unit(B, dim=1)


class OneNormForAllComponents(Plain):
    """A and B are divided by their Frobenius norms, one for all components."""

    tier = 1

    def unit(self, v, dim):
        return super().unit(v.flatten(), dim=0).view_as(v)


class OnlyANormalised(Plain):
    """B is not normalised."""

    tier = 1

    def unit_B(self, B):
        return wide(B)


class NothingNormalised(Plain):
    """Neither A nor B is normalised: LoRA with a frozen copy."""

    tier = 1

    def unit(self, v, dim):
        return wide(v)


class PlainLoRA(Plain):
    """LoRA: B starts at zero, nothing is normalised, no w. ΔW = (λ/r) B A."""

    tier = 1

    def plant(self):
        self.B.data.zero_()

    def directions(self):
        return wide(self.B) @ wide(self.A)

    def scale(self):
        return torch.ones_like(wide(self.w))


class DoRA(Plain):
    """DoRA: the columns of W + (λ/r) B A get magnitudes m that are trained."""

    tier = 1

    def plant(self):
        self.B.data.zero_()
        self.m = nn.Parameter(self.w.clone())

    def delta_weight(self):
        W = wide(self.W)
        changed = W + self.strength() * wide(self.B) @ wide(self.A)
        return wide(self.m) * self.unit(changed, dim=0) - W


class NormsDetached(Plain):
    """The norms are detached: gradients have a part along the components."""

    tier = 1

    def size(self, norm):
        return super().size(norm).detach()


class EpsilonAdded(Plain):
    """1e-8 is added to the norms: short components are not normalised."""

    tier = 1

    def size(self, norm):
        return norm + 1e-8


class NormsClamped(Plain):
    """Norms are clamped at 1e-4: shorter components are not normalised."""

    tier = 1

    def size(self, norm):
        return norm.clamp(min=1e-4)


class NotDividedByR(Plain):
    """λ is not divided by r."""

    tier = 1

    def strength(self):
        return wide(self.lam)


class AbsoluteLambda(Plain):
    """|λ| in the place of λ."""

    tier = 1

    def strength(self):
        return super().strength().abs()


class LambdaSquared(Plain):
    """λ² in the place of λ."""

    tier = 1

    def strength(self):
        return wide(self.lam) * super().strength()


class SoftplusOfLambda(Plain):
    """softplus(λ) in the place of λ."""

    tier = 1

    def strength(self):
        return F.softplus(wide(self.lam)) / len(self.A)


class CopyUntied(Plain):
    """The frozen copy keeps λ at the start, though λ is to be tied."""

    tier = 1

    def plant(self):
        self.register_buffer("lam0", self.lam.detach().clone())

    def delta_weight(self):
        now = wide(self.lam) * self.unit_B(self.B) @ self.unit_A(self.A)
        start = wide(self.lam0) * self.unit_B(self.B0) @ self.unit_A(self.A0)
        return (now - start) / len(self.A) * self.scale()


class CopyAdded(Plain):
    """The frozen copy is added."""

    tier = 1

    def directions(self):
        now = self.unit_B(self.B) @ self.unit_A(self.A)
        return now + self.unit_B(self.B0) @ self.unit_A(self.A0)


class AAndItsCopyExchanged(Plain):
    """A and A₀ are exchanged: B̂Â₀ − B̂₀Â."""

    tier = 1

    def directions(self):
        crossed = self.unit_B(self.B) @ self.unit_A(self.A0)
        return crossed - self.unit_B(self.B0) @ self.unit_A(self.A)


class HalfOfTheComponents(Plain):
    """Only the first half of the components counts."""

    tier = 1

    def unit_A(self, A):
        return super().unit_A(A)[: (len(A) + 1) // 2]

    def unit_B(self, B):
        return super().unit_B(B)[:, : (B.shape[1] + 1) // 2]


class TransposedWhereSquare(Plain):
    """ΔW is transposed where W is square."""

    tier = 1

    def delta_weight(self):
        delta = super().delta_weight()
        return delta.T if len(self.W) == self.W.shape[1] else delta


# ----------------------------------------------------------------------------------------------
# Wrong: w
# ----------------------------------------------------------------------------------------------


class WNotApplied(Plain):
    """w is not applied."""

    tier = 1

    def scale(self):
        return torch.ones_like(wide(self.w))


class NormsOfRows(Plain):
    """w has the norms of the rows of W, and scales the rows of ΔW."""

    tier = 1

    def measure(self):
        return wide(self.W).norm(dim=1, keepdim=True)  # (out, 1)


class OneNormForAllColumns(Plain):
    """w is the Frobenius norm of W for every column, though "column" is asked for."""

    tier = 1

    def measure(self):
        w = super().measure()
        return torch.full_like(w, w.norm())


class NormsOf64Rows(Plain):
    """w is measured from the first 64 rows of W."""

    tier = 1

    def measure(self):
        return wide(self.W[:64]).norm(dim=0)


class MeasuredAnew(Plain):
    """w is measured anew in every forward, and follows W."""

    tier = 1

    def scale(self):
        return self.measure()


class NormsInBfloat16(Plain):
    """w is rounded to W's dtype, be it bfloat16."""

    tier = 1

    def measure(self):
        return wide(super().measure().to(self.W.dtype))


class WLeftBehind(Plain):
    """w is an attribute: .to() leaves it behind, and state_dict has it not."""

    tier = 2

    def plant(self):
        w = self.w
        del self.w
        self.w = w


# ----------------------------------------------------------------------------------------------
# Wrong: the layer
# ----------------------------------------------------------------------------------------------


class ForgetsTheBias(Plain):
    """The output lacks b."""

    tier = 1

    def forward(self, x):
        return F.linear(x, self.weight)


class WeightIsTheBase(Plain):
    """.weight is W: code that reads the weight does not see the adapter."""

    tier = 1

    @property
    def weight(self):
        return self.W

    def forward(self, x):
        return F.linear(x, super().weight, self.b)

    def merge(self):
        return super().weight.detach()


class FirstTokenOnly(Plain):
    """The adapter sees the first token, and gives all tokens the same."""

    tier = 1

    def forward(self, x):
        first = x if x.dim() == 1 else x[..., :1, :]
        return F.linear(x, self.W, self.b) + F.linear(first, self.delta_weight().to(x.dtype))


class BatchOfOne(Plain):
    """An x without a batch dimension comes back with one."""

    tier = 1

    def forward(self, x):
        return super().forward(torch.atleast_2d(x))


class MatricesOnly(Plain):
    """An x that is no matrix is refused."""

    tier = 1

    def forward(self, x):
        if self.b is None:
            return torch.mm(x, self.weight.T)
        return torch.addmm(self.b, x, self.weight.T)


class InputDetached(Plain):
    """x is detached on its way into the adapter: the layers below do not see it."""

    tier = 1

    def forward(self, x):
        update = F.linear(x.detach(), self.delta_weight().to(x.dtype))
        return F.linear(x, self.W, self.b) + update


class WritesIntoX(Plain):
    """x is scaled by w in place."""

    tier = 1

    def forward(self, x):
        y = F.linear(x, self.W, self.b)
        x.mul_(self.scale().to(x.dtype))
        return y + F.linear(x, (self.strength() * self.directions()).to(x.dtype))


class DropoutInEval(Plain):
    """Dropout acts in evaluation."""

    tier = 1

    def forward(self, x):
        dropped = F.dropout(x, 0.1, training=not self.training)
        return F.linear(x, self.W, self.b) + F.linear(dropped, self.delta_weight().to(x.dtype))


class KeptInEval(Plain):
    """The weight is kept from the first call in evaluation, whatever is trained afterwards."""

    tier = 1
    kept = None

    def forward(self, x):
        if self.training:
            return super().forward(x)
        if self.kept is None:
            self.kept = self.weight
        return F.linear(x, self.kept, self.b)


class KeptUntilTrain(Plain):
    """The weight is kept in evaluation without gradients until .train() or .eval() is called."""

    tier = 1
    kept = None

    def train(self, mode=True):
        self.kept = None
        return super().train(mode)

    def forward(self, x):
        if self.training or torch.is_grad_enabled():
            return super().forward(x)
        if self.kept is None:
            self.kept = self.weight
        return F.linear(x, self.kept, self.b)


class KeptWithoutGradients(Plain):
    """The weight is kept from the first call under torch.no_grad."""

    tier = 1
    kept = None

    def forward(self, x):
        if torch.is_grad_enabled():
            return super().forward(x)
        if self.kept is None:
            self.kept = self.weight
        return F.linear(x, self.kept, self.b)


class FailsInInferenceMode(Plain):
    """It asks for the version of a tensor, which there is none of under torch.inference_mode."""

    tier = 1

    def forward(self, x):
        weight = self.weight
        self.version = weight._version
        return F.linear(x, weight, self.b)


# ----------------------------------------------------------------------------------------------
# Wrong: merge, copies, checkpoints, and what else is in tier two
# ----------------------------------------------------------------------------------------------


class MergeOfTheFirstLambda(Plain):
    """The merged weight has λ as it was at the start."""

    tier = 1

    def plant(self):
        self.register_buffer("lam0", self.lam.detach().clone(), persistent=False)

    def merge(self):
        delta = wide(self.lam0) / len(self.A) * self.directions() * self.scale()
        return (self.W + delta).to(self.W.dtype).detach()


class MergeRoundsTwice(Plain):
    """The merged weight is W plus a ΔW that was rounded to W's dtype before."""

    tier = 2

    def merge(self):
        return (self.W + self.delta_weight().to(self.W.dtype)).detach()


class MergeWritesIntoW(Plain):
    """Merging writes into the W that was given, and that others may hold."""

    tier = 1

    def merge(self):
        self.W.data.copy_(self.weight)
        return self.W.detach()


class CopyTakenAnew(Plain):
    """.to() and its like take the frozen copy anew, and ΔW is zero again."""

    tier = 2

    def _apply(self, *arguments):
        super()._apply(*arguments)
        self.A0 = self.A.detach().clone()
        self.B0 = self.B.detach().clone()
        return self


class CopyNotSaved(Plain):
    """The frozen copy is not in state_dict."""

    tier = 2

    def plant(self):
        self.register_buffer("A0", self.A0, persistent=False)
        self.register_buffer("B0", self.B0, persistent=False)


class CannotBeCopied(Plain):
    """It holds a tensor with a history, and copy.deepcopy fails."""

    tier = 2

    def plant(self):
        self.first_A_hat = self.unit_A(self.A)


class KeepsEveryUpdate(Plain):
    """Every ΔW is kept in a list: memory grows with every step."""

    tier = 2

    def plant(self):
        self.updates = []

    def delta_weight(self):
        delta = super().delta_weight()
        self.updates.append(delta.detach())
        return delta


class ZeroHasAGradient(Plain):
    """Norms are clamped at 1e-30, and the gradient of a component that is zero is 1e30."""

    tier = 2

    def size(self, norm):
        return norm.clamp(min=1e-30)


class TakesAnyRank(Plain):
    """r = 0 and r = -1 are taken for 1."""

    tier = 2

    def __init__(self, base_layer, r, lambda_init, **options):
        super().__init__(base_layer, max(r, 1), lambda_init, **options)


RIGHT = [
    Dense,
    Buffers,
    Parametrized,
    ParametrizedWeight,
    Float32Only,
    Float32Breaks,
    NoWeight,
    NormalisedCopy,
    ProductBuffer,
    UntiedProductBuffer,
    Textbook,
    Factored,
    Strength,
    Plain,
]

WRONG = [
    # what is trained
    WIsTrained,
    BiasIsTrained,
    WAndBCopied,
    ExtraBias,
    AIsABuffer,
    LambdaIsABuffer,
    LambdaDetached,
    CopyIsTrained,
    # the start
    AllPositive,
    SetsTheSeed,
    AllComponentsAlike,
    IgnoresLambdaInit,
    CopySharesStorage,
    CopyInBfloat16,
    NoCopy,
    ZeroBWithClamp,
    ZeroAAndBWithEpsilon,
    # the equation
    WrongAxisOfA,
    WrongAxisOfB,
    OneNormForAllComponents,
    OnlyANormalised,
    NothingNormalised,
    PlainLoRA,
    DoRA,
    NormsDetached,
    EpsilonAdded,
    NormsClamped,
    NotDividedByR,
    AbsoluteLambda,
    LambdaSquared,
    SoftplusOfLambda,
    CopyUntied,
    CopyAdded,
    AAndItsCopyExchanged,
    HalfOfTheComponents,
    TransposedWhereSquare,
    # w
    WNotApplied,
    NormsOfRows,
    OneNormForAllColumns,
    NormsOf64Rows,
    MeasuredAnew,
    NormsInBfloat16,
    WLeftBehind,
    # the layer
    ForgetsTheBias,
    WeightIsTheBase,
    FirstTokenOnly,
    BatchOfOne,
    MatricesOnly,
    InputDetached,
    WritesIntoX,
    DropoutInEval,
    KeptInEval,
    KeptUntilTrain,
    KeptWithoutGradients,
    FailsInInferenceMode,
    # merge, copies, checkpoints, and what else is in tier two
    MergeOfTheFirstLambda,
    MergeRoundsTwice,
    MergeWritesIntoW,
    CopyTakenAnew,
    CopyNotSaved,
    CannotBeCopied,
    KeepsEveryUpdate,
    ZeroHasAGradient,
    TakesAnyRank,
]
