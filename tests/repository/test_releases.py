"""What a release rests on: pinned actions, a lock with hashes, and pages whose links and tests exist."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

ROOT = Path(__file__).parents[2]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
PAGES = ("README.md", "SECURITY.md", "CHANGELOG.md", "CONTRIBUTING.md", "examples/README.md")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def lock() -> dict[str, list[tuple[str, str, int]]]:
    """The lock: for each package its versions, their environment markers, and how many hashes each has."""
    found: dict[str, list[tuple[str, str, int]]] = {}
    text = (ROOT / "requirements.lock").read_text(encoding="utf-8")
    for entry in re.sub(r"\\\n\s+", " ", text).splitlines():
        if entry.strip() and not entry.startswith("#"):
            pin, hashes = entry.split(" --hash=", 1)[0], entry.count("--hash=sha256:")
            requirement = Requirement(pin)
            (version,) = requirement.specifier
            assert version.operator == "==", entry
            found.setdefault(requirement.name, []).append((version.version, str(requirement.marker or ""), hashes))
    return found


def test_everything_in_the_lock_has_hashes():
    packages = lock()
    assert len(packages) > 40 and all(count for versions in packages.values() for *_, count in versions)


def test_the_lock_holds_every_dependency_in_a_version_that_is_asked_for():
    packages = lock()
    for line in PROJECT["dependencies"]:
        wanted = Requirement(line)
        assert wanted.name in packages, f"{wanted.name}: run the command in the first lines of requirements.lock"
        for version, *_ in packages[wanted.name]:
            assert SpecifierSet(str(wanted.specifier)).contains(version), line


def test_the_oldest_pillow_that_is_asked_for_can_do_what_is_used():
    """Before 10.1 there is no font of a size nor `has_transparency_data`; before 11.3 no AVIF, and no marks in WebP."""
    (pillow,) = [Requirement(line) for line in PROJECT["dependencies"] if line.startswith("pillow")]
    assert not any(pillow.specifier.contains(old) for old in ("10.0.1", "11.0.0")) and "11.3.0" in pillow.specifier


def test_workflows_pin_their_actions_by_commit_and_name_the_version():
    used = [line for path in WORKFLOWS for line in path.read_text(encoding="utf-8").splitlines() if "uses:" in line]
    assert len(used) > 5
    assert all(re.search(r"uses: [\w-]+/[\w./-]+@[0-9a-f]{40} # v\d+\.\d+\.\d+$", line) for line in used), used


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_workflows_may_only_read_unless_a_job_says_so(path: Path):
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert content["permissions"] == {"contents": "read"}
    for name, job in content["jobs"].items():
        assert job.get("permissions", {}) == ({"id-token": "write"} if name == "publish" else {}), name
        assert job["timeout-minutes"] <= 60
        assert "secrets." not in str(job)
        installs = re.findall(r"pip install ([^-&|'\n][^&|'\n]*)", str(job))
        assert all("==" in part for line in installs for part in line.split() if not part.startswith("-")
                   and not part.startswith("http")), installs  # fmt: skip


def test_ci_tests_every_supported_python():
    content = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text(encoding="utf-8"))
    assert content["jobs"]["test"]["strategy"]["matrix"]["python"] == ["3.11", "3.12", "3.13"]
    assert PROJECT["requires-python"] == ">=3.11"
    said = " ".join(str(step.get("run")) for job in content["jobs"].values() for step in job["steps"])
    for command in ("ruff check", "pyright", "pytest", "python -m build", "--require-hashes", "personalize quickstart"):
        assert command in said, command


def test_a_release_is_published_without_a_password_and_with_an_sbom():
    text = (ROOT / ".github" / "workflows" / "release.yml").read_text(encoding="utf-8")
    assert "cyclonedx-py requirements requirements.lock" in text and "password" not in text.split("jobs:")[1]


def test_pages_link_to_what_exists():
    for page in PAGES:
        path = ROOT / page
        text = re.sub(r"```.*?```", "", path.read_text(encoding="utf-8"), flags=re.DOTALL)
        links = re.findall(r"\]\((?!https?:|#|mailto:)([^)#\s]+)", text)
        assert not [link for link in links if not (path.parent / link).exists()], page


def test_the_tests_that_the_security_page_names_exist():
    named = re.findall(r"`(tests/[^`]+)`", (ROOT / "SECURITY.md").read_text(encoding="utf-8"))
    assert len(named) > 10 and not [name for name in named if not (ROOT / name).exists()]
