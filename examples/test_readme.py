"""What the README says is run: its Python code and its subject. Its table has the rows of the contract."""

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
USE, BY_HAND, SUBJECT = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def text_after(code: str) -> str:
    """The block of text that follows a block of code."""
    return re.search(r"```text\n(.*?)```", README[README.index(code) + len(code) :], re.DOTALL)[1]


def contract(subject: str | Path, *options: str, folder: Path = ROOT) -> subprocess.CompletedProcess:
    """DELORA_SUBJECT=subject pytest test_delora.py, in that folder."""
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *options, "test_delora.py"]
    environment = {**os.environ, "DELORA_SUBJECT": str(subject)}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=600)


def test_the_python_code_of_the_readme_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    exec(compile(USE, "README.md", "exec"), {})
    assert re.fullmatch(r"(\d+ tensor\(True\)\n){2}", capsys.readouterr().out)
    assert (tmp_path / "adapter.pt").exists()


def test_the_worked_example_prints_what_the_readme_says(capsys):
    exec(compile(BY_HAND, "README.md", "exec"), {})
    assert capsys.readouterr().out == text_after(BY_HAND)


def test_the_subject_of_the_readme_passes_the_contract_as_it_says(tmp_path):
    (tmp_path / "my_subject.py").write_text(SUBJECT, encoding="utf-8")
    assert len(SUBJECT.splitlines()) < 25
    for name in ("delora.py", "test_delora.py", "pyproject.toml"):
        (tmp_path / name).write_text((ROOT / name).read_text(encoding="utf-8"), encoding="utf-8")
    run = contract("my_subject.py", folder=tmp_path)
    assert text_after(SUBJECT) in re.sub(r" in [\d.]+s.*", "", run.stdout), run.stdout + run.stderr


def test_a_subject_that_cannot_be_used_is_told_so_in_one_line(tmp_path):
    (tmp_path / "half.py").write_text("def build(weight, bias, **options):\n    raise NotImplementedError\n")
    (tmp_path / "crash.py").write_text("1 / 0\n")
    (tmp_path / "shapes.py").write_text(SUBJECT.replace('"A": layer.delora_A', '"A": layer.delora_A.T'))
    lines = {
        "nowhere.py": "FileNotFoundError: .*nowhere.py'",
        "nowhere": "ModuleNotFoundError: No module named 'nowhere'",
        "half.py": "TypeError: it lacks tensors, delta_weight, merge",
        "half.py:Layer": "AttributeError: module 'half' has no attribute 'Layer'",
        "crash.py": "ZeroDivisionError: division by zero",
        "shapes.py": r"TypeError: tensors\(\)\['A'\] is \(2, 1\), not \(1, 2\), .*",
    }
    for subject, line in lines.items():
        path = tmp_path / subject if subject.endswith(".py") or ":" in subject else subject
        run = contract(path)
        (said,) = [text for text in run.stderr.splitlines() if text.strip()]
        prefix = f"ERROR: DELORA_SUBJECT={path}: "
        assert run.returncode == 4 and said.startswith(prefix) and re.fullmatch(line, said.removeprefix(prefix))


def test_the_table_has_a_row_for_every_property_of_the_contract():
    tests = dict.fromkeys(re.findall(r"::test_(\w+)", contract("test_delora:Reference", "--collect-only").stdout))
    rows = re.findall(r"^\| P\d+ \| ([^|]+?) \|", README, re.MULTILINE)
    assert rows == [name.replace("_", " ") for name in tests]


def test_the_two_commands_of_the_readme_are_one_line_each():
    commands = re.findall(r"```bash\n(.*?)\n```", README, re.DOTALL)
    assert commands == [
        'pip install -e ".[test]" && python examples/quickstart.py',
        'pip install -e ".[test]" && pytest',
    ]
