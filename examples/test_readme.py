"""The README's Python code runs as it stands, and its two commands are where CI looks for them."""

import re
from pathlib import Path

README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")


def test_the_python_code_of_the_readme_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    exec(compile(code, "README.md", "exec"), {})
    assert re.fullmatch(r"(\d+ tensor\(True\)\n){2}", capsys.readouterr().out)
    assert (tmp_path / "adapter.pt").exists()


def test_the_two_commands_of_the_readme_are_one_line_each():
    commands = re.findall(r"```bash\n(.*?)\n```", README, re.DOTALL)
    assert commands == [
        'pip install -e ".[test]" && python examples/quickstart.py',
        'pip install -e ".[test]" && pytest',
    ]
