"""The fields of KubeRay's `ray.io/v1` resources, as JSON schemas: those of its published CRD reference, 1.7.0.

KubeRay's own levels alone: what it takes over from Kubernetes (pod templates, resources, security contexts) stands as a
plain object here and is checked against Kubernetes' own schema. Fields of features that no file of ours uses (history
server, ingress, fault tolerance of the GCS) are objects too.
"""

from __future__ import annotations

from typing import Any

__all__ = ["RAY_CLUSTER", "RAY_JOB"]

Schema = dict[str, Any]

TEXT: Schema = {"type": "string"}
FLAG: Schema = {"type": "boolean"}
COUNT: Schema = {"type": "integer", "minimum": 0}
NUMBER: Schema = {"type": "number"}
OBJECT: Schema = {"type": "object"}
TEXTS: Schema = {"type": "array", "items": TEXT}
OBJECTS: Schema = {"type": "array", "items": OBJECT}
TEXTS_BY_NAME: Schema = {"type": "object", "additionalProperties": TEXT}


def one_of(*values: str) -> Schema:
    return {"enum": list(values)}


def record(*required: str, **fields: Schema) -> Schema:
    return {"type": "object", "properties": fields, "required": list(required), "additionalProperties": False}


def resource(kind: str, spec: Schema) -> Schema:
    named = {"type": "object", "required": ["name"]}
    return record(
        "apiVersion",
        "kind",
        "metadata",
        "spec",
        apiVersion=one_of("ray.io/v1"),
        kind=one_of(kind),
        metadata=named,
        spec=spec,
    )


GROUP: dict[str, Schema] = {
    "labels": TEXTS_BY_NAME,
    "rayStartParams": TEXTS_BY_NAME,
    "resources": TEXTS_BY_NAME,
    "template": OBJECT,
}
HEAD_GROUP = record(
    "template",
    **GROUP,
    enableIngress=FLAG,
    headService=OBJECT,
    ingressOptions=OBJECT,
    serviceType=one_of("ClusterIP", "NodePort", "LoadBalancer"),
)
WORKER_GROUP = record(
    "groupName",
    "template",
    "minReplicas",
    "maxReplicas",
    **GROUP,
    groupName=TEXT,
    idleTimeoutSeconds=COUNT,
    maxReplicas=COUNT,
    minReplicas=COUNT,
    numOfHosts=COUNT,
    priority=COUNT,
    replicas=COUNT,
    scaleStrategy=OBJECT,
    suspend=FLAG,
)
AUTOSCALER = record(
    args=TEXTS,
    command=TEXTS,
    env=OBJECTS,
    envFrom=OBJECTS,
    idleTimeoutSeconds=COUNT,
    image=TEXT,
    imagePullPolicy=TEXT,
    resources=OBJECT,
    securityContext=OBJECT,
    upscalingMode=one_of("Default", "Aggressive", "Conservative"),
    version=one_of("v1", "v2"),
    volumeMounts=OBJECTS,
)
CLUSTER_SPEC = record(
    "headGroupSpec",
    authOptions=record(enableK8sTokenAuth=FLAG, mode=one_of("disabled", "token"), secretName=TEXT),
    autoscalerOptions=AUTOSCALER,
    enableInTreeAutoscaling=FLAG,
    gcsFaultToleranceOptions=OBJECT,
    headGroupSpec=HEAD_GROUP,
    headServiceAnnotations=TEXTS_BY_NAME,
    historyServerOptions=OBJECT,
    managedBy=TEXT,
    networkPolicy=OBJECT,
    rayVersion=TEXT,
    suspend=FLAG,
    tlsOptions=record(enabled=FLAG),
    upgradeStrategy=record(type=one_of("Recreate", "None")),
    workerGroupSpecs={"type": "array", "items": WORKER_GROUP},
)
JOB_SPEC = record(
    activeDeadlineSeconds=COUNT,
    backoffLimit=COUNT,
    clusterSelector=TEXTS_BY_NAME,
    deletionStrategy=OBJECT,
    entrypoint=TEXT,
    entrypointNumCpus=NUMBER,
    entrypointNumGpus=NUMBER,
    entrypointResources=TEXT,
    jobId=TEXT,
    managedBy=TEXT,
    metadata=TEXTS_BY_NAME,
    preRunningDeadlineSeconds={"type": "integer", "minimum": 1},
    rayClusterSpec=CLUSTER_SPEC,
    runtimeEnvYAML=TEXT,
    shutdownAfterJobFinishes=FLAG,
    submissionMode=one_of("K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode"),
    submitterConfig=record(backoffLimit=COUNT),
    submitterPodTemplate=OBJECT,
    suspend=FLAG,
    ttlSecondsAfterFinished=COUNT,
)
RAY_CLUSTER = resource("RayCluster", CLUSTER_SPEC)
RAY_JOB = resource("RayJob", JOB_SPEC)
