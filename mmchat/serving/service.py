"""What all requests of one server share: the model once it is loaded, limits, counts, and whether it is ending."""

from __future__ import annotations

import secrets
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from mmchat.config import RunConfig
from mmchat.data.build import build_template
from mmchat.inference.load import Loaded
from mmchat.serving.access import Access
from mmchat.serving.engine import Engine
from mmchat.serving.errors import ApiError
from mmchat.serving.fetch import Fetcher
from mmchat.serving.limits import Holdings, Limits
from mmchat.serving.media import MediaReader
from mmchat.serving.metrics import Metrics


@dataclass
class Call:
    """One HTTP request, for its log line."""

    id: str = field(default_factory=lambda: f"req_{secrets.token_hex(12)}")
    begun_s: float = field(default_factory=time.monotonic)
    held: int = 0  # bytes of the service's holdings
    first_s: float | None = None  # seconds until the answer's first piece
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    finish: str = ""
    problem: str = ""  # the code of a refusal

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.begun_s


@dataclass(frozen=True)
class Model:
    """A model that answers. `temperature` holds where a request names none."""

    name: str
    loaded: Loaded
    engine: Engine
    reader: MediaReader
    temperature: float


class Service:
    """Begins without a model, so that a server can say that it is loading one."""

    def __init__(self, access: Access, limits: Limits, fetcher: Fetcher) -> None:
        self.access = access
        self.limits = limits
        self.fetcher = fetcher
        self.holdings = Holdings(limits.all_bodies_bytes)
        self.metrics = Metrics(self.stats)
        self.created = int(time.time())
        self.is_draining = False
        self.num_running = 0  # chat completions
        self._model: Model | None = None

    def open(self, name: str, loaded: Loaded, engine: Engine, temperature: float = 0.0) -> None:
        """Answers with this model from now on; the engine has been started."""
        reader = MediaReader(loaded.template.preprocesses, self.limits, self.fetcher)
        self._model = Model(name, loaded, engine, reader, temperature)

    def close(self) -> None:
        """Ends the model's threads; what still runs is cut off."""
        if self._model is not None:
            self._model.engine.close()
            self._model.reader.close()

    def hold(self, call: Call, count: int) -> None:
        """Counts bytes that a request holds until it ends. Raises ApiError 503 where all requests hold too many."""
        if not self.holdings.take(count):
            raise ApiError(503, "the server holds too many large requests; try again", "server_full", retry_after_s=5)
        call.held += count

    @property
    def is_ready(self) -> bool:
        return self._model is not None and self._model.engine.is_ready and not self.is_draining

    @property
    def model(self) -> Model:
        """Raises ApiError 503 while there is none."""
        if self.is_draining:
            raise ApiError(503, "the server is about to end; try again", "server_ending", retry_after_s=5)
        if self._model is None:
            raise ApiError(503, "the model is being loaded; try again", "model_loading", retry_after_s=5)
        if not self._model.engine.is_ready:
            raise ApiError(503, "the model has failed; its operator must look", "model_failed", retry_after_s=60)
        return self._model

    def described(self) -> dict[str, Any]:
        """The one model as /v1/models tells it."""
        model = self.model
        ours = {
            "modalities": list(model.loaded.template.preprocesses),
            "limits": self.limits.model_dump(mode="json"),
            "temperature": model.temperature,
            "context_tokens": int(model.loaded.model.llm.config.max_position_embeddings),
        }
        return {"id": model.name, "object": "model", "created": self.created, "owned_by": "mmchat", "mmchat": ours}

    def stats(self) -> Mapping[str, float]:
        return {} if self._model is None else self._model.engine.stats()


def tightened(loaded: Loaded, limits: Limits) -> Loaded:
    """The model with the server's limits on decoding where they are narrower; what it sees stays the same."""
    values = loaded.config.model_dump(mode="json")
    for modality in ("video", "audio"):
        entry = values["model"]["modalities"].get(modality)
        if entry is None:
            continue
        entry["decode_timeout_s"] = min(entry["decode_timeout_s"], limits.decode_timeout_s)
        memory = entry["decode_memory_bytes"] or limits.decode_memory_bytes
        entry["decode_memory_bytes"] = min(memory, limits.decode_memory_bytes)
        entry["max_file_bytes"] = min(entry["max_file_bytes"], limits.body_bytes)
    return replace(loaded, template=build_template(RunConfig.model_validate(values)))
