"""Operators of the byte side.

``ops`` is what the model calls, ``reference`` the slow definition behind its tests, ``fused`` the kernels of csrc/ as
torch ops; ``selection`` chooses between torch and them where a run begins.
"""
