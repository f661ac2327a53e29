"""examples/anywhere.py: DeLoRA as a parametrization, and all that the example says of it."""

import copy
import shutil
import sys

import anywhere
import pytest
import torch
from anywhere import TARGETS, ByteModel, merge_all, register
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrize
from torch.utils._python_dispatch import TorchDispatchMode

from delora import DeLoRA, adapter_state_dict, inject, load_adapter, merge, param_groups
from test_delora import distance, nuclear_norm, same_bits, tol

TOKENS = torch.arange(48).view(2, 24) * 5 % 256  # (batch, time)
R = 4  # of the head's adapter


# ------------------------------------------------------------------------------------------------
# Helpers
# ------------------------------------------------------------------------------------------------


def adapted(model):
    """The model with all its adapters, new."""
    register(model)
    inject(model, ["head"], r=R)
    return model


def moved(model):
    """The model after a turn of all components, and another λ."""
    for module in model.modules():
        if isinstance(module, DeLoRA):
            with torch.no_grad():
                module.A.normal_()
                module.B.normal_()
                module.lam.fill_(30.0)
    return model


def parametrized(module, name="weight"):
    """The module with a new adapter, and the adapter."""
    weight = getattr(module, name).requires_grad_(False)
    delora = DeLoRA(weight, r=2)
    parametrize.register_parametrization(module, name, delora)
    return module, delora


def steps(model, count=3):
    optimizer = torch.optim.AdamW(param_groups(model, lr=0.01))
    for _ in range(count):
        logits = model(TOKENS[:, :-1])  # (batch, time, 256)
        loss = F.cross_entropy(logits.flatten(0, 1), TOKENS[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


class Operations(TorchDispatchMode):
    """The operations within, as pairs of a name and a result. All results are kept alive."""

    def __init__(self):
        super().__init__()
        self.done = []

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        result = operation(*args, **(kwargs or {}))
        self.done.append((str(operation), result))
        return result


# ------------------------------------------------------------------------------------------------
# The example
# ------------------------------------------------------------------------------------------------


def run(monkeypatch, folder):
    monkeypatch.setattr(sys, "argv", ["anywhere.py", "--quick"])
    monkeypatch.setattr(anywhere, "CACHE", folder / "cache")
    anywhere.main()


def test_the_example_runs(monkeypatch, tmp_path, capsys):
    run(monkeypatch, tmp_path)
    printed = capsys.readouterr().out
    assert printed.count(": yes\n") == 6 and "NO" not in printed
    for name in ("token", "conv", "attention", "head.delora"):
        assert f"    {name}" in printed


class NotZero(DeLoRA):
    """Its start is not the pretrained weight."""

    def forward(self, weight):
        return super().forward(weight) + 1e-3


def train_nothing(model, *rest):
    model.eval()


def load_nothing(model, state_dict):
    inject(model, ["head"])


def merge_the_head_only(model):
    merge(model)


def merge_without_update(model):
    merge(model)
    for path, name in TARGETS.items():
        module = model.get_submodule(path)
        parametrize.remove_parametrizations(module, name, leave_parametrized=False)


def no_bound(delora):
    return 1e-6


@pytest.mark.parametrize(
    ("where", "name", "broken", "message"),
    (
        (anywhere, "DeLoRA", NotZero, "the start is the pretrained model"),
        (anywhere, "train", train_nothing, "the loss falls"),
        (DeLoRA, "norm_bound", no_bound, "every ΔW is within its bound"),
        (anywhere, "load_adapter", load_nothing, "the reloaded model has the same outputs"),
        (anywhere, "merge_all", merge_the_head_only, "the merged model has plain modules only"),
        (anywhere, "merge_all", merge_without_update, "its outputs are the same up to rounding"),
    ),
)
def test_the_example_ends_with_an_error_if_something_is_wrong(
    monkeypatch, tmp_path, where, name, broken, message
):
    monkeypatch.setattr(where, name, broken)
    with pytest.raises(SystemExit, match=f"^Something is wrong.* {message}"):
        run(monkeypatch, tmp_path)


@pytest.mark.parametrize("fused", (True, False))  # without gradients, attention is fused
def test_the_model_is_causal(fused):
    torch.manual_seed(0)
    model = ByteModel().eval()
    changed = TOKENS.clone()
    changed[:, 10:] += 1
    with torch.set_grad_enabled(not fused):
        logits, others = model(TOKENS), model(changed)  # (batch, time, 256)
    # The terms of all sums in a row: kernel 4, q 1, out 1, up 1, down 4, head 1, times WIDTH; then
    # a product of q and k, and the average over what was before.
    terms = 12 * anywhere.WIDTH + anywhere.WIDTH // anywhere.HEADS + 24
    rounding = tol(torch.float32, terms, logits)
    assert distance(logits[:, :10], others[:, :10]) <= rounding
    assert distance(logits[:, 10:], others[:, 10:]) > 10 * rounding


# ------------------------------------------------------------------------------------------------
# Start, training, bound, checkpoint, merge
# ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("training", (True, False))
@pytest.mark.parametrize(
    ("dtype", "autocast"),
    (
        (torch.float32, None),
        (torch.float32, torch.bfloat16),
        (torch.float32, torch.float16),
        (torch.bfloat16, None),
        (torch.bfloat16, torch.bfloat16),
    ),
)
def test_the_start_changes_no_bit_of_the_output(dtype, autocast, training):
    torch.manual_seed(0)
    model = ByteModel().to(dtype).train(training)
    context = torch.autocast("cpu", dtype=autocast, enabled=autocast is not None)
    with context, torch.set_grad_enabled(training):
        start = model(TOKENS)
        adapted(model)
        assert same_bits(model(TOKENS), start)
        moved(model)
        assert distance(model(TOKENS), start) > 0.1


def test_every_adapter_gets_gradients_and_moves_and_nothing_else_does():
    torch.manual_seed(0)
    model = adapted(ByteModel())
    before = copy.deepcopy(model.state_dict())
    steps(model)
    for name, p in model.named_parameters():
        leaf = name.rpartition(".")[2]
        trained = leaf in ("A", "B", "lam")
        assert trained == p.requires_grad, name
        assert trained != same_bits(p, before[name]), name
        if trained:
            assert p.grad.count_nonzero() == p.numel(), name
    deloras = [module for module in model.modules() if isinstance(module, DeLoRA)]
    assert len(deloras) == len(TARGETS) + 1
    for delora in deloras:
        assert 0 < nuclear_norm(delora.delta_weight()) <= delora.norm_bound()


def test_an_original_that_is_trainable_is_refused():
    conv = nn.Conv1d(4, 4, 3)
    parametrize.register_parametrization(conv, "weight", DeLoRA(conv.weight))
    with pytest.raises(ValueError, match="original is trainable"):
        param_groups(conv, lr=1e-3)
    conv.parametrizations.weight.original.requires_grad_(False)
    param_groups(conv, lr=1e-3)
    model = ByteModel()
    register(model)
    param_groups(model, lr=1e-3)  # `register` freezes, without `inject`


def test_a_checkpoint_gives_the_same_outputs_bit_for_bit(tmp_path):
    torch.manual_seed(0)
    model = ByteModel()
    fresh = copy.deepcopy(model)
    moved(adapted(model))
    torch.save(adapter_state_dict(model), tmp_path / "adapter.pt")
    state = torch.load(tmp_path / "adapter.pt", weights_only=True)
    with pytest.raises(ValueError, match="a parametrization is registered first"):
        load_adapter(fresh, state)
    register(fresh)
    assert set(load_adapter(fresh, state)) == {"head"}
    assert same_bits(fresh(TOKENS), model(TOKENS))
    assert not fresh.up.weight.requires_grad
    assert not any(".original" in key or ".base_layer" in key for key in state)


# How many roundings of the head are in a logit. A sum of bfloat16 is made in float32, so what is
# rounded is the left and right factor, h, W x, ΔW x and their sum; W + ΔW and the product with it.
@pytest.mark.parametrize(
    ("dtype", "roundings"), ((torch.float32, anywhere.WIDTH + 2 * R), (torch.bfloat16, 8))
)
@torch.no_grad()
def test_merging_gives_plain_modules_with_the_same_outputs(dtype, roundings):
    torch.manual_seed(0)
    model = ByteModel().to(dtype).eval()
    start = model(TOKENS)
    moved(adapted(model))
    hidden = []  # what the head gets, (batch, time, width)
    model.norm3.register_forward_hook(lambda module, inputs, output: hidden.append(output))
    unmerged = model(TOKENS)
    before = {}
    for path, name in TARGETS.items():
        module = model.get_submodule(path)
        before[path] = module.parametrizations[name].original, getattr(module, name)
    merge_all(model)

    assert str(model) == str(ByteModel())
    assert set(model.state_dict()) == set(ByteModel().state_dict())
    for path, name in TARGETS.items():
        original, weight = before[path]
        merged = getattr(model.get_submodule(path), name)
        assert merged is original and not merged.requires_grad
        assert same_bits(merged, weight)
    rounding = tol(dtype, roundings, unmerged)
    assert distance(model(TOKENS), unmerged) <= rounding < distance(start, unmerged)
    assert same_bits(hidden[0], hidden[1])  # all but the head computes as before


# ------------------------------------------------------------------------------------------------
# Where parametrized weights are used
# ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ("attention", "layer"))
def test_the_fused_path_in_evaluation_sees_the_adapter(kind):
    torch.manual_seed(0)
    if kind == "attention":
        model, fused = nn.MultiheadAttention(16, 2, batch_first=True), "native_multi_head_attention"
        attention = model
        inputs = (torch.randn(2, 5, 16),) * 3
    else:
        model = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
        fused = "transformer_encoder_layer_fwd"
        attention = model.self_attn
        inputs = (torch.randn(2, 5, 16),)
    model.eval()
    plain = copy.deepcopy(model)
    parametrized(attention, "in_proj_weight")
    moved(model)

    def output(layer):
        with torch.no_grad(), Operations() as operations:
            y = layer(*inputs)
        assert any(fused in name for name, _ in operations.done)
        return y if kind == "layer" else y[0]

    start = output(plain)
    with torch.no_grad():
        inside = plain if kind == "attention" else plain.self_attn
        inside.in_proj_weight.copy_(attention.in_proj_weight)
    assert same_bits(output(model), output(plain))
    assert distance(output(model), start) > 0.1


@pytest.mark.parametrize(
    ("kind", "convolve", "groups"),
    (
        (nn.Conv1d, F.conv1d, 1),
        (nn.Conv2d, F.conv2d, 2),
        (nn.Conv2d, F.conv2d, 8),
        (nn.Conv3d, F.conv3d, 4),
    ),
)
def test_a_kernel_is_read_as_a_matrix(kind, convolve, groups):
    """Plain, grouped and depthwise: w, ΔW and outputs against the kernel taken apart by hand."""
    torch.manual_seed(0)
    conv = kind(8, 16, 3, groups=groups, bias=False)
    kernel = conv.weight.detach().clone()  # (out, in/groups, 3, ...)
    x = torch.randn(2, 8, *(6,) * (kernel.dim() - 2))
    start = conv(x)
    _, delora = parametrized(conv)
    assert same_bits(conv(x), start)
    moved(conv)

    columns = kernel.view(16, -1)  # (out, the rest)
    assert delora.w.shape == (columns.shape[1],)
    for j in range(columns.shape[1]):
        norm = columns[:, j].norm()
        assert distance(delora.w[j], norm) <= tol(torch.float32, 16, norm)

    # ΔW from the equation, component by component, in float64.
    update = torch.zeros_like(columns, dtype=torch.float64)  # (out, the rest)
    strength = delora.lam.item() / 2
    for sign, A, B in ((1, delora.A, delora.B), (-1, delora.A0, delora.B0)):
        for i in range(2):
            a = A[i].detach().double()  # (the rest,)
            b = B[:, i].detach().double()  # (out,)
            update += sign * strength * torch.outer(b / b.norm(), a / a.norm() * delora.w.double())
    wanted = kernel.double() + update.view(kernel.shape)
    terms = columns.shape[1] + 2 * 16 + 4  # of the norms of a, b and W's columns; 2r components
    assert distance(conv.weight, wanted) <= tol(torch.float32, terms, wanted)
    y = convolve(x.double(), wanted, groups=groups)
    assert distance(conv(x), y) <= tol(torch.float32, terms + columns.shape[1], y)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs g++ on a CPU")
@pytest.mark.filterwarnings("ignore")  # torch's own, about itself
def test_a_compiled_convolution_is_the_same():
    torch.manual_seed(0)
    conv = nn.Conv1d(8, 8, 3)
    x = torch.randn(2, 8, 12)
    start = torch.compile(conv)(x)
    _, delora = parametrized(conv)
    compiled = torch.compile(conv)
    assert same_bits(compiled(x), start)
    moved(conv)
    terms = 24 + 24 + 8 + 4  # the convolution, the norms of a and b, the sum over 2r components
    rounding = tol(torch.float32, terms, conv(x))
    assert distance(compiled(x), conv(x)) <= rounding < distance(compiled(x), start)
    compiled(x).square().sum().backward()
    gradient = delora.A.grad.clone()
    conv.zero_grad()
    conv(x).square().sum().backward()
    terms = 2 * terms + 20  # the sums once more, and one over 2 · 10 positions
    assert distance(gradient, delora.A.grad) <= tol(torch.float32, terms, delora.A.grad)


def test_every_row_of_an_embedding_moves():
    torch.manual_seed(0)
    embedding, delora = parametrized(nn.Embedding(10, 6, padding_idx=0))
    optimizer = torch.optim.SGD(param_groups(embedding, lr=0.1))
    for _ in range(2):
        optimizer.zero_grad()
        embedding(torch.tensor([0, 1, 2])).square().sum().backward()
        optimizer.step()
    assert (delora.delta_weight().norm(dim=1) > 1e-3).all()


def test_an_embedding_with_sparse_gradients_cannot_be_trained():
    embedding, delora = parametrized(nn.Embedding(10, 6, sparse=True))
    with pytest.raises(RuntimeError, match="sparse"):
        embedding(torch.tensor([1, 2])).square().sum().backward()
    embedding.sparse = False
    embedding(torch.tensor([1, 2])).square().sum().backward()
    assert delora.A.grad.count_nonzero()


@pytest.mark.parametrize(("whole", "arrays"), ((True, 2), (False, 0)))
def test_inject_forms_neither_the_update_nor_the_gradient_of_the_weight(whole, arrays):
    n_in, n_out, batch = 40, 24, 3
    model = nn.Sequential(nn.Linear(n_in, n_out))
    if whole:
        parametrized(model[0])
    else:
        inject(model, ["0"], r=2)
    x = torch.randn(batch, n_in, requires_grad=True)
    W = model[0].parametrizations.weight.original if whole else model[0].base_layer.weight
    with Operations() as operations:
        model(x).sum().backward()
    formed = set()
    for _, result in operations.done:
        if isinstance(result, torch.Tensor) and result.numel() == W.numel():
            formed.add(result.untyped_storage().data_ptr())
    assert len(formed - {W.data_ptr()}) == arrays


@pytest.mark.parametrize("training", (True, False))
def test_cached_forms_the_update_once_in_a_forward_pass(training):
    torch.manual_seed(0)
    attention, delora = parametrized(
        nn.MultiheadAttention(8, 2, batch_first=True), "in_proj_weight"
    )
    attention.train(training)
    formed = []
    delora.register_forward_hook(lambda *args: formed.append(1))
    x = torch.randn(2, 5, 8)
    with torch.set_grad_enabled(training):
        y = attention(x, x, x, need_weights=False)[0]
        assert 3 <= len(formed) <= 5
        formed.clear()
        with parametrize.cached():
            assert same_bits(attention(x, x, x, need_weights=False)[0], y)
        assert len(formed) == 1


def test_what_is_cached_is_used_again_after_a_step():
    torch.manual_seed(0)
    embedding, delora = parametrized(nn.Embedding(10, 6))
    tokens = torch.tensor([1, 2])
    with parametrize.cached():
        before = embedding(tokens)
        moved(embedding)
        assert same_bits(embedding(tokens), before)
    assert distance(embedding(tokens), before) > 0.1


# ------------------------------------------------------------------------------------------------
# Ties and copies
# ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("own", (True, False))
def test_what_is_tied_keeps_W_until_the_parametrization_is_removed(own):
    torch.manual_seed(0)
    token, head = nn.Embedding(16, 8), nn.Linear(8, 16, bias=False)
    head.weight = token.weight
    W = token.weight.detach().clone()
    tied = token.weight
    parametrized(token)
    moved(token)
    assert token.parametrizations.weight.original is head.weight
    assert same_bits(head.weight, W)
    merged = token.weight.detach()
    assert distance(merged, W) > 0.1

    if own:
        head.weight = nn.Parameter(W.clone())
    parametrize.remove_parametrizations(token, "weight", leave_parametrized=True)
    assert token.weight is tied and same_bits(tied, merged)
    assert (head.weight is tied) != own
    assert same_bits(head.weight, W if own else merged)


@pytest.mark.parametrize("head_first", (True, False))
def test_a_head_that_is_tied_is_merged_first(head_first):
    torch.manual_seed(0)
    model = ByteModel()
    model.head.weight = model.token.weight
    start = model(TOKENS)
    adapted(model)
    assert same_bits(model(TOKENS), start)
    moved(model)
    assert model.head.base_layer.weight is model.token.parametrizations.weight.original
    unmerged = model(TOKENS)
    if head_first:
        merge_all(model)
    else:
        parametrize.remove_parametrizations(model.token, "weight", leave_parametrized=True)
        merge(model)
    rounding = tol(torch.float32, anywhere.WIDTH + 2 * R, unmerged)
    assert (distance(model(TOKENS), unmerged) <= rounding) == head_first


def test_two_that_are_tied_and_parametrized_are_given_the_update_twice():
    torch.manual_seed(0)
    token, head = nn.Embedding(16, 8), nn.Linear(8, 16, bias=False)
    head.weight = token.weight
    W = token.weight.detach().clone()
    _, delora = parametrized(token)
    parametrize.register_parametrization(head, "weight", delora)
    moved(token)
    update = delora.delta_weight().detach()
    assert same_bits(token.weight, head.weight)
    for module in (token, head):
        parametrize.remove_parametrizations(module, "weight", leave_parametrized=True)
    wanted = W + 2 * update
    assert distance(token.weight, wanted) <= tol(torch.float32, 4, wanted)


def test_a_copy_is_independent_until_a_parametrization_is_removed():
    torch.manual_seed(0)
    model = adapted(ByteModel())
    twin = copy.deepcopy(model)
    start = model(TOKENS)
    steps(twin)
    assert same_bits(model(TOKENS), start) and distance(twin(TOKENS), start) > 1e-3
    assert not {p.data_ptr() for p in model.parameters()} & {
        p.data_ptr() for p in twin.parameters()
    }

    # One class for both: torch deletes its property `weight`, and the twin's is gone too.
    assert type(twin.conv) is type(model.conv)
    merge_all(model)
    with pytest.raises(AttributeError, match="weight"):
        twin(TOKENS)


def test_a_copy_made_before_registering_is_independent_for_good():
    torch.manual_seed(0)
    model = ByteModel()
    twin = copy.deepcopy(model)
    moved(adapted(model))
    moved(adapted(twin))
    y = twin(TOKENS)
    merge_all(model)
    assert same_bits(twin(TOKENS), y)
