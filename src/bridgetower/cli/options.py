"""Options that several commands share, and their defaults. It imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from pathlib import Path
from types import NoneType, UnionType
from typing import TYPE_CHECKING, Annotated, Any, Literal, Union, get_args, get_origin

from tyro.conf import Fixed, Positional, Suppress, arg
from tyro.constructors import (
    ConstructorRegistry,
    PrimitiveConstructorSpec,
    PrimitiveTypeInfo,
    StructTypeInfo,
)
from tyro.constructors import StructConstructorSpec as Struct

from bridgetower.engines.config import EngineRequest, Precision
from bridgetower.extras import load_object
from bridgetower.plain import AT_LEAST_0, AT_LEAST_1, NO_OPTION, check_numbers
from bridgetower.tasks.spec import TaskSpec

if TYPE_CHECKING:
    from bridgetower.checkpoints import Checkpoint, HubOptions
    from bridgetower.inference.predictor import Predictor
    from bridgetower.model.extensions import Extensions
    from bridgetower.search.searcher import Searcher


def custom_task(reference: str | None) -> TaskSpec | None:
    """Returns the task that `--task-spec` names, or None without one."""
    if reference is None:
        return None
    return load_object("task_spec", reference, TaskSpec)


def custom_extensions(reference: str | None) -> Extensions:
    """Returns the towers, bridges and heads that `--extensions` names."""
    from bridgetower.model.extensions import NO_EXTENSIONS, Extensions

    if reference is None:
        return NO_EXTENSIONS
    return load_object("extensions", reference, Extensions)


_MODEL = (
    "Hub id, folder of bridgetower or transformers, run folder, official .ckpt, or the word demo."
)
Model = Annotated[str, arg(help=_MODEL, metavar="MODEL")]
FirstModel = Annotated[
    Positional[str], arg(help=f"{_MODEL} Can also be given as --model MODEL.", metavar="MODEL")
]
Json = Annotated[bool, arg(help="Print JSON on a terminal too.")]
_DEMO = {
    "model": Path("bridgetower-demo/runs/bridgetower-0/last"),
    "answering model": Path("bridgetower-demo/runs/bridgetower-0-answers/last"),
    "index": Path("bridgetower-demo/held-out.lance"),
}
"""What the word `demo` stands for."""


OPTIONAL_VALUES = ConstructorRegistry()
"""Shows an option that may be absent by the type of its value: `STR`, not `{None}|STR`; `None` still resets it."""
DEFAULT = arg(
    help_behavior_hint=lambda value: "" if value in ("", "''", "None") else f"(default: {value})"
)
"""Shows the default of an option, but not that it is unset: its text says what happens then."""
_asking_tyro: list[type] = []  # the type whose fields tyro's own rule lists


@OPTIONAL_VALUES.struct_rule
def _fields(info: StructTypeInfo) -> Struct | None:
    if not is_dataclass(info.type) or _asking_tyro:
        return None
    _asking_tyro.append(info.type)
    spec = ConstructorRegistry.get_struct_spec(info)
    _asking_tyro.clear()
    if not isinstance(spec, Struct):
        return None
    options = []
    for item in spec.fields:
        kind: Any = Annotated[item.type, DEFAULT]
        if NO_OPTION in get_args(item.type):
            kind = Annotated[item.type, DEFAULT, Fixed, Suppress]
        options.append(replace(item, type=kind))
    return replace(spec, fields=tuple(options))


@OPTIONAL_VALUES.primitive_rule
def _optional(type_info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[Any] | None:
    kinds = get_args(type_info.type)
    if get_origin(type_info.type) not in (Union, UnionType) or NoneType not in kinds:
        return None
    present: Any = Union[tuple(kind for kind in kinds if kind is not NoneType)]  # noqa: UP007 - made at run time
    value = ConstructorRegistry.get_primitive_spec(
        PrimitiveTypeInfo.make(raw_annotation=present, parent_markers=type_info.markers)
    )
    if not isinstance(value, PrimitiveConstructorSpec):
        return None
    return PrimitiveConstructorSpec(
        # `None` is one word, also where a value has several.
        nargs=value.nargs if value.nargs in (1, "*") else "*",
        metavar=value.metavar,
        instance_from_str=lambda words: (
            None if words == ["None"] else value.instance_from_str(words)
        ),
        is_instance=lambda instance: instance is None or value.is_instance(instance),
        str_from_instance=lambda instance: (
            ["None"] if instance is None else value.str_from_instance(instance)
        ),
        choices=None if value.choices is None else (*value.choices, "None"),
    )


def split_names(arguments: Sequence[str]) -> list[tuple[str | None, str]]:
    """Splits arguments of the form NAME=PATH. The name is None without one, and where a file is called so."""
    pairs: list[tuple[str | None, str]] = []
    for argument in arguments:
        name, sign, path = argument.partition("=")
        if sign and not Path(argument).exists():
            pairs.append((name or None, path))
        else:
            pairs.append((None, argument))
    return pairs


@dataclass(frozen=True, kw_only=True)
class ReadOptions:
    """How a checkpoint is read.

    Attributes:
        revision: Branch, tag or commit of a hub id.
        subfolder: Folder of the model inside of the hub's repository.
        image_size: Resize the position embeddings to this many pixels.
        tokenizer: Folder or file with a tokenizer, for an official .ckpt.
        answers: JSON file with the list of answers, for an official .ckpt with a VQA head.
        extensions: Custom towers, bridges and heads that the model has, and metrics: FILE.py:NAME or module:NAME.
    """

    revision: str | None = None
    subfolder: str | None = None
    image_size: int | None = None
    tokenizer: Path | None = None
    answers: Path | None = None
    extensions: str | None = None

    def __post_init__(self) -> None:
        check_numbers(self, image_size=AT_LEAST_1, batch_size=AT_LEAST_1, num_workers=AT_LEAST_0)

    @property
    def hub(self) -> HubOptions:
        """Options of a download from the hub."""
        return {} if self.subfolder is None else {"subfolder": self.subfolder}

    def read(self, source: str) -> Checkpoint:
        """Returns the checkpoint at a source."""
        from bridgetower.checkpoints import read_checkpoint

        checkpoint = read_checkpoint(
            resolve_demo(source, "model"),
            revision=self.revision,
            tokenizer=self.tokenizer,
            answers=self.answers,
            extensions=custom_extensions(self.extensions),
            **self.hub,
        )
        return checkpoint if self.image_size is None else checkpoint.resized(self.image_size)


Reading = Annotated[ReadOptions, arg(name="")]
READ = ReadOptions()


@dataclass(frozen=True, kw_only=True)
class LoadOptions(ReadOptions):
    """How a model is loaded, and what runs it.

    Attributes:
        device: cpu, cuda (an error if there is none), cuda:1 or auto; default: a GPU if there is one.
        fast_decode: Decode large JPEG files at reduced scale: faster, and pixels differ a little.
        precision: bf16 (engines torch and openvino), fp16 (on a GPU) and int8 (engine onnxruntime) take less time on
            hardware that has them, and give other numbers.
        engine: onnxruntime and openvino run exported parts, on the CPU; a model that was not exported is exported once.
            auto takes the fastest that is installed, see docs/engines.md.
        cache: Folder of exported models; default: ~/.cache/bridgetower.
        compile: Let torch.compile make kernels for engine torch when it starts, which takes minutes and a C++ compiler.
    """

    device: str | None = None
    fast_decode: bool = False
    precision: Precision = "fp32"
    engine: EngineRequest = "torch"
    cache: Path | None = None
    compile: bool = False

    def load(self, model: str, *, answers_questions: bool = False) -> Predictor:
        """Returns a loaded model. The demo has another one for questions."""
        from bridgetower.inference.predictor import load

        values = {
            item.name: getattr(self, item.name)
            for item in fields(LoadOptions)
            if item.name != "subfolder"
        }
        values["extensions"] = custom_extensions(self.extensions)
        source = resolve_demo(model, "answering model" if answers_questions else "model")
        return load(source, **values, **self.hub)

    def open_index(self, index: str, root: Path | None, model: str | None) -> Searcher:
        """Opens an index for searches, by default with the model that it was made with."""
        from bridgetower.search.index import Index
        from bridgetower.search.searcher import Searcher

        opened = Index(resolve_demo(index, "index"), root=root)
        return Searcher(opened, self.load(opened.model_or(model)))


Loading = Annotated[LoadOptions, arg(name="")]
LOADED = LoadOptions()


def resolve_demo(source: str, kind: Literal["model", "answering model", "index"]) -> str:
    """Returns a source, or for the word `demo` the path of what the demo left in the working directory."""
    if source != "demo":
        return source
    path = _DEMO[kind]
    if not path.exists():
        raise FileNotFoundError(
            f"{kind} is demo, but there is no {path} here; make it with `make demo` in a clone of the project, or give "
            "./demo for a folder of that name"
        )
    return str(path)
