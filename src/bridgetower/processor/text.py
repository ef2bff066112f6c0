"""Turns texts into token ids, and checks the texts and the tokenizer."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Generic, NamedTuple, TypeVar

from jaxtyping import Int
from tokenizers import Encoding, Tokenizer
from torch import Tensor

_T = TypeVar("_T")

# Of a text that is cut, this many characters are read first for each token that is kept.
_CHARACTERS_PER_TOKEN = 16
# This many words before the end of an incomplete text may be split in another way than in the whole text.
_UNCERTAIN_WORDS = 16


class TextBatch(NamedTuple):
    """Texts as the model takes them. The mask is 1 on tokens, 0 on padding, and None without padding."""

    input_ids: Int[Tensor, "b l"]
    attention_mask: Int[Tensor, "b l"] | None


class SpecialTokens(NamedTuple, Generic[_T]):
    """The special tokens of a tokenizer: their spellings, or their ids."""

    bos: _T
    pad: _T
    eos: _T
    unk: _T
    mask: _T


ROBERTA = SpecialTokens(bos="<s>", pad="<pad>", eos="</s>", unk="<unk>", mask="<mask>")
BERT = SpecialTokens(bos="[CLS]", pad="[PAD]", eos="[SEP]", unk="[UNK]", mask="[MASK]")


class CheckedTokenizer(NamedTuple):
    """A tokenizer, and the spellings and ids of its special tokens."""

    tokenizer: Tokenizer
    special: SpecialTokens[str]
    special_ids: SpecialTokens[int]


def check_tokenizer(tokenizer: Tokenizer) -> CheckedTokenizer:
    """Finds the special tokens, each spelled as BERT's or RoBERTa's, and checks that start and end token are added."""
    if tokenizer.padding is not None or tokenizer.truncation is not None:
        raise ValueError(
            "the tokenizer pads or cuts by itself; call its no_padding() and no_truncation() first"
        )

    # A vocabulary may spell some tokens as BERT does and others as RoBERTa does.
    def is_known(token: str) -> bool:
        return tokenizer.token_to_id(token) is not None

    usual, other = (BERT, ROBERTA) if is_known(BERT.bos) else (ROBERTA, BERT)
    spellings = []
    for token, other_token in zip(usual, other, strict=True):
        has_other = is_known(other_token) and not is_known(token)
        spellings.append(other_token if has_other else token)
    special = SpecialTokens(*spellings)
    ids = special_ids(special, tokenizer)

    # An empty text is start and end token.
    with tokenizers_errors("the tokenizer cannot encode an empty text"):
        added = tokenizer.encode("").ids
    if added != [ids.bos, ids.eos]:
        raise ValueError(
            f"the tokenizer puts {added} around a text, expected {special.bos} {ids.bos} and {special.eos} {ids.eos}; "
            "set its post_processor"
        )
    return CheckedTokenizer(tokenizer, special, ids)


def special_ids(special: SpecialTokens[str], tokenizer: Tokenizer) -> SpecialTokens[int]:
    """Returns the ids of special tokens, or raises ValueError if the vocabulary lacks some."""
    ids = []
    missing = []
    for token in special:
        number = tokenizer.token_to_id(token)
        if number is None:
            missing.append(token)
        else:
            ids.append(number)
    if missing:
        expected = ", ".join(special)
        raise ValueError(f"the vocabulary lacks {', '.join(missing)}; expected all of {expected}")
    return SpecialTokens(*ids)


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
    num_characters = _CHARACTERS_PER_TOKEN * max_length if truncate else sys.maxsize
    long_rows = [row for row, text in enumerate(texts) if len(text) > num_characters]
    with tokenizers_errors("the tokenizer cannot encode these texts"):
        if long_rows:
            # The beginning of each text. The fast method does not return the words that `_suffices` reads.
            encodings = tokenizer.encode_batch([text[:num_characters] for text in texts])
            # The whole of each text whose beginning does not suffice.
            rows = [row for row in long_rows if not _suffices(encodings[row], max_length)]
            full = tokenizer.encode_batch_fast([texts[row] for row in rows])
            for row, encoding in zip(rows, full, strict=True):
                encodings[row] = encoding
        else:
            encodings = tokenizer.encode_batch_fast(list(texts))

    # Cut what is longer than the limit.
    encoded = [encoding.ids for encoding in encodings]
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
    """Whether the beginning of a text has all tokens that are kept, of words well before its end."""
    if len(beginning.ids) <= max_length:
        return False
    # The end token belongs to no word.
    words = beginning.word_ids
    last_kept = words[max_length - 2]
    last_read = words[-2]
    if last_kept is None or last_read is None:
        return False
    return last_kept + _UNCERTAIN_WORDS < last_read


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
    if len(text) > 60:
        text = text[:60] + "…"
    return repr(text)
