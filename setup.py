"""Thin on purpose: metadata and settings live in pyproject.toml."""

from setuptools import setup

setup()
