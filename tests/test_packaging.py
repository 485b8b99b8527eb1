"""What setup.py says of the package, and what is in it when it is built."""

import email
import os
import re
import runpy
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path
from unittest.mock import patch

import pytest

import hf_distill

ROOT = Path(__file__).parent.parent
RELATIVE_LINK = re.compile(r"\]\((?!https?://|#)([^)]*)\)")


@pytest.fixture(scope="module")
def metadata() -> dict:
    with patch("setuptools.setup") as setup:
        runpy.run_path(str(ROOT / "setup.py"))
    return setup.call_args.kwargs


def test_there_is_one_version(metadata):
    assert metadata["version"] == hf_distill.__version__
    assert re.fullmatch(r"\d+\.\d+\.\d+", hf_distill.__version__)


def test_the_description_has_the_links_of_the_readme_with_their_address(metadata):
    readme, description = (ROOT / "README.md").read_text(), metadata["long_description"]
    links = RELATIVE_LINK.findall(readme)
    assert len(links) > 20
    assert all((ROOT / link.partition("#")[0]).exists() for link in links)
    assert RELATIVE_LINK.findall(description) == []
    for link in links:
        kind = "raw" if link.endswith(".png") else "blob"
        assert f"]({metadata['url']}/{kind}/main/{link})" in description
    assert len(description.splitlines()) == len(readme.splitlines())


def test_every_address_is_in_the_one_repository(metadata):
    assert all(address.startswith(metadata["url"]) for address in metadata["project_urls"].values())


def test_the_oldest_constraints_are_the_lower_bounds(metadata):
    extras = metadata["extras_require"]
    required = [*metadata["install_requires"], *extras["test"]]
    lowest = dict(re.match(r"([\w-]+)(?:>=([\d.]+))?", text).groups() for text in required)
    constraints = dict(line.split("==") for line in lines(ROOT / "constraints-oldest.txt"))
    assert {name for name, bound in lowest.items() if bound} - {"setuptools"} == set(constraints)
    for name, version in constraints.items():
        assert re.sub(r"(\.0)*$", "", version) == re.sub(r"(\.0)*$", "", lowest[name]), name


def lines(path: Path) -> list[str]:
    return [line for line in path.read_text().splitlines() if line and not line.startswith("#")]


def run(*command, cwd) -> str:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run([*map(str, command)], cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> tuple[Path, Path]:
    """A source distribution of the files that git knows, and a wheel made from that alone."""
    folder = tmp_path_factory.mktemp("package")
    source = folder / "source"
    files = run("git", "ls-files", "--cached", "--others", "--exclude-standard", cwd=ROOT).splitlines()
    for file in files:
        if (ROOT / file).is_file():
            (source / file).parent.mkdir(parents=True, exist_ok=True)
            (source / file).write_bytes((ROOT / file).read_bytes())
    build = "import sys; from setuptools import build_meta; print(build_meta.build_{}(sys.argv[1]))"
    run(sys.executable, "-c", build.format("sdist"), folder, cwd=source)
    (sdist,) = folder.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        archive.extractall(folder / "sdist", filter="data")
    (unpacked,) = (folder / "sdist").iterdir()
    run(sys.executable, "-c", build.format("wheel"), folder, cwd=unpacked)
    (wheel,) = folder.glob("*.whl")
    return sdist, wheel


def package_files() -> set[str]:
    """What belongs to the package in the work tree."""
    files = (path for path in (ROOT / "hf_distill").rglob("*") if path.is_file() and path.suffix != ".pyc")
    return {str(path.relative_to(ROOT)) for path in files}


@pytest.mark.slow
def test_the_distributions_hold_the_package_and_nothing_else(built):
    sdist, wheel = built
    assert {"hf_distill/py.typed", "hf_distill/demo/teacher/model.safetensors"} <= package_files()
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
        info = {name.split(".dist-info/")[1] for name in archive.namelist() if ".dist-info/" in name}
    assert names == package_files()
    info = {name.removeprefix("licenses/") for name in info}
    assert info == {"LICENSE", "METADATA", "RECORD", "WHEEL", "entry_points.txt", "top_level.txt"}
    with tarfile.open(sdist) as archive:
        parts = (member.name.partition("/")[2] for member in archive.getmembers() if member.isfile())
        names = {name for name in parts if ".egg-info/" not in name}
    others = {"LICENSE", "MANIFEST.in", "PKG-INFO", "README.md", "pyproject.toml", "setup.cfg", "setup.py"}
    assert names == package_files() | others


@pytest.mark.slow
def test_the_metadata_says_what_a_package_index_shows(built, metadata):
    with zipfile.ZipFile(built[1]) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith("METADATA"))
        found = email.message_from_bytes(archive.read(name))
    assert (found["Name"], found["Version"]) == ("hf_distill", hf_distill.__version__)
    assert found["Description-Content-Type"].startswith("text/markdown")
    assert found.get_payload(decode=True).decode().strip() == metadata["long_description"].strip()
    assert {text.split(", ")[0] for text in found.get_all("Project-URL")} >= set(metadata["project_urls"])
    assert "Typing :: Typed" in found.get_all("Classifier")
    required = {text for text in found.get_all("Requires-Dist") if "extra ==" not in text}
    assert {re.match(r"[\w-]+", text).group() for text in required} == {
        re.match(r"[\w-]+", text).group() for text in metadata["install_requires"]
    }


@pytest.mark.slow
def test_the_wheel_works_in_a_fresh_environment(built, tmp_path):
    """The package comes from the wheel, the libraries underneath from the environment of the tests."""
    run(sys.executable, "-m", "venv", "--without-pip", tmp_path / "fresh", cwd=tmp_path)
    python = tmp_path / "fresh" / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index"]
    run(*pip, built[1], cwd=tmp_path)
    (site,) = (tmp_path / "fresh").glob("lib/*/site-packages")
    (site / "libraries.pth").write_text("\n".join(path for path in sys.path if path.endswith("-packages")))
    (tmp_path / "look.py").write_text(
        "import hf_distill\n"
        "from hf_distill.demo import TEACHER, AutoModelForCausalLM\n"
        "size = AutoModelForCausalLM.from_pretrained(TEACHER).num_parameters()\n"
        "print(hf_distill.__version__, hf_distill.__file__, TEACHER, size)\n"
    )
    version, package, teacher, size = run(python, "look.py", cwd=tmp_path).split()
    assert (version, int(size) > 0) == (hf_distill.__version__, True)
    assert package.startswith(str(site))
    assert teacher.startswith(str(site))
    assert "kd" in run(tmp_path / "fresh" / "bin" / "hf-distill", "--help", cwd=tmp_path)
