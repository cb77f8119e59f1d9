"""MMChat: encode, connect, splice, and run the LLM with per-modality low-rank fusion.

media ─▶ encoder ─▶ features ─▶ connector ─▶ media tokens ─┐ splice at placeholders
token ids ─▶ token embeddings ──────────────────────────────┴▶ LLM (+ fusion, gated by presence) ─▶ loss, logits
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from mmchat.batch import Batch, FeatureShape, MediaBatch, TokenLoss
from mmchat.models.box_readout import BoxReadout
from mmchat.models.connector import Connector
from mmchat.models.fusion import Gates, LateFusion, late_visibility
from mmchat.models.head import head_loss, logits_of
from mmchat.models.llm import decoder_of, pack_arguments, token_embedding

Encoded = tuple[Tensor, Sequence[FeatureShape], Sequence[Sequence[float]]]


class MMChat(nn.Module):
    """Encoders and connectors by modality, an LLM, and how the two are fused.

    Args:
        encoders: see mmchat.modalities.Encoder. A modality may share another's encoder: `shared` maps it.
        connectors: one for each modality.
        gates: of the low-rank layers inside the LLM, or None without them.
        late: the late-fusion layer, or None; with it, media tokens stay out of the sequence.
        readouts: of the modalities whose tokens' boxes are read (`read_boxes`).

    Attributes:
        objective: what `forward` sums, where that is not the loss of the answers alone (mmchat/training/losses.py).
    """

    def __init__(
        self,
        llm: PreTrainedModel,
        encoders: dict[str, nn.Module],
        connectors: dict[str, Connector],
        shared: dict[str, str],
        gates: Gates | None,
        late: LateFusion | None,
        readouts: dict[str, BoxReadout],
    ) -> None:
        super().__init__()
        self.llm = llm
        self.encoders = nn.ModuleDict(encoders)
        self.connectors = nn.ModuleDict(connectors)
        self.shared = shared
        self.gates = gates
        self.late = late
        self.readouts = nn.ModuleDict(readouts)
        self.objective: Callable[[MMChat, Batch], TokenLoss] | None = None

    def train(self, mode: bool = True) -> Self:
        """As usual, but frozen encoders stay as they were trained, and no encoder's batch norm moves its statistics.

        Those would depend on what a rank happens to see, and on stand-ins.
        """
        super().train(mode)
        for encoder in self.encoders.values():
            if not any(parameter.requires_grad for parameter in encoder.parameters()):
                encoder.eval()
            for module in encoder.modules():
                if isinstance(module, nn.modules.batchnorm._BatchNorm):
                    module.eval()
        return self

    def forward(self, batch: Batch) -> TokenLoss:
        """The training path: summed loss over the learned tokens of the batch, or what `objective` says."""
        if self.objective is not None:
            return self.objective(self, batch)
        return head_loss(self.llm, self.hidden(batch), batch.labels)

    def logits(self, batch: Batch) -> Tensor:
        """Logits [rows, length, vocabulary] of every position of the batch."""
        return logits_of(self.llm, self.hidden(batch))

    def hidden(
        self,
        batch: Batch,
        cache: Cache | None = None,
        attention_mask: Tensor | None = None,
        tokens: dict[str, Tensor] | None = None,
        is_mixed: bool = False,
    ) -> Tensor:
        """Last hidden states [rows, length, dim].

        With neither cache nor mask the batch is a pack: one row of segments that do not see each other. With a mask
        [rows, cached + length] (0 = padding) rows are separate conversations. tokens: the batch's media tokens, where
        the caller has them already. is_mixed: the cache is one for several conversations in one row (MixedRows), which
        needs the attention `segments` and no late fusion.
        """
        if tokens is None:
            tokens = self.media_tokens(batch)
        embeddings = self.embed(batch, tokens)
        if self.gates is not None:
            self.gates.set(batch.presence, embeddings.dtype)
        packed: dict[str, Any] = {"mixed": cache} if is_mixed else {}
        if cache is None and attention_mask is None:
            packed = pack_arguments(batch.segment_ids)
        hidden = decoder_of(self.llm)(
            inputs_embeds=embeddings,
            position_ids=batch.positions,
            attention_mask=attention_mask,
            past_key_values=cache,
            use_cache=cache is not None,
            **packed,
        ).last_hidden_state
        if self.late is not None:
            hidden = self._fuse_late(hidden, batch, tokens)
        return hidden

    def media_tokens(self, batch: Batch) -> dict[str, Tensor]:
        """Media tokens of every modality, [tokens, dim] in reading order."""
        return {modality: self.connectors[modality](*encoded) for modality, encoded in self.encoded(batch).items()}

    def encoded(self, batch: Batch) -> dict[str, Encoded]:
        """What the connector of every modality reads: features, their shapes, and times of frames in seconds.

        While training, every encoder and connector runs exactly once a call, on a harmless stand-in where the batch
        has no such item: ZeRO's collectives are issued by module calls, and a rank that skips one stops them all.
        """
        encoded: dict[str, Encoded] = {}
        for modality, connector in self.connectors.items():
            media = batch.media.get(modality)
            if media is None and not self.training:
                continue
            encoder = self.encoders[self.shared.get(modality, modality)]
            if media is not None:
                data, shapes, times_s = media.data, media.shapes, media.times_s
            else:
                data, shapes = encoder.stand_in()  # type: ignore[operator]
                times_s = tuple((0.0,) * shape[0] for shape in shapes)
                data = data.to(batch.token_ids.device)
            dtype = next(connector.parameters()).dtype  # the encoder's too; one of stored features has no parameters
            learns = any(p.requires_grad for p in encoder.parameters())
            with torch.set_grad_enabled(learns and torch.is_grad_enabled()):
                features = encoder(data.to(dtype), shapes)
            encoded[modality] = (features, shapes, times_s)
        return encoded

    def embed(self, batch: Batch, tokens: dict[str, Tensor]) -> Tensor:
        """Token embeddings with media tokens spliced in at their placeholders: [rows, length, dim]."""
        embeddings = token_embedding(self.llm)(batch.token_ids)
        for modality, media_tokens in tokens.items():
            media = batch.media.get(modality)
            if media is None:
                embeddings = embeddings + media_tokens.sum().to(embeddings.dtype) * 0.0
            elif self.late is None:
                self._check_counts(modality, media, media_tokens, batch)
                flat = embeddings.flatten(0, 1)
                flat = flat.index_copy(0, media.index, media_tokens.to(flat.dtype))
                embeddings = flat.view_as(embeddings)
        return embeddings

    def _fuse_late(self, hidden: Tensor, batch: Batch, tokens: dict[str, Tensor]) -> Tensor:
        if not tokens:
            return hidden
        assert self.late is not None
        visible = []
        for modality, media_tokens in tokens.items():
            media = batch.media.get(modality)
            if media is None:
                visible.append(batch.token_ids.new_zeros(batch.token_ids.numel(), len(media_tokens)).bool())
                continue
            connector: Connector = self.connectors[modality]  # type: ignore[assignment]
            counts = torch.tensor([connector.config.num_tokens(shape) for shape in media.shapes])
            visible.append(late_visibility(batch, media, counts.to(hidden.device)))
        everything = torch.cat([t.to(hidden.dtype) for t in tokens.values()])
        return self.late(hidden, everything, torch.cat(visible, dim=1))

    @staticmethod
    def _check_counts(modality: str, media: MediaBatch, media_tokens: Tensor, batch: Batch) -> None:
        if len(media.index) != len(media_tokens):
            raise ValueError(
                f"{modality}: {len(media.index)} placeholders but {len(media_tokens)} media tokens in the batch of "
                f"{', '.join(batch.keys)}. The preprocessing plan and the encoder disagree about an item's size."
            )
