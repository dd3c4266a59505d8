"""A Hugging Face encoder: texts to vectors, for search by meaning.

Legend: N texts, T tokens, W width.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from transformers import AutoModel, AutoTokenizer

_BATCH = 32
_MAX_TOKENS = 512

Encode = Callable[[list[str]], npt.NDArray[np.float32]]


def open_encoder(name: str) -> Encode:
    """Texts → [N, W], rows of length 1: the mean over the tokens of the model's last states (Sentence-BERT, section 3).

    `name`: a folder, or a name on the hub.
    """
    tokenizer: Any = AutoTokenizer.from_pretrained(name)
    model: Any = AutoModel.from_pretrained(name).eval()
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token

    @torch.inference_mode()
    def encode(texts: list[str]) -> npt.NDArray[np.float32]:
        rows = []
        for begin in range(0, len(texts), _BATCH):
            batch = tokenizer(
                texts[begin : begin + _BATCH],
                padding=True,
                truncation=True,
                max_length=_MAX_TOKENS,
                return_tensors="pt",
            )
            states_NTW = model(**batch).last_hidden_state.float()
            mask_NT1 = batch["attention_mask"].unsqueeze(-1)
            mean_NW = (states_NTW * mask_NT1).sum(1) / mask_NT1.sum(1).clamp(min=1)
            rows.append(torch.nn.functional.normalize(mean_NW, dim=-1).numpy())
        return np.concatenate(rows)

    return encode
