"""Operators of the byte side: ``ops`` is what the model calls, ``reference`` the slow definition behind its tests."""
