"""inference.GRPCInferenceService as gRPC sees it: decode, one call of the gateway, encode."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from importlib.metadata import version
from itertools import count
from typing import Any

from millrace.kserve.v2 import inference_pb2 as kserve
from millrace.kserve.v2 import inference_pb2_grpc
from millrace.runtime.v1 import runtime_pb2 as pb

from runtime_service.gateway.fleet import Fleet
from runtime_service.gateway.gateway import Gateway
from runtime_service.gateway.kserve.answers import Answer, bare_response
from runtime_service.gateway.kserve.requests import (
    INPUTS,
    OUTPUTS,
    VERSION,
    Asked,
    check_version,
    is_version,
    parse,
    refused,
)
from runtime_service.gateway.routed_generation import RoutedGeneration
from runtime_service.gateway.sampling_fields import renamed
from runtime_service.generate_calls import generate_all
from runtime_service.generation_call import GenerationCall
from shared.auth import caller
from shared.edge import refuse_unknown_fields
from shared.errors import InvalidField, MillraceError, from_status

_SEVERAL = ("stop", "stop_words", "bad_words", "text_output", "finish_reason", "logprobs",
            "cumulative_logprob", "cum_log_probs", "num_output_tokens")  # fmt: skip
_PLATFORM = "millrace"
_NEEDED = "text_input"


class InferenceService(inference_pb2_grpc.GRPCInferenceServiceServicer):
    """Serves `gateway` to KServe's and Triton's clients; `fleet` knows what models there are."""

    def __init__(self, gateway: Gateway, fleet: Fleet) -> None:
        self._gateway, self._fleet = gateway, fleet

    async def ServerLive(self, request: Any, context: Any) -> kserve.ServerLiveResponse:
        """It answers."""
        return kserve.ServerLiveResponse(live=True)

    async def ServerReady(self, request: Any, context: Any) -> kserve.ServerReadyResponse:
        """Whether there is a runtime for somebody."""
        return kserve.ServerReadyResponse(ready=self._gateway.is_serving)

    async def ModelReady(
        self, request: kserve.ModelReadyRequest, context: Any
    ) -> kserve.ModelReadyResponse:
        """Whether a runtime takes generations for the model."""
        ready = any(link.is_usable and link.serves(request.name) for link in self._fleet)
        return kserve.ModelReadyResponse(ready=ready and is_version(request.version))

    async def ServerMetadata(self, request: Any, context: Any) -> kserve.ServerMetadataResponse:
        """Who this is."""
        return kserve.ServerMetadataResponse(name="millrace", version=version("millrace-server"))

    async def ModelMetadata(
        self, request: kserve.ModelMetadataRequest, context: Any
    ) -> kserve.ModelMetadataResponse:
        """What every model here takes and gives."""
        check_version(request.version)
        self._fleet.check_model(request.name)
        response = kserve.ModelMetadataResponse(
            name=request.name, versions=[VERSION], platform=_PLATFORM
        )
        for name, datatype in INPUTS.items():
            response.inputs.add(name=name, datatype=datatype, shape=_shape(name))
        for name, (datatype, _) in OUTPUTS.items():
            response.outputs.add(name=name, datatype=datatype, shape=_shape(name))
        return response

    async def ModelConfig(
        self, request: kserve.ModelConfigRequest, context: Any
    ) -> kserve.ModelConfigResponse:
        """The same, as Triton's configurations of models say it."""
        check_version(request.version)
        self._fleet.check_model(request.name)
        config = kserve.ModelConfig(name=request.name, platform=_PLATFORM, backend=_PLATFORM)
        config.model_transaction_policy.decoupled = True
        for name, datatype in INPUTS.items():
            config.input.add(
                name=name,
                data_type=_config_type(datatype),
                dims=_shape(name),
                optional=name != _NEEDED,
            )
        for name, (datatype, _) in OUTPUTS.items():
            config.output.add(name=name, data_type=_config_type(datatype), dims=_shape(name))
        return kserve.ModelConfigResponse(config=config)

    async def ModelInfer(
        self, request: kserve.ModelInferRequest, context: Any
    ) -> kserve.ModelInferResponse:
        """One generation, in one answer."""
        asked = self._parsed(request)
        if asked.is_stream:
            raise InvalidField(field="stream", problem="needs ModelStreamInfer")
        answer = Answer(asked)
        asked.start.request_id = "0"
        try:
            async with aclosing(generate_all(self._gateway, [asked.start], caller())) as events:
                async for some in events:
                    for event in some:
                        answer.take(event)
        except InvalidField as error:
            raise renamed(error) from None
        return answer.response()

    async def ModelStreamInfer(
        self, request_iterator: AsyncIterator[kserve.ModelInferRequest], context: Any
    ) -> AsyncGenerator[kserve.ModelStreamInferResponse, None]:
        """Many generations on one call, each with one answer or as many as it likes."""
        answers: dict[str, Answer] = {}
        call = self._gateway.open_call(caller())
        reading = asyncio.create_task(call.read(self._starts(call, request_iterator, answers)))
        try:
            async for events in call.messages():
                for response in _responses(answers, events):
                    yield response
            await reading
        finally:
            self._gateway.close_call(call)
            reading.cancel()

    async def _starts(
        self,
        call: GenerationCall[RoutedGeneration],
        requests: AsyncIterator[kserve.ModelInferRequest],
        answers: dict[str, Answer],
    ) -> AsyncIterator[pb.GenerateRequest]:
        """The requests of a call as starts of its generations, and an answer to be for each."""
        numbers = count()
        async for request in requests:
            name = str(next(numbers))
            try:
                refuse_unknown_fields(request)
                asked = self._parsed(request)
            except MillraceError as error:
                answers[name] = Answer(refused(request))
                call.refuse(name, error)
                # Means nothing, and has the call wait while too much is unread.
                yield pb.GenerateRequest(cancel=pb.CancelGeneration(request_id=name))
            else:
                answers[name] = Answer(asked)
                asked.start.request_id = name
                yield pb.GenerateRequest(start=asked.start)

    def _parsed(self, request: kserve.ModelInferRequest) -> Asked:
        self._fleet.check_model(request.model_name)
        return parse(request)


def _responses(
    answers: dict[str, Answer], events: list[pb.Event]
) -> list[kserve.ModelStreamInferResponse]:
    """What a step's events are to readers; who has ended is forgotten."""
    responses = []
    touched: dict[str, Answer] = {}
    for event in events:
        name = event.request_id
        if event.HasField("error"):
            answer = answers.pop(name)
            touched.pop(name, None)
            responses.append(_failed(answer, from_status(event.error)))
            continue
        touched[name] = answers[name]
        touched[name].take(event)
    for name, answer in touched.items():
        if answer.is_final:
            del answers[name]
        elif not (answer.asked.is_stream and answer.has_news):
            continue
        response = answer.response()
        response.parameters["triton_final_response"].bool_param = answer.is_final
        responses.append(kserve.ModelStreamInferResponse(infer_response=response))
    return responses


def _failed(answer: Answer, error: MillraceError) -> kserve.ModelStreamInferResponse:
    response = bare_response(answer.asked)
    response.parameters["triton_final_response"].bool_param = True
    return kserve.ModelStreamInferResponse(
        error_message=str(renamed(error)), infer_response=response
    )


def _shape(name: str) -> list[int]:
    if name == "output_log_probs":
        return [-1, -1]
    return [-1] if name in _SEVERAL else [1]


def _config_type(datatype: str) -> kserve.DataType.ValueType:
    return kserve.DataType.Value("TYPE_STRING" if datatype == "BYTES" else f"TYPE_{datatype}")
