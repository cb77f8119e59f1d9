"""Runs an encoder over shards once: python data_prep/cache_features.py SHARDS... --out OUT --config F --modality audio

OUT holds the same samples with the encoder's features in place of that modality's items. A model whose modality says
`stored_features: true` learns from them and is evaluated on them, without the encoder's cost. The same command
continues a run that was stopped; OUT/features.json says what made the features.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

# A script sees its own folder only: what runs is the checkout that it lies in, installed or not.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch import nn

from data_prep.progress import Progress
from mmchat.config import RunConfig, parse_config, read_values
from mmchat.conversation import MODALITIES, MediaRef, Modality, Record
from mmchat.data.shard_writer import write_shard
from mmchat.data.shards import Shard, expand_shards
from mmchat.errors import SampleError
from mmchat.inference.load import with_base_models
from mmchat.modalities import Preprocess
from mmchat.modalities.feature_files import describe, write_features
from mmchat.models.build import Modalities
from mmchat.models.llm import hide_progress_bars

MADE = "features.json"
Stored = Literal["float32", "float16"]


@dataclass
class FeatureMaker:
    """One modality's preprocess and encoder.

    Attributes:
        made_by: what stands in each item.
        problems: why items stay as they are, with counts.
    """

    modality: Modality
    preprocess: Preprocess
    encoder: nn.Module
    made_by: str
    dtype: Stored
    device: torch.device
    problems: Counter[str] = field(default_factory=Counter)

    def record(self, record: Record) -> Record:
        """The record with features for items; what cannot be encoded stays, and is refused where it is met."""
        return replace(record, media=tuple(map(self._item, record.media)))

    def _item(self, item: MediaRef) -> MediaRef:
        if item.modality != self.modality or item.data is None:
            return item
        try:
            data = item.read()
            header = item.header or self.preprocess.header(data)
            plan = self.preprocess.plan(header)
            with torch.no_grad():
                features = self.encoder(self.preprocess(data, plan).to(self.device), (plan.shape,))
        except SampleError as error:
            self.problems[error.reason] += 1
            return item
        features = features.cpu().to(getattr(torch, self.dtype))
        if not features.isfinite().all():
            self.problems[f"not finite in {self.dtype}"] += 1
            return item
        return MediaRef(item.modality, write_features(features, plan.shape, self.made_by), header)


def feature_maker(config: RunConfig, modality: Modality, dtype: Stored = "float32") -> FeatureMaker:
    """Of the encoder that a configuration names; whether its modality says `stored_features` does not matter.

    Raises ValueError where the model lacks the modality, or the encoder cannot be loaded.
    """
    modalities = config.model.modalities
    entry = modalities.entries().get(modality)
    if entry is None:
        raise ValueError(f"the model has no {modality}; its modalities are {', '.join(modalities.entries()) or 'none'}")
    encoder = entry.build_encoder()
    if encoder is None and modalities.image is not None:
        encoder = modalities.image.build_encoder()
    if encoder is None:
        raise ValueError(f"{modality} shares the encoder of image, which the model does not have")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    live = {name: {**one.model_dump(), "stored_features": False} for name, one in modalities.entries().items()}
    preprocess = Modalities.model_validate(live).preprocesses()[modality]
    made_by = describe(entry, modalities.image)
    return FeatureMaker(modality, preprocess, encoder.eval().to(device), made_by, dtype, device)


def cache_features(maker: FeatureMaker, shards: str | list[str], out: Path) -> int:
    """Writes a shard to `out` for each of `shards`, under its name; returns the number of samples there.

    Shards that are whole already stay. Raises ValueError where `out` was made of something else.
    """
    opened = [Shard(path) for path in expand_shards(shards)]
    names = [Path(str(shard.path)).name for shard in opened]
    if twice := [name for name, count in Counter(names).items() if count > 1]:
        raise ValueError(f"shards of the same name in two folders: {twice}; cache each folder on its own")
    made = {
        "modality": maker.modality,
        "made_by": maker.made_by,
        "dtype": maker.dtype,
        "shards": {name: shard.sha256 for name, shard in zip(names, opened, strict=True)},
    }
    out.mkdir(parents=True, exist_ok=True)
    if (out / MADE).exists():
        if (found := json.loads((out / MADE).read_text())) != made:
            differing = sorted(key for key in made if found.get(key) != made[key])
            raise ValueError(f"{out} was made with other {', '.join(differing)}; name another folder, or remove it")
    elif any(out.iterdir()):
        raise ValueError(f"{out} holds something else; name an empty folder")
    else:
        (out / MADE).write_text(json.dumps(made, indent=1) + "\n")

    progress = Progress("samples")
    total = sum(shard.num_samples for shard in opened)
    done = 0
    for name, shard in zip(names, opened, strict=True):
        if not (out / name).exists():  # it appears only when it is whole, and after its index
            report = write_shard(out / name, _records(shard, maker))
            maker.problems.update(report.problems)
            progress.add(report.num_samples, report.num_bytes, (done + shard.num_samples) / total)
        done += shard.num_samples
    return sum(Shard(out / name).num_samples for name in names if (out / name).exists())


def _records(shard: Shard, maker: FeatureMaker) -> Iterator[Record]:
    for i in range(shard.num_samples):
        try:
            yield maker.record(shard.record(i))
        except SampleError as error:
            maker.problems[error.reason] += 1


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit status: 0 if features were written for all items, 1 otherwise."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shards", nargs="+", metavar="SHARDS", help="paths, folders, globs or ranges")
    parser.add_argument("--out", type=Path, required=True, help="folder for the shards of features")
    parser.add_argument("--config", required=True, metavar="F", help="a run's YAML file, whose encoder is used")
    parser.add_argument("--modality", choices=MODALITIES, required=True)
    parser.add_argument("--dtype", choices=("float32", "float16"), default="float32", help="of the stored values")
    args = parser.parse_args(arguments)
    hide_progress_bars()
    try:
        config = with_base_models(parse_config(read_values(args.config), args.config))
        started = time.monotonic()
        maker = feature_maker(config, args.modality, args.dtype)
        count = cache_features(maker, args.shards, args.out)
    except (ValueError, OSError) as error:
        print(f"cache_features: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("cache_features: stopped; the same command continues after the last whole shard", file=sys.stderr)
        return 130
    size = sum(path.stat().st_size for path in args.out.glob("*.tar"))
    print(
        f"{args.out}: {count:,} samples, {size / 1e6:,.1f} MB, {time.monotonic() - started:.0f} s, by {maker.made_by}"
    )
    for reason, number in maker.problems.most_common():
        print(f"  not encoded: {number:,} x {reason}")
    return 1 if maker.problems else 0


if __name__ == "__main__":
    sys.exit(main())
