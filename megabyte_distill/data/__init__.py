"""From text to packed rows: formats, tokenizers, exact boundaries, data sets, samplers.

Nothing is imported here, so that a preprocessing worker pays neither for torch nor for tokenizers it does not use.
"""
