"""Writes the generated parts of README.md: the results table and the file tree.

A part stands between `<!-- generated:NAME -->` and `<!-- end -->`. With --check nothing is
written; exit 1 if README.md is not what this script would write.
"""

import argparse
import ast
import json
import re
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
RESULT = "bench/results/oulad_mini_eval.json"
FOLDERS = ("protos", "qanchor", "export", "server", "bench", "scripts", "tests", "docs")
SKIPPED_PARTS = {"__pycache__", "v1", "results"}
SPOKEN_FOR = {
    "qanchor/v1": "generated from protos/ by scripts/protos; never edited",
    "bench/results": "committed results; those of bench/ with their environment",
}
WITHOUT_DOCSTRING = {
    ".json": "data: see the module beside it",
    ".yaml": "buf's rules for protos/",
}


def main() -> int:
    """Write or check README.md."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true")
    args = parser.parse_args()
    before = README.read_text()
    after = fill(fill(before, "results", results_table()), "tree", file_tree())
    if args.check:
        if after != before:
            print("README.md is out of date; run: python scripts/readme.py", file=sys.stderr)
        return int(after != before)
    README.write_text(after)
    return 0


def fill(text: str, name: str, content: str) -> str:
    """Replace the generated part `name` of `text`."""
    pattern = rf"(<!-- generated:{name} -->\n).*?(<!-- end -->)"
    filled, count = re.subn(
        pattern, lambda match: f"{match[1]}{content}\n{match[2]}", text, flags=re.DOTALL
    )
    assert count == 1, f"README.md must have one generated part {name}"
    return filled


def results_table() -> str:
    """Averages of every method, then AUC / KS per scenario of those a reader asks for first."""
    methods = json.loads((ROOT / RESULT).read_text())["methods"]
    shown = [
        method
        for method in methods
        if method.get("kind") != "embedding baseline" or method["method"] == "untrained model"
    ]
    lines = ["| method | average AUC | average KS |", "|---|---|---|"]
    lines.extend(
        f"| {method['method']} | {method['average_auc']:.3f}{_bounds(method, 'auc_interval')} | "
        f"{method['average_ks']:.3f}{_bounds(method, 'ks_interval')} |"
        for method in methods
    )
    lines += ["", "| scenario | " + " | ".join(method["method"] for method in shown) + " |"]
    lines.append("|" + "---|" * (len(shown) + 1))
    for row in zip(*(method["scenarios"] for method in shown), strict=True):
        cells = " | ".join(f"{score['auc']:.3f} / {score['ks']:.3f}" for score in row)
        lines.append(f"| {row[0]['scenario']} | {cells} |")
    return "\n".join(lines)


def _bounds(method: dict[str, Any], name: str) -> str:
    """The 95 % interval in brackets, where the result has one."""
    found = method.get(name)
    return f" ({found['low']:.3f} to {found['high']:.3f})" if found else ""


def file_tree() -> str:
    """Every source file with its promise in one line."""
    lines = ["```"]
    for folder in FOLDERS:
        lines.extend(_folder(ROOT / folder))
    return "\n".join([*lines, "```"])


def _folder(folder: Path) -> Iterator[str]:
    files = sorted(path for path in folder.iterdir() if path.is_file() and _is_shown(path))
    folders = sorted(path for path in folder.iterdir() if path.is_dir())
    yield f"{folder.relative_to(ROOT).as_posix()}/"
    for path in files:
        yield f"  {path.name:26} {promise(path)}"
    for path in folders:
        name = path.relative_to(ROOT).as_posix()
        if name in SPOKEN_FOR:
            yield f"{name + '/':28} {SPOKEN_FOR[name]}"
        elif path.name not in SKIPPED_PARTS or "protos" in path.parts:
            yield from _folder(path)


def _is_shown(path: Path) -> bool:
    if path.name == "__init__.py":
        return path.parent.name in {"bundle", "client", "engine"}
    return path.suffix in {".py", ".proto", ".md", ".json", ".toml", ".yaml", ""}


def promise(path: Path) -> str:
    """First line of what a file says it is, without its full stop."""
    text = path.read_text()
    if path.suffix == ".py":
        first = (ast.get_docstring(ast.parse(text)) or "").splitlines()[:1]
    elif path.suffix == ".proto":
        first = re.findall(r"^// (.*)$", text, flags=re.MULTILINE)[:1]
    elif path.suffix == ".md":
        first = [next(line for line in text.splitlines() if line.startswith("# "))[2:]]
    elif path.suffix == "":
        first = [text.splitlines()[1].removeprefix("# ")]
    elif path.suffix == ".toml":
        opening = text.splitlines()[0]
        told = tomllib.loads(text)
        said = opening.removeprefix("# ")
        first = [said if said != opening else str(told.get("about", told.get("title", "")))]
    else:
        first = [WITHOUT_DOCSTRING[path.suffix]]
    shown = first[0] if first else ""
    # A full stop before a capital letter ends a sentence; "Eq. (3)" goes on.
    return re.split(r"\. (?=[A-Z])", shown)[0].rstrip(".")


if __name__ == "__main__":
    sys.exit(main())
