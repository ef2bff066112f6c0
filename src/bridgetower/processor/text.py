"""Tokenizers: read from the files that checkpoints ship, or trained; and how they turn texts into token ids."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar

from jaxtyping import Int
from tokenizers import AddedToken, Encoding, Tokenizer, decoders, pre_tokenizers, processors
from tokenizers.implementations.bert_wordpiece import BertWordPieceTokenizer
from tokenizers.implementations.byte_level_bpe import ByteLevelBPETokenizer
from tokenizers.models import BPE, WordPiece
from torch import Tensor

from bridgetower.files import json_object, read_bytes, read_json

_T = TypeVar("_T")

_NAMES_IN_CONFIG = {
    "bos_token": "bos",
    "cls_token": "bos",
    "eos_token": "eos",
    "sep_token": "eos",
} | {f"{name}_token": name for name in ("pad", "unk", "mask")}
_MOST_GROWTH = 1000  # of a text by what replaces its parts
_CHARACTERS = 16  # of a text that are read first for each token that may be kept
_WORDS = 16  # before a cut, that may be split in another way than in the whole text


class TextBatch(NamedTuple):
    """Texts as the model takes them; the mask is 1 on tokens, 0 on padding, None if nothing is padded."""

    input_ids: Int[Tensor, "b l"]
    attention_mask: Int[Tensor, "b l"] | None


class Special(NamedTuple, Generic[_T]):
    """The special tokens of a tokenizer, by their spelling or by their ids."""

    bos: _T
    pad: _T
    eos: _T
    unk: _T
    mask: _T


ROBERTA = Special(bos="<s>", pad="<pad>", eos="</s>", unk="<unk>", mask="<mask>")
BERT = Special(bos="[CLS]", pad="[PAD]", eos="[SEP]", unk="[UNK]", mask="[MASK]")


def _ids_of(tokens: Special[str], tokenizer: Tokenizer) -> Special[int]:
    known = {token: tokenizer.token_to_id(token) for token in tokens}
    found = [number for number in known.values() if number is not None]
    if len(found) < len(tokens):
        missing = ", ".join(token for token, number in known.items() if number is None)
        raise ValueError(f"the vocabulary lacks {missing}; expected all of {', '.join(tokens)}")
    return Special(*found)


def special_tokens(tokenizer: Tokenizer) -> tuple[Special[str], Special[int]]:
    """Finds the special tokens, each spelled as BERT's or RoBERTa's, and checks that start and end token are added."""
    if tokenizer.padding is not None or tokenizer.truncation is not None:
        raise ValueError(
            "the tokenizer pads or cuts by itself; call its no_padding() and no_truncation() first"
        )
    usual, other = (
        (BERT, ROBERTA) if tokenizer.token_to_id(BERT.bos) is not None else (ROBERTA, BERT)
    )

    def spelled(token: str, rare: str) -> str:
        return (
            rare
            if tokenizer.token_to_id(token) is None and tokenizer.token_to_id(rare) is not None
            else token
        )

    found = Special(*map(spelled, usual, other))
    ids = _ids_of(found, tokenizer)
    with tokenizers_errors("the tokenizer cannot encode an empty text"):
        added = tokenizer.encode("").ids
    if added != [ids.bos, ids.eos]:
        raise ValueError(
            f"the tokenizer puts {added} around a text, expected {found.bos} {ids.bos} and {found.eos} {ids.eos}; "
            "set its post_processor"
        )
    return found, ids


def encode(
    tokenizer: Tokenizer,
    texts: Sequence[str],
    *,
    max_length: int,
    truncate: bool = False,
    first: int = 0,
) -> list[list[int]]:
    """Turns texts into ids with start and end token; of a text that is to be cut, no more is read than needed."""
    check_texts(texts)
    with tokenizers_errors("the tokenizer cannot encode these texts"):
        read = _CHARACTERS * max_length if truncate else sys.maxsize
        long = max(map(len, texts)) > read
        several = tokenizer.encode_batch if long else tokenizer.encode_batch_fast  # without words
        beginnings = several([text[:read] for text in texts])
        encoded = [encoding.ids for encoding in beginnings]
        cut = [row for row, text in enumerate(texts) if len(text) > read]
        whole = [row for row in cut if not _suffices(beginnings[row], max_length)]
        for number, encoding in zip(
            whole, tokenizer.encode_batch_fast([texts[row] for row in whole]), strict=True
        ):
            encoded[number] = encoding.ids
    for number, ids in enumerate(encoded):
        if len(ids) <= max_length:
            continue
        if not truncate:
            raise ValueError(
                f"text {first + number}, {_start(texts[number])}, has {len(ids)} tokens, the limit is {max_length}; "
                "shorten it, or pass truncate=True to cut it"
            )
        encoded[number] = [*ids[: max_length - 1], ids[-1]]
    return encoded


def _suffices(beginning: Encoding, max_length: int) -> bool:
    """Whether the tokens that are kept are of words that end well before the end of a part of a text."""
    if len(beginning.ids) <= max_length:
        return False
    words = beginning.word_ids
    # the last token is the end token, which belongs to no word
    kept, last = (
        words[max_length - 2],
        words[-2],
    )
    return kept is not None and last is not None and kept + _WORDS < last


@contextmanager
def tokenizers_errors(what: str) -> Iterator[None]:
    """Makes every failure of `tokenizers`, panics included, a ValueError of one line; without threads, an OSError."""
    try:
        yield
    except BaseException as error:
        if type(error) is not Exception and type(error).__name__ != "PanicException":
            raise
        reason = str(error).partition("\n")[0]
        # of rayon, which the tokenizer's files have no part in
        if "ThreadPoolBuildError" in reason:
            raise OSError(
                f"the tokenizer cannot start its threads ({reason}); allow this process more memory and threads, or "
                "set TOKENIZERS_PARALLELISM=false"
            ) from error
        raise ValueError(
            f"{what} ({reason}); copy the files of the tokenizer again, or use another one"
        ) from error


def check_texts(texts: Sequence[str]) -> None:
    if isinstance(texts, str):
        raise ValueError(
            f"one text, {_start(texts)}, where a list of texts is expected; pass [text]"
        )
    if len(texts) == 0:
        raise ValueError("no texts given; expected at least one")
    for number, text in enumerate(texts):
        if not isinstance(text, str):
            raise ValueError(f"text {number} is a {type(text).__name__}; expected a string")
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(
                f"text {number}, {_start(text)}, holds half a surrogate pair; expected valid Unicode"
            ) from error


def _start(text: str) -> str:
    return repr(text if len(text) <= 60 else text[:60] + "…")


def load_tokenizer(folder_or_file: str | os.PathLike[str]) -> Tokenizer:
    """Reads a tokenizer of `tokenizer.json`, or `vocab.json` with `merges.txt` (RoBERTa), or `vocab.txt` (BERT)."""
    path = find_tokenizer(folder_or_file)
    if path is None or path.suffix == ".model":
        raise FileNotFoundError(
            f"no tokenizer at {folder_or_file}; expected tokenizer.json, vocab.json with merges.txt, or vocab.txt: of "
            "other files transformers makes a tokenizer.json, AutoTokenizer.from_pretrained(A).save_pretrained(B)"
        )
    folder = path.parent
    if path.name == "vocab.json":
        merges_file = path.with_name("merges.txt")
        if not merges_file.is_file():
            raise FileNotFoundError(
                f"{path} needs merges.txt beside it; copy both files of the tokenizer"
            )
        settings = _settings(folder, ROBERTA)
        mask, prefix = settings.get("mask_token"), settings.get("add_prefix_space") or False
        lstrip = mask.get("lstrip", False) if isinstance(mask, dict) else True
        with _reading(folder):
            return _roberta(
                *BPE.read_file(str(path), str(merges_file)),
                add_prefix_space=prefix,
                mask_lstrip=lstrip,
            )
    if path.name == "vocab.txt":
        settings = _settings(folder, BERT)
        lines = path.read_text(encoding="utf-8").removesuffix("\n").split("\n")
        vocab = {token: number for number, token in enumerate(lines)}
        with _reading(path):
            _ids_of(BERT, Tokenizer(WordPiece(vocab, unk_token=BERT.unk)))
            bert = BertWordPieceTokenizer(
                vocab,
                handle_chinese_chars=settings.get("tokenize_chinese_chars") is not False,
                strip_accents=settings.get("strip_accents"),
                lowercase=settings.get("do_lower_case") is not False,
            )
            return Tokenizer.from_str(bert.to_str())
    content = read_bytes(path)
    with _reading(path):
        tokenizer = Tokenizer.from_str(content.decode())
    # No normaliser may make long texts of short ones: several in turn could make any amount of one letter.
    growth, waiting = 1, [json_object(content, path).get("normalizer")]
    while waiting:
        part = waiting.pop()
        if isinstance(part, dict):
            waiting += part.values()
            texts = ("x", part.get("content"), part.get("prepend"))
            growth *= max(len(text) for text in texts if isinstance(text, str))
        elif isinstance(part, list):
            waiting += part
        if growth > _MOST_GROWTH:
            raise ValueError(
                f"{path} makes texts more than {_MOST_GROWTH} times as long; use another tokenizer"
            )
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


@contextmanager
def _reading(source: Path) -> Iterator[None]:
    with tokenizers_errors(f"{source} does not hold a valid tokenizer"):
        try:
            yield
        except ValueError as error:
            raise ValueError(f"{source}: {error}") from error


def find_tokenizer(folder_or_file: str | os.PathLike[str]) -> Path | None:
    path = Path(folder_or_file)
    candidates = [path, *(path / name for name in ("tokenizer.json", "vocab.json", "vocab.txt"))]
    return next((candidate for candidate in candidates if candidate.is_file()), None)


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
    first: list[str | AddedToken] = [ROBERTA.bos, ROBERTA.pad, ROBERTA.eos, ROBERTA.unk]
    learner.train_from_iterator(
        iter(texts), vocab_size - 1, show_progress=False, special_tokens=first
    )
    model = json.loads(learner.to_str())["model"]
    vocab = model["vocab"] | {ROBERTA.mask: len(model["vocab"])}
    return _roberta(vocab, [(left, right) for left, right in model["merges"]])


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
    ids = _ids_of(ROBERTA, tokenizer)
    tokenizer.post_processor = processors.RobertaProcessing(
        (ROBERTA.eos, ids.eos),
        (ROBERTA.bos, ids.bos),
        trim_offsets=True,
        add_prefix_space=add_prefix_space,
    )
    plain = (ROBERTA.bos, ROBERTA.pad, ROBERTA.eos, ROBERTA.unk)
    tokenizer.add_special_tokens([*plain, AddedToken(ROBERTA.mask, lstrip=mask_lstrip)])
    return tokenizer


def _settings(folder: Path, expected: Special[str]) -> dict[str, Any]:
    """Merges the tokenizer's side files and refuses special tokens that would be ignored."""
    settings: dict[str, Any] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        if (folder / name).is_file():
            settings |= read_json(folder / name)
    for key, role in _NAMES_IN_CONFIG.items():
        given = settings.get(key)
        content, usual = (
            given.get("content") if isinstance(given, dict) else given,
            getattr(expected, role),
        )
        if content not in (None, usual):
            raise ValueError(
                f"{folder} sets {key} to {content!r}, expected {usual!r}; give a tokenizer.json instead"
            )
    if (folder / "added_tokens.json").is_file() and read_json(
        folder / "added_tokens.json"
    ).keys() - set(expected):
        raise ValueError(
            f"{folder} has added_tokens.json with tokens of its own; give a tokenizer.json instead"
        )
    return settings
