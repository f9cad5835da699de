"""The conda environment and the Apptainer image: what they do is what setup.py says, and works.

Neither tool can be had everywhere. Their commands run in a virtual environment in place of it, and
an image is built where Apptainer is installed.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest
import yaml

from helpers.paths import ROOT

DEFINITION = ROOT / "slurm" / "fedsp.def"
CONDA = ROOT / "slurm" / "environment.yml"
SETUP = (ROOT / "setup.py").read_text(encoding="utf-8")


def sections() -> dict[str, str]:
    """The sections of the definition by name; "" is its head."""
    parts = re.split(r"^%(\w+)\n", DEFINITION.read_text(encoding="utf-8"), flags=re.M)
    return {"": parts[0], **dict(zip(parts[1::2], parts[2::2]))}


def pip_lines() -> list[str]:
    """What conda hands to pip."""
    environment = yaml.safe_load(CONDA.read_text(encoding="utf-8"))
    [lines] = [part["pip"] for part in environment["dependencies"] if isinstance(part, dict)]
    return lines


def shell(script: str, folder: Path, environment: dict[str, str]) -> str:
    done = subprocess.run(
        ["sh", "-c", script],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_both_have_the_python_and_the_extras_of_the_setup():
    [python] = re.findall(r'python_requires=">=([\d.]+)"', SETUP)
    names = set(re.findall(r'"(\w+)": [A-Z]+[,}]', SETUP))
    assert f"From: python:{python}-slim" in sections()[""]
    assert f"python={python}" in yaml.safe_load(CONDA.read_text())["dependencies"]
    for text in (sections()["post"], "\n".join(pip_lines())):
        [extras] = re.findall(r"\.\[([\w,]+)\]", text)
        assert set(extras.split(",")) <= names and "constraints.txt" in text
    assert {"all", "local", "evaluate", "plot"} <= names


def test_the_extra_all_has_all_but_the_tests():
    [line] = re.findall(r"^ALL = \[(.*?)\]", SETUP, re.M)
    lists = set(re.findall(r"^([A-Z]+) = \[", SETUP, re.M)) - {"TEST", "ALL", "TOOLS", "BROWSER"}
    assert {f"*{name}" for name in lists} == set(line.split(", ")) and len(lists) >= 3


def test_the_sections_are_shell_and_their_files_exist():
    known = {"", "files", "post", "environment", "runscript", "test", "help"}
    assert set(sections()) == known
    for name in ("post", "environment", "runscript", "test"):
        subprocess.run(["sh", "-n", "-c", sections()[name]], check=True)
    copies = [line.split() for line in sections()["files"].strip().split("\n")]
    assert all((ROOT / source).exists() and target.startswith("/opt/") for source, target in copies)


@pytest.mark.slow
def test_their_commands_install_and_run_the_package(tmp_path):
    """In an environment with the dependencies of this one, but not the package, and no network."""
    setuptools = pytest.importorskip("setuptools")
    if int(setuptools.__version__.split(".")[0]) < 70:
        pytest.skip("setuptools is older than pyproject.toml wants it, and there is no network")
    home = tmp_path / "opt"
    for line in sections()["files"].strip().split("\n"):
        source, target = line.split()
        copy = shutil.copytree if (ROOT / source).is_dir() else shutil.copy
        path = home / target.removeprefix("/opt/")
        path.parent.mkdir(parents=True, exist_ok=True)
        copy(ROOT / source, path)
    venv.create(tmp_path / "env", with_pip=True)
    [site] = (tmp_path / "env" / "lib").glob("python*/site-packages")
    for old in site.glob("setuptools*"):
        shutil.rmtree(old)  # that of this environment takes its place
    (site / "others.pth").write_text(sysconfig.get_path("purelib"))
    environment = {
        **os.environ,
        "PATH": os.pathsep.join(
            [str(tmp_path / "env" / "bin"), str(Path(sys.executable).parent), os.environ["PATH"]]
        ),
        "LD_LIBRARY_PATH": f"{sys.prefix}/lib",  # where the wheel of an MPI has put it
        "PIP_NO_INDEX": "1",
        "PIP_NO_BUILD_ISOLATION": "0",  # which means: no isolation
        "OMP_NUM_THREADS": "1",
    }
    environment.pop("PYTHONPATH", None)
    post = sections()["post"].replace("/opt/", f"{home}/")
    shell(post, tmp_path, environment)
    command = tmp_path / "env" / "bin" / "fedsp-mpi"
    assert command.exists()
    for words in ("--help", "report --help"):
        module = shell(f"python -m fedsp_mpi {words}", tmp_path, environment)
        assert shell(f"fedsp-mpi {words}", tmp_path, environment) == module != ""
    where = shell("python -c 'import fedsp_mpi; print(fedsp_mpi.__file__)'", tmp_path, environment)
    assert where.startswith(str(site)) and (site / "fedsp_mpi" / "py.typed").exists()
    assert "complete, 1 round" in shell(sections()["test"], tmp_path, environment)
    # conda's part for pip, in the folder of its file
    (home / "fedsp_mpi" / "slurm").mkdir()
    (home / "fedsp_mpi" / "slurm" / "pip.txt").write_text("\n".join(pip_lines()))
    shell("pip install --dry-run -r pip.txt", home / "fedsp_mpi" / "slurm", environment)


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("apptainer"), reason="there is no Apptainer")
def test_the_image_is_built_and_tested(tmp_path):
    """`apptainer build` runs the section %test itself."""
    image = tmp_path / "fedsp.sif"
    subprocess.run(["apptainer", "build", "--fakeroot", image, DEFINITION], cwd=ROOT, check=True)
    done = subprocess.run(["apptainer", "run", image, "--help"], capture_output=True, check=True)
    assert b"usage: fedsp_mpi" in done.stdout
