"""What is built from the sources, installed elsewhere, works without them."""

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.distributed.processes import HANG

REPOSITORY = Path(__file__).resolve().parent.parent
TOP = ("CHANGELOG.md", "CITATION.cff", "CONTRIBUTING.md", "LICENSE", "MANIFEST.in", "README.md")
TOP += ("constraints.txt", "pyproject.toml", "setup.py")
PIP = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]


def run(*command, cwd, **variables):
    environment = {**os.environ, **{name: str(value) for name, value in variables.items()}}
    done = subprocess.run([*map(str, command)], cwd=cwd, env=environment, capture_output=True, text=True, timeout=HANG)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def sdist(tmp_path_factory):
    """Of a copy: building leaves folders beside the sources."""
    copy = tmp_path_factory.mktemp("sources")
    for name in ("configs", "jepa_scale", "scripts", "tests"):
        shutil.copytree(REPOSITORY / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in TOP:
        shutil.copy(REPOSITORY / name, copy)
    build = "import sys; from setuptools import build_meta; build_meta.build_sdist(sys.argv[1])"
    run(sys.executable, "-c", build, copy / "dist", cwd=copy)
    return next((copy / "dist").glob("*.tar.gz"))


@pytest.fixture(scope="module")
def wheel(sdist, tmp_path_factory):
    """From the source distribution, which so must be whole."""
    out = tmp_path_factory.mktemp("wheel")
    run(*PIP, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", out, sdist, cwd=out)
    return next(out.glob("*.whl"))


@pytest.mark.matrix
def test_the_source_distribution_has_what_a_cluster_needs(sdist):
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {*TOP, "scripts/launch_slurm.sbatch", "configs/ds/zero3.json", "jepa_scale/train.py"} <= names
    assert not [name for name in names if name.startswith(("tests/", "benchmarks/"))]


@pytest.mark.matrix
def test_the_wheel_has_the_package_and_the_configs(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        about = archive.read(next(name for name in names if name.endswith("METADATA"))).decode()
    of_repository = {f"jepa_scale/{p.relative_to(REPOSITORY)}" for p in (REPOSITORY / "configs").rglob("*.*")}
    assert of_repository <= names and "jepa_scale/py.typed" in names
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert not [name for name in names if not name.startswith(("jepa_scale/", "jepa_scale-"))]
    assert "License-Expression: Apache-2.0" in about


@pytest.mark.matrix
def test_an_installed_wheel_takes_a_newcomer_from_data_to_an_export(wheel, tmp_path):
    site, work = tmp_path / "site", tmp_path / "work"
    work.mkdir()
    run(*PIP, "install", "--no-deps", "--target", site, wheel, cwd=work)
    where = {"PYTHONPATH": site, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    file = run(sys.executable, "-c", "import jepa_scale; print(jepa_scale.__file__)", cwd=work, **where).strip()
    assert Path(file).is_relative_to(site)

    listed = run(site / "bin/jepa-scale", "config", "--list", cwd=work, **where)
    assert {p.stem for p in (REPOSITORY / "configs").glob("*.yaml")} == set(
        re.findall(r"^configs/(\w+)\.yaml", listed, re.M)
    )
    small = ["train.steps=2", "train.batch_size=16", "eval.max_facts=4", "eval.rank_facts=4", "log.progress=false"]
    train = [site / "bin/jepa-scale", "train", "--config", "configs/reversal.yaml", "engine.name=deepspeed", *small]
    run(*train, cwd=work, **where)
    config = yaml.safe_load((work / "runs/reversal/config.yaml").read_text())
    assert config["engine"]["deepspeed"].startswith("configs/ds/")  # found in the package
    assert (work / "runs/reversal/checkpoints/step_00000002/manifest.json").is_file()

    (work / "corpus").mkdir()
    for number in range(20):
        (work / f"corpus/{number}.txt").write_text(
            f"{number} waves rise and fall, and the boats stay where they are.\n" * 9
        )
    (work / "texts.txt").write_text("the waves\nthe boats\n")
    few = [
        "train.steps=2",
        "train.batch_tokens=2048",
        "train.micro_tokens=1024",
        "log.progress=false",
        "data.workers=0",
    ]
    tour = [
        [
            "data",
            "prepare",
            "corpus/",
            "--out",
            "shards",
            "--vocab-size",
            "300",
            "--valid-fraction",
            "0.1",
        ],
        ["train", "--config", "configs/tiny_corpus.yaml", "run.name=mine", "data.path=shards", *few],
        ["eval", "runs/mine"],
        ["generate", "runs/mine", "The waves", "--max-new-tokens", "3"],
        ["encode", "runs/mine", "texts.txt", "--out", "rows.npy"],
        ["convert", "runs/mine", "--to", "hf", "--out", "exported"],
        ["report", "runs/mine"],
        ["plan", "--config", "configs/jepa_8b.yaml", "--world-size", "8", "--no-search"],
        ["bench", "--list"],
        ["new", "objective", "my_objective"],
        ["train", "--config", "my_objective.yaml", *few],
    ]
    where["PYTHONPATH"] = os.pathsep.join([str(site), str(work)])  # my_objective.py is there
    program = [sys.executable, REPOSITORY / "tests/docs/run_commands.py", "results.jsonl"]
    subprocess.run(
        program,
        cwd=work,
        env={**os.environ, **{k: str(v) for k, v in where.items()}},
        input=json.dumps(tour),
        text=True,
        timeout=HANG,
    )
    results = [json.loads(line) for line in (work / "results.jsonl").read_text().splitlines()]
    assert [r["argv"] for r in results if r["code"] == 0] == tour, [r for r in results if r["code"]]


def test_what_is_installed_is_what_the_constraints_say():
    pins = {}
    for line in (REPOSITORY / "constraints.txt").read_text().splitlines():
        if line and not line.startswith("#"):
            pin = Requirement(line)
            pins[canonicalize_name(pin.name)] = pin.specifier
    declared = [Requirement(line) for line in metadata.requires("jepa-scale") or []]
    direct = {canonicalize_name(r.name) for r in declared} - {"flash-attn", "jepa-scale"}
    assert direct <= pins.keys(), "pin what pyproject.toml asks for"
    # Not all of sys.path: once imported, setuptools puts the packages that it carries with it there.
    places = sorted({sysconfig.get_path(name) for name in ("purelib", "platlib")})
    installed = {canonicalize_name(d.name): d.version for d in metadata.distributions(path=places)}
    assert direct & installed.keys()
    wrong = [f"{name} {installed[name]}" for name in pins if name in installed and installed[name] not in pins[name]]
    assert not wrong, f"not the versions of constraints.txt: {', '.join(sorted(wrong))}"


def test_the_image_copies_what_is_there_and_asks_for_extras_that_exist():
    text = (REPOSITORY / "Dockerfile").read_text()
    copied = [word for line in re.findall(r"^COPY --chown=trainer (.*)", text, re.M) for word in line.split()[:-1]]
    assert "jepa_scale" in copied and all((REPOSITORY / name).exists() for name in copied)
    extras = set(re.findall(r"\.\[(\w+)\]", text))
    assert extras and extras <= set(metadata.metadata("jepa-scale").get_all("Provides-Extra"))
    ignored = (REPOSITORY / ".dockerignore").read_text().split()
    assert not set(copied) & set(ignored)
    images = [line for line in text.splitlines() if "pip install" in line]
    assert all("--constraint constraints.txt" in line for line in images)


def test_the_citation_is_of_this_version():
    from jepa_scale import __version__

    citation = yaml.safe_load((REPOSITORY / "CITATION.cff").read_text())
    assert {"cff-version", "message", "title", "authors"} <= citation.keys()
    assert citation["version"] == __version__ and f"## {__version__}" in (REPOSITORY / "CHANGELOG.md").read_text()
