"""cl-bench on streams of texts: the language model is built, trains, and answers; what cannot work is refused."""

import json

import pytest
import torch

from cl_plugins.benchmark import run_benchmark
from cl_plugins.byte_tokenizer import ByteTokenizer
from cl_plugins.lm_bytes import create_lm_bytes
from cl_plugins.recipes import load_recipe
from cl_plugins.scenarios import InstructionStream
from cl_plugins.workloads import build_module
from cl_plugins.workloads.language import HubTokenizer, InstructionTuner

TINY = {"tasks": ["upper-case", "reverse"], "n_train": 32, "n_test": 8}


@pytest.mark.parametrize("method", ["finetune", "lora", "mora", "ema", "joint", "zero-shot"])
def test_methods_on_instructions(method, tmp_path):
    result = run_benchmark(
        method, "instructions", epochs=None if method == "zero-shot" else 1, data=TINY, out=tmp_path, device="cpu",
        progress=False,
    )  # fmt: skip
    matrix = result.accuracy_matrix
    assert tuple(matrix.shape) == ((1 if method == "joint" else 2), 2)
    assert bool((matrix[-1] <= 1).all())
    assert json.loads((tmp_path / "result.json").read_text())["scenario"] == "instructions"


@pytest.mark.parametrize("method", ["ovor", "ranpac", "frozen-linear", "lst"])
def test_methods_for_images_are_refused(method, tmp_path):
    with pytest.raises(ValueError, match=f"must work on text data.*got '{method}'"):
        run_benchmark(method, "instructions", data=TINY, out=tmp_path, device="cpu", progress=False)


def test_the_bundled_model_follows_an_instruction_that_it_was_trained_on():
    stream = InstructionStream(["first-letter"], n_train=4, n_test=40, data_seed=77)
    module = InstructionTuner(create_lm_bytes(), load_recipe("finetune")).eval()
    with torch.no_grad():
        logits = stream.predict(module, next(iter(stream.test_loader(0))))
    assert float((logits.argmax(1) == 0).float().mean()) > 0.8
    random = InstructionTuner(create_lm_bytes(pretrained=False), load_recipe("finetune")).eval()
    with torch.no_grad():
        assert not bool((stream.predict(random, next(iter(stream.test_loader(0)))).argmax(1) == 0).any())


def test_missing_weights_say_how_to_make_them(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"`pretrained` must be a file of weights.*pretrain_lm_bytes"):
        create_lm_bytes(tmp_path / "none.safetensors")


def test_a_model_of_transformers_brings_its_tokenizer(tmp_path):
    transformers = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    words = {"[PAD]": 0, "[END]": 1, "[UNK]": 2, "write": 3, "the": 4, "word": 5}
    raw = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="[UNK]"))
    raw.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="[PAD]", eos_token="[END]")
    config = transformers.LlamaConfig(
        vocab_size=6, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path)
    fast.save_pretrained(tmp_path)
    stream = InstructionStream(["reverse"], n_train=4, n_test=2, batch_size=2)
    recipe = load_recipe("finetune")
    module = build_module(type(recipe)(**{**vars(recipe), "backbone": str(tmp_path)}), stream)
    assert isinstance(stream.tokenizer, HubTokenizer)
    assert stream.tokenizer.encode("write the word") == [3, 4, 5]
    assert (stream.tokenizer.pad_id, stream.tokenizer.eos_id) == (0, 1)
    batch = next(iter(stream.train_dataloader()))
    assert int(batch["input_ids"].max()) < 6
    assert bool(module.training_step(batch, 0).isfinite())
    with pytest.raises(ValueError, match="end-of-sequence"):
        HubTokenizer(transformers.PreTrainedTokenizerFast(tokenizer_object=raw))


def test_another_tokenizer_changes_prompts_and_answers():
    class Doubled(ByteTokenizer):
        def encode(self, text):
            return [i for i in super().encode(text) for _ in range(2)]

    stream = InstructionStream(["reverse"], n_train=4, n_test=2, batch_size=2)
    before, longest = next(iter(stream.train_dataloader()))["input_ids"].shape[1], stream.max_new_tokens
    stream.use_tokenizer(Doubled())
    assert next(iter(stream.train_dataloader()))["input_ids"].shape[1] == 2 * before - 2  # start and end stay single
    assert stream.max_new_tokens == 2 * longest - 1
