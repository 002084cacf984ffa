"""A trained run in one process: texts → states, states → tokens, prompts → what the model says. No engine, no process group."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from tqdm import tqdm

from jepa_scale.checkpoint import Manifest, complete, store
from jepa_scale.checkpoint.manifest import FILE, TENSORS
from jepa_scale.checkpoint.shard_view import ShardView
from jepa_scale.config.loading import load_config
from jepa_scale.convert.from_hf import state_tensors
from jepa_scale.data import SourceOptions, load_data
from jepa_scale.data.base import Dataset
from jepa_scale.data.options import MixtureOptions
from jepa_scale.data.prepare.base import BadRecord, Record
from jepa_scale.data.prepare.encoders.chat_tokens import bos_prefix, encode_text
from jepa_scale.data.prepare.encoders.encode import ChatEncoder
from jepa_scale.data.texts import Text, Texts, tokenize
from jepa_scale.distributed.comm import ParallelContext
from jepa_scale.evaluation.encode import EncodedTexts, encode_texts
from jepa_scale.experiment import Experiment, validate
from jepa_scale.models.generation import answer, rounds
from jepa_scale.models.loading import build_backbone
from jepa_scale.objectives.base import JepaModel
from jepa_scale.objectives.tasks import Task
from jepa_scale.telemetry.records import config_of
from jepa_scale.utils.errors import InputError

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class LoadedRun:
    """A run's model and what belongs to it; of :func:`load`. Weights and states are fp32.

    Attributes:
        checkpoint: what was read.
        module: the backbone and the objective, in evaluation mode.
        data: what the run was trained on, opened; its samples have not been read.
        tokenizer: Hugging Face's, None if the data have none (token ids can still be encoded).
    """

    experiment: Experiment
    checkpoint: Path
    module: JepaModel
    data: Any
    tokenizer: Any
    device: torch.device
    _ranks: ParallelContext = field(init=False)

    def __post_init__(self) -> None:
        self._ranks = ParallelContext(0, 1, 0, self.device, "python")

    @property
    def vocab_size(self) -> int:
        """Token ids of the data."""
        return int(self.data.vocab_size)

    @property
    def hidden_size(self) -> int:
        return self.module.backbone.hidden_size

    @property
    def max_tokens(self) -> int | None:
        """Of the longest text; None = there is no limit."""
        return self.module.objective.most_text_tokens(self.module.backbone)

    # -- states -------------------------------------------------------------------------------------------------------

    def encode(
        self,
        texts: Sequence[Text],
        pooling: Literal["mean", "last"] | None = None,
        batch_tokens: int = 8192,
        normalize: bool = False,
        truncate: bool = False,
        progress: bool = False,
    ) -> np.ndarray:
        """Texts → (n, d) float32, a row a text, whatever they are batched with (to the rounding of fp32).

        Args:
            pooling: mean of a text's states after the final norm, or the last one; None = as the objective reads them.
            batch_tokens: in one forward.
            normalize: make the rows unit vectors.
            truncate: cut texts that are too long for the model.
            progress: show a bar.

        Raises:
            InputError: naming the text by its number: it is empty or too long.
        """
        found = np.empty((len(texts), self.hidden_size), dtype=np.float32)
        for part in self._encoded(self.tokenize(texts, truncate), batch_tokens, pooling, progress):
            found[part.numbers.numpy()] = part.pooled.cpu().numpy()
        if normalize:
            found /= np.maximum(np.linalg.norm(found, axis=1, keepdims=True), 1e-12)
        return found

    def tokens(self, texts: Sequence[Text], batch_tokens: int = 8192, truncate: bool = False) -> list[np.ndarray]:
        """Texts → of each the states (n_i, d) float32 of its tokens after the final norm; arguments and errors are those of
        :meth:`encode`."""
        found: dict[int, np.ndarray] = {}
        for part in self._encoded(self.tokenize(texts, truncate), batch_tokens, None, False):
            for number, states in zip(part.numbers.tolist(), part.tokens, strict=True):
                found[number] = states.cpu().numpy().copy()  # a view would keep the whole batch
        return [found[number] for number in range(len(texts))]

    def tokenize(self, texts: Sequence[Text], truncate: bool = False) -> Texts:
        """Token ids of texts as the model reads them: BOS first where that is the tokenizer's habit, no EOS.

        Raises:
            InputError: naming the text by its number: it is empty or too long.
        """
        if isinstance(texts, str):
            raise InputError("texts: is one string; give a list of them")
        hint = "" if truncate else "shorten it, or have it cut (truncate)"
        return tokenize(self.tokenizer, texts, self.vocab_size, self.max_tokens, lambda n: f"texts[{n}]", hint)

    def unembed(self, states: np.ndarray) -> np.ndarray:
        """States (n, d) → (n, vocab_size) float32, their products with the token embeddings."""
        with torch.no_grad():
            rows = torch.as_tensor(states, dtype=torch.float32, device=self.device)
            return self.module.backbone.unembed(rows)[:, : self.vocab_size].cpu().numpy()

    def _encoded(self, texts: Texts, batch_tokens: int, pooling: str | None, progress: bool) -> Iterator[EncodedTexts]:
        if pooling not in (None, "mean", "last"):
            raise InputError(f"pooling: must be mean or last, got {pooling!r}")
        if batch_tokens < 1:
            raise InputError(f"batch_tokens: must be at least 1, got {batch_tokens}")
        parts = encode_texts(self.module.objective, self._call, texts, batch_tokens, self._ranks, pooling)
        with tqdm(total=len(texts), desc="encode", unit="text", dynamic_ncols=True, disable=not progress) as bar:
            for part in parts:
                yield part
                bar.update(len(part.numbers))

    @torch.no_grad()
    def _call(self, task: Task, batch: Any, *args: Any) -> Any:
        return self.module(task, batch.to(self.device), *args)

    # -- generation ---------------------------------------------------------------------------------------------------

    def generate(self, prompts: Sequence[str], max_new_tokens: int = 128, batch_size: int = 32) -> list[str]:
        """What the model says after each prompt, greedily: the answer to a user's message if it was trained on conversations,
        else how the text goes on.

        Raises:
            InputError: the objective trains no model that generates, or a prompt, named by its number, is empty or leaves no
                room.
        """
        if not self.module.objective.predicts_tokens:
            raise InputError(f"objective {self.experiment.objective.name!r} does not train next-token prediction")
        if self.tokenizer is None:
            raise InputError("the run's data have no tokenizer to read prompts with")
        ids = [self._prompt(prompt, f"prompts[{n}]") for n, prompt in enumerate(prompts)]
        positions = getattr(self.module.backbone.decoder.config, "max_position_embeddings", None)
        plan = rounds([len(prompt) for prompt in ids], max_new_tokens, positions, batch_size)
        if unasked := set(range(len(ids))) - {number for part in plan for number in part.prompts}:
            number = min(unasked)
            raise InputError(
                f"prompts[{number}]: its {len(ids[number]):,} tokens leave no room; the model has {positions}"
            )
        stop = sorted({self.data.special[name] for name in ("end", "eos") if name in self.data.special})
        said: dict[int, str] = {}
        for part in plan:
            for made in answer(self._call, ids, part, stop, self._ranks):
                before = [] if self._chats else ids[made.number].tolist()
                said[made.number] = self._decode([*before, *made.tokens])[len(self._decode(before)) :]
        return [said[number] for number in range(len(ids))]

    @property
    def _chats(self) -> bool:
        return bool(self.data.kind == "chat")

    def _prompt(self, text: str, name: str) -> np.ndarray:
        """Token ids up to where the answer begins, as in training."""
        if not text.strip():
            raise InputError(f"{name}: is empty")
        if not self._chats:
            return np.array([*bos_prefix(self.tokenizer), *encode_text(self.tokenizer, text)], dtype=np.int64)
        encode = ChatEncoder(self.tokenizer, self.data.plain, False, "of the data")
        said = [{"role": "user", "content": text}, {"role": "assistant", "content": "a"}]
        try:
            (sample,) = encode(Record(name, {"messages": said}))
        except BadRecord as error:
            raise InputError(str(error)) from None
        return sample.members["npy"][: sample.members["json"]["turns"][1][0]].astype(np.int64)

    def _decode(self, tokens: list[int]) -> str:
        return str(self.tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False))


def load(run_dir: str | Path, checkpoint: str | Path = "auto", device: str | torch.device = "cpu") -> LoadedRun:
    """Read a run's model in this process alone, whoever trained it on however many ranks.

    The data that the run was trained on are opened for their tokenizer and special ids, not read.

    Args:
        run_dir: with ``config.yaml`` and ``checkpoints/``.
        checkpoint: path of one, or its name in the run; ``auto`` = the newest that is whole.

    Raises:
        InputError: there is no such run or no whole checkpoint, its data cannot be opened, or the checkpoint is of another
            model.
    """
    run = Path(run_dir).expanduser()
    file = config_of(run)
    where = _device(device)
    experiment = validate(load_config(file.absolute()))
    found = find_checkpoint(run, checkpoint, experiment.checkpoint.verify)
    data: Any = open_data(experiment.data)
    with torch.random.fork_rng(devices=[]):  # the weights that are made here are replaced
        backbone = build_backbone(experiment.model, data.vocab_size)
        module = JepaModel(backbone, experiment.objective.build(backbone, data))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # DCP speaks of its internals
        boxes = {name: ShardView.whole(tensor) for name, tensor in state_tensors(module).items()}
        store.read(found / TENSORS, boxes, alone=True)
    tokenizer = data.load_tokenizer() if getattr(data, "tokenizer", None) is not None else None
    return LoadedRun(experiment, found, module.to(where).eval(), data, tokenizer, where)


def _device(name: str | torch.device) -> torch.device:
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise InputError(f"device {name!r}: {str(error).splitlines()[0]}") from None
    if device.type == "cuda" and not (device.index or 0) < torch.cuda.device_count():
        raise InputError(f"device {name!r}: there are {torch.cuda.device_count()} such devices; take another, or cpu")
    return device


def find_checkpoint(run: Path, which: str | Path, hashes: bool) -> Path:
    """A checkpoint of a run whose files are whole; damaged ones are passed over where ``which`` is ``auto``.

    Raises:
        InputError: there is none, or the one that was asked for is damaged.
    """
    directory = run / "checkpoints"
    if str(which) != "auto":
        path = directory / which if (directory / which / FILE).is_file() else Path(which).expanduser()
        if damage := Manifest.read(path).damage(path, hashes=hashes):
            raise InputError(f"{damage[0]}; give another checkpoint, or auto")
        return path
    for found in reversed(complete(directory)):
        damage = found.manifest.damage(found.path, hashes=hashes)
        if not damage:
            return found.path
        logger.warning(f"{damage[0]}; {found.path.name} is passed over")
    raise InputError(f"{directory}: holds no whole checkpoint")


def open_data(options: SourceOptions) -> Dataset:
    """The data set that ``data:`` describes, though shards of it may be missing: nobody will read them.

    Raises:
        InputError: it is gone, with its tokenizer.
    """
    with suppress(InputError):
        return load_data(options)
    skip: dict[str, Any] = {"on_error": "skip"}
    if isinstance(options, MixtureOptions):
        skip["parts"] = [part.model_copy(update={"on_error": "skip"}) for part in options.parts]
    try:
        return load_data(options.model_copy(update=skip))
    except InputError as error:
        raise InputError(f"{error} (the tokenizer of the run comes with its data)") from None
