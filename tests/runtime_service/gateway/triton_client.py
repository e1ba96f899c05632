"""Triton's own client, as a program: what a server answers, as JSON.

Its generated code and ours have the same messages, which one process cannot have twice. Run as
`python -m tests.runtime_service.gateway.triton_client ADDRESS < CALLS`, where each line of CALLS is
`[function of this file, arguments by name]`.
"""

import json
import queue
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import tritonclient.grpc as triton
from tritonclient.utils import InferenceServerException, np_to_triton_dtype


def about(client: triton.InferenceServerClient, model: str) -> dict[str, Any]:
    """What a server and a model say of themselves."""
    server, described = client.get_server_metadata(), client.get_model_metadata(model)
    return {
        "live": client.is_server_live(),
        "ready": client.is_server_ready(),
        "model_ready": client.is_model_ready(model),
        "other_ready": client.is_model_ready("other"),
        "versions_ready": [client.is_model_ready(model, version) for version in ("1", "2")],
        "server": server.name,
        "platform": described.platform,
        "inputs": {tensor.name: tensor.datatype for tensor in described.inputs},
        "outputs": {tensor.name: tensor.datatype for tensor in described.outputs},
    }


def config(client: triton.InferenceServerClient, model: str) -> dict[str, Any]:
    """How a model is configured."""
    found = client.get_model_config(model).config
    written = client.get_model_config(model, as_json=True)["config"]
    return {
        "name": found.name,
        "decoupled": found.model_transaction_policy.decoupled,
        "max_batch_size": found.max_batch_size,
        "needed": [tensor.name for tensor in found.input if not tensor.optional],
        "types": {tensor["name"]: tensor["data_type"] for tensor in written["input"]},
        "outputs": {tensor["name"]: tensor["dims"] for tensor in written["output"]},
    }


def index(client: triton.InferenceServerClient, model: str) -> str:
    """What models there are, by a call of Triton's own."""
    return str(client.get_model_repository_index())


def infer(
    client: triton.InferenceServerClient, model: str, inputs: dict[str, Any], **options: Any
) -> dict[str, Any]:
    """One answer."""
    result = client.infer(model, _tensors(inputs), **options)
    return _outputs(result)


def stream(
    client: triton.InferenceServerClient, model: str, requests: dict[str, dict[str, Any]]
) -> list[dict[str, Any]]:
    """All answers to requests on one stream, in order; the inputs of each, by its id."""
    answers: queue.Queue[tuple[Any, Any]] = queue.Queue()
    client.start_stream(lambda result, error: answers.put((result, error)))
    for request_id, inputs in requests.items():
        client.async_stream_infer(
            model, _tensors(inputs), request_id=request_id, enable_empty_final_response=True
        )
    found, num_ended = [], 0
    while num_ended < len(requests):
        result, error = answers.get(timeout=60)
        if error is not None:
            found.append({"error": str(error)})
            num_ended += 1
            continue
        response = result.get_response()
        is_final = response.parameters["triton_final_response"].bool_param
        num_ended += is_final
        found.append({"id": response.id, "final": is_final, **_outputs(result)})
    client.stop_stream()
    return found


def _tensors(inputs: dict[str, Any]) -> list[triton.InferInput]:
    tensors = []
    for name, value in inputs.items():
        values = value if isinstance(value, list) else [value]
        is_text = isinstance(values[0], str)
        array = np.array([v.encode() for v in values] if is_text else values, dtype=_dtype(values))
        tensor = triton.InferInput(name, list(array.shape), np_to_triton_dtype(array.dtype))
        tensor.set_data_from_numpy(array)
        tensors.append(tensor)
    return tensors


def _dtype(values: list[Any]) -> Any:
    kinds = {str: np.object_, bool: np.bool_, int: np.int32, float: np.float32}
    return kinds[type(values[0])]


def _outputs(result: triton.InferResult) -> dict[str, Any]:
    found = {}
    for output in result.get_response().outputs:
        values = result.as_numpy(output.name).tolist()
        found[output.name] = [v.decode() if isinstance(v, bytes) else v for v in values]
    return found


CALLS: dict[str, Callable[..., Any]] = {
    "about": about,
    "config": config,
    "index": index,
    "infer": infer,
    "stream": stream,
}


def main() -> None:
    """Makes the calls of standard input, and prints a line for each."""
    with triton.InferenceServerClient(sys.argv[1]) as client:
        for line in sys.stdin:
            name, arguments = json.loads(line)
            try:
                answer = CALLS[name](client, **arguments)
            except InferenceServerException as error:
                answer = {"error": error.message(), "status": error.status()}
            sys.stdout.write(json.dumps(answer) + "\n")


if __name__ == "__main__":
    main()
