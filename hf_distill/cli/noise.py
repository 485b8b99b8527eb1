"""Messages of libraries that say nothing about a run: the command line does not show them. The library changes nothing.

Each was seen in runs that went well, and nobody could do anything about it. All other messages are shown.
"""

import logging
import os
import re
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

# Loggers, and how their messages begin.
LOGGED = {
    "bitsandbytes.backends.cpu.ops": "Failed to load CPU gemm_4bit_forward",  # it computes by other means
    "bitsandbytes.autograd._functions": "MatMul8bitLt: inputs will be cast",  # what 8-bit layers do on a CPU
    "DeepSpeed": "Setting accelerator to CPU",  # of its import; the run says which device it has
    # Of rows before they are cut. Rows that are too long for a model are refused or counted by hf_distill.
    "transformers.tokenization_utils_base": "Token indices sequence length is longer",
    # A head that is tied to the embeddings is not in the file.
    "transformers.trainer": "There were missing keys in the checkpoint model loaded: ['lm_head.weight'].",
}
# Loggers with a handler of their own: ours would print their messages once more.
PRINTED = ("datasets", "huggingface_hub")
# Beginnings of warnings: fields and methods of transformers that TRL and PEFT still use under their old names.
WARNED = (
    "`gradient_checkpointing` is deprecated", "`gradient_checkpointing_kwargs` is deprecated",
    "`gradient_checkpointing_enable` is deprecated", "`is_gradient_checkpointing` is deprecated",
)  # fmt: skip


@contextmanager
def without_noise() -> Iterator[None]:
    """Hides these messages and repetitions while it lasts, and progress bars of less than a second."""
    os.environ.setdefault("TQDM_DELAY", "1")  # read once, when tqdm is imported
    with ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        for beginning in WARNED:
            warnings.filterwarnings("ignore", re.escape(beginning), FutureWarning)
        for name, beginning in LOGGED.items():
            logger, hides = logging.getLogger(name), _Hides(beginning)
            logger.addFilter(hides)
            stack.callback(logger.removeFilter, hides)
        for logger in map(logging.getLogger, PRINTED):
            stack.callback(setattr, logger, "propagate", logger.propagate)
            logger.propagate = False
        yield


class _Hides(logging.Filter):
    def __init__(self, beginning: str) -> None:
        super().__init__()
        self.beginning = beginning

    def filter(self, record: logging.LogRecord) -> bool:
        return not record.getMessage().startswith(self.beginning)
