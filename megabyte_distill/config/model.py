"""What a student is made of: the sizes of its byte side and of the backbone it inherits from the teacher.

Imports nothing but the standard library: the Hugging Face export carries this file as it is.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import NamedTuple

MAX_NGRAM = 8
"""Bytes of the longest hashed n-gram."""


class ByteMixer(str, Enum):
    """Which layer mixes bytes along the sequence in the encoder and the decoder."""

    MAMBA2 = "mamba2"
    CONV = "conv"
    LOCAL_ATTENTION = "local_attention"


class RouterKind(str, Enum):
    """What the router makes of two neighbouring encoder states before it compares them."""

    OFFICIAL = "official"
    """A SwiGLU E → hidden → E each (the paper's way)."""
    LINEAR = "linear"
    """An E × E matrix each, without bias and at first the identity (H-Net, arXiv 2507.07955)."""


class DechunkMode(str, Enum):
    """How chunk states come back to bytes."""

    HARD = "hard"
    """Byte t reads h of the last chunk that ended at or before t. What stepping does exactly."""
    CAUSAL = "causal"
    """The end byte reads h_j, the bytes after it s_j = P_j h_j + (1 − P_j) s_{j−1}."""
    OFFICIAL = "official"
    """The paper's EMA, weighted by p at the chunk's end; it sees one byte ahead."""


class ChunkPooling(str, Enum):
    """What the backbone gets of a chunk's bytes; all three live in the teacher's embedding space."""

    LAST = "last"
    """The state of the byte that ends it (the paper's way)."""
    MEAN_LAST = "mean_last"
    """(mean of its bytes' states + the last one) / 2."""
    MAX = "max"
    """The elementwise maximum."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ByteSideConfig:
    """Byte embedding, encoder, router and decoder. Defaults are the paper's; widths in units of features."""

    backbone_width: int = field(metadata={"help": "E: width of the teacher's hidden state; 0 takes the teacher's"})
    byte_width: int = field(default=1536, metadata={"help": "D: width of the byte encoder and decoder"})
    byte_ngram_tables: tuple[int, ...] = field(
        default=(),
        metadata={"help": "n of each hashed n-gram table added to the byte embedding, as 3,4,5,6,7,8; empty for none"},
    )
    byte_ngram_rows: int = field(default=32_768, metadata={"help": "rows of each n-gram table"})
    encoder_layers: int = field(default=4, metadata={"help": "byte mixer blocks in the encoder"})
    decoder_layers: int = field(default=4, metadata={"help": "byte mixer blocks in the decoder"})
    byte_mixer: ByteMixer = field(default=ByteMixer.MAMBA2, metadata={"help": "layer that mixes bytes"})
    encoder_ffn_hidden_size: int = field(
        default=4096, metadata={"help": "hidden width of the SwiGLU D → E behind the encoder"}
    )
    decoder_ffn_hidden_size: int = field(
        default=4096, metadata={"help": "hidden width of the SwiGLU E → D in front of the decoder"}
    )
    router: RouterKind = field(
        default=RouterKind.OFFICIAL,
        metadata={"help": "what projects the states that the router compares: two SwiGLUs or two E × E matrices"},
    )
    router_hidden_size: int = field(
        default=8192, metadata={"help": "hidden width of the two SwiGLUs of --router official"}
    )
    mamba_state_dim: int = field(default=128, metadata={"help": "Mamba-2 state size"})
    mamba_head_dim: int = field(default=64, metadata={"help": "Mamba-2 head width"})
    mamba_expand: int = field(default=2, metadata={"help": "Mamba-2 inner width over D"})
    mamba_conv_kernel: int = field(default=4, metadata={"help": "Mamba-2 causal convolution length, in bytes"})
    mamba_scan_chunk: int = field(default=256, metadata={"help": "Mamba-2 scan block, in bytes (speed only)"})
    conv_kernel: int = field(default=4, metadata={"help": "taps of the conv mixer's depthwise convolution"})
    conv_dilations: tuple[int, ...] = field(
        default=(1, 2, 4, 8), metadata={"help": "dilation of conv block i, taken in turn"}
    )
    conv_ffn_hidden_size: int = field(default=4096, metadata={"help": "hidden width of the conv block's gated MLP"})
    byte_attention_window: int = field(
        default=128, metadata={"help": "bytes that a byte of a local_attention block attends to, itself included"}
    )
    byte_attention_head_dim: int = field(default=64, metadata={"help": "head width of local_attention blocks"})
    norm_eps: float = field(default=1e-5, metadata={"help": "epsilon of the byte side's RMSNorms"})
    chunk_pooling: ChunkPooling = field(
        default=ChunkPooling.LAST, metadata={"help": "what the backbone gets of the states of a chunk's bytes"}
    )
    dechunk_mode: DechunkMode = field(default=DechunkMode.HARD, metadata={"help": "how chunk states reach bytes"})


_READ_BY: Mapping[ByteMixer | RouterKind, tuple[str, ...]] = {
    ByteMixer.MAMBA2: ("mamba_state_dim", "mamba_head_dim", "mamba_expand", "mamba_conv_kernel", "mamba_scan_chunk"),
    ByteMixer.CONV: ("conv_kernel", "conv_dilations", "conv_ffn_hidden_size"),
    ByteMixer.LOCAL_ATTENTION: ("byte_attention_window", "byte_attention_head_dim"),
    RouterKind.OFFICIAL: ("router_hidden_size",),
}
"""Fields of :class:`ByteSideConfig` that one mixer or router alone reads."""


def unread_fields(config: ByteSideConfig) -> dict[str, str]:
    """Fields that change nothing in this byte side, and the flag that each is about, as ``--byte-mixer mamba2``."""
    unread = {
        name: f"--{'byte-mixer' if isinstance(kind, ByteMixer) else 'router'} {kind.value}"
        for kind, names in _READ_BY.items()
        if kind not in (config.byte_mixer, config.router)
        for name in names
    }
    return unread if config.byte_ngram_tables else {**unread, "byte_ngram_rows": "--byte-ngram-tables"}


class RopeScaling(str, Enum):
    """How rotary frequencies are stretched to longer contexts."""

    LLAMA3 = "llama3"
    YARN = "yarn"
    LINEAR = "linear"
    """Every frequency divided by the same factor (the larger Gemma 3)."""


class QkNorm(str, Enum):
    """RMSNorm on queries and keys before the rotation."""

    NONE = "none"
    HEAD = "head"
    """Each head by itself, one weight [head_dim] for all (Qwen 3)."""
    FULL = "full"
    """Over all heads together (OLMo 2 and 3)."""


class Activation(str, Enum):
    """What the gate of the MLP goes through, under Hugging Face's names."""

    SILU = "silu"
    GELU_TANH = "gelu_pytorch_tanh"
    """GELU by its tanh approximation (Gemma)."""


class NormNames(NamedTuple):
    """Hugging Face's names of a layer's norms; None where it has none."""

    before_attention: str | None
    behind_attention: str | None
    """On what attention adds."""
    before_mlp: str | None
    behind_mlp: str | None


@dataclass(frozen=True, kw_only=True, slots=True)
class BackboneConfig:
    """A teacher's transformer, family-neutral. Filled from a Hugging Face config by conversion."""

    family: str
    """``name`` of one of conversion/families.py."""
    num_layers: int
    hidden_size: int
    """E."""
    ffn_hidden_size: int
    num_attention_heads: int
    num_query_groups: int
    """Key/value heads."""
    head_dim: int
    vocab_size: int
    """W: rows of the embedding table that have a meaning."""
    norm_eps: float
    rope_theta: float
    rope_scaling: dict[str, float] | None = None
    """Of kind llama3: factor, low_freq_factor, high_freq_factor, original_max_position_embeddings. Of kind yarn:
    factor, beta_fast, beta_slow, attention_factor, original_max_position_embeddings, truncate (0 or 1). Of kind linear:
    factor."""
    rope_scaling_kind: RopeScaling = RopeScaling.LLAMA3
    """Of ``rope_scaling``, where there is one."""
    qkv_bias: bool = False
    """Biases on the query, key and value projections (Qwen 2)."""
    qk_norm: QkNorm = QkNorm.NONE
    query_pre_attn_scalar: int | None = None
    """Products of queries and keys are divided by its square root; None: ``head_dim``."""
    activation: Activation = Activation.SILU
    post_norm: bool = False
    """Norms on what attention and MLP add (OLMo 2 and 3) instead of on what they read."""
    sandwich_norm: bool = False
    """Norms on what attention and MLP read and on what they add (Gemma 3); not together with ``post_norm``."""
    zero_centred_norms: bool = False
    """Every norm multiplies by 1 + its weight (Gemma)."""
    scaled_embeddings: bool = False
    """The first layer reads token embeddings times √E, rounded to their dtype (Gemma); a tied head has them as they
    are."""
    sliding_window: int | None = None
    """Positions a layer of ``sliding_layers`` attends to, its own included."""
    sliding_layers: tuple[int, ...] = ()
    """Counted from 0. RoPE is not scaled in them (OLMo 3)."""
    sliding_rope_theta: float | None = None
    """RoPE's base in them (Gemma 3); None: ``rope_theta``."""
    tied_embeddings: bool = False
    max_position_embeddings: int = 2048

    @property
    def attention_scale(self) -> float | None:
        """What products of queries and keys are multiplied by; None: 1 / √head_dim."""
        return None if self.query_pre_attn_scalar is None else self.query_pre_attn_scalar**-0.5

    @property
    def norm_names(self) -> NormNames:
        """Which norms a layer has."""
        before, behind = not self.post_norm, self.post_norm or self.sandwich_norm
        return NormNames(
            before_attention="input_layernorm" if before else None,
            behind_attention="post_attention_layernorm" if behind else None,
            before_mlp=("pre_feedforward_layernorm" if behind else "post_attention_layernorm") if before else None,
            behind_mlp="post_feedforward_layernorm" if behind else None,
        )

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embedding table: W rounded up so that every tensor-parallel size up to 128 divides it."""
        return -(-self.vocab_size // 128) * 128
