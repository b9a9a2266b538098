"""`python guarded_mlflow.py FOLDER`: MLflow's server, with its own stores in FOLDER, behind a user and a password.

Prints its port when it listens. A process of its own, because server and client share MLflow's globals within one.
"""

import base64
import os
import sys
from collections.abc import Callable, Iterable

from mlflow.server import constants
from werkzeug.exceptions import Unauthorized
from werkzeug.serving import make_server

USER, PASSWORD = "trainer", "secret"


def guarded(environ: dict, start: Callable) -> Iterable[bytes]:
    from mlflow.server import app

    wanted = "Basic " + base64.b64encode(f"{USER}:{PASSWORD}".encode()).decode()
    return (app if environ.get("HTTP_AUTHORIZATION") == wanted else Unauthorized())(environ, start)


if __name__ == "__main__":
    folder = sys.argv[1]
    os.environ[constants.BACKEND_STORE_URI_ENV_VAR] = f"sqlite:///{folder}/mlflow.db"
    os.environ[constants.ARTIFACT_ROOT_ENV_VAR] = "mlflow-artifacts:/"
    os.environ[constants.ARTIFACTS_DESTINATION_ENV_VAR] = f"{folder}/artifacts"
    os.environ[constants.SERVE_ARTIFACTS_ENV_VAR] = "true"
    server = make_server("127.0.0.1", 0, guarded, threaded=True)
    print(server.server_port, flush=True)
    server.serve_forever()
