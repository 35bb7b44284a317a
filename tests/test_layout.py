"""One subject per module, and imports in one direction."""

import re

import pytest
from helpers import ROOT

# What each module imports of this project, and of what requirements.txt installs.
LAYOUT = {
    "raffle": {"bottle", "client", "server", "settings", "storage"},
    "client": {"settings"},
    "settings": set(),
    "server": {"waitress"},
    "storage": {"database", "draw"},
    "database": set(),
    "draw": set(),
}
WATCHED = {*LAYOUT, "bottle", "waitress", "webtest", "pytest"}


def test_the_layout_has_every_module():
    assert {file.stem for file in ROOT.glob("*.py")} == set(LAYOUT)


@pytest.mark.parametrize("module", LAYOUT)
def test_a_module_imports_only_what_its_subject_needs(module):
    text = (ROOT / f"{module}.py").read_text(encoding="utf-8")
    imported = re.findall(r"^ *(?:import|from) (\w+)", text, re.MULTILINE)

    assert WATCHED.intersection(imported) == LAYOUT[module]
