"""MLflow's webhooks: signed hints that something in the registry has changed.

A webhook carries no bearer token. MLflow signs what it sends with the webhook's secret, which is also in this server's
environment, and not in its settings: those are shown by dashboards and stored by clusters.
"""

import base64
import hashlib
import hmac
import os
import re
import time
from collections.abc import Mapping

SECRET = "CRAFTOR_WEBHOOK_SECRET"
SECONDS = 300
"""An older message may be one that somebody recorded."""


def from_mlflow(headers: Mapping[str, str], body: bytes) -> bool:
    """Whether a message is MLflow's, signed with the secret that we know, and new."""
    secret, sent = os.environ.get(SECRET), headers.get("X-MLflow-Timestamp", "")
    if not secret or not re.fullmatch(r"\d{1,12}", sent) or abs(time.time() - int(sent)) > SECONDS:
        return False
    content = f"{headers.get('X-MLflow-Delivery-Id', '')}.{sent}.".encode() + body
    digest = base64.b64encode(hmac.new(secret.encode(), content, hashlib.sha256).digest())
    return hmac.compare_digest(headers.get("X-MLflow-Signature", "").encode(), b"v1," + digest)
