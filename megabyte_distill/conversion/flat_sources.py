"""The package's pure-torch sources as flat files, for a Hugging Face folder that needs no installed package.

transformers loads a folder's code by following ``from .name import`` recursively, in one flat folder. So the files
reached from the three that transformers opens are copied as they are, under unique names, with their imports rewritten.
Its first releases of version 5 follow one step only, so those three also name what they reach through others.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path

import megabyte_distill

PACKAGE = "megabyte_distill"
ROOTS = ("hf.configuration_megabyte", "hf.modeling_megabyte", "hf.tokenization_megabyte")
"""What config.json and tokenizer_config.json point at."""
_IMPORT = re.compile(rf"^(\s*)from {PACKAGE}\.([\w.]+) import", re.MULTILINE)
_NAMED = """
if False:  # for loaders that copy only the files named in this one
{}"""


def exported_modules() -> list[str]:
    """Names below the package (``model.student``) of every module that travels, found from :data:`ROOTS`."""
    return sorted({*ROOTS, *(module for root in ROOTS for module in _reached(root))})


def flat_sources() -> dict[str, str]:
    """File name → text of everything that travels."""
    files: dict[str, str] = {}
    for module in exported_modules():
        name = f"{flat_name(module)}.py"
        assert name not in files, f"two exported modules would be called {name}"
        text = _IMPORT.sub(lambda match: f"{match[1]}from .{flat_name(match[2])} import", _source(module))
        left = [ast.unparse(node) for node in ast.walk(ast.parse(text)) if _names_the_package(node)]
        assert not left, f"{module}: {left}: only 'from {PACKAGE}.module import name' can be rewritten"
        if module in ROOTS:
            others = (f"    from .{flat_name(other)} import __doc__\n" for other in _reached(module))
            text += _NAMED.format("".join(others))
        origin = f"# {PACKAGE} {megabyte_distill.__version__}, {module.replace('.', '/')}.py; its imports rewritten.\n"
        files[name] = origin + text
    return files


def flat_name(module: str) -> str:
    """A module's name in a flat folder: its last part, behind its folder's for those in config/ (config_model)."""
    folder, _, name = module.rpartition(".")
    return f"config_{name}" if folder == "config" else name


def _source(module: str) -> str:
    path = Path(megabyte_distill.__file__).parent / f"{module.replace('.', '/')}.py"
    return path.read_text(encoding="utf-8")


def _reached(module: str) -> list[str]:
    """Every other module that a module imports, itself or through others."""
    found: set[str] = set()
    waiting = [module]
    while waiting:
        new = set(_imports_of(_source(waiting.pop()))) - found - {module}
        found |= new
        waiting += new
    return sorted(found)


def _imports_of(text: str) -> list[str]:
    return [match[2] for match in _IMPORT.finditer(text)]


def _names_the_package(node: ast.AST) -> bool:
    if isinstance(node, ast.Import):
        return any(alias.name.split(".")[0] == PACKAGE for alias in node.names)
    return isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == PACKAGE
