"""delora.py where its users are: Hugging Face models, quantised layers, PyTorch's modes, two processes, checkpoints.

    pytest examples/test_hosts.py               what needs a package that is not installed is skipped by its name

Nothing is downloaded: models are made from small configurations, and trained for a few steps on real text.
"""

from __future__ import annotations

import copy
import os
import pickle
import shutil
from datetime import timedelta
from pathlib import Path

import pytest
import quickstart
import torch
import torch.distributed as dist
from torch import Tensor, nn

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
from test_delora import distance, norms, same_bits, snapshot, tol

pytestmark = pytest.mark.filterwarnings(
    "default"
)  # what other packages warn of is not what is tested
os.environ.update(HF_HUB_OFFLINE="1", BITSANDBYTES_NOWELCOME="1")

TEXT = quickstart.english()["train"][:4096].long() % 128  # (bytes,), of ASCII
TOKENS = TEXT[:24].view(2, 12)  # (batch, time)


# ------------------------------------------------------------------------------------------------ helpers


def steps(model: nn.Module, loss, count: int = 3, lr: float = 1e-2) -> dict[str, Tensor]:
    """Steps of AdamW. Returns the gradients of the last one, by name."""
    optimizer = torch.optim.AdamW(param_groups(model, lr))
    for _ in range(count):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def moved(model: nn.Module) -> dict[str, DeLoRALinear]:
    """The adapters, after a turn of all their components."""
    adapters = {
        name: module for name, module in model.named_modules() if isinstance(module, DeLoRALinear)
    }
    torch.manual_seed(1)
    for adapter in adapters.values():
        adapter.delora_A.data.normal_()
    return adapters


def depth(model: nn.Module) -> int:
    """The roundings in a row from the first layer to the last: the terms of the sums of every linear layer."""
    weights = [getattr(module, "weight", None) for module in model.modules()]
    return sum(weight.shape[-1] for weight in weights if isinstance(weight, Tensor))


# ------------------------------------------------------------------------------------------------ Hugging Face


def hugging_face(kind: str, **changes) -> tuple[nn.Module, dict[str, Tensor]]:
    """A small model of that kind without dropout, and its input with labels."""
    transformers = pytest.importorskip("transformers")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.manual_seed(0)
    ends = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "vocab_size": 128}
    calm = {
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "initializer_range": 0.2,
    }
    small = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    inputs = {"input_ids": TOKENS, "labels": TOKENS}
    if kind == "GPT-2":
        config = {
            "n_embd": 32,
            "n_layer": 2,
            "n_head": 4,
            "n_positions": 64,
            "initializer_range": 0.2,
        } | ends
        config |= {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
        return transformers.GPT2LMHeadModel(
            transformers.GPT2Config(**config | changes)
        ).eval(), inputs
    if kind == "Llama":
        config = small | ends | {"num_key_value_heads": 2, "initializer_range": 0.2}
        return transformers.LlamaForCausalLM(
            transformers.LlamaConfig(**config | changes)
        ).eval(), inputs
    if kind == "T5":
        config = {
            "d_model": 32,
            "d_kv": 8,
            "d_ff": 48,
            "num_layers": 2,
            "num_heads": 4,
            "dropout_rate": 0.0,
        } | ends
        config |= {"decoder_start_token_id": 0}
        return transformers.T5ForConditionalGeneration(
            transformers.T5Config(**config | changes)
        ).eval(), inputs
    if kind == "BERT":
        config = small | ends | calm
        model = transformers.BertForSequenceClassification(
            transformers.BertConfig(**config | changes)
        )
        return model.eval(), {"input_ids": TOKENS, "labels": torch.tensor([0, 1])}
    config = small | calm | {"image_size": 16, "patch_size": 8}
    model = transformers.ViTForImageClassification(transformers.ViTConfig(**config | changes))
    pixels = TEXT[: 2 * 3 * 16 * 16].view(2, 3, 16, 16) / 64 - 1  # (batch, channel, height, width)
    return model.eval(), {"pixel_values": pixels.to(model.dtype), "labels": torch.tensor([0, 1])}


KINDS = ("GPT-2", "Llama", "T5", "BERT", "ViT")


@pytest.mark.parametrize("kind", KINDS)
def test_a_hugging_face_model_starts_equal_trains_every_adapter_and_merges(kind, tmp_path):
    """GPT-2 has Conv1D; T5 reads wo.weight.dtype in forward; Llama's heads share keys; BERT and ViT have a pooler."""
    model, inputs = hugging_face(kind)
    pretrained = copy.deepcopy(model)
    with torch.no_grad():
        before = model(**inputs).logits
    adapters = inject(model, "all-linear", r=2)
    linear = {
        name
        for name, module in pretrained.named_modules()
        if type(module).__name__ in ("Linear", "Conv1D")
    }
    assert set(adapters) == linear and len(adapters) > 8
    with torch.no_grad():
        assert same_bits(model(**inputs).logits, before)
    found = steps(model.train(), lambda: model(**inputs).loss)
    for name in adapters:
        for leaf in ("A", "B", "lambda"):
            gradient = found[f"{name}.delora_{leaf}"]
            assert gradient.isfinite().all() and gradient.count_nonzero(), (name, leaf)
    assert found.keys() == {name for name, p in model.named_parameters() if p.requires_grad}

    model.eval()
    with torch.no_grad():
        adapted = model(**inputs).logits
        torch.save(adapter_state_dict(model), tmp_path / "adapter.pt")
        load_adapter(pretrained, torch.load(tmp_path / "adapter.pt", weights_only=True))
        assert same_bits(pretrained(**inputs).logits, adapted)
        taken = merge(model)
        merged, rounding = model(**inputs).logits, tol(torch.float32, depth(model), adapted)
        assert distance(merged, adapted) <= rounding < distance(adapted, before)
        unmerge(model, taken)
        assert same_bits(model(**inputs).logits, adapted)


@pytest.mark.parametrize("kind", KINDS)
def test_a_hugging_face_model_in_bfloat16_starts_equal_and_keeps_its_dtype(kind):
    model, inputs = hugging_face(kind)
    model.bfloat16()
    inputs = {
        name: tensor.bfloat16() if tensor.is_floating_point() else tensor
        for name, tensor in inputs.items()
    }
    model.requires_grad_(
        False
    )  # as inject will: PyTorch has other kernels for attention where T5's biases are trained
    before = model(**inputs).logits
    inject(model, "all-linear", r=2)
    assert same_bits(model(**inputs).logits, before)
    found = steps(model, lambda: model(**inputs).loss)
    assert {gradient.dtype for gradient in found.values()} == {torch.float32}
    assert (
        not same_bits(model(**inputs).logits, before)
        and model(**inputs).logits.dtype == torch.bfloat16
    )
    merge(model)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("tied", (True, False))
def test_a_merged_hugging_face_model_is_saved_and_loaded_as_any_other(tied, tmp_path):
    """Also where the head was tied to the embedding: merged, it is no longer, and the folder has both."""
    model, inputs = hugging_face("Llama", tie_word_embeddings=tied)
    inject(model, "all-linear", r=2)
    moved(model)
    merge(model)
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    with torch.no_grad():
        assert same_bits(again(**inputs).logits, model(**inputs).logits)


def test_a_merged_gpt2_is_no_checkpoint_for_a_gpt2_with_conv1d(tmp_path):
    """As the README warns: the merged layers are nn.Linear, whose weight is the transpose of Conv1D's."""
    model, inputs = hugging_face("GPT-2")
    inject(model, ["mlp.c_fc"], r=2)
    merge(model)
    model.save_pretrained(tmp_path)
    with pytest.raises(RuntimeError):
        type(model).from_pretrained(tmp_path)


def test_generation_with_a_cache_follows_the_adapter():
    model, _ = hugging_face("Llama")
    inject(model, "all-linear", exclude=["lm_head"], r=2)
    moved(model)
    options = {"max_new_tokens": 8, "do_sample": False}
    adapted, slow = (model.generate(TOKENS, **options, use_cache=cache) for cache in (True, False))
    with disabled(model):
        base = model.generate(TOKENS, **options)
    assert torch.equal(adapted, slow) and not torch.equal(adapted, base)


@pytest.mark.parametrize("reentrant", (True, False))
def test_gradient_checkpointing_in_a_hugging_face_model_changes_no_gradient(reentrant):
    model, inputs = hugging_face("Llama")
    inject(model, "all-linear", r=2)
    moved(model)
    model.train()
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()  # what a reentrant checkpoint needs where the embedding is frozen
        model.zero_grad()
        model(**inputs).loss.backward()
        gradients.append(
            {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}
        )
    assert all(same_bits(gradients[1][name], gradient) for name, gradient in gradients[0].items())


def test_the_trainer_of_hugging_face_takes_the_two_groups(tmp_path):
    pytest.importorskip("accelerate")
    model, _ = hugging_face("Llama")
    adapters = inject(model, ["q_proj", "v_proj"], r=2)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    import transformers

    optimizer = torch.optim.AdamW(param_groups(model, lr=1e-2, lambda_lr=5e-3))
    options = {
        "max_steps": 3,
        "per_device_train_batch_size": 2,
        "save_strategy": "no",
        "lr_scheduler_type": "constant",
    }
    arguments = transformers.TrainingArguments(
        str(tmp_path), use_cpu=True, report_to=[], disable_tqdm=True, **options
    )
    rows = [{"input_ids": row, "labels": row} for row in TOKENS]
    transformers.Trainer(model, arguments, train_dataset=rows, optimizers=(optimizer, None)).train()
    assert [group["lr"] for group in optimizer.param_groups] == [1e-2, 5e-3]
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    wanted = {f"{name}.delora_{part}" for name in adapters for part in ("A", "B", "lambda")}
    assert changed == wanted


# ------------------------------------------------------------------------------------------------ PyTorch's own layers


@pytest.mark.parametrize("padded", (False, True))
def test_the_fused_transformer_encoder_sees_every_adapter(padded):
    """nn.TransformerEncoder in eval without gradients calls none of its layers; with padding it nests tensors."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
    encoder = nn.TransformerEncoder(layer, 2).eval()
    x = torch.randn(2, 6, 16)
    mask = torch.tensor([[False] * 6, [False] * 4 + [True] * 2]) if padded else None
    real = (slice(None), slice(None, 4))  # what is padded has no defined output
    with torch.no_grad():
        before = encoder(x, src_key_padding_mask=mask)
        adapters = inject(encoder, "all-linear", r=2)
        assert len(adapters) == 6 and same_bits(encoder(x, src_key_padding_mask=mask), before)
        moved(encoder)
        fused = encoder(x, src_key_padding_mask=mask)
    slow = encoder.train()(x, src_key_padding_mask=mask)
    for name, p in encoder.named_parameters():
        assert p.requires_grad == name.endswith(("delora_A", "delora_B", "delora_lambda"))
    slow[real].square()[..., 0].sum().backward()
    assert all(
        a.delora_A.grad.count_nonzero() and a.delora_B.grad.count_nonzero()
        for a in adapters.values()
    )
    rounding = tol(torch.float32, depth(encoder), slow)
    assert distance(fused[real], slow[real]) <= rounding < distance(fused[real], before[real])
    merge(encoder)
    with torch.no_grad():
        merged = encoder.eval()(x, src_key_padding_mask=mask)
    assert distance(merged[real], fused[real]) <= rounding


@pytest.mark.parametrize("grad", (True, False))
def test_multihead_attention_reads_its_adapted_out_proj(grad):
    torch.manual_seed(0)
    attention = nn.MultiheadAttention(16, 2, batch_first=True).eval().requires_grad_(False)
    x = torch.randn(
        2, 6, 16, requires_grad=grad
    )  # if so, and the weights are frozen, nothing else decides on the path
    with torch.set_grad_enabled(grad):
        before = attention(x, x, x)[0]
        adapter = inject(attention, ["out_proj"], r=2)["out_proj"]
        assert same_bits(attention(x, x, x)[0], before)
        moved(attention)
        adapted = attention(x, x, x)[0]
    if grad:
        adapted.square()[..., 0].sum().backward()
        assert adapter.delora_A.grad.count_nonzero() and adapter.delora_lambda.grad.count_nonzero()
    merge(attention)
    rounding = tol(torch.float32, 4 * 16, adapted)
    assert distance(attention(x, x, x)[0], adapted) <= rounding < distance(adapted, before)


# ------------------------------------------------------------------------------------------------ quantised layers


def small_mlp(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(0)
    layers = nn.LayerNorm(64), nn.Linear(64, 96), nn.GELU(), nn.Linear(96, 64, bias=False)
    return nn.Sequential(*layers).to(dtype).eval()


def torch_ao(model: nn.Module) -> nn.Module:
    """int8 weights, and activations that are rounded to 8 bits as they come."""
    return torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)


def torchao(name: str):
    def quantise(model: nn.Module) -> nn.Module:
        quantization = pytest.importorskip(
            "torchao.quantization", reason="could not import 'torchao'"
        )
        quantization.quantize_(model, getattr(quantization, name)())
        return model

    return quantise


def bitsandbytes(name: str, **options):
    def quantise(model: nn.Module) -> nn.Module:
        layer = getattr(pytest.importorskip("bitsandbytes").nn, name)
        for i in (1, 3):
            new = layer(
                model[i].in_features, model[i].out_features, model[i].bias is not None, **options
            )
            new.load_state_dict(model[i].state_dict())
            new.bias = model[i].bias
            model[i] = new.to("cpu")
        return (
            model.train()
        )  # on some CPUs its 4-bit layers are for inference alone after the first call in eval

    return quantise


QUANTISED = {
    "torch.ao int8": (torch_ao, torch.float32),
    "torchao int8": (torchao("Int8WeightOnlyConfig"), torch.float32),
    "torchao int8 bfloat16": (torchao("Int8WeightOnlyConfig"), torch.bfloat16),
    "torchao int8 activations": (torchao("Int8DynamicActivationInt8WeightConfig"), torch.float32),
    "torchao float8": (torchao("Float8WeightOnlyConfig"), torch.bfloat16),
    "bitsandbytes int8": (bitsandbytes("Linear8bitLt", has_fp16_weights=False), torch.float32),
    "bitsandbytes int8 bfloat16": (
        bitsandbytes("Linear8bitLt", has_fp16_weights=False),
        torch.bfloat16,
    ),
    "bitsandbytes nf4": (bitsandbytes("Linear4bit", quant_type="nf4"), torch.float32),
    "bitsandbytes nf4 in bfloat16": (
        bitsandbytes("Linear4bit", compute_dtype=torch.bfloat16),
        torch.float32,
    ),
    "bitsandbytes fp4 bfloat16": (bitsandbytes("Linear4bit", quant_type="fp4"), torch.bfloat16),
}


def dequantised(layer: nn.Module) -> Tensor:
    """W (out, in) as the library itself restores it."""
    if callable(layer.weight):  # torch.ao
        return layer.weight().dequantize()
    if hasattr(layer.weight, "quant_state"):
        import bitsandbytes

        return bitsandbytes.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    if hasattr(layer.weight, "CB"):
        holder = (
            layer.weight if layer.weight.CB is not None else layer.state
        )  # where it is after the first call
        return holder.CB.float() * holder.SCB.float().unsqueeze(1) / 127
    return layer.weight.dequantize()


@pytest.mark.parametrize("kind", QUANTISED)
def test_a_quantised_layer_starts_equal_trains_and_merges_into_floating_point(kind):
    quantise, dtype = QUANTISED[kind]
    model, again, x = (
        quantise(small_mlp(dtype)),
        quantise(small_mlp(dtype)),
        torch.randn(5, 64).to(dtype),
    )
    restored = {name: dequantised(model[int(name)]).double() for name in "13"}  # (out, in)
    before = model(x)
    adapters = inject(model, "all-linear", r=2)
    assert same_bits(model(x), before) and all(
        a.delora_quantised is not None for a in adapters.values()
    )

    # An activation of 8 bits is off by at most a 254th of the largest; a weight that is measured in a narrow dtype, or
    # computed in one inside, by its precision.
    narrow = torch.bfloat16 if "bfloat16" in kind or "float8" in kind else torch.float16
    precision = torch.finfo(narrow).eps + (1 / 127 if "activations" in kind else 0)
    for name, adapter in adapters.items():
        W, exact = small_mlp(dtype)[int(name)].weight.double(), restored[name]
        assert distance(adapter.weight, exact) <= precision * exact.abs().max()
        # | ‖q_j‖ - ‖w_j‖ | ≤ ‖q_j - w_j‖, the error of the quantisation in column j
        error = (exact - W).norm(dim=0) + precision * exact.norm(dim=0)  # (in,)
        assert ((adapter.delora_w_norm - W.norm(dim=0)).abs() <= error).all()
        assert not same_bits(adapter.delora_w_norm, W.norm(dim=0).float())

    found = steps(model, lambda: (model(x).float() - 1).square().mean())
    assert all(
        gradient.isfinite().all() and gradient.count_nonzero() for gradient in found.values()
    )
    adapted = model(x)
    load_adapter(again, adapter_state_dict(model))
    assert same_bits(again(x), adapted)
    sizes = [
        a.weight.detach().float().abs().sum(1).max().item() for a in adapters.values()
    ]  # the gain of each layer
    merge(model)
    assert all(type(model[i]) is nn.Linear and model[i].weight.dtype == dtype for i in (1, 3))
    rounding = tol(dtype, 64 + 96, adapted)
    if (
        "ao int8" in kind or "bitsandbytes" in kind
    ):  # activations of 8 bits, or of float16 or bfloat16, in the base
        rounding += sum(
            (1 / 254 + precision) * 2 * x.abs().max().item() * size for size in sizes
        ) * max(1, sizes[1])
    assert distance(model(x), adapted) <= rounding


@pytest.mark.parametrize("kind", QUANTISED)
def test_an_adapter_of_a_plain_layer_is_refused_by_a_quantised_one(kind):
    quantise, dtype = QUANTISED[kind]
    model = small_mlp(dtype)
    inject(model, ["3"], r=2)
    state, codes = adapter_state_dict(model), quantise(small_mlp(dtype))
    before = snapshot(codes)
    with pytest.raises(
        ValueError, match=r"lacks \['3.delora_quantised'\], quantised here, not there"
    ):
        load_adapter(codes, state)
    assert snapshot(codes) == before


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
@pytest.mark.parametrize("bits", (4, 8))
def test_a_hugging_face_model_that_is_loaded_quantised_is_adapted(bits, dtype, tmp_path):
    """QLoRA's setting: no layer has a bias, so none says in which dtype the model computes."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    pytest.importorskip("bitsandbytes")
    wide = {"hidden_size": 128, "intermediate_size": 192, "initializer_range": 0.1}
    plain, inputs = hugging_face("Llama", **wide)
    plain.save_pretrained(tmp_path / "base")
    config = transformers.BitsAndBytesConfig(**{f"load_in_{bits}bit": True})
    options = {"quantization_config": config, "dtype": dtype, "device_map": "cpu"}
    model = type(plain).from_pretrained(tmp_path / "base", **options).train()
    before = model(**inputs).logits
    adapters = inject(model, "all-linear", exclude=["lm_head"], r=2)
    assert len(adapters) == 14 and same_bits(model(**inputs).logits, before)
    found = steps(model, lambda: model(**inputs).loss)
    assert len(found) == 3 * 14 and all(gradient.count_nonzero() for gradient in found.values())
    adapted = model(**inputs).logits
    fresh = type(plain).from_pretrained(tmp_path / "base", **options).train()
    load_adapter(fresh, adapter_state_dict(model))
    assert same_bits(fresh(**inputs).logits, adapted)
    merge(model)
    assert {model.get_submodule(name).weight.dtype for name in adapters} == {dtype}
    error, effect = ((model(**inputs).logits - y).float().norm() for y in (adapted, before))
    assert (
        error < effect / 4
    )  # activations in the quantised base are of 8 bits, or rounded: what is merged is close


# ------------------------------------------------------------------------------------------------ PyTorch's modes


def byte_transformer(**options) -> quickstart.ByteTransformer:
    """The quickstart's model as it is before pretraining, with an adapter on every layer but the head."""
    torch.manual_seed(0)
    model = quickstart.ByteTransformer()
    inject(model, "all-linear", exclude=["head"], r=4, **options)
    return model


def loss_on_text(model: nn.Module, batch: slice = slice(0, 4)) -> Tensor:
    """On windows of 33 bytes of English, which the model shares out to `batch`."""
    return quickstart.loss_of(model, TEXT[: 4 * 33].view(4, 33)[batch])


@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs g++")
def test_a_block_compiles_as_one_graph_forward_and_backward():
    torch.manual_seed(0)
    block, x = quickstart.Block(), torch.randn(2, 9, quickstart.WIDTH)
    before = torch.compile(block, fullgraph=True)(x)
    adapters = inject(block, "all-linear", r=2)
    torch.compiler.reset()
    compiled = torch.compile(block, fullgraph=True)
    assert same_bits(compiled(x), before)
    moved(block)
    found = []
    for forward in (compiled, block):
        block.zero_grad()
        forward(x).square()[..., 0].sum().backward()
        found.append(
            {name: p.grad.clone() for name, p in block.named_parameters() if p.requires_grad}
        )
    for name, gradient in found[1].items():
        assert gradient.count_nonzero()
        assert distance(found[0][name], gradient) <= tol(torch.float32, depth(block), gradient)
    assert len(found[1]) == 3 * len(adapters) == 18


@pytest.mark.parametrize("base", (torch.float32, torch.bfloat16))
def test_autocast_takes_float32_adapters_on_a_base_of_any_precision(base):
    torch.manual_seed(0)
    model = quickstart.ByteTransformer().to(base)
    with torch.autocast("cpu", torch.bfloat16):
        before = model(TOKENS)
        adapters = inject(model, "all-linear", r=2)
        assert same_bits(model(TOKENS), before)
        found = steps(model, lambda: loss_on_text(model))
        assert not same_bits(model(TOKENS), before) and model(TOKENS).isfinite().all()
    assert {gradient.dtype for gradient in found.values()} == {torch.float32} and len(
        found
    ) == 3 * len(adapters)
    assert all(
        adapter.delta_weight().norm() <= adapter.norm_bound() for adapter in adapters.values()
    )


@pytest.mark.parametrize("reentrant", (True, False))
def test_activation_checkpointing_changes_no_gradient(reentrant):
    model, x = byte_transformer(), torch.randn(2, 9, quickstart.WIDTH, requires_grad=True)
    moved(model)
    found = []
    for checkpointed in (False, True):
        model.zero_grad()
        h = x
        for block in model.blocks:
            h = (
                torch.utils.checkpoint.checkpoint(block, h, use_reentrant=reentrant)
                if checkpointed
                else block(h)
            )
        h.square()[..., 0].sum().backward()
        found.append([p.grad.clone() for name, p in model.named_parameters() if p.requires_grad])
    assert all(same_bits(a, b) and a.count_nonzero() for a, b in zip(*found, strict=True))


def test_functional_call_and_vmap_run_several_adapters_on_one_base():
    models = [byte_transformer() for _ in range(3)]
    for i, model in enumerate(models):
        torch.manual_seed(i)
        for name, p in model.named_parameters():
            if name.endswith("delora_A"):
                nn.init.normal_(p)
    trained = [{n: p.detach() for n, p in m.named_parameters() if p.requires_grad} for m in models]
    stacked = {name: torch.stack([adapter[name] for adapter in trained]) for name in trained[0]}

    def loss(adapter: dict[str, Tensor]) -> Tensor:
        logits = torch.func.functional_call(
            models[0], adapter, TOKENS[:, :-1]
        )  # (batch, time, 256)
        return quickstart.F.cross_entropy(logits.flatten(0, 1), TOKENS[:, 1:].flatten())

    together = torch.func.vmap(torch.func.grad(loss))(stacked)
    for i, model in enumerate(models):
        trainable = [p for p in model.parameters() if p.requires_grad]
        wanted = torch.autograd.grad(quickstart.loss_of(model, TOKENS), trainable)
        for gradients, gradient in zip(together.values(), wanted, strict=True):
            assert distance(gradients[i], gradient) <= tol(torch.float32, depth(model), gradient)


def test_an_adapted_model_is_exported():
    model = byte_transformer()
    moved(model)
    exported = torch.export.export(model.eval(), (TOKENS,)).module()
    assert distance(exported(TOKENS), model(TOKENS)) <= tol(
        torch.float32, depth(model), model(TOKENS)
    )


def test_copies_and_pickles_are_independent_and_equal():
    model = byte_transformer(tie_lambda=False)
    moved(model)
    y = model(TOKENS)
    copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    for other in copies:
        assert same_bits(other(TOKENS), y)
        pointers = {p.data_ptr() for p in model.parameters()}
        assert not pointers & {p.data_ptr() for p in other.parameters()}
        assert [(n, p.requires_grad) for n, p in other.named_parameters()] == [
            (n, p.requires_grad) for n, p in model.named_parameters()
        ]
        steps(other, lambda other=other: loss_on_text(other))
    assert same_bits(model(TOKENS), y)


def test_a_model_on_the_meta_device_takes_the_tensors_of_another():
    source = byte_transformer()
    moved(source)
    with torch.device("meta"):
        model = quickstart.ByteTransformer()
    inject(model, "all-linear", exclude=["head"], r=4)
    assert all(p.is_meta for p in model.parameters())
    model.load_state_dict(source.state_dict(), assign=True)
    assert same_bits(model(TOKENS), source(TOKENS))
    trainable = [name for name, p in model.named_parameters() if p.requires_grad]
    assert (
        trainable == [name for name, p in source.named_parameters() if p.requires_grad]
        and trainable
    )


# ------------------------------------------------------------------------------------------------ two processes


def worker(rank: int, job, folder: str) -> None:
    """Run a job in one of two processes; files in folder are how it answers."""
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", 2)
    dist.init_process_group(
        "gloo", store=store, rank=rank, world_size=2, timeout=timedelta(seconds=120)
    )
    try:
        job(rank, Path(folder))
        dist.barrier()  # what the other process still waits for is done
    finally:
        dist.destroy_process_group()
    os._exit(
        0
    )  # subtle: torch's threads can abort a process that is taken down in order, after the job is done


def in_two_processes(job, folder: Path) -> None:
    if not hasattr(pytest.importorskip("torch.distributed.fsdp"), "fully_shard"):
        pytest.skip("FSDP2 is torch 2.6's")
    torch.multiprocessing.spawn(worker, (job, str(folder)), nprocs=2)


def descend(model: nn.Module, batch: slice, count: int = 3) -> nn.Module:
    """Gradient descent, whose steps are as exact as its gradients: Adam's divide what is almost zero by itself."""
    optimizer = torch.optim.SGD(param_groups(model, lr=5.0, lambda_lr=100.0))
    for _ in range(count):
        optimizer.zero_grad()
        loss_on_text(model, batch).backward()
        optimizer.step()
    return model


def shard(model: quickstart.ByteTransformer, **options) -> nn.Module:
    from torch.distributed.fsdp import fully_shard

    for block in model.blocks:
        fully_shard(block, **options)
    return fully_shard(model, **options)


def half(rank: int) -> slice:
    return slice(2 * rank, 2 * rank + 2)


def job_ddp(rank: int, folder: Path) -> None:
    model = nn.parallel.DistributedDataParallel(byte_transformer())
    descend(model, half(rank))
    torch.save(adapter_state_dict(model.module), folder / f"{rank}.pt")


def job_fsdp2(rank: int, folder: Path) -> None:
    from torch.distributed.device_mesh import init_device_mesh

    nodes = init_device_mesh(
        "cpu", (2, 1), mesh_dim_names=("replicate", "shard")
    )  # as two nodes of one process each
    for tied, options in ((True, {}), (False, {"mesh": nodes})):
        model = byte_transformer(tie_lambda=tied)
        plain = model(TOKENS)
        shard(model, **options)
        assert same_bits(model(TOKENS), plain)
        descend(model, half(rank))
        state = adapter_state_dict(model)  # every process has to call it
        torch.save({"adapter": state, "logits": model(TOKENS)}, folder / f"{rank}-{tied}.pt")
        if rank == 0:
            torch.save(state, folder / f"adapter-{tied}.pt")
        other = shard(byte_transformer(tie_lambda=tied), **options)
        load_adapter(other, state)
        assert same_bits(other(TOKENS), model(TOKENS))


def job_mixed_precision(rank: int, folder: Path) -> None:
    from torch.distributed.fsdp import MixedPrecisionPolicy

    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    base = byte_transformer()
    for adapter in [module for module in base.modules() if isinstance(module, DeLoRALinear)]:
        adapter.enabled = False
    shard(base, mp_policy=policy)
    for tied in (True, False):
        model = shard(byte_transformer(tie_lambda=tied), mp_policy=policy)
        with torch.no_grad():
            start = model(TOKENS)
            assert start.dtype == torch.bfloat16 and same_bits(start, base(TOKENS))
        descend(model, half(rank))
        assert not same_bits(model(TOKENS), start)
        assert {value.dtype for value in adapter_state_dict(model).values()} == {torch.float32}
    (folder / f"{rank}.done").touch()


def job_from_meta(rank: int, folder: Path) -> None:
    """A model that is too large for one process: made without memory, sharded, and only then filled."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

    source = byte_transformer()
    moved(source)
    torch.manual_seed(0)
    base = quickstart.ByteTransformer().state_dict()  # as read from the pretrained file
    with torch.device("meta"):
        model = quickstart.ByteTransformer()
    inject(model, "all-linear", exclude=["head"], r=4)
    shard(model)
    model.to_empty(device="cpu")
    names = {name.replace(".base_layer", ""): name for name in model.state_dict()}
    filled = {names[name]: tensor for name, tensor in base.items()}
    set_model_state_dict(
        model, filled, options=StateDictOptions(full_state_dict=True, strict=False)
    )
    load_adapter(model, adapter_state_dict(source))
    with torch.no_grad():
        assert same_bits(model(TOKENS), source(TOKENS))
    (folder / f"{rank}.done").touch()


def ends_like_one_process(state: dict[str, Tensor], **options) -> None:
    """What two processes reached is what one reaches on all of the text, and not what it reaches on half of it."""
    whole, part = (
        adapter_state_dict(descend(byte_transformer(**options), slice(0, end))) for end in (4, 2)
    )
    assert state.keys() == whole.keys()
    told_apart = []
    for name, value in whole.items():
        rounding = tol(torch.float32, 3 * 4 * 32, value)  # three steps, each a sum over the tokens
        assert distance(state[name], value) <= rounding, name
        told_apart += [name] * (distance(part[name], value) > 2 * rounding)
    assert (
        len(told_apart) >= 3 * 4 * 4
    )  # A, B and λ of v, o, up and down; q and k of untrained attention hardly move


def test_two_processes_under_ddp_end_at_the_weights_of_one(tmp_path):
    in_two_processes(job_ddp, tmp_path)
    states = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1)]
    assert all(same_bits(value, states[1][name]) for name, value in states[0].items())
    ends_like_one_process(states[0])


def test_two_processes_under_fsdp2_end_at_the_weights_of_one_and_save_one_file(tmp_path):
    in_two_processes(job_fsdp2, tmp_path)
    for tied in (True, False):
        ranks = [torch.load(tmp_path / f"{rank}-{tied}.pt", weights_only=True) for rank in (0, 1)]
        state = torch.load(tmp_path / f"adapter-{tied}.pt", weights_only=True)
        for saved in ranks:
            assert all(same_bits(value, state[name]) for name, value in saved["adapter"].items())
        ends_like_one_process(state, tie_lambda=tied)
        torch.manual_seed(0)
        single = quickstart.ByteTransformer()
        load_adapter(single, state)
        logits = ranks[0]["logits"]
        assert distance(single(TOKENS), logits) <= tol(torch.float32, depth(single), logits)


@pytest.mark.parametrize(
    "job", (job_mixed_precision, job_from_meta), ids=("mixed precision", "from meta")
)
def test_under_fsdp2_with(job, tmp_path):
    """The start is zero to the bit where a policy casts to bfloat16; a model may be sharded before it has weights."""
    in_two_processes(job, tmp_path)
    assert sorted(path.name for path in tmp_path.glob("*.done")) == ["0.done", "1.done"]


# ------------------------------------------------------------------------------------------------ from PEFT


def peft_checkpoint(folder: Path, kind: str, model_options: dict, **config) -> Tensor:
    """Train PEFT's DeLoRA on that model for some steps, and save it. Returns the logits."""
    peft = pytest.importorskip("peft")
    model, inputs = hugging_face(kind, **model_options)
    model = peft.get_peft_model(model, peft.DeloraConfig(**config))
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-2)
    with torch.no_grad():
        before = model.eval()(**inputs).logits
    for _ in range(4):
        optimizer.zero_grad()
        model(**inputs).loss.backward()
        optimizer.step()
    model.save_pretrained(folder)
    with torch.no_grad():
        logits = model(**inputs).logits
    assert distance(logits, before) > 0.01
    return logits


@pytest.mark.parametrize(
    ("kind", "config"),
    [
        ("Llama", {"target_modules": ["q_proj", "v_proj"]}),
        ("Llama", {"target_modules": "all-linear", "r": 3, "delora_lambda": 7}),
        ("Llama", {"target_modules": ["q_proj"], "rank_pattern": {"0.self_attn.q_proj": 3}}),
        ("Llama", {"target_modules": ["up_proj"], "lambda_pattern": {"1.mlp.up_proj": 4}}),
        ("Llama", {"target_modules": ["q_proj", "lm_head"]}),
        ("T5", {"target_modules": ["q", "v", "wo"]}),
        ("BERT", {"target_modules": ["query", "value"], "modules_to_save": ["classifier"]}),
        ("BERT", {"target_modules": ["query"], "bias": "all"}),
        ("BERT", {"target_modules": ["query"], "bias": "delora_only", "task_type": "SEQ_CLS"}),
        ("ViT", {"target_modules": "all-linear", "module_dropout": 0.1}),
    ],
)
def test_a_checkpoint_of_peft_gives_the_outputs_of_peft(kind, config, tmp_path):
    logits = peft_checkpoint(tmp_path, kind, {}, **config)
    state = pytest.importorskip("safetensors.torch").load_file(
        tmp_path / "adapter_model.safetensors"
    )
    model, inputs = hugging_face(kind)
    adapters = load_adapter(model, state)
    with torch.no_grad():
        assert distance(model(**inputs).logits, logits) <= tol(torch.float32, depth(model), logits)
    assert {f"base_model.model.{name}.delora_A" for name in adapters} == {
        key for key in state if "delora_A" in key
    }


def test_a_checkpoint_of_peft_that_unties_the_head_is_refused(tmp_path):
    """PEFT trains a copy of a head that is tied to the embedding. Here both would change."""
    config = {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}
    peft_checkpoint(tmp_path, "Llama", {"tie_word_embeddings": True}, **config)
    state = pytest.importorskip("safetensors.torch").load_file(
        tmp_path / "adapter_model.safetensors"
    )
    model, _ = hugging_face("Llama", tie_word_embeddings=True)
    before = snapshot(model)
    with pytest.raises(
        ValueError, match="model.embed_tokens.weight: tied in the model, not in the checkpoint"
    ):
        load_adapter(model, state)
    assert snapshot(model) == before


# ------------------------------------------------------------------------------------------------ bad input


def refused(model: nn.Module, state, message: str) -> None:
    before = snapshot(model)
    with pytest.raises((ValueError, TypeError), match=message):
        load_adapter(model, state)
    assert snapshot(model) == before


def test_a_checkpoint_of_another_architecture_is_refused_by_name():
    source, _ = hugging_face("Llama")
    inject(source, ["q_proj"], r=2)
    state = adapter_state_dict(source)
    for kind in ("GPT-2", "T5", "BERT", "ViT"):
        name = r"model.layers.0.self_attn.q_proj.delora_A: \(2, 32\) in the checkpoint, nothing of that name"
        refused(hugging_face(kind)[0], state, name)
    wider, shallower = (
        hugging_face("Llama", **size)[0] for size in ({"hidden_size": 64}, {"num_hidden_layers": 1})
    )
    refused(wider, state, r"q_proj.delora_A: \(2, 32\) in the checkpoint, \(2, 64\) in the model")
    refused(shallower, state, "model.layers.1.self_attn.q_proj.delora_A: .*nothing of that name")


def test_a_truncated_file_is_noticed_at_every_length(tmp_path):
    """By torch.load or safetensors, which name the trouble; what is missing of a whole state, by load_adapter."""
    model, path = byte_transformer(), tmp_path / "adapter.pt"
    torch.save(adapter_state_dict(model), path)
    data = path.read_bytes()
    torch.manual_seed(0)
    fresh = quickstart.ByteTransformer()
    before = snapshot(fresh)
    for length in (0, 1, 100, len(data) // 2, len(data) - 100, len(data) - 1):
        path.write_bytes(data[:length])
        with pytest.raises((EOFError, RuntimeError, pickle.UnpicklingError)):
            load_adapter(fresh, torch.load(path, weights_only=True))
        assert snapshot(fresh) == before
    state = adapter_state_dict(model)
    for key in list(state)[::7]:
        refused(fresh, {name: value for name, value in state.items() if name != key}, key)


def test_a_rank_that_differs_from_the_injected_one_is_refused():
    model, _ = hugging_face("Llama")
    source = copy.deepcopy(model)
    inject(source, ["v_proj"], r=3)
    inject(model, ["v_proj"], r=2)
    refused(
        model,
        adapter_state_dict(source),
        r"v_proj.delora_A: \(3, 32\) in the checkpoint, \(2, 32\) in the model",
    )


def test_a_lora_checkpoint_is_told_from_a_delora_one(tmp_path):
    peft = pytest.importorskip("peft")
    model, _ = hugging_face("Llama")
    fresh = copy.deepcopy(model)
    peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path)
    state = pytest.importorskip("safetensors.torch").load_file(
        tmp_path / "adapter_model.safetensors"
    )
    for target in (fresh, copy.deepcopy(fresh)):
        if target is not fresh:
            inject(target, ["q_proj"])
        refused(target, state, r"lacks DeLoRA tensors, it is LoRA: .*q_proj.lora_A.weight")


def test_every_update_stays_within_its_bound_in_a_real_model():
    model, inputs = hugging_face("Llama")
    adapters = inject(model, "all-linear", r=2)
    steps(model, lambda: model(**inputs).loss, count=3, lr=1e3)
    for adapter in adapters.values():
        bound = adapter.norm_bound()
        assert max(norms(adapter.delta_weight())) <= bound + tol(torch.float32, 32 + 48 + 4, bound)
