"""The model's configuration and how its parts are put together."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Self

import torch
from pydantic import model_validator
from torch import nn

from mmchat.conversation import Modality
from mmchat.modalities import Preprocess
from mmchat.modalities.audio import AudioConfig
from mmchat.modalities.feature_files import FeatureReader, StoredFeatures, describe
from mmchat.modalities.image import ImageConfig
from mmchat.modalities.video import SharedEncoder, VideoConfig
from mmchat.models.box_readout import BoxReadout
from mmchat.models.connector import Connector, ConnectorConfig
from mmchat.models.fusion import (
    EarlyConfig,
    FLoRAConfig,
    FusionConfig,
    LateConfig,
    LateFusion,
    LoRAConfig,
    adapt,
)
from mmchat.models.llm import LLMConfig, decoder_of, token_embedding
from mmchat.models.mmchat import MMChat
from mmchat.schema import Schema


class _Entry(Schema):
    """What the model adds to a modality.

    stored_features: the shards hold this encoder's features in place of the media, as data_prep/cache_features.py
        writes them; the encoder's weights are not loaded.
    """

    connector: ConnectorConfig
    stored_features: bool = False


class ImageEntry(ImageConfig, _Entry):
    """read_boxes: the model has a layer that reads boxes from media tokens, which the loss `regions` needs."""

    read_boxes: bool = False

    @model_validator(mode="after")
    def _has_places(self) -> Self:
        if self.read_boxes and getattr(self.encoder, "drop_class_token", True) is False:
            raise ValueError("read_boxes: with drop_class_token: false tokens lie in no grid; leave one of the two out")
        if self.read_boxes and self.connector.grid((1, 1, 1)) is None:
            raise ValueError(
                f"read_boxes: tokens of connector {self.connector.kind} have no place; leave it out, or choose linear, "
                "mlp, attentive or pool"
            )
        return self


class VideoEntry(VideoConfig, _Entry):
    pass


class AudioEntry(AudioConfig, _Entry):
    pass


class Modalities(Schema):
    """Which modalities the model has; a modality that is not named does not exist for it."""

    image: ImageEntry | None = None
    video: VideoEntry | None = None
    audio: AudioEntry | None = None

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        for modality, entry in self.entries().items():
            if modality != "video" and entry.connector.times:
                raise ValueError(f"{modality}.connector.times: only the frames of videos have times; leave it out")
        is_shared = self.video is not None and isinstance(self.video.encoder, SharedEncoder)
        if is_shared and self.video and not self.video.stored_features and self.image and self.image.stored_features:
            raise ValueError(
                "video shares the encoder of image, which image.stored_features leaves out; set "
                "video.stored_features too, or give video an encoder of its own"
            )
        return self

    def entries(self) -> dict[Modality, ImageEntry | VideoEntry | AudioEntry]:
        named: dict[Modality, Any] = {"image": self.image, "video": self.video, "audio": self.audio}
        return {modality: entry for modality, entry in named.items() if entry is not None}

    def preprocesses(self) -> dict[Modality, Preprocess]:
        """One preprocess a modality, for training, inference and serving alike; loads no weights."""
        return {modality: self._preprocess(modality) for modality in self.entries()}

    def readouts(self, llm_dim: int) -> dict[str, BoxReadout]:
        """Layers that read boxes from media tokens, by modality."""
        return {"image": BoxReadout(llm_dim)} if self.image is not None and self.image.read_boxes else {}

    def reader(self, modality: Modality) -> FeatureReader | None:
        """What stands in place of the encoder where its features are stored; None where they are not."""
        if not self.entries()[modality].stored_features:
            return None
        preprocess = self._preprocess(modality)
        assert isinstance(preprocess, StoredFeatures)
        return FeatureReader(preprocess.feature_dim)

    def _preprocess(self, modality: Modality) -> Preprocess:
        entry = self.entries()[modality]
        preprocess = entry.preprocess(self.image) if isinstance(entry, VideoEntry) else entry.preprocess()
        if not entry.stored_features:
            return preprocess
        return StoredFeatures(preprocess, preprocess.spec.feature_dim, describe(entry, self.image))


class ModelConfig(Schema):
    llm: LLMConfig
    modalities: Modalities = Modalities()
    fusion: FusionConfig = EarlyConfig()

    @model_validator(mode="after")
    def _ranks_of_what_is_there(self) -> Self:
        ranks = self.fusion.ranks if isinstance(self.fusion, FLoRAConfig) else {}
        if unknown := [name for name in ranks if name not in self.modalities.entries()]:
            raise ValueError(
                f"fusion.ranks: found {', '.join(unknown)}; this model has {', '.join(self.modalities.entries())}"
            )
        return self

    def build(
        self,
        dtype: torch.dtype,
        seed: int,
        partition: Callable[[], Any] = lambda: None,
        gather: Callable[[list[nn.Parameter]], AbstractContextManager[Any]] = lambda _: nullcontext(),
    ) -> MMChat:
        """Loads the pretrained parts and initialises the new ones from `seed`, the same on every rank.

        Args:
            partition: makes an object during whose life transformers loads in partitions (ZeRO-3). Only the LLM is:
                encoders are small beside it, and transformers' Whisper cannot be loaded that way.
            gather: makes partitioned parameters whole for a moment.
        """
        alive = partition()
        llm = self.llm.build(dtype)
        del alive
        for parameter in llm.parameters():
            parameter.requires_grad_(False)
        embedding = token_embedding(llm)
        with torch.no_grad(), gather(list(embedding.parameters())):
            # Through the module, because some LLMs (Gemma) scale their embeddings there.
            token_std = float(embedding(torch.arange(min(1000, embedding.num_embeddings))).float().std())
        llm_dim = embedding.embedding_dim

        encoders: dict[str, nn.Module] = {}
        connectors: dict[str, Connector] = {}
        shared: dict[str, str] = {}
        for modality, entry in self.modalities.entries().items():
            with _seeded(seed, f"encoders.{modality}"):  # an encoder without weights starts at random too
                encoder = self.modalities.reader(modality) or entry.build_encoder()
            if encoder is None:
                if "image" not in encoders:
                    raise ValueError("model.modalities.video.encoder: shared needs model.modalities.image")
                shared[modality] = "image"
            else:
                encoders[modality] = encoder.to(dtype).requires_grad_(False)
            feature_dim = int(encoders[shared.get(modality, modality)].feature_dim)  # type: ignore[arg-type]
            with _seeded(seed, f"connectors.{modality}"):
                connectors[modality] = entry.connector.build(feature_dim, llm_dim, token_std).to(dtype)

        gates, late = None, None
        with _seeded(seed, "fusion"):
            if isinstance(self.fusion, FLoRAConfig | LoRAConfig):
                gates = adapt(decoder_of(llm), self.fusion, tuple(self.modalities.entries()))
            elif isinstance(self.fusion, LateConfig):
                late = LateFusion(self.fusion, llm_dim).to(dtype)
        with _seeded(seed, "readouts"):
            readouts = {name: readout.to(dtype) for name, readout in self.modalities.readouts(llm_dim).items()}
        return MMChat(llm, encoders, connectors, shared, gates, late, readouts)


@contextmanager
def _seeded(seed: int, name: str) -> Iterator[None]:
    """Random state of its own for one component: adding another does not change its start."""
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int.from_bytes(digest[:8], "little") % 2**63)
        yield
