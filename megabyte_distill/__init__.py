"""megabyte-distill: turn a token-trained language model into a byte-level one, at Megatron scale."""

__version__ = "0.1.0"
