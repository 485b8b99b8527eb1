"""`python -m hf_distill.cli`, the form for `accelerate launch` and `torchrun`."""

from torch.distributed.elastic.multiprocessing.errors import record

from hf_distill.cli import main

if __name__ == "__main__":
    record(main)()  # torchrun repeats at the end what the first process to fail has raised
