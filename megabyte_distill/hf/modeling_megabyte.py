"""An exported student as a transformers model: a causal byte LM for stock tools, joint generation of its own.

The sources beside this file are those that the student was trained with.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.modeling_outputs import CausalLMOutputWithPast

from megabyte_distill.alphabet import BYTE_VOCAB, PAD_BYTE
from megabyte_distill.config.fields import from_fields
from megabyte_distill.config.model import BackboneConfig, ByteSideConfig
from megabyte_distill.hf.byte_filter import ByteFilter
from megabyte_distill.hf.configuration_megabyte import MegabyteConfig
from megabyte_distill.hf.torch_backbone import TorchBackbone
from megabyte_distill.inference.generation import Generated, GenerationSettings, generate
from megabyte_distill.inference.prompts import PATH_WINDOW
from megabyte_distill.inference.sampling import Sampling
from megabyte_distill.inference.utf8 import Utf8Mode
from megabyte_distill.model.student import Student

_CACHE_FIELD = "cache" if "cache" in {field.name for field in fields(CausalLMOutputWithPast)} else "past_key_values"
"""Outputs' name of the cache: ``cache`` since transformers 5.24, which still answers to the older one."""


class MegabyteCache(Cache):  # type: ignore[misc]
    """What a batch has read so far: the filter's state. Updated in place by the model's ``forward``."""

    is_compileable = False
    is_croppable = False

    def __init__(self, byte_filter: ByteFilter) -> None:
        super().__init__(layers=[])
        self.byte_filter = byte_filter
        self._columns = 0

    def read(self, input_ids: Tensor, mask: Tensor) -> Tensor:
        """The next columns: :meth:`ByteFilter.read`."""
        self._columns += input_ids.shape[1]
        return self.byte_filter.read(input_ids, mask)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Columns given so far, padding included."""
        return self._columns

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row i goes on as what row ``beam_idx[i]`` was."""
        self.byte_filter.keep(beam_idx.to(torch.int64))

    def crop(self, *arguments: Any) -> None:
        """ValueError: a recurrent state cannot go back."""
        raise ValueError("the cache of a byte-level student cannot be cut back; start again without a cache")


class MegabyteForCausalLM(PreTrainedModel, GenerationMixin):  # type: ignore[misc]
    """A byte-level student.

    ``forward`` gives the causal byte model P(x_{t+1} | x_{≤t}) summed over boundary bits, which ``generate`` and
    evaluation harnesses use; it reads byte after byte and has no gradient. ``generate_bytes`` draws (byte, bit) pairs,
    exact samples of the model, with K times less work a byte.
    """

    config_class = MegabyteConfig
    _is_stateful = True
    _supports_sdpa = True

    def __init__(self, config: MegabyteConfig) -> None:
        """ValueError where the configuration lacks fields or has unknown ones."""
        super().__init__(config)
        byte_side = from_fields(ByteSideConfig, config.byte_side or {}, "config.json, byte_side")
        backbone = from_fields(BackboneConfig, config.backbone or {}, "config.json, backbone")
        student = Student(byte_side, TorchBackbone(backbone))
        if student.is_official:
            raise ValueError("config.json: dechunk mode official looks one byte ahead and cannot be stepped")
        self.byte_encoder, self.router = student.byte_encoder, student.router
        self.backbone, self.byte_decoder = student.backbone, student.byte_decoder
        # its parts are registered above: parameters carry the student's own names, without a prefix
        object.__setattr__(self, "student", student)
        self.post_init()

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *arguments: Any, **options: Any) -> Any:
        """transformers' own, but ValueError where weights are missing, extra or of another shape."""
        wants_info = options.pop("output_loading_info", False)
        model, info = super().from_pretrained(
            pretrained_model_name_or_path, *arguments, output_loading_info=True, **options
        )
        problems = {name: sorted(map(str, found)) for name, found in info.items() if found and name.endswith("_keys")}
        if problems:
            raise ValueError(
                f"{pretrained_model_name_or_path}: the weights do not fit config.json: {problems}; export again"
            )
        return (model, info) if wants_info else model

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        cache: MegabyteCache | None = None,
        past_key_values: MegabyteCache | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int = 0,
        return_dict: bool | None = None,
    ) -> CausalLMOutputWithPast | tuple[Any, ...]:
        """Log-probabilities of the next byte behind every byte, one byte at a time.

        Args:
            input_ids: [B, L] int64, bytes. Each row begins a document, with or without BOS (254) in front; a later
                BOS begins another. PAD (255) is not read.
            attention_mask: [B, L], or [B, columns in the cache + L]; 0 on padding, left or right.
            labels: [B, L], the inputs again, as in all causal models of transformers; −100 and padding do not count.
            cache: what an earlier call returned; updated in place.
            past_key_values: the same under its older name.
            use_cache: return a cache (a given one is always returned).
            logits_to_keep: only so many last columns; 0 keeps all.
            return_dict: False returns a tuple of what there is.

        Returns:
            logits [B, L, 256] fp32, normalised; on padding those behind the last byte read. loss: mean nats of the
            labels. The cache stands under the name that the installed transformers gives it.

        Raises:
            ValueError: for ids that are no bytes, masks and labels of another shape, a cache of another batch or kind.
        """
        _check_ids(input_ids)
        state = _one_cache(cache, past_key_values)
        mask = _checked_mask(attention_mask, input_ids, 0 if state is None else state.get_seq_length())
        use_cache = use_cache or state is not None
        if state is None:
            state = MegabyteCache(ByteFilter(self.student, input_ids.shape[0], self.config.paths))
        if state.byte_filter.rows != input_ids.shape[0]:
            raise ValueError(f"the cache has {state.byte_filter.rows} rows, input_ids {input_ids.shape[0]}")
        logits = state.read(input_ids, mask)
        loss = None if labels is None else _loss(logits, labels, mask & (input_ids != PAD_BYTE))
        returned = state if use_cache else None
        output = CausalLMOutputWithPast(loss=loss, logits=logits[:, -logits_to_keep:], **{_CACHE_FIELD: returned})
        return output.to_tuple() if return_dict is False else output

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        cache: MegabyteCache | None = None,
        past_key_values: MegabyteCache | None = None,
        use_cache: bool | None = None,
        **_: Any,
    ) -> dict[str, Any]:
        """Arguments of ``forward`` for what the cache has not read; positions and the like are not needed."""
        state = cache if cache is not None else past_key_values
        is_whole = attention_mask is None or attention_mask.shape[1] == input_ids.shape[1]
        if state is not None and is_whole:
            input_ids = input_ids[:, state.get_seq_length() :]
        return {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "cache": state,
            "use_cache": use_cache,
            "logits_to_keep": 1,
        }

    def generate_bytes(
        self,
        prompts: Sequence[str | bytes],
        *,
        max_new_bytes: int = 256,
        temperature: float = 1.0,
        top_p: float = 1.0,
        top_k: int = 0,
        min_p: float = 0.0,
        seed: int = 0,
        paths: int | None = None,
        path_window: int = PATH_WINDOW,
        boundary_threshold: float | Literal[False] | None = None,
        stop: str | bytes | Sequence[str | bytes] = (),
        utf8: str = "raw",
    ) -> list[Generated]:
        """Continuations drawn as (byte, bit) pairs.

        ``paths`` (default: the configuration's) read the last ``path_window`` bytes of a prompt; what stands in front
        of them is cut by the router, where :meth:`forward` and ``generate`` read all of it along the paths.

        With ``boundary_threshold`` (default: the configuration's) a byte ends a chunk where the model gives that more;
        False draws the bits with their bytes, exact samples, whatever the configuration says.
        Temperature 0 is greedy. Row i draws with seed + i, and ends in front of a ``stop`` text. ``utf8="constrain"``
        never writes a byte that is no UTF-8. ValueError for settings out of range and for prompts with bytes 254 and
        255.
        """
        texts = [stop] if isinstance(stop, str | bytes) else stop
        threshold = self.config.boundary_threshold if boundary_threshold is None else boundary_threshold
        # 0 is no threshold either, but out of range
        threshold = None if threshold is False else threshold
        settings = GenerationSettings(
            max_new_bytes=max_new_bytes,
            sampling=Sampling(
                temperature=temperature, top_p=top_p, top_k=top_k, min_p=min_p, boundary_threshold=threshold
            ),
            paths=self.config.paths if paths is None else paths,
            path_window=path_window,
            seed=seed,
            stop=tuple(text.encode() if isinstance(text, str) else text for text in texts),
            utf8=Utf8Mode(utf8),
        )
        return generate(self.student, prompts, settings)

    def get_input_embeddings(self) -> nn.Module:
        """The encoder's byte table (the decoder has one of its own)."""
        table: nn.Module = self.byte_encoder.embedding
        return table

    def _init_weights(self, module: nn.Module) -> None:
        """Nothing: modules initialise themselves, and a folder that lacks weights is refused."""

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        """False: the first call of ``forward`` makes the cache."""
        return False


def _check_ids(input_ids: Tensor) -> None:
    if input_ids.dim() != 2 or not input_ids.numel():
        raise ValueError(f"input_ids has shape {list(input_ids.shape)}; expected [B, L] with at least one byte")
    low, high = int(input_ids.min()), int(input_ids.max())
    if low < 0 or high >= BYTE_VOCAB:
        raise ValueError(f"input_ids has values from {low} to {high}; expected bytes, 0 to {BYTE_VOCAB - 1}")


def _one_cache(cache: Any, past_key_values: Any) -> MegabyteCache | None:
    """The cache given under either name."""
    if cache is not None and past_key_values is not None and cache is not past_key_values:
        raise ValueError("cache and past_key_values are two names of one argument; give one")
    given = past_key_values if cache is None else cache
    if given is not None and not isinstance(given, MegabyteCache):
        raise ValueError(f"the cache is a {type(given).__name__}; expected what an earlier call returned, or none")
    return given


def _checked_mask(attention_mask: Tensor | None, input_ids: Tensor, before: int) -> Tensor:
    """[B, L] bool of an attention mask that may reach over the ``before`` columns of a cache."""
    rows, columns = input_ids.shape
    if attention_mask is None:
        return torch.ones_like(input_ids, dtype=torch.bool)
    if attention_mask.shape not in ((rows, columns), (rows, before + columns)):
        raise ValueError(
            f"attention_mask has shape {list(attention_mask.shape)}; expected {[rows, columns]}"
            + (f" or {[rows, before + columns]}" if before else "")
        )
    mask = attention_mask[:, -columns:]
    if not bool(((mask == 0) | (mask == 1)).all()):
        raise ValueError("attention_mask has values other than 0 and 1")
    return mask.to(device=input_ids.device, dtype=torch.bool)


def _loss(logits: Tensor, labels: Tensor, mask: Tensor) -> Tensor:
    """Mean nats of labels [B, L] under the logits [B, L, 256] one column before; mask [B, L], both must be read."""
    if labels.shape != mask.shape:
        raise ValueError(f"labels has shape {list(labels.shape)}; expected {list(mask.shape)}, as input_ids")
    following = labels[:, 1:].masked_fill(~(mask[:, 1:] & mask[:, :-1]), -100)
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), following.flatten(), ignore_index=-100)
