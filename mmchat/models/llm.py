"""Any transformers causal LM as the decoder: loading, and the attention of packed rows without patches."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any, Literal, Protocol

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.masking_utils import sdpa_mask
from transformers.utils import logging

from mmchat.schema import Schema

Attention = Literal["auto", "segments", "sdpa", "eager", "flash_attention_2", "flex_attention"]


class LLMConfig(Schema):
    """A causal LM of transformers.

    pretrained: local folder or hub name. attention `auto`: flash_attention_2 on a GPU where the package is installed,
    flex_attention on a GPU without it, `segments` (one exact causal SDPA per conversation) on a CPU.
    """

    pretrained: str
    revision: str | None = None
    attention: Attention = "auto"
    gradient_checkpointing: bool = False

    def build(self, dtype: torch.dtype) -> PreTrainedModel:
        """Loads the model. Raises ValueError where the name or folder cannot be loaded."""
        try:
            model = AutoModelForCausalLM.from_pretrained(
                self.pretrained,
                revision=self.revision,
                dtype=dtype,
                attn_implementation=self.backend(),
                trust_remote_code=False,  # left out, transformers asks at the terminal whether to run a folder's code
            )
        except OSError as error:
            raise ValueError(
                f"model.llm.pretrained: cannot load {self.pretrained!r}. Wanted a local folder with config.json and "
                f"weights, or a hub name that this machine can reach ({str(error).splitlines()[0]})"
            ) from error
        except ImportError as error:
            raise ValueError(
                f"model.llm.attention: {self.attention} needs a package that is not installed ({error}). "
                "pip install 'mmchat[gpu]', or choose another attention"
            ) from error
        check_supported(model)
        model.config.use_cache = False
        if self.gradient_checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        return model

    def backend(self) -> str:
        if self.attention == "flex_attention" and not torch.cuda.is_available():
            raise ValueError("model.llm.attention: flex_attention cannot train on a CPU; choose auto or segments")
        if self.attention == "auto":
            if not torch.cuda.is_available():
                return SEGMENTS
            return "flash_attention_2" if _has_flash_attention() else "flex_attention"
        return SEGMENTS if self.attention == "segments" else self.attention


def hide_progress_bars() -> None:
    """Loading takes a moment; transformers' bar for every weight file is no news to a person who trains or asks."""
    logging.disable_progress_bar()


def _has_flash_attention() -> bool:
    return importlib.util.find_spec("flash_attn") is not None


def load_tokenizer(config: LLMConfig) -> PreTrainedTokenizerBase:
    """The LLM's own tokenizer. Raises ValueError where it cannot be loaded."""
    try:
        return AutoTokenizer.from_pretrained(config.pretrained, revision=config.revision, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"model.llm.pretrained: no tokenizer in {config.pretrained!r} ({str(error).splitlines()[0]})"
        ) from error


# ---- attention of packed rows ---------------------------------------------------------------------------------------

SEGMENTS = "mmchat_segments"

# Longest segment whose attention is made of two products. Forward and backward, 9 query and 3 key heads of 64, one
# thread with AVX-512: 2.4 ms against 4.6 of torch's fused kernel for 200 positions, 17 against 21 for 512, but 40
# against 31 for 768. The scores also take memory with the square of the length.
PRODUCTS_MAX_LENGTH = 512


class MixedRows(Protocol):
    """A cache for several conversations in one row; it is given to the decoder as `mixed` too."""

    def attend(self, query: Tensor, sliding_window: int | None, attend: Callable[..., Tensor]) -> Tensor: ...


def _segment_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    cu_seq_lens_q: Tensor | None = None,
    mixed: MixedRows | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Causal attention, one SDPA call for each segment of a packed row, so that no mask of length squared exists.

    Shapes: query [rows, heads, q_length, dim]; key, value [rows, kv_heads, k_length, dim] -> [rows, q_length, heads,
    dim]. cu_seq_lens_q [segments + 1]: borders of the segments of the single row; mixed: a cache that has put several
    conversations into the single row; without either, every row is one conversation whose queries are its last
    q_length positions (a cache holds the earlier ones).
    """
    if softcap is not None:
        raise ValueError("attention with softcapping (Gemma 2) needs attention: eager or flex_attention")
    gqa = key.shape[1] != query.shape[1]

    def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = attention_mask) -> Tensor:
        q_length, k_length = q.shape[2], k.shape[2]
        windowed = sliding_window is not None and k_length > sliding_window
        if mask is None and q_length > 1 and (q_length < k_length or windowed):
            rows = torch.arange(k_length - q_length, k_length, device=q.device)[:, None]
            columns = torch.arange(k_length, device=q.device)[None]
            mask = columns <= rows
            if sliding_window is not None:
                mask &= columns > rows - sliding_window
        elif mask is None and windowed and sliding_window is not None:
            k, v = k[:, :, -sliding_window:], v[:, :, -sliding_window:]  # one query, the newest position
        is_causal = mask is None and q_length > 1
        is_slow = query.dtype == torch.bfloat16 and query.device.type == "cpu" and torch.is_grad_enabled()
        if is_causal and is_slow and not dropout and q_length <= PRODUCTS_MAX_LENGTH:
            return _causal_products(q, k, v, scaling if scaling is not None else q.shape[-1] ** -0.5)
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=is_causal, scale=scaling, enable_gqa=gqa
        )

    if mixed is not None:
        return mixed.attend(query, sliding_window, attend).transpose(1, 2), None
    if cu_seq_lens_q is None:
        return attend(query, key, value).transpose(1, 2), None
    lengths = cu_seq_lens_q.diff().tolist()
    parts = zip(*(x.split(lengths, dim=2) for x in (query, key, value)), strict=True)
    return torch.cat([attend(*part) for part in parts], dim=2).transpose(1, 2), None


def _causal_products(q: Tensor, k: Tensor, v: Tensor, scaling: float) -> Tensor:
    """Causal attention as two products; q [rows, heads, length, dim], k and v with kv_heads.

    For training in bfloat16 on a CPU, where torch's fused kernel is slow on short segments. Scores and their softmax
    are float32 as in that kernel: rounded to bfloat16, a score of 100 is off by a quarter. That costs up to half of the
    time again, and is still the faster one.
    """
    length = q.shape[2]
    # Query heads that share a key head lie side by side: [rows, kv_heads, group * length, dim].
    q = rearrange(q, "r (kv g) l d -> r kv (g l) d", kv=k.shape[1])
    scores = rearrange(q.float() @ k.float().transpose(-1, -2), "r kv (g l) s -> r kv g l s", l=length)
    hidden = torch.full((length, length), float("-inf"), device=q.device).triu(1)
    shares = torch.add(hidden, scores, alpha=scaling).softmax(-1).to(v.dtype)
    return rearrange(rearrange(shares, "r kv g l s -> r kv (g l) s") @ v, "r kv (g l) d -> r (kv g) l d", l=length)


def _segment_mask(**arguments: Any) -> Tensor | None:
    """No mask for packs and for single conversations; SDPA's own for padded batches."""
    return None if arguments.get("attention_mask") is None else sdpa_mask(**arguments)


AttentionInterface.register(SEGMENTS, _segment_attention)
AttentionMaskInterface.register(SEGMENTS, _segment_mask)


def pack_arguments(segment_ids: Tensor) -> dict[str, Any]:
    """Keyword arguments that tell transformers' varlen attention where the segments of one packed row lie.

    segment_ids: [1, length], without padding.
    """
    assert segment_ids.shape[0] == 1, "a pack is one row"
    lengths = torch.unique_consecutive(segment_ids[0], return_counts=True)[1]
    borders = F.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)
    longest = int(lengths.max())
    return {
        "cu_seq_lens_q": borders,
        "cu_seq_lens_k": borders,
        "max_length_q": longest,
        "max_length_k": longest,
    }


# ---- parts of a causal LM -------------------------------------------------------------------------------------------


def check_supported(model: PreTrainedModel) -> None:
    """Raises ValueError for an LLM whose logits are not `softcap(head(decoder(x)))`."""
    config = model.config.to_dict()
    scales = [name for name in ("logit_scale", "logits_scaling") if config.get(name) not in (None, 1, 1.0)]
    if scales:
        raise ValueError(
            f"model.llm: {type(model).__name__} scales its logits ({', '.join(scales)}), which the loss head here does "
            "not. Use a Llama, Qwen, SmolLM, Gemma, Mistral or GPT-2 type of model."
        )


def token_embedding(model: PreTrainedModel) -> nn.Embedding:
    embedding = model.get_input_embeddings()
    assert isinstance(embedding, nn.Embedding)
    return embedding


def decoder_of(model: PreTrainedModel) -> nn.Module:
    """The LLM without its head: inputs_embeds -> last_hidden_state."""
    return model.get_decoder()
