"""Recurrences and convolutions on packed segments, with plain kernels that get the boundaries.

The kernels in ``kernels/`` stand for causal-conv1d, flash-linear-attention and mamba-ssm, which run on GPUs alone. transformers chooses
them when it is imported, so each trial is a process of its own.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from jepa_scale.models.families.neighbours import boundaries, reads_neighbours
from jepa_scale.models.families.probe import probe
from jepa_scale.models.loading import build_backbone
from jepa_scale.models.options import ModelOptions
from jepa_scale.packing import SegmentTable
from jepa_scale.utils.errors import InputError
from tests.models.test_token_rows import FAMILIES as SMALL
from tests.models.test_token_rows import make
from tests.text_runs import config_file

KERNELS = Path(__file__).parent / "kernels"
NAMES = ("qwen3_next", "lfm2", "mamba2", "falcon_h1")


def with_kernels(*arguments, **environment):
    """Run a program with the kernels, and return what it prints last."""
    path = os.pathsep.join([str(KERNELS), *sys.path])
    variables = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **environment}
    ran = subprocess.run([sys.executable, *arguments], env=variables, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    return json.loads(ran.stdout.splitlines()[-1])


def test_the_boundaries_of_segments():
    found = boundaries(SegmentTable.from_lengths([3, 1, 2]))
    assert found["cu_seq_lens_q"].tolist() == [0, 3, 4, 6]
    assert found["seq_idx"].tolist() == [[0, 0, 0, 1, 2, 2]]
    assert {x.dtype for x in found.values()} == {torch.int32}


@pytest.mark.parametrize(("name", "reads"), [("qwen3_next", True), ("lfm2", True), ("mamba2", True), ("llama", False)])
def test_which_decoders_read_neighbours(name, reads):
    assert reads_neighbours(make(name).decoder) is reads


def test_packed_segments_are_those_of_padded_rows():
    """Loss and every gradient, as in evaluation and in training, and the states of branches, after each block too."""
    found = with_kernels(KERNELS / "compare.py", *NAMES)
    for name in NAMES:
        assert found[name]["branches"] < 1e-5, name
        for mode in ("training=False", "training=True"):
            assert found[name][mode]["loss"] < 1e-5 and found[name][mode]["gradients"] < 1e-4, (name, mode)


def test_kernels_that_ignore_the_boundaries_are_noticed():
    found = with_kernels(KERNELS / "compare.py", *NAMES, IGNORE_SEGMENTS="1")
    for name in NAMES:
        message = found[name]["refused"]
        assert "does not compute on packed segments what it computes on each alone: block 1 of 3" in message
        assert message.endswith("; set model.packing: padded")


def test_a_mixer_without_the_boundaries_is_noticed():
    """Jamba's decoder does not pass the boundaries on."""
    assert "block 1 of 3 is the first to differ" in with_kernels(KERNELS / "compare.py", "jamba")["jamba"]["refused"]


@pytest.mark.parametrize("name", NAMES)
def test_without_kernels_padded_rows_are_the_way(name):
    with pytest.raises(InputError, match="ForCausalLM .* on packed segments .*; set model.packing: padded$"):
        probe(make(name, "packed"), torch.device("cpu"), torch.float32)


RUN = """
import json, sys, jepa_scale
run = jepa_scale.train(sys.argv[1])
losses = [row["loss"] for row in run.rows if row["split"] == "train"]
states = run.load().encode(["the wave of a ship", "a cow"]).tolist()
try:
    run.load().generate(["a cow"], temperature=1.0)
except ValueError as error:
    print(json.dumps([losses, states, str(error)]))
"""


def test_a_run_of_packed_segments_is_that_of_padded_rows(tmp_path):
    """Its losses and its embeddings; and a recurrent state cannot go back, so no token is drawn or drafted with it."""
    found = {}
    for packing in ("packed", "padded"):
        model = {"family": "huggingface", "packing": packing, "config": SMALL["qwen3_next"]}
        config = config_file(tmp_path, packing, model=model, train={"steps": 4, "batch_size": 8})
        found[packing] = with_kernels("-c", RUN, config)
    (losses, states, refused), (their_losses, their_states, _) = found["packed"], found["padded"]
    assert len(losses) == 4 and losses == pytest.approx(their_losses, rel=1e-5)
    torch.testing.assert_close(torch.tensor(states), torch.tensor(their_states), atol=1e-4, rtol=1e-3)
    assert refused == "temperature: needs a cache that can go back, which a recurrence does not have; leave it out"


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("name", "package", "sizes"),
    [
        ("lfm2", "causal_conv1d", {}),
        ("qwen3_next", "fla", dict(head_dim=32, linear_key_head_dim=32, linear_value_head_dim=32)),
        ("mamba2", "mamba_ssm", dict(num_heads=8, head_dim=32, state_size=64, chunk_size=64)),
    ],
)
def test_the_packages_on_a_gpu(name, package, sizes):
    for needed in ("causal_conv1d", package):
        pytest.importorskip(needed)
    config = {**SMALL[name], "hidden_size": 128, **sizes}
    backbone = build_backbone(ModelOptions(family="huggingface", config=config), 50)
    probe(backbone, torch.device("cuda"), torch.bfloat16)
