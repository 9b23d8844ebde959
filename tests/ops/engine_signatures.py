"""The Python signatures that the engines' adapters call, read from the packages' sources without importing them.

    python tests/ops/engine_signatures.py FOLDER ...      # prints those found in folders that hold the packages

engine_signatures.json holds what it printed, with versions and date. `taking` makes a stand-in take nothing else.
"""

from __future__ import annotations

import ast
import inspect
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

RECORDED = Path(__file__).with_suffix(".json")
PLACES = {  # file -> functions, and classes by what makes them
    "apex/normalization/fused_layer_norm.py": ["fused_rms_norm_affine", "fused_layer_norm_affine"],
    "apex/optimizers/fused_adam.py": ["FusedAdam", "FusedAdam.step", "FusedAdam.zero_grad"],
    "transformer_engine/common/recipe/__init__.py": ["QParams", "Float8CurrentScaling"],
    "transformer_engine/pytorch/module/layernorm.py": ["LayerNorm"],
    "transformer_engine/pytorch/module/linear.py": ["Linear"],
    "transformer_engine/pytorch/module/rmsnorm.py": ["RMSNorm"],
    "transformer_engine/pytorch/ops/basic/layer_norm.py": ["LayerNorm"],
    "transformer_engine/pytorch/ops/basic/rmsnorm.py": ["RMSNorm"],
    "transformer_engine/pytorch/quantization.py": ["autocast"],
}


def signatures(folder: Path, file: str) -> dict[str, str]:
    """Return file:name -> the arguments, with defaults and without annotations; {} where the file is not there."""
    if not (folder / file).exists():
        return {}
    tree = ast.parse((folder / file).read_text(encoding="utf-8"))
    return {f"{file}:{name}": ast.unparse(arguments(tree, name)) for name in PLACES[file]}


def arguments(tree: ast.Module, name: str) -> ast.arguments:
    """Return the arguments of a function, a class (of its __init__, else its fields as a dataclass), or a method."""
    outer, _, method = name.partition(".")
    found = next(node for node in tree.body if getattr(node, "name", "") == outer)
    if isinstance(found, ast.ClassDef):
        made = next((node for node in found.body if getattr(node, "name", "") == (method or "__init__")), None)
        if made is None:
            fields = [node for node in found.body if isinstance(node, ast.AnnAssign)]
            names = [ast.arg(node.target.id) for node in fields if isinstance(node.target, ast.Name)]
            defaults = [node.value for node in fields if node.value]
            return ast.arguments([], [ast.arg("self"), *names], None, [], [], None, defaults)
        found = made
    assert isinstance(found, ast.FunctionDef)
    for each in ast.walk(found.args):
        if isinstance(each, ast.arg):
            each.annotation = None
    return found.args


def taking(stand_in: Callable[..., Any], place: str, base: str = "") -> Callable[..., Any]:
    """Return the stand-in, which then raises TypeError for arguments that the real one would not take.

    place: its recorded signature. base: that of the class which takes the first argument and its further keywords.
    """

    def call(*given: Any, **named: Any) -> Any:
        taken = bind(place, given, named)
        if base:
            bind(base, given[:1], taken.arguments.get("kwargs", {}))
        return stand_in(*given, **named)

    return call


def bind(place: str, given: Sequence[Any], named: Mapping[str, Any]) -> inspect.BoundArguments:
    """Bind arguments to a recorded signature. Raises TypeError."""
    tree = ast.parse(f"def function({json.loads(RECORDED.read_text())['signatures'][place]}): pass")
    function = tree.body[0]
    assert isinstance(function, ast.FunctionDef)
    for defaults in (function.args.defaults, function.args.kw_defaults):  # their names are the package's own
        defaults[:] = [None if value is None else ast.Constant(None) for value in defaults]  # type: ignore[misc]
    space: dict[str, Any] = {}
    exec(compile(ast.fix_missing_locations(tree), place, "exec"), space)
    signature = inspect.signature(space["function"])
    itself = ("self",) if "self" in signature.parameters else ()
    return signature.bind(*itself, *given, **named)


if __name__ == "__main__":
    found = [signatures(Path(folder), file) for folder in sys.argv[1:] for file in PLACES]
    print(json.dumps({name: text for each in found for name, text in each.items()}, indent=1))
