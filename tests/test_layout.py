"""The tree keeps its shape: imports go one way, files and functions stay small, exported files stay pure."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from megabyte_distill.conversion.flat_sources import exported_modules

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "megabyte_distill"
MAX_FILE_LINES = 500
MAX_FUNCTION_LINES = 60
LONG_KERNELS = {"dechunk_backward("}
"""nvcc makes other machine code of it in pieces; whoever cuts it up measures that on a GPU."""

MAY_IMPORT = {
    "alphabet": "",
    "exit_codes": "",
    "optional": "",
    "files": "",
    "config": "exit_codes optional",
    "run_folder": "files config",
    "tool": "exit_codes config",
    "data": "alphabet files config",
    "kernels": "alphabet optional config tool",
    "parallel": "exit_codes",
    "model": "alphabet optional config data kernels parallel",
    "objectives": "alphabet data kernels parallel model",
    "curriculum": "config data parallel model objectives",
    "training": "optional files config data parallel model objectives curriculum",
    # conversion writes what training reads: a teacher folder is a checkpoint of training's format
    "conversion": "alphabet files config run_folder data parallel model training",
    "inference": "alphabet config data kernels model objectives",
    "evaluation": "alphabet files config data model objectives inference",
    "hf": "alphabet config model conversion inference",
    "runs": "config run_folder data parallel model training conversion",
    "student_folders": "config run_folder parallel model conversion hf runs",
    "harness": "alphabet inference evaluation student_folders",
    "memory": "alphabet config run_folder tool data parallel model objectives curriculum training conversion runs",
    "pretrain": "alphabet exit_codes optional files config run_folder data kernels parallel model objectives "
    "curriculum training conversion inference evaluation runs memory",
}
"""What each part of the package may import beside itself: of the parts listed before it those that it needs."""

WITHOUT_MEGATRON = {"alphabet", "files", "config", "run_folder", "data", "kernels"}
EXPORTED = {
    "alphabet",
    "config.fields",
    "config.model",
    "config.ranges",
    *(
        f"model.{name}"
        for name in (
            "byte_decoder",
            "byte_encoder",
            "byte_mixer",
            "byte_stack",
            "chunking",
            "conv_mixer",
            "feed_forward",
            "key_value_cache",
            "linears",
            "local_attention",
            "mamba2",
            "normalization",
            "packed_attention",
            "rotary",
            "router",
            "row_state",
            "step_layers",
            "student",
        )
    ),
    *(
        f"kernels.{name}"
        for name in (
            "chunk_index",
            "chunk_pooling",
            "dispatch",
            "ngrams",
            "ops",
            "recurrence",
            "segment_conv",
            "segments",
            "ssm_scan",
        )
    ),
    *(
        f"inference.{name}"
        for name in (
            "bit_paths",
            "branching_cache",
            "generation",
            "official",
            "prompt_reading",
            "prompts",
            "sampling",
            "utf8",
        )
    ),
    *(f"hf.{name}" for name in ("byte_filter", "torch_backbone")),
    *(f"hf.{name}_megabyte" for name in ("configuration", "modeling", "tokenization")),
}
"""Copied as they are into a Hugging Face export: they import torch, the standard library and each other only, and the
three files that transformers opens import transformers."""
OPTIONAL_PACKAGES = {"transformer_engine", "apex", "mamba_ssm", "wandb"}
REQUIRED_FILES = (
    *("pyproject.toml", "README.md", "CONTRIBUTING.md", "Dockerfile", "Makefile", "LICENSE", "NOTICE"),
    *(".ci/run", ".pre-commit-config.yaml"),
)


def package_files() -> list[Path]:
    return sorted((ROOT / PACKAGE).rglob("*.py"))


def all_python_files() -> list[Path]:
    folders = (PACKAGE, "tools", "tests", "examples", "benchmarks", "scripts")
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def all_cpp_files() -> list[Path]:
    return sorted(path for path in (ROOT / PACKAGE).rglob("*") if path.suffix in (".cu", ".cuh", ".cpp", ".hpp", ".h"))


def cpp_functions(text: str) -> Iterator[tuple[int, int, str]]:
    """(first line, last line, what stands in front of the body) of every function that is in no other one."""
    for pattern in (r"//[^\n]*", r'"(?:\\.|[^"\\\n])*"', r"(?m)^[ \t]*#(?:[^\n\\]|\\.|\\\n)*"):
        text = re.sub(pattern, lambda match: "\n" * match[0].count("\n"), text)
    heads: list[tuple[int, str]] = []
    start = 0
    for mark in re.finditer(r"[{};]", text):
        if mark[0] == "{":
            head = text[start : mark.start()]
            heads.append((start + len(head) - len(head.lstrip()), head.strip()))
        elif mark[0] == "}":
            at, head = heads.pop()
            if "(" in head and not any("(" in outer for _, outer in heads):
                yield text.count("\n", 0, at) + 1, text.count("\n", 0, mark.start()) + 1, head
        start = mark.end()
    assert not heads, f"braces do not match: {heads}"


def imported_modules(path: Path) -> Iterator[tuple[int, str]]:
    """(line, absolute dotted name) of every import of a file, inside functions and TYPE_CHECKING too."""
    package = path.relative_to(ROOT).with_suffix("").parts[:-1]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            module = ".".join(part for part in (base, node.module or "") if part)
            if module == PACKAGE:  # from megabyte_distill import alphabet: the name is the module
                for alias in node.names:
                    yield node.lineno, f"{module}.{alias.name}"
            else:
                yield node.lineno, module


def part_of(path: Path) -> str:
    """The part of the package a file belongs to: its folder, or its own name at the top."""
    return path.relative_to(ROOT / PACKAGE).with_suffix("").parts[0]


def test_every_part_of_the_package_has_its_place() -> None:
    parts = {part_of(path) for path in package_files()} - {"__init__"}
    assert parts <= set(MAY_IMPORT), f"say in MAY_IMPORT what {sorted(parts - set(MAY_IMPORT))} may import"


def edges() -> dict[tuple[str, str], str]:
    """(part, another part that it imports) → where."""
    return {
        (part_of(path), names[1]): f"{path.relative_to(ROOT)}:{line}"
        for path in package_files()
        for line, module in imported_modules(path)
        if (names := module.split("."))[0] == PACKAGE and len(names) > 1
        if part_of(path) not in ("__init__", names[1]) and names[1] != "__version__"
    }


def test_imports_go_one_way_and_each_way_that_is_open_is_used() -> None:
    found = edges()
    allowed = {(part, other) for part, others in MAY_IMPORT.items() for other in others.split()}
    problems = [f"{found[part, other]}: {part} must not import {other}" for part, other in found.keys() - allowed]
    problems += [f"{part} imports {other} no more: take it out of MAY_IMPORT" for part, other in allowed - found.keys()]
    assert not problems, "\n".join(sorted(problems))
    order = list(MAY_IMPORT)
    assert all(order.index(other) < order.index(part) for part, other in allowed), "list the parts from the bottom up"


def test_the_lower_parts_do_not_need_megatron() -> None:
    offenders = [
        f"{path.relative_to(ROOT)}:{line}"
        for path in package_files()
        if part_of(path) in WITHOUT_MEGATRON
        for line, module in imported_modules(path)
        if module.split(".")[0] == "megatron"
    ]
    assert not offenders, offenders


def test_exported_files_import_only_what_travels_with_them() -> None:
    problems = []
    for path in package_files():
        name = ".".join(path.relative_to(ROOT / PACKAGE).with_suffix("").parts)
        if name not in EXPORTED:
            continue
        others = {"torch", "transformers"} if name.endswith("_megabyte") else {"torch"}
        for line, module in imported_modules(path):
            top, _, ours = module.partition(".")
            travels = ours in EXPORTED
            if not (travels if top == PACKAGE else top in sys.stdlib_module_names or top in others):
                problems.append(f"{path.relative_to(ROOT)}:{line}: {module} is not in an export")
    assert not problems, "\n".join(problems)


def test_what_an_export_copies_is_what_is_kept_pure() -> None:
    assert set(exported_modules()) == EXPORTED


def test_optional_packages_are_imported_in_one_file() -> None:
    offenders = [
        f"{path.relative_to(ROOT)}:{line}: {module}"
        for path in package_files()
        if part_of(path) != "optional"
        for line, module in imported_modules(path)
        if module.split(".")[0] in OPTIONAL_PACKAGES
    ]
    assert not offenders, offenders


def parsers_of_half_flags(text: str) -> list[int]:
    """Lines that make a parser without ``allow_abbrev=False``."""
    return [
        node.lineno
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("ArgumentParser")
        if "allow_abbrev=False" not in map(ast.unparse, node.keywords)
    ]


def test_no_program_takes_half_a_flag() -> None:
    offenders = [
        f"{path.relative_to(ROOT)}:{line}"
        for path in all_python_files()
        for line in parsers_of_half_flags(path.read_text(encoding="utf-8"))
    ]
    assert not offenders, offenders
    text = "ArgumentParser()\na.ArgumentParser(allow_abbrev=True)\nArgumentParser(b=1, allow_abbrev=False)\nC()\n"
    assert parsers_of_half_flags(text) == [1, 2]


def test_nothing_points_at_notes_that_are_not_in_the_repository() -> None:
    words = re.compile(r"RECIPE sec[t]ion|DESIGN[.]md|STYLE[.]md")
    pages = [*(ROOT / "docs").glob("*.md"), *ROOT.glob("*.md"), *(ROOT / PACKAGE / "kernels").rglob("*.[ch]*")]
    files = [*all_python_files(), *(ROOT / "scripts").glob("*.sh"), *pages]
    offenders = [str(path.relative_to(ROOT)) for path in files if words.search(path.read_text(encoding="utf-8"))]
    assert not offenders, offenders


def test_nothing_is_unpickled() -> None:
    offenders = [
        f"{path.relative_to(ROOT)}:{line}"
        for path in package_files()
        for line, module in imported_modules(path)
        if module.split(".")[0] in ("pickle", "dill", "cloudpickle", "joblib")
    ]
    assert not offenders, offenders


def test_no_file_is_long() -> None:
    long = {
        str(path.relative_to(ROOT)): lines
        for path in [*all_python_files(), *all_cpp_files()]
        if (lines := len(path.read_text(encoding="utf-8").splitlines())) > MAX_FILE_LINES
    }
    assert not long, long


def test_no_function_is_long() -> None:
    long = []
    for path in all_python_files():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lines = (node.end_lineno or node.lineno) - node.lineno + 1
                if lines > MAX_FUNCTION_LINES:
                    long.append(f"{path.relative_to(ROOT)}:{node.lineno}: {node.name} has {lines} lines")
    assert not long, "\n".join(long)


def test_no_function_of_the_kernels_is_long() -> None:
    long = [
        f"{path.relative_to(ROOT)}:{first}: {last - first + 1} lines: {head}"
        for path in all_cpp_files()
        for first, last, head in cpp_functions(path.read_text(encoding="utf-8"))
        if last - first + 1 > MAX_FUNCTION_LINES and not any(name in head for name in LONG_KERNELS)
    ]
    assert not long, "\n".join(long)


def test_functions_are_found_in_cpp() -> None:
    text = """\
namespace a {  // {
#define OPEN {
struct B {
  B() : x("}{") {}
  template <class T>
  int f(T x) const {
    if (x) { return 1; }
    return [&] { return 2; }();
  }
};
}
"""
    assert [(first, last) for first, last, _ in cpp_functions(text)] == [(4, 4), (5, 9)]


def test_every_module_says_what_it_is() -> None:
    silent = [
        str(path.relative_to(ROOT))
        for path in package_files()
        if not ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
    ]
    assert not silent, silent


def test_a_commit_is_linted_as_make_lint_does_and_downloads_nothing() -> None:
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))["repos"]
    assert [repo["repo"] for repo in hooks] == ["local"]
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    lints = re.findall(r"^\t\$\(BIN\)/(.*)$", makefile.split("\nlint:")[1].split("\n\n")[0], re.MULTILINE)
    entries = {hook["entry"].replace(" --force-exclude", "") for hook in hooks[0]["hooks"]}
    assert entries == {line.removesuffix(" .") for line in lints}
    assert {hook["language"] for hook in hooks[0]["hooks"]} == {"system"}
    assert "make lint\n" in (ROOT / ".ci" / "run").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", REQUIRED_FILES)
def test_the_top_level_is_complete(name: str) -> None:
    assert (ROOT / name).is_file(), f"{name} is missing"
