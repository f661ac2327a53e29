"""Is the contract right? It must pass every right layer of subjects.py, and no wrong one.

pytest -m slow examples/tests/test_subjects.py     each layer, in a process of its own
python examples/tests/test_subjects.py             the wrong ones as a table: who notices what
python examples/tests/test_subjects.py --only WNotApplied NormsOfRows
"""

import argparse
import os
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from xml.etree import ElementTree

import pytest
import subjects

ROOT = Path(__file__).resolve().parent.parent.parent
TIME_LIMIT = 1800  # seconds, for one layer

pytestmark = pytest.mark.slow


def run_contract(subject, *options):
    """The finished process of test_delora.py on a class of subjects.py, in the tier it names."""
    environment = os.environ | {
        "DELORA_SUBJECT": f"examples/tests/subjects.py:{subject.__name__}",
        "OMP_NUM_THREADS": "1",
    }
    environment.pop("DELORA_QUALITY", None)
    if subject.tier == 2:
        environment["DELORA_QUALITY"] = "1"
    command = [sys.executable, "-m", "pytest", "-q", *options, "-p", "no:cacheprovider"]
    return subprocess.run(
        [*command, "test_delora.py"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=TIME_LIMIT,
    )


def red_tests(subject):
    """The names of all tests that turn red, each once, in the contract's order."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        run = run_contract(subject, f"--junitxml={report}")
        if run.returncode not in (0, 1):  # 1: some test failed
            raise RuntimeError(f"{subject.__name__}: {run.stdout[-2000:]}{run.stderr[-2000:]}")
        cases = ElementTree.parse(report).findall(".//testcase")
    names = []
    for case in cases:
        name = case.get("name").partition("[")[0]
        red = case.find("failure") is not None or case.find("error") is not None
        if red and name not in names:
            names.append(name)
    return names


@pytest.mark.parametrize(
    "subject", [subject for subject in subjects.RIGHT if subject is not subjects.Textbook]
)
def test_a_right_layer_passes(subject):
    run = run_contract(subject, "-x")
    assert run.returncode == 0, run.stdout + run.stderr


def test_zero_divided_by_zero_is_all_that_is_wrong_with_the_textbook():
    names = red_tests(subjects.Textbook)
    assert len(names) == 1
    assert "zero_component" in names[0]


@pytest.mark.parametrize("subject", subjects.WRONG)
def test_a_wrong_layer_is_noticed(subject):
    run = run_contract(subject, "-x")
    # 1: a test failed. Had the layer been refused before any test, it would be another number.
    assert run.returncode == 1, run.stdout + run.stderr


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="*", help="names of wrong layers")
    parser.add_argument("--jobs", type=int, default=2, help="at a time")
    options = parser.parse_args()

    chosen = subjects.WRONG
    if options.only:
        chosen = [subject for subject in chosen if subject.__name__ in options.only]
    unnoticed = []
    print("| mistake | tier | tests that turn red |")
    print("| --- | --- | --- |")
    with ThreadPoolExecutor(options.jobs) as pool:
        for subject, names in zip(chosen, pool.map(red_tests, chosen), strict=True):
            if not names:
                unnoticed.append(subject.__name__)
            words = [name.removeprefix("test_").replace("_", " ") for name in names]
            mistake = f"`{subject.__name__}`: {subject.__doc__}".replace("|", "\\|")
            print(f"| {mistake} | {subject.tier} | {'; '.join(words) or '–'} |", flush=True)
    if unnoticed:
        sys.exit(f"not noticed: {', '.join(unnoticed)}")


if __name__ == "__main__":
    main()
