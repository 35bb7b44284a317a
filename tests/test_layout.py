"""The layout: one subject per module, imports in one direction, values in SQL as parameters only."""

import ast
import re
import subprocess

import pytest
from helpers import ROOT

IMPORTS = {
    "raffle": {"server", "storage"},
    "server": set(),
    "storage": {"database", "draw"},
    "database": set(),
    "draw": set(),
}
OUTSIDE = {"raffle": {"bottle"}, "server": {"waitress"}}
SQL = re.compile(r"\b(SELECT|INSERT|UPDATE|DELETE|CREATE|ALTER|PRAGMA|BEGIN|COMMIT|SAVEPOINT)\b")
# What is put into SQL other than values: question marks, and names and numbers of SQLite itself.
PUT_IN = {"marks", "table", "name", "version", "step + 1", "BUSY_TIMEOUT * 1000"}


def nodes(module):
    return list(ast.walk(ast.parse((ROOT / f"{module}.py").read_text(encoding="utf-8"))))


def imported(module):
    names = set()
    for node in nodes(module):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module.partition(".")[0])
    return names


@pytest.mark.parametrize("module", IMPORTS)
def test_a_module_imports_of_this_project_and_of_others_only_what_its_subject_needs(module):
    assert imported(module) & set(IMPORTS) == IMPORTS[module]
    assert imported(module) & {"bottle", "waitress", "webtest", "pytest"} == OUTSIDE.get(module, set())


def texts(module):
    """Return the strings of a module that are not docstrings."""
    found = nodes(module)
    docstrings = {id(node.value) for node in found if isinstance(node, ast.Expr)}
    return [
        node.value
        for node in found
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings
    ]


@pytest.mark.parametrize("module", ["raffle", "server", "draw"])
def test_sql_is_in_storage_and_database_only(module):
    assert "sqlite3" not in imported(module)
    assert not any(SQL.search(text) for text in texts(module))


def test_the_data_model_is_in_the_schema():
    for module in IMPORTS:
        assert not any(re.search("CREATE (TABLE|INDEX)", text) for text in texts(module))
    assert (ROOT / "schema.sql").read_text().count("CREATE TABLE") == 5


def test_storage_knows_nothing_of_http():
    assert imported("storage").isdisjoint({"http", "ipaddress", "urllib", "socket"})
    assert not re.search(r"HTTPError|environ|\bstatus\b", (ROOT / "storage.py").read_text())


@pytest.mark.parametrize("module", ["storage", "database"])
def test_values_reach_sql_only_as_parameters(module):
    statements = 0
    for node in nodes(module):
        if isinstance(node, ast.JoinedStr):
            parts = [part.value for part in node.values if isinstance(part, ast.Constant)]
            if SQL.search("".join(parts)):
                put_in = {ast.unparse(part.value) for part in node.values if isinstance(part, ast.FormattedValue)}
                assert put_in <= PUT_IN
        elif isinstance(node, ast.BinOp) and isinstance(node.op, (ast.Mod, ast.Add)):
            for text in ast.walk(node.left):
                assert not (isinstance(text, ast.Constant) and SQL.search(str(text.value)))
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "format":
            assert not SQL.search(ast.unparse(node.func))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and SQL.search(node.value):
            statements += 1
            assert not re.search(r"[=<>] *'|VALUES \([^?]", node.value) or "sqlite_schema" in node.value
    assert statements > 10


def test_the_top_level_is_what_the_project_says_it_is():
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode:
        pytest.skip("not a git checkout")
    top = {path.split("/")[0] for path in listed.stdout.splitlines() if not path.startswith(".")}
    files = {"schema.sql", "openapi.json", "tests", "requirements.txt", "README.md"}
    assert top == {f"{module}.py" for module in IMPORTS} | files


def test_requirements_are_pinned():
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    pinned = [line.split("==")[0] for line in lines if "==" in line]
    assert pinned == ["bottle", "waitress", "pytest", "webtest"]
