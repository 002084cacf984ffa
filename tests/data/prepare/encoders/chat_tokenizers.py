"""Small tokenizers of each kind, and chat templates that end a prompt or close an answer in different ways."""

import json

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from jepa_scale.data.prepare.encoders.chat_encoder import ChatEncoder

SPECIAL = ["<|h|>", "<|/h|>", "<|eot|>", "<|user|>", "<|assistant|>", "<|system|>"]
EOS = "</s>"
_WORDS = ["hello what is it the sky is blue user assistant ASSISTANT: USER: [INST] [/INST] so . ? , \n\n"] * 20

SPACE = (  # Vicuna's form: the prompt ends in a space
    "{% for m in messages %}{% if m['role'] == 'user' %}USER: {{ m['content'] }} {% else %}ASSISTANT: {{ m['content'] }}"
    "{{ eos_token }}{% endif %}{% endfor %}{% if add_generation_prompt %}ASSISTANT: {% endif %}"
)
LINES = (  # Llama 3's form: the prompt ends in a blank line
    "{% for m in messages %}<|h|>{{ m['role'] }}<|/h|>\n\n{{ m['content'] }}<|eot|>{% endfor %}"
    "{% if add_generation_prompt %}<|h|>assistant<|/h|>\n\n{% endif %}"
)
MARKER = (  # GLM's form: an answer ends where the next message opens
    "{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
INST = (  # no generation prompt, the answer follows a space
    "{% for m in messages %}{% if m['role'] == 'user' %}[INST] {{ m['content'] }} [/INST]{% else %} {{ m['content'] }}"
    "{{ eos_token }}{% endif %}{% endfor %}"
)
NOTHING = (
    "{% for m in messages %}{{ '### Answer: ' if m.role == 'assistant' else '### Question: ' }}{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}### Answer: {% endif %}"
)
BETWEEN = (  # the token stands between two messages, so the last one has none
    "{% for m in messages %}{% if not loop.first %}<|eot|>{% endif %}{{ m.role }}: {{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<|eot|>assistant: {% endif %}"
)
TEMPLATES = {"space": SPACE, "lines": LINES, "marker": MARKER, "inst": INST, "nothing": NOTHING, "between": BETWEEN}


def byte_level(add_prefix_space=False):
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space)
    made.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    return _trained(made, trainers.BpeTrainer, vocab_size=420, initial_alphabet=alphabet)


def metaspace(prepend_scheme):
    made = Tokenizer(models.BPE(unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=prepend_scheme, split=True)
    made.decoder = decoders.Metaspace(prepend_scheme=prepend_scheme)
    return _trained(made, trainers.BpeTrainer, unk_token="<unk>", vocab_size=200)


def prepended():
    """Llama 2's form: a normalizer puts the space before a text."""
    made = metaspace("never").backend_tokenizer
    content = json.loads(made.to_str())
    content["normalizer"] = {
        "type": "Sequence",
        "normalizers": [
            {"type": "Prepend", "prepend": "▁"},
            {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
        ],
    }
    content["pre_tokenizer"] = None
    return _fast(Tokenizer.from_str(json.dumps(content)), "<unk>")


def word_piece():
    made = Tokenizer(models.WordPiece(unk_token="<unk>"))
    made.normalizer = normalizers.BertNormalizer()
    made.pre_tokenizer, made.decoder = pre_tokenizers.BertPreTokenizer(), decoders.WordPiece()
    return _trained(made, trainers.WordPieceTrainer, unk_token="<unk>", vocab_size=200)


KINDS = {
    "byte-level": byte_level,
    "byte-level with a space before": lambda: byte_level(True),
    "a space before each part": lambda: metaspace("always"),
    "a space before the first part": lambda: metaspace("first"),
    "a space before, by the normalizer": prepended,
    "word pieces": word_piece,
}


def _trained(made, trainer, unk_token=None, **options):
    special = [*([unk_token] if unk_token else []), EOS, *SPECIAL]
    made.train_from_iterator([*_WORDS, "<|/h|>"], trainer(special_tokens=special, show_progress=False, **options))
    return _fast(made, unk_token)


def _fast(made, unk_token):
    return PreTrainedTokenizerFast(
        tokenizer_object=made, eos_token=EOS, unk_token=unk_token, extra_special_tokens=SPECIAL
    )


def encoder(tokenizer, template, **options):
    tokenizer.chat_template = template
    return ChatEncoder(tokenizer, False, False, "x", **options)


def talk(*contents):
    return [{"role": "assistant" if n % 2 else "user", "content": content} for n, content in enumerate(contents)]
