"""The house rules that a reader relies on, checked over the syntax tree."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "segmenter_fast"
MODULES = sorted(PACKAGE.rglob("*.py"))
OPS = sorted(path for path in (PACKAGE / "ops").glob("[!_]*.py"))
HOUSE_TESTS = {
    "test_matches_reference",
    "test_opcheck",
    "test_compile_fullgraph",
    "test_strided_inputs",
    "test_empty",
    "test_rejects_bad_input",
}
# What a layer may not import when it is loaded: data flows one way.
MODEL_FILES = ("patch_logits", "blocks", "encoder", "decoder", "model", "variants", "config")
ABOVE_MODELS = set(
    "analysis checkpoint cli cli_analysis data demo evaluate figures images inference metrics "
    "train visualize zoo".split()
)
ABOVE_FILES = {"cli", "cli_analysis", "cli_tradeoff", "demo", "train"}

each_op = pytest.mark.parametrize("path", OPS, ids=lambda path: path.stem)
each_module = pytest.mark.parametrize(
    "path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE))
)


def functions(path: Path) -> dict[str, ast.FunctionDef]:
    """Top-level functions by name; `_` alone (fakes) excepted."""
    body = ast.parse(path.read_text()).body
    return {f.name: f for f in body if isinstance(f, ast.FunctionDef) and f.name != "_"}


def operator_name(function: ast.FunctionDef) -> str | None:
    """`argmax` when decorated with `torch.library.custom_op("segmenter_fast::argmax", ...)`."""
    for decorator in function.decorator_list:
        if isinstance(decorator, ast.Call) and "custom_op" in ast.unparse(decorator.func):
            return ast.literal_eval(decorator.args[0]).removeprefix("segmenter_fast::")
    return None


def operators(path: Path) -> dict[str, ast.FunctionDef]:
    """Registered operators of a file by name."""
    named = {operator_name(f): f for f in functions(path).values()}
    return {name: f for name, f in named.items() if name is not None}


def imported(path: Path) -> set[str]:
    """Submodules of the package that loading this file imports, such as `ops.upsample`."""
    names = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("segmenter_fast"):
            module = node.module.removeprefix("segmenter_fast").removeprefix(".")
            names |= {module} if module else {alias.name for alias in node.names}
        elif isinstance(node, ast.Import):
            names |= {
                alias.name.removeprefix("segmenter_fast.")
                for alias in node.names
                if alias.name.startswith("segmenter_fast.")
            }
    return names


def test_there_is_something_to_check():
    assert "upsample" in {path.stem for path in OPS}
    assert "upsample_argmax" in operators(PACKAGE / "ops" / "upsample_argmax.py")


@each_op
def test_every_op_has_its_tests(path):
    tests = ROOT / "tests" / f"test_{path.stem}.py"
    assert tests.is_file(), f"ops/{path.name} has no tests/{tests.name}"
    if operators(path):
        missing = HOUSE_TESTS - functions(tests).keys()
        assert not missing, f"{tests.name} lacks {', '.join(sorted(missing))}"


@each_op
def test_every_registered_op_has_a_benchmark(path):
    if operators(path):
        stem = path.stem.removesuffix("_triton").removesuffix("_cuda")
        assert (ROOT / "benchmarks" / f"bench_{stem}.py").is_file()


@each_op
def test_every_registered_op_has_a_fake(path):
    text = path.read_text()
    for function in operators(path).values():
        assert f"@{function.name}.register_fake" in text, function.name


@each_op
def test_section_order(path):
    """Reference, then kernels, then the registered operator, then the public function."""
    assert ast.get_docstring(ast.parse(path.read_text())), "no module docstring"
    defined = functions(path)
    line = {name: function.lineno for name, function in defined.items()}
    registered = {name: function.lineno for name, function in operators(path).items()}
    for name in defined:
        reference = line.get(f"{name}_reference")
        if reference is not None:
            assert reference < line[name], f"{name}_reference stands below {name}"
            assert reference < registered.get(name, line[name])
        if name in registered:
            assert registered[name] < line[name], f"operator {name} stands below its function"
        if name.endswith("_kernel"):
            first = min(registered.values(), default=10**9)
            assert line[name] < first, f"{name} stands below an operator"


@each_op
def test_ops_know_nothing_of_models(path):
    foreign = {
        name for name in imported(path) if name.split(".")[0] not in ("backend", "_C", "ops")
    }
    assert not foreign, f"ops/{path.name} imports {foreign}"


@pytest.mark.parametrize("stem", MODEL_FILES)
def test_models_know_nothing_of_files(stem):
    names = {name.split(".")[0] for name in imported(PACKAGE / f"{stem}.py")}
    assert not names & ABOVE_MODELS


@each_module
def test_only_the_entry_points_know_the_command_line(path):
    if path.stem in {"cli", "cli_analysis", "cli_tradeoff", "demo", "__main__"}:
        return
    names = {name.split(".")[0] for name in imported(path)}
    assert not names & ABOVE_FILES


@each_module
def test_triton_quirks_live_in_one_place(path):
    if path.name == "_triton.py":
        return
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Attribute):
            assert ast.unparse(node) != "tl.dot", f"line {node.lineno}: use ops/_triton.py's dot()"
            assert node.attr != "libdevice", f"line {node.lineno}: libdevice fails interpreted"
