"""Traces as a collector gets them: a real receiver of OTLP over HTTP, and the protobuf that comes there."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span, Status

from api.src.errors import NotReady
from api.src.main import create_app
from api.src.settings import Settings
from tests.api.stderr import until
from tests.api.wire import FAILS_LATE, PARTS, speak
from tests.conftest import Server, run_server
from tests.fakes import FakeBackend

DELAY_S = 0.1
TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


@dataclass
class Collector:
    """What has come, in the order in which it came."""

    url: str = ""
    bodies: list[bytes] = field(default_factory=list)

    @property
    def requests(self) -> list[ExportTraceServiceRequest]:
        return [ExportTraceServiceRequest.FromString(body) for body in self.bodies]

    @property
    def spans(self) -> list[Span]:
        resources = [spans for request in self.requests for spans in request.resource_spans]
        return [span for one in resources for scope in one.scope_spans for span in scope.spans]

    def named(self, name: str) -> list[Span]:
        return [span for span in self.spans if span.name == name]

    def wait_for(self, name: str, count: int = 1) -> list[Span]:
        until(lambda: len(self.named(name)) >= count)
        return self.named(name)


@pytest.fixture
def collector(monkeypatch: pytest.MonkeyPatch) -> Iterator[Collector]:
    found = Collector()

    class Receiver(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            assert self.path == "/v1/traces"
            assert self.headers["content-type"] == "application/x-protobuf"
            found.bodies.append(self.rfile.read(int(self.headers["content-length"])))
            self.send_response(200)
            self.send_header("content-length", "0")
            self.end_headers()

        def log_message(self, *_: object) -> None: ...

    with ThreadingHTTPServer(("127.0.0.1", 0), Receiver) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        found.url = f"http://127.0.0.1:{server.server_address[1]}"
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", found.url)
        monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "20")
        yield found
        server.shutdown()
        thread.join()


@pytest.fixture
def server(collector: Collector, start_server: Callable[..., Server]) -> Server:
    return start_server(FakeBackend(delay_s=DELAY_S), traces=True, api_keys=[("alice", "alices-key")])


ALICE = {"Authorization": "Bearer alices-key"}


def attributes(span: Span) -> dict[str, Any]:
    return {pair.key: getattr(pair.value, pair.value.WhichOneof("value")) for pair in span.attributes}


def seconds(span: Span) -> float:
    return (span.end_time_unix_nano - span.start_time_unix_nano) / 1e9


def test_a_request_and_its_parts_are_one_trace(server: Server, collector: Collector) -> None:
    asked = {**ALICE, "traceparent": f"00-{TRACE}-{PARENT}-01", "tracestate": "vendor=1"}
    answer = speak(server.client, PARTS[0] + PARTS[1], asked)
    (request,) = collector.wait_for("POST /v1/audio/speech")
    assert request.trace_id.hex() == TRACE
    assert request.parent_span_id.hex() == PARENT
    assert request.kind == Span.SPAN_KIND_SERVER
    told = attributes(request)
    assert (told["http.request.method"], told["http.route"]) == ("POST", "/v1/audio/speech")
    assert told["http.response.status_code"] == 200
    assert (told["tts.account"], told["tts.cache"], told["tts.model"]) == ("alice", "miss", "fake-1")
    assert told["tts.request_id"] == answer.headers["x-request-id"]
    parts = [collector.wait_for(name)[0] for name in ("admission", "ledger hold", "generation", "ledger settle")]
    assert {part.trace_id for part in parts} == {request.trace_id}
    assert {part.parent_span_id for part in parts} == {request.span_id}
    generation, settle = parts[2:]
    (sounded,) = generation.events
    assert sounded.name == "first sound"
    assert sounded.time_unix_nano - generation.start_time_unix_nano >= DELAY_S * 1e9
    assert seconds(generation) >= 2 * DELAY_S
    assert seconds(request) >= 2 * DELAY_S
    assert attributes(generation)["tts.audio_ms"] == pytest.approx(800, abs=20)
    assert attributes(settle)["tts.outcome"] == "completed"
    assert {span.status.code for span in collector.spans} == {Status.STATUS_CODE_UNSET}


def test_a_hit_waits_for_nobody(server: Server, collector: Collector) -> None:
    for _ in range(2):
        speak(server.client, headers=ALICE)
    hit = collector.wait_for("POST /v1/audio/speech", 2)[1]
    assert hit.trace_id != collector.named("POST /v1/audio/speech")[0].trace_id
    assert attributes(hit)["tts.cache"] == "hit"
    until(lambda: len(collector.named("ledger charge")) == 1)
    assert attributes(collector.named("ledger charge")[0])["tts.outcome"] == "cached"
    assert sorted(span.name for span in collector.spans if span.trace_id == hit.trace_id) == [
        "POST /v1/audio/speech",
        "ledger charge",
    ]


def test_what_fails_is_marked(server: Server, collector: Collector) -> None:
    assert speak(server.client, "It will FAIL.", ALICE).status_code == 500
    with pytest.raises(httpx.RemoteProtocolError):
        speak(server.client, FAILS_LATE, ALICE)
    early, late = collector.wait_for("POST /v1/audio/speech", 2)
    assert [span.status.code for span in (early, late)] == [Status.STATUS_CODE_ERROR] * 2
    assert [attributes(span)["http.response.status_code"] for span in (early, late)] == [500, 200]
    runs = collector.wait_for("generation", 2)
    assert [run.status.message for run in runs] == ["RuntimeError"] * 2


def test_nothing_that_a_client_sent_and_no_key_is_in_it(server: Server, collector: Collector) -> None:
    odd = {**ALICE, "traceparent": "zebra-fish", "User-Agent": "Zebrafish", "Idempotency-Key": "zebrafish"}
    speak(server.client, "The zebrafish speaks.", odd, instructions="zebrafish")
    speak(server.client, "The zebrafish will FAIL.", ALICE)
    speak(server.client, "Hello.", ALICE, voice="zebrafish", model="zebrafish")
    server.client.get("/v1/models/zebrafish?zebrafish", headers=ALICE)
    server.client.request("ZEBRAFISH", "/v1/models")
    collector.wait_for("POST /v1/audio/speech", 3)
    collector.wait_for("GET /v1/models/{model_id}")
    everything = b"".join(collector.bodies).lower()
    assert b"zebra" not in everything
    assert b"alices-key" not in everything


def test_what_machines_ask_all_the_time_is_not_traced(server: Server, collector: Collector) -> None:
    for path in ("/ready", "/healthz", "/metrics", "/version"):
        server.client.get(path)
    server.client.get("/v1/models")
    collector.wait_for("GET /v1/models")
    assert {span.name for span in collector.spans} == {"GET /v1/models"}


def test_what_waits_is_sent_at_the_end(tmp_path: Path, collector: Collector, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "60000")
    monkeypatch.setenv("OTEL_SERVICE_NAME", "our-speech")
    for server in run_server(tmp_path, FakeBackend(), traces=True):
        speak(server.client)
        assert collector.spans == []
    assert collector.named("POST /v1/audio/speech")
    (resource,) = {request.resource_spans[0].resource.SerializeToString() for request in collector.requests}
    assert b"our-speech" in resource
    assert b"qwen3-tts-server" not in resource
    assert "OtelBatchSpanRecordProcessor" not in [thread.name for thread in threading.enumerate()]


def test_a_collector_that_is_away_holds_up_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:1")
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "20")
    monkeypatch.setattr("api.src.traces.CLOSE_S", 0.5)  # the exporter itself would take ten
    for server in run_server(tmp_path, FakeBackend(), traces=True):
        assert speak(server.client).status_code == 200
        time.sleep(0.2)
        began = time.monotonic()
        assert speak(server.client).status_code == 200
        assert time.monotonic() - began < 8, "it waited for the collector"
        began = time.monotonic()
    assert time.monotonic() - began < 8


OFF = """
import sys
from api.src.main import create_app
from api.src.settings import Settings
from tests.fakes import FakeBackend
create_app(Settings(_env_file=None, cache_dir=sys.argv[1]), backend=FakeBackend())
assert not [name for name in sys.modules if name.startswith("opentelemetry.sdk")], "imported without need"
assert not [name for name in sys.modules if name.startswith("opentelemetry.exporter")], "imported without need"
"""


def test_without_being_asked_for_it_is_not_even_imported(tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-c", OFF, str(tmp_path)], check=True)


def test_asked_for_and_not_installed_the_server_refuses_to_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.trace", None)
    monkeypatch.delitem(sys.modules, "api.src.traces", raising=False)
    with pytest.raises(NotReady, match=r"server\[traces\]"):
        create_app(Settings(_env_file=None, cache_dir=tmp_path, traces=True), backend=FakeBackend())
