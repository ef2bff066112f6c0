"""Options that several commands share, and their defaults; importable without torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from pathlib import Path
from types import NoneType, UnionType
from typing import TYPE_CHECKING, Annotated, Any, Literal, Union, get_args, get_origin

from tyro.conf import Fixed, Positional, Suppress, arg
from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, PrimitiveTypeInfo, StructTypeInfo
from tyro.constructors import StructConstructorSpec as Struct

from bridgetower.engines.config import EngineRequest, Precision
from bridgetower.extras import load_object
from bridgetower.model.plain import AT_LEAST_0, AT_LEAST_1, NO_OPTION, check_numbers
from bridgetower.tasks.spec import TaskSpec

if TYPE_CHECKING:
    from bridgetower.checkpoints import Checkpoint, HubOptions
    from bridgetower.model.extensions import Extensions
    from bridgetower.predictor import Predictor


def own_task(place: str | None) -> TaskSpec | None:
    """Returns the task that `--task-spec` names, None without one; errors as of `load_object`."""
    return None if place is None else load_object("task_spec", place, TaskSpec)


def own_extensions(place: str | None) -> Extensions:
    """Returns the towers, bridges and heads that `--extensions` names; errors as of `load_object`."""
    from bridgetower.model.extensions import NO_EXTENSIONS, Extensions

    return NO_EXTENSIONS if place is None else load_object("extensions", place, Extensions)


_MODEL = "Hub id, folder of bridgetower or transformers, run folder, official .ckpt, or the word demo."
Model = Annotated[str, arg(help=_MODEL, metavar="MODEL")]
FirstModel = Annotated[Positional[str], arg(help=f"{_MODEL} Can also be given as --model MODEL.", metavar="MODEL")]
Json = Annotated[bool, arg(help="Print JSON on a terminal too.")]
_DEMO = {
    "model": Path("bridgetower-demo/runs/bridgetower-0/last"),
    "answering model": Path("bridgetower-demo/runs/bridgetower-0-answers/last"),
    "index": Path("bridgetower-demo/held-out.lance"),
}
"""What the word `demo` stands for."""


OPTIONAL_VALUES = ConstructorRegistry()
"""Shows an option that may be absent by the type of its value: `STR`, not `{None}|STR`; `None` still resets it."""
DEFAULT = arg(help_behavior_hint=lambda value: "" if value in ("", "''", "None") else f"(default: {value})")
"""Shows the default of an option, but not that it is unset: what happens then is in the text."""
_listed: list[type] = []


@OPTIONAL_VALUES.struct_rule
def _fields(info: StructTypeInfo) -> Struct | None:
    if not is_dataclass(info.type) or _listed:
        return None
    _listed.append(info.type)  # so that tyro's own rule lists its fields
    spec = ConstructorRegistry.get_struct_spec(info)
    _listed.clear()
    if not isinstance(spec, Struct):
        return None

    def shown(kind: Any) -> Any:
        return Annotated[kind, DEFAULT, Fixed, Suppress] if NO_OPTION in get_args(kind) else Annotated[kind, DEFAULT]

    return replace(spec, fields=tuple(replace(one, type=shown(one.type)) for one in spec.fields))


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
        nargs=value.nargs if value.nargs in (1, "*") else "*",
        metavar=value.metavar,
        instance_from_str=lambda given: None if given == ["None"] else value.instance_from_str(given),
        is_instance=lambda instance: instance is None or value.is_instance(instance),
        str_from_instance=lambda instance: ["None"] if instance is None else value.str_from_instance(instance),
        choices=None if value.choices is None else (*value.choices, "None"),
    )


def named(given: Sequence[str]) -> list[tuple[str | None, str]]:
    """Splits arguments of the form NAME=PLACE; the name is None where there is none, or where a file has that name."""
    parts = [(None, one) if "=" not in one or Path(one).exists() else one.split("=", 1) for one in given]
    return [(name or None, place) for name, place in parts]


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
        """What is set of the hub."""
        return {} if self.subfolder is None else {"subfolder": self.subfolder}

    def read(self, source: str) -> Checkpoint:
        """Returns the checkpoint at a source."""
        from bridgetower.checkpoints import read_checkpoint

        checkpoint = read_checkpoint(
            demo_or(source),
            revision=self.revision,
            tokenizer=self.tokenizer,
            answers=self.answers,
            extensions=own_extensions(self.extensions),
            **self.hub,
        )
        return checkpoint if self.image_size is None else checkpoint.resized(self.image_size)


Reading = Annotated[ReadOptions, arg(name="")]
READ = ReadOptions()


@dataclass(frozen=True, kw_only=True)
class LoadOptions(ReadOptions):
    """How a model is loaded, and what runs it.

    Attributes:
        device: cpu, cuda (a GPU, which must be there), cuda:1 or auto; default: a GPU if there is one.
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
        """Returns a model, loaded; of the demo, one of two."""
        from bridgetower.predictor import load

        values = {item.name: getattr(self, item.name) for item in fields(LoadOptions) if item.name != "subfolder"}
        source = demo_or(model, "answering model" if answers_questions else "model")
        return load(source, **values | {"extensions": own_extensions(self.extensions)}, **self.hub)


Loading = Annotated[LoadOptions, arg(name="")]
LOADED = LoadOptions()


def demo_or(given: str, what: Literal["model", "answering model", "index"] = "model") -> str:
    """Returns what is given; the word `demo` stands for what the demo left in the working directory."""
    if given != "demo":
        return given
    made = _DEMO[what]
    if not made.exists():
        raise FileNotFoundError(
            f"{what} is demo, but there is no {made} here; make it with `make demo` in a clone of the project, or give "
            "./demo for a folder of that name"
        )
    return str(made)
