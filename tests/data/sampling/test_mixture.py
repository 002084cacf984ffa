from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jepa_scale.data import load_data, parse_data
from jepa_scale.utils.errors import InputError
from tests.data.corpus import write_text


def part(path: Path, **keys: Any) -> dict[str, Any]:
    return {"source": "text", "path": str(path), "max_length": 16, "long": "split", **keys}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    a, b = tmp_path_factory.mktemp("a"), tmp_path_factory.mktemp("b")
    write_text(a, [5, 9], seed=1)
    write_text(b, [30], seed=2, longest=12)
    return a, b


def mixture(*parts: dict[str, Any]) -> Any:
    return load_data(parse_data({"source": "mixture", "parts": list(parts)}))


def test_weights_are_shares_of_the_tokens(folders: tuple[Path, Path]) -> None:
    data = mixture(part(folders[0], weight=3, name="big"), part(folders[1], weight=1, name="small"))
    order = data.order(5)
    _, samples = order.take(0, 40_000)
    sizes = data.train.sizes(samples)
    from_big = samples < len(data.parts["big"].train)
    assert sizes[from_big].sum() / sizes.sum() == pytest.approx(0.75, abs=0.01)
    assert sizes.mean() == pytest.approx(data.train.mean_size, rel=0.01)
    assert sizes.max() <= data.train.max_size


def test_every_part_goes_through_its_own_epochs(folders: tuple[Path, Path]) -> None:
    data = mixture(part(folders[0]), part(folders[1]))
    epochs, samples = data.order(5).take(0, 2000)
    first = len(data.parts["part0"].train)
    for low, high in ((0, first), (first, len(data.train))):
        here = (samples >= low) & (samples < high)
        whole = int(epochs[here].max())  # all epochs but the last are complete
        counts = Counter(zip(epochs[here].tolist(), samples[here].tolist(), strict=True))
        assert {c for (e, _), c in counts.items() if e < whole} == {1}
        assert sum(e < whole for e, _ in counts) == whole * (high - low)


def test_examples_are_those_of_the_parts(folders: tuple[Path, Path]) -> None:
    data = mixture(part(folders[0], name="a"), part(folders[1], name="b"))
    parts = [data.parts["a"].train, data.parts["b"].train]
    expected = [example.tokens.tolist() for examples in parts for example in examples]
    assert [data.train[i].tokens.tolist() for i in range(len(data.train))] == expected
    assert data.train.sizes(np.arange(len(data.train))).tolist() == [len(t) for t in expected]
    with pytest.raises(IndexError):
        data.train[len(data.train)]
    assert set(data.splits) == {"a_valid", "b_valid"}
    assert data.vocab_size == 40
    assert data.counts["a_samples"] == 14


def test_the_fingerprint_knows_parts_and_weights(folders: tuple[Path, Path]) -> None:
    a, b = part(folders[0]), part(folders[1])
    prints = {mixture(a, b).fingerprint, mixture(b, a).fingerprint, mixture({**a, "weight": 2}, b).fingerprint}
    assert len(prints) == 3
    assert mixture(a, b).fingerprint in prints


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight": 0}, r"^data.parts.1.weight: .*above 0, got 0"),
        ({"name": "part0"}, r"^data.parts.1.name: 'part0' is also the name of another part"),
        ({"max_lenght": 3}, r"^data.parts.1.max_lenght: unknown key; did you mean 'max_length'"),
        ({"source": "reversal"}, r"^data.parts.1.(path|long|max_length): unknown key"),
        ({"source": "txt"}, r"^data.parts.1.source: unknown source 'txt'; did you mean 'text'"),
    ],
)
def test_bad_parts_are_named(folders: tuple[Path, Path], change: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        mixture(part(folders[0]), part(folders[1], **change))


def test_parts_of_other_vocabularies_are_refused(folders: tuple[Path, Path], tmp_path: Path) -> None:
    write_text(tmp_path, [3], tokenizer="another")
    with pytest.raises(InputError, match=r"^data.parts.1: has another tokenizer .*tokenizer: "):
        mixture(part(folders[0]), part(tmp_path))
    with pytest.raises(InputError, match=r"^data.parts.1.source: reversal cannot be part of a mixture"):
        mixture(part(folders[0]), {"source": "reversal", "entities_a": 50, "comb": 5, "relations": 2})
    with pytest.raises(InputError, match=r"^data.parts: give at least one"):
        mixture()
