"""The columns of a dataset in words, for the errors of tasks that cannot read them."""

from __future__ import annotations

from distdl.samples import DataInfo, Field


def words(data: DataInfo) -> str:
    """All columns of `data`: name, dtype, classes and shape of each."""
    return ", ".join(f"{name} ({in_words(field)})" for name, field in data.fields.items())


def in_words(field: Field) -> str:
    """One column: dtype, classes and shape."""
    shape = " x ".join("varies" if n is None else str(n) for n in field.shape)
    classes = f" of {field.num_classes} classes" if field.num_classes else ""
    return f"{field.dtype}{classes}{f' [{shape}]' if shape else ''}"
