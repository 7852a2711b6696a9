"""The bundled causal language model: small, over bytes, pretrained on text rules that are in no bundled stream."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from cl_plugins.backbones import WEIGHTS
from cl_plugins.causal_lm import CausalLM

LM_BYTES: dict[str, Any] = {"vocab_size": 259, "dim": 96, "depth": 4, "heads": 4}
"""Arguments of :class:`~cl_plugins.causal_lm.CausalLM`."""


def create_lm_bytes(pretrained: bool | str | Path = True, seed: int = 0) -> CausalLM:
    """The model for :class:`~cl_plugins.byte_tokenizer.ByteTokenizer`; nothing is downloaded.

    Args:
        pretrained: True for the weights in the package, a file that ``examples/pretrain_lm_bytes.py`` made, or False
            for random ones.
        seed: of random weights.

    Raises:
        FileNotFoundError: when the weights are not there.

    Example:
        >>> model = create_lm_bytes()
        >>> sum(p.numel() for p in model.parameters())
        470880
    """
    model = CausalLM(**LM_BYTES, seed=seed)
    if pretrained is not False:
        file = WEIGHTS / "lm_bytes.safetensors" if pretrained is True else Path(pretrained)
        if not file.is_file():
            raise FileNotFoundError(
                f"`pretrained` must be a file of weights, got {str(file)!r}, which is not there;"
                " make it with examples/pretrain_lm_bytes.py"
            )
        model.load_state_dict(load_file(file))
    return model
