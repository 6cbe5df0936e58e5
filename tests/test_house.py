"""Imports run one way, scripts -> bgpt -> utils and scripts -> config, and forbidden words occur nowhere."""

import ast
import re

import pytest
from conftest import ROOT

SCRIPTS = {"train-gen", "train-cls", "inference", "cpu-simulation"}
OURS = SCRIPTS | {"config", "utils", "bgpt"}


@pytest.mark.parametrize("path", [*ROOT.glob("*.py"), *ROOT.glob("bgpt/*.py")], ids=str)
def test_imports_run_one_way(path):
    allowed = {"config": {"bgpt"}, "utils": {"bgpt"}}.get(path.stem, {"utils", "bgpt"}) | ({"config"} if path.stem in SCRIPTS else set())
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = [alias.name for alias in node.names] if isinstance(node, (ast.Import, ast.ImportFrom)) else []
        modules = {(node.module if isinstance(node, ast.ImportFrom) else name).split(".")[0] for name in names}
        assert modules & OURS <= allowed and "*" not in names and not (isinstance(node, ast.ImportFrom) and "config" in modules)


def test_forbidden_words_occur_nowhere():
    # `is None` is Python
    words = r"\b(?i:no number|anew|in hand|goes on|is (?-i:none)|beside|lies|all one|for good|what it is|as it stands)\b"
    matches = {}
    for folder in ("", "benchmarks/", "bgpt/", "docs/", "runs/", "tests/"):
        for path in ROOT.glob(f"{folder}*"):
            if path.suffix in (".py", ".md", ".sh", ".j2") and path.name != "test_house.py":
                matches[path.name] = re.findall(words, " ".join(path.read_text(encoding="utf-8").split()))
    assert not {name: each for name, each in matches.items() if each}
