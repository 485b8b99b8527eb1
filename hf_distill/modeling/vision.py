"""Models that read pictures beside text: which parts of them see, which parts write, which tokens stand for a picture.

Everything else about them is what it is of a language model: a backbone, a head, and hidden states at positions.
"""

import inspect
import re
from collections.abc import Iterable
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin

# Names of settings that hold ids or texts of tokens which stand for a picture, or around and inside of one.
_MODALITY = re.compile(r"image|img|video|vision|audio|boi|eoi|row_col|tile|patch")
_ENDS = ("_token", "_tag", "_token_id", "_token_ids", "_token_index", "_ids")
_NUMBER = re.compile(r"\d+")
_PROBE = (1600, 1200)  # of a picture that processors with tiles divide
# Characters of white space, in the alphabets of byte-level and SentencePiece vocabularies.
_BLANK = set("ĠĊčĉ▁ \n\t\r")


def is_vision_language(model: PreTrainedModel | PreTrainedConfig) -> bool:
    """True for a model that also reads pictures, or its configuration."""
    config = model if isinstance(model, PreTrainedConfig) else model.config
    return getattr(config, "vision_config", None) is not None


def merges_early(config: PreTrainedConfig) -> bool:
    """True for a model whose pictures are tokens or patches of the text itself (Chameleon, Emu3, Fuyu).

    Which of its tokens stand for pictures is not known here, so it would learn them as text.
    """
    is_made_of_tokens = getattr(config, "vq_config", None) is not None
    return not is_vision_language(config) and (is_made_of_tokens or config.model_type == "fuyu")


def tokenizer_of(processing_class: Any) -> Any:
    """The tokenizer inside a processor; a tokenizer is its own."""
    return processing_class.tokenizer if isinstance(processing_class, ProcessorMixin) else processing_class


def vision_tower(model: PreTrainedModel) -> tuple[str, nn.Module] | None:
    """The part of a model that sees, and its name; None where there is none."""
    tower = model.get_encoder(modality="image") if is_vision_language(model) else model
    return next(((name, part) for name, part in model.named_modules() if part is tower and name), None)


def spare_frozen_tower(model: PreTrainedModel) -> None:
    """Runs the part of a model that sees without gradients, as long as none of its parameters is trained.

    Gradient checkpointing asks for the gradient of its input (`enable_input_require_grads`), which nothing needs: the
    backward would go through a frozen tower, and its layers would be computed again for it.
    """
    if (found := vision_tower(model)) is None:
        return
    tower, before = found[1], []

    def begin(module: nn.Module, _: Any) -> None:
        before.append(torch.is_grad_enabled())
        torch.set_grad_enabled(before[-1] and any(parameter.requires_grad for parameter in module.parameters()))

    def end(*_: Any) -> None:
        torch.set_grad_enabled(before.pop())

    tower.register_forward_pre_hook(begin)
    tower.register_forward_hook(end, always_call=True)


def language_part(model: PreTrainedModel) -> tuple[str, nn.Module]:
    """The part of a model that reads tokens, and its name: empty for a language model, which is that part."""
    decoder = model.get_decoder() if is_vision_language(model) else model
    return next(((name, part) for name, part in model.named_modules() if part is decoder), ("", model))


def merges_outside(model: PreTrainedModel, backbone: nn.Module) -> bool:
    """True for a model whose own forward puts pictures in the place of tokens, which its backbone cannot (Llama 4)."""

    def takes_pictures(module: Any) -> bool:
        return "pixel_values" in inspect.signature(module.forward).parameters

    return is_vision_language(model) and takes_pictures(type(model)) and not takes_pictures(type(backbone))


def picture_tokens(*sources: Any, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """The ids of tokens that stand for a picture or a part of one: as processors write one, and as settings name them.

    Args:
        sources: processors and configurations.
        tokenizer: tells the ids of tokens that a processor names by their text.
    """
    known, plain = tokenizer.get_vocab(), (tokenizer.unk_token_id, tokenizer.eos_token_id, tokenizer.bos_token_id)
    names = {**getattr(tokenizer, "special_tokens_map", {})}
    found: set[int] = set()
    for settings in (*(vars(source) for source in sources if source is not None), names):
        for name, value in settings.items():
            if not (_MODALITY.search(name) and name.lstrip("_").endswith(_ENDS)):
                continue
            values = value if isinstance(value, list | tuple) else [value]
            ids = (known.get(each) if isinstance(each, str) else each for each in values)
            found |= {each for each in ids if isinstance(each, int) and each >= 0}
    for source in sources:
        if isinstance(source, ProcessorMixin):
            found |= _written_tokens(source)
    return frozenset(found.difference(plain))


def _written_tokens(processor: Any) -> set[int]:
    """The ids of the special tokens that a processor writes for a picture, and of those that differ in numbers alone.

    A picture that is cut into tiles has a token before each (`<row_1_col_2>`), which no setting names.
    """
    mark = getattr(processor, "image_token", None)
    if mark is None:
        return set()
    probe = Image.new("RGB", _PROBE, "gray")
    try:
        ids = processor(images=[probe], text=[mark], add_special_tokens=False)["input_ids"][0]
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError):
        return set()  # it wants more than a picture; rows are tried before the training, and say what
    special = processor.tokenizer.get_added_vocab()
    ids = set(torch.as_tensor(ids).tolist())
    shapes = {_NUMBER.sub("0", token) for token, index in special.items() if index in ids}
    return {index for token, index in special.items() if _NUMBER.sub("0", token) in shapes}


class PictureSpans:
    """The tokens of a text that stand for pictures: placeholders, what is around and between them, white space inside.

    A processor writes a picture as a run of tokens: the placeholders, marks of its rows and borders, and line breaks
    between them. White space belongs to a picture if only such tokens are on both sides of it.

    Args:
        ids: token ids of [`picture_tokens`].
        tokenizer: its white space.
    """

    def __init__(self, ids: Iterable[int], tokenizer: PreTrainedTokenizerBase) -> None:
        self.ids = torch.tensor(sorted(ids), dtype=torch.long)
        blank = [index for token, index in tokenizer.get_vocab().items() if token and not set(token) - _BLANK]
        self.blank = torch.tensor(sorted(blank), dtype=torch.long)

    def __call__(self, input_ids: Tensor) -> Tensor:
        """True for tokens (B, T) that stand for a picture."""
        is_picture = torch.isin(input_ids, self.ids.to(input_ids.device))
        is_blank = torch.isin(input_ids, self.blank.to(input_ids.device)) & ~is_picture
        length = input_ids.shape[1]
        place = torch.arange(length, device=input_ids.device).expand_as(input_ids)
        # The nearest token before and after each one that is not blank; out of the text for none.
        before = torch.where(is_blank, -1, place).cummax(1).values
        after = torch.where(is_blank, length, place).flip(1).cummin(1).values.flip(1)
        bordered = torch.nn.functional.pad(is_picture, (1, 1))  # no picture before the first and after the last token
        inside = bordered.gather(1, before + 1) & bordered.gather(1, after + 1)
        return is_picture | (is_blank & inside)
