"""The folders of the package import only what the last line of their `__init__.py` allows, and files without circles.

No module is listed here: a folder's docstring ends in `Imports: io, models.`, a file that may be read before torch is
found by its name (`*/config.py`, `cli/*.py`), and a file that uses few libraries says so (`Pure: torch alone.`).
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import personalize

ROOT = Path(__file__).parents[2]
LOOSE = {"__init__", "__main__", "errors", "randomness"}  # the files that lie in no folder
EVERYWHERE = {"errors", "randomness"}  # what every folder may import
LIGHT_LIBRARIES = {"tyro", "yaml", "rich", "msgspec"}  # what may be imported before torch


@dataclass(frozen=True)
class Import:
    """One imported name: `personalize.io.images.read` in line 7, at run time, when the file is loaded."""

    name: str
    line: int
    at_load: bool  # not inside a function
    runtime: bool  # not under TYPE_CHECKING


class Package:
    """The source files of a package in `root/personalize`, and what each of them imports."""

    def __init__(self, root: Path) -> None:
        self.root = root / "personalize"
        paths = sorted(path for path in self.root.rglob("*.py") if "_launch" not in path.parts)
        self.files = {self.name(path): path for path in paths}
        self.folders = sorted({path.parent for path in paths} - {self.root})

    def name(self, path: Path) -> str:
        """`personalize/io/images.py` → "io.images"; a folder's `__init__.py` has the folder's name."""
        parts = path.relative_to(self.root).with_suffix("").parts
        return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)

    @cache  # noqa: B019  a handful of packages, for the length of the tests
    def imports(self, file: str) -> tuple[Import, ...]:
        return tuple(imports(ast.parse(self.files[file].read_text(encoding="utf-8"))))

    def own(self, file: str, *, light: bool = False) -> dict[str, int]:
        """Files of this package that `file` imports, with the line; `light` leaves out what does not run at load."""
        found = {}
        for one in self.imports(file):
            if one.name.startswith("personalize.") and (not light or (one.at_load and one.runtime)):
                found.setdefault(self.target(one.name.removeprefix("personalize.")), one.line)
        return {name: line for name, line in found.items() if name}

    def target(self, name: str) -> str:
        """The file that an imported name comes from: "io.images.read" → "io.images"."""
        while name and name not in self.files:
            name = name.rpartition(".")[0]
        return name

    def libraries(self, file: str, *, light: bool = False) -> set[str]:
        used = {one.name.split(".")[0] for one in self.imports(file) if not light or (one.at_load and one.runtime)}
        return used - sys.stdlib_module_names - {"personalize"}

    def docstring(self, file: str) -> str:
        return ast.get_docstring(ast.parse(self.files[file].read_text(encoding="utf-8"))) or ""

    def allowed(self, folder: str) -> set[str]:
        """The folders that `folder` ("io", "editing.drag") may import, by the last line of its docstring."""
        last = self.docstring(folder).strip().splitlines()[-1:]
        match = re.fullmatch(r"Imports: (nothing|[a-z_]+(?:, [a-z_]+)*)\.", last[0] if last else "")
        assert match, f"{folder}/__init__.py must end in a line such as 'Imports: io, models.', not in {last}"
        return set() if match[1] == "nothing" else set(match[1].split(", "))


def imports(node: ast.AST, at_load: bool = True, runtime: bool = True) -> Iterator[Import]:
    """Every import below `node`, also those inside functions and under TYPE_CHECKING."""
    for child in ast.iter_child_nodes(node):
        checking = isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test)
        inside = isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
        if isinstance(child, ast.Import):
            yield from (Import(alias.name, child.lineno, at_load, runtime) for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            assert child.level == 0, f"relative import in line {child.lineno}: write it from the package's name"
            yield from (Import(f"{child.module}.{alias.name}", child.lineno, at_load, runtime) for alias in child.names)
        else:
            yield from imports(child, at_load and not inside, runtime and not checking)


def faults(package: Package) -> list[str]:
    """Everything that breaks a rule of the house, a line each."""
    return [fault for rule in (folder_faults, manual_faults, import_faults, circle_faults, light_faults, pure_faults)
            for fault in rule(package)]  # fmt: skip


def folder_faults(package: Package) -> Iterator[str]:
    """Files outside the folders; a folder's `__init__.py` that is more than a docstring; folders in a circle."""
    for name in package.files:
        if "." not in name and name not in LOOSE and package.files[name].name != "__init__.py":
            yield f"{name}.py lies in no folder"
    for path in package.folders:
        folder = package.name(path / "__init__.py")
        if folder not in package.files:
            yield f"{folder} has no __init__.py"
        elif len(ast.parse(package.files[folder].read_text(encoding="utf-8")).body) != 1:
            yield f"{folder}/__init__.py holds more than a docstring"
    tops = [path.name for path in package.folders if path.parent == package.root]
    try:
        TopologicalSorter({folder: package.allowed(folder) for folder in tops}).prepare()
    except CycleError as error:
        yield f"folders import one another: {' → '.join(error.args[1])}"


def manual_faults(package: Package) -> Iterator[str]:
    """Files that their folder's docstring does not name: the docstrings are the manual of the package."""
    for file, path in package.files.items():
        if "." in file and path.name != "__init__.py":
            folder, _, name = file.rpartition(".")
            if name not in re.findall(r"\w+", package.docstring(folder)):
                yield f"{folder}/__init__.py does not say what {name}.py is for"


def import_faults(package: Package) -> Iterator[str]:
    """Imports of a folder that the importing file's folder does not name."""
    for file in package.files:
        if "." not in file:
            continue
        folder = file.rpartition(".")[0] if package.files[file].name != "__init__.py" else file
        allowed = package.allowed(folder) | set(folder.split(".")) | EVERYWHERE
        for other, line in package.own(file).items():
            if other.split(".")[0] not in allowed:
                yield f"{file}:{line} imports {other}, which {folder} may not"
            if "pretraining" in other.split(".") and "pretraining" not in file.split("."):
                yield f"{file}:{line} imports {other}, which serves the embedded model's training alone"


def circle_faults(package: Package) -> Iterator[str]:
    graph = {file: set(package.own(file)) - {"__init__"} for file in package.files if file != "__init__"}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        yield f"files import one another: {' → '.join(error.args[1])}"


def light_faults(package: Package) -> Iterator[str]:
    """`*/config.py`, `cli/*.py` and the loose files import neither torch nor anything that does, when loaded."""
    light = [file for file, path in package.files.items() if is_light(package, path)]
    for file in light:
        for one, chain in reached(package, file).items():
            if heavy := package.libraries(one, light=True) - LIGHT_LIBRARIES:
                yield f"{file} is read before torch, but imports {sorted(heavy)} by way of {' → '.join(chain)}"


def is_light(package: Package, path: Path) -> bool:
    inside = path.relative_to(package.root).parts
    return (
        path.name == "config.py"
        or inside[0] == "cli"
        and len(inside) == 2
        or len(inside) == 1
        and inside[0] != "randomness.py"
    )


def reached(package: Package, file: str) -> dict[str, tuple[str, ...]]:
    """Every file that loading `file` loads, and by which way."""
    found, todo = {file: (file,)}, [file]
    while todo:
        one = todo.pop()
        for other in package.own(one, light=True):
            if other not in found:
                found[other] = (*found[one], other)
                todo.append(other)
    return found


def pure_faults(package: Package) -> Iterator[str]:
    """A file marked `Pure: torch alone.` (or `Pure: torch, numpy.`) imports these, and of ours only pure files."""
    marks = {
        file: match[1]
        for file in package.files
        if (match := re.search(r"^Pure: (.+)\.$", package.docstring(file), re.M))
    }
    for file, mark in marks.items():
        known = set() if mark == "no library" else set(mark.removesuffix(" alone").split(", "))
        if foreign := package.libraries(file) - known:
            yield f"{file} is marked pure ({mark}), but imports {sorted(foreign)}"
        for other in package.own(file):
            if other not in marks and other not in EVERYWHERE:
                yield f"{file} is marked pure, but imports {other}, which is not"


def test_the_package_keeps_its_rules():
    package = Package(ROOT)
    assert len(package.files) > 100 and "models.stable_diffusion" in package.files
    assert faults(package) == []


PURE = '"""B.\n\nPure: torch alone.\n"""\n'
CLEAN = {
    "__init__.py": "",
    "errors.py": "",
    "low/__init__.py": '"""Low: a, config.\n\nImports: nothing.\n"""',
    "low/a.py": "import torch",
    "low/config.py": "import yaml",
    "high/__init__.py": '"""High: b, c, d.\n\nImports: low.\n"""',
    "high/b.py": PURE + "import torch\nfrom personalize.errors import UserError",
    "high/c.py": "from personalize.low.a import x\nfrom personalize.high import b",
}


def built(folder: Path, changes: dict[str, str]) -> Package:
    for name, text in (CLEAN | changes).items():
        path = folder / "personalize" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return Package(folder)


def test_a_small_package_that_keeps_the_rules_has_no_faults(tmp_path: Path):
    assert faults(built(tmp_path, {})) == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"low/a.py": "from personalize.high.b import x"}, "low.a:1 imports high.b, which low may not"),
        ({"low/a.py": "def f():\n    from personalize.high import b"}, "low.a:2 imports high.b, which low may not"),
        (
            {"low/a.py": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from personalize.high.b import X"},
            "low.a:3 imports high.b, which low may not",
        ),
        (
            {
                "high/d.py": "if TYPE_CHECKING:\n    from personalize.high.c import x",
                "high/c.py": "from personalize.high import d",
            },
            "files import one another",
        ),
        ({"low/config.py": "import torch"}, "low.config is read before torch, but imports ['torch']"),
        ({"low/config.py": "from personalize.low.a import x"}, "by way of low.config → low.a"),
        ({"high/b.py": PURE + "import peft"}, "high.b is marked pure (torch alone), but imports ['peft']"),
        ({"high/b.py": PURE + "from personalize.low import a"}, "high.b is marked pure, but imports low.a"),
        ({"stray.py": ""}, "stray.py lies in no folder"),
        ({"low/new.py": ""}, "low/__init__.py does not say what new.py is for"),
        ({"low/__init__.py": '"""Low.\n\nImports: nothing.\n"""\nimport torch'}, "holds more than a docstring"),
        ({"low/__init__.py": '"""Low.\n\nImports: high.\n"""'}, "folders import one another"),
        ({"low/pretraining/__init__.py": '"""P.\n\nImports: low.\n"""', "low/pretraining/n.py": "",
          "low/a.py": "from personalize.low.pretraining import n"}, "serves the embedded model's training alone"),
    ],
    ids="upward function type_checking circle torch_in_light torch_behind_light impure impure_file stray unnamed "
        "code_in_init folders pretraining".split(),
)  # fmt: skip
def test_each_broken_rule_is_found(tmp_path: Path, changes: dict[str, str], message: str):
    found = faults(built(tmp_path, changes))
    assert any(message in fault for fault in found), found


def test_a_folder_without_its_last_line_is_refused(tmp_path: Path):
    with pytest.raises(AssertionError, match="must end in a line such as 'Imports: io, models.'"):
        faults(built(tmp_path, {"low/__init__.py": '"""Low."""'}))


def test_scripts_import_nothing_from_one_another():
    scripts = [path for folder in ("train", "export", "examples") for path in (ROOT / folder).glob("*.py")]
    assert len(scripts) > 10
    for path in scripts:
        names = {one.name.split(".")[0] for one in imports(ast.parse(path.read_text(encoding="utf-8")))}
        assert not names & {"train", "export", "examples", "tests"}, path


def test_examples_use_the_front_doors_only():
    """Examples import from `personalize` itself: what a user needs is exported there."""
    for path in (ROOT / "examples").glob("*.py"):
        ours = [
            one.name
            for one in imports(ast.parse(path.read_text(encoding="utf-8")))
            if one.name.startswith("personalize")
        ]
        deep = [name for name in ours if name.count(".") > 1]
        assert not deep, f"{path.name}: export {deep} from personalize/__init__.py, and import them from there"


def test_no_public_name_is_called_like_a_folder_or_file_of_the_package():
    """Importing `personalize.attach` would put the module in the place of the function `personalize.attach`."""
    homes = personalize._MODULES
    assert not [
        name
        for name in homes
        if (ROOT / "personalize" / name).exists() or (ROOT / "personalize" / f"{name}.py").exists()
    ]
