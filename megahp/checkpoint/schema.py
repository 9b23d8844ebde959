"""Types of a checkpoint's JSON files. A matching manifest proves that a file is as its writer left it, not that the
writer was megahp: everything read is validated against these types before it is used."""

from typing import Annotated, Any

from pydantic import (
    AfterValidator,
    ConfigDict,
    Field,
    NonNegativeInt,
    PositiveInt,
    TypeAdapter,
    ValidationError,
    with_config,
)
from pydantic.dataclasses import dataclass
from typing_extensions import NotRequired, Required, TypedDict  # noqa: UP035 - pydantic cannot read typing's in Python 3.11

from megahp.files import is_plain

# strict: "3" is no number and 0.5 no count; forbid: a key that nobody knows is not silently without effect
STRICT = ConfigDict(strict=True, extra="forbid")


def _plain(name: str) -> str:
    """Return a file name without a path. Raises ValueError for others."""
    if not is_plain(name):
        raise ValueError("names a file outside the checkpoint")
    return name


FileName = Annotated[str, AfterValidator(_plain), Field(pattern=r"^[\x20-\x7e]{1,255}$")]


@with_config(STRICT)
class Entry(TypedDict):
    """The manifest's entry of a file."""

    bytes: NonNegativeInt
    sha256: str


@dataclass(frozen=True, config=STRICT)
class Chunk:
    """A part of a tensor, and where it is stored."""

    offsets: list[NonNegativeInt]  # of the part in the tensor
    shape: list[NonNegativeInt]
    file: FileName
    begin: Annotated[int, Field(ge=0, lt=2**63)]  # byte of the file, which seek() must be able to take
    bytes: NonNegativeInt
    crc32: NonNegativeInt


@with_config(STRICT)
class Stored(TypedDict):
    """The index's entry of a tensor."""

    dtype: str
    shape: list[NonNegativeInt]
    chunks: list[Chunk]


@with_config(STRICT)
class Manifest(TypedDict):
    version: int
    files: dict[FileName, Entry]
    sha256: str


@with_config(STRICT)
class Index(TypedDict):
    tensors: dict[str, Stored]


@with_config(STRICT)
class ProgressState(TypedDict):
    step: NonNegativeInt
    samples: NonNegativeInt
    tokens: NonNegativeInt


@with_config(STRICT)
class Average(TypedDict):
    true_sq: float
    noise: float


@with_config(STRICT)
class Blocks(TypedDict):
    closed: list[Annotated[list[float], Field(min_length=5, max_length=5)]]
    open: Annotated[list[float], Field(min_length=4, max_length=4)]
    tokens: NonNegativeInt


@with_config(STRICT)
class NoiseScale(TypedDict, total=False):
    pooled: Required[Average]
    layers: Required[dict[str, Average]]
    norms: Blocks  # since megahp measures in blocks
    model: Blocks
    examples: list[Annotated[list[float], Field(min_length=2, max_length=2)]]


@with_config(STRICT)
class BatchSchedulerState(TypedDict):
    batch: PositiveInt
    length: PositiveInt
    since: NonNegativeInt | None
    least: float | None
    began: NonNegativeInt


@with_config(STRICT)
class LossScale(TypedDict):
    value: Annotated[float, Field(gt=0)]
    steps: NonNegativeInt


Counts = dict[str, Annotated[list[NonNegativeInt], Field(min_length=2, max_length=2)]]  # source -> samples, length


@with_config(STRICT)
class Source(TypedDict):
    fingerprint: str
    index: str
    stretches: str


@with_config(STRICT)
class DataOrder(TypedDict):
    stage: NonNegativeInt
    first_sample: NonNegativeInt
    length: NonNegativeInt
    begins: Counts
    taken: Counts


@with_config(ConfigDict(strict=True, extra="allow"))  # other keys, such as versions, are for people to read
class State(TypedDict):
    version: int
    progress: ProgressState
    skipped: NonNegativeInt
    updates: NonNegativeInt
    noise_scale: NoiseScale
    batch_plan: BatchSchedulerState
    loss_scale: LossScale
    spikes: Annotated[dict[str, list[float]], Field(min_length=2, max_length=2)]
    wandb_id: Annotated[str, Field(pattern=r"^[\w-]{1,64}$")]
    data: str | None
    sources: NotRequired[list[Source]]  # not in older ones
    data_order: DataOrder
    table: dict[str, Any]
    layout: dict[str, PositiveInt]
    config: dict[str, dict[str, Any]]
    validation_loss: NotRequired[float | None]


MANIFEST, INDEX, STATE = TypeAdapter(Manifest), TypeAdapter(Index), TypeAdapter(State)


def checked(adapter: TypeAdapter[Any], text: str | bytes) -> Any:
    """Parse JSON as the adapter's type. Raises ValueError with one line that says what is wrong where."""
    try:
        return adapter.validate_json(text)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        where = ".".join(map(str, first["loc"])) or "the document"
        raise ValueError(f"{where} = {repr(first['input'])[:60]}: {first['msg']}") from None
