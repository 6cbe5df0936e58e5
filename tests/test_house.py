"""The plan of the modules: which may import which, and what none of them does."""

import ast

import pytest
from conftest import ROOT

SCRIPTS = ["train-gen", "train-cls", "inference", "cpu-simulation"]
# fmt: off
IMPORTS = {  # arrows point down: {module: the modules of this repository that it may import}
    "system": set(),
    "intervals": set(),
    "config": {"system"},
    "listing": {"system"},
    "labeling": {"system", "listing"},
    "attention": set(),
    "utils": {"system", "listing", "attention"},
    "selection": {"system", "listing", "utils"},
    "fingerprints": {"listing"},
    "devices": {"system"},
    "checkpoint": {"system", "utils"},
    "layers": {"utils"},
    "generation": {"attention", "utils", "layers"},
    "windowing": {"utils"},
    "evaluation": {"intervals", "system", "listing", "selection", "utils", "windowing", "devices", "checkpoint", "generation"},
    "report_page": {"intervals", "system", "utils", "windowing", "evaluation"},
    "lossless": {"system", "listing", "utils", "windowing", "generation"},
    "index_page": {"system", "listing"},
    "resuming": {"system", "checkpoint"},
    "logger": set(),
    "training": {"system", "fingerprints", "utils", "windowing", "devices", "checkpoint", "resuming", "logger"},
    "train-gen": {"config", "system", "listing", "selection", "utils", "devices", "checkpoint", "evaluation", "training"},
    "train-cls": {"config", "system", "listing", "selection", "labeling", "utils", "devices", "checkpoint", "evaluation", "training"},
    "inference": {
        "config", "system", "listing", "selection", "labeling", "utils", "windowing", "devices", "checkpoint", "evaluation",
        "generation", "lossless", "index_page", "report_page",
    },
    "cpu-simulation": {"intervals", "system", "listing"},
}
# fmt: on


def tree_of(module):
    return ast.parse((ROOT / f"{module}.py").read_text(encoding="utf-8"))


def imported_by(tree):
    """Yields (module, name or None) for every import in a module, wherever it stands."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name.split(".")[0], None) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from ((node.module.split(".")[0], alias.name) for alias in node.names)


def test_every_module_has_its_place():
    assert {path.stem for path in ROOT.glob("*.py")} == set(IMPORTS)


@pytest.mark.parametrize("module", IMPORTS)
def test_imports_are_those_of_the_plan(module):
    found = list(imported_by(tree_of(module)))
    assert {name for name, _ in found if name in IMPORTS} <= IMPORTS[module]
    assert ("config" in IMPORTS[module]) <= (module in SCRIPTS)
    for source, name in found:
        assert name != "*" and not (source == "config" and name), f"{module} takes {name} from {source} by value"
        assert source not in IMPORTS or name is None or not name.startswith("_"), f"{name} is private to {source}"
    if module in ("intervals", "system", "config", "listing", "labeling", "cpu-simulation"):
        assert not {"torch", "transformers"} & {source for source, _ in found}


@pytest.mark.parametrize("module", IMPORTS)
def test_nobody_reads_a_private_name_of_another_module(module):
    for node in ast.walk(tree_of(module)):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in IMPORTS:
            assert not node.attr.startswith("_"), f"{module}.py, line {node.lineno}: {node.value.id}.{node.attr}"


@pytest.mark.parametrize("module", IMPORTS)
def test_names_that_are_imported_are_not_passed_on(module):
    """What a module defines is what others take from it: no re-exports."""
    own = {name for source, name in imported_by(tree_of(module)) if name and source in IMPORTS}
    own |= {source for source, name in imported_by(tree_of(module)) if name is None}
    for other in IMPORTS:
        for node in ast.walk(tree_of(other)):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == module != other:
                assert node.attr not in own, f"{other}.py, line {node.lineno}: {module}.{node.attr}"
