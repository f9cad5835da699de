"""Make the tokenizer of configs/phases/model: byte-level BPE, learned from this project's prose.

    python configs/phases/make_tokenizer.py DEST

It reads the project's Markdown and the docstrings of the package, as they are at the time. Every
byte has a token, so that any text can be written. DEST gets tokenizer.json and
tokenizer_config.json.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

from tokenizers import ByteLevelBPETokenizer
from transformers import PreTrainedTokenizerFast

ROOT = Path(__file__).resolve().parents[2]
NUM_TOKENS = 2048
PAD = "<pad>"
EOS = "<eos>"


def prose() -> Iterator[str]:
    """Yield the project's Markdown files, and the docstrings of its package."""
    for path in sorted(ROOT.glob("**/*.md")):
        yield path.read_text(encoding="utf-8")
    for path in sorted((ROOT / "fedsp_mpi").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                yield ast.get_docstring(node) or ""


def main(destination: str) -> None:
    """Learn the tokens, and write the tokenizer's files."""
    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(
        prose(), vocab_size=NUM_TOKENS, special_tokens=[PAD, EOS], show_progress=False
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer._tokenizer, pad_token=PAD, eos_token=EOS
    ).save_pretrained(destination)


if __name__ == "__main__":
    main(sys.argv[1])
