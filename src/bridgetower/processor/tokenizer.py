"""Reads tokenizers from the files that checkpoints ship, and trains small ones."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, normalizers, pre_tokenizers, processors, trainers
from tokenizers.models import BPE, WordPiece

from bridgetower.files import read_json
from bridgetower.processor.text import BERT, ROBERTA, SpecialTokens, tokenizers_errors

_NAMES_IN_CONFIG = {"bos_token": "bos", "cls_token": "bos", "eos_token": "eos", "sep_token": "eos"} | {
    f"{name}_token": name for name in ("pad", "unk", "mask")
}
_BYTES = 256


def load_tokenizer(folder_or_file: str | os.PathLike[str]) -> Tokenizer:
    """Reads a tokenizer from `tokenizer.json`, else `vocab.json` with `merges.txt` (RoBERTa), else `vocab.txt` (BERT).

    `tokenizer.json` is complete in itself; its stored padding and truncation are switched off, since `Processor` does
    both. For the other files `tokenizer_config.json` and `special_tokens_map.json` beside them are honoured; without
    them RoBERTa adds no leading space and BERT lower-cases.

    Args:
        folder_or_file: A folder, searched in the order above, or one of these files.

    Returns:
        A tokenizer that puts the start and the end token around a text.

    Raises:
        FileNotFoundError: There is none of these files, or `merges.txt` is missing.
        ValueError: A file is damaged, or names special tokens other than RoBERTa's or BERT's.
    """
    path = find_tokenizer(folder_or_file)
    if path is None:
        raise FileNotFoundError(
            f"no tokenizer at {folder_or_file}; expected tokenizer.json, vocab.json with merges.txt, or vocab.txt"
        )
    if path.name == "vocab.json":
        return _load_roberta(path)
    if path.name == "vocab.txt":
        return _load_bert(path)
    tokenizer = _build(str(path), lambda: Tokenizer.from_str(path.read_text(encoding="utf-8")))
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


def find_tokenizer(folder_or_file: str | os.PathLike[str]) -> Path | None:
    """Returns the file that `load_tokenizer` starts from, or None if there is none."""
    path = Path(folder_or_file)
    candidates = [path, *(path / name for name in ("tokenizer.json", "vocab.json", "vocab.txt"))]
    return next((candidate for candidate in candidates if candidate.is_file()), None)


def train_tokenizer(captions: Iterable[str], *, vocab_size: int) -> Tokenizer:
    """Trains a byte-level BPE with RoBERTa's special tokens: `<s>` 0, `<pad>` 1, `</s>` 2, `<unk>` 3, `<mask>` last.

    The result depends on the captions and `vocab_size` only. Every text can be encoded, since all bytes are tokens.

    Args:
        captions: Texts to learn from.
        vocab_size: Number of ids; fewer result if the captions hold fewer pairs that occur twice.

    Raises:
        ValueError: There are no captions, or `vocab_size` does not hold the bytes and the special tokens.
    """
    texts = list(captions)
    smallest = _BYTES + len(ROBERTA)
    if vocab_size < smallest:
        raise ValueError(f"vocab_size is {vocab_size}; 256 bytes and {len(ROBERTA)} special tokens need {smallest}")
    if not texts:
        raise ValueError("no captions to train a tokenizer on; give at least one text")
    learner = Tokenizer(BPE())
    learner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - 1,
        min_frequency=2,
        special_tokens=[ROBERTA.bos, ROBERTA.pad, ROBERTA.eos, ROBERTA.unk],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    learner.train_from_iterator(texts, trainer)
    model = json.loads(learner.to_str())["model"]
    vocab = model["vocab"] | {ROBERTA.mask: len(model["vocab"])}
    return _roberta(vocab, [(left, right) for left, right in model["merges"]])


def _load_roberta(path: Path) -> Tokenizer:
    merges_file = path.with_name("merges.txt")
    if not merges_file.is_file():
        raise FileNotFoundError(f"{path} needs merges.txt beside it; copy both files of the tokenizer")
    settings = _settings(path.parent, ROBERTA)
    mask = settings.get("mask_token")
    return _build(
        str(path.parent),
        lambda: _roberta(
            *BPE.read_file(str(path), str(merges_file)),
            add_prefix_space=settings.get("add_prefix_space") or False,
            mask_lstrip=mask.get("lstrip", False) if isinstance(mask, dict) else True,
        ),
    )


def _roberta(
    vocab: dict[str, int],
    merges: list[tuple[str, str]],
    *,
    add_prefix_space: bool = False,
    mask_lstrip: bool = True,
) -> Tokenizer:
    """GPT-2's byte-level BPE between `<s>` and `</s>`; `<mask>` swallows the space before it, as in fairseq."""
    tokenizer = Tokenizer(BPE(vocab=vocab, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space)
    tokenizer.decoder = decoders.ByteLevel()
    ids = ROBERTA.ids(tokenizer)
    tokenizer.post_processor = processors.RobertaProcessing(
        (ROBERTA.eos, ids.eos), (ROBERTA.bos, ids.bos), trim_offsets=True, add_prefix_space=add_prefix_space
    )
    plain = (ROBERTA.bos, ROBERTA.pad, ROBERTA.eos, ROBERTA.unk)
    tokenizer.add_special_tokens([*plain, AddedToken(ROBERTA.mask, lstrip=mask_lstrip)])
    return tokenizer


def _load_bert(path: Path) -> Tokenizer:
    settings = _settings(path.parent, BERT)
    lines = path.read_text(encoding="utf-8").removesuffix("\n").split("\n")
    return _build(str(path), lambda: _bert({token: number for number, token in enumerate(lines)}, settings))


def _bert(vocab: dict[str, int], settings: Mapping[str, Any]) -> Tokenizer:
    """BERT's normaliser, word splitter and WordPiece between `[CLS]` and `[SEP]`."""
    tokenizer = Tokenizer(WordPiece(vocab=vocab, unk_token=BERT.unk))
    chinese = settings.get("tokenize_chinese_chars")
    tokenizer.normalizer = normalizers.BertNormalizer(
        clean_text=True,
        handle_chinese_chars=True if chinese is None else chinese,
        strip_accents=settings.get("strip_accents"),
        lowercase=settings.get("do_lower_case") is not False,
    )
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece(prefix="##")
    ids = BERT.ids(tokenizer)
    tokenizer.post_processor = processors.BertProcessing((BERT.eos, ids.eos), (BERT.bos, ids.bos))
    tokenizer.add_special_tokens(list(BERT))
    return tokenizer


def _settings(folder: Path, expected: SpecialTokens) -> dict[str, Any]:
    """Merges the tokenizer's side files and refuses special tokens that would be ignored."""
    settings: dict[str, Any] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        if (folder / name).is_file():
            settings |= read_json(folder / name)
    for key, role in _NAMES_IN_CONFIG.items():
        given = settings.get(key)
        content, usual = given.get("content") if isinstance(given, dict) else given, getattr(expected, role)
        if content not in (None, usual):
            raise ValueError(f"{folder} sets {key} to {content!r}, expected {usual!r}; give a tokenizer.json instead")
    if (folder / "added_tokens.json").is_file() and read_json(folder / "added_tokens.json").keys() - set(expected):
        raise ValueError(f"{folder} has added_tokens.json with tokens of its own; give a tokenizer.json instead")
    return settings


def _build(source: str, build: Callable[[], Tokenizer]) -> Tokenizer:
    with tokenizers_errors(f"{source} does not hold a valid tokenizer"):
        try:
            return build()
        except ValueError as error:
            raise ValueError(f"{source}: {error}") from error
