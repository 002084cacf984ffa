"""The source ``reversal``: facts, generated or read from a folder."""

from __future__ import annotations

from dataclasses import replace

from jepa_scale.config.loading import find_file
from jepa_scale.data.files.cache import cache_dir
from jepa_scale.data.options import GENERATOR_KEYS, ReversalOptions
from jepa_scale.data.reversal.facts import ReversalData, generate
from jepa_scale.data.reversal.files import read, read_shards
from jepa_scale.data.reversal.sentences import as_sentences
from jepa_scale.data.shards.locate import locate
from jepa_scale.utils.errors import InputError


def load(options: ReversalOptions) -> ReversalData:
    """Generate or read the facts.

    Raises:
        InputError: a key that doesn't fit the others, a size that cannot be met, a file that cannot be read.
    """
    given = options.model_fields_set
    if options.path is None:
        if options.first_relation_token_id is not None:
            raise InputError("data.first_relation_token_id: has a meaning only for files; set data.path or remove it")
        data = generate(options.entities_a, options.comb, options.relations, options.seed)
        if options.form == "sentences":
            data = as_sentences(data, options.sentences, options.seed)
        return _arrange(data, options)
    unused = sorted(given & GENERATOR_KEYS)
    if unused:
        raise InputError(f"data.{unused[0]}: has no meaning for facts read from data.path; remove one of them")
    first = options.first_relation_token_id
    located = locate(options.path, cache_dir())
    if located is not None:
        return _arrange(read_shards(located, first), options)
    folder = find_file(f"{options.path}/train.json", "data.path").parent
    return _arrange(read(folder, first), options)


def _arrange(data: ReversalData, options: ReversalOptions) -> ReversalData:
    return replace(data.repeat_atomic(options.atomic_repeats), by_name=options.order == "by_name")
