"""The three rules of the layout: who speaks HTTP, who speaks SQL, and where the data model is."""

import re
import subprocess

import pytest
from helpers import ROOT

SQL = r"\b(SELECT|INSERT|UPDATE|DELETE|CREATE|PRAGMA|BEGIN|COMMIT)\b"


def imports(module):
    text = (ROOT / module).read_text()
    return set(re.findall(r"^\s*(?:import|from) (\w+)", text, re.MULTILINE))


def test_raffle_speaks_no_sql():
    assert "sqlite3" not in imports("raffle.py")
    assert not re.search(SQL, (ROOT / "raffle.py").read_text())


def test_storage_speaks_no_http():
    assert imports("storage.py").isdisjoint({"bottle", "waitress", "webtest", "http", "raffle", "ipaddress"})
    assert not re.search(r"HTTPError|environ|\bstatus\b", (ROOT / "storage.py").read_text())


def test_the_schema_is_the_data_model():
    assert "CREATE" not in (ROOT / "storage.py").read_text()
    assert re.search(SQL, (ROOT / "schema.sql").read_text())


def test_values_reach_sql_only_as_parameters():
    statements = re.findall(r'f?""".*?"""', (ROOT / "storage.py").read_text(), re.DOTALL)
    statements = [statement for statement in statements if re.search(SQL, statement)]
    assert len(statements) > 10
    for statement in statements:
        assert not statement.startswith("f")
        assert not re.search(r"[{%]", statement)
        assert not re.search(r"= *'|VALUES \([^?]", statement)


def test_the_top_level_is_what_the_project_says_it_is():
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode:
        pytest.skip("not a git checkout")
    top = {path.split("/")[0] for path in listed.stdout.splitlines() if not path.startswith(".")}
    assert top == {"raffle.py", "storage.py", "schema.sql", "openapi.json", "tests", "requirements.txt", "README.md"}


def test_requirements_are_pinned():
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    pinned = [line.split("==")[0] for line in lines if "==" in line]
    assert pinned == ["bottle", "waitress", "pytest", "webtest"]
