"""DeLoRA: Decoupling Angles and Strength in Low-rank Adaptation, in one file.

Bini, Girrbach, Akata, ICLR 2025, https://arxiv.org/abs/2503.18225. "Eq." below is an equation of that paper.

LoRA learns y = (W + BA) x + b, where W is frozen and B, A are thin. How far the layer has moved from W is however large
the product BA has grown, so one learning rate steers both where the update points and how strong it is: set too high,
it destroys the model. DeLoRA separates the two. BA is a sum of r rank-one components b_i a_iᵀ; dividing each by
‖b_i‖‖a_i‖ leaves directions only ("angles"), and one learnable number λ per matrix is the strength:

    ΔW = (λ / r) · (B Ξ A − B₀ Ξ₀ A₀) · diag(w)                 y = (W + ΔW) x + b                (Eq. 8, 9, 15)

    symbol   in the code        shape              meaning
    W        base_layer.weight  (out, in)          pretrained weight, frozen
    A, B     delora_A, _B       (r, in), (out, r)  trainable; only their directions matter
    a_i      A[i, :]            (in,)              with b_i: the i-th rank-one component, b_i a_iᵀ
    b_i      B[:, i]            (out,)
    Ξ        never stored       (r, r)             diagonal, Ξ_ii = 1 / (‖a_i‖ ‖b_i‖)             (Eq. 5)
    λ        delora_lambda      (1,)               trainable strength
    A₀, B₀   delora_A0, _B0     as A, B            the frozen copy, taken at the start            (Eq. 9)
    w        delora_w_norm      (in,)              weight-norm scaling, measured once from W      (Eq. 8)
    λ₀       delora_lambda0     (1,)               λ of the frozen copy, only if tie_lambda=False (Eq. 9)
    -        delora_quantised   (1,)               a mark for the checkpoint, only if W is quantised

The bound. B Ξ A is a sum of r matrices of norm one, so (λ/r) B Ξ A has norm at most |λ| (Eq. 6, 7), in Frobenius and
even in nuclear norm ‖·‖_* (the sum of the singular values), whatever an optimiser does to A and B. The frozen term
obeys the same bound, and diag(w) multiplies a norm by max_j w_j at most, hence

    ‖ΔW‖_F ≤ ‖ΔW‖_* ≤ 2 |λ| max_j w_j        (if tie_lambda=False: |λ| + |λ₀| in place of 2 |λ|)

It is attained, in both norms, when all r components coincide, those of the frozen copy are their negatives, λλ₀ ≥ 0,
and the a_i are zero wherever w is not at its largest. With r = 1 and a constant w (always so unless "column"), turning
a to −a₀ does it. With r > 1 the frozen components, drawn at random, do not coincide, and training stays below the
bound.

Why λ cannot see the scale of A and B: rescaling a_i or b_i by c > 0 changes no unit vector, hence neither ΔW nor its
derivative in λ (which, tied, is ΔW / λ), hence not ∂L/∂λ. For the same reason the gradient of a_i is orthogonal to a_i,
and that of b_i to b_i: it turns a vector and cannot ask for another length. (What length does set is how far a step of
an optimiser turns the vector: see `param_groups`.)

The zero start. The first output must be the pretrained model's. B = 0 would give that too, but zero has no direction,
and any B that has left it, by however small a step, is at full strength. (This file gives a zero vector a zero
gradient: it would never leave.) So A and B start at random and their initial product is subtracted. Two rounded
products need not cancel; but with Â for A with unit rows, B̂ for B with unit columns, "," beside and ";" below, they
telescope:

    B̂Â − B̂₀Â₀  =  (B̂ − B̂₀) Â + B̂₀ (Â − Â₀)  =  [B̂ − B̂₀ , B̂₀] · [Â ; Â − Â₀]

At the start every product has a factor that is exactly zero, so the adapted layer equals the pretrained one bit for bit
in every dtype, as long as λw and x do not overflow it, and the first step leaves it by an amount proportional to the
learning rate. (Tied, λ has no gradient before that: ΔW = 0 at any λ.) It is also cheap: with λ/r and w folded in, the
two brackets are an ordinary LoRA pair of rank 2r (see `factors`).

Where the paper and its authors' released code differ, and what this file does:
1. ‖W‖ in Eq. 8 reads as one number; their code takes the norm of every column. `weight_norm="column"`, the default,
   is the code's, "frobenius" the equation's; None leaves w = 1 (Eq. 7).
2. Eq. 9 freezes λ₀ along with A₀ and B₀; their code multiplies the frozen copy by the current λ. `tie_lambda=True`,
   the default, is the code's: λ → 0 then gives back the pretrained model. `tie_lambda=False` is the equation's.
3. The paper states the radius as λ‖W‖. Around the pretrained W the frozen copy counts too: twice that, as above.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

__all__ = ["DeLoRALinear", "inject", "merge", "unmerge", "disabled", "param_groups",
           "adapter_state_dict", "load_adapter"]

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def _require(ok: bool, message: str, error: type[Exception] = ValueError) -> None:
    if not ok:
        raise error(message)


# ------------------------------------------------------------------------------------------------ what is given: W, b


def _features(layer: nn.Module | None) -> tuple[int, int] | None:
    """(in, out) of a layer that acts like nn.Linear and may be adapted; None for anything else, adapters included."""
    conv1d = type(layer).__name__ == "Conv1D" and hasattr(layer, "nf")  # Hugging Face's, which stores W as (in, out)
    size = tuple(layer.weight.shape) if conv1d else tuple(getattr(layer, f"{n}_features", None) for n in ("in", "out"))
    return size if all(isinstance(n, int) for n in size) and not hasattr(layer, "delora_A") else None


def _weight_and_bias(layer: nn.Module, spare: Tensor | None) -> tuple[Tensor, Tensor | None, bool]:
    """The weight (out, in), the bias (out,) or None, and whether it is quantised, of a layer that acts like nn.Linear.

    Where they cannot be read (the layer has a forward of its own, or packs its weight into a tensor subclass) they are
    measured: a linear layer maps zero to its bias, and row j of the identity to column j of its weight plus the bias.
    The identity is scaled by 1024, so that the sum with a bias in a narrow dtype rounds the weight that much less. Its
    dtype is that of the layer's weight or, if that is stored as codes, of spare; a bias or scales may have another one.
    """
    tensors = [*layer.parameters(), *layer.buffers()]
    _require(not any(hasattr(t, "full_tensor") for t in tensors), "sharded: adapt or merge it unsharded", TypeError)
    transposed = type(layer).__name__ == "Conv1D" and hasattr(layer, "nf")
    if (transposed or type(layer).forward is nn.Linear.forward) and not hasattr(layer.weight, "__tensor_flatten__"):
        return layer.weight.T if transposed else layer.weight, layer.bias, False  # (out, in), (out,)
    (n_in, n_out), floats = _features(layer), [t for t in tensors if t.dtype in FLOATS]
    whole = [t for t in floats if t.numel() == n_in * n_out]  # W, as numbers or packed into a tensor subclass
    first = next(t for t in (*whole, spare, *floats, torch.empty(0)) if t is not None)
    like = {"device": [*tensors, first][0].device, "dtype": first.dtype}
    with torch.no_grad(), torch.autocast(like["device"].type, enabled=False):
        # subtle: an input without requires_grad makes bitsandbytes repack its weight on some CPUs, for inference only
        bias, y = layer(torch.tensor([[0.0], [-2.0]], **like).repeat(1, n_in).requires_grad_())  # (out,) each
        blocks = (1024 * torch.eye(256, n_in, **like).roll(j, dims=1)[: n_in - j] for j in range(0, n_in, 256))
        weight = torch.cat([(layer(rows.requires_grad_()) - bias).T / 1024 for rows in blocks], dim=1)  # (out, in)
    quantised = all(hasattr(t, "__tensor_flatten__") for t in whole)  # W is nowhere in plain floating-point numbers
    # A quantised layer may round inside to fewer bits than it returns, and not say so.
    slack = 1 / 16 if quantised else 8 * torch.finfo(bias.dtype).eps + n_in * 2**-23
    close = (y - bias + 2 * weight.sum(1)).abs() <= slack * (2 * weight.abs().sum(1) + bias.abs())  # (out,)
    _require(close.all(), f"{type(layer).__name__} is not linear, or not finite", TypeError)
    return weight, bias if bias.any() else None, quantised


# ------------------------------------------------------------------------------------------------ the layer


def _unit(v: Tensor, dim: int) -> Tensor:
    """v / ‖v‖ along dim. Zero has no direction: it stays zero, and its gradient is zero.

    Dividing by the largest entry first keeps the squares in range, so that any finite v is right. That divisor is held
    constant, since v / ‖v‖ does not depend on it. No epsilon: what is added to the norm is 1 for zero, 0 for the rest.
    """
    largest = v.detach().abs().amax(dim, keepdim=True)
    v = v / largest.masked_fill((zero := largest == 0), torch.inf)
    return v / (torch.linalg.vector_norm(v, dim=dim, keepdim=True) + zero)


class DeLoRALinear(nn.Module):
    """x ↦ (W + ΔW) x + b, with rank ΔW ≤ 2r and ‖ΔW‖_* ≤ `norm_bound()` (Eq. 15).

    At construction base_layer is frozen, A and B are drawn as the authors draw them (uniform, variance 1 / (3 fan_in))
    and ΔW is exactly zero. Adapter parameters are float32, or float64 on a float64 base; ΔW is computed in that
    precision whatever the base's.

    Args:
        base_layer: nn.Linear, or a layer that acts like one: Hugging Face's Conv1D, or a quantised layer (any module
            that has in_features and out_features and a linear forward).
        r: number of rank-one components.
        lambda_init: λ at the start, in units of w. With "column", λ = 15 on 768 columns of equal norm lets the learned
            term reach 15/√768 ≈ 0.54 ‖W‖_F; with "frobenius" the same strength is λ ≈ 0.54.
        weight_norm: "column" (w_j = ‖W[:, j]‖), "frobenius" (w_j = ‖W‖_F for every j) or None (w_j = 1).
        tie_lambda: True scales the frozen copy by the current λ, False by the initial one (Eq. 9).
        dropout: probability of dropping an entry of the adapter's input in training. `weight` knows no dropout.
        dtype: of x, for a quantised layer, whose codes do not tell; `weight` has it too. None is that of a bias, scales
            or torch's default. `inject` and `load_adapter` pass that of the model's first floating-point parameter.

    Raises:
        TypeError: base_layer does not act like nn.Linear, or is adapted already.
        ValueError: base_layer is empty, uninitialised or not finite; or another argument is not as above: r an int ≥ 1,
            lambda_init in [1e-30, 1e30), dropout in [0, 1).
    """

    def __init__(self, base_layer: nn.Module, r: int = 8, lambda_init: float = 15.0, *, tie_lambda: bool = True,
                 weight_norm: str | None = "column", dropout: float = 0.0, dtype: torch.dtype | None = None):
        super().__init__()
        kind, size = type(base_layer).__name__, _features(base_layer)
        _require(size is not None, f"{kind} does not act like nn.Linear, or is adapted already", TypeError)
        _require(min(size) > 0, f"{kind} is empty or not initialised yet: {base_layer}")
        _require(type(r) is int and r > 0, f"r must be a positive int, got {r!r}")
        for name, value, low, high in (("lambda_init", lambda_init, 1e-30, 1e30), ("dropout", dropout, 0, 1)):
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            _require(number and low <= value < high, f"{name} must be a number in [{low}, {high}), got {value!r}")
        weight, _, quantised = _weight_and_bias(base_layer, dtype and torch.empty(0, dtype=dtype))  # (out, in)
        self.out_features, self.in_features = n_out, n_in = weight.shape
        like = {"dtype": torch.promote_types(weight.dtype, torch.float32), "device": weight.device}
        squares = torch.zeros(64, n_in, **like)  # W is read in blocks of rows: vector_norm by columns is far slower
        for rows in () if weight.is_meta else weight.detach().split(len(squares)):  # (≤ 64, in)
            squares[: len(rows)].addcmul_(rows, rows)
        column = squares.sum(0).sqrt()  # (in,)
        _require(column.is_meta or column.isfinite().all(), f"the weight is not finite, or its norms are not: {kind}")
        norms = {"column": column, "frobenius": column.norm().repeat(n_in), None: torch.ones_like(column)}  # (in,) each
        _require(weight_norm in [*norms], f"weight_norm must be 'column', 'frobenius' or None, got {weight_norm!r}")

        # What is frozen is a parameter too, not a buffer: whatever casts, moves or shards A must do the same to A₀.
        self.delora_A = nn.Parameter(nn.init.kaiming_uniform_(torch.empty(r, n_in, **like), a=5**0.5))  # (r, in)
        self.delora_B = nn.Parameter(nn.init.kaiming_uniform_(torch.empty(n_out, r, **like), a=5**0.5))  # (out, r)
        self.delora_lambda = nn.Parameter(torch.full((1,), float(lambda_init), **like))  # (1,)
        A0, B0, strength0 = (nn.Parameter(p.clone(), requires_grad=False) for p in [*self.parameters()])
        self.delora_A0, self.delora_B0, self.delora_lambda0 = A0, B0, None if tie_lambda else strength0
        self.delora_w_norm = nn.Parameter(norms[weight_norm], requires_grad=False)  # (in,)
        # A mark for the checkpoint. It also keeps the dtype of x, which codes do not tell, and follows model.to(dtype).
        self.delora_quantised = nn.Parameter(weight.new_ones(1), requires_grad=False) if quantised else None  # (1,)
        self.base_layer, self.dropout, self.enabled = base_layer.requires_grad_(False), nn.Dropout(dropout), True
        self.training = self.dropout.training = base_layer.training

    def factors(self) -> tuple[Tensor, Tensor]:
        """(left (out, 2r), right (2r, in)), an ordinary LoRA pair: ΔW = left @ right. The whole equation is here.

        ΔW = [(λB̂ − λ₀B̂₀) Â + λ₀B̂₀ (Â − Â₀)] diag(w) / r, with λ₀ = λ if tied. [λB̂ − λ₀B̂₀, λ₀B̂₀] is written
        λ [B̂ − B̂₀, B̂₀] + (λ₀ − λ) [−B̂₀, B̂₀]: then only equal numbers are subtracted at the start. (A compiler may fuse
        a multiplication into a subtraction that follows, and leave one of two equal products unrounded. It may also sum
        two norms in two orders: hence one array for A and A₀, one for B and B₀.) The size of w goes to the left factor,
        so that |right x| ≤ 2 ‖x‖, which only an x of the dtype's last powers can overflow.
        """
        wide = torch.promote_types(self.delora_A.dtype, torch.float32)
        # Unit rows and columns from here on. What is frozen is detached: a user may have declared everything trainable.
        A, A0 = _unit(torch.stack((self.delora_A.to(wide), self.delora_A0.detach())), dim=2)  # (r, in) each
        B, B0 = _unit(torch.stack((self.delora_B.to(wide), self.delora_B0.detach())), dim=1)  # (out, r) each
        w = self.delora_w_norm.detach().to(wide)  # (in,)
        peak = w.max().clamp(min=torch.finfo(wide).tiny)  # ()
        lam, scale = self.delora_lambda.to(wide), peak / len(A)  # (1,), ()
        left = lam * scale * torch.cat((B - B0, B0), dim=1)  # (out, 2r)
        if self.delora_lambda0 is not None:
            left = left + (self.delora_lambda0.detach() - lam) * scale * torch.cat((-B0, B0), dim=1)
        return left, torch.cat((A, A - A0)) * (w / peak)  # (out, 2r), (2r, in)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in), of any shape but nested, to (..., out), without ever forming the (out, in) update."""
        y = self.base_layer(x)  # (..., out)
        if not self.enabled:
            return y
        left, right = self.factors()
        h = nn.functional.linear(self.dropout(x), right.to(x.dtype)).to(y.dtype)  # (..., 2r)
        with torch.autocast("cpu" if x.is_meta else x.device.type, enabled=False):  # which would round a wider y
            # One addmm makes one array of y's size, a product and a sum make two. Not in place: y is the base's.
            return torch.addmm(y.reshape(-1, y.shape[-1]), h.reshape(-1, len(right)), left.to(y.dtype).T).view(y.shape)

    def delta_weight(self) -> Tensor:
        """ΔW (out, in), in float32 or wider, with gradients."""
        with torch.autocast("cpu" if self.delora_A.is_meta else self.delora_A.device.type, enabled=False):
            return torch.matmul(*self.factors())  # (out, in)

    @property
    def weight(self) -> Tensor:
        """W + ΔW (out, in), summed in ΔW's precision and rounded once to W's; with gradients, so that code which reads
        the weight instead of calling the layer adapts too."""
        weight, _, _ = _weight_and_bias(self.base_layer, self.delora_quantised)  # (out, in)
        return (weight + self.delta_weight()).to(weight.dtype) if self.enabled else weight

    bias = property(lambda self: _weight_and_bias(self.base_layer, self.delora_quantised)[1])  # (out,) or None

    def norm_bound(self) -> float:
        """2 |λ| max_j w_j if tied, else (|λ| + |λ₀|) max_j w_j: at least ‖ΔW‖_* up to rounding (Eq. 6 to 9)."""
        lambda0 = self.delora_lambda if self.delora_lambda0 is None else self.delora_lambda0
        return (abs(self.delora_lambda.item()) + abs(lambda0.item())) * self.delora_w_norm.max().item()

    def merged(self) -> nn.Linear:
        """A new frozen nn.Linear with weight W + ΔW, in the base's dtype. It shares no tensor with this layer.

        Its weight is (out, in) also where the base layer is a Conv1D, whose weight is (in, out).
        """
        weight, bias, _ = _weight_and_bias(self.base_layer, self.delora_quantised)  # (out, in), (out,)
        linear = nn.Linear(self.in_features, self.out_features, device="meta").train(self.training)
        linear.weight = nn.Parameter((weight + self.delta_weight()).to(weight.dtype).contiguous(), requires_grad=False)
        linear.bias = None if bias is None else nn.Parameter(bias.clone(), requires_grad=False)
        return linear


# ------------------------------------------------------------------------------------------------ names in a model


def _modules(model: nn.Module) -> dict[str, nn.Module]:
    """Every module by name, a shared one under each of its names; but nothing that is inside an adapter."""
    modules = dict(model.named_modules(remove_duplicate=False))
    inside = tuple(f"{name}.".removeprefix(".") for name, module in modules.items() if isinstance(module, DeLoRALinear))
    return {name: module for name, module in modules.items() if not name or not name.startswith(inside)}


def _adapters(model: nn.Module) -> dict[str, DeLoRALinear]:
    found = {name: module for name, module in _modules(model).items() if isinstance(module, DeLoRALinear)}
    _require(found, f"{type(model).__name__} has no DeLoRALinear: nothing was injected, or it is merged")
    return found


_ours = re.compile(r"(.*\.)?delora_[^.]*").fullmatch  # whether a parameter of that name belongs to an adapter


def _matching(patterns: Iterable[str] | str, modules: Mapping[str, nn.Module], free: list[str]) -> set[str]:
    """The names that patterns mean: in a list, of any modules; by a regular expression, of the layers in free."""
    string = isinstance(patterns, str)
    try:
        ends = {patterns: patterns} if string else {p: rf"(.*\.)?{re.escape(p)}" for p in patterns}
        found = {p: {name for name in (free if string else modules) if re.fullmatch(ends[p], name)} for p in ends}
    except (TypeError, re.error) as error:
        raise TypeError(f"expected a list of module names or a regular expression, got {patterns!r}") from error
    for pattern, matches in found.items():
        _require(matches, f"{pattern!r}{' (a regular expression)' * string} matches none of {', '.join(free)}")
    return set().union(*found.values())


def _replace(model: nn.Module, new: Mapping[nn.Module, nn.Module]) -> dict[str, nn.Module]:
    """Put new[m] in the place of every m in model, under all of m's names. Returns the new modules by name."""
    placed = {name: new[module] for name, module in _modules(model).items() if module in new}
    _require("" not in placed, f"the model itself is the {type(model).__name__} to replace, and nothing holds it")
    for name, module in placed.items():
        setattr(model.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2], module)
    return placed


# ------------------------------------------------------------------------------------------------ inject


def _build(model: nn.Module, plan: Mapping[str, dict]) -> dict[nn.Module, DeLoRALinear]:
    """An adapter for every module named in plan, {name: arguments of DeLoRALinear}. The model stays as it is."""
    modules, built = _modules(model), {}
    dtype = next((p.dtype for name, p in model.named_parameters() if p.dtype in FLOATS and not _ours(name)), None)
    with ExitStack() as stack:  # DeLoRALinear freezes its base layer, but nothing may change before all are built
        for p in model.parameters():
            stack.callback(setattr, p, "requires_grad", p.requires_grad)
        for name, arguments in plan.items():
            try:
                built[modules[name]] = DeLoRALinear(modules[name], **{"dtype": dtype} | arguments)
            except (TypeError, ValueError, RuntimeError, AttributeError) as error:
                raise type(error)(f"{name or 'the model itself'}: {error}") from error
    return built


def inject(model: nn.Module, target_modules: Iterable[str] | str, r: int = 8, lambda_init: float = 15.0, *,
           exclude: Iterable[str] | str = (), **options) -> dict[str, DeLoRALinear]:
    """Replace the target layers by DeLoRALinear, in place, and freeze every parameter that is not an adapter's.

    Args:
        model: any module. A layer registered under several names becomes one adapter under all of them.
        target_modules: a list of names, each a module's whole dotted name or its end at a dot ("proj" means
            "layers.0.proj", not "layers.0.q_proj"); or a regular expression for the whole name, which chooses among
            the layers that act like nn.Linear, are not adapted yet and contain no other; or "all-linear", all of those.
        exclude: names or a regular expression, as above, of what to leave alone, with all that it contains.
        r, lambda_init, options: arguments of DeLoRALinear.

    Returns:
        The new adapters by name. Adapters from before stay as they were, trainable or not.

    Raises:
        TypeError, ValueError: a name matches nothing, a layer cannot be adapted, an argument is wrong. The message
            names the module and the value, and the model is as it was.
    """
    modules = _modules(model)
    free = [n for n, m in modules.items() if _features(m) and sum(hasattr(k, "in_features") for k in m.modules()) < 2]
    names = _matching(".*" if target_modules == "all-linear" else target_modules, modules, free)
    excluded = {module for name in _matching(exclude, modules, free) for module in modules[name].modules()}
    chosen = {module: name for name, module in modules.items() if name in names and module not in excluded}
    for module, name in chosen.items():
        _require(sum(k in chosen for k in module.modules()) == 1, f"{name or 'the model'} contains another target")
    _require(chosen, f"target_modules={target_modules!r} and exclude={exclude!r} leave no layer to adapt")
    added = _replace(model, _build(model, dict.fromkeys(chosen.values(), dict(options, r=r, lambda_init=lambda_init))))
    for name, p in model.named_parameters():
        p.requires_grad = p.requires_grad and bool(_ours(name))
    return added


# ------------------------------------------------------------------------------------------------ merge, disable


def merge(model: nn.Module) -> dict[str, DeLoRALinear]:
    """Replace every adapter by an nn.Linear of weight W + ΔW, in place. Returns the adapters by name, for `unmerge`.

    The new layers have tensors of their own: where W was tied to an embedding, the embedding stays as it was, and the
    two are no longer tied until `unmerge`. (Whatever ties them again in between throws the merged weight away.)

    Raises:
        ValueError: there is no adapter, or a merged weight is not finite in its dtype. The model is as it was.
        TypeError: the model is sharded (FSDP2).
    """
    adapters = _adapters(model)
    merged = {adapter: adapter.merged() for adapter in set(adapters.values())}
    for name, adapter in adapters.items():
        _require(merged[adapter].weight.isfinite().all(), f"{name}: W + ΔW has entries that are not finite")
    _replace(model, merged)
    return adapters


def unmerge(model: nn.Module, adapters: Mapping[str, DeLoRALinear]) -> None:
    """Put back what `merge` took out: the same objects, now on the device and in the training mode of the merged ones.

    Raises:
        ValueError: a name has no adapter to put back, or no merged layer to take out. The model is as it was.
    """
    modules = _modules(model)
    for name, old, new in [(name, modules.get(name), new) for name, new in adapters.items()]:
        fits = isinstance(new, DeLoRALinear) and type(old) is nn.Linear and _features(old) == _features(new.base_layer)
        _require(fits, f"{name}: {type(new).__name__} was not merged into this {type(old).__name__}")
    _replace(model, {(old := modules[n]): new.train(old.training).to(old.weight.device) for n, new in adapters.items()})


@contextmanager
def disabled(model: nn.Module) -> Iterator[None]:
    """Within this context no adapter acts, for instance to compute the pretrained model's logits. It may be nested."""
    with ExitStack() as stack:
        for adapter in _adapters(model).values():
            stack.callback(setattr, adapter, "enabled", adapter.enabled)
            adapter.enabled = False
        yield


# ------------------------------------------------------------------------------------------------ train, save, load


def param_groups(model: nn.Module, lr: float, lambda_lr: float | None = None, weight_decay: float = 0.0) -> list[dict]:
    """Two groups for an optimiser: all that is trainable but λ, and λ with lambda_lr (lr if None) and no weight decay.

    On A and B weight decay is not a regulariser: ΔW does not see their norms. It only shortens the vectors, and a step
    of the same size turns a shorter vector further, so in effect it is a learning rate that rises over time. On λ it
    would pull the strength to zero, hence none. On a new head it does what it always does.
    """
    strengths = dict.fromkeys(a.delora_lambda for a in _adapters(model).values() if a.delora_lambda.requires_grad)
    others = [p for p in model.parameters() if p.requires_grad and p not in strengths]
    return [{"params": others, "lr": lr, "weight_decay": weight_decay},
            {"params": [*strengths], "lr": lr if lambda_lr is None else lambda_lr, "weight_decay": 0.0}]


def adapter_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """A copy of what training changed: every delora_ tensor, and every other parameter that is trainable (a new head).

    Of a model that is sharded (FSDP2) the tensors are put together: every process has to call this, and one saves.

    Raises:
        ValueError: there is no adapter.
    """
    _adapters(model)
    changed = {n: p for n, p in model.named_parameters(remove_duplicate=False) if p.requires_grad or _ours(n)}
    return {n: (p.full_tensor() if hasattr(p, "full_tensor") else p).data.clone() for n, p in changed.items()}


def load_adapter(model: nn.Module, state_dict: Mapping[str, Tensor]) -> dict[str, DeLoRALinear]:
    """Load what `adapter_state_dict` returned, or what PEFT saved for DeLoRA, into a pretrained or an adapted model.

    Layers that have no adapter yet get one: names, ranks and modes are read from the tensors (dropout, which they do
    not hold, is 0). Everything is frozen but the adapters and the other parameters that state_dict carries. PEFT's
    checkpoints have no frozen copy: A₀ = B₀ = 0. (An untrained one has B = 0 too, and cannot move from there.) They do
    not say whether W was quantised either, so quantised layers refuse them.

    In a model that is sharded (FSDP2) and has its adapters, every process calls this and keeps its part.

    Returns:
        All adapters of the model, by name.

    Raises:
        TypeError, ValueError: a tensor is missing, unknown, not floating-point, not finite, or of another shape than
            the model's; the checkpoint is LoRA's, or changes one of two tensors that are tied here and not the other; a
            layer is quantised here and was not in training. The message has the key, and the model is as it was.
    """
    _require(isinstance(state_dict, Mapping), f"state_dict must be a dict of tensors, got {state_dict!r}", TypeError)
    wrong = [k for k, v in state_dict.items() if getattr(v, "dtype", None) not in FLOATS or not v.isfinite().all()]
    _require(not wrong, f"not finite floating-point tensors: {wrong}", TypeError)
    state = {key: v.full_tensor() if hasattr(v, "full_tensor") else v for key, v in state_dict.items()}
    if all(key.startswith("base_model.model.") and not key.endswith("_A0") for key in state):  # PEFT's
        state = {key.removeprefix("base_model.model."): value for key, value in state.items()}
        ours = {k: v for k, v in state.items() if k.endswith((".delora_A", ".delora_B")) and v.dim() == 2}
        short = [k for k, v in ours.items() if any(0 < n < 1e-4 for n in v.norm(dim=int(k[-1] == "A")).tolist())]
        _require(not short, f"PEFT does not normalise what is shorter than 1e-4, this file does: {short}")
        state |= {f"{key}0": torch.zeros_like(value) for key, value in ours.items()}
    layers = {key.rpartition(".")[0] for key in state if _ours(key) and not key.endswith("_quantised")}
    free = tuple(f"{name}." for name, module in _modules(model).items() if name in layers and _features(module))
    ranks = {name: state.get(f"{name}delora_A", torch.empty(1)).shape[:1].numel() for name in free}
    built = _build(model, {n[:-1]: {"r": r, "tie_lambda": f"{n}delora_lambda0" not in state} for n, r in ranks.items()})
    old = [(k, p) for k, p in model.named_parameters(remove_duplicate=False) if not k.startswith(free)]
    new = [(f"{n}.{k}", p) for n, m in _modules(model).items() if m in built for k, p in built[m].named_parameters()]
    named = {key: p for key, p in [*old, *new] if p.dtype in FLOATS}  # as after the replacement
    # A layer in floats takes an adapter that was trained on a quantised one (QLoRA merges so), but not the reverse.
    state = {key: value for key, value in state.items() if key in named or not key.endswith("delora_quantised")}
    filled = {named[key]: value for key, value in state.items() if key in named}
    missing = [key for key, p in named.items() if _ours(key) and p not in filled]
    _require(layers, f"state_dict lacks DeLoRA tensors{', it is LoRA' * ('.lora_' in str([*state]))}: {[*state][:3]}")
    _require(not missing, f"state lacks {missing}{', quantised here, not there' * ('quantised' in str(missing[:1]))}")
    for key, value in state.items():
        here, there = tuple(value.shape), tuple(named[key].shape) if key in named else "nothing of that name"
        _require(here == there, f"{key}: {here} in the checkpoint, {there} in the model")
    # Where two names are tied and the checkpoint has only one, its value must be the one that both have already.
    tied = [k for k, p in named.items() if p in filled and not torch.equal(state.get(k, p).to(filled[p]), filled[p])]
    _require(not tied, f"{', '.join(tied)}: tied in the model, not in the checkpoint")
    _replace(model, built)
    for key, p in named.items():
        p.requires_grad = p.requires_grad if _ours(key) else p in filled
    with torch.no_grad():
        for p, value in filled.items():
            whole = (value.to(p.device), p.device_mesh, p.placements) if hasattr(p, "full_tensor") else ()
            p.copy_(torch.distributed.tensor.distribute_tensor(*whole) if whole else value)  # sharded: its part
    return _adapters(model)
