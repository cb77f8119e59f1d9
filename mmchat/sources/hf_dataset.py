"""Hugging Face data sets on disk: what `save_to_disk` wrote, and Parquet files as on the hub. Rows are read as chat's.

Rows come from the tables as they are stored, so that no picture or sound is decoded here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from mmchat.conversation import Record
from mmchat.errors import SampleError
from mmchat.sources.chat import chat_record
from mmchat.sources.chat_regions import REGION_OPTIONS
from mmchat.sources.files import Files
from mmchat.sources.rows import finder, of_split, records_from
from mmchat.sources.source import Source

_BATCH_ROWS = 16  # rows in memory at a time; a row may hold pictures
_SAVED = ("{split}/state.json", "state.json")
_PARQUET = (
    *("data/{split}-*.parquet", "{split}-*.parquet", "{split}/*.parquet", "{split}.parquet"),
    *("data/*.parquet", "*.parquet"),
)


def read_hf_dataset(files: Files, split: str, options: Mapping[str, str]) -> Iterator[Record | SampleError]:
    """Rows of the split, in the order of the table or of the names of the Parquet files.

    Raises ValueError where `datasets` is not installed, a file is broken, or the folder holds another split.
    """
    record = chat_record(files, options)
    for mark in (*_SAVED, *_PARQUET):
        names = files.find(mark.format(split=split))
        if mark.endswith("*.parquet") and "{split}" not in mark:
            names = of_split(files, names, split)
        if names:
            folder = PurePosixPath(names[0]).parent
            rows = _saved_rows(files, names[0], split) if mark in _SAVED else _parquet_rows(files, names)
            return records_from(rows, str(folder), finder(files, folder), record)
    raise ValueError(f"{files} holds none of {', '.join((*_SAVED, *_PARQUET)).format(split=split)}")


SOURCES = {"hf_dataset": Source(("instruct",), (*_SAVED, *_PARQUET), read_hf_dataset, REGION_OPTIONS)}

_NOT_INSTALLED = "Hugging Face data sets need the package datasets: pip install 'mmchat[hf]'"


def _saved_rows(files: Files, state: str, split: str) -> Iterator[Any]:
    """Rows of a folder that `Dataset.save_to_disk` wrote, memory-mapped."""
    stored = files.stored(state)
    assert stored is not None, "it was found"
    folder = Path(stored.path).parent
    if Path(stored.path).name != "state.json":
        raise ValueError(f"{folder}: a saved data set inside an archive cannot be mapped into memory; unpack it")
    try:
        import datasets
    except ImportError as error:
        raise ValueError(_NOT_INSTALLED) from error
    try:
        table = datasets.load_from_disk(str(folder)).with_format("arrow")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{folder} is no whole data set saved by datasets: {error}") from error
    if table.split is not None and str(table.split) != split:
        raise ValueError(f"{folder} is the split {table.split}, not {split}: name it with --split")
    for batch in table.iter(_BATCH_ROWS):
        yield from batch.to_pylist()


def _parquet_rows(files: Files, names: list[str]) -> Iterator[Any]:
    """Rows of Parquet files, one row group in memory at most."""
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise ValueError(_NOT_INSTALLED) from error
    for name in names:
        try:
            with files.open(name) as file:
                for batch in pyarrow.parquet.ParquetFile(file).iter_batches(_BATCH_ROWS):
                    yield from batch.to_pylist()
        except (OSError, ValueError) as error:
            raise ValueError(f"{name} in {files} is no whole Parquet file: {error}") from error
