"""File systems behind addresses such as ``s3://bucket/a.jsonl``, opened by fsspec, and the meaning of their errors."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from jepa_scale.utils.errors import InputError

TIMEOUT = 60.0
"""Seconds without a byte after which an http connection counts as dead."""
INSTALL = "pip install 'jepa-scale[remote]'"
_GOOGLE = ("gs", "gcs")
_PACKAGES = {"s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "gcs": "gcsfs"}
_CREDENTIALS = {
    "s3": "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE; for a public bucket set FSSPEC_S3='{\"anon\": true}'",
    "gs": "set GOOGLE_APPLICATION_CREDENTIALS, or run `gcloud auth application-default login`; for a public bucket set "
    'FSSPEC_GS=\'{"token": "anon"}\'',
    "hf": "set HF_TOKEN, or run `hf auth login`; accept the terms of a gated dataset on its page",
    "http": "use an address that carries its signature, or put the host's login into ~/.netrc",
}
_CREDENTIALS |= {"s3a": _CREDENTIALS["s3"], "gcs": _CREDENTIALS["gs"], "https": _CREDENTIALS["http"]}
_CUT = (
    "ClientPayloadError",
    "ServerDisconnectedError",
    "IncompleteRead",
    "IncompleteReadError",
    "ResponseStreamingError",
)
_NO_CREDENTIALS = re.compile(r"Credential|SSO|TokenRetrieval|UnauthorizedSSO|ProfileNotFound|Auth|RefreshError")


class Refused(Exception):
    """The file cannot be had, and another try would not help."""


class Interrupted(Exception):
    """The read failed this time; another try may succeed."""


def scheme_of(address: str) -> str:
    """Return the scheme of a URL, in lower case."""
    return address.partition("://")[0].lower()


def is_http(address: str) -> bool:
    return scheme_of(address) in ("http", "https")


def redacted_url(url: str) -> str:
    """Return the URL for messages: without a password, and without the query of a web address, which may hold a signature."""
    if url.startswith("pipe:"):
        return url
    return re.sub(r"//[^/@]*@", "//", url.partition("?")[0] if is_http(url) else url, count=1)


def filesystem(address: str) -> tuple[Any, str]:
    """Return fsspec's file system of an address and the path in it. Credentials are those of the user's environment.

    The file system must not be kept: fsspec caches one a process, and one that was made before a fork does not work.

    Raises:
        InputError: the scheme is unknown, its package is not installed, or the file system needs more than an address.
    """
    import fsspec  # imports asyncio and more

    scheme = scheme_of(address)
    try:
        system = fsspec.filesystem(scheme, **_settings(scheme))
        if scheme in _GOOGLE:
            system.credentials.maybe_refresh()  # before a request, which gcsfs would try six times with a wrong key
        return system, system._strip_protocol(address)
    except ImportError as error:
        reason = str(error.__cause__ or error)
        if scheme in _PACKAGES:
            reason = f"needs the package {_PACKAGES[scheme]} ({reason}); install it: {INSTALL}"
        raise InputError(f"{redacted_url(address)}: {reason}") from None
    except ValueError as error:
        if "not known" not in str(error):
            raise _explained(address, error) from None
        raise InputError(
            f"{redacted_url(address)}: no files can be read by {scheme}://; use http, https, s3, gs or hf, or copy them here"
        ) from None
    except Exception as error:
        raise _explained(address, error) from None


def _settings(scheme: str) -> dict[str, Any]:
    """Return the arguments of the file system of a scheme."""
    if scheme in ("s3", "s3a"):
        return {"config_kwargs": {"retries": {"total_max_attempts": 1}}}  # the tries are ours
    if scheme in _GOOGLE:
        return _google_settings()
    return _http_settings() if scheme in ("http", "https") else {}


def _http_settings() -> dict[str, Any]:
    from aiohttp import ClientTimeout

    timeout = ClientTimeout(total=None, sock_connect=TIMEOUT, sock_read=TIMEOUT)
    # proxies and ~/.netrc as the environment has them; the bytes as they are stored
    return {"client_kwargs": {"timeout": timeout, "trust_env": True, "auto_decompress": False}}


def _google_settings() -> dict[str, Any]:
    """Have gcsfs read by HTTP alone, without messages beside its errors, by the credentials that are named."""
    from fsspec.config import conf

    # read at import: else it asks by gRPC for the kind of a bucket, a minute where that is blocked, and gRPC survives no fork
    os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
    for name in ("gcsfs", "google.auth"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    chosen = any("token" in conf.get(name, {}) for name in _GOOGLE)
    if chosen or not os.environ.get("GOOGLE_APPLICATION_CREDENTIALS"):
        return {}
    return {"token": "google_default"}  # by itself gcsfs goes on without credentials where these cannot be read


@contextmanager
def explained(address: str) -> Iterator[None]:
    """Turn the errors of any file system into three kinds.

    Raises:
        Refused: there is no such file, or the server does not give it.
        Interrupted: the network or the server failed.
        InputError: credentials are missing, or are not accepted.
    """
    try:
        yield
    except (InputError, Refused, Interrupted):
        raise
    except Exception as error:
        raise _explained(address, error) from None


def _explained(address: str, error: BaseException) -> Exception:
    if is_http(address) and isinstance(error, FileNotFoundError) and error.__cause__ is not None:
        error = error.__cause__  # fsspec reports every failure of a web server as a missing file
    name, text = type(error).__name__, _line(address, error)
    status = _status(error)
    known = type(error).__module__.partition(".")[0] in ("botocore", "aiobotocore", "google", "gcsfs")
    if known and _NO_CREDENTIALS.search(name):
        return _denied(address, f"no credentials were found ({text})")
    if isinstance(error, PermissionError) or status in (401, 403):
        return _denied(address, f"access is denied ({text})")
    if isinstance(error, OSError) and text.startswith("Forbidden"):  # gcsfs's 403
        return _denied(address, f"access is denied ({text})")
    if isinstance(error, FileNotFoundError | IsADirectoryError) or status in (404, 410):
        private = f", or it is private: {_CREDENTIALS['hf']}" if scheme_of(address) == "hf" else ""
        return Refused(f"there is no such file{private}")
    if status is not None:
        return (Interrupted if status in (408, 425, 429) or status >= 500 else Refused)(f"the server answers {text}")
    if name == "OfflineModeIsEnabled":
        return InputError(f"{redacted_url(address)}: HF_HUB_OFFLINE is set; unset it, or use files that are here")
    if isinstance(error, TimeoutError):
        return Interrupted("timed out")
    if name in _CUT or isinstance(error, ConnectionResetError):
        return Interrupted("the connection was cut")
    if isinstance(error, ValueError | TypeError | NotImplementedError) or "ParamValidation" in name:
        return Refused(f"is not an address that can be read ({text})")
    return Interrupted(f"cannot connect: {text}" if "Connect" in name or isinstance(error, ConnectionError) else text)


def _denied(address: str, what: str) -> InputError:
    advice = _CREDENTIALS.get(scheme_of(address), "set the credentials of that store")
    return InputError(f"{redacted_url(address)}: {what}; {advice}")


def _status(error: BaseException) -> int | None:
    """Return the HTTP status of an error of aiohttp, botocore, gcsfs or huggingface_hub."""
    response = getattr(error, "response", None)
    values = [getattr(error, "status", None), getattr(error, "code", None), getattr(response, "status_code", None)]
    if isinstance(response, dict):  # botocore's
        values.append(response.get("ResponseMetadata", {}).get("HTTPStatusCode"))
    return next((value for value in values if isinstance(value, int) and 400 <= value < 600), None)


def _line(address: str, error: BaseException) -> str:
    """Return the first line of an error, without the query of the address."""
    message = getattr(error, "message", None)  # aiohttp's text has the whole URL
    text = f"{_status(error) or ''} {message}" if isinstance(message, str) else str(error)
    query = address.partition("?")[2]
    first = (text.strip().splitlines() or [type(error).__name__])[0]
    return first.replace(query, "…") if query else first
