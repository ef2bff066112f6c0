"""Reads tokenizers from the files of checkpoints, and trains them."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers, processors
from tokenizers.implementations.bert_wordpiece import BertWordPieceTokenizer
from tokenizers.implementations.byte_level_bpe import ByteLevelBPETokenizer
from tokenizers.models import BPE, WordPiece

from bridgetower.files import json_object, read_bytes, read_json
from bridgetower.processor.text import BERT, ROBERTA, SpecialTokens, special_ids, tokenizers_errors

# Roles of special tokens by their names in config files.
_TOKEN_ROLES = {
    "bos_token": "bos",
    "cls_token": "bos",
    "eos_token": "eos",
    "sep_token": "eos",
    "pad_token": "pad",
    "unk_token": "unk",
    "mask_token": "mask",
}
# A normaliser may make a text at most this many times longer.
_MAX_GROWTH = 1000


def load_tokenizer(folder_or_file: str | os.PathLike[str]) -> Tokenizer:
    """Reads a tokenizer of `tokenizer.json`, or `vocab.json` with `merges.txt` (RoBERTa), or `vocab.txt` (BERT)."""
    path = find_tokenizer(folder_or_file)
    if path is None or path.suffix == ".model":
        raise FileNotFoundError(
            f"no tokenizer at {folder_or_file}; expected tokenizer.json, vocab.json with merges.txt, or vocab.txt: of "
            "other files transformers makes a tokenizer.json, AutoTokenizer.from_pretrained(A).save_pretrained(B)"
        )
    if path.name == "vocab.json":
        return read_roberta(path)
    if path.name == "vocab.txt":
        return read_bert(path)
    return read_tokenizer_json(path)


def find_tokenizer(folder_or_file: str | os.PathLike[str]) -> Path | None:
    path = Path(folder_or_file)
    if path.is_file():
        return path
    for name in ("tokenizer.json", "vocab.json", "vocab.txt"):
        if (path / name).is_file():
            return path / name
    return None


def read_roberta(path: Path) -> Tokenizer:
    """Reads a vocabulary with merges beside it."""
    merges_file = path.with_name("merges.txt")
    if not merges_file.is_file():
        raise FileNotFoundError(
            f"{path} needs merges.txt beside it; copy both files of the tokenizer"
        )
    folder = path.parent
    settings = _tokenizer_settings(folder, ROBERTA)
    mask = settings.get("mask_token")
    mask_lstrip = mask.get("lstrip", False) if isinstance(mask, dict) else True
    add_prefix_space = settings.get("add_prefix_space") or False
    with _tokenizer_file_errors(folder):
        vocab, merges = BPE.read_file(str(path), str(merges_file))
        return _roberta(vocab, merges, add_prefix_space=add_prefix_space, mask_lstrip=mask_lstrip)


def read_bert(path: Path) -> Tokenizer:
    """Reads a vocabulary with one token per line."""
    settings = _tokenizer_settings(path.parent, BERT)
    tokens = path.read_text(encoding="utf-8").removesuffix("\n").split("\n")
    vocab = {token: number for number, token in enumerate(tokens)}
    with _tokenizer_file_errors(path):
        special_ids(BERT, Tokenizer(WordPiece(vocab, unk_token=BERT.unk)))
        bert = BertWordPieceTokenizer(
            vocab,
            handle_chinese_chars=settings.get("tokenize_chinese_chars") is not False,
            strip_accents=settings.get("strip_accents"),
            lowercase=settings.get("do_lower_case") is not False,
        )
        return Tokenizer.from_str(bert.to_str())


def read_tokenizer_json(path: Path) -> Tokenizer:
    """Reads a file that has everything, and refuses normalisers that make a text much longer."""
    content = read_bytes(path)
    with _tokenizer_file_errors(path):
        tokenizer = Tokenizer.from_str(content.decode())
    tokenizer.no_padding()
    tokenizer.no_truncation()

    # Normalisers in turn could make any amount of text of one letter.
    growth = 1
    pending = [json_object(content, path).get("normalizer")]
    while pending:
        value = pending.pop()
        if isinstance(value, dict):
            pending += value.values()
            texts = ("x", value.get("content"), value.get("prepend"))
            growth *= max(len(text) for text in texts if isinstance(text, str))
        elif isinstance(value, list):
            pending += value
        if growth > _MAX_GROWTH:
            raise ValueError(
                f"{path} makes texts more than {_MAX_GROWTH} times as long; use another tokenizer"
            )
    return tokenizer


@contextmanager
def _tokenizer_file_errors(source: Path) -> Iterator[None]:
    with tokenizers_errors(f"{source} does not hold a valid tokenizer"):
        try:
            yield
        except ValueError as error:
            raise ValueError(f"{source}: {error}") from error


def train_tokenizer(captions: Iterable[str], *, vocab_size: int) -> Tokenizer:
    """Trains a byte-level BPE with RoBERTa's special tokens: `<s>` 0, `<pad>` 1, `</s>` 2, `<unk>` 3, `<mask>` last."""
    texts = list(captions)
    smallest = 256 + len(ROBERTA)
    if vocab_size < smallest:
        raise ValueError(
            f"vocab_size is {vocab_size}; 256 bytes and {len(ROBERTA)} special tokens need {smallest}"
        )
    if not texts:
        raise ValueError("no captions to train a tokenizer on; give at least one text")
    learner = ByteLevelBPETokenizer()
    *first_tokens, mask = ROBERTA
    learner.train_from_iterator(
        iter(texts),
        vocab_size - 1,
        show_progress=False,
        special_tokens=list[str | AddedToken](first_tokens),
    )
    model = json.loads(learner.to_str())["model"]
    vocab = model["vocab"]
    vocab[mask] = len(vocab)
    merges = [(left, right) for left, right in model["merges"]]
    return _roberta(vocab, merges)


def _roberta(
    vocab: dict[str, int],
    merges: list[tuple[str, str]],
    *,
    add_prefix_space: bool = False,
    mask_lstrip: bool = True,
) -> Tokenizer:
    """Builds GPT-2's byte-level BPE between `<s>` and `</s>`.

    `<mask>` takes the space before it, as in fairseq.
    """
    tokenizer = Tokenizer(BPE(vocab=vocab, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space)
    tokenizer.decoder = decoders.ByteLevel()
    ids = special_ids(ROBERTA, tokenizer)
    tokenizer.post_processor = processors.RobertaProcessing(
        (ROBERTA.eos, ids.eos),
        (ROBERTA.bos, ids.bos),
        trim_offsets=True,
        add_prefix_space=add_prefix_space,
    )
    *first_tokens, mask = ROBERTA
    tokenizer.add_special_tokens([*first_tokens, AddedToken(mask, lstrip=mask_lstrip)])
    return tokenizer


def _tokenizer_settings(folder: Path, expected: SpecialTokens[str]) -> dict[str, Any]:
    """Merges the tokenizer's side files and refuses special tokens that would be ignored."""
    settings: dict[str, Any] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        if (folder / name).is_file():
            settings |= read_json(folder / name)
    for key, role in _TOKEN_ROLES.items():
        token = settings.get(key)
        if isinstance(token, dict):
            token = token.get("content")
        usual = getattr(expected, role)
        if token not in (None, usual):
            raise ValueError(
                f"{folder} sets {key} to {token!r}, expected {usual!r}; give a tokenizer.json instead"
            )
    added = folder / "added_tokens.json"
    if added.is_file() and read_json(added).keys() - set(expected):
        raise ValueError(
            f"{folder} has added_tokens.json with tokens of its own; give a tokenizer.json instead"
        )
    return settings
