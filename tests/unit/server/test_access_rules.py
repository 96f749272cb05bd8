from __future__ import annotations

import ipaddress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kecho import OptionError, ServerConfig
from kecho.server.access import check_prefixes, parse_prefixes, rules_of

pytestmark = pytest.mark.python_only


@pytest.mark.parametrize(
    ("text", "canonical"),
    [
        ("10.0.0.0/8", ("10.0.0.0/8",)),
        ("127.0.0.1", ("127.0.0.1/32",)),
        ("::1, 10.0.0.0/8", ("::1/128", "10.0.0.0/8")),
        ("2001:DB8::/32", ("2001:db8::/32",)),
        ("::ffff:10.0.0.0/104", ("10.0.0.0/8",)),
        ("::ffff:1.2.3.4", ("1.2.3.4/32",)),
        ("0.0.0.0/0,0.0.0.0/0", ("0.0.0.0/0",)),
    ],
)
def test_prefixes_become_canonical(text: str, canonical: tuple[str, ...]) -> None:
    assert check_prefixes(parse_prefixes(text)) == canonical


@pytest.mark.parametrize(
    "text", ["", "localhost", "10.0.0.1/8", "10.0.0.0/33", "::/129", "1.2.3", "1.2.3.4/", "\0", "0"]
)
def test_what_is_no_prefix_is_refused(text: str) -> None:
    with pytest.raises(OptionError) as raised:
        ServerConfig(allow=(text,))
    assert raised.value.option == "allow"
    assert f"must be an address or prefix/length (got {text!r}" in raised.value.reason


def test_host_bits_are_named() -> None:
    with pytest.raises(OptionError, match="host bits"):
        ServerConfig(deny="10.0.0.1/8")


def test_a_prefix_cannot_be_both() -> None:
    with pytest.raises(
        OptionError, match=r"must not repeat a prefix of allow \(got 10\.0\.0\.0/8\)"
    ):
        ServerConfig(allow=["10.0.0.0/8"], deny=["::ffff:10.0.0.0/104"])


@pytest.mark.parametrize(
    ("allow", "deny"),
    [
        ("::/0", "0:0:0:0:0:0:0:0/0"),
        ("2001:db8::/32", "2001:0DB8:0::0/32"),
        ("::ffff:0:0/96", "0.0.0.0/0"),
        ("1.2.3.4", "::ffff:102:304/128"),
        ("10.0.0.0/8", "10.0.0.0/255.0.0.0"),
    ],
)
def test_a_prefix_cannot_be_both_however_it_is_written(allow: str, deny: str) -> None:
    for one, other in ((allow, deny), (deny, allow)):
        with pytest.raises(OptionError, match="must not repeat a prefix of allow") as raised:
            ServerConfig(allow=one, deny=other)
        assert raised.value.option == "deny"


def test_rules_are_compared_by_their_numbers() -> None:
    with pytest.raises(OptionError, match="must not repeat a prefix of allow"):
        rules_of(("192.0.2.1", "fe80::/64"), ("FE80:0::/64",))


@pytest.mark.parametrize("option", ["allow", "deny"])
@pytest.mark.parametrize(
    "text", ["fe80::1%eth0", "fe80::%eth0/64", "fe80::1%1", "2001:db8::1%x", "10.0.0.1%eth0", "%"]
)
def test_a_rule_for_one_link_is_refused(option: str, text: str) -> None:
    """It would hold for every link: fe80::1 of a hostile one would pass for that of a trusted."""
    with pytest.raises(OptionError) as raised:
        ServerConfig(**{option: ["10.0.0.0/8", text]})
    assert raised.value.option == option
    assert raised.value.reason.endswith(f"firewall (got {text!r})")


prefixes = st.one_of(
    st.tuples(st.integers(0, 2**32 - 1), st.integers(0, 32)).map(
        lambda one: str(ipaddress.ip_network((ipaddress.IPv4Address(one[0]), one[1]), strict=False))
    ),
    st.tuples(st.integers(0, 2**128 - 1), st.integers(0, 128)).map(
        lambda one: str(ipaddress.ip_network((ipaddress.IPv6Address(one[0]), one[1]), strict=False))
    ),
)


@given(st.lists(prefixes, max_size=20))
def test_the_most_specific_rule_comes_first(texts: list[str]) -> None:
    rules = rules_of(check_prefixes(texts), ())
    assert [(-length, prefix) for prefix, length, _ in rules] == sorted(
        (-length, prefix) for prefix, length, _ in rules
    )
    assert len(rules) == len(set(check_prefixes(texts)))
