"""What edge devices and the scripts of an experiment say: JSON or CBOR in, checked values out, or a refusal.

    Update                one device's model after training in a round, or the error that kept it from training
    ExperimentRequest     the rounds that somebody asks for

Field names are those of existing devices. Tensors are numpy float64 by name; a nested map is named by its path, with `~1` for
a slash and `~0` for a tilde in a key, as in RFC 6901. CBOR may carry typed arrays (RFC 8746, tags 64 to 86), in any shape
(tags 40 and 1040). Whatever bytes come, the answer is a value or a Refusal: size and depth are looked at before anything is
read, because what is nested a thousand times ends a program that walks through it.

Errors: Refusal (a ValueError with the HTTP status and the field).
"""

import hashlib
import io
import json
import math
import re
from collections.abc import Callable, Mapping
from typing import Annotated, Any, TypeVar

import cbor2
import numpy as np
import numpy.typing as npt
import orjson
import safetensors.numpy
from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError
from safetensors import SafetensorError

from tasks.edge.names import NAME
from tasks.learning.combining import InvalidRule, Tensors, checked_options

MAX_BYTES = 64 * 2**20
MAX_DEPTH = 24  # of nested maps and lists in a message; a tensor of n dimensions takes n
MAX_JSON_DEPTH = 64  # more than a model of MAX_DEPTH maps with tensors of MAX_DEPTH dimensions has
MAX_TENSORS = 4096
MAX_METRICS = 256
MAX_NUMBERS = 32 * 2**20
MAX_SAMPLES = 10**9
MAX_ROUNDS = 10_000
MAX_PARTICIPANTS = 100_000
MAX_NAME = 128
MAX_ERROR = 4096
DEFAULT_MODEL = "fl/models/global_model_v0"
DEFAULT_K, DEFAULT_TIMEOUT_S = 3, 60
JSON_TYPE, CBOR_TYPES = "application/json", ("application/cbor", "application/cbor-seq")

Name = Annotated[str, StringConstraints(pattern=f"^{NAME}$")]
M = TypeVar("M", bound=BaseModel)
Decode = Callable[[Any, bool], Any]  # of a tag's decoded content, and whether it stands where nothing may change


class Refusal(ValueError):
    """What was sent is not taken. status: as HTTP says it; field: which one is wrong, empty for the whole."""

    def __init__(self, status: int, message: str, field: str = "") -> None:
        super().__init__(message)
        self.status = status
        self.field = field


class Update(BaseModel):
    """A device's full model after local training. error: why there is none; then num_samples is 0 and update empty."""

    model_config = ConfigDict(frozen=True, arbitrary_types_allowed=True, strict=True)

    round_id: str
    proplet_id: str
    base_model_uri: str = ""
    num_samples: int = Field(ge=0, le=MAX_SAMPLES)
    metrics: dict[str, float] = Field(default_factory=dict)
    update: dict[str, npt.NDArray[np.float64]]
    error: str = ""

    @property
    def digest(self) -> str:
        """SHA-256 of what it says, whichever format it came in. Hexadecimal."""
        told = [self.round_id, self.proplet_id, self.base_model_uri, self.num_samples, self.metrics, self.error]
        said = hashlib.sha256(json.dumps(told, sort_keys=True).encode())
        for name in sorted(self.update):
            tensor = self.update[name]
            said.update(json.dumps([name, tensor.shape]).encode())
            said.update(np.asarray(tensor, dtype="<f8", order="C").tobytes())
        return said.hexdigest()


class ExperimentRequest(BaseModel):
    """Rounds over some devices. k_of_n 0: as many as there are, at most three; timeout_s 0: a minute; both as ever.

    task_wasm_image: the training module, by the name under which it is distributed. rounds: how many, one after the other;
    rule, rule_options: see tasks.learning.combining.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    experiment_id: Name | None = None
    round_id: Name
    model_ref: str = Field(default=DEFAULT_MODEL, max_length=512)
    participants: list[Name] = Field(default=[], max_length=MAX_PARTICIPANTS)
    hyperparams: dict[str, Any] = {}
    k_of_n: int = Field(default=0, ge=0, le=MAX_PARTICIPANTS)
    timeout_s: int = Field(default=0, ge=0, le=30 * 86400)
    task_wasm_image: str = Field(default="", max_length=512)
    rounds: int = Field(default=1, ge=1, le=MAX_ROUNDS)
    rule: str = "fedavg"
    rule_options: dict[str, Any] = {}

    @property
    def name(self) -> str:
        """What the experiment is called; by its first round when it was given no id."""
        return self.experiment_id or self.round_id

    def round_name(self, number: int) -> str:
        """Of round 1 as given; of the following ones with their number."""
        return self.round_id if number == 1 else f"{self.round_id}.{number}"

    @property
    def digest(self) -> str:
        return hashlib.sha256(self.model_dump_json().encode()).hexdigest()


def read_update(body: bytes, content_type: str = JSON_TYPE, *, max_bytes: int = MAX_BYTES) -> Update:
    """An update in the format that its type names. Raises Refusal."""
    return update_of(_decoded(body, content_type, max_bytes))


def read_experiment(body: bytes, *, max_bytes: int = MAX_BYTES) -> ExperimentRequest:
    """A request for an experiment, in JSON. Raises Refusal."""
    found = decode_json(body, max_bytes=max_bytes)
    if not isinstance(found, dict):
        raise Refusal(400, "Invalid JSON: expected an object with round_id, participants and the rest")
    _require(found, "round_id")
    request = _modelled(ExperimentRequest, {name: value for name, value in found.items() if value is not None})
    if len(set(request.participants)) != len(request.participants):
        raise Refusal(400, "participants: a device is named twice; name each once", "participants")
    if request.participants and request.k_of_n > len(request.participants):
        given = len(request.participants)
        raise Refusal(
            400, f"k_of_n = {request.k_of_n}: there are {given} participants; ask for at most {given}", "k_of_n"
        )
    try:
        options = checked_options(request.rule, request.rule_options)
    except InvalidRule as error:
        raise Refusal(400, str(error), "rule") from None
    # So that what is missing is said at once, and not after a round of training.
    return request.model_copy(update={"hyperparams": _with_rule(request, options)})


def update_of(found: Any) -> Update:
    """The update in a decoded message. Raises Refusal naming the field."""
    if not isinstance(found, dict):
        raise Refusal(400, "Invalid JSON: expected an object with round_id, proplet_id, num_samples and update")
    for name in ("round_id", "proplet_id"):
        _require(found, name)
    error = found.get("error") or ""
    if not isinstance(error, str):
        raise Refusal(400, f"error: expected text, got {type(error).__name__}", "error")
    given = found.get("update")
    if not error and (given is None or given == {} or given == []):
        raise Refusal(400, "update data is required and cannot be empty", "update")
    samples = found.get("num_samples", 0 if error else None)
    _check_samples(samples, bool(error))
    base = found.get("base_model_uri")
    return _modelled(
        Update,
        {
            "round_id": found["round_id"],
            "proplet_id": found["proplet_id"],
            "base_model_uri": "" if base is None else base,
            "num_samples": samples,
            "metrics": _metrics(found.get("metrics")),
            "update": {} if error else read_tensors(given, "update"),
            "error": error[:MAX_ERROR].replace("\0", "\N{REPLACEMENT CHARACTER}"),
        },
    )


def check_fits(
    tensors: Mapping[str, npt.NDArray[Any]], base: Mapping[str, npt.NDArray[Any]], what: str = "update"
) -> None:
    """Raises Refusal unless the names and shapes are those of the base model."""
    for name in sorted(base):
        if name not in tensors:
            raise Refusal(400, f"{what}.{name} is missing: the base model has it", f"{what}.{name}")
        if tensors[name].shape != base[name].shape:
            raise Refusal(
                400,
                f"{what}.{name} has shape {list(tensors[name].shape)}, the base model has {list(base[name].shape)}: "
                "train from the model that the task names",
                f"{what}.{name}",
            )
    if unknown := sorted(set(tensors) - set(base)):
        known = ", ".join(sorted(base))[:200]
        raise Refusal(400, f"{what}.{unknown[0][:80]}: the base model has only {known}", f"{what}.{unknown[0][:80]}")


def version_of(reference: str) -> int:
    """The version that a model's reference names: its last run of digits; 0 without one."""
    found = re.findall(r"[0-9]+", reference)
    return int(found[-1][-15:]) if found else 0


def reference_of(version: int) -> str:
    return f"fl/models/global_model_v{version}"


# Tensors


def read_tensors(value: Any, what: str) -> Tensors:
    """Tensors by name from nested maps of numbers and lists. Raises Refusal."""
    if not isinstance(value, dict):
        raise Refusal(400, f"{what}: expected an object of named tensors, got {type(value).__name__}", what)
    found: Tensors = {}
    _gather(value, (), found, what)
    if not found:
        raise Refusal(400, f"{what} data is required and cannot be empty", what)
    if sum(tensor.size for tensor in found.values()) > MAX_NUMBERS:
        raise Refusal(413, f"{what} has more than {MAX_NUMBERS} numbers", what)
    return found


def _gather(value: dict[Any, Any], path: tuple[str, ...], found: Tensors, what: str) -> None:
    for key, inner in value.items():
        # A file of safetensors keeps the one name for itself.
        if not isinstance(key, str) or not 0 < len(key) <= MAX_NAME or key == "__metadata__" or "\0" in key:
            raise Refusal(400, f"{what}: a name of {key!r:.60}; expected text of 1 to {MAX_NAME} characters", what)
        place = (*path, key.replace("~", "~0").replace("/", "~1"))
        name = "/".join(place)
        if isinstance(inner, dict) and len(place) < MAX_DEPTH:
            _gather(inner, place, found, what)
        else:
            found[name] = _tensor(inner, f"{what}.{name}")
        if len(found) > MAX_TENSORS:
            raise Refusal(413, f"{what} has more than {MAX_TENSORS} tensors", what)


def _tensor(value: Any, what: str) -> npt.NDArray[np.float64]:
    if isinstance(value, np.ndarray):
        tensor = value.astype(np.float64)
    elif isinstance(value, list | int | float) and not isinstance(value, bool):
        _check_numbers(value, what)
        try:
            tensor = np.asarray(value, dtype=np.float64)
        except (ValueError, OverflowError, TypeError):
            raise Refusal(400, f"{what}: its rows differ in length, or a number is too large", what) from None
    else:
        raise Refusal(400, f"{what}: expected a number or lists of numbers, got {type(value).__name__}", what)
    if not np.isfinite(tensor).all():
        raise Refusal(400, f"{what}: NaN or infinite; expected finite numbers", what)
    return tensor


def _check_numbers(value: Any, what: str, depth: int = 0) -> None:
    """Nothing but numbers and lists of them: numpy would take "1" and true for numbers."""
    if depth > MAX_DEPTH:
        raise Refusal(400, f"{what}: more than {MAX_DEPTH} dimensions", what)
    if not isinstance(value, list):
        if type(value) not in (int, float):
            raise Refusal(400, f"{what}: expected numbers, got {type(value).__name__}", what)
        return
    kinds = set(map(type, value))
    if kinds <= {int, float}:
        return
    for inner in value:
        _check_numbers(inner, what, depth + 1)


def model_json(tensors: Mapping[str, npt.NDArray[Any]]) -> dict[str, Any]:
    """The bare model as devices read it: nested as its names say, keys in order."""
    model: dict[str, Any] = {}
    for name in sorted(tensors):
        *folders, last = [part.replace("~1", "/").replace("~0", "~") for part in name.split("/")]
        place = model
        for folder in folders:
            place = place.setdefault(folder, {})
        place[last] = tensors[name].tolist()
    return model


def encode_model(tensors: Mapping[str, npt.NDArray[Any]]) -> bytes:
    """The bare model in JSON; numbers read back exactly."""
    return orjson.dumps(model_json(tensors), option=orjson.OPT_SORT_KEYS)


def encode_tensors(tensors: Mapping[str, npt.NDArray[Any]]) -> bytes:
    """The same in safetensors, float64."""
    return safetensors.numpy.save(
        {name: np.asarray(tensor, dtype=np.float64, order="C") for name, tensor in tensors.items()}
    )


def decode_tensors(data: bytes) -> Tensors:
    """Tensors from safetensors. Raises Refusal."""
    try:
        found = safetensors.numpy.load(data)
    except (SafetensorError, ValueError, KeyError, TypeError) as error:
        raise Refusal(400, f"no safetensors: {error}") from None
    return {name: _tensor(np.asarray(found[name]), name) for name in sorted(found)}


# Decoding


def decode_json(body: bytes, *, max_bytes: int | None = None) -> Any:
    """JSON whose texts can be kept: PostgreSQL has no zero character. max_bytes: None where it was bounded before.

    Raises Refusal.
    """
    found = _parsed(body, max_bytes)
    if b"u0000" in body and _ZERO.search(body):
        raise Refusal(400, "Invalid JSON: a text holds a zero character, which cannot be kept; leave it out")
    return found


def _parsed(body: bytes, max_bytes: int | None) -> Any:
    _check_size(body, max_bytes)
    _check_depth(body)
    try:
        return orjson.loads(body)
    except ValueError as error:
        raise Refusal(400, f"Invalid JSON: {error}") from None


def _check_size(body: bytes, max_bytes: int | None) -> None:
    if max_bytes is not None and len(body) > max_bytes:
        raise Refusal(413, f"the body has {len(body)} bytes, at most {max_bytes} are taken")


def _check_depth(body: bytes) -> None:
    """Raises Refusal for JSON that is nested too deeply."""
    if body.count(b"[") + body.count(b"{") <= MAX_JSON_DEPTH:
        return
    brackets = np.frombuffer(_TEXTS.sub(b"", body).translate(None, _NO_BRACKETS), dtype=np.uint8)
    steps = np.where((brackets == ord("[")) | (brackets == ord("{")), 1, -1)
    if steps.cumsum(dtype=np.int32).max(initial=0) > MAX_JSON_DEPTH:
        raise Refusal(400, f"Invalid JSON: nested more than {MAX_JSON_DEPTH} times")


def decode_cbor(body: bytes) -> Any:
    """One item, and nothing after it. Raises Refusal."""
    stream = io.BytesIO(body)
    decoder = cbor2.CBORDecoder(
        stream,
        semantic_decoders=_TAGS,
        max_depth=MAX_DEPTH,
        allow_duplicate_keys=False,
        strict_hashable_types=True,
        read_size=1,
    )
    try:
        found = decoder.decode()
    except (cbor2.CBORError, ValueError, TypeError, OverflowError, RecursionError, MemoryError, EOFError) as error:
        because = error.__cause__ if isinstance(error.__cause__, Refusal) else error
        raise Refusal(400, f"Invalid CBOR: {because}") from None
    if stream.tell() != len(body):
        raise Refusal(
            400, f"Invalid CBOR: {len(body) - stream.tell()} bytes after the first item; send one update at a time"
        )
    return found


def _decoded(body: bytes, content_type: str, max_bytes: int) -> Any:
    """Of an update, whose error may hold zero characters: `update_of` sees to them."""
    if content_type not in CBOR_TYPES:
        return _parsed(body, max_bytes)
    _check_size(body, max_bytes)
    return decode_cbor(body)


def _typed_array(kind: str) -> Decode:
    def decode(data: Any, _: bool) -> npt.NDArray[Any]:
        if not isinstance(data, bytes):
            raise Refusal(400, "a typed array without a byte string")
        if len(data) % np.dtype(kind).itemsize:
            raise Refusal(400, f"a typed array of {len(data)} bytes: no multiple of {np.dtype(kind).itemsize}")
        return np.frombuffer(data, dtype=kind)

    return decode


def _shaped(order: str) -> Decode:
    def decode(found: Any, _: bool) -> npt.NDArray[Any]:
        if not (isinstance(found, list) and len(found) == 2 and isinstance(found[0], list)):
            raise Refusal(400, "a multi-dimensional array is [dimensions, numbers]")
        shape, data = found
        if len(shape) > MAX_DEPTH or not all(type(one) is int and 0 <= one <= MAX_NUMBERS for one in shape):
            raise Refusal(400, f"dimensions of a multi-dimensional array: expected at most {MAX_DEPTH} integers from 0")
        numbers = data if isinstance(data, np.ndarray) else _tensor(data, "a multi-dimensional array")
        if numbers.ndim != 1 or numbers.size != math.prod(shape):
            raise Refusal(400, f"a multi-dimensional array of shape {shape} with {numbers.size} numbers")
        return numbers.reshape(shape, order="F" if order == "F" else "C")

    return decode


def _refused(tag: int) -> Decode:
    def decode(_: Any, __: bool) -> Any:
        raise Refusal(400, f"tag {tag} is not taken")

    return decode


# Typed arrays by tag; 76 is reserved, and of 128 bits (83, 87) numpy knows no portable float.
_KINDS = {
    64: "u1", 65: ">u2", 66: ">u4", 67: ">u8", 68: "u1", 69: "<u2", 70: "<u4", 71: "<u8", 72: "i1", 73: ">i2", 74: ">i4",
    75: ">i8", 77: "<i2", 78: "<i4", 79: "<i8", 80: ">f2", 81: ">f4", 82: ">f8", 84: "<f2", 85: "<f4", 86: "<f8",
}  # fmt: skip
# A text of JSON, the last one without its end; and what is between brackets. Neither goes back over what it has read.
_TEXTS = re.compile(rb'"(?:[^"\\]++|\\.)*+"?', re.DOTALL)
_NO_BRACKETS = bytes(set(range(256)) - set(b"[]{}"))
_ZERO = re.compile(rb"(?<!\\)(?:\\\\)*+\\u0000")
# What else the decoder knows (dates, shared references, regular expressions...) has no place in an update.
_UNWANTED = (0, 1, 2, 3, 4, 5, 28, 29, 30, 35, 36, 37, 100, 256, 258, 260, 261, 1004, 43000)
_TAGS: dict[int, Decode] = {
    **{tag: _refused(tag) for tag in _UNWANTED},
    **{tag: _typed_array(kind) for tag, kind in _KINDS.items()},
    40: _shaped("C"),
    41: lambda found, _: found,
    1040: _shaped("F"),
}

# Fields


def _require(found: dict[Any, Any], name: str) -> None:
    if name not in found or found[name] in (None, ""):
        raise Refusal(400, f"{name} is required", name)
    if not isinstance(found[name], str):
        raise Refusal(400, f"{name}: expected text, got {type(found[name]).__name__}", name)
    if len(found[name]) > MAX_NAME or not found[name].isprintable():
        raise Refusal(400, f"{name} = {found[name]!r:.60}: expected at most {MAX_NAME} printable characters", name)


def _check_samples(samples: Any, is_error: bool) -> None:
    if samples is None:
        raise Refusal(400, "num_samples is required", "num_samples")
    low = 0 if is_error else 1
    if type(samples) is not int or not low <= samples <= MAX_SAMPLES:
        raise Refusal(
            400, f"num_samples = {samples!r:.40}: expected an integer from {low} to {MAX_SAMPLES}", "num_samples"
        )


def _metrics(value: Any) -> dict[str, float]:
    """Finite numbers by name; nested ones by their path."""
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise Refusal(400, f"metrics: expected an object of numbers, got {type(value).__name__}", "metrics")
    if not value:
        return {}
    tensors = read_tensors(value, "metrics")
    if len(tensors) > MAX_METRICS or any(tensor.ndim for tensor in tensors.values()):
        raise Refusal(400, f"metrics: expected at most {MAX_METRICS} single numbers", "metrics")
    return {name: float(tensor) for name, tensor in tensors.items()}


def _with_rule(request: ExperimentRequest, options: Mapping[str, Any]) -> dict[str, Any]:
    """The hyperparameters as devices get them: with FedProx's proximal term."""
    return {**request.hyperparams, "mu": options["mu"]} if request.rule == "fedprox" else request.hyperparams


def _modelled(kind: type[M], fields: dict[str, Any]) -> M:
    try:
        return kind.model_validate(fields)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        field = ".".join(map(str, first["loc"]))
        raise Refusal(400, f"{field} = {first['input']!r:.80}: {first['msg']}", field) from None
