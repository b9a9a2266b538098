"""Keep other libraries' logs and bars off the terminal: what a run has to say is one line of ours."""

import logging
import os
import sys
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager


def hush() -> None:
    """Errors only from diffusers, transformers, Ray Data, Ray Train and MLflow; their progress bars off."""
    import diffusers
    import transformers

    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()
    for name in ("ray", "ray.data", "ray.train", "mlflow", "alembic"):
        logging.getLogger(name).setLevel(logging.ERROR)
    # Ray and MLflow warn of their own coming changes on every import.
    for module in ("ray", "mlflow", "diffusers", "transformers"):
        warnings.filterwarnings("ignore", category=FutureWarning, module=module)
        warnings.filterwarnings("ignore", category=DeprecationWarning, module=module)


@contextmanager
def held_stderr() -> Iterator[None]:
    """Hold back what the block writes to file descriptor 2, C++ included; it is printed if the block raises."""
    with tempfile.TemporaryFile() as held:
        sys.stderr.flush()
        original = os.dup(2)
        os.dup2(held.fileno(), 2)
        try:
            yield
        except BaseException:
            held.seek(0)
            os.write(original, held.read())
            raise
        finally:
            sys.stderr.flush()
            os.dup2(original, 2)
            os.close(original)
