"""Token ids: which ones are special, how texts become lists of them, how lists become batches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Bool, Int
from tokenizers import Encoding, Tokenizer
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

_SHOWN = 60
_WORDPIECE_PREFIX = "##"
_BYTE_LEVEL_SPACE = "Ġ"  # how byte-level BPE spells a space


@dataclass(frozen=True)
class TextBatch:
    """Texts as the model takes them.

    Attributes:
        attention_mask: 1 on tokens, 0 on padding; None if nothing is padded.
    """

    input_ids: Int[Tensor, "b l"]
    attention_mask: Int[Tensor, "b l"] | None


class SpecialIds(NamedTuple):
    """Ids of the special tokens of one tokenizer."""

    bos: int
    pad: int
    eos: int
    unk: int
    mask: int


class SpecialTokens(NamedTuple):
    """Spelling of the special tokens of one family of tokenizers."""

    bos: str
    pad: str
    eos: str
    unk: str
    mask: str

    def ids(self, tokenizer: Tokenizer) -> SpecialIds:
        """Looks the tokens up.

        Raises:
            ValueError: One of them is not in the vocabulary.
        """
        known = {token: tokenizer.token_to_id(token) for token in self}
        found = [number for number in known.values() if number is not None]
        if len(found) < len(self):
            missing = ", ".join(token for token, number in known.items() if number is None)
            raise ValueError(f"the vocabulary lacks {missing}; expected all of {', '.join(self)}")
        return SpecialIds(*found)


ROBERTA = SpecialTokens(bos="<s>", pad="<pad>", eos="</s>", unk="<unk>", mask="<mask>")
BERT = SpecialTokens(bos="[CLS]", pad="[PAD]", eos="[SEP]", unk="[UNK]", mask="[MASK]")


def special_tokens(tokenizer: Tokenizer) -> SpecialTokens:
    """Tells RoBERTa's family of tokenizers from BERT's and checks that texts come out between start and end token.

    Raises:
        ValueError: It is of neither family, adds other tokens, or pads or cuts by itself.
    """
    if tokenizer.padding is not None or tokenizer.truncation is not None:
        raise ValueError("the tokenizer pads or cuts by itself; call its no_padding() and no_truncation() first")
    family = BERT if tokenizer.token_to_id(BERT.bos) is not None else ROBERTA
    ids = family.ids(tokenizer)
    with tokenizers_errors("the tokenizer cannot encode an empty text"):
        added = tokenizer.encode("").ids
    if added != [ids.bos, ids.eos]:
        raise ValueError(
            f"the tokenizer puts {added} around a text, expected {family.bos} {ids.bos} and {family.eos} {ids.eos}; "
            "set its post_processor"
        )
    return family


def continues_word(tokenizer: Tokenizer) -> Bool[Tensor, " v"]:
    """Tells for each id whether its token carries on the word before it, for whole-word masking.

    In BERT's family those are the tokens that begin with `##`, in RoBERTa's (byte-level BPE) those that do not begin
    with a space. The first word of a text has no space before it: there the special token in front ends the word.

    Raises:
        ValueError: The tokenizer is of neither family.
    """
    family = special_tokens(tokenizer)
    tokens = [tokenizer.id_to_token(number) for number in range(tokenizer.get_vocab_size(with_added_tokens=True))]
    if family is BERT:
        return torch.tensor([token is not None and token.startswith(_WORDPIECE_PREFIX) for token in tokens])
    return torch.tensor([token not in (None, *family) and not token.startswith(_BYTE_LEVEL_SPACE) for token in tokens])


def encode(tokenizer: Tokenizer, texts: Sequence[str], *, max_length: int, truncate: bool = False) -> list[list[int]]:
    """Turns texts into ids with start and end token, unpadded.

    Args:
        tokenizer: Adds start and end token itself.
        texts: At least one.
        max_length: Longest list.
        truncate: Cut longer texts; the end token stays.

    Raises:
        ValueError: There are no texts, one is not a string or not valid Unicode, or too long and not to be cut.
    """
    _check_texts(texts)
    with tokenizers_errors("the tokenizer cannot encode these texts"):
        encoded = [encoding.ids for encoding in tokenizer.encode_batch_fast(list(texts))]
    for number, ids in enumerate(encoded):
        if len(ids) <= max_length:
            continue
        if not truncate:
            raise ValueError(
                f"text {number}, {_start(texts[number])}, has {len(ids)} tokens, the limit is {max_length}; "
                "shorten it, or pass truncate=True to cut it"
            )
        encoded[number] = [*ids[: max_length - 1], ids[-1]]
    return encoded


def encode_with_offsets(tokenizer: Tokenizer, text: str) -> Encoding:
    """Turns a text into ids with the characters that each stands for, uncut.

    Raises:
        ValueError: The text is not valid Unicode, or the tokenizer fails.
    """
    _check_texts([text])
    with tokenizers_errors("the tokenizer cannot encode this text"):
        return tokenizer.encode(text)


def decode(tokenizer: Tokenizer, ids: Sequence[int], *, skip_special_tokens: bool) -> str:
    """Turns ids back into a text.

    Raises:
        ValueError: The tokenizer fails.
    """
    with tokenizers_errors("the tokenizer cannot decode these ids"):
        return tokenizer.decode(list(ids), skip_special_tokens=skip_special_tokens)


@contextmanager
def tokenizers_errors(what: str) -> Iterator[None]:
    """Makes every failure of `tokenizers` a ValueError of one line.

    It raises bare `Exception` for all errors of its own, and where its Rust code panics, what is no `Exception` at all.

    Args:
        what: Cannot be done.
    """
    try:
        yield
    except BaseException as error:
        if type(error) is not Exception and type(error).__name__ != "PanicException":
            raise
        reason = str(error).partition("\n")[0]
        raise ValueError(f"{what} ({reason}); copy the files of the tokenizer again, or use another one") from error


def join_pair(
    first: Sequence[int], second: Sequence[int], *, family: SpecialTokens, ids: SpecialIds, max_length: int
) -> list[int]:
    """Joins two texts as RoBERTa (`<s> A </s></s> B </s>`) or BERT (`[CLS] A [SEP] B [SEP]`) was trained on them.

    Args:
        first, second: Ids with start and end token.
        family, ids: Of the tokenizer.
        max_length: Longest list; the longer text is cut, then both (transformers' `longest_first`).
    """
    between = [ids.eos] if family is BERT else [ids.eos, ids.eos]
    a, b = list(first[1:-1]), list(second[1:-1])
    room = max_length - 2 - len(between)
    shorter, longer = sorted((len(a), len(b)))
    if shorter + longer > room:
        shorter = min(shorter, room // 2)
        longer = room - shorter
    kept = (longer, shorter) if len(a) > len(b) else (shorter, longer)
    return [ids.bos, *a[: kept[0]], *between, *b[: kept[1]], ids.eos]


def pad(ids: Sequence[Sequence[int]], pad_token_id: int) -> TextBatch:
    """Fills lists of ids up to the longest of them, on the right.

    Raises:
        ValueError: There are no lists, or one is empty.
    """
    if not ids or not all(ids):
        raise ValueError(f"{len(ids)} lists of token ids, some without a token; expected at least one, none empty")
    lengths = torch.tensor([len(row) for row in ids])
    input_ids = pad_sequence([torch.tensor(row) for row in ids], batch_first=True, padding_value=pad_token_id)
    present = torch.arange(input_ids.shape[1]) < lengths[:, None]
    return TextBatch(input_ids, None if bool(present.all()) else present.long())


def _check_texts(texts: Sequence[str]) -> None:
    if isinstance(texts, str):
        raise ValueError(f"one text, {_start(texts)}, where a list of texts is expected; pass [text]")
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
    return repr(text if len(text) <= _SHOWN else text[:_SHOWN] + "…")
