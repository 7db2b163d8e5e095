"""The teacher's transformer in megatron-core's layers: one class hosts the teacher and the student's backbone."""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import parallel_state, tensor_parallel
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_block import TransformerBlock
from torch import Tensor

from megabyte_distill.config.engine import TransformerImpl
from megabyte_distill.config.model import BackboneConfig, QkNorm
from megabyte_distill.model.attention import CachedRows, PackedSegments
from megabyte_distill.model.backbone_layers import (
    LayerParts,
    block_spec,
    leading_block,
    local_parts,
    mark_parallel_parameters,
    step_layer,
)
from megabyte_distill.model.engine_layers import engine_parts
from megabyte_distill.model.feed_forward import TEACHER_GATES
from megabyte_distill.model.key_value_cache import KeyValueCache, NewPositions
from megabyte_distill.model.normalization import multiplier
from megabyte_distill.model.rotary import RotaryTable, packed_positions
from megabyte_distill.model.step_layers import StepBackbone
from megabyte_distill.parallel.pipeline import is_first_stage, is_last_stage, pipeline_size, virtual_size
from megabyte_distill.parallel.vocabulary import VocabularyColumns


def transformer_config(config: BackboneConfig, **overrides: Any) -> TransformerConfig:
    """megatron-core's TransformerConfig; ``overrides`` are its fields (dtype, recompute).

    Parallel sizes are those of the process groups.
    """
    pipeline, virtual = pipeline_size(), virtual_size()
    fields: dict[str, Any] = {
        "tensor_model_parallel_size": parallel_state.get_tensor_model_parallel_world_size(),
        "pipeline_model_parallel_size": pipeline,
        "pipeline_dtype": torch.float32 if pipeline > 1 else None,
        "virtual_pipeline_model_parallel_size": virtual if virtual > 1 else None,
        # in one batch two ranks' activations and gradients to each other are told apart by nothing
        "overlap_p2p_comm": virtual > 1,
        "batch_p2p_comm": virtual == 1,
        "variable_seq_lengths": pipeline > 1,
        # megatron allows varying lengths with this dispatcher alone, also where there is no expert to dispatch to
        "moe_token_dispatcher_type": "alltoall",
        # what is sent while the work goes on may not be freed before it has arrived
        "deallocate_pipeline_outputs": pipeline > 1 and virtual == 1,
        "num_layers": config.num_layers,
        "hidden_size": config.hidden_size,
        "ffn_hidden_size": config.ffn_hidden_size,
        "num_attention_heads": config.num_attention_heads,
        "num_query_groups": config.num_query_groups,
        "kv_channels": config.head_dim,
        "layernorm_epsilon": config.norm_eps,
        "normalization": "RMSNorm",
        "layernorm_zero_centered_gamma": config.zero_centred_norms,
        "softmax_scale": config.attention_scale,
        "gated_linear_unit": True,
        "activation_func": TEACHER_GATES[config.activation],
        "add_bias_linear": False,
        "add_qkv_bias": config.qkv_bias,
        "qk_layernorm": config.qk_norm is not QkNorm.NONE,
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
        "bias_activation_fusion": False,
        "bias_dropout_fusion": False,
        "masked_softmax_fusion": False,
        "gradient_accumulation_fusion": False,
        # norms and the byte side are born on the CPU as well; whoever builds a model moves all of it at once
        "use_cpu_initialization": True,
        "transformer_impl": TransformerImpl.LOCAL.value,
        # gradients are sums over the global count, which the loop divides by beforehand
        "calculate_per_token_loss": True,
    }
    return TransformerConfig(**{**fields, **overrides})


class Backbone(MegatronModule):  # type: ignore[misc]
    """Decoder-only transformer over packed vectors [M, E], with its token embedding and head beside it.

    Call it on chunk (or token embedding) vectors and cumulative lengths; it returns the states after the final norm.
    Cut by pipeline stages, the first has the embedding, the last the final norm and the head; between them go
    megatron's [M, 1, E].
    """

    def __init__(
        self,
        config: BackboneConfig,
        transformer: TransformerConfig | None = None,
        parts: LayerParts | None = None,
        *,
        vp_stage: int = 0,
    ) -> None:
        """Of this rank: its pipeline stage's layers, its part of each.

        ``parts``: what layers are built from, by default as ``transformer.transformer_impl`` says; ``vp_stage``: which
        of the rank's virtual pipeline stages it is.
        """
        transformer = copy.copy(transformer or transformer_config(config))  # its own: one field changes below
        super().__init__(config=transformer)
        self.backbone_config = config
        self.vp_stage = vp_stage
        self.pre_process = pre_process = is_first_stage(vp_stage)
        self.post_process = post_process = is_last_stage(vp_stage)
        self.embedding: tensor_parallel.VocabParallelEmbedding | None = None
        if pre_process or (post_process and config.tied_embeddings):
            self.embedding = tensor_parallel.VocabParallelEmbedding(
                num_embeddings=self.padded_vocab_size, embedding_dim=config.hidden_size,
                init_method=transformer.init_method, config=transformer,
            )  # fmt: skip
        parts = parts or _parts_of(transformer, config)
        if parts.gate is not None:
            # by the field, not by megatron's spec, whose module for it has no part in a checkpoint and breaks saving
            transformer.use_te_activation_func, transformer.activation_func = True, parts.gate
        self.decoder = TransformerBlock(
            transformer, block_spec(transformer, config, parts, vp_stage),
            pre_process=pre_process, post_process=post_process, vp_stage=vp_stage,
        )  # fmt: skip
        _check_recomputed_groups(transformer, len(self.decoder.layers))
        # where the field is on, megatron adds up these norms' gradients over tensor-parallel ranks: right for norms
        # that each rank holds whole, not for those that are cut
        transformer.qk_layernorm = config.qk_norm is QkNorm.HEAD
        self.output_layer: tensor_parallel.ColumnParallelLinear | None = None
        if post_process and not config.tied_embeddings:
            self.output_layer = tensor_parallel.ColumnParallelLinear(
                config.hidden_size, self.padded_vocab_size, config=transformer, init_method=transformer.init_method,
                bias=False, gather_output=False,
            )  # fmt: skip
        mark_parallel_parameters(self)
        if self.embedding is not None and config.tied_embeddings and not (pre_process and post_process):
            # first and last stage have a copy each: one optimizer shard for both, one of them in the gradient's norm
            self.embedding.weight.shared_embedding = True
            self.embedding.weight.shared = not pre_process
        self._rotary = RotaryTable(config)
        self._turns_by_angles = parts.turns_by_angles and self._rotary.frequencies[2] == 1.0  # YaRN has a factor

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embedding table over all tensor-parallel ranks."""
        return self.backbone_config.padded_vocab_size

    def set_input_tensor(self, tensor: Any) -> None:
        """Megatron's schedules call it; what a later stage works on is an argument of :meth:`forward`."""

    def embed(self, tokens: Tensor) -> Tensor:
        """What the first layer reads of ids [T] int64, [T, E]: their embeddings, scaled where the family scales."""
        assert self.embedding is not None, "only the first pipeline stage embeds"
        return self._scaled(self.embedding(tokens))

    @property
    def embedding_table(self) -> Tensor:
        """What :meth:`embed` gives for each of this rank's rows of the token embedding [columns.count, E]."""
        assert self.embedding is not None, "only the first pipeline stage embeds"
        return self._scaled(self.embedding.weight[: self.columns.count])

    def _scaled(self, embedded: Tensor) -> Tensor:
        if not self.backbone_config.scaled_embeddings:
            return embedded
        # the factor itself is rounded, as in transformers
        return embedded * embedded.new_full((), self.backbone_config.hidden_size**0.5)

    @property
    def tied_weight(self) -> Tensor | None:
        """The token embedding where it is the head as well, None elsewhere."""
        is_tied = self.backbone_config.tied_embeddings and self.embedding is not None
        return self.embedding.weight if is_tied else None  # type: ignore[union-attr]

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights."""
        weight: Tensor = next(self.parameters())
        return weight.dtype

    @property
    def device(self) -> torch.device:
        """Of the weights."""
        weight: Tensor = next(self.parameters())
        return weight.device

    def forward(self, x: Tensor, cu_seqlens: Tensor) -> Tensor:
        """States [M, E] after the final norm; x [M, E], positions restart in each segment of cu_seqlens [S + 1].

        A pipeline stage that is not the first takes what the stage before returned; one that is not the last returns
        [M, 1, E]. Under sequence parallelism M must be a multiple of the tensor-parallel ranks, and between stages each
        has its own part of the M.
        """
        hidden = self._through(self.decoder, x, cu_seqlens)
        return self._whole(hidden) if self.post_process else hidden

    def first_layers(self, x: Tensor, cu_seqlens: Tensor, count: int) -> Tensor:
        """States [M, E] behind the first ``count`` layers, before any final norm; x and cu_seqlens as :meth:`forward`.

        On the first pipeline stage alone, which must have so many layers.
        """
        assert self.pre_process, "only the first pipeline stage has the first layers"
        return self._whole(self._through(leading_block(self.decoder, count), x, cu_seqlens))

    def drop_behind(self, count: int) -> None:
        """Give up everything but the embedding table and the first ``count`` layers; where there are none, everything.

        What is left is for :meth:`first_layers`.
        """
        is_first = self.pre_process
        self.decoder = leading_block(self.decoder, count if is_first else 0)
        self.embedding, self.output_layer = self.embedding if is_first else None, None

    def _through(self, block: TransformerBlock, x: Tensor, cu_seqlens: Tensor) -> Tensor:
        """megatron's [M, 1, E] behind a block; under sequence parallelism this rank's part of the M."""
        cuts = self.config.sequence_parallel
        parts = self.config.tensor_model_parallel_size if cuts and not self.pre_process else 1
        size = x.shape[0] * parts
        segments = PackedSegments.of(cu_seqlens)
        if sum(segments.lengths) != size:
            raise ValueError(
                f"the backbone got {size} vectors for segments of {sum(segments.lengths)}; pipeline stages must agree "
                "on the boundaries"
            )
        positions = packed_positions(cu_seqlens, size)
        if self._turns_by_angles:
            segments.angles = self._rotary.angles(positions)
        else:
            segments.rotations = self._rotary(positions)
        if self.pre_process:
            x = x.to(self.dtype)[:, None]
            if cuts:
                x = tensor_parallel.scatter_to_sequence_parallel_region(x)
        else:
            block.set_input_tensor(x)
        hidden: Tensor = block(x, None, packed_seq_params=segments)
        return hidden

    def _whole(self, hidden: Tensor) -> Tensor:
        """[M, E] of what :meth:`_through` returns."""
        if self.config.sequence_parallel:
            # every rank goes on with all chunks alike, so that each has the whole gradient of its own part
            hidden = tensor_parallel.gather_from_sequence_parallel_region(hidden, tensor_parallel_output_grad=False)
        return hidden[:, 0]

    @property
    def columns(self) -> VocabularyColumns:
        """Which token ids :meth:`own_logits` are of."""
        ranks, vocab_size = self.config.tensor_model_parallel_size, self.backbone_config.vocab_size
        if ranks == 1:
            return VocabularyColumns(0, vocab_size)
        rows = self.padded_vocab_size // ranks
        first = rows * parallel_state.get_tensor_model_parallel_rank()
        group = parallel_state.get_tensor_model_parallel_group()
        return VocabularyColumns(first, min(max(vocab_size - first, 0), rows), group)

    def own_logits(self, hidden: Tensor) -> Tensor:
        """This rank's columns of the token logits [M, columns.count] of states [M, E], padding cut off."""
        head = self.output_layer or self.embedding
        assert head is not None, "only the last pipeline stage has a head"
        if self.config.tensor_model_parallel_size > 1:
            hidden = tensor_parallel.copy_to_tensor_model_parallel_region(hidden)
        return F.linear(hidden, head.weight)[:, : self.columns.count]

    def logits(self, hidden: Tensor) -> Tensor:
        """Token logits [M, W] of states [M, E] (padding rows of the table cut off), on every tensor-parallel rank."""
        ranks, vocab_size = self.config.tensor_model_parallel_size, self.backbone_config.vocab_size
        own = self.own_logits(hidden)
        if ranks == 1:
            return own
        own = F.pad(own, (0, self.padded_vocab_size // ranks - own.shape[1]))
        logits: Tensor = tensor_parallel.gather_from_tensor_model_parallel_region(own)
        return logits[:, :vocab_size]

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: Any = None
    ) -> dict[str, Any]:
        """megatron's; the copy of tied embeddings on the last pipeline stage is a replica of the first one's.

        Weights alone, so that a checkpoint is the same whatever the layers are built from: Transformer Engine's scaling
        factors (--fp8-recipe delayed has some) would be pickled, and are found anew within an update.
        """
        whole: dict[str, Any] = super().sharded_state_dict(prefix, sharded_offsets, metadata)
        state = {name: part for name, part in whole.items() if not name.endswith("_extra_state")}
        if self.embedding is not None and not self.pre_process:
            stored = state[f"{prefix}embedding.weight"]
            stored.replica_id = (1, *stored.replica_id[1:])
        return state

    def step_weights(self) -> StepBackbone | None:
        """The weights, for steps outside megatron's layers; None of a model in parts, or of another's layers."""
        transformer, config = self.config, self.backbone_config
        is_whole = transformer.tensor_model_parallel_size == 1 and self.pre_process and self.post_process
        if not is_whole or transformer.transformer_impl != TransformerImpl.LOCAL.value:
            return None
        return StepBackbone(
            config=config,
            layers=[step_layer(layer, config) for layer in self.decoder.layers],
            final_norm=multiplier(self.decoder.final_layernorm),
        )

    def init_cache(self, rows: int) -> KeyValueCache:
        """An empty key/value cache for :meth:`step`."""
        return KeyValueCache.empty(rows, self.device)

    @torch.no_grad()
    def step(self, x: Tensor, cache: KeyValueCache, rows: Tensor) -> Tensor:
        """One more position of the cache's (distinct) rows ``rows`` [K]: x [K, E] → states [K, E]; cache is updated.

        Equal to :meth:`forward` on those rows' whole sequences.
        """
        hidden = self.extend(x, cache, rows)
        cache.lengths[rows] += 1
        return hidden

    @torch.no_grad()
    def extend(self, x: Tensor, cache: KeyValueCache, rows: Tensor, offsets: Tensor | None = None) -> Tensor:
        """States [N, E] of positions x [N, E] behind what the cache's rows ``rows`` [N] hold.

        A row may get several: ``offsets`` [N] counts them from 0 (the default). The caller moves ``cache.lengths`` on
        by as many as he keeps.
        """
        new = NewPositions.of(cache, rows, offsets)
        carrier = CachedRows(cache=cache, new=new, rotations=self._rotary(new.places))
        hidden: Tensor = self.decoder(x.to(self.dtype)[:, None], None, packed_seq_params=carrier)
        return hidden[:, 0]


def _parts_of(transformer: TransformerConfig, config: BackboneConfig) -> LayerParts:
    uses_engine = transformer.transformer_impl == TransformerImpl.TRANSFORMER_ENGINE.value
    return engine_parts(config) if uses_engine else local_parts(config)


def _check_recomputed_groups(transformer: TransformerConfig, layers: int) -> None:
    """ValueError for groups that do not divide a stage's layers: megatron would look for more than there are."""
    group = transformer.recompute_num_layers
    if transformer.recompute_method == "uniform" and layers % group:
        raise ValueError(
            f"--recompute-num-layers {group} does not divide the {layers} layers of this pipeline stage; choose a "
            "number that does, or --recompute-method block"
        )
