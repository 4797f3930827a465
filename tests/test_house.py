"""The house: rooms import one way, few names on top, every public name documented and typed."""

from __future__ import annotations

import ast
import importlib
import inspect
import types
import typing
from pathlib import Path

import pytest

import kfgn
from tests.conftest import group_of

ROOT = Path(kfgn.__file__).parent
#: A room may import from itself and from those before it. The facades, the modules
#: beside the rooms, stand on top.
ROOMS = ("base", "objective", "model", "curvature", "optimizers")
BENEATH = {room: set(ROOMS[: i + 1]) for i, room in enumerate(ROOMS)}
BENEATH["diagnostics"] = BENEATH["curvature"] | {"diagnostics"}
BENEATH["posterior"] = BENEATH["curvature"] | {"posterior"}
BENEATH["optimizers"] |= {"diagnostics"}  # which know what methods cost
#: The folders of a room, likewise.
FLOORS = {"model": ("program", "flatten", "trial", "layers", "graph")}
#: The public modules, by attribute of kfgn.
PUBLIC = {"kfgn": kfgn} | {
    f"kfgn.{name}": value for name, value in vars(kfgn).items()
    if isinstance(value, types.ModuleType) and name in kfgn.__all__
}  # fmt: skip
SOURCES = sorted(ROOT.rglob("*.py"))


def imports(path: Path) -> list[str]:
    """The full names of the modules and names that a file imports, wherever in the file."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            found += [f"{node.module}.{alias.name}" for alias in node.names]
    return found


def names() -> list[str]:
    """The full name of every public object."""
    return sorted(f"{module}.{name}" for module, m in PUBLIC.items() for name in m.__all__)


def objects() -> dict[str, object]:
    """Every public object once, and the public methods that classes of kfgn define."""
    found: dict[int, tuple[str, object]] = {}
    for name in names():
        value = getattr(PUBLIC[name.rpartition(".")[0]], name.rpartition(".")[2])
        found.setdefault(id(value), (name, value))
        if inspect.isclass(value):
            for method, function in vars(value).items():
                if inspect.isfunction(function) and not method.startswith("_"):
                    found.setdefault(id(function), (f"{name}.{method}", function))
    return {name: value for name, value in found.values() if not inspect.ismodule(value)}


def test_rooms_import_one_way():
    for path in SOURCES:
        room = path.relative_to(ROOT).parts[0]
        if room not in BENEATH:
            continue  # a facade
        for name in imports(path):
            if name.partition(".")[0] == "kfgn":
                target = name.split(".")[1]
                assert target in BENEATH[room], f"{path}: {room} imports {name}"


@pytest.mark.parametrize("room", FLOORS)
def test_the_folders_of_a_room_import_one_way(room):
    folders = [path.name for path in (ROOT / room).iterdir() if (path / "__init__.py").exists()]
    assert sorted(folders) == sorted(FLOORS[room])
    for k, folder in enumerate(FLOORS[room]):
        for path in (ROOT / room / folder).glob("*.py"):
            own = [name.split(".") for name in imports(path) if name.startswith(f"kfgn.{room}.")]
            assert {name[2] for name in own} <= set(FLOORS[room][: k + 1]), path


def test_every_folder_is_a_room():
    folders = {path.relative_to(ROOT).parts[0] for path in SOURCES if path.parent != ROOT}
    assert folders == set(BENEATH)
    assert {f"kfgn.{path.stem}" for path in ROOT.glob("*.py")} - {"kfgn.__init__"} < set(PUBLIC)


def test_only_public_jax():
    for path in SOURCES:
        for name in imports(path):
            first, *rest = name.split(".")
            private = any(part.startswith("_") for part in rest)
            assert first not in ("jax", "jaxlib") or not private, f"{path} imports {name}"
            assert first != "jaxlib", f"{path} imports {name}"


def test_modules_are_short():
    lengths = {path: len(path.read_text().splitlines()) for path in SOURCES}
    assert {path: n for path, n in lengths.items() if n > 350} == {}


def test_few_names_on_top():
    assert len([name for name in kfgn.__all__ if f"kfgn.{name}" not in PUBLIC]) <= 14


@pytest.mark.parametrize("module", PUBLIC)
def test_facades(module):
    """Documented, with a sorted list of names that exist."""
    room = importlib.import_module(module)
    assert room is PUBLIC[module] and room.__doc__
    # As ruff sorts them: constants, classes, the rest.
    kind = {n: 0 if n.isupper() else 1 if n[0].isupper() else 2 for n in room.__all__}
    assert list(room.__all__) == sorted(set(room.__all__), key=lambda n: (kind[n], n))
    assert all(hasattr(room, name) for name in room.__all__)


@pytest.mark.parametrize("name", objects())
def test_documented(name):
    """A function or class has a docstring of its own."""
    value = objects()[name]
    if inspect.isfunction(value) or inspect.isclass(value):
        assert value.__doc__ and value.__doc__.strip(), name
        assert not value.__doc__.startswith(f"{value.__name__}("), f"{name}: NamedTuple's own"


#: Errors are shown where they are raised.
WITHOUT_EXAMPLE = {f"kfgn.errors.{name}" for name in kfgn.errors.__all__}


def test_examples():
    """Every public function and class has an example, which runs as a test; so has a loss's."""
    lacking = set()
    for name in names():
        value = getattr(PUBLIC[name.rpartition(".")[0]], name.rpartition(".")[2])
        told = value if inspect.isfunction(value) or inspect.isclass(value) else type(value)
        if told.__module__.startswith("kfgn") and ">>>" not in (told.__doc__ or ""):
            lacking.add(name)
    assert lacking == WITHOUT_EXAMPLE


@pytest.mark.parametrize("name", objects())
def test_annotated(name):
    """Every parameter of a public function, and what it returns."""
    value = objects()[name]
    if not inspect.isfunction(value):
        return
    signature = inspect.signature(value)
    for parameter in signature.parameters.values():
        if parameter.name != "self":
            assert parameter.annotation is not inspect.Parameter.empty, f"{name}: {parameter}"
    assert signature.return_annotation is not inspect.Signature.empty, name
    typing.get_type_hints(value)  # names that exist, shapes that jaxtyping can read


def test_tests_of_a_row_have_one_worker():
    """Or else each compiles what they share; nothing but the time that tests take would tell."""
    file, row = "tests/curvature/test_every_model.py", "layer_norm"
    ids = f"{file}::test_layers[{row}]", f"{file}::test_blocks[{row} with sigmoid-hessian]"
    assert {group_of(test) for test in ids} == {row}
    assert group_of("tests/base/test_linalg.py::test_a[residual]") == "tests/base/test_linalg.py"
