"""Messages and progress bars are hidden for a while, and what was hidden before stays so."""

import logging

import datasets
import pytest
from transformers.utils import logging as transformers_logging

from hf_distill.quiet import quiet


def shown():
    levels = [logging.getLogger(name).level for name in ("hf_distill", "trl")]
    bars = not datasets.are_progress_bars_disabled(), transformers_logging.is_progress_bar_enabled()
    return bars, transformers_logging.get_verbosity(), levels


@pytest.mark.parametrize("hides", [None, datasets.disable_progress_bars, transformers_logging.disable_progress_bar])
def test_everything_is_as_it_was_afterwards(hides):
    try:
        if hides is not None:
            hides()
        before = shown()
        with quiet():
            assert shown() == ((False, False), logging.ERROR, [logging.ERROR, logging.ERROR])
        assert shown() == before
    finally:
        datasets.enable_progress_bars()
        transformers_logging.enable_progress_bar()
