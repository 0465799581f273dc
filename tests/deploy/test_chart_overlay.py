"""Values of the user laid over what the chart makes: labels, fields of pods and of Ray's container, claims, the hub."""

from __future__ import annotations

import json
from typing import Any

import pytest
import yaml

from tests.deploy.charts import CHART, helm, only, pod_specs, ray_cluster, render

HOST = "kubernetes.io/hostname"
OTHERS = {"topologyKey": HOST, "labelSelector": {"matchLabels": {"app.kubernetes.io/instance": "first"}}}
BESIDE = {"podAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": [OTHERS]}}
RDMA = {"limits": {"rdma/hca": 1, "hugepages-2Mi": "5Gi"}, "requests": {"ephemeral-storage": "200Gi"}}
EVERYTHING: dict[str, Any] = {
    "labels": {
        "team": "vision",
        "volcano.sh/queue-name": "team",
        "yunikorn.apache.org/queue": "root.team",
        "ray.io/gang-scheduling-enabled": "true",
    },
    "annotations": {"example.com/owner": "vision", "sidecar.istio.io/inject": "false"},
    "pod": {
        "schedulerName": "volcano",
        "priorityClassName": "low",
        "nodeSelector": {"pool": "any", "arch": "amd64"},
        "tolerations": [{"key": "dedicated", "operator": "Exists"}],
        "hostAliases": [{"ip": "10.0.0.1", "hostnames": ["store"]}],
        "imagePullSecrets": [{"name": "mirror"}],
        "securityContext": {"runAsUser": 1000620000},
        "topologySpreadConstraints": [
            {"maxSkew": 1, "topologyKey": "zone", "whenUnsatisfiable": "ScheduleAnyway", "labelSelector": {}}
        ],
        "volumes": [{"name": "scratch", "emptyDir": {}}],
        "initContainers": [
            {"name": "fetch", "command": ["hf", "download", "a/b"]},
            {"name": "wait", "image": "busybox:1.37", "command": ["true"], "restartPolicy": "Always"},
        ],
        "containers": [{"name": "logs", "image": "fluent-bit:4", "env": [{"name": "HOME", "value": "/"}]}],
    },
    "container": {
        "env": [{"name": "FAR", "value": "container"}, {"name": "NEAR", "value": "container"}],
        "volumeMounts": [{"name": "scratch", "mountPath": "/scratch"}],
    },
    "extraEnv": [{"name": "FAR", "value": "extraEnv"}],
    "groups": {
        "learner": {
            "labels": {"team": "learning"},
            "nodeSelector": {"pool": "a"},
            "extraEnv": [{"name": "NEAR", "value": "group"}],
            "pod": {
                "nodeSelector": {"pool": "b"},
                "priorityClassName": "high",
                "containers": [{"name": "logs", "image": "vector:1"}],
            },
            "container": {"resources": RDMA, "securityContext": {"readOnlyRootFilesystem": False}},
        },
    },
    "storage": {
        "checkpoints": {"existingClaim": "share", "subPath": "team/runs"},
        "hfCache": {"existingClaim": "share", "subPath": "hf", "accessModes": ["ReadOnlyMany"]},
    },
    "huggingFace": {"existingSecret": "hub", "key": "token", "offline": True},
}


def pods(values: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Every pod template of a release: head, groups by name, submitter."""
    job = only(render(values), "RayJob")["spec"]
    cluster = job["rayClusterSpec"]
    found = {group["groupName"]: group["template"] for group in cluster["workerGroupSpecs"]}
    return found | {"head": cluster["headGroupSpec"]["template"], "submitter": job["submitterPodTemplate"]}


def env(container: dict[str, Any]) -> dict[str, Any]:
    names = [variable["name"] for variable in container["env"]]
    assert len(names) == len(set(names)), f"twice: {names}"
    return {variable["name"]: variable.get("value", variable.get("valueFrom")) for variable in container["env"]}


def test_labels_are_on_every_object_and_pod_and_annotations_on_rays_and_every_pod():
    job = only(render(EVERYTHING), "RayJob")["metadata"]
    for item in render(EVERYTHING | {"monitoring": {"podMonitor": {"enabled": True, "labels": {"team": "other"}}}}):
        expected = "other" if item["kind"] == "PodMonitor" else "vision"
        assert item["metadata"]["labels"]["team"] == expected, item["kind"]
        assert item["metadata"]["labels"]["app.kubernetes.io/managed-by"] == "Helm"
    assert job["labels"]["volcano.sh/queue-name"] == "team" and job["annotations"]["example.com/owner"] == "vision"
    for name, pod in pods(EVERYTHING).items():
        assert pod["metadata"]["labels"]["team"] == ("learning" if name == "learner" else "vision")
        assert pod["metadata"]["labels"]["app.kubernetes.io/component"] == name
        assert pod["metadata"]["annotations"]["sidecar.istio.io/inject"] == "false"
    cluster = only(render(EVERYTHING | {"mode": "cluster"}), "RayCluster")["metadata"]
    assert (
        cluster["labels"]["ray.io/gang-scheduling-enabled"] == "true" and cluster["annotations"] == job["annotations"]
    )


def test_a_queue_is_named_on_the_ray_job_and_not_on_its_pods():
    queued = {"kueue": {"queueName": "team", "priorityClass": "low"}}
    for mode, kind in (("job", "RayJob"), ("cluster", "RayCluster")):
        objects = render(queued | EVERYTHING | {"mode": mode})
        labels = only(objects, kind)["metadata"]["labels"]
        assert labels["kueue.x-k8s.io/queue-name"] == "team" and labels["team"] == "vision"
        assert str(objects).count("kueue.x-k8s.io/queue-name") == 1
    assert only(render({"job": {"suspend": True}}), "RayJob")["spec"]["suspend"] is True
    assert only(render({"mode": "cluster", "cluster": {"suspend": True}}), "RayCluster")["spec"]["suspend"] is True


def test_fields_for_all_pods_are_in_every_pod_and_those_of_a_group_go_over_them():
    made = pods(EVERYTHING)
    assert len(made) == 5
    for name, pod in made.items():
        spec = pod["spec"]
        assert spec["schedulerName"] == "volcano" and spec["imagePullSecrets"] == [{"name": "mirror"}], name
        assert spec["hostAliases"] == [{"ip": "10.0.0.1", "hostnames": ["store"]}], name
        assert spec["priorityClassName"] == ("high" if name == "learner" else "low"), name
        assert spec["nodeSelector"] == {"pool": "b" if name == "learner" else "any", "arch": "amd64"}, name
        assert {"key": "dedicated", "operator": "Exists"} in spec["tolerations"], name
        assert spec["securityContext"]["runAsUser"] == 1000620000 and spec["securityContext"]["runAsNonRoot"], name
        assert len(spec["topologySpreadConstraints"]) == 1, name
    assert {t["key"] for t in made["learner"]["spec"]["tolerations"]} == {"dedicated", "nvidia.com/gpu"}


def test_extended_resources_huge_pages_and_a_nodes_disk_are_asked_for_by_one_group():
    resources = {name: pod["spec"]["containers"][0]["resources"] for name, pod in pods(EVERYTHING).items()}
    learner = resources.pop("learner")
    assert learner["limits"].items() >= RDMA["limits"].items() and learner["limits"]["nvidia.com/gpu"] == "4"
    assert learner["requests"] == learner["limits"] | RDMA["requests"]
    assert "rdma" not in str(resources) and "ephemeral" not in str(resources)


def test_rays_container_stays_the_first_and_takes_variables_and_mounts_the_nearer_ones_last():
    made = pods(EVERYTHING)
    for name in ("head", "learner", "reward", "rollout"):
        ray, sidecar = made[name]["spec"]["containers"]
        assert ray["name"] == ("ray-head" if name == "head" else "ray-worker")
        assert sidecar["image"] == ("vector:1" if name == "learner" else "fluent-bit:4")
        assert env(ray)["FAR"] == "extraEnv" and env(ray)["NEAR"] == ("group" if name == "learner" else "container")
        assert {"name": "scratch", "mountPath": "/scratch"} in ray["volumeMounts"]
        assert {"name": "dev-shm", "mountPath": "/dev/shm"} in ray["volumeMounts"]
        (shm,) = [volume["emptyDir"] for volume in made[name]["spec"]["volumes"] if volume["name"] == "dev-shm"]
        assert shm["medium"] == "Memory" and shm["sizeLimit"]
    assert made["learner"]["spec"]["containers"][0]["securityContext"] == {
        "allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}, "readOnlyRootFilesystem": False,
    }  # fmt: skip


def test_a_container_without_an_image_is_like_rays_without_gpus_and_one_with_an_image_is_restricted_too():
    made = pods(EVERYTHING)
    assert [c["name"] for c in made["head"]["spec"]["initContainers"]] == ["check-volumes", "fetch", "wait"]
    for name in ("head", "learner"):
        ray, sidecar = made[name]["spec"]["containers"]
        fetch, wait = made[name]["spec"]["initContainers"][-2:]
        assert fetch["image"] == ray["image"] and fetch["volumeMounts"] == ray["volumeMounts"]
        assert env(fetch) == env(ray) | {"NVIDIA_VISIBLE_DEVICES": "void"} and "resources" not in fetch
        assert env(sidecar | {"env": sidecar.get("env", [])}).keys() <= {"HOME"} and "volumeMounts" not in sidecar
        for container in (fetch, wait, sidecar):
            assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}


def test_the_submitter_goes_where_the_head_goes_and_runs_nothing_else():
    head = {"pod": {"nodeSelector": {"pool": "cpu"}, "runtimeClassName": "nvidia", "containers": [{"name": "a"}]}}
    submitter = pods({"head": head, "pod": {"initContainers": [{"name": "b"}]}})["submitter"]["spec"]
    assert submitter["nodeSelector"] == {"pool": "cpu"} and submitter["restartPolicy"] == "Never"
    assert [c["name"] for c in submitter["containers"]] == ["ray-job-submitter"]
    assert not {"initContainers", "volumes", "runtimeClassName"} & set(submitter)


def test_an_affinity_for_a_group_replaces_the_one_for_all_and_adds_no_alternative_to_it():
    def near(zone: str) -> dict[str, Any]:
        terms = [{"matchExpressions": [{"key": "zone", "operator": "In", "values": [zone]}]}]
        return {"nodeAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": {"nodeSelectorTerms": terms}}}

    spread = {"podAntiAffinity": {"preferredDuringSchedulingIgnoredDuringExecution": []}}
    made = pods({"pod": {"affinity": near("a") | spread}, "groups": {"reward": {"affinity": near("b")}}})
    assert made["reward"]["spec"]["affinity"] == near("b") | spread
    assert made["rollout"]["spec"]["affinity"] == near("a") | spread


def test_false_and_zero_go_over_what_the_chart_sets():
    part = {"securityContext": {"allowPrivilegeEscalation": True}, "resources": {"limits": {"rdma/hca": 0}}}
    loose = {
        "podSecurity": {"restricted": False},
        "container": part,
        "pod": {"securityContext": {"runAsNonRoot": False}},
    }
    for name, pod in pods(loose).items():
        assert pod["spec"]["securityContext"]["runAsNonRoot"] is False
        if name != "submitter":
            ray = pod["spec"]["containers"][0]
            assert ray["securityContext"]["allowPrivilegeEscalation"] is True
            assert ray["resources"]["requests"]["rdma/hca"] == 0


def test_a_claim_that_exists_is_mounted_from_a_directory_of_it_wherever_it_is_mounted():
    mounted = [
        (mount["name"], mount.get("subPath"))
        for item in render(EVERYTHING)
        for _, spec in pod_specs(item)
        for container in [*spec.get("initContainers", []), *spec["containers"]]
        for mount in container.get("volumeMounts", [])
        if mount["name"] in ("checkpoints", "hf-cache")
    ]
    assert set(mounted) == {("checkpoints", "team/runs"), ("hf-cache", "hf")} and len(mounted) == 18
    volumes = {volume["name"]: volume for volume in pods(EVERYTHING)["head"]["spec"]["volumes"]}
    assert volumes["checkpoints"]["persistentVolumeClaim"] == {"claimName": "share"}
    assert volumes["hf-cache"]["persistentVolumeClaim"] == {"claimName": "share", "readOnly": True}
    assert not [item for item in render(EVERYTHING) if item["kind"] == "PersistentVolumeClaim"]


def test_the_token_of_the_hub_comes_from_a_secret_into_every_pod_of_ray_and_into_no_other():
    hub = {"HF_TOKEN": {"secretKeyRef": {"name": "hub", "key": "token"}}, "HF_HUB_OFFLINE": "1"}
    for name, pod in pods(EVERYTHING).items():
        variables = env(pod["spec"]["containers"][0])
        assert (variables.items() >= hub.items()) == (name != "submitter"), name
        assert name == "submitter" or variables["HF_HOME"] == "/var/cache/huggingface"
    assert not {"HF_TOKEN", "HF_HUB_OFFLINE"} & env(pods({})["rollout"]["spec"]["containers"][0]).keys()


ONCE = {"checkpoints": {"accessModes": ["ReadWriteOnce"]}}


@pytest.mark.parametrize(
    "values",
    [
        {"storage": ONCE, "pod": {"nodeSelector": {HOST: "one"}}},
        {"storage": ONCE, "pod": {"affinity": BESIDE}},
        {"storage": {"checkpoints": {"accessModes": ["ReadWriteOnce", "ReadWriteMany"]}}},
        {"storage": {"hfCache": {"accessModes": ["ReadWriteOncePod"], "enabled": False}}},
    ],
)
def test_a_volume_of_one_node_is_taken_where_all_pods_are_kept_on_one_node(values):
    assert ray_cluster(render(values))


def rdma(**resources: Any) -> dict[str, Any]:
    return {"groups": {"learner": {"container": {"resources": resources}}}}


def access(volume: str, *modes: str, **more: Any) -> dict[str, Any]:
    return {"storage": {volume: {"accessModes": list(modes)} | more}}


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "one node": (access("checkpoints", "ReadWriteOnce"), r'accessModes = \["ReadWriteOnce"\] lets the pods'),
    "one node, mine": (
        access("checkpoints", "ReadWriteOnce", existingClaim="a"),
        "use ReadWriteMany.* pod.nodeSelector",
    ),
    "cache": (access("hfCache", "ReadWriteOnce"), "storage.hfCache.accessModes .* or storage.hfCache.enabled=false"),
    "one pod": (
        access("checkpoints", "ReadWriteOncePod") | {"pod": {"nodeSelector": {HOST: "one"}}},
        "lets one pod mount it, and head and workers all do",
    ),
    "two nodes": (
        {"storage": ONCE, "pod": {"nodeSelector": {HOST: "a"}}, "head": {"nodeSelector": {HOST: "b"}}},
        "lets the pods of one node mount it",
    ),
    "the head alone": ({"storage": ONCE, "head": {"nodeSelector": {HOST: "b"}}}, "lets the pods of one node mount it"),
    "empty": (access("hfCache", "ReadOnlyMany"), "a new claim would stay empty"),
    "cpu": (rdma(limits={"cpu": "4"}), "Ray counts cpu, so it has a key of its own: use groups.learner.cpu"),
    "gpu": ({"container": {"resources": {"limits": {"nvidia.com/gpu": 1}}}}, "use groups.*.gpus"),
    "other gpu": (
        {"groups": {"learner": {"gpuResource": "amd.com/gpu"} | rdma(limits={"amd.com/gpu": 1})["groups"]["learner"]}},
        "Ray counts amd.com/gpu",
    ),
    "request alone": (rdma(requests={"rdma/hca": 1}), "rdma/hca is requested 1 times and limited to nothing"),
    "uneven": (rdma(limits={"hugepages-2Mi": "1Gi"}, requests={"hugepages-2Mi": "2Gi"}), "give it in limits alone"),
    "disk": (
        rdma(limits={"ephemeral-storage": "1Gi"}, requests={"ephemeral-storage": "2Gi"}),
        "ephemeral-storage has a request of 2Gi, more than its limit of 1Gi",
    ),
    "disk with cache": (
        rdma(requests={"ephemeral-storage": "20Gi"}) | {"storage": {"hfCache": {"enabled": False}}},
        "less than storage.hfCache.size = 100Gi",
    ),
    "account": ({"pod": {"serviceAccountName": "a"}}, "pod.serviceAccountName = a: use serviceAccount.name"),
    "grace": ({"head": {"pod": {"terminationGracePeriodSeconds": 9}}}, "use terminationGracePeriodSeconds at the top"),
    "restart": ({"pod": {"restartPolicy": "Always"}}, "pod.restartPolicy = Always: the operator chooses it"),
    "rays name": ({"pod": {"containers": [{"name": "ray-worker"}]}}, "the name ray-worker is .* use container for"),
    "no such volume": (
        {"pod": {"containers": [{"name": "a", "volumeMounts": [{"name": "v", "mountPath": "/v"}]}]}},
        "container a mounts v at /v, and there is no such volume",
    ),
    "no volume": ({"container": {"volumeMounts": [{"name": "v", "mountPath": "/v"}]}}, "/v: add it to pod.volumes"),
    "operators token": (
        {"autoscaling": {"enabled": True}}
        | {"head": {"extraVolumeMounts": [{"name": "autoscaler-token", "mountPath": "/token"}]}},
        "head.extraVolumeMounts: there is no volume autoscaler-token for /token",
    ),
    "mount": (
        {"container": {"volumeMounts": [{"name": "config", "mountPath": "/shared"}]}},
        r"container.volumeMounts \(config\): /shared is taken by storage.checkpoints.mountPath",
    ),
    "volume twice": (
        {"pod": {"volumes": [{"name": "a"}]}, "head": {"extraVolumes": [{"name": "a"}]}},
        "head.extraVolumes: two volumes are named a",
    ),
    "host path": ({"pod": {"volumes": [{"name": "a", "hostPath": {"path": "/"}}]}}, "pod.volumes: hostPath is refused"),
    "host network": ({"pod": {"hostNetwork": True}}, "pod.hostNetwork = true is refused in a restricted namespace"),
    "names": (
        {"podSecurity": {"restricted": False}, "pod": {"hostNetwork": True}},
        "set pod.dnsPolicy=ClusterFirstWithHostNet",
    ),
    "root": (
        {"pod": {"initContainers": [{"name": "a", "securityContext": {"runAsUser": 0}}]}},
        "Context of a = .* refused",
    ),
    "capability": (
        {"container": {"securityContext": {"capabilities": {"add": ["IPC_LOCK"]}}}},
        "IPC_LOCK.* is refused in a restricted namespace: take it out, or set podSecurity.restricted=false",
    ),
    "kept": ({"container": {"securityContext": {"capabilities": {"drop": ["NET_RAW"]}}}}, "NET_RAW.* is refused in a"),
    "token": ({"extraEnv": [{"name": "HF_TOKEN", "value": "hf_a"}]}, "a value of HF_TOKEN would be readable"),
    "key": ({"container": {"env": [{"name": "WANDB_API_KEY", "value": "a"}]}}, "a value of WANDB_API_KEY would"),
    "sidecar": (
        {"pod": {"containers": [{"name": "a", "image": "b", "env": [{"name": "A_TOKEN", "value": "c"}]}]}},
        "pod.containers .a.: a value of A_TOKEN would",
    ),
    "offline": ({"extraEnv": [{"name": "HF_HUB_OFFLINE", "value": "1"}]}, "use huggingFace.offline"),
    "queue": ({"labels": {"kueue.x-k8s.io/queue-name": "a"}}, "labels: .* use kueue.queueName"),
    "operators label": ({"labels": {"ray.io/cluster": "a"}}, "labels: ray.io/cluster = a is set by"),
    "charts label": ({"labels": {"helm.sh/chart": "a"}}, "labels: helm.sh/chart = a is set by"),
    "gang": ({"head": {"labels": {"ray.io/gang-scheduling-enabled": "true"}}}, "is read on the RayJob .* use labels"),
    "command": ({"annotations": {"ray.io/overwrite-container-cmd": "true"}}, "is set by the chart or the operator"),
}


@pytest.mark.parametrize("values, sentence", WRONG.values(), ids=WRONG.keys())
def test_what_kubernetes_or_the_run_would_refuse_later_is_refused_now(values, sentence):
    with pytest.raises(helm.HelmRenderError, match=sentence):
        render(values)


SCHEMA: dict[str, tuple[dict[str, Any], str]] = {
    "typo": ({"pod": {"toleration": []}}, "/pod': additional properties 'toleration' not allowed"),
    "type": ({"pod": {"tolerations": {}}}, "/pod/tolerations': got object, want array"),
    "value": ({"pod": {"tolerations": [{"effect": "NoSchedul"}]}}, "effect': value must be one of"),
    "number": ({"head": {"pod": {"schedulerName": 5}}}, "/head/pod/schedulerName': got number, want string"),
    "spread": ({"pod": {"topologySpreadConstraints": [{"maxSkew": 1}]}}, "missing properties 'topologyKey'"),
    "container": ({"pod": {"containers": [{"name": "a", "comand": []}]}}, "'comand' not allowed"),
    "hook": ({"container": {"lifecycle": {}}}, "/container': additional properties 'lifecycle' not allowed"),
    "resources": (rdma(limit={"rdma/hca": 1}), "resources': additional properties 'limit' not allowed"),
    "amount": (rdma(limits={"rdma/hca": "one"}), "'one' does not match pattern"),
    "label": ({"labels": {"team": "a b"}}, "/labels/team': 'a b' does not match pattern"),
    "number label": ({"labels": {"team": 1}}, "/labels/team': got number, want string"),
    "token": ({"huggingFace": {"token": "hf_a"}}, "/huggingFace': additional properties 'token' not allowed"),
    "up": ({"storage": {"checkpoints": {"subPath": "../a"}}}, "subPath': '../a' does not match pattern"),
    "read-only runs": (access("checkpoints", "ReadOnlyMany"), "value must be one of 'ReadWriteMany'"),
}


@pytest.mark.parametrize("values, sentence", SCHEMA.values(), ids=SCHEMA.keys())
def test_the_schema_names_the_place_of_an_unknown_key_or_a_wrong_type(values, sentence):
    with pytest.raises(helm.HelmValuesError, match=sentence):
        render(values)


def nulls(node: dict[str, Any]) -> list[Any]:
    """The values that take out one key of a tree each, at every depth; of keys that are empty anyway only maps."""
    found: list[Any] = []
    for key, value in node.items():
        below = nulls(value) if isinstance(value, dict) and key not in ("config", "groups") else []
        found += [{key: each} for each in [None, *below] if value or value == {}]
    return found


def test_a_key_taken_out_by_null_is_left_out_or_refused_in_plain_words():
    for values in nulls(yaml.safe_load((CHART / "values.yaml").read_text())):
        try:
            render(values)
        except helm.HelmValuesError as error:
            assert "missing propert" in str(error), json.dumps(values)
        except helm.HelmRenderError as error:
            assert "execution error" in str(error), f"{json.dumps(values)}: {error}"  # a sentence of ours
