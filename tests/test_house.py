"""The structure of the project: the lesson reads in one direction, and imports only point down."""

import ast
import os
import subprocess
import sys

import pytest

from conftest import ROOT

SOURCE = (ROOT / "tiny_sd.py").read_text(encoding="utf-8")
LINES, TREE = SOURCE.splitlines(), ast.parse(SOURCE)
RULER = next(i for i, line in enumerate(LINES, 1) if line.startswith("# ═"))
FILES = {"tiny_sd": ROOT / "tiny_sd.py"} | {
    ".".join(path.relative_to(ROOT).with_suffix("").parts): path
    for path in (ROOT / "extras").rglob("*.py") if path.stem != "__init__"}


# ── The lesson ──────────────────────────────────────────────────────────────────────────────────


def defined():
    """Return {name: the first line that defines it} of the top level of tiny_sd.py."""
    lines = {}
    for node in TREE.body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            lines.setdefault(node.name, node.lineno)
        elif isinstance(node, ast.Assign):
            for name in ast.walk(ast.Tuple(node.targets)):
                if isinstance(name, ast.Name):
                    lines.setdefault(name.id, node.lineno)
    return lines


def test_the_lesson_reads_in_one_direction():
    """Everything that it uses is defined above, except TORCH, which is below the ruler."""
    lines, ahead = defined(), set()
    for node in TREE.body:
        if node.lineno < RULER:
            ahead |= {name.id for name in ast.walk(node)
                      if isinstance(name, ast.Name) and lines.get(name.id, 0) > node.end_lineno}
    assert ahead == {"TORCH"} and lines["TORCH"] > RULER


def test_the_lesson_is_short():
    assert RULER <= 1030 and len(LINES) <= 1410
    assert max(map(len, LINES)) <= 100
    long = {node.name: node.end_lineno - node.body[1].lineno + 1 for node in TREE.body
            if isinstance(node, ast.FunctionDef) and node.lineno < RULER and len(node.body) > 1}
    assert {name for name, length in long.items() if length > 25} <= {"generate"}


@pytest.mark.parametrize("name, limit", [("extras.cli", 688), ("extras.show", 524)])
def test_the_largest_rooms_stay_small(name, limit):
    assert len(FILES[name].read_text(encoding="utf-8").splitlines()) <= limit


def test_every_definition_of_the_lesson_says_what_it_is():
    for node in TREE.body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            assert ast.get_docstring(node), node.name


# ── What imports what ───────────────────────────────────────────────────────────────────────────


def imports(name):
    """Return {module: line} for our modules that one of our files imports."""
    found = {}
    for node in ast.walk(ast.parse(FILES[name].read_text(encoding="utf-8"))):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            names = [alias.name for alias in node.names]
            if isinstance(node, ast.ImportFrom):
                assert node.level == 0, "an import says the whole name"
                names = [node.module, *(f"{node.module}.{alias}" for alias in names)]
            found |= {module: node.lineno for module in names if module in FILES}
    return found


def in_order(below):
    """Sort {name: names it needs} so that each name follows those it needs; fail on a cycle."""
    order = []
    while len(order) < len(below):
        free = [name for name in below if name not in order and below[name] <= {*order}]
        assert free, f"in a circle: {sorted(below.keys() - {*order})}"
        order += free
    return order


def test_the_lesson_imports_nothing_of_ours_but_the_start_of_the_program():
    found = imports("tiny_sd")
    assert found.keys() == {"extras.start"}
    guard = next(node for node in TREE.body if isinstance(node, ast.If)
                 and node.lineno < found["extras.start"] <= node.end_lineno)
    assert "__name__ == '__main__'" in ast.unparse(guard.test)


def test_arrows_only_point_down():
    """No cycles among files or folders, except that the lesson starts the program.

    Only other programs import the command line; start.py knows only its name.
    """
    below = {name: {*imports(name)} for name in FILES} | {"tiny_sd": set()}
    assert in_order(below)[0] == "tiny_sd"
    assert {name for name in FILES if "extras.cli" in below[name]} == {
        "extras.studio", "extras.training.teach", "extras.training.train"}

    def folder(name):
        return name.rpartition(".")[0]
    folders = {folder(name): set() for name in FILES}
    for name in FILES:
        folders[folder(name)] |= {*map(folder, below[name])} - {folder(name)}
    assert in_order(folders) == ["", "extras", "extras.training", "extras.tools"]


IMPORT_EACH = """
import importlib, os, signal, sys, threading
for name in ("numpy", "PIL.Image", "tqdm", "torch"):    # which take long, and are none of ours
    importlib.import_module(name)
for name in sys.argv[1:]:
    sys.stdout.flush()
    if not os.fork():
        before = dict(os.environ)
        importlib.import_module(name)
        print(name, sys.excepthook is sys.__excepthook__, threading.active_count(),
              signal.getsignal(signal.SIGTERM) == signal.SIG_DFL, before == dict(os.environ))
        sys.stdout.flush()
        os._exit(0)
    os.wait()
"""


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="Windows has no fork")
def test_each_file_can_be_imported_first():
    """And only extras.fast changes the process."""
    pytest.importorskip("torch")
    names = [name for name in FILES if "tools" not in name]
    done = subprocess.run([sys.executable, "-c", IMPORT_EACH, *names], cwd=ROOT,
                          capture_output=True, text=True)
    assert done.stderr == ""
    for name, line in zip(names, done.stdout.splitlines(), strict=True):
        with_fast = "extras.fast" in imports(name) or name in ("extras.fast", "extras.start")
        assert line.split()[:4] == [name, "True", "1", "True"], line
        assert with_fast or line.split()[4] == "True", line
