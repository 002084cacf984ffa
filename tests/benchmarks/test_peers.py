"""The programs that benchmarks/peers.py times do the same work: the same loss and gradient on the same samples."""

import json
import random

import pytest

from benchmarks.peer_programs.ours import Ours
from benchmarks.peer_programs.plain import PlainLoop
from benchmarks.peer_programs.trainer import HuggingFaceTrainer
from benchmarks.peers import experiment_of
from jepa_scale.distributed import comm

TINY = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
}
MAKERS = {
    "packed": lambda samples, folder: HuggingFaceTrainer(samples, "flatten", folder),
    "padded": lambda samples, folder: HuggingFaceTrainer(samples, 0, folder),
    "padded_64": lambda samples, folder: HuggingFaceTrainer(samples, 64, folder),
    "plain": lambda samples, folder: PlainLoop(samples),
}


@pytest.fixture(scope="module")
def ranks():
    yield comm.setup()
    comm.teardown()


@pytest.fixture(scope="module")
def ours(ranks, tmp_path_factory):
    folder = tmp_path_factory.mktemp("chat")
    rng = random.Random(0)
    rows = []
    for _ in range(40):
        asked, answer = ("".join(rng.choices("abcdef ", k=rng.randint(3, 20))) for _ in range(2))
        said = [{"role": "user", "content": f"x{asked}"}, {"role": "assistant", "content": f"y{answer}"}]
        rows.append(json.dumps({"messages": said}) + "\n")
    file = folder / "rows.jsonl"
    file.write_text("".join(rows), encoding="utf-8")
    changes = ["data.vocab_size=300", f"data.cache={folder / 'cache'}", "model.vocab_size=null"]
    program = Ours(experiment_of("chat", 1, 4, str(file), "", TINY, *changes), ranks, folder)
    yield program, folder
    program.close()


@pytest.mark.parametrize("name", MAKERS)
def test_peers_compute_our_loss_and_gradient(ours, name):
    program, folder = ours
    peer = MAKERS[name](program.samples, folder)
    for step in range(3):
        assert peer.look(step) == pytest.approx(program.look(step), rel=1e-4)
