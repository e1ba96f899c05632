"""Errors as HTTP and OpenAI's clients know them.

Source: google.rpc's mapping of codes (google/rpc/code.proto); OpenAI API reference, "Error codes".
"""

import math

import grpc
import msgspec
from aiohttp import web

from runtime_service.gateway.sampling_fields import renamed
from shared.errors import InvalidField, MillraceError

_S = grpc.StatusCode
_STATUSES = {
    _S.INVALID_ARGUMENT: 400,
    _S.UNAUTHENTICATED: 401,
    _S.PERMISSION_DENIED: 403,
    _S.NOT_FOUND: 404,
    _S.ABORTED: 409,
    _S.RESOURCE_EXHAUSTED: 429,
    _S.UNIMPLEMENTED: 501,
    # Of what is asked over HTTP, only the gateway's own standing with its runtimes is one.
    _S.FAILED_PRECONDITION: 502,
    _S.UNAVAILABLE: 503,
    _S.DEADLINE_EXCEEDED: 504,
}
_TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
_MAX_PATH_CHARS = 128
# Where programs know another word than our reason.
_CODES = {
    "MODEL_NOT_SERVED": "model_not_found",
    "PROMPT_TOO_LONG": "context_length_exceeded",
    "QUOTA_EXCEEDED": "rate_limit_exceeded",
    "UNAUTHENTICATED": "invalid_api_key",
}


def failure(error: MillraceError) -> web.Response:
    """The answer that says `error`, and when to try again where that helps."""
    status = _STATUSES.get(error.code, 500)
    headers = {}
    if error.retry_after_s is not None:
        headers["Retry-After"] = str(max(math.ceil(error.retry_after_s), 1))
        # Which OpenAI's own clients look for first: it need not be whole seconds.
        headers["Retry-After-Ms"] = str(max(round(error.retry_after_s * 1000), 1))
    if status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return _response(status, error_body(error), headers)


def error_body(error: MillraceError) -> dict[str, object]:
    """`error` as OpenAI writes errors."""
    status = _STATUSES.get(error.code, 500)
    error = renamed(error)
    parameter = error.fields["field"] if isinstance(error, InvalidField) else None
    code = _CODES.get(error.reason, error.reason.lower())
    return _body(status, str(error), parameter, code)


def failure_of_http(error: web.HTTPException, request: web.Request) -> web.Response:
    """What the HTTP library refuses: an unknown path, another method, a body that is too large."""
    headers, message, path = {}, f"{error.reason}.", repr(request.path[:_MAX_PATH_CHARS])
    if isinstance(error, web.HTTPNotFound):
        # Bases without /v1, and endpoints that other servers have.
        known = sorted({str(route.canonical) for route in request.app.router.resources()})
        message = f"Nothing is served at {path}; there are: {', '.join(known)}."
    elif isinstance(error, web.HTTPMethodNotAllowed):
        methods = ", ".join(sorted(error.allowed_methods))
        headers["Allow"] = methods
        message = f"{path} is not for {request.method}; it takes: {methods}."
    elif isinstance(error, web.HTTPRequestEntityTooLarge):
        limit = request.client_max_size
        message = f"The body is over the {limit} bytes of MILLRACE_MAX_MESSAGE_BYTES."
    return _response(error.status, _body(error.status, message, None, None), headers)


def _body(status: int, message: str, parameter: str | None, code: str | None) -> dict[str, object]:
    kind = _TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")
    return {"error": {"message": message, "type": kind, "param": parameter, "code": code}}


def _response(status: int, body: dict[str, object], headers: dict[str, str]) -> web.Response:
    return web.Response(
        status=status,
        body=msgspec.json.encode(body),
        content_type="application/json",
        headers=headers,
    )
