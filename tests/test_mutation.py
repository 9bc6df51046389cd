"""The catalogue of planted faults fits the code, and its runner tells what becomes of a fault."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from mutation.catalogue import AREAS
from mutation.fault import Fault
from mutation.run import (
    ROOT,
    Result,
    explained,
    files_of,
    passes,
    run_here,
    select,
    summary,
    write,
)
from mutation.scratch import Scratch

FAULTS = {fault.name: fault for area in AREAS.values() for fault in area.faults}
RESULTS = ROOT / "benchmarks" / "results" / "mutation.json"


def test_there_are_enough_faults_everywhere() -> None:
    assert sum(len(area.faults) for area in AREAS.values()) == len(FAULTS), "names are unique"
    assert len(FAULTS) >= 60
    assert set(AREAS) == {"cpu", "cuda", "triton", "graph", "caches"}
    assert min(len(area.faults) for area in AREAS.values()) >= 10
    changes = {(fault.file, fault.before, fault.after) for fault in FAULTS.values()}
    assert len(changes) == len(FAULTS), "no two alike"


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_can_be_planted(name: str) -> None:
    fault = FAULTS[name]
    text = (ROOT / fault.file).read_text()
    planted = fault.plant(text)
    assert planted != text
    if fault.file.endswith(".py"):
        compile(planted, fault.file, "exec")
    assert fault.why and fault.tests
    for argument in fault.tests:
        file, _, test = argument.partition("::")
        if file.startswith("tests/"):
            assert f"def {test.partition('[')[0]}(" in (ROOT / file).read_text() if test else True
            assert (ROOT / file).is_file()


def test_what_occurs_twice_is_no_fault() -> None:
    fault = Fault("twice", "a.py", "x", "y", ("tests",), "")
    with pytest.raises(ValueError, match=r"twice: found 2 times in a\.py, expected once"):
        fault.plant("x = x")
    with pytest.raises(ValueError, match="found 0 times"):
        fault.plant("z")
    with pytest.raises(ValueError, match="changes nothing"):
        Fault("same", "a.py", "x", "x", ("tests",), "").plant("x")


def test_the_recorded_results_are_of_this_catalogue() -> None:
    """Only what the processor could not show may have none."""
    data = json.loads(RESULTS.read_text())
    results = [Result(**row) for row in data["faults"]]
    without = {name for name, fault in FAULTS.items() if fault.needs}
    assert set(FAULTS) - without <= {r.name for r in results} <= set(FAULTS)
    assert data["score"] == summary(results)
    readme = (ROOT / "tests" / "mutation" / "README.md").read_text()
    assert passes(results, explained(readme))
    assert explained(readme) == {r.name for r in results if not r.is_caught}


SOURCE = {
    "value.py": "VALUE = 1\n",
    "test_value.py": """
import os, time, value

def test_value():
    if value.VALUE == 3:
        os.kill(os.getpid(), 11)
    while value.VALUE == 4:
        time.sleep(0.1)
    assert value.VALUE % 2 == 1
""",
}


@pytest.fixture
def scratch(tmp_path: Path) -> Scratch:
    """A copy of a project of two files."""
    root = tmp_path / "root"
    root.mkdir()
    for name, text in SOURCE.items():
        (root / name).write_text(text)
    made = Scratch(tmp_path / "scratch", {}, ("-c", "import value; value.VALUE"))
    made.copy(root, SOURCE)
    return made


@pytest.mark.parametrize(
    ("after", "kind", "by"),
    [
        ("VALUE = 2", "caught", "test_value.py::test_value"),
        ("VALUE = 3", "crashed", "SIGSEGV"),
        ("VALUE = 4", "hung", "no end after 5 s"),
        ("VALUE = 5", "survived", ""),
    ],
)
def test_what_becomes_of_a_fault(scratch: Scratch, after: str, kind: str, by: str) -> None:
    scratch.plant(Fault("it", "value.py", "VALUE = 1", after, ("test_value.py",), "why"))
    assert scratch.build() is None
    outcome = scratch.test(("test_value.py",), 5 if kind == "hung" else 100)
    assert (outcome.kind, outcome.by) == (kind, by)
    scratch.restore()
    assert scratch.test(("test_value.py",), 100).kind == "survived"


def test_a_fault_that_cannot_be_built_or_tested(scratch: Scratch) -> None:
    scratch.plant(Fault("it", "value.py", "VALUE = 1", "VALUE = ", ("test_value.py",), "why"))
    assert "SyntaxError" in str(scratch.build())
    assert scratch.test(("test_value.py",), 100).kind == "not tested"
    scratch.plant(Fault("it", "value.py", "1", "2", ("none.py",), "why"))  # and the other one out
    assert scratch.build() is None
    assert scratch.test(("none.py",), 100).kind == "not tested"


def test_a_copy_follows_its_origin(scratch: Scratch, tmp_path: Path) -> None:
    """What is the same is left alone, so that nothing is built again for it."""
    root, place = tmp_path / "root", scratch.place
    for name in ("old.py", "build/object.o", "library.so"):
        (place / name).write_text("")
    before = (place / "test_value.py").stat().st_mtime_ns
    (root / "value.py").write_text("VALUE = 7\n")
    scratch.copy(root, SOURCE)
    assert (place / "value.py").read_text() == "VALUE = 7\n"
    assert (place / "test_value.py").stat().st_mtime_ns == before
    assert not (place / "old.py").exists()
    assert (place / "build/object.o").exists() and (place / "library.so").exists()


def test_results_of_other_faults_stay(tmp_path: Path) -> None:
    def result(name: str, outcome: str) -> Result:
        return Result(name, "triton", "", "", outcome, "", 0, None)

    first, second, *_ = (fault.name for fault in AREAS["triton"].faults)
    file = tmp_path / "mutation.json"
    write(file, [result(second, "caught"), result("of an older catalogue", "caught")])
    write(file, [result(first, "survived")])
    data = json.loads(file.read_text())
    assert [row["name"] for row in data["faults"]] == [first, second]
    assert data["score"]["total"] == {"faults": 2, "caught": 1}
    write(file, [result(first, "crashed")])
    assert json.loads(file.read_text())["score"]["triton"] == {"faults": 2, "caught": 2}


def test_files_are_those_of_the_checkout() -> None:
    files = files_of(ROOT)
    assert "tests/test_mutation.py" in files and "setup.py" in files
    assert not any(name.startswith("build/") for name in files)


def test_selection() -> None:
    assert select([], None) == {name: list(area.faults) for name, area in AREAS.items()}
    name = AREAS["triton"].faults[0].name
    assert select([name], None) == {"triton": [AREAS["triton"].faults[0]]}
    assert select([name], "cpu") == {}


def test_what_a_processor_cannot_show_is_left_out(capsys: pytest.CaptureFixture[str]) -> None:
    plain, narrow = (Fault(n, "a", "x", "y", (), "", needs) for n, needs in (("p", ""), ("n", "z")))
    chosen = {"cpu": [plain, narrow], "cuda": [plain], "graph": [narrow]}
    assert run_here(chosen, ["z"]) == chosen and not capsys.readouterr().out
    assert run_here(chosen, []) == {"cpu": [plain], "cuda": [plain]}
    assert capsys.readouterr().out == "left out: n needs z\n" * 2


def test_what_passes() -> None:
    def results(*outcomes: str) -> list[Result]:
        caught = [Result(f"caught {i}", "cpu", "", "", "caught", "", 0, None) for i in range(38)]
        others = [Result(f"it {i}", "cuda", "", "", o, "", 0, None) for i, o in enumerate(outcomes)]
        return caught + others

    assert passes(results("crashed", "hung"), [])
    assert passes(results("survived", "survived"), ["it 0", "it 1"])
    assert not passes(results("survived", "survived"), ["it 1"]), "one is not explained"
    assert not passes(results("survived"), []) and not passes(results("not built"), ["it 0"])
    assert not passes(results(*["survived"] * 3), ["it 0", "it 1", "it 2"]), "too many"
    assert summary(results("survived"))["total"] == {"faults": 39, "caught": 38}
    assert explained("| fault |\n| `it` | no GPU |\nand `others`\n") == {"it"}
