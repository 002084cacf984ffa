"""Use a trained run in one process: texts → states, states → tokens, prompts → answers. No engine, no process group."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from tqdm import tqdm

from jepa_scale.checkpoint import find, store
from jepa_scale.checkpoint.manifest import TENSORS, Manifest
from jepa_scale.checkpoint.shard_view import ShardView
from jepa_scale.config.loading import load_config, trained_with
from jepa_scale.convert.from_hf import state_tensors
from jepa_scale.data import SourceOptions, load_data
from jepa_scale.data.base import Dataset
from jepa_scale.data.options import MixtureOptions
from jepa_scale.data.prepare.base import BadRecord, Record
from jepa_scale.data.prepare.encoders.chat_encoder import ChatEncoder
from jepa_scale.data.prepare.encoders.chat_tokens import bos_prefix, encode_text
from jepa_scale.data.texts import Text, Texts, tokenize
from jepa_scale.distributed.comm import ParallelContext
from jepa_scale.evaluation.encode import EncodedTexts, encode_texts
from jepa_scale.evaluation.questions import FactAnswer, answers
from jepa_scale.experiment import Experiment, validate
from jepa_scale.models.frozen.base import STATE, base_of, confirmed
from jepa_scale.models.frozen.four_bit import check_device, quantise
from jepa_scale.models.generation.batches import answer, listed, rounds
from jepa_scale.models.generation.cache_check import check_generation
from jepa_scale.models.generation.speculative import Generation
from jepa_scale.models.generation.speculative import generate as speculate
from jepa_scale.models.loading import build_backbone
from jepa_scale.objectives.base import JepaModel
from jepa_scale.objectives.tasks import Task
from jepa_scale.telemetry.records import config_of
from jepa_scale.utils.errors import InputError


@dataclass(slots=True)
class LoadedRun:
    """A run's model with its data and tokenizer, as :func:`load` returns it. Weights and states are fp32.

    Attributes:
        checkpoint: the checkpoint that was read.
        module: the backbone and the objective, in evaluation mode.
        data: the run's training data, opened; no sample has been read.
        tokenizer: of Hugging Face; None if the data have none (token ids can still be encoded).
    """

    experiment: Experiment
    checkpoint: Path
    module: JepaModel
    data: Any
    tokenizer: Any
    device: torch.device
    _ranks: ParallelContext = field(init=False)
    _chat: ChatEncoder | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        self._ranks = ParallelContext(0, 1, 0, self.device, "python")

    @property
    def vocab_size(self) -> int:
        """Number of token ids of the data."""
        return int(self.data.vocab_size)

    @property
    def hidden_size(self) -> int:
        return self.module.backbone.hidden_size

    @property
    def max_tokens(self) -> int | None:
        """The greatest number of tokens of a text; None = no limit."""
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
        """Encode texts as (n, d) float32, one row per text.

        A row does not depend on the other texts of its batch, up to the rounding of fp32.

        Args:
            pooling: mean of a text's states after the final norm, or the last state; None = the objective's own
                pooling.
            batch_tokens: tokens in one forward.
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
        """Return the (n_i, d) float32 token states of each text after the final norm.

        Arguments and errors are those of :meth:`encode`.
        """
        found: dict[int, np.ndarray] = {}
        for part in self._encoded(self.tokenize(texts, truncate), batch_tokens, None, False):
            for number, states in zip(part.numbers.tolist(), part.tokens, strict=True):
                found[number] = states.cpu().numpy().copy()  # a view would keep the whole batch
        return [found[number] for number in range(len(texts))]

    def tokenize(self, texts: Sequence[Text], truncate: bool = False) -> Texts:
        """Return the token ids of texts as model input: with BOS first if the tokenizer adds one, without EOS.

        Raises:
            InputError: naming the text by its number: it is empty or too long.
        """
        if isinstance(texts, str):
            raise InputError("texts: is one string; give a list of strings")
        hint = "" if truncate else "shorten it, or have it cut (truncate)"
        return tokenize(self.tokenizer, texts, self.vocab_size, self.max_tokens, lambda n: f"texts[{n}]", hint)

    def unembed(self, states: np.ndarray) -> np.ndarray:
        """Multiply states (n, d) with the token embeddings: (n, vocab_size) float32 logits."""
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

    def generate(
        self,
        prompts: Sequence[str],
        max_new_tokens: int = 128,
        batch_size: int = 32,
        draft: int = 0,
        temperature: float = 0.0,
        seed: int = 0,
    ) -> list[str]:
        """Generate text for each prompt.

        A model trained on conversations answers the prompt as a user's message; any other model continues it.

        Args:
            batch_size: prompts at a time; with drafts or a temperature it is one.
            draft: tokens that the objective's own head drafts at a time; see
                :mod:`jepa_scale.models.generation.speculative`.
            temperature: 0 = the likeliest token each time, 1 = samples of the model's distribution.
            seed: of the samples. A prompt's sample depends on its number among the prompts, too.

        Raises:
            InputError: the objective trains no model that generates or has no head that drafts so many tokens, or a prompt, named by
                its number, is empty or leaves no room.
        """
        return [text for text, _ in self.generations(prompts, max_new_tokens, batch_size, draft, temperature, seed)]

    def generations(
        self,
        prompts: Sequence[str],
        max_new_tokens: int = 128,
        batch_size: int = 32,
        draft: int = 0,
        temperature: float = 0.0,
        seed: int = 0,
    ) -> list[tuple[str, Generation]]:
        """Return, for each prompt, the text of :meth:`generate`, and its tokens with the number of drafts that were kept."""
        self._check_generation(draft, temperature)
        ids = [self._prompt(prompt, f"prompts[{n}]") for n, prompt in enumerate(prompts)]
        positions = getattr(self.module.backbone.decoder.config, "max_position_embeddings", None)
        plan = rounds([len(prompt) for prompt in ids], max_new_tokens, positions, batch_size)
        if unasked := set(range(len(ids))) - {number for part in plan for number in part.prompts}:
            number = min(unasked)
            raise InputError(
                f"prompts[{number}]: its {len(ids[number]):,} tokens leave no room for an answer; the model has {positions} "
                "positions"
            )
        stop = sorted({self.data.special[name] for name in ("end", "eos") if name in self.data.special})
        found: dict[int, Generation] = {}
        for part in plan:
            if draft or temperature:
                for number in part.prompts:
                    found[number] = self._speculate(ids[number], stop, part.room, draft, temperature, (seed, number))
            else:
                for answered in answer(self._call, ids, part, stop, self._ranks):
                    found[answered.number] = Generation(answered.tokens, answered.stopped)
        texts = []
        for number, prompt in enumerate(ids):
            before = [] if self._chats else prompt.tolist()
            texts.append(self._decode([*before, *found[number].tokens])[len(self._decode(before)) :])
        return [(text, found[number]) for number, text in enumerate(texts)]

    def answers(self, subjects: Sequence[str], relation: str, batch_size: int = 32) -> list[FactAnswer]:
        """Generate the name of each subject's object in a relation, by the answer generator of the run's evaluation.

        Args:
            subjects: names as the data write them: "Lami Tero" in sentences, else tokens with spaces between them, by their strings
                or ids. relation: such as "teacher", or "<r_0_inv>".
            batch_size: questions at a time.

        Raises:
            InputError: the run's data hold no facts, a subject is no name of theirs, or there is no such relation.
        """
        if self.data.kind != "reversal":
            raise InputError(f"subject: asks about a fact, and the run's data are {self.data.kind}; give a prompt")
        generator = self.module.objective.answer_generator(self._call)
        return answers(generator, self.data, subjects, relation, batch_size)

    def _check_generation(self, draft: int, temperature: float) -> None:
        name, objective = self.experiment.objective.name, self.module.objective
        if not objective.predicts_tokens:
            raise InputError(f"objective {name!r} trains no next-token prediction, so nothing can be generated")
        if self.data.kind == "reversal":
            raise InputError("the run's data are facts; ask for one by --subject … --relation … (in Python: answers)")
        if self.tokenizer is None:
            raise InputError("the run's data have no tokenizer to encode prompts with; use a run whose data have one")
        if draft < 0 or not 0 <= temperature < float("inf"):
            raise InputError(f"draft {draft}, temperature {temperature}: must be 0 or more")
        backbone = self.module.backbone
        if backbone.padded or backbone.reads_neighbours:
            if draft or temperature:
                without = "model.packing: padded does not promise" if backbone.padded else "a recurrence does not have"
                raise InputError(
                    f"{'draft' if draft else 'temperature'}: needs a cache that can go back, which {without}; leave it out"
                )
            check_generation(backbone, self.device, torch.float32)
        if not draft:
            return
        drafter = objective.drafter(backbone)
        if drafter is None:
            raise InputError(
                f"draft: objective {name!r} has no head that drafts tokens; next_latent and mtp have; leave it out"
            )
        if drafter.most is not None and draft > drafter.most:
            raise InputError(
                f"draft: {draft} is more than the {drafter.most} tokens that {name!r} drafts; use at most that"
            )

    def _speculate(
        self, prompt: np.ndarray, stop: Sequence[int], room: int, draft: int, temperature: float, seed: tuple[int, int]
    ) -> Generation:
        backbone, generator = self.module.backbone, torch.Generator(self.device)
        generator.manual_seed(int(np.random.SeedSequence(seed).generate_state(1, np.uint64)[0] >> np.uint64(1)))
        drafter = self.module.objective.drafter(backbone) if draft else None
        ends = {*stop, *listed(backbone.decoder.generation_config.eos_token_id)}
        return speculate(backbone, prompt.tolist(), ends, room, drafter, draft, temperature, generator)

    @property
    def _chats(self) -> bool:
        return bool(self.data.kind == "chat")

    def _prompt(self, text: str, name: str) -> np.ndarray:
        """Return the token ids of a prompt up to the start of the answer, as in training."""
        if not text.strip():
            raise InputError(f"{name}: is empty")
        if not self._chats:
            return np.array([*bos_prefix(self.tokenizer), *encode_text(self.tokenizer, text)], dtype=np.int64)
        if self._chat is None:
            self._chat = ChatEncoder(self.tokenizer, self.data.plain, False, "of the data")
        messages = [{"role": "user", "content": text}, {"role": "assistant", "content": "a"}]
        try:
            (sample,) = self._chat(Record(name, {"messages": messages}))
        except BadRecord as error:
            raise InputError(str(error)) from None
        return sample.members["npy"][: sample.members["json"]["turns"][1][0]].astype(np.int64)

    def _decode(self, tokens: list[int]) -> str:
        return str(self.tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False))


def load(run_dir: str | Path, checkpoint: str | Path = "auto", device: str | torch.device = "auto") -> LoadedRun:
    """Load a run's model in this process alone, whatever number of ranks trained it.

    The data that the run was trained on are opened for their tokenizer and special ids, not read.

    Args:
        run_dir: folder with ``config.yaml`` and ``checkpoints/``.
        checkpoint: path of a checkpoint, or its name in the run; ``auto`` = the newest complete one.
        device: where the model runs; ``auto`` = the first CUDA device, or the CPU where there is none.

    Raises:
        InputError: there is no such run or no complete checkpoint, its data cannot be opened, or the checkpoint is of
            another model.
    """
    run = Path(run_dir).expanduser()
    file = config_of(run)
    where = _device(device)
    config = load_config(file.absolute())
    found = find(run, checkpoint, config.checkpoint.verify, alone=True)
    if found is None:
        raise InputError(f"{run}: has no checkpoint; give another run, or a checkpoint's path")
    manifest = Manifest.read(found)
    experiment = validate(trained_with(config, manifest.config))
    data: Any = open_data(experiment.data)
    with torch.random.fork_rng(devices=[]):  # the checkpoint replaces these weights
        backbone = build_backbone(experiment.model, data.vocab_size)
        module = JepaModel(backbone, experiment.objective.build(backbone, data))
    if experiment.model.load_in_4bit:
        check_device(where)
    base = None
    if STATE in manifest.state:
        base = confirmed(base_of(backbone.decoder, experiment.model), manifest.state, found)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # DCP's message names only its internals
        views = {name: ShardView.whole(tensor) for name, tensor in state_tensors(module, base=base).items()}
        store.read(found / TENSORS, views, alone=True)
    if experiment.model.load_in_4bit:
        quantise(backbone, torch.float32, lambda _, weight: weight.to(where))
    tokenizer = data.load_tokenizer() if getattr(data, "tokenizer", None) is not None else None
    return LoadedRun(experiment, found, module.to(where).eval(), data, tokenizer, where)


def _device(name: str | torch.device) -> torch.device:
    if name == "auto":
        return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise InputError(f"device {name!r}: {str(error).splitlines()[0]}") from None
    if device.type == "cuda" and not (device.index or 0) < torch.cuda.device_count():
        raise InputError(f"device {name!r}: there are {torch.cuda.device_count()} CUDA devices; use another, or cpu")
    return device


def open_data(options: SourceOptions) -> Dataset:
    """Open the data set that ``data:`` describes. Shards may be missing, as no sample is read.

    Raises:
        InputError: the data set and its tokenizer are gone.
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
