"""Metadata lives in pyproject.toml; this file only finds the packages.

`mumoe_fast/{kernels,bench,examples}` are relative symlinks to the top-level rooms, so that one `find_packages`
gives wheels, editable installs, mypy and import-linter the same picture.
"""

from setuptools import find_packages, setup

setup(packages=find_packages(include=["mumoe_fast", "mumoe_fast.*"]))
