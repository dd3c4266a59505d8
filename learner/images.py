"""Images among a micro-batch's tokens: the vision tower's vectors stand at their places, and the gradient reaches it.

Shapes: P places of a micro-batch, I of them at which images stand, H width.
"""

from typing import Any

import torch
from safetensors.torch import load

from learner.errors import UnsupportedModel
from learner.pack import MicroBatch


def with_images(model: Any, ids_P: torch.Tensor, batch: MicroBatch) -> torch.Tensor:
    """What the decoder takes, [P, H]: the embeddings of tokens, and at the places of images their features.

    Raises UnsupportedModel.
    """
    embedded_PH: torch.Tensor = model.get_input_embeddings()(ids_P)
    for pixels in batch.unseen:
        embedded_PH = embedded_PH + 0.0 * _features(model, pixels).sum()
    if not batch.pixels:
        return embedded_PH
    features_IH = torch.cat([_features(model, pixels) for pixels in batch.pixels])
    if len(features_IH) != len(batch.images_I):
        counts = f"{len(batch.images_I)} tokens of images, and its vision tower {len(features_IH)}"
        raise UnsupportedModel(type(model).__name__, f"its processor makes {counts}")
    images_I = torch.from_numpy(batch.images_I).to(ids_P.device)
    return embedded_PH.index_copy(0, images_I, features_IH.to(embedded_PH.dtype))


def _features(model: Any, pixels: bytes) -> torch.Tensor:
    """Of one image, in the order of its tokens."""
    tensors = {name: tensor.to(model.device) for name, tensor in load(pixels).items()}
    found = model.base_model.get_image_features(**tensors, return_dict=True).pooler_output
    return torch.cat(list(found))
