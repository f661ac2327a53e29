"""What README says is run, and what it shows is printed: code, commands, tables, links."""

import contextlib
import io
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from delora import DeLoRALinear

ROOT = Path(__file__).parent.parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
BY_HAND, USE, LAYER = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def text_after(code):
    """The block of text that follows a block of code."""
    rest = README[README.index(code) + len(code) :]
    return re.search(r"```text\n(.*?)```", rest, re.DOTALL)[1]


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


def test_the_python_code_of_the_readme_runs_and_prints_what_it_says(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    exec(compile(USE, "README.md", "exec"), {})
    assert capsys.readouterr().out == text_after(USE)
    assert (tmp_path / "adapter.pt").exists()


@pytest.mark.slow
def test_the_quickstart_ends_with_the_report_of_the_readme():
    """The same run, whole. Another machine rounds otherwise, over 850 steps: a tenth of a loss."""
    command = [sys.executable, "examples/quickstart.py"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900)
    assert run.returncode == 0, run.stderr
    said = run.stdout[run.stdout.index("Report") :]
    shown = text_after("python examples/quickstart.py\n")
    without_numbers = []
    for text in (said, shown):
        lines = text.splitlines()[1:]
        without_numbers.append([re.sub(r" *[\d.,]*\d(e-\d+)?", " #", line) for line in lines])
    assert without_numbers[0] == without_numbers[1]
    for what in ("new text", "old text"):
        pattern = rf"loss, {what} +([\d.]+) -> ([\d.]+)"
        for a, b in zip(*(re.search(pattern, t).groups() for t in (said, shown)), strict=True):
            assert abs(float(a) - float(b)) < 0.1, what


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
        links = re.findall(r"\]\((?!http)([\w./-]+)", text)
        assert links
        for path in links:
            assert (folder / path).exists(), path


def test_every_script_is_in_the_list_of_examples():
    examples = (ROOT / "examples" / "README.md").read_text(encoding="utf-8")
    for path in [*ROOT.glob("examples/*.py"), *ROOT.glob("examples/experiments/*.py")]:
        assert f"({path.relative_to(ROOT / 'examples').as_posix()})" in examples, path


def test_the_worked_example_prints_what_the_readme_says(capsys):
    exec(compile(BY_HAND, "README.md", "exec"), {})
    assert capsys.readouterr().out == text_after(BY_HAND)


def as_shown(matrix):
    rows = [" ".join(f"{round(number, 4):g}" for number in row) for row in matrix.tolist()]
    return f"({'; '.join(rows)})"


def test_the_steps_of_the_worked_example_are_those_of_the_layer():
    scope = {}
    with contextlib.redirect_stdout(io.StringIO()):
        exec(compile(BY_HAND, "README.md", "exec"), scope)
    delora, delta = scope["delora"], scope["delta"].detach()
    a, b, a0, b0 = (
        nn.functional.normalize(p.detach().flatten(), dim=0)  # (2,)
        for p in (delora.A, delora.B, delora.A0, delora.B0)
    )
    new, old = b.outer(a), b0.outer(a0)  # (2, 2)
    total, gradient = delta.sum(), delora.lam.grad.item()
    steps = re.search(r"```text\n(direction.*?)```", README, re.DOTALL)[1]
    wanted = [
        "(0.6, 0.8)    b / ‖b‖ = (0.8, 0.6)",
        as_shown(new),
        f"minus b̂₀ â₀ᵀ = {as_shown(old)}",
        f"is {as_shown(new - old)}",
        f"= {as_shown(delta)} = ΔW",
        f"√{delta.square().sum():.2f} = {delta.norm():.3f}",
        f"‖ΔW‖_* = {torch.linalg.svdvals(delta).sum():.1f}",
        f"2 · ½ · 5 = {delora.norm_bound():g}",
        f"the sum of ΔW, {total:.2f}, by λ: {total:.2f} / ½ = {gradient:.2f}",
    ]
    assert a.tolist() == pytest.approx([0.6, 0.8]) and b.tolist() == pytest.approx([0.8, 0.6])
    assert not [text for text in wanted if text not in steps]


@pytest.mark.slow
def test_the_layer_of_the_readme_passes_the_contract_as_it_says(tmp_path):
    """Without delora.py beside it."""
    (tmp_path / "my_layer.py").write_text(LAYER, encoding="utf-8")
    shutil.copy(ROOT / "test_delora.py", tmp_path)
    run = contract("my_layer.py:MyLayer", folder=tmp_path)
    assert run.returncode == 0, run.stdout + run.stderr
    for line in text_after(LAYER).splitlines():
        pattern = re.sub(r"\d+", r"\\d+", re.escape(line))
        assert re.search(pattern, run.stdout), (line, run.stdout)


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
