"""What a first user has: what `make dist` builds, in a fresh environment, with what it requires and no extra.

The environment holds links to the installed packages that `pip install kvfold` would bring, found by following the
requirements, so nothing is downloaded; kvfold itself is installed from the wheel.
"""

import os
import subprocess
import sys
import tarfile
import tomllib
import venv
import zipfile
from importlib.metadata import distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from kvfold.version import __version__

ROOT = Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.installed


def required(texts, found):
    """Find the distributions that these requirements bring, and what those require."""
    for wanted in map(Requirement, texts):
        name = canonicalize_name(wanted.name)
        if name not in found and (wanted.marker is None or wanted.marker.evaluate({"extra": ""})):
            found[name] = distribution(name)
            required(found[name].requires or (), found)
    return found


def link(held, site):
    """Link the files of one distribution into a folder of packages."""
    for file in held.files or ():
        first = file.parts[0]
        if first not in ("..", "__pycache__") and not (site / first).exists():
            os.symlink(Path(held.locate_file(first)).resolve(), site / first)


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The folder with the wheel and the sdist, built as `make dist` builds them."""
    place = tmp_path_factory.mktemp("dist")
    subprocess.run([sys.executable, "-m", "hatchling", "build", "--directory", place], cwd=ROOT, check=True)
    return place


@pytest.fixture(scope="module")
def installed(built, tmp_path_factory):
    """The `kvfold` command of a fresh environment."""
    place = tmp_path_factory.mktemp("installed")
    venv.create(place / "env", with_pip=False)
    python = place / "env" / "bin" / "python"
    site = next((place / "env" / "lib").glob("python3*/site-packages"))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    for held in required(project["dependencies"], {}).values():
        link(held, site)
    wheel = next(built.glob("kvfold-*.whl"))
    install = [sys.executable, "-m", "pip", "--python", python, "--quiet", "install", "--no-deps", "--no-index"]
    subprocess.run([*install, wheel], check=True)
    return place / "env" / "bin" / "kvfold"


@pytest.fixture
def said(installed, tmp_path):
    """Run a verb in an empty folder; its standard output."""

    def run(*words, lines=""):
        clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        ended = subprocess.run(
            [installed, *words], cwd=tmp_path, env=clean, input=lines, capture_output=True, text=True, check=False
        )
        assert ended.returncode == 0, ended.stderr
        assert "Traceback" not in ended.stderr
        return ended.stdout

    return run


def test_the_environment_holds_no_extra(installed):
    program = (
        "import importlib.util as u; print([n for n in ('ray', 'gguf', 'pytest', 'accelerate') if u.find_spec(n)])"
    )
    held = subprocess.run([installed.with_name("python"), "-c", program], capture_output=True, text=True, check=True)
    assert held.stdout.strip() == "[]"


def test_both_archives_are_of_this_version_and_hold_models_adapters_and_licence(built):
    version = __version__
    wheel = zipfile.ZipFile(built / f"kvfold-{version}-py3-none-any.whl").namelist()
    with tarfile.open(built / f"kvfold-{version}.tar.gz") as opened:
        source = [name.removeprefix(f"kvfold-{version}/") for name in opened.getnames()]
    for card in (ROOT / "src" / "kvfold" / "models").glob("*/adapters/*/README.md"):
        folder = card.parent.relative_to(ROOT / "src")
        for name in ("README.md", "adapter.json", "adapter.safetensors"):
            assert f"{folder}/{name}" in wheel
            assert f"src/{folder}/{name}" in source
    assert f"kvfold-{version}.dist-info/licenses/LICENSE" in wheel
    assert {"LICENSE", "CITATION.cff", "CHANGELOG.md", "Makefile", "docs/advise.md", "pyproject.toml"} <= set(source)
    assert not [name for name in wheel if not name.startswith(("kvfold/", f"kvfold-{version}.dist-info/"))]


def test_a_demo_ends_with_its_page(said, tmp_path):
    assert "written: kvfold-report/report.html" in said("demo", "--model", "tiny", "--n", "4")
    assert "<svg" in (tmp_path / "kvfold-report" / "report.html").read_text()


def test_a_benchmark_and_its_report(said, tmp_path):
    said("bench", "chat", "--n", "2", "--plans", "int8", "--out", "runs", "--threads", "1")
    assert "written: page/report.html" in said("report", "runs", "--out", "page")
    assert "int8" in said("report", "runs", "--markdown")
    said("report", "runs", "--picture", "curve.svg")
    assert (tmp_path / "curve.svg").read_text().startswith("<svg")


def test_a_chat_is_saved_and_inspected(said):
    options = ("--model", "tiny", "--max-new-tokens", "4")
    assert said("chat", *options, "--save", "anna.kvfold", lines="Anna lives in Turin.\n").strip()
    assert "int8(rotate=True)" in said("inspect", "anna.kvfold")


def test_the_other_verbs(said, tmp_path):
    (tmp_path / "text.txt").write_text("My sister Anna, who lives by the sea, has a grey cat. " * 60)
    said("ranks", "--text", "text.txt", "--plan", "snapkv(keep=0.5)", "--tokens", "64")
    said("delimiters", "--text", "text.txt", "--characters", "2500")
    said("train", "base", "--help")
    assert "take int8(rotate=True): " in said("advise", "--memory", "5MB", "--context", "4096", "--forecast")
