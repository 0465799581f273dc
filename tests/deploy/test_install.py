"""What uv is told of pip's configuration, so that torch comes from where pip would take it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def exported(tmp_path: Path, config: str, **environment: str) -> dict[str, str]:
    """uv's variables after the script's lines, in an environment without any of pip's or uv's but these."""
    file = tmp_path / "pip.conf"
    file.write_text(config)
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PIP_", "UV_", "SSL_CERT"))}
    kept |= {"PIP_CONFIG_FILE": str(file), "XDG_CONFIG_DIRS": str(tmp_path), **environment}
    command = f'eval "$({sys.executable} {ROOT / "deploy/pip_settings.py"})"; env'
    printed = subprocess.run(["bash", "-c", command], env=kept, capture_output=True, text=True, check=True).stdout
    lines = (line.partition("=") for line in printed.splitlines())
    return {name: value for name, _, value in lines if name.startswith("UV_")}


def test_uv_takes_packages_from_where_pip_would(tmp_path):
    config = "[global]\nextra-index-url =\n  https://one.example\n  file:///two\nfind-links = /a /b\nconstraint = c.txt"
    assert (
        exported(tmp_path, config).items()
        >= {
            "UV_INDEX": "https://one.example file:///two",
            "UV_FIND_LINKS": "/a,/b",
            "UV_CONSTRAINT": "c.txt",
            "UV_INDEX_STRATEGY": "unsafe-best-match",
        }.items()
    )


def test_the_stronger_of_two_settings_wins_and_a_setting_of_uv_itself_above_all(tmp_path):
    config = "[install]\nindex-url = https://install.example\n[global]\nindex-url = https://global.example\ntimeout = 5"
    assert exported(tmp_path, config)["UV_DEFAULT_INDEX"] == "https://install.example"
    found = exported(tmp_path, config, PIP_INDEX_URL="https://env.example/a'b", UV_HTTP_TIMEOUT="7")
    assert (found["UV_DEFAULT_INDEX"], found["UV_HTTP_TIMEOUT"]) == ("https://env.example/a'b", "7")
