"""Nothing that is read is run."""

from __future__ import annotations

import ast
from pathlib import Path

import kfgn

ROOT = Path(kfgn.__file__).parents[1]
UNPICKLE = {"pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
OUTSIDE = {"socket", "subprocess", "urllib", "requests", "pathlib", "os"}


def told(path: Path) -> tuple[set[str], list[ast.Call]]:
    """The packages that a file imports, and its calls."""
    nodes = list(ast.walk(ast.parse(path.read_text())))
    names = {a.name for n in nodes if isinstance(n, ast.Import) for a in n.names}
    names |= {n.module or "" for n in nodes if isinstance(n, ast.ImportFrom)}
    return {name.partition(".")[0] for name in names}, [n for n in nodes if isinstance(n, ast.Call)]


def test_nothing_is_unpickled_or_evaluated():
    files = [*(ROOT / "kfgn").rglob("*.py"), *(ROOT / "benchmarks").rglob("*.py")]
    assert len(files) > 100
    for path in files:
        imported, calls = told(path)
        assert not imported & UNPICKLE, path
        for call in calls:
            name = call.func.id if isinstance(call.func, ast.Name) else None
            assert name not in ("eval", "exec", "compile", "__import__"), path
            allowed = [k.value for k in call.keywords if k.arg == "allow_pickle"]
            assert all(isinstance(x, ast.Constant) and x.value is False for x in allowed), path
            if isinstance(call.func, ast.Attribute) and call.func.attr == "load":
                module = ast.unparse(call.func.value)
                assert module not in ("np", "numpy", "jnp") or allowed, f"{path}: objects"


def test_the_library_opens_nothing():
    for path in (ROOT / "kfgn").rglob("*.py"):
        imported, calls = told(path)
        assert not imported & OUTSIDE, path
        assert not any(isinstance(c.func, ast.Name) and c.func.id == "open" for c in calls), path
