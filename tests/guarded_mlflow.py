"""`python guarded_mlflow.py FOLDER`: MLflow's server with its own basic-auth app, as `mlflow server` runs it.

Stores lie in FOLDER. Prints its port when it listens. Whoever is logged in may read; `TRAINER` and `READER` have no
other rights, so each may change what it has made itself. A process of its own, because server and client share
MLflow's globals within one.
"""

import os
import sys
from functools import partial
from pathlib import Path

USERS = TRAINER, READER = ("trainer", "trainer's secret"), ("reader", "reader's secret")
SETTINGS = """[mlflow]
default_permission = READ
database_uri = sqlite:///{folder}/users.db
admin_username = admin
admin_password = admin's secret
authorization_function = mlflow.server.auth:authenticate_request_basic_auth
"""


def main(folder: Path) -> None:
    (folder / "auth.ini").write_text(SETTINGS.format(folder=folder))
    os.environ |= {"MLFLOW_AUTH_CONFIG_PATH": str(folder / "auth.ini"), "MLFLOW_FLASK_SERVER_SECRET_KEY": "static"}
    from mlflow.server import constants

    os.environ |= {
        constants.BACKEND_STORE_URI_ENV_VAR: f"sqlite:///{folder}/mlflow.db",
        constants.ARTIFACT_ROOT_ENV_VAR: "mlflow-artifacts:/",
        constants.ARTIFACTS_DESTINATION_ENV_VAR: f"{folder}/artifacts",
        constants.SERVE_ARTIFACTS_ENV_VAR: "true",
    }
    from mlflow.server import auth
    from mlflow.server.auth import sqlalchemy_store
    from werkzeug.security import generate_password_hash
    from werkzeug.serving import make_server

    # A password is checked at every request: werkzeug's own hash is meant to take a tenth of a second.
    sqlalchemy_store.generate_password_hash = partial(generate_password_hash, method="pbkdf2:sha256:1000")
    app = auth.create_app()
    for name, password in USERS:
        auth.store.create_user(name, password)
    server = make_server("127.0.0.1", 0, app, threaded=True)
    print(server.server_port, flush=True)
    server.serve_forever()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
