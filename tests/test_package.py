"""The wheel works where there is neither the source tree nor git nor a compiler."""

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from importlib.metadata import Distribution
from pathlib import Path

import pytest
import yaml

import srit
from srit.commands.cli import COMMANDS

ROOT = Path(__file__).resolve().parent.parent
FILES = ("setup.py", "pyproject.toml", "README.md", "LICENSE", "MANIFEST.in", "CHANGELOG.md",
         "CITATION.cff", "constraints.txt")
BUILD = "import sys; from setuptools import build_meta; print(build_meta.build_{}(sys.argv[1]))"


def build(kind: str, tree: Path, directory: Path) -> Path:
    """The sdist or wheel of a source tree, built as pip does."""
    done = subprocess.run([sys.executable, "-c", BUILD.format(kind), str(directory)], cwd=tree,
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return directory / done.stdout.splitlines()[-1]


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """An empty directory with the wheel of the sdist in it, inside somebody's git repository."""
    folder = tmp_path_factory.mktemp("package")
    tree, site = folder / "tree", folder / "repository"
    for name in ("kernels", "models", "srit", "train", "runs"):
        shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in FILES:
        shutil.copy(ROOT / name, tree)
    with tarfile.open(build("sdist", tree, folder)) as archive:
        archive.extractall(folder / "sdist", filter="data")
    (source,) = (folder / "sdist").iterdir()
    with zipfile.ZipFile(build("wheel", source, folder)) as archive:
        archive.extractall(site)
    subprocess.run(["git", "init", "-q", str(site)], check=True)
    subprocess.run(["git", "-c", "user.name=a", "-c", "user.email=a", "commit", "-q", "--allow-empty",
                    "-m", "theirs"], cwd=site, check=True)
    return site


def python(site: Path, code: str, **env: str) -> str:
    """What the code prints, run in an empty directory with the installed package."""
    empty = site.parent / "empty"
    empty.mkdir(exist_ok=True)
    done = subprocess.run([sys.executable, "-c", code], cwd=empty, capture_output=True, text=True,
                          env={**os.environ, "PYTHONPATH": str(site), **env})
    assert done.returncode == 0, done.stderr[-2000:]
    assert not list(empty.iterdir())
    return done.stdout


def test_every_command_starts_and_the_demo_finds_its_recipe(installed):
    code = """if True:
        import importlib.util, sys
        from srit.commands.cli import COMMANDS, main
        from srit.commands.config import DEMO_RECIPE
        from srit.recipe import read_recipe
        print(DEMO_RECIPE, read_recipe(DEMO_RECIPE)["data"]["in_domain"])
        for name, (_, _, module) in COMMANDS.items():
            print(importlib.util.find_spec(module).origin)
            sys.argv = ["srit", name, "--help"]
            try:
                main()
            except SystemExit:
                pass
    """
    said = python(installed, code, PATH="").splitlines()
    assert said[0] == f"{installed}/srit/runs/demo.yaml ['stories']"
    modules = [line for line in said if line.endswith(".py")]
    assert len(modules) == len(COMMANDS) and all(m.startswith(f"{installed}/srit/") for m in modules)
    assert [line.split()[2] for line in said if line.startswith("usage: srit")] == list(COMMANDS)


def test_it_holds_all_of_the_source_tree(installed):
    for name, folder in (("kernels", "srit/kernels"), ("models", "srit/models"), ("srit", "srit"),
                         ("train", "srit/train"), ("runs", "srit/runs")):
        for file in (ROOT / name).rglob("*.*"):
            if file.suffix in (".py", ".jinja", ".yaml"):
                assert (installed / folder / file.relative_to(ROOT / name)).is_file(), file


def test_it_does_not_record_the_commit_of_the_repository_it_lies_in(installed):
    code = "from srit.runtime.run_dir import describe; print(describe())"
    said = python(installed, code)
    assert "'commit': None" in said and f"'srit': '{metadata(installed)['Version']}'" in said


def test_it_asks_for_torch_without_an_upper_bound(installed):
    needed = metadata(installed)["Requires-Dist"]
    assert "torch>=2.11" in needed and not any("<" in one for one in needed if "extra" not in one)


def metadata(site: Path) -> dict:
    (info,) = site.glob("*.dist-info")
    found = Distribution.at(info).metadata
    return {"Version": found["Version"], "Requires-Dist": found.get_all("Requires-Dist")}


def test_the_citation_is_of_this_version():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == srit.__version__ and citation["preferred-citation"]["year"] == 2024


def test_the_workflow_runs_what_ci_runs():
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "tests.yml").read_text())
    (job,) = workflow["jobs"].values()
    assert {"run": ".ci/run"} in job["steps"] and (ROOT / ".ci" / "run").is_file()
