"""House rules that a reader relies on: sizes, imports, generated parts, the command line."""

import ast
import doctest
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

from qanchor import __version__

ROOT = Path(__file__).resolve().parents[2]
SOURCES = [
    path
    for folder in ("qanchor", "export", "server", "bench", "scripts", "tests")
    for path in sorted((ROOT / folder).rglob("*.py"))
    if "v1" not in path.parts
]
TORCH_FREE = (
    "qanchor.bundle.reader",
    "qanchor.cli",
    "qanchor.client",
    "qanchor.config",
    "qanchor.data.prefix",
    "qanchor_server.main",
)
VERBS = {
    "data", "userqa", "pretrain", "tune", "compile", "eval", "study", "export", "verify", "serve",
    "embed", "ask", "profile", "scenarios",
}  # fmt: skip


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_file_has_one_promise_and_a_bearable_size(path: Path) -> None:
    text = path.read_text()
    tree = ast.parse(text)
    assert len(text.splitlines()) <= (600 if "tests" in path.parts else 500)
    if text.strip():
        assert ast.get_docstring(tree), "the module docstring is missing"
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = (node.end_lineno or 0) - node.lineno + 1
            assert length <= 80, f"{node.name} has {length} lines"


@pytest.mark.parametrize("module", TORCH_FREE)
def test_serving_and_client_import_without_torch_and_transformers(module: str) -> None:
    code = (
        "import sys\n"
        "for name in ('torch', 'transformers', 'pyarrow', 'onnx', 'sklearn'):\n"
        "    sys.modules[name] = None\n"
        f"import {module}\n"
        "if hasattr(sys.modules.get('qanchor.cli'), 'build_parser'):\n"
        "    sys.modules['qanchor.cli'].build_parser()\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_the_verbs_are_these() -> None:
    from qanchor.cli import build_parser

    actions = [action for action in build_parser()._actions if action.dest == "verb"]
    assert set(actions[0].choices or ()) == VERBS


def test_the_changelog_speaks_of_this_version() -> None:
    assert f"## [{__version__}]" in (ROOT / "CHANGELOG.md").read_text()


def test_generated_parts_of_the_readme_are_up_to_date() -> None:
    subprocess.run([sys.executable, "scripts/readme.py", "--check"], check=True, cwd=ROOT)


@pytest.mark.parametrize(
    "path",
    [path for path in SOURCES if "tests" not in path.parts and ">>> " in path.read_text()],
    ids=lambda path: str(path.relative_to(ROOT)),
)
def test_examples_in_docstrings_are_true(path: Path) -> None:
    parts = path.relative_to(ROOT).with_suffix("").parts
    # Top-level folders that hold a package of another name are no packages themselves.
    is_package = (ROOT / parts[0] / "__init__.py").exists()
    module = importlib.import_module(".".join(parts if is_package else parts[1:]))
    assert doctest.testmod(module).failed == 0
