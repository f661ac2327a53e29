"""The README's table of conformance says what a run says, tick by tick; needs peft."""

import importlib.metadata
import re
from pathlib import Path

import conformance
import pytest

README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(("subject", "column"), (("PeftDeLoRA", 3), ("PlainLoRA", 4)))
def test_the_table_of_the_readme_is_what_a_run_gives(subject, column):
    pytest.importorskip("peft")
    rows = [line.split(" | ") for line in README.splitlines() if re.match(r"\| P\d+ \|", line)]
    table = {f"test_{row[1].replace(' ', '_')}": row[column].removesuffix(" |") for row in rows}
    measured = conformance.outcomes(f"examples/conformance.py:{subject}", quick=False)
    assert table.keys() == measured.keys()
    for name, cell in measured.items():
        ticks = [
            ("✓", "–").index(text) if text in "✓–" else "example" for text in (table[name], cell)
        ]
        assert ticks[0] == ticks[1], f"{name}: {table[name]} in the README, {cell} now"


def test_without_peft_one_line_says_so(monkeypatch, capsys):
    def version(package):
        raise importlib.metadata.PackageNotFoundError(package)

    monkeypatch.setattr(importlib.metadata, "version", version)
    monkeypatch.setattr("sys.argv", ["conformance.py"])
    with pytest.raises(
        SystemExit, match="^conformance.py compares with PEFT, which is not installed: pip "
    ):
        conformance.main()
