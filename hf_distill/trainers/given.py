"""The arguments of a trainer, and checks of them alone."""

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

from peft import PeftModel
from transformers import TrainerCallback
from trl.chat_template_utils import get_training_chat_template, has_generation_markers

from hf_distill.model_files import is_adapter_folder
from hf_distill.modeling import tokenizer_of
from hf_distill.named import has_tokenizer, sees, student_processing_class, student_processor
from hf_distill.picture_rows import has_pictures
from hf_distill.rows import is_chat, used_format
from hf_distill.trainers.checks import named_datasets
from hf_distill.trainers.data import check_chat_template, over_datasets
from hf_distill.trainers.input_checks import load_adapters


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
    compute_metrics: Any
    optimizer_cls_and_kwargs: Any
    preprocess_logits_for_metrics: Any

    @property
    def has_adapters(self) -> bool:
        """True if the student is trained in adapters."""
        return self.peft_config is not None or isinstance(self.model, PeftModel) or is_adapter_folder(self.model)

    @property
    def has_pictures(self) -> bool:
        """True if the training rows have pictures; `ValueError` if only held-out rows have some."""
        datasets = self.datasets()
        seen = [name for name, dataset in datasets.items() if has_pictures(dataset)]
        if seen and "train" not in seen:
            raise ValueError(f"the {seen[0]} dataset has pictures, and the train dataset has none: take them from both")
        return bool(seen)

    def datasets(self) -> dict[str, Any]:
        """All data sets by the names that messages call them."""
        return named_datasets(self.train_dataset, self.eval_dataset)

    def with_rows(self, function: Callable[[Any, str], Any]) -> "Given":
        """The same with `function(data set, name)` in the place of each data set."""
        train, evaluation = over_datasets(function, self.train_dataset, self.eval_dataset)
        return self._replace(train_dataset=train, eval_dataset=evaluation)

    def unprepared(self) -> dict[str, Any]:
        """Those whose rows are texts or conversations yet."""
        return {} if self.args.skips_preparation or self.formatting_func is not None else self.datasets()

    def check_arguments(self) -> None:
        """Raises `ValueError` for arguments and settings that contradict each other; TRL says it after loading."""
        args = self.args
        if any(part is not None for part in self.optimizers or ()) and self.optimizer_cls_and_kwargs is not None:
            raise ValueError("optimizers and optimizer_cls_and_kwargs are both given: pass one of them")
        if self.formatting_func is not None and args.completion_only_loss:
            raise ValueError(
                "formatting_func makes texts without a completion, and completion_only_loss=True trains on completions "
                "alone: remove one of them"
            )
        if self.data_collator is not None and args.keeps_documents_apart:
            raise ValueError(
                "data_collator is not used with packing and padding_free, whose rows TRL joins itself: remove it, or "
                "set both to False"
            )
        if args.assistant_only_loss:
            row = next(iter(self.train_dataset))
            if not any(is_chat(row.get(column)) for column in used_format(set(row), args.dataset_text_field)):
                raise ValueError(
                    "assistant_only_loss=True needs conversations (messages, or prompt and completion of messages), "
                    f"and the train dataset has the columns {', '.join(sorted(row))}: set it to False"
                )

    def check_tokens(self) -> None:
        """Raises `ValueError` for special tokens of the settings that the student's tokenizer does not know."""
        for name in ("eos_token", "pad_token"):
            token = getattr(self.args, name)
            if token is not None and token not in tokenizer_of(self.processing_class).get_vocab():
                raise ValueError(
                    f"{name}={token!r} is no token of the student's tokenizer: leave it out, or add the token first"
                )

    def check_assistant_marks(self) -> None:
        """Raises `ValueError` for a chat template of which nobody knows which tokens are the assistant's."""
        template = getattr(self.processing_class, "chat_template", None)
        if not (self.args.assistant_only_loss and self.unprepared() and template) or has_generation_markers(template):
            return
        try:
            get_training_chat_template(self.processing_class)
        except ValueError as error:
            raise ValueError(
                "assistant_only_loss=True: the chat template does not mark what the assistant says ({% generation %}), "
                "and TRL knows no marked form of it. Give the rows as prompt and completion, both of them messages, "
                "whose completions alone are trained, and leave assistant_only_loss out; or add the marks to the "
                "template"
            ) from error

    def with_processing_class(self) -> "Given":
        """The same with the student's tokenizer, or processor if it sees, which its rows need if they have pictures."""
        if self.processing_class is not None:
            return self
        if self.has_pictures:
            return self._replace(processing_class=student_processor(self.model, self.args))
        seeing = sees(self.model, self.args.model_init_kwargs, self.args.trust_remote_code)
        return self._replace(processing_class=student_processing_class(self.model, self.args, sees=seeing))

    def with_adapters_loaded(self) -> "Given":
        """The same with the student loaded, and its tokenizer, if it was given as a folder of adapters.

        Everything that is asked of a model by name is asked of the one under the adapters.
        """
        if not is_adapter_folder(self.model):
            return self
        tokenizer = self.processing_class
        model = load_adapters(self.model, self.args, self.quantization_config)
        if tokenizer is None and has_tokenizer(self.model) and not self.has_pictures:
            seeing = sees(model, None, self.args.trust_remote_code)
            tokenizer = student_processing_class(self.model, self.args, sees=seeing)
        args = copy.copy(self.args)
        args.model_init_kwargs = None  # they were for this model
        return self._replace(model=model, args=args, processing_class=tokenizer, quantization_config=None)

    def check_chat_template(self, tokenizer: Any, whose: str, setting: str) -> None:
        """Raises `ValueError` for conversations that a tokenizer cannot turn into text; `setting` gives a template."""
        for name, dataset in self.unprepared().items():
            check_chat_template(dataset, name, self.args, tokenizer, whose, setting)
