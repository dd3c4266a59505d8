"""A Hugging Face causal model whose every layer attends through our slots; refuses those that cannot.

Shapes: N tokens of a step, M of them whose logits are wanted, V vocabulary, I places of images, C hidden width.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load as read_safetensors
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
)
from transformers.cache_utils import DynamicLayer

from engines.errors import EngineError
from engines.llama_family import LlamaFamily, is_llama_family
from engines.slots import ATTENTION, Block, Slots, Step
from schemas.images import SEEING_MODELS, ImageInput, takes_images

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_UNBOUNDED = 1 << 40
_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.02}
"""Root mean square difference of logits, relative to their spread, that rounding alone may cause."""


class Rows(NamedTuple):
    """Neighbouring rows and how many tokens of each are in a step."""

    rows: slice
    lengths: list[int]
    span: int
    """The highest position among them, plus 1."""


class PolicyModel:
    """The model, its slots, and its weights."""

    def __init__(self, module: Any, *, has_weights: bool = True) -> None:
        """Takes a transformers model over.

        Raises EngineError (`unsupported_model`) unless the slots give the logits that the model itself gives.
        """
        self.has_weights = has_weights
        """False while the parameters are made up."""
        self.module = module.eval().requires_grad_(False)
        self.device = torch.device(module.device)
        config = module.config.get_text_config()
        self.context = int(getattr(config, "max_position_embeddings", None) or _UNBOUNDED)
        """Positions that the model has."""
        self.vocabulary = int(config.vocab_size)
        self._name = type(module).__name__
        self.sees = module.config.model_type in SEEING_MODELS
        """Whether it takes images."""
        self._refuse_by_declaration()
        self._adopt()

    def forward(
        self,
        packed_3N: torch.Tensor,
        parts: list[Rows],
        wanted_M: torch.Tensor,
        seen: Sequence[torch.Tensor] = (),
    ) -> torch.Tensor:
        """Run one step: logits [M, V]. `packed_3N`: token ids, their rows, their positions.

        The tokens of `parts` follow one another; the slots must have room. `seen`: what stands at the places with
        negative ids, as `features` gives it.
        """
        ids_N, rows_N, positions_N = packed_3N
        blocks, first = [], 0
        for part in parts:
            end = first + sum(part.lengths)
            blocks.append(Block(part.rows, part.lengths, positions_N[first:end], part.span))
            first = end
        step = Step(self.slots, rows_N * self.slots.positions + positions_N, blocks)
        if self._fast is not None:
            return self._fast.forward(ids_N, positions_N, wanted_M, step)
        tokens: dict[str, torch.Tensor] = {"input_ids": ids_N.unsqueeze(0)}
        if seen:
            embedded_NC = self.module.get_input_embeddings()(ids_N.clamp(min=0))
            embedded_NC[ids_N < 0] = torch.cat(list(seen))
            tokens = {"inputs_embeds": embedded_NC.unsqueeze(0)}
        logits_1MV = self.module(
            **tokens,
            position_ids=positions_N.unsqueeze(0),
            use_cache=False,
            logits_to_keep=wanted_M,
            slot_step=step,
        ).logits
        if step.calls != self.slots.layers:
            raise self._unsupported(f"{step.calls} of {self.slots.layers} layers attend")
        logits_MV: torch.Tensor = logits_1MV[0]
        return logits_MV

    def features(self, image: ImageInput) -> torch.Tensor:
        """An image as what stands at its places, [I, C]. Raises EngineError (`unsupported_model`)."""
        pixels = {
            name: tensor.to(self.device, self.module.dtype if tensor.is_floating_point() else None)
            for name, tensor in read_safetensors(image.pixels).items()
        }
        found = self.module.base_model.get_image_features(**pixels, return_dict=True).pooler_output
        features_IC = torch.cat(list(found))
        if len(features_IC) != len(image.places):
            counts = f"{len(image.places)} tokens, and its vision tower {len(features_IC)}"
            raise self._unsupported(f"its processor makes {counts} of an image")
        return features_IC

    def take(self, tensors: dict[str, torch.Tensor]) -> None:
        """Copy weights into the live parameters; `tensors` are of `read_weights`."""
        live = self.module.state_dict()
        for name, tensor in tensors.items():
            live[name].copy_(tensor)
        self.has_weights = True

    def _unsupported(self, why: str) -> EngineError:
        return EngineError("unsupported_model", f"{self._name}: {why}")

    def _refuse_by_declaration(self) -> None:
        config = self.module.config.get_text_config()
        if not self.module.is_backend_compatible():
            raise self._unsupported(
                "its attention cannot be replaced (_supports_attention_backend)"
            )
        rope = getattr(config, "rope_parameters", None) or {}
        if rope.get("rope_type") in {"dynamic", "longrope"}:
            raise self._unsupported("its rotary positions depend on the longest row of a batch")
        kinds = set(getattr(config, "layer_types", None) or []) - {"full_attention"}
        if kinds:
            raise self._unsupported(f"layers of kind {', '.join(sorted(kinds))}")

    @torch.inference_mode()
    def _adopt(self) -> None:
        """Make slots of the model's shape, install our attention, and compare with the model's own."""
        ids = (torch.arange(10, device=self.device) * 7 + 3) % self.vocabulary
        turns = [
            ids[:6],
            ids[6:],
        ]  # of unequal lengths, so that rows, padding and positions are seen
        own = [self.module(input_ids=turn.unsqueeze(0), use_cache=True) for turn in turns]
        layers = getattr(own[0].past_key_values, "layers", [])
        for layer in layers:
            if type(layer) is not DynamicLayer:
                raise self._unsupported(f"its cache has a {type(layer).__name__}")
        shapes = {
            (tensor.shape[1], tensor.shape[3]) for x in layers for tensor in (x.keys, x.values)
        }
        if len(shapes) != 1:
            raise self._unsupported(f"key and value shapes {sorted(shapes)} in its layers")
        shape = (len(layers), *shapes.pop())
        self.slots = Slots(shape, layers[0].keys.dtype, self.device)
        self._fast = LlamaFamily(self.module) if is_llama_family(self.module) else None
        self.module.set_attn_implementation({"text_config": ATTENTION} if self.sees else ATTENTION)
        self.slots.reserve(2, 6, most_rows=2)
        self._step_probe([turn[:-1] for turn in turns], [0, 0])
        ours_2V = self._step_probe([turn[-1:] for turn in turns], [5, 3])
        own_2V = torch.stack([out.logits[0, -1] for out in own]).float()
        error = ((ours_2V - own_2V).pow(2).mean().sqrt() / own_2V.std()).item()
        if not error <= _TOLERANCE[self.module.dtype]:
            raise self._unsupported(
                f"logits differ from the model's own by {error:.2g} of their spread"
            )
        self.slots.release()

    def _step_probe(self, turns: list[torch.Tensor], starts: list[int]) -> torch.Tensor:
        lengths = [len(turn) for turn in turns]
        rows = [torch.full_like(turn, row) for row, turn in enumerate(turns)]
        positions = [
            torch.arange(n, device=self.device) + s for n, s in zip(lengths, starts, strict=True)
        ]
        packed_3N = torch.stack([torch.cat(turns), torch.cat(rows), torch.cat(positions)])
        wanted = torch.tensor(lengths, device=self.device).cumsum(0) - 1
        return self.forward(packed_3N, [Rows(slice(0, 2), lengths, 6)], wanted).float()


def open_model(folder: Path, dtype: str, device: str) -> PolicyModel:
    """Read a Hugging Face folder; without weights the model is made from its configuration.

    Raises EngineError (`unsupported_model`, `bad_weights`).
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    has_weights = any(folder.glob("*.safetensors"))
    try:
        module = _read(folder, dtype) if has_weights else _make(folder, dtype)
    except SafetensorError as error:
        raise EngineError("bad_weights", str(error)) from error
    except (ValueError, OSError) as error:
        raise EngineError("unsupported_model", str(error)) from error
    return PolicyModel(module.to(device), has_weights=has_weights)


def _class_of(config: Any) -> Any:
    sees = hasattr(config, "vision_config") and type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING
    if takes_images(config.model_type, has_vision=sees):
        return AutoModelForImageTextToText
    return AutoModelForCausalLM


def _read(folder: Path, dtype: str) -> Any:
    open_class = _class_of(AutoConfig.from_pretrained(folder))
    module, loaded = open_class.from_pretrained(
        folder, dtype=_DTYPES[dtype], output_loading_info=True
    )
    if loaded["missing_keys"]:  # transformers makes them up
        raise EngineError("bad_weights", f"missing {min(loaded['missing_keys'])}")
    return module


def _make(folder: Path, dtype: str) -> Any:
    config = AutoConfig.from_pretrained(folder)
    return _class_of(config).from_config(config, dtype=_DTYPES[dtype])
