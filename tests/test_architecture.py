"""Rules read from the source: layers, no import cycles, no pickle, every setting is read.

`python tests/test_architecture.py` draws the picture of docs/architecture.md anew.
"""

import ast
import dataclasses
import importlib
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

from srit.commands.cli import COMMANDS

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "architecture.md"
MARKS = "<!-- drawn by tests/test_architecture.py -->\n```text\n", "```\n<!-- end -->"
# From below. A package imports from the layers below its own, or from its own layer.
LAYERS = (("runtime",), ("kernels",), ("config", "recipe", "help", "launch", "models"), ("text",),
          ("grading",), ("data",), ("losses",), ("generation", "training"), ("commands", "train"))
LAYER = {package: number for number, packages in enumerate(LAYERS) for package in packages}
FILES = [path for folder in ("kernels", "models", "srit", "train")
         for path in sorted((ROOT / folder).rglob("*.py"))]
TREES = {path: ast.parse(path.read_text(encoding="utf-8")) for path in FILES}


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts if parts[0] == "srit" else ("srit", *parts)).removesuffix(".__init__")


def package_of(module: str) -> str | None:
    """`generation` for srit.generation.engine; None for what is not ours, and for `srit` itself."""
    parts = module.split(".")
    return parts[1] if parts[0] == "srit" and len(parts) > 1 else None


MODULES = {module_of(path): path for path in FILES}


def imports(tree: ast.AST) -> list[str]:
    """Dotted names of everything imported, also inside functions."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative import"
            found += [f"{node.module}.{alias.name}" for alias in node.names]
    return found


IMPORTS = {path: imports(tree) for path, tree in TREES.items()}


def package_imports() -> dict[str, set[str]]:
    found = defaultdict(set)
    for path, names in IMPORTS.items():
        own = package_of(module_of(path))
        for name in names:
            if own and (other := package_of(name)) in LAYER and other != own:
                found[own].add(other)
    return found


def picture() -> str:
    """The packages from the top layer down, and what each imports."""
    imported = package_imports()
    lines = []
    for packages in reversed(LAYERS):
        for package in packages:
            below = sorted(imported[package], key=lambda other: (-LAYER[other], other))
            lines.append(f"{package:11} -> {', '.join(below)}" if below else package)
        lines.append("-" * 40)
    return "\n".join(lines[:-1]) + "\n"


def test_every_package_has_a_layer():
    assert {package_of(module) for module in MODULES} - {None} == set(LAYER)


def test_imports_flow_downward():
    wrong = [(package, other) for package, others in package_imports().items() for other in others
             if LAYER[other] > LAYER[package]]
    assert not wrong


def test_no_import_cycle_of_packages_or_files():
    """Imports inside functions count as well: they would only hide a cycle."""
    files = {name: {m for m in MODULES if m != name and any(
        n == m or n.startswith(m + ".") for n in IMPORTS[path])
        and not (m in name and name.startswith(m + "."))} for name, path in MODULES.items()}
    # `from srit.models import Decoder` also names the package `srit.models`, not what it imports.
    packages = {name for name, path in MODULES.items() if path.name == "__init__.py"}
    files = {name: others - packages for name, others in files.items() if name not in packages}
    for graph in (files, package_imports()):
        while graph:  # take away what imports nothing that is left
            leaves = {name for name, others in graph.items() if not others & graph.keys()}
            assert leaves, f"cycle among {sorted(graph)}"
            graph = {name: others for name, others in graph.items() if name not in leaves}


def test_the_picture_is_up_to_date():
    start, end = MARKS
    assert start + picture() + end in PAGE.read_text(encoding="utf-8"), (
        "run python tests/test_architecture.py")


def test_no_pickle_and_no_eval():
    for path, tree in TREES.items():
        roots = {name.split(".")[0] for name in IMPORTS[path]}
        assert not roots & {"pickle", "dill", "joblib", "cloudpickle"}, path
        for node in ast.walk(tree):
            if isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                assert called not in ("eval", "exec", "torch.load", "torch.save"), (path, called)


def test_every_module_imports():
    for module in MODULES:
        importlib.import_module(module)


def test_importing_has_no_side_effects():
    code = ("import sys, srit, srit.kernels, srit.models; "
            "assert 'transformers' not in sys.modules; assert 'trl' not in sys.modules; "
            "import torch; assert not torch.distributed.is_initialized()")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd="/")
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""


def settings_read() -> dict[str, set[str]]:
    """{config class: names} of every cfg.NAME, by the annotation of cfg in the function around it.

    self.cfg goes by the __init__ of its class; run.cfg, and a cfg without a type, count for "Any".
    """
    read = defaultdict(set)

    def visit(node: ast.AST, cfg: str, own: str) -> None:
        if isinstance(node, ast.ClassDef):
            inits = [f for f in node.body if isinstance(f, ast.FunctionDef) and f.name == "__init__"]
            own = next((found for f in inits if (found := annotation(f))), own)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            cfg = annotation(node) or "Any"
        if isinstance(node, ast.Attribute):
            owner = {"cfg": cfg, "self.cfg": own, "run.cfg": "Any"}.get(ast.unparse(node.value))
            if owner:
                read[owner].add(node.attr)
        for child in ast.iter_child_nodes(node):
            visit(child, cfg, own)

    def annotation(function: ast.FunctionDef) -> str | None:
        return next((ast.unparse(a.annotation) for a in function.args.args
                     if a.arg == "cfg" and a.annotation), None)

    for tree in TREES.values():
        visit(tree, "Any", "Any")
    return read


def test_every_setting_is_read():
    """A flag that nothing reads would be a promise not kept."""
    classes = [cls for _, cls, _ in COMMANDS.values()]
    by_name = {base.__name__: base for cls in classes for base in cls.__mro__}
    read = settings_read()
    assert len(classes) == len(COMMANDS) and set(read) - {"Any", ""} <= by_name.keys()
    unread = []
    for cls in classes:
        known = set(read["Any"])
        for name, names in read.items():
            if name in by_name and issubclass(cls, by_name[name]):
                known |= names
        known |= {"output_dir"}  # of every stage, by its Run
        unread += [f"{cls.__name__}.{field.name}" for field in dataclasses.fields(cls)
                   if field.name not in known and not field.name.endswith("_file")]
    assert not unread


if __name__ == "__main__":
    text = PAGE.read_text(encoding="utf-8")
    start, end = MARKS
    head, _, rest = text.partition(start)
    PAGE.write_text(head + start + picture() + end + rest.partition(end)[2], encoding="utf-8")
