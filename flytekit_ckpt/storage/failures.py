"""Failures of storage: which of them may pass, how often they are tried again, and what the user is told."""

from __future__ import annotations

import contextlib
import errno
import logging
import re
import threading
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from flytekit_ckpt.errors import CheckpointError, StorageError
from flytekit_ckpt.options import StorageOptions
from flytekit_ckpt.storage.uris import public

logger = logging.getLogger("flytekit_ckpt")

LONGEST_WAIT = 20.0
"""Seconds at most between two tries."""

CONFLICTS = 100
"""Times at most that something is written again because another writer came first."""

_Answer = TypeVar("_Answer")

# What S3 says of itself, and of requests that did not arrive whole.
_PASSING_CODES = {
    "BadDigest",
    "IncompleteBody",
    "InternalError",
    "RequestTimeout",
    "ServiceUnavailable",
    "SlowDown",
    "Throttling",
    "ThrottlingException",
    "TooManyRequests",
    "XAmzContentSHA256Mismatch",
}


class IncompleteAnswerError(ConnectionError):
    """Storage answered with fewer bytes than it was asked for."""


def tried_again(
    function: Callable[[], _Answer], *, retries: int, uri: str, cancelled: threading.Event | None = None
) -> _Answer:
    """Call a function until it succeeds, fails for good, or has failed too often.

    Waits grow exponentially up to `LONGEST_WAIT`, each drawn at random below that: those who failed together should
    not come back together.

    Parameters
    ----------
    function : callable
        Does the same whenever it is called.
    retries : int
        Calls after the first.
    uri : str
        For the log.
    cancelled : threading.Event, optional
        Ends the waiting and the tries once it is set.
    """
    import tenacity

    def log(state: tenacity.RetryCallState) -> None:
        error = state.outcome.exception() if state.outcome is not None else None
        logger.info("try %d at %s failed, trying again: %s", state.attempt_number, public(uri), type(error).__name__)

    stop: Any = tenacity.stop_after_attempt(retries + 1)
    trying = tenacity.Retrying(
        stop=stop if cancelled is None else stop | tenacity.stop_when_event_set(cancelled),
        sleep=tenacity.nap.sleep if cancelled is None else tenacity.sleep_using_event(cancelled),
        wait=tenacity.wait_random_exponential(multiplier=0.2, max=LONGEST_WAIT),
        retry=tenacity.retry_if_exception(may_pass),
        before_sleep=log,
        reraise=True,
    )
    return trying(function)


def may_pass(error: BaseException) -> bool:
    """Tell whether a failure may be gone at the next try: the network's, and what a server says of itself."""
    answer = s3_answer(error)
    if answer is not None:
        status = answer.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
        return status in (408, 429, 500, 502, 503, 504) or s3_code(error) in _PASSING_CODES
    return _is_of_the_network(error)


def _is_of_the_network(error: BaseException) -> bool:
    # By name, so that none of these packages is imported for it. What is wrong with a certificate or a proxy's login
    # will be wrong again, whoever says it in other words.
    names: set[str] = set()
    behind: BaseException | None = error
    while behind is not None:
        names.update(kind.__name__ for kind in type(behind).__mro__)
        behind = behind.__cause__
    lasting = {"SSLError", "ClientConnectorCertificateError", "ClientConnectorSSLError", "ProxyConnectionError"}
    passing = {
        # Python, botocore, requests
        "ConnectionError",
        "TimeoutError",
        "HTTPClientError",
        "IncompleteReadError",
        "ResponseParserError",
        "ResponseStreamingError",
        # aiohttp
        "ClientConnectionError",
        "ClientPayloadError",
        # azure-core, google-auth
        "ServiceRequestError",
        "ServiceResponseError",
        "TransportError",
        # http.client, requests, fsspec
        "IncompleteRead",
        "ChunkedEncodingError",
        "FSTimeoutError",
    }
    return bool(names & passing) and not names & lasting


def is_forbidden(error: BaseException) -> bool:
    """Tell whether a failure is that of a permission."""
    behind: BaseException | None = error
    while behind is not None:
        # Google's and Azure's clients have the status of the answer.
        statuses = (getattr(behind, name, None) for name in ("status", "code", "status_code"))
        if isinstance(behind, PermissionError) or 403 in statuses or s3_code(behind) in ("AccessDenied", "403"):
            return True
        behind = behind.__cause__
    return False


class GivenUpError(Exception):
    """Copying an object was given up: the caller asked for it, or something else is there."""


class ConflictError(Exception):
    """Something else is at a URI than what was to be replaced there."""


@contextlib.contextmanager
def reported(operation: str, uri: str, options: StorageOptions) -> Iterator[None]:
    """Turn whatever the storage raises into a `StorageError` that names the URI and holds no credentials."""
    try:
        yield
    except (CheckpointError, GivenUpError, ConflictError):
        raise
    except Exception as error:
        text = str(error).replace(uri, public(uri))
        for value in _secrets(options):
            if isinstance(value, str) and len(value) > 3:
                text = text.replace(value, "***")
        # The user and the password of an endpoint.
        text = re.sub(r"[^\s/@:'\"]+:[^\s/@'\"]+@", "***@", text)
        # S3 servers do not all put their error codes into words.
        cause = f"{s3_code(error) or type(error).__name__} ({text})"
        message = f"cannot {operation} {public(uri)}: {cause}. {_advice(error)}"
        number = getattr(error, "errno", None)
        raise (StorageError(message) if number is None else StorageError(number, message)) from error


def _secrets(options: StorageOptions) -> Iterator[Any]:
    for name in ("key", "secret", "token", "password", "account_key", "client_secret", "sas_token"):
        yield options.get(name)
    # A service account of Google's, or a user's login there.
    token = options.get("token")
    if isinstance(token, dict):
        yield from (token.get(name) for name in ("private_key", "refresh_token", "client_secret"))
    # Azure's.
    connection = str(options.get("connection_string") or "")
    yield connection
    yield from re.findall(r"(?:AccountKey|SharedAccessSignature)=([^;]+)", connection)


def undisturbed(function: Callable[[], _Answer], *, uri: str) -> _Answer:
    """Call a function until no other writer comes in between, which it tells by a `ConflictError`."""
    with contextlib.suppress(ConflictError):
        return function()
    # Rarely needed, and slow to import.
    import tenacity

    trying = tenacity.Retrying(
        stop=tenacity.stop_after_attempt(CONFLICTS),
        wait=tenacity.wait_random_exponential(multiplier=0.01, max=2.0),
        retry=tenacity.retry_if_exception_type(ConflictError),
        before_sleep=lambda state: logger.info(
            "%s was changed by another writer, trying again (%d)", public(uri), state.attempt_number
        ),
    )
    try:
        return trying(function)
    except tenacity.RetryError as error:
        message = (
            f"cannot write {public(uri)}: other writers have changed it {CONFLICTS} times while it was being written. "
            "Save less often, or to destinations of their own"
        )
        raise StorageError(message) from error


def overwritten(uri: str) -> CheckpointError:
    """Make the error for an object that was written here and is gone."""
    message = (
        f"{public(uri)} was removed by somebody else, and with it what this checkpoint saved there before. "
        "Save all of it again: this checkpoint begins anew now"
    )
    return CheckpointError(message)


_CODE_ADVICE = {
    "ConditionNotMet": "It was overwritten meanwhile: try again",
    "ContainerNotFound": "The container does not exist: create it, or correct the URI",
    "InvalidBlockList": "Another writer saved there meanwhile: save again, or to a destination of its own",
    "NoSuchBucket": "The bucket does not exist: create it, or correct the URI",
    "PreconditionFailed": "It was overwritten meanwhile: try again",
    "QuotaExceeded": "Make room there, or save less",
}


def _advice(error: BaseException) -> str:
    code = s3_code(error)
    if code in _CODE_ADVICE:
        return _CODE_ADVICE[code]
    if isinstance(error, PermissionError):
        return (
            "Check the credentials, and that they may read, write and list there "
            "(without the right to list, a bucket calls a missing object forbidden)"
        )
    if type(error).__name__ == "NoCredentialsError":
        return "Give credentials in storage_options, the FLYTE_AWS_* variables or the cloud SDK's own"
    if isinstance(error, ImportError):
        return "It is the package that reaches this kind of storage"
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return "Make room there, or save less"
    return "Check that it is reachable and that the storage options are right, then try again"


def s3_code(error: BaseException | None) -> str:
    """Return the error code in S3's answer, "" if there is none in this exception or those behind it."""
    answer = s3_answer(error)
    return str(answer.get("Error", {}).get("Code", "")) if answer is not None else ""


def s3_answer(error: BaseException | None) -> dict[str, Any] | None:
    """Return S3's answer, if there is one in this exception or those behind it."""
    while error is not None:
        response = getattr(error, "response", None)
        if isinstance(response, dict):
            return response
        error = error.__cause__
    return None
