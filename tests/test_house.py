"""The plan of the house: scripts -> bgpt -> utils, and scripts -> config."""

import ast

import pytest
from conftest import ROOT

SCRIPTS = {"train-gen", "train-cls", "inference", "cpu-simulation"}
OURS = SCRIPTS | {"config", "utils", "bgpt"}


@pytest.mark.parametrize("path", [*ROOT.glob("*.py"), *ROOT.glob("bgpt/*.py")], ids=str)
def test_imports_run_one_way(path):
    allowed = {"config": {"bgpt"}, "utils": {"bgpt"}}.get(path.stem, {"utils", "bgpt"}) | ({"config"} if path.stem in SCRIPTS else set())
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = [alias.name for alias in node.names] if isinstance(node, (ast.Import, ast.ImportFrom)) else []
        found = {(node.module if isinstance(node, ast.ImportFrom) else name).split(".")[0] for name in names}
        assert found & OURS <= allowed and "*" not in names and not (isinstance(node, ast.ImportFrom) and "config" in found)
