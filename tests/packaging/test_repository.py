"""What stands around the code: the citation, the forms and the workflows say what is true."""

from __future__ import annotations

import importlib
import re
import sys
from pathlib import Path

import pytest
import yaml

import ral_kernels

ROOT = Path(__file__).resolve().parents[2]
URL = "https://github.com/ral-kernels/ral_kernels"


def test_citation() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == ral_kernels.__version__
    assert citation["repository-code"] == citation["url"] == URL


@pytest.mark.skipif(sys.version_info < (3, 11), reason="tomllib needs Python 3.11")
def test_project_names_what_is_there() -> None:
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["urls"]["Homepage"] == URL
    module, _, function = project["scripts"]["ral"].partition(":")
    assert callable(getattr(importlib.import_module(module), function))
    hub = tomllib.loads((ROOT / "hub" / "build.toml").read_text())
    assert hub["general"]["name"] == project["name"]
    assert (ROOT / "hub" / "torch-ext" / ral_kernels.__name__ / "__init__.py").is_file()


def test_the_repository_has_one_address() -> None:
    names = ["README.md", "SECURITY.md", "CITATION.cff", "CONTRIBUTING.md", "pyproject.toml"]
    texts = [(ROOT / name).read_text() for name in names]
    texts += [path.read_text() for path in (ROOT / ".github").rglob("*.yml")]
    found = re.findall(r"github\.com/[\w-]*ral[\w-]*/[\w.-]+", "\n".join(texts))
    assert found and {f"https://{address}" for address in found} == {URL}


def test_workflows_run_what_everyone_can_run() -> None:
    for name, commands in (("ci", [".ci/run"]), ("wheel", ["make wheel"])):
        workflow = yaml.safe_load((ROOT / ".github" / "workflows" / f"{name}.yml").read_text())
        (job,) = workflow["jobs"].values()
        assert [step["run"] for step in job["steps"] if "run" in step] == commands
        assert workflow["permissions"] == {"contents": "read"}
    assert (ROOT / ".ci" / "run").stat().st_mode & 0o111


def test_the_form_of_a_bug_asks_for_the_installation() -> None:
    form = yaml.safe_load((ROOT / ".github" / "ISSUE_TEMPLATE" / "bug.yml").read_text())
    info = next(field for field in form["body"] if field["attributes"].get("render") == "json")
    assert "`python -m ral_kernels info --json`" in info["attributes"]["label"]
    assert info["validations"]["required"]
