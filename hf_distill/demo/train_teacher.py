"""Trains the tokenizer and the teacher of the demo.

    python -m hf_distill.demo.train_teacher --output_dir hf_distill/demo/teacher

The teacher is a small Llama with grouped-query attention. Every step draws new stories, so it cannot memorise any and
ends close to the probabilities of the grammar itself. Rows have the form that a trainer gives them: text, then an
end-of-sequence token, and no token in front.

The same machine with the same `--num_threads` and the same torch writes the same files, byte for byte. Another CPU,
thread count or version of torch may sum in another order: expect other weights and nearly the same held-out loss.
"""

import argparse
import math
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase, PreTrainedTokenizerFast, set_seed

from hf_distill.demo.text import Storyteller


def train_tokenizer(texts: list[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE: all 256 bytes are in the vocabulary, so it reads any text, if slowly."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    bpe.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=vocab_size,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            special_tokens=["<|endoftext|>", "<pad>"],
            show_progress=False,
        ),
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token="<|endoftext|>", eos_token="<|endoftext|>", pad_token="<pad>"
    )


def special_token_ids(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Special tokens as a configuration names them."""
    return {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}


def build_teacher(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=128,
            intermediate_size=352,
            num_hidden_layers=4,
            num_attention_heads=8,
            num_key_value_heads=4,
            max_position_embeddings=512,
            tie_word_embeddings=True,
            **special_token_ids(tokenizer),
        )
    )


def make_batch(texts: list[str], tokenizer: PreTrainedTokenizerFast) -> dict[str, torch.Tensor]:
    batch = tokenizer([text + tokenizer.eos_token for text in texts], padding=True, return_tensors="pt")
    labels = batch.input_ids.masked_fill(batch.attention_mask == 0, -100)
    return {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask, "labels": labels}


def held_out_losses(model, tokenizer, num_stories: int, seed: int) -> tuple[float, float]:
    """Nats per token of the model, and of the grammar itself, on new stories.

    A model never predicts the first token of a story, so the first token's share is subtracted from the grammar's nats.
    """
    teller = Storyteller(seed)
    texts = [teller.tell() for _ in range(num_stories)]
    nats, num_tokens, firsts = 0.0, 0, []
    with torch.no_grad():
        for start in range(0, num_stories, 100):
            batch = make_batch(texts[start : start + 100], tokenizer)
            predicted = int((batch["labels"][:, 1:] != -100).sum())
            nats += model(**batch).loss.item() * predicted
            num_tokens += predicted
            firsts.append(batch["input_ids"][:, 0])
    frequencies = torch.cat(firsts).unique(return_counts=True)[1] / num_stories
    first_nats = -(frequencies * frequencies.log()).sum().item() * num_stories
    return nats / num_tokens, (teller.nats - first_nats) / num_tokens


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--vocab_size", type=int, default=640)
    parser.add_argument("--num_steps", type=int, default=2400)
    parser.add_argument("--batch_size", type=int, default=32, help="stories per step")
    parser.add_argument("--learning_rate", type=float, default=3e-3, help="reached after 100 steps, then a cosine to 0")
    parser.add_argument("--num_threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    torch.set_num_threads(args.num_threads)
    set_seed(args.seed)
    teller = Storyteller(args.seed)
    tokenizer = train_tokenizer([teller.tell() for _ in range(5000)], args.vocab_size)
    model = build_teacher(tokenizer)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.learning_rate, betas=(0.9, 0.95), weight_decay=0.01)

    def schedule(step: int) -> float:
        return min((step + 1) / 100, 0.5 + 0.5 * math.cos(math.pi * step / args.num_steps))

    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, schedule)
    progress = tqdm(range(args.num_steps), desc="teacher")
    for _ in progress:
        loss = model(**make_batch([teller.tell() for _ in range(args.batch_size)], tokenizer)).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
        progress.set_postfix(loss=f"{loss.item():.3f}")

    model.eval()
    loss, bound = held_out_losses(model, tokenizer, num_stories=2000, seed=args.seed + 1)
    model.save_pretrained(args.output_dir)
    tokenizer.save_pretrained(args.output_dir)
    print(f"{model.num_parameters():,} parameters, held-out {loss:.4f} nats/token, the grammar itself {bound:.4f}")


if __name__ == "__main__":
    main()
