"""The source files behind the version of each stage; ``python -m tests.versions`` records them.

A file is identified by its syntax tree: comments, docstrings and format change no result.
"""

from __future__ import annotations

import ast
import hashlib
import json
from pathlib import Path
from typing import Any

from srccore.stages.table import STAGES

ROOT = Path(__file__).parents[1]
RECORDED = ROOT / "tests" / "unit" / "goldens" / "versions.json"
COMMAND = "python -m tests.versions"
COMPUTING = ("data", "method", "models", "training", "embedded", "stages")
"""The folders of srccore whose modules compute something."""
CARRYING = frozenset(
    f"srccore.stages.{name}"
    for name in ("checks", "folder", "inputs", "journal", "manifest", "parts", "table", "workers")
)
"""Modules that carry what others compute."""


def found() -> dict[str, Any]:
    """The stages with their versions and files, and the files with their hashes."""
    behind = {
        stage.name: sorted(_behind(f"srccore.stages.{stage.module}"))
        for stage in STAGES.values()
        if stage.module
    }
    files = sorted({path for paths in behind.values() for path in paths})
    return {
        "stages": {
            name: {"version": STAGES[name].version, "files": paths}
            for name, paths in behind.items()
        },
        "files": {path: _hash(ROOT / path) for path in files},
    }


def _behind(module: str) -> set[str]:
    """The files that a module is computed by: its own, and those of what it imports."""
    seen: set[str] = set()
    todo = [module]
    while todo:
        name = todo.pop()
        path = ROOT / f"{name.replace('.', '/')}.py"
        if name in seen or name in CARRYING or not path.is_file():
            continue
        seen.add(name)
        todo += [each for each in _imported(path) if each.split(".")[1:2] in _COMPUTING]
    return {f"{name.replace('.', '/')}.py" for name in seen}


_COMPUTING = [[folder] for folder in COMPUTING]


def _imported(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("srccore"):
            # `from srccore.data import dataset` imports a module, `from x import name` may not.
            names |= {str(node.module), *(f"{node.module}.{each.name}" for each in node.names)}
    return names


def _hash(path: Path) -> str:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list):
            node.body = [each for each in body if not _is_text(each)]  # type: ignore[attr-defined]
    return hashlib.sha256(ast.dump(tree).encode()).hexdigest()[:16]


def _is_text(node: ast.AST) -> bool:
    is_constant = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    return is_constant and isinstance(node.value.value, str)  # type: ignore[attr-defined]


if __name__ == "__main__":
    RECORDED.write_text(json.dumps(found(), indent=1) + "\n", encoding="utf-8")
