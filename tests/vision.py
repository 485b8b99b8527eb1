"""Tiny vision-language models of several families, with processors that need no file and no torchvision."""

from typing import Any

import numpy as np
import pytest
import torch
import transformers
from datasets import Dataset, Features, Image, List, Value
from packaging.version import Version
from PIL import Image as Pictures
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForImageTextToText, PreTrainedTokenizerFast
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil
from transformers.models.gemma3.processing_gemma3 import Gemma3Processor
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.idefics3.processing_idefics3 import Idefics3Processor
from transformers.models.internvl.processing_internvl import InternVLProcessor
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import LlavaOnevisionImageProcessorPil
from transformers.models.llava_onevision.processing_llava_onevision import LlavaOnevisionProcessor
from transformers.models.mllama.image_processing_pil_mllama import MllamaImageProcessorPil
from transformers.models.mllama.processing_mllama import MllamaProcessor
from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil
from transformers.models.smolvlm.processing_smolvlm import SmolVLMProcessor
from transformers.models.smolvlm.video_processing_smolvlm import SmolVLMVideoProcessor

# Without them the image tokens of all families: where a processor puts them around a picture.
AROUND = (
    "<fake_token_around_image>",
    "<global-img>",
    *(f"<row_{i}_col_{j}>" for i in range(1, 7) for j in range(1, 7)),
)
IMAGE, END = "<image>", "<end_of_utterance>"
SPECIAL = (
    "<pad>",
    "<eos>",
    "<|user|>",
    "<|assistant|>",
    "<|system|>",
    IMAGE,
    END,
    "<video>",
    "<boi>",
    "<eoi>",
    *AROUND,
)
WORDS = (
    "what is in this picture how many are there a red blue green small large square circle and one two three".split()
)
IMAGE_ID = SPECIAL.index(IMAGE)

CHAT_TEMPLATE = (
    "{%% macro parts(content) %%}{%% if content is string %%}{{ content }}{%% else %%}{%% for part in content %%}"
    "{%% if part['type'] == 'image' %%}%s{%% else %%}{{ part['text'] }}{%% endif %%}{%% endfor %%}{%% endif %%}"
    "{%% endmacro %%}{%% for message in messages %%}<|{{ message['role'] }}|>{%% if message['role'] == 'assistant' %%}"
    "{%% generation %%}{{ parts(message['content']) }}<eos>{%% endgeneration %%}{%% else %%}"
    "{{ parts(message['content']) }}<eos>{%% endif %%}{%% endfor %%}"
    "{%% if add_generation_prompt %%}<|assistant|>{%% endif %%}"
)


def make_tokenizer(**special: str) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer with the tokens that processors of all families want."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=384, special_tokens=list(SPECIAL), initial_alphabet=alphabet)
    tokenizer.train_from_iterator([" ".join(WORDS)], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<pad>", extra_special_tokens=special
    )


VOCAB = len(make_tokenizer())


def without_videos(processor: type) -> type:
    """A class of processors without its part for videos, which needs torchvision."""
    parts = {"get_attributes": classmethod(lambda cls: ["image_processor", "tokenizer"])}
    return type(processor.__name__, (processor,), parts)


def make_processor(family: str, **settings: Any) -> Any:
    """A processor for pictures of 32 x 32, or, of most families, 16 x 16."""
    if family in ("idefics3", "smolvlm"):
        size = {
            "size": {"longest_edge": 32},
            "max_image_size": {"longest_edge": 16},
            "do_image_splitting": family == "smolvlm",
        }
        size |= settings
        template = CHAT_TEMPLATE % IMAGE
        if family == "idefics3":
            pictures = Idefics3ImageProcessorPil(**size)
            return Idefics3Processor(pictures, make_tokenizer(), image_seq_len=4, chat_template=template)
        pictures = SmolVLMImageProcessorPil(**size)
        processor = without_videos(SmolVLMProcessor)
        made = processor(pictures, make_tokenizer(), None, image_seq_len=4, chat_template=template)
        made.video_processor = SmolVLMVideoProcessor()
        return made
    if family == "gemma3":
        tokenizer = make_tokenizer(boi_token="<boi>", eoi_token="<eoi>", image_token=IMAGE)
        pictures = Gemma3ImageProcessorPil(size={"height": 16, "width": 16}, **settings)
        return Gemma3Processor(pictures, tokenizer, chat_template=CHAT_TEMPLATE % "<boi>", image_seq_length=4)
    if family == "internvl":
        around = {"start_image_token": "<boi>", "end_image_token": "<eoi>", "context_image_token": IMAGE}
        tokenizer = make_tokenizer(**around, video_token="<video>")
        pictures = GotOcr2ImageProcessorPil(size={"height": 16, "width": 16}, **{"max_patches": 2, **settings})
        template = CHAT_TEMPLATE % IMAGE
        return without_videos(InternVLProcessor)(pictures, tokenizer, None, image_seq_length=4, chat_template=template)
    if family == "mllama":
        tokenizer = make_tokenizer(image_token=IMAGE)
        tokenizer.bos_token = "<|user|>"  # which it begins every text with
        pictures = MllamaImageProcessorPil(size={"height": 16, "width": 16}, max_image_tiles=1, **settings)
        return MllamaProcessor(pictures, tokenizer, chat_template=CHAT_TEMPLATE % IMAGE)
    assert family == "llava_onevision", family
    pictures = LlavaOnevisionImageProcessorPil(
        size={"height": 16, "width": 16}, image_grid_pinpoints=[[16, 16], [16, 32], [32, 16]], **settings
    )
    return without_videos(LlavaOnevisionProcessor)(
        pictures, make_tokenizer(), num_image_tokens=16, vision_feature_select_strategy="full",
        chat_template=CHAT_TEMPLATE % IMAGE,
    )  # fmt: skip


TEXT = {
    "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 256, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 1, "tie_word_embeddings": False,
}  # fmt: skip
VISION = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 16,
    "patch_size": 4,
}  # fmt: skip
PLAIN_ROPE = {"rope_type": "default", "rope_theta": 1e4}
ROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}
# The configuration of each family: its model type, and what differs.
FAMILIES: dict[str, dict[str, Any]] = {
    "idefics3": {"scale_factor": 2, "text": {"model_type": "llama"}, "vision": {}},
    "smolvlm": {"scale_factor": 2, "text": {"model_type": "llama"}, "vision": {}},
    "gemma3": {
        "mm_tokens_per_image": 4, "boi_token_index": 8, "eoi_token_index": 9, "text": {"sliding_window": 8},
        "vision": {},
    },
    "llava_onevision": {
        "image_grid_pinpoints": [[16, 16], [16, 32], [32, 16]], "vision_feature_layer": -1,
        "text": {"model_type": "qwen2"}, "vision": {"model_type": "siglip_vision_model", "vision_use_head": False},
    },
    "qwen2_5_vl": {
        "text": {"rope_parameters": ROPE, "rope_scaling": ROPE},
        "vision": {"hidden_size": 16, "out_hidden_size": 32, "depth": 1, "num_heads": 2, "patch_size": 4,
                   "spatial_merge_size": 2, "window_size": 16, "fullatt_block_indexes": [0]},
    },
    "qwen3_vl": {
        "text": {"rope_parameters": ROPE, "rope_scaling": ROPE},
        "vision": {"hidden_size": 16, "out_hidden_size": 32, "depth": 1, "num_heads": 2, "patch_size": 4,
                   "spatial_merge_size": 2, "num_position_embeddings": 16, "deepstack_visual_indexes": [0]},
    },
    "internvl": {"text": {"model_type": "qwen2"}, "vision": {"image_size": [16, 16], "patch_size": [4, 4]}},
    "lfm2_vl": {
        "projector_hidden_size": 24,
        "text": {"model_type": "lfm2", "layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False},
        "vision": {"model_type": "siglip2_vision_model", "num_patches": 16, "vision_use_head": False},
    },
    "llama4": {
        "text": {"intermediate_size_mlp": 48, "num_local_experts": 2, "attention_chunk_size": 64,
                 "num_experts_per_tok": 1, "interleave_moe_layer_step": 2, "rope_parameters": PLAIN_ROPE},
        "vision": {"vision_output_dim": 32, "projector_input_dim": 32, "projector_output_dim": 32,
                   "intermediate_size": 64, "pixel_shuffle_ratio": 0.5, "rope_parameters": PLAIN_ROPE},
    },
    "mllama": {
        "text": {"num_hidden_layers": 3, "cross_attention_layers": [1], "rope_parameters": PLAIN_ROPE},
        "vision": {"vision_output_dim": 32, "num_global_layers": 1, "num_hidden_layers": 1, "attention_heads": 2,
                   "max_num_tiles": 1, "supported_aspect_ratios": [[1, 1]], "intermediate_layers_indices": [0]},
    },
}  # fmt: skip
# transformers 5.17 loads Idefics3's processor only beside torchvision, and knows no answers in rows with pictures.
NEEDS_5_18 = pytest.mark.skipif(Version(transformers.__version__) < Version("5.18"), reason="needs transformers 5.18")
# Families whose processors work without torchvision; those of the others get inputs made by hand.
PROCESSED = ("smolvlm", "idefics3", "gemma3", "llava_onevision", "internvl", "mllama")


def make_vlm(family: str, seed: int = 0, vocab_size: int = VOCAB, **text: Any) -> Any:
    """A random float32 vision-language model, with logits far enough from uniform to tell errors."""
    if family == "llama4" and transformers.__version__ == "5.24.0":
        pytest.skip("the forward of this release's Llama4ForConditionalGeneration fails (`image_outputs`)")
    settings = dict(FAMILIES[family])
    text_config = TEXT | {"vocab_size": vocab_size} | settings.pop("text") | text
    vision_config = VISION | settings.pop("vision")
    config = AutoConfig.for_model(
        family, text_config=text_config, vision_config=vision_config, image_token_id=IMAGE_ID,
        image_token_index=IMAGE_ID, pad_token_id=0, **settings,
    )  # fmt: skip
    torch.manual_seed(seed)
    model = AutoModelForImageTextToText.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.15)
            elif parameter.dim() == 0 or not parameter.any():
                parameter.add_(0.1)  # gates and biases that begin at 0 would hide the picture
    return model.eval()


def picture(seed: int, size: tuple[int, int] = (32, 32)) -> Pictures.Image:
    """A picture of random colours."""
    pixels = np.random.default_rng(seed).integers(0, 255, (*size, 3), dtype=np.uint8)
    return Pictures.fromarray(pixels)


def chats(number: int = 4, seed: int = 0, pictures: int = 1) -> Dataset:
    """Conversations about pictures, with answers of different lengths."""
    rows = [
        {
            "images": [picture(seed + 10 * i + j) for j in range(pictures)],
            "messages": [
                {"role": "user", "content": " ".join(WORDS[: 3 + i % 4])},
                {"role": "assistant", "content": " ".join(WORDS[i : 2 * i + 3])},
            ],
        }
        for i in range(number)
    ]
    message = {"role": Value("string"), "content": Value("string")}
    return Dataset.from_list(rows, features=Features({"images": List(Image()), "messages": List(message)}))


def questions(number: int = 4, seed: int = 0, pictures: int = 1) -> Dataset:
    """The same as prompt and completion."""
    rows = chats(number, seed, pictures)

    def split(row: dict[str, Any]) -> dict[str, Any]:
        return {"prompt": row["messages"][:1], "completion": row["messages"][1:]}

    columns = [split(row) for row in rows]
    rows = rows.remove_columns("messages")
    message = List({"role": Value("string"), "content": Value("string")})
    for name in ("prompt", "completion"):
        rows = rows.add_column(name, [column[name] for column in columns], feature=message)
    return rows


# ----------------------------------------------------------------------------------------------- inputs made by hand

STAND_FOR_PICTURES = ("<image", "<boi", "<eoi", "<fake", "<row", "<global")
PICTURE_IDS = {SPECIAL.index(token) for token in SPECIAL if token.startswith(STAND_FOR_PICTURES)}
# SmolVLM's processor breaks lines between the rows of a picture's tiles; texts here have no line breaks.
LINE_BREAKS = {index for token, index in make_tokenizer().get_vocab().items() if not set(token) - {"Ċ"}}


def tokenised(number: int = 4, seed: int = 0, num_image_tokens: int = 4) -> Dataset:
    """Rows of token ids in which some stand for a picture, of the number that `picture` holds."""
    generator = np.random.default_rng(seed)
    rows = []
    for i in range(number):
        before, after = (generator.integers(60, VOCAB, size).tolist() for size in (2 + i % 2, 4 + i))
        ids = [*before, *[IMAGE_ID] * num_image_tokens, *after]
        rows.append({"input_ids": ids, "labels": ids, "picture": seed + i})
    return Dataset.from_list(rows)


class HandMade:
    """A collator of [`tokenised`] rows: what a family's processor would make of their pictures of 16 x 16."""

    def __init__(self, family: str) -> None:
        self.family = family

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        length = max(len(row["input_ids"]) for row in rows)
        padded = {
            name: torch.tensor([row[name] + [value] * (length - len(row[name])) for row in rows])
            for name, value in (("input_ids", 0), ("labels", -100))
        }
        ids = padded["input_ids"]
        pixels = torch.stack([
            torch.randn(3, 16, 16, generator=torch.Generator().manual_seed(row["picture"])) for row in rows
        ])  # fmt: skip
        batch = {**padded, "attention_mask": (ids != 0).long()}
        if self.family in ("qwen2_5_vl", "qwen3_vl"):
            patches = pixels.view(len(rows), 3, 4, 4, 4, 4).permute(0, 2, 4, 1, 3, 5).reshape(len(rows) * 16, 3, 1, 16)
            batch["pixel_values"] = patches.expand(-1, -1, 2, -1).reshape(len(rows) * 16, 96)
            batch["image_grid_thw"] = torch.tensor([[1, 4, 4]] * len(rows))
            batch["mm_token_type_ids"] = (ids == IMAGE_ID).long()
        elif self.family == "lfm2_vl":
            patches = pixels.view(len(rows), 3, 4, 4, 4, 4).permute(0, 2, 4, 3, 5, 1)
            batch["pixel_values"] = patches.reshape(len(rows), 16, 48)
            batch["pixel_attention_mask"] = torch.ones(len(rows), 16, dtype=torch.long)
            batch["spatial_shapes"] = torch.tensor([[4, 4]] * len(rows))
        else:
            batch["pixel_values"] = pixels
        return batch
