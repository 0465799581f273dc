"""Measures agree with closed forms and literal loops, and find what they are there to find."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from stage_ray.config import MeasureConfig, PolicyConfig
from stage_ray.config.inputs import pin
from stage_ray.config.load import validate_config
from stage_ray.errors import ConfigError
from stage_ray.evaluation.base import EvaluationResult, changes
from stage_ray.evaluation.measures.base import measured, resolve_measures, select
from stage_ray.evaluation.measures.drift import drift_metrics
from stage_ray.evaluation.measures.frechet import frechet_distance
from stage_ray.evaluation.measures.manifold import inside
from stage_ray.evaluation.metrics import MetricValue
from stage_ray.evaluation.suites import resolve_suites
from stage_ray.policies import load_policy
from stage_ray.policies.drift import token_drift
from stage_ray.records import Prompt, RolloutGroup, ScoredGroup
from stage_ray.rewards.vectors import VectorsReward
from stage_ray.samplers import SamplingParams
from tests.rewards.checkpoints import save_dino

NOISE = np.random.default_rng(0)
PROMPTS = [Prompt(index, f"prompt {index}") for index in range(8)]


def test_the_frechet_distance_of_sets_with_uncorrelated_dimensions_is_the_closed_form():
    """Rows at +-s_d on each axis alone have a diagonal covariance, so the distance is a sum over dimensions."""

    def along_axes(mean: list[float], spread: list[float]) -> np.ndarray:
        axes = np.diag(spread)
        return np.concatenate([axes, -axes]) + mean

    own, theirs = along_axes([0, 0, 0], [1, 2, 3]), along_axes([1, 0, -2], [2, 2, 1])
    variance = [2 * np.square(spread) / 5 for spread in ([1, 2, 3], [2, 2, 1])]
    expected = 1 + 4 + np.square(np.sqrt(variance[0]) - np.sqrt(variance[1])).sum()
    assert frechet_distance(own, theirs) == pytest.approx(expected)


def test_the_frechet_distance_is_that_of_the_published_formula_with_a_matrix_root():
    """As pytorch-fid has it: ``scipy.linalg.sqrtm`` of the product of the covariances."""
    from scipy.linalg import sqrtm

    own, theirs = NOISE.normal(size=(40, 5)) @ NOISE.normal(size=(5, 5)), NOISE.normal(0.3, 2, size=(60, 5))
    covariances = [np.cov(rows, rowvar=False) for rows in (own, theirs)]
    root = sqrtm(covariances[0] @ covariances[1]).real
    expected = np.square(own.mean(0) - theirs.mean(0)).sum() + np.trace(sum(covariances)) - 2 * np.trace(root)
    assert frechet_distance(own, theirs) == pytest.approx(expected, rel=1e-9)
    twice = frechet_distance(own, theirs, np.full(40, 2.0), np.ones(60))
    assert twice == pytest.approx(frechet_distance(np.concatenate([own, own]), theirs)), "weights are repetitions"
    few = NOISE.normal(size=(3, 5))
    assert frechet_distance(few, few) == pytest.approx(0, abs=1e-6), "fewer vectors than dimensions"


def test_a_manifold_is_made_of_balls_as_the_paper_has_them():
    own, theirs = NOISE.normal(size=(30, 4)), NOISE.normal(0.5, 1, size=(20, 4))
    expected = []
    for vector in own:
        hits = []
        for other in theirs:
            distances = sorted(float(np.linalg.norm(other - it)) for it in theirs)
            hits.append(np.linalg.norm(vector - other) <= distances[3])  # the first is its own, 0
        expected.append(any(hits))
    assert inside(own, theirs).tolist() == expected and 0 < sum(expected) < 30


def features_of(rows: np.ndarray, theirs: np.ndarray, per_prompt: int, name: str = "features") -> list[ScoredGroup]:
    """Groups whose images have these vectors, and those as their reference pictures'."""
    numbers = np.arange(len(rows))[:, None]
    found = np.concatenate([rows, theirs, numbers], axis=1).astype(np.float32)
    groups = []
    for index in range(len(rows) // per_prompt):
        mine = found[index * per_prompt : (index + 1) * per_prompt]
        valid = np.ones((per_prompt, 1), bool)
        said = ({},) * per_prompt
        groups.append(ScoredGroup(index, (name,), np.ones((per_prompt, 1), np.float32), valid, said, 0.0, {name: mine}))
    return groups


def result_of(own: np.ndarray, theirs: np.ndarray, per_prompt: int = 4) -> EvaluationResult:
    found = measured([MeasureConfig(measure="features")], PROMPTS, features_of(own, theirs, per_prompt))
    return EvaluationResult("b", "m", {"m": MetricValue(0.5, by_prompt={0: 0.5})}).with_metrics(found)


def test_a_model_that_collapses_loses_recall_and_diversity_and_moves_away():
    real, like = NOISE.normal(size=(2, 32, 6))
    whole, collapsed = result_of(like, real), result_of(0.1 * like + 1.0, real)
    change = changes(whole, collapsed)
    assert list(change) == ["m", "Frechet distance", "precision", "recall", "diversity"]
    for name, sign in (("Frechet distance", 1), ("recall", -1), ("diversity", -1)):
        found = change[name]
        assert sign * found.value > 2 * found.error > 0, name
        assert found.value == pytest.approx(collapsed.metrics[name].value - whole.metrics[name].value)
    directions = {name: whole.direction(name) for name in whole.metrics}
    assert directions == {"m": 1, "Frechet distance": -1, "precision": 1, "recall": 1, "diversity": 1}


def test_the_change_of_a_distance_is_surer_than_the_two_distances():
    """Both draw the same prompts anew, so what a prompt adds to both falls away."""
    by_prompt = np.repeat(NOISE.normal(0, 2, size=(8, 1, 3)), 4, axis=1).reshape(32, 3)
    real, before = by_prompt + NOISE.normal(0, 0.1, (32, 3)), by_prompt + NOISE.normal(0.5, 0.1, (32, 3))
    first, second = result_of(before, real), result_of(before + 0.05, real)
    name = "Frechet distance"
    assert changes(first, second)[name].error < first.metrics[name].error / 2


def test_reference_pictures_that_stand_for_several_images_count_once_and_may_be_missing():
    own, theirs = NOISE.normal(size=(2, 32, 3))
    groups = features_of(own, theirs, 4)
    for group in groups:
        group.features["features"][:, -1] %= 5  # pictures of a directory that holds five
        group.features["features"][:, 3:-1] = group.features["features"][:, -1:]
    found = measured([MeasureConfig(measure="features")], PROMPTS, groups)
    assert found["recall"].images == 5 and found["precision"].images == 32
    for group in groups:
        group.features["features"][:, -1] = -1
    assert list(measured([MeasureConfig(measure="features")], PROMPTS, groups)) == ["diversity"]
    groups[0].valid[:] = False  # a scorer that failed counts nowhere
    assert measured([MeasureConfig(measure="features")], PROMPTS, groups)["diversity"].images == 28


def test_vectors_of_images_come_with_those_of_pictures_from_a_directory_or_a_function(tmp_path):
    path = str(save_dino(tmp_path / "dino"))
    images = NOISE.integers(0, 256, (3, 32, 32, 3)).astype(np.uint8)
    for index in range(2):
        (tmp_path / "real").mkdir(exist_ok=True)
        Image.fromarray(images[index]).save(tmp_path / "real" / f"{index}.png")
    none = np.zeros((3, 1), np.float32)
    group = RolloutGroup(0, Prompt(1, ""), (7, 8, 9), none, none, none, none, none, images, 0, "", 0.0)
    plain = VectorsReward(path).score_groups([group]).features
    read = VectorsReward(path, reference=str(tmp_path / "real")).score_groups([group]).features
    width = (plain.shape[1] - 1) // 2
    np.testing.assert_array_equal(read[:, :width], plain[:, :width])
    assert (plain[:, width:-1] == 0).all() and (plain[:, -1] == -1).all()
    assert read[:, -1].tolist() == [1, 0, 1], "image i of prompt 1 is number 3 + i, of two pictures"
    np.testing.assert_allclose(read[:, width:-1], plain[[1, 0, 1], :width], atol=1e-5)
    drawn = VectorsReward(path, reference="tests.evaluation.test_measures.grey").score_groups([group])
    assert drawn.features[:, -1].tolist() == [3, 4, 5] and drawn.valid.all()
    unlike = [p.text for p, _ in VectorsReward.check([Prompt(0, "fine"), Prompt(1, "odd")], path, f"{__name__}.grey")]
    assert unlike == ["odd"]
    (tmp_path / "none").mkdir()
    with pytest.raises(ConfigError, match="holds no pictures"):
        VectorsReward(path, reference=str(tmp_path / "none"))


def grey(prompt: Prompt, seed: int) -> np.ndarray:
    if prompt.text == "odd":
        raise ValueError("no picture of this")
    return np.full((32, 32, 3), 20 * (seed % 12), np.uint8)


@torch.no_grad()
def test_drift_is_the_divergence_of_all_logits_conditional_and_guided(model):
    config, params = PolicyConfig(path=str(model)), SamplingParams(guidance_scale=3.0, temperature=0.9)
    policy, reference = (load_policy(config, device=torch.device("cpu"), trainable=False) for _ in range(2))
    for parameter in policy.trained_parameters().values():
        parameter += 0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    prompts = [policy.codec.encode_prompt(text) for text in ("a photo of a red circle", "a photo of a ring")]
    tokens = torch.randint(policy.codebook_size, (2, policy.image_tokens), generator=torch.Generator().manual_seed(0))
    found = token_drift(policy, reference, prompts, tokens, params)
    logits = [
        [it.image_logits([getattr(p, side) for p in prompts], tokens) for side in ("conditional", "unconditional")]
        for it in (policy, reference)
    ]
    for first, pairs in (
        (0, [one[0] for one in logits]),
        (3, [(u + 3.0 * (c - u)) / 0.9 for c, u in logits]),
    ):
        p, q = (torch.distributions.Categorical(logits=one) for one in pairs)
        kl = torch.distributions.kl_divergence
        expected = torch.stack([kl(p, q), kl(q, p), p.entropy() - q.entropy()], dim=-1)
        torch.testing.assert_close(found[..., first : first + 3], expected, atol=2e-5, rtol=1e-4)
    assert token_drift(policy, reference, prompts, tokens, SamplingParams()).shape[-1] == 3, "nothing is guided"
    assert token_drift(reference, reference, prompts, tokens, params).abs().max() == 0
    rows = found.mean(1).numpy()
    names = list(drift_metrics({0: rows[:1], 1: rows[1:]}, {0: rows}))
    assert names[:3] == ["KL to the reference", "KL on reference images", "entropy drift"] and len(names) == 6


def test_a_mean_measures_any_scorer_under_its_name():
    scores = np.array([[0.5, 1.0], [0.25, np.nan]], np.float32)
    group = ScoredGroup(0, ("other", "fit"), scores, np.isfinite(scores), ({}, {}), 0.0)
    assert select(group, ["fit"]).scores.shape == (2, 1)
    config = MeasureConfig(measure="mean", scorer="clip", name="fit")
    found = measured([config], PROMPTS[:1], [group])
    assert found["fit"].value == 1.0 and found["fit"].images == 1 and found["fit"].better == "larger"


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (["featurs"], r"evaluation.measures.0 = 'featurs' is no known measure; did you mean 'features'"),
        (["mean"], r"evaluation.measures.0: mean needs a scorer; set evaluation.measures.0.scorer"),
        (["features", "features"], "the name 'features' is used twice"),
        (["stage_ray.evaluation.base.Benchmark"], "is no class that derives from"),
    ],
)
def test_a_wrong_measure_is_refused_by_its_key(config, said):
    with pytest.raises(ConfigError, match=said):
        resolve_measures([MeasureConfig(measure=name) for name in config])


def test_the_network_of_a_measure_is_pinned_to_a_commit_as_all_models_of_a_run_are(tmp_path):
    data = {"steps": 1, "prompts": {"train": "-", "heldout": "-"}, "policy": {"path": str(tmp_path)}}
    data |= {"rewards": [{"type": "tests.scorers.Bright"}], "evaluation": {"measures": ["features"]}}
    run, commits = pin(resolve_suites(validate_config(data)), {"facebook/dinov2-base": "0" * 40})
    assert run.evaluation.measures[0].options["path"].endswith("@" + "0" * 40)
    assert commits == {"facebook/dinov2-base": "0" * 40}


def test_what_a_measure_asks_is_written_out():
    clip = MeasureConfig(measure="mean", scorer="clip", name="fit", options={"path": "here"})
    found = resolve_measures([MeasureConfig(measure="features"), clip, MeasureConfig(measure="drift")])
    assert [(it.column, it.scorer) for it in found] == [("features", "vectors"), ("fit", "clip"), ("drift", None)]
    assert found[0].options["path"] == "facebook/dinov2-base", "so that fetch sees it"
    assert resolve_measures(found) == found
