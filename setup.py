"""Build megatron_rltd; everything about it but compiled code stands in pyproject.toml."""

from setuptools import setup

setup()
