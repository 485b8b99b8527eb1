"""Progress bars and messages of the libraries underneath, and ours, hidden for a while."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from datasets import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
from transformers.utils import logging as transformers_logging


@contextmanager
def quiet() -> Iterator[None]:
    """Hides progress bars and all messages below an error; what was shown before is shown again afterwards."""
    loggers = {logging.getLogger(name): logging.getLogger(name).level for name in ("hf_distill", "trl")}
    verbosity = transformers_logging.get_verbosity()
    bars = not are_progress_bars_disabled(), transformers_logging.is_progress_bar_enabled()
    disable_progress_bars()
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for was_shown, show in zip(bars, (enable_progress_bars, transformers_logging.enable_progress_bar), strict=True):
            if was_shown:
                show()
        transformers_logging.set_verbosity(verbosity)
        for logger, level in loggers.items():
            logger.setLevel(level)
