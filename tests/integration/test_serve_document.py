"""Requests that schemathesis draws from the server's own OpenAPI document: none of them is a fault of the server."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import requests
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from mmchat.inference.load import load
from mmchat.serving.limits import Limits
from mmchat.serving.server import Server, Settings
from tests import serving

# Whether a request that fits the document is answered is not checked: random base64 is no picture.
CHECKS = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance]
LIMITS = Limits(new_tokens=16, default_new_tokens=2)


@pytest.fixture(scope="module")
def server(tiny_folder: Any) -> Iterator[Server]:
    loaded = load("configs/tiny.yaml", "float32")
    with serving.in_thread(Settings(port=0, limits=LIMITS), lambda: loaded) as running:
        assert running.ready.wait(300)
        yield running


@pytest.mark.parametrize(
    ("route", "mode"),
    [
        ("POST /v1/chat/completions", GenerationMode.POSITIVE),
        ("POST /v1/chat/completions", GenerationMode.NEGATIVE),
        ("GET /v1/models/{model_id}", GenerationMode.POSITIVE),
    ],
)
def test_no_request_is_a_fault(server: Server, route: str, mode: GenerationMode) -> None:
    """Requests that fit the document, and such as break it."""
    method, path = route.split()
    document = requests.get(f"{server.url}/openapi.json", timeout=60).json()
    operation = schemathesis.openapi.from_dict(document)[path][method]
    statuses = []

    @given(case=operation.as_strategy(mode))
    @settings(max_examples=50, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True, database=None)
    def check(case: Any) -> None:
        answered = case.call(base_url=server.url, timeout=60)
        statuses.append(answered.status_code)
        case.validate_response(answered, checks=CHECKS)

    check()
    assert statuses and max(statuses) < 500
    assert requests.get(f"{server.url}/ready", timeout=60).status_code == 200


def test_the_document_describes_a_true_answer(server: Server) -> None:
    document = requests.get(f"{server.url}/openapi.json", timeout=60).json()
    operation = schemathesis.openapi.from_dict(document)["/v1/chat/completions"]["POST"]
    body = {"messages": [{"role": "user", "content": "Hi"}], "logprobs": True, "top_logprobs": 1}
    for stream in (False, True):
        case = operation.Case(body={**body, "stream": stream}, media_type="application/json")
        answered = case.call(base_url=server.url, timeout=60)
        assert answered.status_code == 200
        case.validate_response(answered, checks=CHECKS)
