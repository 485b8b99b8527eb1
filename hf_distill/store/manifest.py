"""The manifest of a store: what its teacher is, how it was written, and how good it is."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from hashlib import blake2b
from pathlib import Path
from types import UnionType
from typing import Any, get_args, get_origin

from hf_distill.store.shards import write_file

NAME = "manifest.json"
FORMAT = 2
OLDEST = 1  # of the formats that can be read
METHODS = ("hidden", "sampled", "topk")
# What has to be the same when documents are added, and what of it need not: the same weights may lie elsewhere.
IDENTITY = ("method", "parameters", "teacher", "tokenizer", "vocab_size", "temperature", "seed")
# What a server says about one text differs in its last digits: whoever writes compares that.
ANYWHERE = ("name", "revision", "server", "watched")


@dataclass(frozen=True)
class Manifest:
    """The description of a store.

    Args:
        method: "hidden" (states), "sampled" (probabilities) or "topk" (probabilities).
        parameters: of the method, as they were asked for, such as dtype or number of entries.
        teacher: its name, a fingerprint of its weights, their dtype or quantisation, precision of its forward.
        tokenizer: fingerprints of its vocabulary and chat template.
        vocab_size: the true vocabulary of the run, over which probabilities are normalised.
        temperature: at which probabilities were taken; of hidden states it is 1, and any can be taken later.
        seed: of samples and of rotations.
        chosen: what a probe chose, such as the rounding, or tau; it stays when documents are added.
        head: dtype, width and rows of the output layer, factor and cap of its logits, checksum of its file.
        rows: for each writing with other settings, those that rows depend on, to say why rows are missing.
        fidelity: distances between the teacher and what is stored, measured on the first documents.
        counts: documents, label-bearing positions, and bytes of all files when the last writing ended.
        versions: of the libraries that wrote it.
    """

    method: str
    parameters: dict[str, Any]
    teacher: dict[str, Any]
    tokenizer: dict[str, str]
    vocab_size: int
    temperature: float
    seed: int
    chosen: dict[str, Any] = field(default_factory=dict)
    head: dict[str, Any] | None = None
    rows: list[dict[str, Any]] = field(default_factory=list)
    fidelity: dict[str, float] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)

    def write(self, folder: Path) -> None:
        """Writes it into a folder, in the place of an older one, with a digest of its contents."""
        values = {"format": FORMAT, **asdict(self)}
        write_file(folder / NAME, (json.dumps({**values, "digest": _digest(values)}, indent=2) + "\n").encode())

    @property
    def fingerprint(self) -> str:
        """A hash of what the manifest says: of the teacher's weights, the tokenizer, the rows and the method."""
        return _digest({"format": FORMAT, **asdict(self)})[:16]

    @property
    def kind(self) -> str:
        """The method and its parameters, for people."""
        if self.method == "hidden":
            return f"hidden states, {self.parameters['dtype']}"
        entries = f"{self.parameters['entries']:g} entries"
        return f"sampled, {self.parameters['sampler']}, {entries}" if self.method == "sampled" else f"top-k, {entries}"

    def refuse_loss(self, divergence: str, temperatures: Iterable[float], folder: Path) -> None:
        """Raises `ValueError` for a divergence or temperatures that cannot be had from what is stored."""
        if self.method == "hidden":
            return
        if self.method == "sampled" and divergence != "forward_kl":
            raise ValueError(
                f"divergence={divergence!r} cannot be computed from the sample in {folder}, which is unbiased for "
                "forward_kl only: take forward_kl, or a store of hidden states"
            )
        is_whole = self.method == "topk" and self.parameters["entries"] >= self.vocab_size
        if not is_whole and (other := sorted(set(temperatures) - {self.temperature})):
            raise ValueError(
                f"temperature={other[0]:g} cannot be had from the store in {folder}, whose probabilities were taken at "
                f"{self.temperature:g}: take that, or a store of hidden states"
            )

    def with_rows_of(self, other: "Manifest") -> "Manifest":
        """The same, with the settings of the rows of another writing."""
        return replace(self, rows=[*self.rows, *(settings for settings in other.rows if settings not in self.rows)])

    def refuse_other(self, other: "Manifest", folder: Path) -> None:
        """Raises `ValueError` unless documents of another run, `other`, may be added."""
        for name in IDENTITY:
            if differing := _difference(name, getattr(self, name), getattr(other, name)):
                what, here, there = differing
                raise ValueError(
                    f"the store in {folder} was written with {what} {here!r}, and this run has {there!r}: take another "
                    "output_dir, or the settings of the store"
                )


class DamagedManifest(ValueError):
    """The manifest of a store that is not as it was written."""


def is_store(path: Any) -> bool:
    """True for a folder with a manifest. A model's folder may hold one of another kind."""
    manifest = Path(path, NAME) if isinstance(path, str | Path) else None
    # Two of its fields, so that it is known with a damaged byte, too.
    return (
        manifest is not None
        and manifest.is_file()
        and any(name in manifest.read_bytes() for name in (b'"method"', b'"vocab_size"'))
    )


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a store.

    Raises:
        `DamagedManifest`: it is not as it was written.
        `ValueError`: there is none, or one of a newer format.
    """
    path = folder / NAME
    if not path.is_file():
        raise ValueError(f"{folder} is no store of a teacher's outputs: it has no {NAME}")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        digest, own = values.pop("digest", None), _digest(values)
        version = values.pop("format")
        if not isinstance(version, int):
            raise ValueError(f"its format is {version!r}")
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise DamagedManifest(f"{path} is no manifest of a store, or damaged: {error}") from error
    if digest not in (own, None):  # before the format, whose number may be what is damaged
        raise DamagedManifest(
            f"{path} is not as it was written: it is damaged, or was edited. Take it from a copy of the store; if you "
            'edited it, remove its "digest"'
        )
    if not OLDEST <= version <= FORMAT:
        raise ValueError(
            f"the store in {folder} has format {version}, and this version of hf_distill reads formats {OLDEST} to "
            f"{FORMAT}: " + ("update hf_distill" if version > FORMAT else "write the store again")
        )
    if version == 1:
        values = _of_format_1(values)
    kinds = {entry.name: entry.type for entry in fields(Manifest)}
    strange = kinds.keys() ^ values.keys() or {name for name in kinds if not _fits(values[name], kinds[name])}
    if values.get("method") not in METHODS:
        strange = {*strange, "method"}
    if strange:
        raise DamagedManifest(f"{path} is no manifest of a store, or damaged: look at {', '.join(sorted(strange))}")
    return Manifest(**values)


def _digest(values: Any) -> str:
    """A hash of the contents of a manifest, whatever the order and layout of its JSON."""
    return blake2b(json.dumps(values, sort_keys=True).encode(), digest_size=16).hexdigest()


def _of_format_1(values: dict[str, Any]) -> dict[str, Any]:
    """The values of a manifest of format 1, which had the settings of its first writing alone.

    Three of them are left out, which say something else now.
    """
    rows = values.get("rows")
    if not isinstance(rows, dict):
        return values
    others = "packing_strategy", "eos_token", "chat_template_path"
    return {**values, "rows": [{name: rows[name] for name in rows if name not in others}]}


def _fits(value: Any, kind: Any) -> bool:
    """True if a value of JSON is of the type that a field has."""
    if isinstance(kind, UnionType):
        return any(_fits(value, each) for each in get_args(kind))
    return isinstance(value, int | float if kind is float else get_origin(kind) or kind)


def _difference(name: str, here: Any, there: Any) -> tuple[str, Any, Any] | None:
    """The first difference between two values, by the name of what differs."""
    if isinstance(here, Mapping) and isinstance(there, Mapping):
        for key in {**here, **there}:
            if key not in ANYWHERE and here.get(key) != there.get(key):
                return key if name == "parameters" else f"{name} {key}", here.get(key), there.get(key)
        return None
    return None if here == there else (name, here, there)
