"""The manifests: valid for Kubernetes, consistent with each other, with the settings and with the image."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from app.cli import build_parser

ROOT = Path(__file__).parents[1]
MANIFEST = ROOT / "deploy" / "kubernetes.yaml"
VERSIONS = ("1.30", "1.37")

Document = dict[str, Any]


@pytest.fixture(scope="module")
def documents() -> dict[str, Document]:
    return {document["kind"]: document for document in yaml.safe_load_all(MANIFEST.read_text())}


@pytest.fixture(scope="module")
def pod(documents: dict[str, Document]) -> Document:
    spec: Document = documents["Deployment"]["spec"]["template"]["spec"]
    return spec


@pytest.fixture(scope="module")
def container(pod: Document) -> Document:
    (only,) = pod["containers"]
    return dict(only)


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("kind", ["Deployment", "Service", "PodDisruptionBudget", "NetworkPolicy"])
def test_documents_fit_the_schemas(documents: dict[str, Document], kind: str, version: str) -> None:
    assert len(documents) == 4
    kubernetes_validate.validate(documents[kind], version, strict=True)


def test_a_misspelt_field_is_found(documents: dict[str, Document]) -> None:
    broken = copy.deepcopy(documents["Deployment"])
    container = broken["spec"]["template"]["spec"]["containers"][0]
    container["readynessProbe"] = container.pop("readinessProbe")
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(broken, VERSIONS[0], strict=True)


def test_flags_exist(container: Document) -> None:
    options = vars(build_parser().parse_args(container["args"]))
    assert options["served_model_name"]
    known = {flag for action in build_parser()._actions for flag in action.option_strings}
    # those that are commented out count as well
    assert set(re.findall(r"(?<= )--[a-z-]+", MANIFEST.read_text())) - known == {"--from-file"}


def test_ports_and_labels_agree(documents: dict[str, Document], container: Document) -> None:
    (port,) = container["ports"]
    assert port["containerPort"] == build_parser_default("port")
    assert documents["Service"]["spec"]["ports"][0]["targetPort"] == port["name"]
    labels = documents["Deployment"]["spec"]["template"]["metadata"]["labels"].items()
    selectors = [
        documents["Deployment"]["spec"]["selector"]["matchLabels"],
        documents["Service"]["spec"]["selector"],
        documents["PodDisruptionBudget"]["spec"]["selector"]["matchLabels"],
        documents["NetworkPolicy"]["spec"]["podSelector"]["matchLabels"],
    ]
    assert all(selector.items() <= labels for selector in selectors)


def build_parser_default(name: str) -> Any:
    from app.settings import Settings

    return Settings.model_fields[name].default


def test_a_pod_gets_the_time_it_was_promised(pod: Document, container: Document) -> None:
    options = build_parser().parse_args(container["args"])
    asleep = container["lifecycle"]["preStop"]["sleep"]["seconds"]
    assert asleep + float(options.shutdown_timeout) + 5 <= pod["terminationGracePeriodSeconds"]


def test_probes_ask_three_questions(documents: dict[str, Document], container: Document) -> None:
    seconds = {
        name: container[name]["periodSeconds"] * container[name]["failureThreshold"]
        for name in ("startupProbe", "readinessProbe", "livenessProbe")
    }
    assert container["livenessProbe"]["httpGet"]["path"] == "/livez"
    assert container["readinessProbe"]["httpGet"]["path"] == container["startupProbe"]["httpGet"]["path"] == "/readyz"
    assert seconds["readinessProbe"] < 10
    assert seconds["livenessProbe"] >= 30
    assert seconds["startupProbe"] < documents["Deployment"]["spec"]["progressDeadlineSeconds"]
    assert all(container[name]["timeoutSeconds"] >= 5 for name in seconds)


def test_a_rollout_never_lowers_capacity(documents: dict[str, Document]) -> None:
    spec = documents["Deployment"]["spec"]
    assert spec["strategy"]["rollingUpdate"]["maxUnavailable"] == 0
    assert documents["PodDisruptionBudget"]["spec"]["minAvailable"] < spec["replicas"]


def test_pod_is_restricted(pod: Document, container: Document) -> None:
    assert pod["automountServiceAccountToken"] is False
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["securityContext"]["runAsUser"] >= 10_000
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }


def test_every_mount_has_its_volume(pod: Document, container: Document) -> None:
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}


def test_threads_are_those_of_the_limit(container: Document) -> None:
    options = build_parser().parse_args(container["args"])
    assert options.num_threads == container["resources"]["limits"]["cpu"]
