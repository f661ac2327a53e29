"""What README says is run, and what it shows is printed: code, commands, tables, links."""

import ast
import copy
import inspect
import os
import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import conformance
import pytest
import torch
from torch import nn

import delora
from delora import DeLoRA, DeLoRALinear

ROOT = Path(__file__).parent.parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
USE, TRAINER, ANYWHERE, PLAIN, FACTORS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def text_after(code):
    """The block of text that follows a block of code."""
    rest = README[README.index(code) + len(code) :]
    return re.search(r"```text\n(.*?)```", rest, re.DOTALL)[1]


def words_and_numbers(text):
    """Text with # for each number, and the numbers."""
    number = r"\d[\d,]*(?:\.\d+)?(?:e-?\d+)?"
    numbers = [float(found.replace(",", "")) for found in re.findall(number, text)]
    return re.sub(rf" *{number}", " #", text), numbers


def contract(subject, *options, folder=ROOT):
    """DELORA_SUBJECT=subject pytest test_delora.py, in that folder."""
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *options, "test_delora.py"]
    environment = os.environ | {"DELORA_SUBJECT": str(subject)}
    how = {"cwd": folder, "env": environment, "capture_output": True, "text": True}
    return subprocess.run(command, timeout=900, **how)


def test_the_diff_of_the_readme_makes_two_lines_of_a_training_script_delora():
    lines = re.search(r"```diff\n(.*?)```", README, re.DOTALL)[1].splitlines()
    heads = nn.ModuleDict({name: nn.Linear(4, 4) for name in ("q_proj", "k_proj", "v_proj")})
    before = {name: layer.weight.clone() for name, layer in heads.items()}
    x = torch.randn(3, 4)
    outputs = {name: layer(x) for name, layer in heads.items()}
    for sign in "-+":
        scope = {"torch": torch, "model": heads}
        exec("\n".join(line[1:] for line in lines if line[0] == sign), scope)
        assert isinstance(scope["optimizer"], torch.optim.AdamW)
    adapted = [name for name, layer in heads.items() if isinstance(layer, DeLoRALinear)]
    assert adapted == ["q_proj", "v_proj"]
    assert all(torch.equal(heads[name](x), y) for name, y in outputs.items())
    heads["q_proj"](x).square().sum().backward()
    scope["optimizer"].step()
    assert not torch.equal(heads["q_proj"].weight, before["q_proj"])


def test_the_code_to_use_it_runs_and_prints_what_the_readme_says(tmp_path, monkeypatch, capsys):
    """To a hundredth: another machine rounds otherwise, in 300 steps."""
    monkeypatch.chdir(tmp_path)
    exec(compile(USE, "README.md", "exec"), {})
    said, shown = words_and_numbers(capsys.readouterr().out), words_and_numbers(text_after(USE))
    assert said[0] == shown[0]
    assert said[1] == pytest.approx(shown[1], rel=1e-2, abs=1e-2)
    assert (tmp_path / "adapter.pt").exists()


@pytest.mark.slow
def test_a_larger_lambda_lowers_the_loss_as_the_readme_says(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    said = re.search(
        r"with 8 instead of 4 the last loss is ([\d.]+)\s+here instead of ([\d.]+)", README
    )
    for strength, shown in zip((8, 4), said.groups(), strict=True):
        scope = {}
        code = USE.replace("lambda_init=4", f"lambda_init={strength}")
        exec(compile(code, "README.md", "exec"), scope)
        assert scope["loss"].item() == pytest.approx(float(shown), abs=1e-2)


def test_components_that_have_left_their_start_have_turned_as_the_readme_says():
    """‖ΔW‖ is √2 times λ‖W‖/√(r·in) once A and B have nothing to do with A₀ and B₀.

    With b̂_i at right angles to each other, each ‖b̂_i âᵀ_i diag(w)‖² is Σ_j â_ij² w_j², which is
    ‖W‖²/in in the mean. Random directions in 512 dimensions are at right angles to about 1/√512.
    """
    torch.manual_seed(0)
    adapter = DeLoRA(torch.randn(512, 512), r=8)
    nn.init.normal_(adapter.A)
    nn.init.normal_(adapter.B)
    full = adapter.lam.item() * adapter.w.norm().item() / (8 * 512) ** 0.5
    assert adapter.delta_weight().norm().item() / full == pytest.approx(2**0.5, abs=512**-0.5)
    assert re.search(r"At ([\d.]+) the directions", README)[1] == f"{2**0.5:.1f}"


def test_the_formula_as_it_reads_is_that_of_the_file():
    scope = {"normalize": nn.functional.normalize}
    exec(compile(PLAIN, "README.md", "exec"), scope)
    weight = torch.randn(6, 5, dtype=torch.float64)
    adapter = DeLoRA(weight, r=3)
    with torch.no_grad():
        for moved in (0.0, 1.0):
            adapter.A += moved * torch.randn_like(adapter.A)
            adapter.B += moved * torch.randn_like(adapter.B)
            found = scope["delta_weight"](
                weight, adapter.A, adapter.B, adapter.A0, adapter.B0, adapter.lam
            )
            wanted = adapter.delta_weight()
            # r products and their difference are rounded, each of size λ w / r at most
            size = 2 * adapter.norm_bound()
            assert (found - wanted).abs().max() <= 8 * torch.finfo(torch.float64).eps * size
    assert wanted.norm() > 0.1


def test_the_factors_of_the_readme_are_those_of_the_file():
    """The function as it stands, without its docstring."""
    source = textwrap.dedent(inspect.getsource(DeLoRA.factors))
    docstring = ast.get_docstring(ast.parse(source).body[0], clean=False)
    assert source.replace(f'    """{docstring}"""\n', "") == FACTORS


def test_the_code_for_trainer_trains_adapters_and_head_and_resumes_exactly(tmp_path, monkeypatch):
    """On a BERT with a new head."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    monkeypatch.chdir(tmp_path)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.BertConfig(vocab_size=64, intermediate_size=32, num_labels=3, **sizes)
    torch.manual_seed(0)
    pretrained = transformers.BertForSequenceClassification(config)
    rows = []
    for tokens in torch.randint(64, (8, 6)):
        rows.append({"input_ids": tokens, "labels": tokens[0] % 3})
    saving = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4}
    quiet = {"use_cpu": True, "report_to": [], "disable_tqdm": True, "logging_strategy": "no"}
    arguments = transformers.TrainingArguments(
        "out", per_device_train_batch_size=2, **saving, **quiet
    )
    scope = vars(delora) | {"torch": torch, "Trainer": transformers.Trainer, "arguments": arguments}
    states = []
    for resume in (False, True):
        scope |= {"model": copy.deepcopy(pretrained), "dataset": rows}
        code = TRAINER.replace(
            "train()", "train(resume_from_checkpoint='out/checkpoint-2')", resume
        )
        exec(compile(code, "README.md", "exec"), scope)
        states.append(torch.load("adapter.pt", weights_only=True))
    heads = {"classifier.weight", "classifier.bias"}
    assert heads < states[0].keys() and len(states[0]) == 2 + 4 * 6
    assert not torch.equal(states[0]["classifier.weight"], pretrained.classifier.weight)
    assert all(torch.equal(states[1][key], tensor) for key, tensor in states[0].items())


def test_the_code_for_attention_adapts_a_whole_transformer_with_padding():
    torch.manual_seed(0)
    model = nn.Transformer(16, 2, 1, 1, 32, dropout=0.0, batch_first=True).eval()
    source, target = torch.randn(2, 5, 16), torch.randn(2, 4, 16)
    padding = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    apply = lambda: model(source, target, src_key_padding_mask=padding)  # noqa: E731
    before = apply()
    for module in list(model.modules()):
        if isinstance(module, nn.MultiheadAttention):
            scope = {"module": module, "DeLoRA": DeLoRA}
            exec(compile(ANYWHERE, "README.md", "exec"), scope)
    delora.inject(model, "all-linear")
    assert torch.equal(apply(), before)
    optimizer = torch.optim.SGD(delora.param_groups(model, lr=1e-2), lr=1e-2)
    (apply() - target.roll(1, 1)).square().mean().backward()
    for name, p in model.named_parameters():
        if name.endswith((".A", ".B")):
            assert p.grad.norm() > 0, name
    optimizer.step()
    assert not torch.equal(apply(), before)


@pytest.mark.slow
def test_the_quickstart_ends_with_the_report_of_the_readme():
    """The same run, whole. Another machine rounds otherwise, over 850 steps: a tenth of a loss."""
    command = [sys.executable, "examples/quickstart.py"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900)
    assert run.returncode == 0, run.stderr
    said = run.stdout[run.stdout.index("Report") :]
    shown = text_after("python examples/quickstart.py\n")
    lines = [words_and_numbers(line)[0] for line in said.splitlines()[1:]]
    for line in shown.splitlines()[1:]:
        assert words_and_numbers(line)[0] in lines
    for what in ("new text", "old text"):
        pattern = rf"loss, {what} +([\d.]+) -> ([\d.]+)"
        for a, b in zip(*(re.search(pattern, t).groups() for t in (said, shown)), strict=True):
            assert abs(float(a) - float(b)) < 0.1, what
    cells = re.findall(r"([\d.]+) / ([\d.]+)", said)  # ‖ΔW‖ / its bound, of every layer
    shares = [100 * float(moved) / float(bound) for moved, bound in cells]
    words = " ".join(README.split())
    lowest, highest = re.search(r"In the quickstart ΔW is at (\d+) to (\d+) %", words).groups()
    assert abs(min(shares) - int(lowest)) < 1 and abs(max(shares) - int(highest)) < 1


def test_the_accuracies_of_the_readme_are_those_of_the_example():
    table = (ROOT / "examples" / "huggingface.py").read_text(encoding="utf-8")
    for method, rate in (("LoRA", "0.0005"), ("DeLoRA", "0.01")):  # its usual one
        pattern = rf"^  {method} +{rate} +[\d,]+ +[\d.]+ +([\d.]+) \("
        accuracy = re.search(pattern, table, re.MULTILINE)[1]
        assert re.search(rf"a real task: .*\b{method} {accuracy} %", README), method
    error = re.search(r"standard\s+error of ([\d.]+) points", table)[1]
    assert f"± {error} each, no verdict" in README


def test_the_links_of_the_readmes_lead_somewhere():
    examples = (ROOT / "examples" / "README.md").read_text(encoding="utf-8")
    for folder, text in ((ROOT, README), (ROOT / "examples", examples)):
        links = re.findall(r"\]\((?!http)([\w./-]+)(?:#([\w-]+))?\)", text)
        assert links
        for path, heading in links:
            assert (folder / path).exists(), path
            if heading:
                headings = re.findall(
                    r"^#+ (.*)$", (folder / path).read_text("utf-8"), re.MULTILINE
                )
                assert heading in [words.lower().replace(" ", "-") for words in headings]


def test_every_script_is_in_the_list_of_examples():
    examples = (ROOT / "examples" / "README.md").read_text(encoding="utf-8")
    paths = []
    for pattern in ("*.py", "*.ipynb", "experiments/*.py"):
        paths += (ROOT / "examples").glob(pattern)
    for path in paths:
        assert f"({path.relative_to(ROOT / 'examples').as_posix()})" in examples, path


@pytest.mark.slow
def test_the_layer_of_the_readme_passes_the_contract_as_it_says(tmp_path):
    """Copied into another folder, without delora.py beside it."""
    head = "import torch\nfrom torch import nn\nfrom torch.nn import functional as F\n\n\n"
    source = head + inspect.getsource(conformance.MyLayer)
    (tmp_path / "my_layer.py").write_text(source, encoding="utf-8")
    shutil.copy(ROOT / "test_delora.py", tmp_path)
    run = contract("my_layer.py:MyLayer", folder=tmp_path)
    assert run.returncode == 0, run.stdout + run.stderr
    command, shown = re.search(r"```text\n\$ (DELORA_SUBJECT=.*)\n(.*)\n```", README).groups()
    assert command == "DELORA_SUBJECT=examples/conformance.py:MyLayer pytest test_delora.py"
    assert words_and_numbers(shown)[0] in words_and_numbers(run.stdout)[0]
    assert "Declined: merge: AttributeError" in run.stdout


@pytest.mark.slow
@pytest.mark.parametrize(
    ("subject", "message"),
    [
        ("nowhere.py:Layer", "No such file or directory.*nowhere.py"),
        ("half.py:Layer", "module 'half' has no attribute 'Layer'"),
        ("half.py", "half.py can build no layer.*NotImplementedError"),
    ],
)
def test_a_subject_that_cannot_be_used_is_told_why(tmp_path, subject, message):
    half = "def build(weight, bias, **options):\n    raise NotImplementedError\n"
    (tmp_path / "half.py").write_text(half)
    shutil.copy(ROOT / "test_delora.py", tmp_path)
    run = contract(subject, "-x", folder=tmp_path)
    assert run.returncode not in (0, 1) and re.search(message, run.stdout + run.stderr)


def test_the_two_commands_of_the_readme_are_one_line_each():
    commands = re.findall(r"```bash\n(.*?)\n```", README, re.DOTALL)
    assert len(commands) == 2 and all(len(command.splitlines()) == 1 for command in commands)
    assert commands[0].endswith("python examples/quickstart.py")
    assert "pytest" in commands[1]
