"""megabyte-distill: turn a token-trained language model into a byte-level one, at Megatron scale."""

from megabyte_distill.optional import guard_megatron

__version__ = "0.1.0"

guard_megatron()
