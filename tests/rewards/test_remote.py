"""Scorers that ask services: real servers on this machine, and the real clients."""

from __future__ import annotations

import math
import re
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from stage_ray.config import RewardConfig
from stage_ray.errors import ConfigError
from stage_ray.records import Prompt
from stage_ray.rewards import build_rewards, check_rewards, score_groups
from stage_ray.rewards.base import ServiceUnavailableError
from tests.pages import ROOT
from tests.rewards.services import brightness, chat, service
from tests.rewards.test_scoring import group

LEVELS = (0, 51, 204)
IMAGES = np.stack([np.full((8, 8, 3), level, np.uint8) for level in LEVELS])
PROMPTS = [Prompt(0, "a ring", {"tag": "x"}), Prompt(1, "nothing"), Prompt(2, "a dog")]


def built(kind: str, **options):
    config = RewardConfig(type=kind, options=options)
    assert check_rewards([config], PROMPTS) == []
    return build_rewards([config])[0][1]


def level(image: np.ndarray) -> int:
    assert image.shape == (8, 8, 3) and image.min() == image.max()  # PNG: no pixel has changed
    return int(image[0, 0, 0])


def test_an_http_scorer_gets_png_and_records_and_null_is_no_score():
    seen = []

    def answer(request):
        seen.append(request)
        return brightness(request)

    with service(answer) as url:
        output = built("http", url=f"{url}/score", batch_size=2).score(IMAGES, PROMPTS)
    np.testing.assert_allclose(output.scores, [0, np.nan, 0.8], atol=1e-6)
    assert output.valid.tolist() == [True, False, True] and [len(request["images"]) for request in seen] == [2, 1]
    assert seen[0]["prompts"][0] == {"tag": "x", "prompt": "a ring"} and seen[0]["path"] == "/score"


def test_the_server_of_the_readme_serves(tmp_path: Path):
    page = (ROOT / "stage_ray" / "rewards" / "README.md").read_text()
    (server,) = [block for block in re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL) if "do_POST" in block]
    (tmp_path / "server.py").write_text(server)
    command = [sys.executable, str(tmp_path / "server.py"), "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            url = process.stdout.readline().split()[-1]
            np.testing.assert_allclose(built("http", url=url).score(IMAGES, PROMPTS).scores, [0, 0.2, 0.8], atol=1e-6)
        finally:
            process.kill()


def test_details_and_features_of_an_http_scorer_come_along():
    answer = {"scores": [1, 2, 3], "details": [{"verdict": True}, {}, {}], "features": [[0, 1], [1, 0], [1, 1]]}
    with service(lambda request: (200, answer)) as url:
        output = built("http", url=url).score(IMAGES, PROMPTS)
    assert output.details[0] == {"verdict": True} and output.features.tolist() == answer["features"]


def test_a_busy_service_is_asked_again_and_a_wrong_answer_is_not():
    asked = []

    def answer(request):
        asked.append(1)
        return (503, {}) if len(asked) < 3 else brightness(request)

    with service(answer) as url:
        assert built("http", url=url).score(IMAGES, PROMPTS).valid[0]
    assert len(asked) == 3
    asked.clear()

    def wrong(request):
        asked.append(1)
        return 400, {}

    with service(wrong) as url, pytest.raises(Exception, match="400 Bad Request"):
        built("http", url=url).score(IMAGES, PROMPTS)
    assert len(asked) == 1
    with service(lambda request: (200, {"scores": [1.0]})) as url, pytest.raises(ValueError, match="1 scores for 3"):
        built("http", url=url).score(IMAGES, PROMPTS)


@pytest.mark.parametrize(("kind", "path"), [("http", ""), ("vlm_judge", "/v1")])
def test_a_service_that_is_down_is_said_to_be_and_gives_no_score(kind, path):
    with service(brightness) as url:
        pass  # its port is free again
    options = {"url": url + path} | ({"tries": 1} if kind == "http" else {"model": "m", "retries": 0})
    scorer = built(kind, **options)
    with pytest.raises(ServiceUnavailableError, match=f"{re.escape(url)}.* does not answer"):
        scorer.score(IMAGES, PROMPTS)
    (scored,) = score_groups([(kind, scorer)], [group(0, 3)])
    assert not scored.valid.any() and scored.details[0][kind]["error"].startswith("service unavailable: http://")


def test_points_are_read_from_the_last_line_and_brought_to_0_to_1():
    words = {
        0: "Poor. Final Score: 1",
        51: "The prompt wants a Final Score: 5, but it is empty.\nFinal Score: 3.5",
        204: "I cannot say.",
    }
    with service(chat(lambda images, question: words[level(images[0])])) as url:
        output = built("vlm_judge", model="m", url=f"{url}/v1").score(IMAGES, PROMPTS)
    np.testing.assert_allclose(output.scores, [0, 0.625, np.nan])
    assert output.details[2] == {"said": "I cannot say.", "error": "the judge's answer holds no points"}
    with service(chat(lambda images, question: "Final Score: 7")) as url:
        output = built("vlm_judge", model="m", url=f"{url}/v1").score(IMAGES, PROMPTS)
    assert not output.valid.any() and output.details[0]["error"] == "7 points are not in 1..5"


def test_yes_is_a_share_of_probabilities():
    said = {"Yes": math.log(0.3), "yes": math.log(0.15), "No": math.log(0.05), "Maybe": math.log(0.5)}
    asked = []

    def say(images, question):
        asked.append(question)
        return said if level(images[0]) else {"Maybe": -0.1}

    with service(chat(say)) as url:
        options = {"url": f"{url}/v1", "mode": "yes_no", "at_once": 1, "question": "Is this {prompt}?"}
        output = built("vlm_judge", model="m", **options).score(IMAGES, PROMPTS)
    np.testing.assert_allclose(output.scores, [np.nan, 0.9, 0.9], rtol=1e-5)
    assert asked == ["Is this a ring?", "Is this nothing?", "Is this a dog?"]


def test_what_was_asked_before_is_not_asked_again(tmp_path: Path):
    asked = []

    def say(images, question):
        asked.append(question)
        return "Final Score: 4"

    with service(chat(say)) as url:
        for _ in range(2):
            built("vlm_judge", model="m", url=f"{url}/v1", cache=str(tmp_path)).score(IMAGES, PROMPTS)
    assert len(asked) == 3 and len(list(tmp_path.glob("*.json"))) == 3


def test_no_more_requests_than_the_limit_are_under_way():
    lock, most, now = threading.Lock(), [0], [0]
    both = threading.Barrier(2, timeout=60)  # two are under way at once

    def say(images, question):
        with lock:
            now[0] += 1
            most[0] = max(most[0], now[0])
        both.wait()
        with lock:
            now[0] -= 1
        return "Final Score: 4"

    with service(chat(say)) as url:
        scorer = built("vlm_judge", model="m", url=f"{url}/v1", at_once=2)
        scorer.score(np.concatenate([IMAGES, IMAGES[:1]]), [*PROMPTS, PROMPTS[0]])
    assert most[0] == 2


def test_a_pair_is_asked_in_both_orders_and_a_liking_for_the_first_is_a_tie():
    def brighter(images, question):
        a, b = (level(image) for image in images)
        return f"... Image {1 if a > b else 2} is better."

    groups = [group(0, 3)]
    groups[0].images[:] = IMAGES[:, :4, :4]
    for say, scores in (
        (brighter, [0, 0.5, 1]),
        (lambda images, question: "Image 1 is better.", [0.5, 0.5, 0.5]),
        (lambda images, question: "Both images are equally good.", [0.5, 0.5, 0.5]),
    ):
        with service(
            chat(lambda images, question, say=say: say([np.tile(i, (2, 2, 1)) for i in images], question))
        ) as url:
            options = {"model": "m", "url": f"{url}/v1"}
            output = built("win_rate", scorer="vlm_pairs", options=options).score_groups(groups)
        assert output.scores.tolist() == scores


@pytest.mark.parametrize(
    ("kind", "options", "sentence"),
    [
        ("http", {"url": "localhost:80"}, "url = 'localhost:80' is no address"),
        ("vlm_judge", {"model": "m", "url": "x"}, "is no address"),
        ("vlm_judge", {"model": "m", "question": "Good?"}, "has no {prompt}"),
        ("vlm_judge", {"model": "m", "pattern": "("}, "is no regular expression"),
        ("vlm_judge", {"model": "m", "pattern": "[0-9]+"}, "has 0 groups, not one"),
        ("vlm_judge", {}, "model is missing"),
        ("vlm_pairs", {"model": "m"}, "is not a class with a method score"),
    ],
)
def test_wrong_options_are_refused_before_the_start(kind, options, sentence):
    with pytest.raises(ConfigError, match=re.escape(sentence)):
        check_rewards([RewardConfig(type=kind, options=options)], PROMPTS)


def test_a_key_is_named_and_never_written(monkeypatch):
    monkeypatch.delenv("JUDGE_KEY", raising=False)
    with pytest.raises(ConfigError, match="the environment variable JUDGE_KEY is not set here"):
        build_rewards([RewardConfig(type="http", options={"url": "http://127.0.0.1:1", "api_key_env": "JUDGE_KEY"})])
