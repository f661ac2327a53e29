"""The contract of DeLoRA: what has to hold for delora.py, and for any other implementation.

    y = (W + ΔW) x + b
    ΔW = (λ / r) · Σ_i (b_i a_iᵀ / (‖b_i‖ ‖a_i‖) − the same at the start) · diag(w)     (Eq. 5 to 9)

W is frozen, a_i is row i of A, b_i column i of B, w_j the norm of column j of W. λ is trained. It
scales both terms ("tied"), or the second is scaled by λ₀, which is λ at the start ("untied"). "Eq."
is an equation of the paper, https://arxiv.org/abs/2503.18225. Three properties make the method:

    P1  the zero start   at the start ΔW = 0, since the frozen copy of A and B is equal to them
    P2  the bound        ‖ΔW‖_* ≤ 2 |λ| max_j w_j whatever A and B are; ‖·‖_* is the nuclear norm
    P5  the decoupling   λ's gradient sees the angles of A and B alone, not their lengths

They come first, after an example by hand. Then their finer points and P2b (every direction can be
reached), P3 (ΔW does not see lengths), P4 (gradients turn components), P6 (the first step is
small), P7 (one linear map, in every mode), P8 (merge), P9 (the equation), P10 (copies, files), P11
(refusals); then the functions of delora.py. A layer is drawn as a `Case`, printed as the code
that makes it: paste a failing one above its test, as `@example(Case(...))`. "Seen:" names a mistake
found in public code. A tolerance is `tol`: the precision, times the roundings, times the size.

    pytest test_delora.py                                  delora.py
    HYPOTHESIS_PROFILE=thorough pytest test_delora.py      ten times the cases, new ones each time
    DELORA_SUBJECT=my.py:MyLayer pytest test_delora.py     a layer of your own: see `OfClass`
    DELORA_QUALITY=1 DELORA_SUBJECT=...                    and tier two: exact bits, every dtype
"""

import copy
import functools
import gc
import importlib.util
import io
import itertools
import math
import os
import sys
from dataclasses import dataclass, fields, replace
from pathlib import Path

import pytest
import torch
from hypothesis import Phase, assume, example, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

try:
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
except ImportError:  # another implementation need not have it
    if not os.environ.get("DELORA_SUBJECT"):
        raise

SUBJECT_NAME = os.environ.get("DELORA_SUBJECT", "")  # "": delora.py
IN_FULL = not SUBJECT_NAME or os.environ.get("DELORA_QUALITY") == "1"  # with tier two
LAMBDA_INIT = 3.0  # λ at the start, which is λ₀
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
MODES = tuple(itertools.product(("column", "frobenius", None), (True, False)))

# The phase that is left out, explain, can print another failing case than the smallest.
PHASES = [phase for phase in Phase if phase is not Phase.explain]
FAST = settings(max_examples=100, derandomize=True, deadline=None, phases=PHASES)
settings.register_profile("fast", FAST)
settings.register_profile("quick", FAST, max_examples=20)
settings.register_profile("thorough", FAST, max_examples=1000, derandomize=False)
settings.register_profile("drawn", FAST, phases=PHASES[1:])  # without @example: all is shrunk
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "fast"))


@dataclass(frozen=True)
class Case:
    """A layer, as the numbers that make it. `Drawn` builds it, and has what tests compare with."""

    n_in: int
    n_out: int
    r: int
    mode: tuple = ("column", True)  # weight_norm, tie_lambda
    dtype: torch.dtype | None = None  # of W; None is the widest that the subject has
    bias: bool = False
    zero_column: bool = False  # W[:, 0] = 0
    decade: int = 0  # the entries of W are of the order 10**decade
    lengths: tuple = ()  # a_i, and b_i from the last on, are about 10**lengths; (): as built
    strength: float = LAMBDA_INIT  # λ now
    batch: tuple = (3,)  # x is (*batch, in)
    seed: int = 0

    def __repr__(self):
        shown = [f.name for f in fields(self) if getattr(self, f.name) != f.default]
        return f"Case({', '.join(f'{name}={getattr(self, name)!r}' for name in shown)})"

    def _repr_pretty_(self, printer, cycle):
        printer.text(repr(self))


@st.composite
def cases(draw, moved=True, dtypes=(None,), reach=6, sizes=(1, 2, 5, 33), **fixed):
    """Layers as they are built, or moved: A, B and λ anywhere, lengths up to 10**±reach."""
    mode, dtype = draw(st.sampled_from(supported(dtypes)))
    options = {
        "n_in": st.sampled_from(sizes),
        "n_out": st.sampled_from(sizes),
        "r": st.sampled_from((1, 2, 6)),
        "bias": st.booleans(),
        "zero_column": st.booleans(),
        "batch": st.sampled_from(((3,), (), (2, 1, 2), (0,))),
        "seed": st.integers(0, 999),
    }
    if moved:
        lengths = st.lists(st.integers(-reach, reach), min_size=1, max_size=3)
        options["lengths"] = lengths.map(tuple)
        options["strength"] = st.sampled_from((LAMBDA_INIT, -2.0, 1e-6))
    drawn = {name: draw(option) for name, option in options.items()}
    return Case(**drawn | {"mode": mode, "dtype": dtype} | fixed)


# ----------------------------------------------------------------------------------------------
# The three properties
# ----------------------------------------------------------------------------------------------


def test_p9_the_worked_example_comes_out_as_by_hand():
    """W = (3 0; 4 2), λ = ½; a turns from (1, 0) to (3, 4), b from (0, 1) to (4, 3)."""
    weight = nn.Parameter(torch.tensor([[3.0, 0.0], [4.0, 2.0]]))
    mode = modes_and_dtypes()[0][0]  # ("column", True), if the subject has it
    layer = build_layer(weight, None, 1, mode, lambda_init=0.5)
    found = []
    for a, b in (((1.0, 0.0), (0.0, 1.0)), ((3.0, 4.0), (4.0, 3.0))):
        SUBJECT.tensors(layer)["A"].data.copy_(torch.tensor([a]))
        SUBJECT.tensors(layer)["B"].data.copy_(torch.tensor([b]).T)
        found.append(SUBJECT.delta_weight(layer).detach())
    change = found[1] - found[0]  # what is frozen is in both, and cancels
    w = norms_of(weight, mode[0])  # (5, 2)
    by_hand = torch.tensor([[0.24, 0.32], [-0.32, 0.24]]) * w  # (1.2 0.64; -1.6 0.48)
    assert distance(change, by_hand) <= tol(torch.float32, 4, 5), (
        f"ΔW changes by {change.tolist()}, by hand by {by_hand.tolist()}: ½ · (b̂ âᵀ − b̂₀ â₀ᵀ) · "
        "diag(w), b̂ âᵀ = (0.48 0.64; 0.36 0.48), b̂₀ â₀ᵀ = (0 0; 1 0), "
        f"w = {w.tolist()}. If all is 0, the frozen copy shares its storage with A and B; a column "
        "off by a factor is w, a row norms of rows; (2 0.8; -1 0.6) is A, (1.5 0.8; -1 0.8) B, "
        "normalised along the wrong axis; (30 16; 20 12) nothing normalised"
    )


@given(case=cases(moved=False, dtypes=DTYPES))
def test_p1_training_starts_at_w_through_a_frozen_copy(case):
    """ΔW = 0 and layer(x) = W x + b at the start. When A turns, the copy stays (Eq. 9)."""
    drawn = Drawn(case)
    delta = drawn.delta()
    off = distance(delta, 0 * delta)
    assert off <= (0 if IN_FULL else drawn.rounding()), (
        f"P1: at the start ΔW is off by {off:.3g}. Usual causes: no frozen copy, or one that is "
        "not A and B, or is rounded; at the last bit: two terms that cancel within one product"
    )
    off = distance(drawn.layer(drawn.x), drawn.base(drawn.x))
    largest = 1 + drawn.x.abs().sum().item()  # entries of W and b are below 1
    assert off <= (0 if IN_FULL else tol(drawn.x.dtype, 1, largest)), (
        f"P1: ΔW = 0, but the output is off by {off:.3g}. Usual causes: b is missing or added twice"
    )
    drawn.A.data.neg_()
    off = distance(drawn.delta(), drawn.equation())
    assert off <= drawn.rounding(), (
        "P1: with −a_i for all a_i ΔW should be −2 times the first term at the start. It is off by "
        f"{off:.3g} and has norm {drawn.delta().norm():.3g}. Usual cause: the frozen copy shares "
        "storage with A, so that ΔW stays 0; else what P9 says"
    )


@given(case=cases(decade=0) | cases(decade=-6) | cases(decade=6))
@example(Case(2, 3, 2, lengths=(6,)))  # Seen: LoRA, whose update grows with A and B
@example(Case(33, 5, 2, lengths=(0,)))  # Seen: norms over the r components instead of each one's
def test_p2_the_update_never_exceeds_the_bound(case):
    """‖ΔW‖_F ≤ ‖ΔW‖_* ≤ 2 |λ| max_j w_j, untied (|λ| + |λ₀|) max_j w_j (Eq. 6 to 9)."""
    drawn = Drawn(case)
    found, allowed = nuclear_norm(drawn.delta()), drawn.bound()
    assert found <= allowed + drawn.rounding(), (
        f"P2: ‖ΔW‖_* is {found:.6g}, allowed are {allowed:.6g}. Usual causes: nothing normalised "
        "(LoRA), or one of a_i and b_i only; norms along the wrong axis; λ not divided by r; inf: "
        "an entry is not finite"
    )


@given(case=cases(reach=3), i=st.integers(0, 5), c=st.integers(-3, 3), d=st.integers(-3, 3))
@example(Case(2, 2, 1, lengths=(0,)), 0, 3, 3)  # Seen: LoRA, where it grows with A and B
def test_p5_the_gradient_of_lambda_does_not_see_the_lengths(case, i, c, d):
    """∂L/∂λ is the same for 10**c a_i and 10**d b_i as for a_i and b_i (Eq. 5, 7)."""
    drawn = Drawn(case)
    before = drawn.gradients()[2].item()
    drawn.rescale(i, 10.0**c, 10.0**d)
    after = drawn.gradients()[2].item()
    allowed = drawn.unit_tol * drawn.slope_norm
    assert abs(after - before) <= allowed, (
        f"P5: ∂L/∂λ goes from {before:.6g} to {after:.6g} for 1e{c} a_i and 1e{d} b_i, allowed are "
        f"{allowed:.3g} of difference. Usual causes: a_i or b_i is not normalised; an epsilon or a "
        "clamp beside the norm; one norm for all components"
    )


# ----------------------------------------------------------------------------------------------
# Yardsticks, by the definitions
# ----------------------------------------------------------------------------------------------


def tol(dtype, n, size=1.0):
    """The error of n roundings that all point the same way, of numbers of that size.

    (Of a tensor: its largest entry.) A factor of 8, because each number comes from products of a
    few rounded ones. Below the smallest normal number rounding is as there.
    """
    if torch.is_tensor(size):
        size = size.detach().abs().max().item()
    info = torch.finfo(dtype)
    return 8 * n * info.eps * (size + info.smallest_normal)


def distance(found, wanted):
    """The largest difference between two entries, in float64; infinite where one is no number."""
    assert found.shape == wanted.shape, f"{tuple(found.shape)} is not {tuple(wanted.shape)}"
    difference = (found.detach().double() - wanted.detach().double()).abs()
    return difference.nan_to_num(math.inf, math.inf).max().item() if difference.numel() else 0.0


def same_bits(found, wanted):
    return found.dtype == wanted.dtype and torch.equal(found, wanted)


def nuclear_norm(matrix):
    """‖·‖_*, the sum of the singular values. It is never smaller than ‖·‖_F."""
    if not matrix.isfinite().all():
        return math.inf
    return torch.linalg.svdvals(matrix.detach().double()).sum().item()


def norms_of(weight, weight_norm):
    """w (in,) in float64: the norm of each column, of the whole matrix, or 1 (Eq. 8, 7)."""
    weight = weight.detach().double()
    if weight_norm is None:
        return torch.ones(weight.shape[1], dtype=torch.float64)
    if weight_norm == "frobenius":
        return weight.norm().repeat(weight.shape[1])
    return weight.norm(dim=0)


def normalised(A, B):
    """Σ_i b_i a_iᵀ / (‖b_i‖ ‖a_i‖) (out, in), component by component (Eq. 5). Zero adds nothing."""
    total = torch.zeros(len(B), A.shape[1], dtype=torch.float64)
    for a, b in zip(A.double(), B.double().T, strict=True):
        if a.any() and b.any():
            total = total + torch.outer(b / b.norm(), a / a.norm())
    return total


def parameter(tensor):
    """The parameter that a tensor is, or is a view of."""
    return tensor if tensor._base is None else tensor._base


class Drawn:
    """A case, built: a layer, an nn.Linear of the same W and b, an input, and what is to be."""

    def __init__(self, case):
        weight_norm, self.tied = case.mode
        dtype = case.dtype or widest()
        assume((case.mode, dtype) in modes_and_dtypes())
        torch.manual_seed(case.seed)
        self.base = nn.Linear(case.n_in, case.n_out, case.bias, dtype=torch.float64)
        self.base.weight.data *= 10.0**case.decade
        if case.zero_column:
            self.base.weight.data[:, 0] = 0
        weight = self.base.to(dtype).weight
        self.w = norms_of(weight, weight_norm)  # (in,)
        self.layer = build_layer(weight, self.base.bias, case.r, case.mode)
        tensors = SUBJECT.tensors(self.layer)
        self.A, self.B, self.lam = tensors["A"], tensors["B"], tensors["lambda"]
        self.start = normalised(self.A.detach(), self.B.detach())  # (out, in), of the frozen copy
        for i in range(case.r if case.lengths else 0):
            size = 10.0 ** case.lengths[i % len(case.lengths)]
            self.A.data[i] = torch.randn(case.n_in) * size  # (in,)
            self.B.data[:, -1 - i] = torch.randn(case.n_out) * size  # (out,), in the other order
        self.lam.data.fill_(case.strength)
        self.x = torch.randn(*case.batch, case.n_in, 2).to(dtype)[..., 0]  # not contiguous
        self.slope = torch.randn(*case.batch, case.n_out).to(dtype)  # ∂L/∂y
        self.slope_norm = (self.slope.double().norm() * self.x.double().norm()).item()  # ≥ ‖∂L/∂ΔW‖
        # for λ = 1: sums over in, out and 2r. Times slope_norm it is that of ∂L/∂λ
        self.unit_tol = tol(self.A.dtype, case.n_in + case.n_out + 2 * case.r, 2 * self.w)

    def delta(self):
        return SUBJECT.delta_weight(self.layer).detach()

    def equation(self, A=None, B=None, lam=None):
        """ΔW (out, in) by the definition, in float64, of these tensors or the layer's (Eq. 9)."""
        if A is None:
            A, B, lam = self.A.detach(), self.B.detach(), self.lam.detach().double()
        lam0 = lam if self.tied else LAMBDA_INIT
        return (lam * normalised(A, B) - lam0 * self.start) * self.w / len(A)

    def bound(self):
        """2 |λ| max_j w_j, untied (|λ| + |λ₀|) max_j w_j (Eq. 6 to 9)."""
        lam = abs(self.lam.item())
        return (lam + (lam if self.tied else LAMBDA_INIT)) * self.w.max().item()

    def rounding(self, size=1.0):
        """`tol` of what is computed from ΔW, times size."""
        lam = abs(self.lam.item())
        return self.unit_tol * (lam + (0 if self.tied else LAMBDA_INIT)) * size

    def loss(self):
        return (self.layer(self.x) * self.slope).sum()

    def gradients(self):
        """∂L/∂A, ∂L/∂B and ∂L/∂λ, in the shapes of A, B and λ."""
        tensors = (self.A, self.B, self.lam)
        leaves = [parameter(tensor) for tensor in tensors]
        found = torch.autograd.grad(self.loss(), leaves, allow_unused=True)
        gradients = []
        for name, tensor, g in zip("ABλ", tensors, found, strict=True):
            assert g is not None, f"layer(x) does not depend on {name}. Is it detached on the way?"
            if tensor._base is not None:  # a view: its gradient lies in that of the parameter
                g = g.contiguous().as_strided(
                    tensor.shape, tensor.stride(), tensor.storage_offset()
                )
            gradients.append(g)
        return gradients

    def rescale(self, i, c, d):
        """c a_i and d b_i in the place of a_i and b_i, i counted modulo r."""
        self.A.data[i % len(self.A)] *= c
        self.B.data[:, i % len(self.A)] *= d

    def step(self, optimizer, lr, loss):
        """One step of an optimiser on all that the layer declares trainable."""
        parameters = [p for p in self.layer.parameters() if p.requires_grad]
        update = getattr(torch.optim, optimizer)(parameters, lr=lr)
        update.zero_grad()
        loss.backward()
        update.step()


# ----------------------------------------------------------------------------------------------
# Whose layer is tested
# ----------------------------------------------------------------------------------------------


class OfClass:
    """What the contract has to know of a layer: four functions. Here they are, for a class.

    A class is enough whose constructor is MyLayer(base_layer, r, lambda_init), base_layer being an
    nn.Linear, perhaps with weight_norm="column" and tie_lambda=True, and that has A, B, lam and
    delta_weight(), in the layer itself or in its `delora`. For any other layer DELORA_SUBJECT names
    a module, or an object, with functions of these names. Then:

    - The layer is an nn.Module, and works on the given weight and bias themselves, not on copies.
      A, B and λ learn, nothing else does. w is measured once. r may be larger than in or out, and
      x has any number of dimensions. ΔW has the precision of A. `weight`, if there is one, is
      W + ΔW.
    - How the frozen copy is kept is its own affair: the start is what A, B and λ are when `build`
      returns. A and B start at random, with entries of both signs, and no a_i or b_i tiny.
    - A component that is zero adds nothing to ΔW, and has a finite gradient.
    - What the layer does not have it declines by NotImplementedError: a weight_norm, a tie_lambda
      or a dtype of W in `build`; `merge`; the property `weight`. An attribute that is missing says
      the same, and so does any error at another mode than ("column", True) or another dtype than
      float32. (What takes float64 and computes in less has to decline it.) What was declined is
      said at the end, and is no failure.
    - Tier one is the method. Tier two, with DELORA_QUALITY=1, is the rest of the promise: all tests
      marked `quality`, zero to the bit at the start, sums rounded once, zero gradients of zero
      components, and no dtype declined by an error. There r < 1 is a ValueError or a TypeError,
      `merge` leaves the given weight alone, and `unmerge(layer)`, if there is one, undoes it.
    """

    def __init__(self, layer_class):
        self.layer_class = layer_class

    def build(self, weight, bias, *, r, lambda_init, weight_norm, tie_lambda):
        """A layer of weight (out, in) and bias (out,), or None, to be called as layer(x)."""
        base = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device="meta")
        base.weight, base.bias = weight, bias
        if (weight_norm, tie_lambda) == ("column", True):
            return self.layer_class(base, r, lambda_init)
        mode = {"weight_norm": weight_norm, "tie_lambda": tie_lambda}
        return self.layer_class(base, r, lambda_init, **mode)

    def tensors(self, layer):
        """A (r, in), B (out, r) and λ (1,) as they are stored, or views of that, as layer.A.T."""
        delora = getattr(layer, "delora", layer)
        return {"A": delora.A, "B": delora.B, "lambda": delora.lam.view(1)}

    def delta_weight(self, layer):
        """ΔW (out, in), with gradients."""
        return getattr(layer, "delora", layer).delta_weight()

    def merge(self, layer):
        """W + ΔW (out, in) in W's dtype."""
        return layer.merged().weight


def load_subject(name):
    """What my_layer.py:MyLayer names, or package.module:MyLayer, or the module alone."""
    module, _, attribute = name.partition(":")
    if module.endswith(".py"):
        sys.path.insert(0, str(Path(module).parent))
        place = importlib.util.spec_from_file_location(Path(module).stem, module)
        subject = importlib.util.module_from_spec(place)
        place.loader.exec_module(subject)
    else:
        subject = importlib.import_module(module)
    if attribute:
        subject = getattr(subject, attribute)
    return OfClass(subject) if hasattr(subject, "forward") else subject


SUBJECT = load_subject(SUBJECT_NAME or "delora:DeLoRALinear")
DECLINED = {}  # what: why
own = pytest.mark.skipif(bool(SUBJECT_NAME), reason="about delora.py's own names")
quality = pytest.mark.skipif(not IN_FULL, reason="tier two: DELORA_QUALITY=1 runs it")


def build_layer(weight, bias, r, mode=MODES[0], lambda_init=LAMBDA_INIT):
    options = {"weight_norm": mode[0], "tie_lambda": mode[1]}
    return SUBJECT.build(weight, bias, r=r, lambda_init=lambda_init, **options)


@functools.cache
def modes_and_dtypes():
    """The (mode, dtype) that the subject has: its layer can be built and called, and keeps it."""
    found = []
    for mode, dtype in itertools.product(MODES, DTYPES):
        if (mode, DTYPES[0]) not in found and dtype != DTYPES[0]:
            continue  # a mode that float32 has not no other dtype has
        weight = nn.Parameter(torch.randn(3, 2).to(dtype))
        try:
            y = build_layer(weight, None, 1, mode)(torch.ones(1, 2, dtype=dtype))
            if y.dtype != dtype:
                raise TypeError(f"the output is {y.dtype}")
            found.append((mode, dtype))
        except Exception as error:
            needed = mode == MODES[0] and (IN_FULL or dtype == DTYPES[0])
            if not SUBJECT_NAME or (needed and not isinstance(error, NotImplementedError)):
                raise
            DECLINED[f"{mode} in {dtype}"] = f"{type(error).__name__}: {error}"
    if not found:
        pytest.exit(f"{SUBJECT_NAME} can build no layer: {DECLINED}", 4)
    return found


def decline(what, error):
    if not SUBJECT_NAME:
        raise error
    DECLINED[what] = f"{type(error).__name__}: {error}"
    pytest.skip(f"declined: {what}")


def widest():
    return max((dtype for _, dtype in modes_and_dtypes()), key=lambda dtype: dtype.itemsize)


def supported(dtypes):
    """The (mode, dtype) to draw from, where None stands for the widest dtype."""
    found = []
    for wanted in dtypes:
        for mode, dtype in modes_and_dtypes():
            if dtype == (wanted or widest()):
                found.append((mode, wanted))
    return found or pytest.skip(f"declined: {dtypes}")


@pytest.fixture(scope="session", autouse=True)
def say_what_was_declined(request):
    yield
    for what, why in DECLINED.items():
        request.config.add_cleanup(functools.partial(print, f"Declined: {what}: {why}"))


# ----------------------------------------------------------------------------------------------
# P1 zero start
# ----------------------------------------------------------------------------------------------


@quality
@given(case=cases(moved=False, dtypes=DTYPES), other=st.sampled_from(DTYPES))
@example(Case(5, 2, 2), torch.bfloat16)  # Seen: the frozen copy in other bits than A and B
def test_p1_the_zero_start_survives_casts_and_autocast(case, other):
    """layer(x) = W x + b bit for bit, also after layer.to(dtype), and under autocast (Eq. 9)."""
    drawn = Drawn(case)
    x = drawn.x
    for moment in ("as built", f"after layer.to({other})"):
        for narrow in (None, torch.bfloat16, torch.float16):
            with torch.autocast("cpu", narrow, enabled=narrow is not None):
                y, wanted = drawn.layer(x), drawn.base(x)
            off = distance(y, wanted.to(y.dtype))
            assert off == 0, (
                f"P1: {moment}, under autocast to {narrow}, the output is off by {off:.3g}: A and "
                "its copy are rounded in different ways, or something overflows"
            )
        drawn.layer.to(other)
        drawn.base.to(other)
        x = x.to(other)


# ----------------------------------------------------------------------------------------------
# P2 bound
# ----------------------------------------------------------------------------------------------


@given(case=cases(moved=False), optimizer=st.sampled_from(("SGD", "Adam")), lr=st.integers(-3, 3))
def test_p2_no_learning_rate_leaves_the_bound(case, optimizer, lr):
    """‖ΔW‖_* ≤ 2 |λ| max_j w_j after every step of any optimiser, here at 10**lr (Eq. 6 to 9)."""
    drawn = Drawn(case)
    for _ in range(4):
        drawn.step(optimizer, 10.0**lr, (drawn.layer(drawn.x) - 1).sin().sum())
        found, allowed = nuclear_norm(drawn.delta()), drawn.bound()
        assert found <= allowed + drawn.rounding(), (
            f"P2: after a step at {10.0**lr:g} ‖ΔW‖_* is {found:.6g}, allowed are {allowed:.6g}. "
            "Usual causes: nothing is normalised (LoRA); inf: an entry is not finite"
        )


@given(case=cases(moved=False, n_in=1, r=1))
@example(Case(1, 33, 1, decade=1))  # Seen: λ itself called the bound, where w is larger than 1
def test_p2_the_bound_is_attained(case):
    """‖ΔW‖_F = 2 |λ| w for r = 1, a = −a₀, b = b₀ and one column (Eq. 7)."""
    drawn = Drawn(case)
    drawn.A.data.mul_(-7)
    drawn.lam.data.fill_(5.0)
    found, wanted = drawn.delta().norm().item(), drawn.bound()
    assert abs(found - wanted) <= drawn.rounding(), (
        f"P2: ‖ΔW‖_F can be {wanted:.6g}, and is {found:.6g} where it should be that. Usual "
        "causes: if 0, the frozen copy shares storage, or B starts at zero; if half, there is no "
        "frozen copy; else w is no norm of a column, or λ is divided by too much"
    )


@given(case=cases(n_in=7, n_out=6, strength=LAMBDA_INIT), k=st.integers(0, 2))
def test_p2b_every_direction_is_reachable(case, k):
    """The first term can be M diag(w) for any M of rank r or less and nuclear norm λ (Eq. 7).

    M = U Σ Vᵀ, and Q is orthogonal, so that Qᵀ Σ Q has an equal diagonal: here r is 2**k and Q has
    entries ± 1/√r. Then B = U Σ^½ Q and A = (V Σ^½ Q)ᵀ have ‖b_i‖ = ‖a_i‖ = √(λ/r), and B A = M. So
    it costs no expressiveness that all components share one λ.
    """
    r = 2**k
    drawn = Drawn(replace(case, r=r))
    U, S, V = torch.svd(torch.randn(6, r).double() @ torch.randn(r, 7).double())
    root = (LAMBDA_INIT * S[:r] / S[:r].sum()).sqrt()  # (r,), Σ^½
    Q = torch.ones(1, 1, dtype=torch.float64)
    for _ in range(k):
        Q = torch.kron(Q, torch.tensor([[1.0, 1.0], [1.0, -1.0]]).double()) / 2**0.5
    A, B = ((V[:, :r] * root) @ Q).T, (U[:, :r] * root) @ Q
    drawn.A.data.copy_(10 * A)
    drawn.B.data.copy_(B / 10)
    off = distance(drawn.delta(), (B @ A - LAMBDA_INIT * drawn.start / r) * drawn.w)
    assert off <= drawn.rounding(), (
        f"P2b: a matrix of nuclear norm λ is missed by {off:.3g}. If P9 is red, begin there"
    )


# ----------------------------------------------------------------------------------------------
# P3 angles, not scale; P4 tangent gradients
# ----------------------------------------------------------------------------------------------


@given(case=cases(reach=3), i=st.integers(0, 5), c=st.integers(-3, 3), d=st.integers(-3, 3))
@example(Case(2, 2, 1), 0, -6, 0)  # Seen: a clamp at 1e-4 in the place of the norm
@example(Case(2, 2, 1), 0, 0, -6)  # Seen: an epsilon of 1e-8 that is added to the norm
def test_p3_rescaling_a_component_changes_nothing(case, i, c, d):
    """ΔW is the same for 10**c a_i and 10**d b_i as for a_i and b_i (Eq. 5)."""
    drawn = Drawn(case)
    before = drawn.delta().clone()
    drawn.rescale(i, 10.0**c, 10.0**d)
    off = distance(drawn.delta(), before)
    assert off <= drawn.rounding(), (
        f"P3: ΔW moves by {off:.3g} for 1e{c} a_i and 1e{d} b_i. Usual causes: a_i or b_i is not "
        "normalised; an epsilon or a clamp beside the norm; one norm for all components"
    )


@given(case=cases())
@example(Case(2, 2, 1, lengths=(0,)))  # Seen: LoRA. A rate that is too high lengthens components
def test_p4_gradients_turn_components_and_never_stretch_them(case):
    """⟨∂L/∂a_i, a_i⟩ = 0 = ⟨∂L/∂b_i, b_i⟩ for every i and every loss (Eq. 5)."""
    drawn = Drawn(case)
    of_A, of_B, _ = drawn.gradients()
    stretch = (of_A * drawn.A).sum(1), (of_B * drawn.B).sum(0)  # (r,) each
    off = torch.stack(stretch).abs().max().item()
    assert off <= drawn.rounding(drawn.slope_norm), (
        f"P4: ⟨∂L/∂a_i, a_i⟩ or ⟨∂L/∂b_i, b_i⟩ is {off:.3g}. If P9 is red, a_i or b_i is not "
        "normalised, or not alone. Else the norm is detached, so that it counts as a constant"
    )


@given(case=cases(batch=(3,)), which=st.sampled_from(("A", "B", "AB")))
@example(Case(2, 2, 2), "B")  # Seen: 1/ε as gradient, and a first step 10⁴ times too long
def test_p4_a_zero_component_adds_nothing(case, which):
    """a_i = 0 or b_i = 0: no i-th term in ΔW, and finite gradients; in full, zero ones (Eq. 5)."""
    drawn = Drawn(case)
    if "A" in which:
        drawn.A.data[0] = 0
    if "B" in which:
        drawn.B.data[:, 0] = 0
    off = distance(drawn.delta(), drawn.equation())
    assert off <= drawn.rounding(), (
        f"P4: with a zero in {which} ΔW is off by {off}. If P9 is red, begin there. Else: zero has "
        "no direction, adds nothing, and 0/0 is guarded: v / norm.masked_fill(norm == 0, inf)"
    )
    gradients = drawn.gradients()
    assert all(g.isfinite().all() for g in gradients), (
        f"P4: with a zero in {which} a gradient is not finite. The guard comes after the division?"
    )
    of_zero = {"A": gradients[0][0], "B": gradients[1][:, 0]}
    largest = max(of_zero[name].abs().max().item() for name in which)
    assert largest == 0 or not IN_FULL, (
        f"P4: the gradient of a zero component is {largest:.3g}: no direction is better than any. "
        "v / (norm + ε) and v / norm.clamp(ε) give one of the order 1/ε"
    )


@quality
@given(
    case=cases(moved=False, dtypes=(torch.float32,), n_in=6, n_out=6, r=1),
    k=st.sampled_from((-30, -23, -22, -21, -20, -18, 18, 20, 38)),
)
def test_p4_lengths_may_go_to_the_ends_of_float32(case, k):
    """From 1e-18 to 1e18 a component has its direction, past that it has it or counts as zero."""
    drawn = Drawn(case)
    drawn.A.data.fill_(10.0**k)
    drawn.B.data.fill_(10.0**k)
    off = distance(drawn.delta(), drawn.equation())
    if abs(k) > 18:
        as_zero = drawn.equation(0 * drawn.A, drawn.B, drawn.lam.double())
        off = min(off, distance(drawn.delta(), as_zero))
    assert off <= drawn.rounding(), (
        f"P4: with entries of 1e{k} ΔW is off by {off:.3g}. Their squares underflow, so that the "
        "norm is too small; or they overflow, and the norm is clamped to a finite number"
    )


# ----------------------------------------------------------------------------------------------
# P5 λ, strength alone
# ----------------------------------------------------------------------------------------------


@given(case=cases(), c=st.sampled_from((0.0, -2.0, 0.5, 1e3)))
def test_p5_the_update_is_linear_in_lambda(case, c):
    """ΔW is c λ times the rest, minus the frozen copy, which λ scales if tied (Eq. 7, 9)."""
    drawn = Drawn(case)
    drawn.lam.data.mul_(c)
    off = distance(drawn.delta(), drawn.equation())
    assert off <= drawn.rounding(), (
        f"P5: at {c} λ ΔW is off by {off:.3g}. Usual causes: the frozen copy is scaled by λ₀ and "
        "not by λ, or by λ though untied; |λ| or softplus(λ); a λ kept from the start; else see P9"
    )


# ----------------------------------------------------------------------------------------------
# P6 continuous start
# ----------------------------------------------------------------------------------------------


@given(
    case=cases(moved=False, zero_column=False, batch=(3,), sizes=(2, 5, 33)),
    optimizer=st.sampled_from(("SGD", "Adam")),
)
# Seen: B = 0 with a clamp goes to full strength in one step; a copy in A's storage never moves
@example(Case(5, 5, 2), "SGD")
def test_p6_the_first_step_is_proportional_to_the_learning_rate(case, optimizer):
    """‖ΔW‖ = c η + O(η²) after a step at learning rate η, with c > 0 (Eq. 9)."""
    moves = []
    for factor in (1, 10, 100):
        drawn = Drawn(case)
        smallest = 1e-8 if drawn.A.dtype == torch.float64 else 1e-6
        drawn.step(optimizer, factor * smallest, drawn.loss() / drawn.slope.numel())
        moves.append(drawn.delta().double().norm().item())
    assert moves[2] > 0, (
        "P6: a step does not move ΔW. Usual causes: the frozen copy shares storage with A and B; "
        "A and B start at zero; A, B or λ is not in layer.parameters()"
    )
    for small, large in ((moves[0], moves[1]), (moves[1], moves[2])):
        # such steps turn a component by little (less than 1/100 if it starts longer than 1/50), and
        # what is not linear is a share of that: 1/20 is ample
        assert abs(large - 10 * small) <= 0.05 * large + 11 * drawn.rounding(), (
            f"P6: ‖ΔW‖ after one step at each of three rates, 1 to 10 to 100, is {moves}. Usual "
            "causes: B = 0 at the start, from where any step gives full strength; no frozen copy"
        )


def test_p6_the_start_is_spread_and_leaves_the_random_state_to_the_user():
    """A and B have entries of both signs, no two components are alike, and seeds are the user's."""
    starts, after = [], []
    for seed in (1, 2):
        torch.manual_seed(seed)
        layer = build_layer(nn.Parameter(torch.ones(33, 32)), None, 6, modes_and_dtypes()[0][0])
        starts.append(SUBJECT.tensors(layer))
        after.append(torch.rand(1))
    for name in "AB":
        share = (starts[0][name] > 0).double().mean().item()
        assert 0.2 < share < 0.8, (
            f"P6: {share:.0%} of the entries of {name} start above 0. All zero, or positive?"
        )
    assert not torch.equal(starts[0]["A"], starts[1]["A"]), "P6: two seeds give one A"
    assert after[0] != after[1], "P6: building sets the seed, and the user's is lost"
    components = torch.cat((starts[0]["A"], starts[0]["B"].T), dim=1)  # (r, in + out)
    assert len(components.unique(dim=0)) == 6, (
        "P6: two components start alike. They have the same gradients for ever: the rank is lower"
    )


# ----------------------------------------------------------------------------------------------
# P7 one linear map
# ----------------------------------------------------------------------------------------------


@given(case=cases(), optimizer=st.sampled_from(("SGD", "Adam")))
def test_p7_training_changes_a_b_and_lambda_and_nothing_else(case, optimizer):
    """A, B and λ are what an optimiser gets; then W and the frozen copy are as before."""
    drawn = Drawn(case)
    learning = {parameter(p) for p in (drawn.A, drawn.B, drawn.lam)}
    trainable = {p: name for name, p in drawn.layer.named_parameters() if p.requires_grad}
    assert learning == trainable.keys(), (
        f"P7: trainable in layer.parameters() are {sorted(trainable.values())}, with "
        f"{len(learning - trainable.keys())} of A, B and λ missing. Usual causes: W or b is not "
        "frozen; a bias was added; A, B or λ is a buffer; the frozen copy is trained"
    )
    drawn.step(optimizer, 0.1, drawn.loss())
    assert distance(drawn.delta(), drawn.equation()) <= drawn.rounding(), (
        "P7: after a step ΔW is not what A, B, λ and the start give. If P9 is red, begin there. "
        "Else the frozen copy moved with A and B"
    )


@given(case=cases(dtypes=DTYPES, reach=2))
@example(Case(2, 2, 1, dtype=torch.bfloat16, batch=()))  # Seen: an x without batch, a narrow base
def test_p7_the_layer_is_one_linear_map(case):
    """layer(x) = (W + ΔW) x + b, in training and evaluation, with gradients or without (Eq. 15)."""
    drawn = Drawn(case)
    W, b = drawn.base.weight.detach().double().clone(), drawn.base.bias
    x = drawn.x.double()
    for training in (True, False):
        drawn.layer.train(training)
        for moment in ("first", "after a step"):
            wanted = F.linear(x, W + drawn.equation(), b if b is None else b.detach().double())
            largest = (W + drawn.equation()).abs().max() + drawn.bound() + 1  # the bias among them
            size = largest * (x.abs().sum(-1).max() + 1 if x.numel() else 1)
            for context in (torch.enable_grad, torch.no_grad, torch.inference_mode):
                with context():
                    y = drawn.layer(drawn.x)
                off = distance(y, wanted)
                # of x, W, ΔW, ΔW x and y; and of sums in the precision of A
                allowed = tol(y.dtype, 1, size) + drawn.rounding(x.abs().sum().item())
                assert off <= allowed and y.dtype == drawn.x.dtype, (
                    f"P7: {moment}, with {training=}, under {context.__name__}, layer(x) is off by "
                    f"{off:.3g}, allowed are {allowed:.3g}; its dtype is {y.dtype}. If P9 is red, "
                    "begin there. Else b is missing; or, if wrong after a step only, something kept"
                )
            drawn.step("SGD", 0.1, drawn.loss())


@given(case=cases(dtypes=(torch.float32, None)))
def test_p7_the_gradients_are_those_of_the_equation(case):
    """∂L/∂A, ∂L/∂B, ∂L/∂λ and ∂L/∂x, against autograd of the equation in float64 (Eq. 15)."""
    drawn = Drawn(case)
    drawn.x.requires_grad_()
    found = (*drawn.gradients(), *torch.autograd.grad(drawn.loss(), drawn.x))
    tensors = (drawn.A, drawn.B, drawn.lam, drawn.x)
    A, B, lam, x = (tensor.detach().double().requires_grad_() for tensor in tensors)
    y = F.linear(x, drawn.base.weight.detach().double() + drawn.equation(A, B, lam))
    wanted = torch.autograd.grad((y * drawn.slope).sum(), (A, B, lam, x))
    scale = (A.norm(dim=1, keepdim=True), B.norm(dim=0), 1.0, 1.0)  # a longer one turns less
    of_angles = drawn.rounding(drawn.slope_norm)
    largest = drawn.base.weight.abs().max().item() + drawn.bound()
    of_x = tol(drawn.A.dtype, case.n_in + case.n_out, largest) * drawn.slope.abs().sum().item()
    allowed = (of_angles, of_angles, drawn.unit_tol * drawn.slope_norm, of_x)
    for i, name in enumerate(("A", "B", "λ", "x")):
        off = distance(found[i] * scale[i], wanted[i] * scale[i])
        assert off <= allowed[i], (
            f"P7: ∂L/∂{name} is off by {off:.3g}, allowed are {allowed[i]:.3g}. If P9 is red, "
            "begin there. Else: the norm is detached (A, B); λ is; x is, or skips the adapter"
        )


@given(case=cases(dtypes=DTYPES, reach=2))
@example(Case(5, 5, 2, lengths=(0,)))  # Seen: `.weight` is the base's, so its readers miss ΔW
def test_p7_code_that_reads_the_weight_sees_the_adapter(case):
    """layer.weight is W + ΔW in every mode, and depends on A, B and λ (Eq. 15)."""
    drawn = Drawn(case)
    try:
        weight = drawn.layer.weight
    except (AttributeError, NotImplementedError) as error:
        decline("weight", error)
    for training in (True, False) * 2:
        with torch.set_grad_enabled(training):
            weight = drawn.layer.train(training).weight
        wanted = drawn.base.weight.detach().double() + drawn.equation()
        off, allowed = distance(weight, wanted), tol(weight.dtype, 2, wanted) + drawn.rounding()
        assert off <= allowed, (
            f"P7: with {training=} layer.weight is off by {off:.3g}, allowed are {allowed:.3g}. If "
            "P9 is red, begin there. Else: it is W alone, or was kept from before a step"
        )
        drawn.step("SGD", 0.1, drawn.loss())
    learning = [parameter(p) for p in (drawn.A, drawn.B, drawn.lam)]
    found = torch.autograd.grad(drawn.layer.weight.sum(), learning, allow_unused=True)
    assert None not in found, "P7: layer.weight does not depend on A, B or λ"


@given(case=cases(zero_column=False))
def test_p7_w_is_measured_once_and_the_weight_is_not_copied(case):
    """Who writes into W (loads weights, ties it) finds it in the output, and w as it was."""
    drawn = Drawn(case)
    before, x = drawn.layer(drawn.x).detach().double(), drawn.x.double()
    delta = drawn.delta().clone()
    W = drawn.base.weight.detach().double().clone()
    drawn.base.weight.data.mul_(3)
    off = distance(drawn.delta(), delta)
    assert off <= delta.abs().max(), "P7: ΔW is tripled when W is: w is measured anew"
    off = distance(drawn.layer(drawn.x), before + F.linear(x, 2 * W))
    largest = 4 * W.abs().max().item() + drawn.bound() + 1
    allowed = tol(drawn.A.dtype, case.n_in, largest) * (1 + x.abs().sum().item())
    assert off <= allowed, (
        f"P7: W was made three times as large, and the output is off by {off:.3g}: the layer works "
        "on a copy of W, or measures w anew in every forward pass"
    )


# ----------------------------------------------------------------------------------------------
# P8 merge
# ----------------------------------------------------------------------------------------------


def merge_and_back(drawn):
    """A copy of the merged weight (out, in). Afterwards the layer is as it was."""
    try:
        weight = SUBJECT.merge(drawn.layer).detach().clone()
    except (AttributeError, NotImplementedError) as error:
        decline("merge", error)
    if hasattr(SUBJECT, "unmerge"):
        SUBJECT.unmerge(drawn.layer)
    return weight


@given(case=cases(dtypes=DTYPES, reach=2))
@example(Case(5, 33, 2, lengths=(0,), dtype=torch.bfloat16))  # Seen: ΔW rounded, then the sum
def test_p8_the_merged_weight_is_the_sum_rounded_once(case):
    """|merged − (W + ΔW)| ≤ ½ ulp, and the rounding of float32 or wider; in tier one a few ulp."""
    drawn = Drawn(case)
    exact = drawn.base.weight.detach().double() + drawn.delta().double()  # (out, in)
    merged = merge_and_back(drawn)
    info = torch.finfo(merged.dtype)
    half_ulp = info.eps / 2 * exact.abs().clamp(min=info.smallest_normal)
    allowed = half_ulp + tol(torch.promote_types(drawn.A.dtype, torch.float32), 1, exact)
    if not IN_FULL:
        allowed += tol(merged.dtype, 1, exact)
    off = (merged.double() - exact).abs()
    assert merged.dtype == drawn.base.weight.dtype and (off <= allowed).all(), (
        f"P8: the merged weight is off by {off.max():.3g}, its dtype is {merged.dtype}. Usual "
        "causes: ΔW is rounded before the sum; it is of the start, or was kept; it is W alone"
    )


@quality
@given(case=cases(dtypes=DTYPES, reach=2))
@example(Case(5, 33, 2, lengths=(0,), dtype=torch.float32))  # Seen: W + ΔW − ΔW in the place of W
def test_p8_merging_touches_nothing(case):
    """W (an embedding may share it), the layer and the random state are as before, each time."""
    drawn = Drawn(case)
    W, random, y = drawn.base.weight.detach().clone(), torch.get_rng_state(), drawn.layer(drawn.x)
    bits = copy.deepcopy(drawn.layer.state_dict())
    weights = [merge_and_back(drawn) for _ in range(4)]
    assert all(same_bits(weight, weights[0]) for weight in weights), "P8: merged weights drift"
    changed = [n for n, t in drawn.layer.state_dict().items() if not same_bits(t, bits[n])]
    assert not changed, f"P8: merging changed {changed}"
    assert same_bits(drawn.layer(drawn.x), y), "P8: merging changed the output"
    assert torch.equal(torch.get_rng_state(), random), "P8: merging draws random numbers"
    SUBJECT.merge(drawn.layer)
    assert same_bits(drawn.base.weight, W), "P8: merging wrote into W, which others may share"


# ----------------------------------------------------------------------------------------------
# P9 oracle
# ----------------------------------------------------------------------------------------------


@given(case=cases(dtypes=(None, torch.float32, torch.bfloat16)))
@example(Case(5, 33, 2, lengths=(0,), dtype=torch.bfloat16))  # Seen: w rounded to bfloat16
@example(Case(3, 200, 1, lengths=(0,)))  # Seen: w of the first 64 rows only
@example(Case(2, 5, 2, lengths=(0, 1)))  # Seen: norms of rows of W, alike if W is square
@example(Case(2, 5, 2, mode=("frobenius", False), lengths=(0, 1), strength=-2.0))
@example(Case(2, 5, 2, mode=(None, True), lengths=(0, 1), strength=-2.0))
def test_p9_the_update_is_a_sum_over_components(case):
    """ΔW = Σ_i (λ/r) b_i a_iᵀ / (‖b_i‖ ‖a_i‖) diag(w), minus the same of the start (Eq. 8, 9)."""
    drawn = Drawn(case)
    off = distance(drawn.delta(), drawn.equation())
    assert off <= drawn.rounding(), (
        f"P9: ΔW is off by {off:.3g}, allowed are {drawn.rounding():.3g}. ΔW / "
        f"equation begins with {(drawn.delta() / drawn.equation())[:3, :3].tolist()}. "
        "Usual causes: if columns are off by factors, w; rows, norms of rows of W; all by one, λ "
        "or 1/r; by 1e-8 or for small lengths only, an epsilon or a clamp beside a norm; for r > 1 "
        "only, one norm for all; else the frozen copy: its sign, its λ, its storage"
    )


# ----------------------------------------------------------------------------------------------
# P10 copies and checkpoints
# ----------------------------------------------------------------------------------------------


def through_a_file(state):
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


@quality
@given(case=cases(dtypes=DTYPES, reach=2))
@example(Case(5, 2, 2, lengths=(0,)))  # Seen: a frozen copy that is a plain attribute
def test_p10_a_saved_layer_computes_the_same_when_loaded(case):
    """layer(x) is the same bit for bit after state_dict, a file, and a new layer on the same W."""
    drawn, fresh = Drawn(case), Drawn(case)
    fresh.layer = build_layer(fresh.base.weight, fresh.base.bias, case.r, case.mode, 0.5)
    fresh.layer.load_state_dict(through_a_file(drawn.layer.state_dict()))
    assert same_bits(fresh.layer(drawn.x), drawn.layer(drawn.x)), (
        "P10: a loaded layer differs: the frozen copy, w or λ₀ is not in state_dict"
    )


@quality
@given(case=cases(dtypes=DTYPES[:2]))
def test_p10_a_copy_moves_whole_is_independent_and_leaves_nothing_behind(case):
    """copy.deepcopy, .to(dtype) and .to(device) take w and the frozen copy along."""
    drawn = Drawn(case)
    y, delta = drawn.layer(drawn.x), drawn.delta().clone()
    other = copy.deepcopy(drawn.layer)
    drawn.B.data.neg_()
    assert same_bits(other(drawn.x), y), "P10: a deepcopy computes something else, or uses this B"
    back = other.to(torch.float64).to(drawn.x.dtype)
    off = distance(SUBJECT.delta_weight(back), delta)
    assert off <= drawn.rounding(), (
        f"P10: .to(float64) and back moves ΔW by {off:.3g}: the frozen copy is taken anew, or w"
    )
    for name, module in back.to("meta").named_modules():
        for key, value in vars(module).items():
            assert not torch.is_tensor(value) or value.is_meta, f"P10: .to() leaves {name}.{key}"


@quality
@settings(max_examples=3)
@given(case=cases())
def test_p10_nothing_is_kept_from_call_to_call(case):
    """As many tensors are alive after a third call as after a second one."""
    drawn = Drawn(case)
    alive = []
    for _ in range(3):
        drawn.layer(drawn.x).sum().backward()
        drawn.delta()
        gc.collect()
        alive.append(sum(type(thing) is torch.Tensor for thing in gc.get_objects()))
    assert alive[1] == alive[2], f"P10: {alive} tensors are alive: updates or factors are kept"


# ----------------------------------------------------------------------------------------------
# P11 nothing half done
# ----------------------------------------------------------------------------------------------


@quality
@pytest.mark.parametrize("r", (0, -1))
def test_p11_a_rank_below_one_is_refused(r):
    """r ≥ 1, or a ValueError or TypeError when the layer is built; W stays trainable."""
    weight = nn.Parameter(torch.ones(3, 2))
    with pytest.raises((ValueError, TypeError)):
        build_layer(weight, None, r, modes_and_dtypes()[0][0])
    assert weight.requires_grad and torch.equal(weight, torch.ones(3, 2))


# ----------------------------------------------------------------------------------------------
# delora.py: DeLoRA and DeLoRALinear
# ----------------------------------------------------------------------------------------------


@own
@given(case=cases())
def test_delora_is_a_lora_pair_of_twice_the_rank(case):
    """ΔW = left @ right, in float32 or wider, and only A, B and λ get gradients, come what may."""
    drawn = Drawn(case)
    delora = drawn.layer.delora
    left, right = delora.factors()
    assert left.shape == (case.n_out, 2 * case.r) and right.shape == (2 * case.r, case.n_in)
    assert distance(left @ right, drawn.delta()) <= drawn.rounding()
    assert delora.norm_bound() == pytest.approx(drawn.bound(), rel=tol(torch.float64, case.n_out))
    drawn.layer.requires_grad_(True)
    drawn.loss().backward()
    learning = {name for name, p in delora.named_parameters() if p.grad is not None}
    assert learning == {"A", "B", "lam"}
    delora.to(torch.bfloat16)
    assert {t.dtype for t in (*delora.factors(), delora.delta_weight())} == {torch.float32}


@own
@given(case=cases(dtypes=DTYPES, reach=2))
def test_delora_linear_has_the_weight_and_bias_of_what_it_merges_to(case):
    """merged() is a frozen nn.Linear of layer.weight and layer.bias, to the bit, not shared."""
    drawn = Drawn(case)
    layer, merged = drawn.layer.eval(), drawn.layer.merged()
    assert type(merged) is nn.Linear and not merged.training
    assert (merged.in_features, merged.out_features) == (case.n_in, case.n_out)
    assert same_bits(merged.weight, layer.weight)
    assert (merged.bias is None) == (layer.bias is None) == (not case.bias)
    if case.bias:
        assert same_bits(merged.bias, drawn.base.bias) and (
            merged.bias.data_ptr() != drawn.base.bias.data_ptr()
        )
    assert not any(p.requires_grad for p in merged.parameters())
    with torch.autocast("cpu", torch.bfloat16):
        assert same_bits(layer.weight, merged.weight)
    layer.enabled = False
    assert same_bits(layer.weight, drawn.base.weight)


@own
def test_delora_linear_drops_entries_of_the_adapter_s_input():
    """For x = e_j the adapter adds ΔW e_j / (1 − p) or, with probability p in training, nothing."""
    torch.manual_seed(0)
    n, p = 4000, 0.25
    layer = DeLoRALinear(nn.Linear(6, 5, dtype=torch.float64), 2, dropout=p)
    layer.delora.A.data.normal_()
    x = torch.eye(6, dtype=torch.float64)[3].expand(n, 6)
    column = layer.delora.delta_weight()[:, 3] / (1 - p)  # (out,)
    added = layer(x) - layer.base_layer(x)  # (n, out)
    kept = added.abs().sum(1) > 0
    assert distance(added[kept], column.expand(int(kept.sum()), 5)) <= tol(
        torch.float64, 20, column
    )
    assert abs((~kept).double().mean().item() - p) < 5 * (p * (1 - p) / n) ** 0.5
    assert distance(layer.eval()(x[0]) - layer.base_layer(x[0]), (1 - p) * column) <= 1e-14


# ----------------------------------------------------------------------------------------------
# delora.py: inject
# ----------------------------------------------------------------------------------------------


class Attention(nn.Module):
    """What real models have: names that end alike, a norm, a tied head, a layer of two names."""

    def __init__(self, d=8):
        super().__init__()
        self.embed = nn.Embedding(16, d)
        self.q_proj = nn.Linear(d, d)
        self.proj = nn.Linear(d, d, bias=False)
        self.norm = nn.LayerNorm(d)
        self.first = self.second = nn.Linear(d, d)
        self.head = nn.Linear(d, 16, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens):
        x = self.embed(tokens)
        x = x + self.proj(torch.tanh(self.q_proj(self.norm(x))))
        return self.head(x + self.second(torch.tanh(self.first(x))))


TOKENS = torch.arange(12).view(2, 6)


def trained(model, steps=3, lr=0.05):
    """After some steps of AdamW on a loss that moves every adapter."""
    optimizer = torch.optim.AdamW(param_groups(model, lr))
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(model(TOKENS).flatten(0, 1), TOKENS.flatten().flip(0)).backward()
        optimizer.step()
    return model


def snapshot(model):
    """All that a failed call has to leave alone: modules, tensors and their versions, modes."""
    modules = [(n, id(m), m.training) for n, m in model.named_modules(remove_duplicate=False)]
    tensors = [*model.named_parameters(remove_duplicate=False), *model.named_buffers()]
    return modules, [(name, id(t), t._version, t.requires_grad) for name, t in tensors]


def refuses(call, model, message):
    """The call raises an error with that message, and the model is as it was."""
    before = snapshot(model)
    with pytest.raises((ValueError, TypeError), match=message):
        call(model)
    assert snapshot(model) == before, f"changed by a call that failed: {message}"


@own
@pytest.mark.parametrize(
    ("targets", "exclude", "names"),
    [
        (["proj"], (), "b.proj proj"),
        (["b.proj", "q_proj"], (), "b.proj b.q_proj q_proj"),
        (("first",), (), "b.first b.second first second"),
        (r"b\..*proj", (), "b.proj b.q_proj"),
        ("all-linear", ["b"], "first head proj q_proj second"),
        ("all-linear", r"b.*|head", "first proj q_proj second"),
    ],
)
def test_inject_matches_names_from_a_dot_on_and_expressions_as_a_whole(targets, exclude, names):
    model = Attention()
    model.b = Attention()
    adapters = inject(model, targets, exclude=exclude)
    assert sorted(adapters) == names.split()
    for name, adapter in adapters.items():
        assert model.get_submodule(name) is adapter
    for name, p in model.named_parameters():
        assert p.requires_grad == name.endswith(("delora.A", "delora.B", "delora.lam")), name


@own
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"target_modules": ["q_proj", "oj"]}, r"'oj' matches nothing.*'first', 'head', 'proj'"),
        ({"target_modules": "q_pro"}, "'q_pro' matches nothing.* as a string .*regular expression"),
        ({"target_modules": "*q"}, r"'\*q' is no regular expression"),
        ({"target_modules": ["q_proj", "norm"]}, "norm: LayerNorm is no linear layer"),
        ({"target_modules": ["q_proj", ""]}, "the model itself: Attention is no linear layer"),
        ({"exclude": ["nowhere"]}, "'nowhere' matches nothing"),
        ({"exclude": "all-linear"}, "leave no layer"),
        ({"r": 0}, "q_proj: r must be .*got 0"),
        ({"r": 2.0}, "q_proj: r must be .*got 2.0"),
        ({"r": True}, "q_proj: r must be .*got True"),
        ({"lambda_init": 0}, "q_proj: lambda_init must be .*got 0"),
        ({"lambda_init": math.inf}, "q_proj: lambda_init .*got inf"),
        ({"dropout": 1.0}, "q_proj: dropout .*got 1.0"),
        ({"dropout": math.nan}, "q_proj: dropout .*got nan"),
        ({"weight_norm": "row"}, "q_proj: weight_norm .*'row'"),
    ],
)
def test_inject_names_what_is_wrong_and_changes_nothing(arguments, message):
    arguments = {"target_modules": "all-linear"} | arguments
    refuses(lambda model: inject(model, **arguments), Attention(), message)


@own
def test_inject_names_the_layer_that_cannot_be_adapted_and_changes_nothing():
    model = Attention()
    model.proj.weight.data[0, 0] = math.nan
    refuses(lambda m: inject(m, "all-linear"), model, "^proj: .*not finite")
    refuses(lambda m: inject(m, [""]), nn.Linear(2, 2), "model itself")
    model.proj.to("meta")
    refuses(lambda m: inject(m, "all-linear"), model, "^proj.* on the meta device, without values")
    inject(model, "all-linear", exclude=["proj"])
    layer = nn.Linear(2, 2, bias=False)
    nn.init.zeros_(layer.weight)
    with pytest.warns(UserWarning, match="^0: W is zero.*weight_norm=None"):
        inject(nn.Sequential(layer), ["0"])


# ----------------------------------------------------------------------------------------------
# delora.py: merge, unmerge, disabled
# ----------------------------------------------------------------------------------------------


@own
@pytest.mark.parametrize("dtype", DTYPES)
def test_merge_and_unmerge_restore_every_bit_of_a_model(dtype):
    """Merging touches nobody else's tensor, and unmerging puts back the same objects."""
    torch.manual_seed(0)
    model = Attention()
    inject(model, "all-linear", r=3)
    trained(model).to(dtype).eval()
    before, bits = snapshot(model), copy.deepcopy(model.state_dict())
    adapted = model(TOKENS)
    for _ in range(3):
        adapters = merge(model)
        assert sorted(adapters) == ["first", "head", "proj", "q_proj", "second"]
        assert type(model.first) is nn.Linear and model.first is model.second
        assert not any(isinstance(m, DeLoRALinear) for m in model.modules())
        assert same_bits(model.proj.weight, adapters["proj"].weight)
        assert distance(model(TOKENS), adapted) <= tol(dtype, 8, adapted)
        assert same_bits(model.embed.weight, bits["embed.weight"])
        unmerge(model, adapters)
    assert snapshot(model) == before and same_bits(model(TOKENS), adapted)
    for name, value in model.state_dict().items():
        assert same_bits(value, bits[name]), name


@own
def test_merge_and_unmerge_refuse_what_does_not_fit():
    model = Attention().half()
    inject(model, ["q_proj", "first"], r=1)
    model.q_proj.delora.A.data.neg_()
    model.q_proj.delora.w.data.fill_(6e4)
    refuses(merge, model, "^q_proj: .*not finite")
    refuses(merge, Attention(), "there is no adapter here")
    refuses(merge, DeLoRALinear(nn.Linear(2, 2)), "model itself")
    model.q_proj.delora.w.data.fill_(1)
    adapters = merge(model)
    for wrong in ({"q_proj": nn.Linear(8, 8)}, {"norm": adapters["q_proj"]}, {"no": 3}):
        refuses(
            lambda m, wrong=wrong: unmerge(m, adapters | wrong), model, f"^{next(iter(wrong))}: "
        )
    unmerge(model, adapters)
    refuses(lambda m: unmerge(m, adapters), model, "q_proj: there is no merged layer")


@own
def test_disabled_is_the_pretrained_model_and_nests():
    model = Attention()
    base = model(TOKENS)
    inject(model, ["q_proj", "second"], r=2)
    adapted = trained(model)(TOKENS)
    with pytest.raises(KeyError), disabled(model):
        with disabled(model):
            assert same_bits(model(TOKENS), base)
        assert same_bits(model(TOKENS), base)
        raise KeyError
    assert same_bits(model(TOKENS), adapted) and not torch.equal(adapted, base)


# ----------------------------------------------------------------------------------------------
# delora.py: param_groups, adapter_state_dict, load_adapter
# ----------------------------------------------------------------------------------------------


@own
def test_param_groups_give_lambda_its_own_rate_and_no_decay():
    model = Attention()
    adapters = inject(model, ["q_proj", "first"])
    model.norm.requires_grad_(True)
    rest, strengths = param_groups(model, 1e-2, lambda_lr=0.0, weight_decay=0.1)
    assert (rest["lr"], rest["weight_decay"]) == (1e-2, 0.1)
    assert (strengths["lr"], strengths["weight_decay"]) == (0.0, 0.0)
    lams = [adapters["q_proj"].delora.lam, adapters["first"].delora.lam]
    trainable = [p for p in model.parameters() if p.requires_grad]
    assert list(map(id, strengths["params"])) == list(map(id, lams))
    assert sorted(map(id, rest["params"] + lams)) == sorted(map(id, trainable))
    lams[0].requires_grad_(False)
    rest, strengths = param_groups(model, 1e-2)
    assert (rest["weight_decay"], strengths["lr"]) == (0.0, 1e-2)
    assert strengths["params"][0] is lams[1] and len(strengths["params"]) == 1


@own
def test_param_groups_refuse_a_trainable_w_and_warn_of_16_bits():
    model = Attention()
    inject(model, "all-linear")
    model.first.base_layer.bias.requires_grad_(True)  # that is no weight
    param_groups(model, 1e-2)
    model.embed.requires_grad_(True)  # which is the head, too
    refuses(lambda m: param_groups(m, 1e-2), model, r"^head: base_layer.weight is .*\['head'\]")
    model.embed.requires_grad_(False)
    with pytest.warns(UserWarning, match="cast first, then inject"):
        param_groups(model.bfloat16(), 1e-2)


@own
@pytest.mark.parametrize("mode", MODES)
def test_load_adapter_restores_the_outputs_bit_for_bit_without_a_configuration(mode):
    torch.manual_seed(0)
    pretrained = Attention()
    model = copy.deepcopy(pretrained)
    inject(model, ["q_proj"], 3, 2.0, weight_norm=mode[0], tie_lambda=mode[1])
    inject(model, ["second"], r=2)
    model.norm.requires_grad_(True)
    state = through_a_file(adapter_state_dict(trained(model)))
    others = [key for key in state if ".delora." not in key]
    assert others == ["norm.weight", "norm.bias"]
    assert len(state) == 2 + 3 * 6 + (not mode[1]) and not any(
        t.requires_grad for t in state.values()
    )
    fresh = copy.deepcopy(pretrained)
    adapters = load_adapter(fresh, state)
    assert sorted(adapters) == ["first", "q_proj", "second"] and fresh.first is fresh.second
    assert same_bits(fresh(TOKENS), model(TOKENS))
    assert f"r=3, lam={model.q_proj.delora.lam.data}, w={mode[0]}, tied={mode[1]}" in str(fresh)
    for name, p in fresh.named_parameters():
        assert p.requires_grad == name.endswith(("delora.A", "delora.B", "delora.lam")), name
    saved, y = adapter_state_dict(trained(fresh)), fresh(TOKENS)
    load_adapter(trained(fresh), saved)  # saved is a copy: training on left it alone
    assert same_bits(fresh(TOKENS), y)


@own
def test_load_adapter_names_the_key_that_does_not_fit_and_changes_nothing():
    source = Attention()
    inject(source, ["q_proj", "first"], r=3, tie_lambda=False)
    state = adapter_state_dict(source)
    smaller, more = Attention(), Attention()
    inject(smaller, ["q_proj", "first"], r=2, tie_lambda=False)
    inject(more, ["q_proj", "first", "proj"], r=3, tie_lambda=False)
    A, ones = "q_proj.delora.A", torch.ones(3, 8)
    for change, message in (
        ({A: None}, "q_proj.delora.A"),
        ({"q_proj.delora.A0": None}, "q_proj.delora.A0 is missing"),
        ({A: ones[:, :7]}, rf"{A}: .*\[3, 7\]\) in the file, .*\[3, 8\]\) here"),
        ({A: ones.long()}, f"{A} is no tensor of finite"),
        ({A: ones * math.nan}, f"{A} is no tensor of finite"),
        ({"no.delora.A": ones}, "no.delora.A: the model has nothing of that name"),
        ({"norm.weight": ones}, "norm.weight: "),
        ({"second.delora.lam": torch.ones(1)}, "(first|second).delora.lam: tied"),
        ({"module.q_proj.delora.A": ones}, "'module.' comes from DistributedDataParallel"),
    ):
        new = {k: v for k, v in (state | change).items() if v is not None}
        refuses(lambda m, new=new: load_adapter(m, new), Attention(), message)
    refuses(lambda m: load_adapter(m, state), smaller, rf"{A}: .*\[3, 8\]\) in the file")
    refuses(lambda m: load_adapter(m, state), more, "proj.delora.A is missing")
    refuses(lambda m: load_adapter(m, {}), Attention(), "there is no adapter here")
    refuses(lambda m: load_adapter(m, "adapter.pt"), Attention(), "torch.load.*adapter.pt")


@own
def test_load_adapter_warns_of_an_adapter_of_another_base():
    """w says what W was; 5 % of its mean may be rounding, and a file may bring its own W."""
    torch.manual_seed(0)
    model = Attention()
    other = copy.deepcopy(model)
    inject(model, ["q_proj", "proj"], r=2)
    other.proj.weight.data[:, 3] *= 1.2
    with pytest.warns(
        UserWarning, match=r"^proj: w has norm [\d.]+ in the check.*, [\d.]+ here"
    ) as seen:
        load_adapter(other, adapter_state_dict(model))
    assert len(seen) == 1
    load_adapter(other, model.state_dict())  # no word: here any warning is an error
    assert same_bits(other.proj.weight, model.proj.weight)


# ----------------------------------------------------------------------------------------------
# delora.py: DeLoRA as a parametrization
# ----------------------------------------------------------------------------------------------


@own
def test_a_parametrization_starts_and_merges_as_a_layer_does():
    """Of a convolution: W is read as (out, the rest). More of it: examples/tests/test_torch.py."""
    conv, x = nn.Conv1d(3, 4, 5, dtype=torch.bfloat16), torch.randn(2, 3, 8).bfloat16()
    before, shape = conv(x), conv.weight.shape
    nn.utils.parametrize.register_parametrization(conv, "weight", DeLoRA(conv.weight, r=2))
    assert same_bits(conv(x), before)
    conv.parametrizations.weight[0].A.data.neg_()
    after = conv(x)
    nn.utils.parametrize.remove_parametrizations(conv, "weight", leave_parametrized=True)
    assert type(conv) is nn.Conv1d and conv.weight.shape == shape
    assert same_bits(conv(x), after) and not torch.equal(after, before)
