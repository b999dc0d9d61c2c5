"""The dashboard and the alerts ask for metrics that there are, by labels that they have; and leave none out."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client import CollectorRegistry

from api.src.domain import ModelStats, UsageBacklog
from api.src.observe import Metrics

DOCKER = Path(__file__).parents[1] / "docker"
DASHBOARD = json.loads((DOCKER / "grafana" / "dashboard.json").read_text())
ALERTS = yaml.safe_load((DOCKER / "prometheus" / "alerts.yml").read_text())
OUTSIDE = {"instance", "job", "le"}
"""Labels that Prometheus and its histograms add."""


@pytest.fixture(scope="module")
def series() -> dict[str, set[str]]:
    """The labels of each series that /metrics can show."""
    metrics = Metrics()
    metrics.engines.stats = {"model": ModelStats(finished={"stop": 1})}
    metrics.breakers.sources.append(lambda: {"remote": "open"})
    metrics.usage.backlog = lambda: UsageBacklog()
    return dict(_series(metrics.registry))


def _series(registry: CollectorRegistry) -> Iterator[tuple[str, set[str]]]:
    labels = {
        collector._name: set(collector._labelnames)
        for collector in registry._collector_to_names
        if hasattr(collector, "_labelnames")
    }
    endings = {"counter": ["_total"], "histogram": ["_bucket", "_sum", "_count"], "gauge": [""]}
    for family in registry.collect():
        found = labels.get(family.name, set()) | {name for sample in family.samples for name in sample.labels}
        for ending in endings[family.type]:
            yield family.name + ending, found


def panels() -> list[dict[str, Any]]:
    return [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]


def expressions() -> dict[str, str]:
    found = {f"{panel['title']} {target['refId']}": target["expr"] for panel in panels() for target in panel["targets"]}
    rules = [rule for group in ALERTS["groups"] for rule in group["rules"]]
    return found | {rule["alert"]: rule["expr"] for rule in rules}


@pytest.mark.parametrize(("name", "expression"), expressions().items())
def test_what_is_asked_for_is_there(name: str, expression: str, series: dict[str, set[str]]) -> None:
    asked = set(re.findall(r"\btts_\w+", expression))
    assert asked <= set(series), name
    assert asked or "up{" in expression
    known = OUTSIDE.union(*(series[metric] for metric in asked))
    used = set(re.findall(r"(\w+)\s*(?:=~|!~|!=|=)\s*\"", expression))
    used |= {label for group in re.findall(r"\bby \(([^)]*)\)", expression) for label in re.split(r",\s*", group)}
    assert used <= known, name
    for opening, closing in ("()", "{}", "[]"):
        assert expression.count(opening) == expression.count(closing), name


def test_the_dashboard_shows_every_metric(series: dict[str, set[str]]) -> None:
    shown = set(re.findall(r"\btts_\w+", json.dumps(DASHBOARD)))
    ends = r"_(bucket|sum|count)$"
    assert {re.sub(ends, "", name) for name in series} == {re.sub(ends, "", name) for name in shown}


def test_panels_stand_beside_each_other() -> None:
    taken: set[tuple[int, int]] = set()
    for panel in DASHBOARD["panels"]:
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not cells & taken, panel["title"]
        assert place["x"] + place["w"] <= 24
        taken |= cells
    assert len({panel["id"] for panel in DASHBOARD["panels"]}) == len(DASHBOARD["panels"])


def test_what_is_provisioned_fits_together() -> None:
    source = yaml.safe_load((DOCKER / "grafana/provisioning/datasources/prometheus.yml").read_text())
    assert source["datasources"][0]["type"] == DASHBOARD["templating"]["list"][0]["query"]
    assert yaml.safe_load((DOCKER / "grafana/provisioning/dashboards/qwen3-tts.yml").read_text())["providers"]
    scraped = yaml.safe_load((DOCKER / "prometheus/prometheus.yml").read_text())
    assert [(DOCKER / "prometheus" / name).is_file() for name in scraped["rule_files"]] == [True]
    job = scraped["scrape_configs"][0]["job_name"]
    assert all(f'job="{job}"' in text for text in expressions().values() if "up{" in text)
