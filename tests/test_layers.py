"""The storeys of the package: a module imports only from storeys below it, and inside a storey without circles."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import personalize

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "personalize"
STOREYS = (
    "backgrounds checkpoint_layout embeddings errors files forgetting images layouts leftovers lora_names losses "
    "nouns pages randomness recipes replacing scenes token_files",
    "alignment attention captions concepts frames lean loading lora lora_layers mixing model noun_groups phantoms "
    "pickles quantisation reader_names text_lora",
    "background_mask calibrated controls drag drag_attention drag_field drag_fill drag_mask dynamic_prompts inversion "
    "moves multi_concept mutual null_text objectives pretraining sampling text_maps trajectories uniform views world",
    "adapter attachment benchmarks bundled captured catalogue catalogue_table checkpoints choosing cli commands "
    "compatibility concept_data concept_learning concept_maps concept_training conversion coverage data drag_command "
    "dragging edit_command editor evaluation exporting formats guards hub inspection launching learning localization "
    "memory merged_base merging metrics model_card options photo photo_command photo_options photo_parts pictures "
    "preview quickstart regularisation scene_scorer scorer_training scorers scoring settings several stages subject "
    "teams trainer training validation verify __main__",
)
LIBRARIES = (
    "torch numpy PIL safetensors",
    "diffusers transformers peft accelerate bitsandbytes",
    "",
    "datasets huggingface_hub tyro yaml rich torchmetrics lpips",
)
LIGHT = tuple(  # read before torch is imported
    "__init__ __main__ cli commands errors launching options pages photo_options recipes".split()
)
LIGHT_LIBRARIES = {"tyro", "yaml", "rich"}
STOREY = {name: number for number, names in enumerate(STOREYS) for name in names.split()}
FILES = sorted(path for path in PACKAGE.rglob("*.py") if "_launch" not in path.parts)


def name_of(path: Path) -> str:
    """`personalize/model.py` → "model"; a module in a sub-folder belongs to the storey of that folder's name."""
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def imports(node: ast.AST, *, lazy: bool = True) -> Iterator[str]:
    """Dotted names imported below `node`, without those for type checkers alone; `lazy` enters functions."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            continue
        if isinstance(child, ast.Import):
            yield from (alias.name for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            assert child.level == 0, f"relative import in line {child.lineno}: write it from the package's name"
            yield from (f"{child.module}.{alias.name}" for alias in child.names)
        elif lazy or not isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield from imports(child, lazy=lazy)


def imported(path: Path, *, lazy: bool = True) -> set[str]:
    return set(imports(ast.parse(path.read_text(encoding="utf-8")), lazy=lazy))


def own_imports(path: Path, *, lazy: bool = True) -> set[str]:
    """Names of our modules that `path` imports, also inside functions if `lazy`."""
    found = {name.split(".")[1] for name in imported(path, lazy=lazy) if name.startswith("personalize.")}
    return {name for name in found if (PACKAGE / f"{name}.py").is_file() or (PACKAGE / name / "__init__.py").is_file()}


def libraries(path: Path, *, lazy: bool = True) -> set[str]:
    return {name.split(".")[0] for name in imported(path, lazy=lazy)} - sys.stdlib_module_names - {"personalize"}


def test_there_is_something_to_check():
    assert len(FILES) > 10 and {"scenes", "cli", "model"} <= {name_of(path) for path in FILES}


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_module_imports_only_from_storeys_below(path: Path):
    name = name_of(path)
    if name == "__init__":
        return
    assert name in STOREY, f"personalize/{name}.py has no storey: add it to STOREYS in tests/test_layers.py"
    above = {other for other in own_imports(path) if STOREY.get(other, 9) > STOREY[name]}
    assert not above, f"{name} (storey {STOREY[name]}) imports from above: {sorted(above)}"


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_module_uses_only_the_libraries_of_its_storey(path: Path):
    known = " ".join(LIBRARIES[: STOREY.get(name_of(path), 3) + 1]).split()
    foreign = libraries(path) - set(known)
    assert not foreign, f"{name_of(path)} may not import {sorted(foreign)}"


def test_no_circles():
    graph = {name_of(path): own_imports(path) for path in FILES if name_of(path) != "__init__"}
    assert list(TopologicalSorter(graph).static_order())  # raises CycleError with the circle


@pytest.mark.parametrize("name", LIGHT)
def test_what_parses_the_command_line_imports_nothing_heavy(name: str):
    path = PACKAGE / f"{name}.py"
    ours = own_imports(path, lazy=False)
    assert ours <= set(LIGHT) and libraries(path, lazy=False) <= LIGHT_LIBRARIES


def test_scripts_import_nothing_from_one_another():
    scripts = [path for room in ("train", "export", "examples") for path in (ROOT / room).glob("*.py")]
    assert scripts
    for path in scripts:
        assert not {name.split(".")[0] for name in imported(path)} & {"train", "export", "examples", "tests"}, path


def test_no_public_name_is_called_like_its_module():
    """Importing `personalize.attach` would put the module in the place of the function `personalize.attach`."""
    clashes = [name for name in personalize._MODULES if (PACKAGE / f"{name}.py").exists()]
    assert not clashes
