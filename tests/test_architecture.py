"""Rules of the house, read from the source."""

import ast
import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LAYERS = {"kernels": 0, "models": 1, "srit": 2, "train": 3}
FILES = [p for folder in LAYERS for p in sorted((ROOT / folder).rglob("*.py"))]


def layer_of(module: str) -> int | None:
    parts = module.split(".")
    if parts[0] != "srit":
        return None
    return LAYERS.get(parts[1], 2) if len(parts) > 1 else 2


def imports(tree: ast.AST) -> list[str]:
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative import"
            found += [f"{node.module}.{alias.name}" for alias in node.names]
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_flow_downward(path):
    own = LAYERS[path.relative_to(ROOT).parts[0]]
    for name in imports(ast.parse(path.read_text())):
        layer = layer_of(name)
        assert layer is None or layer <= own, f"{path.name} imports {name} from above"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_no_pickle_and_no_eval(path):
    names = imports(ast.parse(path.read_text()))
    assert not [n for n in names if n.split(".")[0] in ("pickle", "dill", "joblib", "cloudpickle")]
    for call in re.findall(r"\b(torch\.load|torch\.save|eval|exec)\(", path.read_text()):
        if call in ("eval", "exec"):
            continue
        raise AssertionError(f"{path.name} calls {call}")
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            assert node.func.id not in ("eval", "exec")


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_every_module_imports(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    module = ".".join(parts if parts[0] == "srit" else ("srit", *parts))
    importlib.import_module(module.removesuffix(".__init__"))


def test_importing_has_no_side_effects():
    code = ("import sys, srit, srit.kernels, srit.models; "
            "assert 'transformers' not in sys.modules; assert 'trl' not in sys.modules; "
            "import torch; assert not torch.distributed.is_initialized()")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd="/")
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""


def test_every_setting_is_read():
    """A flag that nothing reads would be a promise not kept."""
    import dataclasses

    from srit import config

    # config.py names every setting as self.NAME, to check it; what it uses itself is cfg.NAME.
    source = "\n".join(p.read_text().replace("self.", "") if p.name == "config.py" else p.read_text()
                       for p in FILES)
    for cls in (config.SFTConfig, config.DPOConfig, config.SampleConfig, config.EvalConfig,
                config.PairConfig):
        for field in dataclasses.fields(cls):
            assert re.search(rf"\.{field.name}\b", source), f"{cls.__name__}.{field.name}"
