"""The shape of the code: imports go down the floors, and what must sit in one room sits in one room."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FLOORS = (
    {"megatron_deepstack.errors", "megatron_deepstack"},
    {"megatron_deepstack.config", "megatron_deepstack.platform"},
    {"megatron_deepstack.planning", "megatron_deepstack.parallel"},
    {"megatron_deepstack.data", "megatron_deepstack.routing"},
    {"megatron_deepstack.model", "megatron_deepstack.run_folder", "megatron_deepstack.scores"},
    {"megatron_deepstack.step"},
    {"megatron_deepstack.checkpoint", "megatron_deepstack.convert"},
    {"megatron_deepstack.inference", "megatron_deepstack.report"},
    {"megatron_deepstack.training"},
    {"orchestration", "megatron_deepstack.testing", "megatron_deepstack.demo", "megatron_deepstack.storekeeping"},
    {"tools", "megatron_deepstack.cli"},
)
"""Packages by floor, lowest first; those on one floor do not know each other."""

MAX_LINES = 400
MAX_FUNCTION_LINES = 60


def source_files() -> list[Path]:
    folders = ("megatron_deepstack", "orchestration", "tools")
    return sorted(file for folder in folders for file in (ROOT / folder).rglob("*.py"))


FILES = source_files()


def name_of(file: Path) -> str:
    parts = file.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def floor_of(module: str) -> tuple[int, str]:
    """Floor number and package of a module of ours."""
    parts = module.split(".")
    for length in (2, 1):
        package = ".".join(parts[:length])
        for number, packages in enumerate(FLOORS):
            if package in packages:
                return number, package
    raise AssertionError(f"{module} is on no floor; add its package to FLOORS")


CARRIED = "megatron_deepstack.convert.hf_folder"
CARRIED_FILES = {file.stem: f"{CARRIED}.{file.stem}" for file in FILES if name_of(file).startswith(f"{CARRIED}.")}
"""Files that exports carry with them. They import each other by relative names, since others copy them elsewhere."""


def imported(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """Modules named by import statements, wherever they stand, with their line."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 or node.module in CARRIED_FILES, f"line {node.lineno}: relative import"
            name = CARRIED_FILES.get(node.module, node.module) if node.level else node.module
            yield from ((f"{name}.{alias.name}", node.lineno) for alias in node.names)


def ours(module: str) -> str | None:
    """The module of ours that an import statement reaches; None if it is another's."""
    if module.split(".")[0] not in ("megatron_deepstack", "orchestration", "tools"):
        return None
    parts = module.split(".")
    for length in range(len(parts), 0, -1):
        path = ROOT.joinpath(*parts[:length])
        if path.with_suffix(".py").is_file() or path.is_dir():
            return ".".join(parts[:length])
    raise AssertionError(f"{module} does not exist")


def by_name(file: Path) -> str:
    return str(file.relative_to(ROOT))


@cache
def parsed(file: Path) -> ast.Module:
    """The file's syntax tree, which nobody changes."""
    return ast.parse(file.read_text())


@pytest.mark.parametrize("file", FILES, ids=by_name)
def test_imports_go_down(file: Path) -> None:
    floor, package = floor_of(name_of(file))
    for module, line in imported(parsed(file)):
        target = ours(module)
        if target is None or target == "megatron_deepstack":
            continue
        below, other = floor_of(target)
        assert other == package or below < floor, (
            f"{by_name(file)}:{line} imports {target}: floor {below} from floor {floor}; imports go strictly down"
        )


def test_what_exports_carry_needs_nothing_of_ours() -> None:
    known = {
        "__future__",
        "base64",
        "binascii",
        "collections",
        "dataclasses",
        "functools",
        "io",
        "math",
        "os",
        "pathlib",
        "typing",
    }
    known |= {"numpy", "PIL", "torch", "transformers"}
    for file in FILES:
        if name_of(file).startswith(f"{CARRIED}."):
            needed = {module for module, _ in imported(parsed(file)) if not module.startswith(CARRIED)}
            assert {module.split(".")[0] for module in needed} <= known, by_name(file)


def test_no_import_cycles() -> None:
    graph: dict[str, set[str]] = {}
    for file in FILES:
        targets = {ours(module) for module, _ in imported(parsed(file))}
        graph[name_of(file)] = {target for target in targets if target} - {name_of(file)}
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, f"import cycle: {' -> '.join((*path, module))}"
        if module not in done:
            for target in graph.get(module, ()):
                visit(target, (*path, module))
            done.add(module)

    for module in graph:
        visit(module, ())


ROOMS = {
    "torch.cuda": ("megatron_deepstack/platform/",),
    "all_to_all": ("megatron_deepstack/routing/", "megatron_deepstack/testing/gpu/"),
    "batch_isend_irecv": ("megatron_deepstack/routing/",),
    "all_reduce": ("megatron_deepstack/parallel/", "megatron_deepstack/testing/"),
    "import ray": ("orchestration/",),
    "TYPE_CHECKING": (),
}
"""Words of code and the only folders that may use them."""


@cache
def code_only(file: Path) -> str:
    """The file's code without comments and docstrings."""
    tree = ast.parse(file.read_text())
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list):
            node.body = [
                item for item in body if not (isinstance(item, ast.Expr) and isinstance(item.value, ast.Constant))
            ] or [ast.Pass()]
    return ast.unparse(tree)


@cache
def without_texts(file: Path) -> str:
    """The file's code with every text empty, since a text may be the code of another process."""
    tree = ast.parse(file.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            node.value = ""
    return ast.unparse(tree)


@pytest.mark.parametrize("word", ROOMS)
def test_one_room_for_each(word: str) -> None:
    strangers = [by_name(file) for file in FILES if word in code_only(file)]
    strangers = [name for name in strangers if not name.startswith(ROOMS[word] or "-")]
    assert not strangers, f"{word} belongs in {ROOMS[word] or 'no file'}; found in {strangers}"


@pytest.mark.parametrize("file", FILES, ids=by_name)
def test_sizes(file: Path) -> None:
    text = file.read_text()
    assert text.count("\n") <= MAX_LINES, f"{by_name(file)} has {text.count(chr(10))} lines; split it"
    for node in ast.walk(parsed(file)):
        if isinstance(node, ast.FunctionDef):
            length = (node.end_lineno or 0) - node.lineno + 1
            assert length <= MAX_FUNCTION_LINES, f"{by_name(file)}:{node.lineno} {node.name} has {length} lines"


@pytest.mark.parametrize("file", FILES, ids=by_name)
def test_every_module_says_what_it_is(file: Path) -> None:
    text = file.read_text()
    assert not text.strip() or ast.get_docstring(parsed(file)), f"{by_name(file)} opens without a paragraph"


SECTIONED = ("megatron_deepstack/", "orchestration/")
"""Folders whose docstrings teach: those of packages, and those of functions with several parameters."""
TAUGHT = [file for file in FILES if by_name(file).startswith(SECTIONED)]


def public_functions(body: list[ast.stmt], owner: str = "") -> Iterator[tuple[str, ast.FunctionDef]]:
    """Functions of a module and methods of its classes, without those whose name or class begins with an underscore."""
    for node in body:
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            yield from public_functions(node.body, f"{owner}{node.name}.")
        elif isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
            yield f"{owner}{node.name}", node


def is_verb(function: ast.FunctionDef) -> bool:
    """Whether a function is a command (`@app.command()`): each option has a help text, and users see the docstring."""
    calls = [one.func for one in function.decorator_list if isinstance(one, ast.Call)]
    return any(isinstance(call, ast.Attribute) and call.attr == "command" for call in calls)


def parameters(function: ast.FunctionDef) -> list[str]:
    """Names of all parameters except self and cls."""
    spec = function.args
    stars = [star for star in (spec.vararg, spec.kwarg) if star is not None]
    names = [one.arg for one in (*spec.posonlyargs, *spec.args, *spec.kwonlyargs, *stars)]
    return [name for name in names if name not in ("self", "cls")]


@pytest.mark.parametrize("file", [file for file in TAUGHT if file.name == "__init__.py"], ids=by_name)
def test_every_package_teaches(file: Path) -> None:
    text = ast.get_docstring(parsed(file)) or ""
    wanted = f"{by_name(file)} must say what lives there, the one idea, and where to begin"
    assert len(text.splitlines()) >= 3, wanted
    assert "one idea" in text, wanted
    assert "begin" in text.lower(), wanted


@pytest.mark.parametrize("file", TAUGHT, ids=by_name)
def test_public_functions_explain_their_parameters(file: Path) -> None:
    for name, function in public_functions(parsed(file).body):
        text = ast.get_docstring(function) or ""
        if len(parameters(function)) > 1 and not is_verb(function):
            assert "Args:" in text, f"{by_name(file)}:{function.lineno} {name} has no section Args in its docstring"
            _, _, section = text.partition("Args:\n")
            told = {line.strip().partition(":")[0].lstrip("*") for line in section.splitlines()}
            missing = [one for one in parameters(function) if one not in told]
            assert not missing, f"{by_name(file)}:{function.lineno} {name} does not explain {', '.join(missing)}"


def test_no_drawer_for_leftovers() -> None:
    forbidden = {"utils.py", "helpers.py", "common.py", "inspect.py"}
    assert not [by_name(file) for file in FILES if file.name in forbidden]


def test_config_and_planning_know_no_torch() -> None:
    for file in FILES:
        if by_name(file).startswith(("megatron_deepstack/config/", "megatron_deepstack/planning/")):
            roots = {module.split(".")[0] for module, _ in imported(parsed(file))}
            assert not roots & {"torch", "megatron", "ray"}, by_name(file)


SLEEPERS = {
    "waiting.py": "the wait of all tests, for a condition",
    "fault_runs.py": "a wait for a condition",
    "test_launch_faults.py": "a wait for a condition",
}
"""Test files that may sleep, and what for."""


def test_tests_do_not_sleep() -> None:
    """They wait for conditions: `waiting.wait_until`."""
    files = sorted((ROOT / "tests").rglob("*.py"))
    sleepers = {file.name for file in files if "time.sleep(" in without_texts(file)}
    assert sleepers == set(SLEEPERS)


def test_test_files_have_names_of_their_own() -> None:
    """Pytest imports a test file by its name alone, as tests import their helpers; two of one name would clash."""
    files = [file for file in sorted((ROOT / "tests").rglob("*.py")) if file.name != "conftest.py"]
    places: dict[str, list[str]] = {}
    for file in files:
        places.setdefault(file.name, []).append(by_name(file))
    assert not {name: found for name, found in places.items() if len(found) > 1}
