"""Train a span encoder on real English that every Python carries, and see what can be read off its states.

    python scripts/gallery/span_probe.py      # some minutes on two cores, no download

Three encoders of one size read passages of Python's documentation: one with random weights, one that learnt next tokens (`lm`),
one that learnt to recognise a text from any part of it (`span`). Which of eleven topics a passage is from is then read off the frozen
states, by neighbours and by a linear map. No label is trained on.
"""

import argparse
import json
from pathlib import Path

from commands import show


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/gallery_span"))
    parser.add_argument("--small", action="store_true", help="a few steps: does it run?")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="of all runs' config")
    args = parser.parse_args()

    args.out.mkdir(parents=True, exist_ok=True)
    sections = args.out / "sections.jsonl"
    show("data", "sections", "python_docs", "--out", sections)
    settings = [f"run.dir={args.out}", f"eval.probe={sections}", *args.overrides]
    if args.small:
        settings += ["train.steps=2", "train.batch_size=16", "data.workers=0"]
        settings += ["train.eval_every=0", "eval.max_samples=32"]
    runs = {"untrained": ["train.steps=1", "optim.lr=1e-12", "optim.lr_muon=1e-12", "train.eval_every=0"]}
    runs |= {"lm": ["objective={name: lm}"], "span": []}
    for name, changes in runs.items():
        show("train", "--config", "configs/span_tiny.yaml", *settings, f"run.name={name}", *changes)
    show("report", *(args.out / name for name in runs))

    import jepa_scale  # five lines of Python: passages, states, the nearest passage to each

    rows = [json.loads(line) for line in sections.read_text().splitlines()]
    encoder = jepa_scale.load(args.out / "span")
    states = encoder.encode([row["text"] for row in rows], normalize=True)
    cosines = states @ states.T
    print("\nthe nearest passage:")
    for number in range(0, len(rows), len(rows) // 6):
        cosines[number, number] = -1
        for row in (rows[number], rows[cosines[number].argmax()]):
            print(f"  {row['label']:>12}: {row['text'][:80]!r}")
        print()


if __name__ == "__main__":
    main()
