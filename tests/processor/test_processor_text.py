"""Token ids against transformers' tokenizers, cutting, padding and errors."""

import json
from dataclasses import replace
from functools import cache

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from bridgetower.processor import Processor, ProcessorConfig, load_tokenizer, train_tokenizer
from bridgetower.processor.text import encode_texts, tokenizers_errors

TEXTS = [
    "",
    " ",
    "A dog runs on the grass.",
    " leading space",
    "two  spaces and   three",
    "trailing space ",
    "tab\tand\nnewline\r\n",
    "Ein schöner Hund läuft über die Straße",
    "犬が走っている",
    "собака бежит",
    "emoji 🐕‍🦺 👩🏽‍🚀 flags 🇩🇪",
    "a <mask> runs",
    "a<mask>runs on the  <mask>",
    "<s> inner </s><pad>",
    "don't, we'll; it's 1,000.50 $",
    "e\u0301 versus \u00e9, ﬁ, \u200b, \ufeff",
    "A" * 300,
]

VOCAB_TXT = [f"[{name}]" for name in ("PAD", "UNK", "CLS", "SEP", "MASK")]
VOCAB_TXT += ["a", "dog", "Dog", "run", "##s", "##ning", ",", "'", "ä", "犬"]


def _roberta(folder):
    transformers = pytest.importorskip("transformers")
    vocab = json.loads((folder / "vocab.json").read_text())
    merges = [
        tuple(line.split(" ")) for line in (folder / "merges.txt").read_text().splitlines()[1:]
    ]
    mask = transformers.AddedToken("<mask>", lstrip=True)
    return transformers.RobertaTokenizer(vocab=vocab, merges=merges, mask_token=mask)


@pytest.fixture(scope="module")
def roberta_folder(tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("roberta")
    tokenizer.model.save(str(folder))
    return folder


def test_vocab_and_merges_equal_transformers(roberta_folder):
    ours = load_tokenizer(roberta_folder)
    theirs = _roberta(roberta_folder)
    for text in TEXTS:
        assert ours.encode(text).ids == theirs(text).input_ids, text
    assert ours.encode("A dog").ids != ours.encode(" A dog").ids, "no leading space is added"


@settings(
    max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    text=st.lists(
        st.one_of(st.text(max_size=12), st.sampled_from(["<mask>", " ", "</s>", "dog"]))
    ).map("".join)
)
def test_any_text_equals_transformers_and_comes_back(text, roberta_folder):
    ours, theirs = _cached_pair(roberta_folder)
    ids = ours.encode(text).ids
    assert ids == theirs(text).input_ids
    if "<" not in text:
        assert ours.decode(ids) == text


@cache
def _cached_pair(folder):
    return load_tokenizer(folder), _roberta(folder)


def test_the_comparison_sees_a_leading_space_and_the_mask_token(roberta_folder, tmp_path):
    theirs = _roberta(roberta_folder)
    for name in ("vocab.json", "merges.txt"):
        (tmp_path / name).write_bytes((roberta_folder / name).read_bytes())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"add_prefix_space": True}))
    assert load_tokenizer(tmp_path).encode("A dog").ids != theirs("A dog").input_ids
    settings_of_mask = {"mask_token": {"content": "<mask>", "lstrip": False}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings_of_mask))
    assert load_tokenizer(tmp_path).encode("a <mask>").ids != theirs("a <mask>").input_ids


@pytest.mark.parametrize(
    "options",
    [{}, {"do_lower_case": False}, {"strip_accents": False}, {"tokenize_chinese_chars": False}],
)
def test_bert_equals_transformers(options, tmp_path):
    transformers = pytest.importorskip("transformers")
    (tmp_path / "vocab.txt").write_text("\n".join(VOCAB_TXT) + "\n")
    if options:
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(options))
    ours = load_tokenizer(tmp_path)
    theirs = transformers.BertTokenizer(
        vocab={token: number for number, token in enumerate(VOCAB_TXT)}, **options
    )
    for text in [*TEXTS, "A Dog, runs' RUNNING ä Ä 犬犬 a[MASK]dog", "\x00dog\u00a0a"]:
        assert ours.encode(text).ids == theirs(text).input_ids, text


def test_tokenizer_json_is_read_without_its_padding_and_truncation(tokenizer, tmp_path):
    fixed = Tokenizer.from_str(tokenizer.to_str())
    fixed.enable_padding(length=40)
    fixed.enable_truncation(5)
    fixed.save(str(tmp_path / "tokenizer.json"))
    text = "A dog runs on the grass"
    for source in (tmp_path, tmp_path / "tokenizer.json"):
        assert load_tokenizer(source).encode(text).ids == tokenizer.encode(text).ids


def test_missing_and_damaged_tokenizers(roberta_folder, tmp_path):
    (tmp_path / "spm.model").write_bytes(b"\x0e")
    for source in (tmp_path, tmp_path / "spm.model"):
        with pytest.raises(FileNotFoundError, match=r"no tokenizer at .*AutoTokenizer\.from_"):
            load_tokenizer(source)
    (tmp_path / "vocab.json").write_bytes((roberta_folder / "vocab.json").read_bytes())
    with pytest.raises(FileNotFoundError, match=r"needs merges\.txt"):
        load_tokenizer(tmp_path)
    (tmp_path / "merges.txt").write_text("#version: 0.2\nnot known\n")
    with pytest.raises(ValueError, match="does not hold a valid tokenizer"):
        load_tokenizer(tmp_path)
    (tmp_path / "vocab.json").write_text('{"a": 0}')
    (tmp_path / "merges.txt").write_text("#version: 0.2\n")
    with pytest.raises(ValueError, match="lacks <s>, <pad>, </s>, <unk>, <mask>"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match="does not hold a valid tokenizer"):
        load_tokenizer(tmp_path)


def test_special_tokens_that_would_be_ignored(roberta_folder, tmp_path):
    for file in roberta_folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    for name, content, message in (
        (
            "tokenizer_config.json",
            {"mask_token": "[M]"},
            r"mask_token to '\[M\]', expected '<mask>'",
        ),
        ("special_tokens_map.json", {"pad_token": {"content": "[P]"}}, r"pad_token to '\[P\]'"),
        ("added_tokens.json", {"<image>": 320}, "tokens of its own"),
    ):
        (tmp_path / name).write_text(json.dumps(content))
        with pytest.raises(ValueError, match=message):
            load_tokenizer(tmp_path)
        (tmp_path / name).unlink()


def test_trained_tokenizer_has_robertas_ids_and_is_deterministic(tokenizer):
    captions = ["a dog runs", "two dogs run", "the dog ran"] * 5
    first, second = (train_tokenizer(captions, vocab_size=280) for _ in range(2))
    assert first.to_str() == second.to_str()
    assert first.to_str() != train_tokenizer(captions, vocab_size=270).to_str()
    ids = [first.token_to_id(token) for token in ("<s>", "<pad>", "</s>", "<unk>", "<mask>")]
    assert ids == [0, 1, 2, 3, first.get_vocab_size() - 1]
    assert first.get_vocab_size() <= 280
    assert tokenizer.get_vocab_size() == 320
    assert 3 not in tokenizer.encode("ключ 🗝 \x00").ids


def test_training_needs_texts_and_room():
    with pytest.raises(ValueError, match="no captions"):
        train_tokenizer([], vocab_size=300)
    with pytest.raises(ValueError, match=r"vocab_size is 260.*need 261"):
        train_tokenizer(["a"], vocab_size=260)


def test_batches_are_padded_to_their_longest_text(config, tokenizer):
    processor = Processor(config, tokenizer)
    texts = ["A dog", "A dog runs on the grass."]
    short, long = processor.token_ids(texts)
    batch = processor.texts(texts)
    missing = len(long) - len(short)
    assert batch.input_ids.tolist() == [short + [1] * missing, long]
    assert batch.attention_mask.tolist() == [[1] * len(short) + [0] * missing, [1] * len(long)]
    assert processor.texts(["A dog", "A dog"]).attention_mask is None
    assert batch.input_ids.dtype == batch.attention_mask.dtype == torch.long


def test_too_long_texts_name_the_way_out(config, tokenizer):
    text = "A dog runs on the grass. " * 9
    count = len(tokenizer.encode(text).ids)
    with pytest.raises(
        ValueError, match=rf"text 1, 'A dog runs on .*…', has {count} tokens, .* 12; .*truncate"
    ):
        Processor(config, tokenizer).texts(["A dog", text])


def test_truncation_keeps_the_end_token_and_equals_transformers(config, tokenizer, roberta_folder):
    processor = Processor(config, tokenizer)
    theirs = _roberta(roberta_folder)
    for text in TEXTS:
        expected = theirs(text, truncation=True, max_length=config.max_length).input_ids
        assert processor.token_ids([text], truncate=True) == [expected]
        assert expected[-1] == 2, "the end token"


@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(pair=st.lists(st.sampled_from([text for text in TEXTS if text]), min_size=1, max_size=2))
def test_pairs_are_joined_and_cut_as_roberta_does(pair, config, tokenizer, roberta_folder):
    processor = Processor(config, tokenizer)
    _, theirs = _cached_pair(roberta_folder)
    expected = theirs(*pair, truncation="longest_first", max_length=config.max_length).input_ids
    assert processor.pair_ids([pair]) == [expected]


def test_pairs_are_joined_as_bert_does(config, tmp_path):
    transformers = pytest.importorskip("transformers")
    (tmp_path / "vocab.txt").write_text("\n".join(VOCAB_TXT) + "\n")
    processor = Processor(config, load_tokenizer(tmp_path))
    theirs = transformers.BertTokenizer(
        vocab={token: number for number, token in enumerate(VOCAB_TXT)}
    )
    pairs = [
        ("a dog", "running"),
        ("a dog running, runs", "a dog running, runs a dog a dog"),
        ("a dog", "a " * 40),
    ]
    expected = [
        theirs(*pair, truncation="longest_first", max_length=config.max_length).input_ids
        for pair in pairs
    ]
    assert processor.pair_ids(pairs) == expected
    assert processor.pair_ids([("a dog",), pairs[0]]) == [
        processor.token_ids(["a dog"])[0],
        expected[0],
    ]
    with pytest.raises(ValueError, match="an example has 3 texts; expected one or two"):
        processor.pair_ids([("a", "b", "c")])


def test_a_text_of_exactly_the_limit_is_whole(config, tokenizer):
    ids = tokenizer.encode("A dog runs").ids
    processor = Processor(replace(config, max_length=len(ids)), tokenizer)
    assert (
        processor.token_ids(["A dog runs"])
        == processor.token_ids(["A dog runs"], truncate=True)
        == [ids]
    )
    with pytest.raises(ValueError, match="the limit is"):
        Processor(replace(config, max_length=len(ids) - 1), tokenizer).token_ids(["A dog runs"])


def test_special_ids_and_decoding(config, tokenizer):
    processor = Processor(config, tokenizer)
    mask = tokenizer.get_vocab_size() - 1
    assert (processor.token_ids([""]), processor.pad_token_id) == ([[0, 2]], 1)
    assert (processor.mask_token_id, processor.mask_token, processor.vocab_size) == (
        mask,
        "<mask>",
        320,
    )
    assert processor.special_ids == {0, 1, 2, 3, mask}
    batch = processor.texts(["A ö 🐕", "A dog runs"])
    assert [processor.decode(row) for row in batch.input_ids] == ["A ö 🐕", "A dog runs"]
    assert processor.decode([0, mask, 2], skip_special_tokens=False) == "<s><mask></s>"
    (dog,) = set(processor.token_ids(["A dog"])[0]) - set(processor.token_ids(["A"])[0])
    assert processor.word(dog) == "dog"
    assert processor.word(dog) is processor.word(dog)  # it is decoded once


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        ([], "no texts"),
        ("A dog", "one text, 'A dog', where a list"),
        (["A dog", None], "text 1 is a NoneType"),
        (["\ud83d"], "half a surrogate pair"),
    ],
)
def test_bad_texts(texts, message, config, tokenizer):
    with pytest.raises(ValueError, match=message):
        Processor(config, tokenizer).texts(texts)


def test_nothing_to_pad(config, tokenizer):
    for ids in ([], [[]], [[0, 2], []]):
        with pytest.raises(ValueError, match="expected at least one, none empty"):
            Processor(config, tokenizer).pad(ids)


def test_words_of_byte_level_bpe(config, tokenizer):
    processor = Processor(config, tokenizer)
    words = []
    for number in processor.token_ids([" xyz dogs <mask> dog"])[0]:
        words += [] if processor.continues_word[number] else [[]]
        words[-1].append(tokenizer.id_to_token(number))
    assert ["".join(word) for word in words] == ["<s>", "Ġxyz", "Ġdogs", "<mask>", "Ġdog", "</s>"]
    assert len(words[1]) > 1
    assert not processor.continues_word[list(processor.special_ids)].any()
    assert len(processor.continues_word) == processor.vocab_size


def test_unsuitable_tokenizers_are_refused(tokenizer):
    config = ProcessorConfig(profile="hf", image_size=32, max_length=8)
    with pytest.raises(ValueError, match="post_processor"):
        Processor(config, Tokenizer.from_str(_changed(tokenizer, post_processor=None)))
    padding = Tokenizer.from_str(tokenizer.to_str())
    padding.enable_padding()
    with pytest.raises(ValueError, match="pads or cuts"):
        Processor(config, padding)


def _changed(tokenizer, **changes):
    return json.dumps(json.loads(tokenizer.to_str()) | changes)


_TEMPLATE = [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
_PANICKING = {
    "when it is read": {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"}},
    "at any text": {
        "post_processor": {
            "type": "TemplateProcessing",
            "single": _TEMPLATE,
            "pair": _TEMPLATE,
            "special_tokens": {},
        }
    },
}


@pytest.mark.parametrize("changes", _PANICKING.values(), ids=_PANICKING)
def test_a_tokenizer_that_panics_is_an_error(changes, tokenizer, tmp_path):
    (tmp_path / "tokenizer.json").write_text(_changed(tokenizer, **changes))
    with pytest.raises(
        ValueError, match=r"valid tokenizer \(|cannot encode an empty text \("
    ) as caught:
        Processor(
            ProcessorConfig(profile="hf", image_size=32, max_length=8), load_tokenizer(tmp_path)
        )
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "normalizers",
    [
        [{"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 50}]
        * 3,  # 125,000 letters of one
        [{"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "a" * 2000}]}],
    ],
)
def test_a_tokenizer_that_makes_long_texts_of_short_ones_is_refused(
    normalizers, tokenizer, tmp_path
):
    growing = {"type": "Sequence", "normalizers": normalizers}
    (tmp_path / "tokenizer.json").write_text(_changed(tokenizer, normalizer=growing))
    with pytest.raises(
        ValueError, match=r"tokenizer\.json makes texts more than 1000 times as long; use another"
    ):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("kind", ["panics", "a bare Exception"])
def test_texts_that_a_tokenizer_fails_at_are_errors(kind, tokenizer):
    changes = {"pre_tokenizer": {"type": "FixedLength", "length": 0}}
    if kind == "a bare Exception":
        vocab = json.loads(tokenizer.to_str())["model"]["vocab"]
        changes = {
            "model": {"type": "WordLevel", "unk_token": "<none>", "vocab": vocab},
            "pre_tokenizer": None,
        }
    failing = Tokenizer.from_str(_changed(tokenizer, **changes))
    processor = Processor(ProcessorConfig(profile="hf", image_size=32, max_length=8), failing)
    for use, texts in (("token_ids", ["a dog"]), ("pair_ids", [("a dog", "a cat")])):
        with pytest.raises(ValueError, match=r"^the tokenizer cannot encode th.*use another one$"):
            getattr(processor, use)(texts)


@pytest.mark.parametrize(
    ("model", "space", "special", "between"),
    [
        ("bpe", "Ġ", ("[CLS]", "[PAD]", "[SEP]", "[UNK]", "[MASK]"), 1),  # ModernBERT
        ("unigram", "▁", ("[CLS]", "[PAD]", "[SEP]", "[UNK]", "[MASK]"), 1),  # DeBERTa-v3
        ("unigram", "▁", ("<s>", "<pad>", "</s>", "<unk>", "<mask>"), 2),  # XLM-RoBERTa
        ("word pieces", "", ("<s>", "<pad>", "</s>", "[UNK]", "<mask>"), 2),  # MPNet
    ],
)
def test_special_tokens_and_words_of_other_families(model, space, special, between, config):
    plain = [f"{space}red", f"{space}ship", "##s" if model == "word pieces" else "s"]
    vocab = {token: number for number, token in enumerate([*special, *plain])}
    unknown = special[3]
    builders = {
        "bpe": lambda: models.BPE(vocab, [], unk_token=unknown),
        "unigram": lambda: models.Unigram(
            [(token, -float(number)) for token, number in vocab.items()], vocab[unknown]
        ),
        "word pieces": lambda: models.WordPiece(vocab, unk_token=unknown),
    }
    made = Tokenizer(builders[model]())
    start, _, end = special[:3]
    ids = [(start, vocab[start]), (end, vocab[end])]
    pair = f"{start} $A {f'{end} ' * between}$B {end}"
    made.post_processor = processors.TemplateProcessing(
        single=f"{start} $A {end}", pair=pair, special_tokens=ids
    )
    processor = Processor(config, made)
    assert (processor.token_ids([""]), processor.pad_token_id) == ([[0, 2]], 1)
    assert (processor.mask_token, processor.mask_token_id) == (special[4], 4)
    assert processor.continues_word.tolist() == [False] * 7 + [True]
    assert processor.pair_ids([("", "")]) == [[0, *[2] * between, 2]]


class TestOnlyTheBeginningIsRead:
    @pytest.mark.parametrize(
        "before", ["", "A dog runs. ", "\u200b" * 300, "a" * 190, "a" * 200 + " "]
    )
    def test_ids_are_those_of_the_whole_text(self, config, tokenizer, before):
        processor = Processor(config, tokenizer)
        most = config.max_length
        for piece in (
            *TEXTS[1:-1],
            "A",
            " ",
            "\u200b",
            "\x00",
            "e\u0301",
            "a" * 500 + " ",
            "x\u0300" * 60,
        ):
            texts = [(before + piece * length)[:length] + " dog" * 20 for length in (900, 901, 907)]
            whole = [tokenizer.encode(text).ids for text in texts]
            expected = [ids if len(ids) <= most else [*ids[: most - 1], ids[-1]] for ids in whole]
            assert processor.token_ids(texts, truncate=True) == expected

    def test_a_word_that_is_cut_does_not_count(self):
        """Nine long words are 180 characters. Of the next word twelve are read first, which would be three tokens."""
        word = "abcdefghijklmnopqrs"
        vocab = {
            token: number
            for number, token in enumerate(
                ["[UNK]", "<s>", "</s>", word, "abcd", "##efgh", "##ijkl"]
            )
        }
        tokenizer = Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
        tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
        special = [("<s>", 1), ("</s>", 2)]
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A </s>", special_tokens=special
        )
        assert tokenizer.encode(f"{word} " * 9 + word[:12]).ids == [1, *[3] * 9, 4, 5, 6, 2]
        assert encode_texts(tokenizer, [f"{word} " * 40], max_length=12, truncate=True) == [
            [1, *[3] * 10, 2]
        ]

    def test_no_more_is_read(self, tokenizer):
        read = []

        class Counting:
            def encode_batch(self, texts):
                read.extend(map(len, texts))
                return tokenizer.encode_batch(texts)

            def encode_batch_fast(self, texts):
                assert texts == []
                return []

        encode_texts(Counting(), ["A dog runs on the grass. " * 800], max_length=12, truncate=True)
        assert read == [12 * 16]


class PanicException(BaseException):
    """As Rust code raises it through `tokenizers`."""


def test_threads_that_cannot_start_are_no_fault_of_the_files():
    reason = "The global thread pool has not been initialized.: ThreadPoolBuildError { kind: IOError(Os { code: 11 }) }"
    with (
        pytest.raises(OSError, match=r"cannot start its threads .* TOKENIZERS_PAR"),
        tokenizers_errors("x"),
    ):
        raise PanicException(reason)
    with (
        pytest.raises(ValueError, match="copy the files of the tokenizer again"),
        tokenizers_errors("x"),
    ):
        raise PanicException("index out of range")
