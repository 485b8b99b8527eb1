"""The contents of stores, for people: the command `cache info`, and the page of a store on the hub."""

from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path

from rich.console import Console

from hf_distill.report import markdown, size_text, table
from hf_distill.store.hub import CACHE, find_store
from hf_distill.store.manifest import read_manifest
from hf_distill.store.shards import PLAN, Shard, counts_of, shard_names

# Titles and number formats of what a manifest says of fidelity.
FIDELITY = {
    "kl": ("KL(teacher, stored)", "{:.1e} nats"),
    "largest_kl": ("largest KL of a position", "{:.1e} nats"),
    "angle": ("angle between logit gradients", "{:.2f} degrees"),
    "agreement": ("same most likely token", "{:.2%}"),
    "entries": ("entries of a position", "{:.1f}"),
    "known_mass": ("probability of exact entries", "{:.1%}"),
    "squared_error": ("squared error of a position", "{:.4f}"),
}


def info(words: Namespace) -> None:
    """Shows what is in stores, beside each other."""
    short = [Path(name).name for name in words.stores]  # long names would break the table
    titles = short if len(set(short)) == len(short) else words.stores
    show({title: facts(find_store(name)[0]) for title, name in zip(titles, words.stores, strict=True)})


def facts(folder: Path) -> dict[str, str]:
    """The contents of a store, for people."""
    manifest = read_manifest(folder)
    counts = counts_of(Shard(folder, name, {}) for name in shard_names(folder))
    teacher, positions = manifest.teacher, counts["positions"]
    weights = teacher["quantization"] or teacher["dtype"]
    found = {
        "teacher": f"{teacher['name']} ({weights})",
        "store": manifest.kind,
        **({} if manifest.method == "hidden" else {"temperature": f"{manifest.temperature:g}"}),
        "vocabulary": f"{manifest.vocab_size:,}",
        **{
            name: f"{value:.3g}" if isinstance(value, float) else str(value)
            for name, value in manifest.chosen.items()
            if name != "checksum"
        },
        "max_length": ", ".join(dict.fromkeys(str(rows.get("max_length")) for rows in manifest.rows)),
        "texts": f"{counts['documents']:,}",
        "label-bearing positions": f"{positions:,}",
        "bytes": size_text(counts["bytes"]),
        "bytes of a position": f"{counts['bytes'] / max(positions, 1):,.1f}",
    }
    if manifest.head is not None:
        found["head, apart"] = size_text(manifest.head["bytes"])
    for name, value in manifest.fidelity.items():
        title, form = FIDELITY.get(name, (name, "{:g}"))
        found[title] = form.format(value)
    if (folder / PLAN).exists():
        found["state"] = "unfinished: run `cache write` again"
    return found


def card(name: str, folder: Path) -> str:
    """The page of a store on the hub."""
    rows = [{"": title, "value": value} for title, value in facts(folder).items()]
    return (
        "---\ntags: [hf_distill, knowledge-distillation]\n---\n\n# A teacher's outputs\n\n"
        "Written by `hf-distill cache write`. Train a student from it:\n\n"
        f"    hf-distill kd --teacher_model {CACHE}{name} ...\n\n{markdown(rows)}"
    )


def show(stores: Mapping[str, Mapping[str, str]]) -> None:
    """Prints the facts of stores, each in a column."""
    titles = list(dict.fromkeys(title for found in stores.values() for title in found))
    rows = [{"": title, **{name: found.get(title, "") for name, found in stores.items()}} for title in titles]
    Console().print(table(rows))
