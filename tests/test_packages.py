"""The order of packages: each imports from those on lower levels alone, so that no change reaches upward."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import megahp

PACKAGE = Path(megahp.__file__).parent
LEVELS = [  # the lowest first; docs/design.md says what each package holds
    "errors exit_codes",
    "files",
    "config",
    "launch ops series",
    "scaling data",
    "parallel cluster",
    "model log checkpoint",
    "faults report",
    "train",
    "recipe convert evaluate diagnose benchmark plan",
    "commands",
    "cli",
    "__main__",
]
LEVEL = {package: level for level, packages in enumerate(LEVELS) for package in packages.split()}


def package_of(module: str) -> str:
    """megahp.train.loop -> train; megahp itself, which holds a version alone, has none."""
    return module.split(".")[1] if "." in module else ""


def imports(source: str) -> Iterator[str]:
    """The modules of ours, or names in them, that a file imports, inside functions too, and those it starts."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.startswith("megahp."))
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "megahp":
            assert node.level == 0 and node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"


def upward(package: str, source: str) -> list[str]:
    """What a file of this package imports from packages that are not below it."""
    others = {module for module in imports(source) if package_of(module) != package and package_of(module) in LEVEL}
    return sorted(module for module in others if LEVEL[package_of(module)] >= LEVEL[package])


FILES = sorted(path for path in PACKAGE.rglob("*.py") if path.parent != PACKAGE or path.stem in LEVEL)


@pytest.mark.parametrize("file", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_go_down(file: Path) -> None:
    package = file.relative_to(PACKAGE).parts[0].removesuffix(".py")
    assert package in LEVEL, f"megahp/{package} is on no level; give it one in LEVELS"
    assert upward(package, file.read_text(encoding="utf-8")) == []


def test_a_turned_arrow_is_seen() -> None:
    """For every two packages the upper one may import the lower one, and the other way round is refused; packages on
    one level do not know each other."""
    for one in LEVEL:
        for other in LEVEL:
            source = f"def late() -> None:\n    from megahp.{other} import something\n"
            assert (upward(one, source) == []) == (one == other or LEVEL[other] < LEVEL[one]), (one, other)
    assert upward("config", "from megahp import train") == ["megahp.train"]
    assert upward("scaling", "import megahp.data.samples as samples") == ["megahp.data.samples"]


def test_modules_form_no_circle() -> None:
    """Inside a package too: there is an order in which each module imports only those before it."""
    modules = {".".join(("megahp", *path.relative_to(PACKAGE).with_suffix("").parts)): path for path in FILES}
    names = {name.removesuffix(".__init__"): path for name, path in modules.items()}
    left = {
        name: {found for each in imports(path.read_text(encoding="utf-8")) if (found := longest(each, names)) != name}
        for name, path in names.items()
        if path.name != "__init__.py"  # which only gathers names
    }
    while ready := [name for name, needs in left.items() if not needs & left.keys()]:
        for name in ready:
            del left[name]
    assert not left, f"a circle among {sorted(left)}"


def longest(name: str, modules: dict[str, Path]) -> str:
    """The module of a dotted name: megahp.train.loop.train -> megahp.train.loop."""
    while name not in modules and "." in name:
        name = name.rpartition(".")[0]
    return name
