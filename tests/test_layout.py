"""One subject per module, imports in one direction."""

import re

from helpers import ROOT

LAYOUT = {
    "raffle": {"bottle", "server", "storage", "settings", "client"},
    "settings": set(),
    "client": {"settings"},
    "server": {"waitress"},
    "storage": {"database", "draw"},
    "database": set(),
    "draw": set(),
}


def test_a_module_imports_only_what_its_subject_needs():
    for module, allowed in LAYOUT.items():
        imports = re.findall(
            r"^ *(?:import|from) (\w+)", (ROOT / f"{module}.py").read_text("utf-8"), re.MULTILINE
        )
        assert {
            name for name in imports if name in {*LAYOUT, "bottle", "waitress", "webtest"}
        } == allowed, module
