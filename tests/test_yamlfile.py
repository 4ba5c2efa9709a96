import contextlib
import math
import os
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightslim.errors import CompressionError
from lightslim.yamlfile import dump, parse, read

SCALARS = {
    "true": True, "False": False, "no": "no", "off": "off", "yes": "yes", "y": "y",
    "1": 1, "-3": -3, "0": 0, "012": "012", "0o17": 15, "0x1F": 31, "1_000": "1_000", "1:30": "1:30",
    "9" * 19: "9" * 19,
    "1e-3": 1e-3, "1.": 1.0, ".5": 0.5, "-1.5E+2": -150.0, "-.inf": -math.inf, "012.5": 12.5, "1e": "1e", ".": ".",
    "~": None, "null": None, "": None, "none": "none", "2024-01-01": "2024-01-01", "=": "=",
    "'1'": "1", '"true"': "true", "!!str 1": "1", "conv*": "conv*", ".*_sep_weights": ".*_sep_weights",
}  # fmt: skip


@pytest.mark.parametrize(("text", "value"), SCALARS.items())
def test_scalars_are_those_of_yaml_1_2(text, value):
    found = parse(f"a: {text}", "x").tree["a"]
    assert (type(found), found) == (type(value), value)


def test_every_value_knows_its_line():
    document = parse("a:\n  b:\n    - 1\n    - {c: 2,\n       d: 3}\n", "x.yaml")
    assert {keys: place.line for keys, place in document.places.items()} == {
        (): None, ("a",): 1, ("a", "b"): 2, ("a", "b", 0): 3, ("a", "b", 1): 4,
        ("a", "b", 1, "c"): 4, ("a", "b", 1, "d"): 5,
    }  # fmt: skip
    assert str(document.where("a", "b", 7)) == "x.yaml:2: a.b.7"


def test_anchors_are_welcome_and_share_nothing():
    document = parse("a: &x [1, {b: 2}]\nc: *x\n", "x.yaml")
    assert document.tree["a"] == document.tree["c"] == [1, {"b": 2}]
    assert document.tree["a"] is not document.tree["c"]


BAD = {
    "duplicate key": ("a:\n  b: 1\n  c: 2\n  b: 3\n", "x:4: a.b: is given twice, first at x:2"),
    "merge": ("a: &a {b: 1}\nc:\n  <<: *a\n", "x:3: c: merge keys"),
    "list as key": ("a:\n  ? [b]\n  : 1\n", "x:2: a: a key must be text"),
    "truth as key": ("a:\n  true: 1\n", "x:2: a: a key must be text"),
    "python tag": (
        "a:\n  b: !!python/object/apply:os.system [ls]\n",
        "x:2: a.b: the tag !!python/object/apply:os.system",
    ),
    "own tag": ("a: !mine 3\n", "x:1: a: the tag !mine is not allowed"),
    "set": ("a: !!set {b}\n", "x:1: a: the tag !!set is not allowed"),
    "wrong tag": ("a: !!int b\n", "x:1: a: 'b' does not fit its tag"),
    "unquoted star": (
        "a:\n  *: l1_norm\n",
        "x:2: expected alphabetic or numeric character, but found ':' (while scanning",
    ),
    "unquoted glob": ("a: *_weights\n", "x:1: found undefined alias '_weights'; quote a name that begins with '*'"),
    "two documents": ("a: 1\n---\nb: 2\n", "x:2: but found another document (expected a single document"),
    "tab": ("a:\n\tb: 1\n", "x:2: found character '\\t' that cannot start any token"),
    "control character": ("a: 1\nb: \0\n", "x:2: the character 0x0 is not allowed"),
    "open bracket": ("a: [1,\n", "x:2: expected the node content"),
    "cycle": ("b: 1\na: &a [*a]\n", "x:2: an alias stands for something that holds it"),
    "depth": ("[" * 5000, "x:1: there are more than 50 levels"),
    "values": ("- a\n" * 60_000, "x:10000: there are more than 10,000 values"),
    "size": ("#" * 1_000_001, "x: is larger than 1,000,000 bytes"),
    "absurd escape": ('a: "\\UFFFFFFFF"', "x: is not valid YAML"),
}


@pytest.mark.parametrize(("text", "message"), BAD.values(), ids=BAD)
def test_what_is_more_than_plain_values_is_refused(text, message):
    started = time.perf_counter()
    with pytest.raises(CompressionError) as caught:
        parse(text, "x")
    assert str(caught.value).startswith(message)
    assert time.perf_counter() - started < 5


@pytest.mark.parametrize("width", [1, 10])
def test_a_bomb_of_aliases_costs_nothing(width):
    bomb = "a0: &a0 [x]\n" + "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * width)}]\n" for n in range(1, 100))
    started = time.perf_counter()
    with pytest.raises(CompressionError, match=r"x:\d+: there are more than (50 levels|10,000 values)"):
        parse(bomb, "x")
    assert time.perf_counter() - started < 1


def test_a_heading_may_stand_one_space_too_far_right_only_where_yaml_refuses_it():
    assert parse("a:\n  b: 1\n c: # c\n  d: 2\n", "x", headings=["c"]).tree == {"a": {"b": 1}, "c": {"d": 2}}
    assert parse("a:\n c:\n  d: 2\n", "x", headings=["c"]).tree == {"a": {"c": {"d": 2}}}
    for text, line in (
        ("a:\n  b: 1\n e:\n  d: 2\n", 3),
        ("a:\n  b: 1\n c: 3\n", 3),
        ("a:\n  b: 1\n c:\n d: 2\n e: [\n", 6),
    ):
        with pytest.raises(CompressionError, match=rf"x:{line}: expected"):
            parse(text, "x", headings=["c"])


FILES = {
    "empty": (b"", "is empty"),
    "comment": (b"# nothing\n", "is empty"),
    "null": (b"---\n", "is empty"),
    "latin": ("a: 1\nb: é\n".encode("latin-1"), ":2: is not UTF-8 text"),
    "utf-16": ("a: 1".encode("utf-16"), ":1: is not UTF-8 text"),
    "large": (b"a: 1\n" + b"#" * 1_000_000, "is larger than"),
}


@pytest.mark.parametrize(("content", "message"), FILES.values(), ids=FILES)
def test_a_bad_file_is_refused(tmp_path, content, message):
    path = tmp_path / "x.yaml"
    path.write_bytes(content)
    with pytest.raises(CompressionError, match=message) as caught:
        read(path)
    assert str(caught.value).startswith(str(path))


def test_what_is_no_file_is_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "nowhere", tmp_path, tmp_path / "pipe", "a\0b", "x" * 5000):
        with pytest.raises(CompressionError, match="cannot be read"):
            read(path)


def test_a_byte_order_mark_is_no_part_of_the_text(tmp_path):
    (tmp_path / "x.yaml").write_bytes(b"\xef\xbb\xbfa: 1\r\nb: 2\r\n")
    assert read(tmp_path / "x.yaml").tree == {"a": 1, "b": 2}


PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**17), 10**17) | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4).filter("<<".__ne__), inner, max_size=4)
    ),
    max_leaves=8,
)


@given(PLAIN)
def test_what_is_dumped_reads_back_the_same(tree):
    assert parse(dump(tree), "x").tree == tree


@given(st.text(alphabet="ab*&!:-,[]{}'\"|>%#?\n \t0.e~<\\Uf\x85\ufeff", max_size=40))
def test_any_text_is_read_or_refused(text):
    with contextlib.suppress(CompressionError):
        parse(text, "x", headings=["a", "b"])
