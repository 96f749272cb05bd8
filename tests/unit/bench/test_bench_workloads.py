"""Workloads: what makes no sense is refused, and what is made of the rest."""

from __future__ import annotations

import ipaddress
import socket
from dataclasses import fields
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kecho import OptionError
from kecho.bench import Result, Workload
from kecho.bench.crew import shares_of
from kecho.bench.sources import bindable
from kecho.options import option_of
from support.faultless_run import result

pytestmark = pytest.mark.python_only


@pytest.mark.parametrize(
    ("options", "option"),
    [
        ({"mode": "open"}, "rate"),
        ({"rate": 5.0}, "rate"),
        ({"depth": 5}, "depth"),
        ({"mode": "closed", "rounds": 5}, "rounds"),
        ({"mode": "open", "rate": 0}, "rate"),
        ({"mode": "open", "rate": True}, "rate"),
        ({"host": ""}, "host"),
        ({"port": 0}, "port"),
        ({"source": ("1.2.3.4/40",)}, "source"),
        ({"uds": "/x", "source": ("127.0.0.1",)}, "source"),
        ({"close": "slam"}, "close"),
        ({"timeout": 0.0}, "timeout"),
        ({"cpus": (-1,)}, "cpus"),
        ({"cpus": (8192,)}, "cpus"),
        ({"cpus": (True,)}, "cpus"),
        ({"cpus": 1}, "cpus"),
    ],
)
def test_a_workload_that_makes_no_sense_names_its_option(
    options: dict[str, Any], option: str
) -> None:
    with pytest.raises(OptionError) as caught:
        Workload(**options)
    assert caught.value.option == option


def parse_cpus(text: str) -> Any:
    (described,) = (one for one in fields(Workload) if one.name == "cpus")
    return option_of(described).parse(text)


def test_cpus_are_numbers_and_ranges() -> None:
    assert parse_cpus("3") == (3,)
    assert parse_cpus("0,2-4,2") == (0, 2, 3, 4, 2)


@pytest.mark.parametrize("text", ["", "x", "1,", "-1", "3-1", "1-2-3", "0-9999999999", "²"])
def test_what_names_no_cpu_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"^[^\n]+$"):
        parse_cpus(text)


def test_a_result_from_before_there_were_cpus_is_read() -> None:
    data = result().to_dict()
    del data["workload"]["cpus"]
    assert Result.from_dict(data) == result()


@given(st.integers(1, 5000), st.integers(1, 64), st.integers(1, 16))
def test_every_connection_is_somebodys_share(
    connections: int, threads: int, processes: int
) -> None:
    workload = Workload(
        mode="closed", connections=connections, threads=threads, processes=processes
    )
    groups = shares_of(workload)
    assert len(groups) == workload.processes
    assert all(groups)
    shares = [share for group in groups for share in group]
    numbers = [
        number
        for share in shares
        for number in range(share.first_number, share.first_number + share.connections)
    ]
    assert numbers == list(range(connections))
    sizes = [share.connections for share in shares]
    assert max(sizes) - min(sizes) <= 1
    assert [share.index for share in shares] == list(range(shares[0].total))


def test_sources_are_the_hosts_of_a_prefix_in_turn() -> None:
    workload = Workload(connections=5, source=("127.0.0.0/8",))
    hosts = [str(one) for one in workload.source_addresses()]
    assert hosts == [f"127.0.0.{n}" for n in range(1, 6)]
    two = Workload(connections=4, source=("127.0.0.0/8", "10.0.0.0/8", "127.0.0.0/8"))
    hosts = [str(one) for one in two.source_addresses()]
    assert hosts == ["127.0.0.1", "10.0.0.1", "127.0.0.2", "10.0.0.2"]
    assert len(Workload(connections=10**6, source=("fd00::/8",)).source_addresses()) == 4096


@pytest.mark.parametrize("text", ["fe80::1", "fe80::/64", "fe80::1%", "::1%lo", "fe80::/64%lo"])
def test_a_link_local_source_names_its_link(text: str) -> None:
    with pytest.raises(OptionError):
        Workload(source=(text,))
    (address,) = Workload(source=("fe80::1%lo",)).source_addresses()
    assert bindable(address) == ("fe80::1", 0, 0, socket.if_nametoindex("lo"))


def test_a_link_is_known_by_its_name_and_then_by_its_number() -> None:
    assert bindable(ipaddress.ip_address("fe80::1%77")) == ("fe80::1", 0, 0, 77)
    with pytest.raises(OSError, match="there is no link 'nowhere0'"):
        bindable(ipaddress.ip_address("fe80::1%nowhere0"))
