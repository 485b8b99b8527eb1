"""The commands that change a model without training it: `prune` and `merge`."""

import json
import os
from dataclasses import asdict
from itertools import groupby
from typing import Any

import torch
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from hf_distill.cli.arguments import MergeArguments, PruneArguments
from hf_distill.cli.data import filled, refuse_one_template
from hf_distill.evaluation import evaluate_fidelity
from hf_distill.lora import merge_adapter
from hf_distill.named import sees
from hf_distill.page import page_of, write_page
from hf_distill.pruning import drop_layers, original_layers, rank_layers, read_manifest, refuse_bundles
from hf_distill.report import markdown, measured_on, result_rows, table
from hf_distill.row_files import first_rows, load_rows
from hf_distill.runs import Run
from hf_distill.saving import refuse_folder, save_tokenizer, set_aside, try_saving
from hf_distill.token_comparison import compare_tokens
from hf_distill.token_data import comparison_data


def prune(arguments: PruneArguments) -> None:
    """Ranks layers, drops some, saves the student with its tokenizer, the bundles, `pruning.md` and `report.html`.

    Raises:
        `ValueError`: options that do not say which layers, or what `rank_layers` and `drop_layers` refuse.
    """
    _refuse_options(arguments)
    bundle_dir = os.path.join(arguments.output_dir, "bundles")
    refuse_bundles(bundle_dir)
    refuse_folder(arguments.output_dir, {"the model": arguments.model})
    groups = None if arguments.groups is None else _groups(arguments.groups)
    rows = None
    if arguments.dataset is not None:
        rows = load_rows(arguments.dataset, arguments.split, arguments.dataset_config)
        rows = filled(first_rows(rows, arguments.max_rows), arguments)
    model, tokenizer = _load(arguments.model)
    try_saving(model, tokenizer, arguments.output_dir)
    reading: dict[str, Any] = {"batch_size": arguments.batch_size, "max_length": arguments.max_length}

    layers, tables = arguments.layers, {}
    if layers is None:
        assert rows is not None
        assert arguments.num_layers is not None
        spans = rank_layers(model, rows, tokenizer, arguments.num_layers, **reading)
        layers = spans[0].layers
        tables["Layers that change their input least (angle / pi): the first are dropped"] = [
            {"--layers": " ".join(map(str, span.layers)), "distance": f"{span.distance:.4f}"} for span in spans
        ]
    student = drop_layers(model, layers, bundle_dir, groups, share_weights=True)
    set_aside(arguments.output_dir)
    student.save_pretrained(arguments.output_dir)
    save_tokenizer(tokenizer, arguments.output_dir)
    if rows is not None:
        fidelity = {"pruned": evaluate_fidelity(student, model, rows, tokenizer, **reading)}
        tokens = comparison_data(compare_tokens(student, model, rows, tokenizer, **reading))
        run = Run(asdict(arguments), [], fidelity, {"command": "prune", "num_rows": {"held-out": len(rows)}}, tokens)
        write_page(os.path.join(arguments.output_dir, "report.html"), page_of({"pruned": run}))
        tables[f"Against the whole model, {measured_on(fidelity, len(rows))}"] = result_rows(fidelity)
    kept = {"kept": original_layers(student)}
    kept |= {name: bundle["layers"] for name, bundle in read_manifest(bundle_dir)["bundles"].items()}
    tables[f"{student.num_parameters() / model.num_parameters():.1%} of the parameters are kept"] = [
        {"": name, "layers": _layer_ranges(group)} for name, group in kept.items()
    ]
    _report(arguments.output_dir, tables)


def merge(arguments: MergeArguments) -> None:
    """Merges an adapter into its base model; `ValueError` for what `merge_adapter` refuses."""
    merge_adapter(arguments.adapter, arguments.output_dir, base=arguments.base)
    print(f"the merged model is in {arguments.output_dir}")


def _refuse_options(arguments: PruneArguments) -> None:
    if (arguments.layers is None) == (arguments.num_layers is None):
        raise ValueError("give either --layers, or --num_layers and --dataset to have them chosen")
    if arguments.layers is None and (arguments.dataset is None or arguments.groups is not None):
        raise ValueError("--num_layers needs --dataset to choose layers on; --groups names layers: it needs --layers")
    if arguments.batch_size < 1 or (arguments.max_length or 2) < 2:
        raise ValueError("batch_size has to be at least 1, and max_length at least 2")
    refuse_one_template(arguments)
    if arguments.prompt_template is not None and arguments.dataset is None:
        raise ValueError("--prompt_template needs --dataset: the rows that it makes prompts of")


def _groups(text: str) -> dict[str, list[int]]:
    try:
        return {name: list(layers) for name, layers in json.loads(text).items()}
    except (AttributeError, TypeError, ValueError) as error:
        raise ValueError(f'groups have to be JSON such as {{"B": [3, 4], "C": [5]}}, got {text!r}') from error


def _load(name: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    if sees(name, None, False):
        raise ValueError(f"model {name!r} reads pictures, and prune is for models of text alone")
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
        model: Any = AutoModelForCausalLM.from_pretrained(name, dtype="auto")
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"model {name!r} cannot be loaded with its tokenizer: {reason}") from error
    return model.to("cuda" if torch.cuda.is_available() else "cpu"), tokenizer


def _layer_ranges(layers: list[int]) -> str:
    """`0-3, 19` of 0, 1, 2, 3 and 19."""
    runs = [[layer for _, layer in run] for _, run in groupby(enumerate(layers), lambda pair: pair[1] - pair[0])]
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def _report(folder: str, tables: dict[str, list[dict[str, str]]]) -> None:
    for title, rows in tables.items():
        # A title of the table's own would be folded to the table's width.
        Console().print(f"\n{title}", table(rows), sep="\n")
    with open(os.path.join(folder, "pruning.md"), "w", encoding="utf-8") as file:
        file.write("\n".join(f"## {title}\n\n{markdown(rows)}" for title, rows in tables.items()))
    print(f"student, bundles, pruning.md and, of --dataset, report.html are in {folder}")
