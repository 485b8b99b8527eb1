"""`python -m hf_distill.cli`, the form for `accelerate launch` and `torchrun`."""

import os

from hf_distill.cli import main
from hf_distill.cli.noise import without_noise

if __name__ == "__main__":
    with without_noise():
        if "TORCHELASTIC_RUN_ID" in os.environ:
            from torch.distributed.elastic.multiprocessing.errors import record

            main = record(main)  # torchrun repeats at the end what the first process to fail has raised
        main()
