"""Is it alive, is it ready, what is it, how does it fare."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from starlette.responses import JSONResponse, Response

from ..observe import Metrics
from .guards import Service
from .schemas import ErrorResponse

router = APIRouter()


@router.get("/healthz")
async def healthz() -> dict[str, str]:
    """The process is alive."""
    return {"status": "ok"}


@router.get("/ready", responses={503: {"description": "Not ready: the phase and why."}})
async def ready(request: Request, service: Service) -> JSONResponse:
    """Whether speech can be had now; 503 with phase and reason until then. Also what speaks, and why that."""
    readiness = service.readiness()
    body = {"ready": readiness.ready, "phase": readiness.phase, "reason": readiness.reason}
    body |= _backend(request, service)
    if readiness.ready:
        return JSONResponse(body)
    return JSONResponse(body, 503, {"Retry-After": str(service.retry_after)})


@router.get("/version", responses={503: {"model": ErrorResponse}})
async def version(request: Request, service: Service) -> dict[str, Any]:
    """The server's version, the backend that speaks, why it is that one, and how its models' weights are held."""
    weights = {model.id: model.weights for model in service.backend.models if model.weights}
    return {"version": request.app.version, **_backend(request, service), "weights": weights}


@router.get("/metrics", response_class=Response, responses={503: {"model": ErrorResponse}})
async def metrics(request: Request, service: Service) -> Response:
    """Prometheus metrics."""
    shown: Metrics = request.app.state.metrics
    shown.running.set(service.admission.running)
    shown.waiting.set(service.admission.waiting)
    shown.engines.stats = service.backend.stats()
    shown.ready.set(service.readiness().ready)
    shown.lines_dropped.count = request.app.state.log_lines.dropped
    return Response(generate_latest(shown.registry), media_type=CONTENT_TYPE_LATEST)


def _backend(request: Request, service: Service) -> dict[str, Any]:
    return {"backend": service.backend.name, "backend_reason": request.app.state.backend_reason}
