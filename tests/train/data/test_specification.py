"""The grammar of dataset specifications: what is read, what is written, and where an error points."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dllm_train.data import Source, format_specification, parse_specification

names = st.text(
    st.characters(codec="utf-8", categories=["L", "N", "P", "S", "Zs"], include_characters="\t\n"), min_size=1
)
sources = st.builds(
    Source,
    name=names,
    configuration=st.none() | names,
    splits=st.lists(
        st.tuples(names, st.none() | st.integers(1, 10**9)), max_size=3, unique_by=lambda entry: entry[0]
    ).map(tuple),
    filters=st.lists(st.tuples(names, names), max_size=2).map(tuple),
    weight=st.just(1.0),
)
weights = st.floats(0, exclude_min=True, allow_infinity=False)


@given(st.lists(sources, min_size=1, max_size=3), st.data())
def test_what_is_written_is_read_back(parsed, data):
    if data.draw(st.booleans()):
        parsed = [Source(**{**vars(source), "weight": data.draw(weights)}) for source in parsed]
    else:
        parsed = [Source(**{**vars(source), "weight": None}) for source in parsed]
    assert parse_specification(format_specification(tuple(parsed))) == tuple(parsed)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a", [Source("a")]),
        ("org/name:python", [Source("org/name", "python")]),
        ("a[train:5_000, test:100]+b", [Source("a", splits=(("train", 5000), ("test", 100))), Source("b")]),
        ("0.7*a + .3 * b", [Source("a", weight=0.7), Source("b", weight=0.3)]),
        (
            ' 1.5 * "a" : c [ train : 5 , x : "y" ] + 2*b ',
            [Source("a", "c", (("train", 5),), (("x", "y"),), 1.5), Source("b", weight=2.0)],
        ),
        ("2*a[train]", [Source("a", splits=(("train", None),), weight=2.0)]),
        ("a[lang:python,train:3]", [Source("a", splits=(("train", 3),), filters=(("lang", "python"),))]),
        ('a[label:"3"]', [Source("a", filters=(("label", "3"),))]),
        ('"C:\\\\a+b \\"c\\".jsonl"', [Source('C:\\a+b "c".jsonl')]),
        ("2024.jsonl", [Source("2024.jsonl")]),
        ("  ./data/a-b_c.jsonl  ", [Source("./data/a-b_c.jsonl")]),
    ],
)
def test_specifications_mean(text, expected):
    assert parse_specification(text) == tuple(expected)


@pytest.mark.parametrize(
    ("text", "position", "expected"),
    [
        ("", 0, "the name of a dataset, found the end"),
        ("a++b", 2, r"the name of a dataset, found '\+'"),
        ("a b", 2, r"'\+' and another dataset, or the end, found 'b'"),
        ("a[train:5", 9, r"',' or '\]', found the end"),
        ("a[]", 2, r"a split or a field, found '\]'"),
        ("a[train:]", 8, "a count of rows, or the value of a field"),
        ("a[train:0]", 8, "a positive count of rows"),
        ("a[train:-5]", 8, "a positive count of rows"),
        ("a[train,train:2]", 8, "each split once; 'train' is there twice"),
        ("0*a+1*b", 0, "a positive weight"),
        ("-0.5*a", 0, "a positive weight"),
        ("0.5*a+b", 6, "a weight, since another dataset has one"),
        ("a:", 2, "the name of a configuration"),
        ('"a', 0, "the name of a dataset"),
        ('""', 0, "the name of a dataset"),
        ("a]", 1, r"'\+' and another dataset, or the end"),
    ],
)
def test_an_error_points_to_its_position(text, position, expected):
    with pytest.raises(ValueError, match=f"position {position}: expected {expected}") as raised:
        parse_specification(text)
    assert str(raised.value).splitlines()[-1] == " " * (position + 2) + "^"


def test_what_is_no_string_is_refused():
    with pytest.raises(TypeError, match="dataset is a list; expected a specification string"):
        parse_specification(["a"])
