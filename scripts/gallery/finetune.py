"""Fine-tune a local Hugging Face model with LLM-JEPA, beside plain fine-tuning, and use the result in transformers alone.

    python scripts/gallery/finetune.py                                  # some minutes on two cores, no download
    python scripts/gallery/finetune.py --model DIR --train chats.jsonl --test test.jsonl    # your model, your conversations

Without --model a small Llama with random weights is made, with a tokenizer and a chat template, as a folder that
`save_pretrained` wrote; without --train, conversations that ask for a regular expression in English. Everything is below --out:
`lm/` and `two_view/`, the runs; `hf/`, the fine-tuned model; the report is opened from `two_view/report.html`.
"""

import argparse
import json
import random
from pathlib import Path

from commands import show

ATOMS = {
    "a vowel": "[AEIOUaeiou]",
    "a letter": "[A-Za-z]",
    "a capital letter": "[A-Z]",
    "a small letter": "[a-z]",
    "a digit": "[0-9]",
    "any character": ".",
    "the string 'dog'": "dog",
    "the string 'truck'": "truck",
    "the string 'ring'": "ring",
}
RELATIONS = {
    "{} before {}": "({}).*({})",
    "{} right before {}": "({})({})",
    "{} or {}": "({})|({})",
    "{} and also {}": "({})&({})",
}
CHANGES = {
    "{}": "{}",
    "anything but {}": "~({})",
    "{}, at least twice": "({}){{2,}}",
    "{}, 3 times or more": "({}){{3,}}",
}
PLACES = {
    "containing {}": ".*({}).*",
    "starting with {}": "({})(.*)",
    "ending with {}": "(.*)({})",
    "that are {}": "{}",
}
ROLES = ("user", "assistant")
TEMPLATE = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"


def conversations(how_many: int, seed: int = 0) -> list[dict[str, list[dict[str, str]]]]:
    """Different questions in English, each with the regular expression that answers it."""
    rng = random.Random(seed)
    found: dict[str, str] = {}

    def pick(table: dict[str, str]) -> tuple[str, str]:
        return rng.choice(list(table.items()))

    while len(found) < how_many:
        said, meant = zip(pick(ATOMS), pick(ATOMS), strict=True)
        for words, pattern in (pick(RELATIONS), pick(CHANGES), pick(PLACES)):
            said, meant = [words.format(*said)], [pattern.format(*meant)]
        found[f"lines {said[0]}"] = meant[0]
    return [
        {"messages": [{"role": role, "content": text} for role, text in zip(ROLES, pair, strict=True)]}
        for pair in found.items()
    ]


def write(path: Path, rows: list[dict[str, list[dict[str, str]]]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def make_model(folder: Path, rows: list[dict[str, list[dict[str, str]]]], width: int) -> Path:
    """A Llama with random weights and a tokenizer trained on the rows, as `save_pretrained` leaves them."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    special = ["<|end|>", "<|pad|>", *(f"<|{role}|>" for role in ROLES)]
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    letters = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=512, special_tokens=special, initial_alphabet=letters, show_progress=False)
    bpe.train_from_iterator((message["content"] for row in rows for message in row["messages"]), trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|end|>", pad_token="<|pad|>")
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def answers(folder: Path, questions: list[str]) -> list[str]:
    """By transformers alone, greedily."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    said = []
    for question in questions:
        asked = tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        out = model.generate(**asked, max_new_tokens=64, do_sample=False, pad_token_id=tokenizer.eos_token_id)
        said.append(tokenizer.decode(out[0, asked["input_ids"].shape[1] :], skip_special_tokens=True))
    return said


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="folder of a causal language model of transformers")
    parser.add_argument("--train", type=Path, help="JSON lines of messages")
    parser.add_argument("--test", type=Path, help="the same, held out; needed with --train")
    parser.add_argument("--out", type=Path, default=Path("runs/gallery_finetune"))
    parser.add_argument("--small", action="store_true", help="a few steps: does it run?")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="of both runs' config")
    args = parser.parse_args()
    if bool(args.train) != bool(args.test):
        parser.error("--train and --test belong together")

    args.out.mkdir(parents=True, exist_ok=True)
    train, test = args.train, args.test
    held_out, rows = 20 if args.small else 200, conversations(150 if args.small else 2200)
    if train is None:
        train, test = write(args.out / "train.jsonl", rows[held_out:]), write(args.out / "test.jsonl", rows[:held_out])
    model = args.model or make_model(args.out / "model", rows, 32 if args.small else 192)

    settings = [f"run.dir={args.out}", f"model.pretrained={model}", f"data.tokenizer={model}", "log.progress=true"]
    settings += [f"data.path={train}", f"data.valid_path={test}"]
    if args.model is None:  # random weights: all of them, at a rate for that
        settings += ["model.lora=null", "optim.lr=2e-3", "optim.warmup_steps=20", "data.max_length=128"]
        settings += ["train.epochs=3", "train.batch_size=32", "train.accumulation=1", "eval.max_new_tokens=64"]
    if args.small:
        settings += ["train.steps=3", "train.epochs=0", "train.batch_size=8", "train.accumulation=1", "data.workers=0"]
        settings += ["eval.max_generations=8", "eval.max_new_tokens=8"]
    config = "configs/finetune_example.yaml"
    show("train", "--config", config, *settings, "run.name=lm", "objective={name: lm}", *args.overrides)
    show("train", "--config", config, *settings, "run.name=two_view", *args.overrides)
    show("report", args.out / "lm", args.out / "two_view")
    show("convert", args.out / "two_view", "--to", "hf", "--out", args.out / "hf")

    asked = [json.loads(line)["messages"] for line in test.read_text().splitlines()[:3]]
    said = answers(args.out / "hf", [messages[-2]["content"] for messages in asked])
    print("\nin transformers, without jepa_scale:")
    for messages, answer in zip(asked, said, strict=True):
        print(f"  {messages[-2]['content']}\n    said   {answer}\n    right  {messages[-1]['content']}")


if __name__ == "__main__":
    main()
