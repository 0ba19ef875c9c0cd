"""JSON-RPC 2.0, without a connection."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent import rpc


class Add(rpc.Params):
    a: int
    b: int = 0


METHODS = {"add": rpc.Method(Add, lambda params: params.a + params.b)}


def run(message):
    return rpc.call_method(METHODS, rpc.parse(message))


def test_a_request_is_read_and_run():
    assert run('{"jsonrpc":"2.0","id":1,"method":"add","params":{"a":1,"b":2}}') == 3
    assert run(b'{"jsonrpc":"2.0","id":"x","method":"add","params":{"a":1}}') == 1


def test_a_request_without_an_id_is_a_notification():
    assert rpc.parse('{"jsonrpc":"2.0","method":"add"}').id is rpc.UNSET
    assert rpc.parse('{"jsonrpc":"2.0","id":null,"method":"add"}').id is None


@pytest.mark.parametrize(
    ("message", "number", "request_id"),
    [
        ("", rpc.PARSE_ERROR, None),
        ("{", rpc.PARSE_ERROR, None),
        (b"\xff", rpc.PARSE_ERROR, None),
        ('"\\ud800"', rpc.PARSE_ERROR, None),
        ('{"params":' + "[" * 100_000, rpc.PARSE_ERROR, None),
        # Wrong in its shape first, and no JSON behind that.
        ('{"jsonrpc":5,]', rpc.INVALID_REQUEST, None),
        ('{"jsonrpc":"2.0","method":5,"id":"\\ud800"}', rpc.INVALID_REQUEST, None),
        ('{"method":5,"x":' + "[" * 100_000, rpc.INVALID_REQUEST, None),
        ("1", rpc.INVALID_REQUEST, None),
        ("{}", rpc.INVALID_REQUEST, None),
        ('{"jsonrpc":"2.0","id":7,"method":5}', rpc.INVALID_REQUEST, 7),
        ('{"jsonrpc":"1.0","id":"a","method":"add"}', rpc.INVALID_REQUEST, "a"),
        ('{"jsonrpc":"2.0","id":{},"method":"add"}', rpc.INVALID_REQUEST, None),
        ('{"jsonrpc":"2.0","id":true,"method":"add"}', rpc.INVALID_REQUEST, None),
        ('{"jsonrpc":"2.0","id":1,"result":{}}', rpc.INVALID_REQUEST, 1),
        ("[]", rpc.INVALID_REQUEST, None),
        (b' [{"jsonrpc":"2.0","id":1,"method":"add"}]', rpc.INVALID_REQUEST, None),
        ('{"jsonrpc":"2.0","id":1,"method":"subtract"}', rpc.METHOD_NOT_FOUND, None),
        ('{"jsonrpc":"2.0","id":1,"method":"add"}', rpc.INVALID_PARAMS, None),
        ('{"jsonrpc":"2.0","id":1,"method":"add","params":[1,2]}', rpc.INVALID_PARAMS, None),
        ('{"jsonrpc":"2.0","id":1,"method":"add","params":{"a":"1"}}', rpc.INVALID_PARAMS, None),
        ('{"jsonrpc":"2.0","id":1,"method":"add","params":{"a":1,"c":1}}', rpc.INVALID_PARAMS, None),
        ('{"jsonrpc":"2.0","id":1,"method":"add","params":null}', rpc.INVALID_PARAMS, None),
    ],
)
def test_what_is_wrong_gets_the_number_of_the_specification(message, number, request_id):
    with pytest.raises(rpc.RpcError) as caught:
        run(message)
    assert (caught.value.number, caught.value.request_id) == (number, request_id)


@given(st.one_of(st.binary(max_size=60), st.text(max_size=60)))
def test_no_message_raises_anything_but_an_error_response(message):
    with pytest.raises(rpc.RpcError) as caught:
        run(message)
    answer = json.loads(rpc.encode_error(caught.value.request_id, caught.value))
    assert answer["error"]["code"] == caught.value.number


def test_responses_and_notifications_are_those_of_the_specification():
    assert json.loads(rpc.encode_result(None, {"a": "é"})) == {"jsonrpc": "2.0", "id": None, "result": {"a": "é"}}
    assert json.loads(rpc.encode_error(3, rpc.Failed("not_found", "x: not there"))) == {
        "jsonrpc": "2.0",
        "id": 3,
        "error": {"code": -32000, "message": "x: not there", "data": {"code": "not_found"}},
    }
    assert json.loads(rpc.encode_notification("process.exit", {"id": "p1"})) == {
        "jsonrpc": "2.0",
        "method": "process.exit",
        "params": {"id": "p1"},
    }
