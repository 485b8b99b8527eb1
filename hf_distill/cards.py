"""The model card of a trained student: its base, teacher and data, what was measured, and how it came about."""

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from huggingface_hub import ModelCard

HOMEPAGE = "https://github.com/hf-distill/hf_distill"
# The hub takes these as addresses of its own; everything else is a path or a name of this machine.
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_FILE = re.compile(r"\.(jsonl|ndjson|json|parquet|csv)(\.\w+)?")
_MESSAGE = '[{"role": "user", "content": "Once upon a time"}]'


@dataclass(frozen=True)
class CardFacts:
    """Facts about a run that its trainer does not know.

    Args:
        datasets: names of its data sets, on the hub or here.
        command: the command line that repeats it.
        results: a table in Markdown, with the lines around it.
        picture: the name of a picture in the folder of the card.
    """

    datasets: Sequence[str] = ()
    command: str = ""
    results: str = ""
    picture: str = ""


def complete_card(
    card: ModelCard,
    *,
    name: str,
    base: str,
    hub_id: str | None,
    title: str,
    settings: Mapping[str, str],
    has_chat_template: bool,
    facts: CardFacts,
) -> None:
    """Writes what is known of a student into the card that TRL has made.

    TRL's links to trackers, its versions and citations are kept. Names that are not on the hub stand without a link,
    and are no part of the card's metadata.

    Args:
        card (`ModelCard`): as TRL writes it; changed.
        name: of the student.
        base: the name of the model that it was before its training, a hub id or the last part of a path.
        hub_id: where the student will be on the hub, if that is known.
        title: of the table of settings.
        settings: these, as text by name; `teacher` is also named at the top.
        has_chat_template: whether the student's tokenizer has one.
        facts ([`CardFacts`]): of the run.
    """
    parts = _sections(card.text)
    hub_datasets = [dataset for dataset in facts.datasets if _is_on_hub(dataset)]
    for key, value in {"model_name": name, "datasets": hub_datasets or None, "pipeline_tag": "text-generation"}.items():
        if value is None:
            card.data.pop(key, None)
        else:
            card.data[key] = value
    card.data.pop("licence", None)  # a word that the hub does not know
    if not _is_on_hub(str(card.data.get("base_model"))):
        card.data.pop("base_model", None)
    prompt = _MESSAGE if has_chat_template else '"Once upon a time"'
    text = [
        f"# {name}",
        _introduction(base, card.data.get("base_model"), settings.get("teacher"), facts.datasets),
        "## Quick start",
        "```python\nfrom transformers import pipeline\n\n"
        f'generator = pipeline("text-generation", model="{hub_id or name}", device_map="auto")\n'
        f'print(generator({prompt}, max_new_tokens=64, return_full_text=False)[0]["generated_text"])\n```',
    ]
    if facts.results:
        text += ["## Results", facts.results.strip()]
        text += [f"![{name}: losses and results]({facts.picture})"] if facts.picture else []
    text.append(re.sub(r"\n\s*\n", "\n\n", parts.get("Training procedure", "").strip()))
    if settings:
        rows = "\n".join(f"| {setting} | {_cell(value)} |" for setting, value in settings.items())
        text.append(f"## {title}\n\n| setting | value |\n|---|---|\n{rows}")
    if facts.command:
        text.append(f"## Command\n\n```bash\n{facts.command}\n```")
    text += [f"## Versions\n\n{_versions(parts.get('Framework versions', ''))}", parts.get("Citations", "").strip()]
    card.text = "\n\n".join(part for part in text if part) + "\n"


def _introduction(base: str, hub_base: object, teacher: str | None, datasets: Sequence[str]) -> str:
    began = f"[{base}](https://huggingface.co/{base})" if hub_base == base else f"`{base}`"
    of_teacher = f", as the student of `{teacher}`" if teacher else ""
    names = [
        f"[{each}](https://huggingface.co/datasets/{each})" if _is_on_hub(each) else f"`{Path(each).name}`"
        for each in datasets
    ]
    rows = f", on {' and '.join(names)}" if names else ""
    return f"This model is {began}, trained with [hf_distill]({HOMEPAGE}){of_teacher}{rows}."


def _versions(of_trl: str) -> str:
    """The list of TRL's card, with the packages that it lacks before it."""
    lines = [line for line in of_trl.splitlines() if line.startswith("- ")]
    own = []
    for title, package in (("hf_distill", "hf_distill"), ("PEFT", "peft")):
        try:
            own.append(f"- {title}: {version(package)}")
        except PackageNotFoundError:  # a copy of the sources that was not installed
            continue
    return "\n".join([*own, *lines])


def _sections(text: str) -> dict[str, str]:
    """The sections of a card by their titles, each with its heading."""
    parts = re.split(r"(?m)^(?=#{1,3} )", text)
    return {part.partition("\n")[0].lstrip("# ").strip(): part for part in parts if part.startswith("#")}


def _is_on_hub(name: str) -> bool:
    return bool(_HUB_ID.fullmatch(name)) and not os.path.exists(name) and not _FILE.search(name)


def _cell(text: str) -> str:
    return str(text).replace("|", "\\|").replace("\n", " ")
