"""Any scorer behind HTTP as a reward: images and prompts out as JSON, one number per image back; no gradient.

    POST {"images": ["<base64 PNG>", ...], "prompts": ["...", ...]}  ->  200 {"scores": [0.1, ...]}

One request carries the whole batch. The scorer must score image i by prompt i alone.
"""

import base64
import http.client
import json
import math
import os
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from craftor_rewards.compressibility import encode
from craftor_rewards.protocol import Range, check_inputs

MAX_RESPONSE_BYTES = 1_000_000
FIRST_WAIT, LONGEST_WAIT = 0.5, 8.0


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirect would take images and token to a place that nobody configured."""

    def redirect_request(self, *args: object, **kwargs: object) -> None:
        return None


class HttpScorer(nn.Module):
    """Scores in the scorer's own units; higher must be better.

    url: http or https, without user and password.
    timeout: seconds to connect, for each wait, and for the whole answer.
    num_retries: how often a request is repeated after a failed connection, a timeout or a status of 429 or 5xx, with
        pauses of 0.5, 1, 2, ... 8 seconds. Other statuses are the sender's fault and are not repeated.
    token_env: name of an environment variable, sent as `Authorization: Bearer <its value>`. It is read at each request
        and neither stored nor printed.

    Raises ValueError for wrong settings and for an answer that is not one finite number per image; ConnectionError when
    the scorer cannot be reached, refuses, or fails as often as it is asked.
    """

    differentiable = False
    needs_prompt = True
    score_range: Range = "the scorer's own"

    def __init__(
        self,
        url: str,
        *,
        timeout: float = 60.0,
        num_retries: int = 3,
        token_env: str | None = None,
        needs_prompt: bool = True,
    ) -> None:
        super().__init__()
        parts = urllib.parse.urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"scorer address '{parts.scheme}://{parts.hostname or ''}'; expected http:// or https://")
        _ = parts.port  # raises ValueError if it is not a number
        if parts.username or parts.password:
            raise ValueError(
                f"scorer address of '{parts.hostname}' holds a user or password; name a token by token_env"
            )
        if not (url.isascii() and url.isprintable() and " " not in url):
            raise ValueError(f"scorer address of '{parts.hostname}' holds spaces or characters that must be %-encoded")
        if not (math.isfinite(timeout) and timeout > 0):
            raise ValueError(f"timeout is {timeout}; expected seconds above 0")
        if num_retries < 0:
            raise ValueError(f"num_retries is {num_retries}; expected 0 or more")
        self.url = url
        self.name = f"{parts.scheme}://{parts.netloc}{parts.path}"
        self.timeout = timeout
        self.num_retries = num_retries
        self.token_env = token_env
        self.needs_prompt = needs_prompt
        self._token()

    def forward(self, images: Float[Tensor, "b 3 H W"], prompts: Sequence[str]) -> Float[Tensor, " b"]:
        check_inputs(images, prompts, needs_prompt=self.needs_prompt)
        pictures = [base64.b64encode(file).decode("ascii") for file in encode(images, "png")]
        answer = self._post(json.dumps({"images": pictures, "prompts": list(prompts)}).encode())
        return torch.tensor(_scores(answer, len(images), self.name), dtype=torch.float32, device=images.device)

    def _token(self) -> str | None:
        if self.token_env is None:
            return None
        token = os.environ.get(self.token_env, "").strip()
        if not token or not token.isascii() or not token.isprintable():
            raise ValueError(
                f"environment variable '{self.token_env}', the token for {self.name}, is missing or unusable"
            )
        return token

    def _post(self, body: bytes) -> bytes:
        """The body of a 200; waits and asks again as the class says."""
        headers = {"Content-Type": "application/json", "Accept": "application/json"}
        if token := self._token():
            headers["Authorization"] = f"Bearer {token}"
        for attempt in range(self.num_retries + 1):
            if attempt:
                time.sleep(min(FIRST_WAIT * 2 ** (attempt - 1), LONGEST_WAIT))
            request = urllib.request.Request(self.url, data=body, headers=headers, method="POST")
            try:
                with urllib.request.build_opener(_NoRedirect).open(request, timeout=self.timeout) as response:
                    return self._read(response)
            except urllib.error.HTTPError as error:
                failure = f"status {error.code} {error.reason}"
                error.close()
                if error.code != 429 and error.code < 500:
                    raise ConnectionError(f"scorer {self.name} refused: {failure}") from None
            except (OSError, http.client.HTTPException) as error:
                failure = f"{type(error).__name__}: {error}"
        raise ConnectionError(f"scorer {self.name} failed {self.num_retries + 1} times, last with {failure}")

    def _read(self, response: http.client.HTTPResponse) -> bytes:
        """At most `MAX_RESPONSE_BYTES`, within `timeout` however slowly they trickle in."""
        deadline = time.monotonic() + self.timeout
        body = b""
        while chunk := response.read1(65536):
            body += chunk
            if len(body) > MAX_RESPONSE_BYTES:
                raise ValueError(
                    f"scorer {self.name} answered more than {MAX_RESPONSE_BYTES} bytes; expected its scores"
                )
            if time.monotonic() > deadline:
                raise TimeoutError(f"no whole answer within {self.timeout} s")
        if response.length:
            raise http.client.IncompleteRead(body, response.length)
        return body


def _scores(answer: bytes, num_images: int, name: str) -> list[float]:
    try:
        parsed = json.loads(answer, parse_int=float)
    except ValueError as error:
        raise ValueError(f"scorer {name} answered something that is not JSON: {answer[:80]!r}") from error
    scores = parsed.get("scores") if isinstance(parsed, dict) else None
    if not isinstance(scores, list) or not all(isinstance(score, float) for score in scores):
        raise ValueError(f'scorer {name} answered {answer[:80]!r}; expected {{"scores": [number, ...]}}')
    if len(scores) != num_images:
        raise ValueError(f"scorer {name} answered {len(scores)} scores for {num_images} images")
    if bad := [i for i, score in enumerate(scores) if not abs(score) <= torch.finfo(torch.float32).max]:
        raise ValueError(
            f"scorer {name} answered NaN, infinity or more than float32 holds for images {bad} of the batch"
        )
    return scores
