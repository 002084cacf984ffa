from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from jepa_scale.data.prepare.encoders.chat_tokens import encode_text
from tests.data.prepare.encoders.chat_tokenizers import KINDS, SPECIAL

MADE = {name: make() for name, make in KINDS.items()}
TEXTS = st.lists(st.sampled_from(["hello", " ", "what is", "\n\n", "é", "  so.", *SPECIAL]) | st.text(max_size=5)).map(
    "".join
)


@settings(deadline=None)
@given(kind=st.sampled_from(sorted(KINDS)), text=TEXTS, raw=st.booleans(), before=st.booleans())
def test_ids_are_those_of_a_call(kind, text, raw, before):
    """Whatever an earlier call has left in the tokenizer: truncation, padding, how special tokens are read."""
    tokenizer = MADE[kind]
    wanted = tokenizer(text, add_special_tokens=False, split_special_tokens=raw)["input_ids"]
    if before:
        tokenizer.pad_token = tokenizer.eos_token
        tokenizer("a b c", truncation=True, padding="max_length", max_length=2, split_special_tokens=not raw)
    assert encode_text(tokenizer, text, raw) == wanted


def test_a_class_that_changes_texts_is_called():
    class Lower(PreTrainedTokenizerFast):
        def _encode_plus(self, text, *args, **kwargs):
            return super()._encode_plus(text.lower(), *args, **kwargs)

    plain = MADE["byte-level"]
    lower = Lower(tokenizer_object=plain.backend_tokenizer, eos_token=plain.eos_token)
    assert encode_text(lower, "HELLO") == encode_text(plain, "hello") != encode_text(plain, "HELLO")
