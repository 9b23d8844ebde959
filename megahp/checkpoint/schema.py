"""The JSON files of a checkpoint as types. A seal proves that a file is as its writer left it, not that the writer was
megahp: everything read from one is checked against these before it is used."""

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

STRICT = ConfigDict(strict=True, extra="forbid")


def _plain(name: str) -> str:
    """Return the name of a file that lies in the folder itself."""
    if not is_plain(name):
        raise ValueError("names a file outside the checkpoint")
    return name


FileName = Annotated[str, AfterValidator(_plain), Field(pattern=r"^[\x20-\x7e]{1,255}$")]


@with_config(STRICT)
class Entry(TypedDict):
    """What the manifest says of a file."""

    bytes: NonNegativeInt
    sha256: str


@dataclass(frozen=True, config=STRICT)
class Chunk:
    """Where a part of a tensor lies."""

    offsets: list[NonNegativeInt]  # of the part in the tensor
    shape: list[NonNegativeInt]
    file: FileName
    begin: NonNegativeInt  # byte of the file
    bytes: NonNegativeInt
    crc32: NonNegativeInt


@with_config(STRICT)
class Stored(TypedDict):
    """What the index says of a tensor."""

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
class DataOrder(TypedDict):
    stage: NonNegativeInt
    first_sample: NonNegativeInt
    length: NonNegativeInt
    begins: Counts
    taken: Counts


@with_config(ConfigDict(strict=True, extra="allow"))  # further keys are for people to read
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
    data_order: DataOrder
    table: dict[str, Any]
    layout: dict[str, PositiveInt]
    config: dict[str, dict[str, Any]]
    validation_loss: NotRequired[float | None]


MANIFEST, INDEX, STATE = TypeAdapter(Manifest), TypeAdapter(Index), TypeAdapter(State)


def checked(adapter: TypeAdapter[Any], text: str | bytes) -> Any:
    """Return JSON as the adapter's type. Raises ValueError saying in one line what is wrong where."""
    try:
        return adapter.validate_json(text)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        where = ".".join(map(str, first["loc"])) or "the whole"
        raise ValueError(f"{where} = {repr(first['input'])[:60]}: {first['msg']}") from None
