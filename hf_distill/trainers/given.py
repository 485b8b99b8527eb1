"""The arguments of a trainer, and the models that read its rows."""

from collections.abc import Callable
from typing import Any, NamedTuple

from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel, TrainerCallback

from hf_distill.trainers.checks import named_datasets
from hf_distill.trainers.data import check_chat_template


class Given(NamedTuple):
    """The arguments of a trainer, under the names that [`HardLabelTrainer`] explains."""

    model: Any
    args: Any
    train_dataset: Any
    eval_dataset: Any
    processing_class: Any
    data_collator: Any
    peft_config: Any
    quantization_config: Any
    callbacks: list[TrainerCallback] | None
    optimizers: tuple[Any, Any]
    formatting_func: Any

    @property
    def has_adapters(self) -> bool:
        """True if the student is trained in adapters."""
        return self.peft_config is not None or isinstance(self.model, PeftModel)

    def datasets(self) -> dict[str, Any]:
        """All data sets by the names that messages call them."""
        return named_datasets(self.train_dataset, self.eval_dataset)

    def unprepared(self) -> dict[str, Any]:
        """Those whose rows are texts or conversations yet."""
        return {} if self.args.skips_preparation or self.formatting_func is not None else self.datasets()

    def check_chat_template(self, tokenizer: Any, whose: str, setting: str) -> None:
        """Raises `ValueError` for conversations that a tokenizer cannot turn into text; `setting` gives a template."""
        for name, dataset in self.unprepared().items():
            check_chat_template(dataset, name, self.args, tokenizer, whose, setting)


class Reader(NamedTuple):
    """A model that reads the student's rows."""

    name: str
    model: PreTrainedModel
    read: Callable[[dict[str, Any]], Tensor]  # hidden states (n, D) of the n tokens of a batch
