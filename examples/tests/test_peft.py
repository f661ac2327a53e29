"""examples/peft_checkpoints.py: the outputs are the same on both sides, or it is refused by name.

What needs a package that is not installed (peft, transformers, safetensors) is skipped by its name.
Nothing is downloaded: models are made from small configurations.
"""

import copy
import json
import os
import sys
import warnings

import peft_checkpoints
import pytest
import torch
from experiments.common import ByteTransformer
from peft_checkpoints import from_peft, save_for_peft, to_peft_delora, to_peft_lora
from torch import nn

from delora import DeLoRA, adapter_state_dict, disabled, inject, load_adapter, param_groups
from test_delora import distance, same_bits, snapshot, tol

# What other packages warn of is not what is tested.
pytestmark = pytest.mark.filterwarnings("default")
os.environ["HF_HUB_OFFLINE"] = "1"

FORMS = ("lora", "delora")
CONVERT = {"lora": to_peft_lora, "delora": to_peft_delora}


# ------------------------------------------------------------------------------------------------
# Helpers
# ------------------------------------------------------------------------------------------------


def hugging_face(kind, **changes):
    """A small model of that kind without dropout, and inputs for it with labels."""
    pytest.importorskip("safetensors")  # transformers needs it
    transformers = pytest.importorskip("transformers")
    transformers.logging.set_verbosity_error()
    torch.manual_seed(0)
    tokens = torch.randint(3, 128, (2, 12))  # (batch, time)
    pixels = torch.randn(2, 3, 16, 16)  # (batch, channel, height, width)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
    layers = {"num_hidden_layers": 2, "initializer_range": 0.2}
    text = {"vocab_size": 128, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    calm = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    labels = torch.tensor([0, 1])
    if kind == "Llama":
        options = sizes | layers | text | {"num_key_value_heads": 2} | changes
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**options))
        inputs = {"input_ids": tokens, "labels": tokens}
    elif kind == "BERT":
        options = sizes | layers | text | calm | changes
        model = transformers.BertForSequenceClassification(transformers.BertConfig(**options))
        inputs = {"input_ids": tokens, "labels": labels}
    elif kind == "GPT-2":
        options = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "resid_pdrop": 0.0}
        options |= {"embd_pdrop": 0.0, "attn_pdrop": 0.0, "initializer_range": 0.2} | text | changes
        model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**options))
        inputs = {"input_ids": tokens, "labels": tokens}
    elif kind == "T5":
        options = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
        options |= {"dropout_rate": 0.0, "decoder_start_token_id": 0} | text | changes
        model = transformers.T5ForConditionalGeneration(transformers.T5Config(**options))
        inputs = {"input_ids": tokens, "labels": tokens}
    else:
        options = sizes | layers | calm | {"image_size": 16, "patch_size": 8} | changes
        model = transformers.ViTForImageClassification(transformers.ViTConfig(**options))
        inputs = {"pixel_values": pixels, "labels": labels}
    return model.eval(), inputs


def depth(model):
    """The roundings in a row from first layer to last: the terms of all linear layers' sums."""
    terms = 0
    for module in model.modules():
        weight = getattr(module, "weight", None)
        if torch.is_tensor(weight):
            terms += weight.shape[-1]
    return terms


@torch.no_grad()
def logits_of(model, inputs):
    return model(**inputs).logits


def train(model, groups, inputs, steps=3):
    """Some steps of AdamW."""
    optimizer = torch.optim.AdamW(groups)
    model.train()
    for _ in range(steps):
        optimizer.zero_grad()
        model(**inputs).loss.backward()
        optimizer.step()
    model.eval()


def turn(model):
    """Other components than the frozen ones, without training."""
    torch.manual_seed(1)
    for module in model.modules():
        if isinstance(module, DeLoRA):
            module.A.data.normal_()
            module.B.data.normal_()


def load_file(folder):
    safetensors = pytest.importorskip("safetensors.torch")
    return safetensors.load_file(folder / "adapter_model.safetensors")


def trained_by_peft(folder, model, inputs, config):
    """Train PEFT's DeLoRA on that model for some steps, and save it. Returns the logits."""
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(model, peft.DeloraConfig(**config)).eval()
    before = logits_of(model, inputs)
    train(model, [{"params": [p for p in model.parameters() if p.requires_grad]}], inputs, steps=4)
    model.save_pretrained(folder)
    logits = logits_of(model, inputs)
    assert distance(logits, before) > tol(torch.float32, depth(model), logits)
    return logits


def in_peft(pretrained, folder):
    """The model as PEFT loads it. PEFT warns of missing and unknown keys, and of a wrong layout."""
    peft = pytest.importorskip("peft")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = peft.PeftModel.from_pretrained(copy.deepcopy(pretrained), folder).eval()
    complaints = []
    for warning in caught:
        message = str(warning.message)
        if "key" in message.lower() or "fan_in_fan_out" in message:
            complaints.append(message)
    assert not complaints, complaints
    return model


def adapted_by_peft(served):
    """The names of the layers that PEFT adapts."""
    names = []
    for name, _ in served.base_model.model.named_modules():
        if name.endswith(".base_layer"):
            names.append(name.removesuffix(".base_layer"))
    return names


def check_in_peft(model, pretrained, inputs, folder, to):
    """PEFT gives the outputs of an adapted model, which is left as it was. Returns PEFT's model."""
    pytest.importorskip("safetensors")
    before = snapshot(model)
    save_for_peft(model, folder, to)
    assert snapshot(model) == before
    adapted = logits_of(model, inputs)
    with disabled(model):
        base = logits_of(model, inputs)
    served = in_peft(pretrained, folder)
    rounding = tol(adapted.dtype, depth(model), adapted)
    assert distance(logits_of(served, inputs), adapted) <= rounding < distance(adapted, base)
    return served


class Layers(nn.Module):
    """A few layers, and names of which one is the end of another."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 4)
        self.inner = nn.ModuleDict({"fc": nn.Linear(4, 4), "head": nn.Linear(4, 4)})
        self.lm_head = nn.Linear(4, 4)

    def forward(self, x):
        h = self.inner["fc"](self.fc(x))
        return self.lm_head(self.inner["head"](h))


def adapted_layers(targets=("fc", "inner.head"), **options):
    torch.manual_seed(0)
    model = Layers()
    inject(model, [*targets], **options)
    turn(model)
    return model


def projections():
    torch.manual_seed(0)
    return nn.ModuleDict({"q_proj": nn.Linear(8, 8), "proj": nn.Linear(8, 8)})


def peft_tensors(name="q_proj", r=2):
    """What PEFT would save of an adapter of the first of these projections."""
    weight = projections()["q_proj"].weight.detach()
    return {
        f"base_model.model.{name}.delora_A": torch.randn(r, 8),
        f"base_model.model.{name}.delora_B": torch.randn(8, r),
        f"base_model.model.{name}.delora_lambda": torch.tensor([7.0]),
        f"base_model.model.{name}.delora_w_norm": weight.norm(dim=0),
    }


# ------------------------------------------------------------------------------------------------
# From PEFT
# ------------------------------------------------------------------------------------------------


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
    model, inputs = hugging_face(kind)
    logits = trained_by_peft(tmp_path, copy.deepcopy(model), inputs, config)
    state = load_file(tmp_path)
    adapters = load_adapter(model, from_peft(state))
    assert distance(logits_of(model, inputs), logits) <= tol(torch.float32, depth(model), logits)

    in_file = set()
    for key in state:
        if key.endswith(".delora_A"):
            in_file.add(key)
    assert in_file == {f"base_model.model.{name}.delora_A" for name in adapters}
    trainable = [key for key, p in model.named_parameters() if p.requires_grad]
    assert len(trainable) == 3 * len(adapters)  # A, B and lam of each, and nothing else


def test_a_model_in_memory_is_read_as_its_file_is(tmp_path):
    peft = pytest.importorskip("peft")
    model, _ = hugging_face("Llama")
    config = peft.DeloraConfig(target_modules=["q_proj"], init_weights=False)
    model = peft.get_peft_model(model, config)
    model.save_pretrained(tmp_path)
    in_file = from_peft(load_file(tmp_path))
    in_memory = from_peft(peft.get_peft_model_state_dict(model))
    assert in_file.keys() == in_memory.keys()
    for key, value in in_file.items():
        assert same_bits(value, in_memory[key]), key


def test_the_update_is_that_of_the_formula_of_peft():
    """(λ/r) B Ξ A diag(w), without a frozen copy."""
    state = peft_tensors()
    model = projections()
    delora = load_adapter(model, from_peft(state))["q_proj"].delora
    A, B, lam, w = state.values()
    directions = (B / B.norm(dim=0)) @ (A / A.norm(dim=1, keepdim=True))
    wanted = lam / 2 * directions * w
    assert distance(delora.delta_weight(), wanted) <= tol(torch.float32, 8, 7 * w)
    assert delora.lam0 is None  # tied
    assert not delora.A0.any()
    assert not delora.B0.any()


def test_what_peft_saved_besides_is_loaded_and_frozen():
    state = peft_tensors() | {
        "base_model.model.q_proj.base_layer.bias": torch.ones(8),  # PEFT's bias="all"
        "base_model.model.proj.weight": torch.ones(8, 8),  # PEFT's modules_to_save
    }
    model = projections()
    load_adapter(model, from_peft(state))
    assert same_bits(model["q_proj"].bias, torch.ones(8))
    assert same_bits(model["proj"].weight, torch.ones(8, 8))
    assert not model["q_proj"].base_layer.bias.requires_grad
    assert not model["proj"].weight.requires_grad


def test_a_model_whose_own_names_begin_as_in_peft_keeps_them():
    model = nn.ModuleDict({"base_model": nn.ModuleDict({"model": projections()})})
    found = from_peft(peft_tensors("base_model.model.q_proj"))
    assert set(load_adapter(model, found)) == {"base_model.model.q_proj"}


@pytest.mark.parametrize("leaf", ("A", "B"))
def test_vectors_that_peft_does_not_normalise_are_refused(leaf):
    """Rows of A and columns of B. The norms along the other axis mean nothing."""
    torch.manual_seed(0)
    key = f"base_model.model.q_proj.delora_{leaf}"
    at_the_clamp = torch.eye(8, 2) * 1e-4
    one_row_is_short = torch.ones(8, 2)
    one_row_is_short[3] = 1e-5
    one_is_zero = torch.randn(8, 2) * torch.tensor([1.0, 0.0])
    for matrix in (at_the_clamp, at_the_clamp.double(), one_row_is_short, one_is_zero):
        matrix = matrix if leaf == "B" else matrix.T
        assert same_bits(from_peft(peft_tensors() | {key: matrix})[f"q_proj.delora.{leaf}"], matrix)
    one_is_short = torch.randn(8, 2)
    one_is_short[:, 1] = 1e-5 / 8**0.5
    for matrix, norm in ((0.99 * at_the_clamp, "9.9e-05"), (one_is_short, "1e-05")):
        matrix = matrix if leaf == "B" else matrix.T
        with pytest.raises(ValueError, match=f"^{key}: a vector has norm {norm}"):
            from_peft(peft_tensors() | {key: matrix})


def test_a_checkpoint_of_peft_that_unties_the_head_is_refused(tmp_path):
    """PEFT trains a copy of a head that is tied to the embedding. Here both would change."""
    model, inputs = hugging_face("Llama", tie_word_embeddings=True)
    config = {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}
    trained_by_peft(tmp_path, copy.deepcopy(model), inputs, config)
    state = from_peft(load_file(tmp_path))
    before = snapshot(model)
    with pytest.raises(ValueError, match="(lm_head|embed_tokens).weight: tied in the model, not"):
        load_adapter(model, state)
    assert snapshot(model) == before


def test_a_lora_checkpoint_is_told_from_a_delora_one(tmp_path):
    peft = pytest.importorskip("peft")
    model, _ = hugging_face("Llama")
    config = peft.LoraConfig(target_modules=["q_proj"])
    peft.get_peft_model(model, config).save_pretrained(tmp_path)
    with pytest.raises(
        ValueError, match=r"q_proj\.lora_A\.weight is LoRA's, and this reads PEFT's De"
    ):
        from_peft(load_file(tmp_path))


def test_the_state_of_a_model_in_memory_is_told_from_that_of_its_file():
    peft = pytest.importorskip("peft")
    model, _ = hugging_face("Llama")
    model = peft.get_peft_model(model, peft.DeloraConfig(target_modules=["q_proj"]))
    state = {}
    for key, value in model.state_dict().items():
        if "delora" in key:
            state[key] = value
    with pytest.raises(ValueError, match=r"q_proj\.delora_\w+\.default is not as PEFT saves it"):
        from_peft(state)


@pytest.mark.parametrize("leaf", ("delora_A", "delora_B", "delora_lambda", "delora_w_norm"))
def test_a_missing_tensor_of_peft_is_named(leaf):
    state = peft_tensors()
    del state[f"base_model.model.q_proj.{leaf}"]
    with pytest.raises(ValueError, match=rf"^base_model\.model\.q_proj\.{leaf} is missing$"):
        from_peft(state)


def test_what_peft_did_not_save_is_refused_by_key():
    ours = adapter_state_dict(adapted_layers())
    with pytest.raises(
        ValueError, match=r"^fc\.delora\.A is not PEFT's: .* with base_model\.model\."
    ):
        from_peft(ours)
    with pytest.raises(
        ValueError, match=r"no DeLoRA of PEFT in \['base_model\.model\.head\.bias'\]"
    ):
        from_peft({"base_model.model.head.bias": torch.ones(3)})
    with pytest.raises(ValueError, match=r"no DeLoRA of PEFT in \[\]"):
        from_peft({})
    key = "base_model.model.q_proj.delora_A"
    with pytest.raises(ValueError, match=rf"^{key}: \(8,\) is no matrix"):
        from_peft(peft_tensors() | {key: torch.ones(8)})
    with pytest.raises(TypeError, match=rf"^{key} is a list, no tensor"):
        from_peft(peft_tensors() | {key: [1.0]})
    with pytest.raises(TypeError, match="^expected a dict, .* got 'adapter_model.safetensors'"):
        from_peft("adapter_model.safetensors")


# ------------------------------------------------------------------------------------------------
# To PEFT: tensors
# ------------------------------------------------------------------------------------------------


def update_in_peft(tensors, name):
    """ΔW of a layer from PEFT's tensors, in float64: as LoRA with alpha = rank, or as DeLoRA."""
    own = {}
    for key, value in tensors.items():
        prefix = f"base_model.model.{name}."
        if key.startswith(prefix):
            own[key.removeprefix(prefix)] = value.double()
    if "lora_A.weight" in own:
        return own["lora_B.weight"] @ own["lora_A.weight"]
    A, B = own["delora_A"], own["delora_B"]
    sizes = A.norm(dim=1).clamp(min=1e-4) * B.norm(dim=0).clamp(min=1e-4)  # (r,)
    return (B * (own["delora_lambda"] / len(A) / sizes)) @ A * own["delora_w_norm"]


@pytest.mark.parametrize("weight_norm", ("column", "frobenius", None))
@pytest.mark.parametrize(("to", "tied"), (("lora", True), ("lora", False), ("delora", True)))
def test_the_update_is_the_same_and_all_layers_have_one_rank(to, tied, weight_norm):
    model = adapted_layers(["fc"], r=3, weight_norm=weight_norm, tie_lambda=tied)
    inject(model, ["inner.head"], r=1, lambda_init=0.5, weight_norm=weight_norm, tie_lambda=tied)
    turn(model)
    model.fc.delora.lam.data.fill_(-2.0)  # untied, λ₀ is 15 still
    tensors = CONVERT[to](adapter_state_dict(model))
    for name, adapter in (("fc", model.fc), ("inner.head", model.inner["head"])):
        update = adapter.delora.delta_weight()
        size = adapter.delora.norm_bound()
        assert distance(update_in_peft(tensors, name), update) <= tol(torch.float32, 4 + 6, size)
        leaf = "lora_A.weight" if to == "lora" else "delora_A"
        assert tensors[f"base_model.model.{name}.{leaf}"].shape == (6, 4)
    assert all(tensor.dtype == torch.float32 for tensor in tensors.values())
    assert not any(tensor.requires_grad for tensor in tensors.values())


@pytest.mark.parametrize("to", FORMS)
def test_the_tensors_that_are_given_are_left_alone(to):
    state = adapter_state_dict(adapted_layers(r=2)) | {"lm_head.bias": torch.ones(4)}
    before = copy.deepcopy(state)
    tensors = CONVERT[to](state)
    for tensor in tensors.values():
        if tensor is not state["lm_head.bias"]:
            tensor.add_(1)
    assert state.keys() == before.keys()
    for key, value in state.items():
        assert same_bits(value, before[key]), key
    assert tensors["base_model.model.lm_head.bias"] is state["lm_head.bias"]  # and under PEFT's key


def test_vectors_of_ordinary_length_are_exported_as_they_are():
    state = adapter_state_dict(adapted_layers(r=2))
    tensors = to_peft_delora(state)
    A, A0 = tensors["base_model.model.fc.delora_A"].split(2)
    B, B0 = tensors["base_model.model.fc.delora_B"].split(2, dim=1)
    assert same_bits(A, state["fc.delora.A"]) and same_bits(A0, state["fc.delora.A0"])
    assert same_bits(B, state["fc.delora.B"]) and same_bits(B0, -state["fc.delora.B0"])


@pytest.mark.parametrize("length", (1e-18, 1e-10, 1e-4, 1e-3, 1.0, 1e15, 1e18, 1e60))
def test_vectors_of_any_length_are_the_same_in_peft(length):
    """PEFT clamps a norm at 1e-4, and in its float32 one of 1e20 overflows."""
    wide = length > 1e19
    model = adapted_layers(r=2).to(torch.float64 if wide else torch.float32)
    for tensor in (model.fc.delora.A, model.fc.delora.B, model.fc.delora.A0, model.fc.delora.B0):
        tensor.data.mul_(length)
    tensors = to_peft_delora(adapter_state_dict(model))
    for key, tensor in tensors.items():
        tensors[key] = tensor.float()
        assert tensors[key].isfinite().all(), key
        if key.endswith("_A"):
            assert tensors[key].norm(dim=1).isfinite().all(), key
        if key.endswith("_B"):
            assert tensors[key].norm(dim=0).isfinite().all(), key
    allowed = tol(torch.float32, 4 + 4, model.fc.delora.norm_bound())
    assert distance(update_in_peft(tensors, "fc"), model.fc.delora.delta_weight()) <= allowed
    from_peft(tensors)  # nothing is too short to come back


def test_lambda_in_sixteen_bits_is_exported_without_rounding():
    """A layer of the largest rank doubles it, which rounds nothing. Another may have it times 6."""
    model = adapted_layers(["fc"], r=3)
    inject(model, ["inner.head"], r=1, lambda_init=1.0078125)  # 1 + 2**-7: all bits of a bfloat16
    lam = "base_model.model.inner.head.delora_lambda"
    state = adapter_state_dict(model.bfloat16())
    assert to_peft_delora(state)[lam].item() == 6 * 1.0078125


def test_a_frozen_copy_with_another_strength_fits_into_lora_only():
    model = adapted_layers(r=2, tie_lambda=False)
    state = adapter_state_dict(model)
    update = update_in_peft(to_peft_delora(state), "fc")  # λ is λ₀ still
    allowed = tol(torch.float32, 4 + 4, model.fc.delora.norm_bound())
    assert distance(update, model.fc.delora.delta_weight()) <= allowed

    state["inner.head.delora.lam"] = torch.tensor([2.0])
    message = r"^inner\.head: lam is 2, lam0 is 15, and PEFT's DeLoRA .* Plain LoRA can hold both"
    with pytest.raises(ValueError, match=message):
        to_peft_delora(state)
    to_peft_lora(state)


@pytest.mark.parametrize("to", FORMS)
@pytest.mark.parametrize("leaf", ("A", "B", "lam", "A0", "B0", "w"))
def test_a_missing_tensor_or_another_shape_is_named(to, leaf):
    key = f"fc.delora.{leaf}"
    state = adapter_state_dict(adapted_layers(r=2))
    with pytest.raises(TypeError, match=rf"^{key} is a NoneType, no tensor$"):
        CONVERT[to](state | {key: None})
    with pytest.raises(
        ValueError, match=rf"^{key}: \(7,\)(, where .* fits A and B| is no matrix)$"
    ):
        CONVERT[to](state | {key: torch.ones(7)})
    del state[key]
    with pytest.raises(ValueError, match=rf"^{key} is missing$"):
        CONVERT[to](state)


@pytest.mark.parametrize("to", FORMS)
def test_what_is_no_adapted_linear_layer_is_refused_by_key(to):
    convert = CONVERT[to]
    with pytest.raises(ValueError, match=r"no adapted layer in \['head\.bias'\]"):
        convert({"head.bias": torch.ones(3)})
    with pytest.raises(ValueError, match="no adapted layer in .'base_model.model.q_proj.delora_A'"):
        convert(peft_tensors())
    with pytest.raises(TypeError, match="^expected a dict, .* got Layers"):
        convert(Layers())
    model = adapted_layers()
    conv = nn.Conv1d(4, 4, 1).requires_grad_(False)
    nn.utils.parametrize.register_parametrization(conv, "weight", DeLoRA(conv.weight))
    model.conv = conv
    with pytest.raises(ValueError, match=r"^conv\.parametrizations\.weight\.0\.A is of a param"):
        convert(adapter_state_dict(model))


# ------------------------------------------------------------------------------------------------
# To PEFT: outputs
# ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weight_norm", ("column", "frobenius", None))
@pytest.mark.parametrize(("to", "tied"), (("lora", True), ("lora", False), ("delora", True)))
def test_peft_gives_the_outputs_of_a_trained_model(to, tied, weight_norm, tmp_path):
    pretrained, inputs = hugging_face("Llama")
    model = copy.deepcopy(pretrained)
    strength = 5.0 if weight_norm == "column" else 1.0
    options = {"lambda_init": strength, "weight_norm": weight_norm, "tie_lambda": tied}
    inject(model, ["q_proj", "v_proj", "lm_head"], r=3, **options)
    inject(model, ["down_proj"], r=1, lambda_init=0.5, tie_lambda=tied)  # another rank, another λ
    train(model, param_groups(model, lr=3e-2), inputs)
    check_in_peft(model, pretrained, inputs, tmp_path / "new" / to, to)


@pytest.mark.parametrize("weight_norm", ("column", "frobenius", None))
def test_there_and_back_again_gives_the_same_outputs(weight_norm):
    pretrained, inputs = hugging_face("Llama")
    model = copy.deepcopy(pretrained)
    inject(model, ["q_proj", "v_proj"], r=3, lambda_init=1.0, weight_norm=weight_norm)
    inject(model, ["down_proj"], r=1, lambda_init=0.5, weight_norm=weight_norm)
    train(model, param_groups(model, lr=3e-2), inputs)
    adapted = logits_of(model, inputs)

    again = copy.deepcopy(pretrained)
    adapters = load_adapter(again, from_peft(to_peft_delora(adapter_state_dict(model))))
    assert {len(adapter.delora.A) for adapter in adapters.values()} == {6}
    assert {adapter.delora.weight_norm for adapter in adapters.values()} == {weight_norm}
    rounding = tol(torch.float32, depth(model), adapted)
    before = logits_of(pretrained, inputs)
    assert distance(logits_of(again, inputs), adapted) <= rounding < distance(adapted, before)


@pytest.mark.parametrize("to", FORMS)
def test_zero_short_and_long_components_are_the_same_in_peft(to, tmp_path):
    """Zero has no direction, here and in PEFT; and a λ may be negative."""
    pretrained, inputs = hugging_face("BERT")
    model = copy.deepcopy(pretrained)
    torch.manual_seed(1)
    for adapter in inject(model, ["query", "value"], r=4).values():
        with torch.no_grad():
            adapter.delora.A.normal_().mul_(torch.tensor([1e-9, 1.0, 1e17, 0.0])[:, None])
            adapter.delora.B.normal_().mul_(torch.tensor([1e-7, 1e16, 1.0, 1.0]))
            adapter.delora.B0[:, 1] = 0
            adapter.delora.lam.mul_(-0.5)
    check_in_peft(model, pretrained, inputs, tmp_path, to)
    if to == "delora":
        again = copy.deepcopy(pretrained)
        load_adapter(again, from_peft(load_file(tmp_path)))
        adapted = logits_of(model, inputs)
        rounding = tol(torch.float32, depth(model), adapted)
        assert distance(logits_of(again, inputs), adapted) <= rounding


@pytest.mark.parametrize("to", FORMS)
@pytest.mark.parametrize("dtype", (torch.float64, torch.bfloat16))
def test_the_update_keeps_its_precision_whatever_that_of_the_base_model(dtype, to, tmp_path):
    """Adapters are float32 on a bfloat16 base, float64 on a float64 one: here, and in PEFT."""
    pytest.importorskip("safetensors")
    pretrained, inputs = hugging_face("Llama")
    pretrained.to(dtype)
    model = copy.deepcopy(pretrained)
    adapters = inject(model, ["q_proj", "down_proj"], r=2)
    turn(model)
    save_for_peft(model, tmp_path, to)
    served = in_peft(pretrained, tmp_path)
    for name, adapter in adapters.items():
        update = adapter.delora.delta_weight()
        in_its_layer = served.base_model.model.get_submodule(name).get_delta_weight("default")
        assert in_its_layer.dtype == update.dtype
        rounding = tol(update.dtype, adapter.in_features + 4, adapter.delora.norm_bound())
        assert distance(in_its_layer, update) <= rounding
    assert logits_of(served, inputs).dtype == dtype


@pytest.mark.parametrize("to", FORMS)
def test_a_trained_head_and_trained_biases_go_along(to, tmp_path):
    pretrained, inputs = hugging_face("BERT")
    model = copy.deepcopy(pretrained)
    for adapter in inject(model, ["query", "value"], r=2).values():
        adapter.base_layer.bias.requires_grad_(True)
    model.classifier.weight.requires_grad_(True)  # its bias stays frozen, and goes along as it is
    model.bert.embeddings.LayerNorm.requires_grad_(True)
    train(model, param_groups(model, lr=1e-2), inputs)
    served = check_in_peft(model, pretrained, inputs, tmp_path, to)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert sorted(config["modules_to_save"]) == ["bert.embeddings.LayerNorm", "classifier"]
    assert config["bias"] == f"{to}_only"
    assert config["r"] == 4

    # and what PEFT saves of it comes back
    if to == "delora":
        served.save_pretrained(tmp_path / "again")
        again = copy.deepcopy(pretrained)
        load_adapter(again, from_peft(load_file(tmp_path / "again")))
        adapted = logits_of(model, inputs)
        rounding = tol(torch.float32, depth(model), adapted)
        assert distance(logits_of(again, inputs), adapted) <= rounding


@pytest.mark.parametrize("to", FORMS)
def test_a_trained_module_with_parts_is_kept_whole(to, tmp_path):
    """Its own parameters, those of its parts, and its buffers, also transposed or shared ones."""
    pytest.importorskip("safetensors")
    pytest.importorskip("peft")
    torch.manual_seed(0)
    pretrained = Layers()
    pretrained.attention = nn.MultiheadAttention(4, 2)
    pretrained.normal = nn.BatchNorm1d(4)
    pretrained.normal.register_buffer("twin", pretrained.normal.running_mean)
    model = copy.deepcopy(pretrained)
    inject(model, ["inner.fc"], r=2)
    turn(model)
    model.attention.requires_grad_(True)
    model.normal.requires_grad_(True)
    for p in (*model.attention.parameters(), *model.normal.parameters()):
        p.data.add_(torch.randn_like(p))
    model.attention.out_proj.weight.data = torch.randn(4, 4).T
    model.normal.running_mean.normal_()
    save_for_peft(model, tmp_path, to)
    served = in_peft(pretrained, tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert sorted(config["modules_to_save"]) == ["attention", "normal"]
    for name in ("attention", "normal"):
        kept = served.base_model.model.get_submodule(name).modules_to_save["default"].state_dict()
        wanted = model.get_submodule(name).state_dict()
        assert kept.keys() == wanted.keys()
        for key, value in wanted.items():
            assert same_bits(kept[key], value), (name, key)


def test_a_head_that_was_loaded_goes_along_when_it_is_trainable_again(tmp_path):
    pytest.importorskip("safetensors")
    pretrained, inputs = hugging_face("BERT")
    source = copy.deepcopy(pretrained)
    inject(source, ["query"], r=2)
    turn(source)
    source.classifier.requires_grad_(True)
    source.classifier.weight.data.add_(1.0)
    model = copy.deepcopy(pretrained)
    load_adapter(model, adapter_state_dict(source))
    save_for_peft(model, tmp_path / "without")
    model.classifier.requires_grad_(True)
    save_for_peft(model, tmp_path / "with")
    adapted = logits_of(source, inputs)
    rounding = tol(torch.float32, depth(source), adapted)
    without = logits_of(in_peft(pretrained, tmp_path / "without"), inputs)
    with_it = logits_of(in_peft(pretrained, tmp_path / "with"), inputs)
    assert distance(with_it, adapted) <= rounding < distance(without, adapted)


def test_conv1d_is_exported_to_lora(tmp_path):
    pretrained, inputs = hugging_face("GPT-2")
    model = copy.deepcopy(pretrained)
    inject(model, "all-linear", exclude=["lm_head"], r=2)
    turn(model)
    served = check_in_peft(model, pretrained, inputs, tmp_path / "lora", "lora")
    adapted = logits_of(model, inputs)
    merged = served.merge_and_unload()  # PEFT adds ΔW the right way round
    assert distance(logits_of(merged, inputs), adapted) <= tol(torch.float32, depth(model), adapted)
    message = r"^transformer\.h\.0\.attn\.c_attn: PEFT's DeLoRA takes nn.Linear, .* a Conv1D"
    refused(model, tmp_path / "no", "delora", message)


@pytest.mark.parametrize("to", FORMS)
def test_as_many_layers_as_there_are_keep_their_names(to, tmp_path):
    """From 20 target modules on, PEFT shortens their list."""
    pretrained, inputs = hugging_face("BERT", num_hidden_layers=5)
    model = copy.deepcopy(pretrained)
    adapters = inject(model, "all-linear", exclude=["bert.encoder.layer.1", "pooler"], r=1)
    assert len(adapters) == 4 * 6 + 1
    turn(model)
    check_in_peft(model, pretrained, inputs, tmp_path, to)


@pytest.mark.parametrize("to", FORMS)
@pytest.mark.parametrize("target", ("fc", "inner.fc"))
def test_a_name_that_ends_another_is_no_pattern(to, target, tmp_path):
    pytest.importorskip("safetensors")
    torch.manual_seed(0)
    pretrained = Layers()
    x = torch.randn(3, 4)
    model = copy.deepcopy(pretrained)
    targets = target if target == "fc" else [target]  # a string is the whole name
    assert set(inject(model, targets, r=1)) == {target}
    turn(model)
    save_for_peft(model, tmp_path, to)
    served = in_peft(pretrained, tmp_path)
    assert distance(served(x), model(x)) <= tol(torch.float32, 4 * 4, model(x))
    assert distance(pretrained(x), model(x)) > tol(torch.float32, 4 * 4, model(x))
    assert adapted_by_peft(served) == [target]


def test_a_dot_in_a_name_is_no_wildcard(tmp_path):
    pytest.importorskip("safetensors")
    pretrained = nn.Module()
    pretrained.a = nn.ModuleDict({"fc": nn.Linear(4, 4)})
    pretrained.b = nn.ModuleDict({"a": copy.deepcopy(pretrained.a)})  # b.a.fc ends in a.fc
    pretrained.a_fc = nn.Linear(4, 4)
    model = copy.deepcopy(pretrained)
    inject(model, ["a.fc"], exclude=["b"])
    save_for_peft(model, tmp_path)
    assert adapted_by_peft(in_peft(pretrained, tmp_path)) == ["a.fc"]


def test_the_configuration_names_the_pretrained_model(tmp_path):
    pytest.importorskip("safetensors")
    save_for_peft(adapted_layers(["inner.head"], r=2), tmp_path, "lora", base_model="a/name")
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "a/name"
    assert config["modules_to_save"] is None
    assert config["bias"] == "none"
    assert config["r"] == config["lora_alpha"] == 4


# ------------------------------------------------------------------------------------------------
# What PEFT could not reproduce: the message begins with a name, nothing is written, nothing changed
# ------------------------------------------------------------------------------------------------


def refused(model, folder, to, message):
    pytest.importorskip("safetensors")
    before = snapshot(model)
    with pytest.raises(ValueError, match=message):
        save_for_peft(model, folder, to)
    assert snapshot(model) == before
    assert not folder.exists()


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "folder"


def test_a_model_without_adapters_is_refused(folder):
    refused(Layers(), folder, "lora", "^Layers has no DeLoRALinear")
    layer = adapted_layers(["fc"]).fc
    refused(layer, folder, "lora", "^the model itself is a DeLoRALinear")
    refused(adapted_layers(), folder, "peft", "^to must be 'lora' or 'delora', got 'peft'")


def test_two_strengths_are_refused_as_delora(folder):
    model = adapted_layers(["fc"], tie_lambda=False)
    model.fc.delora.lam.data.fill_(2.0)
    refused(model, folder, "delora", "^fc: lam is 2, lam0 is 15")


def test_a_layer_under_two_names_is_refused(folder):
    model = adapted_layers(["inner.fc"])
    model.twin = model.inner["fc"]
    refused(model, folder, "lora", r"^twin: the same layer as inner\.fc, and PEFT adapts one name")


def test_a_trained_tensor_under_two_names_is_refused(folder):
    model = adapted_layers(["inner.fc"])
    model.inner["head"].requires_grad_(True)
    model.twin = model.inner["head"]
    refused(
        model, folder, "lora", r"^twin\.weight: the same parameter as inner\.head\.weight, train"
    )


def test_a_trained_module_whose_name_ends_another_is_refused(folder):
    model = adapted_layers(["inner.fc"])
    model.head = nn.Linear(4, 4)
    refused(
        model, folder, "lora", r"^head is trainable, and PEFT would take inner\.head for it: they"
    )
    del model.inner["head"]
    model.lm_head = None
    model.another_head = nn.Identity()  # the end of a word is enough for PEFT
    refused(model, folder, "lora", "^head is trainable, and PEFT would take another_head for it")


@pytest.mark.parametrize("to", FORMS)
def test_a_trained_module_whose_name_ends_one_of_peft_is_refused(to, folder):
    """Seen: PEFT keeps a copy of "norm", and of its own "delora_w_norm", and cannot load either."""
    peft = pytest.importorskip("peft")
    for part in peft_checkpoints.PARTS[to]:
        end = part.rpartition("_")[2]
        model = adapted_layers(["inner.fc"])
        model.add_module(end, nn.LayerNorm(4))
        refused(
            model, folder, to, rf"^{end} is trainable, and PEFT would take inner\.fc\.\w*{end} for"
        )

    config = peft.LoraConfig if to == "lora" else peft.DeloraConfig
    served = peft.get_peft_model(Layers(), config(target_modules=["fc"]))
    parts = {name for name, _ in served.base_model.model.fc.named_children()}
    assert parts == set(peft_checkpoints.PARTS[to])


def test_trained_tensors_that_peft_has_no_place_for_are_refused(folder):
    model = adapted_layers(["inner.fc"])
    model.bias = nn.Parameter(torch.ones(4))  # the model's own
    refused(model, folder, "lora", "^bias is trainable, and PEFT has no place for it")
    model = adapted_layers(["inner.fc"])
    model.inner.bias = nn.Parameter(torch.ones(4))  # beside an adapter
    refused(model, folder, "lora", r"^inner\.bias is trainable, and PEFT has no place for it")
    model = nn.Sequential(adapted_layers(["inner.fc"]))
    model[0].scale = nn.Parameter(torch.ones(4))  # around an adapter
    refused(model, folder, "lora", r"^0\.scale is trainable, and PEFT has no place for it")
    model = adapted_layers(["inner.fc"])
    model.inner["fc"].base_layer.weight.requires_grad_(True)
    refused(model, folder, "lora", r"^inner\.fc\.base_layer\.weight is trainable, and PEFT has no")
    model = adapted_layers(["inner.fc"])
    model.scales = nn.ParameterList([torch.ones(4)])  # PEFT copies no containers
    refused(model, folder, "lora", r"^scales\.0 is trainable, and PEFT has no place for it")


@pytest.mark.parametrize("to", FORMS)
def test_a_parametrization_is_refused(to, folder):
    model = adapted_layers(["inner.fc"])
    conv = nn.Conv1d(4, 4, 1).requires_grad_(False)
    nn.utils.parametrize.register_parametrization(conv, "weight", DeLoRA(conv.weight))
    model.conv = conv
    refused(model, folder, to, r"^conv\.parametrizations\.weight\.0: a DeLoRA outside of a DeLoRAL")


@pytest.mark.parametrize("to", FORMS)
@pytest.mark.parametrize("target", ("linear1", "self_attn.out_proj"))
def test_a_layer_that_is_read_and_not_called_is_refused(target, to, folder, tmp_path):
    """Seen: PEFT's adapter of such a layer changes nothing, and nothing says so."""
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    model = nn.Sequential(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)).eval()
    x = torch.randn(2, 3, 8)
    before = model(x)
    config = peft.DeloraConfig(target_modules=[target], init_weights=False)
    served = peft.get_peft_model(copy.deepcopy(model), config).eval()
    with torch.no_grad():
        rounding = tol(torch.float32, depth(model), before)
        passed_over = distance(served(x), before) <= rounding
    assert passed_over, "PEFT has learned it: such layers need not be refused any longer"
    inject(model, [target], r=2)
    refused(model, folder, to, rf"^0\.{target}: \w+ reads the weight and does not call the layer")


# ------------------------------------------------------------------------------------------------
# The script
# ------------------------------------------------------------------------------------------------


train_for_long = peft_checkpoints.train


def train_shortly(model, text, optimizer, steps, seed, watch):
    train_for_long(model, text, optimizer, 2, seed, watch)


def untrained(steps):
    torch.manual_seed(0)
    return ByteTransformer().eval()


@pytest.fixture
def script(monkeypatch, tmp_path):
    """main() on an untrained model, for two steps, into a folder of its own."""
    monkeypatch.setattr(sys, "argv", ["peft_checkpoints.py", "--quick", "--out", str(tmp_path)])
    monkeypatch.setattr(peft_checkpoints, "train", train_shortly)
    monkeypatch.setattr(peft_checkpoints, "pretrained", untrained)
    return peft_checkpoints.main


def test_the_report_compares_both_forms_and_the_way_back(script, tmp_path, capsys):
    pytest.importorskip("peft")
    script()
    report = capsys.readouterr().out
    for name in ("here ", "PEFT, lora", "PEFT, delora", "here again"):
        assert f"\n  {name}" in report, report
    for folder in ("lora", "delora", "from_peft"):
        assert (tmp_path / folder / "adapter_config.json").exists()


@pytest.mark.parametrize("wrong", (2.0, float("nan")))
def test_a_difference_beyond_rounding_is_a_failure(wrong, script, monkeypatch):
    pytest.importorskip("peft")

    def lora_that_is_off(state):
        tensors = to_peft_lora(state)
        tensors["base_model.model.blocks.0.up.lora_A.weight"] *= wrong
        return tensors

    monkeypatch.setattr(peft_checkpoints, "to_peft_lora", lora_that_is_off)
    with pytest.raises(
        SystemExit, match="^Something is wrong: outputs differ by more than rounding"
    ):
        script()


@pytest.mark.parametrize("package", ("peft", "safetensors"))
def test_without_a_package_one_line_says_so(package, script, monkeypatch, capsys):
    if package == "safetensors":
        pytest.importorskip("peft")  # which is asked for first
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.setitem(sys.modules, f"{package}.torch", None)
    message = (
        f"^peft_checkpoints.py needs {package}.*, which is not installed: pip install peft saf"
    )
    with pytest.raises(SystemExit, match=message):
        script()
    assert capsys.readouterr().out == ""
