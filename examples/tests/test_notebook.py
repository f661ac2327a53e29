"""The notebook for a class: its form, what it shows when it is run, and whether that is so.

    pytest examples/tests/test_notebook.py            its form, in a second
    pytest -m slow examples/tests/test_notebook.py    all of it is run, and so are its planted bugs

The second needs nbclient, nbformat, ipykernel and matplotlib, and takes a minute. What the run
prints is compared with what is committed, word by word and number by number, and what the notebook
says of these numbers is computed from them.
"""

import ast
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
NOTEBOOK = ROOT / "examples" / "delora_in_ten_steps.ipynb"
CONTRACT = (ROOT / "test_delora.py").read_text(encoding="utf-8")
TEXT = NOTEBOOK.read_text(encoding="utf-8")
COMMITTED = {cell["id"]: cell for cell in json.loads(TEXT)["cells"]}
NUMBER = r"-?\d+(?:\.\d+)?(?:e[+-]?\d+)?"
ROUNDING = 1e-12  # far above what float64 rounds here, and far below everything else
COMPILED = "step-8-code"  # its numbers are rounding errors, which depend on the compiler
EXERCISES = "abcde"


def source(cell):
    return "".join(cell["source"])


def code_cells(cells):
    return {name: cell for name, cell in cells.items() if cell["cell_type"] == "code"}


def printed(cell):
    """What it wrote to stdout."""
    streams = [output for output in cell["outputs"] if output["output_type"] == "stream"]
    return "".join("".join(stream["text"]) for stream in streams if stream["name"] == "stdout")


def pictures(cell):
    """How many PNGs it drew."""
    return sum("image/png" in output.get("data", {}) for output in cell["outputs"])


def numbers(line):
    return [float(number) for number in re.findall(NUMBER, line)]


# ------------------------------------------------------------------------------------------------
# Its form
# ------------------------------------------------------------------------------------------------


def test_it_has_ten_steps_each_with_a_title_code_and_a_question():
    names = list(COMMITTED)
    titles = re.findall(r"^## Step (\d+)\. ", "\n".join(map(source, COMMITTED.values())), re.M)
    assert titles == [str(step) for step in range(1, 11)]
    for step in range(1, 11):
        first, last = names.index(f"step-{step}"), names.index(f"step-{step}-question")
        assert source(COMMITTED[f"step-{step}"]).startswith(f"## Step {step}. ")
        assert COMMITTED[names[first + 1]]["cell_type"] == "code"
        assert COMMITTED[names[last - 1]]["cell_type"] == "code"
        question = source(COMMITTED[f"step-{step}-question"])
        assert f"**Question {step}.**" in question and question.endswith("?"), step


def test_it_has_five_exercises_each_with_a_layer_and_a_question():
    found = [name for name in COMMITTED if re.fullmatch(r"exercise-\w-code", name)]
    assert found == [f"exercise-{letter}-code" for letter in EXERCISES]
    for letter in EXERCISES:
        assert source(COMMITTED[f"exercise-{letter}"]).endswith("?")
        code = source(COMMITTED[f"exercise-{letter}-code"])
        assert f"class Exercise{letter.upper()}(RightLayer):" in code
        assert f"**{letter}.**" in source(COMMITTED["answers-exercises"])


def test_it_has_an_answer_to_each_question():
    answers = source(COMMITTED["answers-questions"])
    assert re.findall(r"^(\d+)\. ", answers, re.M) == [str(step) for step in range(1, 11)]
    for name in ("answers-exercises", "answers-questions"):
        answer = source(COMMITTED[name])
        assert "<details>\n<summary>" in answer and answer.endswith("</details>"), "not folded"


def test_every_cell_that_prints_or_draws_has_its_outputs_from_a_clean_run():
    cells = code_cells(COMMITTED)
    assert [cell["execution_count"] for cell in cells.values()] == list(range(1, len(cells) + 1))
    for name, cell in cells.items():
        code = source(cell)
        assert bool(printed(cell)) == ("print(" in code), name
        assert pictures(cell) == code.count("plt.show()"), name
    for name in [*(f"step-{step}-code" for step in range(1, 11)), "exercise-a-code"]:
        assert printed(cells[name]) or pictures(cells[name]), name


def test_it_is_small_and_says_nothing_of_the_machine_that_ran_it():
    assert len(TEXT.encode()) < 1_000_000
    assert '"execution"' not in TEXT  # the times at which cells were run
    for name, cell in COMMITTED.items():
        assert not cell["metadata"], name
        words = source(cell)
        for output in cell.get("outputs", []):
            assert output["output_type"] != "error" and output.get("name") != "stderr", name
            words += printed(cell)
        assert not re.search(r"/(home|root|tmp|usr|work|Users|opt)/|[A-Z]:\\", words), name


def test_it_imports_torch_and_matplotlib_and_delora_in_step_10_alone():
    for name, cell in code_cells(COMMITTED).items():
        code = source(cell).replace("%matplotlib inline", "")
        modules = set()
        for node in ast.walk(ast.parse(code)):
            if isinstance(node, ast.Import):
                modules |= {alias.name.partition(".")[0] for alias in node.names}
            if isinstance(node, ast.ImportFrom):
                modules.add(node.module.partition(".")[0])
        foreign = modules - set(sys.stdlib_module_names) - {"torch", "matplotlib"}
        assert foreign == ({"delora"} if name == "step-10-code" else set()), name


def test_its_links_properties_and_tests_exist():
    words = "\n".join(
        source(cell) for cell in COMMITTED.values() if cell["cell_type"] == "markdown"
    )
    links = re.findall(r"\]\((?!http)([\w./-]+)", words)
    assert links
    for link in links:
        assert (NOTEBOOK.parent / link).exists(), link
    named = set(re.findall(r"\bP\d+\b", words))
    assert {"P1", "P2", "P3", "P4", "P5", "P6", "P7", "P8", "P9"} <= named
    for name in named:
        assert f"def test_{name.lower()}_" in CONTRACT, name
    tests = set(re.findall(r"`(test_p\w+)`", words))
    assert len(tests) >= 5
    for test in tests:
        assert f"def {test}(" in CONTRACT, test


def close(found, shown):
    """Whether a number is the one that is shown, up to one in its last digit; or both are rounding.

    Whoever computes in another order differs by rounding, and then a last digit may turn over.
    """
    sizes = [abs(float(found)), abs(float(shown))]
    if "e" in shown and min(sizes) < ROUNDING:
        return max(sizes) < ROUNDING
    mantissa, _, exponent = shown.partition("e")
    last_digit = 10.0 ** (int(exponent or 0) - len(mantissa.partition(".")[2]))
    return abs(float(found) - float(shown)) < 1.5 * last_digit


def test_a_number_is_told_from_another():
    assert close("2.32", "2.32") and close("2.33", "2.32") and not close("2.34", "2.32")
    assert close("1.08e+04", "1.09e+04") and not close("1.08e+04", "1.05e+04")
    assert close("3e-16", "0e+00") and not close("3e-09", "0e+00") and not close("0e+00", "3e-09")
    assert close("100", "100") and not close("102", "100") and not close("-1.00", "1.00")


# ------------------------------------------------------------------------------------------------
# What it shows
# ------------------------------------------------------------------------------------------------

runs = pytest.mark.slow


@pytest.fixture(scope="module")
def executed():
    """{id: cell} after a run from a clean kernel, in the notebook's folder."""
    nbclient = pytest.importorskip("nbclient")
    nbformat = pytest.importorskip("nbformat")
    pytest.importorskip("ipykernel")
    pytest.importorskip("matplotlib")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    client = nbclient.NotebookClient(
        notebook,
        timeout=600,
        kernel_name="python3",
        allow_errors=True,
        resources={"metadata": {"path": str(NOTEBOOK.parent)}},
    )
    # for a project that is not installed
    paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    client.execute(env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))})
    return {cell["id"]: cell for cell in notebook.cells}


def same_texts(executed):
    """Whether this Python has the texts of the one that made what is committed."""
    return printed(executed["texts"]) == printed(COMMITTED["texts"])


def words(text):
    return re.sub(NUMBER, "#", text).split()


@runs
def test_it_runs_without_an_error(executed):
    for name, cell in code_cells(executed).items():
        for output in cell["outputs"]:
            assert output["output_type"] != "error", (name, output["evalue"])
        assert pictures(cell) == pictures(COMMITTED[name]), name


@runs
def test_it_prints_what_is_committed(executed):
    """The words; and the numbers, if this Python has the same texts."""
    for name, cell in code_cells(executed).items():
        if name == COMPILED:
            continue
        found, shown = printed(cell), printed(COMMITTED[name])
        assert words(found) == words(shown), name
        if same_texts(executed):
            pairs = zip(re.findall(NUMBER, found), re.findall(NUMBER, shown), strict=True)
            assert not [pair for pair in pairs if not close(*pair)], name


def lines(executed, name, start=""):
    """The numbers of each line that a cell prints, of those that begin so."""
    text = printed(executed[name]).splitlines()
    found = [numbers(line) for line in text if line.strip().startswith(start)]
    assert found, f"{name} prints no line that begins with {start!r}"
    return found


# ------------------------------------------------------------------------------------------------
# Whether that is so: what the notebook says, from the numbers that it prints
# ------------------------------------------------------------------------------------------------


@runs
def test_steps_1_and_2_lora_learns_and_is_blown_up(executed):
    [(before, after)] = lines(executed, "step-1-code", "loss")
    assert after < before
    for _, b, a, size in lines(executed, "step-1-code", "component"):
        assert abs(a * b - size) < 0.005 * (a + b + 1) + 0.005  # each is rounded by half of 0.01
    [(difference,)] = lines(executed, "step-1-code", "BA and")
    assert difference < ROUNDING

    sensible, high = lines(executed, "step-2-code", "real layer")
    [(norm,)] = lines(executed, "pretraining", "‖W‖")
    assert sensible[1] == after and sensible[2] < norm
    assert high[1] > before and high[2] > 10 * norm, "a high rate should destroy the model"
    *_, highest = lines(executed, "step-2-code", "rate")
    assert highest[4] > 2, "the caption says that the first step leaves the picture"


@runs
def test_step_3_lengths_change_lora_and_not_the_normalised_sum(executed):
    [(lora, normalised)] = lines(executed, "step-3-code", "as trained")
    [(times, longer, same)] = lines(executed, "step-3-code", "1000 times")
    [(_, _, _, less)] = lines(executed, "step-3-code", "with b_2 = 0")
    assert abs(longer / lora - times) < times * 0.005 / lora  # lora is rounded by half of 0.01
    assert less < same == normalised <= 4


@runs
def test_step_4_the_circle_reaches_twice_lambda_and_no_step_leaves_it(executed):
    for lam, reach, _, off in lines(executed, "step-4-code"):
        assert reach == 2 * lam and off < ROUNDING


@runs
def test_step_5_gradients_are_at_right_angles_and_vectors_grow_and_turn_less(executed):
    [angles] = lines(executed, "step-5-code")
    assert angles == [90.0] * 4
    [(before, _)] = lines(executed, "step-1-code", "loss")
    for rate, loss, size in lines(executed, "step-5-training-code", "rate"):
        assert loss < before and size <= 2 * 5.0, f"DeLoRA should stand a rate of {rate}"
    steps = lines(executed, "step-5-training-code", "step")
    for three in (steps[:3], steps[3:]):
        for (_, length, turn), (_, longer, less) in zip(three, three[1:], strict=False):
            assert longer > length and turn > less
    assert steps[5][2] < steps[2][2], "in the end it turns less at the higher rate"
    sensible, high = lines(executed, "step-2-code", "real layer")
    of_delora = [line[1] for line in lines(executed, "step-5-training-code", "rate")]
    assert sensible[1] < of_delora[0], "the notebook says that LoRA is a little lower"
    assert high[1] > of_delora[1] + 1


@runs
def test_step_6_the_slope_in_lambda_sees_no_length(executed):
    once, a_hundred = lines(executed, "step-6-code")[1:]
    assert abs(a_hundred[2] - once[2]) <= 1e-6  # a central difference, of six digits
    assert once[2] != 0 and abs(a_hundred[1]) > 10 * abs(once[1])


@runs
def test_step_7_the_first_step_from_zero_is_whole_at_every_rate(executed):
    [clamped] = lines(executed, "step-7-code", "B = 0, clamped")
    [stuck] = lines(executed, "step-7-code", "B = 0, no direction")
    [copied] = lines(executed, "step-7-code", "frozen copy")
    zero, *clamped = clamped
    assert max(clamped) - min(clamped) <= 1e-6
    assert abs(clamped[0] / 2.5 - 1) < 0.1, "λ / √r, if components were at right angles"
    assert stuck == [zero] * 5
    for small, large in zip(copied, copied[1:], strict=False):
        # six decimals; and an arc is not a chord: at 1e-2 a row turns by 0.01 √96 / 0.57 radians
        assert abs(large / small - 10) < 10 * (0.5e-6 / small) + 0.1


@runs
def test_step_8_only_the_telescoped_difference_is_zero_in_every_way(executed):
    text = printed(executed[COMPILED])
    found = {}
    for line in text.splitlines()[1:6]:
        form, eager, compiled = line.split()
        found[form] = (eager, compiled)
    assert list(found)[1:] == ["with_a_plus", "in_turn", "one_product", "telescoped"]
    assert float(found["in_turn"][0]) > 0 and float(found["one_product"][0]) > 0
    assert float(found["telescoped"][0]) == 0
    if "Nothing can be compiled on this machine" in text:
        assert {compiled for _, compiled in found.values()} == {"-"}
        assert len(text.splitlines()) == 7, "one line says so"
    else:
        assert float(found["telescoped"][1]) == 0
        assert float(found["with_a_plus"][1]) > 0 or float(found["one_product"][1]) > 0


@runs
def test_step_9_columns_are_the_unit_and_both_parents_agree(executed):
    by_columns, by_the_whole, by_nothing = lines(executed, "step-9-code")
    assert by_columns == [0] and by_the_whole[0] > 10 and by_nothing[0] > 10
    [(size, difference)] = lines(executed, "step-9-second-parent-code", "‖ΔW‖")
    assert size > 1 and difference < ROUNDING
    [stretched] = lines(executed, "step-9-second-parent-code", "lengths")
    [(of_columns,)] = lines(executed, "step-9-second-parent-code", "norms")
    assert len(stretched) == 4 and all(0.5 < s / of_columns < 2 for s in stretched)


@runs
def test_step_10_the_file_computes_the_same(executed):
    [(before, after, lam0, lam)] = lines(executed, "step-10-code", "loss")
    assert after < before and lam != lam0
    [(of_the_file,)] = lines(executed, "step-10-code", "ΔW of")
    [(of_the_merged,)] = lines(executed, "step-10-code", "outputs of")
    assert of_the_file < ROUNDING and of_the_merged < ROUNDING
    [(size, bound)] = lines(executed, "step-10-code", "‖ΔW‖")
    assert 0 < size < bound
    assert "outputs unchanged: True" in printed(executed["step-10-code"])


@runs
def test_the_symptoms_of_the_exercises_are_those_of_the_answers(executed):
    [(start,), (before, learned), (size, bound)] = lines(executed, "right-layer-trained")
    assert start == 0 and learned < before and 0 < size < bound

    [(start,), (turned, bound_a), (_, _, longer)] = lines(executed, "exercise-a-code")
    assert start == 0 and turned > bound_a == bound and longer != turned
    [(start,), (_, _, shorter)] = lines(executed, "exercise-b-code")
    assert start == 0 and shorter > 0
    [(change,), (size, bound_c)] = lines(executed, "exercise-c-code")
    assert change > 10 and size > bound_c == bound
    [(before_d, after), (moved, size_d)] = lines(executed, "exercise-d-code")
    assert before_d == after == before and moved > 1 and size_d == 0
    [(start,), (_, after), (back,)] = lines(executed, "exercise-e-code")
    assert start == 0 and after < learned and back > 0
    answers = source(COMMITTED["answers-exercises"])
    for pair in (f"{turned:.2f} against {bound:.2f}", f"{size:.2f} against {bound:.2f}"):
        assert pair in answers or not same_texts(executed), pair


# ------------------------------------------------------------------------------------------------
# The planted bugs, and the contract
# ------------------------------------------------------------------------------------------------


def subject_file():
    """unit, RightLayer and the exercises, as a file for the contract: the code of the notebook."""
    parts = ["import torch", "from torch import nn"]
    for cell in code_cells(COMMITTED).values():
        code = source(cell).replace("%matplotlib inline", "")
        for node in ast.parse(code).body:
            name = getattr(node, "name", "")
            if name in ("unit", "RightLayer") or name.startswith("Exercise"):
                parts.append(ast.get_source_segment(code, node))
    return "\n\n\n".join(parts) + "\n"


def outcomes(folder, layer, tests=()):
    """{test: "PASSED", "FAILED" or "SKIPPED"} of the contract on that layer, of all tests if ()."""
    planted = folder / "planted.py"
    planted.write_text(subject_file(), encoding="utf-8")
    how = {"DELORA_SUBJECT": f"{planted}:{layer}", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-vv", "-p", "no:cacheprovider", "--tb=no"]
    chosen = [f"test_delora.py::{test}" for test in tests] or ["test_delora.py"]
    environment = os.environ | how
    environment.pop("DELORA_QUALITY", None)
    run = subprocess.run(
        [*command, *chosen],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert run.returncode in (0, 1), run.stdout + run.stderr
    return dict(re.findall(r"::(test_\w+)\S* (PASSED|FAILED|SKIPPED)", run.stdout))


def answer(letter):
    """The answer to an exercise, up to the next one."""
    rest = source(COMMITTED["answers-exercises"]).partition(f"**{letter}.** ")[2]
    return re.split(r"\*\*\w\.\*\*|</details>", rest)[0]


def test_every_answer_names_a_red_test():
    for letter in EXERCISES:
        red = answer(letter).partition("Red: ")[2].partition("Green: ")[0]
        assert re.search(r"`test_\w+`", red), letter


@pytest.mark.slow
def test_the_right_layer_of_the_exercises_passes_the_contract(tmp_path):
    found = outcomes(tmp_path, "RightLayer")
    assert "FAILED" not in found.values() and list(found.values()).count("PASSED") >= 15


@pytest.mark.slow
@pytest.mark.parametrize("letter", EXERCISES)
def test_a_planted_bug_turns_red_what_its_answer_says_and_nothing_that_is_said_to_be_green(
    tmp_path, letter
):
    red, _, green = answer(letter).partition("Red: ")[2].partition("Green: ")
    wanted = {test: "FAILED" for test in re.findall(r"`(test_\w+)`", red)}
    wanted |= {test: "PASSED" for test in re.findall(r"`(test_\w+)`", green)}
    assert outcomes(tmp_path, f"Exercise{letter.upper()}", wanted) == wanted
