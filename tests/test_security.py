"""What docs/security.md promises: who runs code that comes with data, and where secrets go.

Single promises have their tests by the source: names in an index (tests/data/shards/test_locate.py), pickles in checkpoints
(tests/checkpoint/test_store.py), object arrays in shards (tests/data/shards/test_reader.py).
"""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

REPOSITORY = Path(__file__).resolve().parent.parent
FILES = sorted([*(REPOSITORY / "jepa_scale").rglob("*.py"), *(REPOSITORY / "scripts").glob("*.py")])

ALLOWED = {
    "jepa_scale/__init__.py": {"import_module": "jepa_scale/train.py"},
    "jepa_scale/cli/main.py": {"import_module": "modules of ours, from a table"},
    "jepa_scale/convert/standalone.py": {"import_module": "modules of ours, whose source is written into an export"},
    "jepa_scale/utils/importing.py": {"import_module": "module:Class of a config, flag or task, which the user writes"},
    "jepa_scale/telemetry/__init__.py": {"import_module": "modules of ours, from a table"},
    "jepa_scale/checkpoint/__init__.py": {"import_module": "modules of ours, from a table"},
    "jepa_scale/checkpoint/restore.py": {
        "pickle": "the name of an exception",
        "torch.load": "weights_only",
    },
    "jepa_scale/checkpoint/store.py": {"pickle": "an unpickler that makes dataclasses of DCP alone"},
    "jepa_scale/data/sampling/loader.py": {"pickle": "between a rank and its own loader processes"},
    "jepa_scale/data/files/download.py": {
        "gopen": "a shell for pipe: URLs, which the user writes; names in them are checked"
    },
}
"""File → what it may use, and why that runs nobody else's code."""


def uses(tree: ast.AST) -> set[str]:
    """Names of what can run code that came with data."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names} & {"pickle", "marshal", "shelve", "dill", "cloudpickle"}
        if isinstance(node, ast.ImportFrom) and node.module in ("pickle", "marshal", "shelve", "dill", "cloudpickle"):
            found.add(node.module)
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func)
        keywords = {word.arg: ast.unparse(word.value) for word in node.keywords}
        if name in ("eval", "exec", "__import__", "os.system", "os.popen"):
            found.add(name)
        if name.endswith("import_module"):
            found.add("import_module")
        if name == "torch.load":
            found.add("torch.load" if keywords.get("weights_only") == "True" else "torch.load with pickle")
        if name in ("np.load", "numpy.load") and keywords.get("allow_pickle") != "False":
            found.add("np.load with pickle")
        if name.startswith("yaml.") and "load" in name and not name.startswith("yaml.safe_load"):
            found.add(name)
        if name.rsplit(".", 1)[-1] in ("extractall", "extract", "unpack_archive"):
            found.add("extract")
        if name.rsplit(".", 1)[-1] == "gopen":
            found.add("gopen")
        if keywords.get("shell") == "True":
            found.add("a shell")
        if keywords.get("trust_remote_code") == "True":
            found.add("trust_remote_code=True")
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(REPOSITORY)))
def test_nothing_new_runs_code_that_came_with_data(path):
    allowed = ALLOWED.get(str(path.relative_to(REPOSITORY)), {})
    assert uses(ast.parse(path.read_text())) <= allowed.keys()


def test_the_list_of_exceptions_is_no_longer_than_needed():
    for name, allowed in ALLOWED.items():
        assert uses(ast.parse((REPOSITORY / name).read_text())) == allowed.keys(), name


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("import numpy as np\nnp.load(f)", "np.load with pickle"),
        ("torch.load(f)", "torch.load with pickle"),
        ("torch.load(f, weights_only=False)", "torch.load with pickle"),
        ("yaml.load(f, Loader=yaml.Loader)", "yaml.load"),
        ("subprocess.run(c, shell=True)", "a shell"),
        ("AutoModel.from_pretrained(n, trust_remote_code=True)", "trust_remote_code=True"),
        ("tarfile.open(f).extractall(d)", "extract"),
        ("from pickle import loads", "pickle"),
    ],
)
def test_the_audit_sees(text, found):
    assert uses(ast.parse(text)) == {found}


def test_whatever_comes_from_elsewhere_is_not_trusted_by_default():
    from jepa_scale.data.prepare.base import PrepareOptions
    from jepa_scale.models.options import ModelOptions

    assert ModelOptions.model_fields["trust_remote_code"].default is False
    assert PrepareOptions.model_fields["trust_remote_code"].default is False


def test_an_api_key_is_in_no_file_of_a_run_and_in_no_line(tmp_path):
    key = "0123456789abcdef" * 2 + "01234567"  # as long as W&B's
    values = {
        "run": {"dir": str(tmp_path / "runs"), "name": "small"},
        "engine": {"threads": 1},
        "model": {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2},
        "data": {"source": "reversal", "entities_a": 50, "comb": 5, "relations": 2},
        "objective": {"name": "concept", "bridge_width": 16},
        "train": {"steps": 2, "batch_size": 16, "log_every": 1},
        "eval": {"max_facts": 4, "rank_facts": 4},
        "log": {"wandb": True, "tensorboard": True},
    }
    config = tmp_path / "small.yaml"
    config.write_text(yaml.safe_dump(values))
    secrets = {"WANDB_API_KEY": key, "HF_TOKEN": f"hf_{key}", "WANDB_MODE": "offline"}
    environment = {**os.environ, **secrets, "PYTHONPATH": str(REPOSITORY), "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "jepa_scale.train", "--config", str(config)]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, timeout=300)
    assert done.returncode == 0, done.stderr.decode()
    assert key.encode() not in done.stdout + done.stderr
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert any(path.suffix == ".wandb" for path in files) and any("tfevents" in path.name for path in files)
    assert json.loads((tmp_path / "runs/small/summary.json").read_text())["steps"] == 2
    assert not [str(path) for path in files if key.encode() in path.read_bytes()]
