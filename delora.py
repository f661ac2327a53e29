"""DeLoRA: Decoupling Angles and Strength in Low-rank Adaptation, in one file.

Bini, Girrbach, Akata, ICLR 2025, https://arxiv.org/abs/2503.18225. "Eq." is an equation of theirs.

LoRA adapts y = W x + bias by two thin matrices that are trained: y = (W + B A) x + bias, W frozen.
One learning rate steers both where BA points and how large it is. Too high, it destroys the model.

DeLoRA separates the two. BA is a sum of r rank-one components b_i a_iᵀ. Each is divided by its size
‖b_i‖ ‖a_i‖, which leaves its direction only (the "angles"), and one learnable number λ per matrix
is the strength of them all:

    ΔW = (λ / r) · (B Ξ A − B₀ Ξ₀ A₀) · diag(w)      y = (W + ΔW) x + bias     (Eq. 8, 9, 15)

    symbol  code    shape              meaning
    W       weight  (out, in)          pretrained weight, frozen
    A, B    A, B    (r, in), (out, r)  trainable; a_i is row i of A, b_i is column i of B
    Ξ       -       (r, r)             diagonal, Ξ_ii = 1 / (‖a_i‖ ‖b_i‖): it normalises (Eq. 5)
    λ       lam     (1,)               trainable strength
    A₀, B₀  A0, B0  as A, B            the frozen copy: A and B at the start; Ξ₀ belongs to it
    λ₀      lam0    (1,)               λ at the start; only if tie_lambda=False, for B₀ Ξ₀ A₀
    w       w       (in,)              w_j = ‖W[:, j]‖, measured once; scales column j of ΔW (Eq. 8)

The bound. A component divided by its size has norm one, so λ/r times r of them have norm |λ| at
most, whatever an optimiser does to A and B. The frozen copy may double it: ‖ΔW‖_F ≤ 2 |λ| max_j w_j
(see `DeLoRA`). λ is trained too, at a learning rate of its own, and the bound moves with it.

The zero start. Training has to start at W. LoRA has B = 0 for that, but here a zero vector has no
direction. So A and B start at random, and what they give at the start is subtracted from then on
(Eq. 9). Why that is zero to the last bit: `DeLoRA.factors`.

    from delora import inject, merge, param_groups

    inject(model, ["q_proj", "v_proj"])     # adapters in place, all else frozen, the same outputs
    optimizer = torch.optim.AdamW(param_groups(model, lr=1e-2, lambda_lr=5e-3))
    train(model, optimizer)                 # as ever
    merge(model)                            # plain nn.Linear layers that hold W + ΔW

The file has three parts, and a reader may stop after each: 1. the method, `DeLoRA`, for any matrix;
2. `DeLoRALinear`, a layer around a linear layer; 3. `inject` to `load_adapter`, for a whole model.

Where the paper, its authors' code (which gave the paper's results) and this file differ:
1. ‖W‖ in Eq. 8. Paper: one number. Code: a norm per column. Here: the same, or "frobenius".
2. What multiplies B₀ Ξ₀ A₀. Paper: λ₀. Code: today's λ. Here: the same, or `tie_lambda=False`.
3. The bound. Paper: λ‖W‖, for the first term. Here: for the whole ΔW, with max_j w_j for ‖W‖.
"""

import re
import warnings
from contextlib import contextmanager
from numbers import Integral, Real

import torch
from torch import nn

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


# ----------------------------------------------------------------------------------------------
# 1. The method: W ↦ W + ΔW, for any matrix W
# ----------------------------------------------------------------------------------------------


def _wide(value):
    """In float32 at least: float64 stays as it is."""
    return value if value.dtype == torch.float64 else value.float()


def _unit(v, dim):
    """v / ‖v‖ along dim. Zero has no direction: v / ∞ leaves it zero, and gives it a zero gradient.

    A vector shorter than 1e-19 in float32 is treated like zero. The squares of its entries may
    underflow, so that its norm comes out too small and v / ‖v‖ too long. (Where squares overflow,
    the norm is ∞ by itself, and v / ‖v‖ zero.)
    """
    v = _wide(v)
    norm = v.norm(dim=dim, keepdim=True)
    return v / norm.masked_fill(norm < torch.finfo(v.dtype).tiny ** 0.5, torch.inf)


def _weight_norms(weight, weight_norm):
    """w (in,) of a weight (out, in). `DeLoRA` says what weight_norm means."""
    column = _wide(weight).square().sum(0).sqrt()  # (in,), on a CPU faster than norm(dim=0)
    if not (column.is_meta or column.norm().isfinite()):
        raise ValueError("the weight is not finite, or its norms are not")
    if weight_norm == "column":
        return column
    if weight_norm == "frobenius":
        return column.norm().expand_as(column)
    if weight_norm is None:
        return torch.ones_like(column)
    raise ValueError(f"weight_norm must be 'column', 'frobenius' or None, got {weight_norm!r}")


def _frozen(value):
    """A copy that is not trained: a Parameter and no buffer, since FSDP2 shards only parameters."""
    return nn.Parameter(value.detach().clone(), requires_grad=False)


def _require_number(name, value, low, high, kind=Real):
    if isinstance(value, bool) or not isinstance(value, kind) or not low <= value < high:
        raise ValueError(f"{name} must be {kind.__name__}, {low} <= {name} < {high}, got {value!r}")


def _no_autocast(x):
    """A context without autocast on x's device. (The meta device has no autocast to switch off.)"""
    return torch.autocast("cpu" if x.is_meta else x.device.type, enabled=False)


class DeLoRA(nn.Module):
    """W ↦ W + ΔW for a weight matrix W: the equation at the top of this file (Eq. 15).

    It starts at ΔW = 0 exactly, and reaches updates of rank ≤ 2r in a ball around W.

    **The bound.** B Ξ A is a sum of r matrices of norm one or zero, so (λ/r) B Ξ A has norm ≤ |λ|.
    This is so for the Frobenius norm, and for the nuclear norm ‖·‖_*, which is the sum of the
    singular values and never smaller (Eq. 6, 7). The frozen term likewise, with λ ("tied") or λ₀
    ("untied", tie_lambda=False). diag(w) multiplies a norm by max_j w_j at most:

        tied:     ‖ΔW‖_F ≤ ‖ΔW‖_* ≤ 2 |λ| max_j w_j
        untied:   ‖ΔW‖_F ≤ ‖ΔW‖_* ≤ (|λ| + |λ₀|) max_j w_j

    When is it attained? For r = 1 and a constant w, a = −a₀ and b = b₀ does it. In general ‖ΔW‖_F
    reaches the bound only if all of this holds (λ, λ₀ and w not zero):

    - the r normalised components coincide,
    - those of the frozen copy are their negatives (untied with λ < 0: they are equal to them),
    - each a_i is zero at every j where w_j is not the largest.

    The frozen components, drawn at random, hardly ever allow that, and ‖ΔW‖_F stays below the
    bound. (‖ΔW‖_* reaches it in other cases too: for a constant w, if all the a_i and rows of A₀
    are orthogonal to each other, and all the b_i and columns of B₀.)

    **λ does not see the lengths of a_i and b_i.** Replace a_i by c·a_i with c > 0: its direction
    stays, so ΔW stays, and so do ∂ΔW/∂λ and the gradient of λ. And since ΔW does not change along
    a_i, the gradient of a_i has no part along a_i, nor has that of b_i along b_i: it asks for a
    turn and for nothing else.

    As a parametrization it adapts what is no linear layer: an embedding, a convolution, the
    `in_proj_weight` of nn.MultiheadAttention (examples/anywhere.py):

        module.weight.requires_grad_(False)
        nn.utils.parametrize.register_parametrization(module, "weight", DeLoRA(module.weight))

    Args:
        weight: W (out, in), read for its shape and norms. A kernel of more dimensions is read as
            (out, the rest).
        r: number of components, 1 or more.
        lambda_init: λ at the start, at least 1e-30 (at zero A and B would have no gradient) and
            below 1e30. The first term starts at ‖(λ/r) B Ξ A diag(w)‖_F ≈ λ ‖W‖_F / √(r · in), if
            the columns of W are about equal: for λ = 15, r = 8, in = 768 at 0.19 ‖W‖_F.
        weight_norm: "column": w_j = ‖W[:, j]‖. "frobenius": w_j = ‖W‖_F for every j (Eq. 8 as it
            reads): there λ/√in is as strong as λ is by column. None: w_j = 1 (Eq. 7); only this
            can adapt W = 0.
        tie_lambda: what multiplies the frozen copy. True: λ, so that λ → 0 gives W. False: λ₀.

    The parameters are float32, or float64 if W is; ΔW is float32 or wider.

    Raises:
        ValueError: weight is no matrix of floating-point numbers (float64, float32, bfloat16 or
            float16), is empty or not finite; or another argument is not as above.
    """

    def __init__(self, weight, r=8, lambda_init=15.0, *, weight_norm="column", tie_lambda=True):
        super().__init__()
        _require_number("r", r, 1, torch.inf, Integral)
        _require_number("lambda_init", lambda_init, 1e-30, 1e30)
        if weight.dtype not in FLOATS or weight.dim() < 2 or 0 in weight.shape:
            raise ValueError(f"{weight.dtype}, {tuple(weight.shape)} is no matrix of floats")

        w = _weight_norms(weight.flatten(1), weight_norm)  # (in,)
        self.A = nn.Parameter(w.new_empty(r, len(w)))  # (r, in)
        self.B = nn.Parameter(w.new_empty(len(weight), r))  # (out, r)
        self.lam = nn.Parameter(w.new_full((1,), lambda_init))  # (1,)
        for p in (self.A, self.B):  # as the authors: a = √5 is uniform in ±1/√in, B in ±1/√r
            nn.init.kaiming_uniform_(p, a=5**0.5)
        self.A0 = _frozen(self.A)  # (r, in)
        self.B0 = _frozen(self.B)  # (out, r)
        self.lam0 = None if tie_lambda else _frozen(self.lam)  # (1,)
        self.w = _frozen(w)  # (in,)
        self.weight_norm = weight_norm  # to be printed; what counts is w

    def factors(self):
        """(left (out, 2r), right (2r, in)), an ordinary LoRA pair: ΔW = left @ right.

        The whole equation is here, and everything else is computed from it.

        Why not B = 0 for the start? By the rule of `_unit` a b_i = 0 contributes nothing and has
        no gradient, so B would stay zero for ever. With a rule that gives it a gradient, the first
        step, however small, gives b_i a direction, and its term has full strength at once: for
        w = 1 ‖ΔW‖ jumps from 0 to |λ| if r = 1, to about |λ| / √r in general.

        Why not subtract the two terms as they stand? Write Â for A with unit rows, B̂ for B with
        unit columns. As one product, B̂Â − B̂₀Â₀ = [B̂, −B̂₀] · [Â; Â₀]. ("," puts matrices side by
        side, ";" one above the other.) At the start equal terms would have to cancel, but each sum
        is rounded on its way, and what is left is not zero. Subtracting two finished products does
        not help in general either: a compiler may fuse one of them into the subtraction, where it
        is rounded differently. So it is the factors that are subtracted:

            B̂Â − B̂₀Â₀  =  (B̂ − B̂₀) Â + B̂₀ (Â − Â₀)  =  [B̂ − B̂₀, B̂₀] · [Â; Â − Â₀]

        At the start B̂ − B̂₀ and Â − Â₀ are differences of equal numbers: of quotients, and unlike
        products these have no fused form with a subtraction. They are exactly zero in every dtype,
        and zero is what they give in any product with finite numbers, in any order of summing:
        ΔW x = 0 to the bit.

        λ multiplies the left factor, w / r the right one. Untied, the left one is not λB̂ − λ₀B̂₀,
        where one product could be fused again, but once more made of differences of equal numbers:

            λB̂Â − λ₀B̂₀Â₀  =  [λ(B̂ − B̂₀) + (λ − λ₀)B̂₀, λ₀B̂₀] · [Â; Â − Â₀]

        What has a gradient at the start? A and B do. λ does not if tied: its gradient comes with
        the first step. In formulas, with G = ∂L/∂ΔW · diag(w) / r for a loss L: ∂L/∂B̂ = λ G Âᵀ and
        ∂L/∂Â = λ B̂₀ᵀ G, which reach B and A through the divisions. ∂L/∂λ is zero if tied; untied it
        is the sum of the entries of G ∘ B̂₀Â.
        """
        # subtle: Â and Â₀ come from one array. If there were two, a compiler might sum their norms
        # in different orders. What is frozen is detached, in case of model.requires_grad_(True).
        A_hat, A0_hat = _unit(torch.stack((self.A, self.A0.detach())), dim=2)  # (r, in) each
        B_hat, B0_hat = _unit(torch.stack((self.B, self.B0.detach())), dim=1)  # (out, r) each
        lam = _wide(self.lam)  # (1,)
        if self.lam0 is None:
            left = lam * torch.cat((B_hat - B0_hat, B0_hat), dim=1)  # (out, 2r)
        else:
            lam0 = _wide(self.lam0.detach())  # (1,)
            left = torch.cat((lam * (B_hat - B0_hat) + (lam - lam0) * B0_hat, lam0 * B0_hat), dim=1)
        # right (2r, in) carries w / r
        return left, torch.cat((A_hat, A_hat - A0_hat)) * (_wide(self.w.detach()) / len(A_hat))

    def delta_weight(self):
        """ΔW (out, in), in float32 or wider, with gradients."""
        with _no_autocast(self.A):
            return torch.matmul(*self.factors())

    def norm_bound(self):
        """The bound on ‖ΔW‖_* now, a float: 2 |λ| max_j w_j, or (|λ| + |λ₀|) max_j w_j untied.

        Under FSDP2 it is collective: every process has to call it, and gets the same number.
        """
        lam0 = self.lam if self.lam0 is None else self.lam0
        bound = (abs(self.lam) + abs(lam0)) * self.w  # (in,)
        if hasattr(bound, "full_tensor"):  # a DTensor: each process has a part
            bound = bound.full_tensor()
        return bound.max().item()

    def forward(self, weight):
        """W + ΔW in W's shape and dtype, summed in ΔW's precision and rounded once."""
        total = self.delta_weight()  # (out, in)
        total += weight.flatten(1)  # in place, to save an array of W's size
        return total.to(weight.dtype).view_as(weight)

    def extra_repr(self):
        return (
            f"r={len(self.A)}, lam={self.lam.data}, w={self.weight_norm}, tied={self.lam0 is None}"
        )


# ----------------------------------------------------------------------------------------------
# 2. The layer: nn.Linear, or what acts like it, and its adapter
# ----------------------------------------------------------------------------------------------


def _features(layer):
    """(in, out) of nn.Linear and of what has its sizes, None for any other module."""
    if type(layer).__name__ == "Conv1D" and hasattr(layer, "nf"):  # Hugging Face's, W is (in, out)
        return layer.weight.shape
    n_in = getattr(layer, "in_features", None)
    n_out = getattr(layer, "out_features", None)
    if isinstance(n_in, Integral) and isinstance(n_out, Integral):
        return n_in, n_out


def _require_here(name, tensors):
    """An error unless all tensors are in this process, whole and with values."""
    for tensor in tensors:
        if hasattr(tensor, "full_tensor"):
            raise TypeError(f"{name} is sharded. For FSDP2 see examples/distributed.py")
        if tensor.is_meta:
            raise ValueError(
                f"{name} is on the meta device, without values: not loaded, or offloaded"
            )


def _can_be_read(layer):
    """Whether layer.weight and layer.bias are W and b, and the layer does what nn.Linear does."""
    if type(layer).forward is not nn.Linear.forward or "forward" in vars(layer):
        return False  # a forward of its own, or one put on this layer, as by offloading
    for name in ("weight", "bias"):
        if name not in layer._parameters and not nn.utils.parametrize.is_parametrized(layer, name):
            return False  # computed by a hook, before each forward
    # a subclass of Tensor that is made of others: packed, as by quantising, or sharded
    return not hasattr(layer.weight, "__tensor_flatten__")


@torch.no_grad()
def _weight_and_bias(layer):
    """W (out, in), and b (out,) or None, of a linear layer: read if possible, else measured.

    A linear layer maps zero to b, row j of the identity to b plus column j of W, and minus that row
    to b minus column j: in the difference b cancels. The identity is scaled by 512, so that less of
    W is lost where b is large. What is measured is as exact as the layer's own rounding, and nobody
    has to know how the layer stores W (Conv1D as its transpose).

    The inputs have the dtype of the layer's first floating-point tensor. In a quantised layer,
    where W is stored as codes, that is the bias or the scales; if there is none, it is torch's
    default.
    """
    if _can_be_read(layer):
        return layer.weight, layer.bias
    n_in, n_out = _features(layer)
    tensors = [*layer.parameters(), *layer.buffers(), torch.empty(0)]
    _require_here("its weight", tensors)
    dtype = next(t.dtype for t in tensors if t.dtype in FLOATS)
    x = torch.zeros(1, n_in).to(tensors[0].device, dtype)
    with _no_autocast(x):
        # subtle: the inputs require a gradient, though none is recorded. Given one that requires
        # none, some layers (bitsandbytes' 4-bit, on some CPUs) repack W, for inference only.
        b = layer(x.requires_grad_())
        if not torch.is_tensor(b):
            raise TypeError(
                f"{type(layer).__name__} is not linear: it returns a {type(b).__name__}"
            )
        W = b.new_empty(n_out, n_in)
        for j in torch.arange(n_in).split(256):  # not all at once, to save memory
            rows = 512 * nn.functional.one_hot(j, n_in).to(x)  # (≤ 256, in)
            W[:, j] = (layer(rows.requires_grad_()) - layer((-rows).requires_grad_())).T / 1024
        # Is it linear? Then one more input, −1, 1, −1, ..., gives what W and b do. (All rows are
        # the same now.) What the layer rounds inside, once for each entry of a row of W, now up and
        # now down, adds up like the 2-norm of that row: a sixteenth of that is allowed.
        rows.fill_(1)[:, ::2] = -1
        error = layer(rows) - b - rows.to(b) @ W.T
    if not (abs(error) <= (W.norm(dim=1) + abs(b)) / 16).all():
        raise TypeError(f"{type(layer).__name__} is not linear, or not finite (try eval() first)")
    return W, b[0] if b.any() else None


def _adapter_parameters(model):
    """The parameters of every DeLoRA in a model, in a DeLoRALinear or as a parametrization."""
    return {p for m in model.modules() if isinstance(m, DeLoRA) for p in m.parameters()}


class DeLoRALinear(nn.Module):
    """x ↦ (W + ΔW) x + b: a linear layer and its adapter. Wrapping freezes it, outputs stay.

    Attributes: `base_layer`, what is wrapped; `delora`, the `DeLoRA` of its weight; `dropout`;
    `enabled`, False to leave ΔW out of outputs and `weight`; `in_features`, `out_features`.

    Args:
        base_layer: nn.Linear or what acts like it: any module with in_features and out_features
            whose forward is linear, quantised ones among them, and Hugging Face's Conv1D.
        r, lambda_init, weight_norm, tie_lambda: see `DeLoRA`.
        dropout: probability of dropping an entry of the adapter's input in training, below 1.

    Raises:
        TypeError: base_layer does not act like nn.Linear, is adapted already, or is sharded.
        ValueError: base_layer is not initialised, not finite or not here; or another argument is
            wrong.
    """

    def __init__(
        self,
        base_layer,
        r=8,
        lambda_init=15.0,
        *,
        weight_norm="column",
        tie_lambda=True,
        dropout=0.0,
    ):
        super().__init__()
        _require_number("dropout", dropout, 0, 1)
        if _adapter_parameters(base_layer):
            raise TypeError(f"{type(base_layer).__name__} is adapted already")
        if not _features(base_layer):
            raise TypeError(
                f"{type(base_layer).__name__} is no linear layer: exclude it, or see "
                "examples/anywhere.py"
            )
        weight, _ = _weight_and_bias(base_layer)  # (out, in)
        self.base_layer = base_layer
        self.delora = DeLoRA(weight, r, lambda_init, weight_norm=weight_norm, tie_lambda=tie_lambda)
        self.dropout = nn.Dropout(dropout)
        self.enabled = True
        self.out_features, self.in_features = weight.shape
        self.training = self.dropout.training = base_layer.training
        base_layer.requires_grad_(False)

    def forward(self, x):
        """x (..., in) to (..., out), without forming the (out, in) update."""
        y = self.base_layer(x)  # (..., out)
        if not self.enabled:
            return y
        with _no_autocast(x):  # y's dtype, be it autocast's or the base layer's choice, is kept
            left, right = self.delora.factors()  # (out, 2r), (2r, in)
            # the factors, whose differences were taken in float32, are rounded to y's dtype last
            h = nn.functional.linear(self.dropout(x).to(y.dtype), right.to(y.dtype))  # (..., 2r)
            total = nn.functional.linear(h, left.to(y.dtype))  # (..., out)
            total += y  # in place, to save an array of y's size; others may hold y, so y stays
        return total

    @property
    def weight(self):
        """W + ΔW (out, in), for code that takes the weight and does not call the layer.

        nn.MultiheadAttention does so with its out_proj, nn.TransformerEncoderLayer in evaluation
        with all its layers. If they read W, the adapter would have no effect there. Gradients reach
        A, B and λ. There is no dropout in it. It is formed, and W measured if need be, at each use.
        """
        weight, _ = _weight_and_bias(self.base_layer)
        return self.delora(weight) if self.enabled else weight

    @property
    def bias(self):
        """b (out,) of the base layer, or None, for the same code."""
        return _weight_and_bias(self.base_layer)[1]

    def merged(self):
        """A new frozen nn.Linear with weight W + ΔW in W's dtype. It shares no tensor with this.

        Where W is measured, as of a Conv1D or a quantised layer, it has the dtype and the exactness
        of the measurement. The weight is (out, in) also for a Conv1D.
        """
        weight, bias = _weight_and_bias(self.base_layer)
        linear = nn.Linear(self.in_features, self.out_features, device="meta")
        linear.weight = _frozen(self.delora(weight))
        linear.bias = None if bias is None else _frozen(bias)
        return linear.train(self.training)


# ----------------------------------------------------------------------------------------------
# 3. A model: inject, merge, train, save, load
# ----------------------------------------------------------------------------------------------


def _modules(model, kind=nn.Module):
    """{name: module} of that kind, under every name a module has. Wrapped layers are left out."""
    wrapped = {m.base_layer for m in model.modules() if isinstance(m, DeLoRALinear)}
    return {
        name: m
        for name, m in model.named_modules(wrapped, remove_duplicate=False)  # not entered
        if isinstance(m, kind)
    }


def _require_some(adapters):
    if not adapters:
        raise ValueError("there is no adapter here: none was injected or loaded, or all are merged")
    return adapters


def _replace(model, new):
    """Put new[m] in the place of every module m, wherever model holds it."""
    if model in new:
        raise ValueError(f"{type(model).__name__} is the model itself, and nothing holds it")
    for parent in list(model.modules()):  # listed first, since an adapter holds what it replaces
        for name, child in parent._modules.items():
            if child in new:
                setattr(parent, name, new[child])


@contextmanager
def _adapting(model, plan):
    """Adapt the layers in plan, {layer: (its name, arguments of DeLoRALinear)}; yield the adapters.

    If the body of the context then raises nothing, all but the adapters is frozen. If something
    goes wrong, in the body or before, the model is as it was.
    """
    trainable = [p for p in model.parameters() if p.requires_grad]
    new = {}
    try:
        for layer, (name, arguments) in plan.items():
            try:
                new[layer] = DeLoRALinear(layer, **arguments)
            except Exception as error:  # type and traceback stay
                error.args = [f"{name or 'the model itself'}: {error}"]
                raise
        _replace(model, new)
        yield new
    except BaseException:
        _replace(model, {adapter: adapter.base_layer for adapter in new.values()})
        for p in trainable:
            p.requires_grad = True
        raise
    for p in set(model.parameters()) - _adapter_parameters(model):
        p.requires_grad = False


def _matching(patterns, modules, linear):
    """The names that a list (of any modules' names) or a string (for linear layers) stands for."""
    if patterns == "all-linear":
        return linear
    if isinstance(patterns, str):
        try:
            found = {patterns: {name for name in linear if re.fullmatch(patterns, name)}}
        except re.error as error:
            raise ValueError(f"{patterns!r} is no regular expression: {error}") from error
    else:
        found = {p: {name for name in modules if f".{name}".endswith(f".{p}")} for p in patterns}
    for pattern, names in found.items():
        if not names:
            raise ValueError(
                f"{pattern!r} matches nothing. In a list it is a name, or its end from a dot on; "
                "as a string it is 'all-linear' or a regular expression for the whole name of a "
                f"linear layer. Those here end in {sorted({n.rpartition('.')[2] for n in linear})}"
            )
    return set().union(*found.values())


def inject(model, target_modules, r=8, lambda_init=15.0, *, exclude=(), **options):
    """Replace the target layers by DeLoRALinear, in place, and freeze every other parameter.

    Args:
        model: any module, with its pretrained weights: w is measured now. (nn.Linear layers of a
            model that is wholly on the meta device are adapted there, and
            `load_state_dict(..., assign=True)` fills them.)
        target_modules: a list of names. Each is a module's whole name, or its end from a dot on:
            "proj" means "layers.0.proj", not "layers.0.q_proj". Or a string: a regular expression
            for the whole name, of linear layers that have no adapter and contain no other linear
            layer; "all-linear" is all of those. A layer with several names gets one adapter.
        exclude: a list or a string, as above: what to leave alone, with all that it contains.
        r, lambda_init, options: arguments of `DeLoRALinear`.

    A new head is frozen too: exclude it if it is a target, and unfreeze it afterwards by
    head.requires_grad_(True).

    Returns:
        The new adapters by name. Adapters from before stay as they were, trainable or not.

    Raises:
        TypeError, ValueError: a name matches nothing, a layer cannot be adapted, an argument is
            wrong. (A layer that is measured may raise something else.) The message names the module
            and the value, and the model is as it was.

    Warns if a weight is zero: then w is zero too, and the adapter has no effect and no gradient.
    """
    modules = _modules(model)
    linear = []
    for name, module in modules.items():
        layers = [part for part in module.modules() if _features(part)]
        # linear itself, without another linear layer in it, and not adapted
        if layers == [module] and not _adapter_parameters(module):
            linear.append(name)
    names = _matching(target_modules, modules, linear)
    left_alone = {
        part for name in _matching(exclude, modules, linear) for part in modules[name].modules()
    }
    plan = {
        module: (name, dict(options, r=r, lambda_init=lambda_init))
        for name, module in modules.items()
        if name in names and module not in left_alone
    }
    if not plan:
        raise ValueError(f"target_modules={target_modules!r}, exclude={exclude!r} leave no layer")

    on_meta = all(p.is_meta for p in model.parameters())  # as a whole
    with _adapting(model, plan) as new:
        adapters = {name: new[m] for name, m in modules.items() if m in new}
        for name, adapter in adapters.items():
            if _adapter_parameters(adapter.base_layer):
                raise ValueError(f"{name} contains another target")  # a wrapper and what is in it
            if not on_meta:
                _require_here(name, [adapter.delora.w])
                if adapter.delora.norm_bound() == 0:
                    warnings.warn(f"{name}: W is zero, so ΔW stays zero. Use weight_norm=None")
    return adapters


def merge(model):
    """Replace every DeLoRALinear by an nn.Linear of weight W + ΔW, in place.

    The new layers have tensors of their own: where W was tied to an embedding, the embedding keeps
    W, and the two are no longer tied until `unmerge`. (What ties them again meanwhile, as Hugging
    Face's `tie_weights` does, throws W + ΔW away.) Disabled adapters are merged as well.

    A DeLoRA that is registered as a parametrization is merged by torch's own
    `remove_parametrizations(module, name, leave_parametrized=True)`. That writes into W itself: if
    W is tied to a layer with an adapter, `merge` comes first, or that layer's W changes too.

    Returns:
        The adapters by name, for `unmerge`.

    Raises:
        TypeError, ValueError: there is no DeLoRALinear, one is sharded or on the meta device, or a
            merged weight is not finite in its dtype. The message names the layer, and the model is
            as it was.
    """
    adapters = _require_some(_modules(model, DeLoRALinear))
    merged = {}
    for name, adapter in adapters.items():
        _require_here(name, adapter.parameters())
        merged[adapter] = adapter.merged()
        if not merged[adapter].weight.isfinite().all():
            raise ValueError(f"{name}: W + ΔW has entries that are not finite")
    _replace(model, merged)
    return adapters


def unmerge(model, adapters):
    """Put back what `merge` took out: the same objects, every bit as before.

    They come to the device and the training mode that the merged layers have now.

    Raises:
        ValueError: a name has no adapter here, or no nn.Linear of its size in the model, which is
            as it was.
    """
    modules = _modules(model)
    back = {}
    for name, adapter in adapters.items():
        merged = modules.get(name)
        if (
            type(merged) is not nn.Linear
            or not isinstance(adapter, DeLoRALinear)
            or _features(merged) != _features(adapter)
        ):
            raise ValueError(
                f"{name}: there is no merged layer to put this {type(adapter).__name__} back for "
                f"(is it unmerged already?), but {merged}"
            )
        back[merged] = adapter
    _replace(model, back)
    for merged, adapter in back.items():
        adapter.train(merged.training).to(merged.weight.device)


@contextmanager
def disabled(model):
    """Within this context no DeLoRALinear acts, as if nothing had been injected.

    Parametrizations stay on. Contexts may be nested.
    """
    before = {
        adapter: adapter.enabled
        for adapter in _require_some(_modules(model, DeLoRALinear)).values()
    }
    try:
        for adapter in before:
            adapter.enabled = False
        yield
    finally:
        for adapter, enabled in before.items():
            adapter.enabled = enabled


def param_groups(model, lr, lambda_lr=None, weight_decay=0.0):
    """Two groups for an optimiser: all that is trainable but λ, and λ at lambda_lr (None: at lr).

    Both groups carry their weight decay, so that the optimiser's own default plays no part. λ has
    none: decay would pull it to zero. On A and B it is no regulariser, since ΔW does not see their
    lengths. It changes how fast they turn. A step of SGD is at right angles to a_i or b_i, so it
    makes them longer, and a longer vector is turned less by the same step. Their turning slows down
    by itself; weight decay keeps them short, and turning.

    Raises:
        ValueError: there is no DeLoRA; or a weight under one is trainable, and W would move too.

    Warns if adapters are stored in 16 bits, where small steps are lost in rounding.
    """
    _require_some(_adapter_parameters(model))
    strengths = {}  # {λ: its adapter's name}: each λ once, in the order of the model
    for name, module in model.named_modules():
        for delora in module.children():
            if not isinstance(delora, DeLoRA):
                continue
            # W is in the base_layer of a DeLoRALinear; torch calls it original if parametrized
            for leaf, p in module.named_parameters():
                is_weight = leaf.startswith(("base_layer", "original")) and "bias" not in leaf
                if p.requires_grad and is_weight:
                    raise ValueError(
                        f"{name}: {leaf} is trainable, and W would move beside ΔW. Freeze it, or "
                        f"train it without an adapter: inject(..., exclude=[{name!r}])"
                    )
            if delora.A.dtype.itemsize < 4:
                warnings.warn("adapters in 16 bits lose small steps: cast first, then inject")
            if delora.lam.requires_grad:
                strengths[delora.lam] = name
    others = [p for p in model.parameters() if p.requires_grad and p not in strengths]
    return [
        {"params": others, "lr": lr, "weight_decay": weight_decay},
        {"params": [*strengths], "lr": lr if lambda_lr is None else lambda_lr, "weight_decay": 0.0},
    ]


def adapter_state_dict(model):
    """A copy of the tensors of every DeLoRA, and of every other parameter that is trainable.

    Raises:
        TypeError, ValueError: there is no DeLoRA, or a tensor is sharded or on the meta device.
    """
    model.state_dict()  # not for its value: FSDP2 then shards again what a forward pass gathered
    adapted = _require_some(_adapter_parameters(model))
    state = {}
    for key, p in model.named_parameters(remove_duplicate=False):
        if p.requires_grad or p in adapted:
            _require_here(key, [p])
            state[key] = p.detach().clone()
    return state


@torch.no_grad()
def load_adapter(model, state_dict):
    """Load what `adapter_state_dict` returned, into a pretrained model or into an adapted one.

    Linear layers that have no adapter yet get one: names, ranks and modes are read from the tensors
    (dropout is 0). Every adapter that the model has already must be in state_dict, too. Everything
    is frozen but the adapters, whatever else state_dict holds: to train on, unfreeze a new head
    again. What was not trainable in an adapter before is not afterwards.

    Returns:
        Every DeLoRALinear of the model by name.

    Raises:
        TypeError, ValueError: a tensor of state_dict is unknown, of another shape, sharded, on the
            meta device (or the model's is), or differs from one that the model ties it to; or an
            adapter's is missing, not floating-point or not finite. The message has the key, and the
            model is as it was.

    Warns if the w of a DeLoRALinear is not the norms that W has here, to 5 % of their mean (20 % if
    W is measured, as when quantised): the adapter was made for another W.
    """
    if not isinstance(state_dict, dict):
        raise TypeError(f"expected a dict, as of torch.load(path), got {state_dict!r:.99}")
    plan = {}
    for name, layer in _modules(model).items():
        A = state_dict.get(f"{name}.delora.A")
        if getattr(A, "ndim", 0) == 2 and not _adapter_parameters(layer):
            plan[layer] = name, {"r": len(A), "tie_lambda": f"{name}.delora.lam0" not in state_dict}

    with _adapting(model, plan):
        here = model.state_dict(keep_vars=True)  # the parameters themselves: tied names share one
        for key in state_dict:
            if key not in here:
                raise ValueError(
                    f"{key}: the model has nothing of that name. A new adapter needs a linear "
                    f"layer and {key.rpartition('.')[0]}.A; a parametrization is registered first. "
                    "'module.' comes from DistributedDataParallel, '_orig_mod.' from "
                    "torch.compile: save what is inside. 'lora_' is LoRA's, 'base_model.model.' is "
                    "PEFT's: see examples/peft_checkpoints.py"
                )
        adapted = _require_some(_adapter_parameters(model))
        values = {}  # {parameter or buffer: what it will be}. Nothing is written before all is seen
        for key, p in here.items():
            if not torch.is_tensor(p):
                continue
            value = state_dict.get(key, p)
            if not torch.is_tensor(value) or value.shape != p.shape:
                raise ValueError(
                    f"{key}: {getattr(value, 'shape', value)} in the file, {p.shape} here"
                )
            if key in state_dict:
                _require_here(key, [p, value])
            elif p in adapted:
                raise ValueError(f"{key} is missing")
            if p in adapted and (value.dtype not in FLOATS or not value.isfinite().all()):
                raise TypeError(f"{key} is no tensor of finite floating-point numbers")
            first = values.setdefault(p, value)  # by the first of p's names
            if first is not value and (first.to(value) != value).any():
                raise ValueError(f"{key}: tied in the model, not in the checkpoint")
        adapters = _modules(model, DeLoRALinear)
        for name, adapter in adapters.items():
            w = values[adapter.delora.w].cpu()
            likely = "column"  # no tensor says what weight_norm was, but w tells
            if (w == w[0]).all():
                likely = None if w[0] == 1 else "frobenius"
            weight, _ = _weight_and_bias(adapter.base_layer)
            # A quantised W, which is measured, is further from the W that was adapted elsewhere.
            allowed = 0.05 if _can_be_read(adapter.base_layer) else 0.2
            for weight_norm in ("column", likely):  # the norms of columns may be equal, too
                own = _weight_norms(values.get(weight, weight), weight_norm).cpu()  # (in,)
                if (abs(w - own) <= allowed * own.mean()).all():
                    break
            else:
                warnings.warn(
                    f"{name}: w has norm {w.norm():.4g} in the checkpoint, {own.norm():.4g} here: "
                    "another base model, or weights were loaded or merged after it was made"
                )
            adapter.delora.weight_norm = weight_norm
        for p, value in values.items():
            p.copy_(value)
    return adapters
