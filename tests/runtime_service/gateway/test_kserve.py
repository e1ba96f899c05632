"""KServe v2 and Triton's clients at a gateway: Triton's own one, and ours of the same protocol."""

import asyncio
import json
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import grpc
import pytest
from hypothesis import given
from hypothesis import strategies as st
from millrace.kserve.v2 import inference_pb2 as kserve
from millrace.kserve.v2 import inference_pb2_grpc

from runtime_service.gateway.kserve.requests import INPUTS, parse
from runtime_service.gateway.kserve.tensors import add_output, inputs_of
from runtime_service.gateway.sampling_fields import Sampling
from shared.auth import ApiKeys
from shared.errors import InvalidField
from shared.security import ServerSecurity
from tests.runtime_service.daemon import ENDLESS, ENDLESS_TOKENS, TOKENIZER, until
from tests.runtime_service.gateway.running_gateway import RunningGateway, kill, running_fleet
from tests.shared.key_files import new_key

TEXT = "Zwölf Boxkämpfer 🙂 jagen STO Viktor; "
NUM_TOKENS = len(TOKENIZER.encode(TEXT).ids)


async def triton(fleet: RunningGateway, *calls: tuple[str, dict[str, Any]]) -> list[Any]:
    """What Triton's client makes of each call."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "tests.runtime_service.gateway.triton_client", fleet.server.address,
        stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    lines = "".join(json.dumps([name, {"model": "echo", **rest}]) + "\n" for name, rest in calls)
    out, problems = await process.communicate(lines.encode())
    answers = [json.loads(line) for line in out.splitlines()]
    assert len(answers) == len(calls), problems.decode()
    return answers


def request_of(
    request_id: str = "", model: str = "echo", **inputs: Any
) -> kserve.ModelInferRequest:
    """A request whose contents are not raw."""
    request = kserve.ModelInferRequest(model_name=model, id=request_id)
    for name, value in inputs.items():
        tensor = request.inputs.add(name=name, shape=[1])
        if isinstance(value, bool):
            tensor.datatype = "BOOL"
            tensor.contents.bool_contents.append(value)
        elif isinstance(value, int):
            tensor.datatype = "INT32"
            tensor.contents.int_contents.append(value)
        else:
            tensor.datatype = "BYTES"
            tensor.contents.bytes_contents.append(value.encode())
    return request


@asynccontextmanager
async def connected(
    folder: Path, num_runtimes: int, **options: Any
) -> AsyncIterator[tuple[RunningGateway, Any]]:
    """A fleet, and a stub of our own."""
    async with (
        running_fleet(folder, num_runtimes, **options) as fleet,
        grpc.aio.insecure_channel(fleet.server.address) as channel,
    ):
        yield fleet, inference_pb2_grpc.GRPCInferenceServiceStub(channel)


async def test_tritons_client_learns_what_there_is(tmp_path: Path) -> None:
    async with running_fleet(tmp_path, 1) as fleet:
        about, index = await triton(fleet, ("about", {}), ("index", {}))
    assert about["live"] is about["ready"] is about["model_ready"] is True
    assert about["other_ready"] is False
    assert about["versions_ready"] == [True, False]
    assert about["server"] == about["platform"] == "millrace"
    assert about["inputs"]["text_input"] == about["outputs"]["text_output"] == "BYTES"
    assert about["inputs"]["stream"] == "BOOL"
    assert "UNIMPLEMENTED" in index["status"]


async def test_tritons_client_reads_a_models_configuration(tmp_path: Path) -> None:
    async with running_fleet(tmp_path, 1) as fleet:
        config, unknown = await triton(fleet, ("config", {}), ("config", {"model": "gpt-4"}))
    assert (config["name"], config["decoupled"], config["max_batch_size"]) == ("echo", True, 0)
    assert config["needed"] == ["text_input"]
    assert config["types"]["text_input"] == "TYPE_STRING"
    assert (config["types"]["stream"], config["types"]["seed"]) == ("TYPE_BOOL", "TYPE_UINT64")
    assert config["outputs"]["text_output"] == ["-1"]
    assert "NOT_FOUND" in unknown["status"]


async def test_tritons_client_gets_log_probabilities_as_each_backend_writes_them(
    tmp_path: Path,
) -> None:
    asked = {"text_input": "ab", "max_tokens": 3, "exclude_input_in_output": True}
    two = json.dumps({"n": 2, "logprobs": 1})
    async with running_fleet(tmp_path, 1, step_s=0.002) as fleet:
        vllm, alone, trtllm, too_many, (*parts,) = await triton(
            fleet,
            ("infer", {"inputs": {**asked, "return_logprobs": True, "sampling_parameters": two}}),
            ("infer", {"inputs": {**asked, "return_logprobs": True}}),
            ("infer", {"inputs": {**asked, "return_log_probs": True, "sampling_parameters": two}}),
            ("infer", {"inputs": {**asked, "return_logprobs": True,
                                  "sampling_parameters": json.dumps({"logprobs": 21})}}),
            ("stream", {"requests": {"a": {**asked, "stream": True, "return_logprobs": True}}}),
        )  # fmt: skip
    a, b = (str(token) for token in TOKENIZER.encode("ab").ids)
    own = {"logprob": -0.25, "rank": 1}
    rows = [{a: {**own, "decoded_token": "a"}}, {b: {**own, "decoded_token": "b"}}]
    assert [json.loads(one) for one in vllm["logprobs"]] == [[*rows, rows[0]]] * 2
    assert json.loads(alone["logprobs"][0]) == [*rows, rows[0]]
    assert trtllm["cum_log_probs"] == [-0.75, -0.75]
    assert trtllm["output_log_probs"] == [[-0.25] * 3] * 2
    assert too_many["error"].startswith("top_logprobs: ")
    streamed = [row for part in parts for row in json.loads(part["logprobs"][0])]
    assert streamed == [*rows, rows[0]]


async def test_words_that_are_to_be_banned_are_refused_and_none_are_not(tmp_path: Path) -> None:
    """Clients of the TensorRT-LLM backend send an empty one always."""
    asked = {"text_input": "ab", "max_tokens": 2, "exclude_input_in_output": True}
    listed = json.dumps({"bad_words": ["x"]})
    async with running_fleet(tmp_path, 1) as fleet:
        none, one, other = await triton(
            fleet,
            ("infer", {"inputs": {**asked, "bad_words": [""]}}),
            ("infer", {"inputs": {**asked, "bad_words": ["x", ""]}}),
            ("infer", {"inputs": {**asked, "sampling_parameters": listed}}),
        )
    assert none["text_output"] == ["ab"]
    assert one["error"].startswith("bad_words: is not supported")
    assert "INVALID_ARGUMENT" in one["status"]
    assert other == one


async def test_tritons_client_gets_one_answer(tmp_path: Path) -> None:
    """By the inputs of the TensorRT-LLM backend, and by those of the vLLM backend."""
    by_json = json.dumps({"max_tokens": "4", "temperature": "0.0", "n": 2})
    async with running_fleet(tmp_path, 1) as fleet:
        whole, echoed, several, unknown, bad, first = await triton(
            fleet,
            ("infer", {"inputs": {
                "text_input": TEXT, "max_tokens": 200, "temperature": 0.5, "stop_words": ["", "STO V"],
                "random_seed": 3, "exclude_input_in_output": True, "return_finish_reason": True,
                "return_num_input_tokens": True, "return_num_output_tokens": True,
                "return_cumulative_logprob": True, "beam_width": 1, "pad_id": 0,
            }}),
            ("infer", {"inputs": {"text_input": TEXT}}),
            ("infer", {"inputs": {"text_input": "ab", "sampling_parameters": by_json,
                                  "exclude_input_in_output": True},
                       "parameters": {"max_tokens": 3}, "request_id": "r"}),
            ("infer", {"model": "gpt-4", "inputs": {"text_input": TEXT}}),
            ("infer", {"inputs": {"text_input": TEXT, "top_p": 2.0}}),
            ("infer", {"inputs": {"text_input": TEXT}, "priority": 1}),
        )  # fmt: skip
    shown = TEXT.partition("STO V")[0]
    num_tokens = len(TOKENIZER.encode(shown + "STO V").ids)
    assert whole["text_output"] == [shown]
    assert whole["finish_reason"] == ["stop"]
    assert whole["num_input_tokens"] == [NUM_TOKENS]
    assert whole["num_output_tokens"] == [num_tokens]
    assert whole["cumulative_logprob"] == [-0.25 * num_tokens]
    assert set(echoed) == {"text_output"}
    assert echoed["text_output"][0].startswith(TEXT)
    assert TEXT.startswith(echoed["text_output"][0].removeprefix(TEXT))
    assert several["text_output"] == ["abab", "abab"]
    assert "NOT_FOUND" in unknown["status"]
    assert "there are: echo" in unknown["error"]
    assert "INVALID_ARGUMENT" in bad["status"]
    assert bad["error"].startswith("top_p: must be over 0")
    assert first["error"].startswith("priority: is not supported")


async def test_tritons_client_streams_many_at_once(tmp_path: Path) -> None:
    """Text comes in parts, the last one is told, and one that fails leaves the others alone."""
    asked = {"text_input": TEXT, "stream": True, "max_tokens": 2 * NUM_TOKENS}
    requests: dict[str, Any] = {
        "a": {**asked, "return_finish_reason": True, "return_num_output_tokens": True},
        "bad": {**asked, "top_k": -2},
        "worse": {**asked, "wings": 2},
        "whole": {**asked, "stream": False, "exclude_input_in_output": True},
        "b": asked,
    }
    # A step is long: tokens that come while nothing here runs are told in one part.
    async with running_fleet(tmp_path, 2, step_s=0.03) as fleet:
        (answers,) = await triton(fleet, ("stream", {"requests": requests}))
        assert fleet.sample("running_generations") == 0
    errors = sorted(answer["error"] for answer in answers if "error" in answer)
    assert len(errors) == 2
    assert errors[0].startswith("top_k: must be from 0")
    assert errors[1].startswith("wings: is no input of this model")
    parts = {name: [a for a in answers if a.get("id") == name] for name in ("a", "b", "whole")}
    for name in ("a", "b"):
        assert len(parts[name]) > 1
        assert "".join(part["text_output"][0] for part in parts[name]) == TEXT * 2
        assert [part["final"] for part in parts[name]] == [False] * (len(parts[name]) - 1) + [True]
    assert [part["text_output"] for part in parts["whole"]] == [[TEXT * 2]]
    assert parts["whole"][0]["final"]
    assert sum(part["num_output_tokens"][0] for part in parts["a"]) == 2 * NUM_TOKENS
    reasons = [part["finish_reason"][0] for part in parts["a"]]
    assert reasons == ["None"] * (len(reasons) - 1) + ["length"]


async def test_stream_survives_the_loss_of_its_runtime_and_ends_with_its_call(
    tmp_path: Path,
) -> None:
    async with connected(tmp_path, 2, step_s=0.005, **ENDLESS) as (fleet, stub):
        call = stub.ModelStreamInfer()
        asked = {"text_input": TEXT, "stream": True, "max_tokens": 3 * NUM_TOKENS}
        await call.write(request_of("a", **asked))
        text, is_killed, is_final = "", False, False
        while not is_final:
            response = (await call.read()).infer_response
            text += response.raw_output_contents[0][4:].decode()
            is_final = response.parameters["triton_final_response"].bool_param
            if text and not is_killed:
                is_killed = True
                await kill(fleet.busiest())
        await call.write(request_of("b", **{**asked, "max_tokens": ENDLESS_TOKENS}))
        await call.read()
        call.cancel()
        await until(lambda: fleet.sample("running_generations") == 0)
    assert text == TEXT * 3


async def test_client_that_reads_no_refusals_is_not_read_either(tmp_path: Path) -> None:
    """Who sends nonsense for ever costs no more than what may wait to be read."""
    async with connected(tmp_path, 1) as (fleet, stub):
        call = stub.ModelStreamInfer()
        bad = request_of("x" * 200, model="no" * 5_000, text_input="a")

        async def send() -> None:
            while True:
                await call.write(bad)

        sending = asyncio.create_task(send())
        await until(lambda: any(not call._room.is_set() for call in fleet.gateway._calls))
        sending.cancel()
        call.cancel()
        await until(lambda: not fleet.gateway._calls)


async def test_rpcs_need_a_key_with_the_scope(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good = new_key(capsys, tmp_path / "keys", "acme")
    builder = new_key(capsys, tmp_path / "keys", "acme", "build")
    security = ServerSecurity(api_keys=ApiKeys(tmp_path / "keys"))
    async with connected(tmp_path, 1, gateway_security=security) as (_, stub):
        codes = []
        for key in ("mr_no_no", builder, good):
            metadata = (("authorization", f"Bearer {key}"),)
            try:
                await stub.ModelInfer(request_of(text_input="ab"), metadata=metadata)
                codes.append(grpc.StatusCode.OK)
            except grpc.aio.AioRpcError as error:
                codes.append(error.code())
    expected = grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.PERMISSION_DENIED
    assert codes == [*expected, grpc.StatusCode.OK]


@pytest.mark.parametrize(
    ("inputs", "says"),
    [
        ({}, "text_input: must be a text"),
        ({"text_input": ""}, "text_input: must be a text"),
        ({"text_input": "a", "stream": True}, "stream: needs ModelStreamInfer"),
        ({"text_input": "a", "beam_width": 4}, "beam_width: must be 1"),
        ({"text_input": "a", "sampling_parameters": "{"}, "sampling_parameters: is not JSON"),
        ({"text_input": "a", "sampling_parameters": '{"wings": 2}'}, "wings: is not known"),
        ({"text_input": "a", "max_tokens": 0}, "max_tokens: must be at least 1"),
        ({"text_input": "a", "max_tokens": "many"}, "max_tokens: expected `int"),
        ({"text_input": "a", "exclude_input_in_output": "no"}, "exclude_input_in_output: must be"),
        ({"text_input": "a", "end_id": "x"}, "end_id: must be a token id"),
        (
            {"text_input": "a", "end_id": 2, "sampling_parameters": '{"stop_token_ids": 5}'},
            "stop_token_ids: expected `array",
        ),
    ],
)
async def test_bad_inputs_are_named(tmp_path: Path, inputs: dict[str, Any], says: str) -> None:
    async with connected(tmp_path, 1) as (_, stub):
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await stub.ModelInfer(request_of(**inputs))
        with pytest.raises(grpc.aio.AioRpcError) as other:
            await stub.ModelInfer(kserve.ModelInferRequest(model_version="2"))
    assert raised.value.code() == other.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert says in str(raised.value.details())


async def test_an_input_that_comes_twice_is_refused(tmp_path: Path) -> None:
    """Which of two values was meant nobody can know."""
    request = request_of(text_input="a", max_tokens=2)
    request.inputs.append(request.inputs[-1])
    if request.raw_input_contents:
        request.raw_input_contents.append(request.raw_input_contents[-1])
    async with connected(tmp_path, 1) as (_, stub):
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await stub.ModelInfer(request)
    assert "max_tokens: is given twice" in str(raised.value.details())


@pytest.mark.parametrize("kind", ["inputs", "outputs"])
async def test_regions_of_shared_memory_are_refused(tmp_path: Path, kind: str) -> None:
    """A client that names one reads its answer there, whatever it is sent."""
    request = request_of(text_input="a", max_tokens=2)
    request.outputs.add(name="text_output")
    tensor = getattr(request, kind)[0]
    tensor.parameters["shared_memory_region"].string_param = "region"
    async with connected(tmp_path, 1) as (_, stub):
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await stub.ModelInfer(request)
    says = f"{tensor.name}: is not supported with the parameter 'shared_memory_region'"
    assert says in str(raised.value.details())


@given(st.lists(st.text()), st.lists(st.integers(0, 2**32 - 1)))
def test_tensors_come_back_as_they_went(texts: list[str], numbers: list[int]) -> None:
    response = kserve.ModelInferResponse()
    add_output(response, "texts", "BYTES", texts)
    add_output(response, "numbers", "UINT32", numbers)
    request = kserve.ModelInferRequest(raw_input_contents=response.raw_output_contents)
    for output in response.outputs:
        request.inputs.add(name=output.name, datatype=output.datatype, shape=output.shape)
    assert inputs_of(request) == {"texts": texts, "numbers": numbers}


@given(st.binary(max_size=40), st.sampled_from(("BYTES", "BOOL", "INT64", "FP32", "FP8")))
def test_contents_of_any_bytes_are_read_or_refused(content: bytes, datatype: str) -> None:
    request = kserve.ModelInferRequest(raw_input_contents=[content])
    request.inputs.add(name="x", datatype=datatype, shape=[1])
    try:
        (values,) = inputs_of(request).values()
    except InvalidField:
        return
    assert len(values) == 1


def some_value() -> st.SearchStrategy[kserve.InferParameter]:
    return st.one_of(
        st.builds(kserve.InferParameter, bool_param=st.booleans()),
        st.builds(kserve.InferParameter, int64_param=st.integers(-(2**63), 2**63 - 1)),
        st.builds(kserve.InferParameter, double_param=st.floats()),
        st.builds(kserve.InferParameter, string_param=st.text()),
        st.just(kserve.InferParameter()),
    )


@given(
    st.dictionaries(st.sampled_from((*INPUTS, "timeout", "n", "logit_bias")), some_value()),
    st.text()
    | st.dictionaries(
        st.sampled_from(sorted(Sampling.__struct_fields__)),
        st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.lists(st.text()),
    ).map(json.dumps),
)
def test_parameters_of_any_value_make_a_start_or_are_refused(
    parameters: dict[str, kserve.InferParameter], written: str
) -> None:
    request = request_of(text_input="a", sampling_parameters=written)
    for name, value in parameters.items():
        request.parameters[name].CopyFrom(value)
    with suppress(InvalidField):
        assert parse(request).start.text == "a"
