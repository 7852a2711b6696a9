"""Models of transformers behind the same prompts and decoding."""

from __future__ import annotations

import pytest
import torch

from cl_plugins.byte_tokenizer import ByteTokenizer
from cl_plugins.causal_lm import LanguageModule
from cl_plugins.generation import greedy_decode
from cl_plugins.scenarios import InstructionStream

transformers = pytest.importorskip("transformers")


def test_decoding_equals_that_of_transformers():
    config = transformers.LlamaConfig(
        vocab_size=ByteTokenizer.vocab_size, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=2, pad_token_id=256, bos_token_id=257, eos_token_id=258,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = transformers.LlamaForCausalLM(config).eval()
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(20)  # sharp logits, so that rounding decides nothing
    stream = InstructionStream(["reverse"], n_train=4, n_test=4, batch_size=4)
    batch = next(iter(stream.train_dataloader()))
    made = greedy_decode(model, batch["prompt_ids"], batch["prompt_mask"], 6, eos_id=258)
    expected = model.generate(
        input_ids=batch["prompt_ids"], attention_mask=batch["prompt_mask"], max_new_tokens=6, do_sample=False
    )
    assert torch.equal(made, expected[:, batch["prompt_ids"].shape[1] :][:, : made.shape[1]])
    loss = LanguageModule(model).training_step(batch, 0)
    assert loss.requires_grad
