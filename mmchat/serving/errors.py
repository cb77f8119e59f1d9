"""Refusals as OpenAI's error objects. What a library says of its own insides never gets into one."""

from __future__ import annotations

from typing import Any

from mmchat.errors import SampleError
from mmchat.modalities.image import FORMATS

# Of these reasons the detail is a sentence of this project's about what the client sent; of others it may hold what a
# decoder said, which can be paths or addresses in memory.
_TOLD_WHOLE = (
    "empty region",
    "inverted region",
    "picture too elongated",
    "picture too small",
    "region not finite",
    "region outside the picture",
    "region without its picture",
    "modality not in the model",
    "audio too long",
    "video too long",
)
_UNREADABLE = "found bytes that cannot be decoded as {}"
_TOLD_AS = {
    "undecodable image": _UNREADABLE.format("a picture; wanted " + ", ".join(FORMATS)),
    "undecodable video": _UNREADABLE.format("a clip; wanted MP4, WebM, Matroska, AVI, MPEG or GIF"),
    "undecodable audio": _UNREADABLE.format("a sound; wanted WAV, FLAC, MP3, Ogg, M4A or WebM"),
    "no video track": "found a file without pictures; wanted a clip",
    "no audio track": "found a file without sound; wanted a recording",
    "empty video": "found a clip without frames",
    "empty audio": "found a sound without samples",
    "audio not finite": "found samples that are no numbers",
    "truncated video": "found far less than its header says; was it cut off?",
    "truncated audio": "found far less than its header says; was it cut off?",
    "longer than its header": "found far more than its header says; repair it: ffmpeg -i IN -c copy OUT",
    "decoding timed out": "found a file that takes too long to decode; wanted a shorter or a smaller one",
    "decoder crashed": "found a file that the decoder cannot work on; encode it anew",
    "out of memory": "found a file that takes too much memory to decode; wanted a smaller one",
    "file too large": "found more bytes than may be decoded; wanted a smaller file",
    "too many scans": "found a picture that takes too long to decode; save it anew as a baseline JPEG",
    "picture too large": "found more pixels than may be decoded; wanted a smaller picture",
}


class ApiError(Exception):
    """A request that is not answered.

    Attributes:
        status: of HTTP. kind, code, param: OpenAI's `type` (follows from the status), `code` and `param`.
        retry_after_s: when to try again, where that helps.
    """

    def __init__(
        self, status: int, message: str, code: str | None = None, param: str | None = None, retry_after_s: int = 0
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.code = code
        self.param = param
        self.retry_after_s = retry_after_s

    @property
    def kind(self) -> str:
        if self.status == 401:
            return "authentication_error"
        if self.status == 403:
            return "permission_error"
        return "server_error" if self.status >= 500 else "invalid_request_error"

    def body(self) -> dict[str, Any]:
        """OpenAI's error object."""
        return {"error": {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}}

    def headers(self) -> dict[str, str]:
        headers = {"Retry-After": str(self.retry_after_s)} if self.retry_after_s else {}
        if self.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        return headers


def of_sample(error: SampleError, param: str | None = None) -> ApiError:
    """What a client is told of a sample that cannot be used: the reason, and a detail that gives nothing away."""
    reason = error.reason
    detail = error.detail.removeprefix(": ") if reason in _TOLD_WHOLE else _TOLD_AS.get(reason, "")
    message = f"{reason}: {detail}" if detail else reason
    if param is not None:
        message = f"{param}: {message}"
    return ApiError(400, message, reason.replace(" ", "_"), param)


def internal(request_id: str) -> ApiError:
    """The message of a fault of ours; the log has the rest under the same id."""
    return ApiError(500, f"the server failed on this request; its operator finds it as {request_id}", "internal_error")
