"""What deploy/README.md does with the chart: its values files and commands render, and its jobs have room."""

from __future__ import annotations

import functools
import re
import shlex
from typing import Any

import pytest
import yaml

from stage_ray.cli import main
from stage_ray.config.load import load_config
from tests.deploy.charts import CHART, ROOT, helm, merged, only, pod_specs, ray_cluster, render

kubernetes_validate = pytest.importorskip("kubernetes_validate", reason="kubernetes-validate is not installed")

TEXT = (ROOT / "deploy" / "README.md").read_text(encoding="utf-8")
FILES = {
    name: yaml.safe_load(block)
    for name, block in re.findall(r"^`(\w+\.yaml)`,.*?```yaml\n(.*?)```", TEXT, flags=re.DOTALL | re.MULTILINE)
}


def typed(start: str) -> list[list[str]]:
    """Words of every command on the page that starts so, without comments and what comes after a pipe."""
    lines = [line for block in re.findall(r"```bash\n(.*?)```", TEXT, flags=re.DOTALL) for line in block.splitlines()]
    return [shlex.split(re.split(r"\s+#\s|\s\|\s", line)[0]) for line in lines if line.startswith(start)]


def given(words: list[str], option: str) -> list[str]:
    return [words[i + 1] for i, word in enumerate(words) if word == option]


def values_of(words: list[str]) -> dict[str, Any]:
    """The values that a helm command gives, those of files first."""
    parts = [FILES[name] for name in given(words, "--values")]
    parts += [helm.parse_set_string(text) for text in given(words, "--set")]
    for text in given(words, "--set-file"):
        key, _, path = text.partition("=")
        parts.append(helm.parse_set_file(f"{key}={ROOT / path}"))
    return functools.reduce(merged, parts, {})


RELEASES = [
    words for verb in ("install", "upgrade", "template") for words in typed(f"helm {verb} ") if "--values" in words
]
each_release = pytest.mark.parametrize("words", RELEASES, ids=[" ".join(words[1:3]) for words in RELEASES])


@each_release
def test_every_release_on_the_page_renders(words):
    values = values_of(words)
    assert words[3] == "deploy/helm/stage-ray" and (ROOT / words[3]).is_dir()
    assert only(render(values, words[2]), "RayCluster" if values.get("mode") == "cluster" else "RayJob")


SECTION = TEXT[TEXT.index("## Queues, networks and disks") : TEXT.index("## Upgrade and uninstall")]
OVER = [yaml.safe_load(block) for block in re.findall(r"```yaml\n(.*?)```", SECTION, flags=re.DOTALL)]


@pytest.mark.parametrize("values", OVER, ids=lambda values: "-".join(values))
def test_what_the_page_lays_over_the_first_job_is_right_by_the_schemas(values):
    objects = render(merged(FILES["first.yaml"], values))
    for at, spec in pod_specs(objects):
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "a"}, "spec": spec}
        kubernetes_validate.validate(pod, "1.34", strict=True), at
    assert values.get("labels", {}).items() <= only(objects, "RayJob")["metadata"]["labels"].items()


def test_the_page_has_a_block_for_each_queue_network_and_disk():
    assert len(OVER) >= 10
    for word in ("kueue", "volcano", "yunikorn", "rdma/hca", "/efa", "ephemeral-storage", "subPath", "huggingFace"):
        assert word in str(OVER), word


def test_the_config_that_the_page_writes_out_passes_the_dry_run_that_it_recommends(tmp_path, monkeypatch, capsys):
    (words,) = [words for words in RELEASES if words[1] == "template"]
    config = only(render(values_of(words), words[2]), "ConfigMap", "-config")["data"]["config.yaml"]
    (tmp_path / "first-config.yaml").write_text(config)
    monkeypatch.chdir(tmp_path)
    (line,) = typed("stage-ray train ")[:1]
    assert main(line[1:]) == 0, capsys.readouterr().err


def test_the_page_has_both_modes_and_both_images():
    assert set(FILES) == {"smoke.yaml", "first.yaml"} and len(RELEASES) >= 7


def submitted() -> list[tuple[dict[str, Any], list[str]]]:
    """Every job for the chart's cluster mode, with the values of the cluster that was installed just before it."""
    section = TEXT[TEXT.index("## A cluster that takes jobs") : TEXT.index("## Upgrade and uninstall")]
    found, cluster = [], {}
    for line in re.findall(r"^(?:helm install|stage-ray submit) .*", section, flags=re.MULTILINE):
        words = shlex.split(line)
        if words[0] == "helm":
            cluster = values_of(words)
        else:
            found.append((cluster, words))
    return found


@pytest.mark.parametrize("cluster, words", submitted(), ids=lambda value: "" if isinstance(value, dict) else value[4])
def test_a_job_on_the_page_has_room_on_its_cluster_and_an_engine_that_runs_there(cluster, words):
    run = load_config(ROOT / words[2], given(words, "--set")).model_dump(mode="json", exclude={"run_dir"})
    render(merged(cluster, {"mode": "job", "configFile": yaml.safe_dump(run)}))  # in mode job the chart checks that
    on_gpus = not cluster["image"]["repository"].endswith("-cpu")
    assert bool(run["rollout"]["gpus"]) == on_gpus, "the GPU image's vLLM has no CPU backend"
    assert given(words, "--run-dir")[0].startswith(ray_mount(cluster) + "/runs/")


def ray_mount(values: dict[str, Any]) -> str:
    (container,) = ray_cluster(render(values))["headGroupSpec"]["template"]["spec"]["containers"]
    (mount,) = [mount for mount in container["volumeMounts"] if mount["name"] == "checkpoints"]
    return str(mount["mountPath"])


def test_a_release_is_gone_before_one_of_its_name_is_installed_again():
    installed: set[str] = set()
    for block in re.findall(r"```bash\n(.*?)```", TEXT, flags=re.DOTALL):
        lines = block.splitlines()
        for i, line in enumerate(lines):
            words = line.split()
            if words[:2] == ["helm", "install"] and "deploy/helm/stage-ray" in line:
                before = "\n".join(lines[:i])
                if words[2] in installed:
                    assert f"helm uninstall {words[2]} --wait" in before, line
                    assert f"kubectl wait pod --for=delete --selector app.kubernetes.io/instance={words[2]}" in before
                installed.add(words[2])
    assert installed >= {"smoke", "first", "team"}
    assert not re.search(r"^helm uninstall (?!.*--wait)", TEXT, flags=re.MULTILINE)


def test_a_token_of_ones_own_has_the_key_that_the_operator_reads():
    assert "--from-file=auth_token=" in TEXT
    assert "auth_token" in (CHART / "values.yaml").read_text()
