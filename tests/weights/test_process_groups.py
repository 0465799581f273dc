"""Ranks meet on the network of the first one's address, whatever the machine's name leads to."""

from __future__ import annotations

import os
import socket
import subprocess
import sys

import psutil
import pytest

from stage_ray.weights.process_groups import keep_to_network_of

SETTINGS = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")
LISTENS = """
import sys, psutil, torch
from stage_ray.actors.client import free_address
from stage_ray.weights.process_groups import init_process_group
init_process_group(0, 1, free_address(sys.argv[1]), torch.device("cpu"), timeout_s=60)
print({c.laddr.ip for c in psutil.Process().net_connections() if c.status == psutil.CONN_LISTEN})
"""


def addresses() -> dict[str, str]:
    """This machine's IPv4 addresses and the interface of each."""
    found = psutil.net_if_addrs().items()
    return {item.address: name for name, items in found for item in items if item.family == socket.AF_INET}


@pytest.fixture
def nothing_set(monkeypatch):
    for name in SETTINGS:
        monkeypatch.setenv(name, "")  # so that it is as before after the test
        monkeypatch.delenv(name)


def test_each_of_the_machines_addresses_is_reached_over_an_interface_that_has_it(nothing_set, monkeypatch):
    found = addresses()
    assert "127.0.0.1" in found
    for address in found:  # a machine reaches its own address as itself
        keep_to_network_of(f"{address}:6000")
        assert address in {item.address for item in psutil.net_if_addrs()[os.environ["GLOO_SOCKET_IFNAME"]]}
        for name in SETTINGS:
            monkeypatch.delenv(name)


def test_gloo_and_nccl_are_told_unless_the_user_has_told_them(nothing_set, monkeypatch):
    loopback = addresses()["127.0.0.1"]
    keep_to_network_of("127.0.0.1:6000")
    assert [os.environ[name] for name in SETTINGS] == [loopback, f"={loopback}"]
    for name in SETTINGS:
        monkeypatch.setenv(name, "mine")
    keep_to_network_of("127.0.0.1:6000")
    assert [os.environ[name] for name in SETTINGS] == ["mine", "mine"]


@pytest.mark.slow
def test_ranks_that_meet_at_an_address_listen_there_and_nowhere_else(nothing_set):
    for address in addresses():
        done = subprocess.run([sys.executable, "-c", LISTENS, address], capture_output=True, text=True, timeout=100)
        assert done.stdout == f"{ {address} }\n", done.stderr
