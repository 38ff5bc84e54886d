"""What a JSON Schema says of a value, held against the `jsonschema` package, and the JSON in an answer's text."""

import json
import os
import signal
import threading
from typing import Any, Dict, List

import pytest

import clinvk
from conftest import alive, children_of, eventually

NULL = {"type": "null"}
OBJECT = {"type": "object", "additionalProperties": False}


def is_valid(value: Any, schema: Any) -> bool:
    assert clinvk.schema_faults(schema) == []
    return clinvk.value_faults(value, schema) == []


# ---- What is valid

@pytest.mark.parametrize("schema, right, wrong", [
    (True, [1, None], []),
    (False, [], [1, None]),
    ({}, [1, {"a": []}], []),
    ({"unheard-of": 1, "nullable": True, "contentEncoding": "base64"}, [1, "%"], []),
    ({"type": "integer"}, [1, 1.0, -3, 1e300], [1.5, True, "1", None, []]),
    ({"type": "number"}, [1, 1.5], [False, "1"]),
    ({"type": "boolean"}, [True], [1, 0, "true"]),
    ({"type": ["string", "null"]}, ["", None], [0, {}]),
    ({"type": "array"}, [[]], [{}]),
    ({"enum": [1, "a", None, [True]]}, [1, 1.0, "a", None, [True]], [True, "b", [1], False]),
    ({"const": {"a": [0, False]}}, [{"a": [0.0, False]}], [{"a": [False, 0]}, {"a": [0, False], "b": 1}]),
    ({"minLength": 2, "maxLength": 2.0}, ["ab", "\U0001f600\U0001f600", 3], ["a", "abc"]),
    ({"pattern": "b"}, ["abc", 3], ["ac"]),
    ({"pattern": "^a[$]?\\$$"}, ["a$", "a$$"], ["a$\n", "a"]),  # Python's own $ would take the newline
    ({"minimum": 1, "maximum": 2}, [1, 1.5, 2, "0"], [0.9, 3]),
    ({"exclusiveMinimum": 1, "exclusiveMaximum": 2}, [1.5], [1, 2]),
    ({"multipleOf": 0.1}, [0.3, 1, 1e300], [0.35]),
    ({"multipleOf": 1e-8}, [12345.12345678], [0.5e-8]),
    ({"minItems": 1, "maxItems": 2}, [[1], [1, 2], "abc"], [[], [1, 2, 3]]),
    ({"uniqueItems": True}, [[1, True, "1", [1]], [{"a": 1}, {"a": True}]], [[1, 1.0], [{"a": 1, "b": 2},
                                                                                        {"b": 2, "a": 1.0}]]),
    ({"uniqueItems": False}, [[1, 1]], []),
    ({"minProperties": 1, "maxProperties": 1}, [{"a": 1}], [{}, {"a": 1, "b": 2}]),
    ({"required": ["a"]}, [{"a": None}, []], [{}, {"b": 1}]),
    ({"properties": {"a": {"type": "null"}}}, [{"a": None}, {"b": 1}, "a"], [{"a": 1}]),
    ({"patternProperties": {"^x": NULL}, "properties": {"a": {}}, "additionalProperties": {"type": "integer"}},
     [{"x": None, "a": "b", "c": 1}], [{"x": 1}, {"c": "d"}]),
    ({"propertyNames": {"maxLength": 1}}, [{"a": 1}], [{"ab": 1}]),
    ({"dependentRequired": {"a": ["b"]}}, [{"a": 1, "b": 2}, {"c": 3}], [{"a": 1}]),
    ({"dependentSchemas": {"a": {"required": ["b"]}}}, [{"a": 1, "b": 2}, {}], [{"a": 1}]),
    ({"dependencies": {"a": ["b"], "c": {"required": ["d"]}}}, [{"a": 1, "b": 2}, {"c": 1, "d": 2}],
     [{"a": 1}, {"c": 1}]),
    ({"prefixItems": [{"type": "null"}], "items": {"type": "integer"}}, [[], [None], [None, 1]], [[1], [None, "a"]]),
    ({"items": [{"type": "null"}], "additionalItems": False}, [[], [None]], [[1], [None, 1]]),
    ({"items": [{"type": "null"}]}, [[None, 1]], [[1]]),
    ({"additionalItems": False}, [[1]], []),
    ({"contains": {"const": 1}, "minContains": 2, "maxContains": 3}, [[1, 1], [1, 2, 1, 1]], [[1], [1, 1, 1, 1]]),
    ({"contains": {"const": 1}}, [[2, 1]], [[], [2]]),
    ({"allOf": [{"minimum": 1}, {"maximum": 2}]}, [1], [0, 3]),
    ({"anyOf": [{"minimum": 2}, {"type": "integer"}]}, [1, 2.5], [1.5]),
    ({"oneOf": [{"minimum": 2}, {"type": "integer"}]}, [1, 2.5], [1.5, 3]),
    ({"not": {"type": "integer"}}, [1.5], [1]),
    ({"if": {"minimum": 5}, "then": {"multipleOf": 5}, "else": {"multipleOf": 2}}, [10, 4], [6, 3]),
    ({"if": False, "then": False}, [1], []),
    ({"then": False, "else": False, "minContains": 5}, [1, []], []),
    ({"properties": {"a": {}}, "anyOf": [{"properties": {"b": {}}, "required": ["b"]}, {}],
      "unevaluatedProperties": False}, [{"a": 1}, {"a": 1, "b": 2}], [{"c": 1}]),
    ({"not": {"properties": {"a": False}}, "unevaluatedProperties": False}, [], [{"a": 1}]),
    ({"if": {"required": ["a"], "properties": {"a": {}}}, "unevaluatedProperties": NULL}, [{"a": 1, "b": None}],
     [{"b": 1}]),
    ({"prefixItems": [{}], "contains": {"const": 7}, "unevaluatedItems": False}, [[1, 7], [7]], [[1], [1, 7, 2]]),
    ({"$ref": "#/$defs/a~1b%25", "minimum": 1, "$defs": {"a/b%": {"maximum": 2}}}, [1, 2], [0, 3]),
    ({"properties": {"next": {"$ref": "#"}, "n": {"type": "integer"}}}, [{"next": {"next": {"n": 1}}}],
     [{"next": {"next": {"n": "1"}}}]),
    ({"$id": "http://x/y", "items": {"$ref": "http://x/y#leaf"}, "definitions": {"l": {"$anchor": "leaf", **NULL}}},
     [[None]], [[1]]),
    ({"items": {"$ref": "#leaf"}, "definitions": {"l": {"$id": "#leaf", "type": "null"}}}, [[None]], [[1]]),
    ({"items": {"$dynamicRef": "#t"}, "$dynamicAnchor": "t", "type": ["array", "null"]}, [[[None]]], [[[1]]]),
    ({"items": {"$recursiveRef": "#"}, "type": "array"}, [[[]]], [[1]]),
    ({"$ref": "#/parts/0/a", "parts": [{"a": {"type": "null"}}]}, [None], [1]),
    ({"properties": {"$ref": {"type": "null"}}, "const": {"$ref": None}}, [{"$ref": None}], [{"$ref": 1}]),
])
def test_values_are_valid_or_not(schema: Any, right: List[Any], wrong: List[Any]) -> None:
    assert ([value for value in right if not is_valid(value, schema)],
            [value for value in wrong if is_valid(value, schema)]) == ([], [])


@pytest.mark.parametrize("name, right, wrong", [
    ("date", ["2024-02-29"], ["2023-02-29", "2024-2-29", "20240229", "2024-02-29Z", "\u09e8024-02-29", "2024-02-29\n"]),
    ("time", ["08:30:06Z", "08:30:06.25+01:00", "23:59:60Z"], ["08:30:06", "24:00:00Z", "8:30:06Z", "22:59:60Z",
                                                               "08:30:06+1:00"]),
    ("date-time", ["1985-04-12T23:20:50.52Z", "1985-04-12t23:20:50-08:00"],
     ["1985-04-12", "1985-04-31T23:20:50Z", "1985-04-12T23:20:50", "1985-04-12 23:20:50Z"]),
    ("duration", ["P1Y2M3DT4H5M6S", "PT36H", "P2W"], ["P", "PT", "P1", "1D", "P1YT", "P1Y2W", "PT1D", "P1D\n"]),
    ("email", ["a.b+c@example.com", "a@b", '"a b"@example.com'],
     ["a", "a@", "@b", "a@b@c", "a..b@c", "a b@c", "a@-b", "é@b"]),
    ("hostname", ["example.com", "a-1", "x" * 63], ["", "-a", "a-", "a..b", "a_b", "x" * 64, ".".join(["x" * 60] * 5)]),
    ("ipv4", ["127.0.0.1"], ["127.0.0", "256.0.0.1", "::1", "127.0.0.1/8"]),
    ("ipv6", ["::1", "::ffff:1.2.3.4"], ["127.0.0.1", "1::2::3", "fe80::1%eth0", "[::1]"]),
    ("uuid", ["2EB8AA08-aa98-11ea-b4aa-73b441d16380"], ["2eb8aa08aa9811eab4aa73b441d16380", "{}", "x"]),
    ("uri", ["https://a.b/c?d=%20#e", "mailto:a@b", "urn:x:y"], ["a.b", "/c", "http://a b", "http://a/%2", "1a:b"]),
    ("idn-email", ["anything"], []),
])
def test_formats(name: str, right: List[str], wrong: List[str]) -> None:
    assert ([text for text in [*right, 3] if not is_valid(text, {"format": name})],
            [text for text in wrong if is_valid(text, {"format": name})]) == ([], [])


# ---- What the faults say

PEOPLE = {"type": "object", "properties": {"people": {"items": {
    "properties": {"age": {"type": "integer"}, "e-mail": {"type": "string"}}, "required": ["age"]}}}}
UNION = {"anyOf": [{"type": "null"}, {**OBJECT, "properties": {"kind": {"const": "a"}, "n": {"type": "integer"}}},
                   {**OBJECT, "properties": {"kind": {"const": "b"}, "s": {"type": "string"}}}]}


@pytest.mark.parametrize("schema, value, faults", [
    (PEOPLE, {"people": [{"age": "4"}]}, ["$.people[0].age: must be integer, not string"]),
    (PEOPLE, {"people": [{"age": 1}, {"e-mail": 2}]},
     ["$.people[1].age: is required", "$.people[1].e-mail: must be string, not integer"]),
    ({"additionalProperties": False}, {"two words": 1}, ['$["two words"]: must not be there']),
    ({"type": ["integer", "null"]}, 1.5, ["$: must be integer or null, not number"]),
    ({"enum": ["é", 1]}, 2, ['$: must be one of ["é", 1]']),
    ({"minLength": 3}, "a", ["$: must have at least 3 characters"]),
    ({"pattern": "^{a}"}, "a", ['$: must match the pattern "^{a}"']),
    ({"propertyNames": {"maxLength": 1}}, {"ab": 1}, ["$.ab: its name must have at most 1 characters"]),
    ({"contains": {"const": 1}}, [2], ["$: must have at least 1 items that fit `contains`, has 0"]),
    ({"anyOf": [NULL, {"type": "string"}]}, 1, ["$: must be null, not integer, or must be string, not integer"]),
    (UNION, {"kind": "b", "s": 1}, ["$.s: must be string, not integer"]),  # told of the one that is meant
    ({"oneOf": [{}, {}]}, 1, ["$: must fit exactly one of the schemas of oneOf, fits 2"]),
    ({"items": {"type": "null"}}, [1] * 50, [f"$[{index}]: must be null, not integer" for index in range(10)]),
])
def test_a_fault_says_where_and_what(schema: Any, value: Any, faults: List[str]) -> None:
    assert is_valid(value, True) and clinvk.schema_faults(schema) == []
    assert clinvk.value_faults(value, schema) == faults


def test_a_long_enum_is_not_told_whole() -> None:
    [fault] = clinvk.value_faults("x", {"enum": list(range(1000))})
    assert len(fault) < 300


# ---- Schemas that can not be checked

@pytest.mark.parametrize("schema, at", [
    (None, "$"), ([], "$"), ("object", "$"), ({"type": "strng"}, "$.type"), ({"type": []}, "$.type"),
    ({"type": [["string"]]}, "$.type"), ({"properties": []}, "$.properties"),
    ({"properties": {"a": 1}}, "$.properties.a"), ({"properties": {"a": ["b"]}}, "$.properties.a"),
    ({"items": {"pattern": "("}}, "$.items.pattern"), ({"pattern": "a{99999999999}"}, "$.pattern"),
    ({"patternProperties": {"(": {}}}, "$.patternProperties"), ({"minLength": 1.5}, "$.minLength"),
    ({"minItems": -1}, "$.minItems"), ({"maxContains": True}, "$.maxContains"), ({"minimum": "1"}, "$.minimum"),
    ({"maximum": float("inf")}, "$.maximum"), ({"exclusiveMinimum": True}, "$.exclusiveMinimum"),
    ({"multipleOf": 0}, "$.multipleOf"), ({"uniqueItems": 1}, "$.uniqueItems"), ({"required": True}, "$.required"),
    ({"required": [1]}, "$.required"), ({"enum": "a"}, "$.enum"), ({"format": 1}, "$.format"),
    ({"allOf": {}}, "$.allOf"), ({"anyOf": []}, "$.anyOf"), ({"oneOf": [1]}, "$.oneOf[0]"), ({"not": [{}]}, "$.not"),
    ({"items": 1}, "$.items"), ({"additionalProperties": None}, "$.additionalProperties"),
    ({"additionalProperties": [{}]}, "$.additionalProperties"), ({"prefixItems": {}}, "$.prefixItems"),
    ({"dependentRequired": {"a": "b"}}, "$.dependentRequired"), ({"dependencies": {"a": [1]}}, "$.dependencies"),
    ({"$ref": 1}, "$.$ref"), ({"$ref": "#/$defs/a"}, "$.$ref"), ({"$ref": "#/enum", "enum": []}, "$.$ref"),
    ({"$ref": "#nowhere"}, "$.$ref"), ({"$ref": "other.json"}, "$.$ref"),
    ({"$ref": "#/allOf/-1", "allOf": [{}]}, "$.$ref"), ({"$ref": "http://x/y#/a", "$id": "http://x/z"}, "$.$ref"),
    ({"items": {"$id": "inner"}}, "$.items.$id"),
    ({"$ref": "#/far", "far": {"items": {"type": "strng"}}}, "$.$ref.items.type"),
    ({"$ref": "#"}, "$"), ({"allOf": [{"not": {"$ref": "#"}}]}, "$"),
    ({"properties": {"a": {"if": {"$ref": "#/$defs/b"}}}, "$defs": {"b": {"anyOf": [{}, {"$ref": "#/$defs/b"}]}}},
     "$.$defs.b"),
])
def test_a_schema_that_can_not_be_checked_is_refused(schema: Any, at: str) -> None:
    faults = clinvk.schema_faults(schema)
    assert [fault.split(": ")[0] for fault in faults] == [at]


def test_every_fault_of_a_schema_is_told() -> None:
    assert clinvk.schema_faults({"type": "strng", "properties": {"a": {"minimum": ""}, "b": 1}}) == [
        "$.type: must be one of array, boolean, integer, null, number, object, string, or a list of these",
        "$.properties.a.minimum: must be a number", "$.properties.b: must be a schema: an object, or true or false"]


# ---- What is nested deep

def nested(levels: int) -> Any:
    value: Any = None
    for _ in range(levels):
        value = {"next": value}
    return value


TREE = {"properties": {"next": {"anyOf": [{"$ref": "#"}, {"type": "null"}]}}}


def test_a_value_that_is_nested_deep_is_a_fault_and_no_crash() -> None:
    assert is_valid(nested(80), TREE)
    assert clinvk.value_faults(nested(5000), TREE) == ["$: is nested too deep to be checked"]
    assert clinvk.value_faults([nested(5000)] * 2, {"uniqueItems": True}) == ["$: is nested too deep to be checked"]


def test_a_schema_that_is_nested_deep_is_a_fault_and_no_crash() -> None:
    schema: Dict[str, Any] = {}
    for _ in range(5000):
        schema = {"allOf": [schema]}
    assert clinvk.schema_faults(schema) == []
    assert clinvk.value_faults(1, schema) == ["$: is nested too deep to be checked"]


def test_a_union_that_refers_to_itself_twice_is_checked_once_per_level() -> None:
    shape = {"properties": {"next": {"$ref": "#"}}}
    schema = {"anyOf": [NULL, {**shape, "required": ["a"]}, {**shape, "required": ["next"]}]}
    assert is_valid(nested(30), schema)  # else a thousand million looks


@pytest.mark.filterwarnings("ignore::FutureWarning")  # Python's, of what sets may mean one day
def test_a_pattern_without_an_end_is_refused_at_once() -> None:
    for pattern in ("[" * 100_000, "[^" * 100_000, "\\[" * 50_000 + "["):
        [fault] = clinvk.schema_faults({"pattern": pattern})
        assert fault == "$.pattern: must be a regular expression that Python knows"
    assert clinvk.value_faults("a$", {"pattern": r"[$\]]$"}) == []


FOR_EVER = {"items": {"pattern": "^(a+)+$"}}


def test_a_pattern_that_takes_for_ever_is_a_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clinvk.Searches, "SECS", 1.0)
    before = children_of(os.getpid())
    assert clinvk.value_faults(["aa", "a" * 28 + "!"], FOR_EVER) == [
        "$: looking for the patterns of the schema takes more than 1 s"]
    assert not alive([pid for pid in children_of(os.getpid()) if pid not in before])


def test_a_pattern_that_takes_long_stops_nobody_else(monkeypatch: pytest.MonkeyPatch) -> None:
    """A search in our own process would keep this thread waiting until it ends."""
    monkeypatch.setattr(clinvk.Searches, "SECS", 600.0)
    found: List[Any] = []
    before = children_of(os.getpid())
    asking = threading.Thread(target=lambda: found.append(clinvk.value_faults("a" * 28 + "!", FOR_EVER["items"])))
    asking.start()
    [search] = eventually(lambda: alive([pid for pid in children_of(os.getpid()) if pid not in before]))
    assert asking.is_alive()
    os.kill(search, signal.SIGKILL)
    asking.join()
    assert found == [["$: looking for the patterns of the schema takes more than 600 s"]]


@pytest.mark.parametrize("pattern, right, wrong", [
    ("^(a|b)+$", ["ab", "a" * 20_000], ["", "ac", "a\n"]),
    (r"^[\w.]+@(\w+\.)+\w+$", ["\u00e4@b.c"], ["a@b", "a@\ud800.c"]),
    ("a", ["b" * 20_000 + "a"], ["b" * 20_000])])
def test_a_pattern_that_may_take_long_is_looked_for_as_any_other(pattern: str, right: List[str],
                                                                  wrong: List[str],
                                                                  monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clinvk.Searches, "SECS", 600.0)
    for schema in ({"pattern": pattern}, {"not": {"type": "string", "not": {"pattern": pattern}}}):
        assert all(is_valid(text, schema) for text in right)
        assert not any(is_valid(text, schema) for text in wrong)
    assert is_valid(dict.fromkeys(wrong), {"patternProperties": {pattern: False}})
    assert not any(is_valid({text: 1}, {"patternProperties": {pattern: False}}) for text in right)


# ---- The JSON in a text

@pytest.mark.parametrize("text, inner", [
    ('{"a": 1.50}', '{"a": 1.50}'), ("  [1,\n 2]\n", "[1,\n 2]"), ('"x"', '"x"'), ("null", "null"),
    ('```json\n{"a": 1}\n```', '{"a": 1}'), ('```\n{"a": 1}\n```\n', '{"a": 1}'), ('```json\r\n{"a": 1}\r\n```\r\n',
                                                                                   '{"a": 1}'),
    ('```json\n{"a": 1}```', '{"a": 1}'), ('```json\n{"a": 1}\n', '{"a": 1}'),
    ('Here it is:\n\n  ```JSON\n  {"a": 1}\n  ```\nDone.', '{"a": 1}'),
    ('{"a": "```x```"}', '{"a": "```x```"}'), ('```json\n{"a": "\\n```\\n"}\n```', '{"a": "\\n```\\n"}'),
    ('{"a": 1, "a": 2}', '{"a": 1, "a": 2}')])
def test_the_json_of_an_answer(text: str, inner: str) -> None:
    assert clinvk.json_in(text) == (json.loads(inner), inner)


@pytest.mark.parametrize("text", [
    "", "  \n", "```json\n```", "Sorry.", 'Here: {"a": 1}', '{"a": 1} {"b": 2}', '{"a": 1}.', "{'a': 1}", '{"a": 1,}',
    "NaN", "[-Infinity]", "[1e400]", '{"a": 1', '```json\n{"a": 1\n', '```json\n{"a": 1}\n```\n```json\n{"b": 2}\n```',
    "```json\nno\n```", "[" * 100_000, '["a\nb"]'])
def test_what_is_not_one_json_value_is_refused(text: str) -> None:
    with pytest.raises(ValueError) as caught:
        clinvk.json_in(text)
    assert str(caught.value).startswith("is ") and len(str(caught.value)) < 200


# ---- OpenAI's strict mode

def strict(properties: Any, **more: Any) -> Any:
    return {**OBJECT, "properties": properties, "required": [*properties], **more}


def strict_levels(levels: int) -> Any:
    schema = strict({"end": {"type": "string"}})
    for _ in range(levels - 1):
        schema = strict({"next": schema})
    return schema


@pytest.mark.parametrize("schema", [
    strict({}), strict({"a": {"type": "string", "pattern": "x", "format": "date", "description": "d"}}, title="t"),
    strict({"a": {"type": ["integer", "null"], "minimum": 1, "multipleOf": 2}, "b": {"enum": ["x"]}}),
    strict({"a": {"type": "array", "items": {"$ref": "#"}, "minItems": 1}}),
    strict({"a": {"anyOf": [{"$ref": "#/$defs/b"}, NULL]}}, **{"$defs": {"b": strict({"c": {"const": 1}})}}),
    strict_levels(10), strict({f"p{index}": {"type": "null"} for index in range(5000)})])
def test_strict_schemas(schema: Any) -> None:
    assert clinvk.is_strict(schema)


@pytest.mark.parametrize("schema", [
    True, {}, {"type": "array", "items": {"type": "string"}}, {"type": ["object", "null"]},
    {**OBJECT, "properties": {"a": {"type": "string"}}}, {"type": "object", "properties": {}, "required": []},
    strict({}, anyOf=[strict({})]), strict({"a": {}}), strict({"a": True}), strict({"a": {"type": "strng"}}),
    strict({"a": {"type": "object"}}), strict({"a": {"type": "array"}}),
    strict({"a": {"type": "string", "minLength": 1}}), strict({"a": {"type": "string", "format": "uri"}}),
    strict({"a": {"type": "string", "default": "x"}}),
    strict({"a": {"oneOf": [{"type": "string"}]}}), strict({"a": {"allOf": [{"type": "string"}]}}),
    strict({"a": {"$ref": "#", "description": "d"}}), strict({"a": {"type": "array", "items": [{"type": "null"}]}}),
    strict({"a": {"type": "null"}}, additionalProperties=True), strict({"a": {"type": "null"}}, required=[]),
    strict({"a": {"type": "null"}}, **{"$defs": {"b": {"type": "object"}}}), strict_levels(11),
    strict({f"p{index}": {"type": "null"} for index in range(5001)}), strict({"a": {"enum": list(range(1001))}})])
def test_schemas_that_are_not_strict(schema: Any) -> None:
    assert not clinvk.is_strict(schema)


# ---- Held against another implementation

def test_verdicts_are_those_of_jsonschema() -> None:
    jsonschema = pytest.importorskip("jsonschema")
    hypothesis = pytest.importorskip("hypothesis")
    schemas, values = random_schemas(hypothesis.strategies)
    verdicts = set()

    @hypothesis.settings(max_examples=150, deadline=None, database=None, derandomize=True,
                         suppress_health_check=list(hypothesis.HealthCheck))
    @hypothesis.given(schemas, hypothesis.strategies.lists(values, min_size=1, max_size=5))
    def compare(schema: Any, values: List[Any]) -> None:
        jsonschema.Draft202012Validator.check_schema(schema)
        faults = clinvk.schema_faults(schema)
        if faults:
            assert all("leads back to itself" in fault for fault in faults)
            return
        validator = jsonschema.Draft202012Validator(schema)
        for value in values:
            verdicts.add(validator.is_valid(value))
            assert (clinvk.value_faults(value, schema) == []) == validator.is_valid(value)

    compare()
    assert verdicts == {True, False}


def random_schemas(some: Any) -> Any:
    """Strategies of hypothesis: schemas of every keyword, and small values that they are likely to speak of."""
    names, count = some.sampled_from(["a", "b", "ab", ""]), some.integers(0, 3)
    plain = some.none() | some.booleans() | some.integers(-2, 3) | some.sampled_from([0.5, 1.0, -1.5]) | names
    values = some.recursive(plain, max_leaves=6, extend=lambda inner: some.lists(inner, max_size=3)
                            | some.dictionaries(names, inner, max_size=3))
    patterns, types = some.sampled_from(["a", "^a", "b$", "^$"]), some.sampled_from(sorted(clinvk.TYPES))
    name_lists = some.lists(names, max_size=2, unique=True)

    def around(inner: Any) -> Any:
        named = some.dictionaries(names, inner, max_size=2)
        said = {
            "type": types | some.lists(types, min_size=1, max_size=3, unique=True), "const": values,
            "pattern": patterns, "enum": some.lists(values, min_size=1, max_size=3),
            "multipleOf": some.sampled_from([0.5, 1, 1.5, 2]), "uniqueItems": some.booleans(), "required": name_lists,
            "dependentRequired": some.dictionaries(names, name_lists, max_size=2),
            "$ref": some.sampled_from(["#/$defs/x", "#/$defs/y", "#here", "#"]),
            "patternProperties": some.dictionaries(patterns, inner, max_size=2),
            **dict.fromkeys("minLength maxLength minItems maxItems minProperties maxProperties".split(), count),
            **dict.fromkeys("minimum maximum exclusiveMinimum exclusiveMaximum".split(),
                            some.sampled_from([-1, 0.5, 1, 2])),
            **dict.fromkeys("allOf anyOf oneOf prefixItems".split(), some.lists(inner, min_size=1, max_size=3)),
            **dict.fromkeys("properties dependentSchemas".split(), named), "items": inner, "not": inner,
            **dict.fromkeys("propertyNames additionalProperties unevaluatedItems unevaluatedProperties".split(), inner)}
        parts = [some.fixed_dictionaries({keyword: value}) for keyword, value in said.items()]
        parts += [some.fixed_dictionaries({"contains": inner}, optional={"minContains": count, "maxContains": count}),
                  some.fixed_dictionaries({"if": inner}, optional={"then": inner, "else": inner})]
        return some.lists(some.one_of(parts), max_size=4).map(
            lambda chosen: {keyword: value for part in chosen for keyword, value in part.items()})

    inner = some.recursive(some.booleans(), lambda leaf: leaf | around(leaf), max_leaves=6)
    whole = some.builds(lambda top, x, y: {**top, "$defs": {"x": x, "y": {"$anchor": "here", "properties": {"a": y}}}},
                        around(inner), inner, inner)
    return whole, values


def test_two_threads_check_at_once() -> None:
    found: List[Any] = []
    threads = [threading.Thread(target=lambda: found.append(clinvk.value_faults(nested(5000), TREE))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [["$: is nested too deep to be checked"]] * 2
