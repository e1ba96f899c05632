"""What a failure looks like to people, and to the shell that called."""

import sys

OK = 0
FAILED = 1
USAGE = 2
NOT_FOUND = 3
UNAVAILABLE = 4
INTERRUPTED = 130

EXIT_CODES_HELP = """\
Exit codes: 0 done, 1 failed, 2 wrong usage or refused input, 3 not found,
4 unavailable now (no daemon, draining, queue full: try again), 130 interrupted."""

_EXIT_CODES = {
    "INVALID_ARGUMENT": USAGE,
    "NOT_FOUND": NOT_FOUND,
    "UNAVAILABLE": UNAVAILABLE,
    "RESOURCE_EXHAUSTED": UNAVAILABLE,
    "DEADLINE_EXCEEDED": UNAVAILABLE,
}

# Daemons and the SDK say what any client has to do; this is how one does it here.
_HINTS = {"UNAUTHENTICATED": " The command takes it from MILLRACE_CLI_API_KEY."}
_TLS_HINT = ". The command takes the CA from MILLRACE_CLI_TLS_CA, and a certificate from MILLRACE_CLI_TLS_CERT."


# Of input that is not UTF-8.
_MAX_FOUND = 64


class CommandFailed(Exception):
    """The command cannot go on; the message is one sentence for people."""

    def __init__(self, message: str, exit_code: int = FAILED) -> None:
        super().__init__(message)
        self.exit_code = exit_code


def report(error: BaseException, *, as_json: bool) -> int | None:
    """The exit code of `error`, told in one line on stderr; None where it is not ours to tell.

    Args:
        as_json: the line is an object, for programs.
    """
    if isinstance(error, KeyboardInterrupt):
        if sys.stderr.isatty():  # the cursor stands behind ^C
            sys.stderr.write("\n")
        return INTERRUPTED
    if isinstance(error, BrokenPipeError):  # whoever read our output has enough
        sys.stdout = None
        return OK
    if isinstance(error, CommandFailed):
        _tell(str(error), "COMMAND_FAILED", {}, as_json)
        return error.exit_code
    if isinstance(error, OSError) and error.filename is not None:
        _tell(f"{error.filename}: {error.strerror}", "COMMAND_FAILED", {}, as_json)
        return FAILED
    if isinstance(error, UnicodeEncodeError | UnicodeDecodeError):
        found = error.object[:_MAX_FOUND]
        _tell(f"what was given is not UTF-8, found {found!a}", "COMMAND_FAILED", {}, as_json)
        return USAGE
    # Imported only now: a command that does not call a daemon does not pay for gRPC.
    from millrace.errors import MAY_ASK_FOR_TLS, MillraceError

    if not isinstance(error, MillraceError):
        return None
    is_refused = error.message.endswith(MAY_ASK_FOR_TLS)
    hint = _TLS_HINT if is_refused else _HINTS.get(error.reason, "")
    _tell(error.message + hint, error.reason, dict(error.metadata), as_json)
    return _EXIT_CODES.get(error.code.name, FAILED)


def _tell(message: str, reason: str, metadata: dict[str, str], as_json: bool) -> None:
    if as_json:
        import json

        line = json.dumps({"error": {"reason": reason, "message": message, "metadata": metadata}})
    else:
        line = f"millrace: {message}"
    sys.stderr.write(line + "\n")
