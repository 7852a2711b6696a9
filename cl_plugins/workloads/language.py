"""A causal language model that learns to answer instructions."""

from __future__ import annotations

from typing import Any

from cl_plugins.causal_lm import LanguageModule
from cl_plugins.lm_bytes import create_lm_bytes
from cl_plugins.recipes import Recipe
from cl_plugins.workloads.optimizers import configure_optimizers

_BUNDLED = ("vit_glyph", "lm_bytes")
"""Recipes that name the bundled backbone mean the bundled language model here."""


class InstructionTuner(LanguageModule):
    """Trains a causal language model by a recipe; cross-entropy of the answers' tokens.

    Args:
        model: :class:`~cl_plugins.causal_lm.CausalLM` or one of transformers.
        recipe: optimizer, learning rate and schedule.
    """

    def __init__(self, model: Any, recipe: Recipe) -> None:
        super().__init__(model, recipe.lr, recipe.weight_decay)
        self.recipe = recipe

    def configure_optimizers(self) -> Any:
        """The recipe's optimizer and schedule."""
        return configure_optimizers(self, self.recipe)


class HubTokenizer:
    """A tokenizer of transformers under the names that prompts and generation use.

    Args:
        tokenizer: of transformers.

    Raises:
        ValueError: for a tokenizer without an end-of-sequence token.
    """

    def __init__(self, tokenizer: Any) -> None:
        if tokenizer.eos_token_id is None:
            raise ValueError(f"`tokenizer` must have an end-of-sequence token, got {type(tokenizer).__name__} without")
        self.tokenizer = tokenizer
        self.eos_id: int = tokenizer.eos_token_id
        self.bos_id: int = self.eos_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
        self.pad_id: int = self.eos_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id

    def encode(self, text: str) -> list[int]:
        """Token ids without special tokens."""
        return list(self.tokenizer.encode(text, add_special_tokens=False))

    def decode(self, ids: Any) -> str:
        """The text of ids; special tokens are left out."""
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=True))


def build_language(recipe: Recipe, stream: Any) -> InstructionTuner:
    """The module that a recipe trains on a stream of texts.

    Args:
        recipe: its ``backbone`` is ``"lm_bytes"``, or a causal language model of transformers by name or folder.
        stream: of texts; a model of transformers gives it its tokenizer.

    Raises:
        ModuleNotFoundError: for a model of transformers without that package.
    """
    if recipe.backbone in _BUNDLED:
        return InstructionTuner(create_lm_bytes(recipe.pretrained), recipe)
    try:
        from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"`backbone` {recipe.backbone!r} needs the package transformers; pip install 'cl-plugins[llm]'"
        ) from error
    if recipe.pretrained:
        model = AutoModelForCausalLM.from_pretrained(recipe.backbone)
    else:
        build: Any = AutoModelForCausalLM.from_config
        model = build(AutoConfig.from_pretrained(recipe.backbone))
    stream.use_tokenizer(HubTokenizer(AutoTokenizer.from_pretrained(recipe.backbone)))
    return InstructionTuner(model, recipe)
