"""Reads tokenizers from the files of checkpoints, trains them, and turns texts into token ids."""

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
# Of a text that is cut, so many characters are read first for each token.
_CHARACTERS_PER_TOKEN = 16
# So many words before the end of an incomplete text may be split in another way than in the whole text.
_UNCERTAIN_WORDS = 16


class TextBatch(NamedTuple):
    """Texts as the model takes them. The mask is 1 on tokens, 0 on padding, and None without padding."""

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
    ids = [tokenizer.token_to_id(token) for token in tokens]
    missing = [token for token, number in zip(tokens, ids, strict=True) if number is None]
    if missing:
        expected = ", ".join(tokens)
        raise ValueError(f"the vocabulary lacks {', '.join(missing)}; expected all of {expected}")
    return Special(*(number for number in ids if number is not None))


def special_tokens(tokenizer: Tokenizer) -> tuple[Special[str], Special[int]]:
    """Finds the special tokens, each spelled as BERT's or RoBERTa's, and checks that start and end token are added."""
    if tokenizer.padding is not None or tokenizer.truncation is not None:
        raise ValueError(
            "the tokenizer pads or cuts by itself; call its no_padding() and no_truncation() first"
        )

    # A vocabulary may spell some tokens as BERT does and others as RoBERTa does.
    def is_known(token: str) -> bool:
        return tokenizer.token_to_id(token) is not None

    spellings = (BERT, ROBERTA) if is_known(BERT.bos) else (ROBERTA, BERT)
    tokens = Special(
        *(
            other if is_known(other) and not is_known(usual) else usual
            for usual, other in zip(*spellings, strict=True)
        )
    )
    ids = _ids_of(tokens, tokenizer)
    with tokenizers_errors("the tokenizer cannot encode an empty text"):
        added = tokenizer.encode("").ids
    if added != [ids.bos, ids.eos]:
        raise ValueError(
            f"the tokenizer puts {added} around a text, expected {tokens.bos} {ids.bos} and {tokens.eos} {ids.eos}; "
            "set its post_processor"
        )
    return tokens, ids


def encode_texts(
    tokenizer: Tokenizer,
    texts: Sequence[str],
    *,
    max_length: int,
    truncate: bool = False,
    first: int = 0,
) -> list[list[int]]:
    """Turns texts into ids with start and end token, and reads no more than needed of a text that is cut."""
    check_texts(texts)
    with tokenizers_errors("the tokenizer cannot encode these texts"):
        # Read the beginning of each text. The fast method does not tell words.
        num_characters = _CHARACTERS_PER_TOKEN * max_length if truncate else sys.maxsize
        cut = [row for row, text in enumerate(texts) if len(text) > num_characters]
        encode_batch = tokenizer.encode_batch if cut else tokenizer.encode_batch_fast
        beginnings = encode_batch([text[:num_characters] for text in texts])
        encoded = [encoding.ids for encoding in beginnings]

        # Read all of the texts whose beginning does not tell the tokens.
        rows = [row for row in cut if not _suffices(beginnings[row], max_length)]
        full = tokenizer.encode_batch_fast([texts[row] for row in rows])
        for row, encoding in zip(rows, full, strict=True):
            encoded[row] = encoding.ids

    # Cut what is longer than the limit.
    for row, ids in enumerate(encoded):
        if len(ids) <= max_length:
            continue
        if not truncate:
            raise ValueError(
                f"text {first + row}, {_quoted(texts[row])}, has {len(ids)} tokens, the limit is {max_length}; "
                "shorten it, or pass truncate=True to cut it"
            )
        encoded[row] = [*ids[: max_length - 1], ids[-1]]
    return encoded


def _suffices(beginning: Encoding, max_length: int) -> bool:
    """Whether the first tokens belong to words that end well before the end of the beginning of a text."""
    if len(beginning.ids) <= max_length:
        return False
    # The end token belongs to no word.
    words = beginning.word_ids
    cut_word = words[max_length - 2]
    last_word = words[-2]
    if cut_word is None or last_word is None:
        return False
    return cut_word + _UNCERTAIN_WORDS < last_word


@contextmanager
def tokenizers_errors(problem: str) -> Iterator[None]:
    """Turns failures of `tokenizers`, panics included, into ValueError, or into OSError if it gets no threads."""
    try:
        yield
    except BaseException as error:
        if type(error) is not Exception and type(error).__name__ != "PanicException":
            raise
        reason = str(error).partition("\n")[0]
        # rayon reports a lack of threads, for which the files are not to blame.
        if "ThreadPoolBuildError" in reason:
            raise OSError(
                f"the tokenizer cannot start its threads ({reason}); allow this process more memory and threads, or "
                "set TOKENIZERS_PARALLELISM=false"
            ) from error
        raise ValueError(
            f"{problem} ({reason}); copy the files of the tokenizer again, or use another one"
        ) from error


def check_texts(texts: Sequence[str]) -> None:
    if isinstance(texts, str):
        raise ValueError(
            f"one text, {_quoted(texts)}, where a list of texts is expected; pass [text]"
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
                f"text {number}, {_quoted(text)}, holds half a surrogate pair; expected valid Unicode"
            ) from error


def _quoted(text: str) -> str:
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

    # RoBERTa has a vocabulary and merges.
    if path.name == "vocab.json":
        merges_file = path.with_name("merges.txt")
        if not merges_file.is_file():
            raise FileNotFoundError(
                f"{path} needs merges.txt beside it; copy both files of the tokenizer"
            )
        settings = _tokenizer_settings(folder, ROBERTA)
        mask = settings.get("mask_token")
        with _tokenizer_file_errors(folder):
            return _roberta(
                *BPE.read_file(str(path), str(merges_file)),
                add_prefix_space=settings.get("add_prefix_space") or False,
                mask_lstrip=mask.get("lstrip", False) if isinstance(mask, dict) else True,
            )

    # BERT has a vocabulary, a token a line.
    if path.name == "vocab.txt":
        settings = _tokenizer_settings(folder, BERT)
        lines = path.read_text(encoding="utf-8").removesuffix("\n").split("\n")
        vocab = {token: number for number, token in enumerate(lines)}
        with _tokenizer_file_errors(path):
            _ids_of(BERT, Tokenizer(WordPiece(vocab, unk_token=BERT.unk)))
            bert = BertWordPieceTokenizer(
                vocab,
                handle_chinese_chars=settings.get("tokenize_chinese_chars") is not False,
                strip_accents=settings.get("strip_accents"),
                lowercase=settings.get("do_lower_case") is not False,
            )
            return Tokenizer.from_str(bert.to_str())

    # A tokenizer.json has everything.
    content = read_bytes(path)
    with _tokenizer_file_errors(path):
        tokenizer = Tokenizer.from_str(content.decode())
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
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


@contextmanager
def _tokenizer_file_errors(source: Path) -> Iterator[None]:
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
    return _roberta(vocab, [(first, second) for first, second in model["merges"]])


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


def _tokenizer_settings(folder: Path, expected: Special[str]) -> dict[str, Any]:
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
