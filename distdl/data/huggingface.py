"""What Hugging Face `datasets` keeps beside its Arrow files, read and written as plain JSON.

`datasets` stores the logical types of columns ("features") twice: in the metadata of the Arrow schema under
the key "huggingface", and in dataset_info.json. state.json names the Arrow files of a split and
dataset_dict.json the splits (https://huggingface.co/docs/datasets, "Features" and `save_to_disk`). Writing
them ourselves makes a prepared dataset open with `datasets.load_from_disk`, and reading them lets a folder
made by `save_to_disk` be trained on, in both cases without importing the library.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa

from distdl.data.index import Column
from distdl.samples import Field

INFO_FILE = "dataset_info.json"

Features = dict[str, Any]
"""Column -> the JSON of its feature, such as {"dtype": "uint8", "_type": "Value"}."""

_VALUE_NAMES = {
    "halffloat": "float16",
    "float": "float32",
    "double": "float64",
    "date32[day]": "date32",
    "date64[ms]": "date64",
}


def read_features(schema: pa.Schema) -> Features:
    """The features in the schema's metadata; empty where the writer left none, or nothing usable."""
    text = (schema.metadata or {}).get(b"huggingface")
    try:
        return dict(json.loads(text)["info"]["features"]) if text else {}
    except (ValueError, KeyError, TypeError):
        return {}


def with_features(schema: pa.Schema, features: Features) -> pa.Schema:
    """`schema` with `features` as its only metadata."""
    bare = pa.schema([pa.field(f.name, f.type, nullable=f.nullable) for f in schema])
    return bare.with_metadata({"huggingface": json.dumps({"info": {"features": features}})})


def feature_of(kind: pa.DataType) -> Any:
    """The feature that `datasets` reads back as the Arrow type `kind`."""
    if pa.types.is_fixed_size_list(kind):
        # "Sequence" rather than the newer "List": every version of datasets that we support reads it.
        return {"feature": feature_of(kind.value_type), "length": kind.list_size, "_type": "Sequence"}
    if pa.types.is_large_list(kind):
        return {"feature": feature_of(kind.value_type), "_type": "LargeList"}
    if pa.types.is_list(kind):
        kept = "List" if pa.types.is_struct(kind.value_type) else "Sequence"
        return {"feature": feature_of(kind.value_type), "length": -1, "_type": kept}
    if pa.types.is_struct(kind):
        return {field.name: feature_of(field.type) for field in kind}
    return {"dtype": _VALUE_NAMES.get(str(kind), str(kind)), "_type": "Value"}


def class_names(feature: Any) -> tuple[str, ...] | None:
    """The names of a ClassLabel, else None."""
    if isinstance(feature, dict) and feature.get("_type") == "ClassLabel" and feature.get("names"):
        return tuple(map(str, feature["names"]))
    return None


def all_class_names(feature: Any) -> list[tuple[str, ...]]:
    """The names of every ClassLabel in a feature, lists and structs included, in order."""
    own = class_names(feature)
    if own is not None:
        return [own]
    inner = feature.values() if isinstance(feature, dict) else feature if isinstance(feature, list) else ()
    return [names for one in inner for names in all_class_names(one)]


def has_type(feature: Any, kind: str) -> bool:
    """Whether a feature, or one inside it, is of `_type` `kind`."""
    if isinstance(feature, dict):
        return feature.get("_type") == kind or any(has_type(one, kind) for one in feature.values())
    return isinstance(feature, list) and any(has_type(one, kind) for one in feature)


def class_label(names: Sequence[str]) -> Any:
    """The feature of integers that number `names`."""
    return {"names": list(names), "_type": "ClassLabel"}


def is_image(feature: Any) -> bool:
    """Whether a feature is an encoded image: struct<bytes, path> in Arrow."""
    return isinstance(feature, dict) and feature.get("_type") == "Image"


def is_sound(feature: Any) -> bool:
    """Whether a feature is an encoded sound: struct<bytes, path> in Arrow."""
    return isinstance(feature, dict) and feature.get("_type") == "Audio"


def array_shape(feature: Any) -> tuple[int | None, ...] | None:
    """The shape of an Array2D .. Array5D (None in it: varies), else None."""
    if isinstance(feature, dict) and str(feature.get("_type")) in {f"Array{n}D" for n in range(2, 6)}:
        return tuple(feature["shape"])
    return None


def canonical_type(kind: pa.DataType) -> pa.DataType:
    """The same values in the types that are stored: no dictionaries, views or extensions, lists of `item`."""
    if isinstance(kind, pa.ExtensionType):
        return canonical_type(kind.storage_type)
    if pa.types.is_dictionary(kind):
        return canonical_type(kind.value_type)
    if pa.types.is_fixed_size_list(kind):
        return pa.list_(canonical_type(kind.value_type), kind.list_size)
    if pa.types.is_large_list(kind):
        return pa.large_list(canonical_type(kind.value_type))
    if pa.types.is_list(kind) or str(kind).startswith(("list_view", "large_list_view")):
        return pa.list_(canonical_type(kind.value_type))
    if pa.types.is_struct(kind):
        return pa.struct([pa.field(f.name, canonical_type(f.type)) for f in kind])
    return {"string_view": pa.string(), "binary_view": pa.binary()}.get(str(kind), kind)


def as_converted(schema: pa.Schema) -> pa.Schema:
    """What `convert` makes of `schema` unasked: canonical types, fixed-size lists where a feature says so."""
    features = read_features(schema)
    fields = []
    for field in schema:
        kind = canonical_type(field.type)
        shape = array_shape(features.get(field.name)) or ()
        if shape:
            kind = unlisted(kind)
        for length in reversed(shape):
            kind = pa.list_(kind) if length is None else pa.list_(kind, length)
        fields.append(pa.field(field.name, kind))
    return pa.schema(fields, metadata=schema.metadata)


def unlisted(kind: pa.DataType) -> pa.DataType:
    """The element type under lists of any kind and depth."""
    while pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        kind = kind.value_type
    return kind


def unnest(kind: pa.DataType) -> tuple[tuple[int, ...], pa.DataType]:
    """(row shape, element type): (28, 28), uint8 for 28 fixed-size lists of 28 uint8."""
    shape: list[int] = []
    while pa.types.is_fixed_size_list(kind):
        shape.append(kind.list_size)
        kind = kind.value_type
    return tuple(shape), kind


def columns_of(schema: pa.Schema) -> dict[str, Column]:
    """The columns of an Arrow schema as the index and the plan name them.

    Fixed-size lists, to any depth, become the shape of a row, lists of varying length a None in it; the
    fields of a struct stand as `column.field`; an extension type as its storage.
    """
    features = read_features(schema)
    found: dict[str, Column] = {}
    for field in schema:
        _add_column(found, field.name, field.type, features.get(field.name))
    return found


def _add_column(found: dict[str, Column], name: str, kind: pa.DataType, feature: Any) -> None:
    shape: list[int | None] = []
    while True:
        if isinstance(kind, pa.ExtensionType):
            kind = kind.storage_type
        elif pa.types.is_fixed_size_list(kind):
            shape.append(kind.list_size)
            kind = kind.value_type
        elif pa.types.is_list(kind) or pa.types.is_large_list(kind):
            shape.append(None)
            kind = kind.value_type
        else:
            break
    while True:  # a list: what its elements are
        if isinstance(feature, dict) and feature.get("_type") in ("Sequence", "List", "LargeList"):
            feature = feature.get("feature")
        elif isinstance(feature, list) and len(feature) == 1:
            feature = feature[0]
        else:
            break
    if pa.types.is_struct(kind) and not shape:
        for inner in kind:
            parts = feature if isinstance(feature, dict) else {}
            _add_column(found, f"{name}.{inner.name}", inner.type, parts.get(inner.name))
    else:
        found[name] = Column(dtype=str(kind), shape=tuple(shape), classes=class_names(feature))


def fields_of(schema: pa.Schema) -> dict[str, Field]:
    """`columns_of`, as the plan's fields."""
    return {
        name: Field(c.dtype, c.shape, len(c.classes) if c.classes else None, classes=c.classes or ())
        for name, c in columns_of(schema).items()
    }


def state_json(files: Sequence[str], split: str, fingerprint: str) -> str:
    """state.json of one split; `files` are names of Arrow files beside it."""
    state: dict[str, Any] = {
        "_data_files": [{"filename": file} for file in files],
        "_fingerprint": fingerprint,
        "_format_columns": None,
        "_format_kwargs": {},
        "_format_type": None,
        "_output_all_columns": False,
        "_split": split,
    }
    return json.dumps(state, indent=1) + "\n"


def info_json(features: Mapping[str, Any]) -> str:
    """dataset_info.json of one split."""
    info = {"citation": "", "description": "", "features": dict(features), "homepage": "", "license": ""}
    return json.dumps(info, indent=1) + "\n"


def dict_json(splits: Sequence[str]) -> str:
    """dataset_dict.json of a dataset."""
    return json.dumps({"splits": list(splits)}) + "\n"
