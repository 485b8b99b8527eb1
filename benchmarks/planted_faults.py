"""Faults that `hf-distill doctor` has to find, and set-ups in which it has to stay silent.

The lists were written before any of the checks. Thresholds may be set on the faults of `TUNING`. Those of `HELD_OUT`
and the set-ups of `CLEAN` are run once, when all checks are there, and reported as they come: docs/benchmarks.md.

A fault counts as found if a check warns or fails with a line about what `says` asks for. A warning or failure about
something else is a false alarm, there as in the set-ups without a fault.
"""

from typing import NamedTuple


class Fault(NamedTuple):
    """A fault in the models, the data or the settings of a run.

    Args:
        planted (`str`): how it differs from a set-up that works.
        says (`str`): the subject that the finding has to name.
    """

    planted: str
    says: str


TUNING = {
    "doubled BOS": Fault("rows begin with the text of the BOS token, and the tokenizer adds another", "BOS"),
    "leaked rows": Fault("a fifth of the held-out rows are training rows", "held-out rows in the training set"),
    "renamed vocabulary": Fault(
        "the teacher's embeddings are those of another vocabulary of the same size; its tokenizer is the student's",
        "a teacher that predicts the rows badly",
    ),
    "shifted labels": Fault("rows bring labels that are shifted by one already", "labels that are not the tokens"),
    "broken 4-bit teacher": Fault(
        "the teacher computes the same, with channels of sizes so different that blocks of 4 bits cannot hold them",
        "the cost of 4 bits",
    ),
    "mislabelled padding": Fault("rows are padded beforehand, and the padding bears labels", "labels on padding"),
    "lost system prompt": Fault(
        "rows have system messages, which the student's chat template leaves out", "lost system messages"
    ),
    "copied rows": Fault("four fifths of the training rows are copies of ten of them", "duplicates"),
    "mixing student": Fault(
        "the student's hidden states depend on the other rows of the batch: a norm over the batch",
        "the gradient of 1 x n against n x 1",
    ),
    "high learning rate": Fault("a thousand times the learning rate of the set-up without a fault", "learning rate"),
}

HELD_OUT = {
    "other template": Fault(
        "the teacher has a chat template of its own, which makes another text of the same messages", "chat templates"
    ),
    "masked end": Fault(
        "EOS is the padding token, and rows come with every EOS masked out of the labels", "EOS without a label"
    ),
    "endless teacher": Fault(
        "the teacher has never learned to end: EOS has an untrained row in its head", "the teacher's probability of EOS"
    ),
    "swapped models": Fault("student and teacher are given in each other's place", "a teacher worse than the student"),
    "wrong rotation": Fault(
        "the teacher's configuration has lost the base of its rotary positions", "a teacher that predicts rows badly"
    ),
    "cut rows": Fault("max_length is a quarter of the median row", "labels that are cut off"),
    "leaked rows, retyped": Fault(
        "a fifth of the held-out rows are training rows with other spaces and capitals",
        "held-out rows in the training set",
    ),
    "low learning rate": Fault("a ten-thousandth of the learning rate of the set-up without a fault", "learning rate"),
    "misspelt LoRA target": Fault("one of two target modules matches nothing (qproj)", "a target without a module"),
    "half a store": Fault("the teacher is a store that was written for half of the rows", "texts not in the store"),
}

# "stories" is the packaged teacher on texts of the demo's grammar, "SmolLM2" is SmolLM2-135M-Instruct.
CLEAN = {
    "stories, texts": "a random student of half the depth, the demo's settings",
    "stories, packed prompts and completions": "a trained student, packing",
    "stories, conversations, LoRA": "a trained student, one template on both sides, LoRA, a 4-bit teacher",
    "SmolLM2, conversations": "a student of every second layer, system messages",
    "SmolLM2, texts, LoRA": "SmolLM2 with LoRA learns from SmolLM2 in 4 bits",
}
