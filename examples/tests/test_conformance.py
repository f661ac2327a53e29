"""The README's table of conformance says what a run says, tick by tick; needs peft."""

import importlib.metadata
import re
from pathlib import Path

import conformance
import pytest

README = (Path(__file__).parent.parent.parent / "README.md").read_text(encoding="utf-8")


def kind_of(cell):
    """A tick, a dash, or a case in words, whichever."""
    return cell if cell in "✓–" else "a case"


@pytest.mark.slow
@pytest.mark.parametrize(("subject", "column"), (("PeftDeLoRA", 4), ("PlainLoRA", 5)))
def test_the_table_of_the_readme_is_what_a_run_gives(subject, column):
    pytest.importorskip("peft")
    tests = conformance.properties()
    measured = conformance.outcomes(f"examples/conformance.py:{subject}", tests)
    rows = [line.strip("| ").split(" | ") for line in README.splitlines()]
    table = {row[2]: row for row in rows if len(row) > 4 and re.fullmatch(r"P\d+b?", row[0])}
    assert len(table) == len(tests)
    for test, tier in tests.items():
        number, _, words = test.removeprefix("test_p").partition("_")
        row = table[words.replace("_", " ")]
        assert row[:2] == [f"P{number}", str(tier)]
        assert kind_of(row[column]) == kind_of(measured[test]), (row, measured[test])


def test_without_peft_one_line_says_so(monkeypatch):
    def version(package):
        raise importlib.metadata.PackageNotFoundError(package)

    monkeypatch.setattr(importlib.metadata, "version", version)
    monkeypatch.setattr("sys.argv", ["conformance.py"])
    words = "^conformance.py compares with PEFT, which is not installed: pip install peft$"
    with pytest.raises(SystemExit, match=words):
        conformance.main()
