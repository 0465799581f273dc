"""Every command line of README.md and deploy/README.md, and the test that runs it or the reason why none can.

A line is run as written, or shrunk (`--set steps=...`, `--quick`, tiny sizes) where it takes minutes as written.
"""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
README, DEPLOY = "README.md", "deploy/README.md"

KUBERNETES = "needs Kubernetes"
CONTAINERS = "needs a container engine"
SECOND_MACHINE = "needs a second machine"
MINUTES = "takes ten minutes to hours; its options are parsed and its parts are tested"
TESTS = "is what runs these tests"

HERE = "tests/test_readme.py::"
CONFIGS = "tests/config/test_shipped.py::"
JOBS = "tests/commands/test_jobs.py::"
DRY_RUN = HERE + "test_every_training_of_the_pages_is_accepted_by_a_dry_run"
SHORT_RUN = HERE + "test_a_training_that_was_stopped_goes_on"
PAPER_RUNS = "tests/test_paper_runs.py::test_a_config_is_accepted_by_a_dry_run_where_its_prompts_lie"
SENT = JOBS + "test_submit_sends_code_files_and_scorers_follows_the_run_and_does_not_repeat_it"
RAYS_OWN = "tests/deploy/test_chart_job.py::"
RAYS_OWN += "test_the_rendered_entrypoint_trains_on_nodes_like_its_pods_and_again_does_nothing"
QUEUED = "tests/deploy/test_slurm.py::"
QUEUED += "test_before_its_time_is_up_the_training_saves_and_the_job_is_queued_again"
STOPPED = JOBS + "test_a_job_is_joined_left_stopped_killed_and_goes_on_without_losing_a_group"
TOKEN = HERE + "test_the_lines_that_make_a_token_make_one_that_is_closed_to_others"
HEAD = "tests/ray_head.py::ray_head"
CHART = "tests/deploy/test_chart_readme.py::"
RENDERED = f"{KUBERNETES}; rendered as written by {CHART}test_every_release_on_the_page_renders"
CHECKED = CHART + "test_the_config_that_the_page_writes_out_passes_the_dry_run_that_it_recommends"

SUBMIT = "stage-ray submit configs/stage_shapeworld.yaml --run-dir /shared/runs/"
TRAIN = "stage-ray train configs/stage_shapeworld.yaml "
HELM = "deploy/helm/stage-ray --values "
MONITORING = (
    " --set monitoring.podMonitor.enabled=true --set monitoring.grafanaDashboard.enabled=true"
    " --set-file monitoring.grafanaDashboard.json=deploy/grafana/stage-ray.json"
    " --set monitoring.prometheusRule.enabled=true"
    " --set-file monitoring.prometheusRule.rules=deploy/grafana/alerts.yaml"
)

TABLE: dict[str, dict[str, str]] = {
    README: {
        "make train": HERE + "test_make_train_is_the_default_job_and_make_knows_the_other_tasks_of_the_page",
        "make test": TESTS,
        TRAIN + "--set seed=$seed --run-dir runs/seed-$seed": DRY_RUN,
        TRAIN + "--set learner.lr=5e-5 --set steps=200 --run-dir runs/mine": SHORT_RUN,
        TRAIN + "--set learner.lr=5e-5 --set steps=200 --run-dir runs/mine --resume": SHORT_RUN,
        "stage-ray evaluate runs/mine/final --suite shapeworld --guidance 3 --json mine.json": HERE
        + "test_the_trained_model_is_evaluated",
        'stage-ray generate runs/mine/final --prompt "a photo of a red circle and a blue ring" --guidance 3'
        " --out pictures": HERE + "test_the_trained_model_draws",
        'stage-ray score pictures --prompt "a photo of a red circle and a blue ring" --scorer clip'
        " --set rewards.0.options.path=package:stage_ray/shapeworld/assets/clip": "tests/commands/test_score.py::"
        "test_the_line_of_the_readme_scores_what_generate_has_drawn",
        "stage-ray configs": CONFIGS + "test_each_is_listed_with_its_three_opening_lines",
        "stage-ray init stage_shapeworld --out mine.yaml": CONFIGS + "test_the_lines_of_the_readme_do_what_they_say",
        "stage-ray train mine.yaml --dry-run": CONFIGS + "test_the_lines_of_the_readme_do_what_they_say",
        "stage-ray report runs/mine": HERE + "test_a_run_is_reported_anew",
        "stage-ray study study.yaml": "tests/study/test_study.py::"
        "test_a_study_that_was_stopped_goes_on_gives_an_arm_the_value_that_its_search_found_and_is_done",
        "stage-ray compare runs/grpo_shapeworld runs/stage_shapeworld": "tests/report/test_compare.py::"
        "test_the_line_of_the_readme_writes_a_page",
        "stage-ray bench pipeline": MINUTES,
        "stage-ray fetch configs/stage_shapeworld.yaml --set policy.path=deepseek-community/Janus-Pro-1B": "tests/"
        "commands/test_fetch.py::test_the_command_reads_the_variables_of_the_hub",
        "stage-ray pretrain --out world": "tests/shapeworld/test_pretrain.py::"
        "test_a_smoke_run_builds_every_model_in_a_form_that_transformers_loads",
        TRAIN + "--set steps=12 --set evaluation.enabled=false --set pipeline.max_staleness=0"
        " --run-dir runs/lockstep": DRY_RUN,
        **dict.fromkeys(
            [f"stage-ray train janus_pro_7b_{run}" for run in ("geneval", "hps_gdino_git", "ocr")], PAPER_RUNS
        ),
        "make chaos MINUTES=10 SEED=7": MINUTES,
        "stage-ray bench all --json bench.json": MINUTES,
        "ray get-auth-token --generate && chmod 600 ~/.ray/auth_token": TOKEN,
        "export RAY_AUTH_MODE=token": TOKEN,
        "ray start --head": HEAD,
        SUBMIT + "first": SENT,
        f"ray job submit --working-dir . -- {TRAIN}--run-dir /shared/runs/second --auto-resume": RAYS_OWN,
        f"helm install first {HELM}first.yaml": RENDERED,
        "stage-ray plan --model janus-pro-7b --gpu h100 --gpus 64": "tests/commands/test_plan.py::"
        "test_the_plans_in_deploy_are_what_the_command_prints",
    },
    DEPLOY: {
        "helm repo add kuberay https://ray-project.github.io/kuberay-helm/": KUBERNETES,
        "helm install kuberay-operator kuberay/kuberay-operator --version 1.7.0 --namespace kuberay-system"
        " --create-namespace --wait": KUBERNETES,
        "helm repo add nvidia https://helm.ngc.nvidia.com/nvidia": KUBERNETES,
        "helm install gpu-operator nvidia/gpu-operator --namespace gpu-operator --create-namespace --wait": KUBERNETES,
        "kubectl get nodes -o custom-columns="
        r"'NODE:.metadata.name,GPUS:.status.allocatable.nvidia\.com/gpu'": KUBERNETES,
        "kubectl create namespace stage-ray": KUBERNETES,
        "kubectl label namespace stage-ray pod-security.kubernetes.io/enforce=restricted": KUBERNETES,
        "kubectl config set-context --current --namespace=stage-ray": KUBERNETES,
        r"""printf 'HF_TOKEN=%s\n' "$HF_TOKEN" | kubectl create secret generic stage-ray-env"""
        " --from-env-file=/dev/stdin": KUBERNETES,
        "docker build --target gpu --tag registry.example.com/stage-ray:0.2.0 --file deploy/docker/Dockerfile .": (
            CONTAINERS
        ),
        "docker push registry.example.com/stage-ray:0.2.0": CONTAINERS,
        f"helm install smoke {HELM}smoke.yaml --set-file configFile=configs/stage_shapeworld.yaml": RENDERED,
        f"helm install first {HELM}first.yaml": RENDERED,
        "kubectl get rayjob,raycluster,pod --watch": KUBERNETES,
        "kubectl logs --follow --selector batch.kubernetes.io/job-name --tail=-1": KUBERNETES,
        "HEAD=$(kubectl get pod --selector ray.io/node-type=head --output name)": KUBERNETES,
        'kubectl port-forward "$HEAD" 8265 &': KUBERNETES,
        "export RAY_AUTH_MODE=token": TOKEN,
        'export RAY_AUTH_TOKEN=$(kubectl exec "$HEAD" --container ray-head -- printenv RAY_AUTH_TOKEN)': KUBERNETES,
        "ray job list --address http://127.0.0.1:8265": SENT,
        f"helm upgrade first {HELM}first.yaml{MONITORING}": RENDERED,
        f"helm template first {HELM}first.yaml --show-only templates/configmap.yaml | python -c 'import sys, yaml;"
        """ print(yaml.safe_load(sys.stdin)["data"]["config.yaml"])' > first-config.yaml""": CHECKED,
        "stage-ray train first-config.yaml --dry-run": CHECKED,
        "helm uninstall first --wait --timeout 5m": KUBERNETES,
        "kubectl wait pod --for=delete --selector app.kubernetes.io/instance=first --timeout=5m": KUBERNETES,
        "openssl rand -hex 32 | tr -d '\\n' | kubectl create secret generic stage-ray-token"
        " --from-file=auth_token=/dev/stdin": KUBERNETES,
        f"helm install team {HELM}smoke.yaml --set mode=cluster": RENDERED,
        f"helm install gpus {HELM}first.yaml --set mode=cluster": RENDERED,
        SUBMIT + "gpus --set rollout.gpus=1 --set learner.gpus=1 --set 'rollout.resources={rollout: 1}'"
        " --set 'scoring.resources={reward: 1}' --set 'learner.resources={learner: 1}'": CHART
        + "test_a_job_on_the_page_has_room_on_its_cluster_and_an_engine_that_runs_there",
        SUBMIT + "first --image-has-code": JOBS
        + "test_what_only_the_cluster_can_find_wrong_has_the_exit_code_of_the_run",
        SUBMIT + "second --set learner.lr=5e-5 --env HF_TOKEN": SENT,
        "ray job stop ID --address http://127.0.0.1:8265": STOPPED,
        "ray job submit --address http://127.0.0.1:8265 --working-dir . --"
        f" {TRAIN}--run-dir /shared/runs/third --auto-resume": RAYS_OWN,
        f"helm install first {HELM}first.yaml --set image.tag=0.2.1": RENDERED,
        f"helm upgrade gpus {HELM}first.yaml --set mode=cluster --set image.tag=0.2.1": RENDERED,
        "kubectl get persistentvolumeclaim": KUBERNETES,
        "ray get-auth-token --generate && chmod 600 ~/.ray/auth_token": TOKEN,
        "ray start --head --dashboard-host=127.0.0.1 --disable-usage-stats --resources='{\"learner\": 4}'": HEAD,
        "ray start --address=FIRST:6379 --disable-usage-stats --resources='{\"rollout\": 4}'": SECOND_MACHINE,
        SUBMIT + "first": SENT,
        SUBMIT + "placed --set 'learner.resources={learner: 1}' --set 'rollout.resources={rollout: 1}'": "tests/deploy/"
        "test_chart_job.py::test_the_rendered_entrypoint_trains_on_nodes_like_its_pods_and_again_does_nothing",
        f"ray job submit --working-dir . -- {TRAIN}--run-dir /shared/runs/plain --auto-resume": RAYS_OWN,
        "sbatch deploy/slurm/one-node.sbatch configs/stage_shapeworld.yaml /shared/runs/first"
        " --set rollout.engine=torch": QUEUED,
        "sbatch --nodes=4 --gpus-per-node=8 deploy/slurm/several-nodes.sbatch configs/stage_shapeworld.yaml"
        " /shared/runs/many --set rollout.workers=24": QUEUED,
        TRAIN + "--set rollout.tensor_parallel=2 --set steps=2 --run-dir runs/parallel": DRY_RUN,
        TRAIN + "--run-dir runs/first": DRY_RUN,
    },
}
"""Page -> command line without its comment -> ``file::name`` of what runs it, or why nothing can."""

REASONS = (KUBERNETES, CONTAINERS, SECOND_MACHINE, MINUTES, TESTS)


def text(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def command_lines(page: str) -> list[str]:
    """Commands in a page's bash blocks: continued lines joined, comments and the shell's own loops left out."""
    blocks = re.findall(r"```bash\n(.*?)```", text(page), flags=re.DOTALL)
    lines = [
        re.sub(r"\s+#\s.*", "", line).strip() for block in blocks for line in block.replace("\\\n", " ").split("\n")
    ]
    return [line for line in lines if line and line != "done" and not re.fullmatch(r"for .*; do", line)]


def named_tests(how: str) -> list[str]:
    """Every ``file::name`` in a cell of the table."""
    return re.findall(r"tests/\S+?\.py::\w+", how)
