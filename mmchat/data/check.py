"""What is wrong with a shard, sample by sample; check_report.py looks at all shards together.

A sample is read, phrased and fitted by the very functions that training calls, so what they refuse is what training
will refuse. Training-time dropouts are off, and a task that draws its wording draws once.
"""

from __future__ import annotations

import contextlib
import json
import random
import re
import tempfile
from array import array
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mmchat.conversation import Conversation, MediaRef, Modality, Record, Region
from mmchat.data.chat_template import ChatTemplate, Sample
from mmchat.data.check_report import Job, Severity, ShardCheck, Use, open_shard
from mmchat.data.pack import load_media
from mmchat.data.shard_index import TAR_BLOCK, HeaderOf, index_shard, padded
from mmchat.data.shards import Shard
from mmchat.errors import SampleError
from mmchat.modalities.image import ImageLimits
from mmchat.regions import check_region
from mmchat.storage import CacheConfig, File, is_url
from mmchat.tasks import TASKS

Notes = dict[str, tuple[Severity, str]]  # reason to severity and detail, of one sample

_UNLIMITED = 2**62
_PLACEHOLDER = re.compile(r"<(?:image|video|audio)>")


@dataclass(frozen=True)
class ShardChecker:
    """Checks shards one by one.

    Attributes:
        template: of the run that will read the shards, without dropout; None checks what needs no model.
        header_of, decode: read a media item where there is no template.
        is_deep: every byte is read: the tar is walked, hashed and compared with its index, all media is decoded.
        hash_media: media is read and hashed, which comparing its content needs; is_deep includes it.
        folder: for indexes that are made for the check alone, and copies of shards behind URLs.
        cache: of shards behind URLs.
    """

    template: ChatTemplate | None
    header_of: HeaderOf
    decode: Callable[[Modality, bytes], object]
    is_deep: bool
    hash_media: bool
    folder: Path
    cache: CacheConfig

    def check(self, job: Job, on_sample: Callable[[int], None] = lambda num_bytes: None) -> ShardCheck:
        """Checks one shard; `on_sample` hears the bytes in the tar of every sample that is done."""
        with tempfile.TemporaryDirectory(dir=self.folder) as folder:
            found = ShardCheck(job)
            shard = self._open(found, Path(folder) / Path(job.path).name)
            if shard is not None:
                self._samples(shard, found, on_sample)
            return found

    def _samples(self, shard: Shard, found: ShardCheck, on_sample: Callable[[int], None]) -> None:
        job = found.job
        found.num_samples, found.num_bytes = shard.num_samples, shard.num_bytes
        found.sha256 = found.sha256 or shard.sha256
        offsets, owners = array("q"), array("q")  # byte and sample of every member
        for i in range(shard.num_samples):
            notes: Notes = {}
            key, num_bytes = f"sample {i}", 0
            try:
                entry = shard.entry(i)
                key, num_bytes = entry.key, sum(TAR_BLOCK + padded(size) for _, size in entry.members.values())
                offsets.extend(offset for offset, _ in entry.members.values())
                owners.extend([i] * len(entry.members))
                found.keys.add(key.encode(), i)
                self._sample(shard.record(i), i, found, notes)
            except SampleError as error:
                notes[error.reason] = ("error", error.detail)
            except Exception as error:  # training catches no other
                notes["stops the run"] = ("error", f"{type(error).__name__}: {error}")
            for reason, (severity, detail) in notes.items():
                found.add(severity, reason, key, detail.replace(str(shard.path), job.path))
            found.num_bad += any(severity == "error" for severity, _ in notes.values())
            on_sample(num_bytes)
        if not shard.num_samples:
            found.add("warning", "empty shard", "", "it holds no samples")
        if not job.only_hash:
            _check_adjacency(np.array(offsets), np.array(owners), shard, found)

    def _open(self, found: ShardCheck, copy: Path) -> Shard | None:
        """The shard by its index, or by one made for the check where that is of no use; None where the tar is not.

        Args:
            copy: where the tar may be linked or copied to, to have an index made beside it.
        """
        job, shard = found.job, None
        try:
            File.open(job.path, self.cache)
        except FileNotFoundError as error:
            found.add("error", "no such shard", "", str(error))
            return None
        except OSError as error:
            found.add("error", "unreachable shard" if is_url(job.path) else "unreadable shard", "", str(error))
            return None
        try:
            shard = open_shard(job.path, self.cache)
            if shard.num_samples:
                shard.entry(0)  # now it reads where the entries lie
        except SampleError:
            pass  # one damaged line, met again with its sample
        except (ValueError, OSError) as error:
            shard, cause = None, error.__cause__
            if is_url(job.path) and isinstance(cause, OSError) and not isinstance(cause, FileNotFoundError):
                found.add("error", "unreachable shard", "", str(error))
                return None
            is_absent = isinstance(cause, FileNotFoundError)
            found.add("error", "no index" if is_absent else "unusable index", "", str(error))
        if shard is not None and (job.only_hash or not self.is_deep):
            return shard
        try:
            self._copy(job.path, copy)
        except SampleError as error:
            found.add("error", error.reason, "", error.detail)
            return shard
        try:
            problems = index_shard(copy, self.header_of)
            fresh = Shard(copy)
        except (ValueError, OSError) as error:
            found.add("error", "damaged tar", "", str(error).replace(str(copy), job.path))
            return shard
        entries = [fresh.entry(i) for i in range(fresh.num_samples)]
        left_out = problems.problems - Counter(entry.problem[0] for entry in entries if entry.problem is not None)
        for reason, count in left_out.items():
            detail = problems.examples[reason][0].replace(str(copy), job.path)
            found.findings.add("error", reason, job, "", detail, count)
        if shard is None:
            return fresh
        found.sha256 = fresh.sha256
        if fresh.sha256 != shard.sha256:
            found.add("error", "stale index", "", f"the tar has sha256 {fresh.sha256}, its index says {shard.sha256}")
        # An index may leave keys out on purpose (those of another split), but not say what the tar does not.
        members = {entry.key: entry.members for entry in entries}
        if fresh.sha256 == shard.sha256 and any(members.get(key) != places for key, places in _places(shard)):
            found.add("error", "stale index", "", "keys or members lie elsewhere than the index says; make it anew")
        return shard

    def _copy(self, path: str, copy: Path) -> None:
        """A link to the tar, or the bytes of one behind a URL. Raises SampleError where they cannot be had."""
        if not is_url(path):
            copy.symlink_to(Path(path).resolve())
            return
        remote = File.open(path, self.cache)
        with open(copy, "wb") as file:
            for start in range(0, remote.num_bytes, self.cache.block_bytes):
                try:
                    block = remote.read(start, min(self.cache.block_bytes, remote.num_bytes - start))
                except OSError as error:
                    raise SampleError("unreachable shard", str(error)) from error
                file.write(block)

    def _sample(self, record: Record, i: int, found: ShardCheck, notes: Notes) -> None:
        """One sample on the way that training takes. Raises SampleError, or notes what is wrong."""
        refs = [ref for ref in record.media if ref.data is not None]
        found.media.update(ref.modality for ref in refs)
        if self.hash_media or self.is_deep or not refs:
            contents = [(ref.modality, found.items.add(_read(ref), i)) for ref in refs]
            found.samples.add(json.dumps([record.facts, contents], sort_keys=True).encode(), i)
        if found.job.only_hash:
            return
        sample: Sample | None = None
        for task in dict.fromkeys(use.task for use in found.job.uses):
            try:
                conversation = TASKS[task].conversation(record, random.Random(record.key))
                _note_media(record, conversation, notes)
                if self.template is None:
                    _check_without_model(conversation, record.key)
                else:
                    uses = [use for use in found.job.uses if use.task == task]
                    sample = _fit(self.template, conversation, record.key, uses, notes)
            except SampleError as error:
                notes.setdefault(error.reason, ("error", error.detail))
        _note_boxes(record, notes)
        for ref in refs if self.template is None else []:
            header = ref.header or self.header_of(ref.modality, _read(ref))
            if header.width is not None and header.height is not None:
                ImageLimits().check(header.width, header.height)  # the default limits
        if self.is_deep and self.template is not None and sample is not None:
            load_media(sample, self.template)
        for ref in refs if self.is_deep and self.template is None else []:
            self.decode(ref.modality, _read(ref))


def _places(shard: Shard) -> Iterator[tuple[str, dict[str, tuple[int, int]]]]:
    for i in range(shard.num_samples):
        try:
            entry = shard.entry(i)
        except (SampleError, ValueError):
            continue  # counted with its sample
        yield entry.key, entry.members


def _read(ref: MediaRef) -> bytes:
    try:
        return ref.read()
    except OSError as error:
        raise SampleError("unreadable shard", str(error)) from error


def _check_adjacency(offsets: np.ndarray, owners: np.ndarray, shard: Shard, found: ShardCheck) -> None:
    """Legal here, where members are joined by their index, but not for readers that go from start to end."""
    owners = owners[np.argsort(offsets)]
    starts = owners[np.flatnonzero(np.diff(owners, prepend=-1))]
    for i in np.flatnonzero(np.bincount(starts) > 1):
        detail = "another sample lies between its members: webdataset's reader splits it, or stops there"
        found.add("warning", "members apart", shard.entry(int(i)).key, detail)


def _note_media(record: Record, conversation: Conversation, notes: Notes) -> None:
    """Media that is never shown, and placeholders that stayed text."""
    shown = conversation.media
    if hidden := [i for i, ref in enumerate(record.media) if ref.data is not None and ref not in shown]:
        notes["media not shown"] = ("warning", f"items {hidden} of its {len(record.media)} media are in no turn")
    texts = [part for turn in conversation.turns for part in turn.parts if isinstance(part, str)]
    if (text := next(filter(_PLACEHOLDER.search, texts), None)) is not None:
        notes["placeholder left as text"] = ("warning", f"the model reads it as letters: {text!r:.120}")


def _note_boxes(record: Record, notes: Notes) -> None:
    """Boxes anywhere in the facts, such as a caption's objects; where no "media" is named, of the first item."""
    for node in _objects(record.facts):
        if "box" not in node:
            continue
        try:
            box = _box(node["box"])
            number = node.get("media", 0)
            if isinstance(number, int) and number in range(len(record.media)):
                _check_region(Region(0, box=box), record.media[number])
        except SampleError as error:
            if error.reason != "unreadable region" or not any(reason.startswith("unreadable") for reason in notes):
                notes.setdefault(error.reason, ("warning", f"in the facts: {error.detail}"))


def _box(found: Any) -> tuple[float, float, float, float]:
    if isinstance(found, list) and len(found) == 4 and all(isinstance(number, int | float) for number in found):
        with contextlib.suppress(OverflowError):  # an int of hundreds of digits
            return float(found[0]), float(found[1]), float(found[2]), float(found[3])
    raise SampleError("unreadable region", f"wanted a box of 4 numbers, found {found!r:.120}")


def _objects(node: Any) -> Iterator[dict[str, Any]]:
    if isinstance(node, dict):
        yield node
    for child in node.values() if isinstance(node, dict) else node if isinstance(node, list) else ():
        yield from _objects(child)


def _check_without_model(conversation: Conversation, key: str) -> None:
    """What a template would refuse, as far as it can be known without one. Raises SampleError."""
    if not any(turn.is_learned for turn in conversation.turns):
        raise SampleError("nothing to learn", f"{key}: no turn of this conversation is learned; wanted an answer")
    for part in (part for turn in conversation.turns for part in turn.parts if isinstance(part, Region)):
        if part.media not in range(len(conversation.media)):
            raise SampleError("region without its picture", f"{key}: a region names media item {part.media}")
        _check_region(part, conversation.media[part.media])


def _check_region(region: Region, ref: MediaRef) -> None:
    """Raises SampleError. Where the size is not known, nothing can be said."""
    if ref.header is not None and ref.header.width is not None and ref.header.height is not None:
        check_region(region, ref.header.width, ref.header.height, ref.header.duration_s)


def _fit(template: ChatTemplate, conversation: Conversation, key: str, uses: list[Use], notes: Notes) -> Sample:
    """The sample at its full length; notes which budgets shorten it. Raises SampleError where one cannot hold it."""
    whole = template.fit(conversation, key, key, _UNLIMITED, _UNLIMITED)
    notes.update({one.rule: ("warning", one.amount) for item in whole.media for one in item.plan.excerpts})
    for use in uses:
        assert use.tokens is not None and use.patches is not None
        if len(whole) > use.tokens or whole.num_patches > use.patches:
            fitted = template.fit(conversation, key, key, use.tokens, use.patches)
            kept = f"{len(fitted)} of {len(whole)} tokens and {fitted.num_patches} of {whole.num_patches} patches"
            notes["shortened to fit"] = ("warning", f"{kept} are left; packs hold {use.tokens} and {use.patches}")
    return whole
