"""Process groups, the pipeline payload, and megatron-core without CUDA."""
