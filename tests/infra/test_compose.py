"""The files for containers: read by compose itself and by the schemas of Kubernetes, then by the rules of this house."""

import copy
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from prefect.settings import Settings

from infra import chain_node, stack_plan

INFRA = Path(stack_plan.__file__).parent
MANIFESTS = sorted(path for path in (INFRA / "kubernetes").glob("*.yaml") if path.name != "kustomization.yaml")
PINNED = re.compile(r"[a-z0-9./-]+:[A-Za-z.]*\d[\w.-]*(@sha256:[0-9a-f]{64})?")
SECRET = re.compile("PASSWORD|SECRET|TOKEN|AUTH|CREDENTIAL|CONNECTION_URL|PRIVATE|PASSPHRASE")
SECRET_FILES = ("postgres-password", "store-password", "prefect-server.env", "gateway.env")
ONCE = "set-up"  # runs, and ends
COMPOSE = Path(sys.executable).with_name("docker-compose")


@pytest.fixture(scope="module")
def composed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What compose makes of the file, with secrets beside it that hold nothing."""
    folder = tmp_path_factory.mktemp("secrets")
    for name in SECRET_FILES:
        (folder / name).touch()
    command = [COMPOSE, "--file", INFRA / "compose.yaml", "--profile", "*", "config", "--format", "json"]
    environment = {"HEALCHAIN_SECRETS": str(folder), "PATH": os.environ["PATH"], "HOME": str(folder)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    read: dict[str, Any] = json.loads(done.stdout)
    return read


def faults_of_compose(composed: dict[str, Any]) -> list[str]:
    faults = []
    for name, service in composed["services"].items():
        rules = {
            "image": bool(PINNED.fullmatch(service["image"])),
            "healthcheck": name == ONCE or bool(service.get("healthcheck", {}).get("test")),
            "restart": service.get("restart") == ("no" if name == ONCE else "unless-stopped"),
            "read_only": service.get("read_only") is True,
            "cap_drop": service.get("cap_drop") == ["ALL"],
            "security_opt": "no-new-privileges:true" in service.get("security_opt", []),
            "mem_limit": int(service.get("mem_limit", 0)) > 0,
            "ports": all(port.get("host_ip") == "127.0.0.1" for port in service.get("ports", [])),
            "volumes": all(volume["type"] == "volume" for volume in service.get("volumes", [])),
            "environment": not list(literal_secrets(service.get("environment", {}))),
        }
        faults += [f"{name}.{rule}" for rule, holds in rules.items() if not holds]
    return faults


def literal_secrets(environment: dict[str, str | None]) -> Iterator[str]:
    """Names that hold a secret in the file itself; one that ends in _FILE says where it is."""
    return (
        name
        for name, value in environment.items()
        if value and ((SECRET.search(name) and not name.endswith("_FILE")) or re.search("://[^/]*:[^/]*@", value))
    )


def test_compose_keeps_the_rules(composed: dict[str, Any]) -> None:
    servers = {"postgres", "store", "chain", "prefect", "gateway"}
    assert set(composed["services"]) == servers | {ONCE, "publisher", "miner-1"}
    assert faults_of_compose(composed) == []


WRONG: list[tuple[str, Callable[[dict[str, Any]], object]]] = [
    ("image", lambda service: service.update(image="postgres:latest")),
    ("image", lambda service: service.update(image="postgres")),
    ("healthcheck", lambda service: service.pop("healthcheck")),
    ("restart", lambda service: service.pop("restart")),
    ("read_only", lambda service: service.update(read_only=False)),
    ("cap_drop", lambda service: service.pop("cap_drop")),
    ("security_opt", lambda service: service.pop("security_opt")),
    ("mem_limit", lambda service: service.pop("mem_limit")),
    ("ports", lambda service: service["ports"][0].pop("host_ip")),
    ("environment", lambda service: service["environment"].update(POSTGRES_PASSWORD="guess")),
    ("environment", lambda service: service["environment"].update(WHERE="postgresql://me:guess@postgres/prefect")),
]


@pytest.mark.parametrize(("rule", "spoil"), WRONG)
def test_a_service_that_breaks_a_rule_is_found(
    composed: dict[str, Any], rule: str, spoil: Callable[[dict[str, Any]], object]
) -> None:
    spoiled = copy.deepcopy(composed)
    spoil(spoiled["services"]["postgres"])
    assert faults_of_compose(spoiled) == [f"postgres.{rule}"]


def documents() -> list[dict[str, Any]]:
    return [document for path in MANIFESTS for document in yaml.safe_load_all(path.read_text())]


def workloads() -> list[dict[str, Any]]:
    return [document for document in documents() if document["kind"] in ("Deployment", "StatefulSet", "Job")]


def test_every_manifest_is_what_kubernetes_expects_and_is_listed() -> None:
    for document in documents():
        kubernetes_validate.validate(document, kubernetes_validate.latest_version(), strict=True)
    listed = yaml.safe_load((INFRA / "kubernetes/kustomization.yaml").read_text())["resources"]
    assert sorted(listed) == [path.name for path in MANIFESTS]
    misspelt = copy.deepcopy(workloads()[0])
    misspelt["spec"]["template"]["spec"]["containers"][0]["livenessprobe"] = {}
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(misspelt, kubernetes_validate.latest_version(), strict=True)


def test_manifests_keep_the_rules() -> None:
    assert len(workloads()) == 8
    for workload in workloads():
        ends = workload["kind"] == "Job"
        assert ends or workload["spec"]["replicas"] == 1  # each has a volume, or a queue, of its own
        pod = workload["spec"]["template"]["spec"]
        assert pod["automountServiceAccountToken"] is False
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["securityContext"]["runAsUser"] > 0
        assert not {"hostNetwork", "hostPID", "hostIPC"} & set(pod)
        assert not [volume for volume in pod["volumes"] if "hostPath" in volume]
        for container in pod["containers"]:
            assert PINNED.fullmatch(container["image"])
            assert ends or {"startupProbe", "readinessProbe", "livenessProbe"} <= set(container)
            hardened = container["securityContext"]
            assert hardened["readOnlyRootFilesystem"] is True
            assert hardened["allowPrivilegeEscalation"] is False
            assert hardened["capabilities"]["drop"] == ["ALL"]
            assert container["resources"]["limits"]["memory"]
            assert not list(literal_secrets({one["name"]: one.get("value") for one in container["env"]}))
            assert not [port for port in container.get("ports", []) if "hostPort" in port]


def test_nothing_is_reached_from_outside_and_no_secret_is_in_a_file() -> None:
    assert {document["spec"].get("type", "ClusterIP") for document in documents() if document["kind"] == "Service"} == {
        "ClusterIP"
    }
    assert "Secret" not in {document["kind"] for document in documents()}


def commands(composed: dict[str, Any]) -> list[list[str]]:
    """Every command of our own image, in both kinds of files."""
    own = [service["command"] for service in composed["services"].values() if service["image"].startswith("healchain:")]
    for workload in workloads():
        for container in workload["spec"]["template"]["spec"]["containers"]:
            if container["image"].startswith("healchain:"):
                own.append([*container["command"], *container.get("args", [])])
    return own


def test_the_commands_are_those_of_the_package_and_of_prefect(composed: dict[str, Any]) -> None:
    helps: dict[str, str] = {}
    for command in commands(composed):
        if command[:3] == ["python", "-m", "infra.chain_node"]:
            filled = [part if "--owner=" not in part else "--owner=0x" + "1" * 40 for part in command[3:]]
            assert chain_node.read_arguments(filled).port == 8545
            continue
        program = {"prefect": "prefect", "healchain": "infra.cli"}[command[0]]
        words = [part for part in command if not part.startswith("-")]
        asked = " ".join(words)
        if asked not in helps:
            asking = [sys.executable, "-m", program, *words[1:], "--help"]
            shown = subprocess.run(asking, capture_output=True, text=True, check=True)
            helps[asked] = shown.stdout
        for flag in command[len(words) :]:
            assert flag.partition("=")[0] in helps[asked], (asked, flag)
    assert set(helps) == {"prefect server start", "prefect worker start", "healchain publisher", "healchain gateway"}


def names_in_files() -> set[str]:
    text = "".join(path.read_text() for path in [INFRA / "compose.yaml", INFRA / "Dockerfile", *MANIFESTS])
    text += (INFRA / "kubernetes/kustomization.yaml").read_text()
    return set(re.findall(r"\b(?:PREFECT|HEALCHAIN)_[A-Z_]+\b", text))


def names_of_the_stack(folder: Path) -> set[str]:
    plan = stack_plan.open_plan(folder, {}, 1)
    return {
        name for program in stack_plan.programs(plan) for name in program.environment if name.startswith("PREFECT_")
    }


# Variables of the compose file itself.
OF_COMPOSE = {"HEALCHAIN_IMAGE", "HEALCHAIN_SECRETS", "PREFECT_PORT"}


def test_the_environment_names_exist(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = names_in_files() - OF_COMPOSE | names_of_the_stack(tmp_path)
    sources = "".join(path.read_text() for path in INFRA.glob("*.py"))
    for name in names:
        if name.startswith("HEALCHAIN_"):
            assert f'"{name}"' in sources, name
        else:
            assert is_setting_of_prefect(name, monkeypatch), name
    assert not is_setting_of_prefect("PREFECT_SERVER_API_AUTH_STRINGS", monkeypatch)


def is_setting_of_prefect(name: str, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether Prefect reads it: set alone, it changes a setting."""
    value = {"PREFECT_HOME": "/marked", "PREFECT_SERVER_ANALYTICS_ENABLED": "false"}.get(name, "7")
    if name.endswith("_URL"):
        value = "http://marked/api" if "DATABASE" not in name else "sqlite+aiosqlite:////marked"
    for other in [one for one in os.environ if one.startswith("PREFECT_")]:
        monkeypatch.delenv(other)
    unset = Settings().to_environment_variables(exclude_unset=True, include_secrets=True)
    monkeypatch.setenv(name, value)
    changed = Settings().to_environment_variables(exclude_unset=True, include_secrets=True)
    monkeypatch.undo()
    return changed != unset
