"""The README's table of conformance says what a run says, tick by tick; needs peft."""

import importlib.metadata
import re
from pathlib import Path

import conformance
import pytest

README = (Path(__file__).parent.parent.parent / "README.md").read_text(encoding="utf-8")


def kind_of(cell):
    """A tick, a dash, or an example, whichever."""
    return cell if cell in "✓–" else "example"


@pytest.mark.parametrize(("subject", "column"), (("PeftDeLoRA", 3), ("PlainLoRA", 4)))
def test_the_table_of_the_readme_is_what_a_run_gives(subject, column):
    pytest.importorskip("peft")
    rows = [line.split(" | ") for line in README.splitlines() if re.match(r"\| P\d+ \|", line)]
    table = {f"test_{row[1].replace(' ', '_')}": row[column].removesuffix(" |") for row in rows}
    measured = conformance.outcomes(f"examples/conformance.py:{subject}", quick=False)
    assert table.keys() == measured.keys()
    for name, cell in measured.items():
        assert kind_of(table[name]) == kind_of(cell), f"{name}: {table[name]} there, {cell} now"


def test_without_peft_one_line_says_so(monkeypatch):
    def version(package):
        raise importlib.metadata.PackageNotFoundError(package)

    monkeypatch.setattr(importlib.metadata, "version", version)
    monkeypatch.setattr("sys.argv", ["conformance.py"])
    words = "^conformance.py compares with PEFT, which is not installed: pip install peft$"
    with pytest.raises(SystemExit, match=words):
        conformance.main()
